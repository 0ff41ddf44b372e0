"""Writes merged weights as codes with scales (`quantization: keep`), and measures what that loses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paft_merge.compute import kernels
from paft_merge.compute.blocks import Tally
from paft_merge.engine.streaming import Progress, merge_checkpoint
from paft_merge.errors import Problem
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.inputs.quantized.rounding import Rounding
from paft_merge.inputs.quantized.weights import Bytes, Piece
from paft_merge.output.direct_io import PageAlignedBuffer
from paft_merge.output.folder import Finished, Output, compact, digest_of
from paft_merge.plan import MergePlan, PlannedTensor
from paft_merge.plan.sparse_output import deltas_of

if TYPE_CHECKING:
    from paft_merge.compute.blocks import Ops


class Loss(NamedTuple):
    """What rounding to codes loses of the updates of some entries; an update is the merged value minus the base's."""

    updated: int = 0
    """Entries whose update is not zero."""
    unmoved: int = 0
    """Those of them that have the base's value."""
    update: float = 0.0
    """Sum of the squared updates."""
    error: float = 0.0
    """Sum of the squared differences between the written and the merged values."""

    def plus(self, other: Loss) -> Loss:
        """The loss of both."""
        return Loss(
            self.updated + other.updated,
            self.unmoved + other.unmoved,
            self.update + other.update,
            self.error + other.error,
        )

    def to_json(self) -> dict[str, Any]:
        """The loss for the manifest: counts, the share of entries that did not move, and the relative error of the update."""
        return {
            **self._asdict(),
            "unmoved_share": self.unmoved / self.updated if self.updated else 0.0,
            "relative_error": math.sqrt(self.error / self.update) if self.update else 0.0,
        }


def writes_codes(plan: MergePlan) -> bool:
    """Whether some tensors of a plan are codes or scales that are computed."""
    return any(tensor.coded for tensor in plan.tensors)


def write_codes(
    plan: MergePlan, output: Output, *, threads: int, ops: Ops, hold: int, progress: Callable[[Progress], None]
) -> None:
    """Merge every weight, and write its codes and scales into `output`, as `merge_checkpoint` does for plain weights.

    Args:
        plan: a merge with `quantization: keep`, or a part of it. It may lack the codes or the scales of a weight.
        output, threads, ops, hold, progress: as for `merge_checkpoint`.
    """
    encoder = _Encoder(plan, output)
    merge_checkpoint(deltas_of(plan), encoder, threads=threads, ops=ops, hold=hold, progress=progress)


def loss_of_codes(plan: MergePlan, finished: Mapping[str, Finished]) -> Loss | None:
    """Return the loss over all weights that were rounded to codes; None if there are none."""
    names = [tensor.name for tensor in plan.tensors if tensor.coded and not tensor.coded.place]
    noted = [json.loads(finished[name].noted)["quantization"] for name in names]
    return reduce(Loss.plus, (Loss(*one) for one in noted)) if noted else None


def lost(plan: MergePlan, finished: Mapping[str, Finished]) -> list[Problem]:
    """Return a notice of what the rounding to codes lost, over all weights."""
    total = loss_of_codes(plan, finished)
    if not total or not total.updated:
        return []
    shown = total.to_json()
    what = (
        f"{shown['unmoved_share']:.1%} of the entries that the merge changes in quantised weights did not move, and the "
        f"relative error of the update is {shown['relative_error']:.3g}, because their codes are coarse"
    )
    fix = "remove quantization: keep for plain weights"
    if plan.recipe.rounding != "stochastic":
        fix += ", or write rounding: stochastic"
    return [Problem("QUANTISED", plan.config_source.ref, what, fix)]


