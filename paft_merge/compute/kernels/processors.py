"""Processors that kernels are compiled for: this machine's, or a level of x86-64 for the kernels of a wheel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

_V3 = {"abm", "avx", "avx2", "bmi1", "bmi2", "cx16", "f16c", "fma", "lahf_lm", "movbe", "popcnt", "sse4_2", "xsave"}


class Level(NamedTuple):
    """A level of the x86-64 psABI (section 3.1.1)."""

    needs: set[str]
    """Features of every processor of the level, by the names of /proc/cpuinfo."""
    tuning: str
    """LLVM's features besides those of the level."""


LEVELS: Mapping[str, Level] = {
    # By default LLVM makes vectors of 256 bits for this level: on Zen 5, `merging.consensus` then takes 1.45 times as long.
    "x86-64-v4": Level(_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "-prefer-256-bit"),
    "x86-64-v3": Level(_V3, ""),
}
"""The levels whose kernels come with a wheel, best first."""


def level_of(flags: set[str]) -> str | None:
    """The best level of a processor with these flags; None if it has none of the levels."""
    return next((name for name, level in LEVELS.items() if level.needs <= flags), None)


@cache
def level() -> str | None:
    """The level of this processor; None if `NUMBA_CPU_NAME` names another processor."""
    return None if "NUMBA_CPU_NAME" in os.environ else level_of(set(_listed().get("flags", "").split()))


@cache
def identity() -> str:
    """Text that differs between processors for which LLVM makes different code."""
    listed = _listed()
    if listed and not any(name in os.environ for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")):
        return "|".join(listed.get(name, "") for name in _DISTINCTIVE)
    return "|".join(processor())


_DISTINCTIVE = (
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "flags",
    "CPU implementer",
    "CPU part",
    "CPU variant",
    "Features",
)
"""The entries of /proc/cpuinfo from which LLVM derives the name and the features of a processor of x86-64 or ARM."""


@cache
def _listed() -> Mapping[str, str]:
    """The entries of the first processor in /proc/cpuinfo; empty where there is none. LLVM knows them too, but takes 15 ms to import."""
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as file:
            first = file.read(1 << 16).decode(errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor() -> tuple[str, str]:
    """Name and features of the processor to compile for, as LLVM takes them: those of numba, which reads the same variables."""
    from llvmlite import binding

    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    return (
        binding.get_host_cpu_name() if name is None else name,
        binding.get_host_cpu_features().flatten() if features is None else features,
    )


def has_avx512() -> bool:
    """Whether the processor to compile for has vector registers of 512 bits."""
    name, features = processor()
    return name == "x86-64-v4" or "+avx512f" in features.split(",")
