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
    below, packed, sums = np.zeros(len(EDGES), np.int64), np.zeros(kernels.BINS, np.int64), np.zeros(2)
    largest = kernels.measure(bits, EDGES, below, packed, sums)
    magnitudes = bits & MAGNITUDE
    assert largest == magnitudes.max()
    assert below.tolist() == [int((magnitudes < edge).sum()) for edge in EDGES]
    np.testing.assert_allclose(sums, [(wide**2).sum(), (wide**4).sum()], rtol=1e-12)
    assert (packed >> kernels.COUNT_SHIFT).tolist() == np.bincount(magnitudes >> 16, minlength=kernels.BINS).tolist()
    lows = np.bincount(magnitudes >> 16, magnitudes & 0xFFFF, kernels.BINS)
    assert (packed & ((1 << kernels.COUNT_SHIFT) - 1)).tolist() == lows.astype(np.int64).tolist()
    rows, into = np.stack([packed, packed[::-1]]), np.ones((2, 2, kernels.BINS), np.int64)
    kernels.unpack(rows, *into)
    counts = np.bincount(magnitudes >> 16, minlength=kernels.BINS)
    np.testing.assert_array_equal(into - 1, [[counts, counts[::-1]], [lows, lows[::-1]]])
    assert not rows.any()


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
    weight = np.zeros(1)
    deltas = (value - wide).view(np.uint32)
    assert erased == kernels.erased(deltas, base, weight, kernels.lines(1)) == int((value == wide).sum())
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