class _Encoder(Output):
    """Receives merged weights in float32, block by block, and rounds them to codes; passes other tensors on."""

    def __init__(self, plan: MergePlan, output: Output) -> None:
        self.output, self.lock = output, Lock()
        self.parts: dict[str, dict[str, PlannedTensor]] = {}
        for tensor in plan.tensors:
            if tensor.coded:
                self.parts.setdefault(tensor.merged.name, {})[_stored_name(tensor)] = tensor
        self.refit = plan.recipe.scales == "refit"
        self.losses: dict[str, dict[int, Loss]] = {name: {} for name in self.parts}
        self.panels: dict[tuple[str, int], _Panel] = {}
        self._slots = {slot.name: slot for shard in output.shards for slot in shard.slots}
        self.finished = {name: done for name, done in output.finished.items() if name not in self.parts}
        for name, parts in self.parts.items():
            if all(part.name in output.finished for part in parts.values()):
                self.finished[name] = output.finished[next(iter(parts.values())).name]

    def memory(self, memory: PageAlignedBuffer, name: str, start: int, nbytes: int) -> Any:
        if name in self.parts:
            return memory.array(nbytes, 0)
        return self.output.memory(memory, name, start, nbytes)

    def write(self, name: str, start: int, buffer: Any, memory: PageAlignedBuffer | None = None) -> None:
        if name not in self.parts:
            self.output.write(name, start, buffer, memory)
            return
        parts = self.parts[name]
        some = next(iter(parts.values()))
        coded, values, start = some.coded, buffer.view(np.float32), start // 4
        assert coded is not None
        held, width = coded.template.checkpoint, coded.written.shape[-1]
        assert isinstance(held, Dequantized)
        base = np.empty_like(values)
        coded.template.value(start, start + len(values), base)
        rows = np.where(values == base, base, values).reshape(
            -1, width
        )  # merges lose the sign of zero, which is a code
        how = Rounding(self.refit, some.rounding_key)
        pieces, decoded = coded.written.encode(held.parts, start // width, rows, how)
        self.losses[name][start] = _loss(values, base, decoded.reshape(-1))
        for piece in pieces:
            if piece.part in parts:
                self._write_piece(parts[piece.part], piece)

    def _write_piece(self, tensor: PlannedTensor, piece: Piece) -> None:
        """Write bytes that follow each other; keep others until their panel, all runs from the first to the last, is full."""
        runs, nbytes = piece.data.shape
        if runs == 1 or nbytes == piece.stride:
            self.output.write(tensor.name, piece.start, np.ascontiguousarray(piece.data).reshape(-1))
            return
        first, column = divmod(piece.start, runs * piece.stride)
        with self.lock:
            panel = self.panels.setdefault((tensor.name, first), _Panel(np.empty((runs, piece.stride), np.uint8)))
            panel.data[:, column : column + nbytes] = piece.data
            panel.filled += nbytes
            full = panel.filled == piece.stride
            if full:
                del self.panels[tensor.name, first]
        if full:
            self.output.write(tensor.name, first * panel.data.size, panel.data.reshape(-1))

    def finish_tensor(self, finished: Finished) -> None:
        """Add the stored tensors of a weight to the journal. The statistics of the weight are those of its codes."""
        self.finished[finished.name] = finished
        if finished.name not in self.parts:
            self.output.finish_tensor(finished)
            return
        found = self.losses.pop(finished.name)
        total = reduce(Loss.plus, (found[start] for start in sorted(found)))
        noted = compact({**json.loads(finished.noted), "quantization": list(total)})
        nothing = Tally.empty(0)
        for tensor in sorted(self.parts[finished.name].values(), key=lambda one: one.name):
            assert tensor.coded is not None
            self.output.writer.settle(tensor.name)
            digest = digest_of(self.output.part, self._slots[tensor.name], tensor.tile_bytes)
            about = Finished("", "", [], nothing.counts, nothing.total())
            if not tensor.coded.place:
                about = replace(finished, noted=noted)
            self.output.finish_tensor(replace(about, name=tensor.name, digest=digest))


class _Panel:
    """Bytes of a stored tensor that arrive column by column."""

    def __init__(self, data: Bytes) -> None:
        self.data, self.filled = data, 0


def _stored_name(tensor: PlannedTensor) -> str:
    assert tensor.coded is not None
    return tensor.coded.written.parts[tensor.coded.place]


def _loss(merged: Any, base: Any, written: Any) -> Loss:
    counts, sums = np.empty(2, np.int64), np.empty(2)
    kernels.lost(merged, base, written, counts, sums, kernels.lines(2, of=np.float64))
    return Loss(*counts.tolist(), *sums.tolist())
