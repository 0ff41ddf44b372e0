"""Sources with adapters of different PEFT types: merged as float64 arithmetic on their deltas, sliced, explained, audited."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys.adapters import merged_by_peft, train
from toys.merge import on, recipe, same, tensors_of, write_recipe
from toys.peft_types import CASES, opt, wide

from paft_merge import audit, explain, merge, open_plan
from paft_merge.errors import AuditError

PAIRS = [
    ("OFT plain", "VERA plain"),
    ("LOKR plain", "BOFT plain"),
    ("IA3 biases", "ROAD plain"),
    ("HIRA plain", "LN_TUNING plain"),
]
Deltas = dict[str, torch.Tensor]


def family(tmp_path: Path, *names: str) -> tuple[Path, list[Path], dict[str, torch.Tensor], list[Deltas]]:
    """A base, adapters of these cases on it, its tensors, and the deltas that PEFT gives them, in float64."""
    made: list[Path] = []
    deltas: list[Deltas] = []
    make = opt if any(CASES[name].make is opt for name in names) else wide
    for name in names:
        case = CASES[name] if CASES[name].make is make else CASES[f"{name.split()[0]} biases"]
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base, adapter = train(make(), folder, case.config())
        made.append(adapter)
        theirs = merged_by_peft(make, base, adapter, folder / "theirs")
        held = load_file(base / "model.safetensors")
        deltas.append({key: theirs[key].double() - held[key].double() for key in held})
    return base, made, held, deltas


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_task_arithmetic_adds_the_deltas(names: tuple[str, str], tmp_path: Path) -> None:
    base, adapters, held, (one, other) = family(tmp_path, *names)
    sources = [(on(base, adapters[0]), {"weight": 0.7}), (on(base, adapters[1]), {"weight": -0.4})]
    merge(recipe("task_arithmetic", base, *sources, dtype="float32"), tmp_path / "out")
    for key, value in tensors_of(tmp_path / "out").items():
        wanted = held[key].double() + 0.7 * one[key] - 0.4 * other[key]
        assert float((value - wanted).abs().max() / wanted.abs().max()) < 1e-6, key


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_ties_elects_signs_of_the_deltas(names: tuple[str, str], tmp_path: Path) -> None:
    base, adapters, held, (one, other) = family(tmp_path, *names)
    sources = [(on(base, adapter), {"weight": weight}) for adapter, weight in zip(adapters, (0.7, 0.4), strict=True)]
    shared = {"density": 1.0, "normalize": False}
    merge(recipe("ties", base, *sources, dtype="float32", parameters=shared), tmp_path / "out")
    for key, value in tensors_of(tmp_path / "out").items():
        a, b = 0.7 * one[key], 0.4 * other[key]
        sign = torch.where(a + b >= 0, 1.0, -1.0)
        wanted = held[key].double() + a * (a * sign > 0) + b * (b * sign > 0)
        near = (a + b).abs() > 1e-6  # else rounding decides the sign
        assert float(((value - wanted) * near).abs().max() / wanted.abs().max()) < 1e-6, key


def test_slices_take_the_layers_deltas(tmp_path: Path) -> None:
    base, adapters, held, (delta,) = family(tmp_path, "OFT plain")
    parts = [{"sources": [{"model": on(base, adapters[0]), "layer_range": [first, first + 1]}]} for first in (1, 0, 1)]
    merge({"merge_method": "passthrough", "slices": parts, "dtype": "float32"}, tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for place, layer in enumerate((1, 0, 1)):
        name = "model.layers.{}.self_attn.q_proj.weight"
        wanted = held[name.format(layer)].double() + delta[name.format(layer)]
        assert float((merged[name.format(place)] - wanted).abs().max()) < 1e-6


def test_threads_memory_and_tiles_do_not_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters, _, _ = family(tmp_path, "OFT plain", "BOFT plain")
    data = recipe("linear", None, *((on(base, adapter), {"weight": 0.5}) for adapter in adapters), dtype="bfloat16")
    merge(data, tmp_path / "one", threads=1)
    monkeypatch.setattr("paft_merge.compute.blocks.TILE", 64)
    merge(data, tmp_path / "other", threads=3)
    assert same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other"))


def test_explanations_say_what_peft_computes(tmp_path: Path) -> None:
    base, adapters, _, _ = family(tmp_path, "BOFT plain", "IA3 plain")
    sources = [(on(base, adapter), {"weight": 1.0}) for adapter in adapters]
    path = write_recipe(tmp_path / "recipe.yaml", recipe("task_arithmetic", base, *sources))
    with open_plan(path) as plan:
        (found,) = explain(plan, "model.layers.0.self_attn.q_proj.weight")
    assert [source.delta for source in found.sources] == ["boft, computed by PEFT", "ia3"]


def test_an_audit_needs_the_base(tmp_path: Path) -> None:
    base, adapters, _, (delta,) = family(tmp_path, "OFT plain")
    with pytest.raises(AuditError, match="is of type OFT") as caught:
        audit(str(adapters[0]))
    assert [problem.code for problem in caught.value.problems] == ["NO_BASE"]
    found = audit(str(adapters[0]), base=str(base))
    (source,) = found.sources
    changed = sum(bool(value.any()) for value in delta.values())
    assert (source.header.kind, len(source.tensors)) == ("oft", changed)
    norm = sum(float(value.square().sum()) for value in delta.values())
    assert sum(tensor.measure.square for tensor in source.tensors) == pytest.approx(norm, rel=1e-5)
