"""Rounding into the rarer storage types, and NaN and infinity in any of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paft_merge.inputs.dtypes import DTYPES, cast, count_nonfinite

MERGEABLE = [name for name, dtype in DTYPES.items() if dtype.mergeable]
NARROW = [name for name in MERGEABLE if DTYPES[name].bits < 32]
FLOATS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


def kind_of(name: str) -> torch.dtype:
    kind = getattr(torch, str(DTYPES[name].torch))
    assert isinstance(kind, torch.dtype)
    return kind


def read(stored: np.ndarray, name: str) -> torch.Tensor:
    return torch.from_numpy(stored).view(kind_of(name))


@pytest.mark.parametrize("name", MERGEABLE)
@given(values=FLOATS)
@settings(max_examples=50, deadline=None)
def test_nearest_is_what_torch_rounds_to(name: str, values: np.ndarray) -> None:
    expected = torch.from_numpy(values).to(kind_of(name))
    assert torch.equal(read(cast(values, name), name).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", MERGEABLE)
@given(values=FLOATS)
@settings(max_examples=50, deadline=None)
def test_nonfinite_elements_are_counted_as_torch_sees_them(name: str, values: np.ndarray) -> None:
    stored = cast(values, name)
    wide = read(stored, name).double()
    assert count_nonfinite(stored, name) == int((~torch.isfinite(wide)).sum())


@pytest.mark.parametrize("name", [name for name in NARROW if DTYPES[name].bits == 8])
def test_every_byte_is_known_to_be_finite_or_not(name: str) -> None:
    stored = np.arange(256, dtype=np.uint8)
    finite = torch.isfinite(read(stored, name).float())
    assert [count_nonfinite(stored[i : i + 1], name) for i in range(256)] == [int(not f) for f in finite]


def test_of_types_that_cannot_be_merged_nothing_is_asked() -> None:
    assert count_nonfinite(np.full(16, 0xFF, np.uint8), "I64") == 0
    assert count_nonfinite(np.full(16, 0xFF, np.uint8), "F4") == 0


@pytest.mark.parametrize("name", NARROW)
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_is_right_on_average(name: str) -> None:
    largest = min(float(torch.finfo(kind_of(name)).max), 1e30)
    smallest = float(torch.finfo(kind_of(name)).smallest_normal)
    for value in (0.3, -1.7, 1.0, 0.0, -0.0, smallest * 0.37, -smallest * 0.01, largest, -largest * 0.999, 1 + 1e-6):
        values = np.full(200_000, value, np.float32)
        rounded = read(cast(values, name, key=77), name).double()
        found = sorted(rounded.unique().tolist())
        assert 1 <= len(found) <= 2, (value, found)
        exact = float(np.float32(value))
        if len(found) == 1:
            assert abs(found[0] - exact) <= abs(exact) * 1e-4 or found[0] == exact, (value, found)
            continue
        low, high = found
        assert low < exact < high
        sigma = (high - low) * 0.5 / len(values) ** 0.5
        assert abs(rounded.mean().item() - exact) < 5 * sigma
        neighbours = torch.from_numpy(values[:1]).to(kind_of(name)).double().item()
        assert neighbours in found


@pytest.mark.parametrize("name", NARROW)
def test_a_stream_is_one_number_an_element_wherever_a_block_begins(name: str) -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    whole = cast(values, name, key=5)
    width = DTYPES[name].bits // 8
    parts = [cast(values[a : a + 137], name, key=5, index=a) for a in range(0, 1000, 137)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(cast(values, name, key=6), whole)
    assert not np.array_equal(cast(values[width:], name, key=5), whole[width * width :])


@pytest.mark.parametrize("name", NARROW)
def test_what_is_not_finite_or_too_large_is_rounded_as_to_nearest(name: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32)
    ours, theirs = read(cast(values, name, key=9), name).float(), read(cast(values, name), name).float()
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
    assert count_nonfinite(cast(values[:3], name, key=9), name) == count_nonfinite(cast(values[:3], name), name)
