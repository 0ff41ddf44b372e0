"""The values that codes of one block have, with the scale 1: floats of 8 or 4 bits, integers, and tables of levels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


class Form(NamedTuple):
    """A grid as the kernels take it (see `compute.kernels.codes`).

    Attributes:
        numbers: the kind of grid, and its numbers.
        table: the largest magnitude of floats, or the levels and the middles between them.
        multiply: dividend of a scale; values are multiplied with the quotient. 0: values are divided by the scale.
        factor: factor of all values.
    """

    numbers: NDArray[np.int64]
    table: Values
    multiply: float = 0.0
    factor: float = 1.0


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
    def values(self) -> Values:
        """The value of each code, `[2 << sign]`; those past `most` are NaN or infinite."""
        codes = np.arange(1 << self.sign)
        exponent, mantissa = codes >> self.bits, codes & ((1 << self.bits) - 1)
        normal = exponent > 0
        found = np.ldexp(mantissa + (normal << self.bits), np.where(normal, exponent - 1, 0) + self.lowest - self.bits)
        found[codes > self.most] = np.nan
        found[(codes > self.most) & (mantissa == 0)] = np.inf
        values: Values = np.concatenate([found, -found]).astype(np.float32)
        if not self.signed_zero:
            values[codes.size] = np.nan
        return values

    @property
    def largest(self) -> np.float32:
        """The largest value."""
        found: np.float32 = self.values[self.most]
        return found

    def codes(self, values: Values) -> NDArray[np.uint8]:
        """Round values to nearest even codes; those out of range become the largest magnitude."""
        magnitudes = np.minimum(np.abs(values), self.largest)
        exponents = np.maximum((magnitudes.view(np.uint32) >> np.uint32(23)).astype(np.int32) - 127, self.lowest)
        steps = np.rint(np.ldexp(magnitudes, self.bits - exponents)).astype(np.int32)
        found = (((exponents - self.lowest) << self.bits) + steps).astype(np.uint8)
        negative = np.signbit(values) & (self.signed_zero | (found != 0))
        signed: NDArray[np.uint8] = found | (negative.astype(np.uint8) << np.uint8(self.sign))
        return signed

    @cached_property
    def form(self) -> Form:
        """The grid for the kernels."""
        numbers = np.array([0, self.bits, self.lowest, self.sign, self.signed_zero], np.int64)
        return Form(numbers, np.array([self.largest], np.float32))

    def reach(self, zeros: Any) -> tuple[Any, Any]:
        """The least and the greatest value with these zero points."""
        return -self.largest - zeros, self.largest - zeros

    def wanted(self, low: Values, high: Values, zeros: Values, *, whole: bool) -> Values:
        """The scales of blocks of which the magnitudes reach the largest value; `whole` does not change that."""
        return (np.maximum(-low, high) / self.largest).astype(np.float32)


@dataclass(frozen=True)
class IntGrid:
    """Integers, less a zero point.

    Attributes:
        low, high: the least and the greatest.
        zero_code: the code of 0; codes are the integers plus it, of 8 bits.
        after: whether a zero point is added to a value after it is rounded; only halves are rounded otherwise.
        half: the magnitude for which a scale is 1; None: half of the range, as compressed-tensors and GPTQ have it.
        multiply, factor: as in `Form`.
    """

    low: int
    high: int
    zero_code: int = 0
    after: bool = False
    half: float | None = None
    multiply: float = 0.0
    factor: float = 1.0

    @cached_property
    def form(self) -> Form:
        """The grid for the kernels."""
        numbers = np.array([1, self.low, self.high, self.zero_code, self.after], np.int64)
        return Form(numbers, np.zeros(1, np.float32), self.multiply, self.factor)

    def reach(self, zeros: Any) -> tuple[Any, Any]:
        """The least and the greatest value with these zero points."""
        return (self.low - zeros) * np.float32(self.factor), (self.high - zeros) * np.float32(self.factor)

    def wanted(self, low: Values, high: Values, zeros: Values, *, whole: bool) -> Values:
        """The scales of blocks with these limits.

        Args:
            low, high: limits of each block.
            zeros: its zero point.
            whole: whether the limits must be in range; else the larger one may be half a step outside.
        """
        if not whole:
            return (np.maximum(-low, high) / np.float32(self.half or (self.high - self.low) / 2)).astype(np.float32)
        least, greatest = self.reach(zeros)
        below, above = (
            np.divide(end, side, out=np.zeros_like(end), where=side != 0)
            for end, side in ((low, least), (high, greatest))
        )
        found: Values = np.maximum(below, above)
        return found


@dataclass(frozen=True, eq=False)
class LevelGrid:
    """Levels from -1 to 1, such as those of NF4 (QLoRA, arXiv:2305.14314).

    Attributes:
        values: the value of each code.
    """

    values: Values

    @cached_property
    def form(self) -> Form:
        """The grid for the kernels; the codes are in the order of their values, as bitsandbytes sorts them."""
        order = np.argsort(self.values, kind="stable")
        levels = self.values[order]
        middles = (levels[1:] + levels[:-1]) / np.float32(2)
        return Form(np.concatenate([[2], order]).astype(np.int64), np.concatenate([levels, middles]), multiply=1.0)

    def reach(self, zeros: Any) -> tuple[Any, Any]:
        """The least and the greatest level; `zeros` are 0."""
        return self.values.min(), self.values.max()

    def wanted(self, low: Values, high: Values, zeros: Values, *, whole: bool) -> Values:
        """The scales of blocks with these limits: the largest magnitudes; or those for which all levels are wide enough (`whole`)."""
        least, greatest = self.reach(zeros) if whole else (np.float32(-1), np.float32(1))
        found: Values = np.maximum(low / least, high / greatest)
        return found


CodeGrid = FloatGrid | IntGrid | LevelGrid

FLOAT8_GRIDS = {
    "F8_E4M3": FloatGrid(3, -6, 0x7E),
    "F8_E5M2": FloatGrid(2, -14, 0x7B),
    "F8_E4M3FNUZ": FloatGrid(3, -7, 0x7F, signed_zero=False),
    "F8_E5M2FNUZ": FloatGrid(2, -15, 0x7F, signed_zero=False),
}
"""The grid of each 8-bit float."""
E2M1 = FloatGrid(1, 0, 7, sign=3)
"""The 4-bit float of MXFP4 and NVFP4."""
