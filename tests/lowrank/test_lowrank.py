"""Low-rank approximations against full singular value decompositions in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from paft_merge.lowrank.factors import LowRank, padded, rank_for, stacked, truncate
from paft_merge.lowrank.range_finder import approximate, measured_error
from paft_merge.stats.spectrum import on_one_core


class Dense:
    """A matrix in memory, read in chunks; `order` permutes the chunks."""

    def __init__(self, matrix: Any, threads: int = 1, order: Callable[[list[int]], list[int]] = list) -> None:
        self.matrix, self.shape, self.threads, self.order = matrix, matrix.shape, threads, order
        self.passes = 0

    def each(self, work: Callable[[int, Any], Any]) -> list[Any]:
        self.passes += 1
        firsts = list(range(0, len(self.matrix), 100))
        shuffled = self.order(firsts)
        with ThreadPoolExecutor(self.threads) as pool:
            done = dict(zip(shuffled, pool.map(lambda i: work(i, self.matrix[i : i + 100]), shuffled), strict=True))
        return [done[first] for first in firsts]


def spectrum(rows: int, columns: int, singular: Any, seed: int = 0) -> Any:
    """A float32 matrix with given singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, len(singular))))[0] for n in (rows, columns))
    return ((u * singular) @ v.T).astype(np.float32)


def ties(rows: int, columns: int, density: float, decay: float = 0.0) -> Any:
    """TIES of two adapters of rank 16, whose components fall by `exp(-decay)` each."""
    rng = np.random.default_rng(1)
    scale = np.exp(-decay * np.arange(16))
    deltas = [(rng.standard_normal((rows, 16)) * scale) @ rng.standard_normal((16, columns)) for _ in range(2)]
    cut = int((1 - density) * rows * columns)
    trimmed = [np.where(np.abs(d) >= np.partition(np.abs(d), cut, None)[cut], d, 0) for d in deltas]
    sign = np.sign(sum(trimmed))
    agreed = [np.where(np.sign(d) == sign, d, 0) for d in trimmed]
    return (sum(agreed) / np.maximum(sum((d != 0).astype(int) for d in agreed), 1)).astype(np.float32)


COUNT = np.arange(1, 257)
CASES: dict[str, Callable[[], Any]] = {
    "ties": lambda: ties(384, 256, 0.2),
    "ties, wide": lambda: ties(256, 384, 0.5),
    "ties, trained": lambda: ties(640, 384, 0.2, decay=0.2),
    "1/i": lambda: spectrum(384, 256, 1 / COUNT),
    "1/sqrt(i)": lambda: spectrum(256, 384, COUNT**-0.5),
    "exponential": lambda: spectrum(384, 256, np.exp(-COUNT / 10)),
}


@cache
def case(name: str) -> tuple[Any, Any]:
    """The matrix, and its singular values by torch in float64."""
    matrix = CASES[name]()
    return matrix, torch.linalg.svdvals(torch.from_numpy(matrix).double()).numpy()


def true_error(matrix: Any, low: LowRank) -> float:
    return float(np.linalg.norm(matrix - low.left.astype(np.float64) @ low.right))


@pytest.mark.parametrize("name", CASES)
def test_two_passes_are_within_one_percent_of_the_optimal_error(name: str) -> None:
    matrix, singular = case(name)
    rows = Dense(matrix)
    low = approximate(rows, 32, seed=3)
    best = np.linalg.norm(singular[32:])
    assert best <= true_error(matrix, low) <= 1.01 * best  # +0.6 % at the most
    assert low.error == pytest.approx(true_error(matrix, low), rel=1e-4)
    assert low.norm == pytest.approx(np.linalg.norm(singular), rel=1e-6)
    assert rows.passes == 2 + (low.error < 0.05 * low.norm)
    assert low.left.shape == (len(matrix), 32)
    np.testing.assert_allclose(low.singular[:8], singular[:8], rtol=0.01)
    assert (low.singular <= singular[: len(low.singular)] * (1 + 1e-5)).all()
    np.testing.assert_allclose(np.linalg.norm(low.left, axis=0), np.linalg.norm(low.right, axis=1), rtol=1e-4)


@pytest.mark.parametrize(
    "singular",
    [np.ones(16), np.exp(-np.arange(16.0)), 10.0 ** -np.linspace(0, 6, 16)],
    ids=["flat", "steep", "steeper"],
)
def test_an_exactly_low_rank_matrix_is_found_to_float32(singular: Any) -> None:
    matrix = spectrum(300, 200, singular)
    low = approximate(Dense(matrix), 24, seed=0)
    assert true_error(matrix, low) < 1e-6 * low.norm
    assert low.error == pytest.approx(true_error(matrix, low), rel=0.3)  # itself a difference of float32 roundings


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 2), (7, 40), (40, 7), (130, 30)])
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_tiny_matrices_and_ranks_above_their_sides(shape: tuple[int, int], rank: int) -> None:
    matrix = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    low = approximate(Dense(matrix), rank, seed=0)
    best = np.linalg.norm(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:])
    assert low.left.shape == (shape[0], min(rank, *shape))
    assert true_error(matrix, low) <= 1.01 * best + 2e-6 * low.norm


