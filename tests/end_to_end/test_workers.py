"""Merges by several workers, as processes: the files of one process, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.merge import HERE, files_of, on, paft, python, recipe, write_recipe

from paft_merge import merge
from paft_merge.errors import OutputError
from paft_merge.output.placing import WORKERS, part_of

Models = dict[str, Path]
LEASE = 2.0

_COMMAND = "import sys\nfrom paft_merge.cli import cli\ncli(['merge', *sys.argv[1:]])"
_SLOW = """if True:
    import time
    from paft_merge.output.folder import Output
    finish = Output.finish_tensor
    def slowly(self, finished):
        time.sleep({seconds})
        finish(self, finished)
    Output.finish_tensor = slowly
"""
_NEVER_COMPLETE = """if True:
    import time
    from paft_merge.output.folder import Output
    Output.complete = lambda *_, **__: time.sleep(60)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base in six files, two fine-tunes in other numbers of files, and two adapters."""
    root, base = tmp_path_factory.mktemp("models"), random_state(0, torch.bfloat16, layers=6)
    return {
        "base": save_checkpoint(root / "base", base, 6),
        "x": save_checkpoint(root / "x", near(base, 1), 2),
        "y": save_checkpoint(root / "y", near(base, 2, 2e-3)),
        "sft": save_adapter(root / "sft", base, 3),
        "dpo": save_adapter(root / "dpo", base, 4, rank=2, size=5e-3),
    }


def start(*arguments: Any, slow: float = 0.0, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """Start `paft merge` in a process, after the Python text `before`; `slow` is a number of seconds for each tensor."""
    code = (_SLOW.format(seconds=slow) if slow else before) + _COMMAND
    here = os.environ | {"PYTHONPATH": HERE} | environment
    command = [sys.executable, "-c", code, *map(str, arguments), "--lease-seconds", str(LEASE), "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=here)


def ends(*workers: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for workers, which must exit with `code`; their stderr."""
    said = "".join(worker.communicate(timeout=120)[1] for worker in workers)
    assert [worker.returncode for worker in workers] == [code] * len(workers), said
    return said


def until(true: Any, seconds: float = 60) -> Any:
    """Wait until a function returns something true; return that."""
    began = time.monotonic()
    while not (found := true()):
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return found


def complete_files(out: Path) -> list[str]:
    folder = part_of(out) / WORKERS / "files"
    return [path.name for path in folder.iterdir() if "." not in path.name] if folder.is_dir() else []


def ties(models: Models, weight: float | str = 0.5, **extra: Any) -> dict[str, Any]:
    given = {"weight": weight, "density": 0.4}
    sources = [models["x"], on(models["base"], models["sft"]), on(models["base"], models["dpo"])]
    return recipe("ties", models["base"], *((source, given) for source in sources), **extra)


def several(models: Models) -> str:
    """A file of two documents, of which the second uses the first."""
    inner = ties(models, name="inner", parameters={"trim_scope": "global"})
    outer = recipe("slerp", models["y"], "inner", parameters={"t": 0.3})
    return f"{json.dumps(inner)}\n---\n{json.dumps(outer)}"


def two_results(models: Models) -> str:
    one = recipe("dare_ties", models["base"], (models["x"], {"weight": 1.0, "density": 0.5}), name="one")
    two = recipe("linear", None, (models["x"], {"weight": 0.5}), (models["y"], {"weight": 0.5}), name="two")
    return f"{json.dumps(one)}\n---\n{json.dumps(two)}"


def slices(models: Models) -> dict[str, Any]:
    def layers(name: str, first: int, last: int) -> dict[str, Any]:
        return {"model": str(models[name]), "layer_range": [first, last]}

    parts = [{"sources": [layers("x", 0, 4)]}, {"sources": [layers("y", 2, 6)]}]
    return {"merge_method": "passthrough", "slices": parts}


