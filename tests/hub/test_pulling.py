"""Pulling, remote headers, and merging from the network: what is fetched, what is not, and every way it goes wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from safetensors.torch import load_file, save_file
from toys.hub import files_of, hub, online
from toys.hub_server import READER, HubServer, Lie, Status, Truncate

import paft_merge
from paft_merge.errors import HubError, PaftMergeError, Problem
from paft_merge.hub import download, fetch, fetch_file, resolve

__all__ = ["hub"]

Family = Callable[..., dict[str, Path]]


@pytest.fixture
def models(hub: HubServer, tmp_path: Path) -> HubServer:
    """`me/base` (three shards), `me/tuned` and the adapter `me/sft`, with what else such repositories hold."""
    made, base = tmp_path / "made", random_state(0)
    hub.add("me/base", files_of(save_checkpoint(made / "base", base, shards=3)))
    hub.add("me/base", {
        "pytorch_model.bin": b"\x80\x04" * 900, "consolidated.safetensors": b"x" * 500, "README.md": b"# base",
        "original/params.safetensors": b"y" * 500, "tokenizer.json": b"{}", "onnx/model.onnx": b"z" * 500,
    })  # fmt: skip
    hub.add("me/tuned", files_of(save_checkpoint(made / "tuned", near(base, 1))))
    hub.add("me/sft", files_of(save_adapter(made / "sft", base, 3)))
    hub.add("me/sft", {"optimizer.bin": b"o" * 500})
    return hub


RECIPE = {
    "merge_method": "ties",
    "base_model": "me/base",
    "models": [
        {"model": "me/tuned", "parameters": {"weight": 0.5, "density": 0.5}},
        {"model": "me/base+me/sft", "parameters": {"weight": 0.5, "density": 0.5}},
    ],
}


def local_twin(tmp_path: Path) -> dict[str, bytes]:
    """The same merge from folders."""
    made = tmp_path / "made"
    text = json.dumps(RECIPE).replace("me/", f"{made}/")
    return weights(paft_merge.merge(json.loads(text), tmp_path / "twin").path)


def weights(folder: Path) -> dict[str, bytes]:
    return {n: c for n, c in files_of(folder).items() if n.endswith(".safetensors")}


def fetched(hub: HubServer) -> set[str]:
    return {r.path.split("?")[0].split("/", 5)[-1] for r in hub.requests if r.method == "GET" and "/resolve/" in r.path}


def code_of(caught: pytest.ExceptionInfo[PaftMergeError]) -> str:
    return caught.value.problems[0].code


# --- pulling ----------------------------------------------------------------------------------------------------------


def test_only_what_a_merge_reads_is_fetched(models: HubServer) -> None:
    folder = fetch("me/base")
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert set(files_of(folder)) == shards | {
        "config.json", "model.safetensors.index.json", "README.md", "tokenizer.json",
    }  # fmt: skip
    assert set(files_of(fetch("me/sft"))) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("offline", [True, False])
def test_a_warm_cache_touches_no_network(
    models: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    first = weights(paft_merge.merge(RECIPE, tmp_path / "first").path)
    models.requests.clear()
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert weights(paft_merge.merge(RECIPE, tmp_path / "second").path) == first == local_twin(tmp_path)
    assert models.requests == []


def test_pull_asks_whether_a_branch_has_moved_and_a_merge_does_not(models: HubServer) -> None:
    before = fetch("me/tuned")
    models.add("me/tuned", {"config.json": b'{"model_type": "llama", "new": 1}'})
    assert fetch("me/tuned") == before
    after = download([resolve("me/tuned", refresh=True)])[0]
    assert after != before
    assert fetch("me/tuned") == after
    assert fetch("me/tuned", before.name) == before


def test_a_revision_is_a_branch_a_tag_or_a_commit(models: HubServer) -> None:
    old = models.repositories["me/tuned"].branches["main"]
    models.repositories["me/tuned"].tags["v1"] = old
    models.add("me/tuned", {"config.json": b"{}"})
    assert fetch("me/tuned", "v1") == fetch("me/tuned", old)
    assert fetch("me/tuned", "v1").name == old != fetch("me/tuned").name
    models.requests.clear()
    fetch("me/tuned", "v1")
    assert models.requests == []


def test_what_arrived_whole_is_not_fetched_again(models: HubServer) -> None:
    models.fail(r"GET .*/cdn/.*00002-of", Status(404), times=99)
    with pytest.raises(HubError) as caught:
        fetch("me/base")
    assert "model-00002-of-00003.safetensors" in str(caught.value)
    models.rules.clear()
    models.requests.clear()
    fetch("me/base")
    assert models.count(r"GET /cdn/.*00002-of") == 1
    assert models.count(r"GET /cdn/") <= 3


def test_an_incomplete_cache_is_not_taken_for_a_whole_one(
    models: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = resolve("me/base")
    assert {file.name for file in seen.missing} == {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert seen.missing_bytes > 1000
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        fetch("me/base", seen.commit)
    assert code_of(caught) == "HUB_OFFLINE"
    assert "model-00001-of-00003" in str(caught.value)
    with pytest.raises(HubError) as caught:
        fetch("me/never")
    assert code_of(caught) == "HUB_OFFLINE"


def test_a_cache_that_others_left_serves_offline(
    models: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = fetch("me/base")
    for listing in (folder.parents[1]).glob("trees/*"):
        listing.unlink()
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("me/base") == folder
    next(folder.glob("*-00002-*")).unlink()
    with pytest.raises(HubError) as caught:
        fetch("me/base")
    assert code_of(caught) == "HUB_OFFLINE"


@pytest.mark.parametrize(
    "fault",
    [Truncate(1500), Truncate(700, reset=True), Status(503), Status(429, {"Retry-After": "0"}), Lie(flip=True)],
    ids=["cut", "reset", "503", "429", "flipped"],
)
def test_trouble_that_passes_is_not_seen(models: HubServer, tmp_path: Path, fault: object) -> None:
    models.fail("GET /cdn/", fault, times=1)  # type: ignore[arg-type]
    assert weights(fetch("me/tuned"))["model.safetensors"] == models.files("me/tuned")["model.safetensors"]


@pytest.mark.parametrize(
    "pattern", ["GET /api/models", r"(GET|HEAD) .*/resolve/.*/config\.json"], ids=["list", "small"]
)
@pytest.mark.parametrize("code", [500, 503])
def test_the_listing_and_small_files_are_asked_for_again(models: HubServer, pattern: str, code: int) -> None:
    models.fail(pattern, Status(code), times=2)
    assert (fetch("me/base") / "config.json").is_file()
    assert not [rule for rule in models.rules if rule.times]


@pytest.mark.parametrize("refresh", [False, True])
def test_a_recipe_on_the_hub_is_asked_for_again(models: HubServer, refresh: bool) -> None:
    models.add("me/base", {"recipe.yaml": b"merge_method: linear"})
    models.fail(r"GET .*/resolve/.*/recipe\.yaml", Truncate(3, reset=True), times=2)
    assert fetch_file("hf://me/base/recipe.yaml", refresh=refresh).read_bytes() == b"merge_method: linear"
    assert not [rule for rule in models.rules if rule.times]


def test_a_listing_without_sizes_is_not_one_of_empty_files(models: HubServer) -> None:
    models.lists_sizes = False
    missing = resolve("me/base", kind="model").missing
    files = models.files("me/base")
    assert {file.name: file.size for file in missing} == {file.name: len(files[file.name]) for file in missing}
    assert (fetch("me/base") / missing[0].name).stat().st_size == missing[0].size > 0


def test_bytes_that_are_never_right_leave_nothing(models: HubServer) -> None:
    models.fail("GET /cdn/", Lie(flip=True), times=99)
    with pytest.raises(HubError) as caught:
        fetch("me/tuned")
    assert code_of(caught) == "HUB_CORRUPT"
    seen = resolve("me/tuned")
    assert [file.name for file in seen.missing] == ["model.safetensors"]
    assert not list(seen.folder.parents[1].glob("blobs/*.incomplete"))


@pytest.mark.parametrize(
    "name", ["../evil.json", "..\\evil.json", "/etc/evil.json", "a/../../evil.json", "C:evil.json"]
)
def test_a_name_that_leaves_its_folder_is_refused(models: HubServer, tmp_path: Path, name: str) -> None:
    models.add("me/evil", {name: b"{}", "config.json": b"{}"})
    with pytest.raises(HubError) as caught:
        fetch("me/evil")
    assert code_of(caught) == "HUB_PATH"
    assert not list(tmp_path.rglob("*evil.json*"))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("me/base:me/sft", "an adapter follows its base after a '+': did you mean me/base+me/sft?"),
        (" me/base", "did you mean 'me/base', without blanks?"), ("./base ", "did you mean './base', without blanks?"),
        ("run/checkpoint-*", "in the models: and sources: of a recipe; name one folder"), ("C:\\base", "check the path"),
    ],
)  # fmt: skip
def test_what_a_path_was_meant_to_be_is_said_with_its_line(path: str, hint: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n  - model: {tmp_path}\n  - model: {json.dumps(path)}\n"
    )
    with pytest.raises(PaftMergeError) as caught:
        fetch(path)
    assert str(caught.value).endswith(hint)
    if "*" not in path:
        with pytest.raises(PaftMergeError, match=rf"recipe\.yaml:5: {re.escape(path)}: .*{re.escape(hint)}"):
            paft_merge.merge(recipe, tmp_path / "out")


def test_a_mistyped_folder_is_named(models: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base/x/y").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    online(monkeypatch, models.url, tmp_path / "home", READER)
    for unplugged in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", unplugged)
        for path in ("bse/x/y", "base/x/yy", "base/xx", f"{tmp_path}/bsae/x"):
            with pytest.raises(HubError, match=r"not a local folder, .*; did you mean .*base"):
                fetch(path)
        with pytest.raises(HubError, match=r"not a local folder, .*; check the "):
            fetch("mistral/7b")


def test_what_cannot_be_had_is_said_in_one_line(
    models: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models.add("me/gated", files_of(tmp_path / "made" / "tuned"), gated=True)
    models.add("me/private", files_of(tmp_path / "made" / "tuned"), private=True)
    online(monkeypatch, models.url, tmp_path / "home", READER)
    codes = {}
    for ref, revision in [("me/none", None), ("me/base", "nope"), ("me/gated", None), ("./no/folder", None)]:
        with pytest.raises(HubError) as caught:
            fetch(ref, revision)
        codes[ref] = code_of(caught)
        assert len(str(caught.value).splitlines()) == 1
        assert ";" in str(caught.value)
    assert codes == {
        "me/none": "HUB_NOT_FOUND", "me/base": "HUB_REVISION", "me/gated": "HUB_GATED", "./no/folder": "NOT_FOUND",
    }  # fmt: skip
    assert fetch("me/private").is_dir()
    online(monkeypatch, models.url, tmp_path / "other", None)
    with pytest.raises(HubError) as caught:
        fetch("me/private")
    assert code_of(caught) == "HUB_NOT_FOUND"
    online(monkeypatch, "http://127.0.0.1:9", tmp_path / "other", None)
    with pytest.raises(HubError) as caught:
        fetch("me/base")
    assert code_of(caught) == "HUB_UNREACHABLE"


def test_a_rate_limit_that_lasts_and_a_server_that_is_down_are_told(
    models: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)
    models.fail("GET /api/models", Status(429, {"Retry-After": "17"}), times=99)
    with pytest.raises(HubError) as caught:
        fetch("me/base")
    assert code_of(caught) == "HUB_RATE_LIMIT"
    assert "17 seconds" in str(caught.value)
    models.rules.clear()
    models.fail("GET /api/models", Status(500), times=99)
    with pytest.raises(HubError) as caught:
        fetch("me/base")
    assert code_of(caught) == "HUB_SERVER"


def test_a_full_disk_is_told_before_and_when_it_happens(models: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import shutil

    room = shutil.disk_usage("/")._replace(free=100)
    with monkeypatch.context() as small:
        small.setattr("paft_merge.hub.pulling.shutil.disk_usage", lambda _: room)
        models.requests.clear()
        with pytest.raises(HubError) as caught:
            fetch("me/tuned")
    assert code_of(caught) == "DISK"
    assert models.count("/cdn/") == 0

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "blobs/x")

    with monkeypatch.context() as broken:
        broken.setattr("huggingface_hub.file_download._chmod_and_move", full)
        with pytest.raises(HubError) as caught:
            fetch("me/tuned")
    assert code_of(caught) == "DISK"
    assert [file.name for file in resolve("me/tuned").missing] == ["model.safetensors"]


# --- headers first ----------------------------------------------------------------------------------------------------


def test_a_plan_from_headers_fetches_no_weights(models: HubServer) -> None:
    with paft_merge.open_plan(RECIPE, stream_from_hub=True) as plan:
        assert len(plan.tensors) == len(random_state(0))
        assert plan.bytes_written > 10_000
    ranged = [r for r in models.requests if r.path.startswith("/cdn/")]
    assert len(ranged) == 5
    assert all(r.range for r in ranged)
    assert not any(r.token for r in ranged), "another host has seen the token"


def test_a_wrong_shape_is_found_before_any_weight_is_fetched(models: HubServer, tmp_path: Path) -> None:
    wrong = {**random_state(0), "lm_head.weight": torch.zeros(41, 24)}
    models.add("me/wrong", files_of(save_checkpoint(tmp_path / "wrong", wrong)))
    recipe = json.loads(json.dumps(RECIPE).replace("me/tuned", "me/wrong"))
    with pytest.raises(PaftMergeError, match=r"lm_head\.weight"):
        paft_merge.merge(recipe, tmp_path / "out")
    assert all(r.range for r in models.requests if r.path.startswith("/cdn/"))
    assert not (tmp_path / "out.part").exists()


def test_a_place_that_cannot_be_written_is_told_before_any_weight_is_fetched(models: HubServer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(RECIPE, tmp_path / "out")
    assert code_of(caught) == "OUTPUT"
    assert all(r.range for r in models.requests if r.path.startswith("/cdn/"))


def test_room_for_cache_and_output_is_counted_together(
    models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    with paft_merge.open_plan(RECIPE, stream_from_hub=True) as plan:
        needed = plan.bytes_written
    room = shutil.disk_usage("/")._replace(free=needed + 1000)
    monkeypatch.setattr("paft_merge.hub.pulling.shutil.disk_usage", lambda _: room)
    with pytest.raises(HubError) as caught:
        paft_merge.merge(RECIPE, tmp_path / "out")
    assert code_of(caught) == "DISK"
    assert "stream_from_hub=True" in str(caught.value)


@pytest.mark.parametrize("output", [{"kind": "adapter", "rank": 3}, {"kind": "delta"}])
def test_an_adapter_of_adapters_needs_no_weights_of_the_base(
    output: dict[str, object], models: HubServer, tmp_path: Path
) -> None:
    recipe = {**RECIPE, "models": RECIPE["models"][1:], "output": output}
    out = paft_merge.merge(recipe, tmp_path / "out").path
    assert [path.name for path in (tmp_path / "home").rglob("*.safetensors")] == ["adapter_model.safetensors"]
    local = json.loads(json.dumps(recipe).replace("me/", f"{tmp_path}/made/"))
    assert weights(paft_merge.merge(local, tmp_path / "twin").path) == weights(out)
    assert paft_merge.reproduce(out).identical
    with paft_merge.open_plan(recipe, stream_from_hub=True) as plan:
        assert plan.bytes_on_hub == 0


# --- streaming --------------------------------------------------------------------------------------------------------


def test_a_streamed_merge_has_the_same_bytes_and_stores_no_input(models: HubServer, tmp_path: Path) -> None:
    out = paft_merge.merge(RECIPE, tmp_path / "out", stream_from_hub=True).path
    assert weights(out) == local_twin(tmp_path)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    stored = list((tmp_path / "home").rglob("blobs/*"))
    assert max(p.stat().st_size for p in stored) < 5000
    manifest = json.loads((out / "merge_manifest.json").read_text())
    commit = models.repositories["me/base"].branches["main"]
    assert {"path": "me/base", "revision": None, "kind": "model", "repo_id": "me/base", "commit": commit}.items() <= (
        manifest["sources"][0].items()
    )


@pytest.mark.parametrize(
    "fault",
    [
        Truncate(1500), Truncate(700, reset=True), Status(503), Status(500), Status(429, {"Retry-After": "0"}),
        Status(403),
    ],
    ids=["cut", "reset", "503", "500", "429", "expired"],
)  # fmt: skip
def test_a_stream_goes_on_where_it_broke(
    models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: object
) -> None:
    monkeypatch.setattr("paft_merge.stores.windows._HEAD_BYTES", 2000)
    monkeypatch.setattr("paft_merge.hub.ranges.WINDOW_BYTES", 4096)
    with paft_merge.open_plan(RECIPE, stream_from_hub=True):
        pass
    # The first request of each of the 5 files reads its head; what comes next breaks four times.
    models.requests.clear()
    models.fail(r"GET /cdn/", Lie(), times=5)
    models.fail(r"GET /cdn/", fault, times=4)  # type: ignore[arg-type]
    assert weights(paft_merge.merge(RECIPE, tmp_path / "out", stream_from_hub=True).path) == local_twin(tmp_path)
    assert not [rule for rule in models.rules if rule.times]
    if isinstance(fault, Truncate):
        starts = [int((r.range or "=0-").split("=")[1].split("-")[0]) for r in models.requests if "/cdn/" in r.path]
        assert any(start % 4096 == fault.after for start in starts), "it begins again instead of going on"


def test_any_piece_read_from_any_thread_is_what_the_file_has(models: HubServer) -> None:
    import random
    from concurrent.futures import ThreadPoolExecutor

    from paft_merge.hub.ranges import Remote
    from paft_merge.stores import Windows

    whole = models.files("me/tuned")["model.safetensors"]
    seen = resolve("me/tuned", kind="model")
    with Remote.open([seen]) as remote:
        file = remote.files(seen)["model.safetensors"]
        assert "hf_writer" not in repr(file)
        file._head, file.windows = b"", Windows(16 * 1000, 1000)

        def piece(seed: int) -> bool:
            drawn = random.Random(seed)
            start, size = drawn.randrange(len(whole)), drawn.choice([1, 37, 900, 3000, 9000])
            held = bytearray(size)
            count = file.read(memoryview(held), start)
            return held[:count] == whole[start : start + size] and count == min(size, len(whole) - start)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(piece, range(150)))
        assert piece(150)
        assert len(file.windows._held) <= 16
        file.windows.close()


def test_a_server_that_names_the_wait_is_obeyed(models: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from paft_merge.hub.ranges import Remote

    waits: list[float] = []
    monkeypatch.setattr("paft_merge.hub.ranges.time.sleep", waits.append)
    models.fail("GET .*/resolve/.*safetensors", Status(429, {"Retry-After": "7"}), times=2)
    with Remote.open([resolve("me/tuned", kind="model")]):
        pass
    assert waits == [7.0, 7.0]


@pytest.mark.parametrize(
    ("where", "lie"),
    [
        ("GET .*/resolve/.*safetensors", Lie(headers={"X-Linked-Etag": '"' + "0" * 64 + '"'})),
        ("GET .*/resolve/.*safetensors", Lie(headers={"X-Repo-Commit": "f" * 40})),
        ("GET /cdn/", Lie(headers={"Content-Range": "bytes 0-99/123456"})),
    ],
    ids=["etag", "commit", "length"],
)
def test_another_file_than_was_listed_is_an_error(models: HubServer, tmp_path: Path, where: str, lie: Lie) -> None:
    models.fail(where, lie, times=99)
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(RECIPE, tmp_path / "out", stream_from_hub=True)
    assert code_of(caught) == "HUB_CHANGED"
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_midway_is_an_error_and_never_a_mix(
    models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paft_merge.stores.windows._HEAD_BYTES", 2000)
    monkeypatch.setattr("paft_merge.hub.ranges.WINDOW_BYTES", 4096)
    models.fail("GET /cdn/", Lie(), times=8)
    models.fail("GET /cdn/", Lie(headers={"ETag": '"cdn-other"'}), times=99)
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(RECIPE, tmp_path / "out", stream_from_hub=True)
    assert code_of(caught) == "HUB_CHANGED"
    assert not (tmp_path / "out").exists()


def test_a_server_without_ranges_and_one_that_stays_broken_are_told(
    models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paft_merge.stores.windows._HEAD_BYTES", 2000)
    models.fail("GET /cdn/", Lie(ignore_range=True), times=999)
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(RECIPE, tmp_path / "out", stream_from_hub=True)
    assert code_of(caught) == "HUB_RANGES"
    models.rules.clear()
    models.fail("GET /cdn/", Status(503), times=999)
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(RECIPE, tmp_path / "out", stream_from_hub=True)
    assert code_of(caught) == "HUB_SERVER"
    assert not (tmp_path / "out").exists()


def test_what_the_cache_has_is_streamed_from_there(models: HubServer, tmp_path: Path) -> None:
    fetch("me/base", kind="model")
    models.requests.clear()
    paft_merge.merge(RECIPE, tmp_path / "out", stream_from_hub=True)
    assert not models.count("me/base")


def test_a_pickle_is_fetched_only_where_it_is_asked_for(models: HubServer, tmp_path: Path) -> None:
    state = random_state(0)
    torch.save(state, tmp_path / "pytorch_model.bin")
    models.add("me/bin", {"config.json": b"{}", "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    assert set(files_of(fetch("me/bin"))) == {"config.json"}
    for ref, code in (("me/bin", "PICKLE_REFUSED"), ("me/sft", "CHECKPOINT_MISSING")):
        recipe = json.loads(json.dumps(RECIPE).replace("me/tuned", ref))
        with pytest.raises(PaftMergeError) as caught:
            paft_merge.merge(recipe, tmp_path / "out")
        assert code_of(caught) == code
        assert not models.count("GET /cdn/.*pytorch_model")
    assert "holds an adapter and no checkpoint; write " in str(caught.value)
    recipe = json.loads(json.dumps(RECIPE).replace("me/tuned", "me/bin"))
    with paft_merge.open_plan(recipe, stream_from_hub=True, lazy_unpickle=True) as plan:
        assert "pytorch_model.bin" in {f.name for m in plan.models for f in m.checkpoint.files}
    assert set(files_of(fetch("me/bin", unpickle=True))) == {"config.json", "pytorch_model.bin"}


def test_load_file_reads_what_was_pulled(models: HubServer) -> None:
    read = load_file(fetch("me/tuned") / "model.safetensors")
    assert torch.equal(read["lm_head.weight"], near(random_state(0), 1)["lm_head.weight"])


# --- beside the weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream_from_hub", [False, True])
def test_folders_and_modules_of_a_repository_are_pulled_and_merged(
    hub: HubServer, tmp_path: Path, stream_from_hub: bool
) -> None:
    made = tmp_path / "made"
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    for seed, name in enumerate(("base", "tuned")):
        hub.add(f"me/{name}", files_of(save_checkpoint(made / name, random_state(seed))))
        save_file({"linear.weight": torch.full((2, 3), float(seed))}, tmp_path / "dense.safetensors")
        hub.add(f"me/{name}", {
            "modules.json": json.dumps(modules).encode(), "1_Pooling/config.json": b"{}", "2_Dense/config.json": b"{}",
            "2_Dense/model.safetensors": (tmp_path / "dense.safetensors").read_bytes(), "spk_dict.pt": b"voice",
            "checkpoint-5/tokenizer.json": b"{}", "onnx/model.onnx": b"o" * 500, "voices/a.wav": b"v" * 500,
        })  # fmt: skip
    told: list[Problem] = []
    models = [{"model": "me/tuned", "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": "me/base", "models": models}
    out = tmp_path / "out"
    paft_merge.merge(recipe, out, stream_from_hub=stream_from_hub, warn=told.extend)
    assert load_file(out / "2_Dense/model.safetensors")["linear.weight"].tolist() == [[0.5] * 3] * 2
    kept = {"1_Pooling/config.json": b"{}", "spk_dict.pt": b"voice", "voices/a.wav": b"v" * 500}
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert not {"checkpoint-5/tokenizer.json", "onnx/model.onnx"} & fetched(hub)
    assert [p.what for p in told if p.code == "SIDE_FILES"] == [
        "the merge neither merges nor copies 'onnx/', other forms of its weights"
    ]


def test_trained_weights_beside_an_adapter_on_the_hub_stop_a_merge_unread(models: HubServer) -> None:
    models.add("me/sft", {"value_head.safetensors": b"h" * 500})
    with pytest.raises(PaftMergeError, match="value_head"), paft_merge.open_plan(RECIPE, stream_from_hub=True):
        pass
    assert "value_head.safetensors" not in fetched(models)
