"""`output: {kind: adapter}`: the merged delta as a LoRA, equal to the merged checkpoint as far as the rank allows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near, save_checkpoint
from safetensors.torch import load_file
from toys.adapters import merged_by_us
from toys.merge import WEIGHT_SPACE, bits_equal, on, recipe, recipe_for, tensors_of

from paft_merge import merge
from paft_merge.errors import MergeError
from paft_merge.methods import METHODS

Family = Callable[..., dict[str, Path]]
LINEAR = {
    "task_arithmetic": ("task_arithmetic", {"weight": [0.7, -0.4]}, {}),
    "lambda and normalize": ("task_arithmetic", {"weight": [2.0, 1.0]}, {"normalize": True, "lambda": 0.6}),
    "gradients and filters": (
        "task_arithmetic",
        {"weight": [[0.1, 0.9], [{"filter": "q_proj", "value": 0.0}, {"value": 0.3}]]},
        {},
    ),
    "weights by norms": ("task_arithmetic", {"weight": ["equal_norm", 0.5]}, {"weight_scope": "tensor"}),
    "weights by norms of the model": ("task_arithmetic", {"weight": ["equal_norm", 0.5]}, {}),
    "linear": ("linear", {"weight": [0.7, 0.4]}, {}),
    "one source of weight zero": ("task_arithmetic", {"weight": [0.0, 1.0]}, {}),
}


def asked(f: dict[str, Path], method: str, own: dict[str, Any], shared: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A recipe of both adapters of a family."""
    models = [
        {"model": on(f["base"], f[name]), "parameters": {key: values[at] for key, values in own.items()}}
        for at, name in enumerate(("sft", "dpo"))
    ]
    base = {} if method == "linear" else {"base_model": str(f["base"])}
    return {"merge_method": method, **base, "models": models, "parameters": shared, **keys}


def distance(base: Path, dense: Path, adapter: Path) -> tuple[float, float, float]:
    """Frobenius norms of: (base + adapter) - the merged checkpoint; the merged delta; float32 rounding of the checkpoint."""
    whole, made, start = tensors_of(dense), merged_by_us(base, adapter), tensors_of(base)
    assert made.keys() == whole.keys()
    squares = [
        (made[n].double() - whole[n].double(), whole[n].double() - start[n].double(), 1e-7 * whole[n].double())
        for n in whole
    ]
    error, norm, rounding = (
        math.sqrt(math.fsum(float(t.square().sum()) for t in one)) for one in zip(*squares, strict=True)
    )
    return error, norm, rounding