RECIPES = {
    "ties": ties,
    "global-l1": lambda models: recipe(
        "l1_ties", models["base"], (models["x"], {"weight": 1.0}), (on(models["base"], models["sft"]), {"weight": 0.5}),
        parameters={"trim": {"l1_mass": 0.8}, "trim_scope": "global", "rescale": "l1"},
    ),
    "global": lambda models: ties(models, "equal_norm", parameters={"trim_scope": "global", "rescale": "l2"}),
    "dare-stochastic": lambda models: recipe(
        "dare_ties", models["base"], (models["x"], {"weight": 1.0, "density": 0.5}),
        (on(models["base"], models["dpo"]), {"weight": 0.5, "density": 0.5}), rounding="stochastic", seed=7,
    ),
    "slerp": lambda models: recipe("slerp", models["base"], models["x"], parameters={"t": 0.4}),
    "slices": slices,
    "adapter": lambda models: recipe(
        "ties", models["base"], (on(models["base"], models["sft"]), {"weight": "equal_norm"}),
        (on(models["base"], models["dpo"]), {"weight": 0.5}), parameters={"density": 0.4, "trim_scope": "global"},
        output={"kind": "adapter", "rank": 3},
    ),
    "documents": several,
    "results": two_results,
}  # fmt: skip


def written(models: Models, name: str, folder: Path) -> Path:
    made = RECIPES[name](models)
    if isinstance(made, Mapping):
        return write_recipe(folder / "recipe.yaml", made)
    (folder / "recipe.yaml").write_text(made)
    return folder / "recipe.yaml"


# Workers that write an adapter are in tests/engine/test_spaces.py.
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "adapter"])
def test_workers_write_the_files_of_one_process(name: str, models: Models, tmp_path: Path) -> None:
    asked = written(models, name, tmp_path)
    options = {"out_shard_bytes": 20_000} if name in ("slices", "results") else {}
    flags = ["--out-shard-size", "20000"] if options else []
    merge(asked, tmp_path / "one", **options)
    ends(*(start(asked, tmp_path / "many", "--worker", f"{i}/3", *flags, slow=0.02) for i in range(3)))
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".log"} == {"one", "many", "recipe.yaml"}


