"""The files of a merge, divided among workers by their predicted cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from paft_merge.output.shards import split
from paft_merge.plan import MergePlan


def by_file(plan: MergePlan) -> list[MergePlan]:
    """Return a plan for each file of the output."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    return [
        replace(plan, tensors=tuple(tensors[slot.name] for slot in shard.slots), shards=(shard,))
        for shard in plan.shards
    ]


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Divide files among workers: the most expensive first, each to the worker with the least cost (LPT).

    Args:
        costs: one a file.
        count: of workers.

    Returns:
        The files of each worker, by position in `costs`, the most expensive first.
    """
    found: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, worker) for worker in range(count)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, worker = heapq.heappop(loads)
        found[worker].append(number)
        heapq.heappush(loads, (load + costs[number], worker))
    return found


def spreading_size(plan: MergePlan, count: int) -> int | None:
    """A largest size of a file, in bytes, with which every worker of `count` has files to write; None if there is none.

    Shares balance well with several files for each worker, so it is the size of four files each, or of fewer where tensors
    are large.
    """
    rows = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors]
    for each in (4, 3, 2, 1):
        size = plan.bytes_written // (each * count)
        size -= size % int(10 ** max(len(str(size)) - 2, 0))  # two digits
        if size and len(split(rows, size)) >= count:
            return size
    return None
