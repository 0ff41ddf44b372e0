"""`paft doctor`: what this installation and this machine have, and what would go wrong in a merge or a training."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from paft_merge.compute.cores import available_cores
from paft_merge.compute.kernels import object_cache
from paft_merge.engine import machine
from paft_merge.errors import Problem
from paft_merge.hub.settings import local_state, size_of
from paft_merge.output.versions import version_of

NAME = "paft-merge"
SHOWN = ("torch", "transformers", "peft", "trl", "numba", "llvmlite", "safetensors", "huggingface-hub", "mergekit")
"""Packages whose versions are shown."""
LEAST_FREE = 1 << 30
"""Bytes of disk or memory below which a merge of a usual model cannot work."""


@dataclass(frozen=True)
class Examination:
    """The facts of an installation and a machine, and the problems in them."""

    facts: Mapping[str, Any]
    """JSON data by topic."""
    errors: tuple[Problem, ...]
    """What fails."""
    warnings: tuple[Problem, ...]
    """What makes something slow or impossible that not everyone needs."""

    def to_json(self) -> dict[str, Any]:
        """The examination as plain data."""
        found = {"errors": [asdict(one) for one in self.errors], "warnings": [asdict(one) for one in self.warnings]}
        return {**self.facts, **found}


def examine(folder: Path, *, thorough: bool = False) -> Examination:
    """Examine the installation, and a folder in which a merge is to be written.

    Args:
        folder: the folder, which may not exist yet.
        thorough: also import torch, and measure the size of the Hub's cache.
    """
    errors: list[Problem] = []
    warnings: list[Problem] = []
    requirements = [Requirement(text) for text in _requirements()]
    errors += _wrong_versions(requirements)
    hub = local_state()
    facts = {
        "versions": {NAME: version_of(NAME), "python": platform.python_version()}
        | {name: _version(name) for name in SHOWN},
        "system": _system(errors, warnings),
        "kernels": _kernels(warnings),
        "out": _out(folder, errors),
        "rates": _rates(warnings),
        "gpus": _gpus(),
        "hub": {
            "token": hub.token, "cache": str(hub.cache), "cache_bytes": size_of(hub.cache) if thorough else None,
            "offline": hub.offline, "endpoint": hub.endpoint,
        },
        "extras": {name: sorted(lacking) for name, lacking in _extras(requirements).items()},
        "torch": _torch(errors) if thorough else None,
    }  # fmt: skip
    if not _can_write(hub.cache):
        warnings.append(Problem("HUB", str(hub.cache), "the Hub's cache cannot be written", "set HF_HOME"))
    return Examination(facts, tuple(errors), tuple(warnings))


def _requirements() -> list[str]:
    try:
        return metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _wrong_versions(requirements: list[Requirement]) -> Iterator[Problem]:
    """Packages that are missing or have a version outside of the bounds; of an extra, only the latter."""
    python = metadata.metadata(NAME)["Requires-Python"] if requirements else None
    if python and not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        yield Problem(
            "VERSION", "python", f"is {platform.python_version()}, and {NAME} needs {python}", "use that Python"
        )
    for one in requirements:
        found = _version(one.name)
        if one.marker is not None and (found is None or _extra_of(one) == "dev"):
            continue
        if found is None:
            yield Problem("VERSION", one.name, "is not installed", f"pip install '{one.name}{one.specifier}'")
        elif not one.specifier.contains(found, prereleases=True):
            what = f"is {found}, and {NAME} needs {one.specifier}"
            yield Problem("VERSION", one.name, what, f"pip install '{one.name}{one.specifier}'")


def _extra_of(requirement: Requirement) -> str:
    found = re.search(r"""extra == ['"]([\w-]+)['"]""", str(requirement.marker or ""))
    return found[1] if found else ""


def _extras(requirements: list[Requirement]) -> dict[str, set[str]]:
    """The packages that each extra lacks."""
    found: dict[str, set[str]] = {}
    for one in requirements:
        extra = _extra_of(one)
        if extra not in ("", "dev", "all"):
            lacking = found.setdefault(extra, set())
            if _version(one.name) is None:
                lacking.add(one.name)
    return found


def _system(errors: list[Problem], warnings: list[Problem]) -> dict[str, Any]:
    if sys.platform != "linux":
        what = f"{platform.system()} is not tested; see docs/cli.md for what is known"
        warnings.append(Problem("SYSTEM", "", what, "use Linux, WSL 2 or a container where something fails"))
    free = _free_memory()
    if free is not None and free < LEAST_FREE:
        what = f"only {free / 1e9:.1f} GB of memory are free"
        errors.append(Problem("MEMORY", "", what, "end other programs, or use fewer threads"))
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": available_cores(),
        "free_memory_bytes": free,
    }


def _free_memory() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def _kernels(warnings: list[Problem]) -> dict[str, Any]:
    """The folders of compiled kernels, and how many are compiled."""
    folders = [{"path": str(folder), "writable": _can_write(folder)} for folder in object_cache.folders()]
    compiled, number = object_cache.compiled_kernels()
    if compiled == 0 and not any(folder["writable"] for folder in folders):
        what = "no folder for compiled kernels can be written, so every command compiles them again"
        warnings.append(Problem("KERNELS", str(folders[-1]["path"]), what, "set NUMBA_CACHE_DIR to a folder that can"))
    elif compiled == 0:
        what = f"the first merge compiles them, in about {object_cache.seconds_to_compile():.0f} s"
        warnings.append(Problem("KERNELS", "", what, "compile them before with python -m paft_merge.compute.kernels"))
    return {"folders": folders, "compiled": compiled, "packaged": object_cache.packaged_kernels(), "all": number}


def _out(folder: Path, errors: list[Problem]) -> dict[str, Any]:
    place = _nearest(folder)
    free, writable = shutil.disk_usage(place).free, _can_write(place)
    if not writable:
        errors.append(Problem("OUTPUT", str(place), "cannot be written", "choose another folder"))
    if free < LEAST_FREE:
        what = f"only {free / 1e9:.1f} GB are free"
        errors.append(Problem("DISK_FULL", str(place), what, "free space, or choose another disk"))
    return {"folder": str(place), "writable": writable, "free_bytes": free}


def _rates(warnings: list[Problem]) -> dict[str, Any]:
    """The rates that `paft bench` stored; without them the defaults."""
    stored, problems = machine.stored()
    warnings += problems
    rates = stored.rates if stored else machine.REFERENCE
    origin = machine.described(stored, date.today())
    return {"measured": stored is not None, "origin": origin, **rates.model_dump()}


def _gpus() -> list[dict[str, Any]]:
    """The GPUs that the driver of NVIDIA lists, without importing torch."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    asked = [program, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(", ", 3) for line in lines if line.count(", ") >= 3]
    return [
        {"name": name, "memory_mib": _number(all_), "free_mib": _number(free), "driver": driver}
        for name, all_, free, driver in rows
    ]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _torch(errors: list[Problem]) -> dict[str, Any] | None:
    """What torch reports about itself."""
    try:
        import torch
    except ImportError as error:
        errors.append(Problem("MISSING", "torch", f"cannot be imported: {error}", "install torch again"))
        return None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


def _can_write(folder: Path) -> bool:
    """Whether a folder, which may not exist yet, can be written."""
    place = _nearest(folder)
    return place.is_dir() and os.access(place, os.W_OK)


def _nearest(place: Path) -> Path:
    """The first of a path and the folders above it that exists."""
    place = place.absolute()
    return next(one for one in (place, *place.parents) if one.exists())
