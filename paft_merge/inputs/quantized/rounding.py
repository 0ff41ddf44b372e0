"""Rounds float32 values to codes with scales, to nearest or at random without bias."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute import kernels
from paft_merge.compute.scratch import SCRATCH
from paft_merge.inputs.quantized.grids import FLOAT8_GRIDS, CodeGrid, FloatGrid, IntGrid, Values
from paft_merge.inputs.quantized.scale_forms import Bits, Exponents, Scales


class Rounding(NamedTuple):
    """How values are rounded to codes.

    Attributes:
        refit: compute the scale of a block again where that is nearer to its values; else every scale is kept.
        key: stream of stochastic rounding; 0 rounds to nearest.
    """

    refit: bool = True
    key: int = 0


class Layout(NamedTuple):
    """The blocks of a matrix `[R, W]`, in lines of `A` blocks.

    Attributes:
        height: rows of a block; the last line may be cut.
        groups: `[W]` int32, the block of each column in its line.
        size: columns of a block, which follow each other; 0: they may be anywhere.
    """

    height: int
    groups: NDArray[np.int32]
    size: int = 0

    @classmethod
    def of(cls, height: int, size: int, width: int) -> Layout:
        """Blocks of `height` rows and `size` columns."""
        return cls(height, (np.arange(width) // size).astype(np.int32), size)


class ZeroPoints(NamedTuple):
    """Zero points of blocks.

    Attributes:
        values: `[L, A]`.
        kept: whether every block keeps its zero point.
        least: the least one that a block may get; None: that of the grid.
    """

    values: Values
    kept: bool = False
    least: int | None = None


class Rounded(NamedTuple):
    """Codes with scales.

    Attributes:
        codes: `[R, W]`, one byte each.
        scales: `[L, A]`, bits as in `Scales`.
        zeros: `[L, A]`, zero points.
        values: `[R, W]`, what the codes stand for.
    """

    codes: NDArray[np.uint8]
    scales: Bits
    zeros: Values
    values: Values


class _Tried(NamedTuple):
    """Scales that are tried: bits, values and zero points, `[L, A]` each."""

    bits: Bits
    scales: Values
    zeros: Values


def round_blocks(
    values: Values,
    grid: CodeGrid,
    layout: Layout,
    stored: Scales,
    how: Rounding,
    *,
    zeros: ZeroPoints | None = None,
    index: int = 0,
) -> Rounded:
    """Round blocks of values to codes.

    A block has the stored scale or, with `refit`, the one for its limits if that makes its squared error smaller. A small
    change of a block is lost less often with the stored scale: another scale changes the rounding of every entry.

    Args:
        values: `[R, W]`, contiguous, without NaN.
        grid: the values of the codes.
        layout: the blocks.
        stored: the scales of the checkpoint, `[L, A]`.
        how: which scales to try, and how codes are rounded.
        zeros: the zero points of the checkpoint; None: there are none.
        index: number of the first entry in the stream of `how.key`.
    """
    points = zeros or ZeroPoints(np.zeros(stored.values.shape, np.float32), kept=True)
    limits = np.empty((2, *stored.values.shape), np.float32)
    tried = [_Tried(stored.bits, stored.values, points.values)]
    with np.errstate(all="ignore"):
        if how.refit or how.key:
            kernels.limits(values, layout.groups, layout.height, layout.size, limits, kernels.lines(4))
        if how.refit:
            tried += _fitted(limits, grid, stored, points, exact=how.key != 0)
        scales, shifts = (np.stack([getattr(one, part) for one in tried]) for part in ("scales", "zeros"))
        usable = np.isfinite(scales) & (scales > 0)
        if how.key:  # values out of range have a bias
            reaching = usable & _reaches(limits, grid, np.abs(scales), shifts)
            usable = np.where(reaching.any(0), reaching, usable)
        usable[0] |= not how.key
        form = grid.form
        steps = scales
        if form.multiply:
            steps = np.where(scales != 0, np.float32(form.multiply) / scales, np.float32(0))
    codes, decoded = np.empty(values.shape, np.uint8), np.empty(values.shape, np.float32)
    chosen, across = np.empty(stored.values.shape, np.int64), stored.values.shape[-1]
    kernels.round_codes(
        *(values, layout.groups, layout.height, layout.size, steps, scales, shifts, usable.view(np.uint8)),
        *(bool(form.multiply), float(form.factor), form.numbers, form.table, np.uint64(how.key), index),
        *(codes, decoded, chosen, np.empty((len(tried), across)), np.empty((3, across), np.float32)),
        *(kernels.lines(2, of=np.float64), kernels.lines(7), SCRATCH.array("spare codes", kernels.STRIP, np.uint8)),
    )
    bits = np.choose(chosen, [one.bits for one in tried])
    return Rounded(codes, bits, np.choose(chosen, [one.zeros for one in tried]), decoded)


def _reaches(limits: Values, grid: CodeGrid, scales: Values, zeros: Values) -> NDArray[np.bool_]:
    """Whether the codes of each block have values from its least to its greatest one."""
    least, greatest = grid.reach(zeros)
    found: NDArray[np.bool_] = (limits[0] >= least * scales) & (limits[1] <= greatest * scales)
    return found


def _fitted(limits: Values, grid: CodeGrid, stored: Scales, zeros: ZeroPoints, *, exact: bool) -> list[_Tried]:
    """Scales for blocks with these limits.

    Args:
        limits: `[2, L, A]`, the least and the greatest value of each block, or zero.
        grid: the values of the codes.
        stored: the scales of the checkpoint.
        zeros: its zero points.
        exact: whether all values must be in range.
    """
    if isinstance(grid, IntGrid) and not zeros.kept:
        return [_with_zeros(limits, grid, stored, zeros, exact=exact)]
    wanted = grid.wanted(limits[0], limits[1], zeros.values, whole=exact)
    bits = stored.form.nearest(wanted)
    tried = [bits]
    if isinstance(stored.form, Exponents):
        tried.append(np.maximum(bits, 1) - np.uint8(1))
    elif exact or (isinstance(grid, FloatGrid) and grid in FLOAT8_GRIDS.values()):
        reached = _reaches(limits, grid, stored.form.values(bits), zeros.values)
        higher = bits + bits.dtype.type(1)
        tried = [np.where(reached | ~np.isfinite(stored.form.values(higher)), bits, higher)]
    return [_Tried(one, stored.form.values(one), zeros.values) for one in tried]


def _with_zeros(limits: Values, grid: IntGrid, stored: Scales, zeros: ZeroPoints, *, exact: bool) -> _Tried:
    """Scales and zero points with which all codes are used, or all but one if every value must be in range."""
    low, high = limits
    wanted = ((high - low) / np.float32(grid.high - grid.low - exact)).astype(np.float32)
    bits = stored.form.nearest(wanted)
    if exact:
        bits = np.where(stored.form.values(bits) < wanted, bits + bits.dtype.type(1), bits)
    scales = stored.form.values(bits)
    points = np.float32(grid.low) - np.divide(low, scales, out=np.zeros_like(low), where=scales > 0)
    points = np.ceil(points) if exact else np.rint(points)
    least = grid.low if zeros.least is None else zeros.least
    return _Tried(bits, scales, np.clip(points, least, grid.high).astype(np.float32))
