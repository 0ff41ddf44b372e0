"""NVIDIA ModelOpt: NVFP4, which has a scale of FP8 for each 16 codes and one for the tensor, and FP8.

`weight` holds two 4-bit codes in a byte, `weight_scale` the scales of groups, and `weight_scale_2` the scale of the tensor, which
multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterator

from paft_merge.errors import Problems
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.quantized.grids import E2M1, FLOAT8_GRIDS
from paft_merge.inputs.quantized.mxfp4 import fp4_pairs
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

_GROUP = 16
_ALGORITHMS = ("FP8", "FP8_PB_WO", "NVFP4", "MIXED_PRECISION")


def find(checkpoint: Checkpoint, settings: Settings, problems: Problems) -> Iterator[QuantizedWeight]:
    """Find the weights of a checkpoint of ModelOpt.

    Args:
        checkpoint: as it is stored.
        settings: its `quantization_config`.
        problems: receives what does not belong together, and algorithms that are not read.
    """
    where, tensors, algorithm = checkpoint.folder, checkpoint.tensors, str(settings.get("quant_algo") or "")
    smoothed = next((name for name in tensors if name.endswith(".pre_quant_scale")), None)
    if algorithm not in _ALGORITHMS or smoothed:
        how = f"{algorithm or 'no quant_algo'}{f', with {quote(smoothed)}' if smoothed else ''}"
        what = f"is quantised by ModelOpt ({how}), which is not read"
        problems.add("DTYPE_UNSUPPORTED", where, what, "dequantise it with the library that wrote it")
        return
    for name, scale in tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        codes, of_all = tensors.get(name.removesuffix("_scale")), tensors.get(f"{name}_2")
        if codes is None:
            problems.found.append(missing(where, name, f"codes: {quote(name.removesuffix('_scale'))}"))
        elif codes.dtype == "U8" and algorithm in ("NVFP4", "MIXED_PRECISION"):
            grid = Grid(scale, (*codes.shape[:-1], 2 * codes.shape[-1]), (1,) * (len(codes.shape) - 1) + (_GROUP,))
            if of_all is None:
                problems.found.append(missing(where, name, f"the scale of the tensor: {quote(f'{name}_2')}"))
            elif scale.dtype != "F8_E4M3" or of_all.dtype != "F32":
                wrong, wanted = (scale, ["F8_E4M3"]) if scale.dtype != "F8_E4M3" else (of_all, ["F32"])
                problems.found.append(wrong_dtype(where, wrong, wanted))
            elif not grid.fits or len(codes.shape) < 2 or of_all.numel != 1:
                wrong, shape = (of_all, (1,)) if grid.fits else (scale, grid.counts)
                problems.found.append(wrong_shape(where, wrong, shape, codes))
            else:
                parts = codes.name, name, of_all.name
                table, form = fp4_pairs(), "NVFP4"
                yield ScaledCodes(codes.name, grid.shape, parts, form, codes, table, E2M1, grid, of_all=of_all)
        elif codes.dtype in FLOAT8 and algorithm != "NVFP4":
            yield from _fp8(where, codes, scale, algorithm, problems)
        else:
            wanted_types = ("U8",) if algorithm == "NVFP4" else FLOAT8
            problems.found.append(wrong_dtype(where, codes, wanted_types))
    for info in tensors.values():
        if info.dtype in ("U8", *FLOAT8) and info.name.endswith(".weight") and f"{info.name}_scale" not in tensors:
            problems.found.append(missing(where, info.name, f"scales: {quote(f'{info.name}_scale')}"))


def _fp8(
    where: object, codes: TensorInfo, scale: TensorInfo, algorithm: str, problems: Problems
) -> Iterator[QuantizedWeight]:
    shape, lead = codes.shape, (1,) * (len(codes.shape) - 2)
    sizes = [shape, (*lead, 1, shape[-1])] if algorithm == "FP8" else [(*lead, 128, 128), shape, (*lead, 1, shape[-1])]
    grid = next((g for g in (Grid(scale, shape, s) for s in sizes) if g.fits), None)
    if scale.dtype not in FLOATS:
        problems.found.append(wrong_dtype(where, scale, FLOATS))
    elif grid is None:
        problems.found.append(wrong_shape(where, scale, Grid(scale, shape, sizes[0]).counts, codes))
    else:
        parts = codes.name, scale.name
        table = byte_values(codes.dtype)
        yield ScaledCodes(codes.name, shape, parts, "FP8", codes, table, FLOAT8_GRIDS[codes.dtype], grid)
