"""The kernels of an audit count what NumPy counts, for any size of a block and any bits."""

from __future__ import annotations

import numpy as np
import pytest

from paft_merge.compute import kernels
from paft_merge.compute.kernels.block_source import FULL

MAGNITUDE = np.uint32(0x7FFFFFFF)
EDGES = np.array([1e-45, 1e-30, 1e-6, 1e-5, 1e-4, 1e-3, 1.0], np.float32).view(np.uint32)


def drawn(size: int, seed: int = 0) -> np.ndarray:
    """Deltas of every kind: normal ones, tiny ones, some zeros of both signs, and equal neighbours."""
    made = np.random.default_rng(seed)
    values = made.standard_normal(size).astype(np.float32) * np.float32(10.0) ** made.integers(-44, 3, size)
    values[made.random(size) < 0.1] = 0.0
    values[made.random(size) < 0.1] = -0.0
    values[1::7] = values[:-1:7] if size > 1 else values[1::7]
    return values.astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 63, 1023, 1024, 1025, 5001])
def test_a_delta_is_measured_as_numpy_measures_it(size: int) -> None:
    values = drawn(size)
    bits, wide = values.view(np.uint32), np.abs(values).astype(np.float64)
    below, packed, sums = np.zeros(len(EDGES), np.int64), np.zeros((2, kernels.BINS), np.int64), np.zeros(2)
    gone, weight, none = np.zeros(1, np.int64), np.zeros(1), np.empty(0, np.uint16)
    largest = kernels.measure(bits, none, EDGES, below, packed[0], sums, gone, weight, kernels.lines(1))
    magnitudes = bits & MAGNITUDE
    assert largest == magnitudes.max()
    assert below.tolist() == [int((magnitudes < edge).sum()) for edge in EDGES]
    np.testing.assert_allclose(sums, [(wide**2).sum(), (wide**4).sum()], rtol=1e-12)
    assert (gone[0], weight[0]) == (0, 0.0)
    into = np.ones((2, 2, kernels.BINS), np.int64)
    kernels.unpack(packed, *into)
    counts = np.bincount(magnitudes >> 16, minlength=kernels.BINS)
    lows = np.bincount(magnitudes >> 16, magnitudes & 0xFFFF, kernels.BINS)
    none_there = np.zeros(kernels.BINS)
    np.testing.assert_array_equal(into - 1, [[counts, none_there], [lows, none_there]])
    assert not packed.any()


@pytest.mark.parametrize(("bits", "count"), [(0x7F7FFFFF, kernels.MOST), (0x3F80FFFF, kernels.MOST), (0xFFFF, 70_000)])
def test_a_bin_holds_as_many_entries_as_a_block_has(bits: int, count: int) -> None:
    delta, packed = np.full(count, bits, np.uint32), np.zeros((1, kernels.BINS), np.int64)
    none, into = np.empty(0, np.uint32), np.zeros((2, 1, kernels.BINS), np.int64)
    kernels.measure(
        delta,
        none,
        none,
        none.view(np.int64),
        packed[0],
        np.zeros(2),
        np.zeros(1, np.int64),
        np.zeros(0),
        kernels.lines(1),
    )
    kernels.unpack(packed, *into)
    assert into[:, 0, bits >> 16].tolist() == [count, count * (bits & 0xFFFF)]
    assert np.count_nonzero(into) == 2


