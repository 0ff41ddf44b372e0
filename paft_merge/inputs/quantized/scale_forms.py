"""How the scales of blocks are stored, and which stored ones are nearest to given ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from paft_merge.inputs.dtypes import widen
from paft_merge.inputs.quantized.grids import FLOAT8_GRIDS, Values

Bits = NDArray[Any]
_FLOATS: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class ScaleForm(Protocol):
    """How scales are stored: as unsigned integers, of which a larger one is a larger positive scale."""

    def nearest(self, wanted: Values) -> Bits:
        """Return the bits of the scales nearest to given ones, which are zero or positive; of exponents those not smaller."""

    def values(self, bits: Bits) -> Values:
        """Return the scales with these bits."""


class Scales(NamedTuple):
    """Scales of blocks as they are stored.

    Attributes:
        bits: `[*shape]`.
        values: `[*shape]`, the scales with these bits.
        form: how they are stored.
    """

    bits: Bits
    values: Values
    form: ScaleForm

    def shaped(self, *shape: int) -> Scales:
        """The same in another shape."""
        return Scales(self.bits.reshape(shape), self.values.reshape(shape), self.form)


@dataclass(frozen=True)
class FloatScales:
    """Floats; with a scale of the whole weight, the products or the quotients.

    Attributes:
        dtype: their storage type.
        of_all: the scale of the weight.
        divides: whether it divides.
    """

    dtype: str
    of_all: np.float32 | float = 1.0
    divides: bool = False

    def nearest(self, wanted: Values) -> Bits:
        """See `ScaleForm`; those out of range become the largest finite one."""
        own: Values = wanted * np.float32(self.of_all) if self.divides else wanted / np.float32(self.of_all)
        if (grid := FLOAT8_GRIDS.get(self.dtype)) is not None:
            return grid.codes(own)
        if self.dtype == "BF16":
            wide = own.view(np.uint32)
            even = np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
            found: Bits = np.minimum((wide + even) >> np.uint32(16), 0x7F7F).astype(np.uint16)
            return found
        kind = _FLOATS[self.dtype]
        found = np.minimum(own, np.finfo(kind).max).astype(kind)
        return found.view(f"u{found.itemsize}")

    def values(self, bits: Bits) -> Values:
        """See `ScaleForm`."""
        if (grid := FLOAT8_GRIDS.get(self.dtype)) is not None:
            own = grid.values[bits]
        else:
            own = np.empty(bits.shape, np.float32)
            widen(np.ascontiguousarray(bits).reshape(-1).view(np.uint8), self.dtype, own.reshape(-1))
        found: Values = own / np.float32(self.of_all) if self.divides else own * np.float32(self.of_all)
        return found


@dataclass(frozen=True)
class Exponents:
    """Powers of two (E8M0): bytes that hold the exponent plus 127."""

    def nearest(self, wanted: Values) -> Bits:
        """See `ScaleForm`."""
        fraction, exponent = np.frexp(wanted)
        found: Bits = np.clip(exponent - (fraction == 0.5) + 127, 0, 254).astype(np.uint8)
        return found

    def values(self, bits: Bits) -> Values:
        """See `ScaleForm`."""
        return powers()[bits]


@dataclass(frozen=True, eq=False)
class CodedScales:
    """Codes of scales that are quantised themselves, in order of their values: `levels[code] * outer + offset`.

    Attributes:
        levels: `[256]`, ascending.
        outer: `[codes]`, the scale of each code's block.
        offset: added to every value.
    """

    levels: Values
    outer: Values
    offset: np.float32

    def nearest(self, wanted: Values) -> Bits:
        """See `ScaleForm`."""
        own = wanted.reshape(-1) - self.offset
        own = np.divide(own, self.outer, out=np.zeros_like(own), where=self.outer != 0)
        found: Bits = np.searchsorted((self.levels[1:] + self.levels[:-1]) / np.float32(2), own).astype(np.uint8)
        return found.reshape(wanted.shape)

    def values(self, bits: Bits) -> Values:
        """See `ScaleForm`."""
        found: Values = self.levels[bits.reshape(-1)] * self.outer + self.offset
        return found.reshape(bits.shape)


@cache
def powers() -> Values:
    """The value of every exponent of E8M0: powers of two, and NaN for 255."""
    return np.concatenate([np.ldexp(np.float32(1), np.arange(-127, 128)), [np.nan]]).astype(np.float32)
