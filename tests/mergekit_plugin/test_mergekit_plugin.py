"""Our methods inside mergekit, and mergekit reading adapters through us: against `paft merge`, and against its own way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import State, save_adapter, save_checkpoint
from toys import quantized
from toys.mergekit import CONFIG, llama_family, llama_state, load_state, mergekit_merge

from paft_merge.cli import mergekit_yaml
from paft_merge.engine import api
from paft_merge.errors import CheckpointError
from paft_merge.methods import METHODS

with __import__("warnings").catch_warnings():
    __import__("warnings").simplefilter("ignore")  # of what mergekit imports
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge_methods import get, registered_methods, registry
    from mergekit.scripts import run_yaml

    from paft_merge import mergekit_plugin


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    """Our methods in mergekit's registry, and out of it again."""
    mergekit_plugin.register()
    yield
    for name in mergekit_plugin.OURS:
        registry._METHODS.pop(name, None)


def merged(recipe: dict[str, Any], out: Path) -> State:
    return load_state(api.merge(recipe, out, warn=lambda _: None).path)


CASES: dict[str, dict[str, Any]] = {
    "l1_ties": {},
    "l1_ties by mass": {"parameters": {"l1_mass": 0.7, "shrink": "soft", "normalize": True, "lambda": 0.5}},
    "l1_ties by density": {
        "parameters": {"density": [0.2, 0.9], "rescale": False, "elect": "count", "elect_tie": "zero"}
    },
    "l1_ties by epsilon": {"parameters": {"epsilon": 1e-3, "normalize": "count"}},
    "sign_election": {},
    "geometric_median": {"parameters": {"weight": 2.0, "lambda": 0.9}},
    "magmax": {"parameters": {"weight": [0.2, 0.9]}},
    "pcb": {"parameters": {"density": 0.3}},
    "sign_election of the densest": {"parameters": {"density": 0.4, "elect": "unweighted", "weight": 0.7}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_mergekit_with_our_methods_gives_our_bits(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = llama_family(tmp_path, dtype)
    recipe = {
        "merge_method": case.split()[0], "base_model": str(family["base"]), **CASES[case],
        "models": [{"model": str(family[name])} for name in "xyz"],
    }  # fmt: skip
    theirs, ours = mergekit_merge(recipe, tmp_path / "theirs"), merged(recipe, tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if case != "geometric_median":
            assert torch.equal(ours[name], tensor), name
        # A merge of files adds the deltas to the base one by one, mergekit adds their sum.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-8)


def test_registering_twice_is_registering_once() -> None:
    mergekit_plugin.register()
    assert [m.spec.name for m in registered_methods()].count("l1_ties") == 1


@pytest.mark.parametrize("name", mergekit_plugin.OURS)
def test_mergekit_checks_our_parameters(name: str, tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    recipe = {"merge_method": name, "base_model": str(family["base"]), "models": [{"model": str(family["x"])}]}
    wrong_values = {"density": 1.5, "elect": "maybe", "lambda": "much", "iterations": -1, "epsilon": -1.0}
    for wrong in ({key: value} for key, value in wrong_values.items() if METHODS[name].parameter(key)):
        with pytest.raises(ValueError, match=r"validation error"):
            mergekit_merge({**recipe, "parameters": wrong}, tmp_path / "out")
    with pytest.raises(ValueError, match="base"):
        mergekit_merge({k: v for k, v in recipe.items() if k != "base_model"}, tmp_path / "out")
    described = {p.name: p.description for p in get(name).spec.parameters}
    assert all(described.values())
    assert "trim_scope" not in described


# --- adapters on the fly -----------------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """A base and two adapters of it."""
    base = llama_state(0, request.param)
    targets = {name: tensor for name, tensor in base.items() if "q_proj" in name or "up_proj" in name}
    return {
        "base": save_checkpoint(tmp_path / "base", base, 2, CONFIG),
        "sft": save_adapter(tmp_path / "sft", targets, 3),
        "dpo": save_adapter(tmp_path / "dpo", targets, 4, rank=2, size=5e-3),
    }


def adapter_recipe(folders: dict[str, Path], **more: Any) -> dict[str, Any]:
    models = [
        {"model": f"{folders['base']}+{folders[n]}", "parameters": {"weight": 0.6, "density": 0.5}}
        for n in ("sft", "dpo")
    ]
    return {"merge_method": "ties", "base_model": str(folders["base"]), "models": models, **more}


def test_mergekit_reads_adapters_without_merging_them_first(adapted: dict[str, Path], tmp_path: Path) -> None:
    recipe = adapter_recipe(adapted)
    with pytest.raises(RuntimeError, match="cache dir"):
        mergekit_merge(recipe, tmp_path / "refused")
    by_the_cache = mergekit_merge(recipe, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    before = {path.name for path in tmp_path.iterdir()}
    with mergekit_plugin.adapters_on_the_fly():
        on_the_fly = mergekit_merge(recipe, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} - before == {"ours"}
    for name, theirs in by_the_cache.items():
        assert on_the_fly[name].dtype == theirs.dtype
        # PEFT's product and ours may differ in the last bit of float32, and so may a rounding of the sum
        torch.testing.assert_close(
            on_the_fly[name], theirs, rtol=2e-2 if theirs.dtype == torch.bfloat16 else 1e-5, atol=1e-7
        )
    same = sum(int((on_the_fly[n] == t).sum()) for n, t in by_the_cache.items()) / sum(
        t.numel() for t in by_the_cache.values()
    )
    assert same > 0.99 if theirs.dtype == torch.bfloat16 else same > 0.5


def test_mergekit_arithmetic_of_ours_is_mergekit_with_our_loader(adapted: dict[str, Path], tmp_path: Path) -> None:
    recipe = adapter_recipe(adapted)
    with mergekit_plugin.adapters_on_the_fly():
        theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = merged({**recipe, "arithmetic": "mergekit"}, tmp_path / "ours")
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_a_lora_merge_dtype_keeps_small_updates(adapted: dict[str, Path], tmp_path: Path) -> None:
    recipe = {**adapter_recipe(adapted, out_dtype="float32"), "merge_method": "task_arithmetic"}
    with mergekit_plugin.adapters_on_the_fly():
        wide = mergekit_merge(recipe, tmp_path / "wide", lora_merge_dtype="float32")
    ours = merged(recipe, tmp_path / "ours")
    for name, tensor in wide.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_adapter_on_the_base_is_read_too(adapted: dict[str, Path], tmp_path: Path) -> None:
    refs = [f"{adapted['base']}+{adapted[name]}" for name in ("sft", "dpo")]
    recipe = {
        "merge_method": "slerp",
        "base_model": refs[0],
        "models": [{"model": ref} for ref in refs],
        "parameters": {"t": 0.4},
    }
    with mergekit_plugin.adapters_on_the_fly():
        theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = merged({**recipe, "arithmetic": "mergekit"}, tmp_path / "ours")
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_mergekit_is_as_it_was_afterwards(adapted: dict[str, Path]) -> None:
    before = LoaderCache.get, ModelReference.merged, ModelReference.local_path
    ref = ModelReference.parse(f"{adapted['base']}+{adapted['sft']}")
    LoaderCache.loaders.clear()
    with mergekit_plugin.adapters_on_the_fly():
        assert isinstance(LoaderCache().get(ref), mergekit_plugin.AdaptedLoader)
        assert ref.merged().lora is None
    assert (LoaderCache.get, ModelReference.merged, ModelReference.local_path) == before
    assert ref not in LoaderCache.loaders


def test_a_loader_looks_for_aliases_and_says_what_is_missing(adapted: dict[str, Path]) -> None:
    loader = mergekit_plugin.AdaptedLoader(adapted["base"], adapted["sft"], None)
    plain = load_state(adapted["base"])
    norm = loader.get_tensor("nowhere", aliases=["model.norm.weight"])
    assert norm is not None
    assert torch.equal(norm, plain["model.norm.weight"])
    changed = loader.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert changed is not None
    assert not torch.equal(changed, plain["model.layers.0.mlp.up_proj.weight"])
    assert loader.get_tensor("nowhere", raise_on_missing=False) is None
    half = mergekit_plugin.AdaptedLoader(adapted["base"], adapted["sft"], torch.float16)
    assert {tensor.dtype for name in plain if (tensor := half.get_tensor(name)) is not None} == {torch.float16}
    half.model.close()
    with pytest.raises(KeyError):
        loader.get_tensor("nowhere")
    loader.model.close()


def test_an_adapter_on_a_quantised_base_is_refused_by_name(adapted: dict[str, Path], tmp_path: Path) -> None:
    stored, _ = quantized.coded(load_state(adapted["base"]))
    base = save_checkpoint(tmp_path / "coded", stored, config={"quantization_config": quantized.CONFIG})
    with pytest.raises(CheckpointError, match=r"is quantised \(FP8.*mergekit would write"):
        mergekit_plugin.AdaptedLoader(base, adapted["sft"], None)


def test_the_console_script_is_mergekit_yaml_with_both(
    adapted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**adapter_recipe(adapted), "merge_method": "l1_ties"}
    for model in recipe["models"]:
        del model["parameters"]["density"]
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(
        "sys.argv",
        [
            "paft-mergekit-yaml",
            str(config),
            str(tmp_path / "out"),
            "--quiet",
            "--no-copy-tokenizer",
            "--no-write-model-card",
        ],
    )
    LoaderCache.loaders.clear()
    mergekit_yaml.main()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert load_state(tmp_path / "out").keys() == load_state(adapted["base"]).keys()
    helped = CliRunner().invoke(run_yaml.main, ["--help"])
    assert "lora-merge-cache" in helped.output


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"merge_method": "tis"}, "error[MERGEKIT]: "),
        ({"models": 5}, "error[MERGEKIT]: models: Input should be a valid list"),
        (None, "none.yaml: No such file or directory; `paft merge` takes the same file"),
    ],
)
def test_a_fault_of_the_console_script_is_one_line(
    change: dict[str, Any] | None, text: str, adapted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "none.yaml"
    if change:
        config.write_text(yaml.safe_dump(adapter_recipe(adapted) | change))
    monkeypatch.setattr("sys.argv", ["paft-mergekit-yaml", str(config), str(tmp_path / "out"), "--quiet"])
    LoaderCache.loaders.clear()
    with pytest.raises(SystemExit) as stopped:
        mergekit_yaml.main()
    message = str(stopped.value.code)
    assert text in message
    assert len(message.splitlines()) == 1
