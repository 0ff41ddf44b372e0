"""The geometric median and MagMax against plain definitions in float64, and what they make of ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paft_merge.errors import RecipeError
from paft_merge.methods import geometric_median, magmax
from paft_merge.recipe import load_recipe


def median_of(*points: list[float], weight: float | list[float] = 1.0, **more: float) -> list[float]:
    return geometric_median([torch.tensor(point) for point in points], weight, **more).tolist()


def distances(point: np.ndarray, points: np.ndarray, weights: np.ndarray) -> float:
    """What the median makes least: the weighted sum of distances."""
    return float(weights @ np.linalg.norm(points - point, axis=1))


def weiszfeld(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The plain iteration in the space of the points; it must not meet one of them."""
    point = weights @ points / weights.sum()
    for _ in range(5000):
        pulls = weights / np.linalg.norm(points - point, axis=1)
        point = pulls @ points / pulls.sum()
    return point


@pytest.mark.parametrize("count", [3, 4, 7])
def test_the_median_is_weiszfeld_s_in_the_space_of_the_deltas(count: int) -> None:
    made = np.random.default_rng(count)
    points = made.normal(0, 1e-3, (count, 6)) * made.uniform(0.5, 2, (count, 1))
    points, weights = points.astype(np.float32).astype(np.float64), made.uniform(0.8, 1.2, count)
    ours = geometric_median([torch.from_numpy(p).float() for p in points], weights.tolist(), iterations=2000, epsilon=0)
    np.testing.assert_allclose(ours.numpy(), weiszfeld(points, weights), rtol=1e-4, atol=1e-8)


@settings(deadline=None, max_examples=60)
@given(
    points=hnp.arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.integers(-3, 3)),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6),
)
def test_no_point_near_the_median_or_among_the_deltas_is_better(points: np.ndarray, weights: list[float]) -> None:
    """Small whole numbers: many deltas are equal, on one line, or the median themselves."""
    points, kept = points.astype(np.float64), weights[: len(points)]
    if not sum(kept):
        return
    ours = geometric_median([torch.from_numpy(p).float() for p in points], kept, iterations=1000).double().numpy()
    least = distances(ours, points, np.array(kept))
    around = ours + np.random.default_rng(0).normal(0, 0.05, (50, points.shape[1]))
    for other in (*points, *around):
        assert least <= distances(other, points, np.array(kept)) * (1 + 1e-4) + 1e-6


def test_degenerate_medians() -> None:
    assert median_of([1.0, 0.0], [0.0, 1.0]) == [0.5, 0.5]  # every point between the two is one; the mean stays
    assert median_of([1.0, 0.0], [0.0, 1.0], weight=[3.0, 1.0]) == [1.0, 0.0]  # the heavier delta, exactly
    assert median_of([1.0], [1.0], [5.0]) == [1.0]  # most of the weight is there
    assert median_of([0.1], [0.2], [0.9]) == pytest.approx([0.2])  # on a line, the middle one
    assert median_of([0.1], [0.1], [0.1]) == median_of([0.1])
    assert median_of([0.0], [0.0]) == [0.0]
    assert median_of([1.0, 0.0], [0.0, 1.0], lambda_=0.5) == [0.25, 0.25]
    assert median_of([1.0], [1.0], [5.0], lambda_=-2.0) == [-2.0]
    # The mean is the first delta, which is not the median: the iteration has to leave it.
    found = median_of([0.0, 0.0], [3.0, 0.0], [-1.0, 1.0], [-1.0, -1.0], [-1.0, 0.0])
    points = np.array([[0.0, 0.0], [3.0, 0.0], [-1.0, 1.0], [-1.0, -1.0], [-1.0, 0.0]])
    assert distances(np.array(found), points, np.ones(5)) < distances(points[0], points, np.ones(5)) - 0.05


def test_a_weight_counts_a_delta_as_often() -> None:
    points = [[1.0, 0.2], [-0.5, 1.0], [0.3, -1.0]]
    once, doubled = [2.0, 2.0, 3.0], [points[0], points[1], points[2], *points]
    assert median_of(*points, weight=once) == pytest.approx(median_of(points[2], *doubled), abs=1e-5)
    assert median_of(*points, weight=once) != pytest.approx(median_of(*points), abs=1e-3)
    assert median_of(*points, weight=once, iterations=0) == pytest.approx([1.9 / 7, -0.6 / 7], abs=1e-6)
    with pytest.raises(ValueError, match="every weight is 0"):
        median_of(*points, weight=0.0)
    with pytest.raises(ValueError, match="weight must be at least 0"):
        median_of(*points, weight=-1.0)


@settings(deadline=None, max_examples=60)
@given(
    values=hnp.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 50)), elements=st.integers(-6, 6)),
    weights=st.lists(st.sampled_from([-0.5, 0.0, 0.25, 1.0, 2.0]), min_size=4, max_size=4),
    factor=st.sampled_from([-1.0, 0.5, 1.0]),
)
def test_magmax_is_its_definition(values: np.ndarray, weights: list[float], factor: float) -> None:
    deltas = values.astype(np.float64) / 8  # exact in float32, with many ties
    ours = magmax([torch.from_numpy(d).float() for d in deltas], weights[: len(deltas)], lambda_=factor)
    expected = np.zeros(deltas.shape[1])
    for delta, weight in zip(deltas, weights, strict=False):
        expected = np.where(np.abs(weight * delta) > np.abs(expected), weight * delta, expected)
    np.testing.assert_array_equal(ours.numpy(), expected * factor)


def test_magmax_of_opposite_deltas_takes_the_first() -> None:
    one, other = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])
    assert magmax([one, other]).tolist() == [1.0, -2.0]
    assert magmax([other, one]).tolist() == [-1.0, 2.0]


def test_a_recipe_refuses_a_negative_weight_of_a_median() -> None:
    models = [{"model": "a", "parameters": {"weight": -1.0}}, {"model": "b"}]
    with pytest.raises(RecipeError, match="at least 0"):
        load_recipe({"merge_method": "geometric_median", "base_model": "base", "models": models})
