"""Merges whose weights follow from the norms of the deltas: of the model or of each tensor, from factors or by a walk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import dense_deltas, near, random_state, save_adapter, save_checkpoint
from toys.merge import State, files_of, manifest_of, on, paft, recipe, same, tensors_of, write_recipe

from paft_merge import merge, merge_state_dicts, open_plan, reproduce
from paft_merge.compute import blocks
from paft_merge.errors import MergeError, PaftMergeError, RecipeError
from paft_merge.methods.rules.measured_weights import weights_for


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, a fine-tune, two adapters of very different sizes, and the deltas of all in float64."""
    root, base = tmp_path_factory.mktemp("models"), random_state(0, torch.float32, layers=3)
    x = near(base, 1)
    made: dict[str, Any] = {
        "base": save_checkpoint(root / "base", base, shards=3),
        "x": save_checkpoint(root / "x", x),
        "sft": save_adapter(root / "sft", base, 3, size=3e-2),
        "dpo": save_adapter(root / "dpo", base, 4, rank=2),
    }
    made["deltas"] = {
        "x": {name: x[name].double() - base[name].double() for name in base},
        **{name: dense_deltas(made[name], base) for name in ("sft", "dpo")},
    }
    return made


def asked(
    models: dict[str, Any], names: list[str], given: list[Any], method: str = "ties", **shared: Any
) -> dict[str, Any]:
    sources = [models["x"] if name == "x" else on(models["base"], models[name]) for name in names]
    density = {} if method == "task_arithmetic" else {"density": 0.5}
    pairs = [(source, {"weight": weight, **density}) for source, weight in zip(sources, given, strict=True)]
    return recipe(method, models["base"], *pairs, parameters=shared)


def norm(delta: State, tensor: str | None = None) -> float:
    chosen = delta.values() if tensor is None else [delta[tensor]] if tensor in delta else []
    return float(np.sqrt(sum(float((one.double() ** 2).sum()) for one in chosen)))


def used(folder: Any) -> dict[str, list[float]]:
    """The weights that a manifest records for each tensor."""
    tensors = manifest_of(folder)["tensors"].items()
    return {name: [s["parameters"]["weight"] for s in t["sources"]] for name, t in tensors if t.get("sources")}