def test_a_zero_matrix_has_rank_zero() -> None:
    zero = np.zeros((30, 20), np.float32)
    for low in (approximate(Dense(zero), 4, seed=0), approximate(Dense(zero), None, energy=0.9, seed=0),
                truncate(zero[:, :3], np.ones((3, 20), np.float32), 4)):  # fmt: skip
        assert low.left.shape == (30, 0)
        assert low.right.shape == (0, 20)
        assert (low.error, low.norm) == (0, 0)
        left, right = padded((low.left, low.right), 4)
        assert not (left @ right).any()


def test_the_bits_depend_on_neither_threads_nor_order() -> None:
    matrix = (
        case("ties")[0] * np.repeat(np.float32([1e-6, 1, 1e-3, 1e-5]), 96)[:, None]
    )  # sums whose order changes bits
    with on_one_core():
        one, two = (approximate(Dense(matrix, *how), 8, seed=5) for how in ((1,), (4, lambda firsts: firsts[::-1])))
        other = approximate(Dense(matrix), 8, seed=6)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.left != other.left).any()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_finds_the_smallest_rank_that_reaches_it(energy: float) -> None:
    matrix, singular = case("exponential")
    low = approximate(Dense(matrix), None, energy=energy, seed=0)
    smallest = int(np.searchsorted(np.cumsum(singular**2), energy * np.sum(singular**2) * (1 - 1e-12))) + 1
    assert (
        low.left.shape[1] == smallest if energy < 1 else low.left.shape[1] > 60
    )  # 1e-7 of the energy is float32 rounding
    assert low.error <= np.sqrt(1 - energy + 1e-6) * low.norm
    assert approximate(Dense(matrix), None, energy=energy, max_rank=6, seed=0).left.shape[1] == min(6, smallest)


def test_energy_of_a_flat_spectrum_widens_the_sketch() -> None:
    matrix = np.random.default_rng(3).standard_normal((300, 256)).astype(np.float32)
    low = approximate(Dense(matrix), None, energy=0.9, seed=0)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert low.left.shape[1] == pytest.approx(rank_for(singular, np.linalg.norm(singular), 0.9), abs=4)


def factors(rank: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((60, rank)).astype(np.float32), rng.standard_normal((rank, 40)).astype(np.float32)


def test_stacked_factors_are_the_weighted_sum() -> None:
    one, two = factors(3), factors(5, seed=1)
    left, right = stacked([one, two], [0.5, -2.0])
    assert left.shape == (60, 8)
    np.testing.assert_allclose(left @ right, 0.5 * (one[0] @ one[1]) - 2 * (two[0] @ two[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [12, 90])
@pytest.mark.parametrize("rank", [1, 5, 12, 100, None])
def test_truncation_is_the_optimal_one(given: int, rank: int | None) -> None:
    left, right = factors(given)
    product = left.astype(np.float64) @ right
    singular = np.linalg.svd(product, compute_uv=False)
    low = truncate(left, right, rank)
    kept = min(given, 40, rank or 100)
    assert low.left.shape == (60, kept)
    best = np.linalg.norm(singular[kept:]) if kept < min(given, 40) else 0.0
    assert true_error(product, low) == pytest.approx(best, rel=1e-6, abs=1e-6 * low.norm)
    assert low.error == pytest.approx(true_error(product, low), rel=1e-3)
    np.testing.assert_allclose(low.singular, singular[: min(given, 40)], rtol=1e-9)


def test_equal_factors_count_once() -> None:
    one = factors(4)
    low = truncate(*stacked([one, one], [1.0, 1.0]), rank=None)
    assert low.left.shape == (60, 4)
    assert true_error(2 * one[0].astype(np.float64) @ one[1], low) < 1e-6 * low.norm


@pytest.mark.parametrize("energy", [0.3, 0.95, 1.0])
def test_truncation_by_energy(energy: float) -> None:
    low = truncate(*factors(12), rank=None, energy=energy)
    kept = low.left.shape[1]
    assert kept == rank_for(low.singular, low.norm, energy)
    reached = np.cumsum(low.singular**2) / low.norm**2
    assert reached[kept - 1] >= energy * (1 - 1e-12)
    assert kept == 1 or reached[kept - 2] < energy


def bfloat16(values: Any) -> Any:
    return torch.from_numpy(values).bfloat16().float().numpy()


def test_the_error_is_that_of_the_stored_factors() -> None:
    matrix, _ = case("exponential")
    left, right = factors(12)
    for dense, low in (
        (matrix, approximate(Dense(matrix), 60, seed=0, store=bfloat16)),
        (matrix, approximate(Dense(matrix), 8, seed=0, store=bfloat16)),
        (left.astype(np.float64) @ right, truncate(left, right, None, store=bfloat16)),
        (left.astype(np.float64) @ right, truncate(left, right, 6, store=bfloat16)),
    ):
        np.testing.assert_array_equal(low.left, bfloat16(low.left))
        assert low.error == pytest.approx(true_error(dense, low), rel=1e-3)
        assert low.error > 1e-3 * low.norm


def test_the_error_of_any_factors_is_measured() -> None:
    matrix, _ = case("ties")
    left, right = np.ones((384, 2), np.float32), np.ones((2, 256), np.float32)
    assert measured_error(Dense(matrix), left, right) == pytest.approx(np.linalg.norm(matrix - 2.0), rel=1e-6)
