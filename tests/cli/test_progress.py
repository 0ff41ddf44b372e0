"""The progress bar of a merge on a narrow terminal, and the announcement of the compiler."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
from rich.cells import cell_len
from toys.merge import HERE

from paft_merge.cli.terminal import StderrHandler, clock
from paft_merge.compute.kernels import object_cache

SCRIPT = """
import time
from paft_merge.cli.merging import progress_bar
from paft_merge.engine.streaming import Progress
with progress_bar(False) as show:
    for i in range(1, 9):
        name = f"model.layers.{i}.post_attention_layernorm.weight"
        show(Progress(i * 1000, 10_291, i * 2_594_000_000, 9 * 2_594_000_000, name))
        time.sleep(0.15)
"""


EVALUATION = """
from paft_merge.cli.evaluating import _progress
from paft_merge.evaluating import EvaluateProgress
with _progress() as show:
    show(EvaluateProgress("tensors\\x1b[2J" + "\u65e5" * 90 + "x" * 200, 3, 7))
"""


def drawn(width: int, script: str = SCRIPT, **environment: str) -> list[str]:
    """The states of the bar on a terminal of `width` columns, without control sequences."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"PYTHONPATH": HERE, "TERM": "xterm", **environment}
    with subprocess.Popen([sys.executable, "-c", script], stderr=there, stdout=there, env=env) as running:
        os.close(there)
        text = b""
        try:
            while part := os.read(here, 4096):
                text += part
        except OSError:  # the other end is closed
            pass
    os.close(here)
    assert running.returncode == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    return [line for line in re.split(r"[\r\n]+", plain) if "tensors" in line]


@pytest.mark.parametrize("width", [80, 200])
def test_a_metric_with_a_long_name_keeps_its_bar_and_its_count(width: int) -> None:
    line = drawn(width, EVALUATION)[-1]
    assert cell_len(line) <= width
    assert re.search(r"\\x1b\[2J.*… ━+.* 3/7 ", line), line


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_the_bar_fits_80_columns_with_its_numbers(environment: dict[str, str]) -> None:
    lines = drawn(80, **environment)
    assert len(lines) > 3
    assert all(len(line) <= 80 for line in lines)
    last = lines[-1]
    assert re.search(r"\d+/10291 tensors .* \d+% +[\d.]+ [GM]B/s \d:\d\d:\d\d\s*$", last), last
    assert "layernorm" not in last
    assert "post_attention_layernorm.weight" in drawn(120, **environment)[-1]


def test_the_compiler_announces_itself_once_and_stops_the_clock(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, kernel = object_cache._Compiler(), object_cache._KERNELS[0]

    def compile_slowly(_: object) -> float:
        time.sleep(0.05)
        return clock()

    monkeypatch.setattr(object_cache, "_COMPILER", compiler)
    caplog.set_level(logging.INFO, object_cache.__name__)
    for _ in range(2):
        before, real = clock(), time.monotonic()
        assert compiler.run(kernel, compile_slowly) - before < 0.04
        assert clock() - before < time.monotonic() - real - 0.04
    assert object_cache.compile_seconds() >= 0.1
    (told,) = caplog.messages
    assert re.fullmatch(r"compiling up to \d+ kernels for this processor \(once; about \d+ s\)", told)


def test_a_warning_of_every_trial_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("trials")
    logger.addHandler(StderrHandler())
    for trial in range(3):
        logger.warning("the text was cut")
        logger.info("trial %d", trial)
    assert capsys.readouterr().err == "the text was cut\ntrial 0\ntrial 1\ntrial 2\n"
