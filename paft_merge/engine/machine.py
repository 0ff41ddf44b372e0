"""The rates of a machine, as `paft bench` measured and stored them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection
from datetime import date
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from paft_merge.errors import Problem
from paft_merge.recipe.sections import problems_of
from paft_merge.recipe.yaml_source import dotted

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Rates(BaseModel):
    """The rates on which the time of a merge depends; all are positive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    read_gbps: Rate = 1.0
    """GB/s that a process reads from its disk."""
    write_gbps: Rate = 0.8
    """GB/s that a process writes to its disk, until the data are durable."""
    cached_gbps: Rate = 15.0
    """GB/s that one core copies from the page cache."""
    gflops: Rate = 200.0
    """GFLOP/s of one core in float32 low-rank products."""
    loops: Rate = 1.0
    """Speed of the loops over entries, as a multiple of the reference machine's."""
    memory_gb: Rate = 16.0
    """GB of memory, which limit how much the page cache holds."""


def _complete(rates: Rates) -> Rates:
    if lacking := Rates.model_fields.keys() - rates.model_fields_set:
        raise ValueError(f"lacks {', '.join(sorted(lacking))}")
    return rates


class Machine(BaseModel):
    """A measurement of a machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    """Version of paft_merge that measured."""
    host: str
    cores: Annotated[int, Field(gt=0)]
    measured: date
    folder: str
    """The folder whose disk was measured."""
    rates: Annotated[Rates, AfterValidator(_complete)]


REFERENCE = Rates()
"""The rates without a measurement. The files of a merge are balanced among its workers by them."""


def machine_file() -> Path | None:
    """The file that holds the measurement: in `XDG_CACHE_HOME`, else in `~/.cache`; None for a user without a home."""
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(users, "paft_merge", "machine.json") if os.path.isabs(users) else None


def store(machine: Machine) -> Path | None:
    """Write the measurement, and return its file; None for a user without a home."""
    path = machine_file()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(machine.model_dump_json(indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    return path


def stored() -> tuple[Machine | None, list[Problem]]:
    """The stored measurement, or None where there is none; and a warning if its file is broken."""
    path = machine_file()
    if path is None or not path.exists():
        return None, []
    try:
        with path.open(encoding="utf-8") as file:
            data = json.loads(file.read(_LONGEST))
        return Machine.model_validate(data), []
    except ValidationError as error:
        fault = next(problems_of(error, Machine, data, dotted))
        what = f"{fault.where}: {fault.what}"
    except (OSError, ValueError, RecursionError) as error:
        what = f"cannot be read: {error}"
    return None, [Problem("BENCH", str(path), f"{what}; default rates are used", "run `paft bench` again")]


_LONGEST = 1 << 16
"""Most characters of the file that are read."""


def described(machine: Machine | None, today: date, given: Collection[str] = ()) -> str:
    """Where rates come from, and how old they are.

    Args:
        machine: the stored measurement.
        today: the date.
        given: names of rates that the user gave.
    """
    own = f"{', '.join(given)} as given, else " if given else ""
    if machine is None:
        return f"{own}default rates; `paft bench` measures those of this machine"
    days = (today - machine.measured).days
    age = "today" if days == 0 else f"{days} day{'s' * (days != 1)} ago" if days > 0 else f"on {machine.measured}"
    here = "this machine" if machine.host == platform.node() else f"{machine.host}, another machine"
    return f"{own}measured by `paft bench` {age} on {here} ({machine.cores} cores, {machine.folder})"
