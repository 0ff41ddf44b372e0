"""`space: core`, `knots` and `ctm` in a recipe: the adapter holds what the published formulas make of the factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import near, save_checkpoint
from safetensors.torch import load_file
from toys.merge import files_of, on, recipe, tensors_of

from paft_merge import merge, reproduce
from paft_merge.errors import RecipeError
from paft_merge.lowrank.core_space import core_of
from paft_merge.lowrank.ctm import compressed_of
from paft_merge.lowrank.factors import Pair
from paft_merge.lowrank.knots import knots_of
from paft_merge.methods import iso_c, ties, tsv
from paft_merge.output.folder import Finished, Output

Family = Callable[..., dict[str, Path]]
SPACES = {"core": core_of, "knots": knots_of, "ctm": lambda pairs: compressed_of(pairs, 3)}


def pairs_of(folder: Path) -> dict[str, Pair]:
    """B, times the scale, and A of every module of an adapter."""
    state = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removesuffix(".lora_A.weight"): (
            state[name.replace("lora_A", "lora_B")].float().numpy() * np.float32(scale),
            a.float().numpy(),
        )
        for name, a in state.items()
        if name.endswith(".lora_A.weight")
    }


METHODS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "ties": (ties, {"density": 0.4}),
    "tsv": (tsv, {}),
    "iso_c": (iso_c, {"lambda": 0.5}),
}


@pytest.mark.parametrize(
    ("space", "method"),
    [("core", "ties"), ("core", "tsv"), ("core", "iso_c"), ("knots", "ties"), ("ctm", "ties"), ("ctm", "tsv")],
)
def test_an_adapter_holds_the_method_s_result_in_the_space(
    space: str, method: str, family: Family, tmp_path: Path
) -> None:
    f, weights = family(), [0.7, 0.4]
    function, given = METHODS[method]
    models = [(on(f["base"], f[n]), {"weight": w}) for n, w in zip(("sft", "dpo"), weights, strict=True)]
    output = {"kind": "adapter", "rank": 3 if space == "ctm" else "sum"}
    made = merge(recipe(method, f["base"], *models, parameters=given, space=space, output=output), tmp_path / "out")
    found, sources = pairs_of(tmp_path / "out"), [pairs_of(f[n]) for n in ("sft", "dpo")]
    assert found.keys() == {module for source in sources for module in source}
    for module, (b, a) in found.items():
        spanned = SPACES[space]([source[module] for source in sources if module in source])
        keywords = {name.replace("lambda", "lambda_"): value for name, value in given.items()}
        used = [w for w, source in zip(weights, sources, strict=True) if module in source]
        merged = function([torch.from_numpy(one) for one in spanned.coordinates], used, **keywords).double().numpy()
        expected = spanned.left @ merged @ (np.eye(a.shape[1]) if spanned.right is None else spanned.right)
        assert np.linalg.norm(b @ a - expected) < 2e-6 * np.linalg.norm(expected)
    assert made.error == pytest.approx(0, abs=1e-6)
    held, whole = np.zeros(2), np.zeros(2)
    for module in found:
        pairs = [source[module] for source in sources]
        held += [np.square(one).sum() for one in SPACES[space](pairs).coordinates]
        whole += [np.square(b @ a).sum() for b, a in pairs]
    outside = made.manifest["adapter"].get("outside", 0.0)
    assert outside == pytest.approx(1 - held.sum() / whole.sum(), abs=1e-5)
    assert (outside > 0.1) == (space == "ctm")
    assert f"with the method `{method}` in `space: {space}`." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("space", ["core", "knots"])
def test_magnitudes_are_ranked_and_deltas_measured_over_the_coordinates_of_the_model(
    space: str, family: Family, tmp_path: Path
) -> None:
    """`trim_scope: global`, which is how the authors of KnOTS trim, and weights by norms of the whole deltas."""
    f = family()
    models = [(on(f["base"], f["sft"]), {"weight": 1.0}), (on(f["base"], f["dpo"]), {"weight": "equal_norm"})]
    given = {"density": 0.3, "trim_scope": "global", "normalize": "none", "elect": "none"}
    asked = recipe("ties", f["base"], *models, parameters=given, space=space, output={"kind": "adapter"})
    merge(asked, tmp_path / "out")
    sources = [pairs_of(f[n]) for n in ("sft", "dpo")]
    spaces = {module: SPACES[space]([source[module] for source in sources]) for module in sources[0]}
    norms = [np.sqrt(sum(np.linalg.norm(b @ a) ** 2 for b, a in source.values())) for source in sources]
    weights = [1.0, norms[0] / norms[1]]
    cuts = []
    for i in range(2):
        sizes = np.sort(np.concatenate([np.abs(one.coordinates[i]).ravel() for one in spaces.values()]))
        cuts.append(sizes[sizes.size - int(0.3 * sizes.size)])
    for module, (b, a) in pairs_of(tmp_path / "out").items():
        one = spaces[module]
        kept = [
            w * np.where(np.abs(m) >= cut * (1 - 1e-6), m, 0)
            for w, m, cut in zip(weights, one.coordinates, cuts, strict=True)
        ]
        expected = one.left @ sum(kept) @ (np.eye(a.shape[1]) if one.right is None else one.right)
        assert np.linalg.norm(b @ a - expected) < 5e-6 * np.linalg.norm(expected)


def test_random_drops_depend_on_the_seed_alone(family: Family, tmp_path: Path) -> None:
    f = family()
    models = [(on(f["base"], f[n]), {"weight": 0.6}) for n in ("sft", "dpo")]
    asked = recipe(
        "dare_ties", f["base"], *models, parameters={"density": 0.5}, space="core", output={"kind": "adapter"}
    )
    one, again, other = (
        load_file(merge({**asked, "seed": seed}, tmp_path / name, threads=threads).path / "adapter_model.safetensors")
        for name, seed, threads in (("one", 7, 1), ("again", 7, 3), ("other", 8, 1))
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


OUTPUTS: dict[str, tuple[str, dict[str, Any], float | str]] = {
    "core": ("ties", {"density": 0.5, "trim_scope": "global"}, 0.5),
    "knots": ("dare_ties", {"density": 0.5}, "equal_norm"),
    "ctm": ("task_arithmetic", {}, 0.5),
    "weight": ("ties", {"density": 0.5, "trim_scope": "global", "normalize": "none"}, "equal_norm"),
}
"""By space: a method, its parameters, and the weight of the first source. Two rank magnitudes over the model, two measure norms."""


@pytest.mark.parametrize("space", OUTPUTS)
def test_an_interrupted_merge_a_worker_and_a_reproduction_write_the_same_bytes(
    space: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f, (method, given, weight) = family(), OUTPUTS[space]
    models = [(on(f["base"], f[name]), {"weight": w}) for name, w in (("sft", weight), ("dpo", 0.4))]
    output = {"kind": "adapter", "rank": 3}
    asked = recipe(method, f["base"], *models, parameters=given, space=space, output=output)
    whole = merge(asked, tmp_path / "whole")
    assert reproduce(whole.path).identical
    merge(asked, tmp_path / "worker", worker="0/2")
    finish, count = Output.finish_tensor, 0

    def interrupted(output: Output, finished: Finished) -> None:
        nonlocal count
        finish(output, finished)
        count += 1
        if count == 5:  # once, between the two factors of a module
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "finish_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(asked, tmp_path / "resumed", threads=1)
    merge(asked, tmp_path / "resumed", threads=3, resume=True)
    assert files_of(tmp_path / "worker") == files_of(tmp_path / "resumed") == files_of(whole.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "tsv", "space": "weight"}, r"merge_method: tsv merges adapters in their core space.*add space: core"),
        ({"merge_method": "iso_c", "space": "knots"}, r"merge_method: iso_c merges adapters in their core space"),
        ({"output": {"kind": "checkpoint"}}, r"space: core makes an adapter; add output: \{kind: adapter\}.*BASE\+OUT"),
        ({"output": None}, r"space: core makes an adapter; add output"),
        ({"space": "ctm"}, r"subspaces of the rank of the output; write a number as rank"),
        ({"space": "Core"}, r"space.*core"),
        ({"merge_method": "karcher", "parameters": {}, "base_model": None}, r"karcher merges values, and space: core is one of deltas"),
    ],
)  # fmt: skip
def test_a_recipe_that_a_space_cannot_merge_is_refused(
    changes: dict[str, Any], message: str, family: Family, tmp_path: Path
) -> None:
    f = family()
    models = [(on(f["base"], f[n]), {}) for n in ("sft", "dpo")]
    asked = recipe("ties", f["base"], *models, parameters={"weight": 0.5}, space="core", output={"kind": "adapter"})
    asked = {name: value for name, value in {**asked, **changes}.items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        merge(asked, tmp_path / "out")


def test_a_source_that_is_not_a_low_rank_product_is_refused_by_name(family: Family, tmp_path: Path) -> None:
    f = family()
    state = tensors_of(f["base"])
    moved = {name: t if "_proj" in name else state[name] for name, t in near(state, 1).items()}
    tuned = save_checkpoint(tmp_path / "tuned", moved)
    models = [(ref, {"weight": 0.5}) for ref in (on(f["base"], f["sft"]), tuned)]
    asked = recipe("ties", f["base"], *models, space="core", output={"kind": "adapter", "rank": 4})
    with pytest.raises(RecipeError, match=r"the delta of \S*/tuned is not a low-rank product.*space: weight"):
        merge(asked, tmp_path / "out")


@pytest.mark.parametrize(("space", "density"), [("core", 0.4), ("knots", 1.0)])
def test_the_rank_that_an_energy_needs_and_a_lower_one_are_those_of_the_merged_delta(
    space: str, density: float, family: Family, tmp_path: Path
) -> None:
    f = family()
    models = [(on(f["base"], f[n]), {"weight": 0.6}) for n in ("sft", "dpo")]
    given = {"density": density, "trim_scope": "global"}
    asked = recipe("ties", f["base"], *models, parameters=given, space=space)
    whole = merge({**asked, "output": {"kind": "adapter"}}, tmp_path / "whole").path
    for name, output in (("auto", {"rank": "auto", "energy": 0.9}), ("two", {"rank": 2})):
        made = merge({**asked, "output": {"kind": "adapter", **output}}, tmp_path / name)
        exact, found = pairs_of(whole), pairs_of(tmp_path / name)
        values = {module: np.linalg.svd(b @ a, compute_uv=False) for module, (b, a) in exact.items()}
        kept = {
            module: np.linalg.norm(b @ a) ** 2 / np.square(values[module]).sum() for module, (b, a) in found.items()
        }
        best = {
            module: np.square(s[: made.manifest["adapter"]["rank"]]).sum() / np.square(s).sum()
            for module, s in values.items()
        }
        assert all(kept[module] <= best[module] + 1e-5 for module in kept)
        assert name == "two" or min(kept.values()) >= 0.9
        squares = sum(np.linalg.norm(exact[m][0] @ exact[m][1] - b @ a) ** 2 for m, (b, a) in found.items())
        total = sum(np.square(s).sum() for s in values.values())
        assert made.error == pytest.approx(np.sqrt(squares / total), rel=1e-4)
