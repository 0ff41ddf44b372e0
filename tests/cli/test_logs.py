"""Every long command writes its log beside what it writes, and no fault of the log stops the command."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_adapter
from toys.merge import files_of, on, paft, paft_process, recipe, tensors_of, write_recipe
from toys.run import make_world

import paft_merge
from paft_merge.output.log_file import log_beside, logged


@pytest.fixture
def file(family: Callable[..., dict[str, Path]], tmp_path: Path) -> Path:
    models = family()
    return write_recipe(
        tmp_path / "recipe.yaml",
        recipe("task_arithmetic", models["base"], (on(models["base"], models["sft"]), {"weight": 0.5})),
    )


def test_a_merge_has_a_log_beside_its_folder(file: Path, tmp_path: Path) -> None:
    assert paft("merge", file, tmp_path / "out", "--quiet").exit_code == 0
    log = (tmp_path / "out.log").read_text().splitlines()
    assert log[0].startswith("paft-merge ")
    assert f"paft merge {file} {tmp_path / 'out'} --quiet" in log[0]
    assert "merged in " in log[-2]
    assert log[-1].endswith("out is done")
    paft_merge.merge(file, tmp_path / "again")
    assert not (tmp_path / "again.log").exists()  # the library writes none
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "again").keys()
    for more in (["--resume"], ["--overwrite"]):
        assert paft("merge", file, tmp_path / "out", "--quiet", *more).exit_code == 0
    assert (tmp_path / "out.log").read_text().count("\npaft-merge ") == 2  # appended
    assert paft("audit", tmp_path / "out").exit_code == 0
    assert paft("reproduce", tmp_path / "out", tmp_path / "third", "--quiet").exit_code == 0
    assert "paft reproduce" in (tmp_path / "third.log").read_text()


def test_any_command_writes_to_the_file_of_log_file(file: Path, tmp_path: Path) -> None:
    log = tmp_path / "new" / "all.log"
    done = paft("--log-file", log, "methods")
    assert (done.exit_code, done.stderr) == (0, "")
    assert paft("--log-file", log, "methods", "tise").exit_code == 1
    merged = paft("--log-file", log, "merge", file, tmp_path / "out", "--quiet")
    assert (merged.exit_code, merged.output) == (0, "")
    assert paft("--log-file", log, "merge", file, tmp_path / "out", "--quiet").exit_code == 1
    text = log.read_text()
    assert text.count("\npaft-merge ") == 3
    assert "paft --log-file" in text.splitlines()[0]
    assert " ERROR paft_merge: RECIPE: tise: is not a method; did you mean 'ties'?" in text
    assert re.search(r" INFO paft_merge\.cli: merge: [\d.]+ s\n", text)
    assert re.search(r" ERROR paft_merge: \w+: .*out: exists and is not empty", text)
    assert "--overwrite" in text
    assert (tmp_path / "out.log").exists()


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    done = paft("--log-file", tmp_path, "methods")
    assert done.exit_code == 2  # it is a folder
    (tmp_path / "file").write_text("")
    done = paft("--log-file", tmp_path / "file" / "log", "methods", "linear")
    assert (done.exit_code, done.stderr.count("warning[LOG]")) == (0, 1)


def test_the_folders_above_an_output_are_made_for_its_log(file: Path, tmp_path: Path) -> None:
    done = paft("merge", file, tmp_path / "runs" / "first" / "out", "--quiet")
    assert (done.exit_code, done.stderr.count("warning[LOG]")) == (0, 0)
    assert (tmp_path / "runs" / "first" / "out.log").read_text().rstrip().endswith("out is done")


def test_warnings_errors_and_interrupts_are_in_the_log(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_adapter(tmp_path / "large", tensors_of(tmp_path / "base"), 5, size=1.0)
    models = [(on(tmp_path / "base", one), {"weight": 0.5}) for one in (tmp_path / "sft", other)]
    write_recipe(file, recipe("task_arithmetic", tmp_path / "base", *models))
    done = paft("merge", file, tmp_path / "out", "--quiet")
    assert done.stderr.count("warning[SCALE]") == 1
    assert "WARNING paft_merge: SCALE: " in (tmp_path / "out.log").read_text()
    from paft_merge.engine import streaming

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "merge_checkpoint", stopped)
    assert paft("merge", file, tmp_path / "other", "--quiet").exit_code == 130
    assert "ERROR paft_merge: KeyboardInterrupt" in (tmp_path / "other.log").read_text()


def test_what_is_refused_before_it_begins_leaves_no_log(file: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "bad.yaml").write_text("merge_method: nope\n")
    for words in (
        (file, tmp_path / "full"),
        (tmp_path / "bad.yaml", tmp_path / "out"),
        (file, tmp_path / "o", "--dry-run"),
    ):
        assert paft("merge", *words).exit_code == (0 if "--dry-run" in words else 1)
    assert list(tmp_path.glob("*.log")) == []


def test_every_worker_has_its_log(file: Path, tmp_path: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-m", "paft_merge", "merge", file, tmp_path / "out", "--worker", f"{i}/2"], stderr=subprocess.DEVNULL)
        for i in range(2)
    ]  # fmt: skip
    assert [one.wait() for one in both] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["out.worker-0.log", "out.worker-1.log"]


@pytest.mark.parametrize("odd", ["folder", "fifo", "read-only", "full"])
def test_a_log_that_cannot_be_written_is_a_warning(odd: str, file: Path, tmp_path: Path) -> None:
    log = tmp_path / "out.log"
    if odd == "folder":
        log.mkdir()
    elif odd == "fifo":
        os.mkfifo(log)
    elif odd == "full":
        log.symlink_to("/dev/full")
    else:
        log.symlink_to("/proc/version")
    done = paft_process("merge", file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning[LOG]") == 1
    assert "the work goes on without this log" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_output_of_a_shell_in_the_same_file_stays_whole(file: Path, tmp_path: Path) -> None:
    with (tmp_path / "out.log").open("wb") as both:
        command = [sys.executable, "-m", "paft_merge", "merge", file, tmp_path / "out"]
        assert subprocess.run(command, stdout=both, stderr=both, check=False).returncode == 0
    text = (tmp_path / "out.log").read_text()
    assert "INFO paft_merge" not in text
    assert "is done: see its README.md" in text


def test_names_of_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, log in (
        ("o", "o.log"),
        ("o/", "o.log"),
        ("a/../o", "o.log"),
        ("v1.5", "v1.5.log"),
        (".", f"../{tmp_path.name}.log"),
    ):
        assert log_beside(Path(given)) == Path(os.path.abspath(log))
    assert log_beside(Path("o"), "3").name == "o.worker-3.log"
    assert log_beside(Path("/")) == Path("/root.log")


def test_secrets_are_left_out(tmp_path: Path) -> None:
    token = "hf_" + "abcdefghijABCDEFGHIJ0123456789KLMN"
    with logged(tmp_path / "a.log", f"paft evaluate --set x={token}") as note:
        note(logging.INFO, f"said {token} and more")
        logging.getLogger("paft_merge.hub").info("token %s", token)
    text = (tmp_path / "a.log").read_text()
    assert token not in text
    assert text.count("(a Hugging Face token)") == 3
    assert "and more" in text


def test_the_terminal_shows_what_it_showed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    terminal = logging.Handler()
    terminal.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(terminal)
    announcer = logging.getLogger("paft_merge.compute.kernels.object_cache")
    before = announcer.level
    announcer.setLevel(logging.INFO)
    try:
        with logged(tmp_path / "a.log"):
            logging.getLogger("paft_merge.hub").info("quiet")
            logging.getLogger("paft_merge.hub").warning("loud")
            announcer.info("compiling")
    finally:
        announcer.setLevel(before)
        logging.getLogger().removeHandler(terminal)
    assert shown == ["loud", "compiling"]
    assert [line.rpartition(": ")[2] for line in (tmp_path / "a.log").read_text().splitlines()] == [
        "quiet",
        "loud",
        "compiling",
    ]


def test_an_evaluation_has_a_log_beside_its_file(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world").parent
    done = paft("evaluate", world / "base", "--perplexity", world / "text.txt", "--out", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    first, *lines = (tmp_path / "scores.json.log").read_text().splitlines()
    assert "paft evaluate" in first
    assert [line.partition("paft_merge: ")[2][:12] for line in lines if "paft_merge: " in line] == [
        "perplexity s",
        "perplexity: ",
    ]
    refused = paft("evaluate", world / "base", "--perplexity", world / "sft.jsonl.no", "--out", tmp_path / "b.json")
    assert refused.exit_code == 2
    assert not (tmp_path / "b.json.log").exists()
