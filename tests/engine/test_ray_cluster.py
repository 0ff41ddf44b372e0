"""Ray without a cluster: options, addresses, resources, and what a task does on a machine that differs."""

from __future__ import annotations

import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toys.merge import paft, recipe, write_recipe

from paft_merge import MergeOptions, merge, open_plan
from paft_merge.engine import ray_merge
from paft_merge.engine.ray_cluster import Cluster, Needs, until_seen
from paft_merge.engine.ray_merge import Job, write_file
from paft_merge.engine.workers import identity_of
from paft_merge.errors import CheckpointError, OutputError, PaftMergeError, Problem, RunError
from paft_merge.output.shared import SharedOutput
from paft_merge.pipeline import run
from paft_merge.plan import MergePlan

Family = Callable[..., dict[str, Path]]


@pytest.mark.parametrize("given", [{"worker": "0/2"}, {"distributed": True}, {"finalize": True}])
def test_ray_and_workers_exclude_each_other(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Ray numbers its tasks itself"):
        MergeOptions(engine="ray", **given)


def test_options_that_need_ray_or_exclude_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ray_address='auto' needs engine='ray'"):
        MergeOptions(ray_address="auto")
    with pytest.raises(ValueError, match="engine must be local or ray, not 'spark'"):
        MergeOptions(engine="spark")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="write device='cuda', not 'cuda:1'"):
        MergeOptions(engine="ray", device="cuda:1")
    asked = write_recipe(tmp_path / "r.yaml", {})
    for command, flags, said in [
        ("merge", ["--ray-address", "auto"], "--ray-address auto needs --engine ray"),
        (
            "merge",
            ["--engine", "ray", "--worker", "0/2"],
            "leave out worker, distributed and finalize with --engine ray",
        ),
        ("run", ["--ray-address", "auto"], "--ray-address needs --engine ray"),
        ("tune", ["--ray-address", "auto"], "--ray-address needs --engine ray"),
    ]:
        done = paft(command, asked, tmp_path / "out", *flags)
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())


def test_ray_is_not_installed(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = write_recipe(tmp_path / "r.yaml", recipe("linear", None, (family()["x"], {"weight": 1.0})))
    done = paft("merge", asked, tmp_path / "out", "--engine", "ray")
    assert (done.exit_code, done.stderr) == (
        1, "error[MISSING]: ray is not installed; pip install 'paft-merge[ray]'\n",
    )  # fmt: skip
    with pytest.raises(RunError, match="ray is not installed"):
        run(asked, tmp_path / "run", engine="ray")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nonsense", "127.0.0.1:nonsense", "[::1]:9"])
def test_an_address_without_a_cluster(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(RunError) as found, Cluster.connect(address):
        pass
    (problem,) = found.value.problems
    assert (problem.code, problem.where) == ("RAY", address)
    assert "\n" not in str(problem)
    assert problem.what.startswith("no cluster: ")


def test_a_cluster_that_refuses_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(address: str, **_: Any) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}")

    monkeypatch.setattr(pytest.importorskip("ray"), "init", refuses)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(
            RunError, match=r"Failed to connect.*; use Ray in the version of the cluster, with its token in"
        ):
            Cluster.connect(address).__enter__()


def test_errors_pass_between_processes() -> None:
    for kind in (CheckpointError, OutputError, PaftMergeError):
        error = kind([Problem("A", "b", "c", "d"), Problem("E", "f", "g")], [Problem("W", "", "w")])
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.problems, again.warnings, str(again)) == (
            kind, error.problems, error.warnings, str(error),
        )  # fmt: skip


def cluster(*nodes: dict[str, float], started: bool = False) -> Cluster:
    """A cluster of machines with these resources."""
    listed = [{"Alive": True, "Resources": node} for node in nodes]
    listed.append({"Alive": False, "Resources": {"CPU": 1}})
    return Cluster(SimpleNamespace(nodes=lambda: listed), started)


HEAD = {"memory": 1e9}
BIG, SMALL = {"CPU": 64, "GPU": 8, "memory": 1e12}, {"CPU": 16, "memory": 64e9}


@pytest.mark.parametrize(
    ("nodes", "parallel", "expected"),
    [
        ([HEAD, BIG, BIG], None, (16, Needs(8, 1))),
        ([BIG, SMALL], None, (8, Needs(8, 1))),
        ([HEAD, SMALL, SMALL], None, (2, Needs(16, 0))),
        ([SMALL, SMALL], 8, (8, Needs(4, 0))),
        ([SMALL], 100, (100, Needs(1, 0))),
        ([BIG], 16, (16, Needs(4, 0.5))),
        ([BIG], 2, (2, Needs(32, 1))),
        ([HEAD], None, (1, Needs(1, 0))),
        ([], 3, (3, Needs(1, 0))),
    ],
)
def test_shares_of_machines(nodes: list[dict[str, float]], parallel: int | None, expected: tuple[int, Needs]) -> None:
    assert cluster(*nodes).share(parallel) == expected


