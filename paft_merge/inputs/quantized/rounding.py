"""Rounds float32 values to codes with scales, to nearest or at random without bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paft_merge.inputs.dtypes import uniform

Array = NDArray[Any]


@dataclass(frozen=True)
class FloatGrid:
    """The values of a float of 8 or 4 bits.

    Attributes:
        bits: bits of the mantissa.
        lowest: exponent of the smallest normal number.
        most: the code of the largest magnitude.
        sign: bit of the sign.
        signed_zero: whether zero has a sign; else the code of minus zero is NaN.
    """

    bits: int
    lowest: int
    most: int
    sign: int = 7
    signed_zero: bool = True

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """The value of each code, `[2 << sign]`; of codes past `most` it has no meaning."""
        codes = np.arange(1 << self.sign)
        exponent, mantissa = codes >> self.bits, codes & ((1 << self.bits) - 1)
        normal = exponent > 0
        found = np.ldexp(mantissa + (normal << self.bits), np.where(normal, exponent - 1, 0) + self.lowest - self.bits)
        return np.concatenate([found, -found]).astype(np.float32)

    @property
    def largest(self) -> np.float32:
        """The largest value."""
        found: np.float32 = self.values[self.most]
        return found

    def codes(self, values: NDArray[np.float32], chances: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        """Round values to codes; those out of range become the largest magnitude.

        Args:
            values: `[*shape]`, without NaN.
            chances: `[*shape]` in [0, 1), which round up or down without bias; None rounds to nearest even.
        """
        magnitudes = np.minimum(np.abs(values), self.largest)
        exponents = (magnitudes.view(np.uint32) >> np.uint32(23)).astype(np.int32) - 127
        np.maximum(exponents, self.lowest, out=exponents)
        steps = np.ldexp(magnitudes, self.bits - exponents)
        if chances is None:
            np.rint(steps, out=steps)
        else:
            down = np.floor(steps)
            steps = down + (chances < steps - down)
        found = (((exponents - self.lowest) << self.bits) + steps.astype(np.int32)).astype(np.uint8)
        negative = np.signbit(values)
        if not self.signed_zero:
            negative &= found != 0
        return found | (negative.astype(np.uint8) << np.uint8(self.sign))


FLOAT8_GRIDS = {
    "F8_E4M3": FloatGrid(3, -6, 0x7E),
    "F8_E5M2": FloatGrid(2, -14, 0x7B),
    "F8_E4M3FNUZ": FloatGrid(3, -7, 0x7F, signed_zero=False),
    "F8_E5M2FNUZ": FloatGrid(2, -15, 0x7F, signed_zero=False),
}
"""The grid of each 8-bit float."""
E2M1 = FloatGrid(1, 0, 7, sign=3)
"""The 4-bit float of MXFP4."""


class Rounding(NamedTuple):
    """How values are rounded to codes.

    Attributes:
        refit: compute the scale of a block again where that is nearer to its values; else every scale is kept.
        key: stream of stochastic rounding; 0 rounds to nearest.
    """

    refit: bool = True
    key: int = 0


class Scales(NamedTuple):
    """Scales of blocks as they are stored.

    Attributes:
        bits: `[groups, columns]`, unsigned integers.
        values: the same as float32.
        dtype: their storage type.
        exponents: whether they are bytes that hold exponents of two.
    """

    bits: Array
    values: NDArray[np.float32]
    dtype: str
    exponents: bool


class Rounded(NamedTuple):
    """Codes with scales.

    Attributes:
        codes: `[groups, rows, columns, width]`, one byte each.
        scales: `[groups, columns]`, in the type of `Scales.bits`.
        values: what the codes mean, `[groups, rows, columns, width]`.
    """

    codes: NDArray[np.uint8]
    scales: Array
    values: NDArray[np.float32]


def round_blocks(
    values: NDArray[np.float32], grid: FloatGrid, stored: Scales, how: Rounding, chances: NDArray[np.float32] | None
) -> Rounded:
    """Round blocks of values to codes.

    A block has the stored scale or, with `refit`, the one for its largest magnitude if that makes its squared error smaller.
    A small change of a block is lost less often with the stored scale: another scale changes the rounding of every entry.

    Args:
        values: `[groups, rows, columns, width]`; a block is `[rows, width]`.
        grid: the values of the codes.
        stored: the scales of the checkpoint.
        how: which scales to try.
        chances: as for `FloatGrid.codes`, of the shape of `values`.
    """
    with np.errstate(all="ignore"):
        most = np.abs(values).max(axis=(1, 3))
        best, error = _with(values, grid, stored.bits, stored.values), None
        for bits, scale in _fitted(most, grid, stored) if how.refit else ():
            usable = np.isfinite(scale) & (scale > 0) & ((chances is None) | (most <= grid.largest * scale))
            if error is None:
                error = _error(values, best)
                if chances is not None:
                    error[most > grid.largest * np.abs(stored.values)] = np.inf  # clipped values have a bias
            other = _with(values, grid, bits, np.where(usable, scale, 1).astype(np.float32))
            theirs = np.where(usable, _error(values, other), np.inf)
            better = theirs < error
            if better.any():
                error = np.where(better, theirs, error)
                at = better[:, None, :, None]
                best = _Tried(
                    *(np.where(at if a.ndim == 4 else better, b, a) for a, b in zip(best, other, strict=True))
                )
        if chances is not None:
            exact = best.decoded == values
            drawn = grid.codes(_divided(values, best.scale), chances)
            codes = np.where(exact, best.codes, drawn)
            best = best._replace(codes=codes, decoded=grid.values[codes] * best.scale[:, None, :, None])
    return Rounded(best.codes, best.bits, best.decoded)


class _Tried(NamedTuple):
    codes: NDArray[np.uint8]
    bits: Array
    scale: NDArray[np.float32]
    decoded: NDArray[np.float32]

    def where(self, better: NDArray[np.bool_], other: _Tried) -> _Tried:
        """These blocks, with those of `other` where they are better; `better`: `[groups, columns]`."""
        at = better[:, None, :, None]
        return _Tried(
            np.where(at, other.codes, self.codes),
            np.where(better, other.bits, self.bits),
            np.where(better, other.scale, self.scale),
            np.where(at, other.decoded, self.decoded),
        )


def _with(values: NDArray[np.float32], grid: FloatGrid, bits: Array, scale: NDArray[np.float32]) -> _Tried:
    codes = grid.codes(_divided(values, scale))
    return _Tried(codes, bits, scale, grid.values[codes] * scale[:, None, :, None])


def _divided(values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values over the scale of their block; zero where it is zero."""
    wide = scale[:, None, :, None]
    return np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)


