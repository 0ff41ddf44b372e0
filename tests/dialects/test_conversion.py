"""`paft convert` changes names and layouts, not values: there and back is bit for bit, and every reader gets the delta."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import save_checkpoint
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import adapters, readers
from toys.served import MADE, PREFIX, Q, State, V, base_state, draw, plain, same, wanted, write

from paft_merge.cli import cli
from paft_merge.dialects.checking import check
from paft_merge.dialects.conversion import Target, convert
from paft_merge.dialects.matrices import Matrix
from paft_merge.errors import PaftMergeError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def bits(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def equal(one: Path, other: Path) -> bool:
    ours, theirs = bits(one), bits(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- there and back ---------------------------------------------------------------------------------------------------

LOSSLESS = {
    "plain": "vllm mlx kohya", "rsLoRA": "vllm mlx kohya", "alpha pattern": "kohya", "rank pattern": "kohya",
    "both patterns, one scale": "vllm mlx kohya", "DoRA": "mlx kohya", "pattern of targets": "vllm mlx kohya",
    "null targets": "vllm mlx kohya", "head and embeddings": "vllm mlx", "experts": "vllm mlx kohya", "gpt2": "vllm mlx kohya",
}  # fmt: skip
"""Adapters of PEFT, and the dialects that hold all of them."""


@pytest.mark.parametrize(("made", "to"), [(made, to) for made, several in LOSSLESS.items() for to in several.split()])
def test_there_and_back_is_bit_for_bit(made: str, to: Target, tmp_path: Path) -> None:
    folder = MADE[made](tmp_path / "adapter")
    convert(folder, tmp_path / "there", to)
    assert convert(tmp_path / "there", tmp_path / "back", "peft") == []
    assert equal(folder, tmp_path / "back")
    assert config_of(folder) == config_of(tmp_path / "back")


@pytest.mark.parametrize(("way", "last"), [(("mlx", "kohya", "vllm"), "peft"), (("kohya", "vllm", "mlx"), "peft")])
def test_a_longer_way_back_is_bit_for_bit(way: tuple[Target, ...], last: Target, tmp_path: Path) -> None:
    start = at = MADE["both patterns, one scale"](tmp_path / "adapter")
    for i, to in enumerate((*way, last)):
        convert(at, tmp_path / str(i), to)
        at = tmp_path / str(i)
    assert equal(start, at)
    assert config_of(start) == config_of(at)


def test_an_adapter_of_mlx_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    parts = {f"{Q}.lora_a": (24, 4), f"{Q}.lora_b": (4, 24), "model.layers.0.mlp.switch_mlp.up_proj.lora_a": (3, 4, 24)}
    parts["model.layers.0.mlp.switch_mlp.up_proj.lora_b"] = (3, 16, 4)
    parts |= {"model.embed_tokens.lora_a": (32, 4), "model.embed_tokens.lora_b": (4, 24)}
    save_file({name: draw(*shape).bfloat16() for name, shape in parts.items()}, folder / "adapters.safetensors")
    numbers = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(
        json.dumps({"lora_parameters": numbers, "num_layers": 2, "model": "x/y"})
    )
    convert(folder, tmp_path / "peft", "peft")
    assert config_of(tmp_path / "peft")["lora_alpha"] == 80
    assert config_of(tmp_path / "peft")["base_model_name_or_path"] == "x/y"
    assert "model.layers.0.mlp.experts.2.up_proj" in readers.vllm(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "back", "mlx")
    assert equal(folder, tmp_path / "back")
    assert config_of(tmp_path / "back")["lora_parameters"]["scale"] == 20.0
    assert config_of(tmp_path / "back")["lora_parameters"]["keys"] == ["mlp.switch_mlp.up_proj", "model.embed_tokens", "self_attn.q_proj"]  # fmt: skip


def test_what_is_rounded_is_named(tmp_path: Path) -> None:
    folder = MADE["alpha pattern"](tmp_path / "adapter")
    notes = convert(folder, tmp_path / "out", "vllm")
    assert [note.what for note in notes] == ["the scales of 1 modules were multiplied into their factor B, rounded to F32 in 1 of them"]  # fmt: skip
    exact = write(tmp_path / "exact", plain(), alpha_pattern={"q_proj": 4})
    (note,) = convert(exact, tmp_path / "power", "vllm")
    assert note.what.endswith("exactly")
    convert(tmp_path / "power", tmp_path / "back", "peft")
    assert equal(exact, tmp_path / "back")


def changed(folder: Path, change: Callable[[State], State], **metadata: str) -> None:
    """Change the tensors of a converted adapter, as another program might, and keep or replace its metadata."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        kept = opened.metadata()
    save_file(change(load_file(file)), file, metadata=kept | metadata)


