"""Merges on a Ray cluster of two nodes in one machine: the files of one process, whatever happens to the tasks."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import near, random_state, save_checkpoint
from methods.test_mergekit_arithmetic import NOISY
from test_workers import RECIPES, Models, complete_files, example, start, until, written
from test_workers import models as models
from toys.merge import HERE, files_of, recipe, write_recipe
from toys.ray_nodes import NODE, Nodes, two_nodes
from toys.run import make_world, outcome, sections
from toys.train import THEIR_WARNINGS

from paft_merge import MergeResult, Progress, merge
from paft_merge.engine.ray_cluster import Cluster, Needs
from paft_merge.errors import EvaluateError, MergeError, OutputError, Problem, RunError
from paft_merge.output.placing import WORKERS, part_of
from paft_merge.pipeline import Event, run
from paft_merge.pipeline.tuning import Trial, tune


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


@pytest.fixture
def slow(nodes: Nodes) -> Iterator[Nodes]:
    nodes.slow(0.1)
    yield nodes
    nodes.slow(0)


@pytest.mark.parametrize("name", RECIPES)
def test_tasks_write_the_files_of_one_process(name: str, models: Models, nodes: Nodes, tmp_path: Path) -> None:
    asked = written(models, name, tmp_path)
    options: Any = {"out_shard_bytes": 20_000} if name in ("slices", "results") else {}
    merge(asked, tmp_path / "one", **options)
    made = merge(asked, tmp_path / "many", engine="ray", **options)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "many", "recipe.yaml"}
    assert made.bytes_written > 0


def test_each_file_is_written_by_a_task_and_progress_is_that_of_the_whole(
    models: Models, slow: Nodes, tmp_path: Path
) -> None:
    asked, seen = written(models, "ties", tmp_path), list[Progress]()
    merge(asked, tmp_path / "out", engine="ray", progress=seen.append)
    sizes = [progress.bytes_done for progress in seen]
    assert sizes == sorted(sizes)
    assert len(sizes) > 3
    assert (seen[-1].tensors, seen[-1].bytes_done) == (seen[-1].tensors_total, seen[-1].bytes_total)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def in_background(*arguments: Any, **options: Any) -> Future[MergeResult]:
    """Merge on the cluster in another thread."""
    return ThreadPoolExecutor(1).submit(merge, *arguments, engine="ray", **options)


def processes(out: Path) -> list[int]:
    """The processes that are writing files, as their leases name them."""
    shared = part_of(out) / WORKERS
    if not (shared / "leases").is_dir():
        return []
    begun = [path.name.partition(".") for path in (shared / "files").iterdir() if "." in path.name]
    leases = [(shared / "leases" / f"file-{number}.0", id) for number, _, id in begun]
    held = [path.read_text() for path, id in leases if path.exists() and id in path.read_text()]
    return [int(found[1]) for text in held if (found := re.search(r"process (\d+) on", text))]


def test_a_task_whose_process_is_killed_is_run_again(models: Models, slow: Nodes, tmp_path: Path) -> None:
    asked, out, warned = written(models, "global", tmp_path), tmp_path / "out", list[Problem]()
    running = in_background(asked, out, warn=warned.extend)
    victim = until(lambda: complete_files(out) and processes(out))[-1]
    os.kill(victim, signal.SIGKILL)
    running.result(60)
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")
    said = [str(problem) for problem in warned if problem.code == "WORKERS"]
    assert re.fullmatch(
        rf"the task of (model-\S+): takes over \1: the task of \1, process {victim} on \S+ has ended", "\n".join(said)
    )


def test_a_node_that_is_lost(models: Models, slow: Nodes, tmp_path: Path) -> None:
    asked, out, third = written(models, "ties", tmp_path), tmp_path / "out", slow.cluster.add_node(**NODE)
    slow.slow(2)
    running = in_background(asked, out)
    until(lambda: len(processes(out)) >= 3)
    slow.cluster.remove_node(third, allow_graceful=False)
    slow.slow(0)
    running.result(60)
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_an_interrupted_merge_stops_its_tasks_and_can_be_continued(models: Models, slow: Nodes, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    slow.slow(0.5)
    given = {"recipe.yaml": str(asked), "/shared/merged": str(out), "auto": slow.cluster.address}
    words = [given.get(word, word) for word in shlex.split(example("merged --engine ray"))[1:]]
    command = [sys.executable, "-m", "paft_merge", *words]
    here = os.environ | {"PYTHONPATH": HERE}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job begins with it ignored
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    driver = subprocess.Popen(command, **pipes, text=True, env=here, preexec_fn=heed)
    until(lambda: processes(out))
    driver.send_signal(signal.SIGINT)
    stdout, stderr = driver.communicate(timeout=60)
    assert (driver.returncode, stdout) == (130, ""), stderr
    assert stderr.splitlines()[-1] == (
        "interrupted; finished work is kept, and the same command with --resume continues"
    ), stderr
    assert "Traceback" not in stderr
    before = files_of(part_of(out))
    assert not [name for name in before if re.search(r"files/\d+\.", name)], "a task left a file that it had begun"
    slow.slow(0)
    merge(asked, out, engine="ray")
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_an_error_of_a_task_is_that_of_one_process(models: Models, nodes: Nodes, tmp_path: Path) -> None:
    base = random_state(0, torch.bfloat16, layers=6)
    bad = near(base, 1)
    bad["model.layers.3.mlp.up_proj.weight"][0, 3] = float("nan")
    save_checkpoint(tmp_path / "bad", bad, 3)
    asked = write_recipe(tmp_path / "recipe.yaml", recipe("linear", None, (tmp_path / "bad", {"weight": 1.0})))
    with pytest.raises(MergeError) as one:
        merge(asked, tmp_path / "one")
    with pytest.raises(MergeError) as many:
        merge(asked, tmp_path / "out", engine="ray")
    assert many.value.problems == one.value.problems
    assert type(many.value) is MergeError
    assert not (tmp_path / "out").exists()


def test_a_finished_output_is_left_as_it_is(models: Models, nodes: Nodes, tmp_path: Path) -> None:
    asked, out = written(models, "slerp", tmp_path), tmp_path / "out"
    merge(asked, out)
    assert merge(asked, out, engine="ray").bytes_written == 0
    written(models, "ties", tmp_path)
    with pytest.raises(OutputError, match="holds a finished merge with another recipe"):
        merge(asked, out, engine="ray")
    assert merge(asked, out, engine="ray", overwrite=True).bytes_written > 0


def test_tasks_continue_the_files_of_workers(models: Models, slow: Nodes, tmp_path: Path) -> None:
    asked, out = written(models, "global", tmp_path), tmp_path / "out"
    worker = start(asked, out, "--worker", "0/1", slow=0.2)
    until(lambda: len(complete_files(out)) >= 2)
    worker.kill()
    worker.communicate()
    merge(asked, out, engine="ray")
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_two_drivers_of_one_output(models: Models, slow: Nodes, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    running = in_background(asked, out, lease_seconds=2)
    until(lambda: processes(out))
    with pytest.raises(OutputError, match=r"the driver of Ray's tasks, process .* merges this on Ray already"):
        merge(asked, out, engine="ray", lease_seconds=2)
    running.result(60)


def test_relative_paths_are_those_of_the_driver(
    models: Models, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models["x"].parent)
    asked = recipe("linear", None, ("x", {"weight": 0.5}), ("y", {"weight": 0.5}))
    merge(asked, tmp_path / "one")
    merge(asked, Path(os.path.relpath(tmp_path / "out")), engine="ray")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_methods_of_modules(models: Models, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy_on_ray.py").write_text(NOISY.replace('"noisy"', '"noisy_on_ray"'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = recipe("noisy_on_ray", models["base"], (models["x"], {"weight": 0.5}))
    merge(asked, tmp_path / "one", imports=["noisy_on_ray"])
    merge(asked, tmp_path / "out", imports=["noisy_on_ray"], engine="ray")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_a_machine_without_the_package(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    ghost = ModuleType("ghost")
    exec("def haunt(): pass", vars(ghost))
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    vars(ghost)["haunt"].__module__ = "ghost"
    with Cluster.connect(None) as cluster, pytest.raises(RunError) as found:
        list(cluster.each(vars(ghost)["haunt"], [()], Needs(1)))
    assert re.fullmatch(
        r"a task cannot begin on machine [\d.]+: ModuleNotFoundError: No module named 'ghost'; install paft-merge, in one "
        "version, on every machine", str(found.value),
    )  # fmt: skip


def test_resources_that_no_machine_has(
    models: Models, nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked, out = written(models, "slerp", tmp_path), tmp_path / "out"
    running = in_background(asked, out, threads=2)
    until(lambda: "tasks wait until one joins" in caplog.text)
    assert re.search(
        r"a task needs 2 CPUs, 0\.\d GB of memory; no machine of the cluster has that \(1 CPU, ", caplog.text
    )
    big = nodes.cluster.add_node(**{**NODE, "num_cpus": 2})
    running.result(60)
    nodes.cluster.remove_node(big)
    assert out.is_dir()


# --- steps of a run, and trials of a search -------------------------------------------------------------------------------


Ran = tuple[Path, list[Event], list[str]]
TUNE = {"metric": "text", "space": {"models[1].parameters.weight": [0.0, 4.0]}, "trials": 4, "startup_trials": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metrics = {key: sections()["evaluate"]["metrics"][key] for key in ("words", "text")}
    compare = {"arms": ["base", "individual", "parallel"], "methods": ["linear"]}
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder, evaluate={"metrics": metrics}, compare=compare, tune=TUNE)


@pytest.fixture(scope="module")
def ran(world: Path, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The folder of a run on the cluster, its events, and what it warned about."""
    folder, events, warned = tmp_path_factory.mktemp("runs") / "ray", list[Event](), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("paft_merge").addHandler(handler)
    run(world, folder, engine="ray", on_event=events.append)
    logging.getLogger("paft_merge").removeHandler(handler)
    return folder, events, warned