def _error(values: NDArray[np.float32], tried: _Tried) -> NDArray[np.float64]:
    """The squared error of each block."""
    found: NDArray[np.float64] = np.square(tried.decoded - values).sum(axis=(1, 3), dtype=np.float64)
    return found


def _fitted(most: NDArray[np.float32], grid: FloatGrid, stored: Scales) -> list[tuple[Array, NDArray[np.float32]]]:
    """Scales for blocks with these largest magnitudes, as bits and as values: the least that clips none; of exponents also the next smaller."""
    wanted = (most / grid.largest).astype(np.float32)
    if stored.exponents:
        fraction, exponent = np.frexp(wanted)
        up = np.clip(exponent - (fraction == 0.5) + 127, 0, 254)
        tried = [up, np.maximum(up - 1, 0)] if wanted.size else []
        return [(one.astype(np.uint8), np.ldexp(np.float32(1), one - 127).astype(np.float32)) for one in tried]
    if stored.dtype == "BF16":
        bits = ((wanted.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
        return [(bits, (bits.astype(np.uint32) << np.uint32(16)).view(np.float32))]
    held: Array = wanted.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[stored.dtype])
    higher = np.nextafter(held, np.array(np.inf, held.dtype))
    held = np.where(grid.largest * held.astype(np.float32) < most, higher, held)
    return [(held.view(stored.bits.dtype), held.astype(np.float32))]


def draws(how: Rounding, start: int, count: int) -> NDArray[np.float32] | None:
    """The numbers that round entries `start` to `start + count` of a tensor; None: they are rounded to nearest."""
    return uniform(how.key, start, count) if how.key else None
