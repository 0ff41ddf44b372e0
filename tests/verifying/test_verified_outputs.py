"""`paft verify` of outputs of every kind: spaces of adapters, several documents, other vocabularies, and what cannot be verified."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from toys.adapters import edit_config, llama, train
from toys.hub import files_of, hub, online
from toys.hub_server import HubServer
from toys.merge import on, paft, recipe, write_recipe
from toys.quantized import CONFIG, coded
from toys.vocabulary import save_tokenizer, vocabulary_family

from paft_merge.engine.api import merge
from paft_merge.errors import EvaluateError, PaftMergeError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.verifying import Behaviour, Verification, likeness, verify

__all__ = ["hub"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*"
)  # PEFT reads a name that transformers renamed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters on it, and the first merged."""
    top = tmp_path_factory.mktemp("world")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, adapter = train(llama(), top, LoraConfig(r=2, target_modules=["q_proj"]))
    shutil.copytree(adapter, top / "other")
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t.flip(0).contiguous() for n, t in factors.items()}, top / "other" / "adapter_model.safetensors")
    merge(of_one(top), top / "merged", write_model_card=False)
    return top


def of_one(top: Path, **more: Any) -> dict[str, Any]:
    return recipe("task_arithmetic", top / "base", (on(top / "base", top / "adapter"), {"weight": 1.0}), **more)


def tensors_only(place: Path, **more: Any) -> Verification:
    return verify(place, tensors_only=True, **more)


@pytest.mark.parametrize(("space", "rank"), [("core", None), ("ctm", 2)])
def test_an_adapter_of_a_space_is_compared_with_the_adapter_of_its_recipe(
    world: Path, tmp_path: Path, space: str, rank: int | None
) -> None:
    wanted = recipe(
        "task_arithmetic", world / "base", *((on(world / "base", world / a), {"weight": 0.6}) for a in ("adapter", "other")),
        space=space, output={"kind": "adapter", **({"rank": rank} if rank else {})},
    )  # fmt: skip
    merge(wanted, tmp_path / "out", write_model_card=False)
    if space == "core":
        found = verify(tmp_path / "out", rows=2, new_tokens=1)
        assert found.ok, found.findings
        assert found.behaviours["recipe"].largest < 1e-5
        assert found.behaviours["adapter"].largest < 1e-5
        assert found.behaviours["base"].largest > 1e-3
        file = write_recipe(tmp_path / "recipe.json", wanted)
        assert tensors_only(tmp_path / "out", recipe=file).ok
    found = tensors_only(tmp_path / "out")
    assert found.ok, found.findings
    assert found.relative_error < 1e-6
    edit_config(
        tmp_path / "out",
        lora_alpha=2 * json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"],
    )
    (one,) = tensors_only(tmp_path / "out").findings
    assert (one.kind, one.what.split(",")[0]) == ("scale", "has 2 times the recipe's update")


def test_a_result_of_several_documents_is_verified_by_their_file(world: Path, tmp_path: Path) -> None:
    base = world / "base"
    first = {**of_one(world), "name": "first"}
    half = recipe("linear", None, ("first", {"weight": 0.5}), (base, {"weight": 0.5}))
    whole = recipe("linear", None, (base, {"weight": 1.0}))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "\n---\n".join(json.dumps(one) for one in (first, {**half, "name": "half"}, {**whole, "name": "whole"}))
    )
    merge(file, tmp_path / "out", write_model_card=False)
    for name in ("half", "whole"):
        assert tensors_only(tmp_path / "out" / name).exact
        assert tensors_only(tmp_path / "out" / name, recipe=file).exact
    run = paft("verify", tmp_path / "out", "--tensors-only")
    assert run.exit_code == 1
    assert "holds several results: 'half', 'whole'; verify each" in run.output
    shutil.copytree(tmp_path / "out" / "half", tmp_path / "third")
    with pytest.raises(PaftMergeError, match="several results: half, whole; choose one"):
        tensors_only(tmp_path / "third", recipe=file)


