"""A tensor with one row per token in the order of another vocabulary: rows are gathered, and missing rows filled.

A block gathers rows of stored tensors; consecutive rows are one `pread`, so that only the block is in memory. Deltas of
adapters are gathered separately from the stored rows, which keeps them exact.

    V  rows of the output       D  donors: this tensor in every model       W  elements per row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from paft_merge.compute.blocks import tile_bounds
from paft_merge.compute.scratch import SCRATCH
from paft_merge.inputs.adapters.deltas import AdapterDelta
from paft_merge.inputs.adapters.rows import Array
from paft_merge.inputs.checkpoint import DTYPES
from paft_merge.inputs.dtypes import widen
from paft_merge.inputs.tensor_inputs import Read

if TYPE_CHECKING:
    from torch import Tensor

ZERO, MEAN, PAD = -1, -2, -3
"""Donors that are not models: zeros; the mean of a row of several models; the mean of all rows that are not `PAD`."""

Ids = NDArray[np.int64]
Take = Callable[[Read, Ids, Any], None]
"""Writes the given rows of a tensor, or of its adapter's delta, into `[len(rows), W]` float32."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """The origin of each row of one model's tensor, for another vocabulary.

    Attributes:
        donor: `[V]`: index of a donor, or `ZERO`, `MEAN`, `PAD`.
        row: `[V]`: the row in that donor; for `MEAN` the index into `shared`.
        shared: `[S, D]`: for each mean the row in each donor, -1 for donors without it; at least one has it.
    """

    donor: Ids
    row: Ids
    shared: Ids

    def is_own(self, model: int, rows: int) -> bool:
        """Whether the tensor of donor `model`, of `rows` rows, is already in this order."""
        return len(self.row) == rows and bool((self.donor == model).all() and (self.row == np.arange(rows)).all())


@dataclass(frozen=True)
class Gathered(Read):
    """One model's tensor in the output's vocabulary, whose rows are the first dimension longer than one."""

    donors: tuple[Read, ...] = field(default=(), compare=False, repr=False)
    """This tensor in every model of the merge, each in the model's vocabulary."""
    map: RowMap = field(kw_only=True, compare=False, repr=False)
    _mean: dict[Take, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    _lock: Any = field(default_factory=Lock, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, read: Read, donors: tuple[Read, ...], rows: RowMap) -> Gathered:
        """`read`, which is one of `donors`, with its rows mapped by `rows`."""
        made = cls(read.source, read.checkpoint, read.name, None, donors, map=rows)
        used = [donors[i] for i in np.unique(rows.donor) if i >= 0]
        used += [donor for donor, column in zip(donors, rows.shared.T, strict=True) if (column >= 0).any()]
        if not any(donor.delta for donor in used):
            return made
        deltas = tuple(dict.fromkeys(donor.delta for donor in used if donor.delta))
        kind = read.delta.kind if read.delta else deltas[0].kind
        delta = RemappedDelta(made.shape, made.row_size, kind, deltas, made._fetch)
        return cls(read.source, read.checkpoint, read.name, delta, donors, map=rows)

    @property
    def shape(self) -> tuple[int, ...]:
        own = self.checkpoint.tensors[self.name].shape
        count = len(self.map.row)
        return (1, count) if is_flat(own) else (count, *own[1:])

    @property
    def row_size(self) -> int:
        return max(math.prod(self.shape) // max(len(self.map.row), 1), 1)

    @property
    def plain(self) -> bool:
        return False

    @cached_property
    def stored_at(self) -> object:
        """Identity of the stored rows; equal for the same rows in the same order."""
        places: dict[object, int] = {}
        number = np.array([places.setdefault(donor.stored_at, len(places)) for donor in self.donors], np.int64)
        donor = np.where(self.map.donor < 0, self.map.donor, number[np.maximum(self.map.donor, 0)])
        digest = xxhash.xxh3_128()
        for part in (donor, self.map.row, self.map.shared, number):
            digest.update(part.tobytes())
        return tuple(places), digest.digest()

    def weight(self, start: int, stop: int, out: Any) -> None:
        self._gather(start // self.row_size, stop // self.row_size, _stored, out)

    def tensor(self, *, baked: bool) -> Tensor:
        """As `Read.tensor`; `baked` rounds to the type that all donors are promoted to."""
        import torch

        kind = torch.float32
        if baked:
            kind = torch.empty(0, dtype=_torch_dtype(self)).dtype
            for donor in self.donors:
                kind = torch.promote_types(kind, _torch_dtype(donor))
        return self._in_memory(kind)

    def _fetch(self, first: int, last: int, out: Any) -> None:
        """The adapters' deltas of rows `[first, last)`, into `out` `[last - first, W]`."""
        self._gather(first, last, _added, out)

    def _gather(self, first: int, last: int, take: Take, out: Any) -> None:
        """Rows `[first, last)` by `take`, into `out`, float32."""
        table = out.reshape(last - first, self.row_size)
        donor, row = self.map.donor[first:last], self.map.row[first:last]
        for one in np.unique(donor):
            places = np.flatnonzero(donor == one)
            if one == ZERO:
                table[places] = 0
            elif one == PAD:
                table[places] = self._padding(take)
            elif one == MEAN:
                table[places] = self._means(row[places], take)
            elif len(places) == len(table):
                take(self.donors[one], row, table)
            else:
                held = SCRATCH.array("gathered", (len(places), self.row_size), np.float32)
                take(self.donors[one], row[places], held)
                table[places] = held

    def _means(self, lines: Ids, take: Take) -> Any:
        """The means of rows that several models share, `[len(lines), W]`; summed in the order of the donors in float64."""
        total, count = np.zeros((len(lines), self.row_size)), np.zeros((len(lines), 1))
        for donor, rows in zip(self.donors, self.map.shared[lines].T, strict=True):
            has = np.flatnonzero(rows >= 0)
            if not len(has):
                continue
            held = np.empty((len(has), self.row_size), np.float32)
            take(donor, rows[has], held)
            total[has] += held
            count[has] += 1
        return total / count

    def _padding(self, take: Take) -> Any:
        """The mean of all rows that are not padding, `[W]`, computed once, in one pass over the tensor."""
        with self._lock:
            if take not in self._mean:
                total, count = np.zeros(self.row_size), 0
                for start, stop in tile_bounds(math.prod(self.shape), self.row_size):
                    bounds = start // self.row_size, stop // self.row_size
                    known = np.flatnonzero(self.map.donor[slice(*bounds)] != PAD)
                    if len(known):
                        # Padding follows the tokens, except for ids that a tokenizer skips.
                        parts = [(int(a), int(b)) for a, b in _runs(known + bounds[0])]
                        for first, many in parts:
                            held = np.empty((many, self.row_size), np.float32)
                            self._gather(first, first + many, take, held)
                            total += held.sum(0, dtype=np.float64)
                        count += len(known)
                self._mean[take] = total / max(count, 1)
            return self._mean[take]


def is_flat(shape: tuple[int, ...]) -> bool:
    """Whether the vocabulary is the second dimension, as the first is one (BART's `final_logits_bias`)."""
    return len(shape) == 2 and shape[0] == 1 and shape[1] > 1


def rows_of(shape: tuple[int, ...]) -> int:
    """Number of rows of a tensor that has one per token."""
    return shape[1] if is_flat(shape) else shape[0] if shape else 0


def _stored(read: Read, rows: Ids, out: Any) -> None:
    """Stored rows; zero past the last one, where an adapter extends the vocabulary."""
    info = read.checkpoint.tensors[read.name]
    inside = np.flatnonzero(rows < rows_of(info.shape))
    if len(inside) < len(rows):
        out[:] = 0
        if len(inside):
            held = np.empty((len(inside), out.shape[1]), np.float32)
            _stored(read, rows[inside], held)
            out[inside] = held
        return
    size = info.nbytes // rows_of(info.shape)
    bits = SCRATCH.array("gathered_bits", (len(rows), size), np.uint8)
    for at, (first, count) in _runs_with_index(rows):
        read.checkpoint.read_into(read.name, first * size, bits[at : at + count])
    widen(bits.reshape(-1), info.dtype, out.reshape(-1))


def _added(read: Read, rows: Ids, out: Any) -> None:
    """The adapter's delta of rows; zero without an adapter."""
    if read.delta is None:
        out[:] = 0
        return
    width = out.shape[1]
    for at, (first, count) in _runs_with_index(rows):
        read.compute_delta(first * width, (first + count) * width, out[at : at + count].reshape(-1))


def _runs_with_index(rows: Ids) -> Iterator[tuple[int, tuple[int, int]]]:
    """The runs of `rows`, each with the index where it begins."""
    at = 0
    for first, count in _runs(rows):
        yield at, (first, count)
        at += count


def _runs(rows: Ids) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers in `rows`, as first and count."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    begins = [0, *cuts.tolist()]
    for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True):
        yield int(rows[begin]), end - begin


def _torch_dtype(read: Read) -> Any:
    import torch

    return getattr(torch, str(DTYPES[read.checkpoint.tensors[read.name].dtype].torch))


Fetch = Callable[[int, int, Array], None]


class RemappedDelta(AdapterDelta):
    """The rows of other deltas in another order.

    Args:
        shape, row_size: as for `AdapterDelta`.
        kind: kind of the delta of the model's adapter.
        deltas: the other deltas.
        fetch: writes rows `[start, stop)` of the delta into its last argument.
    """

    def __init__(
        self, shape: tuple[int, ...], row_size: int, kind: str, deltas: Sequence[AdapterDelta], fetch: Fetch
    ) -> None:
        super().__init__(shape, row_size, kind)
        self._deltas, self._fetch = deltas, fetch
        self.rank = max((delta.rank for delta in deltas), default=0)

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        self._fetch(start, stop, out)

    def release(self) -> None:
        for delta in self._deltas:
            delta.release()
