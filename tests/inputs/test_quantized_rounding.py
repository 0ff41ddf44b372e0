"""Values rounded to codes with scales: nearest as torch rounds, without bias at random, with the better scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paft_merge.inputs.quantized.grids import E2M1, FLOAT8_GRIDS, CodeGrid, IntGrid, LevelGrid
from paft_merge.inputs.quantized.rounding import Layout, Rounded, Rounding, ZeroPoints, round_blocks
from paft_merge.inputs.quantized.scale_forms import CodedScales, Exponents, FloatScales, ScaleForm, Scales
from paft_merge.inputs.quantized.weights import byte_values

E4M3 = FLOAT8_GRIDS["F8_E4M3"]
HALVES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
REFIT, KEEP = Rounding(), Rounding(refit=False)
NF4 = LevelGrid(
    np.float32([-1, -0.7, -0.525, -0.395, -0.284, -0.185, -0.091, 0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1])
)


def stored(scale: Any, form: ScaleForm) -> Scales:
    """Scales that a form has, `[L, A]`."""
    bits = form.nearest(np.atleast_2d(np.float32(scale)))
    return Scales(bits, form.values(bits), form)


def rounded(values: Any, grid: CodeGrid, scale: Any, how: Rounding = REFIT, **more: Any) -> Rounded:
    """Values of one block."""
    held = np.atleast_2d(np.float32(values))
    layout = Layout(len(held), np.zeros(held.shape[1], np.int32))
    return round_blocks(held, grid, layout, stored(scale, more.pop("form", FloatScales("F32"))), how, **more)


@pytest.mark.parametrize("kind", FLOAT8_GRIDS)
def test_the_nearest_code_is_that_of_torch(kind: str) -> None:
    grid, made = FLOAT8_GRIDS[kind], np.random.default_rng(0)
    steps = grid.values[: grid.most + 1]
    assert np.array_equal(steps, byte_values(kind)[: grid.most + 1])
    values = (made.standard_normal(4000) * 2.0 ** made.integers(-20, 8, 4000)).astype(np.float32)
    values = np.concatenate([values, (steps[1:] + steps[:-1]) / 2, -(steps[1:] + steps[:-1]) / 2, steps, -steps])
    values = values.astype(np.float32)[np.abs(values) <= grid.largest]
    named = {"F8_E4M3": "float8_e4m3fn"}.get(kind, f"float8_{kind[3:].lower()}")
    wanted = torch.from_numpy(values).to(getattr(torch, named)).view(torch.uint8).numpy()
    assert np.array_equal(grid.codes(values), wanted)
    assert np.array_equal(rounded(values, grid, 1, KEEP).codes[0], wanted)
    far = rounded([1e9, -1e9], grid, 1, KEEP)
    assert far.values.tolist() == [[grid.largest, -grid.largest]]


def test_four_bit_floats_round_halves_to_even() -> None:
    assert E2M1.values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for sign in (1, -1):
        found = rounded(sign * HALVES, E2M1, 1, KEEP).codes[0]
        assert (found - (sign < 0) * 8).tolist() == [0, 2, 2, 4, 4, 6, 6]
        assert E2M1.codes(sign * HALVES).tolist() == found.tolist()


@pytest.mark.parametrize("after", [False, True])
def test_integers_round_halves_to_even_before_or_after_the_zero_point(after: bool) -> None:
    """compressed-tensors adds the zero point before it rounds, GPTQ and AWQ after it."""
    halves, zeros = np.arange(-9.5, 9.5, dtype=np.float32), ZeroPoints(np.full((1, 1), 3, np.float32), kept=True)
    made = rounded(halves, IntGrid(-8, 7, 8, after=after), 1, KEEP, zeros=zeros)
    whole = torch.from_numpy(halves).round() + 3 if after else (torch.from_numpy(halves) + 3).round()
    assert (made.codes[0].astype(int) - 8).tolist() == whole.clamp(-8, 7).tolist()
    assert (made.values[0] + 3).tolist() == whole.clamp(-8, 7).tolist()


def test_levels_are_the_nearest_and_the_smaller_one_of_two() -> None:
    middles = (NF4.values[1:] + NF4.values[:-1]) / np.float32(2)
    found = rounded(np.concatenate([middles, np.nextafter(middles, np.float32(9))]), NF4, 1, KEEP)
    assert found.codes[0].tolist() == [*range(15), *range(1, 16)]


GRIDS: list[tuple[str, CodeGrid, ScaleForm, ZeroPoints | None]] = [
    ("E2M1", E2M1, FloatScales("F8_E4M3", np.float32(300), divides=True), None),
    ("exponents", E2M1, Exponents(), None),
    ("E4M3", E4M3, FloatScales("F32"), None),
    ("int4", IntGrid(-8, 7, 8), FloatScales("BF16"), None),
    ("int4 zeros", IntGrid(-8, 7, 8), FloatScales("F16"), ZeroPoints(np.zeros((1, 1), np.float32))),
    ("int8", IntGrid(-127, 127, half=1.0, multiply=127.0, factor=1 / 127), FloatScales("F32"), None),
    ("levels", NF4, FloatScales("F32"), None),
    ("nested", NF4, CodedScales(np.linspace(-1, 1, 256, dtype=np.float32), np.full(1, 3, np.float32), np.float32(3)), None),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "form", "zeros"), [one[1:] for one in GRIDS], ids=[one[0] for one in GRIDS])
def test_random_codes_have_the_values_on_average_whatever_their_scale_was(
    grid: CodeGrid, form: ScaleForm, zeros: ZeroPoints | None
) -> None:
    few = np.float32([0.013, 0.3, -1.1, 2.9, -4.3, 5.1])
    values = np.repeat(few, 6000)
    for scale in (0.01, 1.0):
        off = [
            np.abs(rounded(values, grid, scale, how, form=form, zeros=zeros).values.reshape(6, -1).mean(1) - few).max()
            for how in (Rounding(key=7), Rounding())
        ]
        assert off[0] < off[1] / 4


def test_chances_do_not_depend_on_the_rows_that_are_rounded_together() -> None:
    values = np.random.default_rng(4).standard_normal((6, 2100)).astype(np.float32)
    scales = stored(np.full((6, 33), 0.2), FloatScales("F32"))
    layout, grid = Layout.of(1, 64, 2100), IntGrid(-8, 7, 8)
    whole = round_blocks(values, grid, layout, scales, Rounding(key=5), index=9000)
    for row in range(6):
        one = round_blocks(
            *(values[row : row + 1], grid, layout, Scales(scales.bits[:1], scales.values[:1], scales.form)),
            Rounding(key=5),
            index=9000 + 2100 * row,
        )
        assert np.array_equal(one.codes[0], whole.codes[row])
        assert np.array_equal(one.scales[0], whole.scales[row])


def test_a_scale_is_fitted_where_that_is_nearer() -> None:
    values = np.random.default_rng(1).standard_normal((8, 8)) * 1e-3
    for how in (REFIT, KEEP):
        made = rounded(values, E4M3, 1e-6, how)
        scale = made.scales.view(np.float32)[0, 0]
        assert np.array_equal(made.values, E4M3.values[made.codes] * scale)
        if how.refit:
            assert scale == pytest.approx(np.abs(values).max() / 448, rel=1e-6)
            assert np.abs(made.values - values).max() <= np.abs(values).max() / 28
        else:
            assert scale == np.float32(1e-6)
            assert np.abs(made.values).max() == np.float32(448e-6)  # larger ones are cut


@pytest.mark.parametrize("height", [1, 2, 3])
def test_blocks_of_any_columns_get_the_scales_of_their_own_entries(height: int) -> None:
    """Groups in another order, and cut lines of blocks, against each block alone."""
    made = np.random.default_rng(height)
    values, groups = (
        made.standard_normal((5, 12)).astype(np.float32),
        made.permutation(np.repeat(np.arange(3), 4)).astype(np.int32),
    )
    scales, grid = stored(np.full((-(-5 // height), 3), 1e-3), FloatScales("F32")), IntGrid(-8, 7, 8)
    found = round_blocks(values, grid, Layout(height, groups), scales, REFIT)
    for line in range(-(-5 // height)):
        for group in range(3):
            rows, columns = slice(line * height, line * height + height), groups == group
            alone = rounded(values[rows, columns].reshape(1, -1), grid, 1e-3)
            assert np.array_equal(found.codes[rows, columns].reshape(-1), alone.codes[0])
            assert found.scales[line, group] == alone.scales[0, 0]


def test_a_small_change_keeps_the_scale_that_loses_less() -> None:
    """Another scale would round all entries anew, which is a larger error than to lose the change."""
    codes = np.random.default_rng(2).integers(0, 100, (8, 8)).astype(np.uint8)
    base = E4M3.values[codes] * np.float32(0.003)
    found = rounded(base * np.float32(1.0001), E4M3, 0.003)
    assert np.array_equal(found.codes, codes)
    assert found.scales.view(np.float32)[0, 0] == np.float32(0.003)


@pytest.mark.parametrize(("most", "exponent"), [(6.0, 0), (6.1, 1), (0.75, -3), (7.9, 1)])
def test_random_codes_of_exponents_cut_no_value(most: float, exponent: int) -> None:
    made = rounded(np.linspace(-most, most, 32), E2M1, 2.0**-9, Rounding(key=1), form=Exponents())
    assert made.scales[0, 0] == 127 + exponent


@pytest.mark.parametrize("kind", FLOAT8_GRIDS)
def test_values_beyond_the_largest_scale_get_that_scale(kind: str) -> None:
    """The code after it is NaN or infinite."""
    most = FLOAT8_GRIDS[kind].most
    for how in (REFIT, Rounding(key=3)):
        made = rounded([6.1 * FLOAT8_GRIDS[kind].largest, 0.0], E2M1, 1.0, how, form=FloatScales(kind))
        assert made.scales.tolist() == [[most]]
        assert made.values.tolist() == [[6 * FLOAT8_GRIDS[kind].largest, 0.0]]


def test_a_block_of_zeros_and_a_scale_of_zero_are_written() -> None:
    for scale in (0.0, 0.5):
        made = rounded(np.zeros((2, 2)), E4M3, scale)
        assert not made.values.any()
        assert made.scales.view(np.float32)[0, 0] == np.float32(scale)
    assert np.allclose(rounded(np.full((2, 2), 3.0), E4M3, 0.0).values, 3)
