"""Pushing: one commit, checked before, resumed, and nothing half."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import random_state, save_adapter, save_checkpoint
from toys.hub import UPLOADS, files_of, hub, online
from toys.hub_server import READER, HubServer, Status

import paft_merge
from paft_merge.errors import HubError, PaftMergeError
from paft_merge.hub import push

__all__ = ["hub"]
pytestmark = UPLOADS


def merged(family: Callable[..., dict[str, Path]], tmp_path: Path) -> Path:
    places = family()
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(places["base"]),
        "models": [{"model": f"{places['base']}+{places['sft']}", "parameters": {"weight": 0.5}}],
    }
    return paft_merge.merge(recipe, tmp_path / "merged").path


def code_of(caught: pytest.ExceptionInfo[PaftMergeError]) -> str:
    return caught.value.problems[0].code


def test_a_merge_arrives_whole_in_one_commit(
    hub: HubServer, family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    folder = merged(family, tmp_path)
    url = push(folder, "me/merged", private=True, message="Half of it", tags=["v1"])
    repository = hub.repositories["me/merged"]
    assert url == f"{hub.url}/me/merged/commit/{repository.branches['main']}"
    assert {n: c for n, c in hub.files("me/merged").items() if n != ".gitattributes"} == files_of(folder)
    assert len(repository.commits) == 2
    assert repository.messages[repository.tags["v1"]] == "Half of it"
    assert repository.tags["v1"] == repository.branches["main"]
    assert repository.private


def test_a_merged_adapter_arrives_with_a_card_of_its_sources_rank_and_error(
    hub: HubServer, family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    """It replaces an adapter with other factors, of which nothing is left."""
    f = family()
    models = [{"model": f"{f['base']}+{f[name]}", "parameters": {"weight": 0.5}} for name in ("sft", "dpo")]
    recipe = {"merge_method": "ties", "base_model": str(f["base"]), "models": models, "parameters": {"density": 0.5}}
    paft_merge.merge({**recipe, "output": {"kind": "adapter", "rank": 5}}, tmp_path / "out")
    made = paft_merge.merge({**recipe, "output": {"kind": "adapter", "rank": 2}}, tmp_path / "out", overwrite=True)
    push(made.path, "me/adapter")
    files = hub.files("me/adapter")
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == files_of(made.path)
    assert json.loads(files["adapter_config.json"])["r"] == 2
    card = files["README.md"].decode()
    for said in ("LoRA of rank 2", f"relative error of {made.error:.3g}", "ties", str(f["sft"]), str(f["dpo"])):
        assert said in card


def test_a_second_push_uploads_and_commits_nothing(hub: HubServer, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", random_state(1), shards=3)
    first = push(folder, "me/m")
    hub.requests.clear()
    assert push(folder, "me/m") == first
    assert hub.count("PUT ") == 0
    assert hub.count("/commit/") == 0


@pytest.mark.parametrize(
    ("where", "status"), [("PUT /lfs/", 400), ("POST .*/commit/", 400), ("POST .*/commit/", 500)], ids=str
)
def test_a_push_that_breaks_changes_nothing_and_goes_on(
    hub: HubServer, tmp_path: Path, where: str, status: int
) -> None:
    folder = save_checkpoint(tmp_path / "m", random_state(1), shards=3)
    push(save_checkpoint(tmp_path / "old", random_state(2)), "me/m")
    before = dict(hub.files("me/m"))
    hub.requests.clear()
    hub.fail(where, Status(status), times=1)
    with pytest.raises(HubError) as caught:
        push(folder, "me/m")
    assert "me/m" in str(caught.value)
    assert hub.files("me/m") == before
    uploaded = hub.count("PUT /lfs/") - ("PUT" in where)  # after a failed upload, those that wait are not begun
    hub.requests.clear()
    push(folder, "me/m")
    assert hub.count("PUT /lfs/") == 3 - uploaded
    assert "PUT" in where or uploaded == 3
    # The old model's single file would contradict the new index.
    assert "model.safetensors" not in hub.files("me/m")
    assert {n for n in hub.files("me/m") if n != ".gitattributes"} == set(files_of(folder))


def test_trouble_that_passes_is_not_seen(hub: HubServer, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", random_state(1))
    hub.fail("PUT /lfs/", Status(503), times=1)
    hub.fail("POST .*/preupload/", Status(429, {"Retry-After": "0"}), times=1)
    push(folder, "me/m")
    assert "model.safetensors" in hub.files("me/m")


def test_a_push_through_xet_is_one_commit_too(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    (tmp_path / "cas").mkdir()
    hub.xet = str(tmp_path / "cas")
    folder = save_checkpoint(tmp_path / "m", random_state(1), shards=3)
    push(folder, "me/m")
    assert set(hub.files("me/m")) == {".gitattributes", *files_of(folder)}
    assert len(hub.repositories["me/m"].commits) == 2
    assert hub.count("PUT /lfs/") == 0
    assert hub.count("xet-write-token") >= 1


def test_a_pull_request_and_a_branch_leave_main_alone(hub: HubServer, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", random_state(1), 2)
    head = hub.add("me/m", {"README.md": b"mine"})
    assert push(folder, "me/m", create_pr=True).endswith("/me/m/discussions/1")
    assert set(hub.files("me/m", "refs/pr/1")) == {"README.md", *files_of(folder)}
    push(folder, "me/m", branch="next")
    assert hub.files("me/m", "next") == hub.files("me/m", "refs/pr/1")
    assert hub.repositories["me/m"].branches["main"] == head


def test_somebody_elses_commit_in_between_is_a_conflict(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    folder = save_adapter(tmp_path / "a", random_state(1), 2)
    hub.add("me/m", {"README.md": b"mine"})
    before = HfApi.preupload_lfs_files

    def meanwhile(self: HfApi, *args: object, **kwargs: object) -> None:
        before(self, *args, **kwargs)
        hub.add("me/m", {"README.md": b"theirs"})

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(HubError) as caught:
        push(folder, "me/m")
    assert code_of(caught) == "HUB_CONFLICT"
    assert set(hub.files("me/m")) == {"README.md"}


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda f: (f / "merge_state.json").write_text("{}"), "PUSH_INCOMPLETE"),
        (lambda f: _edit(f, complete=False), "PUSH_INCOMPLETE"),
        (lambda f: _flip(f / "model.safetensors"), "PUSH_CHANGED"),
        (lambda f: (f / "notes.md").write_text("use hf_" + "aB3" * 12), "PUSH_SECRET"),
        (lambda f: (f / "notes.md").write_text("the token is hf_writer"), "PUSH_SECRET"),
    ],
)
def test_what_should_not_be_seen_is_refused(
    hub: HubServer, family: Callable[..., dict[str, Path]], tmp_path: Path, spoil: Callable[[Path], object], code: str
) -> None:
    folder = merged(family, tmp_path)
    spoil(folder)
    with pytest.raises(HubError) as caught:
        push(folder, "me/merged")
    assert code_of(caught) == code
    assert hub.requests == []


def _edit(folder: Path, **fields: object) -> None:
    path = folder / "merge_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)


def test_folders_that_are_nothing_are_refused(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.part").mkdir()
    codes = []
    for name in ("none", "empty", "m.part"):
        with pytest.raises(HubError) as caught:
            push(tmp_path / name, "me/m")
        codes.append(code_of(caught))
    assert codes == ["PUSH_FOLDER", "PUSH_FOLDER", "PUSH_INCOMPLETE"]
    broken = save_checkpoint(tmp_path / "broken", random_state(1), shards=2)
    next(broken.glob("*-00002-*")).unlink()
    with pytest.raises(PaftMergeError) as torn:
        push(broken, "me/m")
    assert code_of(torn) == "SHARD_MISSING"


def test_a_report_is_sent_as_it_is(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    (folder / "plots").mkdir(parents=True)
    (folder / "audit.html").write_text("<html></html>")
    (folder / "plots" / "cdf.png").write_bytes(b"\x89PNG")
    (folder / ".secret").write_text("mine")
    push(folder, "me/report")
    assert set(hub.files("me/report")) == {".gitattributes", "audit.html", "plots/cdf.png"}


def test_who_may_not_write_is_told_so(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(tmp_path / "a", random_state(1), 2)
    hub.add("me/m", {"README.md": b"mine"})
    hub.add("me/old", {"README.md": b"mine"}, private=False)
    with pytest.raises(HubError) as caught:
        push(folder, "nobody/m")
    assert code_of(caught) == "HUB_FORBIDDEN"
    with pytest.raises(HubError) as caught:
        push(folder, "me/old", private=True)
    assert code_of(caught) == "HUB_VISIBILITY"
    hub.repositories["me/old"].tags["v1"] = hub.repositories["me/old"].branches["main"]
    with pytest.raises(HubError) as caught:
        push(folder, "me/old", tags=["v1"])
    assert code_of(caught) == "HUB_EXISTS"
    online(monkeypatch, hub.url, tmp_path / "home", READER)
    with pytest.raises(HubError) as caught:
        push(folder, "me/m")
    assert code_of(caught) == "HUB_FORBIDDEN"
    online(monkeypatch, hub.url, tmp_path / "home", None)
    with pytest.raises(HubError) as caught:
        push(folder, "me/m")
    assert code_of(caught) in ("HUB_LOGIN", "HUB_NOT_FOUND")
    assert set(hub.files("me/m")) == {"README.md"}


def test_offline_and_unreachable_are_told_as_such(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(tmp_path / "a", random_state(1), 2)
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
            push(folder, "me/m")
    assert code_of(caught) == "HUB_OFFLINE"
    online(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)
    with pytest.raises(HubError) as caught:
        push(folder, "me/m")
    assert code_of(caught) == "HUB_UNREACHABLE"


def test_metadata_that_the_hub_refuses_is_told_in_its_words(hub: HubServer, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", random_state(1), 2)
    (folder / "README.md").write_text("---\nbase_model: /here\n---\n")
    hub.metadata_faults = ['"base_model" with value "/here" is not valid']
    with pytest.raises(HubError, match='"base_model" with value "/here" is not valid') as caught:
        push(folder, "me/m")
    assert len(str(caught.value).splitlines()) == 1
    assert set(hub.files("me/m")) == {".gitattributes"}


def test_places_on_this_machine_in_a_card_are_told(
    hub: HubServer, family: Callable[..., dict[str, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(merged(family, tmp_path), "me/merged")
    assert "names a place on this machine" in caplog.text


def test_no_token_is_ever_in_a_message(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "abcdefgh" * 4
    online(monkeypatch, hub.url, tmp_path / "home", token)
    hub.fail(".*", Status(400, {"X-Error-Message": f"bad token {token}"}), times=9)
    with pytest.raises(HubError) as caught:
        push(save_adapter(tmp_path / "a", random_state(1), 2), "me/m")
    assert token not in str(caught.value)
