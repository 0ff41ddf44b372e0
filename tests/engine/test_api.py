"""`merge` and `open_plan` for Python users: options, results, short reprs, deprecated names, and the page about them."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ForwardRef

import pytest
import torch
from conftest import near, save_checkpoint
from safetensors.torch import load_file, save_file
from toys.hub import UPLOADS
from toys.hub import files_of as hub_files
from toys.hub import hub as hub
from toys.hub_server import HubServer
from toys.merge import files_of, manifest_of, paft, python, recipe, write_recipe
from toys.run import make_world
from toys.train import THEIR_WARNINGS

import paft_merge
from paft_merge import MergeOptions, merge, open_plan
from paft_merge.engine.options import RECORDED, MergeKeywords, parse_size
from paft_merge.errors import MergeError, PaftMergeError, Problem, deprecated
from paft_merge.methods import METHODS
from paft_merge.recipe import load_recipe

Family = Callable[..., dict[str, Path]]
PAGE = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture
def asked(family: Family, tmp_path: Path) -> Path:
    paths = family()
    return write_recipe(tmp_path / "r.yaml", recipe("task_arithmetic", paths["base"], (paths["x"], {"weight": 0.5})))


# --- nothing to merge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("method", ["passthrough", "ties"])
def test_a_source_without_tensors_is_refused(file: str, method: str, asked: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    save_file({}, empty / file)
    base = json.loads(asked.read_text())["base_model"]
    merged = (None, (empty, {})) if method == "passthrough" else (base, (empty, {"weight": 1.0}))
    file = write_recipe(asked, recipe(method, *merged))
    refused = paft("merge", file, tmp_path / "out", "--quiet")
    before = file.read_text().partition(str(empty))[0]
    at = f"{file}:{before.count(chr(10))}"  # the item of the source begins on the line before
    fault = f"error[CHECKPOINT_MISSING]: {at}: {empty}: holds no tensors; download it again, or check the path\n"
    assert (refused.exit_code, refused.stderr) == (1, fault)
    assert not list(tmp_path.glob("out*"))


def test_a_result_without_tensors_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(4)}, tmp_path / f"{name}.safetensors")
    models = [{"model": str(tmp_path / f"{name}.safetensors"), "parameters": {"weight": 1}} for name in ("a", "b")]
    file = write_recipe(tmp_path / "r.yaml", {"merge_method": "linear", "models": models})
    refused = paft("merge", file, tmp_path / "out", "--quiet", "--tensor-intersection")
    assert (refused.exit_code, refused.stderr.split(";")[0]) == (
        1, f"error[KEYS_MISSING]: {file}:1: the output has no tensors, because its sources have none in common",
    )  # fmt: skip
    assert not list(tmp_path.glob("out*"))


# --- relative paths -------------------------------------------------------------------------------------------------------


def test_relative_paths_are_looked_for_beside_the_recipe_then_in_the_working_directory(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, here, there = family(), tmp_path / "here", tmp_path / "recipes"
    for folder in (here, there / "run"):
        folder.mkdir(parents=True)
    shutil.copytree(paths["base"], here / "base")
    shutil.copytree(paths["x"], there / "run" / "checkpoint-5")
    made = recipe("task_arithmetic", Path("base"), (Path("run/checkpoint-*"), {"weight": 0.5}))
    file = write_recipe(there / "r.yaml", made)
    wanted = merge(recipe("task_arithmetic", paths["base"], (paths["x"], {"weight": 0.5})), tmp_path / "wanted")
    monkeypatch.chdir(here)
    found = merge(file, tmp_path / "out")
    assert (found / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert [w.code for w in found.warnings] == ["CHECKPOINTS"]  # the only one
    shutil.copytree(paths["y"], there / "base")
    both = merge(file, tmp_path / "both")
    assert [str(w) for w in both.warnings if w.code == "PATHS"] == [
        f"base: is both beside the recipe ({there / 'base'}) and in the working directory; the first is read; "
        "write an absolute path if that is not meant"
    ]
    assert (both / "model.safetensors").read_bytes() != (wanted / "model.safetensors").read_bytes()
    with pytest.raises(PaftMergeError, match=r"there is no folder .run.*here"):
        merge(made, tmp_path / "none")  # a recipe without a file


# --- options --------------------------------------------------------------------------------------------------------------


def test_the_keywords_for_editors_are_the_fields_of_the_options() -> None:
    def text(annotation: Any) -> str:
        return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else str(annotation)

    typed = {name: text(annotation) for name, annotation in MergeKeywords.__annotations__.items()}
    assert typed == {field.name: field.type for field in dataclasses.fields(MergeOptions)}


def test_options_and_keywords_may_be_mixed_and_keywords_win(asked: Path, tmp_path: Path) -> None:
    options = MergeOptions(write_model_card=False, threads=1)
    assert not (merge(asked, tmp_path / "one", options) / "README.md").exists()
    assert (merge(asked, tmp_path / "two", options, write_model_card=True) / "README.md").exists()
    assert options == MergeOptions(write_model_card=False, threads=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.threads = 2  # type: ignore[misc]


@pytest.mark.parametrize("call", [merge, paft_merge.reproduce])
def test_an_unknown_option_is_a_type_error_with_a_suggestion(call: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'overwrit' is not an option of a merge; did you mean 'overwrite'"):
        call("r.yaml", tmp_path / "out", overwrit=True)
    with pytest.raises(TypeError, match="'zzz' is not an option of a merge; options are strict, "):
        open_plan("r.yaml", zzz=1)  # type: ignore[call-arg]


def test_the_manifest_records_the_same_options_as_ever(asked: Path, tmp_path: Path) -> None:
    plain = manifest_of(merge(asked, tmp_path / "plain"))["options"]
    assert json.dumps(plain) == (
        '{"device": "cpu", "imports": [], "out_shard_bytes": null, "lazy_unpickle": false, "allow_crimes": false, '
        '"allow_nonfinite": false, "trust_remote_code": false}'
    )
    said = manifest_of(merge(asked, tmp_path / "sized", out_shard_bytes="8kB", memory="800M", imports=()))["options"]
    assert said == plain | {"out_shard_bytes": 8000}
    assert list(plain) == list(RECORDED)
    assert MergeOptions(tensor_names="union").recorded() == plain | {"tensor_names": "union"}


def test_sizes_may_be_text(asked: Path, tmp_path: Path) -> None:
    assert parse_size("800M") == MergeOptions(memory="800M").memory_bytes == 800_000_000
    assert files_of(merge(asked, tmp_path / "one", out_shard_bytes=8000)) == files_of(
        merge(asked, tmp_path / "two", out_shard_bytes="8kB")
    )
    for name in ("memory", "out_shard_bytes"):
        with pytest.raises(ValueError, match="'lots' is not a size; write for example 800M or 5GB"):
            MergeOptions(**{name: "lots"})
    with pytest.raises(PaftMergeError, match="more than memory=10;"):
        merge(asked, tmp_path / "three", memory="10 ")


def test_a_renamed_option_works_and_warns_at_the_line_of_the_caller(asked: Path) -> None:
    text = "the option 'remote' is deprecated since paft-merge 0.1, and two releases later it will be removed; "
    with pytest.warns(FutureWarning, match=text + "use 'stream_from_hub'") as caught:
        plan = open_plan(asked, remote=True)  # type: ignore[call-arg]
    assert caught[0].filename == __file__
    with plan as found:
        assert found.tensors


def test_a_deprecated_name_says_what_to_use() -> None:
    def old() -> None:
        deprecated("old()", "use new()", since="0.3")

    def user() -> None:
        old()

    with pytest.warns(FutureWarning, match=r"^old\(\) is deprecated since paft-merge 0.3, .*; use new\(\)$") as caught:
        user()
    assert caught[0].lineno == user.__code__.co_firstlineno + 1


def test_a_manifest_cannot_set_other_options(asked: Path, tmp_path: Path) -> None:
    out = merge(asked, tmp_path / "out")
    for name, value in {"overwrite": True, "stream_from_hub": True, "nonsense": 1}.items():
        changed = manifest_of(out)
        changed["options"] = {name: value}
        (out / "merge_manifest.json").write_text(json.dumps(changed))
        with pytest.raises(MergeError, match=f"the option '{name}', which this version does not know") as caught:
            paft_merge.reproduce(out)
        assert caught.value.problems[0].code == "REPRODUCE_OPTION"


# --- one reading of the recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [1, 2])
def test_a_merge_parses_and_checks_its_recipe_once(
    documents: int, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, counts = family(), {"parsed": 0, "checked": 0}
    each = [recipe("linear", None, (paths[name], {"weight": 1.0}), name=name) for name in ("x", "y")[:documents]]
    (tmp_path / "r.yaml").write_text("\n---\n".join(map(json.dumps, each)))

    def counting(name: str, function: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **keywords)

        return run

    loader, check = paft_merge.recipe.yaml_source._Loader, paft_merge.recipe.check
    monkeypatch.setattr(loader, "__init__", counting("parsed", loader.__init__))
    monkeypatch.setattr(paft_merge.recipe, "check", counting("checked", check))
    merge(tmp_path / "r.yaml", tmp_path / "out")
    assert counts == {"parsed": 1, "checked": documents}


# --- results ----------------------------------------------------------------------------------------------------------------


def test_a_result_says_what_was_merged_and_is_a_path(asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "<b>out"
    result = merge(asked, out)
    assert os.fspath(result) == str(result) == f"{result}" == str(result.path) == str(out)
    assert Path(result) == out
    assert (result / "config.json").is_file()
    assert result.manifest == manifest_of(out)
    assert [t.name for t in result.plan.tensors] == list(result.manifest["tensors"])
    assert result.bytes_written == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert result.warnings == ()
    assert 0 < result.seconds < 60
    assert not result.results
    assert repr(result).startswith(f"MergeResult({str(out)!r}, {len(result.plan.tensors)} tensors, ")
    assert copy.deepcopy(result) is result
    assert "<b>" not in result._repr_html_()
    assert "&lt;b&gt;out" in result._repr_html_()
    assert "\u202e" not in dataclasses.replace(result, path=Path("\u202e"))._repr_html_()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.path = tmp_path  # type: ignore[misc]


def test_warnings_are_in_the_result_and_are_still_reported(asked: Path, tmp_path: Path) -> None:
    data, told = json.loads(asked.read_text()), list[Problem]()
    result = merge({**data, "slerp": 1}, tmp_path / "out", warn=told.extend)
    assert len(told) == 1
    assert list(result.warnings) == told
    assert repr(result).endswith(", 1 warning)")


def test_several_results_are_one_result_with_each_by_its_name(family: Family, tmp_path: Path) -> None:
    paths = family()
    each = [recipe("linear", None, (paths[name], {"weight": 1.0}), name=name) for name in "xy"]
    (tmp_path / "r.yaml").write_text("\n---\n".join(map(json.dumps, each)))
    result = merge(tmp_path / "r.yaml", tmp_path / "out")
    assert {name: one.path for name, one in result.results.items()} == {n: tmp_path / "out" / n for n in "xy"}
    assert result.path == tmp_path / "out"
    assert result.bytes_written == sum(one.bytes_written for one in result.results.values())
    assert result.results["y"].manifest == manifest_of(tmp_path / "out" / "y")
    assert "2 results" in repr(result)
    for name in ("plan", "manifest"):
        with pytest.raises(ValueError, match="there are several"):
            getattr(result, name)
    chosen = merge(tmp_path / "r.yaml", tmp_path / "one", output_name="x")
    assert not chosen.results
    assert chosen.plan.recipe.name == "x"


def test_problems_of_the_place_are_reported_once(asked: Path, hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    broken = json.loads(asked.read_text()) | {"models": [{"model": str(tmp_path / "nowhere")}]}
    hub.add("me/base", hub_files(tmp_path / "base"))
    for case in (asked, broken, recipe("linear", None, ("me/base", {"weight": 1.0}))):
        with pytest.raises(PaftMergeError) as caught:
            merge(case, tmp_path / "out")
        assert len(set(caught.value.problems)) == len(caught.value.problems)
        assert "out: is a file" in str(caught.value)


# --- what a notebook shows ----------------------------------------------------------------------------------------------------


def test_plans_and_recipes_are_short_and_escaped(tmp_path: Path) -> None:
    state = {f"<i>{n:03}": torch.full((4,), float(n)) for n in range(300)}
    places = [save_checkpoint(tmp_path / f"<u>{i}", near(state, i)) for i in range(2)]
    weights = [{"filter": name, "value": 0.1 + i / 7} for i, name in enumerate(state)]
    sources = [(place, {"weight": [*weights, {"value": 0.5}]}) for place in places]
    data = recipe("linear", None, *sources)
    with open_plan(data) as plan:
        assert repr(plan) == f"MergePlan('linear', 2 models, 300 tensors, {plan.bytes_written / 1000:.1f} kB)"
        shown = plan._repr_html_()
        assert 10 < shown.count("<tr>") < 20
        assert len(shown) < 5000
        assert sum(count for _, count in plan.summary()) == 300
        loaded = plan.recipe
        assert repr(plan.tensors[0]) == "PlannedTensor('<i>000', 'linear', F32, (4,), 2 sources)"
    assert repr(METHODS["linear"]) == "Method('linear', 'Linear (model soups)', 2 parameters)"
    assert repr(loaded) == "Recipe('linear', 2 models)"
    assert repr(load_recipe(write_recipe(tmp_path / "r.yaml", {**data, "name": "n"}))) == (
        f"Recipe('linear', 2 models, name='n', file='{tmp_path}/r.yaml')"
    )
    for html in (shown, loaded._repr_html_()):
        assert not {"<u>", "<i>", "<b>"} & set(re.findall(r"<\w>", html))
        assert len(html.splitlines()) <= 202
    assert "&lt;u&gt;0" in loaded._repr_html_()
    assert "lines more" in loaded._repr_html_()


def test_a_plan_as_json_is_what_a_dry_run_prints(asked: Path) -> None:
    with open_plan(asked) as plan:
        ours = plan.to_json()
    printed = json.loads(paft("merge", asked, "--dry-run", "--json").stdout)
    assert printed.pop("prediction")["seconds"] > 0
    assert json.loads(json.dumps(ours)) | {"bytes_free": 0} == printed | {"bytes_free": 0}
    assert len(ours["tensors"]) == len(plan.tensors)


# --- the package ------------------------------------------------------------------------------------------------------------


def test_the_package_is_imported_without_numpy_and_finds_everything() -> None:
    code = """if True:
        import sys, paft_merge
        assert not {"numpy", "torch", "yaml", "click"} & sys.modules.keys()
        options = paft_merge.MergeOptions(memory="5GB")
        assert paft_merge.__version__.count(".") == 2
        assert not {"numpy", "torch", "yaml", "click"} & sys.modules.keys()
        assert paft_merge.hub.push is paft_merge.push
        assert paft_merge.hub.pull is paft_merge.pull
        from paft_merge import *
        assert callable(merge) and callable(merge_state_dicts) and callable(explain) and callable(reproduce)
        assert Progress.__module__ == "paft_merge.engine.streaming"
    """
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_python_m_paft_merge_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "paft_merge", "--version"], capture_output=True, text=True, timeout=60)
    assert run.stdout == f"paft, version {paft_merge.__version__}\n"


def test_one_class_in_the_package_is_called_progress() -> None:
    found = [
        path
        for path in Path(paft_merge.__file__).parent.rglob("*.py")
        if re.search(r"^class Progress\b", path.read_text(), re.MULTILINE)
    ]
    assert [path.name for path in found] == ["streaming.py"]


# --- the page ---------------------------------------------------------------------------------------------------------------


@THEIR_WARNINGS
@UPLOADS
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_snippet_of_the_page_runs(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text()
    search = {"metric": "text", "space": {"models[1].parameters.weight": [0.0, 1.0]}, "trials": 1}
    make_world(tmp_path, tune=search).rename(tmp_path / "run.yaml")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for at, name in enumerate(("math", "code")):
        shutil.copytree(tmp_path / "base", tmp_path / name)
        save_file(near(base, at), tmp_path / name / "model.safetensors", {"format": "pt"})
    hub.add("me/base", hub_files(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    names: dict[str, Any] = {}
    for at, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(snippet, f"snippet {at} of {PAGE.name}", "exec"), names)
    shown = capsys.readouterr().out
    for line in re.findall(r"# ((?:MergeResult|MergePlan|Recipe)\(.*\))", text):
        assert re.search(re.sub(r"\d+\\\.\d+", r"[\\d.]+", re.escape(line)), shown), line
    assert hub.repositories["me/merged"].private


def test_the_page_shows_every_exported_name() -> None:
    text = PAGE.read_text()
    for name in paft_merge.__all__:
        assert re.search(rf"\b{name}\b", text), name
