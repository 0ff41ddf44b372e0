"""How files are divided among workers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys.merge import on, recipe

from paft_merge import MergeOptions, merge, open_plan
from paft_merge.engine.api import check_output
from paft_merge.engine.balancing import by_file, shares
from paft_merge.engine.workers import identity_of
from paft_merge.errors import OutputError
from paft_merge.output.leases import Leases, create_once
from paft_merge.output.placing import WORKERS, part_of
from paft_merge.output.shards import plan_shards
from paft_merge.output.shared import SharedOutput


def test_the_most_expensive_files_come_first_and_go_to_the_worker_with_the_least() -> None:
    assert shares([1, 5, 3, 3, 4], 2) == [[1, 3], [4, 2, 0]]
    assert shares([1, 1], 3) == [[0], [1], []]
    assert shares([], 2) == [[], []]


def test_shares_are_balanced() -> None:
    costs = np.random.default_rng(0).uniform(1, 10, 200).tolist()
    loads = [sum(costs[i] for i in share) for share in shares(costs, 7)]
    assert max(loads) < 1.05 * min(loads)
    assert sorted(i for share in shares(costs, 7) for i in share) == list(range(200))


def test_the_plans_of_files_are_the_plan(family: Callable[..., dict[str, Path]]) -> None:
    paths = family(torch.bfloat16, shards=3)
    with open_plan(recipe("ties", paths["base"], (on(paths["base"], paths["sft"]), {"weight": 1.0}))) as plan:
        files = by_file(plan)
        assert [file.shards for file in files] == [(shard,) for shard in plan.shards]
        assert [tensor for file in files for tensor in file.tensors] == list(plan.tensors)


def test_workers_in_python(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family(shards=3)
    asked = recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})
    seen: list[tuple[int, int]] = []
    first = merge(asked, tmp_path / "out", worker="1/2", progress=lambda p: seen.append((p.tensors, p.bytes_done)))
    again = merge(asked, tmp_path / "out", worker="0/2")
    assert (first.bytes_written > 0, again.bytes_written) == (True, 0)
    assert seen[-1][0] == len(first.plan.tensors) == len(seen)
    assert seen == sorted(seen)
    assert again.manifest["tensors"].keys() == {tensor.name for tensor in first.plan.tensors}


def test_a_worker_that_comes_while_the_output_is_completed_leaves_nothing(
    family: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out = family(shards=3), tmp_path / "out"
    asked = recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})
    merge(asked, out, worker="0/2")
    before = os.stat(out).st_ino
    monkeypatch.setattr("paft_merge.engine.api.is_finished", lambda *_: False)  # as before the output was there
    assert merge(asked, out, worker="1/2", overwrite=True).bytes_written == 0
    assert os.stat(out).st_ino == before
    assert not out.with_name("out.part").exists()


def test_the_folder_of_a_worker_that_came_late_and_was_killed_is_removed(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths, out = family(shards=3), tmp_path / "out"
    asked = recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})
    merge(asked, out, worker="0/2")
    for factor, stays in ((0.5, False), (0.1, True)):
        other = recipe("slerp", paths["base"], paths["x"], parameters={"t": factor})
        with (
            open_plan(other) as plan,
            SharedOutput.join(out, plan.shards, identity_of(plan, MergeOptions()), "late", 9),
        ):
            pass
        merge(asked, out, worker="1/2")
        assert part_of(out).exists() == stays


def test_a_job_of_an_array_of_slurm_that_is_submitted_alone_joins_those_at_work(
    family: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out, options = family(shards=3), tmp_path / "out", MergeOptions(lease_seconds=1)
    asked = recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    for end in ("MIN", "MAX"):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{end}", "3")
    with open_plan(asked) as plan, SharedOutput.join(out, plan.shards, identity_of(plan, options), "0", 1) as first:
        assert first.leases.take("worker-0")  # another job of the array is at work
        assert merge(asked, out, distributed=True, lease_seconds=1).bytes_written > 0


def test_a_worker_that_is_taken_for_dead_while_it_completes_the_output_goes_on(
    family: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out, gathered, fails = family(shards=3), tmp_path / "out", SharedOutput.gathered, [True]
    asked = recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})

    def taken_over(shared: SharedOutput) -> Any:
        if fails.pop():
            fails.append(False)
            with Leases.open(shared.leases.folder, 9, "another worker") as other:
                create_once(other.folder / "complete.1", json.dumps({"id": other.id, "who": other.who}), other.id)
            raise OutputError.of("OUTPUT", shared.part, "the other worker has moved a file")
        return gathered(shared)

    monkeypatch.setattr(SharedOutput, "gathered", taken_over)
    assert merge(asked, out, worker="0/1").bytes_written > 0


def test_an_output_that_is_completed_while_a_worker_looks_at_it(
    family: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out = family(shards=3), tmp_path / "out"
    asked = recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})
    merge(asked, tmp_path / "other")

    def check(*given: Any) -> None:
        os.rename(tmp_path / "other", out)  # what the last of the other workers does
        check_output(*given)

    monkeypatch.setattr("paft_merge.engine.api.check_output", check)
    assert merge(asked, out, worker="1/2").bytes_written == 0


def test_a_file_system_without_locks(
    family: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    paths = family(shards=3)
    asked = recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})
    merge(asked, tmp_path / "out", worker="0/2")
    merge(asked, tmp_path / "out", worker="1/2")
    with pytest.raises(OutputError, match="No locks available"):
        merge(asked, tmp_path / "other")


def test_devices_of_workers_may_have_other_numbers(family: Callable[..., dict[str, Path]]) -> None:
    paths = family()
    with open_plan(recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})) as plan:
        one, two = (identity_of(plan, MergeOptions(device=device)) for device in ("cuda:0", "cuda:1"))
        assert one == two != identity_of(plan, MergeOptions())


def test_two_workers_that_write_the_same_file_end_in_one(tmp_path: Path) -> None:
    shards = plan_shards({"model.safetensors": [("w", "F32", (2,))]})

    def join() -> AbstractContextManager[SharedOutput]:
        return SharedOutput.join(tmp_path / "out", shards, {}, "a worker", 9)

    with join() as slow, join() as fast, slow.file(0) as late:
        late.write("w", 0, b"12345678")
        with fast.file(0) as early:
            early.write("w", 0, b"12345678")
        assert slow.files() == {0}
    with join() as after:
        assert after.files() == {0}
        assert [path.name for path in (after.part / WORKERS / "files").iterdir()] == ["00000"]
