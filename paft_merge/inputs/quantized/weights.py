"""A weight that is stored as codes with scales, and the grids of values that its blocks share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from math import lcm, prod
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute import kernels
from paft_merge.compute.kernels.block_source import BlockSource, Codes
from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import CheckpointError, Problem
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint, TensorInfo
from paft_merge.inputs.dtypes import widen
from paft_merge.inputs.quantized.code_intervals import OfCodes, as_values
from paft_merge.inputs.quantized.grids import FLOAT8_GRIDS, CodeGrid
from paft_merge.inputs.quantized.rounding import Layout, Rounding, ZeroPoints, round_blocks
from paft_merge.inputs.quantized.scale_forms import Exponents, FloatScales, ScaleForm, Scales, powers
from paft_merge.inputs.safetensors_header import quote

FLOAT8 = tuple(FLOAT8_GRIDS)
FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = {"I8": np.int8, "U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
_PANEL_BYTES = 32 << 20
"""A panel that is not larger is read whole, and kept."""

Settings = Mapping[str, Any]
"""A `quantization_config`."""
Values = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Parts:
    """Reads the stored tensors of a quantised checkpoint, from any number of threads.

    Args:
        checkpoint: the checkpoint as it is stored.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._panels, self._reading = dict[tuple[str, int], Bytes](), Lock()

    def bytes(self, info: TensorInfo, start: int, out: Bytes) -> Bytes:
        """Fill `out` with the bytes of a tensor from byte `start` on."""
        self.checkpoint.read_into(info.name, start, out)
        return out

    def columns(self, info: TensorInfo, start: int, shape: tuple[int, int], first: int, stop: int) -> Bytes:
        """Return bytes `[first, stop)` of every row of a panel of a tensor, `[rows, stop - first]`.

        A panel of moderate size is read once for all of its blocks; of a larger one each row is read alone.

        Args:
            info: the tensor.
            start: its byte where the panel begins.
            shape: rows of the panel, and bytes in a row.
            first: first byte of each row.
            stop: one past the last byte.
        """
        rows, width = shape
        if rows * width > _PANEL_BYTES and self.checkpoint.location(info.name, 0, 1) is not None:
            out = np.empty((rows, stop - first), np.uint8)
            for row in range(rows):
                self.checkpoint.read_into(info.name, start + row * width + first, out[row])
            return out
        with self._reading:
            panel = self._panels.pop((info.name, start), None)
            if panel is None:
                panel = self.bytes(info, start, np.empty(rows * width, np.uint8))
            while len(self._panels) > 1:
                del self._panels[next(iter(self._panels))]
            self._panels[info.name, start] = panel
        return panel.reshape(shape)[:, first:stop]

    def release(self, weight: QuantizedWeight) -> None:
        """Free the panels of a weight."""
        with self._reading:
            self._panels = {key: panel for key, panel in self._panels.items() if key[0] not in weight.parts}

    def values(self, info: TensorInfo, first: int, stop: int, *, exponents: bool = False) -> Values:
        """Read entries `[first, stop)` of a tensor of scales or zero points as float32.

        Args:
            info: a tensor of floats, of integers, or of exponents.
            first: first entry.
            stop: one past the last entry.
            exponents: its bytes are exponents of two, with a bias of 127.

        Raises:
            CheckpointError: NONFINITE, which names the tensor.
        """
        width = DTYPES[info.dtype].bits // 8
        held = self.bytes(info, first * width, np.empty((stop - first) * width, np.uint8))
        if exponents or info.dtype == "F8_E8M0":
            values = powers()[held]
        elif info.dtype in FLOAT8:
            values = byte_values(info.dtype)[held]
        elif info.dtype in _INTEGERS:
            values = held.view(_INTEGERS[info.dtype]).astype(np.float32)
        else:
            values = np.empty(stop - first, np.float32)
            widen(held, info.dtype, values)
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            what = f"scale {quote(info.name)} is {values[at]} at entry {first + at:,}, so its weight has no values"
            where = self.checkpoint.folder / info.file
            raise CheckpointError.of("NONFINITE", where, what, "download the file again")
        return values

    def scales(self, info: TensorInfo, first: int, stop: int, form: ScaleForm) -> Scales:
        """Read scales as `values` does, with their bits."""
        width = DTYPES[info.dtype].bits // 8
        bits = self.bytes(info, first * width, np.empty((stop - first) * width, np.uint8)).view(f"u{width}")
        return Scales(bits, form.values(bits), form)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight that is stored as several tensors; each format has a subclass.

    Attributes:
        name: the name of the weight in a checkpoint that is not quantised.
        shape: its shape there, two dimensions or more.
        parts: names of the stored tensors that it is made of, first the codes.
        format: name of the format, for messages.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    format: str

    def decode(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes = as_values) -> None:
        """Dequantise rows `[first, stop)` of the weight, seen as `[rows, shape[-1]]`.

        Args:
            parts: the stored tensors.
            first: first row.
            stop: one past the last row.
            out: `[stop - first, shape[-1]]`, contiguous; overwritten.
            of: what to write of each code: its value, or an end of the interval of values that are rounded to it.

        Raises:
            CheckpointError: NONFINITE, a scale is NaN or infinite; otherwise as `Checkpoint.read_into`.
        """
        raise NotImplementedError

    def add_to(self, feed: BlockSource, parts: Parts, start: int, row: int) -> bool:
        """Add the decoding of entries from `start` on to a row of `feed`; False where `decode` is needed."""
        return False

    @property
    def unit(self) -> int:
        """Rows of the weight, seen as `[rows, shape[-1]]`, that are written together."""
        raise NotImplementedError

    @property
    def computed(self) -> tuple[str, ...]:
        """The parts that `encode` writes, first the codes; the others stay as they are."""
        return self.parts[:2]

    def encode(self, parts: Parts, first: int, values: Values, how: Rounding) -> tuple[list[Piece], Values]:
        """Round rows to codes with scales.

        Args:
            parts: the stored tensors.
            first: first row, a multiple of `unit`.
            values: `[rows, shape[-1]]`, a multiple of `unit` rows, or all rows to the end.
            how: which scales to use, and how codes are rounded.

        Returns:
            The stored bytes, and the values of these codes.
        """
        raise NotImplementedError

    @property
    def working_bytes(self) -> int:
        """Bytes of memory for the codes and scales of a tile; subclasses that hold more add it."""
        return 3 * min(1 << 21, prod(self.shape))


