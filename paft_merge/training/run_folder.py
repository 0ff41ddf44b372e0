"""The folders of an adapter's run: `<out>.part` until everything is written, then `<out>`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError, reading
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.recipe.sections import former_keys
from paft_merge.training.checkpoint_parts import file_fault, missing_part
from paft_merge.training.schema import AdapterSpec

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
            with reading(self.part / RUN_FILE, "RESUME", TrainError, "remove the folder, and train again"):
                _check_same(json.loads(read_text(self.part / RUN_FILE, "RESUME")), plan, self.part)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.part / RUN_FILE, plan)

    def check_finished(self, settings: Mapping[str, Any]) -> None:
        """Check that the finished adapter is whole, and was trained with these settings.

        Args:
            settings: `base`, the name of the base, and `spec`, the adapter's section as JSON.

        Raises:
            TrainError: RESUME, naming every field that differs; ADAPTER, a file is damaged.
        """
        path = self.final / DONE_FILE
        with reading(path, "ADAPTER", TrainError, "remove the folder and train again"):
            record = json.loads(read_text(path, "ADAPTER"))
            spec = {k: v for k, v in record["spec"].items() if k not in ("processes", "accelerate_config")}
            before = {"base": record["base"]["name"], "spec": former_keys(AdapterSpec, spec)}
        _check_same(before, settings, self.final, "train into another folder, or remove this one")
        if fault := file_fault(self.final / "adapter_model.safetensors"):
            raise TrainError.of("ADAPTER", self.final, fault, "remove the folder and train again")

    def last_checkpoint(self, processes: int = 1) -> Path | None:
        """The newest whole checkpoint, for a run of so many processes."""
        return next((path for path, fault in self.faults(processes) if not fault), None)

    def faults(self, processes: int = 1) -> Iterator[tuple[Path, str]]:
        """Every checkpoint, from the newest on, and what is wrong with it (empty if it is whole)."""
        found = {
            int(p.name.rsplit("-", 1)[1]): p for p in self.checkpoints.glob("checkpoint-*") if p.name[11:].isdigit()
        }
        every = [path for _, path in sorted(found.items(), reverse=True)]
        for path in every:
            yield path, missing_part(path, [one for one in every if one != path], processes)

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


def _check_same(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    folder: Path,
    fix: str = "resume with the same recipe and data, or remove the folder",
) -> None:
    """Raise TrainError RESUME with every setting that differs."""
    details = []
    for name, was, is_now in _differences(before, now):
        name = name.removeprefix("spec.")
        same = name == "data" and isinstance(was, str)
        details.append(
            "the rows of the data set are others"
            if same
            else f"{name}: {_short(was)} there, {_short(is_now)} in the recipe"
        )
    if details:
        raise TrainError.of("RESUME", folder, f"was trained with other settings: {'; '.join(details)}", fix)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of every field that differs, nested ones with dots."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{name}[{i}]" if len(now) > 1 else name)
    elif before != now:
        yield name, before, now


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
