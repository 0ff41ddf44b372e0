"""A merge in one pass is the merge that measures first, bit for bit, whatever ties and whatever the sample says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.deltas import Cut, deltas
from toys.merge import files_of, manifest_of, on, recipe

import paft_merge
from paft_merge.compute import blocks
from paft_merge.compute.blocks import Block, Election, Outcome
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.engine import streaming
from paft_merge.methods.rules import one_pass, threshold_bounds
from paft_merge.methods.rules.consensus import Consensus
from paft_merge.methods.rules.rule import TensorPass
from paft_merge.methods.rules.threshold_bounds import NONE, Bracket
from paft_merge.methods.rules.thresholds import Trim

SIZE, TILE = 40_000, 1024
MEMORY = np.empty(0, np.uint8)
EQUAL = Election((0.5, 0.5))


@pytest.fixture(autouse=True)
def _whatever_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of tiles as small as these are inexact, and many entries stay undecided."""
    monkeypatch.setattr(one_pass, "_MOST_UNDECIDED", 0.9)
    monkeypatch.setattr(one_pass, "_MOST_COPIED", 8.0)


def bases(size: int) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 0.02, size).astype(np.float32).view(np.uint32)


class OnBase(Cut):
    """`Cut` with a base under it."""

    def __call__(self, work, *, sample=False, tiles=None):  # type: ignore[no-untyped-def]
        base = bases(self.bits.shape[1])

        def on_base(block: Block) -> object:
            stop = block.index + block.sources.shape[1]
            return work(Block(block.index, base[block.index : stop], block.sources, False))

        return super().__call__(on_base, sample=sample, tiles=tiles)


def measured(rule: Consensus, walk: TensorPass, out: np.ndarray) -> list[Outcome]:
    combine = rule.prepare(walk, deltas=True)
    return walk.each(lambda b: combine(b, out[b.index : b.index + b.sources.shape[1]], 0))


def settled(rule: Consensus, walk: TensorPass, out: np.ndarray) -> list[Outcome] | None:
    plan = rule.one_pass(walk)
    if plan is None:
        return None
    merged = walk.each(lambda b: (b.index, *plan.merge(b, out[b.index : b.index + b.sources.shape[1]], MEMORY)))
    starts, undecided = [start for start, _, _ in merged], [o for _, _, o in merged]
    survivals = plan.thresholds(starts, undecided)
    if survivals is None:
        return None
    for start, outcome, o in merged:
        plan.resolve(start, o, survivals, out[start : start + TILE], outcome)
    return [outcome for _, outcome, _ in merged]