def test_every_worker_writes_files(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    said = ends(*(start(asked, out, "--worker", f"{i}/3", slow=0.1) for i in range(3)))
    for i in range(3):
        assert f"worker {i} of 3: writes 2 of 6 files" in said
    assert "waits for model-0000" in said
    assert said.count("warning[SCALE]") <= 1
    assert out.is_dir()


def test_one_of_two_workers_alone_does_everything_and_the_other_finds_it_done(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "global", tmp_path), tmp_path / "out"
    ends(start(asked, out, "--worker", "1/2"))
    before = files_of(out)
    ends(start(asked, out, "--worker", "0/2"))
    merge(asked, tmp_path / "one")
    assert files_of(out) == before == files_of(tmp_path / "one")
    assert not part_of(out).exists()


def test_more_workers_than_files(models: Models, tmp_path: Path) -> None:
    asked = write_recipe(tmp_path / "recipe.yaml", recipe("linear", None, (models["y"], {"weight": 1.0})))
    said = ends(*(start(asked, tmp_path / "out", "--worker", f"{i}/3", slow=0.15) for i in range(3)))
    assert (
        len(re.findall(r"no file to write: the output has 1 file and 3 workers; --out-shard-size [\d.]+KB makes", said))
        == 2
    )
    merge(asked, tmp_path / "one")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


# --- the examples of docs/scale.md --------------------------------------------------------------------------------------


def examples(language: str) -> list[str]:
    page = (Path(HERE) / "docs" / "scale.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def example(containing: str) -> str:
    """The only shell example with a text."""
    (found,) = [text for text in examples("sh") if containing in text]
    return found


def shell(script: str, asked: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    """Start an example, with this recipe and output in place of its own, and two processes instead of four."""
    torchrun, paft = f"{sys.executable} -m torch.distributed.run", f"{sys.executable} -m paft_merge"
    script = re.sub(r"^paft ", f"{paft} ", script.replace("torchrun ", f"{torchrun} "), flags=re.MULTILINE)
    script = script.replace("recipe.yaml", str(asked)).replace("/shared/merged", str(out)).replace("-node 4", "-node 2")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        environment = {name: "", **environment}
    here = os.environ | {"PYTHONPATH": HERE} | environment
    return subprocess.Popen(
        ["bash", "-ec", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=here
    )


def test_torchrun_on_one_machine(models: Models, tmp_path: Path) -> None:
    asked, out, began = written(models, "global", tmp_path), tmp_path / "out", time.monotonic()
    said = ends(shell(example("--standalone"), asked, out))
    assert re.search(r"worker [01] of 2: writes 3 of 6 files", said), said
    assert time.monotonic() - began < 50, "a worker waited for the time of a lease"
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_torchrun_on_two_machines(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "slerp", tmp_path), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = example("--nnodes").replace("node0", "127.0.0.1").replace("29500", str(port))
    nodes = [script.replace("--node-rank 0", f"--node-rank {i}") for i in range(2)]
    said = ends(*(shell(node, asked, out) for node in nodes))
    assert re.search(r"worker [0-3] of 4: writes \d of 6 files", said), said
    assert out.is_dir()


def test_an_array_of_slurm(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "slerp", tmp_path), tmp_path / "out"
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
    jobs = [
        shell(example("--array"), asked, out, SLURM_ARRAY_TASK_ID=str(i), SLURM_CPUS_PER_TASK="1", **array)
        for i in range(2)
    ]
    said = ends(*jobs)
    assert re.search(r"worker ([01]) of 2 \(task \1 of an array\): writes 3 of 6 files", said), said


def test_an_indexed_job_of_kubernetes(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "slerp", tmp_path), tmp_path / "out"
    (job,) = [yaml.safe_load(text) for text in examples("yaml")]
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (count,) = [one["value"] for one in container["env"] if one["name"] == "JOB_COMPLETIONS"]
    assert int(count) == job["spec"]["completions"]
    script = " ".join(container["command"]).replace("/shared/recipe.yaml", "recipe.yaml")
    pods = [shell(script, asked, out, JOB_COMPLETION_INDEX=str(i), JOB_COMPLETIONS="2") for i in range(2)]
    ends(*pods)
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_workers_by_hand(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "slerp", tmp_path), tmp_path / "out"
    lines = [line.partition("#")[0].strip() for line in examples("sh")[0].splitlines()]
    assert len(lines) == 2
    ends(*(shell(line, asked, out) for line in lines))
    assert out.is_dir()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_workers_that_are_killed_and_started_again_end_in_the_same_bytes(models: Models, tmp_path: Path) -> None:
    asked, out, chance = written(models, "global", tmp_path), tmp_path / "out", random.Random(5)
    merge(asked, tmp_path / "one")
    running = {i: start(asked, out, "--worker", f"{i}/3", slow=0.05) for i in range(3)}
    for _ in range(4):
        time.sleep(chance.uniform(0.3, 1.5))
        victim = chance.randrange(3)
        running[victim].kill()
        running[victim].communicate()
        count = 3 + (victim < 2)  # the number of workers may change
        running[victim] = start(asked, out, "--worker", f"{victim}/{count}", slow=0.05)
    ends(*running.values())
    assert files_of(out) == files_of(tmp_path / "one")
    assert not part_of(out).exists()


def test_the_files_of_a_dead_worker_are_taken_over_and_it_is_said(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    slow = start(asked, out, "--worker", "0/2", slow=30)
    until(lambda: (part_of(out) / WORKERS / "leases" / "file-00000.0").exists() or _claimed(out))
    other = start(asked, out, "--worker", "1/2")
    until(lambda: len(complete_files(out)) == 5)
    os.kill(slow.pid, signal.SIGSTOP)  # as a machine that hangs
    said = ends(other)
    os.kill(slow.pid, signal.SIGCONT)
    slow.kill()
    slow.communicate()
    assert "waits for model-0000" in said
    assert "takes over model-0000" in said
    assert f"was silent for {LEASE:g} s" in said
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def _claimed(out: Path) -> bool:
    folder = part_of(out) / WORKERS / "leases"
    return folder.is_dir() and any(path.name.startswith("file-") for path in folder.iterdir())


def test_a_worker_that_was_taken_for_dead_does_no_harm(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    hangs = start(asked, out, "--worker", "0/2", slow=1)
    until(lambda: _claimed(out))
    os.kill(hangs.pid, signal.SIGSTOP)
    ends(start(asked, out, "--worker", "1/2"))
    before = files_of(out)
    os.kill(hangs.pid, signal.SIGCONT)
    ends(hangs)
    merge(asked, tmp_path / "one")
    assert files_of(out) == before == files_of(tmp_path / "one")
    assert not part_of(out).exists()


def test_a_worker_that_lost_its_file_goes_on(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    hangs = start(asked, out, "--worker", "0/2", slow=0.05)
    until(lambda: _claimed(out))
    os.kill(hangs.pid, signal.SIGSTOP)
    other = start(asked, out, "--worker", "1/2", slow=0.4)
    leases = part_of(out) / WORKERS / "leases"
    until(lambda: any(path.name.startswith("file-") and path.name.endswith(".1") for path in leases.iterdir()))
    os.kill(hangs.pid, signal.SIGCONT)
    said = ends(hangs, other)
    assert "worker 0 of 2: was taken for dead, and another one writes model-0000" in said
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_a_worker_whose_number_was_given_away_stops(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    hangs = start(asked, out, "--worker", "0/2", slow=0.5)
    until(lambda: _claimed(out))
    os.kill(hangs.pid, signal.SIGSTOP)
    again = start(asked, out, "--worker", "0/2", slow=0.1)
    until((part_of(out) / WORKERS / "leases" / "worker-0.1").exists)
    os.kill(hangs.pid, signal.SIGCONT)
    said = ends(hangs, code=1)
    assert f"worker 0 of 2 was silent for {LEASE:g} s, and worker 0 of 2, process {again.pid} on" in said
    assert "took its number; nothing is lost: the others write its files" in said
    ends(again)
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_a_folder_that_is_deleted_under_a_worker(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    worker = start(asked, out, "--worker", "0/2", slow=0.3)
    until(lambda: _claimed(out))
    shutil.rmtree(part_of(out), ignore_errors=True)
    said = ends(worker, code=1)
    assert "error[OUTPUT]" in said
    assert "was deleted while a worker used it; start the workers again" in said
    assert not out.exists()


def test_damaged_files_of_a_merge_are_named(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    worker = start(asked, out, "--worker", "0/2", slow=0.3)
    until(lambda: len(complete_files(out)) == 2)
    worker.kill()
    worker.communicate()
    folder = part_of(out) / WORKERS
    journal = folder / "files" / complete_files(out)[0] / "merge_state.json"
    journal.write_bytes(journal.read_bytes()[:-9])
    said = ends(start(asked, out, "--worker", "0/2"), code=1)
    assert f"{journal.parent}: its journal is incomplete; delete this folder, and start a worker again" in said
    shutil.rmtree(journal.parent)
    before = (folder / "merge.json").read_bytes()
    (folder / "merge.json").write_bytes(before[:50])
    said = ends(start(asked, out, "--worker", "0/2"), code=1)
    assert f"merge.json: is damaged; delete {part_of(out)} to start over" in said
    (folder / "merge.json").write_bytes(before)
    ends(start(asked, out, "--worker", "0/2"))
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_two_live_workers_cannot_have_the_same_number(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    first = start(asked, out, "--worker", "0/2", slow=0.4)
    until(lambda: _claimed(out))
    said = ends(start(asked, out, "--worker", "0/2"), code=1)
    assert "error[BUSY]" in said
    assert f"worker 0 of 2, process {first.pid} on" in said
    assert "is at work already; give each worker another number" in said
    ends(first)
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


@pytest.mark.parametrize("change", ["recipe", "input", "option", "version"])
def test_a_worker_that_would_merge_something_else_is_refused(change: str, models: Models, tmp_path: Path) -> None:
    shutil.copytree(models["x"], tmp_path / "x")
    models = models | {"x": tmp_path / "x"}
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    flags: Sequence[str] = []
    first = start(asked, out, "--worker", "0/2", slow=30)
    until(lambda: _claimed(out))
    if change == "recipe":
        write_recipe(asked, ties(models, parameters={"lambda": 0.5}))
    elif change == "input":
        save_checkpoint(tmp_path / "x", near(random_state(0, torch.bfloat16, layers=6), 9), 2)
    elif change == "option":
        flags = ["--no-write-model-card"]
    else:
        place = part_of(out) / WORKERS / "merge.json"
        begun = json.loads(place.read_text())
        begun["versions"]["numba"] = "0.1"
        place.write_text(json.dumps(begun))
    said = ends(start(asked, out, "--worker", "1/2", *flags), code=1)
    first.kill()
    first.communicate()
    names = {
        "recipe": "another recipe (parameters)",
        "input": f"another inputs ({tmp_path / 'x'})",
        "option": "another options (write_model_card)",
        "version": "another versions (numba)",
    }
    assert names[change] in said
    assert (
        f"give all workers the same recipe, inputs, version and options; to start over, delete {part_of(out)}" in said
    )
    assert len([line for line in said.splitlines() if line.startswith("error")]) == 1


def test_finalize_lists_what_is_missing_and_completes_what_is_there(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    assert "no worker has begun to write it" in ends(start(asked, out, "--finalize"), code=1)
    assert not part_of(out).exists()
    killed = start(asked, out, "--worker", "0/2", slow=0.3)
    until(lambda: len(complete_files(out)) == 2)
    killed.kill()
    killed.communicate()
    said = ends(start(asked, out, "--finalize"), code=1)
    assert "error[INCOMPLETE]" in said
    assert "4 of 6 files are missing: model-0000" in said
    assert "start its workers again" in said
    assert not out.exists()
    os.utime(models["x"] / "model-00001-of-00002.safetensors")  # a copy on another machine has another time
    ends(start(asked, out, "--worker", "0/1", "--quiet"))
    assert "is done" in ends(start(asked, out, "--finalize"))
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")


def test_all_files_are_there_and_their_workers_are_dead(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    worker = start(asked, out, "--worker", "0/2", before=_NEVER_COMPLETE)
    until(lambda: len(complete_files(out)) == 6)
    worker.kill()
    worker.communicate()
    assert not out.exists()
    ends(*(start(asked, out, "--finalize") for _ in range(3)))
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".log"} == {"one", "out", "recipe.yaml"}


@pytest.mark.parametrize("what", ["replacing-workers", "workers-mounted"])
def test_a_worker_is_killed_at_any_step(what: str, models: Models, tmp_path: Path) -> None:
    asked = write_recipe(tmp_path / "recipe.yaml", recipe("slerp", models["x"], models["y"], parameters={"t": 0.5}))
    folder = tmp_path / "killed"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "model.safetensors").write_text("the old one")
    (folder / "old" / "config.json").write_text("{}")
    code = "import sys; from toys import kill_merges; kill_merges.main(*sys.argv[1:])"
    run = python(code, asked, folder, what, "9")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["steps"] > 70
    assert not found["faults"]


def test_a_merge_by_one_process_leaves_the_folder_of_workers_alone(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    killed = start(asked, out, "--worker", "0/2", slow=0.3)
    until(lambda: len(complete_files(out)) == 1)
    killed.kill()
    killed.communicate()
    for resume in (False, True):
        with pytest.raises(
            OutputError, match=r"is the unfinished merge of several workers; start its workers again, or"
        ):
            merge(asked, out, resume=resume)
    assert complete_files(out)
    shutil.rmtree(part_of(out))
    merge(asked, out)


def test_workers_leave_the_folder_of_a_merge_by_one_process_alone(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    killed = start(asked, out, slow=10)
    until(lambda: (part_of(out) / "merge_state.json").exists())
    said = ends(start(asked, out, "--worker", "0/2"), code=1)
    assert "error[BUSY]" in said
    killed.kill()
    killed.communicate()
    said = ends(start(asked, out, "--worker", "0/2"), code=1)
    assert "is the unfinished merge of one process; continue it with --resume and without workers" in said
    merge(asked, out, resume=True)


def test_an_existing_model_is_replaced_only_if_asked(models: Models, tmp_path: Path) -> None:
    asked, out = written(models, "ties", tmp_path), tmp_path / "out"
    shutil.copytree(models["base"], out)
    said = ends(start(asked, out, "--worker", "0/2"), code=1)
    assert "pass --overwrite to replace it" in said
    ends(*(start(asked, out, "--worker", f"{i}/2", "--overwrite", slow=0.05) for i in range(2)))
    merge(asked, tmp_path / "one")
    assert files_of(out) == files_of(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".log"} == {"one", "out", "recipe.yaml"}


def test_a_fault_of_an_input_ends_every_worker_with_its_line(models: Models, tmp_path: Path) -> None:
    bad = near(random_state(0, torch.bfloat16, layers=6), 1)
    bad["model.norm.weight"][3] = float("nan")
    asked = write_recipe(
        tmp_path / "recipe.yaml",
        recipe("linear", None, (save_checkpoint(tmp_path / "bad", bad, 3), {"weight": 0.5}), (models["y"], {"weight": 0.5})),
    )  # fmt: skip
    said = ends(*(start(asked, tmp_path / "out", "--worker", f"{i}/2") for i in range(2)), code=1)
    assert said.count("error[NONFINITE]") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--worker", "2/2"], "'2/2' is not a worker; they are counted from 0: write 0/2 to 1/2"),
        (["--worker", "x"], "'x' is not a worker; write I/N"),
        (["--distributed"], "the environment has no number of a worker"),
        (["--worker", "0/2", "--lease-seconds", "0"], "0.0 is not in the range x>0"),
        (["--worker", "0/2", "--finalize"], "worker, distributed and finalize exclude each other"),
    ],
)
def test_usage(
    flags: Sequence[str], says: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    run = paft("merge", written(models, "ties", tmp_path), tmp_path / "out", *flags)
    assert run.exit_code == 2
    assert says in run.stderr.replace("\n", " ")
