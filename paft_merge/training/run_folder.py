"""The folders of an adapter's run: `<out>.part` until everything is written, then `<out>`."""

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
    """The output folder of one adapter, and its work folder."""

    final: Path

    @property
    def part(self) -> Path:
        """The work folder."""
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
        """Create the work folder, or check that an existing one belongs to the same run.

        Args:
            plan: Settings that must be equal in both runs.
            resume: Continue an interrupted run.

        Raises:
            TrainError: EXISTS, when a folder exists and `resume` is off; RESUME, when it belongs to another run.
        """
        if self.final.exists():
            fix = "skip finished adapters with resume=True, remove the folder, or train into another one"
            raise TrainError.of("EXISTS", self.final, "the folder exists", fix)
        if self.part.exists() and not resume:
            fix = "continue it with resume=True, or remove the folder"
            raise TrainError.of("EXISTS", self.part, "an interrupted run left this folder", fix)
        if self.part.exists() and (self.part / RUN_FILE).exists():
            _check_same(json.loads((self.part / RUN_FILE).read_text()), plan, self.part)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.part / RUN_FILE, plan)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; the trainer writes its state file last."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if _complete(p)]
        return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)

    def tidy(self) -> None:
        """Remove the checkpoints, but keep TensorBoard's files as `runs/`."""
        if (self.checkpoints / "runs").exists():
            os.replace(self.checkpoints / "runs", self.part / "runs")
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def holds_work(self) -> bool:
        """Whether the work folder has anything to resume, or to inspect after a failure."""
        return (
            any(self.part.rglob("checkpoint-*"))
            or any(self.part.rglob("samples.jsonl"))
            or any(self.part.rglob("runs"))
        )

    def finish(self, keep_checkpoints: bool = False) -> None:
        """Remove the files that only the run needs, and rename the work folder to the output folder."""
        if not keep_checkpoints:
            self.tidy()
        (self.part / RUN_FILE).unlink(missing_ok=True)
        os.replace(self.part, self.final)


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))  # parts of processes instead of an adapter file
    return sharded or (checkpoint / "adapter_model.safetensors").exists()


def _check_same(before: dict[str, Any], now: dict[str, Any], part: Path) -> None:
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    detail = [f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in changed]
    if changed:
        fix = "resume with the same recipe and data, or remove the folder"
        raise TrainError.of("RESUME", part, "; ".join(detail), fix)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:110] + "..."


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the complete new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)


def is_first() -> bool:
    """Whether this process writes and logs: the only process of a run, or the first of several."""
    return os.environ.get("RANK", "0") == "0"
