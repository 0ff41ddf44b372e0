"""The loops from one block to another: against their definitions in float64, and against their twins by torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paft_merge.compute import blocks
from paft_merge.compute.block_walk import ArrayTensor, BlockWalk
from paft_merge.compute.blocks import NOTHING, Block, KeepThreshold, RankedKeep
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.torch_ops import TorchOps
from paft_merge.methods.rules.magprune import RankedDrop

LENGTH, LINES = 1300, 18  # a row is more than one strip of the loops
SIZE = LENGTH * LINES
CPU = CpuOps()
EPSILON = 1e-3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ops(request: pytest.FixtureRequest) -> TorchOps:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return TorchOps(torch.device(request.param))


def narrow(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(params=["stored", "deltas"])
def block(request: pytest.FixtureRequest) -> Block:
    made = np.random.default_rng(0)
    base = made.normal(0, 0.02, SIZE)
    if request.param == "stored":  # differences of bfloat16: many equal magnitudes
        sources = np.stack([narrow(base + made.normal(0, 1e-3, SIZE)) for _ in range(3)])
        return Block(LENGTH * 7, narrow(base), sources, subtract=True)
    deltas = made.normal(0, 1e-3, (3, SIZE)).astype(np.float32)
    deltas[:, :50] = 0
    deltas[1:, 50:90] = deltas[0, 50:90]
    return Block(LENGTH * 7, narrow(base), deltas.view(np.uint32), subtract=False)


def wide(block: Block) -> np.ndarray:
    """The deltas of a block, float32 `[n, E]`."""
    if isinstance(block.sources, torch.Tensor):
        return block.sources.cpu().numpy()
    as_float = [(r if r.dtype == np.uint32 else r.astype(np.uint32) << 16).view(np.float32) for r in block.sources]
    deltas = np.stack(as_float)
    return deltas - (block.base.astype(np.uint32) << 16).view(np.float32) if block.subtract else deltas


def first(block: Block) -> Block:
    return Block(block.index, block.base, block.sources[:1], block.subtract)


def test_tallies_are_equal_and_those_of_a_blend(block: Block, ops: TorchOps) -> None:
    (counts, sums), (their_counts, their_sums) = CPU.tally(block), ops.tally(block)
    np.testing.assert_array_equal(counts, their_counts)
    np.testing.assert_allclose(sums, their_sums, rtol=1e-6)
    blended = CPU.blend(block, np.empty(SIZE, np.uint32), 1.0, [1.0] * 3, 0, True)
    np.testing.assert_array_equal(counts, blended.counts)
    np.testing.assert_array_equal(sums, blended.sums)


def test_variances(block: Block, ops: TorchOps) -> None:
    for total in (3, 5):
        ours, theirs = CPU.variance(block, total), ops.variance(block, total)
        np.testing.assert_array_equal(wide(ours), wide(theirs))
        padded = np.concatenate([wide(block), np.zeros((total - 3, SIZE))]).astype(np.float64)
        np.testing.assert_allclose(wide(ours)[0], padded.var(axis=0), rtol=1e-6)
    if not block.subtract:  # sources that are equal have none, whatever they are
        assert not wide(CPU.variance(block, 3))[0, :90].any()


def test_selections(block: Block, ops: TorchOps) -> None:
    by = CPU.variance(block, 3)
    middle = int(np.sort(by.sources[0])[SIZE // 2])
    for survival in (
        KeepThreshold(low=middle, low_cut=block.index + SIZE // 2),
        NOTHING,
        KeepThreshold(low_cut=block.index + SIZE),
    ):
        ours, theirs = CPU.select(block, by, survival), ops.select(block, ops.variance(block, 3), survival)
        np.testing.assert_array_equal(wide(ours), wide(theirs))
        at, bits = np.arange(block.index, block.index + SIZE), by.sources[0]
        stays = (bits > survival.low) | ((bits == survival.low) & (at < survival.low_cut))
        np.testing.assert_array_equal(wide(ours), np.where(stays, wide(block), 0))
    assert wide(CPU.select(block, by, KeepThreshold(low_cut=block.index + SIZE))).any(axis=1).all()


def test_swaps(block: Block, ops: TorchOps) -> None:
    ours, theirs = CPU.swap(first(block), EPSILON), ops.swap(first(block), EPSILON)
    np.testing.assert_array_equal(wide(ours), wide(theirs))
    delta = wide(first(block)).astype(np.float64)
    expected = delta * np.clip(EPSILON / np.maximum(np.abs(delta), 1e-6), 0, 1)
    np.testing.assert_allclose(wide(ours), expected, rtol=1e-6)


def test_overlaps_and_shares(block: Block, ops: TorchOps) -> None:
    (counts, energy), (their_counts, their_energy) = CPU.overlaps(block, EPSILON), ops.overlaps(block, EPSILON)
    np.testing.assert_array_equal(counts, their_counts)
    np.testing.assert_allclose(energy, their_energy, rtol=1e-12)
    large = np.abs(wide(block)) > np.float32(EPSILON)
    np.testing.assert_array_equal(counts.sum(1), large.sum(1))
    np.testing.assert_allclose(energy, (np.where(large, wide(block), 0).astype(np.float64) ** 2).sum(1), rtol=1e-12)
    np.testing.assert_array_equal(counts[:, 1], (large & (large.sum(0) == 1)).sum(1))
    scales = [1.0, 1.02, 0.5]
    ours, theirs = CPU.share(block, EPSILON, scales), ops.share(block, EPSILON, scales)
    np.testing.assert_array_equal(wide(ours), wide(theirs))
    kept, many = np.where(large, wide(block), 0).astype(np.float64), large.sum(0)
    own = (kept * np.array(scales)[:, None]).sum(0)
    np.testing.assert_allclose(
        wide(ours)[0], np.where(many > 1, kept.sum(0) / np.maximum(many, 1), own), rtol=1e-5, atol=1e-9
    )


def test_fusions(block: Block, ops: TorchOps) -> None:
    deltas, weights = CPU.select(block, CPU.variance(block, 3), KeepThreshold(low=1)), [0.5, 0.4, 1e-7]
    (ours, elected, energy), (theirs, their_elected, their_energy) = (
        CPU.fuse(deltas, weights),
        ops.fuse(deltas, weights),
    )
    np.testing.assert_array_equal(wide(ours), wide(theirs))
    np.testing.assert_array_equal(elected, their_elected)
    np.testing.assert_allclose(energy, their_energy, rtol=1e-12)
    values = wide(deltas)
    vote = values[0] + values[1] + values[2]
    agrees = np.where(vote >= 0, values > 0, values < 0)
    np.testing.assert_array_equal(elected, agrees.sum(1))
    w = np.array(weights)[:, None]
    expected = (values * agrees * w).sum(0) / np.maximum((agrees * w).sum(0), 1e-6)
    np.testing.assert_allclose(wide(ours)[0], expected, rtol=1e-5, atol=1e-9)


def test_largest_deltas(block: Block, ops: TorchOps) -> None:
    weights = [0.5, -0.4, 1.0]
    (ours, won, energy), (theirs, their_won, their_energy) = CPU.largest(block, weights), ops.largest(block, weights)
    np.testing.assert_array_equal(wide(ours), wide(theirs))
    np.testing.assert_array_equal(won, their_won)
    np.testing.assert_allclose(energy, their_energy, rtol=1e-12)
    values = wide(block)
    weighted = values * np.array(weights, np.float32)[:, None]
    owner = np.abs(weighted).argmax(axis=0)  # the first of equal ones
    np.testing.assert_array_equal(wide(ours)[0], np.take_along_axis(weighted, owner[None], 0)[0])
    taken = [(owner == i) & (values[i] != 0) for i in range(3)]
    np.testing.assert_array_equal(won, [own.sum() for own in taken])
    squares = [(values[i][own].astype(np.float64) ** 2).sum() for i, own in enumerate(taken)]
    np.testing.assert_allclose(energy, squares, rtol=1e-12)


def test_competitions(block: Block, ops: TorchOps) -> None:
    """Each step of PCB-Merging on one block, against the definition in float64."""
    values = wide(block).astype(np.float64)
    pairs = values[:, None] * values
    extremes = CPU.products(block)
    np.testing.assert_array_equal(extremes, ops.products(block))
    np.testing.assert_array_equal(extremes, [pairs.min(-1), pairs.max(-1)])
    least, scale = extremes[0], 1 / (extremes[1] - extremes[0])
    sums, theirs = CPU.exponential_sums(block, least, scale), ops.exponential_sums(block, least, scale)
    np.testing.assert_allclose(sums, theirs, rtol=1e-12)
    made = np.exp((pairs - least[..., None]) * scale[..., None] - 0.5)
    np.testing.assert_allclose(sums, made.sum(-1), rtol=1e-12)
    shares = SIZE / sums
    shares[1], shares[:, 1] = 0, 0  # the second delta does not take part
    scores, their_scores = CPU.scores(block, least, scale, shares), ops.scores(block, least, scale, shares)
    np.testing.assert_array_equal(wide(scores), wide(their_scores))
    expected = [made[i, i] ** 2 * (shares[i][:, None] * made[i]).sum(0) for i in range(3)]
    np.testing.assert_allclose(wide(scores), expected, rtol=1e-6)
    middle = int(np.sort(scores.sources[0])[SIZE // 2])
    survivals = [KeepThreshold(low=middle, low_cut=block.index + SIZE // 3), NOTHING, KeepThreshold()]
    given = survivals, [0.5, 0.0, 0.7], [1.0, 2.0, -0.5]
    (row, kept, energy), (their_row, their_kept, their_energy) = (
        CPU.compete(block, scores, *given),
        ops.compete(block, their_scores, *given),
    )
    np.testing.assert_array_equal(wide(row), wide(their_row))
    np.testing.assert_array_equal(kept, their_kept)
    np.testing.assert_allclose(energy, their_energy, rtol=1e-12)
    at, bits = np.arange(SIZE), scores.sources[0]
    stays = np.stack([(bits > middle) | ((bits == middle) & (at < SIZE // 3)), at < 0, at >= 0])
    parts = np.where(stays, wide(scores), 0) * np.array([0.5, 0, 0.7])[:, None]
    total, divisor = (parts * np.array([1.0, 2.0, -0.5])[:, None] * values).sum(0), parts.sum(0)
    np.testing.assert_allclose(wide(row)[0], total / divisor, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(kept, (stays & (values != 0)).sum(1))


@pytest.mark.parametrize(("length", "inner"), [(LENGTH, 1), (LENGTH // 10, 10), (SIZE, 1), (1, LENGTH)])
def test_ranked_drops(block: Block, ops: TorchOps, length: int, inner: int) -> None:
    drops = [RankedDrop(0.6, 0.3, 12345678901234567890 + i).keep(length) for i in range(3)]
    ours, theirs = CPU.drop_ranked(block, length, inner, drops), ops.drop_ranked(block, length, inner, drops)
    np.testing.assert_array_equal(wide(ours), wide(theirs))
    lines = np.abs(wide(block)[0]).reshape(-1, length, inner)
    ranks = lines.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable").ravel()
    kept = wide(ours)[0] != 0
    assert not kept[wide(block)[0] == 0].any()
    if length > 1:
        small, large = kept[ranks < length / 4].mean(), kept[ranks >= length * 3 / 4].mean()
        assert small < 0.45
        assert large > 0.75
    everything = RankedKeep(np.full(length, 1 << 32, np.uint64), 1)
    np.testing.assert_array_equal(wide(CPU.drop_ranked(block, length, inner, [everything] * 3)), wide(block))


def test_gram_matrices_of_rows_and_columns(block: Block, ops: TorchOps) -> None:
    values = wide(block).astype(np.float64).reshape(3, -1, LENGTH)
    by_row, by_column = CPU.gram_rows(block, LENGTH), CPU.gram_columns(block, LENGTH)
    np.testing.assert_allclose(by_row, np.einsum("irj,krj->rik", values, values), rtol=1e-12, atol=1e-20)
    np.testing.assert_allclose(by_column, np.einsum("irj,krj->ikj", values, values), rtol=1e-12, atol=1e-20)
    np.testing.assert_allclose(by_row, ops.gram_rows(block, LENGTH), rtol=1e-10, atol=1e-20)
    np.testing.assert_allclose(by_column, ops.gram_columns(block, LENGTH), rtol=1e-10, atol=1e-20)
    np.testing.assert_allclose(by_row.sum(0), CPU.gram(block), rtol=1e-12)


@pytest.mark.parametrize("across", [False, True])
def test_mixtures(block: Block, ops: TorchOps, across: bool) -> None:
    weights = np.random.default_rng(1).normal(size=(3, LENGTH if across else LINES))
    ours, theirs = CPU.mix(block, weights, LENGTH, across=across), ops.mix(block, weights, LENGTH, across=across)
    np.testing.assert_array_equal(wide(ours), wide(theirs))
    values = wide(block).astype(np.float64).reshape(3, -1, LENGTH)
    expected = (values * (weights[:, None, :] if across else weights[:, :, None])).sum(0).ravel()
    np.testing.assert_allclose(wide(ours)[0], expected, rtol=1e-4, atol=1e-8)


def test_what_torch_computed_is_merged_where_it_is(block: Block, ops: TorchOps) -> None:
    """A derived block of torch's is a tensor on its device, and blends and elections take it as it is."""
    ours, theirs = np.empty(SIZE, np.uint16), np.empty(SIZE, np.uint16)
    CPU.blend(CPU.share(block, EPSILON, [1.0] * 3), ours, 1.0, [1.0], 0, False)
    ops.blend(ops.share(block, EPSILON, [1.0] * 3), theirs, 1.0, [1.0], 0, False)
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", 1 << 10)


def test_a_row_is_never_parted(small_tiles: None) -> None:
    sources = np.zeros((1, 60 * 70), np.uint32)
    each = BlockWalk([ArrayTensor(np.zeros(60 * 70, np.uint32), sources, row=70)])
    assert each.tiles > 3
    sizes = each(lambda block: block.sources.shape[1])
    assert sum(sizes) == 60 * 70
    assert all(size % 70 == 0 for size in sizes)
