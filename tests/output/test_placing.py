"""Mount points, failed renames, finished folders that still hold a lock, and folders that are not ours."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import near, random_state, save_checkpoint
from toys.merge import HERE, files_of, paft, python, recipe, write_recipe

from paft_merge import merge
from paft_merge.engine.streaming import Progress
from paft_merge.errors import CheckpointError, OutputError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.output import placing
from paft_merge.output.folder import JOURNAL, LOCK
from paft_merge.output.placing import INSIDE, PLACING, part_of


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "models" / "base", state, shards=2)
    return recipe("ties", base, (save_checkpoint(tmp_path / "models" / "x", near(state, 1)), {"weight": 1.0}))


@pytest.fixture
def whole(asked: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    return files_of(merge(asked, tmp_path / "unbroken"))


class Merged:
    """Counts the tensors that a merge computes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _: Progress) -> None:
        self.count += 1


def refusing(code: int, wanted: Callable[[str, str], bool]) -> Callable[[Any, Any], None]:
    rename = os.rename

    def renamed(one: Any, other: Any) -> None:
        if wanted(str(one), str(other)):
            raise OSError(code, os.strerror(code), str(one), None, str(other))
        rename(one, other)

    return renamed


# --- mount points -----------------------------------------------------------------------------------------------------


def test_a_merge_into_a_mount_point_grows_inside_it(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(placing, "is_mount", lambda folder: folder == out)
    seen = set[str]()
    merge(asked, out, progress=lambda _: seen.update(path.name for path in out.iterdir()))
    assert seen == {INSIDE, "lost+found"}
    assert files_of(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "unbroken", "volume"]


def test_a_model_in_a_mount_point_is_replaced(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "volume"
    (out / "deep").mkdir(parents=True)
    (out / "model.safetensors").write_text("old")
    (out / "deep" / "file").write_text("old")
    monkeypatch.setattr(placing, "is_mount", lambda folder: folder == out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge(asked, out)
    merge(asked, out, overwrite=True)
    assert files_of(out) == whole


@pytest.mark.parametrize("what", ["mounted", "replacing-mounted"])
def test_a_merge_into_a_mount_point_is_killed_at_any_step(what: str, asked: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "model.safetensors").write_text("the old one")
    (folder / "old" / "config.json").write_text("{}")
    file = write_recipe(folder / "recipe.yaml", asked)
    code = "import sys; from toys import kill_merges; kill_merges.main(*sys.argv[1:])"
    run = python(code, file, folder, what, "1" if what == "mounted" else "3")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["steps"] > 30
    assert not found["faults"]


def test_a_folder_whose_files_are_being_placed_is_not_opened(tmp_path: Path) -> None:
    out = save_checkpoint(tmp_path / "out", random_state(0))
    (out / INSIDE).mkdir()
    Checkpoint.open(out).close()
    (out / INSIDE / PLACING).write_text("[]")
    with pytest.raises(CheckpointError, match="did not finish"):
        Checkpoint.open(out)


@pytest.mark.parametrize("how", ["-t tmpfs none", "--bind {bound}"])
def test_a_real_mount(how: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """A tmpfs, and a bind mount of the same file system, which has the device of its parent."""
    (out := tmp_path / "a volume").mkdir()
    (bound := tmp_path / "bound").mkdir()
    command = ["unshare", "-m", "true"]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs rights that this process does not have")
    file = write_recipe(tmp_path / "recipe.yaml", asked)
    script = (
        f"mount {how.format(bound=bound)} '{out}' || exit 77; "
        f"'{sys.executable}' -m paft_merge.cli merge '{file}' '{out}' --quiet && cp -r '{out}' '{tmp_path}/copy'"
    )
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": HERE}
    )
    if run.returncode == 77:
        pytest.skip(f"mount: {run.stderr}")
    assert run.returncode == 0, run.stderr
    assert files_of(tmp_path / "copy") == files_of(merge(file, tmp_path / "same"))
    assert not list(tmp_path.glob("*.part"))


def test_the_disk_of_a_mount_point_is_checked(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := tmp_path / "volume").mkdir()
    monkeypatch.setattr(placing, "is_mount", lambda folder: folder == out)
    monkeypatch.setattr(
        placing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 5 if path == out else 1 << 40)
    )
    with pytest.raises(OutputError, match="5 are free"):
        merge(asked, out)
    assert not list(out.iterdir())


# --- renames that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_cannot_be_renamed_over_gets_its_files_one_by_one(
    code: int, asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "rename", refusing(code, lambda _, other: other == str(out)))
    merge(asked, out)
    assert files_of(out) == whole
    assert not part_of(out).exists()


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("moves", [1, 2, 3])
def test_a_merge_that_is_killed_while_its_files_are_moved_one_by_one_is_resumed(
    mounted: bool, replacing: bool, moves: int, asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, again, left = tmp_path / "volume", Merged(), [moves]
    out.mkdir()
    if replacing:
        (out / "model.safetensors").write_text("old")
        (out / "tokenizer.json").write_text("old")
    listed, rename = os.listdir, os.rename
    monkeypatch.setattr(os, "listdir", lambda place: sorted(listed(place)))
    monkeypatch.setattr(placing, "is_mount", lambda folder: mounted and folder == out)
    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)

    def killed(one: Any, other: Any) -> None:
        if os.fspath(out) in map(os.fspath, (one, other)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(one))
        left[0] -= out in (Path(one).parent, Path(other).parent) and Path(other).name != INSIDE
        if left[0] < 0:
            raise KeyboardInterrupt
        rename(one, other)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(asked, out, overwrite=replacing)
    with pytest.raises(CheckpointError, match="did not finish"):
        Checkpoint.open(out)
    merge(asked, out, overwrite=replacing, resume=True, progress=again)
    assert (again.count, files_of(out)) == (0, whole)
    assert not list(tmp_path.glob("volume.*"))


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EIO])
@pytest.mark.parametrize("replacing", [False, True])
def test_after_a_failed_rename_nothing_is_merged_again(
    code: int, replacing: bool, asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    if replacing:
        out.mkdir()
        (out / "model.safetensors").write_text("old")
    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    part = str(part_of(out))

    def blocked(one: str, _: str) -> bool:
        return part in (one, os.path.dirname(one)) and not one.endswith((".new", "replaced"))

    before, first, again = files_of(out) if replacing else None, Merged(), Merged()
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refusing(code, blocked))
        with pytest.raises(OutputError, match=os.strerror(code)):
            merge(asked, out, overwrite=replacing, progress=first)
    assert first.count > 5
    assert (files_of(out) if replacing else None) == before
    merge(asked, out, overwrite=replacing, resume=True, progress=again)
    assert again.count == 0
    assert files_of(out) == whole


