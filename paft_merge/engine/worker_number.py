"""`WorkerNumber`: which of the workers of a merge this process is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerNumber:
    """Worker `index` of `count`, counted from 0."""

    index: int
    count: int
    local_index: int | None = None
    """Number among the workers on this machine, where the launcher gives it."""
    local_count: int = 1
    """Workers on this machine that share its cores."""
    array_task: str | None = None
    """Number of a job in the array of Slurm, and that of its task if it has several: the same if the job is submitted alone."""

    def __str__(self) -> str:
        task = f" (task {self.array_task} of an array)" if self.array_task else ""
        return f"worker {self.index} of {self.count}{task}"

    @property
    def name(self) -> str:
        """Identifies the worker among those of one merge, also where a part of them was started again with another count."""
        return self.array_task or str(self.index)

    @classmethod
    def parse(cls, text: str) -> WorkerNumber:
        """Read `I/N`.

        Raises:
            ValueError: the text is something else, or I is not from 0 to N - 1.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text, re.ASCII)
        if found is None:
            raise ValueError(f"{text!r} is not a worker; write I/N, for example 0/4 for the first of four")
        index, count = map(int, found.groups())
        if index >= count:
            several = f"0/{count} to {count - 1}/{count}" if count > 1 else "0/1" if count else "for example 0/4"
            raise ValueError(f"{text!r} is not a worker; they are counted from 0: write {several}")
        return cls(index, count)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> WorkerNumber:
        """Read the variables of torchrun, then of Slurm (tasks, an array of jobs, or both), then of a Kubernetes indexed Job.

        Raises:
            ValueError: there are none, one is missing or is not a number, or two contradict each other.
        """
        read = _Variables(environment)
        if read.has("RANK", "WORLD_SIZE"):
            rank, size = read.pair("RANK", "WORLD_SIZE")
            if not read.has("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                return cls(rank, size)
            return cls(rank, size, *read.pair("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        in_array = read.has("SLURM_ARRAY_TASK_ID")
        if in_array or read.has("SLURM_PROCID"):
            # Without srun, a script of sbatch runs once, as task 0, and has no number of tasks where none was asked for.
            once = not read.has("SLURM_NTASKS") and (in_array or environment["SLURM_PROCID"].strip() == "0")
            tasks = (0, 1) if once else read.pair("SLURM_PROCID", "SLURM_NTASKS")
            job, jobs = read.array() if in_array else (0, 1)
            name = environment["SLURM_ARRAY_TASK_ID"].strip() if in_array else None
            name = f"{name}.{tasks[0]}" if name and tasks[1] > 1 else name
            # Slurm gives each task cores and perhaps GPUs of its own, so a machine's cores are not divided again.
            local = read.number("SLURM_LOCALID", "SLURM_LOCALID") if read.has("SLURM_LOCALID") else None
            return cls(job * tasks[1] + tasks[0], jobs * tasks[1], local, array_task=name)
        if read.has("JOB_COMPLETION_INDEX"):
            return cls(*read.pair("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"))
        raise ValueError(
            "the environment has no number of a worker: torchrun sets RANK and WORLD_SIZE, srun SLURM_PROCID and "
            "SLURM_NTASKS, an array of Slurm SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, an indexed Job of Kubernetes "
            "JOB_COMPLETION_INDEX (set JOB_COMPLETIONS too); or pass worker='I/N'"
        )


@dataclass(frozen=True)
class _Variables:
    """Variables of the environment that are numbers."""

    environment: Mapping[str, str]

    def has(self, *names: str) -> bool:
        """Whether any of the variables is set."""
        return any(self.environment.get(name) for name in names)

    def number(self, name: str, beside: str) -> int:
        """Return a variable, which must be set because `beside` is."""
        text = self.environment.get(name, "").strip()
        if not text:
            fix = f"set it to the number of workers, or pass worker='{self.environment[beside]}/N'"
            raise ValueError(f"{beside} is set and {name} is not; {fix}")
        if re.fullmatch(r"\d+", text, re.ASCII) is None:
            raise ValueError(f"{name} is {text!r}, and must be a number")
        return int(text)

    def pair(self, index: str, count: str) -> tuple[int, int]:
        """Return an index and the count that it is below."""
        found = self.number(index, count), self.number(count, index)
        if found[0] >= found[1]:
            raise ValueError(f"{index} is {found[0]} and {count} is {found[1]}: an index is less than the count")
        return found

    def array(self) -> tuple[int, int]:
        """Return the place of a job in its array, and the length of the array.

        An array such as `1,5,7` has gaps: its length is that with the gaps, because workers may be missing.
        """
        name = "SLURM_ARRAY_TASK_ID"
        task = self.number(name, name)
        if not self.has("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX"):
            return self.pair(name, "SLURM_ARRAY_TASK_COUNT")
        low, high = self.number("SLURM_ARRAY_TASK_MIN", name), self.number("SLURM_ARRAY_TASK_MAX", name)
        if not low <= task <= high:
            raise ValueError(f"{name} is {task}, and SLURM_ARRAY_TASK_MIN and _MAX are {low} and {high}")
        step = max(self.number("SLURM_ARRAY_TASK_STEP", name), 1) if self.has("SLURM_ARRAY_TASK_STEP") else 1
        return (task - low) // step, (high - low) // step + 1
