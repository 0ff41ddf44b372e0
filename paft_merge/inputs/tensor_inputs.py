"""One merged tensor's inputs, and the blocks they make: bytes from checkpoints, and adapters' deltas computed on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paft_merge.compute.blocks import Block, Wants, tile_bounds
from paft_merge.compute.kernels.block_source import BlockSource
from paft_merge.compute.scratch import SCRATCH
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.dtypes import widen

if TYPE_CHECKING:
    from torch import Tensor

    from paft_merge.inputs.adapters import AdapterDelta

RAW = {"BF16": np.uint16, "F32": np.uint32}
"""Storage types that a block holds as they are."""


def _quietly() -> np.errstate:
    """Let NaN and infinity pass without NumPy's warning: the engine tells of them, with their place."""
    return np.errstate(invalid="ignore", over="ignore")


@dataclass(frozen=True)
class Read:
    """One tensor as one source has it: a checkpoint's tensor, and what an adapter does to it."""

    source: str
    """The model reference, as messages and the manifest show it."""
    checkpoint: Checkpoint = field(compare=False, repr=False)
    name: str
    delta: AdapterDelta | None = field(default=None, compare=False, repr=False)

    @property
    def dtype(self) -> str:
        return self.checkpoint.tensors[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.delta.shape if self.delta else self.checkpoint.tensors[self.name].shape

    @property
    def row_size(self) -> int:
        """Elements that are read together: rows of an adapter, or single ones."""
        return self.delta.row_size if self.delta else 1

    @property
    def plain(self) -> bool:
        """Whether its values are the stored bits, in their order."""
        return self.delta is None

    @property
    def stored_at(self) -> object:
        """Where what is stored of it lies; equal for the same tensor of the same checkpoint."""
        return self.checkpoint.place, self.name

    def same_weight(self, other: Read) -> bool:
        """Whether both begin with the very same stored tensor."""
        return self.stored_at == other.stored_at

    def raw(self, start: int, stop: int, out: Any) -> None:
        """Read elements `[start, stop)` into `out`, an array of the storage type's size."""
        width = DTYPES[self.dtype].bits // 8
        self.checkpoint.read_into(self.name, start * width, out.view(np.uint8))

    def fed(self, feed: BlockSource, start: int, row: int) -> bool:
        """Let `feed` read the stored elements from `start` on into a row; whether it can."""
        width = DTYPES[self.dtype].bits // 8
        place = self.checkpoint.lies_at(self.name, start * width, feed.size * width)
        if place:
            feed.read(row, *place)
        return place is not None

    def weight(self, start: int, stop: int, out: Any) -> None:
        """Elements `[start, stop)` of the stored tensor as float32 into `out` `[stop - start]`; zero beyond its end.

        A vocabulary that an adapter has extended has rows that the checkpoint lacks; nothing is there to be added to.
        """
        stored = self.checkpoint.tensors[self.name]
        end = min(stop, stored.numel)
        if end < stop:
            out[max(end - start, 0) :] = 0
        if end <= start:
            return
        if self.dtype == "F32":
            self.raw(start, end, out[: end - start])
            return
        size = DTYPES[self.dtype].bits // 8
        held = SCRATCH.array("stored", (end - start) * size, np.uint8)
        self.checkpoint.read_into(self.name, start * size, held)
        widen(held, self.dtype, out[: end - start])

    @_quietly()
    def value(self, start: int, stop: int, out: Any) -> None:
        """Elements `[start, stop)` as this source has them, float32 into `out`."""
        self.weight(start, stop, out)
        if self.delta:
            delta = SCRATCH.array("value_delta", stop - start, np.float32)
            self.compute_delta(start, stop, delta, out)
            out += delta

    def tensor(self, *, baked: bool) -> Tensor:
        """The whole tensor as this source has it, in memory.

        Args:
            baked: in its storage type, the adapter rounded into it, as a merged checkpoint would hold it; else exact, as
                float32.
        """
        import torch

        if baked and not self.delta:
            return self.checkpoint.tensor(self.name)
        return self._in_memory(getattr(torch, str(DTYPES[self.dtype].torch)) if baked else torch.float32)

    def _in_memory(self, kind: Any) -> Tensor:
        """The values as a tensor of the type `kind`."""
        import torch

        made = torch.empty(math.prod(self.shape), dtype=kind)
        for start, stop in tile_bounds(len(made), self.row_size):
            values = SCRATCH.array("whole", stop - start, np.float32)
            self.value(start, stop, values)
            made[start:stop] = torch.from_numpy(values)
        return made.reshape(self.shape)

    def compute_delta(self, start: int, stop: int, out: Any, weight: Any = None) -> None:
        """The adapter's delta of elements `[start, stop)`, whole rows, float32 into `out`; `weight`: what it is added to."""
        assert self.delta is not None
        row = self.delta.row_size
        if weight is None and self.delta.needs_weight:
            weight = SCRATCH.array("delta_weight", stop - start, np.float32)
            self.weight(start, stop, weight)
        below = weight.reshape(-1, row) if self.delta.needs_weight else None
        self.delta.compute(start // row, stop // row, below, out.reshape(-1, row))


@dataclass(frozen=True)
class Inputs:
    """The base and the sources of one merged tensor, and in which form its blocks hold them.

    `raw`     values as stored; every input is a plain tensor of the same type, bfloat16 or float32.
    `deltas`  float32 deltas from the base.
    `values`  float32 values.

    Where deltas are wanted, a source that does not differ from the base has none and is not `active`.
    """

    base: Read | None
    sources: tuple[Read, ...]
    form: Literal["raw", "deltas", "values"]
    subtract: bool
    """With `raw`: the rule wants deltas."""

    @classmethod
    def one(cls, read: Read) -> Inputs:
        """One tensor, as it is."""
        return cls(read, (), "deltas", subtract=False)

    @property
    def unchanged(self) -> bool:
        """Whether every input is the same tensor."""
        reads = self.reads
        return all(r.same_weight(reads[0]) and r.delta is reads[0].delta for r in reads)

    @property
    def deltas(self) -> bool:
        """Whether a block's sources are deltas, or stand for them."""
        return self.form == "deltas" or self.subtract

    @property
    def reads(self) -> list[Read]:
        """The base, if there is one, and every source."""
        return [*([self.base] if self.base else []), *self.sources]

    def row(self, shape: Sequence[int], of_rule: int) -> int:
        """Elements of a row of the merged tensor: blocks are whole rows, as adapters' deltas are, and of those of the rule."""
        rows = {read.delta.row_size for read in self.reads if read.delta}
        return math.lcm(of_rule, *(rows or {max(shape[-1] if shape else 1, 1)}))

    def release(self) -> None:
        """Let go of the adapters' factors and of computed tensors, which are made when they are first needed."""
        for read in self.reads:
            if read.delta:
                read.delta.release()
            read.checkpoint.release(read.name)

    @property
    def active(self) -> list[int]:
        """Indices of the sources that a block's rows hold."""
        return [i for i, s in enumerate(self.sources) if not (self.deltas and self._idle(s))]

    def _idle(self, source: Read) -> bool:
        assert self.base is not None
        return source.same_weight(self.base) and source.delta is self.base.delta

    @_quietly()
    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Read elements `[start, stop)`; the arrays belong to this thread until its next block.

        `all_sources`: one row a source, zeros for those that have no delta; else one for each that is `active`.
        """
        rows = list(self.sources) if all_sources else [self.sources[i] for i in self.active]
        size, raw, base = stop - start, self.form == "raw", self.base
        deltas = [read.delta for read in rows if read.delta]
        feed = BlockSource(size, deltas[0].row_size if deltas else 1, lambda: self._reread(rows, start, stop))
        stored = base is not None and (raw or (base.dtype == "BF16" and base.plain and not self._extended))
        kinds = (RAW[base.dtype] if stored and base else np.uint32), (RAW[rows[0].dtype] if raw and rows else np.uint32)
        fed = {-1} if stored and base and base.fed(feed, start, -1) else set[int]()
        fed |= {
            i for i, read in enumerate(rows) if (read.fed(feed, start, i) if raw else self._fed(read, feed, start, i))
        }
        if len(fed) == len(rows) + (base is not None):
            return Block(start, np.empty(0, kinds[0]), np.empty((len(rows), 0), kinds[1]), raw and self.subtract, feed)
        bits = SCRATCH.array("base", size if base else 0, kinds[0])
        sources = SCRATCH.array("sources", (len(rows), size), kinds[1])
        if base and -1 not in fed:
            base.raw(start, stop, bits) if stored else base.value(start, stop, bits.view(np.float32))
        for i, (read, row) in enumerate(zip(rows, sources, strict=True)):
            if i not in fed:
                self._read(read, start, stop, row)
        return Block(start, bits, sources, raw and self.subtract, feed if fed else None)

    def _read(self, source: Read, start: int, stop: int, out: Any) -> None:
        """A source's row of a block."""
        if self.form == "raw":
            source.raw(start, stop, out)
        elif self.form == "values":
            source.value(start, stop, out.view(np.float32))
        else:
            self._delta(source, start, stop, out.view(np.float32))

    def _reread(self, rows: Sequence[Read], start: int, stop: int) -> None:
        """Read what a block is made of once more, to be told what is wrong with it."""
        held = np.empty(stop - start, np.float32)
        for read in [*([self.base] if self.base else []), *rows]:
            read.weight(start, stop, held)

    def _fed(self, source: Read, feed: BlockSource, start: int, row: int) -> bool:
        """Let `feed` compute a source's delta, where it is one product; whether it is."""
        base, delta, width = self.base, source.delta, feed.width
        if self.form != "deltas" or base is None or base.delta or delta is None or delta.row_size != width:
            return False
        product = delta.product(start // width, (start + feed.size) // width) if source.same_weight(base) else None
        if product:
            feed.multiply(row, *product)
        return product is not None

    def factors(self, source: int) -> tuple[Any, Any] | None:
        """B `[O, R]` and A `[R, I]` of a source's delta, float32, scale in B, where it is one product and nothing else.

        A head that is only untied from its embeddings is a product of rank 0, and has nothing to tell.
        """
        base, read = self.base, self.sources[source]
        if base is None or base.delta or read.delta is None or not read.same_weight(base) or read.delta.kind == "bias":
            return None
        pairs = read.delta.factors()
        return pairs[0] if pairs is not None and len(pairs) == 1 and pairs[0][0].shape[1] else None

    def whole(self, *, baked: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Base, or None, and every source as whole tensors in memory (see `Read.tensor`)."""
        base = self.base.tensor(baked=baked) if self.base else None
        return base, [source.tensor(baked=baked) for source in self.sources]

    @property
    def _extended(self) -> bool:
        assert self.base is not None
        return any(s.shape != self.base.shape for s in self.sources)

    def _delta(self, source: Read, start: int, stop: int, out: Any) -> None:
        """`source - base` in float32. What both share is never subtracted, so an adapter's delta is exact."""
        base = self.base
        assert base is not None
        if source.same_weight(base):
            if source.delta:
                source.compute_delta(start, stop, out)
            else:
                out[:] = 0
            if base.delta and base.delta is not source.delta:
                other = SCRATCH.array("base_delta", stop - start, np.float32)
                base.compute_delta(start, stop, other)
                out -= other
            return
        source.value(start, stop, out)
        other = SCRATCH.array("base_value", stop - start, np.float32)
        base.value(start, stop, other)
        out -= other


def inputs_for(base: Read | None, sources: Sequence[Read], wants: Wants | Literal["whole"]) -> Inputs:
    """Choose the form of the blocks: stored values where no arithmetic is needed to get them, deltas where adapters give them."""
    if wants == "whole":
        return Inputs(base, tuple(sources), "values", subtract=False)
    if wants == "offsets":
        wants = "deltas" if base else "values"
    if wants == "either" and all(s.same_weight(sources[0]) for s in sources):
        # Values that share their checkpoint: the shared part is read once and the adapters are added to it.
        plain = replace(sources[0], delta=None)
        return Inputs(plain, tuple(sources), "deltas", subtract=False)
    reads = [*([base] if base and wants == "deltas" else []), *sources]
    if all(r.plain and r.dtype == reads[0].dtype and r.dtype in RAW and r.shape == reads[0].shape for r in reads):
        if wants != "deltas":
            return Inputs(None, tuple(sources), "raw", subtract=False)
        if not all(s.same_weight(sources[0]) for s in reads):
            return Inputs(base, tuple(sources), "raw", subtract=True)
    return (
        Inputs(base, tuple(sources), "deltas", False)
        if wants == "deltas"
        else Inputs(None, tuple(sources), "values", False)
    )
