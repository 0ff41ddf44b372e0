"""The operations by torch against the kernels: the same bits for everything but sums, on the CPU (and on a GPU)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from paft_merge.compute import kernels
from paft_merge.compute.blocks import Block, Election, KeepThreshold
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.torch_ops import TorchOps

SIZE = 20_003
MILLI = int(np.float32(1e-3).view(np.uint32))
SURVIVALS = [
    KeepThreshold(low=MILLI, low_cut=SIZE // 2, high=MILLI + 3_000_000, high_cut=SIZE // 3),
    KeepThreshold(keep=1 << 31, key=12345678901234567890, scale=2.0),
    KeepThreshold(low=MILLI, shrink=1e-3),
]
CPU = CpuOps()


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
    if request.param == "stored":
        sources = np.stack([narrow(base + made.normal(0, 1e-3, SIZE)) for _ in range(3)])
        return Block(77, narrow(base), sources, subtract=True)
    deltas = made.normal(0, 1e-3, (3, SIZE)).astype(np.float32)
    deltas[:, :50] = 0
    return Block(77, narrow(base), deltas.view(np.uint32), subtract=False)


def test_histograms_are_equal(block: Block, ops: TorchOps) -> None:
    for sums in (0, 1, 2):
        for ours, theirs in zip(CPU.histogram(block, sums), ops.histogram(block, sums), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_what_is_collected_is_equal(block: Block, ops: TorchOps) -> None:
    bounds = [MILLI, 1, 0], [100_000, MILLI, 0]
    (counts, found), (their_counts, their_found) = CPU.collect(block, *bounds), ops.collect(block, *bounds)
    np.testing.assert_array_equal(counts, their_counts)
    for ours, theirs in zip(found, their_found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_located_entries_are_equal(block: Block, ops: TorchOps) -> None:
    _, found = CPU.collect(block, [MILLI, 0, 0], [100_000, 0, 0])
    bits = int(found[0][-1])
    assert CPU.locate(block, 0, bits, 0) == ops.locate(block, 0, bits, 0)


def test_sums_agree_to_rounding(block: Block, ops: TorchOps) -> None:
    np.testing.assert_allclose(CPU.gram(block), ops.gram(block), rtol=1e-12)
    for squares in (False, True):
        ours, theirs = (each.dropped_norms(block, SURVIVALS, squares=squares) for each in (CPU, ops))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("out", [np.uint16, np.uint32])
@pytest.mark.parametrize("key", [0, 987654321987654321])
def test_blends_are_equal(block: Block, ops: TorchOps, out: type, key: int) -> None:
    ours, theirs = np.empty(SIZE, out), np.empty(SIZE, out)
    outcomes = [o.blend(block, to, 0.7, [0.1, 0.2, -0.3], key, True) for o, to in ((CPU, ours), (ops, theirs))]
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(outcomes[0].counts, outcomes[1].counts)
    np.testing.assert_allclose(outcomes[0].sums, outcomes[1].sums, rtol=1e-6)


@pytest.mark.parametrize("key", [0, 987654321987654321])
def test_every_election_is_equal(block: Block, ops: TorchOps, key: int) -> None:
    ours, theirs = np.empty(SIZE, np.uint16), np.empty(SIZE, np.uint16)
    for elect, normalize, tie in itertools.product(kernels.ELECT, kernels.NORMALIZE, (True, False)):
        election = Election((0.5, 0.8, -0.3), elect, tie, normalize, 1.3)
        outcomes = [o.consensus(block, to, SURVIVALS, election, key) for o, to in ((CPU, ours), (ops, theirs))]
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{elect} {normalize} {tie}")
        np.testing.assert_array_equal(outcomes[0].counts, outcomes[1].counts)
        np.testing.assert_allclose(outcomes[0].sums, outcomes[1].sums, rtol=1e-6)


def test_a_result_that_is_not_finite_is_counted(ops: TorchOps) -> None:
    base = np.array([1.0, np.inf, np.nan], np.float32).view(np.uint32)
    block = Block(0, base, np.zeros((1, 3), np.uint32), subtract=False)
    for each in (CPU, ops):
        assert each.blend(block, np.empty(3, np.uint32), 1.0, [1.0], 0, True).bad == 2
