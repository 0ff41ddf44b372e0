"""`resize`: the optimal approximation of each delta, in a folder that PEFT loads as it loaded the adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from toys.adapters import (
    edit_config,
    edit_tensors,
    error,
    gpt2,
    gpt_oss,
    llama,
    merged_by_peft,
    merged_by_us,
    opt,
    train,
)
from toys.merge import paft

from paft_merge.engine.resizing import resize
from paft_merge.errors import AdapterError, MergeError, OutputError

TWO = ["q_proj", "down_proj"]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (llama, {"target_modules": TWO, "r": 6, "lora_alpha": 9}),
    "rslora, patterns": (
        llama,
        {
            "target_modules": TWO,
            "r": 6,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"layers.1.mlp.down_proj": 20},
        },
    ),
    "conv1d, embedding": (gpt2, {"target_modules": ["c_attn", "wte"], "r": 6, "fan_in_fan_out": True}),
    "dora, saved": (llama, {"target_modules": ["q_proj"], "r": 6, "use_dora": True, "modules_to_save": ["lm_head"]}),
    "lora_bias": (opt, {"target_modules": ["q_proj", "fc1"], "r": 6, "lora_alpha": 3, "lora_bias": True}),
    "experts": (gpt_oss, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "r": 4}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path, Path]:
    """A kind of adapter: its name, how its model is made, the base and the adapter."""
    make, fields = KINDS[request.param]
    return request.param, make, *train(make(), tmp_path_factory.mktemp("kind"), LoraConfig(**fields))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return train(llama(), tmp_path_factory.mktemp("plain"), LoraConfig(**KINDS["plain"][1]))


def deltas(base: Path, adapter: Path) -> dict[str, Any]:
    """The deltas of an adapter, in float64, one for each matrix."""
    start, merged = load_file(base / "model.safetensors"), merged_by_us(base, adapter)
    found = {n: (merged[n].double() - start[n].double()).numpy() for n in start}
    found = {n: d for n, d in found.items() if d.any()}
    return {f"{n} {i}": m for n, d in found.items() for i, m in enumerate(d if d.ndim == 3 else [d])}


def test_a_rank_that_holds_all_of_it_changes_nothing_for_peft(kind: Any, tmp_path: Path) -> None:
    _, make, base, adapter = kind
    made = resize(adapter, tmp_path / "out", rank=7)
    before, after = (merged_by_peft(make, base, one, tmp_path / f"merged {one.name}") for one in (adapter, made.path))
    assert error(after, before) < 1e-5
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (7, 7, False, {})
    assert made.error < 1e-7


@pytest.mark.parametrize("portable", [True, False])
def test_the_error_is_the_smallest_possible_one(kind: Any, portable: bool, tmp_path: Path) -> None:
    name, _, base, adapter = kind
    if name.startswith("dora"):
        return  # what it adds is not the product of the factors
    made = resize(adapter, tmp_path / "out", rank=2, portable=portable)
    whole, kept = deltas(base, adapter), deltas(base, made.path)
    whole = {n: d for n, d in whole.items() if d.shape[0] > 1 and "bias" not in n}
    lost = math.sqrt(sum(float(np.square(d - kept[n]).sum()) for n, d in whole.items()))
    best = math.sqrt(sum(float(np.square(np.linalg.svd(d, compute_uv=False)[2:]).sum()) for d in whole.values()))
    assert lost == pytest.approx(best, rel=1e-4)
    assert made.error * made.norm == pytest.approx(lost, rel=1e-4)
    assert made.rank == 2


def test_energy_finds_a_rank_for_each_module(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    made = {p: resize(adapter, tmp_path / str(p), energy=0.8, portable=p) for p in (True, False)}
    ranks = [one.rank for one in made[False].modules.values()]
    assert len(set(ranks)) > 1
    assert made[True].rank == made[False].rank == max(ranks)
    assert all(one.error <= math.sqrt(0.2) * one.norm for one in made[True].modules.values())
    one, other = (deltas(base, m.path) for m in made.values())
    assert all(np.allclose(one[n], other[n], atol=1e-6) for n in one)
    shapes = {n: t.shape[0] for n, t in load_file(made[False].path / "adapter_model.safetensors").items() if "_A" in n}
    assert sorted(shapes.values()) == sorted(ranks)
    assert resize(adapter, tmp_path / "most", energy=0.999, max_rank=3).rank == 3


def test_modules_that_are_not_selected_keep_their_factors(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    made = resize(adapter, tmp_path / "out", rank=2, exclude=["layers.1.*"], include=["q_proj"], portable=False)
    whole, kept = deltas(base, adapter), deltas(base, made.path)
    changed = [n for n in whole if not np.allclose(whole[n], kept[n], atol=1e-6)]
    assert changed == ["model.layers.0.self_attn.q_proj.weight 0"]
    assert resize(adapter, tmp_path / "padded", rank=2, include=["q_proj"]).rank == 6
    with pytest.raises(AdapterError, match=r"exclude: no module matches 'qproj'.*are named like 'model\.layers\.0"):
        resize(adapter, tmp_path / "typo", rank=2, exclude=["qproj"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_error_is_that_of_the_stored_type(dtype: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    made = resize(adapter, tmp_path / "out", rank=6, dtype=dtype)
    whole, kept = deltas(base, adapter), deltas(base, made.path)
    lost = math.sqrt(sum(float(np.square(whole[n] - kept[n]).sum()) for n in whole))
    assert made.error * made.norm == pytest.approx(lost, rel=0.01)
    assert {t.dtype for t in load_file(made.path / "adapter_model.safetensors").values()} == {getattr(torch, dtype)}


def test_a_limit_of_the_error_leaves_nothing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"the relative error is 0\.\d+, more than max_error=0\.01"):
        resize(plain[1], tmp_path / "out", rank=1, max_error=0.01)
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[Any, str]] = {
    "another type": (lambda a: (a / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 4, "alpha": 4}'), "only a LoRA has a rank"),
    "pissa": (lambda a: edit_config(a, init_lora_weights="pissa"), "pissa makes the delta depend on the base"),
    "another rank": (lambda a: edit_config(a, r=5), r"has lora_A \(6, 16\).* gives it rank 5"),
    "half a pair": (lambda a: edit_tensors(a, lambda t: {n: x for n, x in t.items() if "0.self_attn.q_proj.lora_A" not in n}), "alone"),
    "no factors": (lambda a: edit_tensors(a, lambda t: {"base_model.model.lm_head.weight": torch.ones(4, 4)}), "no factors"),
    "not finite": (lambda a: edit_tensors(a, lambda t: {n: x * float("nan") for n, x in t.items()}), "NaN"),
    "not there": (lambda a: (a / "adapter_config.json").unlink(), "adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_resized_is_refused(fault: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    spoil, message = REFUSED[fault]
    adapter = Path(shutil.copytree(plain[1], tmp_path / "adapter"))
    spoil(adapter)
    with pytest.raises(AdapterError, match=message):
        resize(adapter, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "either rank or energy"),
        ({"rank": 2, "energy": 0.5}, "either rank or energy"),
        ({"rank": 0}, "rank must be a whole number above 0"),
        ({"energy": 1.5}, "energy is a share"),
        ({"rank": 2, "max_rank": 3}, "needs energy"),
        ({"rank": 2, "dtype": "int8"}, "dtype must be one of bfloat16, float16, float32"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes: Any, message: str, plain: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        resize(plain[1], tmp_path / "out", **sizes)


def test_the_input_is_never_replaced(plain: tuple[Path, Path], tmp_path: Path) -> None:
    for out in (plain[1], plain[1] / "below", plain[1].parent):
        with pytest.raises(OutputError):
            resize(plain[1], out, rank=2, overwrite=True)
    resize(plain[1], tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="exists and is not empty"):
        resize(plain[1], tmp_path / "out", rank=3)
    assert resize(plain[1], tmp_path / "out", rank=3, overwrite=True).rank == 3


def test_the_command_prints_the_errors_and_the_place(plain: tuple[Path, Path], tmp_path: Path) -> None:
    run = paft("resize", plain[1], tmp_path / "out", "--energy", "0.9", "--max-rank", "3", "--no-portable")
    assert run.exit_code == 0, run.output
    assert run.stdout == f"{tmp_path / 'out'}\n"
    assert "model.layers.1.mlp.down_proj" in run.stderr
    run = paft("resize", plain[1], tmp_path / "json", "--rank", "2", "--json", "--dtype", "bfloat16")
    found = json.loads(run.stdout)
    assert found["rank"] == 2
    assert len(found["modules"]) == 4
    assert 0.1 < found["relative_error"] < 0.9
    run = paft("resize", plain[1], tmp_path / "no")
    assert (run.exit_code, "give either rank or energy" in run.output) == (2, True)
