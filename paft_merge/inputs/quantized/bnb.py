"""bitsandbytes: NF4 and FP4 (QLoRA, arXiv:2305.14314), whose scales may be quantised too, and int8 (arXiv:2208.07339).

A 4-bit weight is one row of bytes, and `quant_state` has its shape as JSON; `absmax` has a scale for each block of entries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, lcm, prod
from typing import Any

import numpy as np

from paft_merge.compute.kernels import STRIP
from paft_merge.errors import CheckpointError, Problems
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.quantized.code_intervals import OfCodes, as_values
from paft_merge.inputs.quantized.grids import IntGrid, LevelGrid
from paft_merge.inputs.quantized.rounding import Layout, Rounding, round_blocks
from paft_merge.inputs.quantized.scale_forms import CodedScales, FloatScales, ScaleForm
from paft_merge.inputs.quantized.weights import (
    Grid,
    Parts,
    Piece,
    QuantizedWeight,
    ScaledCodes,
    Settings,
    Values,
    apply,
    byte_values,
    look_up,
    missing,
    pair_values,
    wrong_dtype,
    wrong_shape,
)
from paft_merge.inputs.safetensors_header import quote

_STATE = ".weight.quant_state.bitsandbytes__"
_SEVENTH = np.float32(7.874015718698502e-3)
"""1 / 127, as bitsandbytes rounds it."""
_ROWS = IntGrid(-128, 127, half=1.0, multiply=127.0, factor=float(_SEVENTH))
"""The values of int8."""


@dataclass(frozen=True, eq=False)
class Int8(ScaledCodes):
    """Rows of int8 times the greatest magnitude of the row, over 127."""

    def decode(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes = as_values) -> None:
        super().decode(parts, first, stop, out, of)
        out *= _SEVENTH


@dataclass(frozen=True)
class Nested:
    """Scales that are quantised in blocks themselves (double quantisation).

    Attributes:
        absmax: a scale for each block of codes of scales.
        quant_map: the values of the 256 codes.
        size: codes of a block.
        offset: added to every value.
    """

    absmax: TensorInfo
    quant_map: TensorInfo
    size: int
    offset: float


@dataclass(frozen=True, eq=False)
class FourBits(QuantizedWeight):
    """Pairs of 4-bit codes, the high half of a byte first, in blocks that run over the ends of rows.

    Attributes:
        codes: one byte for two entries.
        absmax: a scale for each block, or its code.
        quant_map: the values of the 16 codes.
        size: entries of a block.
        nested: how `absmax` is quantised; None: it is not.
    """

    codes: TensorInfo
    absmax: TensorInfo
    quant_map: TensorInfo
    size: int
    nested: Nested | None

    def decode(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes = as_values) -> None:
        numel, width = prod(self.shape), self.shape[-1]
        a, b = first * width, stop * width
        block, last = a // self.size, -(-b // self.size)
        start = block * self.size
        nbytes = -(-min(last * self.size, numel) // 2) - start // 2
        codes = parts.bytes(self.codes, start // 2, np.empty(nbytes, np.uint8))
        wide = np.empty(2 * nbytes, np.float32)
        look_up(of(pair_values(parts.values(self.quant_map, 0, 16), low_first=False)), codes, wide)
        apply(np.multiply, wide.reshape(1, -1), self._scales(parts, block, last)[None], self.size)
        out.reshape(-1)[:] = wide[a - start : b - start]

    def _scales(self, parts: Parts, first: int, stop: int) -> Values:
        return parts.scales(self.absmax, first, stop, self._scale_form(parts, first, stop)).values

    @property
    def unit(self) -> int:
        return lcm(self.size, self.shape[-1]) // self.shape[-1]  # whole blocks

    def encode(self, parts: Parts, first: int, values: Values, how: Rounding) -> tuple[list[Piece], Values]:
        start, count, size = first * self.shape[-1], values.size, self.size
        block, blocks = start // size, -(-count // size)
        levels, held = parts.values(self.quant_map, 0, 16), values
        if count % size:  # zeros are exact, so that they change no scale
            held = np.zeros(blocks * size, np.float32)
            held[:count] = values.reshape(-1)
        across = gcd(blocks, max(STRIP // size, 1))
        stored = parts.scales(self.absmax, block, block + blocks, self._scale_form(parts, block, block + blocks))
        stored, layout = stored.shaped(blocks // across, across), Layout.of(1, size, size * across)
        made = round_blocks(held.reshape(-1, size * across), LevelGrid(levels), layout, stored, how, index=start)
        nbytes = -(-count // 2)
        codes = made.codes.reshape(-1)[: 2 * nbytes]
        if np.unique(levels).size < levels.size:  # FP4 has two zeros
            was = parts.bytes(self.codes, start // 2, np.empty(nbytes, np.uint8))
            was = np.stack([was >> np.uint8(4), was & np.uint8(15)], 1).reshape(-1)[: codes.size]
            codes = np.where(levels[was] == levels[codes], was, codes)
        pairs = (codes[0::2] << np.uint8(4)) | codes[1::2]
        pieces = [
            Piece.of(self.codes.name, start // 2, pairs),
            Piece.of(self.absmax.name, block * made.scales.itemsize, made.scales),
        ]
        return pieces, made.values.reshape(-1)[:count].reshape(values.shape)

    def _scale_form(self, parts: Parts, first: int, stop: int) -> ScaleForm:
        """How the scales of blocks are stored; quantised ones keep the scales of their own."""
        if self.nested is None:
            return FloatScales(self.absmax.dtype)
        size = self.nested.size
        outer = parts.values(self.nested.absmax, first // size, -(-stop // size))
        outer = outer[np.arange(first, stop) // size - first // size]
        return CodedScales(parts.values(self.nested.quant_map, 0, 256), outer, np.float32(self.nested.offset))

    @property
    def working_bytes(self) -> int:
        return 6 * min(1 << 21, prod(self.shape))


def find(checkpoint: Checkpoint, settings: Settings, problems: Problems) -> Iterator[QuantizedWeight]:
    """Find the weights of bitsandbytes.

    Args:
        checkpoint: as it is stored.
        settings: its `quantization_config`.
        problems: receives what does not belong together.
    """
    where, tensors = checkpoint.folder, checkpoint.tensors
    four, eight = (bool(settings.get(f"load_in_{n}") or settings.get(f"_load_in_{n}")) for n in ("4bit", "8bit"))
    for name, info in tensors.items():
        is_state, is_rows = _STATE in name, name.endswith(".SCB")
        if (is_state and not four) or (is_rows and not eight):
            what = f"stores {quote(name)}, and its config does not say load_in_{'4bit' if is_state else '8bit'}"
            problems.add("CONFIG_MISMATCH", where, what, "correct quantization_config, or download it again")
        elif is_state:
            with problems.catching():
                yield _four_bits(Parts(checkpoint), name)
        elif is_rows:
            with problems.catching():
                yield _int8(where, checkpoint, info)
        elif info.dtype in ("U8", "I8") and name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            if f"{stem}.SCB" not in tensors and not any(f"{stem}{_STATE}{kind}" in tensors for kind in ("nf4", "fp4")):
                lacks = (
                    f"scales: {quote(f'{stem}.SCB')}"
                    if info.dtype == "I8"
                    else f"its state: {quote(f'{stem}{_STATE}nf4')}"
                )
                problems.found.append(missing(where, name, lacks))


def _int8(where: object, checkpoint: Checkpoint, scale: TensorInfo) -> Int8:
    stem = scale.name.removesuffix(".SCB")
    codes, form = checkpoint.tensors.get(f"{stem}.weight"), checkpoint.tensors.get(f"{stem}.weight_format")
    if codes is None:
        raise CheckpointError([missing(where, scale.name, f"codes: {quote(f'{stem}.weight')}")])
    if codes.dtype != "I8" or scale.dtype != "F32":
        wrong, wanted = (codes, "I8") if codes.dtype != "I8" else (scale, "F32")
        raise CheckpointError([wrong_dtype(where, wrong, [wanted])])
    if len(codes.shape) != 2 or scale.shape != codes.shape[:1]:
        raise CheckpointError([wrong_shape(where, scale, codes.shape[:1], codes)])
    if form is not None and Parts(checkpoint).bytes(form, 0, np.empty(form.nbytes, np.uint8)).any():
        what = f"tensor {quote(form.name)} says that the codes of {quote(codes.name)} are not in rows"
        raise CheckpointError.of("DTYPE_UNSUPPORTED", where, what, "save it again with a newer bitsandbytes")
    grid = Grid(scale, codes.shape, (1, codes.shape[1]))
    parts = tuple(one.name for one in (codes, scale, form) if one)
    return Int8(codes.name, codes.shape, parts, "int8", codes, byte_values("I8"), _ROWS, grid)


def _four_bits(parts: Parts, name: str) -> FourBits:
    """The weight of one module.

    Raises:
        CheckpointError: parts are missing or do not fit the state.
    """
    tensors, where = parts.checkpoint.tensors, parts.checkpoint.folder
    weight, kind = name.partition(".quant_state.")[0], name.rpartition("__")[2]
    state = _state(parts, tensors[name])
    shape, size = state.get("shape"), state.get("blocksize")
    listed = isinstance(shape, list) and len(shape) >= 2 and all(type(n) is int and n > 0 for n in shape)
    if not listed or type(size) is not int or size < 2 or size % 2 or state.get("quant_type") != kind:
        raise CheckpointError.of("CONFIG_INVALID", where, f"tensor {quote(name)} has no valid state: {state}")
    assert isinstance(shape, list)
    nested = "nested_blocksize" in state
    wanted = {"": ("U8",), ".absmax": ("U8",) if nested else ("F32", "F16", "BF16"), ".quant_map": ("F32",)}
    wanted |= {".nested_absmax": ("F32",), ".nested_quant_map": ("F32",)} if nested else {}
    blocks = -(-prod(shape) // size)
    inner, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if nested and (
        type(inner) is not int or inner < 1 or not isinstance(offset, int | float) or not abs(offset) < 1e30
    ):
        raise CheckpointError.of("CONFIG_INVALID", where, f"tensor {quote(name)} has no valid state: {state}")
    counts = {"": -(-prod(shape) // 2), ".absmax": blocks, ".quant_map": 16, ".nested_quant_map": 256}
    counts |= {".nested_absmax": -(-blocks // inner)} if nested and type(inner) is int else {}
    held: dict[str, TensorInfo] = {}
    for part, kinds in wanted.items():
        info = tensors.get(weight + part)
        if info is None:
            raise CheckpointError([missing(where, name, quote(weight + part))])
        if info.dtype not in kinds:
            raise CheckpointError([wrong_dtype(where, info, kinds)])
        if info.numel != counts[part]:
            raise CheckpointError([wrong_shape(where, info, [counts[part]], tensors[weight])])
        held[part] = info
    double = None
    if nested:
        assert type(inner) is int
        double = Nested(held[".nested_absmax"], held[".nested_quant_map"], inner, float(offset or 0.0))
    names = (*(info.name for info in held.values()), name)
    return FourBits(
        weight, tuple(shape), names, kind.upper(), held[""], held[".absmax"], held[".quant_map"], size, double
    )


def _state(parts: Parts, info: TensorInfo) -> Mapping[str, Any]:
    """The JSON in a `quant_state` tensor."""
    held = parts.bytes(info, 0, np.empty(info.nbytes, np.uint8)) if info.nbytes < 1 << 16 else np.empty(0, np.uint8)
    try:
        found = json.loads(held.tobytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        what = f"tensor {quote(info.name)} is not the JSON of a state"
        raise CheckpointError.of("CONFIG_INVALID", parts.checkpoint.folder, what, "download it again")
    return found
