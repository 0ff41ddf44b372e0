"""An output at a URL: the files of a local merge, finished by its manifest alone, resumed and replaced without a local trace."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from toys.merge import HERE, files_of, manifest_of, paft, paft_process, recipe
from toys.object_store import S3, Fault, s3, server
from toys.stores import models, ties

import paft_merge
from paft_merge.errors import PaftMergeError
from paft_merge.stores import Store

__all__ = ["models", "s3", "server"]

OUT = "s3://bkt/out"
SMALL: dict[str, Any] = {"out_shard_bytes": 5_000}
"""Options that make several files."""


def same(made: dict[str, bytes], local: Path) -> bool:
    """Whether files are those of a local merge; recipe and inputs are named by their places in manifest and card."""
    ours, theirs = dict(made), files_of(local)
    one, two = json.loads(ours.pop("merge_manifest.json")), manifest_of(local)
    theirs.pop("merge_manifest.json")
    ours.pop("README.md"), theirs.pop("README.md")
    places = ("recipe", "recipe_text", "sources", "inputs", "donor", "totals", "pairs", "tensors", "warnings")
    digests = {name: entry["digest"] for name, entry in one["tensors"].items()}
    assert digests == {name: entry["digest"] for name, entry in two["tensors"].items()}
    return ours == theirs and {k: v for k, v in one.items() if k not in places} == {
        k: v for k, v in two.items() if k not in places
    }


def test_a_merge_into_a_bucket_is_that_into_a_folder(models: S3, tmp_path: Path) -> None:
    local = paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", **SMALL)
    far = paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL, scratch=tmp_path)
    assert same(models.files("bkt", "out"), tmp_path / "local")
    assert far.manifest["tensors"].keys() == local.manifest["tensors"].keys()
    assert not list(tmp_path.glob("paft-*"))


FAULTS = [
    Fault("PUT", "out/model-00002", 500, times=2),
    Fault("PUT", "out/merge_manifest", 503, times=3),
    Fault("PUT", "out/model-00003", "reset", times=2),
    Fault("DELETE", "out/", 500, times=2),
    Fault("HEAD", "out/", 500, times=2),
]


def test_passing_failures_of_an_output_are_tried_again(models: S3, tmp_path: Path) -> None:
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", **SMALL)
    models.faults += FAULTS
    paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL, scratch=tmp_path)
    assert models.faults == []
    assert same(models.files("bkt", "out"), tmp_path / "local")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of an upload that are smaller than S3 allows, so that small files have many."""
    monkeypatch.setattr("paft_merge.stores.store._PART_BYTES", 4000)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("how", [500, "reset"])
def test_a_part_that_fails_is_sent_again(
    how: int | str, models: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    models.faults.append(Fault("PUT", "partNumber=2", how))
    paft_merge.merge(ties("s3://bkt/m"), OUT, scratch=tmp_path)
    assert any("partNumber=3" in asked for asked in models.seen)
    assert models.faults == []
    assert same(models.files("bkt", "out"), tmp_path / "local")
    with models.quiet() as client:
        assert "Uploads" not in client.list_multipart_uploads(Bucket="bkt")


def test_a_store_that_keeps_other_bytes_is_noticed(models: S3, tmp_path: Path) -> None:
    def spoil() -> None:
        with models.quiet() as client:
            client.put_object(Bucket="bkt", Key="out/model-00001-of-00003.safetensors", Body=b"x" * 11184)

    # The first question about a file follows its upload.
    models.faults.append(Fault("HEAD", "out/model-00001", 200, times=9, call=spoil))
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(ties("s3://bkt/m"), OUT, scratch=tmp_path)
    assert caught.value.problems[0].code == "STORE_CORRUPT"
    assert "merge_manifest.json" not in models.files("bkt", "out")


def test_a_bucket_whose_tags_are_no_md5(models: S3, tmp_path: Path) -> None:
    models.faults.append(Fault("HEAD", "out/", "other tag", times=2))
    store, file = Store(OUT), tmp_path / "x" / "config.json"
    assert [store.upload(name, file).etag for name in "ab"] == ["a" * 32] * 2
    assert [asked for asked in models.seen if asked.startswith("GET")] == ["GET /bkt/out/a?"]  # read back once


def cut(models: S3, after: int, place: str = "s3://bkt/m", **options: Any) -> None:
    """Start a merge whose store refuses every write after so many."""
    fault = Fault("PUT", "/out/", 403, times=10_000, after=after)
    models.faults.append(fault)
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(ties(place), OUT, **SMALL, **options)
    assert caught.value.problems[0].code == "STORE_DENIED"
    models.faults.clear()


@pytest.mark.parametrize("after", [0, 2, 16, 19])
def test_nothing_looks_whole_until_the_manifest_and_resume_continues(after: int, models: S3, tmp_path: Path) -> None:
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", **SMALL)
    cut(models, after)
    held = models.files("bkt", "out")
    assert "merge_manifest.json" not in held
    if held:
        with pytest.raises(PaftMergeError, match="is the output of a merge that did not finish"):
            paft_merge.merge(recipe("linear", None, (OUT, {"weight": 1.0})), tmp_path / "never")
    models.seen.clear()
    paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL, resume=True)
    assert same(models.files("bkt", "out"), tmp_path / "local")
    kept = {name for name in held if f".paft.part/{name}.json" in held}
    sent = {asked.split("/out/")[1].rstrip("?") for asked in models.seen if asked.startswith("PUT /bkt/out/model-0")}
    assert kept.isdisjoint(sent)


