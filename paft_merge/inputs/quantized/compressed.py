"""compressed-tensors (llm-compressor): FP8, INT8, packed INT4 and INT8, MXFP8, MXFP4 and NVFP4.

`config_groups` states for each group of modules the bits, the type and the blocks of the codes. The names are
`weight` or `weight_packed`, `weight_scale`, `weight_zero_point`, `weight_g_idx`, `weight_global_scale`, `weight_shape`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.quantized.grids import E2M1, FLOAT8_GRIDS, CodeGrid, IntGrid
from paft_merge.inputs.quantized.mxfp4 import fp4_pairs
from paft_merge.inputs.quantized.weights import (
    FLOATS,
    Grid,
    ModulePatterns,
    Parts,
    Piece,
    QuantizedWeight,
    ScaledCodes,
    Settings,
    Values,
    byte_values,
    missing,
    pair_values,
    texts,
    wrong_dtype,
    wrong_shape,
)
from paft_merge.inputs.safetensors_header import quote

_DENSE = ("", "dense")
_NAMES = {("float", 8): "FP8", ("float", 4): "FP4", ("int", 8): "INT8", ("int", 4): "INT4"}


@dataclass(frozen=True)
class Scheme:
    """How the weights of one group are quantised.

    Attributes:
        kind: `float` or `int`.
        bits: bits of a code.
        strategy: `tensor`, `channel`, `block`, `group` or `tensor_group`.
        group: entries of a group.
        block: rows and columns of a block.
        symmetric: whether there are no zero points.
    """

    kind: str
    bits: int
    strategy: str
    group: int
    block: tuple[int, ...]
    symmetric: bool

    @classmethod
    def of(cls, weights: Mapping[str, Any]) -> Scheme:
        """The scheme that `weights` of a config group states."""
        group, block = weights.get("group_size"), weights.get("block_structure")
        strategy = weights.get("strategy") or (
            "group" if type(group) is int and group > 0 else "channel" if group == -1 else "tensor"
        )
        sides = tuple(n for n in block if type(n) is int and n > 0) if isinstance(block, list | tuple) else ()
        return cls(
            str(weights.get("type") or "int"),
            bits if type(bits := weights.get("num_bits", 8)) is int else 0,
            str(strategy),
            group if type(group) is int and group > 0 else 0,
            sides,
            weights.get("symmetric") is not False,
        )

    @property
    def name(self) -> str:
        """The format, for messages."""
        if (self.kind, self.bits) == ("float", 4):
            return "NVFP4" if self.group == 16 else "MXFP4"
        return _NAMES.get((self.kind, self.bits), f"{self.kind}, {self.bits} bits")

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The blocks of the scales of a weight; None if the strategy is unknown."""
        lead = (1,) * (len(shape) - 1)
        if self.strategy == "tensor":
            return shape if len(shape) == 2 else (1, *shape[1:])
        if self.strategy == "channel":
            return (*lead, shape[-1])
        if self.strategy in ("group", "tensor_group") and self.group:
            return (*lead, self.group)
        if self.strategy == "block" and len(self.block) == 2:
            return (*lead[1:], *self.block)
        return None


