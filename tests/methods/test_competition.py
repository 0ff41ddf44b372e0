"""PCB-Merging against its definition in float64, over the tensor, and what it makes of degenerate deltas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from paft_merge.compute import blocks
from paft_merge.methods import pcb
from paft_merge.methods.rules.thresholds import kept_count


def normalized(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def definition(deltas: np.ndarray, weights: Sequence[float], densities: Sequence[float], factor: float) -> np.ndarray:
    """The paper's formulas (arXiv:2410.02396, sec. 3), entry by entry, of the deltas that are not zero."""
    present = [delta for delta in deltas if delta.any()]
    total, divisor = np.zeros(deltas.shape[1]), np.zeros(deltas.shape[1])
    for delta, weight, density in zip(deltas, weights, densities, strict=True):
        if not delta.any():
            continue
        intra = softmax(len(present) * normalized(delta * delta))
        inter = np.sum([softmax(normalized(delta * other)) for other in present], axis=0)
        score = intra * inter
        order = np.lexsort((np.arange(score.size), -score.astype(np.float32)))[: kept_count(score.size, density)]
        share = np.zeros_like(score)
        share[order] = score[order] / score.max()
        total, divisor = total + weight * share * delta, divisor + share
    return factor * np.where(divisor > 0, total / np.where(divisor > 0, divisor, 1.0), 0.0)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("tile", [1 << 10, 1 << 21])
def test_pcb_is_its_definition(count: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", tile)
    made = np.random.default_rng(count)
    deltas = (made.standard_t(4, (count, 5000)) * 1e-3).astype(np.float32).astype(np.float64)
    deltas[0, ::7] = 0
    weights, densities = made.uniform(-0.5, 1.5, count), made.choice([0.05, 0.2, 0.5, 1.0], count)
    ours = pcb([torch.from_numpy(d).float() for d in deltas], weights.tolist(), density=densities.tolist(), lambda_=0.7)
    expected = definition(deltas, weights, densities, 0.7)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-9)
    assert np.mean(expected != 0) > 0.02


def test_large_entries_and_those_of_one_sign_win() -> None:
    one = torch.tensor([1.0, 0.85, 0.1, -0.8, 0.0])
    other = torch.tensor([1.0, -0.85, 0.1, -0.8, 0.0])
    found = pcb([one, other], density=0.4)  # two entries of each: agreement counts more than the size 0.85
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.0, -0.8, 0.0])


def test_a_delta_of_zeros_does_not_take_part() -> None:
    made = torch.Generator().manual_seed(0)
    one, other = (torch.randn(400, generator=made) for _ in range(2))
    zeros = torch.zeros(400)
    assert torch.equal(pcb([one, zeros, other], [0.5, 1.0, 2.0]), pcb([one, other], [0.5, 2.0]))
    alone = pcb([zeros, one], density=0.25)
    largest = one.abs() >= one.abs().sort(descending=True).values[99]
    torch.testing.assert_close(alone, torch.where(largest, one, 0.0))


def test_equal_entries_keep_the_lowest_index() -> None:
    assert pcb([torch.full((5,), -2.0)], density=0.4).tolist() == [-2.0, -2.0, 0.0, 0.0, 0.0]
    assert pcb([torch.full((5,), 3.0), torch.full((5,), -1.0)], density=[0.4, 0.6]).tolist() == [
        1.0,
        1.0,
        -1.0,
        0.0,
        0.0,
    ]
    assert not pcb([torch.ones(5)], density=0.0).any()


def test_deltas_of_any_size_have_scores_in_range() -> None:
    made = torch.Generator().manual_seed(0)
    deltas = [torch.randn(300, generator=made) for _ in range(24)]
    plain = pcb(deltas)
    for size in (2.0**-60, 2.0**60):
        torch.testing.assert_close(pcb([d * size for d in deltas]) / size, plain, rtol=0, atol=0)
    many = [torch.randn(300, generator=made).numpy() for _ in range(128)]
    expected = definition(np.array(many, np.float64), [1.0] * 128, [0.2] * 128, 1.0)
    np.testing.assert_allclose(pcb([torch.from_numpy(d) for d in many]).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_values_that_are_not_finite_are_found() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        pcb([torch.tensor([1.0, float("nan")]), torch.ones(2)])
