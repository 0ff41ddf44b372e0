"""Object files of the kernels: compiled once, checked before use, replaced by numba's own cache where they cannot be used."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from threading import Event
from time import monotonic

import numpy as np
import pytest

from paft_merge.compute import kernels, magnitudes, splitmix64
from paft_merge.compute.kernels import object_cache, primitives
from paft_merge.compute.kernels.block_source import FULL
from paft_merge.compute.kernels.object_cache import Compiled
from paft_merge.errors import MergeError

USED = """
import sys
import numpy as np
from paft_merge.compute.kernels import add_squares
sums = np.zeros(1)
add_squares(np.full(30, 2, np.float32).view(np.uint32), sums)
print(sums[0], "numba" in sys.modules)
"""


def used(code: str, folder: Path) -> str:
    """What a fresh process prints that keeps its object files in `folder`."""
    environment = {"NUMBA_CACHE_DIR": str(folder), "PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    run = subprocess.run(
        [sys.executable, "-c", dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The object file that a first process made."""
    folder = tmp_path_factory.mktemp("compiled")
    assert used(USED, folder) == "120.0 True"
    (kept,) = folder.iterdir()
    return kept


def test_numba_is_imported_once_for_a_loop(compiled: Path) -> None:
    assert used(USED, compiled.parent) == "120.0 False"
    assert [compiled] == list(compiled.parent.iterdir())


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty"])
def test_a_broken_object_file_is_made_again(compiled: Path, tmp_path: Path, harm: str) -> None:
    kept = Path(shutil.copy(compiled, tmp_path))
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    kept.write_bytes({"cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "empty": b""}[harm])
    assert used(USED, tmp_path) == "120.0 True"
    assert used(USED, tmp_path) == "120.0 False"


def test_what_a_loop_was_long_ago_goes_when_it_is_made_again(compiled: Path, tmp_path: Path) -> None:
    kept = tmp_path / compiled.name
    stem = kept.name.rpartition("-")[0]
    long_ago, lately, another = (tmp_path / name for name in (f"{stem}-a.o", f"{stem}-b.o", "blend-1-a.o"))
    for old in (long_ago, lately, another):
        old.write_bytes(b"")
    for old in (long_ago, another):
        os.utime(old, (0, 0))
    used(USED, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([kept, lately, another])


def test_every_loop_can_be_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [getattr(kernels, name) for name in every_loop()]
    assert {"fill_loop.fill", "merging.blend", "low_rank.multiply"} <= {f"{loop.module}.{loop.name}" for loop in every}
    for loop in every:
        monkeypatch.setattr(loop, "_entry", 0)
    monkeypatch.setattr(sys, "argv", ["paft_merge.compute.kernels"])
    runpy.run_module("paft_merge.compute.kernels")
    assert all(loop._entry for loop in every)


def test_where_nothing_can_be_kept_a_loop_still_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert used(USED, tmp_path / "file" / "folder") == "120.0 True"


def forget_digests() -> None:
    object_cache._sources.cache_clear()
    object_cache._environment.cache_clear()


def test_an_object_file_belongs_to_the_sources_of_the_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(Path(object_cache.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(object_cache, "__file__", str(copy / "object_cache.py"))
    for module in (magnitudes, splitmix64):
        shutil.copy(str(module.__file__), tmp_path)
        monkeypatch.setattr(module, "__file__", str(tmp_path / Path(str(module.__file__)).name))
    names = set()
    for changed in (None, copy / "primitives.py", tmp_path / "magnitudes.py", tmp_path / "splitmix64.py"):
        forget_digests()
        if changed:
            changed.write_text(changed.read_text() + "\n# changed\n")
        names |= {object_cache._environment(level) for level in (None, "x86-64-v3", "x86-64-v4")}
    forget_digests()
    assert len(names) == 12


def test_bits_of_either_type_are_one_loop_s_and_give_the_same() -> None:
    values = np.arange(5, dtype=np.float32)
    wide = values.view(np.uint32)
    narrow = (wide >> 16).astype(np.uint16)
    for base in (wide, narrow):
        out = [np.empty(5, kind) for kind in (np.uint16, np.uint32)]
        for one in out:
            bad = kernels.blend(
                one, base, base[None, :], False, FULL, 0, 2.0, np.ones(1, np.float32),
                np.uint64(0), False, np.empty((1, 8), np.int64), np.empty((1, 4)), 1,
                np.empty((2, 0), np.uint32), np.zeros(1, np.int64), kernels.lines(4),
            )  # fmt: skip
            assert bad == 0
        np.testing.assert_array_equal(out[1].view(np.float32), 3 * values)
        np.testing.assert_array_equal(out[0].astype(np.uint32) << 16, out[1])


@pytest.mark.parametrize(
    ("argument", "error", "match"),
    [
        (np.zeros(10, np.uint32)[::2], ValueError, "contiguous"),
        ([1, 2], TypeError, r"takes an array \(u4.1\) and not list"),
        (np.zeros(4, np.float32), TypeError, "not float32, 1-d"),
        (np.zeros((2, 2), np.uint32), TypeError, "not uint32, 2-d"),
    ],
)
def test_what_a_loop_cannot_read_is_refused(argument: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        kernels.add_squares(argument, np.zeros(1))


def test_numbers_and_bits_of_another_type_are_refused() -> None:
    some, room = np.zeros((1, 4), np.uint32), np.zeros((2, 64), np.uint32)
    with pytest.raises(TypeError, match=r"bits.1\) and not float32"):
        kernels.pick(np.zeros(4, np.float32), some, False, 0, 1, room, kernels.lines(1))
    with pytest.raises(TypeError, match=r"number \(int\) and not a float"):
        kernels.pick(some[0], some, False, 0, 1.0, room, kernels.lines(1))
    with pytest.raises(ValueError, match="shorter"):
        kernels.pick(some[0], some, False, 0, 1, room)


def broken(*_: object) -> None:
    raise AttributeError("module 'llvmlite.binding' has no attribute 'Target'")


def refusing(*_: object) -> None:
    raise RuntimeError("LLVM IR parsing error")


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is loaded, and no warning was logged."""
    for name in every_loop():
        monkeypatch.setattr(getattr(kernels, name), "_entry", 0)
        monkeypatch.setattr(getattr(kernels, name), "_function", None)
    monkeypatch.setattr(object_cache, "_FALLEN_BACK", [])


@pytest.mark.parametrize(("step", "harm"), [("_machine", broken), ("_compile", refusing), ("_load", refusing)])
def test_llvm_may_refuse_at_any_step(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str, harm: object
) -> None:  # fmt: skip
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(object_cache, step, harm)
    some, picked = np.arange(64, dtype=np.uint32), np.zeros((2, 64), np.uint32)
    assert kernels.pick(some, some[None, :], False, 0, 1, picked, kernels.lines(1)) == 64
    np.testing.assert_array_equal(picked, np.stack([some, some]))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(r"llvmlite \S+ \(\w+: .*\); numba's cache is used instead", record.getMessage())


def allocating(size: int) -> int:
    """A kernel that needs memory of numba's runtime."""
    return int(np.ones(size).sum())


def test_code_that_needs_the_runtime_of_numba_is_not_kept(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(primitives, "allocating", primitives.jit(allocating), raising=False)
    assert Compiled("primitives.allocating", "int")(1000) == 1000
    (record,) = caplog.records
    assert "primitives.allocating calls NRT_" in record.getMessage()
    assert not list(tmp_path.glob("*.o"))


def test_numba_loads_from_its_cache_what_it_compiled() -> None:
    from numba.core import config

    config.reload_config()  # else the first compilation uses the folder of an earlier test
    assert object_cache._compile_cached(kernels.add_squares)
    assert object_cache._c_function(kernels.add_squares, cache=True).cache_hits == 1


def test_a_kernel_that_numba_cannot_compile_is_an_error(forgotten: None) -> None:
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        Compiled("merging.absent", "int")(1)


def every_loop() -> list[str]:
    return sorted(name for name, value in vars(kernels).items() if isinstance(value, Compiled))


@pytest.mark.parametrize("name", every_loop())
def test_every_loop_is_where_its_name_says(name: str) -> None:
    from importlib import import_module

    loop = getattr(kernels, name)
    found = getattr(import_module(f"paft_merge.compute.kernels.{loop.module}"), loop.name)
    assert found.py_func.__code__.co_argcount == len(loop.takes)
    assert found.py_func.__doc__


def test_a_compilation_has_a_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release, calls = Event(), list[str]()

    def stuck(kernel: Compiled) -> bytes:
        calls.append(kernel.name)
        release.wait(60)
        raise AssertionError("nobody waits for this")

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(object_cache, "_COMPILER", object_cache._Compiler())
    monkeypatch.setattr(object_cache, "LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(object_cache, "_compile", stuck)
    monkeypatch.setattr(object_cache, "_compile_cached", stuck)
    start = monotonic()
    try:
        for name in ("statistics.measure", "statistics.compare"):
            with pytest.raises(
                MergeError, match=r"kernel \w+: was not compiled within 0 minutes; run again when"
            ) as caught:
                Compiled(name, "u4.1").prepare()
            assert caught.value.problems[0].code == "COMPILE"
    finally:
        release.set()
        object_cache._KERNELS[:] = [
            kernel for kernel in object_cache._KERNELS if kernel.takes[0].word != "u4.1" or len(kernel.takes) > 1
        ]
    assert monotonic() - start < 30
    assert calls[0] == "measure"
