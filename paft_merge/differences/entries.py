"""The entries of two stored tensors, compared a piece at a time: how many differ, by how much, and whether one rounding explains it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.inputs.dtypes import DTYPES, cast, widen

Bytes = NDArray[np.uint8]

_PIECE = 1 << 16
"""Entries that are compared together: few enough to stay in the cache through all steps."""
_TYPED = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip


def is_decoded(dtype: str) -> bool:
    """Whether entries of a storage type have values here; tensors of any other type are compared by their bytes."""
    return dtype in _TYPED or DTYPES[dtype].mergeable


def width_of(dtype: str) -> int:
    """Bytes of an entry of a storage type that `is_decoded`."""
    return DTYPES[dtype].bits // 8


@dataclass(frozen=True)
class Counts:
    """The comparison of some entries of two tensors, A and B.

    NaN equals NaN, and 0.0 equals -0.0. Norms and `largest` are over the entries that are finite in both.

    Attributes:
        unequal: entries whose values differ.
        nonfinite: entries of `unequal` of which one or both are NaN or infinite.
        norm: ||B - A||.
        norm_a: ||A||.
        largest: the largest |B - A|.
        at: flat index of the first entry that has it; -1 where no finite entries differ.
        pair: its values in A and in B.
        one_step: for the type of A and that of B, whether all entries, rounded to it, are equal or neighbours.
        other_bits: whether the bits of an entry differ, or its types.
        excess: sum of B's entries less that of A's, as integers of their bits, modulo 2**64: 0 for the same entries in another order.
    """

    unequal: int = 0
    nonfinite: int = 0
    norm: float = 0.0
    norm_a: float = 0.0
    largest: float = 0.0
    at: int = -1
    pair: tuple[float, float] = (0.0, 0.0)
    one_step: tuple[bool, bool] = (True, True)
    other_bits: bool = False
    excess: int = 0

    def __add__(self, other: Counts) -> Counts:
        """The comparison of these entries and of later ones."""
        peak = other if other.largest > self.largest or self.at < 0 else self
        return Counts(
            self.unequal + other.unequal,
            self.nonfinite + other.nonfinite,
            math.hypot(self.norm, other.norm),
            math.hypot(self.norm_a, other.norm_a),
            peak.largest,
            peak.at,
            peak.pair,
            (self.one_step[0] and other.one_step[0], self.one_step[1] and other.one_step[1]),
            self.other_bits or other.other_bits,
            (self.excess + other.excess) % 2**64,
        )


def compare(a: Bytes, b: Bytes, dtypes: tuple[str, str], first: int) -> Counts:
    """Compare the same entries of A and B.

    Args:
        a, b: `[bytes]`, whole entries, as many in both.
        dtypes: the storage types of A and of B, both decoded.
        first: flat index of the first entry in its tensor.
    """
    widths = tuple(map(width_of, dtypes))
    count, found = len(a) // widths[0], Counts()
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        one, other = a[start * widths[0] : stop * widths[0]], b[start * widths[1] : stop * widths[1]]
        found += _piece(one, other, dtypes, first + start, found.one_step)
    return found


def norm_of(a: Bytes, dtype: str) -> float:
    """The norm of the finite entries."""
    width = width_of(dtype) * _PIECE
    return math.hypot(*(_norm(_finite(_wide(a[start : start + width], dtype))) for start in range(0, len(a), width)))


def _piece(a: Bytes, b: Bytes, dtypes: tuple[str, str], first: int, steps: tuple[bool, bool]) -> Counts:
    """Compare one piece. `steps`: `one_step` of the pieces before, which is not looked for again where it is False."""
    if dtypes[0] == dtypes[1] and np.array_equal(a, b):
        return Counts(norm_a=_norm(_finite(_wide(a, dtypes[0]))))
    ours, theirs = _wide(a, dtypes[0]), _wide(b, dtypes[1])
    with np.errstate(invalid="ignore", over="ignore"):
        delta = theirs - ours
    unequal, nonfinite = _unequal(a, b, dtypes, ours, theirs), 0
    differing = unequal
    if not (finite := np.isfinite(delta)).all():
        unequal &= ~(np.isnan(ours) & np.isnan(theirs))
        differing = unequal & finite
        nonfinite = int(np.count_nonzero(unequal)) - int(np.count_nonzero(differing))
        delta, ours = np.where(finite, delta, 0.0), _finite(ours)
    sizes = np.abs(delta)
    peak = int(sizes.argmax())
    within = (_within_one_step(a, b, (ours, theirs), dtypes, i, differing) if steps[i] else False for i in (0, 1))
    return Counts(
        int(np.count_nonzero(unequal)),
        nonfinite,
        _norm(delta),
        _norm(ours),
        float(sizes[peak]),
        first + peak if differing.any() else -1,
        (float(ours[peak]), float(theirs[peak])),
        (next(within), next(within)),
        other_bits=True,
        excess=(_bit_sum(b, dtypes[1]) - _bit_sum(a, dtypes[0])) % 2**64,
    )


def _bit_sum(stored: Bytes, dtype: str) -> int:
    return int(stored.view(f"u{width_of(dtype)}").sum(dtype=np.uint64))


def _wide(stored: Bytes, dtype: str) -> NDArray[np.float64]:
    """Stored entries as float64; exactly, but for integers beyond 2**53."""
    if dtype in _TYPED:
        return stored.view(_TYPED[dtype]).astype(np.float64)
    out = np.empty(len(stored) // width_of(dtype), np.float32)
    widen(stored, dtype, out)
    return out.astype(np.float64)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, 0.0)


def _unequal(a: Bytes, b: Bytes, dtypes: tuple[str, str], ours: Any, theirs: Any) -> NDArray[np.bool_]:
    """Which entries differ; integers exactly."""
    whole = all(dtype in _TYPED and dtype[0] != "F" for dtype in dtypes)
    found = a.view(_TYPED[dtypes[0]]) != b.view(_TYPED[dtypes[1]]) if whole else ours != theirs
    return np.asarray(found, np.bool_)


def _norm(values: NDArray[np.float64]) -> float:
    """The norm of finite values, without overflow of their squares."""
    with np.errstate(over="ignore", under="ignore"):
        squares = float(np.dot(values, values)) if values.size else 0.0
    if 1e-250 < squares < math.inf or not values.any():
        return math.sqrt(squares)
    peak = float(np.abs(values).max())
    scaled = values / peak
    return peak * math.sqrt(float(np.dot(scaled, scaled)))


def _within_one_step(
    a: Bytes, b: Bytes, values: tuple[Any, Any], dtypes: tuple[str, str], side: int, differing: NDArray[np.bool_]
) -> bool:
    """Whether the differing entries, rounded to the type of A (0) or B (1), are equal or neighbours in it. Never of integers."""
    dtype = dtypes[side]
    if not DTYPES[dtype].mergeable:
        return not differing.any()
    places = [
        _order(stored if own == dtype else _rounded(wide, dtype), dtype)
        for stored, wide, own in zip((a, b), values, dtypes, strict=True)
    ]
    far = np.abs(places[0] - places[1]) > 1
    return not (far & differing).any()


def _rounded(values: NDArray[np.float64], dtype: str) -> Bytes:
    """Values rounded to a storage type."""
    with np.errstate(over="ignore"):
        if dtype in _TYPED:
            return values.astype(_TYPED[dtype]).view(np.uint8)
        return cast(values.astype(np.float32), dtype)


def _order(stored: Bytes, dtype: str) -> NDArray[np.int64]:
    """An integer for each entry, in the order of the values; neighbours in the type differ by 1, and both zeros are 0."""
    bits = stored.view(f"u{width_of(dtype)}").astype(np.int64)
    sign = np.int64(1) << np.int64(DTYPES[dtype].bits - 1) if DTYPES[dtype].bits < 64 else np.int64(-(2**63))
    magnitude = bits & ~sign
    return np.where(bits & sign != 0, -magnitude, magnitude)


def total(parts: Iterable[Counts]) -> Counts:
    """The sum of comparisons in the order of their entries."""
    found = Counts()
    for part in parts:
        found += part
    return found
