"""`run.json`: the fingerprint, state and result of each step; and the lock of a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from paft_merge.errors import RunError, reading
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.output.card import CARD
from paft_merge.pipeline.fingerprints import sizes_below, still_there
from paft_merge.pipeline.steps import Step
from paft_merge.recipe.sections import explain
from paft_merge.training.adapter_record import versions
from paft_merge.training.run_folder import write_json

FILE, LOCK, FORMAT = "run.json", "run.lock", 1


class _Record(BaseModel):
    """The record of a step in `run.json`."""

    model_config = ConfigDict(extra="allow", strict=True)
    stage: str
    key: str
    state: Literal["started", "done", "failed", "stale"]
    began: float = 0.0
    seconds: float = 0.0
    result: dict[str, Any] = {}
    outputs: dict[str, int] = {}
    error: str = ""


_STEPS = TypeAdapter(dict[str, _Record])


@dataclass
class State:
    """The steps of a run folder and their records; written after every change."""

    folder: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> State:
        """Read the state of a run folder; an empty one if there is no `run.json`.

        Raises:
            RunError: STATE, the file is damaged or has another format.
        """
        path = folder / FILE
        if not path.exists():
            return cls(folder)
        fix = "remove it; adapters and merges are then repeated"
        with reading(path, "STATE", RunError, fix):
            data = json.loads(read_text(path, "STATE"))
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise RunError.of("STATE", path, f"has format {found!r}", "use the version that wrote it")
        try:
            steps = _STEPS.validate_python(data.get("steps"))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ("steps", *fault["loc"])
            what = f"is damaged: {'.'.join(map(str, where))}: {explain(fault, where)[0]}"
            raise RunError.of("STATE", path, what, fix) from error
        return cls(folder, {name: record.model_dump(exclude_unset=True) for name, record in steps.items()})

    def write(self) -> None:
        """Write `run.json` atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FILE, {"format": FORMAT, "versions": versions(), "steps": self.steps})

    def finished(self, step: Step) -> bool:
        """Whether a step is done with its present fingerprint, and its output is still complete."""
        record = self.steps.get(step.name, {})
        if record.get("state") != "done" or record.get("key") != step.key:
            return False
        return step.out is None or still_there(step.out, record.get("outputs", {}))

    def why(self, step: Step) -> str:
        """Why a step has to run; empty if it is finished."""
        record = self.steps.get(step.name)
        if self.finished(step):
            return ""
        if record is None:
            return "new"
        if record.get("key") != step.key:
            return "its inputs have changed"
        return {"done": "its output is missing", "failed": "it failed"}.get(
            str(record.get("state")), "it was interrupted"
        )

    def start(self, step: Step) -> None:
        """Record the start of a step; remove old output, unless the step can resume from it."""
        record = self.steps.get(step.name, {})
        resumes = record.get("key") == step.key and record.get("state") in ("started", "failed")
        if step.out is not None and not resumes:
            for place in (step.out, step.out.with_name(step.out.name + ".part")):
                _remove(place)
        self.steps[step.name] = {"stage": step.stage, "key": step.key, "state": "started", "began": time.time()}
        self.write()

    def done(self, step: Step, result: Mapping[str, Any] | None = None) -> None:
        """Record that a step is finished."""
        record = self.steps[step.name]
        record["seconds"] = round(time.time() - record.pop("began"), 2)
        record["state"] = "done"
        record["result"] = dict(result or {})
        if step.out is not None:
            sizes = sizes_below(step.out)
            sizes.pop(CARD, None)  # a card that is edited or written again makes no step stale
            record["outputs"] = sizes
        self.write()

    def failed(self, step: Step, error: BaseException) -> None:
        """Record why a step failed."""
        record = self.steps.setdefault(step.name, {"stage": step.stage, "key": step.key})
        record["state"] = "failed"
        record["error"] = f"{type(error).__name__}: {error}"[:2000]
        self.write()

    def result(self, step: Step) -> dict[str, Any]:
        """The result of a finished step."""
        return dict(self.steps.get(step.name, {}).get("result", {}))


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder; the operating system releases the lock when the process ends.

    Raises:
        RunError: BUSY, another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise RunError.of(
                "BUSY", folder, f"another run uses this folder ({who})", "wait for it, or stop it"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
