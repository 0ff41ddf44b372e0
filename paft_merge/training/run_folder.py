"""Where an adapter grows: `<out>.part` until everything is written, then `<out>`; what a resumed run has to match."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError

RUN_FILE = "paft_run.json"
DONE_FILE = "paft_train.json"


@dataclass(frozen=True)
class RunFolder:
    """The folders of one adapter's run."""

    final: Path

    @property
    def part(self) -> Path:
        """Where the run works."""
        return self.final.with_name(self.final.name + ".part")

    @property
    def checkpoints(self) -> Path:
        """TRL's output folder."""
        return self.part / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the adapter is complete."""
        return (self.final / DONE_FILE).exists()

    def open(self, plan: dict[str, Any], resume: bool) -> None:
        """Make the work folder, or check that the one that is there belongs to the same run.

        Raises:
            TrainError: EXISTS, when something is there and `resume` is off; RESUME, when it is another run's.
        """
        if self.final.exists():
            raise TrainError.of("EXISTS", self.final, "the folder exists", "remove it, or write elsewhere with --out")
        if self.part.exists() and not resume:
            fix = "go on with --resume, or remove the folder"
            raise TrainError.of("EXISTS", self.part, "an interrupted run left this folder", fix)
        if self.part.exists() and (self.part / RUN_FILE).exists():
            _check_same(json.loads((self.part / RUN_FILE).read_text()), plan, self.part)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.part / RUN_FILE, plan)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is complete: the trainer writes its state last."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if _complete(p)]
        return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)

    def tidy(self) -> None:
        """Remove the checkpoints; what TensorBoard reads was written among them, and stays as `runs/`."""
        if (self.checkpoints / "runs").exists():
            os.replace(self.checkpoints / "runs", self.part / "runs")
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def holds_work(self) -> bool:
        """Whether there is anything to resume, or to look at after a failure."""
        return (
            any(self.part.rglob("checkpoint-*"))
            or any(self.part.rglob("samples.jsonl"))
            or any(self.part.rglob("runs"))
        )

    def finish(self, keep_checkpoints: bool = False) -> None:
        """Remove what only the run needed and give the folder its name."""
        if not keep_checkpoints:
            self.tidy()
        (self.part / RUN_FILE).unlink(missing_ok=True)
        os.replace(self.part, self.final)


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))  # each process's part, instead of an adapter
    return sharded or (checkpoint / "adapter_model.safetensors").exists()


def _check_same(before: dict[str, Any], now: dict[str, Any], part: Path) -> None:
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    detail = [f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in changed]
    if changed:
        fix = "resume with the recipe and the data it was started with, or remove the folder"
        raise TrainError.of("RESUME", part, "; ".join(detail), fix)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:110] + "..."


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)


def is_first() -> bool:
    """Whether this is the only process of a run, or the first of several: the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"
