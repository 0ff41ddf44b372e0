"""Every method of mergekit against mergekit's own function: the same numbers in float32, better ones from bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from toys.mergekit import OURS

from paft_merge import methods
from paft_merge.errors import MergeError
from paft_merge.methods import METHODS
from paft_merge.methods.rules.thresholds import kept_count

pytest.importorskip("mergekit")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what mergekit imports
    from mergekit.merge_methods import registered_methods
    from mergekit.merge_methods.api import merge_tensors

WEIGHT = {"weight": (0.5, 0.7, 0.3)}
NEGATIVE = {"weight": (0.5, -0.7, 0.3)}
THIN = {**WEIGHT, "density": (0.3, 0.5, 0.8)}
RESCALED = {**THIN, "normalize": True, "rescale": True, "lambda": 0.8}
VALUES = ("linear", "passthrough", "karcher", "slerp", "arcee_fusion")

# name, the parameters of both, and the models: the base with `b`
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear": ("linear", WEIGHT, "xyz"),
    "linear of a negative weight": ("linear", {**NEGATIVE, "normalize": False}, "xyz"),
    "passthrough": ("passthrough", {}, "x"),
    "passthrough scaled": ("passthrough", {"scale": 0.7}, "x"),
    "task_arithmetic": ("task_arithmetic", {**NEGATIVE, "lambda": 0.8}, "bxyz"),
    "task_arithmetic normalized": ("task_arithmetic", {**WEIGHT, "normalize": True}, "bxyz"),
    "ties": ("ties", THIN, "bxyz"),
    "ties of a negative weight": ("ties", {**THIN, **NEGATIVE, "normalize": False, "rescale": True}, "bxyz"),
    "dare_ties dense": ("dare_ties", {**WEIGHT, "normalize": True}, "bxyz"),
    "dare_linear dense": ("dare_linear", {**WEIGHT, "normalize": True}, "bxyz"),
    "breadcrumbs": ("breadcrumbs", THIN, "bxyz"),
    "breadcrumbs rescaled": ("breadcrumbs", {**RESCALED, "gamma": (0.01, 0.1, 0.5)}, "bxyz"),
    "breadcrumbs of density one": ("breadcrumbs", {**WEIGHT, "gamma": 0.4}, "bxyz"),
    "breadcrumbs_ties": ("breadcrumbs_ties", THIN, "bxyz"),
    "breadcrumbs_ties rescaled": ("breadcrumbs_ties", {**RESCALED, **NEGATIVE, "gamma": 0.05}, "bxyz"),
    "della dense": ("della", WEIGHT, "bxyz"),
    "della_linear dense": ("della_linear", {**WEIGHT, "normalize": True}, "bxyz"),
    "slerp": ("slerp", {"t": 0.3}, "bx"),
    "nuslerp": ("nuslerp", WEIGHT, "xy"),
    "nuslerp around a base": ("nuslerp", WEIGHT, "bxy"),
    "nuslerp by rows": ("nuslerp", {**WEIGHT, "nuslerp_flatten": False}, "xy"),
    "nuslerp by rows around a base": ("nuslerp", {**WEIGHT, "nuslerp_flatten": False}, "bxy"),
    "nuslerp by columns": ("nuslerp", {**WEIGHT, "nuslerp_flatten": False, "nuslerp_row_wise": True}, "xy"),
    "nuslerp by columns around a base": ("nuslerp", {**WEIGHT, "nuslerp_flatten": False, "nuslerp_row_wise": True}, "bxy"),
    "nuslerp of weights that cancel": ("nuslerp", {"weight": (0.5, -0.5)}, "xy"),
    "multislerp": ("multislerp", WEIGHT, "xyz"),
    "multislerp around a base": ("multislerp", WEIGHT, "bxyz"),
    "multislerp not normalized": ("multislerp", {**WEIGHT, "normalize_weights": False}, "bxyz"),
    "multislerp of one": ("multislerp", {"weight": 0.5}, "bx"),
    "karcher": ("karcher", {}, "xyz"),
    "karcher of far apart": ("karcher", {"max_iter": 20, "tol": 1e-6}, "uvw"),
    "karcher of one": ("karcher", {}, "x"),
    "model_stock": ("model_stock", {}, "bxyz"),
    "model_stock by rows": ("model_stock", {"filter_wise": True}, "bxyz"),
    "nearswap": ("nearswap", {"t": 5e-4}, "bx"),
    "ram": ("ram", {"epsilon": 1e-3}, "bxyz"),
    "ram of one": ("ram", {}, "bx"),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 1e-3, "r": 0.5, "alpha": 0.8}, "bxyz"),
    "ramplus_tl by default": ("ramplus_tl", {}, "bxyz"),
    "sce": ("sce", {"select_topk": 0.3}, "bxyz"),
    "sce of so few that all count alike": ("sce", {"select_topk": 0.005}, "bxyz"),
    "sce of everything": ("sce", {}, "bxyz"),
    "sce of nothing": ("sce", {"select_topk": 0.0}, "bxyz"),
    "sce of far apart": ("sce", {"select_topk": 0.7}, "buv"),
    "arcee_fusion": ("arcee_fusion", {}, "bx"),
}  # fmt: skip
SHAPES = {"matrix": (48, 40), "vector": (300,), "experts": (4, 12, 10)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(seed: int, shape: Sequence[int], size: float) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * size


def models(shape: Sequence[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A base `b`, fine-tunes `x`, `y`, `z` of it, and `u`, `v`, `w` that have nothing to do with it."""
    base = draw(0, shape, 0.02)
    made = {"b": base} | {name: base + draw(i, shape, i * 1e-3) for i, name in enumerate("xyz", 1)}
    made |= {name: draw(i, shape, 0.02) for i, name in enumerate("uvw", 7)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def theirs(case: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    name, given, letters = CASES[case]
    sources = letters.removeprefix("b")
    parameters = {k: dict(zip(sources, v, strict=False)) if isinstance(v, tuple) else v for k, v in given.items()}
    parameters = {k: {i: v[i] for i in sources} if isinstance(v, dict) else v for k, v in parameters.items()}
    chosen = [tensors[letter].to(dtype) for letter in letters]
    base = 0 if letters.startswith("b") else None
    return merge_tensors(chosen, name, ids=list(letters), base_index=base, parameters=parameters, name="w")


def ours(case: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """By our functions on plain tensors, float32."""
    name, given, letters = CASES[case]
    function: Callable[..., torch.Tensor] = getattr(methods, name)
    chosen = [tensors[letter].float() for letter in letters]
    count = len(letters.removeprefix("b"))
    keywords = {k.replace("lambda", "lambda_"): v[:count] if isinstance(v, tuple) else v for k, v in given.items()}
    if name in ("slerp", "arcee_fusion"):
        return function(*chosen, **keywords)
    around = chosen[0] if letters.startswith("b") else torch.zeros(())
    deltas = [tensor - around for tensor in (chosen[1:] if letters.startswith("b") else chosen)]
    return around + function(deltas[0] if name in ("nearswap", "passthrough") else deltas, **keywords)


def test_every_method_of_mergekit_is_here() -> None:
    assert {method.spec.name for method in registered_methods()} <= METHODS.keys()
    assert {name for name, _, _ in CASES.values()} == METHODS.keys() - OURS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_float32_results_are_mergekit_s(case: str, shape: str) -> None:
    tensors = models(SHAPES[shape], torch.float32)
    torch.testing.assert_close(ours(case, tensors), theirs(case, tensors, torch.float32), rtol=2e-6, atol=1e-7)


def ranked_apart(case: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The entries where no source's magnitude is one that a mask divides: which of such equals are kept is arbitrary."""
    name, given, letters = CASES[case]
    apart = torch.ones(tensors["b"].shape, dtype=torch.bool)
    for i, letter in enumerate(
        letters.removeprefix("b") if name in ("ties", "breadcrumbs", "breadcrumbs_ties") else ""
    ):
        density, gamma = (given.get(key, 1.0) for key in ("density", "gamma"))
        density = density[i] if isinstance(density, tuple) else density
        gamma = 0.01 if gamma == 1.0 else gamma[i] if isinstance(gamma, tuple) else gamma
        sizes = (tensors[letter].double() - tensors["b"].double()).abs()
        kept, above = int(density * sizes.numel()), 0 if name == "ties" else int(gamma * sizes.numel())
        above = sizes.numel() - max(0, sizes.numel() - kept - above) - kept if density < 1 else 0
        ordered = sizes.flatten().sort(descending=True).values
        for rank in (above, above + kept):
            apart &= ~torch.isin(sizes, ordered[max(rank - 1, 0) : rank + 1]) if density < 1 else apart
    return apart


@pytest.mark.parametrize("case", CASES)
def test_from_bfloat16_ours_is_nearer_to_the_float64_answer(case: str) -> None:
    tensors = models((64, 96), torch.bfloat16)
    exact, apart = theirs(case, tensors, torch.float64), ranked_apart(case, tensors)
    assert apart.double().mean() > 0.8
    errors = [
        (result.to(torch.bfloat16).double() - exact)[apart].abs().mean().item()
        for result in (ours(case, tensors), theirs(case, tensors, torch.bfloat16))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-9)


def test_bfloat16_costs_mergekit_a_few_percent_of_ties() -> None:
    """How large the difference is: not a matter of the last bit only."""
    tensors = models((256, 256), torch.bfloat16)
    exact, apart = theirs("ties", tensors, torch.float64).to(torch.bfloat16), ranked_apart("ties", tensors)
    results = ours("ties", tensors), theirs("ties", tensors, torch.bfloat16)
    wrong = [(result.to(torch.bfloat16) != exact)[apart].double().mean().item() for result in results]
    assert wrong[0] < 1e-3
    assert 0.02 < wrong[1] < 0.3


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
def test_masks_differ_only_in_ties_at_a_threshold(name: str) -> None:
    """bfloat16 deltas have many equal magnitudes: mergekit keeps any of those at the threshold, we the first."""
    tensors = models((128, 128), torch.bfloat16)
    delta = tensors["x"].float() - tensors["b"].float()
    given = {"weight": 1.0, "density": 0.4}
    mine = getattr(methods, name)([delta], **given) != 0
    merged = merge_tensors(
        [torch.zeros_like(delta), delta],
        name,
        ids=["b", "x"],
        base_index=0,
        parameters={k: {"x": v} for k, v in given.items()},
    )
    apart = mine != (merged != 0)
    assert int(mine.sum()) == int((merged != 0).sum()) == kept_count(delta.numel(), 0.4)
    assert apart.any()
    assert len(delta[apart].abs().unique()) <= 2


# --- random methods: the same law ------------------------------------------------------------------------------------

RUNS = 300


def keep_rates(run: Callable[[int], torch.Tensor]) -> torch.Tensor:
    return torch.stack([run(seed) != 0 for seed in range(RUNS)]).double().mean(0)


@pytest.mark.parametrize("shape", [(6, 20), (50,), (3, 20, 4)])
@pytest.mark.parametrize("name", ["della", "della_linear", "dare_linear", "dare_ties"])
def test_random_methods_keep_each_entry_as_often_as_mergekit(name: str, shape: tuple[int, ...]) -> None:
    delta = draw(1, shape, 1e-3)
    given = {"weight": 1.0, "density": 0.6} | ({"epsilon": 0.3} if "della" in name else {})
    parameters = {k: {"x": v} for k, v in given.items()} | {"rescale": False}

    def run_theirs(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return merge_tensors(
            [torch.zeros_like(delta), delta], name, ids=["b", "x"], base_index=0, parameters=parameters
        )

    mine = keep_rates(lambda seed: getattr(methods, name)([delta], rescale=False, seed=seed, **given))
    other = keep_rates(run_theirs)
    spread = (2 * 0.25 / RUNS) ** 0.5
    assert (mine - other).abs().max() < 5 * spread
    assert abs((mine - other).mean()) < 5 * spread / delta.numel() ** 0.5
    if "della" in name:  # and the larger the likelier, along the second dimension
        rows = mine.unsqueeze(0) if mine.ndim == 1 else mine
        order = (delta.unsqueeze(0) if mine.ndim == 1 else delta).abs().argsort(1)
        ranked = rows.gather(1, order).movedim(1, -1).reshape(-1, rows.shape[1]).mean(0)
        assert ranked[0] < 0.45 < 0.75 < ranked[-1]


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_rescales_to_the_l1_norm(name: str) -> None:
    delta = draw(1, (40, 50), 1e-3)
    merged = getattr(methods, name)([delta], 1.0, density=0.4, normalize=False)
    assert merged.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5)


def test_della_merges_rows_of_one_entry_which_mergekit_cannot() -> None:
    delta = torch.full((4000, 1), 1e-3)
    with pytest.raises(RuntimeError):
        merge_tensors(
            [delta, 2 * delta],
            "della",
            ids=["b", "x"],
            base_index=0,
            parameters={"weight": {"x": 1.0}, "density": {"x": 0.6}},
        )
    kept = (methods.della([delta], 1.0, density=0.6, rescale=False) != 0).double().mean().item()
    assert kept == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), (0.5, 0.5)])
def test_della_refuses_what_mergekit_refuses(density: float, epsilon: float) -> None:
    delta = draw(1, (4, 5), 1e-3)
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        methods.della([delta], 1.0, density=density, epsilon=epsilon)
    parameters = {"weight": {"x": 1.0}, "density": {"x": density}, "epsilon": {"x": epsilon}}
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        merge_tensors([delta, 2 * delta], "della", ids=["b", "x"], base_index=0, parameters=parameters)


# --- where formulas have no value ------------------------------------------------------------------------------------


def test_model_stock_keeps_the_base_where_deltas_oppose() -> None:
    delta = draw(1, (4, 5), 1e-3)
    assert not methods.model_stock([delta, -delta]).any()
    rows = torch.cat([delta[:2], delta[2:]])
    mixed = methods.model_stock([rows, torch.cat([delta[:2], -delta[2:]])], filter_wise=True)
    torch.testing.assert_close(mixed[:2], delta[:2], rtol=1e-4, atol=0)  # its lengths are near mergekit's floor of 1e-6
    assert not mixed[2:].any()


def test_model_stock_by_hand() -> None:
    one, other = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3**0.5])  # at 60 degrees: t = 2 * 0.5 / 1.5
    torch.testing.assert_close(methods.model_stock([one, other]), (one + other) / 2 * (2 / 3))


