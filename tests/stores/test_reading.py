"""Models, adapters and recipes at a URL: read by ranges, equal to local ones, and every way in which a store fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys.merge import files_of, on, paft, recipe
from toys.object_store import S3, Fault, s3, server
from toys.stores import Family, models, ties

import paft_merge
from paft_merge.errors import PaftMergeError, Problem
from paft_merge.stores import Store

__all__ = ["models", "s3", "server"]


def weights(folder: Path) -> dict[str, bytes]:
    return {n: c for n, c in files_of(folder).items() if n.endswith((".safetensors", "config.json", "index.json"))}


def test_a_merge_of_models_in_a_bucket_is_that_of_local_ones(models: S3, tmp_path: Path) -> None:
    local = paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    far = paft_merge.merge(ties("s3://bkt/m"), tmp_path / "far")
    assert weights(far.path) == weights(local.path)
    etags = [file["etag"] for file in far.manifest["inputs"]["s3://bkt/m/base"]["checkpoint"]["files"].values()]
    assert len(etags) == 3
    assert all(etags)


BROKEN = [
    Fault("GET", "base/model-0000", 500, times=3),
    Fault("GET", "x/model", 503, times=2),
    Fault("GET", "x/model-0000", "reset", times=2, after=1),
    Fault("GET", "list-type", 500, times=2),
    Fault("GET", "adapter_model", "slow"),
]


def test_passing_failures_are_tried_again(models: S3, tmp_path: Path) -> None:
    local = paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    models.faults += BROKEN
    far = paft_merge.merge(ties("s3://bkt/m"), tmp_path / "far")
    assert models.faults == []
    assert weights(far.path) == weights(local.path)


def refused(place: Any, out: Path, **options: Any) -> list[Problem]:
    """The problems of a merge that cannot be done, none of which has several lines or a credential."""
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(place, out, **options)
    assert not any("\n" in str(p) or "hunter2" in str(p) or "Traceback" in str(p) for p in caught.value.problems)
    assert not (out / "config.json").exists() if isinstance(out, Path) else True
    return list(caught.value.problems)


def test_a_store_that_is_down_is_one_line(models: S3, tmp_path: Path) -> None:
    models.faults.append(Fault("GET", "list-type", 503, times=1000))
    (problem, *_) = refused(ties("s3://bkt/m"), tmp_path / "out")
    assert problem.code == "STORE_SERVER"
    assert "status 503" in problem.what
    assert problem.where == "s3://bkt/m/base"


REFUSED = {
    "s3://nobucket/base": ("STORE_NOT_FOUND", "the bucket does not exist"),
    "s3://bkt/m/nothing": ("STORE_NOT_FOUND", "there is no such folder or file"),
    "s3://bkt/m/base@main": ("STORE_URL", "an object store has no revisions"),
    "s3://": ("STORE_URL", "names no bucket"),
    "s3://bkt/../other": ("STORE_URL", "leaves its bucket"),
    "s3://key:hunter2@bkt/m/base": ("SECRET", "credentials"),
    "s3://bkt/m/base?X-Amz-Signature=hunter2": ("SECRET", "credentials"),
    "az://c/m?sv=1&sig=hunter2": ("SECRET", "credentials"),
    "https://example.com/base": ("STORE_URL", "is not an address in an object store"),
    "gs://bkt/base": ("STORE_PACKAGE", "is missing"),
    "abfss://box@account.dfs.core.windows.net/base": ("STORE_PACKAGE", "is missing"),
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_cannot_be_read_is_one_line(url: str, models: S3, tmp_path: Path) -> None:
    code, what = REFUSED[url]
    problems = refused(recipe("linear", None, (url, {"weight": 1.0})), tmp_path / "out")
    assert [problem.code for problem in problems] == [code]
    assert what in problems[0].what
    if code == "STORE_PACKAGE":
        assert "pip install 'paft-merge[" in problems[0].fix


def test_a_url_without_permission_is_one_line(models: S3, tmp_path: Path) -> None:
    models.faults.append(Fault("GET", "base/model-0000", 403, times=9))
    (problem,) = refused(ties("s3://bkt/m"), tmp_path / "out")
    assert problem.code == "STORE_DENIED"


def test_no_credentials_are_one_line(models: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    problems = refused(ties("s3://bkt/m"), tmp_path / "out")
    assert {problem.code for problem in problems} == {"STORE_CREDENTIALS"}
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("what", ["is replaced", "is cut", "is deleted"])
def test_a_file_that_changes_while_it_is_read_stops_the_merge(what: str, models: S3, tmp_path: Path) -> None:
    key = "m/x/model-00001-of-00003.safetensors"
    body = (tmp_path / "x" / "model-00001-of-00003.safetensors").read_bytes()

    def change() -> None:
        with models.quiet() as client:
            if what == "is deleted":
                client.delete_object(Bucket="bkt", Key=key)
                return
            changed = body[:-4] + b"abcd" if what == "is replaced" else body[:1000]
            client.put_object(Bucket="bkt", Key=key, Body=changed)

    # Read its header, then change it before the first range of its tensors.
    models.faults.append(Fault("GET", "model-0000", 200, after=6, call=change))
    with pytest.MonkeyPatch.context() as small:
        small.setattr("paft_merge.stores.windows._HEAD_BYTES", 2000)
        problems = refused(ties("s3://bkt/m"), tmp_path / "out")
    assert {problem.code for problem in problems} == {"INPUT_CHANGED"}
    assert all(problem.where.startswith("s3://bkt/m/x") or "/x/" in problem.where for problem in problems)


def test_a_recipe_at_a_url_names_models_beside_it(models: S3, tmp_path: Path) -> None:
    local = paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key="m/recipe.yaml", Body=json.dumps(ties(".")).encode())
        client.put_object(Bucket="bkt", Key="m/deep/recipe.yaml", Body=json.dumps(ties("..")).encode())
        client.put_object(Bucket="bkt", Key="m/bad.yaml", Body=b"merge_method: [\n")
        client.put_object(Bucket="bkt", Key="m/away.yaml", Body=json.dumps(ties("../../..")).encode())
    for name in ("recipe.yaml", "deep/recipe.yaml"):
        ran = paft("merge", f"s3://bkt/m/{name}", tmp_path / name / "out")
        assert ran.exit_code == 0, ran.output
        assert weights(tmp_path / name / "out") == weights(local.path)
    (problem, *_) = refused("s3://bkt/m/bad.yaml", tmp_path / "out")
    assert problem.where.startswith("s3://bkt/m/bad.yaml:")
    (problem, *_) = refused("s3://bkt/m/away.yaml", tmp_path / "out")
    assert (problem.code, problem.what) == ("STORE_URL", "leaves its bucket")
    (problem,) = refused("s3://bkt/m/none.yaml", tmp_path / "out")
    assert (problem.code, problem.where) == ("STORE_NOT_FOUND", "s3://bkt/m/none.yaml")


def test_what_the_bucket_holds_is_named_by_its_url(models: S3, tmp_path: Path) -> None:
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key="m/x/config.json", Body=b"{")
        client.put_object(Bucket="bkt", Key="part/model.safetensors", Body=b"x" * 100)
        client.put_object(Bucket="bkt", Key="part/merge_state.json", Body=b"{}")
        client.put_object(Bucket="bkt", Key="pickles/pytorch_model.bin", Body=b"x" * 100)
    (problem,) = refused(ties("s3://bkt/m"), tmp_path / "out")
    assert problem.where == "s3://bkt/m/x/config.json"
    (problem,) = refused(recipe("linear", None, ("s3://bkt/part", {"weight": 1.0})), tmp_path / "out")
    assert (problem.code, problem.where) == ("CHECKPOINT_UNFINISHED", "s3://bkt/part")
    (problem,) = refused(recipe("linear", None, ("s3://bkt/pickles", {"weight": 1.0})), tmp_path / "out")
    assert (problem.code, problem.where) == ("PICKLE_REFUSED", "s3://bkt/pickles")


_FETCH = Store.fetch


def small_only(store: Store, name: str, target: Path, size: int) -> None:
    """Download a file that does not hold weights."""
    assert not name.endswith(".safetensors")
    _FETCH(store, name, target, size)


def test_other_commands_read_urls(models: S3, tmp_path: Path) -> None:
    text = json.dumps(ties("s3://bkt/m"))
    (tmp_path / "r.yaml").write_text(text)
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key="r.yaml", Body=text.encode())
    for command in (
        ["merge", "--dry-run", tmp_path / "r.yaml", "s3://bkt/out"],
        ["merge", "--dry-run", "--json", tmp_path / "r.yaml", "s3://bkt/out"],
        ["explain", tmp_path / "r.yaml"],
        ["audit", tmp_path / "r.yaml"],
        ["audit", "s3://bkt/r.yaml"],
        ["explain", "s3://bkt/r.yaml"],
        ["audit", "s3://bkt/m/base+s3://bkt/m/sft"],
        ["audit", "s3://bkt/m/x", "--base", "s3://bkt/m/base"],
        ["audit", "s3://bkt/m/sft"],
    ):
        ran = paft(*command)
        assert ran.exit_code == 0, (command, ran.output)
    assert models.files("bkt", "out") == {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("paft_merge.stores.store.Store.fetch", small_only)
        far = json.dumps(paft_merge.audit("s3://bkt/m/x", base="s3://bkt/m/base").to_json())
    assert (
        json.loads(far.replace("s3://bkt/m", str(tmp_path)))
        == paft_merge.audit(tmp_path / "x", base=tmp_path / "base").to_json()
    )


def test_the_memory_of_fsspec_is_a_store(family: Family, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, folder in family(shards=3).items():
        memory.put(str(folder), f"/m/{name}", recursive=True)
    local = paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    far = paft_merge.merge(ties("memory://m"), "memory://out/merged")
    names = memory.find("/out/merged")
    assert {n.rpartition("/")[2]: memory.cat(n) for n in names if n.endswith(("safetensors", "config.json"))} == {
        name: held for name, held in weights(local.path).items() if not name.endswith("index.json")
    }
    assert paft_merge.reproduce(str(far.path)).identical
    memory.rm("/", recursive=True)


def test_one_file_of_tensors_is_a_model(models: S3, tmp_path: Path) -> None:
    given, name = {"weight": 1.0}, "model-00001-of-00003.safetensors"
    far, local = (
        paft_merge.merge(recipe("linear", None, *((f"{place}/{one}/{name}", given) for one in "xy")), tmp_path / out)
        for place, out in (("s3://bkt/m", "far"), (tmp_path, "local"))
    )
    assert list(weights(far.path).values()) == list(weights(local.path).values())


def test_the_checkpoints_of_a_run_in_a_bucket(models: S3, tmp_path: Path) -> None:
    for step in (100, 200):
        models.put("bkt", tmp_path / "x", f"run/checkpoint-{step}/")
    made = {"merge_method": "linear", "models": [{"model": "s3://bkt/run/checkpoint-*", "parameters": {"weight": 1.0}}]}
    merged = paft_merge.merge(made, tmp_path / "out")
    assert len(merged.plan.models) == 2


def test_commands_that_read_no_urls_say_so(models: S3, tmp_path: Path) -> None:
    base, sft = "s3://bkt/m/base", "s3://bkt/m/sft"
    run = {"base_model": base, "adapters": {"sft": {"path": sft}}, "merge": {"method": "ties"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    ran = paft("run", "--dry-run", tmp_path / "run.yaml", tmp_path / "out")
    assert f"{base} is a URL; copy it into a folder first" in ran.output
    assert f"{sft}: is a URL; copy it into a folder first" in ran.output
    pulled = paft("pull", on(base, sft))
    assert (pulled.exit_code, pulled.stdout) == (1, "")
    assert "merge it without pulling it" in pulled.stderr
    assert f"{base}: is a URL; copy it into a folder first" in paft("push", base, "me/x").output
    assert "is not an address in an object store" in paft("merge", "https://a/r.yaml", tmp_path / "out").output
    for command in ("card", "reproduce"):
        assert f"error[MANIFEST]: {base}/merge_manifest.json: no such file" in paft(command, base).output
