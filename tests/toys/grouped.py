"""A program for torchrun that initialises gloo and merges: `grouped.py RECIPE OUT [SIGNAL]`.

Rank 1 sends itself the signal before its second sum."""

from __future__ import annotations

import os
import sys

from torch import distributed

from paft_merge import PaftMergeError, merge
from paft_merge.engine.process_group import ProcessGroup


def main(recipe: str, out: str, fault: str = "") -> int:
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    add_up = ProcessGroup.add_up

    def counted(self: ProcessGroup, values: tuple) -> tuple:  # type: ignore[type-arg]
        print(f"rank {rank} adds {sum(array.size for array in values)} counts", file=sys.stderr, flush=True)
        if fault and rank == 1 and self._ids:
            os.kill(os.getpid(), int(fault))
        return add_up(self, values)

    ProcessGroup.add_up = counted  # type: ignore[method-assign]
    try:
        merge(recipe, out, worker=f"{rank}/{size}", threads=1, lease_seconds=1)
    except PaftMergeError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