def test_directions_that_cancel_out_are_interpolated_or_refused() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert not methods.multislerp([a, -a], 1.0).any()
    with pytest.raises(MergeError, match="cancel out"):
        methods.multislerp([a, -a, b, -b], 1.0)
    with pytest.raises(ValueError, match="zero"):
        merge_tensors([a, -a, b, -b], "multislerp", ids=list("wxyz"), parameters={"weight": 1.0})


def test_opposite_and_parallel_vectors_have_no_angle_to_speak_of() -> None:
    a = draw(1, (20, 30), 1.0)
    torch.testing.assert_close(methods.nuslerp([a, 3 * a], [1.0, 1.0]), 2 * a)
    torch.testing.assert_close(methods.nuslerp([a, -a], [3.0, 1.0]), 0.5 * a)
    torch.testing.assert_close(methods.karcher([a, 3 * a]), 2 * a)
    assert methods.karcher([a, -a]).isfinite().all()
    assert not methods.karcher([0 * a, 0 * a]).any()


def test_a_source_without_length_counts_in_karcher_s_mean_length() -> None:
    a = draw(1, (20, 30), 1.0)
    torch.testing.assert_close(methods.karcher([a, 0 * a]), a / 2)


def test_the_karcher_mean_of_two_is_half_way_on_the_sphere() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(methods.karcher([a, b]), methods.slerp(a, b, 0.5))
    torch.testing.assert_close(methods.multislerp([a, b], 1.0), methods.slerp(a, b, 0.5))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_ram_adds_what_is_alone_and_averages_what_is_shared() -> None:
    deltas = [torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 8.0, 1e-6])]
    assert methods.ram(deltas).tolist() == [1.0, 3.0, 8.0, 0.0]
    # one of two of the first is shared: 1 + 0.1 * min(1 / 1, 0.2)
    torch.testing.assert_close(methods.ramplus_tl(deltas), torch.tensor([1.02, 3.0, 8.16, 0.0]))


