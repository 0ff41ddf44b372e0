"""Sums over the workers of a merge by `torch.distributed`, where the program that calls `merge` has initialised it."""

from __future__ import annotations

import sys

import numpy as np

from paft_merge.engine.worker_number import WorkerNumber
from paft_merge.errors import OutputError
from paft_merge.output.shared import Counted, SharedOutput

_FIX = "start all workers again; complete files are kept"


class ProcessGroup:
    """The default process group, if its ranks are the workers of the merge.

    A collective that has begun cannot be given up, and keeps its process from ending. So a worker first notes in the shared
    folder that it has counted, and begins the collective when all have; until then it looks at the signs of life of the
    others, and stops with an error when one is dead. Its own end then stops the rest.
    """

    def __init__(self, worker: WorkerNumber, shared: SharedOutput) -> None:
        self.worker, self.shared = worker, shared
        self._ids: list[str] = []
        """The process that was each worker when the first sum began."""
        self._sums = 0

    @staticmethod
    def fits(worker: WorkerNumber) -> bool:
        """Whether this process has a process group in which it is this worker, one of as many."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return (rank, size) == (worker.index, worker.count) and worker.name == str(rank)

    def add_up(self, counted: Counted) -> Counted:
        """Add up the integers that all workers counted.

        Raises:
            OutputError: WORKERS, a worker has ended or hangs, or the collective failed.
        """
        import torch
        from torch import distributed

        on = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        try:
            if not self._ids:
                own = torch.tensor([*self.shared.leases.id.encode()], device=on)
                every = [torch.empty_like(own) for _ in range(self.worker.count)]
                distributed.all_gather(every, own)
                self._ids = [bytes(id.tolist()).decode() for id in every]
            self._wait_for_all()
            flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in counted])).to(on)
            distributed.all_reduce(flat)
        except RuntimeError as error:
            what = f"torch.distributed failed: {str(error).splitlines()[0]}"
            raise OutputError.of("WORKERS", str(self.worker), what, _FIX) from error
        ends = np.cumsum([array.size for array in counted])[:-1]
        parts = np.split(flat.cpu().numpy(), ends)
        return tuple(part.reshape(array.shape) for part, array in zip(parts, counted, strict=True))

    def _wait_for_all(self) -> None:
        self._sums += 1
        leases, pause = self.shared.leases, 0.0
        leases.take(self._counted(self.worker.index))
        for index, id in enumerate(self._ids):
            while (done := leases.holder(self._counted(index))) is None or done.id != id:
                holder = leases.holder(f"worker-{index}")
                if holder is None or holder.id != id or holder.state in ("ended", "silent"):
                    hangs = holder is not None and holder.id == id and holder.state == "silent"
                    since = f"was silent for {leases.seconds:g} s" if hangs else "has ended"
                    what = f"worker {index} of {self.worker.count} {since}, and its counts are missing"
                    raise OutputError.of("WORKERS", str(self.worker), what, _FIX)
                pause = self.shared.pause(pause)

    def _counted(self, index: int) -> str:
        """The right of a worker that says that it has counted for this sum."""
        return f"counted{self._sums}-{index}"
