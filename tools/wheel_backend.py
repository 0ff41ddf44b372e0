"""The build backend: setuptools, which also compiles the kernels for the usual x86-64 processors and puts them into the wheel.

A wheel that is built on another system, without the compiler (`pip wheel --no-build-isolation` in an environment without numba) or
with `--config-settings=kernels=no` has no compiled kernels: they are compiled when they are first used, as in a checkout.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that are not defined here)

COMPILER = ("llvmlite", "numba", "numpy", "xxhash")
"""The dependencies of the package that its kernels import."""

PLACE = Path("paft_merge", "compute", "kernels", "packaged")


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What setuptools needs, and the compiler."""
    dependencies = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    compiler = [text for text in dependencies if re.match(r"[\w-]+", text)[0] in COMPILER]  # type: ignore[index]
    return [
        *build_meta.get_requires_for_build_wheel(config_settings),
        *([] if _hindrance(config_settings) else compiler),
    ]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build a wheel with compiled kernels, where they can be compiled."""
    with packaged_kernels(config_settings):
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


@contextmanager
def packaged_kernels(config_settings: Any = None) -> Iterator[None]:
    """Compile the kernels, a process for each level, into the tree to be packaged; delete them afterwards."""
    for old in (PLACE, Path("build", "lib", PLACE)):  # setuptools packages what an earlier build left there
        shutil.rmtree(old, ignore_errors=True)
    missing = [name for name in COMPILER if find_spec(name) is None]
    try:
        if reason := _hindrance(config_settings) or (f"{', '.join(missing)} not installed" if missing else ""):
            print(f"the wheel has no compiled kernels: {reason}", file=sys.stderr)
        else:
            _compile()
        yield
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


def _hindrance(config_settings: Any) -> str:
    """Why no object files for Linux on x86-64 are made; empty if they are."""
    if (config_settings or {}).get("kernels") == "no":
        return "kernels=no"
    usual = sys.platform == "linux" and platform.machine() == "x86_64"
    return "" if usual else f"{sys.platform} on {platform.machine()}"


def _compile() -> None:
    levels = runpy.run_path(str(Path(__file__).parents[1] / PLACE.parent / "processors.py"))["LEVELS"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    command = [sys.executable, "-m", "paft_merge.compute.kernels", str(PLACE)]
    print(f"compiling the kernels for {', '.join(levels)} (about a minute)", file=sys.stderr)
    running = [
        subprocess.Popen(command, env=ours | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": level.tuning})
        for name, level in levels.items()
    ]
    if code := max([process.wait() for process in running], key=abs):
        raise subprocess.CalledProcessError(code, command)
