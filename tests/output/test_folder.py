"""Where a merge may write, and what is there after it was killed, starved of disk, or fed with inputs that change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.merge import files_of, on, paft, paft_process, python, recipe, tensors_of, write_recipe

from paft_merge import merge
from paft_merge.engine.streaming import Progress
from paft_merge.errors import CheckpointError, OutputError, PaftMergeError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.output import placing
from paft_merge.output.folder import JOURNAL, LOCK, Output, part_of


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base in two files, a fine-tune and an adapter."""
    base = random_state(0, torch.bfloat16)
    folder = tmp_path / "models"
    made = {"base": save_checkpoint(folder / "base", base, shards=2), "x": save_checkpoint(folder / "x", near(base, 1))}
    return made | {"sft": save_adapter(folder / "sft", base, 3)}


@pytest.fixture
def asked(models: dict[str, Path]) -> dict[str, Any]:
    """A recipe that merges some tensors and copies others."""
    weight = [{"filter": "layers", "value": 0.5}, {"value": 1}]
    sources = [(models["x"], {"weight": weight, "density": 0.5}), (on(models["base"], models["sft"]), {"weight": 1})]
    return recipe("ties", models["base"], *sources)


@pytest.fixture
def plain(asked: dict[str, Any]) -> dict[str, Any]:
    """`asked` without its adapter: quick in a process of its own, which then does without torch."""
    return {**asked, "models": asked["models"][:1]}


@pytest.fixture
def adapters_only(models: dict[str, Path]) -> dict[str, Any]:
    return recipe("ties", models["base"], (on(models["base"], models["sft"]), {"weight": 1}))


def codes(error: pytest.ExceptionInfo[PaftMergeError]) -> list[str]:
    return [problem.code for problem in error.value.problems]


class StopError(Exception):
    """What a test raises in the middle of a merge."""


def stop_after(tensors: int) -> Callable[[Progress], None]:
    def progress(done: Progress) -> None:
        if done.tensors == tensors:
            raise StopError

    return progress


@pytest.fixture
def half(asked: dict[str, Any], tmp_path: Path) -> Path:
    """`out.part` of a merge that stopped after five tensors; the path is `out`."""
    with pytest.raises(StopError):
        merge(asked, tmp_path / "out", progress=stop_after(5), threads=1)
    return tmp_path / "out"


