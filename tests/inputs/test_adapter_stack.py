"""`BASE+P+Q` against PEFT, which merges P into the base, loads Q on the result and merges it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from toys.adapters import edit_tensors, llama
from toys.merge import paft
from transformers import AutoModelForCausalLM

import paft_merge
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import PaftMergeError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.deltas import LowRank
from paft_merge.inputs.adapters.stack import AdapterStack
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.recipe import ModelRef

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = ["q_proj", "v_proj", "down_proj"]
P = LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR)
KINDS = {
    "lora": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "o_proj"], use_rslora=True),
    "dora": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=True),
    "saved modules": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj", "norm"]),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]),
}


def adapted(base: Path, config: LoraConfig, out: Path, seed: int) -> Path:
    """Train nothing, but set random factors; save the adapter, and return the merged model's folder."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    folder = out.with_name(f"{out.name}-merged")
    merged.merge_and_unload().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, `p`, and for every kind an adapter made on the base with `p`."""
    folder = tmp_path_factory.mktemp("stack")
    llama().save_pretrained(folder / "base")
    after = adapted(folder / "base", P, folder / "p", 1)
    for seed, (kind, config) in enumerate(KINDS.items()):
        adapted(after, config, folder / kind, seed + 2)
    return folder


def merged(model: Any, base: Path, out: Path) -> dict[str, torch.Tensor]:
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "dtype": "float32"}
    recipe["models"] = [{"model": model, "parameters": {"weight": 1.0}}]
    return load_file(paft_merge.merge(recipe, out).path / "model.safetensors")


def assert_near(got: dict[str, torch.Tensor], folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    assert got.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-6, rtol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_are_added_as_peft_merges_one_after_the_other(made: Path, tmp_path: Path, kind: str) -> None:
    got = merged(f"{made}/base+{made}/p+{made}/{kind}", made / "base", tmp_path / "out")
    assert_near(got, made / f"{kind}-merged")


def test_the_order_matters_where_a_delta_depends_on_the_weight(made: Path, tmp_path: Path) -> None:
    swapped = merged(f"{made}/base+{made}/dora+{made}/p", made / "base", tmp_path / "out")
    expected = load_file(made / "dora-merged" / "model.safetensors")
    assert any(not torch.allclose(swapped[name], tensor, atol=1e-4) for name, tensor in expected.items())


def test_three_adapters_in_the_object_form(made: Path, tmp_path: Path) -> None:
    third = adapted(made / "lora-merged", P, tmp_path / "third", 9)
    paths = [f"{made}/p", f"{made}/lora", {"path": str(tmp_path / "third")}]
    assert_near(merged({"model": f"{made}/base", "lora": paths}, made / "base", tmp_path / "out"), third)


@pytest.mark.parametrize("tying", [True, False])
def test_tied_embeddings_are_those_of_one_merge_after_the_other(tmp_path: Path, tying: bool) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    one = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=tying)
    adapted(tmp_path / "base", one, tmp_path / "one", 1)
    adapted(tmp_path / "base", LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), tmp_path / "two", 2)
    edit_tensors(tmp_path / "two", lambda state: {k: v for k, v in state.items() if "base_layer" not in k})
    merged(f"{tmp_path}/base+{tmp_path}/one", tmp_path / "base", tmp_path / "first")
    expected = merged(f"{tmp_path}/first+{tmp_path}/two", tmp_path / "first", tmp_path / "second")
    got = merged(f"{tmp_path}/base+{tmp_path}/one+{tmp_path}/two", tmp_path / "base", tmp_path / "out")
    assert got.keys() == expected.keys() >= {"lm_head.weight"}
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name


def test_what_depends_on_a_whole_weight_that_was_changed_is_refused(made: Path, tmp_path: Path) -> None:
    config = json.loads((made / "lora" / "adapter_config.json").read_text())
    (tmp_path / "pissa").mkdir()
    (tmp_path / "pissa" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    (tmp_path / "pissa" / "adapter_model.safetensors").hardlink_to(made / "lora" / "adapter_model.safetensors")
    with pytest.raises(PaftMergeError, match=r"starts from the whole weight, which an adapter before it changes"):
        merged(f"{made}/base+{made}/p+{tmp_path}/pissa", made / "base", tmp_path / "out")


def test_manifest_explanation_audit_and_reproduction_name_all_adapters(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    model = "base+p+lora"
    recipe = {"merge_method": "ties", "base_model": "base", "parameters": {"weight": 0.5, "density": 0.5}}
    recipe["models"] = [{"model": model}, {"model": "base+dora"}]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    out = paft_merge.merge(tmp_path / "r.yaml", tmp_path / "out").path
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert [(s["path"], s["kind"]) for s in manifest["sources"]] == [
        ("base", "model"), ("p", "adapter"), ("lora", "adapter"), ("dora", "adapter"),
    ]  # fmt: skip
    assert set(manifest["inputs"][model]["adapter"]) == {"0", "1"}
    assert reproduce(out).identical
    shown = paft("explain", tmp_path / "r.yaml", "--tensor", "model.layers.0.self_attn.q_proj.weight", "--json")
    assert (shown.exit_code, model in shown.output) == (0, True)
    audit = paft_merge.audit(model, "base+dora")
    assert [source.label for source in audit.sources] == ["p+lora", "dora"]
    assert sorted(t.name for t in audit.sources[0].tensors) == sorted(
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    )


def test_the_factors_of_single_adapters_are_freed_when_they_are_one(made: Path) -> None:
    with (
        Checkpoint.open(made / "base") as base,
        Adapter.open(made / "p", base) as p,
        Adapter.open(made / "lora", base) as q,
    ):
        delta = AdapterStack.of([p, q]).deltas["model.layers.0.self_attn.q_proj.weight"]
        assert isinstance(delta, LowRank)
        delta.product(0, 1)
        parts = [one.deltas["model.layers.0.self_attn.q_proj.weight"] for one in (p, q)]
        assert [part.pair.held for part in parts if isinstance(part, LowRank)] == [None, None]


def test_references(tmp_path: Path) -> None:
    ref = ModelRef.parse("a@v+b@w+c+d@x")
    assert ref.adapters == (("b", "w"), ("c", None), ("d", "x"))
    assert (str(ref), ref.written(), ref.base) == ("a@v+b@w+c+d@x", "a@v+b@w+c+d@x", ModelRef("a", "v"))
    odd = ModelRef.parse({"model": "a", "lora": [{"path": "b+1"}, "c@v"]})
    assert odd.adapters == (("b+1", None), ("c", "v"))
    assert ModelRef.parse(odd.written()) == odd != ModelRef.parse({"model": "a", "lora": [{"path": "b+1"}, "c"]})
    for text in ("a + b", "a+ b", "a +b", "a+b + c"):
        with pytest.raises(PaftMergeError, match=r"blanks around '\+' in .*; write BASE\+ADAPTER"):
            ModelRef.parse(text)
    with pytest.raises(PaftMergeError, match="empty path"):
        ModelRef.parse("a+b+")
    with pytest.raises(PaftMergeError, match=r"did you mean me/base\+me/sft\?"):
        paft_merge.hub.fetch("me/base:me/sft")
