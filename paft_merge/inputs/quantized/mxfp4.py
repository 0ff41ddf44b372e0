"""MXFP4: pairs of 4-bit floats (E2M1) in a byte, and an exponent of two (E8M0) for each 32 entries.

The format is that of the OCP Microscaling Formats specification 1.0. gpt-oss stores all experts of a layer as one tensor
`NAME_blocks` `[experts, out, groups, 16]`, whose weight `NAME` is `[experts, in, out]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

from paft_merge.compute import kernels
from paft_merge.compute.kernels.block_source import TURNED
from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import Problems
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.quantized.code_intervals import OfCodes, as_values
from paft_merge.inputs.quantized.grids import E2M1
from paft_merge.inputs.quantized.rounding import Layout, Rounding, round_blocks
from paft_merge.inputs.quantized.scale_forms import Exponents, Scales
from paft_merge.inputs.quantized.weights import (
    Parts,
    Piece,
    QuantizedWeight,
    Settings,
    Values,
    missing,
    pair_values,
    wrong_dtype,
    wrong_shape,
)
from paft_merge.inputs.safetensors_header import quote

GROUP = 32
"""Entries that share an exponent."""


@cache
def fp4_pairs() -> Values:
    """The values of the two codes of a byte, `[256, 2]`; the low half is the first."""
    return pair_values(E2M1.values)


@dataclass(frozen=True, eq=False)
class TransposedExperts(QuantizedWeight):
    """The experts of a layer of gpt-oss; a row of the weight is a column of codes.

    Attributes:
        blocks: codes, `[experts, out, groups, 16]`.
        scales: exponents, `[experts, out, groups]`.
    """

    blocks: TensorInfo
    scales: TensorInfo

    def decode(self, parts: Parts, first: int, stop: int, out: Values, of: OfCodes = as_values) -> None:
        height = self.shape[1]
        for expert in range(first // height, -(-stop // height)):
            a, b = (min(max(row - expert * height, 0), height) for row in (first, stop))
            row = expert * height + a - first
            self._decode_expert(parts, expert, a, b, out[row : row + b - a], of(fp4_pairs()))

    def _decode_expert(self, parts: Parts, expert: int, first: int, stop: int, out: Values, table: Values) -> None:
        """Dequantise rows `[first, stop)` of one expert, which are columns of its codes."""
        _, height, width = self.shape
        a, b = first // GROUP, -(-stop // GROUP)
        panel = width, height // 2
        codes = parts.columns(self.blocks, expert * prod(panel), panel, a * GROUP // 2, b * GROUP // 2)
        groups = height // GROUP
        held = parts.values(self.scales, expert * width * groups, (expert + 1) * width * groups, exponents=True)
        scales = np.ascontiguousarray(held.reshape(width, groups)[:, a:b])
        rows = (b - a) * GROUP
        # Rows of bytes that are not a power of two apart: those would share a few sets of the L1 cache.
        apart = SCRATCH.array("turned codes", (width, codes.shape[1] + 64), np.uint8)
        apart[:, : codes.shape[1]] = codes
        whole = out if rows == stop - first else SCRATCH.array("turned rows", (rows, width), np.float32)
        line = SCRATCH.array("turned scales", TURNED, np.float32)
        kernels.decode_turned(apart, table, scales, GROUP, line, whole)
        if whole is not out:
            out[:] = whole[first - a * GROUP : stop - a * GROUP]

    @property
    def unit(self) -> int:
        return GROUP

    def encode(self, parts: Parts, first: int, values: Values, how: Rounding) -> tuple[list[Piece], Values]:
        height, pieces, decoded = self.shape[1], list[Piece](), np.empty_like(values)
        for expert in range(first // height, -(-(first + len(values)) // height)):
            a, b = (min(max(row - expert * height, 0), height) for row in (first, first + len(values)))
            row = expert * height + a - first
            some = slice(row, row + b - a)
            pieces += self._encode_expert(parts, expert, a, values[some], how, decoded[some])
        return pieces, decoded

    def _encode_expert(
        self, parts: Parts, expert: int, first: int, values: Values, how: Rounding, decoded: Values
    ) -> list[Piece]:
        """Round rows of one expert, which are columns of its codes, and write the values of the codes into `decoded`."""
        _, height, width = self.shape
        a, count, groups = first // GROUP, len(values) // GROUP, height // GROUP
        held = parts.scales(self.scales, expert * width * groups, (expert + 1) * width * groups, Exponents())
        held = held.shaped(width, groups)
        bits, scales = (np.ascontiguousarray(one[:, a : a + count].T) for one in (held.bits, held.values))
        layout, index = Layout.of(GROUP, 1, width), (expert * height + first) * width
        made = round_blocks(values, E2M1, layout, Scales(bits, scales, held.form), how, index=index)
        decoded[:] = made.values
        codes = made.codes.reshape(count, GROUP, width)
        pairs = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
        turned = np.ascontiguousarray(pairs.transpose(2, 0, 1)).reshape(width, -1)
        return [
            Piece(self.blocks.name, (expert * width * groups + a) * GROUP // 2, turned, groups * GROUP // 2),
            Piece(self.scales.name, expert * width * groups + a, np.ascontiguousarray(made.scales.T), groups),
        ]

    @property
    def working_bytes(self) -> int:
        # Two panels, the codes of a tile turned, and the scales of an expert.
        panel = prod(self.shape[1:])
        return panel + panel // 8 + (1 << 21)


def find(checkpoint: Checkpoint, settings: Settings, problems: Problems) -> Iterator[QuantizedWeight]:
    """Find the MXFP4 weights of gpt-oss.

    Args:
        checkpoint: as it is stored.
        settings: its `quantization_config`.
        problems: receives blocks without scales, scales without blocks, and wrong shapes and types.
    """
    where, tensors = checkpoint.folder, checkpoint.tensors
    for name, info in tensors.items():
        if name.endswith("_scales") and info.dtype == "U8" and f"{name[:-7]}_blocks" not in tensors:
            problems.found.append(missing(where, name, quote(f"{name[:-7]}_blocks")))
        if not name.endswith("_blocks"):
            continue
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if scales is None:
            problems.found.append(missing(where, name, f"scales: {quote(f'{stem}_scales')}"))
        elif {info.dtype, scales.dtype} != {"U8"}:
            problems.found.append(wrong_dtype(where, info if info.dtype != "U8" else scales, ["U8"]))
        elif len(info.shape) != 4 or info.shape[-1] != GROUP // 2:
            problems.found.append(wrong_shape(where, info, ["experts", "out", "groups", GROUP // 2], scales))
        elif scales.shape != info.shape[:-1]:
            problems.found.append(wrong_shape(where, scales, info.shape[:-1], info))
        else:
            experts, out, groups, _ = info.shape
            shape = (experts, groups * GROUP, out)
            yield TransposedExperts(stem, shape, (name, scales.name), "MXFP4", info, scales)
