"""A block that is filled while a loop walks it is the block that was filled before, and what cannot be read is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.merge import files_of, on, recipe

import paft_merge
from paft_merge.compute import blocks
from paft_merge.compute.blocks import Block, Election, KeepThreshold
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.kernels import block_source, product
from paft_merge.compute.kernels.block_source import BlockSource, Codes, packed, unpacked
from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.tensor_inputs import Read, inputs_for

OPS = CpuOps()
ELECTION = Election((0.6, 0.4), "weighted", True, "weights", 1.0)
SURVIVALS = [KeepThreshold(low=0x38000000, low_cut=700), KeepThreshold(keep=1 << 31, key=5)]


def never() -> None:
    raise AssertionError("everything could be read")


def written(block: Block) -> list[object]:
    outs = [np.empty(block.size, kind) for kind in (np.uint16, np.uint32)]
    outcomes = [OPS.consensus(block, out, SURVIVALS, ELECTION, 3) for out in outs]
    return [*outs, *(part for one in outcomes for part in (one.counts, one.sums, one.bad))]


def blended(block: Block) -> list[object]:
    out = np.empty(block.size, np.uint16)
    outcome = OPS.blend(block, out, 1.0, (0.5, -0.25), 0, True)
    return [out, outcome.counts, outcome.sums]


LOOPS: dict[str, Callable[[Block], list[object]]] = {
    "consensus": written,
    "blend": blended,
    "collect": lambda b: [*(collected := OPS.collect(b, [0x38000000] * 2, [1 << 20] * 2))[1], collected[0]],
    "histogram": lambda b: list(OPS.histogram(b, 2)),
    "gram": lambda b: [OPS.gram(b)],
    "dropped": lambda b: [*(OPS.dropped_norms(b, SURVIVALS, squares=squares) for squares in (False, True))],
    "looked at": lambda b: [b.base.copy(), b.sources.copy()],
}


@pytest.mark.parametrize("piece", [1 << 9, 1 << 12, 1 << 20])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (40, 130), (7, 1100), (300, 33), (64, 256)])
def test_filled_on_the_way_or_before_is_the_same(
    loop: str, piece: int, kept: bool, rows: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_source, "PIECE", piece)
    made, size = np.random.default_rng(0), rows * width
    base = made.integers(0, 0x3F80, size).astype(np.uint16)
    pairs = [[made.normal(0, 1e-2, shape).astype(np.float32) for shape in ((rows, 6), (6, width))] for _ in range(2)]
    full = np.empty((2, rows, width), np.float32)
    for (left, right), out in zip(pairs, full, strict=True):
        product(left, right, out)
    (tmp_path / "base").write_bytes(b"not this" + base.tobytes() + b"nor this")
    expected = LOOPS[loop](Block(77, base, full.reshape(2, -1).view(np.uint32), subtract=False))

    fd = os.open(tmp_path / "base", os.O_RDONLY)
    try:
        held = size if kept else 0  # arrays that are given are filled; where none are, a piece is used again and again
        arrays = np.full(held, 0xFFFF, np.uint16), np.full((2, held), np.nan, np.float32)
        fed = BlockSource(size, width, never)
        fed.read(-1, fd, 8)
        for row, (left, right) in enumerate(pairs):
            fed.multiply(row, left, packed(right))
        block = Block(77, arrays[0], arrays[1].view(np.uint32), subtract=False, feed=fed)
        found = LOOPS[loop](block)
        if kept:
            os.truncate(tmp_path / "base", 0)  # nothing is read twice
        np.testing.assert_array_equal(block.sources.view(np.float32), full.reshape(2, -1))
        np.testing.assert_array_equal(block.base, base)
    finally:
        os.close(fd)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("piece", [1 << 9, 1 << 20])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize(("width", "size", "skip"), [(96, 32, 0), (96, 96, 40), (50, 16, 14), (1, 1, 0)])
@pytest.mark.parametrize("zeros", [False, True])
def test_codes_are_filled_with_their_values(
    piece: int,
    each: int,
    width: int,
    size: int,
    skip: int,
    zeros: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whole and in pieces, from the middle of a row, with blocks that are cut at the end of a row."""
    monkeypatch.setattr(block_source, "PIECE", piece)
    made, count = np.random.default_rng(each), 2998
    codes = made.integers(0, 256, count // each).astype(np.uint8)
    table = made.normal(0, 1, (256, each)).astype(np.float32)
    entry = np.arange(skip, skip + count)
    shape = int(entry[-1]) // width + 1, -(-width // size)
    scales, points = (made.normal(0, 1, shape).astype(np.float32) for _ in range(2))
    at = entry // width, entry % width // size
    wanted = (table[codes].reshape(-1) - points[at] * zeros) * scales[at]
    (tmp_path / "codes").write_bytes(b"not this" + codes.tobytes())
    fd = os.open(tmp_path / "codes", os.O_RDONLY)
    for held in (0, count):
        fed = BlockSource(count, width, never)
        for row in (-1, 0):
            fed.decode(row, Codes(fd, 8, table, scales, points if zeros else None, width, size, skip))
        arrays = np.full(held, 7, np.uint32), np.full((1, held), 7, np.uint32)
        block = Block(0, *arrays, subtract=False, feed=fed)
        outcome = OPS.blend(block, out := np.empty(count, np.uint32), 1.0, (1.0,), 0, True)
        np.testing.assert_array_equal(out.view(np.float32), wanted + wanted)
        np.testing.assert_array_equal(block.sources[0].view(np.float32), wanted)
        assert outcome.counts[0, 0] == np.count_nonzero(wanted == 0)
    os.truncate(tmp_path / "codes", 100)
    block = Block(0, np.empty(0, np.uint32), np.empty((1, 0), np.uint32), subtract=False, feed=fed)
    with pytest.raises(AssertionError, match="everything could be read"):
        OPS.blend(block, out, 1.0, (1.0,), 0, True)
    os.close(fd)


@pytest.mark.parametrize("row", [64, 33])
def test_a_place_is_found_in_one_source_without_filling_the_others(tmp_path: Path, row: int) -> None:
    made = np.random.default_rng(0)
    size, pairs = 4096 * row, []
    full = np.empty((2, 4096, row), np.float32)
    for out in full:
        left, right = (made.normal(0, 1, shape).astype(np.float32) for shape in ((4096, 3), (3, row)))
        product(left, right, out)
        pairs.append((left, packed(right)))
    fed = BlockSource(size, row, never)
    (tmp_path / "base").write_bytes(bytes(2 * size))
    fd = os.open(tmp_path / "base", os.O_RDONLY)
    fed.read(-1, fd, 0)
    for source, pair in enumerate(pairs):
        fed.multiply(source, *pair)
    block = Block(1000, np.empty(0, np.uint16), np.empty((2, 0), np.uint32), subtract=False, feed=fed)
    bits = full.reshape(2, -1).view(np.uint32)
    for source in (0, 1):
        magnitudes = bits[source] & 0x7FFFFFFF
        for place in (0, size // 2, size - 1):
            nth = int((magnitudes[:place] == magnitudes[place]).sum())
            assert OPS.locate(block, source, int(magnitudes[place]), nth) == 1000 + place
    np.testing.assert_array_equal(block.sources, bits)
    os.close(fd)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_file_that_became_shorter_is_named(loop: str, tmp_path: Path) -> None:
    state = {"w": torch.randn(64, 64).bfloat16()}
    folders = [save_checkpoint(tmp_path / name, near(state, seed)) for seed, name in enumerate("bxy")]
    base, x, y = (Read(folder.name, Checkpoint.open(folder), "w") for folder in folders)
    inputs = inputs_for(base, (x, y), "deltas")
    file = folders[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"x/model\.safetensors: ends at byte"):
        LOOPS[loop](inputs.block(0, 64 * 64))
    for read in (base, x, y):
        read.checkpoint.close()


def test_a_read_that_failed_once_is_an_error() -> None:
    held = np.zeros(10, np.uint16)
    fed = BlockSource(10, 1, lambda: None)
    fed.read(-1, 1 << 20, 0)  # no such descriptor
    with pytest.raises(CheckpointError, match="failed once and then succeeded"):
        OPS.blend(Block(0, held, np.zeros((0, 10), np.uint32), False, fed), np.empty(10, np.uint16), 1.0, [], 0, False)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp", "karcher"])
def test_pieces_change_no_bit_of_a_merge(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(0, torch.bfloat16, layers=1, width=160)
    base = save_checkpoint(tmp_path / "base", state)
    tuned = [save_checkpoint(tmp_path / f"tuned{i}", near(state, i)) for i in (1, 2)]
    adapters = [on(base, save_adapter(tmp_path / f"adapter{i}", state, i)) for i in (3, 4)]
    for kind, sources in (("tuned", tuned), ("adapters", adapters)):
        extra = {"parameters": {"t": 0.4}} if method == "slerp" else {}
        models = [base, sources[0]] if method == "slerp" else sources
        given = {} if method in ("slerp", "karcher") else {"weight": 0.5}
        root = None if method in ("linear", "karcher") else base
        asked = recipe(method, root, *((one, given) for one in models), seed=1, **extra)
        found = []
        for piece in (1 << 16, 1 << 8):
            monkeypatch.setattr(block_source, "PIECE", piece)
            found.append(files_of(paft_merge.merge(asked, tmp_path / f"{kind}{piece}")))
        assert found[0] == found[1], kind
    assert blocks.TILE > 160 * 160


@pytest.mark.parametrize("shape", [(3, 200), (2, 128), (1, 5), (0, 70), (4, 0)])
def test_a_factor_is_unpacked_as_it_was_packed(shape: tuple[int, int]) -> None:
    right = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = unpacked(packed(right), shape[1])
    assert np.array_equal(found, right)
    assert found.flags.c_contiguous


@pytest.mark.parametrize(("sources", "width", "entries"), [(1, 0, 1 << 16), (2, 0, 1 << 16), (8, 0, 1 << 14), (100, 0, 1 << 13),
                                                           (2, 1024, 1 << 16), (8, 1024, 1 << 14), (100, 1024, 1 << 14)])  # fmt: skip
def test_a_piece_of_many_sources_has_fewer_entries(sources: int, width: int, entries: int) -> None:
    block = BlockSource(1 << 20, width, never)
    for row in range(-1, sources):
        if row < 0 or not width:
            block.read(row, 0, 0)
        else:
            block.multiply(row, np.zeros((1, 1), np.float32), None)
    assert block.piece == entries
