"""The kernels against plain NumPy in float64, and against themselves with other blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paft_merge.compute import kernels
from paft_merge.compute.blocks import Block, Election, KeepThreshold
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.kernels import product

OPS = CpuOps()
SIZE = 5_000


def normal(seed: int, *shape: int, size: float = 1e-3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, shape).astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def pattern(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(1, 1, 1), (3, 65, 2), (17, 300, 7), (64, 128, 64), (5, 70, 130), (5, 70, 0)]
)
def test_a_product_is_a_product(rows: int, width: int, rank: int) -> None:
    left, right = normal(0, rows, rank, size=1.0), normal(1, rank, width, size=1.0)
    out = np.full((rows, width), np.nan, np.float32)
    product(left, right, out)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-6 * rank)


def test_bits_of_a_product_depend_on_row_and_column_alone() -> None:
    left, right = normal(0, 50, 13, size=1.0), normal(1, 13, 200, size=1.0)
    whole = np.empty((50, 200), np.float32)
    product(left, right, whole)
    for rows, columns in (
        (slice(7, 12), slice(0, 200)),
        (slice(0, 50), slice(3, 77)),
        (slice(49, 50), slice(199, 200)),
    ):
        part = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        product(left[rows], np.ascontiguousarray(right[:, columns]), part)
        np.testing.assert_array_equal(bits(part), bits(whole[rows, columns]))


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = np.concatenate([normal(0, SIZE, size=s) for s in (1e-38, 1e-3, 1.0, 1e30)])
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # two ties, one to each side
    out = np.empty(values.size, np.uint16)
    block = Block(0, bits(values), np.zeros((0, values.size), np.uint32), subtract=False)
    OPS.blend(block, out, 1.0, [], 0, False)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(out, expected)


def test_stochastic_rounding_is_unbiased_and_leaves_what_fits() -> None:
    value = np.float32(1.0 + 0.25 * 2**-7)  # a quarter of the way between two bfloat16
    values = np.full(100_000, value)
    values[0] = 1.5
    out = np.empty(values.size, np.uint16)
    OPS.blend(Block(0, bits(values), np.zeros((0, values.size), np.uint32), False), out, 1.0, [], 99, False)
    rounded = (out.astype(np.uint32) << 16).view(np.float32)
    assert rounded[0] == 1.5
    assert set(np.unique(rounded[1:])) == {np.float32(1.0), np.float32(1.0 + 2**-7)}
    assert abs((rounded[1:] > 1).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / values.size)


@pytest.mark.parametrize("split", [1, 1000, kernels.STRIP, 2500])
def test_blocks_may_be_cut_anywhere(split: int) -> None:
    base, deltas = normal(0, SIZE, size=0.02), normal(1, 2, SIZE)
    survivals = [
        KeepThreshold(low=pattern(1e-3), low_cut=1234, keep=1 << 31, key=5, scale=1.5),
        KeepThreshold(low=pattern(abs(deltas[1, 40])), low_cut=3000, high=pattern(2e-3), high_cut=2000),
    ]
    election = Election((0.5, 0.7), "weighted", True, "weights", 1.0)

    def run(cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        out, counts = np.empty(SIZE, np.uint16), 0
        for start, stop in zip(cuts, [*cuts[1:], SIZE], strict=True):
            block = Block(start, bits(base[start:stop]), bits(deltas[:, start:stop]), False)
            counts = counts + OPS.consensus(block, out[start:stop], survivals, election, 7).counts[:, :7]
        return out, counts

    whole, parts = run([0]), run([0, split, 2 * split])
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])


def test_a_tally_is_what_numpy_counts() -> None:
    base, deltas = normal(0, SIZE, size=0.02), normal(1, 2, SIZE, size=1e-4)
    deltas[0, :100] = 0
    survivals = [KeepThreshold(low=pattern(1e-4)), KeepThreshold()]
    outcome = OPS.consensus(
        Block(0, bits(base), bits(deltas), False), np.empty(SIZE, np.uint32), survivals,
        Election((0.5, -0.7), "weighted", True, "none", 1.0), 0,
    )  # fmt: skip
    wide = deltas.astype(np.float64)
    kept = np.where([np.abs(deltas[0]) > np.float32(1e-4), np.ones(SIZE, bool)], wide, 0)
    weighted = kept * np.array([[0.5], [-0.7]])
    agrees = (weighted != 0) & (np.sign(weighted) == np.where(weighted.sum(0) >= 0, 1, -1))
    counts = dict(zip(kernels.COUNTS, outcome.counts.T, strict=True))
    for name, threshold in (("below_1e-06", 1e-6), ("below_1e-05", 1e-5), ("below_1e-04", 1e-4), ("below_1e-03", 1e-3)):
        np.testing.assert_array_equal(counts[name], (np.abs(deltas) < np.float32(threshold)).sum(1))
    np.testing.assert_array_equal(counts["zeros"], (deltas == 0).sum(1))
    np.testing.assert_array_equal(counts["kept"], (kept != 0).sum(1))
    np.testing.assert_array_equal(counts["elected"], agrees.sum(1))
    np.testing.assert_array_equal(counts["max_bits"], bits(np.abs(deltas)).max(1))
    expected = [np.abs(wide).sum(1), (wide**2).sum(1), (kept**2).sum(1), (np.where(agrees, kept, 0) ** 2).sum(1)]
    np.testing.assert_allclose(outcome.sums, np.stack(expected, 1), rtol=1e-6)


def test_the_loss_of_codes_is_that_of_the_updates_alone() -> None:
    base, merged = normal(0, SIZE), normal(1, SIZE)
    merged[:700] = base[:700]
    written = np.where(np.arange(SIZE) % 3 == 0, base, merged + np.float32(1e-5))
    counts, sums = np.empty(2, np.int64), np.empty(2)
    kernels.lost(merged, base, written, counts, sums, kernels.lines(2, of=np.float64))
    moved = merged != base
    assert counts.tolist() == [moved.sum(), (moved & (written == base)).sum()]
    squares = [np.square((one - other).astype(np.float64)).sum() for one, other in ((merged, base), (written, merged))]
    np.testing.assert_allclose(sums, squares, rtol=1e-12)
