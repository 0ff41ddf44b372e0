"""One merged tensor's inputs, and the blocks they make: bytes from checkpoints, and adapters' deltas computed on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paft_merge.blocks import Block, tile_bounds
from paft_merge.casting import widen
from paft_merge.checkpoint import DTYPES, Checkpoint
from paft_merge.loops.feed import Feed
from paft_merge.rules import Wants
from paft_merge.scratch import SCRATCH

if TYPE_CHECKING:
    from torch import Tensor

    from paft_merge.adapters import Patch

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
    patch: Patch | None = field(default=None, compare=False, repr=False)

    @property
    def dtype(self) -> str:
        return self.checkpoint.tensors[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.patch.shape if self.patch else self.checkpoint.tensors[self.name].shape

    @property
    def row(self) -> int:
        """Elements that are read together: rows of an adapter, or single ones."""
        return self.patch.row if self.patch else 1

    @property
    def plain(self) -> bool:
        """Whether its values are the stored bits, in their order."""
        return self.patch is None

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

    def fed(self, feed: Feed, start: int, out: Any) -> bool:
        """Let `feed` read the stored elements from `start` on into `out`, an array of the storage type; whether it can."""
        place = self.checkpoint.lies_at(self.name, start * DTYPES[self.dtype].bits // 8, out.nbytes)
        if place:
            feed.read(out, *place)
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
        if self.patch:
            delta = SCRATCH.array("value_delta", stop - start, np.float32)
            self.delta_of_patch(start, stop, delta, out)
            out += delta

    def tensor(self, *, baked: bool) -> Tensor:
        """The whole tensor as this source has it, in memory.

        Args:
            baked: in its storage type, the adapter rounded into it, as a merged checkpoint would hold it; else exact, as
                float32.
        """
        import torch

        if baked and not self.patch:
            return self.checkpoint.tensor(self.name)
        return self._in_memory(getattr(torch, str(DTYPES[self.dtype].torch)) if baked else torch.float32)

    def _in_memory(self, kind: Any) -> Tensor:
        """The values as a tensor of the type `kind`."""
        import torch

        made = torch.empty(math.prod(self.shape), dtype=kind)
        for start, stop in tile_bounds(len(made), self.row):
            values = SCRATCH.array("whole", stop - start, np.float32)
            self.value(start, stop, values)
            made[start:stop] = torch.from_numpy(values)
        return made.reshape(self.shape)

    def delta_of_patch(self, start: int, stop: int, out: Any, weight: Any = None) -> None:
        """The adapter's delta of elements `[start, stop)`, whole rows, float32 into `out`; `weight`: what it is added to."""
        assert self.patch is not None
        row = self.patch.row
        if weight is None and self.patch.needs_weight:
            weight = SCRATCH.array("patch_weight", stop - start, np.float32)
            self.weight(start, stop, weight)
        below = weight.reshape(-1, row) if self.patch.needs_weight else None
        self.patch.delta(start // row, stop // row, below, out.reshape(-1, row))


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
        return all(r.same_weight(reads[0]) and r.patch is reads[0].patch for r in reads)

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
        rows = {read.patch.row for read in self.reads if read.patch}
        return math.lcm(of_rule, *(rows or {max(shape[-1] if shape else 1, 1)}))

    def release(self) -> None:
        """Let go of the adapters' factors and of computed tensors, which are made when they are first needed."""
        for read in self.reads:
            if read.patch:
                read.patch.release()
            read.checkpoint.release(read.name)

    @property
    def active(self) -> list[int]:
        """Indices of the sources that a block's rows hold."""
        return [i for i, s in enumerate(self.sources) if not (self.deltas and self._idle(s))]

    def _idle(self, source: Read) -> bool:
        assert self.base is not None
        return source.same_weight(self.base) and source.patch is self.base.patch

    @_quietly()
    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Read elements `[start, stop)`; the arrays belong to this thread until its next block.

        `all_sources`: one row a source, zeros for those that have no delta; else one for each that is `active`.
        """
        rows = list(self.sources) if all_sources else [self.sources[i] for i in self.active]
        size = stop - start
        left: list[Callable[[], None]] = []  # what is read while the block is walked, to be read at once if that fails

        def again() -> None:
            for read in left:
                read()

        patches = [read.patch for read in rows if read.patch]
        feed = Feed(size, patches[0].row if patches else 1, again)
        if self.form == "raw":
            dtype = RAW[self.reads[0].dtype]
            base = SCRATCH.array("base", size if self.base else 0, dtype)
            sources = SCRATCH.array("sources", (len(rows), size), dtype)
            for read, row in [*([(self.base, base)] if self.base else []), *zip(rows, sources, strict=True)]:
                raw = partial(read.raw, start, stop, row)
                left.append(raw) if read.fed(feed, start, row) else raw()
            return Block(start, base, sources, self.subtract, feed)
        values = SCRATCH.array("sources", (len(rows), size), np.float32)
        base_f = self._base(start, stop, feed, left)
        for read, row in zip(rows, values, strict=True):
            if self.form == "values":
                read.value(start, stop, row)
            elif not self._fed(read, feed, start, row):
                self._delta(read, start, stop, row)
        base_bits = base_f if base_f.dtype == np.uint16 else base_f.view(np.uint32)
        return Block(start, base_bits, values.view(np.uint32), subtract=False, feed=feed)

    def _fed(self, source: Read, feed: Feed, start: int, out: Any) -> bool:
        """Let `feed` compute a source's delta, where it is one product; whether it is."""
        base, patch = self.base, source.patch
        if base is None or base.patch or patch is None or patch.row != feed.row or not source.same_weight(base):
            return False
        product = patch.product(start // feed.row, (start + out.size) // feed.row)
        if product:
            feed.multiply(out, *product)
        return product is not None

    def factors(self, source: int) -> tuple[Any, Any] | None:
        """B `[O, R]` and A `[R, I]` of a source's delta, float32, scale in B, where it is one product and nothing else.

        A head that is only untied from its embeddings is a product of rank 0, and has nothing to tell.
        """
        base, read = self.base, self.sources[source]
        if base is None or base.patch or read.patch is None or not read.same_weight(base) or read.patch.kind == "bias":
            return None
        pairs = read.patch.factors()
        return pairs[0] if pairs is not None and len(pairs) == 1 and pairs[0][0].shape[1] else None

    def whole(self, *, baked: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Base, or None, and every source as whole tensors in memory (see `Read.tensor`)."""
        base = self.base.tensor(baked=baked) if self.base else None
        return base, [source.tensor(baked=baked) for source in self.sources]

    def _base(self, start: int, stop: int, feed: Feed, left: list[Callable[[], None]]) -> Any:
        """The base's part of a block: stored bits where they can be used as they are, else float32."""
        if self.base is None:
            return SCRATCH.array("base", 0, np.float32)
        if self.base.dtype == "BF16" and self.base.plain and not self._extended:
            base = SCRATCH.array("base", stop - start, np.uint16)
            raw = partial(self.base.raw, start, stop, base)
            left.append(raw) if self.base.fed(feed, start, base) else raw()
            return base
        base = SCRATCH.array("base", stop - start, np.float32)
        self.base.value(start, stop, base)
        return base

    @property
    def _extended(self) -> bool:
        assert self.base is not None
        return any(s.shape != self.base.shape for s in self.sources)

    def _delta(self, source: Read, start: int, stop: int, out: Any) -> None:
        """`source - base` in float32. What both share is never subtracted, so an adapter's delta is exact."""
        base = self.base
        assert base is not None
        if source.same_weight(base):
            if source.patch:
                source.delta_of_patch(start, stop, out)
            else:
                out[:] = 0
            if base.patch and base.patch is not source.patch:
                other = SCRATCH.array("base_delta", stop - start, np.float32)
                base.delta_of_patch(start, stop, other)
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
        plain = replace(sources[0], patch=None)
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