def test_what_is_not_there_is_said_with_the_way_on(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    run = paft("verify", tmp_path / "out")
    assert run.exit_code == 1
    assert "its merge did not finish" in run.output
    assert "--resume" in run.output
    for name in ("base", "adapter"):
        shutil.copytree(world / name, tmp_path / name)
    merge(of_one(tmp_path), tmp_path / "merged", write_model_card=False)
    shutil.move(tmp_path / "adapter", tmp_path / "elsewhere")
    run = paft("verify", tmp_path / "merged", "--tensors-only")
    assert run.exit_code == 1
    assert "or write a recipe with the sources of now, and pass --recipe recipe.yaml" in run.output


def test_stochastic_rounding_is_noise_and_no_loss(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "tuned")
    state = load_file(world / "base" / "model.safetensors")
    tuned = {n: t + 1e-4 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for n, t in state.items()}
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    wanted = recipe("task_arithmetic", world / "base", (tmp_path / "tuned", {"weight": 1.0}))
    merge({**wanted, "out_dtype": "bfloat16", "rounding": "stochastic"}, tmp_path / "out", write_model_card=False)
    found = tensors_only(tmp_path / "out")
    assert found.ok
    assert "whose noise is" in found.verdict
    (one,) = found.findings
    assert "adds noise of" in one.what
    assert one.fix == "write out_dtype: float32 in the recipe"


def test_a_doubled_scale_that_was_rounded_before_is_named_with_both(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "merged", tmp_path / "out")
    base, state = (load_file(world / name / "model.safetensors") for name in ("base", "merged"))
    twice = {n: (2 * t - base[n]).bfloat16().float() if n.endswith("q_proj.weight") else t for n, t in state.items()}
    save_file(twice, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (one,) = tensors_only(tmp_path / "out").findings
    assert one.kind == "scale"
    assert "has 2 times the recipe's update, rounded to bfloat16 before it was stored as float32" in one.what


def test_each_model_has_the_type_of_its_config_also_when_it_is_read_layer_by_layer(world: Path, tmp_path: Path) -> None:
    merge({**of_one(world), "out_dtype": "bfloat16"}, tmp_path / "out", write_model_card=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    found = [verify(tmp_path / "out", rows=1, new_tokens=1, memory=memory).behaviours for memory in ("1G", "1k")]
    for name in ("recipe", "base"):
        kl = [one[name].kl for one in found]
        assert kl[0] == pytest.approx(kl[1], rel=1e-6), name


def test_hidden_states_that_are_nan_part_at_their_layer() -> None:
    def parted(*drift: float) -> int | None:
        return Behaviour("recipe", 1, None, None, None, None, 0.0, 0.0, 0, {}, drift).breaks_at

    assert parted(0.0, 0.001, float("nan"), float("nan")) == 2
    assert parted(0.001, 0.02, 0.06) is None
    assert parted(0.001, 0.2) == 1


def test_matrices_of_experts_in_another_order_are_named(tmp_path: Path) -> None:
    made = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    folders = [
        save_checkpoint(tmp_path / f"{i}", {"e": one})
        for i, one in enumerate((made, made[[1, 0, 3, 2]], made.roll(1, 2)))
    ]
    with Checkpoint.open(folders[0]) as a, Checkpoint.open(folders[1]) as b, Checkpoint.open(folders[2]) as c:
        reads = [Read("x", checkpoint, "e") for checkpoint in (a, b, c)]
        assert likeness._order((4, 12, 16), reads[1], reads[0]) == "it holds the recipe's matrices in another order"
        assert "columns are shifted by 1: column 1 is the recipe's column 0" in likeness._order(
            (4, 12, 16), reads[2], reads[0]
        )
        assert likeness._order((4, 12, 16), reads[0], reads[0]) == ""


def test_sources_that_are_not_stored_here_are_run_from_what_is_read(
    world: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "adapter"):
        hub.add(f"me/{name}", files_of(world / name))
    wanted = recipe("task_arithmetic", "me/base", (on("me/base", "me/adapter"), {"weight": 1.0}))
    merge(wanted, tmp_path / "out", write_model_card=False)
    hub.add("me/out", files_of(tmp_path / "out"))
    online(monkeypatch, hub.url, tmp_path / "another home")
    found = verify("me/out@main", rows=2, new_tokens=1)
    assert found.exact
    assert not found.skipped
    assert found.behaviours["recipe"].largest == 0
    assert found.behaviours["adapter"].largest < 1e-5
    assert found.behaviours["base"].largest > 1e-3
    missing = paft("verify", "me/out@none")
    assert missing.exit_code == 1
    assert "none" in missing.output


def test_a_base_that_another_document_makes_is_that_model(world: Path, tmp_path: Path) -> None:
    first = {**of_one(world), "name": "first"}
    nothing = recipe("task_arithmetic", "first", (world / "merged", {"weight": 0.5}))
    (tmp_path / "recipe.yaml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(nothing)}")
    merge(tmp_path / "recipe.yaml", tmp_path / "out", write_model_card=False)
    found = verify(tmp_path / "out", rows=2, new_tokens=1)
    assert found.exact
    assert found.behaviours["base"].largest < 1e-5, "the merge adds nothing to its base"


def test_a_quantised_base_is_run_by_its_values(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, _ = train(
            llama(hidden_size=32, intermediate_size=48, head_dim=16),
            tmp_path,
            LoraConfig(r=2, target_modules=["q_proj"]),
        )
    stored, _ = coded({n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()})
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": CONFIG, "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    merge(of_one(tmp_path, quantization="keep"), tmp_path / "out", write_model_card=False)
    found = verify(tmp_path / "out", rows=2, new_tokens=1)
    assert found.ok
    assert "up to the codes" in found.verdict
    assert not found.skipped
    kl = {name: one.kl or 0 for name, one in found.behaviours.items()}
    assert kl["recipe"] == pytest.approx(kl["adapter"], rel=1e-3)
    assert kl["recipe"] < kl["base"]


def tuned(model: Any, top: Path) -> Path:
    """A model, a fine-tune of it, and their merge."""
    model.save_pretrained(top / "base")
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(top / "tuned")
    merge(
        recipe("task_arithmetic", top / "base", (top / "tuned", {"weight": 0.5})), top / "out", write_model_card=False
    )
    return top / "out"


def test_models_without_logits_and_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

    monkeypatch.setenv("COLUMNS", "100")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("text", "pictures"):
        (tmp_path / name).mkdir()
    out = tuned(BertModel(BertConfig(vocab_size=40, max_position_embeddings=32, **small)), tmp_path / "text")
    shown = paft("verify", out, "--rows", "2", "--quiet", "--require", "top1 > 0.5")
    assert shown.exit_code == 2
    assert "there is no top1" in shown.output
    assert "largest" in shown.output
    assert "KL mean" not in shown.output
    text = {**small, "vocab_size": 40, "max_position_embeddings": 8}
    vision = {**small, "image_size": 8, "patch_size": 4}
    out = tuned(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), tmp_path / "pictures")
    found = verify(out, rows=2)
    assert found.exact
    assert "reads pixel_values beside tokens" in found.skipped["recipe"]


# --- tokens -------------------------------------------------------------------------------------------------------------


def test_a_base_with_other_ids_is_not_compared(tmp_path: Path) -> None:
    made = vocabulary_family(tmp_path)
    wanted = recipe("task_arithmetic", made["base"], (made["x"], {"weight": 0.5}), tokenizer_source=str(made["x"]))
    merge(wanted, tmp_path / "out", write_model_card=False)
    found = verify(tmp_path / "out", rows=2, new_tokens=1)
    assert found.exact
    assert found.behaviours["recipe"].largest == 0
    assert "its tokenizer gives other ids to" in found.skipped["base"]
    assert found.prompts == "2 runs of random tokens"


def test_tokens_beyond_the_embeddings_are_said(world: Path, tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        shutil.copytree(world / name, tmp_path / name)
    save_tokenizer(tmp_path / "tokenizer", "base")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "base" / file.name)
    merge(of_one(tmp_path), tmp_path / "out", write_model_card=False)
    (tmp_path / "lines.txt").write_text("the quick brown fox\n")
    found = verify(tmp_path / "out", rows=2, new_tokens=1, data=tmp_path / "lines.txt")
    assert found.ok
    assert [one.kind for one in found.findings] == ["vocabulary"]
    assert "has ids up to 276, and the embeddings have 40 rows" in found.findings[0].what
    assert "its vocabulary of 40 does not have" in found.skipped["recipe"]
    with pytest.raises(EvaluateError, match="has no tokenizer, which data needs"):
        verify(world / "merged", data=tmp_path / "lines.txt")


# --- code ---------------------------------------------------------------------------------------------------------------


def test_code_of_a_folder_runs_only_when_it_is_allowed(world: Path, tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        shutil.copytree(world / name, tmp_path / name)
    ran = tmp_path / "ran"
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (tmp_path / "base" / "modeling_own.py").write_text(code)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    merge(of_one(tmp_path), tmp_path / "without", write_model_card=False)
    merge(of_one(tmp_path), tmp_path / "out", write_model_card=False, trust_remote_code=True)
    refused = paft("verify", tmp_path / "without", "--quiet")
    assert refused.exit_code == 0, refused.output
    assert "pass --trust-code" in refused.output
    assert not ran.exists()
    assert tensors_only(tmp_path / "without", trust_code=True).exact, "its recipe does not copy the code"
    found = verify(tmp_path / "out", rows=2, new_tokens=1, trust_code=True)
    assert ran.exists()
    assert found.exact
    assert found.behaviours["recipe"].largest == 0
