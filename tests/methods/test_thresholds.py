"""Thresholds of whole tensors against a plain sort, however the tensor is cut and whatever its values tie on."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.deltas import Cut, deltas

from paft_merge.compute import blocks, kernels
from paft_merge.compute.blocks import Block, KeepThreshold
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.histogram import l1_of_bins, squares_of_bins
from paft_merge.methods.rules import threshold_bounds, thresholds
from paft_merge.methods.rules.threshold_bounds import largest
from paft_merge.methods.rules.thresholds import Rescale, Trim, kept_count, trim_survivals


def mask(delta: np.ndarray, survival: KeepThreshold) -> np.ndarray:
    """The entries that survive, read off the definition."""
    size, at = np.abs(delta).view(np.uint32), np.arange(delta.size)
    passes = (size > survival.low) | ((size == survival.low) & (at < survival.low_cut))
    outlier = (size > survival.high) | ((size == survival.high) & (at < survival.high_cut))
    return passes & ~outlier & (delta != 0)


def wanted(delta: np.ndarray, trim: Trim) -> np.ndarray:
    """The entries that should survive, by sorting."""
    size = np.abs(delta.astype(np.float64))
    order = np.lexsort((np.arange(delta.size), -size))
    if trim.rule == "density":
        chosen = order[: kept_count(delta.size, trim.value)]
    elif trim.rule == "epsilon":
        chosen = np.flatnonzero(size > np.float32(trim.value))
    elif trim.rule == "l1_mass":
        held = np.cumsum(size[order])
        chosen = order[: np.searchsorted(held, trim.value * held[-1] * (1 - 1e-12)) + 1]
    else:
        count, top = int(trim.value * delta.size), int(trim.gamma * delta.size)
        dropped = delta.size - max(0, delta.size - count - top) - count
        chosen = order[dropped : dropped + count]
    found = np.zeros(delta.size, bool)
    found[chosen] = True
    return found & (delta != 0)


PAIRS = [
    (Trim("density", 0.2), Trim("density", 0.6)),
    (Trim("l1_mass", 0.9), Trim("l1_mass", 0.3)),
    (Trim("epsilon", 1e-3), Trim("density", 0.01)),
    (Trim("outliers", 0.5, 0.1), Trim("outliers", 0.9, 0.2)),
    (Trim("density", 0.0), Trim("density", 1.0)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(f"{t.rule}{t.value:g}" for t in pair))
@pytest.mark.parametrize("kind", ["smooth", "ties", "sparse", "sorted"])
@pytest.mark.parametrize(("size", "tile"), [(1, 10), (7, 3), (4_000, 4_000), (100_000, 3_000)])
@pytest.mark.parametrize("rescale", ["none", "l1", "l2"])
def test_survivors_are_those_of_a_sort(
    pair: tuple[Trim, Trim], kind: str, size: int, tile: int, rescale: Rescale
) -> None:
    values = deltas(kind, size)
    survivals = trim_survivals(pair, size, Cut(values, tile), CpuOps(), rescale=rescale)
    for delta, trim, survival in zip(values, pair, survivals, strict=True):
        expected = wanted(delta, trim)
        np.testing.assert_array_equal(mask(delta, survival), expected)
        if rescale != "none" and np.abs(delta[expected]).sum() > 1e-7:
            norms = [np.linalg.norm(some.astype(np.float64), int(rescale[1])) for some in (delta, delta[expected])]
            assert survival.scale == pytest.approx(norms[0] / norms[1], rel=1e-12)


@pytest.mark.parametrize("rescale", ["l1", "l2"])
@pytest.mark.parametrize("trim", [Trim("density", 0.2, soft=True), Trim("epsilon", 1e-3, soft=True)])
def test_soft_thresholds_are_rescaled_after_they_shrink(rescale: Rescale, trim: Trim) -> None:
    (delta, _) = values = deltas("smooth", 20_000)
    survival, _ = trim_survivals([trim, trim], 20_000, Cut(values, 1_000), CpuOps(), rescale=rescale)
    shrunk = np.abs(delta[mask(delta, survival)].astype(np.float64)) - survival.shrink
    norms = [np.linalg.norm(some, int(rescale[1])) for some in (delta.astype(np.float64), shrunk)]
    assert survival.scale == pytest.approx(norms[0] / norms[1], rel=1e-10)


def test_a_threshold_takes_two_passes_where_a_sample_can_be_trusted() -> None:
    each = Cut(deltas("smooth", 400_000), 10_000)
    trim_survivals([Trim("density", 0.2), Trim("density", 0.5)], 400_000, each, CpuOps())
    assert each.reads == 1  # one pass collects (the sample reads a sixteenth), the merge itself is the other


def test_a_sample_that_misleads_costs_two_passes_and_no_bit() -> None:
    values = deltas("smooth", 400_000)
    values.reshape(2, -1, 10_000)[:, :, :700] *= np.float32(0.01)  # just what the sample looks at
    each = Cut(values, 10_000)
    survivals = trim_survivals([Trim("density", 0.2)] * 2, 400_000, each, CpuOps())
    assert each.reads == 3
    for delta, survival in zip(values, survivals, strict=True):
        np.testing.assert_array_equal(mask(delta, survival), wanted(delta, Trim("density", 0.2)))


@pytest.mark.parametrize("rescale", ["l1", "l2"])
@pytest.mark.parametrize("kind", ["smooth", "ties", "sparse"])
def test_a_global_threshold_keeps_what_the_paper_keeps(kind: str, rescale: Rescale) -> None:
    values = deltas(kind, 30_000)
    trims = [Trim("density", 0.2), Trim("l1_mass", 0.8)]
    survivals = thresholds.trim_globally(trims, 30_000, Cut(values, 1_000), CpuOps(), rescale=rescale)
    for delta, trim, survival in zip(values, trims, survivals, strict=True):
        size = np.abs(delta)
        expected = (size >= size[wanted(delta, trim)].min()) & (size > 0)  # the k-th largest, and every tie of it
        np.testing.assert_array_equal(mask(delta, survival), expected)
        norms = [np.linalg.norm(some.astype(np.float64), int(rescale[1])) for some in (size, size[expected])]
        assert survival.scale == pytest.approx(norms[0] / norms[1], rel=1e-12)


def test_norms_of_bins_are_exact() -> None:
    values = deltas("smooth", 50_000)
    values[0, :3] = [1e-40, 3e38, 0.0]
    block = Block(0, np.zeros(0, np.uint32), values.view(np.uint32), False)
    counts, sums = CpuOps().histogram(block, 2)
    for i in range(2):
        wide = np.abs(values[i].astype(np.float64))
        norms = l1_of_bins(counts[i], sums[i, : kernels.BINS])
        assert norms.sum() == pytest.approx(wide.sum(), rel=1e-14)
        assert squares_of_bins(counts[i], sums[i]).sum() == pytest.approx((wide**2).sum(), rel=1e-14)
    last = np.flatnonzero(counts[1])[-1]  # the bin of the largest
    inside = wide[(np.abs(values[1]).view(np.uint32) >> 16) == last]
    less = squares_of_bins(counts[1], sums[1], float(inside.min()))[last]
    assert less == pytest.approx(((inside - inside.min()) ** 2).sum(), rel=1e-8)


def test_kept_counts() -> None:
    cases = {(5, 0.1): 1, (5, 0.4): 2, (5, 1.0): 5, (5, 2.0): 5, (5, 0.0): 0, (0, 0.5): 0, (10, 0.99): 9}
    assert {case: kept_count(*case) for case in cases} == cases


def test_tiles_cover_a_tensor_in_whole_rows() -> None:
    for numel, row in ((1, 1), (blocks.TILE * 3 + 5, 1), (7 * 4096 * 300, 4096), (2 * 10_000_000, 10_000_000)):
        bounds = blocks.tile_bounds(numel, row)
        assert bounds[0][0] == 0
        assert bounds[-1][1] == numel
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        assert all(start % row == 0 for start, _ in bounds)
    assert blocks.tile_bounds(0, 5) == []


def test_a_sample_goes_through_all_columns() -> None:
    # Columns of an adapter's delta differ in size; a step that divides the row would meet the same few in every row and tile.
    rows, row = 8192, 512
    made = np.random.default_rng(0)
    sizes = 1e-3 * made.lognormal(0, 1, row)
    delta = (made.normal(0, 1, (2, rows, row)) * sizes).astype(np.float32).reshape(2, -1)
    each = Cut(delta, tile=1 << 20)
    survivals = trim_survivals([Trim("density", 0.2)] * 2, delta.shape[1], each, CpuOps())
    assert each.reads == 1  # the bracket held the threshold at once
    for values, survival in zip(delta, survivals, strict=True):
        assert mask(values, survival).sum() == int(0.2 * values.size)


@pytest.mark.parametrize("levels", [1, 2, 3, 20])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.6, 0.95])
def test_a_bracket_is_short_where_many_are_equal(levels: int, density: float) -> None:
    # As the differences of bfloat16 checkpoints are: here every magnitude is one of a few.
    size, tile = 1 << 18, 1 << 12
    made = np.random.default_rng(levels).integers(0, levels, (1, size)) + 1
    delta = (made * np.random.default_rng(9).choice([-1, 1], made.shape) * 1e-3).astype(np.float32)
    each = Cut(delta, tile)
    (sample,) = threshold_bounds.draw_sample(each, CpuOps())
    bracket = threshold_bounds.guess_bracket(sample, density)
    assert sample.inside(bracket) < 0.08  # of 64 tiles a few, and not the fifth of all that are equal
    each.reads = 0
    (survival,) = trim_survivals([Trim("density", density)], size, each, CpuOps())
    assert each.reads == 1
    kept = mask(delta[0], survival)
    np.testing.assert_array_equal(
        np.flatnonzero(kept), np.sort(np.argsort(-np.abs(delta[0]), kind="stable")[: int(density * size)])
    )


def test_a_bracket_cuts_at_the_ends_of_blocks() -> None:
    bracket = threshold_bounds.Bracket(low=100, width=11, begin=40, end=60)
    assert [bracket.within(start, start + 20) for start in range(0, 100, 20)] == [
        (100, 10),
        (100, 10),
        (100, 11),
        (101, 10),
        (101, 10),
    ]
    assert bracket.within(30, 70) == (100, 11)
    one = threshold_bounds.Bracket(low=7, width=1, begin=40, end=60)
    assert [one.within(start, start + 20) for start in (20, 40, 60)] == [(7, 0), (7, 1), (8, 0)]


@settings(max_examples=200)
@given(st.integers(1, 20_000), st.integers(1, 2**31), st.data())
def test_the_largest_of_many_numbers(size: int, spread: int, data: st.DataObject) -> None:
    bits = np.random.default_rng(size).integers(0, spread, size).astype(np.uint32)
    if data.draw(st.booleans()):
        bits.sort()
    rank = data.draw(st.integers(1, size))
    value = int(np.sort(bits)[size - rank])
    assert largest(bits, rank) == (value, int((bits > value).sum()), int((bits == value).sum()))


@pytest.mark.parametrize("rank", [1, 5_000, 40_000, 79_999, 80_000])
def test_the_largest_where_the_sample_misleads(rank: int) -> None:
    bits = np.tile(np.arange(20, dtype=np.uint32), 4000)  # every sampled one is equal to the others
    value = int(np.sort(bits)[bits.size - rank])
    assert largest(bits, rank) == (value, int((bits > value).sum()), int((bits == value).sum()))


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
def test_a_few_rows_tell_where_the_threshold_of_a_product_is(spread: float, density: float) -> None:
    # Rows that differ in size by e**spread: a few of them taken anywhere would be off by far more than what is inside here.
    made, misses = np.random.default_rng(int(10 * spread)), 0
    for _ in range(5):
        left = made.normal(0, 1e-2, (1024, 8)) * made.lognormal(0, spread, (1024, 1))
        right = made.normal(0, 1e-2, (8, 257))
        pair = left.astype(np.float32), right.astype(np.float32)
        sample = threshold_bounds.draw_rows(pair)
        bracket = threshold_bounds.guess_bracket(sample, density)
        every = np.sort(np.abs(pair[0] @ pair[1]).reshape(-1).view(np.uint32))
        threshold = every[every.size - int(density * every.size)]
        misses += not bracket.low <= threshold < bracket.low + bracket.width
        assert ((every >= bracket.low) & (every < bracket.low + bracket.width)).mean() < 0.03
        assert sample.inside(bracket) < 0.03
    assert misses <= 1


def test_rows_are_not_sampled_where_there_are_few_or_no_factors() -> None:
    made = np.random.default_rng(0)
    pair = made.normal(size=(200, 4)).astype(np.float32), made.normal(size=(4, 9)).astype(np.float32)
    each = Cut((pair[0] @ pair[1]).reshape(1, -1), 600)

    def sampled(*pairs: Any) -> list[bool]:
        """Whether each sample is of rows, not of tiles."""
        factors = [partial(lambda one: one, pair) for pair in pairs]
        return [not draw().starts for draw in threshold_bounds.samples_of(each, CpuOps(), factors)]

    assert sampled(pair) == [True]
    assert sampled(None) == sampled((pair[0][:100], pair[1])) == sampled() == [False]