@pytest.mark.parametrize("kind", ["smooth", "some ties", "ties", "sparse", "sorted"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("out", [np.uint16, np.uint32])
def test_one_pass_merges_as_two_do(kind: str, density: float, out: type) -> None:
    made = deltas(kind, SIZE) if kind != "some ties" else (deltas("smooth", SIZE) * 2e5).round() / np.float32(2e5)
    found = 0
    for elect, normalize in itertools.product(
        ("weighted", "unweighted", "count", "none"), ("weights", "count", "none")
    ):
        trims = (Trim("density", density), Trim("count", 777))
        rule = Consensus(trims, Election((0.6, -0.4), elect, normalize=normalize, factor=1.3))
        walk = TensorPass(SIZE, OnBase(made, TILE), CpuOps(), (0, 1))
        ours, theirs = np.empty(SIZE, out), np.empty(SIZE, out)
        one, two = settled(rule, walk, ours), measured(rule, walk, theirs)
        if one is None:
            continue
        found += 1
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{elect} {normalize}")
        np.testing.assert_array_equal(sum(o.counts[:, :7] for o in one), sum(o.counts[:, :7] for o in two))
        np.testing.assert_allclose(sum(o.sums for o in one), sum(o.sums for o in two), rtol=1e-6)
        assert not any(o.bad for o in one)
    assert found == 12 or kind == "sorted"


def test_a_source_that_keeps_everything_has_no_bracket() -> None:
    made = deltas("smooth", SIZE)
    rule = Consensus((Trim("density", 1.0), Trim("density", 0.3)), Election((0.6, 0.4)))
    walk = TensorPass(SIZE, OnBase(made, TILE), CpuOps(), (0, 1))
    plan = rule.one_pass(walk)
    assert plan is not None
    assert plan.brackets[0] == NONE
    assert plan.brackets[1].width
    ours, theirs = np.empty(SIZE, np.uint16), np.empty(SIZE, np.uint16)
    assert settled(rule, walk, ours)
    measured(rule, walk, theirs)
    np.testing.assert_array_equal(ours, theirs)


def test_a_count_keeps_that_many_however_many_sources_have_one() -> None:
    rule = Consensus((Trim("count", 777), Trim("count", SIZE)), EQUAL)
    walk = TensorPass(SIZE, OnBase(deltas("smooth", SIZE), TILE), CpuOps(), (0, 1))
    counts = sum(o.counts[:, 5] for o in measured(rule, walk, np.empty(SIZE, np.uint32)))
    assert counts.tolist() == [777, SIZE]


@pytest.mark.parametrize(
    "trims",
    [
        (Trim("l1_mass", 0.9), Trim("density", 0.2)),
        (Trim("density", 0.2, soft=True), Trim("density", 0.2)),
        (Trim("outliers", 0.2, 0.01), Trim("density", 0.2)),
        (Trim("density", 1.0), Trim("density", 1.0)),
        (Trim("density", 0.0), Trim("density", 0.2)),
    ],
)
def test_what_no_bracket_can_tell_is_measured_first(trims: tuple[Trim, Trim]) -> None:
    walk = TensorPass(SIZE, OnBase(deltas("smooth", SIZE), TILE), CpuOps(), (0, 1))
    assert Consensus(trims, EQUAL).one_pass(walk) is None
    assert Consensus((Trim("density", 0.2),) * 2, EQUAL, rescale="l1").one_pass(walk) is None


def test_a_bracket_that_misses_says_so() -> None:
    rule = Consensus((Trim("density", 0.2),) * 2, EQUAL)
    walk = TensorPass(SIZE, OnBase(deltas("smooth", SIZE), TILE), CpuOps(), (0, 1))
    plan = rule.one_pass(walk)
    assert plan is not None
    low, width = plan.brackets[0].low, plan.brackets[0].width
    for bracket in (Bracket(low + width, width), Bracket(1, low - 1)):
        off = one_pass.OnePass(plan.ranks, (bracket, plan.brackets[1]), plan.election, CpuOps())
        merged = walk.each(
            lambda b, off=off: (b.index, off.merge(b, np.empty(b.sources.shape[1], np.uint16), MEMORY)[1])
        )
        assert off.thresholds([start for start, _ in merged], [o for _, o in merged]) is None


def spy(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every tensor that is merged in one pass from now on, whether its thresholds were where they had been guessed."""
    used: list[bool] = []
    real: Callable[..., object] = one_pass.OnePass.thresholds

    def spied(self: one_pass.OnePass, *arguments: object) -> object:
        found = real(self, *arguments)
        used.append(found is not None)
        return found

    monkeypatch.setattr(one_pass.OnePass, "thresholds", spied)
    return used


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A base and two fine-tunes with tensors of many small tiles."""
    monkeypatch.setattr(blocks, "TILE", 1 << 10)
    made = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": (torch.randn(120, 64 + i, generator=made) * 0.02).bfloat16() for i in range(4)}
    wide = {name: tensor.float() for name, tensor in base.items()}  # of another type, so that deltas are computed
    states = {"base": base, "x": near(wide, 1), "y": near(wide, 2, 2e-3)}
    return {name: save_checkpoint(tmp_path / name, state) for name, state in states.items()}


@pytest.mark.parametrize("how", ["held", "not held", "missed", "measured"])
def test_the_output_does_not_depend_on_how_it_was_found(
    large: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    asked = recipe(
        "ties",
        large["base"],
        (large["x"], {"weight": 0.6, "density": 0.2}),
        (large["y"], {"weight": 0.4, "density": 0.3}),
    )
    used = spy(monkeypatch)
    reference = files_of(paft_merge.merge(asked, tmp_path / "reference"))
    assert True in used
    used.clear()
    if how == "not held":
        held = streaming._Held
        monkeypatch.setattr(streaming, "_Held", lambda nbytes: held(0))
    if how == "missed":
        monkeypatch.setattr(one_pass, "guess_bracket", lambda sample, share: Bracket(0x7F000000, 16))
    if how == "measured":
        monkeypatch.setattr(streaming, "may_be_held", lambda tensor: False)
    out = files_of(paft_merge.merge(asked, tmp_path / "out"))
    assert used == {"held": used, "not held": used, "missed": [False] * len(used), "measured": []}[how]
    for name, content in reference.items():
        if name.endswith(".safetensors") or how in ("held", "not held"):
            assert out[name] == content, name


def test_adapters_are_merged_from_what_a_few_rows_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", 1 << 10)
    name, base = "model.layers.0.mlp.up_proj.weight", random_state(0, torch.bfloat16, layers=1, width=256)
    adapters = [save_adapter(tmp_path / str(seed), base, seed) for seed in (3, 4)]
    folder = save_checkpoint(tmp_path / "base", base)
    asked = recipe("ties", folder, *((on(folder, a), {"weight": 0.5, "density": 0.2}) for a in adapters))
    drawn, used = [], spy(monkeypatch)
    real = threshold_bounds.draw_rows
    monkeypatch.setattr(threshold_bounds, "draw_rows", lambda pair: drawn.append(real(pair)) or drawn[-1])
    out = files_of(paft_merge.merge(asked, tmp_path / "out"))
    assert used.count(True) > 0.8 * len(used)
    assert len(drawn) == 2 * len(used) > 2
    monkeypatch.setattr(streaming, "may_be_held", lambda tensor: False)
    measured_first = files_of(paft_merge.merge(asked, tmp_path / "measured"))
    assert out["model.safetensors"] == measured_first["model.safetensors"]
    assert manifest_of(tmp_path / "out")["tensors"][name]["sources"]


def test_an_infinite_base_that_is_set_aside_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", 1 << 10)
    monkeypatch.setattr("paft_merge.methods.rules.threshold_bounds._SAMPLE_MARGIN", 0.49)  # so that no bracket misses
    monkeypatch.setattr(one_pass, "_MOST_UNDECIDED", 1.0)
    name, base = "model.layers.0.mlp.up_proj.weight", random_state(0, torch.bfloat16, layers=1, width=33)
    adapter = save_adapter(tmp_path / "sft", base, 3)
    base[name].view(-1)[::5] = torch.inf
    asked = recipe(
        "ties", folder := save_checkpoint(tmp_path / "base", base), (on(folder, adapter), {"weight": 1, "density": 0.5})
    )
    outs = []
    for held in (True, False):
        with monkeypatch.context() as patch:
            if not held:
                patch.setattr(streaming, "may_be_held", lambda tensor: False)
            out = paft_merge.merge(asked, tmp_path / f"out{held}", allow_nonfinite=True)
            outs.append((files_of(out)["model.safetensors"], manifest_of(out)["tensors"][name].get("nonfinite")))
    assert outs[0] == outs[1]
    assert outs[0][1] == len(base[name].view(-1)[::5])
