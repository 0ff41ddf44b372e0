"""A weight that is stored as codes with scales, and the grids of values that its blocks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import CheckpointError, Problem
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint, TensorInfo
from paft_merge.inputs.dtypes import widen
from paft_merge.inputs.safetensors_header import quote

FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FLOATS = ("F64", "F32", "F16", "BF16")
Values = NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as several tensors; each format has a subclass.

    Attributes:
        name: the name of the weight in a checkpoint that is not quantised.
        shape: its shape there, two dimensions or more.
        parts: the stored tensors that it is made of.
        format: name of the format, for messages.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    format: str

    def decode(self, checkpoint: Checkpoint, first: int, stop: int, out: Values) -> None:
        """Dequantise rows `[first, stop)` of the weight, seen as `[rows, shape[-1]]`.

        Args:
            checkpoint: where the parts are stored.
            first: first row.
            stop: one past the last row.
            out: `[stop - first, shape[-1]]`; overwritten.

        Raises:
            CheckpointError: NONFINITE, a scale is NaN or infinite; otherwise as `Checkpoint.read_into`.
        """
        raise NotImplementedError

    @property
    def working_bytes(self) -> int:
        """Bytes of memory for a tile of codes and scales; subclasses that hold more add it."""
        return 3 * min(1 << 21, prod(self.shape))


@dataclass(frozen=True)
class Grid:
    """Values that blocks of a weight share: scales or zero points.

    Attributes:
        info: the stored tensor.
        shape: shape of the weight.
        sizes: entries of a block in each dimension of the weight; blocks at the end may be cut.
        exponents: whether its bytes are exponents of two, with a bias of 127.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    exponents: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of blocks in each dimension."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.sizes, strict=True))

    @property
    def fits(self) -> bool:
        """Whether the stored tensor has one value for each block; dimensions of one do not count."""
        return [n for n in self.info.shape if n != 1] == [n for n in self.counts if n != 1]

    def rows(self, checkpoint: Checkpoint, first: int, stop: int) -> Values:
        """Return the values for rows `[first, stop)` of the weight, `[stop - first, blocks in a row]`.

        Raises:
            CheckpointError: NONFINITE if one of them is NaN or infinite.
        """
        at = np.unravel_index(np.arange(first, stop), self.shape[:-1])
        blocks = [index // size for index, size in zip(at, self.sizes[:-1], strict=True)]
        line = np.ravel_multi_index(blocks, self.counts[:-1])
        low, high, count = int(line.min()), int(line.max()) + 1, self.counts[-1]
        held = read_values(checkpoint, self.info, low * count, high * count, exponents=self.exponents)
        return held.reshape(high - low, count)[line - low]

    def apply(self, operation: Callable[..., Any], out: Values, values: Values) -> None:
        """Compute `operation(out, values)` in place, each value for the entries of its block.

        Args:
            operation: a ufunc of NumPy, such as `np.multiply`.
            out: `[n, shape[-1]]`; overwritten.
            values: `[n, blocks in a row]`.
        """
        size = self.sizes[-1]
        whole = out.shape[1] // size
        if whole:
            view = out[:, : whole * size].reshape(len(out), whole, size)
            operation(view, values[:, :whole, None], out=view)
        if out.shape[1] % size:
            operation(out[:, whole * size :], values[:, whole:], out=out[:, whole * size :])


def read_values(checkpoint: Checkpoint, info: TensorInfo, first: int, stop: int, *, exponents: bool = False) -> Values:
    """Read entries `[first, stop)` of a tensor of scales as float32.

    Args:
        checkpoint: where it is stored.
        info: a tensor of floats, or of exponents.
        first: first entry.
        stop: one past the last entry.
        exponents: its bytes are exponents of two, with a bias of 127.

    Raises:
        CheckpointError: NONFINITE, which names the tensor.
    """
    width = DTYPES[info.dtype].bits // 8
    held = np.empty((stop - first) * width, np.uint8)
    checkpoint.read_into(info.name, first * width, held)
    if exponents or info.dtype == "F8_E8M0":
        values = _powers()[held]
    else:
        values = np.empty(stop - first, np.float32)
        widen(held, info.dtype, values)
    if not np.isfinite(values).all():
        at = first + int(np.flatnonzero(~np.isfinite(values))[0])
        what = f"scale {quote(info.name)} is {values[at - first]} at entry {at:,}, so its weight has no values"
        raise CheckpointError.of("NONFINITE", checkpoint.folder / info.file, what, "download the file again")
    return values


@cache
def _powers() -> Values:
    """The value of every exponent of E8M0: powers of two, and NaN for 255."""
    return np.concatenate([np.ldexp(np.float32(1), np.arange(-127, 128)), [np.nan]]).astype(np.float32)


@cache
def float8_values(dtype: str) -> Values:
    """The float32 value of each of the 256 codes of an 8-bit float type."""
    values = np.empty(256, np.float32)
    widen(np.arange(256, dtype=np.uint8), dtype, values)
    return values


@dataclass(frozen=True)
class ScaledCodes(QuantizedWeight):
    """Codes of one byte for each entry, in the shape of the weight, times a scale for each block.

    Attributes:
        codes: the stored tensor of codes.
        scale: the scales.
    """

    codes: TensorInfo
    scale: Grid

    def decode(self, checkpoint: Checkpoint, first: int, stop: int, out: Values) -> None:
        width = self.shape[-1]
        held = SCRATCH.array("codes", (stop - first) * width, np.uint8)
        checkpoint.read_into(self.codes.name, first * width, held)
        if self.codes.dtype == "I8":
            np.copyto(out, held.view(np.int8).reshape(out.shape))
        else:
            np.take(float8_values(self.codes.dtype), held.reshape(out.shape), out=out, mode="clip")
        self.scale.apply(np.multiply, out, self.scale.rows(checkpoint, first, stop))


def wrong_shape(where: object, info: TensorInfo, wanted: Sequence[int], weight: TensorInfo) -> Problem:
    """A problem: scales or zero points that do not fit their weight."""
    what = f"tensor {quote(info.name)} is {list(info.shape)}, and {quote(weight.name)} {list(weight.shape)} needs {list(wanted)}"
    return Problem("SHAPE_MISMATCH", str(where), what, "download it again, or check quantization_config")


def wrong_dtype(where: object, info: TensorInfo, wanted: Sequence[str]) -> Problem:
    """A problem: a part of a weight in a type that the format does not have."""
    what = f"tensor {quote(info.name)} is {info.dtype}, and the format has {' or '.join(wanted)} there"
    return Problem("DTYPE_UNSUPPORTED", str(where), what, "download it again, or check quantization_config")


Settings = Mapping[str, Any]
"""A `quantization_config`."""
