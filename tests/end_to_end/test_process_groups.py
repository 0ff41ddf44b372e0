"""Workers in a process group of torch.distributed add up their counts there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import near, random_state, save_checkpoint
from toys.merge import HERE, files_of, recipe, write_recipe

from paft_merge import merge
from paft_merge.engine.process_group import ProcessGroup
from paft_merge.engine.worker_number import WorkerNumber
from paft_merge.output.placing import WORKERS, part_of

PROGRAM = Path(HERE) / "tests" / "toys" / "grouped.py"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    base = random_state(0, torch.bfloat16, layers=2)
    paths = [save_checkpoint(tmp_path / name, near(base, i), 3) for i, name in enumerate(("base", "x", "y"))]
    given = {"weight": "equal_norm", "density": 0.4}
    made = recipe("ties", paths[0], *((path, given) for path in paths[1:]), parameters={"trim_scope": "global"})
    return write_recipe(tmp_path / "recipe.yaml", made)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{HERE}:{Path(HERE) / 'tests'}", "OMP_NUM_THREADS": "1"} | more


def ranks(count: int, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start a program as the ranks of a group, without torchrun, which would end all when one ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in range(count):
        here = environment(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, str(PROGRAM), *map(str, arguments)]
        yield subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=here)


def test_a_global_trim_under_torchrun_with_gloo(asked: Path, tmp_path: Path) -> None:
    merge(asked, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, PROGRAM, asked, tmp_path / "out"], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"rank [01] adds \d{5,} counts", done.stderr)) >= 4, "each rank adds its counts, twice"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


STOPS = "start all workers again; complete files are kept"


def test_a_rank_that_hangs_is_named(asked: Path, tmp_path: Path) -> None:
    first, second = ranks(2, asked, tmp_path / "out", signal.SIGSTOP.value)
    said = first.communicate(timeout=60)[1]
    second.kill()
    second.communicate()
    assert first.returncode == 1, said
    assert f"worker 0 of 2: worker 1 of 2 was silent for 1 s, and its counts are missing; {STOPS}" in said


def test_a_rank_that_dies_is_named_and_the_merge_can_be_started_again(asked: Path, tmp_path: Path) -> None:
    first, second = ranks(2, asked, tmp_path / "out", signal.SIGKILL.value)
    second.communicate(timeout=60)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 1, said
    assert f"worker 0 of 2: worker 1 of 2 has ended, and its counts are missing; {STOPS}" in said
    assert list((part_of(tmp_path / "out") / WORKERS / "sums").iterdir()) == [], "the counts go through the group"
    again = list(ranks(2, asked, tmp_path / "out"))
    assert [process.communicate(timeout=60)[1] and process.returncode for process in again] == [0, 0]
    merge(asked, tmp_path / "one")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_a_group_of_other_processes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ProcessGroup.fits(WorkerNumber(0, 2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert ProcessGroup.fits(WorkerNumber(0, 2))
    assert not ProcessGroup.fits(WorkerNumber(1, 2))
    assert not ProcessGroup.fits(WorkerNumber(0, 3))
