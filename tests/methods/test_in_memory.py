"""A merge of files is a merge of tensors: every method, from several files and in small blocks, against its plain function."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, near, save_checkpoint
from safetensors.torch import load_file
from toys.merge import WEIGHT_SPACE

import paft_merge
from paft_merge import methods
from paft_merge.compute import blocks
from paft_merge.compute.torch_ops import TorchOps
from paft_merge.engine import api
from paft_merge.errors import MergeError
from paft_merge.methods import METHODS, REQUIRED
from paft_merge.methods.rules.thresholds import stream_key

SHAPES = {"layers.0.w": (90, 64), "layers.1.experts": (5, 30, 40), "norm": (300,), "scale": ()}
MORE: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3}, "l1_ties": {"l1_mass": 0.7}, "dare_ties": {"density": 0.4}, "dare_linear": {"density": 0.4},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1}, "breadcrumbs_ties": {"density": 0.4}, "della": {"density": 0.5},
    "della_linear": {"density": 0.5}, "sce": {"select_topk": 0.4}, "ram": {"epsilon": 1e-3}, "ramplus_tl": {"epsilon": 1e-3},
    "nearswap": {"t": 5e-4}, "slerp": {"t": 0.3}, "passthrough": {"scale": 0.7}, "sign_election": {"elect": "count"},
    "pcb": {"density": 0.4},
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, MORE.get(name, {})) for name in WEIGHT_SPACE} | {
    "nuslerp by rows": ("nuslerp", {"nuslerp_flatten": False}),
    "nuslerp by columns": ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "model_stock by rows": ("model_stock", {"filter_wise": True}),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in every matrix: whatever is measured has to be put together."""
    monkeypatch.setattr(blocks, "TILE", 1 << 10)


def load_state(folder: Path) -> State:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def states() -> dict[str, State]:
    made = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=made) * 0.02 for name, shape in SHAPES.items()}
    return {"base": base, "x": near(base, 1), "y": near(base, 2, 2e-3)}


def in_memory(name: str, given: dict[str, Any], tensors: list[torch.Tensor]) -> torch.Tensor:
    """What the plain function says, of the base and the sources."""
    function = getattr(methods, name)
    signature = inspect.signature(function).parameters
    if "weight" in signature:
        given = {"weight": 0.6, **given}
    first = next(iter(signature))
    if first == "base":
        return function(*tensors[:2], **given)
    if first in ("delta", "tensor"):
        return (
            tensors[0] + function(tensors[1] - tensors[0], **given)
            if first == "delta"
            else function(tensors[1], **given)
        )
    if METHODS[name].base == "ignored":
        return function(tensors[1:], **given)
    return tensors[0] + function([t - tensors[0] for t in tensors[1:]], **given)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_of_files_is_the_function_of_tensors(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, given = CASES[case]
    method, made = METHODS[name], states()
    folders = {ref: save_checkpoint(tmp_path / ref, state, shards=2) for ref, state in made.items()}
    letters = ["x", "y"][: method.max_sources]
    weight = {"weight": 0.6} if (p := method.parameter("weight")) and p.default in (REQUIRED, 1.0) else {}
    recipe = {
        "merge_method": name, "parameters": {**weight, **given}, "models": [{"model": str(folders[letter])} for letter in letters],
        **({} if method.base == "ignored" else {"base_model": str(folders["base"])}),
    }  # fmt: skip
    merged = [
        load_state(api.merge(recipe, tmp_path / f"out{threads}", threads=threads, warn=lambda _: None).path)
        for threads in (1, 3)
    ]
    refs = [str(folders[letter]) for letter in letters]
    for tensor, result in merged[0].items():
        assert torch.equal(result, merged[1][tensor]), tensor

        if case == "multislerp" and tensor == "scale":
            continue  # two numbers of opposite sign have no mean direction to speak of

        def key(seed: int, place: str, _: str, purpose: str, tensor: str = tensor) -> int:
            return stream_key(seed, refs[int(place)] if int(place) < len(refs) else "", tensor, purpose)

        with monkeypatch.context() as patch:
            patch.setattr("paft_merge.methods.rules.thresholds.stream_key", key)
            expected = in_memory(name, given, [made[letter][tensor] for letter in ("base", *letters)])
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=4e-9)  # the base is added before or after the sum


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if METHODS[name].streamed])
def test_torch_s_operations_make_the_same_tensors(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes them, here on the CPU; sums may be rounded in another order."""
    name, given = CASES[case]
    for tensor in SHAPES:
        tensors = [made[tensor] for made in states().values()][: 1 + (METHODS[name].max_sources or 2)]
        ours = in_memory(name, given, tensors)
        with monkeypatch.context() as patch:
            patch.setattr("paft_merge.methods.rules.whole_tensors.CpuOps", lambda: TorchOps(torch.device("cpu")))
            theirs = in_memory(name, given, tensors)
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-9)


DELTAS = [torch.eye(4), torch.ones(4, 4)]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ties", {"weight": 1.0, "density": 2}, r"density must be in \[0, 1\], got 2"),
        ("ties", {"weight": [1.0, float("nan")]}, "weight must be finite, got nan"),
        ("ties", {"weight": 1.0, "lambda_": float("inf")}, "lambda must be finite"),
        ("ties", {"weight": 1.0, "normalize": None}, "normalize must be one of"),
        ("ties", {"weight": torch.ones(3)}, "weight has 3 values for 2 sources"),
        ("l1_ties", {"l1_mass": None}, "set density, l1_mass or epsilon"),
        ("l1_ties", {"epsilon": -1.0}, "epsilon must be at least 0"),
        ("breadcrumbs", {"weight": 1.0, "gamma": -1}, "gamma must be in"),
        ("karcher", {"max_iter": -1}, "max_iter must be at least 0"),
    ],
)
def test_a_function_refuses_what_a_recipe_refuses(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(methods, name)(DELTAS, **given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["ties", "linear", "dare_ties", "multislerp", "sce", "ram", "karcher"])
def test_a_function_refuses_tensors_that_are_not_finite(name: str, bad: float) -> None:
    given = {"weight": 1.0} if METHODS[name].parameter("weight") else {}
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(methods, name)([torch.eye(4), torch.full((4, 4), bad)], **given)


def test_a_function_refuses_a_sum_that_overflows() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        methods.linear([torch.full((4,), 3e38)], 2.0, normalize=False)


def test_weights_may_come_in_any_sequence_and_tensors_must_come() -> None:
    expected = methods.ties(DELTAS, [0.5, 1.0])
    assert torch.equal(methods.ties(DELTAS, torch.tensor([0.5, 1.0])), expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one tensor"):
        methods.linear([], 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if METHODS[name].streamed])
def test_a_merge_names_the_source_that_is_not_finite(case: str, bad: float) -> None:
    name, given = CASES[case]
    method, broken = METHODS[name], torch.full((4, 4), 0.5)
    broken[1, 1] = bad
    base = None if method.base == "ignored" else {"w": torch.eye(4)}
    sources = [{"w": broken}, {"w": 2 * torch.eye(4)}][: method.max_sources]
    weight = {"weight": 1.0} if method.parameter("weight") else {}
    with pytest.raises(MergeError, match="0: w: 1 of 16 elements are NaN or infinite"):
        paft_merge.merge_state_dicts(base, sources, name, parameters={**weight, **given})
