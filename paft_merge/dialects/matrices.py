"""Tensors of an adapter as stored bits, read when they are used: rearranged without a change of any value.

Only `Matrix.times` computes; it says whether its result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import AdapterError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.dtypes import DTYPES, cast, widen

Bits = NDArray[Any]
"""An array of unsigned integers, one for each element of a tensor."""

_UINTS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class Matrix:
    """A tensor that is not read yet: its dtype (as safetensors names it), its shape, and its bits on demand."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Bits]

    @classmethod
    def stored(cls, file: Checkpoint, name: str) -> Matrix:
        """A tensor of a file.

        Raises:
            AdapterError: DTYPE_UNSUPPORTED, it has no numbers of whole bytes.
        """
        info = file.tensors[name]
        if not DTYPES[info.dtype].mergeable:
            raise AdapterError.of("DTYPE_UNSUPPORTED", file.folder, f"tensor {name!r} is {info.dtype}")
        kind = _UINTS[DTYPES[info.dtype].bits]

        def read() -> Bits:
            raw = np.empty(info.nbytes, np.uint8)
            file.read_into(name, 0, raw)
            return raw.view(kind).reshape(info.shape)

        return cls(info.dtype, info.shape, read)

    @classmethod
    def of_float32(cls, values: NDArray[np.float32]) -> Matrix:
        """Numbers that are in memory."""
        return cls("F32", values.shape, lambda: np.ascontiguousarray(values).view(np.uint32))

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def transposed(self) -> Matrix:
        """`[N, M]` of `[M, N]`."""
        return self.made(self.shape[::-1], lambda bits: bits.T)

    def made(self, shape: tuple[int, ...], rearrange: Callable[[Bits], Bits]) -> Matrix:
        """Its elements in another arrangement, of the given shape."""
        return Matrix(self.dtype, shape, lambda: rearrange(self.read()))

    def reshaped(self, *shape: int) -> Matrix:
        """The same elements in another shape."""
        return self.made(shape, lambda bits: bits.reshape(shape))

    def padded(self, axis: int, size: int) -> Matrix:
        """With zeros at the end of one axis, up to `size`; itself if it has that size."""
        more = size - self.shape[axis]
        if not more:
            return self
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        widths = [(0, more if i == axis else 0) for i in range(len(shape))]
        return self.made(shape, lambda bits: np.pad(bits, widths))

    def cut(self, axis: int, start: int, stop: int) -> Matrix:
        """Elements `[start, stop)` of one axis."""
        at = (*[slice(None)] * axis, slice(start, stop))
        return self.made((*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), lambda bits: bits[at])

    def is_zero(self) -> bool:
        """Whether every element is zero; reads it."""
        bits = self.read()
        return not bool((bits & bits.dtype.type(2 ** (8 * bits.itemsize - 1) - 1)).any())

    def same(self, other: Matrix) -> bool:
        """Whether both have the same dtype, shape and bits; reads both."""
        return (self.dtype, self.shape) == (other.dtype, other.shape) and np.array_equal(self.read(), other.read())

    def times(self, factor: float) -> tuple[Matrix, bool]:
        """Its product with a number, rounded once to its dtype, and whether nothing was rounded; reads it."""
        bits = np.ascontiguousarray(self.read())
        if self.dtype == "F64":
            values = bits.view(np.float64)
            scaled, exact = values * factor, values * factor / factor
            return self._of(scaled.view(np.uint64)), bool(np.array_equal(exact, values))
        values32 = np.empty(bits.size, np.float32)
        widen(bits.reshape(-1).view(np.uint8), self.dtype, values32)
        product = values32.astype(np.float64) * factor
        made = cast(product.astype(np.float32), self.dtype).view(bits.dtype)
        back = np.empty(bits.size, np.float32)
        widen(made.view(np.uint8), self.dtype, back)
        return self._of(made.reshape(bits.shape)), bool(np.array_equal(back.astype(np.float64), product))

    def _of(self, bits: Bits) -> Matrix:
        return Matrix(self.dtype, self.shape, lambda: bits)


def joined(parts: Sequence[Matrix], axis: int = 0) -> Matrix:
    """Matrices of one dtype, one after the other along an axis."""
    first = parts[0]
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    return Matrix(first.dtype, shape, lambda: np.concatenate([part.read() for part in parts], axis))


def stacked(parts: Sequence[Matrix], axis: int = 0) -> Matrix:
    """Matrices of one dtype and shape, along a new axis."""
    first = parts[0]
    shape = (*first.shape[:axis], len(parts), *first.shape[axis:])
    return Matrix(first.dtype, shape, lambda: np.stack([part.read() for part in parts], axis))


def zeros(dtype: str, shape: tuple[int, ...]) -> Matrix:
    """Zeros."""
    return Matrix(dtype, shape, lambda: np.zeros(shape, _UINTS[DTYPES[dtype].bits]))
