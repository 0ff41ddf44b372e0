"""Execution of the steps, stage by stage; `run.json` records the start and the end of each."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft_merge.compute.magnitudes import EPSILON
from paft_merge.errors import AuditError, PaftMergeError, Problem, RunError, reading
from paft_merge.output.log_file import logged
from paft_merge.pipeline.named_models import labels
from paft_merge.pipeline.schema import STAGES, RunRecipe, Stage
from paft_merge.pipeline.state import State
from paft_merge.pipeline.steps import SPARSITY, Answer, Audit, Evaluate, Export, Merge, Push, Step, Train, Verify
from paft_merge.pipeline.trained_templates import as_trained, template_of_run
from paft_merge.training.engine_schema import ENGINES, Engine
from paft_merge.training.run_folder import DONE_FILE, write_json

if TYPE_CHECKING:
    from paft_merge.auditing.report.audit import Audit as AuditReport
    from paft_merge.evaluating.loading import EvaluatedModel
    from paft_merge.pipeline.arms import Arm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something that happened to a step, for a progress display."""

    step: str
    what: Literal["start", "progress", "done", "failed"]
    text: str = ""


OnEvent = Callable[[Event], None]


@dataclass
class Executor:
    """Executes the steps of a run."""

    recipe: RunRecipe
    folder: Path
    state: State
    on_event: OnEvent
    trust_code: bool = False
    threads: int | None = None
    """Blocks that a merge or an audit computes at a time; None: one for each core."""

    def stage(self, stage: Stage, steps: Sequence[Step]) -> None:
        """Execute steps of a stage.

        Raises:
            PaftMergeError: a step failed; a further problem names the finished stages and how to resume.
        """
        with logged(self.folder / "logs" / f"{stage}.log"):
            try:
                self.do(stage, steps)
            except PaftMergeError as error:
                raise self.stopped(stage, error) from error

    def do(self, stage: Stage, steps: Sequence[Step]) -> None:
        """Execute steps of a stage, without a log of the stage."""
        do = {
            "train": self._train,
            "audit": self._audit,
            "merge": self._merge,
            "verify": self._verify,
            "evaluate": self._evaluate,
            "export": self._export,
            "push": self._push,
        }
        do[stage](steps)

    def stopped(self, stage: Stage, error: PaftMergeError) -> PaftMergeError:
        """Return the error of a step with a further problem that names the finished stages and how to resume."""
        finished = [
            s for s in STAGES if any(r["stage"] == s and r["state"] == "done" for r in self.state.steps.values())
        ]
        what = f"stage {stage} stopped; finished steps ({', '.join(finished) or 'none yet'}) are kept in {self.folder}"
        fix = "fix it and rerun the same command; it resumes here"
        return type(error)([*error.problems, Problem("RUN", "", what, fix)], error.warnings)

    @contextmanager
    def _recorded(self, step: Step, *, reported: bool = True) -> Iterator[dict[str, Any]]:
        """Record a step's start and end; the block puts the step's result into the mapping."""
        result: dict[str, Any] = {}
        self.state.start(step)
        self.on_event(Event(step.name, "start"))
        began = time.monotonic()
        try:
            yield result
        except BaseException as error:
            if isinstance(error, Exception):
                self.state.failed(step, error)
                self.on_event(Event(step.name, "failed", str(error).split("\n")[0]))
            raise
        self._finish(step, result, time.monotonic() - began, reported=reported)

    def _finish(self, step: Step, result: Mapping[str, Any], seconds: float, *, reported: bool = True) -> None:
        self.state.done(step, result)
        log.info("%s: done in %.1f s %s", step.name, seconds, dict(result))
        if reported:
            self.on_event(Event(step.name, "done", f"{seconds:.1f} s"))

    # --- train ------------------------------------------------------------------------------------------------------

    def _train(self, steps: Sequence[Step]) -> None:
        """Train adapters with the same base and folder together, so that the base is loaded once."""
        waiting = list(steps)
        while waiting:
            step = waiting[0]
            if isinstance(step.job, Train):
                mine = [s for s in waiting if isinstance(s.job, Train) and s.job.folder == step.job.folder]
                self._adapters(mine)
            else:
                mine = [step]
                self._merge(mine)
            waiting = [s for s in waiting if s not in mine]

    def _adapters(self, steps: Sequence[Step]) -> None:
        from paft_merge.training.launch import train

        jobs = {step.job.adapter: step for step in steps if isinstance(step.job, Train)}
        first = next(iter(jobs.values())).job
        assert isinstance(first, Train)
        sections = {name: step.job.section for name, step in jobs.items() if isinstance(step.job, Train)}
        for step in steps:
            self.state.start(step)
        seen, last = set[str](), [0.0]

        def finish() -> None:
            for step in steps:
                record = self.state.steps[step.name]
                if record["state"] == "started" and self._trained(step):
                    self._finish(step, _facts(step), time.time() - float(record["began"]))

        def progress(now: Any) -> None:
            step = jobs[now.name]
            if now.name not in seen:
                finish()  # the adapter before this one is written by now
                seen.add(now.name)
                self.state.steps[step.name]["began"] = time.time()
                self.on_event(Event(step.name, "start"))
            if now.logs:
                log.info("%s: step %d: %s", step.name, now.step, dict(now.logs))
            if time.monotonic() - last[0] > 1.0 or now.step == now.steps:
                last[0] = time.monotonic()
                self.on_event(Event(step.name, "progress", f"step {now.step}/{now.steps}"))

        try:
            train(
                {"base_model": first.base, "adapters": sections},
                first.folder,
                resume=True,
                progress=progress,
                trust_code=True,
            )
        except Exception as error:
            step = next((step for step in steps if not self._trained(step)), steps[-1])
            self.state.failed(step, error)
            self.on_event(Event(step.name, "failed", str(error).split("\n")[0]))
            raise
        finally:
            finish()

    @staticmethod
    def _trained(step: Step) -> bool:
        return step.out is not None and (step.out / DONE_FILE).is_file()

    # --- audit ------------------------------------------------------------------------------------------------------

    def _audit(self, steps: Sequence[Step]) -> None:
        from paft_merge.auditing import audit

        spec = self.recipe.audit
        assert spec is not None
        for step in steps:
            job, out = step.job, step.out
            assert isinstance(job, Audit)
            assert out is not None
            with self._recorded(step) as result:
                done = audit(
                    *job.sources,
                    base=job.base,
                    preview=None,
                    epsilon=spec.epsilon,
                    require=spec.require,
                    fetch_base=True,
                    threads=self.threads,
                )
                done = _relabelled(done, dict(zip(job.sources, job.names, strict=True)))
                out.mkdir(parents=True, exist_ok=True)
                (out / "audit.json").write_text(done.dumps() + "\n", encoding="utf-8")
                if spec.html:
                    (out / "audit.html").write_text(done.to_html(), encoding="utf-8")
                result |= {s.label: {"sparsity": s.total.measure.sparsity(spec.epsilon)} for s in done.sources}
                failed = done.check(*spec.require)
                if failed:
                    raise AuditError(failed)

    # --- merge ------------------------------------------------------------------------------------------------------

    def _merge(self, steps: Sequence[Step]) -> None:
        from paft_merge.engine.api import merge

        def keep(step: Step, names: Mapping[str, str], kept: list[str], problems: Sequence[Problem]) -> None:
            # The merges of a comparison warn only in run.json and the log file.
            own = step.name.rpartition("/")[2] == "merged"
            for problem in problems:
                where, what, fix = (_renamed(text, names) for text in (problem.where, problem.what, problem.fix))
                kept.append(str(Problem(problem.code, where, what, fix)))
                shown = Problem(problem.code, f"{step.name}: {where}" if where else step.name, what, fix)
                log.log(logging.WARNING if own else logging.INFO, "%s", shown)

        for step in steps:
            job, out = step.job, step.out
            assert isinstance(job, Merge)
            assert out is not None
            with self._recorded(step) as result:
                kept = result.setdefault("warnings", [])
                merge(
                    as_trained(job.recipe),
                    out,
                    resume=True,
                    overwrite=True,
                    threads=self.threads,
                    warn=partial(keep, step, labels(job.recipe), kept),
                )

    # --- evaluate ---------------------------------------------------------------------------------------------------

    def _evaluate(self, steps: Sequence[Step]) -> None:
        """Evaluate the metrics of each arm together, so that its model is loaded once, after the sources have answered."""
        for kind, do in ((Answer, self._answer), (Evaluate, self._arm)):
            by_arm: dict[Arm, list[Step]] = {}
            for step in steps:
                if isinstance(step.job, kind):
                    by_arm.setdefault(step.job.arm, []).append(step)
            for mine in by_arm.values():
                do(mine)

    def _answer(self, steps: Sequence[Step]) -> None:
        """Answer the prompts of every `agreement` with one source."""
        from paft_merge.evaluating.light import answers_of

        spec, subject = self.recipe.evaluate, None
        assert spec is not None
        with ExitStack() as loaded:
            for step in steps:
                job, out = step.job, step.out
                assert isinstance(job, Answer)
                assert out is not None
                with self._recorded(step) as result:
                    subject = subject or loaded.enter_context(closing(self._loaded(job.arm, spec.engine)))
                    found = answers_of(subject, spec.metrics[job.metric], self.recipe.folder, spec.batch_size)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    write_json(out, {"answers": found})
                    result["answers"] = len(found)

    def _loaded(self, arm: Arm, engine: Engine) -> EvaluatedModel:
        from paft_merge.evaluating.vllm_loading import load_for

        spec, template = self.recipe.evaluate, template_of_run(self.recipe, self.folder)
        assert spec is not None
        return load_for(engine, arm.parts, spec, trust_code=self.trust_code, template=template)

    def _arm(self, steps: Sequence[Step]) -> None:
        from paft_merge.evaluating import HARNESS
        from paft_merge.evaluating.light import measure

        spec, subject, shown, began = self.recipe.evaluate, None, list[str](), time.monotonic()
        assert spec is not None
        with ExitStack() as loaded:
            for step in sorted(steps, key=self._engine_order):
                job, out = step.job, step.out
                assert isinstance(job, Evaluate)
                assert out is not None
                with self._recorded(step, reported=False) as result:
                    if job.metric == SPARSITY:
                        scores = {SPARSITY: {"value": self._sparsity(job), "stderr": None}}
                    else:
                        engine = spec.engine_of(job.metric)
                        if subject is None or subject.engine != engine:
                            loaded.close()
                            subject = loaded.enter_context(closing(self._loaded(job.arm, engine)))
                        if job.metric == HARNESS:
                            from paft_merge.evaluating.harness import run_tasks

                            found = run_tasks(subject, spec, self.recipe.folder)
                        else:
                            of = spec.metrics[job.metric]
                            folder, sources = self.recipe.folder, answers_for(job)
                            score = measure(subject, of, folder, spec.batch_size, spec.seed, sources=sources)
                            found = {job.metric: score}
                        scores = {name: one.to_json() for name, one in found.items()}
                    out.parent.mkdir(parents=True, exist_ok=True)
                    write_json(out, scores)
                    result |= {name: {"value": s["value"], "stderr": s["stderr"]} for name, s in scores.items()}
                shown += [
                    f"{name} {score['value']:.3f}" for name, score in scores.items() if score["value"] is not None
                ]
        seconds = time.monotonic() - began
        self.on_event(Event(steps[0].name.rpartition("/")[0], "done", f"{', '.join(shown)} ({seconds:.1f} s)"))

    def _engine_order(self, step: Step) -> int:
        """The place of an evaluation among those of its arm: those of one engine follow each other."""
        assert isinstance(step.job, Evaluate)
        assert self.recipe.evaluate is not None
        return ENGINES.index(self.recipe.evaluate.engine_of(step.job.metric))

    def _sparsity(self, job: Evaluate) -> float | None:
        """Share of the entries that the arm moves by less than epsilon; None if it changes no tensor."""
        from paft_merge.auditing import audit

        epsilon = self.recipe.audit.epsilon if self.recipe.audit else EPSILON
        base, *adapters = job.arm.parts
        # A path may contain a plus, so an adapter on the base is passed by itself.
        source = adapters[0] if base == self.recipe.base and len(adapters) == 1 else "+".join(job.arm.parts)
        try:
            done = audit(source, base=self.recipe.base, preview=None, epsilon=epsilon)
        except AuditError as error:
            if all(problem.code == "EMPTY" for problem in error.problems):
                return None
            raise
        value = done.sources[0].total.measure.sparsity(epsilon)
        return None if math.isnan(value) else value

    # --- verify -----------------------------------------------------------------------------------------------------

    def _verify(self, steps: Sequence[Step]) -> None:
        from paft_merge.output.card import CARD, is_edited, write_card
        from paft_merge.output.card.verified import REPORT
        from paft_merge.verifying import verify

        spec = self.recipe.verify
        assert spec is not None
        for step in steps:
            job, out = step.job, step.out
            assert isinstance(job, Verify)
            assert out is not None
            with self._recorded(step) as result:
                done = verify(
                    job.folder, data=job.data, rows=spec.rows, new_tokens=spec.new_tokens, tensors_only=spec.tensors_only,
                    memory=spec.memory, require=spec.require, threads=self.threads, trust_code=self.trust_code,
                )  # fmt: skip
                text = json.dumps(done.to_json(), indent=2) + "\n"
                for place in (out, job.folder / REPORT):
                    place.write_text(text, encoding="utf-8")
                card = job.folder / CARD
                if card.is_file() and not is_edited(card.read_text(encoding="utf-8")):
                    write_card(job.folder)
                result |= {"verdict": done.verdict, "findings": [str(finding) for finding in done.findings]}
                result |= {name: one.kl for name, one in done.behaviours.items()}
                if failed := [*done.faults(), *done.failures(spec.require)]:
                    raise AuditError(failed)

    # --- export -----------------------------------------------------------------------------------------------------

    def _export(self, steps: Sequence[Step]) -> None:
        from paft_merge.exporting import export

        spec = self.recipe.export
        assert spec is not None
        for step in steps:
            assert isinstance(step.job, Export)
            with self._recorded(step) as result:
                done = export(
                    step.job.folder, step.out, to=step.job.to, quantize=spec.quantize, base=self.recipe.base,
                    trust_code=self.trust_code, overwrite=True,
                )  # fmt: skip
                for problem in done.warnings:
                    log.warning("%s", problem)
                result["files"] = list(done.files)

    # --- push -------------------------------------------------------------------------------------------------------

    def _push(self, steps: Sequence[Step]) -> None:
        from paft_merge import hub

        spec = self.recipe.push
        assert spec is not None
        for step in steps:
            assert isinstance(step.job, Push)
            with self._recorded(step) as result:
                settings = spec.model_dump(exclude={"repo_id"})
                result["url"] = hub.push(step.job.folder, spec.repo_id, **settings)