def test_nearswap_takes_what_is_near_and_less_of_what_is_far() -> None:
    delta = torch.tensor([0.25, -1.0, 4.0, 0.0])
    assert methods.nearswap(delta, 1.0).tolist() == [0.25, -1.0, 1.0, 0.0]


def test_sce_by_hand() -> None:
    deltas = [torch.tensor([3.0, 1.0, -2.0, 0.5]), torch.tensor([-1.0, 1.0, 2.0, 0.5])]
    # variances 4, 0, 4, 0: two entries can be selected, and half of them is the first
    first = methods.sce(deltas, select_topk=0.5)
    torch.testing.assert_close(first, torch.tensor([3.0, 0.0, 0.0, 0.0]))
    # energies 9 + 4 and 1 + 4; signs +3 - 1 and -2 + 2, which elects +
    torch.testing.assert_close(methods.sce(deltas, select_topk=0.999), first)
    torch.testing.assert_close(methods.sce(deltas), torch.tensor([3.0, 1.0, 2.0, 0.5]))
    agreeing = [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])]  # energies 9 and 1
    torch.testing.assert_close(methods.sce(agreeing), torch.tensor([(9 * 3.0 + 1 * 1.0) / 10, 0.0]))


def test_breadcrumbs_drops_both_ends() -> None:
    delta = torch.tensor([5.0, -4.0, 3.0, 2.0, 1.0])
    assert methods.breadcrumbs([delta], 1.0, density=0.4, gamma=0.2).tolist() == [0.0, -4.0, 3.0, 0.0, 0.0]
    assert methods.breadcrumbs([delta], 1.0, density=0.8, gamma=0.4).tolist() == [0.0, -4.0, 3.0, 2.0, 1.0]