@dataclass(frozen=True)
class PackedZeros:
    """Zero points that are packed along the rows of the weight.

    Attributes:
        info: `[ceil(rows * bits / 32), groups]`, I32.
        bits: bits of a zero point, which divide 32.
    """

    info: TensorInfo
    bits: int

    def rows(self, parts: Parts, first: int, stop: int) -> Values:
        """Return the zero points of rows `[first, stop)`, `[stop - first, groups]`."""
        count, groups = 32 // self.bits, self.info.shape[-1]
        low, high = first // count, -(-stop // count)
        words = parts.bytes(self.info, low * groups * 4, np.empty((high - low) * groups * 4, np.uint8))
        at = np.arange(first, stop)
        shifts = (at % count * self.bits).astype(np.uint32)[:, None]
        codes = words.view(np.uint32).reshape(-1, groups)[at // count - low] >> shifts & np.uint32((1 << self.bits) - 1)
        return codes.astype(np.float32) - np.float32(1 << (self.bits - 1))

    lines = rows  # a block has one row

    @property
    def unit(self) -> int:
        """Rows whose zero points share words."""
        return 32 // self.bits

    def piece(self, first: int, values: Values) -> Piece:
        """Return the words of the zero points of rows from `first` on, `[rows, groups]`; `first` is a multiple of `unit`."""
        count, (rows, groups) = self.unit, values.shape
        codes = np.zeros((-(-rows // count) * count, groups), np.uint32)
        codes[:rows] = values + np.float32(1 << (self.bits - 1))
        shifts = (np.arange(count) * self.bits).astype(np.uint32)[:, None]
        words = np.bitwise_or.reduce(codes.reshape(-1, count, groups) << shifts, axis=1)
        return Piece.of(self.info.name, first // count * groups * 4, words)


def find(checkpoint: Checkpoint, settings: Settings, problems: Problems) -> Iterator[QuantizedWeight]:
    """Find the weights of a checkpoint of compressed-tensors.

    Args:
        checkpoint: as it is stored.
        settings: its `quantization_config`.
        problems: receives what does not belong together, and formats that are not read.
    """
    where, tensors = checkpoint.folder, checkpoint.tensors
    listed = settings.get("config_groups")
    groups = [group for group in listed.values() if _has_weights(group)] if isinstance(listed, Mapping) else []
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, Mapping) and str(sparse.get("format") or "") not in _DENSE:
        _unread(where, f"sparse ({sparse.get('format')})", problems)
    elif settings.get("transform_config"):
        _unread(where, "rotated (transform_config)", problems)
    else:
        targeted = [(ModulePatterns(texts(group.get("targets"))), group) for group in groups]
        for name in tensors:
            stem = name.removesuffix(".weight_scale")
            if stem == name and name.endswith(".weight_packed"):
                stem = name.removesuffix(".weight_packed")
                if f"{stem}.weight_scale" not in tensors:
                    problems.found.append(missing(where, name, f"scales: {quote(f'{stem}.weight_scale')}"))
            elif stem != name:
                group = _group_of(stem, targeted)
                if group is None:
                    what = f"stores {quote(name)}, and no group of quantization_config has the module {quote(stem)}"
                    problems.add("CONFIG_MISMATCH", where, what, "correct quantization_config, or download it again")
                    continue
                with problems.catching():
                    yield _weight(Parts(checkpoint), stem, Scheme.of(group["weights"]))
        for module in _without_scales(checkpoint, groups, settings):
            what = f"says in config.json that {quote(module)} is quantised, and it is not"
            problems.add("CONFIG_MISMATCH", where, what, "correct quantization_config, or download it again")


def _has_weights(group: Any) -> bool:
    """Whether a group of a config states how weights are quantised."""
    return isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)


def _unread(where: object, how: str, problems: Problems) -> None:
    what = f"is quantised by compressed-tensors and {how}, which is not read"
    problems.add("DTYPE_UNSUPPORTED", where, what, "dequantise it with the library that wrote it")


def _group_of(module: str, groups: list[tuple[ModulePatterns, Mapping[str, Any]]]) -> Mapping[str, Any] | None:
    """The group that names a module, else the first one that names a class of modules."""
    named = (group for targets, group in groups if targets.naming(module))
    classes = (group for _, group in groups if any(one.isidentifier() for one in texts(group.get("targets"))))
    return next(named, None) or next(classes, None)


def _without_scales(checkpoint: Checkpoint, groups: list[Mapping[str, Any]], settings: Settings) -> list[str]:
    """The first module that a group targets by name, and that is stored as floats."""
    targets = ModulePatterns(one for group in groups for one in texts(group.get("targets")) if not one.isidentifier())
    ignored = ModulePatterns(texts(settings.get("ignore")))
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        plain = module != name and len(info.shape) == 2 and info.dtype in FLOATS
        if plain and targets.naming(module) and not ignored.naming(module):
            return [module]
    return []


def _weight(parts: Parts, stem: str, scheme: Scheme) -> ScaledCodes:
    """The weight of one module.

    Raises:
        CheckpointError: parts are missing, or do not fit the scheme.
    """
    tensors, where = parts.checkpoint.tensors, parts.checkpoint.folder
    packed, plain = tensors.get(f"{stem}.weight_packed"), tensors.get(f"{stem}.weight")
    if packed and plain:
        what = f"stores {quote(plain.name)} twice: also as {quote(packed.name)}"
        raise CheckpointError.of("CONFIG_MISMATCH", where, what, "delete one of them, or download it again")
    codes, scale = packed or plain, tensors[f"{stem}.weight_scale"]
    if codes is None:
        raise CheckpointError([missing(where, scale.name, f"codes: {quote(f'{stem}.weight')}")])
    found = _table(scheme, packed is not None)
    if found is None:
        what = f"stores {quote(codes.name)} as {scheme.name}{' packed' if packed else ''}, {scheme.strategy}, which is not read"
        raise CheckpointError.of("DTYPE_UNSUPPORTED", where, what, "dequantise it with the library that wrote it")
    table, values, wanted = found
    if codes.dtype != wanted or len(codes.shape) < 2:
        raise CheckpointError([wrong_dtype(where, codes, [wanted])])
    shape = (*codes.shape[:-1], _width(parts, stem, scheme, codes, scale, table))
    exponents = scale.dtype == "U8"
    kinds = _scale_types(scheme)
    if scale.dtype not in kinds:
        raise CheckpointError([wrong_dtype(where, scale, kinds)])
    sizes = scheme.sizes(shape)
    assert sizes is not None
    grid = Grid(scale, shape, sizes, exponents)
    if not grid.fits:
        raise CheckpointError([wrong_shape(where, scale, grid.counts, codes)])
    zeros, groups, of_all = (tensors.get(f"{stem}.weight_{part}") for part in ("zero_point", "g_idx", "global_scale"))
    held = [codes, scale, zeros, groups, of_all, tensors.get(f"{stem}.weight_shape")]
    if groups is not None and groups.shape != shape[-1:]:
        raise CheckpointError([wrong_shape(where, groups, shape[-1:], codes)])
    if groups is not None and (parts.values(groups, 0, groups.numel) == -1).any():
        groups = None  # compressed-tensors takes the columns in order then
    if scheme.name == "NVFP4" and (of_all is None or of_all.numel != 1):
        fault = wrong_shape(where, of_all, [1], codes) if of_all else missing(where, codes.name, "weight_global_scale")
        raise CheckpointError([fault])
    used = of_all if scheme.strategy == "tensor_group" or scheme.name == "NVFP4" else None
    points = _zeros(where, scheme, zeros, codes, grid, packed is not None)
    names = tuple(one.name for one in held if one)
    return ScaledCodes(
        *(f"{stem}.weight", shape, names, scheme.name, codes, table, values, grid, points, groups, used, np.divide),
        scheme.symmetric or scheme.kind == "float",
    )


def _scale_types(scheme: Scheme) -> tuple[str, ...]:
    """The types of the scales of a weight."""
    exponents = ("U8", "F8_E8M0")
    if scheme.name in ("MXFP4", "NVFP4"):
        return exponents if scheme.name == "MXFP4" else ("F8_E4M3", *FLOATS)
    return (*FLOATS, *exponents) if scheme.kind == "float" and scheme.strategy == "group" else FLOATS


def _table(scheme: Scheme, packed: bool) -> tuple[Values, CodeGrid, str] | None:
    """The values of a byte of codes, those of a code, and the type of their tensor; None if the format is not read."""
    if scheme.sizes((2, 2)) is None:
        return None
    if scheme.kind == "float" and scheme.bits == 8 and not packed:
        return byte_values("F8_E4M3"), FLOAT8_GRIDS["F8_E4M3"], "F8_E4M3"
    if scheme.kind == "float" and scheme.bits == 4 and packed and scheme.group in (16, 32):
        return fp4_pairs(), E2M1, "U8"
    if scheme.kind != "int" or scheme.bits not in (4, 8):
        return None
    half = 1 << (scheme.bits - 1)
    if not packed:
        return byte_values("I8"), IntGrid(-half, half - 1), "I8"
    values = np.arange(-half, half, dtype=np.float32)
    return values if half == 128 else pair_values(values), IntGrid(-half, half - 1, half), "I32"


def _width(parts: Parts, stem: str, scheme: Scheme, codes: TensorInfo, scale: TensorInfo, table: Values) -> int:
    """Columns of a weight: those of the groups, else what `weight_shape` says, else those of the codes."""
    held = codes.shape[-1] * (codes.nbytes // max(codes.numel, 1)) * (table.size // 256)
    stated = parts.checkpoint.tensors.get(f"{stem}.weight_shape")
    certain = codes.dtype != "I32" or (scheme.group > 0 and scale.shape[-1:] == (held // scheme.group,))
    # Far away, reading a shape is a request for each weight.
    if certain and (stated is None or codes.dtype != "I32" or parts.checkpoint.location(stated.name, 0, 1) is None):
        return held
    if stated is None or stated.dtype not in ("I64", "I32") or stated.numel != len(codes.shape):
        raise CheckpointError(
            [missing(parts.checkpoint.folder, codes.name, f"its shape: {quote(f'{stem}.weight_shape')}")]
        )
    *rows, width = map(int, parts.values(stated, 0, stated.numel))
    if (*rows,) != codes.shape[:-1] or not held - 32 // scheme.bits < width <= held:
        what = f"tensor {quote(stated.name)} says {[*rows, width]}, and {quote(codes.name)} holds {[*codes.shape[:-1], held]}"
        raise CheckpointError.of("SHAPE_MISMATCH", parts.checkpoint.folder, what, "download it again")
    return width


def _zeros(
    where: object, scheme: Scheme, zeros: TensorInfo | None, codes: TensorInfo, grid: Grid, packed: bool
) -> Grid | PackedZeros | None:
    """The zero points of a weight; None for a symmetric one.

    Raises:
        CheckpointError: they are missing or do not fit.
    """
    if zeros is None:
        if scheme.symmetric:
            return None
        raise CheckpointError([missing(where, codes.name, "zero points, and the config says symmetric: false")])
    if not packed or zeros.dtype != "I32":
        found, kinds = Grid(zeros, grid.shape, grid.sizes), ("I8",) if scheme.kind == "int" else ("F8_E4M3", *FLOATS)
        if zeros.dtype not in kinds or not found.fits:
            raise CheckpointError([_wrong_zeros(where, zeros, found.counts, codes, kinds)])
        return found
    wanted = [-(-grid.shape[0] * scheme.bits // 32), grid.counts[-1]]
    if zeros.dtype != "I32" or list(zeros.shape) != wanted or len(grid.shape) != 2:
        raise CheckpointError([_wrong_zeros(where, zeros, wanted, codes, ("I32",))])
    return PackedZeros(zeros, scheme.bits)


def _wrong_zeros(
    where: object, zeros: TensorInfo, shape: Sequence[int], codes: TensorInfo, kinds: Sequence[str]
) -> Problem:
    return wrong_shape(where, zeros, shape, codes) if zeros.dtype in kinds else wrong_dtype(where, zeros, kinds)
