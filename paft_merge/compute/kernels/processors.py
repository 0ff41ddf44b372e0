"""Processors that kernels are compiled for: this machine's, or a level of x86-64 for the kernels of a wheel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

_V3 = {"avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sahf", "sse4.2", "xsave"}


class Level(NamedTuple):
    """A level of the x86-64 psABI (section 3.1.1)."""

    needs: set[str]
    """Features of every processor of the level, by LLVM's names."""
    tuning: str
    """LLVM's features besides those of the level."""


LEVELS: Mapping[str, Level] = {
    # By default LLVM makes vectors of 256 bits for this level: on Zen 5, `merging.consensus` then takes 1.45 times as long.
    "x86-64-v4": Level(_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "-prefer-256-bit"),
    "x86-64-v3": Level(_V3, ""),
}
"""The levels whose kernels come with a wheel, best first."""


def level_of(features: Mapping[str, bool]) -> str | None:
    """The best level of a processor with these features; None if it has none of the levels."""
    has = {name for name, present in features.items() if present}
    return next((name for name, level in LEVELS.items() if level.needs <= has), None)


@cache
def level() -> str | None:
    """The level of this processor; None if `NUMBA_CPU_NAME` names another processor."""
    from llvmlite import binding

    return None if "NUMBA_CPU_NAME" in os.environ else level_of(binding.get_host_cpu_features())


@cache
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
