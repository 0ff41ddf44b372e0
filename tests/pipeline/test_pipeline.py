"""`paft run`: what is done, what is not done again, and that a run which was killed ends like one that was not."""

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
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from toys.converters import checkout
from toys.hub import UPLOADS, hub
from toys.hub_server import HubServer
from toys.run import Killed, dying, make_world, outcome, write_rows
from toys.train import THEIR_WARNINGS

from paft_merge import pipeline
from paft_merge.cli import cli
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import AuditError, PaftMergeError, RecipeError, RunError
from paft_merge.pipeline import plan, run
from paft_merge.pipeline.state import State

__all__ = ["hub"]
pytestmark = THEIR_WARNINGS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its data, which no test changes."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run(world, folder)
    return folder


@pytest.fixture
def copied(unbroken: Path, tmp_path: Path) -> Path:
    """That run, to be played with. In its own place, since `run.json` names no folder."""
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


def test_a_run_leaves_every_stage_and_a_table(unbroken: Path) -> None:
    for name in ("adapters/sft/paft_train.json", "adapters/dpo/paft_train.json", "audit/audit.json", "merged/model.safetensors",
                 "evaluations/merged/skill.json", "table.md", "table.csv", "table.json", "logs/train.log", "recipe.yaml"):  # fmt: skip
        assert (unbroken / name).is_file(), name
    record = json.loads((unbroken / "run.json").read_text())
    assert {step["state"] for step in record["steps"].values()} == {"done"}
    assert [step["stage"] for step in record["steps"].values()] == sorted(
        (step["stage"] for step in record["steps"].values()), key=["train", "audit", "merge", "evaluate"].index
    )
    (row,) = json.loads((unbroken / "table.json").read_text())["rows"]
    assert row["arm"] == "merged"
    assert list(row["cells"]) == ["skill", "pairs", "words", "text", "sparsity"]
    assert 0 <= row["cells"]["pairs"]["mean"] <= 1
    assert 1 < row["cells"]["text"]["mean"] < 100


def test_an_unchanged_run_does_nothing_again(world: Path, copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.suffix in (".safetensors",)}
    assert run(world, copied).done == ()
    assert {path: path.stat().st_mtime_ns for path in before} == before


DROPS = ("merge.merge_method=dare_ties", "merge.parameters={density: 0.5}", "merge.models[0].parameters={weight: 1.0}")
"""The toy's merge with random drops."""


def weights(folder: Path) -> bytes:
    """The merged tensors of a run."""
    return (folder / "merged/model.safetensors").read_bytes()