def test_an_adapter_that_was_changed_gets_a_new_configuration(tmp_path: Path) -> None:
    """Its metadata keep the configuration from before its conversion, which is not that of its factors any more."""
    convert(MADE["both patterns, one scale"](tmp_path / "padded"), tmp_path / "there", "vllm")
    changed(tmp_path / "there", lambda state: {name: tensor + 0.5 for name, tensor in state.items()})
    (note,) = convert(tmp_path / "there", tmp_path / "back", "peft")
    assert "a new one was made" in note.what
    assert equal(tmp_path / "there", tmp_path / "back")
    assert (config_of(tmp_path / "back")["r"], config_of(tmp_path / "back")["rank_pattern"]) == (6, {})

    convert(MADE["alpha pattern"](tmp_path / "folded"), tmp_path / "there2", "vllm")
    changed(tmp_path / "there2", lambda state: {name: tensor * 1.1 for name, tensor in state.items()})
    convert(tmp_path / "there2", tmp_path / "back2", "peft")
    assert equal(tmp_path / "there2", tmp_path / "back2")  # dividing by 3/8 and multiplying again would change bits
    assert config_of(tmp_path / "back2")["alpha_pattern"] == {}

    convert(MADE["plain"](tmp_path / "plain"), tmp_path / "there3", "vllm")
    other = {**config_of(tmp_path / "plain"), "use_dora": True}
    changed(tmp_path / "there3", dict, paft_adapter_config=json.dumps(other))
    convert(tmp_path / "there3", tmp_path / "back3", "peft")
    assert config_of(tmp_path / "back3")["use_dora"] is False


# --- what readers get -------------------------------------------------------------------------------------------------

READABLE = (
    "plain", "bare names", "rsLoRA", "alpha pattern", "rank pattern", "both patterns, one scale", "adapter's name", "wrapped twice",
    "pattern of targets", "no targets", "null targets", "head and embeddings", "untargeted head", "experts",
)  # fmt: skip


@pytest.mark.parametrize("made", READABLE)
def test_the_portable_form_has_the_same_delta_for_every_reader(made: str, tmp_path: Path) -> None:
    folder = MADE[made](tmp_path / "adapter")
    convert(folder, tmp_path / "out", "vllm")
    for verdict in check(tmp_path / "out", list(readers.READERS)):
        assert verdict.passes, verdict
        deltas, right = readers.READERS[verdict.reader](tmp_path / "out"), wanted(folder)
        assert deltas.keys() == right.keys()
        for name, delta in deltas.items():
            torch.testing.assert_close(delta, right[name], rtol=1e-5, atol=1e-8)


def test_names_are_put_right_for_peft(tmp_path: Path) -> None:
    right = MADE["plain"](tmp_path / "plain")
    for made in ("bare names", "adapter's name", "wrapped twice"):
        convert(MADE[made](tmp_path / made), tmp_path / f"{made} out", "peft")
        assert equal(right, tmp_path / f"{made} out")
        assert [verdict.outcome for verdict in check(tmp_path / f"{made} out", ["peft"])] == ["loads"]


# --- fused experts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def experts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[], Any], Path, Path]:
    """A class of models with fused experts, a base whose files hold them one by one, and an adapter by PEFT."""
    make = getattr(adapters, str(request.param))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
    return make, *adapters.train(make(), tmp_path_factory.mktemp("experts"), config)


