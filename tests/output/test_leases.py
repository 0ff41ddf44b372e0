"""Leases: one holder at a time, dead holders lose their rights, and no clock of another process matters."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paft_merge.output import leases as module
from paft_merge.output.leases import Leases, create_once

FAST = 0.3


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Leases]:
    with Leases.open(tmp_path, FAST, "mine") as leases:
        yield leases


def of_a_dead_process(folder: Path, right: str, generation: int = 0, process: str = "") -> None:
    """What a process leaves that was killed."""
    (folder / f"dead{generation}.beat").write_text(f"           7 {FAST} {process}\n")
    (folder / f"{right}.{generation}").write_text(json.dumps({"id": f"dead{generation}", "who": "the dead one"}))


def test_one_of_two_gets_a_right(mine: Leases, tmp_path: Path) -> None:
    with Leases.open(tmp_path, FAST, "theirs") as theirs:
        assert mine.take("a")
        assert mine.take("a")
        assert not theirs.take("a")
        holder = theirs.holder("a")
        assert holder is not None
        assert (holder.state, holder.who.split(",")[0]) == ("alive", "mine")
        time.sleep(3 * FAST)
        assert not theirs.take("a")
        assert theirs.take("b")
    assert mine.take("b"), "a process that ended has no rights"


def test_a_right_that_nobody_had(mine: Leases) -> None:
    assert mine.holder("a") is None


def test_a_silent_process_loses_its_rights_after_the_time(mine: Leases, tmp_path: Path) -> None:
    of_a_dead_process(tmp_path, "a")
    began = time.monotonic()
    while not mine.take("a"):
        assert mine.holder("a").state == "alive"  # type: ignore[union-attr]
        time.sleep(0.02)
    assert FAST <= time.monotonic() - began < 4 * FAST


def test_of_many_that_see_it_dead_one_takes_over(tmp_path: Path) -> None:
    of_a_dead_process(tmp_path, "a")
    won: list[bool] = []
    together = threading.Barrier(8)

    def compete() -> None:
        with Leases.open(tmp_path, 5, "one of many") as leases:
            leases.seconds = FAST
            leases.take("a")
            time.sleep(1.5 * FAST)
            leases.seconds = 5
            leases._seen["dead0"] = (leases._seen["dead0"][0], time.monotonic() - 10)
            together.wait()
            won.append(leases.take("a"))
            together.wait()

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_process_that_counts_more_slowly_is_given_its_own_time(mine: Leases, tmp_path: Path) -> None:
    with Leases.open(tmp_path, 20 * FAST, "slow") as slow:
        assert slow.take("a")
        assert not mine.take("a")
        time.sleep(2 * FAST)
        assert not mine.take("a")


def test_who_lost_a_right_sees_it(mine: Leases, tmp_path: Path) -> None:
    assert mine.take("a")
    with Leases.open(tmp_path, FAST, "theirs") as theirs:
        text = (tmp_path / f"{mine.id}.beat").read_text()
        theirs._seen[mine.id] = text, time.monotonic() - 10
        (tmp_path / f"{mine.id}.beat").write_text(text)
        if theirs.take("a"):  # the count may have moved in between
            assert not mine.take("a")
            assert mine.holder("a").id == theirs.id  # type: ignore[union-attr]


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(mine: Leases, tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    of_a_dead_process(tmp_path, "a", process=f"{child.pid} {module._machine()}")
    assert mine.take("a")
    (tmp_path / "far.beat").write_text(f"7 {FAST} {child.pid} another-machine\n")
    (tmp_path / "b.0").write_text(json.dumps({"id": "far", "who": "far"}))
    assert not mine.take("b")


def test_waiting_for_a_number_ends_when_its_holder_shows_that_it_is_alive(mine: Leases, tmp_path: Path) -> None:
    said: list[str] = []
    with Leases.open(tmp_path, FAST, "theirs") as theirs:
        assert theirs.take("worker-0")
        assert not mine.wait_for("worker-0", lambda holder: said.append(holder.who))
        assert len(said) == 1
    assert mine.wait_for("worker-0", lambda holder: said.append(holder.who))
    assert len(said) == 1


def test_file_systems_without_links(mine: Leases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_link)
    assert mine.take("a")
    assert not create_once(tmp_path / "a.0", "other", "x")
    (tmp_path / "b.0").touch()  # its creator was killed before it wrote
    assert not mine.take("b")
    assert mine.holder("b").who == "another process"  # type: ignore[union-attr]
    time.sleep(1.2 * FAST)
    assert mine.take("b")


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert create_once(tmp_path / "a", "text", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_gone_ends_quietly(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    with Leases.open(folder, FAST, "mine"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        time.sleep(FAST)
    assert not folder.exists()
