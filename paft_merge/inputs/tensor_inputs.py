"""The inputs of one merged tensor, read in blocks: bytes from checkpoints, and deltas of adapters, computed on the fly."""

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
"""Storage types that a block can hold unconverted, and the type of their bits."""


def _quietly() -> np.errstate:
    """Suppress NumPy's warnings about NaN and infinity: the engine reports them, with their position."""
    return np.errstate(invalid="ignore", over="ignore")


@dataclass(frozen=True)
class Read:
    """One tensor of one source: a checkpoint's tensor, and the delta that an adapter adds to it."""

    source: str
    """The model reference, for messages and the manifest."""
    checkpoint: Checkpoint = field(compare=False, repr=False)
    name: str
    delta: AdapterDelta | None = field(default=None, compare=False, repr=False)

    @property
    def dtype(self) -> str:
        """Storage type of the checkpoint's tensor."""
        return self.checkpoint.tensors[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the sum."""
        return self.delta.shape if self.delta else self.stored_shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor."""
        return self.checkpoint.tensors[self.name].shape

    @property
    def row_size(self) -> int:
        """Elements that are read together: a row of the adapter's delta, or 1."""
        return self.delta.row_size if self.delta else 1

    @property
    def plain(self) -> bool:
        """Whether its values are the stored tensor, unchanged."""
        return self.delta is None

    @property
    def stored_at(self) -> object:
        """Identity of the stored tensor; equal for the same tensor of the same checkpoint."""
        return self.checkpoint.stored_at(self.name)

    def same_weight(self, other: Read) -> bool:
        """Whether both have the same stored tensor."""
        return self.stored_at == other.stored_at

    def raw(self, start: int, stop: int, out: Any) -> None:
        """Read elements `[start, stop)` into `out`, an array of the storage type's size."""
        width = DTYPES[self.dtype].bits // 8
        self.checkpoint.read_into(self.name, start * width, out.view(np.uint8))

    def add_to(self, feed: BlockSource, start: int, row: int) -> bool:
        """Add the read of the stored elements from `start` on, into a row; False if they cannot be read from a file."""
        return self.checkpoint.add_to(feed, self.name, start, row)

    def weight(self, start: int, stop: int, out: Any) -> None:
        """Read elements `[start, stop)` of the stored tensor as float32 into `out` `[stop - start]`.

        Elements past its end are zero: an adapter that extends the vocabulary adds rows that the checkpoint lacks.
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
        """Read elements `[start, stop)`, with the delta added, as float32 into `out`."""
        self.weight(start, stop, out)
        if self.delta:
            delta = SCRATCH.array("value_delta", stop - start, np.float32)
            self.compute_delta(start, stop, delta, out)
            out += delta

    def tensor(self, *, baked: bool) -> Tensor:
        """Read the whole tensor, with the delta added.

        Args:
            baked: round to the storage type, as a merged checkpoint would hold it; otherwise float32.
        """
        import torch

        if baked and not self.delta:
            return self.checkpoint.tensor(self.name)
        return self._in_memory(getattr(torch, str(DTYPES[self.dtype].torch)) if baked else torch.float32)

    def _in_memory(self, kind: Any) -> Tensor:
        """The values as a tensor of torch dtype `kind`."""
        import torch

        made = torch.empty(math.prod(self.shape), dtype=kind)
        for start, stop in tile_bounds(len(made), self.row_size):
            values = SCRATCH.array("whole", stop - start, np.float32)
            self.value(start, stop, values)
            made[start:stop] = torch.from_numpy(values)
        return made.reshape(self.shape)

    def compute_delta(self, start: int, stop: int, out: Any, weight: Any = None) -> None:
        """Compute the adapter's delta of elements `[start, stop)` into `out`; zero past the rows that the adapter has.

        Args:
            start: first element; a multiple of `row_size`.
            stop: one past the last element; a multiple of `row_size`.
            out: `[stop - start]` float32; overwritten.
            weight: the stored elements, float32; read if needed and None.
        """
        assert self.delta is not None
        row_size, end = self.delta.row_size, min(stop, math.prod(self.delta.shape))
        held = max(end - start, 0)
        out[held:] = 0
        if not held:
            return
        if weight is None and self.delta.needs_weight:
            weight = SCRATCH.array("delta_weight", held, np.float32)
            self.weight(start, end, weight)
        rows = weight[:held].reshape(-1, row_size) if self.delta.needs_weight else None
        self.delta.compute(start // row_size, end // row_size, rows, out[:held].reshape(-1, row_size))


@dataclass(frozen=True)
class Inputs:
    """The base and the sources of one merged tensor, and the form in which its blocks hold the sources.

    `raw`     stored bits; every input is a plain tensor of the same type, bfloat16 or float32.
    `deltas`  float32 deltas from the base.
    `values`  float32 values.

    If the method needs deltas, sources that do not differ from the base are not `active`.
    """

    base: Read | None
    sources: tuple[Read, ...]
    form: Literal["raw", "deltas", "values"]
    subtract: bool
    """With `raw`: the method needs deltas."""
    without_base: bool = False
    """Blocks have zeros in place of the base, so that what a method adds to the base is all that it writes."""

    @classmethod
    def one(cls, read: Read) -> Inputs:
        """A single tensor, unchanged."""
        return cls(read, (), "deltas", subtract=False)

    @property
    def unchanged(self) -> bool:
        """Whether every input is the same tensor."""
        reads = self.reads
        return all(r.same_weight(reads[0]) and r.delta is reads[0].delta for r in reads)

    @property
    def deltas(self) -> bool:
        """Whether the method needs deltas, which a block holds or from whose values it computes them."""
        return self.form == "deltas" or self.subtract

    @property
    def reads(self) -> list[Read]:
        """The base, if there is one, and every source."""
        return [*([self.base] if self.base else []), *self.sources]

    @property
    def stored(self) -> list[Read]:
        """The reads whose stored tensors are read. The deltas of most adapters need none, so without the base there may be none."""
        if not (self.without_base and self.base):
            return self.reads
        active = [self.sources[i] for i in self.active]
        found = [r for r in active if not r.same_weight(self.base) or (r.delta and r.delta.needs_weight)]
        return [self.base, *found] if found else []

    def row_size(self, shape: Sequence[int], of_rule: int) -> int:
        """Elements per row of the merged tensor; a block is a number of whole rows of adapters and of the rule.

        Args:
            shape: shape of the merged tensor.
            of_rule: elements per row of the rule.
        """
        rows = {read.delta.row_size for read in self.reads if read.delta}
        return math.lcm(of_rule, *(rows or {max(shape[-1] if shape else 1, 1)}))

    @property
    def alike(self) -> bool:
        """Whether the base and every source have the same shape."""
        return self.base is not None and not self._extended

    def among(self, sources: Sequence[int]) -> Inputs:
        """The base and some of the sources; all must be `alike`."""
        return replace(self, sources=tuple(self.sources[i] for i in sources))

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors of all low-rank deltas, which are in memory from the first block to `release`."""
        deltas = {id(read.delta): read.delta for read in self.reads if read.delta and read.delta.rank}
        return sum(4 * delta.entries for delta in deltas.values())

    def release(self) -> None:
        """Free the adapters' factors and computed tensors; they are made again on the next use."""
        for read in self.reads:
            if read.delta:
                read.delta.release()
            read.checkpoint.release(read.name)

    @property
    def active(self) -> list[int]:
        """Indices of the sources that differ from the base, if the method needs deltas; else of all."""
        return [i for i, s in enumerate(self.sources) if not (self.deltas and self._idle(s))]

    def _idle(self, source: Read) -> bool:
        assert self.base is not None
        return source.same_weight(self.base) and source.delta is self.base.delta

    @_quietly()
    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Read elements `[start, stop)`; the arrays belong to this thread until its next block.

        Args:
            start: first element; the first of a row.
            stop: one past the last element; the end of a row.
            all_sources: one row for each source, zeros for those without a delta; else one for each that is `active`.
        """
        rows = list(self.sources) if all_sources else [self.sources[i] for i in self.active]
        width = next((read.delta.row_size for read in rows if read.delta), 1)
        feed = BlockSource(stop - start, width, lambda: self._read_again(rows, start, stop))
        if self.form == "raw":
            return self._raw_block(rows, feed, start)
        if not self.without_base and self.base and self.base.dtype == "BF16" and self.base.plain and not self._extended:
            return self._delta_block(rows, feed, start)
        return self._float_block(rows, feed, start)

    def _raw_block(self, rows: Sequence[Read], feed: BlockSource, start: int) -> Block:
        """A block of stored bits."""
        reads = [*([(-1, self.base)] if self.base else []), *enumerate(rows)]
        fed = {row for row, read in reads if read.add_to(feed, start, row)}
        return self._filled(rows, feed, fed, start, base_bits=True)

    def _delta_block(self, rows: Sequence[Read], feed: BlockSource, start: int) -> Block:
        """A block of the stored bits of the base, and float32 deltas."""
        assert self.base is not None
        fed = {-1} if self.base.add_to(feed, start, -1) else set[int]()
        fed |= {i for i, read in enumerate(rows) if self._add_product(read, feed, start, i)}
        return self._filled(rows, feed, fed, start, base_bits=True)

    def _float_block(self, rows: Sequence[Read], feed: BlockSource, start: int) -> Block:
        """A block of float32 values of the base, if any, and float32 deltas or values."""
        base = self.base
        plain = base is not None and base.plain and base.dtype == "F32" and not self.without_base and not self._extended
        fed = {-1} if plain and base and base.add_to(feed, start, -1) else set[int]()
        fed |= {i for i, read in enumerate(rows) if self._add_product(read, feed, start, i)}
        return self._filled(rows, feed, fed, start, base_bits=False)

    def _filled(self, rows: Sequence[Read], feed: BlockSource, fed: set[int], start: int, *, base_bits: bool) -> Block:
        """A block of the rows in `fed` (-1 is the base), which `feed` fills when needed, and the others, read now."""
        base, stop, subtract = self.base, start + feed.size, self.form == "raw" and self.subtract
        base_kind = RAW[base.dtype] if base and base_bits else np.uint32
        kind = RAW[rows[0].dtype] if self.form == "raw" and rows else np.uint32
        if len(fed) == len(rows) + (base is not None):
            return Block(start, np.empty(0, base_kind), np.empty((len(rows), 0), kind), subtract, feed)
        bits = SCRATCH.array("base", feed.size if base else 0, base_kind)
        sources = SCRATCH.array("sources", (len(rows), feed.size), kind)
        if self.without_base:
            bits[:] = 0
        elif base and -1 not in fed:
            base.raw(start, stop, bits) if base_bits else base.value(start, stop, bits.view(np.float32))
        for i, (read, row) in enumerate(zip(rows, sources, strict=True)):
            if i not in fed:
                self._read(read, start, stop, row)
        return Block(start, bits, sources, subtract, feed if fed else None)

    def _read(self, source: Read, start: int, stop: int, out: Any) -> None:
        """Read a source's row of a block."""
        if self.form == "raw":
            source.raw(start, stop, out)
        elif self.form == "values":
            source.value(start, stop, out.view(np.float32))
        else:
            self._delta(source, start, stop, out.view(np.float32))

    def _read_again(self, rows: Sequence[Read], start: int, stop: int) -> None:
        """Read the inputs of a block again, to raise the error behind a failed read."""
        held = np.empty(stop - start, np.float32)
        for read in [*([self.base] if self.base else []), *rows]:
            read.weight(start, stop, held)

    def _add_product(self, source: Read, feed: BlockSource, start: int, row: int) -> bool:
        """Add a source's delta, if it is one low-rank product, to `feed`; False if it is not."""
        base, delta, width = self.base, source.delta, feed.width
        if self.form != "deltas" or base is None or base.delta or delta is None or delta.row_size != width:
            return False
        if start + feed.size > math.prod(delta.shape):
            return False
        product = delta.product(start // width, (start + feed.size) // width) if source.same_weight(base) else None
        if product:
            feed.multiply(row, *product)
        return product is not None

    def factors(self, source: int) -> tuple[Any, Any] | None:
        """Return B `[O, R]` and A `[R, I]` of a source's delta, float32 with the scale in B.

        None if the delta is not one low-rank product, belongs to a bias, or has rank 0 (a head that is only untied).
        """
        pairs = self.all_factors(source)
        return pairs[0] if pairs is not None and len(pairs) == 1 else None

    def all_factors(self, source: int) -> list[tuple[Any, Any]] | None:
        """Return `factors` for each matrix of a source's delta: several if it is of experts in one tensor."""
        base, read = self.base, self.sources[source]
        if base is None or base.delta or read.delta is None or not read.same_weight(base) or read.delta.kind == "bias":
            return None
        pairs = read.delta.factors()
        return pairs if pairs is not None and pairs[0][0].shape[1] else None

    def whole(self, *, baked: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Read the base, if any, and every source as whole tensors (see `Read.tensor`)."""
        base = self.base.tensor(baked=baked) if self.base else None
        return base, [source.tensor(baked=baked) for source in self.sources]

    @property
    def _extended(self) -> bool:
        assert self.base is not None
        return any(s.shape != self.base.shape for s in self.sources)

    def _delta(self, source: Read, start: int, stop: int, out: Any) -> None:
        """`source - base` in float32. A shared stored tensor is not subtracted, so an adapter's delta is exact."""
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
    """Choose the form of the blocks: stored bits if possible, and deltas if adapters give them.

    Args:
        base: the base, if the merge has one.
        sources: at least one.
        wants: the form that the method needs, or `whole` for whole tensors.
    """
    if wants == "whole":
        return Inputs(base, tuple(sources), "values", subtract=False)
    if wants == "offsets":
        wants = "deltas" if base else "values"
    if wants == "either" and all(s.same_weight(sources[0]) for s in sources):
        # Values of one checkpoint: it is read once and the adapters are added to it.
        plain = replace(sources[0], delta=None)
        return Inputs(plain, tuple(sources), "deltas", subtract=False)
    reads = [*([base] if base and wants == "deltas" else []), *sources]
    if all(r.plain and r.dtype == reads[0].dtype and r.dtype in RAW and r.shape == reads[0].shape for r in reads):
        if wants != "deltas":
            return Inputs(None, tuple(sources), "raw", subtract=False)
        if not all(s.same_weight(sources[0]) for s in reads):
            return Inputs(base, tuple(sources), "raw", subtract=True)
    if wants == "deltas":
        return Inputs(base, tuple(sources), "deltas", subtract=False)
    return Inputs(None, tuple(sources), "values", subtract=False)