class Piece(NamedTuple):
    """Bytes of a stored tensor.

    Attributes:
        part: the name of the tensor.
        start: its first byte.
        data: `[runs, bytes]`.
        stride: bytes from one run to the next.
    """

    part: str
    start: int
    data: Bytes
    stride: int

    @classmethod
    def of(cls, part: str, start: int, held: NDArray[Any]) -> Piece:
        """Entries that follow each other."""
        data = np.ascontiguousarray(held).reshape(1, -1).view(np.uint8)
        return cls(part, start, data, data.size)


class Zeros(Protocol):
    """Zero points of the blocks of a weight."""

    @property
    def info(self) -> TensorInfo:
        """The stored tensor."""

    @property
    def unit(self) -> int:
        """Rows of the weight whose zero points are written together."""

    def lines(self, parts: Parts, first: int, stop: int) -> Values:
        """Return those of lines `[first, stop)` of blocks, `[stop - first, blocks in a line]`."""

    def piece(self, first: int, values: Values) -> Piece:
        """Return the stored bytes of lines from `first` on, `[lines, blocks in a line]`."""

    def rows(self, parts: Parts, first: int, stop: int) -> Values:
        """Return the values for rows `[first, stop)` of the weight, `[stop - first, blocks in a row]`."""


@dataclass(frozen=True)
class Grid:
    """A stored tensor with a value for each block of a weight: scales or zero points.

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
        return tuple(-(-n // max(size, 1)) for n, size in zip(self.shape, self.sizes, strict=True))

    @property
    def fits(self) -> bool:
        """Whether the stored tensor has one value for each block; with fewer dimensions than the weight, those of one do not count."""
        if len(self.info.shape) == len(self.counts):
            return self.info.shape == self.counts
        return [n for n in self.info.shape if n != 1] == [n for n in self.counts if n != 1]

    def rows(self, parts: Parts, first: int, stop: int) -> Values:
        """Return the values for rows `[first, stop)` of the weight, `[stop - first, blocks in a row]`.

        Raises:
            CheckpointError: NONFINITE if one of them is NaN or infinite.
        """
        at = np.unravel_index(np.arange(first, stop), self.shape[:-1])
        blocks = [index // size for index, size in zip(at, self.sizes[:-1], strict=True)]
        line = np.ravel_multi_index(blocks, self.counts[:-1])
        low, high, count = int(line.min()), int(line.max()) + 1, self.counts[-1]
        held = parts.values(self.info, low * count, high * count, exponents=self.exponents)
        return held.reshape(high - low, count)[line - low]

    @property
    def unit(self) -> int:
        """Rows whose values are written together."""
        return 1

    def lines(self, parts: Parts, first: int, stop: int) -> Values:
        """Return the values of lines `[first, stop)` of blocks, `[stop - first, blocks in a line]`."""
        count = self.counts[-1]
        return parts.values(self.info, first * count, stop * count).reshape(-1, count)

    def piece(self, first: int, values: Values) -> Piece:
        """Return the stored bytes of values for lines of blocks from `first` on; integers of 8 bits."""
        return Piece.of(self.info.name, first * self.counts[-1], values.astype(np.int8))


def apply(operation: Callable[..., Any], out: Values, values: Values, size: int) -> None:
    """Compute `operation(out, values)` in place, each value for the `size` entries of its block.

    Args:
        operation: a ufunc of NumPy, such as `np.multiply`.
        out: `[n, W]`; overwritten.
        values: `[n, blocks in a row]`.
        size: entries of a block in a row; the last block may be cut.
    """
    whole = out.shape[1] // size
    if whole:
        view = out[:, : whole * size].reshape(len(out), whole, size)
        operation(view, values[:, :whole, None], out=view)
    if out.shape[1] % size:
        operation(out[:, whole * size :], values[:, whole:], out=out[:, whole * size :])


@cache
def byte_values(dtype: str) -> Values:
    """The float32 value of each of the 256 codes of a type of 8 bits, `[256]`; torch is not imported for it."""
    if dtype in _INTEGERS:
        return np.arange(256, dtype=np.uint8).view(_INTEGERS[dtype]).astype(np.float32)
    return FLOAT8_GRIDS[dtype].values


def pair_values(of_code: Values, *, low_first: bool = True) -> Values:
    """The two float32 values of each byte that holds two codes of 4 bits, `[256, 2]`.

    Args:
        of_code: `[16]`, the value of each code.
        low_first: the low half of a byte is the first of the two; else the high half is.
    """
    low, high = of_code[np.arange(256) & 15], of_code[np.arange(256) >> 4]
    return np.stack([low, high] if low_first else [high, low], 1)


def look_up(table: Values, codes: Bytes, out: Values) -> None:
    """Write the values of codes into `out`.

    Args:
        table: `[256]`, a value for each byte, or `[256, 2]`, two for each byte.
        codes: bytes, contiguous.
        out: as many values, contiguous; overwritten.
    """
    flat, held = out.reshape(-1), codes.reshape(-1)
    if table.ndim == 2:
        np.take(table.view(np.uint64).reshape(-1), held, out=flat.view(np.uint64), mode="clip")
    elif held.size % 2:
        np.take(table, held, out=flat, mode="clip")
    else:  # two codes at a time
        np.take(_of_two(table.tobytes()), held.view(np.uint16), out=flat.view(np.uint64), mode="clip")


@cache
def _of_two(table: bytes) -> NDArray[np.uint64]:
    """The bits of the two values of every two bytes, `[65536]`; `table`: the bytes of `[256]` float32."""
    values, codes = np.frombuffer(table, np.float32), np.arange(1 << 16)
    return np.stack([values[codes & 255], values[codes >> 8]], 1).view(np.uint64).reshape(-1)


@dataclass(frozen=True, eq=False)
class ScaledCodes(QuantizedWeight):
    """Codes in the order of the weight's entries: `(value of the code - zero point) * scale`.

    Attributes:
        codes: the stored tensor of codes; a row of the weight is a whole number of bytes.
        table: the values of a byte, see `look_up`.
        grid: the values of a code.
        scale: the scales.
        zeros: the zero points, on the same grid; None: there are none.
        groups: for each column of the weight, the column of the scales; None: the columns are in the order of the grid.
        of_all: a scale of one value for the whole weight; None: there is none.
        combine: computes the scales from those of the grid and `of_all`.
        symmetric: whether zero points stay as they are.
    """

    codes: TensorInfo
    table: Values
    grid: CodeGrid
    scale: Grid
    zeros: Zeros | None = None
    groups: TensorInfo | None = None
    of_all: TensorInfo | None = None
    combine: Callable[..., Any] = np.multiply
    symmetric: bool = True

    def decode(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes = as_values) -> None:
        rows, width = out.shape
        nbytes = self.codes.nbytes // prod(self.shape[:-1])
        held = parts.bytes(self.codes, first * nbytes, SCRATCH.array("codes", rows * nbytes, np.uint8))
        scales, zeros = self._of_blocks(parts, first, stop)
        size = self.scale.sizes[-1]
        if self.groups is not None:
            at, size = group_of_columns(parts, self.groups, scales.shape[1]), 1
            scales, zeros = np.take(scales, at, 1), None if zeros is None else np.take(zeros, at, 1)
        table = of(self.table).reshape(256, -1)
        if not self._is_padded:
            none = np.empty((0, 0), np.float32)
            kernels.decode(held, table, scales, none if zeros is None else zeros, width, size, 0, out.reshape(-1))
            return
        wide = np.empty((rows, nbytes * table.shape[1]), np.float32)
        look_up(of(self.table), held, wide)
        out[:] = wide[:, :width]
        if zeros is not None:
            apply(np.subtract, out, zeros, size)
        apply(np.multiply, out, scales, size)

    def _of_blocks(self, parts: Parts, first: int, stop: int) -> tuple[Values, Values | None]:
        """The scales and the zero points of rows `[first, stop)`, `[stop - first, blocks in a row]`."""
        scales = self.scale.rows(parts, first, stop)
        if self.of_all is not None:
            with np.errstate(all="ignore"):
                scales = self.combine(scales, parts.values(self.of_all, 0, 1))
            if not np.isfinite(scales).all():
                what = f"scale {quote(self.of_all.name)} makes scales of {quote(self.scale.info.name)} NaN or infinite"
                where = parts.checkpoint.folder / self.of_all.file
                raise CheckpointError.of("NONFINITE", where, what, "download the file again")
        zeros = self.zeros.rows(parts, first, stop) if self.zeros else None
        return np.ascontiguousarray(scales), None if zeros is None else np.ascontiguousarray(zeros)

    @property
    def _is_padded(self) -> bool:
        """Whether codes that have no entry fill up the rows."""
        return self.codes.nbytes * (self.table.size // 256) != prod(self.shape)

    def add_to(self, feed: BlockSource, parts: Parts, start: int, row: int) -> bool:
        each, width = self.table.size // 256, self.shape[-1]
        if self.groups is not None or self._is_padded or start % each or type(self) is not ScaledCodes:
            return False
        location = parts.checkpoint.location(self.codes.name, start // each, -(-feed.size // each))
        if location is None:
            return False
        first, stop = start // width, -(-(start + feed.size) // width)
        scales, zeros = self._of_blocks(parts, first, stop)
        table, size = self.table.reshape(256, -1), self.scale.sizes[-1]
        feed.decode(row, Codes(*location, table, scales, zeros, width, size, start - first * width))
        return True

    @property
    def _height(self) -> int:
        """Rows of a block of the weight, seen as `[rows, shape[-1]]`."""
        *outer, inner = self.scale.sizes[:-1]
        return prod(outer) * inner

    @property
    def unit(self) -> int:
        panel, rows, height = self.shape[-2], prod(self.shape[:-1]), self._height
        if panel not in (rows, height) and panel % height:
            return max(panel, height)
        return lcm(height, self.zeros.unit) if self.zeros else height

    @property
    def computed(self) -> tuple[str, ...]:
        zeros = (self.zeros.info.name,) if self.zeros and not self.symmetric else ()
        return (self.codes.name, self.scale.info.name, *zeros)

    def encode(self, parts: Parts, first: int, values: Values, how: Rounding) -> tuple[list[Piece], Values]:
        rows, width = values.shape
        height, across = self._height, self.scale.counts[-1]
        panel = max(self.shape[-2], height)
        count, whole = -(-panel // height), panel if panel % height else rows
        decoded, pieces = np.empty_like(values), list[Piece]()
        layout = self._layout(parts, height, width, across)
        for row in range(0, rows, whole):
            some, start = values[row : row + whole], first + row
            at, lines = start // panel * count + start % panel // height, -(-len(some) // height)
            stored = parts.scales(self.scale.info, at * across, (at + lines) * across, self._scale_form(parts))
            zeros = None
            if self.zeros is not None:
                zeros = ZeroPoints(self.zeros.lines(parts, at, at + lines), self.symmetric)
            stored = stored.shaped(lines, across)
            made = round_blocks(some, self.grid, layout, stored, how, zeros=zeros, index=start * width)
            decoded[row : row + whole] = made.values
            wide = self._packed(made.codes)
            pieces += [
                Piece.of(self.codes.name, start * wide.shape[1], wide),
                Piece.of(self.scale.info.name, at * across * made.scales.itemsize, made.scales),
            ]
            if self.zeros is not None and not self.symmetric:
                pieces.append(self.zeros.piece(at, made.zeros))
        return pieces, decoded

    def _layout(self, parts: Parts, height: int, width: int, across: int) -> Layout:
        if self.groups is None:
            return Layout.of(height, self.scale.sizes[-1], width)
        return Layout(height, group_of_columns(parts, self.groups, across))

    def _scale_form(self, parts: Parts) -> ScaleForm:
        """How the scales are stored."""
        info = self.scale.info
        if self.scale.exponents or info.dtype == "F8_E8M0":
            return Exponents()
        if self.of_all is None:
            return FloatScales(info.dtype)
        return FloatScales(info.dtype, parts.values(self.of_all, 0, 1)[0], self.combine is np.divide)

    def _packed(self, codes: Bytes) -> Bytes:
        """The bytes of the codes of some rows, `[rows, bytes of a row]`."""
        rows, width = codes.shape
        nbytes = self.codes.nbytes // prod(self.shape[:-1])
        two = self.table.ndim == 2
        if width != nbytes * (1 + two):
            wide = np.zeros((rows, nbytes * (1 + two)), np.uint8)
            wide[:, :width] = codes
            codes = wide
        return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4)) if two else codes


def group_of_columns(parts: Parts, info: TensorInfo, count: int) -> NDArray[np.int32]:
    """Read the group of each column of a weight.

    Raises:
        CheckpointError: SHAPE_MISMATCH, a column is in none of `count` groups.
    """
    at = parts.values(info, 0, info.numel)
    if at.min() < 0 or at.max() >= count:
        what = f"group {quote(info.name)} has {at.min():.0f} to {at.max():.0f}, and {count} groups"
        raise CheckpointError.of("SHAPE_MISMATCH", parts.checkpoint.folder, what, "download the file again")
    return at.astype(np.int32)


def wrong_shape(where: object, info: TensorInfo, wanted: Sequence[int | str], weight: TensorInfo) -> Problem:
    """A problem: scales or zero points that do not fit their weight."""
    what = f"tensor {quote(info.name)} is {list(info.shape)}, and {quote(weight.name)} {list(weight.shape)} needs {list(wanted)}"
    return Problem("SHAPE_MISMATCH", str(where), what, "download it again, or check quantization_config")


def wrong_dtype(where: object, info: TensorInfo, wanted: Sequence[str]) -> Problem:
    """A problem: a part of a weight in a type that the format does not have."""
    what = f"tensor {quote(info.name)} is {info.dtype}, and the format has {' or '.join(wanted)} there"
    return Problem("DTYPE_UNSUPPORTED", str(where), what, "download it again, or check quantization_config")


def missing(where: object, has: str, lacks: str) -> Problem:
    """A problem: a part of a weight without another one."""
    return Problem("KEYS_MISSING", str(where), f"stores {quote(has)} without {lacks}", "download it again")


def texts(value: Any) -> list[str]:
    """The texts in a list of a config; none if it is not a list."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


class ModulePatterns:
    """Patterns of a config that name modules: `re:` and a regular expression, a glob, or a path or a part of it.

    Args:
        patterns: the patterns; regular expressions that are not valid name no module.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._paths, self._expressions = set[str](), dict[str, re.Pattern[str]]()
        for one in patterns:
            if not one.startswith("re:") and "*" not in one:
                self._paths.add(one)
                continue
            with suppress(re.error):
                self._expressions[one] = re.compile(one[3:] if one.startswith("re:") else translate(one))

    def naming(self, module: str) -> set[str]:
        """Return the patterns that name a module."""
        parts = module.split(".")
        ends = {".".join(parts[at:]) for at in range(len(parts))}
        begins = {".".join(parts[:at]) for at in range(1, len(parts))}
        expressions = {one for one, expression in self._expressions.items() if expression.match(module)}
        return (ends | begins) & self._paths | expressions