def test_an_unfinished_merge_is_started_over_or_refused(models: S3, tmp_path: Path) -> None:
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", **SMALL)
    cut(models, 6)
    other = ties("s3://bkt/m") | {"out_dtype": "float16"}
    with pytest.raises(PaftMergeError, match="was started with another"):
        paft_merge.merge(other, OUT, **SMALL, resume=True)
    assert "merge_state.json" in models.files("bkt", "out")
    paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL)
    assert same(models.files("bkt", "out"), tmp_path / "local")


def test_a_file_that_was_changed_since_its_upload_is_merged_again(models: S3, tmp_path: Path) -> None:
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", **SMALL)
    cut(models, 8)
    held = models.files("bkt", "out")
    first = min(name for name in held if name.startswith("model-"))
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key=f"out/{first}", Body=held[first][:-1] + b"?")
    paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL, resume=True)
    assert same(models.files("bkt", "out"), tmp_path / "local")


def test_a_finished_merge_stays_and_is_replaced_on_request(models: S3, tmp_path: Path) -> None:
    place = ties("s3://bkt/m")
    paft_merge.merge(place, OUT, **SMALL)
    before = models.files("bkt", "out")
    with pytest.raises(PaftMergeError, match="exists and is not empty"):
        paft_merge.merge(place, OUT)
    models.seen.clear()
    paft_merge.merge(place, OUT, **SMALL, resume=True)
    assert not [asked for asked in models.seen if asked.startswith("PUT")]
    assert models.files("bkt", "out") == before
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key="out/notes.txt", Body=b"mine")
    with pytest.raises(PaftMergeError, match=r"holds notes.txt, which no merge left there.*force=True"):
        paft_merge.merge(place, OUT, overwrite=True)
    assert models.files("bkt", "out") == before | {"notes.txt": b"mine"}
    with models.quiet() as client:
        client.delete_object(Bucket="bkt", Key="out/notes.txt")
    paft_merge.merge(place, OUT, overwrite=True)  # the files of the base: three, and no more
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    assert same(models.files("bkt", "out"), tmp_path / "local")


def test_a_model_that_no_merge_left_is_replaced_with_force_alone(models: S3, tmp_path: Path) -> None:
    (tmp_path / "x" / "notes.txt").write_text("mine")
    models.put("bkt", tmp_path / "x", "out/")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(PaftMergeError):
            paft_merge.merge(ties("s3://bkt/m"), OUT, **options)
    assert models.files("bkt", "out") == files_of(tmp_path / "x")
    paft_merge.merge(ties("s3://bkt/m"), OUT, overwrite=True, force=True)
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    assert same(models.files("bkt", "out"), tmp_path / "local")


@pytest.mark.parametrize("after", [1, 6])
def test_an_interrupted_replacement_is_no_model_and_resumes(after: int, models: S3, tmp_path: Path) -> None:
    paft_merge.merge(ties("s3://bkt/m"), OUT)
    models.faults.append(Fault("DELETE", "/out/", 403, times=1000, after=after))
    with pytest.raises(PaftMergeError):
        paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL, overwrite=True)
    models.faults.clear()
    assert {"merge_state.json"} <= models.files("bkt", "out").keys()
    assert "merge_manifest.json" not in models.files("bkt", "out")
    paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL, resume=True)
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", **SMALL)
    assert same(models.files("bkt", "out"), tmp_path / "local")