def answers_for(job: Evaluate) -> list[list[str]]:
    """The answers of each source of an `agreement`; none for other evaluations."""
    found = []
    for path in job.answers:
        with reading(path, "STATE", RunError, "remove it, and run again"):
            found.append([str(text) for text in json.loads(path.read_text(encoding="utf-8"))["answers"]])
    return found


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """A message with its sources named as in the recipe."""
    for long in sorted(names, key=len, reverse=True):
        text = text.replace(long, names[long])
    return text


def _relabelled(done: AuditReport, names: Mapping[str, str]) -> AuditReport:
    """An audit with its sources named as in the recipe; `names` are by audited path."""
    labels = {
        s.label: next((n for place, n in names.items() if s.header.source.endswith(place)), s.label)
        for s in done.sources
    }
    sources = [replace(s, header=replace(s.header, label=labels[s.label])) for s in done.sources]
    pairs = [replace(p, left=labels[p.left], right=labels[p.right]) for p in done.pairs]
    return replace(done, sources=tuple(sources), pairs=tuple(pairs))


def _facts(step: Step) -> dict[str, Any]:
    """The part of a finished adapter's record that goes into `run.json`."""
    assert step.out is not None
    record = json.loads((step.out / DONE_FILE).read_text(encoding="utf-8"))
    delta, run = record["delta"], record["run"]
    return {
        "steps": run["steps"], "seconds": run.get("seconds"), "tokens": run.get("tokens"), "train_loss": run["train_loss"], "norm": delta["norm"],
        "below_epsilon": delta["below_epsilon"],
    }  # fmt: skip
