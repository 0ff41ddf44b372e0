"""Names from strangers' files: no control character reaches a terminal, no mark-up a card."""

from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import near, random_state, save_checkpoint
from toys import vocabulary as words
from toys.mergekit import CONFIG

from paft_merge.cli import cli
from paft_merge.cli.terminal import console, plain
from paft_merge.engine.api import merge
from paft_merge.errors import Problem, escape

HOSTILE = "model.\x1b]0;owned\x07\x1b[2J[red]\u202egnp\u200b.weight"
TITLE = b"\x1b]0;"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A recipe whose models hold a tensor of a hostile name and a card with hostile licences."""
    state = {**random_state(0), HOSTILE: random_state(0)["model.norm.weight"]}
    for name, one in (("base", state), ("x", near(state, 1))):
        save_checkpoint(tmp_path / name, one)
        card = {"license": "other", "license_name": "mine\n\n# INJECTED\n<script>alert(1)</script>|`\x1b[2J"}
        (tmp_path / name / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    recipe = {
        "merge_method": "ties", "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "x"), "parameters": {"weight": 1.0, "density": 0.5}}],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


def on_a_terminal(*arguments: object) -> bytes:
    """The bytes that a command writes to a terminal of 100 columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "paft_merge.cli", *map(str, arguments)]
    running = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    running.wait()
    return shown


@pytest.mark.parametrize("command", ["merge", "explain", "dry-run", "audit"])
def test_no_name_reaches_a_terminal_as_a_command(hostile: Path, tmp_path: Path, command: str) -> None:
    arguments = {
        "merge": ("merge", hostile, tmp_path / "out"),
        "explain": ("explain", hostile),
        "dry-run": ("merge", "--dry-run", hostile),
        "audit": ("audit", tmp_path / "x", "--base", tmp_path / "base"),
    }[command]
    shown = on_a_terminal(*arguments)
    assert b"Traceback" not in shown, shown.decode()
    for piece in (TITLE, b"\x07", "\u202e".encode(), "\u200b".encode(), b"\x1b[2J["):
        assert piece not in shown, shown
    if command == "explain":
        assert rb"\x1b]0;owned\x07\x1b[2J[red]\u202egnp\u200b.weight" in shown.replace(b"\r\n", b"")


def test_lines_of_other_libraries_are_escaped(tmp_path: Path) -> None:
    """transformers warns with the model's type as config.json has it, through its own handler."""
    words.save_tokenizer(tmp_path, "base")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": f"llama{HOSTILE}"}))
    (tmp_path / "rows.txt").write_text("a\n")
    shown = on_a_terminal("evaluate", tmp_path, "--perplexity", tmp_path / "rows.txt")
    assert TITLE not in shown
    assert "\u202e".encode() not in shown
    assert rb"\x1b]0;owned" in shown


def test_warnings_of_other_libraries_are_escaped() -> None:
    code = "import warnings, logging; from paft_merge.errors import escape_logs; escape_logs(); escape_logs()"
    code += "; warnings.warn('a\\x1b]0;b'); logging.getLogger('x').warning('c %s', '\\x1b[31m\\x1b]0;d')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stderr
    assert r"a\x1b]0;b" in done.stderr
    assert r"c \x1b]0;d" in done.stderr


def test_escaped_are_controls_line_breaks_and_what_hides_or_reorders_text() -> None:
    assert (
        escape("a\x1b[0m\x9b\n\u202e\u2066\u200d\ud800\u2028é漢") == r"a\x1b[0m\x9b\n\u202e\u2066\u200d\ud800\u2028é漢"
    )
    assert escape("a\nb\tc", lines=True) == "a\nb\\tc"
    assert str(Problem("X", "a\nb", "c")) == r"a\nb: c"


def test_a_console_prints_names_without_control_or_markup() -> None:
    screen = console(force_terminal=True, width=200, color_system=None)
    with screen.capture() as held:
        screen.print(f"[bold]{plain(HOSTILE)}[/]")
        screen.print(HOSTILE, markup=False)
    assert "\x1b]" not in held.get()
    assert held.get().count(r"\x1b]0;owned") == held.get().count(r"\x1b[2J[red]\u202egnp") == 2


def test_a_card_of_a_source_cannot_write_into_the_merged_card(hostile: Path, tmp_path: Path) -> None:
    merge(hostile, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in card
    assert "<script>" not in card.partition("\n---\n")[2]
    assert not [line for line in card.splitlines() if line.startswith("# INJECTED")]
    head = yaml.safe_load(card.partition("---\n")[2].partition("\n---\n")[0])
    assert head["license_name"].startswith("mine\n")  # quoted in YAML, as it was
    table = [line for line in card.splitlines() if "INJECTED" in line and line.startswith("| ")]
    assert table
    assert all(line.replace("\\|", "").count("|") == 5 for line in table)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            "error[DISK_FULL]: /x/y: No space left on device; free space",
        ),
        (MemoryError(), "error[MEMORY]: there is not enough memory"),
        (RecursionError(), "error[INPUT]: an input is nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "error[INPUT]: an input is not UTF-8 text at byte 0"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), "use a shorter name"),
        (OSError(errno.ELOOP, "Too many levels", "a\x1b"), r"error[SYSTEM]: a\x1b: Too many levels"),
        (RuntimeError("can't start new thread"), "error[SYSTEM]: can't start new thread; raise the limit of processes"),
    ],
)
def test_errors_of_the_system_and_of_memory_are_lines(
    error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("paft_merge.hub.merged_folders.write_card", fail)
    done = CliRunner().invoke(cli, ["card", str(tmp_path)])
    assert done.exit_code == 1
    assert shown in done.output
    assert "Traceback" not in done.output
    assert json.dumps(done.output)


def test_an_output_that_is_a_circle_of_links_is_one_line(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": str(family()["base"])}]}))
    done = CliRunner().invoke(cli, ["merge", str(recipe), str(tmp_path / "a")])
    assert done.exit_code == 1
    assert "error[SYSTEM]" in done.output
    assert "the links form a circle" in done.output


def test_a_bug_is_not_taken_for_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("paft_merge.hub.merged_folders.write_card", fail)
    assert isinstance(CliRunner().invoke(cli, ["card", str(tmp_path)]).exception, RuntimeError)


ARGV = "\x1b]0;x\x07\x1b[31m\u202e\nz"


@pytest.mark.parametrize(
    "args",
    [
        [ARGV], [f"--{ARGV}"], [f"-{ARGV}"], ["merge", f"--{ARGV}"], ["merge", "x", "o", ARGV], ["merge", "x", "o", "--threads", ARGV],
        ["evaluate", "m", "--suite", ARGV], ["evaluate", "m", "--exact-match", ARGV], ["tune", ARGV, "o"], ["run", "x", "--only", ARGV],
        ["completion", ARGV], ["merge", "x", "o", "--memory", ARGV], ["--log-file", "/", ARGV], ["doctor", f"--quiet={ARGV}"],
    ],
)  # fmt: skip
def test_errors_of_usage_escape_the_arguments(args: list[str]) -> None:
    done = CliRunner().invoke(cli, args, color=True)
    assert done.exit_code == 2
    assert not {"\x1b", "\x07", "\u202e"} & {*done.output}
