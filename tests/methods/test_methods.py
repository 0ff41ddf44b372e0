"""The methods on plain tensors: laws that hold for all of them, hand-sized examples, and the originals they reproduce."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paft_merge import methods
from paft_merge.methods import METHODS
from paft_merge.methods.rules.thresholds import kept_count

FIRST = {name: next(iter(inspect.signature(getattr(methods, name)).parameters)) for name in METHODS}
PAIRS = {name for name in METHODS if FIRST[name] == "base" or name in ("nuslerp", "model_stock")}
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
NOT_HOMOGENEOUS = {
    "nearswap",
    "ram",
    "ramplus_tl",
    "arcee_fusion",
}  # they compare a delta with a number, or take its softmax


def call(name: str, tensors: list[torch.Tensor], **keywords: Any) -> torch.Tensor:
    """Run a method on all tensors, on the first two, or on the first, with weight 1 and t 0.5 by default."""
    function: Callable[..., torch.Tensor] = getattr(methods, name)
    for key, value in (("weight", 1.0), ("t", 0.5)):
        if key in inspect.signature(function).parameters:
            keywords.setdefault(key, value)
    if FIRST[name] == "base":
        return function(*tensors[:2], **keywords)
    return function(tensors if FIRST[name] in ("tensors", "deltas") else tensors[0], **keywords)


def draw(*seeds: int, shape: tuple[int, ...] = (37, 19), size: float = 1e-3) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(s)) * size for s in seeds]


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_inputs_are_not_modified(method: str) -> None:
    tensors = draw(0, 1)
    before = [t.clone() for t in tensors]
    call(method, tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_order_of_sources_does_not_matter_but_to_slerp_and_to_random_masks(method: str) -> None:
    tensors = draw(0, 1)
    if FIRST[method] not in ("tensors", "deltas") or method in RANDOM:
        pytest.skip("the base comes first; masks belong to places")
    torch.testing.assert_close(call(method, tensors), call(method, tensors[::-1]), rtol=1e-6, atol=1e-12)


def test_zero_deltas_give_zero(method: str) -> None:
    assert not call(method, [torch.zeros(5, 3), torch.zeros(5, 3)]).any()


def test_a_single_source_comes_back_as_it_is(method: str) -> None:
    if method == "iso_c":
        pytest.skip("it makes the singular values of one delta equal too")
    (tensor,) = draw(3)
    everything = {
        "l1_ties": {"l1_mass": 1.0},
        "nearswap": {"t": 1.0},
        "ram": {"epsilon": 0.0},
        "ramplus_tl": {"epsilon": 0.0},
        "pcb": {"density": 1.0},
    }
    result = call(method, [tensor, tensor] if method in PAIRS else [tensor], **everything.get(method, {}))
    torch.testing.assert_close(result, tensor, rtol=1e-6, atol=0)


def test_result_is_float32_of_the_same_shape_for_every_float_type(method: str) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        result = call(method, [t.to(dtype) for t in draw(0, 1, shape=(2, 3, 4))])
        assert (result.dtype, result.shape) == (torch.float32, (2, 3, 4))


def test_scalars_and_empty_tensors_are_merged(method: str) -> None:
    assert call(method, [torch.tensor(2.0), torch.tensor(2.0)]).shape == ()
    assert call(method, [torch.zeros(0, 4), torch.zeros(0, 4)]).shape == (0, 4)


def test_keywords_are_the_recipe_fields(method: str) -> None:
    ignored = {"int8_mask", "trim_scope", "weight_scope"} | (
        {"density", "rescale"} if method == "task_arithmetic" else set()
    )
    fields = {p.name.replace("lambda", "lambda_") for p in METHODS[method].parameters} - ignored
    keywords = set(inspect.signature(getattr(methods, method)).parameters) - {
        *FIRST.values(),
        "base",
        "other",
        "seed",
    }
    assert keywords == fields


def test_defaults_are_the_recipe_defaults(method: str) -> None:
    for name, keyword in inspect.signature(getattr(methods, method)).parameters.items():
        parameter = METHODS[method].parameter(name.replace("lambda_", "lambda"))
        if parameter and keyword.default is not inspect.Parameter.empty:
            assert keyword.default == parameter.default, name


def test_shapes_that_differ_are_refused(method: str) -> None:
    if FIRST[method] in ("tensor", "delta"):
        pytest.skip("it takes one")
    with pytest.raises(ValueError, match="one shape"):
        call(method, [torch.zeros(3), torch.zeros(4)])


def test_doubling_every_delta_doubles_the_result() -> None:
    tensors = draw(0, 1)
    for name in METHODS.keys() - NOT_HOMOGENEOUS:
        torch.testing.assert_close(call(name, [2 * t for t in tensors]), 2 * call(name, tensors), rtol=1e-6, atol=0)


def test_words_that_are_no_choice_are_refused() -> None:
    with pytest.raises(ValueError, match="elect must be one of weighted"):
        methods.ties(draw(0, 1), 1.0, elect="total")
    with pytest.raises(ValueError, match="weight has 3 values for 2 sources"):
        methods.ties(draw(0, 1), [1.0, 1.0, 1.0])


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_ties_elects_on_weighted_deltas_unlike_peft() -> None:
    deltas = [torch.tensor([3.0]), torch.tensor([-2.0])]
    assert methods.ties(deltas, [0.4, 1.0]).item() == -2.0
    assert methods.ties(deltas, [0.4, 1.0], elect="unweighted", normalize="count").item() == pytest.approx(1.2)


def test_elections_by_hand() -> None:
    deltas = [
        torch.tensor([3.0, 1.0, 1.0, 0.0]),
        torch.tensor([-1.0, 2.0, -1.0, 0.0]),
        torch.tensor([-1.0, 0.0, 0.0, 5.0]),
    ]

    def result(**keywords: Any) -> list[float]:
        return methods.sign_election(deltas, 1.0, **keywords).tolist()  # type: ignore[no-any-return]

    assert result(elect="none") == [1.0, 3.0, 0.0, 5.0]
    assert result(elect="weighted") == [3.0, 3.0, 1.0, 5.0]  # a tie elects +
    assert result(elect="count") == [-2.0, 3.0, 1.0, 5.0]  # two of three are negative
    assert result(elect="count", elect_tie="zero") == [-2.0, 3.0, 0.0, 5.0]
    assert result(elect="count", normalize="count") == [-1.0, 1.5, 1.0, 5.0]


def test_a_negative_weight_votes_for_the_opposite_sign() -> None:
    deltas = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, -3.0])]
    assert methods.ties(deltas, [1.0, -1.0], normalize="none").tolist() == [-3.0, 4.0]


def test_density_counts_and_ties_keep_the_lowest_index() -> None:
    delta = torch.tensor([1.0, -2.0, 2.0, 2.0, 0.5])
    assert methods.ties([delta], 1.0, density=0.1).tolist() == [0.0, -2.0, 0.0, 0.0, 0.0]
    assert methods.ties([delta], 1.0, density=0.4).tolist() == [0.0, -2.0, 2.0, 0.0, 0.0]
    assert not methods.ties([delta], 1.0, density=0.0).any()


def test_l1_mass_keeps_the_fewest_entries_with_that_share() -> None:
    delta = torch.tensor([4.0, -3.0, 2.0, 1.0])  # L1 norm 10

    def kept(**keywords: Any) -> list[float]:
        return methods.l1_ties([delta], rescale="none", **keywords).tolist()  # type: ignore[no-any-return]

    assert kept(l1_mass=0.4) == [4.0, 0.0, 0.0, 0.0]
    assert kept(l1_mass=0.41) == [4.0, -3.0, 0.0, 0.0]
    assert kept(l1_mass=0.9) == [4.0, -3.0, 2.0, 0.0]
    assert kept(l1_mass=None, epsilon=2.0) == [4.0, -3.0, 0.0, 0.0]
    assert kept(l1_mass=0.7, shrink="soft") == [1.0, 0.0, 0.0, 0.0]  # the threshold, 3, is taken off


def test_l1_rescaling_gives_the_norm_back() -> None:
    (delta,) = draw(5, shape=(300, 200))
    for keywords in ({"l1_mass": 0.6}, {"density": 0.1}, {"epsilon": 1e-3}, {"density": 0.1, "shrink": "soft"}):
        merged = methods.l1_ties([delta], **keywords)
        assert merged.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5), keywords


def test_linear_refuses_weights_that_add_up_to_zero() -> None:
    with pytest.raises(ValueError, match="add up to zero"):
        methods.linear(draw(0, 1), [1.0, -1.0])


@pytest.mark.parametrize("case", ["zero", "parallel", "opposite", "equal"])
def test_slerp_of_degenerate_vectors_is_finite_and_linear(case: str) -> None:
    (v,) = draw(0, size=1.0)
    other = {"zero": torch.zeros_like(v), "parallel": 2 * v, "opposite": -v, "equal": v}[case]
    result = methods.slerp(v, other, 0.25)
    expected = 0.75 * v + 0.25 * other
    if case == "zero":  # a zero vector stands at a right angle to everything
        expected = math.sin(0.75 * math.pi / 2) * v
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


# --- randomness -------------------------------------------------------------------------------------------------------


def test_the_mean_of_dare_over_seeds_is_the_delta() -> None:
    delta = torch.ones(64)
    runs = torch.stack([methods.dare_linear([delta], 1.0, density=0.3, rescale=False, seed=s) for s in range(400)])
    assert set(runs.unique().tolist()) == {0.0, 1.0}
    spread = math.sqrt(0.3 * 0.7 / 400)
    assert (runs.mean(0) - 0.3).abs().max() < 5 * spread


def test_dare_masks_are_independent_between_sources_and_neighbours() -> None:
    delta, n = torch.ones(200_000), 200_000
    one = methods.dare_linear([delta], 1.0, density=0.5, rescale=False, seed=1)
    two = methods.dare_linear([delta, delta], [0.0, 1.0], density=0.5, rescale=False, seed=1)
    bound = 5 * 0.25 / math.sqrt(n)
    assert abs((one * two).mean() - 0.25) < bound
    assert all(abs((one[:-k] * one[k:]).mean() - 0.25) < bound for k in (1, 2, 64, 1024))


RESCALED = {
    "ties": {"density": 0.3},
    "l1_ties": {"l1_mass": 0.5},
    "l1_ties soft": {"density": 0.5, "shrink": "soft"},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "della_linear": {"density": 0.4},
    "della": {"density": 0.4},
}


@pytest.mark.parametrize("case", RESCALED)
@pytest.mark.parametrize(("rescale", "power"), [("l1", 1), ("l2", 2), (True, 1)])
def test_rescale_keeps_the_norm_and_the_proportions(case: str, rescale: str | bool, power: int) -> None:
    (delta,) = draw(0)
    method, rest = getattr(methods, case.split()[0]), {"weight": 1.0, **RESCALED[case]}
    plain, merged = (method([delta], rescale=given, **rest).double() for given in ("none", rescale))
    assert 0 < (merged == 0).sum() < delta.numel()
    scale = (torch.linalg.vector_norm(delta.double(), power) / torch.linalg.vector_norm(plain, power)).item()
    assert abs(scale - 1) > 1e-3
    torch.testing.assert_close(merged, plain * scale, rtol=3e-7, atol=0)


def test_a_seed_gives_the_same_mask_and_another_seed_another() -> None:
    (delta,) = draw(0)
    runs = [methods.dare_ties([delta], 1.0, density=0.5, seed=s) for s in (7, 7, 8)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# --- against a float64 reference --------------------------------------------------------------------------------------


def reference_ties(
    deltas: list[np.ndarray], weights: list[float], density: float, rescale: str = "none", **rule: Any
) -> np.ndarray:
    """TIES as its paper describes it, entry by entry, in float64."""
    kept = []
    for delta in deltas:
        order = np.lexsort((np.arange(delta.size), -np.abs(delta)))[: kept_count(delta.size, density)]
        mask = np.zeros(delta.size, bool)
        mask[order] = True
        kept.append(np.where(mask, delta, 0.0))
        if rescale != "none" and kept[-1].any():
            norm, left = (np.linalg.norm(some, int(rescale[1])) for some in (delta, kept[-1]))
            kept[-1] *= norm / left
    weighted = [w * k for w, k in zip(weights, kept, strict=True)]
    votes = {"weighted": weighted, "unweighted": kept, "count": [np.sign(k) for k in kept], "none": None}[rule["elect"]]
    total, divisor = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for w, k, v in zip(weights, kept, weighted, strict=True):
        agrees = k != 0
        if votes is not None:
            elected = np.sign(np.sum(votes, axis=0))
            elected = np.where(elected == 0, 1.0 if rule["elect_tie"] == "positive" else 0.0, elected)
            agrees &= np.sign(v if rule["elect"] == "weighted" else k) == elected
        total += np.where(agrees, v, 0.0)
        divisor += np.where(agrees, {"weights": w, "count": 1.0, "none": 0.0}[rule["normalize"]], 0.0)
    return total / np.where(divisor == 0, 1.0, divisor)


@settings(deadline=None, max_examples=60)
@given(
    arrays=hnp.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 50)), elements=st.integers(-6, 6)),
    weights=st.lists(st.sampled_from([-0.5, 0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4),
    density=st.floats(0, 1),
    elect=st.sampled_from(["weighted", "unweighted", "count", "none"]),
    elect_tie=st.sampled_from(["positive", "zero"]),
    normalize=st.sampled_from(["weights", "count", "none"]),
    rescale=st.sampled_from(["none", "l1", "l2"]),
)
def test_ties_is_its_definition_under_every_option(
    arrays: np.ndarray, weights: list[float], density: float, elect: str, elect_tie: str, normalize: str, rescale: str
) -> None:
    deltas = [row.astype(np.float64) / 8 for row in arrays]  # exact in float32, with many ties
    rule = {"elect": elect, "elect_tie": elect_tie, "normalize": normalize, "rescale": rescale}
    ours = methods.ties([torch.from_numpy(d).float() for d in deltas], weights[: len(deltas)], density=density, **rule)
    np.testing.assert_allclose(
        ours.numpy(), reference_ties(deltas, weights[: len(deltas)], density, **rule), rtol=1e-6, atol=1e-7
    )


# --- against the originals --------------------------------------------------------------------------------------------


def test_peft_ties_is_a_named_option() -> None:
    from peft.utils.merge_utils import ties

    deltas, weights = draw(0, 1, 2), torch.tensor([0.5, 0.7, 0.2])
    for vote, elect in (("total", "unweighted"), ("frequency", "count")):
        theirs = ties(deltas, weights, density=0.3, majority_sign_method=vote)
        ours = methods.ties(deltas, weights.tolist(), density=0.3, elect=elect, normalize="count")
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


CASES = {
    "linear": {"weight": {"x": 0.5, "y": 0.7}},
    "linear unnormalized": {"weight": {"x": 0.5, "y": -0.7}, "normalize": False},
    "task_arithmetic": {"weight": {"x": 0.5, "y": 0.7}, "lambda": 0.8},
    "task_arithmetic normalized": {"weight": {"x": 0.5, "y": 0.7}, "normalize": True},
    "ties": {"weight": {"x": 0.5, "y": 0.7}, "density": {"x": 0.3, "y": 0.5}},
    "ties unnormalized": {
        "weight": {"x": 0.5, "y": -0.7},
        "density": {"x": 0.3, "y": 1.0},
        "normalize": False,
        "rescale": True,
    },
    "dare_ties dense": {"weight": {"x": 0.5, "y": 0.7}, "density": {"x": 1.0, "y": 1.0}},
    "dare_linear dense": {"weight": {"x": 0.5, "y": 0.7}, "density": {"x": 1.0, "y": 1.0}, "normalize": True},
    "slerp": {"t": 0.3},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_mergekit_agrees(case: str) -> None:
    from mergekit.merge_methods.api import merge_tensors

    name, parameters = case.split()[0], CASES[case]
    base, x, y = draw(0, 1, 2, size=0.02)
    tensors = [base, base + 0.05 * x, base + 0.1 * y]
    if name == "slerp":
        theirs = merge_tensors(tensors[:2], name, base_index=0, ids=["b", "x"], parameters=parameters, name="w")
        ours = methods.slerp(tensors[0], tensors[1], 0.3)
    else:
        given = tensors[1:] if name == "linear" else tensors
        index = None if name == "linear" else 0
        theirs = merge_tensors(
            given, name, base_index=index, ids=["b", "x", "y"][-len(given) :], parameters=parameters, name="w"
        )
        keywords = {
            k.replace("lambda", "lambda_"): list(v.values()) if isinstance(v, dict) else v
            for k, v in parameters.items()
        }
        ours = getattr(methods, name)(given if name == "linear" else [t - base for t in tensors[1:]], **keywords)
        ours = ours if name == "linear" else base + ours
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
