"""Writes merged deltas as sparse tensors (`output: {kind: delta}`).

The deltas are merged twice, as the tensors of a checkpoint are: the first time the entries that are not zero are counted, which
gives every tensor of the output its size; the second time the entries are written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.blocks import Tally
from paft_merge.engine.factors import to_stored
from paft_merge.engine.streaming import Progress, measured_over_model, merge_checkpoint, not_finite
from paft_merge.errors import CheckpointError
from paft_merge.inputs.adapters.sparse_delta import mask_shape, pack, row_of
from paft_merge.inputs.dtypes import count_nonfinite
from paft_merge.methods.rules.thresholds import count_all
from paft_merge.output.direct_io import PageAlignedBuffer
from paft_merge.output.folder import Finished, Output, digest_of
from paft_merge.plan import MergePlan, PlannedTensor
from paft_merge.plan.sparse_output import deltas_of, with_counts

if TYPE_CHECKING:
    from paft_merge.compute.blocks import Ops

_BITS = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}
"""The bits of a stored value; all but the highest are zero where the value is."""


def counted(
    plan: MergePlan, *, threads: int, ops: Ops, hold: int, progress: Callable[[Progress], None] = lambda _: None
) -> MergePlan:
    """Return the plan of a sparse delta with the sizes that one pass over all inputs finds.

    Args:
        plan: from `plan_merge`.
        threads, ops, hold, progress: as for `merge_checkpoint`.
    """
    whole = measured_over_model(plan, threads=threads, ops=ops, add_up=count_all)
    counter = _Counter(whole.tensors)
    merge_checkpoint(deltas_of(whole), counter, threads=threads, ops=ops, hold=hold, progress=progress)
    return with_counts(
        whole, {name: [found[start] for start in sorted(found)] for name, found in counter.counts.items()}
    )


def write_deltas(
    plan: MergePlan, output: Output, *, threads: int, ops: Ops, hold: int, progress: Callable[[Progress], None]
) -> None:
    """Merge every delta, and write its entries into `output`, as `merge_checkpoint` does for a checkpoint.

    Args:
        plan: from `counted`, or a part of it that has all tensors of its deltas.
        output, threads, ops, hold, progress: as for `merge_checkpoint`.

    Raises:
        CheckpointError: INPUT_CHANGED, also where a block has another number of entries than were counted.
    """
    packer = _Packer(plan.tensors, output)
    merge_checkpoint(deltas_of(plan), packer, threads=threads, ops=ops, hold=hold, progress=progress)


class _Deltas(Output):
    """Receives merged deltas in float32, block by block, and rounds them to their storage type."""

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        self.parts: dict[str, dict[str, PlannedTensor]] = {}
        for tensor in tensors:
            assert tensor.sparse is not None
            self.parts.setdefault(tensor.merged.name, {})[tensor.sparse.part] = tensor
        self.finished = {}

    def memory(self, memory: PageAlignedBuffer, name: str, start: int, nbytes: int) -> Any:
        return memory.array(nbytes, 0)

    def write(self, name: str, start: int, buffer: Any, memory: PageAlignedBuffer | None = None) -> None:
        parts, values = self.parts[name], buffer.view(np.float32)
        tensor, start = parts.get("values") or parts["delta"], start // 4
        assert tensor.sparse is not None
        if tensor.sparse.subtracted is None and tensor.dtype == "F32":  # as the merge wrote it, which is finite
            self.take(tensor, start, values.view(np.uint32))
            return
        if tensor.sparse.subtracted is not None:
            base = np.empty_like(values)
            tensor.sparse.subtracted.value(start, start + len(values), base)
            values = values - base
        stored = to_stored(values, tensor.dtype, tensor.rounding_key, start)
        if bad := count_nonfinite(stored, tensor.dtype):
            raise not_finite(replace(tensor.merged, dtype=tensor.dtype), bad)
        self.take(tensor, start, stored.view(_BITS[tensor.dtype]))

    @abstractmethod
    def take(self, tensor: PlannedTensor, start: int, bits: NDArray[Any]) -> None:
        """Take the entries of a delta from element `start` on.

        Args:
            tensor: its `values`, or its `delta`.
            start: flat index of the first entry.
            bits: `[E]`, those of the storage type.
        """

    def finish_tensor(self, finished: Finished) -> None:
        self.finished[finished.name] = finished


class _Counter(_Deltas):
    """Counts the entries that are not zero: by delta and first element of a block."""

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        super().__init__(tensors)
        self.counts: dict[str, dict[int, int]] = {name: {} for name in self.parts}

    def take(self, tensor: PlannedTensor, start: int, bits: NDArray[Any]) -> None:
        self.counts[tensor.merged.name][start] = int(np.count_nonzero(_filled(bits)))


class _Packer(_Deltas):
    """Writes the entries that are not zero, and their mask, into an output."""

    def __init__(self, tensors: Sequence[PlannedTensor], output: Output) -> None:
        super().__init__(tensors)
        self.output, self._slots = output, {slot.name: slot for shard in output.shards for slot in shard.slots}
        for name, parts in self.parts.items():
            if all(part.name in output.finished for part in parts.values()):
                self.finished[name] = output.finished[next(iter(parts.values())).name]

    def take(self, tensor: PlannedTensor, start: int, bits: NDArray[Any]) -> None:
        assert tensor.sparse is not None
        if tensor.sparse.part == "delta":
            self.output.write(tensor.name, start * tensor.width, bits)
            return
        filled, block = _filled(bits), tensor.sparse.blocks[start]
        if np.count_nonzero(filled) != block.entries:
            what = "has other values than in the pass that counted them"
            raise CheckpointError.of("INPUT_CHANGED", tensor.merged.name, what, "merge again")
        if block.zeros:
            filled[np.flatnonzero(~filled)[: block.zeros]] = True
        places = np.flatnonzero(filled)
        self.output.write(tensor.name, block.place * tensor.width, bits[places])
        parts, shape = self.parts[tensor.merged.name], tensor.merged.shape
        row = row_of(shape)
        if mask := parts.get("mask"):
            place = start // row * mask_shape(shape)[-1] + start % row // 8
            rows = filled.reshape(-1, row) if len(filled) % row == 0 else filled.reshape(1, -1)
            self.output.write(mask.name, place, pack(rows))
        else:
            for at, which in enumerate(divmod(start + places, row)):
                self.output.write(parts["indices"].name, (at * tensor.numel + block.place) * 4, which.astype(np.int32))

    def finish_tensor(self, finished: Finished) -> None:
        """Add the parts of a delta to the journal. The statistics of the delta are those of its values."""
        super().finish_tensor(finished)
        nothing = Tally.empty(0)
        for part, tensor in sorted(self.parts[finished.name].items()):
            self.output.writer.settle(tensor.name)
            digest = digest_of(self.output.part, self._slots[tensor.name], tensor.tile_bytes)
            about = finished if part in ("values", "delta") else Finished("", "", [], nothing.counts, nothing.total())
            self.output.finish_tensor(replace(about, name=tensor.name, digest=digest))


def _filled(bits: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries are neither 0 nor -0."""
    filled: NDArray[np.bool_] = bits << bits.dtype.type(1) != 0
    return filled
