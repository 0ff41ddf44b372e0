"""`paft diff` against a plain comparison of whole tensors, and what each kind of difference is called."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_adapter, save_checkpoint
from safetensors.torch import load_file, save_file
from toys.merge import on, paft, tensors_of

from paft_merge import differences
from paft_merge.compute import blocks
from paft_merge.differences import ModelDiff, TensorDifference
from paft_merge.engine.api import merge
from paft_merge.errors import CheckpointError, PaftMergeError

State = dict[str, torch.Tensor]
Q, UP, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
INF, NAN = math.inf, math.nan


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state(dtype: torch.dtype = torch.float32) -> State:
    return {Q: drawn(8, 8, dtype=dtype), UP: drawn(16, 8, seed=1, dtype=dtype), NORM: torch.ones(8, dtype=dtype)}


def written(folder: Path, one: State, other: State, **options: Any) -> ModelDiff:
    save_checkpoint(folder / "a", one)
    save_checkpoint(folder / "b", other)
    return differences.diff(folder / "a", folder / "b", **options)


def by_name(found: ModelDiff) -> dict[str, TensorDifference]:
    return {one.name: one for one in found.tensors}


# --- entries ----------------------------------------------------------------------------------------------------------


def plain(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """The comparison by definition, of whole tensors in float64."""
    one, other = a.double(), b.double()
    unequal = (one != other) & ~(one.isnan() & other.isnan())
    finite = one.isfinite() & other.isfinite()
    delta = torch.where(finite, other - one, 0)
    norm, norm_a = delta.norm().item(), torch.where(one.isfinite(), one, 0).norm().item()
    at = delta.abs().argmax().item()
    return {
        "unequal": int(unequal.sum()), "nonfinite": int((unequal & ~finite).sum()), "norm": norm,
        "relative": norm / norm_a if norm_a else None, "largest": delta.abs().max().item(),
        "at": tuple(int(i) for i in torch.unravel_index(torch.tensor(at), a.shape)),
    }  # fmt: skip


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def test_every_pair_of_types_is_compared_as_whole_tensors_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", 64)  # several blocks a tensor
    one, other = State(), State()
    for i, left in enumerate(DTYPES):
        for j, right in enumerate(DTYPES):
            name = f"t{i}.{j}"
            one[name] = (drawn(21, 13, seed=i) * 3).to(left)
            moved = torch.where(drawn(21, 13, seed=j + 50) > 1, drawn(21, 13, seed=j + 90), 0)
            other[name] = (one[name].double() + moved).to(right)
    found = by_name(written(tmp_path, one, other))
    assert found.keys() == one.keys()
    for name, got in found.items():
        wanted = plain(one[name], other[name])
        assert got.unequal == wanted["unequal"], name
        if not wanted["unequal"]:
            assert got.kind in ("same", "equal")
            continue
        assert got.nonfinite == wanted["nonfinite"]
        assert [got.norm, got.relative] == pytest.approx([wanted["norm"], wanted["relative"]], rel=1e-12), name
        assert (got.largest, got.at) == (wanted["largest"], wanted["at"]), name
    assert sum(one.kind == "same" for one in found.values()) < 12


ENTRIES: dict[str, tuple[Any, Any, torch.dtype, torch.dtype, str]] = {
    "negative zero": ([0.0, 1.0], [-0.0, 1.0], torch.float32, torch.float32, "equal"),
    "the same NaN": ([NAN, 1.0], [NAN, 1.0], torch.float32, torch.float32, "same"),
    "another NaN": ([NAN, 1.0], [-NAN, 1.0], torch.float32, torch.float32, "equal"),
    "NaN in A": ([NAN, 1.0], [1.0, 1.0], torch.float32, torch.float32, "different"),
    "NaN in B": ([1.0, 1.0], [1.0, NAN], torch.float32, torch.float32, "different"),
    "the same infinity": ([INF, 1.0], [INF, 1.0], torch.float32, torch.bfloat16, "equal"),
    "infinities of two signs": ([INF, 1.0], [-INF, 1.0], torch.float32, torch.float32, "different"),
    "too large for half": ([70000.0, 1.0], [INF, 1.0], torch.float32, torch.float16, "different"),
    "exact in bfloat16": ([0.5, 1.0], [0.5, 1.0], torch.float32, torch.bfloat16, "equal"),
    "rounded to bfloat16": ([0.1, 1.0], [0.1, 1.0], torch.float32, torch.bfloat16, "rounded"),
    "rounded from bfloat16": ([0.1, 1.0], [0.1, 1.0], torch.bfloat16, torch.float32, "rounded"),
    "rounded to zero in half": ([1e-9, 1.0], [0.0, 1.0], torch.bfloat16, torch.float16, "rounded"),
    "next value": ([1.0, 2.0], [1.0078125, 2.0], torch.bfloat16, torch.bfloat16, "rounded"),
    "the value after the next": ([1.0, 2.0], [1.015625, 2.0], torch.bfloat16, torch.bfloat16, "different"),
    "the smallest values around zero": ([1e-45, 1.0], [0.0, 1.0], torch.float32, torch.float32, "rounded"),
    "the smallest values of two signs": ([1e-45, 1.0], [-1e-45, 1.0], torch.float32, torch.float32, "different"),
    "a float8 apart": ([1.0, 2.0], [1.125, 2.0], torch.float8_e4m3fn, torch.float8_e4m3fn, "rounded"),
    "integers": ([1, 2], [1, 3], torch.int32, torch.int32, "different"),
    "integers as floats": ([1, 2], [1.0, 2.0], torch.int64, torch.float32, "equal"),
    "integers beyond float64": ([2**60, 1], [2**60 + 1, 1], torch.int64, torch.int64, "different"),
    "huge values": ([1.7e308, 1.0], [-1.7e308, 1.0], torch.float64, torch.float64, "different"),
    "tiny values": ([1e-300, 0.0], [3e-300, 0.0], torch.float64, torch.float64, "different"),
    "empty": ([], [], torch.float32, torch.float32, "same"),
    "empty in another type": ([], [], torch.float32, torch.bfloat16, "equal"),
    "complex": ([1 + 1j, 2], [1 + 2j, 2], torch.complex64, torch.complex64, "different"),
    "equal complex": ([1 + 1j, 2], [1 + 1j, 2], torch.complex64, torch.complex64, "same"),
    "complex and real": ([1, 2], [1, 2], torch.complex64, torch.float32, "different"),
}  # fmt: skip


def test_odd_entries_have_a_kind(tmp_path: Path) -> None:
    one, other = (
        {name.replace(" ", "_"): torch.tensor(row[i], dtype=row[2 + i]) for name, row in ENTRIES.items()}
        for i in (0, 1)
    )
    one["scalar"], other["scalar"] = torch.tensor(1.0), torch.tensor(2.0)
    result = written(tmp_path, one, other)
    found = by_name(result)
    assert {name: found[name.replace(" ", "_")].kind for name in ENTRIES} == {n: row[4] for n, row in ENTRIES.items()}
    assert (found["scalar"].at, found["scalar"].pair) == ((), (1.0, 2.0))
    assert (found["NaN_in_A"].nonfinite, found["NaN_in_A"].norm) == (1, 0.0)
    assert found["integers_beyond_float64"].unequal == 1
    assert found["tiny_values"].norm == pytest.approx(2e-300)
    assert math.isfinite(found["huge_values"].norm or 0)
    json.loads(json.dumps(result.to_json(), allow_nan=False))  # NaN is not JSON


# --- names ------------------------------------------------------------------------------------------------------------


def test_shards_and_order_change_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", state())
    save_checkpoint(tmp_path / "b", dict(reversed(state().items())), shards=3)
    run = paft("diff", tmp_path / "a", tmp_path / "b")
    assert run.exit_code == 0, run.output
    assert "3 tensors: 3 same" in run.output
    assert "same model" in run.output


RENAMES: dict[str, Callable[[str], str]] = {
    "a prefix": lambda name: f"module.{name}",
    "without a prefix": lambda name: name.removeprefix("model."),
    "other words": lambda name: name.replace("self_attn.q_proj", "attention.wq").replace("up_proj", "w3").replace("norm", "n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RENAMES)
def test_renamed_tensors_are_found(tmp_path: Path, kind: str) -> None:
    other = {RENAMES[kind](name): tensor for name, tensor in state().items()}
    for name, held in (("a", state()), ("b", other)):
        save_checkpoint(tmp_path / name, held)
        (tmp_path / name / "config.json").unlink()  # with one, transformers is asked for the names that it knows
    found = differences.diff(tmp_path / "a", tmp_path / "b")
    assert found.kinds == {"renamed": 3}
    assert found.same
    assert {one.name: one.other for one in found.tensors} == dict(zip(state(), other, strict=True))


def test_a_tensor_that_only_one_has_is_not_the_same(tmp_path: Path) -> None:
    found = written(tmp_path, state(), {**{n: t for n, t in state().items() if n != NORM}, "extra.weight": drawn(3)})
    assert not found.same
    kinds = {name: one.kind for name, one in by_name(found).items()}
    assert kinds == {Q: "same", UP: "same", NORM: "only in A", "extra.weight": "only in B"}


def test_two_tensors_that_changed_places_are_named(tmp_path: Path) -> None:
    one = {f"model.layers.{i}.self_attn.q_proj.weight": drawn(8, 8, seed=i) for i in range(3)}
    names = list(one)
    swapped = {**one, names[0]: one[names[1]], names[1]: one[names[0]]}
    found = by_name(written(tmp_path, one, swapped))
    assert {n: (found[n].kind, found[n].other) for n in names} == {
        names[0]: ("moved", names[1]), names[1]: ("moved", names[0]), names[2]: ("same", ""),
    }  # fmt: skip


def test_zeros_that_changed_places_with_values_are_not_called_moved(tmp_path: Path) -> None:
    one = {"a.bias": torch.zeros(4), "b.bias": drawn(4)}
    found = by_name(written(tmp_path, one, {"a.bias": drawn(4), "b.bias": torch.zeros(4)}))
    assert found["a.bias"].kind == "different"


ORDERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "rows": (lambda t: t.flip(-2), "12 of 12 rows moved"),
    "two rows": (lambda t: t[[1, 0, *range(2, 12)]], "2 of 12 rows moved"),
    "columns": (lambda t: t[:, [0, 2, 1, *range(3, 8)]], "2 of 8 columns moved"),
    "transposed": (lambda t: t.T, "transposed"),
    "entries": (lambda t: t.flatten().flip(0).reshape(t.shape), ""),
    "one entry": (lambda t: t.index_fill(0, torch.tensor([0]), 9.0), ""),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_rows_and_columns_in_another_order_are_named(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "TILE", 32)  # several blocks a tensor
    one = {name: drawn(12, 8, seed=i) for i, name in enumerate(ORDERS)} | {
        "vector": drawn(9),
        "experts": drawn(3, 4, 8),
    }
    other = {name: ORDERS[name][0](one[name]) for name in ORDERS}
    other |= {"vector": one["vector"].flip(0), "experts": one["experts"][[2, 0, 1]]}
    found = by_name(written(tmp_path, *({n: t.to(dtype).contiguous() for n, t in s.items()} for s in (one, other))))
    wanted = {name: order for name, (_, order) in ORDERS.items()}
    wanted |= {"vector": "8 of 9 entries moved", "experts": "12 of 12 rows moved"}
    assert {name: got.order for name, got in found.items()} == wanted
    assert {name: got.kind for name, got in found.items()} == {
        name: "permuted" if order else "different" for name, order in wanted.items()
    }
    assert not any(got.harmless for got in found.values())


@pytest.mark.parametrize(
    ("width", "words"), [(40, "largest"), (69, "2 of 12 rows moved"), (80, "2 of 12 rows moved"), (120, "rows moved")]
)
def test_no_width_of_a_terminal_crops_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, words: str
) -> None:
    name = "model.layers.11.mlp.experts.7.down_proj.weight"
    one, other = (
        {name: drawn(12, 8), NORM: torch.ones(3)},
        {name: ORDERS["two rows"][0](drawn(12, 8)), NORM: torch.full((3,), NAN)},
    )
    save_checkpoint(tmp_path / "a", one)
    save_checkpoint(tmp_path / "b", other)
    monkeypatch.setenv("COLUMNS", str(width))
    shown = paft("diff", tmp_path / "a", tmp_path / "b").output
    assert words in shown
    assert "16.67%" in shown
    assert "3 NaN or infinite" in " ".join(shown.split())
    assert "0.00e+00" not in shown, "no finite entry differs"
    assert all(len(line) <= width for line in shown.splitlines()[4:])
    assert (name in shown) == (width != 80) or width == 40


def test_another_shape_is_no_comparison_of_values(tmp_path: Path) -> None:
    found = by_name(written(tmp_path, state(), {**state(), Q: drawn(8, 9)}))
    assert found[Q].kind == "shape"
    assert found[Q].shapes == ((8, 8), (8, 9))
    assert found[Q].norm is None


def test_only_a_pattern_and_a_tolerance(tmp_path: Path) -> None:
    near = {**state(), Q: state()[Q] * 1.001, UP: state()[UP] * 1.1}
    found = written(tmp_path, state(), near, tolerance=0.01)
    assert {one.name: one.kind for one in found.tensors} == {Q: "close", UP: "different", NORM: "same"}
    some = differences.diff(tmp_path / "a", tmp_path / "b", only="*q_proj*", tolerance=0.01)
    assert [one.name for one in some.tensors] == [Q]
    assert some.same
    with pytest.raises(CheckpointError, match="matches no tensor"):
        differences.diff(tmp_path / "a", tmp_path / "b", only="q_proj")


# --- adapters ---------------------------------------------------------------------------------------------------------


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor], **config: Any) -> Path:
    """An adapter with other factors or settings."""
    factors = load_file(folder / "adapter_model.safetensors")
    made = folder.with_name("changed")
    made.mkdir()
    save_file({n: change(n, t).contiguous() for n, t in factors.items()}, made / "adapter_model.safetensors")
    held = json.loads((folder / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps({**held, **config}))
    return made


def test_rescaled_factors_are_the_same_adapter(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "one", state(), 0)
    other = changed(adapter, lambda name, t: t * 3 if "lora_A" in name else t / 3)
    found = differences.diff(adapter, other)
    assert set(found.kinds) == {"different"}
    assert found.deltas is not None
    assert {one.kind for one in found.deltas} == {"same delta"}
    assert found.same


def test_alpha_and_factors_that_cancel_are_the_same_adapter(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "one", state(), 0)
    other = changed(adapter, lambda name, t: t / 2 if "lora_A" in name else t, lora_alpha=16)
    assert differences.diff(adapter, other).same


def test_another_alpha_is_another_adapter(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "one", state(), 0)
    found = differences.diff(adapter, changed(adapter, lambda name, t: t, lora_alpha=16))
    assert set(found.kinds) == {"same"}
    assert not found.same
    assert found.deltas is not None
    assert all(one.relative == pytest.approx(1) for one in found.deltas)
    run = paft("diff", adapter, tmp_path / "changed")
    assert run.exit_code == 3
    assert "lora_alpha: 8 in A, 16 in B\n" in run.output


def test_a_module_that_one_adapter_lacks(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "one", state(), 0)
    other = save_adapter(tmp_path / "two", {Q: state()[Q]}, 0)
    found = differences.diff(adapter, other)
    assert found.deltas is not None
    assert {one.kind for one in found.deltas} == {"same", "only in A"}


def test_an_adapter_and_a_model_are_refused_with_the_way_out(tmp_path: Path) -> None:
    adapter, model = save_adapter(tmp_path / "one", state(), 0), save_checkpoint(tmp_path / "model", state())
    for pair in ((adapter, model), (model, adapter)):
        with pytest.raises(CheckpointError, match=r"compare the model that it makes, `BASE\+"):
            differences.diff(*pair)
    with pytest.raises(PaftMergeError, match="is not a file of tensors that is read here; give the folder"):
        differences.diff(model / "config.json", model)


def test_a_base_with_an_adapter_is_the_merge_but_for_one_rounding(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", state(torch.bfloat16))
    adapter = save_adapter(tmp_path / "one", state(), 0, size=0.3)
    merge({"merge_method": "passthrough", "models": [{"model": on(base, adapter)}]}, tmp_path / "out")
    found = differences.diff(on(base, adapter), tmp_path / "out")
    assert {one.kind for one in found.tensors} == {"rounded", "same"}
    assert not found.changes
    tensors = tensors_of(tmp_path / "out")
    save_checkpoint(tmp_path / "doubled", {**tensors, Q: state()[Q] + 2 * (tensors[Q] - state()[Q])})
    assert by_name(differences.diff(on(base, adapter), tmp_path / "doubled"))[Q].kind == "different"


# --- settings ---------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "a base of RoPE": ({"rope_theta": 1e4}, {"rope_theta": 5e5}, False),
    "a default written out": ({}, {"rms_norm_eps": 1e-6}, True),
    "a version": ({"transformers_version": "4.1"}, {"transformers_version": "5.0"}, True),
    "a type": ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}, True),
    "an end token": ({"eos_token_id": 2}, {"eos_token_id": [2, 7]}, False),
    "a class": ({"architectures": ["LlamaForCausalLM"]}, {"architectures": ["LlamaModel"]}, False),
    "dropout": ({"attention_dropout": 0.0}, {"attention_dropout": 0.1}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_count_where_they_change_the_model(tmp_path: Path, case: str) -> None:
    one, other, same = CONFIGS[case]
    save_checkpoint(tmp_path / "a", state(), config=one)
    save_checkpoint(tmp_path / "b", state(), config=other)
    found = differences.diff(tmp_path / "a", tmp_path / "b")
    assert found.same is same
    assert len(found.changes) == 1
    assert next(iter(other)) in found.changes[0].what


def tokenizer(folder: Path, vocab: dict[str, int], template: str = "", **config: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": []}))
    held = {**config, **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(held))


def test_tokenizers_are_compared_in_words(tmp_path: Path) -> None:
    for name in "ab":
        save_checkpoint(tmp_path / name, state())
    tokenizer(tmp_path / "a", {"x": 0, "y": 1, "old": 2}, "one\ntwo", eos_token="x", add_bos_token=True)
    tokenizer(tmp_path / "b", {"x": 1, "y": 0, "new": 2}, "one\nthree", eos_token="y", add_bos_token=False)
    (tmp_path / "b" / "generation_config.json").write_text('{"temperature": 0.6}')
    text = "\n".join(f"{c.file}: {c.what}" for c in differences.diff(tmp_path / "a", tmp_path / "b").changes)
    for words in (
        "tokens: only A has 1 token: 'old'", "tokens: only B has 1 token: 'new'", "another id in B have 2 tokens",
        'eos_token: "x" in A, "y" in B', "the template differs from line 2 on", "add_bos_token: true in A, false in B",
        "generation_config.json: temperature is only in B: 0.6",
    ):  # fmt: skip
        assert words in text, text


def test_other_forms_of_one_tokenizer_are_the_same(tmp_path: Path) -> None:
    for name, merges, more in (
        ("a", [["x", "y"], ["xy", "z"]], {}),
        ("b", ["x y", "xy z"], {"extra_special_tokens": {}}),
    ):
        save_checkpoint(tmp_path / name, state())
        tokenizer(tmp_path / name, {"x": 0, "y": 1}, "one")
        held = json.loads((tmp_path / name / "tokenizer.json").read_text())
        held["model"]["merges"] = merges
        (tmp_path / name / "tokenizer.json").write_text(
            json.dumps(dict(sorted(held.items(), reverse=name == "a")), indent=3)
        )
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    found = differences.diff(tmp_path / "a", tmp_path / "b")
    assert found.same
    assert [change.counts for change in found.changes] == [False]
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    with pytest.raises(PaftMergeError, match=r"tokenizer.json of B: is not JSON"):
        differences.diff(tmp_path / "a", tmp_path / "b")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_the_worst_first(tmp_path: Path) -> None:
    other = {**state(), Q: state()[Q] * 2, UP: state()[UP].bfloat16()}
    written(tmp_path, state(), other)
    run = paft("diff", tmp_path / "a", tmp_path / "b")
    assert run.exit_code == 3
    lines = run.output.splitlines()
    assert "3 tensors: 1 different, 1 rounded, 1 same" in lines
    places = [next(i for i, line in enumerate(lines) if line.startswith(kind)) for kind in ("different", "rounded")]
    assert places == sorted(places)
    assert "1.00e+00" in lines[places[0]]
    data = json.loads(paft("diff", tmp_path / "a", tmp_path / "b", "--json").output)
    assert data["same"] is False
    assert data["kinds"] == {"different": 1, "rounded": 1, "same": 1}


def test_in_80_columns_names_have_a_line_and_lose_their_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = f"model.layers.11.{'mixture.' * 6}up_proj.weight"
    save_checkpoint(tmp_path / "a", {Q: drawn(8, 8), UP: drawn(8, 8, seed=1), long: drawn(8, 8, seed=2)})
    save_checkpoint(tmp_path / "b", {Q: drawn(8, 8, seed=1), UP: drawn(8, 8), long: drawn(8, 8) / 0})
    monkeypatch.setenv("COLUMNS", "80")
    lines = paft("diff", tmp_path / "a", tmp_path / "b", "--quiet").output.splitlines()
    assert max(map(len, lines[2:])) <= 80
    assert any(line.split()[:2] == ["moved", Q] for line in lines)
    assert any(line.strip() == f"B: {UP}" for line in lines)
    assert any("model.layers.11" in line and "…" in line and "up_proj.weight" in line for line in lines)
    assert any(line.strip() == "64 NaN or infinite" for line in lines)
    monkeypatch.setenv("COLUMNS", "240")
    assert long in paft("diff", tmp_path / "a", tmp_path / "b", "--quiet").output


def test_at_most_forty_rows_without_all(tmp_path: Path) -> None:
    one = {f"model.layers.{i}.bias": drawn(4, seed=i) for i in range(50)}
    written(tmp_path, one, {name: tensor * 2 for name, tensor in one.items()})
    run = paft("diff", tmp_path / "a", tmp_path / "b")
    assert run.output.count("model.layers") == 40
    assert "and 10 more (--all shows them)" in run.output
    assert paft("diff", tmp_path / "a", tmp_path / "b", "--all").output.count("model.layers") == 50


def test_a_notebook_shows_the_worst_first_and_escapes_names(tmp_path: Path) -> None:
    one = {f"model.layers.{i}.<b>": drawn(4, seed=i) for i in range(50)}
    html = written(tmp_path / "<i>", one, {name: tensor * 2 for name, tensor in one.items()})._repr_html_()
    assert html.count("<tr>") == 41
    assert "50 different" in html
    assert "and 10 more" in html
    assert "&lt;b&gt;" in html
    assert not {"<b>", "<i>"} & set(re.findall(r"<[a-z]+>", html))
    same = written(tmp_path / "same", state(), state())
    assert repr(same).endswith("/same/b', 3 same)")
    assert "are the same: 3 same" in same._repr_html_()
    assert "<table>" not in same._repr_html_()


def test_broken_and_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", state())
    save_checkpoint(tmp_path / "b", state(), shards=2)
    index = tmp_path / "b" / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    del held["weight_map"][Q]
    index.write_text(json.dumps(held))
    run = paft("diff", tmp_path / "a", tmp_path / "b")
    assert run.exit_code == 1
    assert "is not in the index" in run.output
    torch.save(state(), tmp_path / "weights.bin")
    run = paft("diff", tmp_path / "a", tmp_path / "weights.bin")
    assert run.exit_code == 1
    assert "--lazy-unpickle" in run.output
    run = paft("diff", tmp_path / "a" / "model.safetensors", tmp_path / "weights.bin", "--lazy-unpickle")
    assert run.exit_code == 0, run.output
    with pytest.raises(PaftMergeError):
        differences.diff(tmp_path / "a", tmp_path / "nowhere" / "at" / "all")


# --- further forms ----------------------------------------------------------------------------------------------------


def test_the_file_of_an_adapter_is_the_adapter(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "one", state(), 0)
    assert differences.diff(adapter / "adapter_model.safetensors", adapter).of_adapters


def test_a_model_and_itself(tmp_path: Path) -> None:
    base, adapter = save_checkpoint(tmp_path / "base", state()), save_adapter(tmp_path / "one", state(), 0)
    assert differences.diff(base, base).kinds == {"same": 3}
    assert differences.diff(on(base, adapter), on(base, adapter)).same
    found = by_name(differences.diff(base, on(base, adapter)))
    assert {found[Q].kind, found[UP].kind, found[NORM].kind} == {"different", "same"}


def test_a_pattern_that_only_the_files_of_adapters_match(tmp_path: Path) -> None:
    adapter, other = save_adapter(tmp_path / "one", state(), 0), save_adapter(tmp_path / "two", state(), 1)
    assert len(differences.diff(adapter, other, only="*q_proj*").tensors) == 2
    with pytest.raises(CheckpointError, match="matches no tensor"):
        differences.diff(adapter, other, only="*k_proj*")


def test_a_dora_adapter_is_compared_by_its_files(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "one", {Q: state()[Q]}, 0)
    factors = load_file(adapter / "adapter_model.safetensors")
    stem = next(iter(factors)).rpartition(".lora_")[0]
    save_file({**factors, f"{stem}.lora_magnitude_vector": torch.ones(8)}, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    found = differences.diff(adapter, changed(adapter, lambda name, t: t * 2))
    assert found.deltas is None
    assert not found.same
    assert any("DoRA" in warning.what for warning in found.warnings)


def test_a_tied_head_that_one_stores_is_not_a_difference(tmp_path: Path) -> None:
    from toys.mergekit import CONFIG, llama_state

    full = llama_state(0)
    tied = {name: tensor for name, tensor in full.items() if name != "lm_head.weight"}
    config = {**CONFIG, "tie_word_embeddings": True}
    save_checkpoint(tmp_path / "a", tied, config=config)
    copy = {**tied, "lm_head.weight": tied["model.embed_tokens.weight"].clone()}
    save_checkpoint(tmp_path / "b", copy, config=config)
    save_checkpoint(tmp_path / "c", {**tied, "lm_head.weight": full["lm_head.weight"] + 1}, config=config)
    for pair in (("a", "b"), ("b", "a")):
        found = differences.diff(*(tmp_path / name for name in pair))
        assert found.same, found.kinds
    assert not differences.diff(tmp_path / "a", tmp_path / "c").same


def test_layers_that_loaders_pass_over_are_compared(tmp_path: Path) -> None:
    from toys.mergekit import CONFIG, llama_state

    save_checkpoint(tmp_path / "a", llama_state(0), config=CONFIG)
    save_checkpoint(tmp_path / "b", {**llama_state(0), "mtp.fc.weight": drawn(4, 4)}, config=CONFIG)
    for pair, kind in ((("a", "b"), "only in B"), (("b", "a"), "only in A")):
        assert by_name(differences.diff(*(tmp_path / name for name in pair)))["mtp.fc.weight"].kind == kind