@pytest.mark.parametrize(
    "state", ['{"identity": []}', '{"identity": {"files": [1]}, "beside": 3, "replaces": {"a": 1}}', "[", "3"]
)
def test_a_state_that_no_merge_wrote_is_not_trusted(state: str, models: S3) -> None:
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key="out/merge_state.json", Body=state.encode())
        client.put_object(Bucket="bkt", Key="out/.paft.part/model.safetensors.json", Body=b"[1]\n2")
        client.put_object(Bucket="bkt", Key="out/notes.txt", Body=b"mine")
        for resume in (True, False):
            with pytest.raises(PaftMergeError, match="exists and is not empty"):
                paft_merge.merge(ties("s3://bkt/m"), OUT, resume=resume)
        client.delete_object(Bucket="bkt", Key="out/notes.txt")
    paft_merge.merge(ties("s3://bkt/m"), OUT, overwrite=True)
    assert not [name for name in models.files("bkt", "out") if "merge_state" in name or name.startswith(".paft")]


def test_a_second_merge_into_the_folder_stops_the_first(models: S3, tmp_path: Path) -> None:
    def intrude() -> None:
        state = {"run": "elsewhere:1:2", "identity": {"files": {}}}
        with models.quiet() as client:
            client.put_object(Bucket="bkt", Key="out/merge_state.json", Body=json.dumps(state).encode())

    models.faults.append(Fault("PUT", "out/model-00002", 200, call=intrude))
    with pytest.raises(PaftMergeError, match="another merge has begun since this one: elsewhere:1 writes there"):
        paft_merge.merge(ties("s3://bkt/m"), OUT, **SMALL)
    assert "merge_manifest.json" not in models.files("bkt", "out")


def test_a_file_that_is_replaced_after_its_upload_is_noticed(models: S3) -> None:
    def replaced() -> None:
        with models.quiet() as client:
            client.put_object(Bucket="bkt", Key="out/model-00001-of-00003.safetensors", Body=b"x")

    models.faults.append(Fault("PUT", "out/README", 200, call=replaced))
    with pytest.raises(PaftMergeError, match=r"model-00001-of-00003.safetensors was replaced since it was uploaded"):
        paft_merge.merge(ties("s3://bkt/m"), OUT)
    assert "merge_manifest.json" not in models.files("bkt", "out")


def test_two_merges_that_begin_together_are_not_both_let_in(models: S3) -> None:
    def intrude() -> None:
        with models.quiet() as client:
            client.put_object(Bucket="bkt", Key="out/merge_state.json", Body=b'{"run": "elsewhere:1:2"}')

    models.faults.append(Fault("PUT", "out/merge_state", 200, call=intrude))
    with pytest.raises(PaftMergeError, match="another merge has begun"):
        paft_merge.merge(ties("s3://bkt/m"), OUT)


def test_a_store_without_conditional_writes(models: S3) -> None:
    models.faults.append(Fault("PUT", "out/merge_state", 501))
    paft_merge.merge(ties("s3://bkt/m"), OUT)
    assert models.faults == []
    assert "merge_manifest.json" in models.files("bkt", "out")


PLACES = {
    "s3://bkt/m/base": "is, contains or is inside the input",
    "s3://bkt/m": "is, contains or is inside the input",
    "s3://bkt/m/base/deep": "is, contains or is inside the input",
    "s3://bkt/m/./sft/": "is, contains or is inside the input",
    "s3://bkt": "is a whole bucket",
    "s3://nobucket/out": "the bucket does not exist",
    "s3://key:hunter2@bkt/out": "has credentials or a query in it",
    "s3:/bkt/out": "is neither a URL nor a folder",
    "s3://bkt/out.part": "cannot be the name of a model",
    "http://bkt/out": "is not an address in an object store",
    "gs://bkt/out": "a package for this store is missing",
}


@pytest.mark.parametrize("out", PLACES)
def test_a_place_that_cannot_be_written_is_one_line(out: str, models: S3, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(ties("s3://bkt/m")))
    ran = paft("merge", tmp_path / "r.yaml", out)
    assert ran.exit_code == 1
    assert PLACES[out] in ran.output
    assert "Traceback" not in ran.output
    assert "hunter2" not in ran.output
    assert models.files("bkt", "m").keys() >= {"base/config.json"}
    assert models.files("bkt", "out") == {}


def test_workers_need_a_shared_folder(models: S3) -> None:
    with pytest.raises(PaftMergeError, match="workers share a folder of a file system"):
        paft_merge.merge(ties("s3://bkt/m"), OUT, worker="0/2")


