"""Weights that follow from norms: the definition, and every method that takes them, on tensors in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paft_merge import methods
from paft_merge.methods import METHODS
from paft_merge.methods.rules.measured_weights import Weight, weights_for

MEASURED = [name for name, method in METHODS.items() if (p := method.parameter("weight")) and p.words]


def test_the_methods_that_add_up_deltas_take_them() -> None:
    assert {*MEASURED} == {
        "task_arithmetic", "ties", "l1_ties", "sign_election", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
        "della_linear", "della", "magmax", "pcb", "tsv", "iso_c",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "norms", "expected"),
    [
        (["equal_norm", "equal_norm"], [15.0, 1.0], [8 / 15, 8.0]),
        (["auto", "equal_norm", "auto"], [3.0, 6.0, 0.0], [1.5, 0.75, 0.0]),
        ([1.0, "equal_norm"], [15.0, 1.0], [1.0, 15.0]),
        ([-0.5, "equal_norm"], [15.0, 1.0], [-0.5, 7.5]),
        ([0.0, "equal_norm", "equal_norm"], [9.0, 4.0, 2.0], [0.0, 0.75, 1.5]),
        ([1.0, 2.0, "auto"], [1.0, 2.0, 10.0], [1.0, 2.0, 0.25]),
        (["inverse_norm", "inverse_norm"], [15.0, 1.0], [0.125, 1.875]),
        (["inverse_norm"] * 3, [2.0, 0.0, 2.0], [1.0, 0.0, 1.0]),
        (["equal_norm"], [3.0], [1.0]),
        (["equal_norm", 1.0], [1e-8, 1.0], [0.0, 1.0]),
        ([0.3, -0.2], [1.0, 1.0], [0.3, -0.2]),
    ],
)
def test_weights_are_their_definition(given: list[Weight], norms: list[float], expected: list[float]) -> None:
    assert weights_for(given, norms) == pytest.approx(expected, rel=5e-6)


def test_weights_have_six_digits_so_that_rounding_errors_do_not_reach_them() -> None:
    one, other = (weights_for(["equal_norm"] * 2, [norm, 1.0]) for norm in (3.7, 3.7 * (1 + 1e-12)))
    assert one == other == (0.635135, 2.35)


@pytest.fixture
def deltas() -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(40, 300, generator=made) * size for size in (1e-2, 7e-4, 3e-3)]


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("word", ["equal_norm", "inverse_norm"])
def test_a_word_is_the_number_that_it_stands_for(method: str, word: str, deltas: list[torch.Tensor]) -> None:
    norms = [float(np.linalg.norm(delta.double().numpy())) for delta in deltas]
    wanted = np.mean(norms) if word == "equal_norm" else len(norms) / math.fsum(1 / n for n in norms)
    merge, rest = (
        getattr(methods, method),
        {} if method in ("task_arithmetic", "l1_ties", "magmax", "tsv", "iso_c") else {"density": 0.4},
    )
    expected = merge(deltas, weight=[float(f"{wanted / norm:.6g}") for norm in norms], **rest)
    assert torch.equal(merge(deltas, weight=word, **rest), expected)
    assert not torch.equal(merge(deltas, weight=1.0, **rest), expected)


def test_a_word_beside_numbers_takes_their_size(deltas: list[torch.Tensor]) -> None:
    merged = methods.task_arithmetic(deltas, [0.0, 2.0, "auto"])
    size = 2.0 * deltas[1].norm()
    torch.testing.assert_close(merged, 2.0 * deltas[1] + deltas[2] * (size / deltas[2].norm()), rtol=1e-5, atol=1e-9)


def test_words_that_do_not_go_together_are_refused(deltas: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="inverse_norm is for all sources or for none, and others have"):
        methods.task_arithmetic(deltas, ["inverse_norm", 1.0, "inverse_norm"])
    with pytest.raises(ValueError, match=r"must be a number or one of equal_norm, inverse_norm, auto, got 'norm'"):
        methods.ties(deltas, "norm")
    with pytest.raises(ValueError, match=r"weight must be a number, got 'auto'"):
        methods.linear(deltas, "auto")
