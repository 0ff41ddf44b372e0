"""Models and adapters in a folder of a Hub repository: `me/run/checkpoint-500`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_state, save_adapter, save_checkpoint
from safetensors.torch import load_file
from toys.hub import files_of, hub
from toys.hub_server import HubServer

import paft_merge
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import PaftMergeError
from paft_merge.hub import fetch, is_repository, pull, resolve, split_repository

__all__ = ["hub"]


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> HubServer:
    """`me/base`, and `me/run` with an adapter at its top, in two checkpoints, and a pickled one."""
    made, base = tmp_path / "made", random_state(0)
    hub.add("me/base", files_of(save_checkpoint(made / "base", base)))
    files = files_of(save_adapter(made / "top", base, 9))
    for step in (500, 1000):
        folder = save_adapter(made / f"checkpoint-{step}", base, step)
        files |= {f"checkpoint-{step}/{name}": content for name, content in files_of(folder).items()}
        files |= {f"checkpoint-{step}/optimizer.pt": b"o" * 500, f"checkpoint-{step}/trainer_state.json": b"{}"}
    torch.save(load_file(made / "checkpoint-500" / "adapter_model.safetensors"), made / "adapter_model.bin")
    files["old/adapter_config.json"] = files["checkpoint-500/adapter_config.json"]
    files["old/adapter_model.bin"] = (made / "adapter_model.bin").read_bytes()
    hub.add("me/run", files)
    whole = files_of(save_checkpoint(made / "inner", random_state(5), shards=2))
    hub.add("me/run", {f"deep/er/model/{name}": content for name, content in whole.items()})
    return hub


def recipe(*models: str) -> dict[str, object]:
    sources = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "task_arithmetic", "base_model": "me/base", "models": sources, "dtype": "float32"}


def weights(folder: Path) -> dict[str, bytes]:
    return {n: c for n, c in files_of(folder).items() if n.endswith(".safetensors")}


def twin(tmp_path: Path, made: dict[str, object]) -> dict[str, bytes]:
    """The same merge from folders."""
    text = json.dumps(made).replace("me/run/", f"{tmp_path}/made/").replace("me/base", f"{tmp_path}/made/base")
    return weights(paft_merge.merge(json.loads(text.replace("@v1", "")), tmp_path / "twin").path)


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_in_a_folder_is_merged(run: HubServer, tmp_path: Path, stream: bool) -> None:
    run.repositories["me/run"].tags["v1"] = run.repositories["me/run"].branches["main"]
    made = recipe("me/base+me/run/checkpoint-500@v1", "me/base+me/run/checkpoint-1000")
    out = paft_merge.merge(made, tmp_path / "out", stream_from_hub=stream).path
    assert weights(out) == twin(tmp_path, made)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    found = {s["path"]: s for s in manifest["sources"]}["me/run/checkpoint-500"]
    commit = run.repositories["me/run"].branches["main"]
    assert (found["repo_id"], found["folder"], found["commit"], found["revision"]) == (
        "me/run",
        "checkpoint-500",
        commit,
        "v1",
    )
    assert f"https://huggingface.co/me/run/tree/{commit}/checkpoint-500" in (out / "README.md").read_text()
    run.add("me/run", {"checkpoint-500/adapter_model.safetensors": b"another"})
    run.repositories["me/run"].tags["v1"] = run.repositories["me/run"].branches["main"]
    assert reproduce(out).identical


def test_only_the_files_of_the_folder_are_fetched(run: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("me/run/checkpoint-500", kind="adapter")
    assert set(files_of(folder)) == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(files_of(folder.parent)) == {f"checkpoint-500/{name}" for name in files_of(folder)}
    assert pull("me/base+me/run/checkpoint-500")[1] == folder
    run.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("me/run/checkpoint-500", kind="adapter") == folder
    assert resolve("me/run/checkpoint-500").snapshot == folder.parent
    with pytest.raises(PaftMergeError, match=r"adapter_model.safetensors|cannot be reached|HF_HUB_OFFLINE"):
        fetch("me/run/checkpoint-1000", kind="adapter")
    assert run.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_in_a_deep_folder_is_merged(run: HubServer, tmp_path: Path, stream: bool) -> None:
    made = recipe("me/run/deep/er/model")
    out = paft_merge.merge(made, tmp_path / "out", stream_from_hub=stream).path
    text = (
        json.dumps(made)
        .replace("me/run/deep/er/model", f"{tmp_path}/made/inner")
        .replace("me/base", f"{tmp_path}/made/base")
    )
    assert weights(out) == weights(paft_merge.merge(json.loads(text), tmp_path / "twin").path)


def test_a_pickled_adapter_in_a_folder(run: HubServer, tmp_path: Path) -> None:
    with pytest.raises(PaftMergeError, match=r"holds only pickles .*lazy_unpickle=True"):
        paft_merge.merge(recipe("me/base+me/run/old"), tmp_path / "no")
    out = paft_merge.merge(recipe("me/base+me/run/old"), tmp_path / "out", lazy_unpickle=True).path
    assert weights(out) == twin(tmp_path, recipe("me/base+me/run/checkpoint-500"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_that_is_not_there_is_named_with_those_that_are(run: HubServer, cached: bool) -> None:
    if cached:
        fetch("me/run/checkpoint-500")
    with pytest.raises(PaftMergeError) as caught:
        fetch("me/run/checkpoint-50")
    (problem,) = caught.value.problems
    assert str(problem) == (
        "me/run/checkpoint-50: me/run has no folder 'checkpoint-50'; it has old, deep/er/model, checkpoint-500, checkpoint-1000"
    )


def test_which_names_are_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert split_repository("gpt2") == ("gpt2", "")
    assert split_repository("me/run") == ("me/run", "")
    assert split_repository("me/run/a/b-1") == ("me/run", "a/b-1")
    local = (
        "",
        "/me/run",
        "./me/run/x",
        "../x",
        "me/../x",
        "me/run/../x",
        "me//run",
        "me/run/",
        "~/x/y",
        "runs/me/x",
        "C:\\x",
        "a b/c",
    )
    assert not any(is_repository(path) for path in local)


def test_a_local_folder_that_is_not_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(PaftMergeError) as caught:
        fetch("runs/first/checkpoint-5")
    assert caught.value.problems[0].code == "NOT_FOUND"