def test_random_drops_are_the_same_in_any_run_folder_however_it_is_spelt(
    world: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (Path(shutil.copytree(unbroken, tmp_path / name)) for name in ("one", "deeper/two"))
    monkeypatch.chdir(tmp_path)
    run(world, one, overrides=(*DROPS, "evaluate=false", "audit=false"))
    run(world, "./deeper/../deeper/two", overrides=(*DROPS, "evaluate=false", "audit=false"))
    assert weights(one) == weights(two) != weights(unbroken)
    sources = json.loads((one / "merged/merge_manifest.json").read_text())["recipe"]["models"]
    assert [source["model"]["label"] for source in sources] == ["sft", "dpo"]
    again = reproduce(one / "merged", tmp_path / "again")
    assert again.identical
    assert again.tensors > 5
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights(one)
    run(world, one, overrides=(*DROPS, "merge.seed=7", "evaluate=false", "audit=false"))
    assert weights(one) != weights(two), "another seed drops others"


def test_times_do_not_matter_and_bytes_do(world: Path, copied: Path) -> None:
    for path in world.parent.rglob("*"):
        os.utime(path, (1, 1))
    assert plan(world, copied).todo == ()


@pytest.mark.parametrize(
    ("file", "reruns"),
    [
        ("test.jsonl", {"evaluate/merged/skill", "evaluate/merged/words"}),
        ("text.txt", {"evaluate/merged/text"}),
        ("reward.py", {"evaluate/merged/words"}),
        ("pairs.jsonl", "all but train/sft"),
        ("sft.jsonl", "all but train/dpo"),
        ("base/config.json", "all"),
    ],
)
def test_a_changed_file_reruns_what_depends_on_it_and_nothing_else(
    file: str, reruns: str | set[str], unbroken: Path, world: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(world.parent, tmp_path / "world"))
    assert plan(changed / "recipe.yaml", unbroken).todo == ()
    with (changed / file).open("a") as end:
        end.write("\n" if file != "reward.py" else "# more\n")
    names = {step.name for step in plan(changed / "recipe.yaml", unbroken).todo}
    every = {step.name for step in plan(world, unbroken).steps}
    if isinstance(reruns, str):
        reruns = every - {reruns.removeprefix("all but ")}
    assert names == reruns


def test_a_changed_metric_is_measured_again_and_the_table_has_it(world: Path, copied: Path) -> None:
    # The base's bytes end up in the keys, and an override is as good as an edit.
    done = run(world, copied, overrides=["evaluate.metrics.skill.max_new_tokens=1"])
    assert done.done == ("evaluate/merged/skill",)
    done = run(world, copied, overrides=["evaluate.metrics.skill.max_rows=3"])
    assert done.done == ("evaluate/merged/skill",)
    assert len(json.loads((copied / "evaluations/merged/skill.json").read_text())["skill"]["rows"]) == 3


def test_an_output_that_is_gone_or_cut_is_made_again(world: Path, copied: Path, unbroken: Path) -> None:
    model = copied / "merged/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert run(world, copied).done == ("merge/merged",)
    assert outcome(copied) == outcome(unbroken)


def test_from_does_a_stage_and_those_after_it_again(world: Path, copied: Path, unbroken: Path) -> None:
    done = run(world, copied, start="merge").done
    assert {name.split("/")[0] for name in done} == {"merge", "evaluate"}
    assert outcome(copied) == outcome(unbroken)


def test_only_does_one_stage_when_those_before_it_are_done(world: Path, copied: Path, tmp_path: Path) -> None:
    done = run(world, copied, only="merge", overrides=["merge.models[1].parameters.weight=0.25"]).done
    assert done == ("merge/merged",)
    with pytest.raises(RunError, match="stage evaluate needs merge/merged, not finished as the recipe is now"):
        run(world, copied, only="evaluate")
    with pytest.raises(RunError, match="has no stage push"):
        run(world, tmp_path / "none", only="push")
    assert not (tmp_path / "none").exists()


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noted", [True, False], ids=["after the note", "before the note"])
@pytest.mark.parametrize("stage", ["audit", "merge", "evaluate"])
def test_a_run_killed_in_a_stage_goes_on_and_ends_the_same(
    stage: str, noted: bool, world: Path, copied: Path, unbroken: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, 2 if stage == "evaluate" else 1, before_it_is_noted=not noted)
        with pytest.raises(Killed):
            run(world, copied, start=stage)  # type: ignore[arg-type]
    assert plan(world, copied).todo
    again = run(world, copied).done
    assert all(not name.startswith("train/") for name in again)
    assert outcome(copied) == outcome(unbroken)


def test_a_training_killed_between_two_adapters_goes_on_with_the_second(
    world: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paft_merge.training import run as training

    finish, calls = training.finish, []

    def first_only(job, trainer, **given):
        calls.append(job.name)
        if job.name == "dpo" and calls.count("dpo") == 1:
            raise Killed
        return finish(job, trainer, **given)

    monkeypatch.setattr(training, "finish", first_only)
    with pytest.raises(Killed):
        run(world, tmp_path / "run")
    done = run(world, tmp_path / "run").done
    assert calls == ["sft", "dpo", "dpo"]
    assert "train/sft" not in done
    assert outcome(tmp_path / "run") == outcome(unbroken)


def test_a_process_that_is_killed_outright_leaves_a_run_that_goes_on(
    world: Path, unbroken: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of training: no handler, no `finally`."""
    code = f"""
        import os, signal, warnings
        from paft_merge.pipeline import run
        from paft_merge.training import callbacks
        step = callbacks.Watch.on_step_end
        def die(self, args, state, *rest, **more):
            if self.name == "dpo" and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, args, state, *rest, **more)
        callbacks.Watch.on_step_end = die
        run({str(world)!r}, {str(tmp_path / "run")!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run" / "table.md").exists()
    finished = tmp_path / "run/adapters/sft/adapter_model.safetensors"
    before = finished.stat().st_mtime_ns
    assert "train/dpo" in run(world, tmp_path / "run").done
    assert finished.stat().st_mtime_ns == before, "what was finished is not trained again"
    assert outcome(tmp_path / "run") == outcome(unbroken)


def test_a_folder_holds_one_run_at_a_time(world: Path, copied: Path) -> None:
    from paft_merge.pipeline.state import locked

    with locked(copied), pytest.raises(RunError, match=rf"another run uses this folder \(process {os.getpid()}\)"):
        run(world, copied)
    assert run(world, copied).done == ()


# --- failing ----------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_leaves_the_finished_ones_and_says_how_to_go_on(
    world: Path, copied: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.parent / "broken.py").write_text("def words(completions, **columns):\n    return []\n")
    with pytest.raises(PaftMergeError) as caught:
        run(world, copied, overrides=["evaluate.metrics.words.function=broken.py:words"])
    assert "returned 0 scores for 6 completions" in str(caught.value)
    assert "stage evaluate stopped; finished steps (train, audit, merge, evaluate) are kept" in str(caught.value)
    assert "rerun the same command; it resumes here" in str(caught.value)
    record = State.read(copied).steps["evaluate/merged/words"]
    assert record["state"] == "failed"
    assert "returned 0 scores" in record["error"]
    assert run(world, copied).done == ("evaluate/merged/words",)
    assert outcome(copied) == outcome(unbroken)


def test_the_gate_of_the_audit_stops_before_the_merge(world: Path, copied: Path) -> None:
    gate = ["audit.require=['sparsity(1e-5) [source=sft] >= 0.999999']", "merge.seed=1"]
    with pytest.raises(AuditError, match=r"sparsity\(1e-5\) is .* and >= 0.999999 is required"):
        run(world, copied, overrides=gate)
    assert State.read(copied).steps["merge/merged"]["state"] == "done", "the merge of the recipe before is still there"
    assert "merge/merged" in {step.name for step in plan(world, copied, overrides=["merge.seed=1"]).todo}


def test_a_broken_run_json_is_told(world: Path, copied: Path) -> None:
    (copied / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        run(world, copied)


# --- the export -------------------------------------------------------------------------------------------------------


def test_the_merged_model_is_exported_once(world: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    wanted = ["export={to: [gguf, ollama], quantize: q4_k_m}"]
    with pytest.raises(RecipeError, match=r"export: convert_hf_to_gguf.py: of llama.cpp is not on the path; git clone"):
        run(world, copied, overrides=wanted)
    with pytest.raises(RecipeError, match=r"export.llama_cpp: unknown key"):  # a recipe names no program
        run(world, copied, overrides=["export={to: gguf, llama_cpp: /tmp}"])
    with pytest.raises(RecipeError, match="writes a whole model, which gguf-lora is not for"):
        run(world, copied, overrides=["export={to: gguf-lora}"])
    monkeypatch.setenv("LLAMA_CPP_DIR", str(checkout(copied / "llama.cpp")))
    assert run(world, copied, overrides=wanted).done == ("export/gguf", "export/ollama")
    assert sorted(file.name for file in (copied / "export" / "ollama").iterdir()) == ["Modelfile", "merged-Q4_K_M.gguf"]
    assert run(world, copied, overrides=wanted).done == ()
    assert run(world, copied, overrides=["export={to: gguf, quantize: q5_k_m}"]).done == ("export/gguf",)
    assert [file.name for file in (copied / "export" / "gguf").iterdir()] == ["merged-Q5_K_M.gguf"]


# --- the push ---------------------------------------------------------------------------------------------------------


def test_the_merged_model_is_pushed_once(world: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paft_merge import hub

    pushed = []

    def push(folder, repo_id, **settings):
        pushed.append((Path(folder).name, repo_id, settings))
        return f"https://huggingface.co/{repo_id}"

    wanted = ["push={repo_id: me/toy, tags: [paft]}"]
    monkeypatch.setattr(hub, "push", push, raising=False)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        run(world, copied, overrides=wanted)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert run(world, copied, overrides=wanted).done == ("push/me/toy",)
    settings = {"private": True, "branch": None, "create_pr": False, "message": None, "tags": ["paft"]}
    assert pushed == [("merged", "me/toy", settings)]
    assert run(world, copied, overrides=wanted).done == ()
    assert State.read(copied).steps["push/me/toy"]["result"]["url"] == "https://huggingface.co/me/toy"


@UPLOADS
def test_the_push_reaches_a_hub(world: Path, copied: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    run(world, copied, overrides=["push={repo_id: me/toy}"])
    there = hub.files("me/toy")
    assert there["model.safetensors"] == (copied / "merged/model.safetensors").read_bytes()
    assert str(copied) not in there["README.md"].decode()


@UPLOADS
@pytest.mark.parametrize("noted", [True, False], ids=["after the note", "before the note"])
def test_a_run_killed_in_the_push_sends_nothing_twice(
    noted: bool, world: Path, copied: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    wanted = ["push={repo_id: me/toy, tags: [paft]}"]
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, 1, before_it_is_noted=not noted)
        with pytest.raises(Killed):
            run(world, copied, overrides=wanted)
    first = hub.files("me/toy")
    run(world, copied, overrides=wanted)
    assert hub.files("me/toy") == first
    assert run(world, copied, overrides=wanted).done == ()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_runs_shows_the_steps_and_ends_in_the_table(world: Path, copied: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli, ["run", "--dry-run", str(world), str(tmp_path / "new")])
    assert shown.exit_code == 0, shown.output
    assert "train/sft" in shown.stdout
    assert "9 of 9 steps to do" in shown.stdout
    assert not (tmp_path / "new").exists()
    done = CliRunner().invoke(cli, ["run", str(world), str(copied)])
    assert done.exit_code == 0, done.output
    assert "merged" in done.stdout
    assert f"0 steps to do, 9 done already; logs: {copied / 'logs'}" in done.stderr
    changed = CliRunner().invoke(cli, ["run", str(world), str(copied), "--set", "evaluate.metrics.skill.max_rows=2"])
    assert "evaluate/merged: skill" in changed.stderr
    wrong = CliRunner().invoke(cli, ["run", str(world), str(copied), "--set", "merge.densty=2"])
    assert wrong.exit_code == 1
    assert "error[UNKNOWN_KEY]" in wrong.stderr


def test_a_failed_gate_exits_with_3_and_a_refused_recipe_with_1(world: Path, copied: Path) -> None:
    gate = "audit.require=['sparsity(1e-5) [source=sft] >= 0.999999']"
    done = CliRunner().invoke(cli, ["run", str(world), str(copied), "--set", gate])
    assert done.exit_code == 3
    assert "error[REQUIRED]: sft: sparsity(1e-5) is" in done.stderr
    assert CliRunner().invoke(cli, ["run", str(world), str(copied), "--set", "seeds=all"]).exit_code == 1
    assert CliRunner().invoke(cli, ["run", str(world)]).exit_code == 2


def test_an_interrupted_run_prints_the_command_as_it_was_given(
    world: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("paft_merge.pipeline.run", interrupted)
    args = ["run", "--set", "merge.parameters={density: 0.5}", str(world), str(copied), "--from", "merge"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 130
    (line,) = done.stderr.splitlines()
    assert shlex.split(line.partition("To continue: ")[2]) == ["paft", *args]


def test_warnings_and_log_lines_have_one_form(world: Path, copied: Path, request: pytest.FixtureRequest) -> None:
    scale = ["--set", "merge.models[1].parameters.weight=1e-4", "--set", "evaluate=false", "--set", "audit=false"]
    request.addfinalizer(partial(logging.getLogger().setLevel, logging.getLogger().level))  # -v sets it for the process
    done = CliRunner().invoke(cli, ["-v", "run", str(world), str(copied), *scale])
    assert done.exit_code == 0, done.output
    assert any(line.startswith("warning[SCALE]: merge/merged: ") for line in done.stderr.splitlines())
    assert re.search(r"^info: paft-merge .*, Python .*: paft -v run ", done.stderr, re.MULTILINE)
    assert re.search(r"^info: run: [\d.]+ s$", done.stderr, re.MULTILINE)
    assert "WARNING" not in done.stderr


def test_a_run_without_evaluations_has_no_table(world: Path, copied: Path) -> None:
    done = CliRunner().invoke(cli, ["run", str(world), str(copied), "--set", "evaluate=false"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{copied}\n"
    assert not list(copied.glob("table.*"))


def test_a_run_that_waited_for_the_lock_reads_what_the_other_one_did(
    world: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late"
    real = pipeline.locked

    @contextmanager
    def after_another(folder: Path) -> Iterator[None]:
        shutil.copytree(copied, late, dirs_exist_ok=True)  # the other run begins and ends before the lock is taken
        with real(folder):
            yield

    monkeypatch.setattr(pipeline, "locked", after_another)
    assert run(world, late).done == ()


def test_rows_that_are_no_pairs_are_found_before_training(world: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(world.parent, tmp_path / "world"))
    write_rows(changed / "pairs.jsonl", [{"prompt": "w1", "good": "w2", "bad": "w3"}])
    with pytest.raises(RecipeError) as caught:
        run(changed / "recipe.yaml", tmp_path / "run", overrides=["evaluate=false", "audit=false"])
    assert "adapters.dpo" in str(caught.value)
    assert "needs chosen and rejected; the columns are prompt, good, bad" in str(caught.value)
    assert not (tmp_path / "run").exists()