@pytest.mark.parametrize("case", LINEAR)
def test_a_sum_of_deltas_is_exact(case: str, family: Family, tmp_path: Path) -> None:
    f = family()
    method, own, shared = LINEAR[case]
    dense = merge(asked(f, method, own, shared), tmp_path / "dense")
    made = merge(asked(f, method, own, shared, output={"kind": "adapter"}), tmp_path / "out")
    error, norm, rounding = distance(f["base"], dense.path, made.path)
    assert error < 3 * rounding
    assert made.error == 0
    assert made.manifest["adapter"]["norm"] == pytest.approx(norm, rel=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    wanted = 2 if case == "one source of weight zero" else 6
    assert config["r"] == config["lora_alpha"] == wanted == made.manifest["adapter"]["rank"]
    assert config["base_model_name_or_path"] == str(f["base"])
    assert config["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["sum below its rank", "ties", "ties near full rank"])
def test_the_recorded_error_is_the_measured_one(case: str, dtype: str, family: Family, tmp_path: Path) -> None:
    f = family()
    method, rank = ("task_arithmetic", 3) if case == "sum below its rank" else ("ties", 22 if "full" in case else 6)
    shared = {"density": 0.5} if method == "ties" else {}
    one = asked(f, method, {"weight": [0.7, 0.4]}, shared)
    dense = merge(one, tmp_path / "dense")
    made = merge({**one, "out_dtype": dtype, "output": {"kind": "adapter", "rank": rank}}, tmp_path / "out")
    error, norm, rounding = distance(f["base"], dense.path, made.path)
    assert made.error == pytest.approx(error / norm, rel=2e-3, abs=rounding / norm)
    assert made.manifest["adapter"]["norm"] == pytest.approx(norm, rel=1e-5)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}


DELTA_METHODS = [name for name in WEIGHT_SPACE if METHODS[name].base == "required" and METHODS[name].streamed]


@pytest.mark.parametrize("method", DELTA_METHODS)
def test_every_method_that_adds_to_the_base_writes_the_delta_that_a_checkpoint_gets(
    method: str, family: Family, tmp_path: Path
) -> None:
    f = family()
    one = recipe_for(method, f["base"], on(f["base"], f["sft"]), on(f["base"], f["dpo"]))
    dense = merge(one, tmp_path / "dense")
    made = merge({**one, "output": {"kind": "adapter", "rank": 24}}, tmp_path / "out")
    error, _, rounding = distance(f["base"], dense.path, made.path)
    assert error < 3 * rounding


def test_fine_tunes_and_adapters_are_merged_to_one_adapter(family: Family, tmp_path: Path) -> None:
    f = family()
    state = tensors_of(f["base"])
    moved = {n: t if "_proj" in n else state[n] for n, t in near(state, 1).items()}
    tuned = save_checkpoint(tmp_path / "tuned", moved)
    for method, shared in (("ties", {"density": 0.5, "weight": 0.5}), ("linear", {"weight": 0.5})):
        one = recipe(method, f["base"], tuned, on(f["base"], f["sft"]), parameters=shared)
        dense = merge(one, tmp_path / f"{method} dense")
        made = merge({**one, "output": {"kind": "adapter", "rank": 24}}, tmp_path / method)
        error, _, rounding = distance(f["base"], dense.path, made.path)
        assert error < 3 * rounding


def test_threads_and_blocks_change_no_bit(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = family()
    monkeypatch.setattr("paft_merge.compute.blocks.TILE", 24 * 16)
    one = asked(f, "dare_ties", {"weight": [0.7, 0.4]}, {"density": 0.5}, output={"kind": "adapter", "rank": 5})
    found = [tensors_of(merge(one, tmp_path / str(threads), threads=threads)) for threads in (1, 3)]
    assert [n for n in found[0] if not bits_equal(found[0][n], found[1][n])] == []


def test_a_limit_of_the_error_refuses_before_the_output_has_its_name(family: Family, tmp_path: Path) -> None:
    f = family()
    one = asked(f, "ties", {"weight": [0.7, 0.4]}, {"density": 0.5}, output={"kind": "adapter", "rank": 2})
    with pytest.raises(MergeError, match=r"the relative error is 0\.\d+, more than max_error=0\.01") as failed:
        merge(one, tmp_path / "out", max_error=0.01)
    assert failed.value.problems[0].code == "MAX_ERROR"
    assert not (tmp_path / "out").exists()
    made = merge(one, tmp_path / "out", max_error=0.99, resume=True)
    assert 0.01 < (made.error or 0) < 0.99


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_the_rank_is_the_least_that_keeps_an_energy(method: str, energy: float, family: Family, tmp_path: Path) -> None:
    f = family()
    shared = {"density": 0.5} if method == "ties" else {}
    one = asked(f, method, {"weight": [0.7, 0.4]}, shared)
    dense, start = tensors_of(merge(one, tmp_path / "dense")), tensors_of(f["base"])
    values = [torch.linalg.svdvals((dense[n] - start[n]).double()).square() for n in start if "_proj" in n]
    needed = max(int((v.cumsum(0) < (energy - 1e-9) * v.sum()).sum()) + 1 for v in values)
    made = merge({**one, "output": {"kind": "adapter", "rank": "auto", "energy": energy}}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == needed
    assert (made.error or 0) ** 2 <= 1 - energy + 1e-6