def test_resources_of_tasks(caplog: pytest.LogCaptureFixture) -> None:
    made = cluster(HEAD, BIG, SMALL)
    assert made.cores == 16
    made.check(Needs(64, 1, 10**12))
    made.check(Needs(16, 0, 10**9))
    assert not caplog.messages
    made.check(Needs(16, 9, 10**9))
    assert caplog.messages == [
        "a task needs 16 CPUs, 9 GPUs, 1.0 GB of memory; no machine of the cluster has that "
        "(16 CPUs, 64.0 GB of memory; 64 CPUs, 8 GPUs, 1000.0 GB of memory); tasks wait until one joins"
    ]
    with pytest.raises(RunError, match=r"a task needs 17 CPUs; .*; lower threads or memory"):
        cluster(SMALL, started=True).check(Needs(17))


# --- a task on a machine that differs ---------------------------------------------------------------------------------


@pytest.fixture
def planned(family: Family) -> Iterator[MergePlan]:
    paths = family(shards=3)
    with open_plan(recipe("slerp", paths["base"], paths["x"], parameters={"t": 0.5})) as plan:
        yield plan


def job(plan: MergePlan, out: Path, shared: SharedOutput, **changes: Any) -> Job:
    @contextmanager
    def again() -> Iterator[MergePlan]:
        yield plan

    given = {"open_plan": again, "driver": shared.leases.id, "options": MergeOptions(lease_seconds=1), **changes}
    return Job(out=out, threads=1, hold=0, **given)


@pytest.fixture
def shared(planned: MergePlan, tmp_path: Path) -> Iterator[SharedOutput]:
    identity = identity_of(planned, MergeOptions())
    with SharedOutput.join(tmp_path / "out", planned.shards, identity, "driver", 1) as joined:
        yield joined
    ray_merge._OPENED.close()


def test_a_task_writes_one_file(planned: MergePlan, shared: SharedOutput, tmp_path: Path) -> None:
    written, warnings = write_file(job(planned, tmp_path / "out", shared), 1)
    assert (shared.files(), warnings) == ({1}, [])
    assert 0 < written < planned.bytes_written
    assert write_file(job(planned, tmp_path / "out", shared), 1) == (0, [])


def test_a_machine_without_the_output(planned: MergePlan, shared: SharedOutput, tmp_path: Path) -> None:
    for out, driver in ((tmp_path / "other", shared.leases.id), (tmp_path / "out", "somebody-else")):
        with pytest.raises(OutputError) as found:
            write_file(job(planned, out, shared, driver=driver), 0)
        assert str(found.value).startswith(f"{out}: machine ")
        assert "does not see what the process that submits tasks has written there" in str(found.value)
    assert not (tmp_path / "other.part").exists()


def test_a_machine_without_an_input(planned: MergePlan, shared: SharedOutput, tmp_path: Path) -> None:
    @contextmanager
    def fails() -> Iterator[MergePlan]:
        raise CheckpointError.of("MISSING", "/data/base", "does not exist")
        yield planned

    with pytest.raises(CheckpointError, match=r"^on machine \S+: /data/base: does not exist$"):
        write_file(job(planned, tmp_path / "out", shared, open_plan=fails), 0)


def test_a_machine_with_another_version(
    planned: MergePlan, shared: SharedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = identity_of(planned, MergeOptions())
    other = {**found, "versions": {**found["versions"], "numba": "0.1"}}
    monkeypatch.setattr(ray_merge, "identity_of", lambda *_: other)
    with pytest.raises(OutputError, match=r"on machine \S+: .*was started with another versions \(numba\)"):
        write_file(job(planned, tmp_path / "out", shared), 0)


def test_files_that_come_late_are_waited_for() -> None:
    answers = iter([False, False, True])
    until_seen(lambda: next(answers), Path("x"), OutputError, 5)
    assert next(answers, None) is None


def test_an_output_in_an_object_store_is_refused(family: Family) -> None:
    pytest.importorskip("ray")
    asked = recipe("linear", None, (family()["x"], {"weight": 1.0}))
    with pytest.raises(OutputError, match="is in an object store, and workers share a folder"):
        merge(asked, "memory://bucket/out", engine="ray")


def test_nothing_is_asked_of_ray_without_it(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    merge(recipe("linear", None, (family()["x"], {"weight": 1.0})), tmp_path / "out", engine="local")
