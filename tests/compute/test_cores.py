"""The cores that threads are started for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import paft_merge
from paft_merge.compute.cores import available_cores


def test_only_the_cores_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert available_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == 64


def test_nothing_else_counts_the_cores_of_the_machine() -> None:
    tree = Path(paft_merge.__file__).parent
    users = {str(path.relative_to(tree)) for path in tree.rglob("*.py") if "os.cpu_count" in path.read_text("utf-8")}
    assert users == {"compute/cores.py", "engine/ray_cluster.py"}  # Ray's default, for a cluster that tells none