@pytest.mark.parametrize("size", [1, 1023, 1025, 5001])
def test_a_pair_is_compared_as_numpy_compares_it(size: int) -> None:
    left, right = drawn(size), drawn(size, 1)
    a, b = left.astype(np.float64), right.astype(np.float64)
    least, differ = np.minimum(np.abs(a), np.abs(b)), a * b < 0
    edge = np.float32(1e-5)
    counts, sums, shared = np.zeros(4, np.int64), np.zeros(5), np.zeros(4, np.int64)
    kernels.compare(left.view(np.uint32), right.view(np.uint32), edge.view(np.uint32), counts, sums)
    above = least >= edge
    assert counts.tolist() == [(least > 0).sum(), differ.sum(), above.sum(), (above & differ).sum()]
    expected = [a * b, least, least * differ, a * a * differ, b * b * differ]
    np.testing.assert_allclose(sums, [one.sum() for one in expected], rtol=1e-9, atol=1e-12)
    low, cut = np.float32([1e-4, 1e-3]).view(np.uint32), np.array([size // 2, 0])
    kernels.shared_support(left.view(np.uint32), right.view(np.uint32), 0, low, cut, shared)
    place, (u, v) = np.arange(size), (one.view(np.uint32) & MAGNITUDE for one in (left, right))
    in_a, in_b = (u > low[0]) | ((u == low[0]) & (place < cut[0])), v > low[1]
    assert shared.tolist() == [(in_a & in_b).sum(), (in_a | in_b).sum(), in_a.sum(), in_b.sum()]


def test_the_difference_of_any_two_bfloat16_is_erased_where_it_is_zero() -> None:
    made = np.random.default_rng(2)
    base, source = made.integers(0, 1 << 16, (2, 40_000)).astype(np.uint16)
    near = made.random(base.size) < 0.7  # mostly a few steps apart, as fine-tunes are; else any two numbers
    source[near] = base[near] + made.integers(-2, 3, int(near.sum()))
    source[-50:], base[-50:] = 0, 0x8000
    fine = ((base & 0x7F80) < 0x7F00) & ((source & 0x7F80) < 0x7F00)  # finite, and so is the difference
    base, source = base[fine], source[None, fine]
    erased, squares = surveyed(base, source, subtract=True)
    wide, value = ((one.astype(np.uint32) << 16).view(np.float32) for one in (base, source[0]))
    weight, gone, none = np.zeros(1), np.zeros(1, np.int64), np.empty(0, np.uint32)
    deltas, bins = (value - wide).view(np.uint32), np.zeros(kernels.BINS, np.int64)
    kernels.measure(deltas, base, none, none.view(np.int64), bins, np.zeros(2), gone, weight, kernels.lines(1))
    assert erased == gone[0] == int((value == wide).sum())
    assert 0 < erased < base.size
    np.testing.assert_allclose([squares, weight[0]], (wide.astype(np.float64) ** 2).sum(), rtol=1e-12)
    again = surveyed(wide.view(np.uint32), deltas[None], subtract=False)
    np.testing.assert_allclose(again, (erased, squares), rtol=1e-12)


def surveyed(base: np.ndarray, sources: np.ndarray, *, subtract: bool) -> tuple[int, float]:
    """How many entries of one source bfloat16 erases, and the sum of the weights' squares, from `kernels.survey`."""
    integers, size = np.int64, sources.shape[1]
    gone, weight, none = np.zeros(1, integers), np.zeros(1), np.empty((0, 1), np.uint32)
    kernels.survey(
        base, sources, subtract, FULL, np.empty((1, kernels.CACHED if subtract else 0), np.float32), EDGES, np.zeros((1, len(EDGES)), integers),
        np.zeros((1, kernels.BINS), integers), size, *np.zeros((2, 1, 0), integers), np.zeros(1, np.uint32), np.zeros((1, 2)), gone, weight,
        np.uint32(1), np.zeros((0, 4), integers), np.zeros((0, 5)), np.zeros((0, 4), integers), none, none, np.zeros((0, size), np.int32),
        np.zeros((0, 2, size), np.float32), np.zeros((0, 1, size), np.uint32), np.zeros((0, 2, 2), integers), np.ones(1, np.float32), -1,
        True, 0, 1.0, np.zeros((1, 8), integers), np.zeros((1, 4)), np.zeros(1), np.empty(1, np.uint32), np.empty(2, np.uint32),
        np.empty(2, integers), kernels.lines(6),
    )  # fmt: skip
    return int(gone[0]), float(weight[0])
