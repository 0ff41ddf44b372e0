"""FP8: codes of 8-bit floats with the shape of the weight, and a scale for each block, row or tensor.

The block format is that of DeepSeek-V3 (arXiv:2412.19437, section 3.3): `weight_scale_inv` has a scale for each 128 x 128
block, which multiplies the codes. FBGEMM and ModelOpt name it `weight_scale`; it is per row or per tensor there.
"""

from __future__ import annotations

from collections.abc import Iterator

from paft_merge.errors import Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.quantized.grids import FLOAT8_GRIDS
from paft_merge.inputs.quantized.weights import (
    FLOAT8,
    FLOATS,
    Grid,
    QuantizedWeight,
    ScaledCodes,
    Settings,
    byte_values,
    missing,
    wrong_dtype,
    wrong_shape,
)
from paft_merge.inputs.safetensors_header import quote

_MARKERS = ("_scale_inv", "_scale")
_SCALES = (*FLOATS, "F8_E8M0", "U8")
"""The types of scales; bytes are exponents of two, as in transformers."""
_BLOCK = (128, 128)
"""The blocks of a config that does not state `weight_block_size`, as in transformers."""


def find(checkpoint: Checkpoint, settings: Settings, problems: Problems) -> Iterator[QuantizedWeight]:
    """Find the FP8 weights of a checkpoint.

    Args:
        checkpoint: as it is stored.
        settings: its `quantization_config`.
        problems: receives codes without scales, scales without codes, and wrong shapes and types.
    """
    where, tensors, scaled = checkpoint.folder, checkpoint.tensors, set[str]()
    if (blocks := settings.get("weight_block_size")) is not None and not _are_blocks(blocks):
        what = f"says weight_block_size: {blocks!r} in its quantization_config, which is not two sizes"
        problems.add("CONFIG_INVALID", where, what, "correct quantization_config, or download it again")
        return
    for name, info in tensors.items():
        marker = next((one for one in _MARKERS if name.endswith(one)), None)
        if marker is None or (weight := tensors.get(name.removesuffix(marker))) is None:
            if marker == "_scale_inv" or name.endswith(".weight_scale"):
                problems.found.append(missing(where, name, quote(name.removesuffix(marker or ""))))
            continue
        if weight.dtype not in FLOAT8:
            if marker == "_scale_inv" or name.endswith(".weight_scale"):
                problems.found.append(wrong_dtype(where, weight, FLOAT8))
            continue
        scaled.add(weight.name)
        if len(weight.shape) < 2:
            problems.found.append(wrong_shape(where, weight, ["out", "in"], info))
            continue
        if info.dtype not in _SCALES:
            problems.found.append(wrong_dtype(where, info, _SCALES))
            continue
        grids = [Grid(info, weight.shape, sizes, info.dtype == "U8") for sizes in _sizes(settings, weight.shape)]
        fitting = next((grid for grid in grids if grid.fits), None)
        if fitting is None:
            problems.found.append(wrong_shape(where, info, grids[0].counts, weight))
        else:
            table, grid = byte_values(weight.dtype), FLOAT8_GRIDS[weight.dtype]
            names = weight.name, name
            yield ScaledCodes(weight.name, weight.shape, names, "FP8", weight, table, grid, fitting)
    lacking = [info for info in tensors.values() if info.dtype in FLOAT8 and info.name not in scaled]
    problems.found += [_without_scales(where, info) for info in lacking if len(info.shape) > 1]


def _sizes(settings: Settings, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The blocks that a config allows for a weight of this shape, the likeliest first."""
    lead = (1,) * (len(shape) - 2)
    tensor, expert, rows, columns = shape, lead + shape[-2:], (*lead, 1, shape[-1]), (*lead, shape[-2], 1)
    method = settings.get("quant_method")
    if method == "fbgemm_fp8":
        return [rows, columns]
    blocks = settings.get("weight_block_size", _BLOCK if method == "fp8" else None)
    return [(*lead, *blocks)] if blocks is not None else [tensor, expert]


def _are_blocks(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _without_scales(where: object, info: TensorInfo) -> Problem:
    what = (
        f"stores codes {quote(info.name)} ({info.dtype}) without scales, although its config says that it is quantised"
    )
    return Problem(
        "KEYS_MISSING", str(where), what, "download it again, or remove quantization_config if the codes are values"
    )
