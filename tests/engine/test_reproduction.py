"""Cards, reproduction, recipes on the Hub, and the commands: the real client from push to pull to merge to reproduce."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.hub import UPLOADS, environment, files_of, hub
from toys.hub_server import HubServer, Status
from toys.merge import python, recipe, write_recipe

import paft_merge
from paft_merge.cli import cli
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import HubError, PaftMergeError
from paft_merge.hub import fetch_file
from paft_merge.output import versions
from paft_merge.output.card import licence, write_card

__all__ = ["hub"]
pytestmark = UPLOADS

CARD = """---
license: apache-2.0
datasets: [me/data]
language: en
---
# A model
"""

RECIPE = """\
merge_method: dare_ties
base_model: me/base
models:
  - model: me/tuned
    parameters: {weight: 0.5, density: 0.5}
  - model: me/base+me/sft
    parameters: {weight: 0.5, density: 0.5}
seed: 7
"""


@pytest.fixture
def models(hub: HubServer, tmp_path: Path) -> HubServer:
    made, base = tmp_path / "made", random_state(0)
    hub.add("me/base", files_of(save_checkpoint(made / "base", base, shards=2)))
    hub.add("me/tuned", files_of(save_checkpoint(made / "tuned", near(base, 1))))
    hub.add("me/sft", files_of(save_adapter(made / "sft", base, 3)))
    for name in ("base", "tuned", "sft"):
        hub.add(f"me/{name}", {"README.md": CARD.encode()})
    return hub


@pytest.fixture
def merged(models: HubServer, tmp_path: Path) -> Path:
    return paft_merge.merge(RECIPE, tmp_path / "merged").path


def paft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def head_of(text: str) -> dict[str, object]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


# --- cards ------------------------------------------------------------------------------------------------------------


def test_a_card_says_what_it_is_made_of(models: HubServer, merged: Path) -> None:
    text = (merged / "README.md").read_text()
    assert head_of(text) == {
        "base_model": ["me/base", "me/tuned", "me/sft"], "base_model_relation": "merge", "library_name": "transformers",
        "tags": ["mergekit", "merge", "paft"], "license": "apache-2.0", "datasets": ["me/data"], "language": ["en"],
    }  # fmt: skip
    for name in ("base", "tuned", "sft"):
        assert f"`{models.repositories[f'me/{name}'].branches['main']}`" in text
    assert RECIPE.strip() in text
    assert "| `sft` |" in text
    assert "paft reproduce" in text
    assert f"Written by paft-merge `{paft_merge.__version__}` ([how to install it](" in text
    assert "pip install" not in text, "nobody knows whether this version is on the package index"


def test_a_version_installed_from_a_repository_has_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = SimpleNamespace(
        version="0.1.0", read_text={"direct_url.json": json.dumps({"vcs_info": {"commit_id": "f" * 40}})}.get
    )
    monkeypatch.setattr(versions, "distribution", lambda name: installed)
    assert versions.version_of.__wrapped__("paft-merge") == f"0.1.0+{'f' * 12}"


def test_a_source_tree_that_is_not_installed_merges_and_says_so(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", random_state(0))
    file = write_recipe(tmp_path / "r.yaml", recipe("linear", None, (base, {"weight": 1.0})))
    code = f"""if True:
        from importlib import metadata
        def hidden(name, known=metadata.distribution):
            if name == "paft-merge":
                raise metadata.PackageNotFoundError(name)
            return known(name)
        metadata.distribution = hidden
        import paft_merge
        from paft_merge.cli import cli
        cli(["merge", {str(file)!r}, {str(tmp_path / "out")!r}, "--quiet"], standalone_mode=False)
        print(paft_merge.__version__)
        cli(["--version"])
    """
    done = python(code)
    assert done.stdout.split("\n")[-3:] == ["unknown", "paft, version unknown", ""], done.stderr
    assert "paft-merge unknown, Python" in (tmp_path / "out.log").read_text()


def test_the_hubs_own_reader_understands_the_card(merged: Path) -> None:
    from huggingface_hub import ModelCard

    (merged / "results_2026.json").write_text(
        json.dumps(
            {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.01}}, "n-shot": {"arc": 25}}
        )
    )
    (merged / "evaluation.json").write_text(json.dumps({"gsm8k": {"value": 0.25, "stderr": 0.02, "rows": [1.0, 0.0]}}))
    write_card(merged)
    data = ModelCard.load(merged / "README.md").data
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results or ()}
    assert found == {("arc", "acc"): 0.5, ("gsm8k", "score"): 0.25}
    text = (merged / "README.md").read_text()
    assert "| arc | acc | 25 | 0.5 | 0.01 |" in text
    assert "| gsm8k | score | - | 0.25 | 0.02 |" in text


def test_a_card_is_written_anew_with_a_picture_but_not_over_somebodys_words(merged: Path) -> None:
    pytest.importorskip("matplotlib")
    done = paft("card", merged)
    assert done.exit_code == 0, done.output
    assert (merged / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    text = (merged / "README.md").read_text()
    assert "](sparsity.png)" in text
    (merged / "README.md").write_text(text.replace("# Merged model", "# My model"))
    refused = paft("card", merged)
    assert refused.exit_code == 1
    assert "error[CARD_EDITED]" in refused.stderr
    assert "# My model" in (merged / "README.md").read_text()
    assert paft("card", merged, "--overwrite").exit_code == 0
    assert (merged / "README.md").read_text() == text


def test_licences_that_differ_are_told_and_none_is_stated(models: HubServer, tmp_path: Path) -> None:
    models.add("me/sft", {"README.md": CARD.replace("apache-2.0", "cc-by-nc-4.0").encode()})
    told: list[str] = []
    out = paft_merge.merge(RECIPE, tmp_path / "out", warn=lambda problems: told.extend(map(str, problems)))
    text = (out / "README.md").read_text()
    assert "license" not in head_of(text)
    assert "cc-by-nc-4.0" in text
    assert any("different licences" in line for line in told)


@pytest.mark.parametrize("text", ["", "---\n- 1\n---\n", "---\n{{\n---\n", "no head", "---\nlicense: {a: 1}\n---\n"])
def test_a_source_with_a_strange_card_states_nothing(models: HubServer, tmp_path: Path, text: str) -> None:
    from paft_merge.output.card import about

    (tmp_path / "README.md").write_text(text)
    assert about(tmp_path) == {}
    assert licence({"sources": [{"path": "x", "card": {}}]}) == ({}, [])


# --- reproduction -----------------------------------------------------------------------------------------------------


def test_a_pushed_merge_is_made_again_bit_for_bit_though_its_sources_have_moved(
    models: HubServer, merged: Path, tmp_path: Path
) -> None:
    paft_merge.hub.push(merged, "me/merged")
    models.add("me/tuned", files_of(save_checkpoint(tmp_path / "moved", near(random_state(0), 9))))
    paft("pull", "me/tuned")
    done = paft("reproduce", "me/merged", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert "identical: 12 of 12 tensors" in done.output, done.output
    one, two = (
        {n: c for n, c in files_of(f).items() if n.endswith((".safetensors", "index.json"))}
        for f in (merged, tmp_path / "again")
    )
    assert one == two
    assert not list((tmp_path / "home").glob("hub/models--me--merged/**/*.safetensors"))


def test_another_result_another_file_and_other_versions_are_told(
    models: HubServer, merged: Path, tmp_path: Path
) -> None:
    path = merged / "merge_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["lm_head.weight"]["digest"] = "0" * 32
    manifest["files"]["config.json"] = "0" * 32
    manifest["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    done = paft("reproduce", merged, "--json")
    assert done.exit_code == 3
    found = json.loads(done.stdout)
    assert not found["identical"]
    assert (found["differing"], found["files"]) == (["lm_head.weight"], ["config.json"])
    assert found["versions"]["torch"][0] == "1.0"


def test_a_source_that_is_not_what_it_was_is_refused_before_the_merge(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    places = family()
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(places[n]), "parameters": {"weight": 0.5}} for n in ("x", "y")],
    }
    out = paft_merge.merge(recipe, tmp_path / "out")
    assert reproduce(out).identical
    save_checkpoint(places["y"], near(random_state(0), 5))
    with pytest.raises(PaftMergeError) as caught:
        reproduce(out, tmp_path / "again")
    assert [p.code for p in caught.value.problems] == ["REPRODUCE_INPUT"]
    assert str(places["y"]) in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_a_manifest_cannot_make_us_import_anything(models: HubServer, merged: Path) -> None:
    path = merged / "merge_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["options"]["imports"] = ["antigravity"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(PaftMergeError) as caught:
        reproduce(merged)
    assert caught.value.problems[0].code == "REPRODUCE_IMPORT"
    assert "antigravity" not in sys.modules


def test_documents_of_one_file_are_made_again_together(models: HubServer, tmp_path: Path) -> None:
    first = "name: half\nmerge_method: linear\nmodels:\n- {model: me/base, parameters: {weight: 1}}\n"
    first += "- {model: me/tuned, parameters: {weight: 1}}\n"
    last = (
        "merge_method: task_arithmetic\nbase_model: half\nmodels:\n- {model: half+me/sft, parameters: {weight: 0.5}}\n"
    )
    (tmp_path / "two.yaml").write_text(f"{first}---\n{last}")
    out = paft_merge.merge(tmp_path / "two.yaml", tmp_path / "out")
    sources = json.loads((out / "merge_manifest.json").read_text())["sources"]
    assert {s["path"] for s in sources} == {"me/base", "me/tuned", "me/sft"}
    assert all(s["commit"] for s in sources)
    assert reproduce(out).identical


# --- recipes on the Hub -----------------------------------------------------------------------------------------------


def test_a_recipe_may_lie_on_the_hub(models: HubServer, tmp_path: Path, merged: Path) -> None:
    old = models.add("me/recipes", {"ties/recipe.yaml": RECIPE.encode()})
    models.add("me/recipes", {"ties/recipe.yaml": b"merge_method: linear\n"})
    for place in (f"hf://me/recipes/ties/recipe.yaml@{old}", f"hf://me/recipes@{old}/ties/recipe.yaml"):
        out = tmp_path / f"out{len(place)}-{place[-1]}"
        done = paft("merge", place, out, "--quiet")
        assert done.exit_code == 0, done.output
        assert (out / "model-00001-of-00002.safetensors").read_bytes() == (
            merged / "model-00001-of-00002.safetensors"
        ).read_bytes()
    models.requests.clear()
    fetch_file(f"hf://me/recipes/ties/recipe.yaml@{old}")
    assert models.requests == []
    assert paft("merge", "--dry-run", f"hf://me/recipes/ties/recipe.yaml@{old}").exit_code == 0
    assert paft("explain", f"hf://me/recipes/ties/recipe.yaml@{old}").exit_code == 0
    assert paft("audit", f"hf://me/recipes/ties/recipe.yaml@{old}", "--no-preview").exit_code == 0


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("hf://me/recipes/none.yaml", "HUB_FILE"), ("hf://me/none/recipe.yaml", "HUB_NOT_FOUND"),
        ("hf://me/recipes/recipe.yaml@nope", "HUB_REVISION"), ("hf://me", "HUB_FILE"),
        ("hf://me/recipes/../../recipe.yaml", "HUB_PATH"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_had_is_one_clear_line(models: HubServer, place: str, code: str) -> None:
    models.add("me/recipes", {"recipe.yaml": RECIPE.encode()})
    with pytest.raises(HubError) as caught:
        fetch_file(place)
    assert caught.value.problems[0].code == code
    done = paft("merge", "--dry-run", place)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error[{code}]: ")


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_dry_run_reads_headers_alone(models: HubServer, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = paft("merge", "--dry-run", tmp_path / "r.yaml", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["tensors"]) == 12
    sizes = [len(c) for n in ("base", "tuned", "sft") for p, c in models.files(f"me/{n}").items() if "safetensors" in p]
    assert found["bytes_on_hub"] == sum(sizes) - len(models.files("me/base")["model.safetensors.index.json"])
    assert "of files are not on this machine" in paft("merge", "--dry-run", tmp_path / "r.yaml").stdout
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_pull_prints_where_it_lies(models: HubServer) -> None:
    done = paft("pull", "me/base+me/sft")
    base, adapter = done.stdout.splitlines()
    assert {p.name for p in Path(base).glob("*.safetensors")} == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert (Path(adapter) / "adapter_model.safetensors").is_file()
    commit = models.repositories["me/tuned"].branches["main"]
    assert paft("pull", f"me/tuned@{commit}").stdout.strip().endswith(commit)


def test_an_error_of_the_hub_is_one_line_and_exit_code_1(models: HubServer, merged: Path) -> None:
    models.fail("POST .*/commit/", Status(403), times=9)
    done = paft("push", merged, "me/merged", "--private", "--tag", "v1")
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert lines[0].startswith("error[HUB_FORBIDDEN]: me/merged: ")


def test_from_push_to_reproduce_in_processes_of_their_own(models: HubServer, tmp_path: Path) -> None:
    """What a user types, against another endpoint, with a token in the environment and an empty cache."""
    import os

    (tmp_path / "r.yaml").write_text(RECIPE)
    env = {**os.environ, **environment(models.url, tmp_path / "fresh")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "paft_merge.cli", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "hf_writer" not in done.stdout + done.stderr
        return done.stdout

    run("merge", "r.yaml", "out", "--stream-from-hub", "--quiet")
    assert re.fullmatch(rf"{models.url}/me/done/commit/\w{{40}}\n", run("push", "out", "me/done", "--private"))
    assert models.repositories["me/done"].private
    assert run("reproduce", "me/done", "--quiet").startswith("identical: 12 of 12 tensors")


def test_relative_sources_are_explained_where_they_are_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_state(0)
    save_checkpoint(tmp_path / "base", state)
    save_checkpoint(tmp_path / "x", near(state, 1))
    monkeypatch.chdir(tmp_path)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("base", "x")],
    }
    paft_merge.merge(recipe, "out")
    assert reproduce(tmp_path / "out").identical
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PaftMergeError) as caught:
        reproduce(tmp_path / "out")
    fixes = {problem.fix for problem in caught.value.problems}
    assert fixes == {"a relative path starts beside the recipe, or where the merge ran: give this command there"}
