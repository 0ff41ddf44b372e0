"""GPTQ and AWQ: integer codes packed in words of 32 bits, stored `[in, out]`, with a scale and a zero point for each group.

`qweight` packs GPTQ's codes along the inputs and AWQ's along the outputs, in an order of its own; `qzeros` and `scales` have
a row for each group of inputs, which `g_idx` names for GPTQ. GPTQ stores zero points less one, except in `gptq_v2`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import Problems
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.quantized.code_intervals import OfCodes, as_values
from paft_merge.inputs.quantized.grids import IntGrid
from paft_merge.inputs.quantized.rounding import Layout, Rounding, ZeroPoints, round_blocks
from paft_merge.inputs.quantized.scale_forms import FloatScales, Scales
from paft_merge.inputs.quantized.weights import (
    FLOATS,
    Parts,
    Piece,
    QuantizedWeight,
    Settings,
    Values,
    apply,
    group_of_columns,
    look_up,
    missing,
    pair_values,
    wrong_dtype,
    wrong_shape,
)
from paft_merge.inputs.safetensors_header import quote

_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""For each output of a word, the number of its code in the word."""
_OUTPUTS = np.argsort(_AWQ_ORDER)
"""For each code of a word, the number of its output."""
_CODES = np.arange(16, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class GroupedCodes(QuantizedWeight):
    """A weight `[out, in]` whose codes are stored `[in, out]`: `(code - zero point) * scale` of its group of inputs.

    Attributes:
        codes: `qweight`.
        zeros: `qzeros`, `[groups, out / codes in a word]`.
        scales: `[groups, out]`.
        groups: `g_idx`, the group of each input; None: consecutive inputs.
        bits: bits of a code, 4 or 8.
        group: inputs of a group.
        awq: whether codes and zero points are packed as AWQ packs them.
        less_one: whether zero points are stored less one.
        symmetric: whether zero points stay as they are.
    """

    codes: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    groups: TensorInfo | None
    bits: int
    group: int
    awq: bool
    less_one: bool
    symmetric: bool

    def decode(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes = as_values) -> None:
        (self._awq_codes if self.awq else self._gptq_codes)(parts, first, stop, out, of)
        scales, zeros = self._scales(parts, first, stop), self._zeros(parts, first, stop)
        size = self.group
        if self.groups is not None:
            at = group_of_columns(parts, self.groups, scales.shape[1])
            if not np.array_equal(at, np.arange(len(at)) // self.group):
                scales, zeros, size = scales[:, at], zeros[:, at], 1
        apply(np.subtract, out, zeros, size)
        apply(np.multiply, out, scales, size)

    def _gptq_codes(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes) -> None:
        words, outputs = self.codes.shape
        held = parts.columns(self.codes, 0, (words, 4 * outputs), 4 * first, 4 * stop)
        turned = np.ascontiguousarray(np.ascontiguousarray(held).view(np.uint32).T)
        table = pair_values(_CODES) if self.bits == 4 else np.arange(256, dtype=np.float32)
        look_up(of(table), turned.view(np.uint8), out)

    def _awq_codes(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes) -> None:
        inputs, words = self.codes.shape
        a, b = first // 8, -(-stop // 8)
        turned = np.ascontiguousarray(parts.columns(self.codes, 0, (inputs, 4 * words), 4 * a, 4 * b).T)
        table = of(pair_values(_CODES))
        for row in range(first, stop):
            code = int(_AWQ_ORDER[row % 8])
            line = turned[4 * (row // 8 - a) + code // 2]
            np.take(table[:, code % 2], line, out=out[row - first], mode="clip")

    def _zeros(self, parts: Parts, first: int, stop: int) -> Values:
        """The zero points of outputs `[first, stop)`, `[stop - first, groups]`."""
        groups, words = self.zeros.shape
        count = 32 // self.bits
        a, b = first // count, -(-stop // count)
        held = np.ascontiguousarray(parts.columns(self.zeros, 0, (groups, 4 * words), 4 * a, 4 * b))
        at = np.arange(first, stop)
        code = _AWQ_ORDER[at % 8] if self.awq else at % count
        shifts = (code * self.bits).astype(np.uint32)
        zeros: NDArray[np.uint32] = held.view(np.uint32)[:, at // count - a] >> shifts
        most = np.uint32((1 << self.bits) - 1)
        if self.less_one:
            zeros = zeros + np.uint32(1)
        return np.ascontiguousarray((zeros & most).T.astype(np.float32))

    def _scales(self, parts: Parts, first: int, stop: int) -> Values:
        """The scales of outputs `[first, stop)`, `[stop - first, groups]`."""
        groups, outputs = self.scales.shape
        held = parts.values(self.scales, 0, groups * outputs).reshape(groups, outputs)
        return np.ascontiguousarray(held[:, first:stop].T)

    @property
    def unit(self) -> int:
        return 32 // self.bits  # their zero points share words

    @property
    def computed(self) -> tuple[str, ...]:
        return self.codes.name, self.zeros.name, self.scales.name

    def encode(self, parts: Parts, first: int, values: Values, how: Rounding) -> tuple[list[Piece], Values]:
        stop, width, count = first + len(values), self.shape[1], self.scales.shape[0]
        nbytes = self.scales.nbytes // self.scales.numel
        held = parts.columns(self.scales, 0, (count, self.shape[0] * nbytes), first * nbytes, stop * nbytes)
        form = FloatScales(self.scales.dtype)
        bits = np.ascontiguousarray(np.ascontiguousarray(held).view(f"u{nbytes}").T)
        layout = Layout.of(1, self.group, width)
        if self.groups is not None:
            at = group_of_columns(parts, self.groups, count)
            layout = layout if np.array_equal(at, layout.groups) else Layout(1, at)
        zeros = ZeroPoints(self._zeros(parts, first, stop), self.symmetric, int(self.less_one))
        grid = IntGrid(0, (1 << self.bits) - 1, after=True)
        stored = Scales(bits, form.values(bits), form)
        made = round_blocks(values, grid, layout, stored, how, zeros=zeros, index=first * width)
        points = np.ascontiguousarray(made.zeros.T).astype(np.int64) - self.less_one & grid.high
        codes = self._across(made.codes.T) if self.awq else self._along(np.ascontiguousarray(made.codes)).T
        word, words = first // self.unit, self.zeros.shape[1]
        pieces = [
            _columns(self.codes, codes, word if self.awq else first, self.codes.shape[1]),
            _columns(self.zeros, self._across(points), word, words),
            _columns(self.scales, np.ascontiguousarray(made.scales.T), first, self.shape[0]),
        ]
        return pieces, made.values

    def _along(self, codes: NDArray[Any]) -> NDArray[np.uint32]:
        """Words of codes that follow each other in a row, `[rows, columns / codes in a word]`."""
        if self.bits == 4:
            codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
        return np.ascontiguousarray(codes).view(np.uint32)

    def _across(self, codes: NDArray[Any]) -> NDArray[np.uint32]:
        """Words of codes that follow each other in a row, in the order of zero points; the last word may be cut."""
        count = self.unit
        held = np.zeros((len(codes), -(-codes.shape[1] // count) * count), np.uint8)
        held[:, : codes.shape[1]] = codes
        return self._along(held.reshape(len(held), -1, 8)[..., _OUTPUTS].reshape(held.shape) if self.awq else held)

    @property
    def working_bytes(self) -> int:
        return 2 * self.codes.nbytes + 3 * self.scales.nbytes + 8 * (1 << 20)


def _columns(info: TensorInfo, held: NDArray[Any], first: int, count: int) -> Piece:
    """The bytes of some columns of a tensor with `count` columns."""
    data = np.ascontiguousarray(held)
    return Piece(info.name, first * data.itemsize, data.view(np.uint8), count * data.itemsize)


def find_gptq(checkpoint: Checkpoint, settings: Settings, problems: Problems) -> Iterator[QuantizedWeight]:
    """Find the weights of GPTQ; see `_find`."""
    form = str(settings.get("checkpoint_format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        _unread(checkpoint, f"GPTQ, checkpoint_format: {form}", problems)
        return
    yield from _find(checkpoint, settings, problems, awq=False, less_one=form == "gptq")


def find_awq(checkpoint: Checkpoint, settings: Settings, problems: Problems) -> Iterator[QuantizedWeight]:
    """Find the weights of AWQ; see `_find`."""
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        _unread(checkpoint, f"AWQ, version: {version}", problems)
        return
    yield from _find(checkpoint, settings, problems, awq=True, less_one=False)


def _unread(checkpoint: Checkpoint, how: str, problems: Problems) -> None:
    what = f"is quantised ({how}), which is not read"
    problems.add("DTYPE_UNSUPPORTED", checkpoint.folder, what, "dequantise it with the library that wrote it")


def _find(
    checkpoint: Checkpoint, settings: Settings, problems: Problems, *, awq: bool, less_one: bool
) -> Iterator[QuantizedWeight]:
    """Find the weights with `qweight`, `qzeros`, `scales` and perhaps `g_idx`.

    Args:
        checkpoint: as it is stored.
        settings: its `quantization_config`.
        problems: receives what does not belong together, and widths that are not read.
        awq, less_one: as in `GroupedCodes`.
    """
    where, tensors = checkpoint.folder, checkpoint.tensors
    bits, group = (
        settings.get("bits", settings.get("w_bit", 4)),
        settings.get("group_size", settings.get("q_group_size", 128)),
    )
    name = "AWQ" if awq else "GPTQ"
    symmetric = settings.get("zero_point") is False if awq else settings.get("sym") is not False
    if bits not in ((4,) if awq else (4, 8)):
        _unread(checkpoint, f"{name}, {bits} bits", problems)
        return
    count = 32 // bits
    for codes in [info for key, info in tensors.items() if key.endswith(".qweight")]:
        stem = codes.name.removesuffix(".qweight")
        found = {part: tensors.get(f"{stem}.{part}") for part in ("qzeros", "scales", "g_idx")}
        zeros, scales, groups = found["qzeros"], found["scales"], found["g_idx"]
        if zeros is None or scales is None:
            lacks = "qzeros" if zeros is None else "scales"
            problems.found.append(missing(where, codes.name, quote(f"{stem}.{lacks}")))
            continue
        if settings.get("desc_act") and groups is None:
            problems.found.append(missing(where, codes.name, f"{quote(f'{stem}.g_idx')}, and the config says desc_act"))
            continue
        wrong = next((one for one in (codes, zeros, groups) if one and one.dtype != "I32"), None)
        if wrong is not None or scales.dtype not in FLOATS:
            problems.found.append(wrong_dtype(where, wrong or scales, ["I32"] if wrong else FLOATS))
            continue
        if len(codes.shape) != 2:
            problems.found.append(wrong_shape(where, codes, ["in", "out"], scales))
            continue
        inputs, outputs = (codes.shape[0], codes.shape[1] * 8) if awq else (codes.shape[0] * count, codes.shape[1])
        size = group if type(group) is int and group > 0 else inputs
        number = -(-inputs // size)
        shapes: list[tuple[TensorInfo, tuple[int, ...]]] = [
            (scales, (number, outputs)),
            (zeros, (number, -(-outputs // count))),
        ]
        shapes += [(groups, (inputs,))] if groups else []
        if misfit := next(((info, shape) for info, shape in shapes if info.shape != shape), None):
            problems.found.append(wrong_shape(where, misfit[0], misfit[1], codes))
            continue
        parts = tuple(one.name for one in (codes, zeros, scales, groups) if one)
        yield GroupedCodes(
            *(
                f"{stem}.weight",
                (outputs, inputs),
                parts,
                name,
                codes,
                zeros,
                scales,
                groups,
                bits,
                size,
                awq,
                less_one,
            ),
            symmetric,
        )