@THEIR_WARNINGS
def test_the_results_of_steps_on_ray_are_those_of_a_run(
    world: Path, ran: Ran, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, events, warned = ran
    run(world, tmp_path / "one")
    assert (
        {text for text in warned if "answers" in text}
        == {text for text in caplog.messages if "answers" in text}
        != set()
    )
    assert outcome(folder) == outcome(tmp_path / "one")
    assert not run(world, folder).done, "all steps are done"
    here, there = (json.loads((place / "run.json").read_text())["steps"] for place in (tmp_path / "one", folder))
    assert here.keys() == there.keys()
    for name, step in here.items():
        assert (there[name]["key"], there[name]["state"]) == (step["key"], "done")
        assert there[name].get("outputs", {}).keys() == step.get("outputs", {}).keys()
    assert {path.name for path in (folder / "logs").iterdir()} == {
        path.name for path in (tmp_path / "one/logs").iterdir()
    }
    ended = [event.step for event in events if event.what == "done"]
    assert {"train/sft", "audit/adapters", "merge/merged", "evaluate/base"} <= set(ended)
    begun = [event.step for event in events if event.what == "start"]
    assert begun.index("train/dpo") < ended.index("train/sft") + 2, "adapters are trained at the same time"


FAULTS = {
    "of ours": "from paft_merge.errors import EvaluateError\n    raise EvaluateError.of('WORDS', 'here', 'no words')",
    "of others": "raise ValueError('no words')",
}


@THEIR_WARNINGS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_fails_on_ray_stops_the_run(fault: str, world: Path, ran: Ran, tmp_path: Path) -> None:
    folder, events = shutil.copytree(ran[0], tmp_path / "run"), list[Event]()
    reward, overrides = world.with_name("reward.py"), ["evaluate.metrics.words.max_new_tokens=3"]
    text = reward.read_text()
    try:
        reward.write_text(f"def words(completions, **columns):\n    {FAULTS[fault]}\n")
        with pytest.raises((EvaluateError, ValueError)) as found:
            run(world, folder, overrides=overrides, engine="ray", on_event=events.append)
    finally:
        reward.write_text(text)
    if fault == "of ours":
        assert type(found.value) is EvaluateError
        first, last = found.value.problems
        assert (first.code, first.what) == ("WORDS", "no words")
        assert last.what.startswith("stage evaluate stopped; finished steps (train, audit, merge")
    assert "no words" in next(event.text for event in events if event.what == "failed")
    steps = json.loads((folder / "run.json").read_text())["steps"]
    failed = [step["error"] for step in steps.values() if step["state"] == "failed"]
    assert 1 <= len(failed) <= 2
    assert "no words" in failed[0]
    done = run(world, folder, overrides=overrides, engine="ray").done
    assert {name.partition("/")[0] for name in done} == {"evaluate"}


def test_trials_run_side_by_side(world: Path, ran: Ran, tmp_path: Path) -> None:
    folder, seen = shutil.copytree(ran[0], tmp_path / "run"), list[Trial]()
    found = tune(world, folder, engine="ray", trials=3, progress=lambda trial, done, total: seen.append(trial))
    assert sorted(trial.number for trial in seen) == [1, 2, 3]
    assert len({trial.parameters["models[1].parameters.weight"] for trial in found.trials}) == 3
    assert [trial.is_recipe for trial in found.trials].count(True) == 1
    assert not (folder / "scratch").exists()
    again = tune(world, folder, engine="ray", trials=4)
    assert again.trials[:3] == found.trials
    (own,) = [trial for trial in again.trials if trial.is_recipe]
    done = json.loads((folder / "evaluations" / "merged" / "text.json").read_text())
    assert own.scores["text"] == pytest.approx(done["text"]["value"], rel=1e-6)