def test_a_full_scratch_is_one_line(models: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("paft_merge.output.stored.shutil.disk_usage", lambda _: room)
    with pytest.raises(
        PaftMergeError, match=r"bytes are needed for one file before it is uploaded, and 1,000 are free"
    ):
        paft_merge.merge(ties("s3://bkt/m"), OUT, scratch=tmp_path)
    with pytest.raises(PaftMergeError, match="is not a folder that can be written to"):
        paft_merge.merge(ties("s3://bkt/m"), OUT, scratch=tmp_path / "none")
    assert models.files("bkt", "out") == {}


def test_the_output_is_audited_reproduced_and_gets_its_card(models: S3, tmp_path: Path) -> None:
    paft_merge.merge(ties("s3://bkt/m"), OUT)
    before = models.files("bkt", "out")
    assert paft("audit", OUT).exit_code == 0
    again = paft("reproduce", OUT)
    assert again.exit_code == 0, again.output
    assert "identical" in again.output
    assert paft("reproduce", OUT, "s3://bkt/again").exit_code == 0
    assert models.files("bkt", "again").keys() == before.keys()
    assert paft("card", OUT, "--overwrite").exit_code == 0
    assert models.files("bkt", "out")["README.md"]
    with models.quiet() as client:
        name = "out/model-00001-of-00003.safetensors"
        client.put_object(Bucket="bkt", Key=name, Body=before[name.removeprefix("out/")][:-1] + b"?")
    assert "its bytes differ from those that the merge wrote" in paft("audit", OUT).output
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key="m/x/model-00001-of-00003.safetensors", Body=before[name[4:]])
    refused = paft("reproduce", OUT)
    assert refused.exit_code == 1
    assert "is not the source that was merged" in refused.output


KILLED = """if True:
    import os, signal, threading, s3fs
    put = s3fs.S3FileSystem._call_s3
    left = [int(os.environ["PUTS"])]
    async def counted(self, method, *given, **named):
        if method in ("put_object", "delete_object"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return await put(self, method, *given, **named)
    s3fs.S3FileSystem._call_s3 = counted
"""


@pytest.mark.parametrize("puts", [9, 21])
def test_a_killed_merge_resumes_in_another_process(puts: int, models: S3, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(ties("s3://bkt/m")))
    command = ["merge", tmp_path / "r.yaml", OUT, "--out-shard-size", "5k", "--scratch", tmp_path]
    killed = paft_process(*command, before=KILLED, PUTS=str(puts))
    assert killed.returncode == -9, killed.stderr
    held = models.files("bkt", "out")
    assert ("merge_manifest.json" in held) == (puts > 20)  # killed when the marks of an unfinished merge are removed
    assert "merge_state.json" in held
    assert list(tmp_path.glob("paft-*.part"))
    assert paft(*command, "--resume").exit_code == 0
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", **SMALL)
    assert same(models.files("bkt", "out"), tmp_path / "local")
    assert "merge_state.json" not in models.files("bkt", "out")
    assert not list(tmp_path.glob("paft-*"))


def test_adapters_results_and_global_thresholds(models: S3, tmp_path: Path) -> None:
    def several(place: str) -> str:
        one = ties(place) | {"name": "one"}
        two = recipe(
            "ties",
            f"{place}/base",
            (f"{place}/x", {"weight": "equal_norm"}),
            parameters={"trim_scope": "global", "density": 0.3},
        )
        return "\n---\n".join(json.dumps(document) for document in (one, two | {"name": "two"}))

    far = paft_merge.merge(several("s3://bkt/m"), OUT, **SMALL)
    paft_merge.merge(several(str(tmp_path)), tmp_path / "local", **SMALL)
    for name in ("one", "two"):
        assert same(models.files("bkt", f"out/{name}"), tmp_path / "local" / name)
    assert far.results["two"].manifest["complete"]
    assert str(far.results["two"]) == f"{OUT}/two"


def test_the_example_of_the_documentation(models: S3, tmp_path: Path) -> None:
    with models.quiet() as client:
        client.put_object(Bucket="bkt", Key="m/recipe.yaml", Body=json.dumps(ties(".")).encode())
    page = (Path(HERE) / "docs" / "scale.md").read_text()
    (example,) = [text for text in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "s3://" in text]
    lines = [line for line in example.splitlines() if line.startswith("paft ")]
    assert len(lines) == 2
    for line in lines:
        line = line.replace("s3://models/recipe", "s3://bkt/m/recipe").replace("s3://models/merged", OUT)
        ran = paft(*shlex.split(line.replace("--scratch /tmp", f"--scratch {tmp_path}"))[1:])
        assert ran.exit_code == 0, ran.output
    paft_merge.merge(ties(str(tmp_path)), tmp_path / "local", out_shard_bytes="5GB")
    assert same(models.files("bkt", "out"), tmp_path / "local")