@pytest.fixture
def whole(asked: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """The files of an unbroken merge."""
    return files_of(merge(asked, tmp_path / "unbroken", threads=1))


# --- places (row 51) ---------------------------------------------------------------------------------------------------


def test_places_that_would_harm_something_are_refused_before_anything_is_read_or_written(
    asked: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(models["x"], target_is_directory=True)
    before = files_of(tmp_path)
    places = [
        ("full", False, "exists and is not empty"),
        ("file", True, "is a file"),
        ("file/out", True, "is a file"),
        ("models/base", True, "is, contains or is inside the input"),
        ("models/sft", True, "is, contains or is inside the input"),
        ("models/base/out", True, "is, contains or is inside the input"),
        ("models", True, "is, contains or is inside the input"),
        ("models/../models/x/.", True, "is, contains or is inside the input"),
        ("link", True, "is, contains or is inside the input"),
        ("out.part", True, "cannot be the name of a model"),
    ]
    for place, overwrite, text in places:
        with pytest.raises(OutputError, match=text) as caught:
            merge(asked, tmp_path / place, overwrite=overwrite)
        assert set(codes(caught)) == {"OUTPUT"}, place
    with pytest.raises(OutputError, match="cannot be the name"):
        merge(asked, "/", overwrite=True)
    assert files_of(tmp_path) == before


def test_a_place_relative_to_here_is_taken(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert merge(asked, "new/folder/out").path == Path("new/folder/out")
    (tmp_path / "here" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "empty")
    merge(asked, ".")
    assert (tmp_path / "here" / "empty" / "config.json").exists()


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model.safetensors").write_text("old")
    (tmp_path / "real" / "old.txt").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    merge(asked, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()
    assert not (tmp_path / "real" / "old.txt").exists()


def test_a_folder_that_nobody_may_write_is_refused() -> None:
    """In a process without root's rights, because root may write everywhere."""
    locked = Path(tempfile.mkdtemp(dir="/tmp"))
    locked.chmod(0o555)
    code = """if True:
        import os, sys
        from pathlib import Path
        from paft_merge.errors import Problems
        from paft_merge.output.folder import check_place
        if not os.getuid():
            os.setuid(65534)
        found = Problems()
        check_place(Path(sys.argv[1]), (), 1, overwrite=False, problems=found)
        print(*found.found)
    """
    run = python(code, locked / "out")
    locked.rmdir()
    assert run.stdout == f"{locked}: cannot be written to; choose another folder, or change its permissions\n", (
        run.stderr
    )


def test_too_little_disk_is_known_beforehand(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(OutputError, match=r"bytes are needed and 100 are free") as caught:
        merge(asked, tmp_path / "out")
    assert codes(caught) == ["DISK"]
    assert not list(tmp_path.glob("out*"))


def test_faults_of_the_place_are_told_with_those_of_the_inputs(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    asked["models"].append({"model": str(tmp_path / "nowhere"), "parameters": {"weight": 1}})
    with pytest.raises(PaftMergeError) as caught:
        merge(asked, tmp_path / "file")
    assert codes(caught) == ["NOT_FOUND", "OUTPUT"]


def test_inputs_are_never_modified(asked: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    before = files_of(tmp_path / "models")
    merge(asked, tmp_path / "out")
    assert files_of(tmp_path / "models") == before


def test_a_foreign_folder_of_the_name_out_part_is_not_touched(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not the unfinished output of a merge"):
        merge(asked, tmp_path / "out")
    assert files_of(tmp_path / "out.part") == {"thesis.txt": b"mine"}


# --- replacing (rows 51 and 57) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_one_step", [True, False])
def test_what_is_replaced_stays_whole_until_the_merge_is(
    in_one_step: bool, asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_step:
        monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("the old one")
    seen = []
    merge(asked, out, overwrite=True, progress=lambda _: seen.append(files_of(out)))
    assert len(seen) > 5
    assert all(files == {"model.safetensors": b"the old one"} for files in seen)
    assert files_of(out) == whole
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_what_is_replaced_stays_when_the_merge_fails(
    asked: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    broken = {n: t.clone() for n, t in tensors_of(models["x"]).items()}
    broken["model.norm.weight"][3] = float("nan")
    save_checkpoint(models["x"], broken)
    with pytest.raises(PaftMergeError, match="NaN"):
        merge(asked, out, overwrite=True)
    assert files_of(out) == {"model.safetensors": b"old"}


def test_a_replacement_in_two_steps_that_was_cut_in_half_is_mended(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    out.mkdir()
    (out / "model.safetensors").write_text("old")

    def fails(one: Path, other: Path) -> None:
        if one == part_of(out):
            raise StopError
        rename(one, other)

    with monkeypatch.context() as patched:
        patched.setattr(placing, "_exchange", lambda one, other: False)
        patched.setattr(os, "rename", fails)
        with pytest.raises(StopError):
            merge(asked, out, overwrite=True)
    assert not out.exists()
    with pytest.raises(StopError):
        merge(asked, out, overwrite=True, progress=stop_after(1))
    assert files_of(out) == {"model.safetensors": b"old"}
    assert files_of(merge(asked, out, overwrite=True)) == whole


def test_files_are_durable_before_they_get_their_name(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync, rename = list[tuple[str, str]](), os.fsync, os.rename

    def synced(fd: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def renamed(one: Any, other: Any) -> None:
        calls.append(("rename", Path(other).name))
        rename(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    merge(asked, tmp_path / "out")
    before = [name for call, name in calls[: calls.index(("rename", "out"))] if call == "fsync"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert before[:2] == shards
    assert {"config.json", "merge_manifest.json", "model.safetensors.index.json", "out.part"} < set(before)
    assert before[-2:] == ["model.safetensors.index.json", "out.part"]
    assert calls[calls.index(("rename", "out")) + 1 :] == [("fsync", tmp_path.name)]


# --- killed and resumed (rows 53 to 58) --------------------------------------------------------------------------------


def run_killer(asked: dict[str, Any], folder: Path, *arguments: str) -> dict[str, Any]:
    file = write_recipe(folder / "recipe.yaml", asked)
    run = python("import sys; from toys import kill_merges; kill_merges.main(*sys.argv[1:])", file, folder, *arguments)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def test_a_merge_that_is_killed_at_any_step_is_resumed_to_the_same_bytes(asked: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    found = run_killer(asked, folder, "new", "1")
    assert found["steps"] > 30
    assert not found["faults"]


def test_a_merge_that_is_killed_while_it_replaces_leaves_the_old_or_the_new_model(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "model.safetensors").write_text("the old one")
    (folder / "old" / "config.json").write_text("{}")
    found = run_killer(asked, folder, "replacing", "3")
    assert not found["faults"]


def test_the_command_that_is_killed_is_resumed_by_the_command(tmp_path: Path) -> None:
    state = {f"model.layers.{i}.w": torch.randn(64, 64) for i in range(1500)}
    base, x = save_checkpoint(tmp_path / "base", state), save_checkpoint(tmp_path / "x", near(state, 1))
    file, out = (
        write_recipe(tmp_path / "r.yaml", recipe("ties", base, (x, {"weight": 1, "density": 0.5}))),
        tmp_path / "out",
    )
    command = [sys.executable, "-m", "paft_merge.cli", "merge", file, out, "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        while lines_of(part_of(out) / JOURNAL) < 50 and running.poll() is None:
            time.sleep(0.001)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(CheckpointError, match="did not finish"):
        Checkpoint.open(part_of(out))
    resumed = paft("merge", file, out, "--resume", "--quiet")
    assert (resumed.exit_code, resumed.output) == (0, "")
    assert files_of(out) == files_of(merge(file, tmp_path / "unbroken"))


def lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_a_resumed_merge_passes_over_what_is_there(half: Path, asked: dict[str, Any], whole: dict[str, bytes]) -> None:
    seen = list[Progress]()
    merge(asked, half, resume=True, progress=seen.append)
    assert [p.tensors for p in seen] == list(range(6, seen[0].tensors_total + 1))
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert files_of(half) == whole


def test_a_resumed_merge_that_is_stopped_at_once_has_lost_nothing(
    half: Path, asked: dict[str, Any], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(StopError):
            merge(asked, half, resume=True)
    seen = list[Progress]()
    merge(asked, half, resume=True, progress=seen.append)
    assert seen[0].tensors == 6
    assert files_of(half) == whole


def test_without_resume_it_is_begun_anew(half: Path, asked: dict[str, Any], whole: dict[str, bytes]) -> None:
    seen = list[Progress]()
    merge(asked, half, progress=seen.append)
    assert seen[0].tensors == 1
    assert files_of(half) == whole


def test_resume_with_nothing_to_resume_is_a_merge(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert files_of(merge(asked, tmp_path / "out", resume=True)) == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-7],
        lambda text: text + '{"name": "model.norm.we',
        lambda text: text + "\x00\x00\n",
        lambda text: text.replace('"digest": "', '"digest": "0', 2),
        lambda text: text.split("\n")[0] + "\n[]\n5\n{}\nnull\n",
        lambda text: "",
        lambda text: "not json\n" + text,
    ],
    ids=["cut", "half a line", "zeros", "other digests", "other lines", "empty", "no first line"],
)
def test_a_damaged_journal_costs_time_and_no_bit(
    damage: Callable[[str], str], half: Path, asked: dict[str, Any], whole: dict[str, bytes]
) -> None:
    journal = part_of(half) / JOURNAL
    journal.write_text(damage(journal.read_text()))
    assert files_of(merge(asked, half, resume=True)) == whole


def test_bytes_that_changed_in_out_part_are_merged_again(
    half: Path, asked: dict[str, Any], whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    for shard in part_of(half).glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start::13] = bytes(b ^ 0xFF for b in content[start::13])
        shard.write_bytes(content)
    merge(asked, half, resume=True)
    assert "5 tensors" in caplog.text
    assert files_of(half) == whole


def test_a_shard_that_is_gone_is_written_again(half: Path, asked: dict[str, Any], whole: dict[str, bytes]) -> None:
    next(part_of(half).glob("*.safetensors")).unlink()
    assert files_of(merge(asked, half, resume=True)) == whole


def test_nothing_else_that_lies_in_out_part_gets_into_the_output(
    half: Path, asked: dict[str, Any], whole: dict[str, bytes]
) -> None:
    (part_of(half) / "README.md").write_text("of another attempt")
    (part_of(half) / "additional_chat_templates").mkdir()
    (part_of(half) / "additional_chat_templates" / "old.jinja").write_text("old")
    assert files_of(merge(asked, half, resume=True)) == whole


@pytest.mark.parametrize("change", ["recipe", "inputs", "adapter", "adapter config", "versions", "files", "device"])
def test_a_merge_of_something_else_is_not_resumed(
    change: str,
    half: Path,
    asked: dict[str, Any],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keywords: dict[str, Any] = {}
    named = change
    if change == "recipe":
        asked["models"][0]["parameters"]["density"] = 0.4
    elif change == "inputs":
        save_checkpoint(models["x"], near(tensors_of(models["base"]), 2))
        named = "inputs \\("
    elif change == "adapter":
        save_adapter(models["sft"], tensors_of(models["base"]), 4)
        named = "inputs"
    elif change == "adapter config":
        config = models["sft"] / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
        named = "inputs"
    elif change == "versions":
        monkeypatch.setattr("paft_merge.engine.sidefiles.version_of", lambda name: "9.9")
    elif change == "files":
        keywords["out_shard_bytes"] = 20_000
    else:
        monkeypatch.setattr("paft_merge.engine.api.identity", lambda planned, device: {"device": "cuda"})
        named = "device"
    before = files_of(part_of(half))
    with pytest.raises(OutputError, match=f"started with another .*{named}") as caught:
        merge(asked, half, resume=True, **keywords)
    assert codes(caught) == ["RESUME_STALE"]
    assert caught.value.problems[0].fix == "run without resume=True to start over"
    before.pop(LOCK)
    assert {name: content for name, content in files_of(part_of(half)).items() if name != LOCK} == before


def test_a_merge_of_copies_alone_is_resumed(adapters_only: dict[str, Any], tmp_path: Path) -> None:
    """Whose tally has no rows."""
    with pytest.raises(StopError):
        merge(adapters_only, tmp_path / "out", progress=stop_after(2), threads=1)
    seen = list[Progress]()
    merge(adapters_only, tmp_path / "out", resume=True, progress=seen.append)
    assert seen[0].tensors == 3
    assert files_of(tmp_path / "out") == files_of(merge(adapters_only, tmp_path / "unbroken"))


def test_an_error_in_a_thread_stops_the_merge_and_what_was_finished_is_kept(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Output.write

    def fails(self: Output, name: str, start: int, buffer: Any, *room: Any) -> None:
        if "layers.1" in name:
            raise ZeroDivisionError(name)
        write(self, name, start, buffer, *room)

    with monkeypatch.context() as patched:
        patched.setattr(Output, "write", fails)
        with pytest.raises(ZeroDivisionError, match=r"layers\.1"):
            merge(asked, tmp_path / "out")
    assert [path.name for path in tmp_path.glob("out*")] == ["out.part"]
    assert files_of(merge(asked, tmp_path / "out", resume=True)) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_merge_that_is_told_to_stop_says_how_to_go_on(
    number: signal.Signals, plain: dict[str, Any], tmp_path: Path
) -> None:
    file = write_recipe(tmp_path / "r.yaml", plain)
    hook = f"""if True:
        import os, signal
        from paft_merge.engine import api
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
        merge = api.merge
        def stopped(*arguments, **keywords):
            keywords["progress"] = lambda done: done.tensors == 3 and os.kill(os.getpid(), {number.value})
            return merge(*arguments, **keywords)
        api.merge = stopped
    """
    run = paft_process("merge", file, tmp_path / "out", "--threads", "1", before=hook)
    assert run.returncode == 130, run.stderr
    assert run.stderr == "interrupted; finished work is kept, and the same command with --resume continues\n"
    assert lines_of(tmp_path / "out.part" / JOURNAL) >= 3


# --- full disks (row 52) -----------------------------------------------------------------------------------------------


def limited(asked: dict[str, Any], out: Path, limit: int) -> subprocess.CompletedProcess[str]:
    """`paft merge` in a process whose files cannot be longer than `limit`."""
    file = write_recipe(out.with_name("r.yaml"), asked)
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    return paft_process("merge", file, out, "--overwrite", before=before, PYTHONDONTWRITEBYTECODE="1")


def test_a_limit_of_file_sizes_is_met_before_the_first_tensor(plain: dict[str, Any], tmp_path: Path) -> None:
    run = limited(plain, tmp_path / "out", 4_000)
    assert run.returncode == 1
    assert run.stderr.startswith("error[DISK]: ")
    assert run.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.glob("out*")] == ["out.log"]


def test_a_limit_that_only_a_side_file_meets_leaves_the_old_model(
    plain: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    (models["base"] / "tokenizer.json").write_text(" " * 400_000 + "{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("old")
    run = limited(plain, tmp_path / "out", 300_000)
    assert run.returncode == 1
    assert "error[DISK]" in run.stderr
    assert "--resume" in run.stderr
    assert files_of(tmp_path / "out") == {"model.safetensors": b"old"}


def test_a_disk_that_fills_in_the_middle_of_a_shard_is_told_and_resumed(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, calls = os.pwrite, iter(range(10**6))

    def full(*arguments: Any) -> int:
        if next(calls) > 8:
            raise OSError(28, os.strerror(28))
        return pwrite(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="bytes needed") as caught:
            merge(asked, tmp_path / "out")
    assert codes(caught) == ["DISK"]
    assert not (tmp_path / "out").exists()
    assert files_of(merge(asked, tmp_path / "out", resume=True)) == whole


def test_a_disk_that_is_full_for_the_journal_is_told(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", **keywords: Any) -> Any:
        return opened(Path("/dev/full") if self.name == JOURNAL and mode == "ab" else self, mode, **keywords)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        merge(asked, tmp_path / "out")
    assert codes(caught) == ["DISK"]


# --- inputs that change, and merges that meet (rows 59 and 60) -----------------------------------------------------------


def test_an_input_that_is_written_to_while_it_is_merged_stops_the_merge(
    asked: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    file = models["x"] / "model.safetensors"

    def touch(done: Progress) -> None:
        if done.tensors == 3:
            os.utime(file, ns=(0, 12345))

    with pytest.raises(CheckpointError, match="was written to since") as caught:
        merge(asked, tmp_path / "out", progress=touch)
    assert codes(caught) == ["INPUT_CHANGED"]
    assert [path.name for path in tmp_path.glob("out*")] == ["out.part"]


def test_an_adapter_that_changes_while_it_is_merged_stops_the_merge(
    asked: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PaftMergeError) as caught:
        merge(
            asked, tmp_path / "out", progress=lambda _: os.utime(models["sft"] / "adapter_model.safetensors", ns=(0, 5))
        )
    assert codes(caught) == ["INPUT_CHANGED"]


def test_an_input_that_is_cut_short_while_it_is_merged_is_no_crash(
    asked: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    file = models["x"] / "model.safetensors"
    with pytest.raises(CheckpointError) as caught:
        merge(asked, tmp_path / "out", threads=1, progress=lambda _: os.truncate(file, 2000))
    assert codes(caught) == ["INPUT_CHANGED"]


def test_a_second_merge_to_one_place_is_told_who_is_there(
    asked: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    told = list[str]()

    def also(done: Progress) -> None:
        if done.tensors == 3:
            with pytest.raises(OutputError) as caught:
                merge(asked, tmp_path / "out", resume=True)
            told.extend([caught.value.problems[0].code, str(caught.value)])

    merge(asked, tmp_path / "out", progress=also)
    assert told[0] == "BUSY"
    assert f"process {os.getpid()} is writing here" in told[1]
    assert files_of(tmp_path / "out") == whole


def test_a_lock_that_was_renamed_away_is_not_mistaken_for_ones_own(tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    part.mkdir()
    with placing._open_lock(part) as lock:
        os.rename(part, tmp_path / "out")
        with pytest.raises(OutputError) as caught:
            placing._take(lock, part)
    assert codes(caught) == ["BUSY"]


def test_a_merge_that_ended_first_is_not_overwritten(asked: dict[str, Any], tmp_path: Path) -> None:
    def another(done: Progress) -> None:
        if done.tensors == 3:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("another's")

    with pytest.raises(OutputError, match="not empty"):
        merge(asked, tmp_path / "out", progress=another)
    assert files_of(tmp_path / "out") == {"config.json": b"another's"}


# --- side files ----------------------------------------------------------------------------------------------------------


def test_what_belongs_to_the_base_stands_beside_the_weights(
    asked: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    kept = {
        "generation_config.json": "{}", "tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}",
        "preprocessor_config.json": "{}", "merges.txt": "a b", "tokenizer.model": "\x00", "source.spm": "\x00", "LICENSE": "l",
        "additional_chat_templates/tool.jinja": "{{ y }}",
    }  # fmt: skip
    left = {
        "adapter_config.json": "{}", "trainer_state.json": "{}", "optimizer.pt": "x", "README.md": "old", "modeling_x.py": "1/0",
        "pytorch_model.bin.index.json": "{}", "merge_manifest.json": "{}", "training_args.bin": "x", ".gitattributes": "",
    }  # fmt: skip
    for name, content in (kept | left).items():
        (models["base"] / name).parent.mkdir(exist_ok=True)
        (models["base"] / name).write_text(content)
    written = files_of(merge(asked, tmp_path / "out"))
    assert {name: written.get(name) for name in kept} == {name: content.encode() for name, content in kept.items()}
    made = {"config.json", "README.md", "merge_manifest.json", "model.safetensors.index.json"}
    assert {name for name in written if not name.endswith(".safetensors")} == kept.keys() | made
    assert json.loads(written["config.json"]) == json.loads((models["base"] / "config.json").read_text())


def test_a_config_says_what_the_merge_changed_and_nothing_else(tmp_path: Path) -> None:
    base = random_state(0, torch.bfloat16)
    config = {
        "model_type": "odd", "torch_dtype": "bfloat16", "vocab_size": 40, "rope_theta": 1e4,
        "text_config": {"dtype": "bfloat16", "vocab_size": 40, "hidden_size": 24}, "vision_config": {"vocab_size": 7},
    }  # fmt: skip
    a, b = (
        save_checkpoint(tmp_path / "a", base, config=config),
        save_checkpoint(tmp_path / "b", near(base, 1), config=config),
    )
    merge(recipe("linear", a, (a, {"weight": 1}), (b, {"weight": 1}), out_dtype="float16"), tmp_path / "out")
    expected = {**config, "torch_dtype": "float16", "text_config": {**config["text_config"], "dtype": "float16"}}  # type: ignore[dict-item]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"tie_word_embeddings": False, **expected}


def test_a_grown_vocabulary_and_a_cut_tie_are_in_the_config() -> None:
    from paft_merge.plan.output_config import _changes

    config = {
        "vocab_size": 40,
        "tie_word_embeddings": True,
        "text_config": {"vocab_size": 40, "tie_word_embeddings": True},
        "vision_config": {"vocab_size": 7},
    }
    changes = _changes(config, None, {40: 44}, untied=True)
    changed = {"vocab_size": 44, "tie_word_embeddings": False}
    assert changes == {**changed, "text_config": changed}


@pytest.fixture(autouse=True)
def no_debris(tmp_path: Path) -> Iterator[None]:
    """No test leaves a descriptor of its output open."""
    yield
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    ]
    assert not [path for path in held if path.startswith(str(tmp_path / "out"))]