@pytest.mark.parametrize("names", [["sft", "dpo"], ["x", "dpo"]], ids=["from factors", "by a walk"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("word", ["equal_norm", "inverse_norm"])
def test_weights_and_values_are_their_definition(
    names: list[str], scope: str, word: str, models: dict[str, Any], tmp_path: Path
) -> None:
    out = merge(asked(models, names, [word] * 2, "task_arithmetic", weight_scope=scope), tmp_path / "out")
    merged, base, found = tensors_of(out), tensors_of(models["base"]), used(out)
    deltas = [models["deltas"][name] for name in names]
    for tensor, weights in found.items():
        norms = [norm(delta, tensor if scope == "tensor" else None) for delta in deltas]
        assert weights == pytest.approx(weights_for([word] * 2, norms), rel=3e-6), tensor
        expected = base[tensor].double() + sum(
            w * d[tensor] for w, d in zip(weights, deltas, strict=True) if tensor in d
        )
        torch.testing.assert_close(merged[tensor].double(), expected, rtol=1e-6, atol=1e-7)
    assert (len({tuple(weights) for weights in found.values()}) == 1) == (scope == "global")


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_manifest_and_the_card_have_the_numbers(scope: str, models: dict[str, Any], tmp_path: Path) -> None:
    out = merge(asked(models, ["sft", "dpo"], ["auto", 0.5], weight_scope=scope), tmp_path / "out")
    totals = manifest_of(out)["totals"]
    measured = [weights[0] for weights in used(out).values()]
    assert totals[0]["weights"] == [min(measured), max(measured)]
    assert totals[1]["weights"] == [0.5, 0.5]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| L2 norm | weight |" in card
    shown = " to ".join(dict.fromkeys(f"{w:g}" for w in totals[0]["weights"]))
    assert f"| {totals[0]['l2']:.4g} | {shown} |" in card
    if scope == "global":
        assert totals[0]["weighted_l2"] == pytest.approx(totals[1]["weighted_l2"], rel=1e-5)
        assert manifest_of(out)["warnings"] == []
    numbers = asked(models, ["sft", "dpo"], [1.0, 0.5])
    if scope == "global":
        numbers["models"][0]["parameters"]["weight"] = measured[0]
        assert same(tensors_of(merge(numbers, tmp_path / "numbers")), tensors_of(out)), "a recipe may have the numbers"


@pytest.mark.parametrize("shared", [{}, {"weight_scope": "tensor"}, {"trim_scope": "global", "rescale": "l2"}], ids=str)
def test_threads_and_shards_change_no_bit(
    shared: dict[str, Any], models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "TILE", 256)
    data = asked(models, ["x", "sft", "dpo"], ["equal_norm"] * 3, **shared)
    first = tensors_of(merge(data, tmp_path / "one", threads=1))
    for at, ways in enumerate([{"threads": 3}, {"out_shard_bytes": 8_000, "threads": 2}]):
        assert same(tensors_of(merge(data, tmp_path / str(at), **ways)), first), ways  # type: ignore[arg-type]
    assert reproduce(tmp_path / "one", tmp_path / "again").identical


def test_other_documents_and_dicts_in_memory_have_the_same_bits(models: dict[str, Any], tmp_path: Path) -> None:
    data = asked(models, ["x", "dpo"], ["equal_norm"] * 2)
    plain = tensors_of(merge({**data, "dtype": "float32"}, tmp_path / "plain"))
    last = recipe("linear", None, ("inner", {"weight": 1.0}), dtype="float32")
    (tmp_path / "r.yaml").write_text("\n---\n".join(map(str, [{**data, "name": "inner"}, last])))
    assert same(tensors_of(merge(tmp_path / "r.yaml", tmp_path / "two")), plain)
    states = {name: tensors_of(models[name]) for name in ("base", "x")}
    sources = {"a": states["x"], "b": near(states["base"], 5)}
    rules = {"parameters": {"weight": "inverse_norm", "density": 0.5}}
    made = merge_state_dicts(states["base"], sources, "ties", **rules)  # type: ignore[arg-type]
    save_checkpoint(tmp_path / "b", sources["b"])
    on_disk = recipe("ties", models["base"], models["x"], tmp_path / "b", **rules)
    assert same(made, tensors_of(merge(on_disk, tmp_path / "disk")))


def test_filters_choose_the_tensors_whose_norm_counts(models: dict[str, Any], tmp_path: Path) -> None:
    words = [{"filter": "mlp", "value": "equal_norm"}, {"value": 1.0}]
    found = used(merge(asked(models, ["sft", "dpo"], [words] * 2, "task_arithmetic"), tmp_path / "out"))
    norms = [norm({name: d for name, d in models["deltas"][one].items() if "mlp" in name}) for one in ("sft", "dpo")]
    expected = weights_for(["equal_norm"] * 2, norms)
    for name, weights in found.items():
        assert weights == pytest.approx(expected if "mlp" in name else [1.0, 1.0], rel=3e-6), name


def test_faults_are_told_with_their_place(models: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PaftMergeError, match="inverse_norm is for all sources or for none"):
        merge(asked(models, ["sft", "dpo"], ["inverse_norm", 1.0]), tmp_path / "out")
    with pytest.raises(
        RecipeError, match=r"models\[0\].parameters.weight: must be a number or one of .*did you mean 'equal_norm'"
    ):
        merge(asked(models, ["sft", "dpo"], ["equal_nom", 1.0]), tmp_path / "out")
    with pytest.raises(
        RecipeError, match="must be a number, got 'auto'; write a number; weights from norms are for methods that add"
    ):
        merge(recipe("linear", None, (models["x"], {"weight": "auto"})), tmp_path / "out")
    with pytest.raises(PaftMergeError, match="arithmetic: mergekit needs a number as weight, not auto"):
        merge({**asked(models, ["x", "dpo"], ["auto", 1.0]), "arithmetic": "mergekit"}, tmp_path / "out")
    zero = save_adapter(tmp_path / "zero", tensors_of(models["base"]), 1, size=0.0)
    nothing = asked({**models, "zero": zero}, ["sft", "zero"], ["auto", "auto"])
    with pytest.raises(MergeError, match="zero: its delta is zero, so no weight gives it the size that auto asks for"):
        merge(nothing, tmp_path / "out")
    broken = tensors_of(models["x"])
    broken["model.norm.weight"][0] = torch.nan
    save_checkpoint(tmp_path / "nan", broken)
    data = recipe("ties", models["base"], *[(m, {"weight": "auto"}) for m in (models["x"], tmp_path / "nan")])
    with pytest.raises(MergeError, match=r"nan: model.norm.weight: the delta has NaN or infinite values"):
        merge(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_has_the_words_and_the_files_are_those_of_a_resumed_merge(
    models: dict[str, Any], tmp_path: Path
) -> None:
    data = asked(models, ["x", "sft"], ["equal_norm"] * 2)
    with open_plan(data) as plan:
        assert any("weight=[equal_norm, equal_norm]" in kind.parameters for kind, _ in plan.summary())
    merge(data, tmp_path / "whole")

    def stop(done: Any) -> None:
        if done.tensors == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(data, tmp_path / "out", progress=stop)
    merge(data, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    shown = paft("merge", write_recipe(tmp_path / "r.yaml", data), tmp_path / "dry", "--dry-run")
    assert shown.exit_code == 0, shown.output