def deltas_of(base: Path, adapter: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The deltas that a merge adds, by tensor."""
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        found = {}
        for name, delta in opened.deltas.items():
            rows = int(np.prod(delta.shape)) // delta.row_size
            out = np.full((rows, delta.row_size), np.nan, np.float32)
            delta.compute(0, rows, np.zeros((rows, delta.row_size), np.float32), out)
            found[name] = out
        return found


def test_fused_experts_are_split_for_vllm_and_come_back(experts: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, base, adapter = experts
    for to in ("vllm", "mlx", "kohya"):
        with Checkpoint.open(base) as opened:
            convert(adapter, tmp_path / to, to, opened)  # type: ignore[arg-type]
            convert(tmp_path / to, tmp_path / f"{to} back", "peft", opened)
        assert equal(adapter, tmp_path / f"{to} back")
        assert config_of(adapter) == config_of(tmp_path / f"{to} back")
    deltas = deltas_of(base, adapter)
    for read in readers.READERS.values():
        found = {f"{path}.weight": delta.numpy() for path, delta in read(tmp_path / "vllm").items()}
        assert found.keys() == deltas.keys()
        assert max(np.abs(found[name] - deltas[name]).max() for name in deltas) < 1e-6


def test_factors_of_experts_are_joined_for_peft(experts: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """Each expert has its own factors, some have none, and they differ in scale and rank."""
    make, base, adapter = experts
    with Checkpoint.open(base) as opened:
        convert(adapter, tmp_path / "several", "vllm", opened)
        tensors = load_file(tmp_path / "several" / "adapter_model.safetensors")
        tensors = {
            n: draw(*t.shape) * (i + 1) / 50 for i, (n, t) in enumerate(tensors.items()) if ".experts.1." not in n
        }
        save_file(tensors, tmp_path / "several" / "adapter_model.safetensors")
        fields = {**config_of(tmp_path / "several"), "alpha_pattern": {r"0\.(up_proj|w3)": 16}}
        (tmp_path / "several" / "adapter_config.json").write_text(json.dumps(fields))
        convert(tmp_path / "several", tmp_path / "joined", "peft", opened)
    before, after = (deltas_of(base, tmp_path / name) for name in ("several", "joined"))
    assert before.keys() <= after.keys()
    for name, delta in after.items():
        assert np.abs(delta - before.get(name, 0)).max() < 1e-6
    merged = adapters.merged_by_peft(make, base, tmp_path / "joined", tmp_path / "peft")
    state = load_file(base / "model.safetensors")
    assert max(float((merged[n] - state[n] - torch.from_numpy(after[n])).abs().max()) for n in after) < 1e-6


def test_the_order_of_old_unsloth_is_put_right(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, adapter = adapters.train(
            adapters.qwen3_moe(), tmp_path, LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=EXPERTS)
        )
    right = deltas_of(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    grouped = {
        n: t if "lora_A" in n else t.reshape(len(t), 2, 12).mT.reshape(t.shape).contiguous() for n, t in tensors.items()
    }
    save_file(grouped, adapter / "adapter_model.safetensors")
    fields = config_of(adapter) | {"lora_B_layout": "grouped_by_expert"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    assert [v.outcome for v in check(adapter, ["peft"])] == ["silent"]
    convert(adapter, tmp_path / "peft", "peft")
    assert [v.outcome for v in check(tmp_path / "peft", ["peft"])] == ["loads"]
    assert torch.equal(load_file(tmp_path / "peft/adapter_model.safetensors")[n := next(iter(tensors))], tensors[n])
    ours = deltas_of(base, tmp_path / "peft")
    assert all(np.array_equal(ours[name], right[name]) for name in right)
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(adapter) | {"lora_B_layout": None, "base_model_name_or_path": "unsloth/x"}))  # fmt: skip
    with pytest.raises(PaftMergeError, match="lora_B_layout"):
        convert(adapter, tmp_path / "unknown", "peft")


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "to", "said"),
    [
        ("DoRA", "vllm", "DoRA"), ("norms", "vllm", "norm.weight"), ("norms", "mlx", "norm.weight"), ("head", "kohya", "lm_head.weight"),
        ("bias", "vllm", "q_proj.bias"), ("half", "peft", "lora_A"), ("fused experts", "vllm", "--base"), ("fused experts", "mlx", "--base"),
        ("head and embeddings", "kohya", "embed_tokens"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused_by_name(made: str, to: Target, said: str, tmp_path: Path) -> None:
    with pytest.raises(PaftMergeError, match=said) as caught:
        convert(MADE[made](tmp_path / "adapter"), tmp_path / "out", to)
    assert {problem.code for problem in caught.value.problems} == {"ADAPTER_UNSUPPORTED"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
        ("peft_type", "VERA"),
        ("odd", 1),
        ("use_bdlora", {"nblocks": 2}),
        ("rank_pattern", {"q_proj": 9}),
    ],
)
def test_variants_without_a_plain_delta_are_refused(field: str, value: object, tmp_path: Path) -> None:
    for to in ("vllm", "mlx", "kohya"):
        with pytest.raises(PaftMergeError):
            convert(write(tmp_path / "a", plain(), **{field: value}), tmp_path / "out", to)  # type: ignore[arg-type]


def test_unknown_tensors_and_other_bases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PaftMergeError, match="lora_C"):
        convert(write(tmp_path / "a", plain() | {f"{PREFIX}{Q}.lora_C.weight": draw(2)}), tmp_path / "out", "peft")
    with Checkpoint.open(save_checkpoint(tmp_path / "base", base_state(16))) as base, pytest.raises(PaftMergeError):
        convert(MADE["plain"](tmp_path / "b"), tmp_path / "out", "vllm", base)
    with pytest.raises(PaftMergeError, match="cannot be multiplied"):
        convert(write(tmp_path / "c", {f"{PREFIX}{Q}.lora_A.weight": draw(3, 4), f"{PREFIX}{Q}.lora_B.weight": draw(4, 4)}), tmp_path / "out", "vllm")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_copies_of_the_base_are_left_out_if_they_are_copies(tmp_path: Path) -> None:
    state = base_state()
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    tensors = plain() | {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": draw(4, 24),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": draw(24, 4),
    }
    folder = write(tmp_path / "a", tensors | {key: state["model.embed_tokens.weight"]})
    with Checkpoint.open(save_checkpoint(tmp_path / "base", state)) as base:
        (note,) = convert(folder, tmp_path / "out", "vllm", base)
        assert note.what == "1 stored weights of the base were left out"
        write(folder, tensors | {key: state["model.embed_tokens.weight"] * 2})
        with pytest.raises(PaftMergeError, match="embed_tokens"):
            convert(folder, tmp_path / "out2", "vllm", base)
    (note,) = convert(folder, tmp_path / "out3", "vllm")
    assert "--base" in note.what


# --- kohya's files ----------------------------------------------------------------------------------------------------


def kohya(place: Path, prefix: str = "lycoris", **changes: torch.Tensor) -> Path:
    """A file as LyCORIS writes it, which does not say which modules it adapts."""
    stem = f"{prefix}_{Q.replace('.', '_')}"
    tensors = {"lora_down.weight": draw(4, 24), "lora_up.weight": draw(24, 4), "alpha": torch.tensor(2.0)}
    save_file(
        {
            f"{stem}.{n}": t
            for n, t in (tensors | {k.replace("_weight", ".weight"): v for k, v in changes.items()}).items()
        },
        place,
    )
    return place


def test_a_foreign_file_of_kohya_needs_the_base_for_its_names(tmp_path: Path) -> None:
    file = kohya(tmp_path / "one.safetensors")
    with pytest.raises(PaftMergeError, match="--base"):
        convert(file, tmp_path / "out", "peft")
    with Checkpoint.open(save_checkpoint(tmp_path / "base", base_state())) as base:
        convert(file, tmp_path / "out", "peft", base)
        assert config_of(tmp_path / "out")["lora_alpha"] == 2
        assert same(readers.vllm(tmp_path / "out"), {Q: draw(24, 4).double() @ draw(4, 24).double() / 2})
    state = {**base_state(), f"{Q.replace('self_attn.q', 'self.attn_q')}.weight": draw(24, 24)}
    with (
        Checkpoint.open(save_checkpoint(tmp_path / "two", state)) as base,
        pytest.raises(PaftMergeError, match="not known"),
    ):
        convert(file, tmp_path / "out2", "peft", base)


def test_names_in_metadata_are_not_trusted_blindly(tmp_path: Path) -> None:
    convert(MADE["plain"](tmp_path / "plain"), tmp_path / "kohya", "kohya")
    flats = {f"lycoris_{path.replace('.', '_')}": Q for path in (Q, V)}  # two modules of one name: one would be lost
    changed(tmp_path / "kohya", dict, paft_modules=json.dumps(flats))
    with pytest.raises(PaftMergeError, match="--base"):
        convert(tmp_path / "kohya", tmp_path / "out", "peft")
    for text in ("[]", "{", '{"a": 1}'):
        changed(tmp_path / "kohya", dict, paft_modules=text, paft_adapter_config=text)
        with pytest.raises(PaftMergeError, match="--base"):
            convert(tmp_path / "kohya", tmp_path / "out", "peft")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_mid_weight": draw(4, 4, 3, 3)}, "not of a plain LoRA"), ({"hada_w1_a": draw(4, 4)}, "not of a plain LoRA"),
        ({"dora_scale": draw(1, 24)}, "DoRA over inputs"), ({"alpha": torch.tensor(torch.nan)}, "alpha"),
        ({"lora_up_weight": draw(24, 3)}, "cannot be multiplied"),
    ],
)  # fmt: skip
def test_other_files_of_kohya_are_refused(changes: State, said: str, tmp_path: Path) -> None:
    with (
        Checkpoint.open(save_checkpoint(tmp_path / "base", base_state())) as base,
        pytest.raises(PaftMergeError, match=said),
    ):
        convert(kohya(tmp_path / "one.safetensors", **changes), tmp_path / "out", "peft", base)


def test_names_of_kohya(tmp_path: Path) -> None:
    for path, prefix in {
        "text_model.encoder.layers.0.q_proj": "lora_te",
        "down_blocks.0.attentions.0.to_q": "lora_unet",
        Q: "lycoris",
    }.items():
        convert(
            write(tmp_path / prefix, plain(path), target_modules=["q_proj", "to_q"]),
            tmp_path / f"{prefix} out",
            "kohya",
        )
        names = load_file(tmp_path / f"{prefix} out" / "lora.safetensors")
        assert f"{prefix}_{path.replace('.', '_')}.lora_down.weight" in names
    twice = write(tmp_path / "twice", plain("a.b_c", "a.b.c"), target_modules=["b_c", "c"])
    with pytest.raises(PaftMergeError, match="underscores"):
        convert(twice, tmp_path / "out", "kohya")
    with pytest.raises(PaftMergeError, match="Flux"):
        convert(write(tmp_path / "flux", plain("transformer_blocks.0.attn.to_q")), tmp_path / "out", "kohya")


# --- the output -------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_the_command_names_its_output_and_its_changes(tmp_path: Path) -> None:
    folder = MADE["rank pattern"](tmp_path / "adapter")
    done = run(folder, tmp_path / "out", "--to", "vllm")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "warning[CONVERTED]: 1 modules were padded with zeros to rank 6" in done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert run(folder, tmp_path / "out", "--to", "vllm").exit_code == 1
    assert run(folder, tmp_path / "out", "--to", "mlx", "--overwrite").exit_code == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapters.safetensors"]
    (folder / "tokenizer.json").write_text("{}")
    assert "other files were not copied: tokenizer.json" in run(folder, tmp_path / "out2", "--to", "peft").stderr


def test_inputs_are_never_replaced(tmp_path: Path) -> None:
    folder = MADE["plain"](tmp_path / "adapter")
    before = bits(folder)
    for out in (folder, folder / "out", tmp_path):
        done = run(folder, out, "--to", "vllm", "--overwrite")
        assert done.exit_code == 1
        assert "error[OUTPUT]" in done.stderr
    assert bits(folder).keys() == before.keys()
    assert sorted(os.listdir(tmp_path)) == ["adapter"]


def test_an_output_that_fails_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reads = MADE["plain"](tmp_path / "adapter"), Matrix.stored.__func__  # type: ignore[attr-defined]

    def failing(cls: type[Matrix], file: Checkpoint, name: str) -> Matrix:
        made: Matrix = reads(cls, file, name)
        return made if V not in name else Matrix(made.dtype, made.shape, lambda: open("/nonexistent/x").read())  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(Matrix, "stored", classmethod(failing))
    assert run(folder, tmp_path / "out", "--to", "vllm").exit_code == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(folder, tmp_path / "out", "--to", "vllm").exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["adapter", "out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_product_with_a_number_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = draw(7, 5).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as file:
        matrix = Matrix.stored(file, "x")
        for factor, exact in ((4.0, True), (1 / 3, False)):
            made, was_exact = matrix.times(factor)
            ours = torch.from_numpy(np.ascontiguousarray(made.read()).view(np.uint8)).view(dtype).reshape(7, 5)
            assert torch.equal(ours, (tensor.double() * factor).to(dtype)) or dtype != torch.float64
            torch.testing.assert_close(ours, (tensor.double() * factor).to(dtype))
            assert was_exact == exact
