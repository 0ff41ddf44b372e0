"""Tensors of two models, read in blocks and compared: a pair of one name, and pairs of equal bits under different names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from paft_merge.compute.blocks import tile_bounds
from paft_merge.compute.scratch import SCRATCH
from paft_merge.differences.entries import Bytes, Counts, compare, is_decoded, norm_of, total, width_of
from paft_merge.differences.kinds import Kind, TensorDifference
from paft_merge.inputs.tensor_inputs import Read

_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Pair:
    """A tensor of A and a tensor of B.

    Attributes:
        a, b: where they are read.
        rescalable: they are deltas of adapters, of which other factors can have the same product.
    """

    a: Read
    b: Read
    rescalable: bool = False

    def compared(self, name: str, other: str, tolerance: float, pool: Executor) -> TensorDifference:
        """Compare all entries.

        Args:
            name: the tensor's in A.
            other: its name in B.
            tolerance: the largest relative norm of a difference that is `close`.
            pool: reads and compares blocks.
        """
        a, b = self.a, self.b
        made = TensorDifference(
            name, "same", "" if other == name else other, (_format(a), _format(b)), (a.shape, b.shape)
        )
        if a.shape != b.shape:
            order = _order(a, b) if len(a.shape) == 2 and a.shape == b.shape[::-1] else ""
            return replace(made, kind="permuted" if order else "shape", order=order)
        if a.same_weight(b) and a.delta is b.delta:
            return _with_kind(made, "same")
        if not all(map(is_decoded, (dtype_of(a), dtype_of(b)))):
            equal = a.checkpoint.same_bytes(a.name, b.checkpoint, b.name)
            return _with_kind(made, "same" if equal else "different")
        counts = self._counts(pool)
        if not counts.unequal:
            return _with_kind(
                replace(made, unequal=0), "equal" if counts.other_bits or dtype_of(a) != dtype_of(b) else "same"
            )
        ratio = counts.norm / counts.norm_a if counts.norm_a else math.inf
        relative = ratio if math.isfinite(ratio) else None
        held = replace(
            made, unequal=counts.unequal, nonfinite=counts.nonfinite, norm=counts.norm, relative=relative,
            largest=counts.largest, at=_index(counts.at, a.shape), pair=counts.pair if counts.at >= 0 else None,
        )  # fmt: skip
        kind = self._kind(held, counts, tolerance)
        order = _order(a, b) if kind == "different" and not counts.excess else ""
        return replace(held, kind="permuted" if order else kind, order=order)

    def _kind(self, found: TensorDifference, counts: Counts, tolerance: float) -> Kind:
        if counts.nonfinite:
            return "different"
        if tolerance and found.relative is not None and found.relative <= tolerance:
            return "close"
        if self.rescalable:
            return "same delta" if found.relative is not None and found.relative <= _PRODUCTS else "different"
        return "rounded" if any(counts.one_step) else "different"

    def _counts(self, pool: Executor) -> Counts:
        """Compare block by block; blocks of equal bits are only read again for ||A|| if others differ."""
        a, b = self.a, self.b
        rows = [read.delta.row_size for read in (a, b) if read.delta]
        bounds = tile_bounds(math.prod(a.shape), math.lcm(*rows) if rows else 1)
        dtypes = dtype_of(a), dtype_of(b)

        def on_tile(bound: tuple[int, int]) -> Counts | None:
            ours, theirs = _stored(a, *bound, "diff_a"), _stored(b, *bound, "diff_b")
            equal = dtypes[0] == dtypes[1] and np.array_equal(ours, theirs)
            return None if equal else compare(ours, theirs, dtypes, bound[0])

        def norm(bound: tuple[int, int]) -> Counts:
            return Counts(norm_a=norm_of(_stored(a, *bound, "diff_a"), dtypes[0]))

        try:
            found = list(pool.map(on_tile, bounds))
            if any(one is not None and one.unequal for one in found):
                skipped = [bound for bound, one in zip(bounds, found, strict=True) if one is None]
                found += pool.map(norm, skipped)
        finally:
            for read in (a, b):
                if read.delta:
                    read.delta.release()
                read.checkpoint.release(read.name)
        return total(one for one in found if one is not None)


_PRODUCTS = 1e-6
"""The relative norm by which equal products of other float32 factors may differ."""


def dtype_of(read: Read) -> str:
    """The storage type of the entries that are compared: float32 where an adapter is added."""
    return read.dtype if read.plain else "F32"


def _format(read: Read) -> str:
    """How a tensor is stored, for reports: its type, or its quantised format."""
    return (read.checkpoint.stored_format(read.name) if read.plain else "") or dtype_of(read)


def _stored(read: Read, start: int, stop: int, key: str) -> Bytes:
    """Entries `[start, stop)` as bytes of `dtype_of`; memory of this thread until its next call with the same key."""
    held: Any = SCRATCH.array(key, (stop - start) * width_of(dtype_of(read)), np.uint8)
    if read.plain:
        read.raw(start, stop, held)
    else:
        read.value(start, stop, held.view(np.float32))
    return held  # type: ignore[no-any-return]


def _with_kind(found: TensorDifference, kind: Kind) -> TensorDifference:
    return replace(found, kind="renamed" if kind == "same" and found.other else kind)


def _index(at: int, shape: Sequence[int]) -> tuple[int, ...] | None:
    return tuple(int(i) for i in np.unravel_index(at, tuple(shape))) if at >= 0 else None


def _order(a: Read, b: Read) -> str:
    """How B orders the rows, columns or entries of A, in words; empty if they are not the same bits."""
    if not (a.plain and b.plain and a.dtype == b.dtype and a.shape):
        return ""
    ours, theirs = _line_sums(a), _line_sums(b)
    for noun, one, other in zip(("rows", "columns"), ours, theirs, strict=True):
        if len(one) == len(other) and np.array_equal(np.sort(one), np.sort(other)):
            noun = "entries" if len(a.shape) == 1 else noun
            return f"{int(np.count_nonzero(one != other)):,} of {len(one):,} {noun} moved"
    return "transposed" if np.array_equal(ours[0], theirs[1]) and np.array_equal(ours[1], theirs[0]) else ""


def _line_sums(read: Read) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """A hash of every row and of every column: the sum of their bits with fixed random weights, modulo 2**64.

    The rows of a tensor of more than two dimensions are along its last one.
    """
    width = read.shape[-1] if len(read.shape) > 1 else 1
    height, bits = math.prod(read.shape) // width, f"u{width_of(read.dtype)}"
    weights = np.random.default_rng(0).integers(1, 2**64, max(height, width), np.uint64, endpoint=False)
    rows, columns = list[NDArray[np.uint64]](), np.zeros(width, np.uint64)
    for start, stop in tile_bounds(height * width, width):
        lines = _stored(read, start, stop, "diff_a").view(bits).reshape(-1, width).astype(np.uint64)
        rows.append(lines @ weights[:width])
        columns += weights[start // width : stop // width] @ lines
    read.checkpoint.release(read.name)
    return np.concatenate(rows), columns


def equal_bits(ours: Mapping[str, Read], theirs: Mapping[str, Read]) -> Iterator[tuple[str, str]]:
    """Pairs of a tensor of A and one of B of the same type, shape and bits; each is in at most one pair.

    Args:
        ours, theirs: plain tensors by name, in the order in which equal ones are paired.
    """
    waiting = defaultdict[object, list[str]](list)
    for name, read in theirs.items():
        waiting[_digest(read)].append(name)
    for name, read in ours.items():
        some = waiting.get(_digest(read), [])
        known = sorted(some, key=lambda other: -_alike(name, other))
        for other in known:
            if read.checkpoint.same_bytes(read.name, theirs[other].checkpoint, theirs[other].name):
                some.remove(other)
                yield name, other
                break


def _digest(read: Read) -> object:
    """Type, shape, and a hash of the first 4 KiB."""
    held = bytearray(min(read.checkpoint.tensors[read.name].nbytes, _SAMPLE_BYTES))
    read.checkpoint.read_into(read.name, 0, held)
    return read.dtype, read.shape, xxhash.xxh3_128_digest(held)


def _alike(name: str, other: str) -> int:
    """Number of equal parts at the end of two names."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return next((i for i, (one, two) in enumerate(pairs) if one != two), min(name.count("."), other.count(".")) + 1)


def is_constant(read: Read) -> bool:
    """Whether the first 4 KiB repeat one entry, as those of new norms and biases do."""
    held = np.empty(min(read.checkpoint.tensors[read.name].nbytes, _SAMPLE_BYTES), np.uint8)
    read.checkpoint.read_into(read.name, 0, held)
    width = width_of(read.dtype) or 1
    rows = held[: len(held) // width * width].reshape(-1, width)
    return not len(rows) or bool((rows == rows[0]).all())