# --- finished folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", ["sealed", "paft_merge 123\n", None])
def test_resume_of_a_finished_merge_removes_its_lock_and_merges_nothing(
    lock: str | None, asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "out", Merged()
    if lock == "sealed":
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                merge(asked, out)
        assert (out / LOCK).is_file()
    else:
        merge(asked, out)
        if lock:
            (out / LOCK).write_text(lock)
    assert merge(asked, out, resume=True, progress=again).bytes_written == 0
    assert again.count == 0
    assert files_of(out) == whole


def test_resume_does_not_take_another_merge_for_finished(asked: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(asked, out)
    other = json.loads(json.dumps(asked))
    other["models"][0]["parameters"]["weight"] = 0.5
    with pytest.raises(OutputError, match=r"holds a finished merge with another recipe \(models\)"):
        merge(other, out, resume=True)
    file = next(out.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OutputError, match="was changed since its merge"):
        merge(asked, out, resume=True)


# --- what no merge left -----------------------------------------------------------------------------------------------


def test_a_part_with_a_lock_of_another_program_is_not_cleared(asked: dict[str, Any], tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    part.mkdir()
    (part / LOCK).write_text("npm")
    (part / "thesis.txt").write_text("mine")
    for keywords in ({}, {"resume": True}, {"overwrite": True, "force": True}):
        with pytest.raises(OutputError, match="is not the unfinished output of a merge"):
            merge(asked, tmp_path / "out", **keywords)
    assert files_of(part) == {LOCK: b"npm", "thesis.txt": b"mine"}


def test_a_folder_in_the_place_of_a_replaced_model_is_not_removed(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    mine, out = tmp_path / "out.part.replaced", tmp_path / "out"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    merge(asked, out)
    with pytest.raises(OutputError, match=r"out.part.replaced: exists, and no merge left it"):
        merge(asked, out, overwrite=True)
    assert files_of(mine) == {"thesis.txt": b"mine"}
    assert files_of(out) == whole


def test_overwriting_something_else_than_a_model_needs_force(asked: dict[str, Any], tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    (out / "thesis.txt").write_text("mine")
    file = write_recipe(tmp_path / "recipe.yaml", asked)
    refused = paft("merge", file, out, "--overwrite", "--quiet")
    assert (refused.exit_code, files_of(out)) == (1, {"thesis.txt": b"mine"})
    assert refused.stderr == (
        f"error[OUTPUT]: {out}: holds thesis.txt, and no weights of a model; choose another folder, or pass --force too to"
        " delete all of it\n"
    )
    assert paft("merge", file, out, "--overwrite", "--force", "--quiet").exit_code == 0
    assert files_of(out) == files_of(merge(file, tmp_path / "same"))


def test_a_recipe_in_the_replaced_folder_is_not_deleted(asked: dict[str, Any], tmp_path: Path) -> None:
    file = write_recipe(merge(asked, tmp_path / "out").path / "recipe.yaml", asked)
    with pytest.raises(OutputError, match=r"is, contains or is inside the input .*recipe\.yaml"):
        merge(file, tmp_path / "out", overwrite=True, force=True)
    assert file.is_file()


def test_a_folder_with_a_mount_point_is_not_replaced(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inner := merge(asked, tmp_path / "out").path / "data").mkdir()
    (inner / "thesis.txt").write_text("mine")
    monkeypatch.setattr(placing, "_mounts", lambda: ["/", str(inner)])
    with pytest.raises(OutputError, match=f"contains the mount point {inner}"):
        merge(asked, tmp_path / "out", overwrite=True, force=True)
    assert files_of(tmp_path / "out") == whole | {"data/thesis.txt": b"mine"}


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_source_whose_time_was_put_back_is_noticed(how: str, asked: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "models" / "x" / "model.safetensors"

    def rewrite(done: Progress) -> None:
        if done.tensors == 3:
            seen, data = file.stat(), bytearray(file.read_bytes())
            data[-100] ^= 1
            if how == "another file":
                file.unlink()
                file.write_bytes(data)
            else:  # not cut to nothing first: a reader would report a file that became shorter
                with file.open("r+b") as opened:
                    opened.write(data)
            os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))

    with pytest.raises(CheckpointError) as caught:
        merge(asked, tmp_path / "out", threads=1, progress=rewrite)
    assert [problem.code for problem in caught.value.problems] == ["INPUT_CHANGED"]
    with pytest.raises(OutputError, match="another inputs") as stale:
        merge(asked, tmp_path / "out", threads=1, resume=True)
    assert stale.value.problems[0].code == "RESUME_STALE"
    assert (tmp_path / "out.part" / JOURNAL).is_file()


def test_a_mark_that_another_worker_writes_at_that_moment_is_no_stranger_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).touch()
    own = placing._starts

    def starts(path: Path, *beginnings: bytes) -> bool:
        found = own(path, *beginnings)
        (tmp_path / LOCK).write_bytes(placing._MARK)
        return found

    monkeypatch.setattr(placing, "_starts", starts)
    assert placing.is_left_by_merge(tmp_path)
