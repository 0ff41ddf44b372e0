"""One walk over blocks: every element once, in tile order, whatever the pool does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paft_merge.compute import blocks
from paft_merge.compute.block_walk import ArrayTensor, BlockWalk
from paft_merge.compute.blocks import Block

SIZE, TILE = 300, 48


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", TILE)


class Recorded(ArrayTensor):
    """A tensor that records how it is used."""

    log: list[object] = []  # noqa: RUF012, shared with the test, which clears it

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        self.log.append(("all" if all_sources else "active", start))
        return super().block(start, stop)

    def release(self) -> None:
        self.log.append("released")


def tensor(kind: type[ArrayTensor] = ArrayTensor, row: int = 1) -> ArrayTensor:
    return kind(np.zeros(SIZE, np.uint32), np.arange(2 * SIZE, dtype=np.uint32).reshape(2, SIZE), row)


@pytest.mark.parametrize("threads", [0, 3])
def test_results_come_in_tile_order(threads: int) -> None:
    first_may_end = threading.Event()

    def work(block: Block) -> tuple[int, list[int]]:
        if threads and block.index == 0:
            assert first_may_end.wait(10)  # the first block ends after the second one
        elif block.index == TILE:
            first_may_end.set()
        return block.index, block.sources[1].tolist()

    with ThreadPoolExecutor(threads or 1) as pool:
        found = BlockWalk([tensor()], pool if threads else None)(work)
    assert [index for index, _ in found] == list(range(0, SIZE, TILE))
    assert [value for _, values in found for value in values] == list(range(SIZE, 2 * SIZE))


def test_some_tiles_and_samples_are_parts_of_the_walk() -> None:
    walk = BlockWalk([tensor(row=4)])
    assert walk.tiles == 7
    assert walk.numel == SIZE
    assert walk(lambda block: (block.index, block.size), tiles=[1, 6]) == [(TILE, TILE), (6 * TILE, 12)]
    assert walk(lambda block: block.size, sample=True) == [4] * 7  # one row, as a tile has fewer than 16


def test_a_derived_walk_computes_its_blocks_from_those_of_another() -> None:
    def doubled(block: Block) -> Block:
        return Block(block.index, block.base, block.sources * 2, subtract=False)

    found = BlockWalk([tensor()]).derived(doubled)(lambda block: block.sources[0])
    np.testing.assert_array_equal(np.concatenate(found), np.arange(SIZE) * 2)


def test_a_walk_over_a_model_reads_every_source_and_releases_each_tensor_after_its_blocks() -> None:
    Recorded.log.clear()
    BlockWalk([tensor(Recorded), tensor(Recorded)], all_sources=True)(lambda block: None)
    assert Recorded.log == 2 * [*(("all", start) for start in range(0, SIZE, TILE)), "released"]
    Recorded.log.clear()
    BlockWalk([tensor(Recorded)])(lambda block: None)
    assert Recorded.log == [("active", start) for start in range(0, SIZE, TILE)]


def test_the_first_failure_is_raised_and_cancels_the_blocks_that_wait() -> None:
    begun, hold = [], threading.Event()

    def work(block: Block) -> None:
        begun.append(block.index)
        if block.index == 0:
            raise ValueError("the first block")
        hold.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="the first block"):
            BlockWalk([tensor()], pool)(work)
        hold.set()
    assert len(begun) <= 2  # the pool may have begun one more
