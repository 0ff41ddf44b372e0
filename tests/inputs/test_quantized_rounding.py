"""Values rounded to codes with scales: nearest as torch rounds, without bias at random, with the better scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paft_merge.inputs.quantized.rounding import E2M1, FLOAT8_GRIDS, Rounding, Scales, round_blocks
from paft_merge.inputs.quantized.weights import byte_values

HALVES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


@pytest.mark.parametrize("kind", FLOAT8_GRIDS)
def test_the_nearest_code_is_that_of_torch(kind: str) -> None:
    grid, made = FLOAT8_GRIDS[kind], np.random.default_rng(0)
    assert np.array_equal(grid.values[: grid.most + 1], byte_values(kind)[: grid.most + 1])
    values = (made.standard_normal(4000) * 2.0 ** made.integers(-20, 8, 4000)).astype(np.float32)
    steps = grid.values[: grid.most + 1]
    values = np.concatenate([values, (steps[1:] + steps[:-1]) / 2, -(steps[1:] + steps[:-1]) / 2, steps, -steps])
    values = values.astype(np.float32)[np.abs(values) <= grid.largest]
    named = {"F8_E4M3": "float8_e4m3fn"}.get(kind, f"float8_{kind[3:].lower()}")
    wanted = torch.from_numpy(values).to(getattr(torch, named)).view(torch.uint8).numpy()
    assert np.array_equal(grid.codes(values), wanted)
    assert grid.values[grid.codes(np.float32([1e9, -1e9]))].tolist() == [grid.largest, -grid.largest]


def test_four_bit_floats_round_halves_to_even() -> None:
    assert E2M1.values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1.codes(HALVES).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert E2M1.codes(-HALVES).tolist() == [8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("grid", [E2M1, FLOAT8_GRIDS["F8_E4M3"]], ids=["E2M1", "E4M3"])
def test_chances_give_the_value_on_average(grid: object) -> None:
    assert isinstance(grid, type(E2M1))
    values = np.repeat(np.float32([0.013, 0.3, -1.1, 2.9, -5.3]), 4000)
    chances = np.tile(np.arange(4000, dtype=np.float32) / 4000, 5)
    means = grid.values[grid.codes(values, chances)].reshape(5, -1).mean(1)
    assert np.allclose(means, values[::4000], rtol=2e-3)


def stored(scale: float, kind: str = "F32") -> Scales:
    value = np.full((1, 1), scale, np.float32)
    if kind == "U8":
        return Scales((np.log2(value) + 127).astype(np.uint8), value, kind, True)
    return Scales(value.view(np.uint32), value, kind, False)


def test_a_scale_is_fitted_where_that_is_nearer() -> None:
    grid = FLOAT8_GRIDS["F8_E4M3"]
    values = (np.random.default_rng(1).standard_normal((1, 8, 1, 8)) * 1e-3).astype(np.float32)
    for how in (Rounding(), Rounding(refit=False)):
        made = round_blocks(values, grid, stored(1e-6), how, None)
        scale = made.scales.view(np.float32)[0, 0]
        assert np.array_equal(made.values, grid.values[made.codes] * scale)
        if how.refit:
            assert scale == pytest.approx(np.abs(values).max() / 448, rel=1e-6)
            assert np.abs(made.values - values).max() <= np.abs(values).max() / 28
        else:
            assert scale == np.float32(1e-6)
            assert np.abs(made.values).max() == np.float32(448e-6)  # larger ones are cut


def test_a_small_change_keeps_the_scale_that_loses_less() -> None:
    """Another scale would round all entries anew, which is a larger error than to lose the change."""
    grid, made = FLOAT8_GRIDS["F8_E4M3"], np.random.default_rng(2)
    codes = made.integers(0, 100, (1, 8, 1, 8)).astype(np.uint8)
    base = grid.values[codes] * np.float32(0.003)
    found = round_blocks(base * np.float32(1.0001), grid, stored(0.003), Rounding(), None)
    assert np.array_equal(found.codes, codes)
    assert found.scales.view(np.float32)[0, 0] == np.float32(0.003)


@pytest.mark.parametrize(("most", "exponent"), [(6.0, 0), (6.1, 1), (0.75, -3), (7.9, 1)])
def test_random_codes_of_exponents_cut_no_value(most: float, exponent: int) -> None:
    values = np.linspace(-most, most, 32, dtype=np.float32).reshape(1, 32, 1, 1)
    made = round_blocks(values, E2M1, stored(2.0**-9, "U8"), Rounding(key=1), np.full_like(values, 0.5))
    assert made.scales[0, 0] == 127 + exponent


def test_a_block_of_zeros_and_a_scale_of_zero_are_written() -> None:
    grid, zeros = FLOAT8_GRIDS["F8_E4M3"], np.zeros((1, 2, 1, 2), np.float32)
    for scale in (0.0, 0.5):
        made = round_blocks(zeros, grid, stored(scale), Rounding(), None)
        assert not made.values.any()
        assert made.scales.view(np.float32)[0, 0] == np.float32(scale)
    made = round_blocks(zeros + np.float32(3), grid, stored(0.0), Rounding(), None)
    assert np.allclose(made.values, 3)


def test_blocks_rounded_at_random_have_their_values_on_average() -> None:
    grid, made = FLOAT8_GRIDS["F8_E4M3"], np.random.default_rng(3)
    values = np.broadcast_to(made.standard_normal((1, 4, 1, 4)).astype(np.float32), (500, 4, 1, 4)).copy()
    chances = made.random(values.shape, np.float32)
    scales = Scales(
        np.full((500, 1), 0.01, np.float32).view(np.uint32), np.full((500, 1), 0.01, np.float32), "F32", False
    )
    off = [
        np.abs(round_blocks(values, grid, scales, Rounding(), drawn).values.mean(0) - values[0]).sum()
        for drawn in (chances, None)
    ]
    assert off[0] < off[1] / 4
