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
from paft_merge.compute.blocks import Block, Election, KeepThreshold, RankedKeep
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.kernels import object_cache, primitives
from paft_merge.compute.kernels.block_source import FULL, TURNED, BlockSource, packed
from paft_merge.compute.kernels.object_cache import Compiled
from paft_merge.errors import MergeError
from paft_merge.inputs.quantized.grids import E2M1, IntGrid, LevelGrid
from paft_merge.inputs.quantized.rounding import Layout, Rounding, round_blocks
from paft_merge.inputs.quantized.scale_forms import FloatScales, Scales

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
    runpy.run_module("paft_merge.compute.kernels")
    assert all(loop._entry for loop in every)


def test_where_nothing_can_be_kept_a_loop_still_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert used(USED, tmp_path / "file" / "folder") == "120.0 True"


def test_an_object_file_belongs_to_the_sources_of_the_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(Path(object_cache.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(object_cache, "__file__", str(copy / "object_cache.py"))
    for module in (magnitudes, splitmix64):
        shutil.copy(str(module.__file__), tmp_path)
        monkeypatch.setattr(module, "__file__", str(tmp_path / Path(str(module.__file__)).name))
    names = set()
    for changed in (None, copy / "primitives.py", tmp_path / "magnitudes.py", tmp_path / "splitmix64.py"):
        monkeypatch.setattr(object_cache, "_ENVIRONMENT", [])
        if changed:
            changed.write_text(changed.read_text() + "\n# changed\n")
        names.add(object_cache._environment())
    assert len(names) == 4


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


def results() -> list[np.ndarray]:
    """What every kernel computes of one block."""
    cpu, made, rows, width = CpuOps(), np.random.default_rng(0), 40, 70
    size = rows * width
    left, right = (made.normal(0, 0.05, shape).astype(np.float32) for shape in ((rows, 5), (5, width)))
    dense = made.normal(0, 1e-2, size).astype(np.float32)
    base = (made.normal(0, 0.1, size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    fed = BlockSource(size, width, broken)
    for row in range(3):
        fed.multiply(row, left * np.float32(row + 1), packed(right))
    sources = np.empty((3, size), np.uint32)
    block = Block(77, base, sources, subtract=False, feed=fed)
    assert block.sources is sources
    sources[1] = dense.view(np.uint32)
    low = int(np.float32(1e-2).view(np.uint32))
    keeps = [KeepThreshold(low=low, low_cut=500), KeepThreshold(keep=1 << 31, key=5), KeepThreshold(shrink=1e-3)]
    out, other = np.empty(size, np.uint16), np.empty(size, np.uint16)
    found: list[object] = [
        sources,
        *cpu.histogram(block, 2),
        cpu.dropped_norms(block, keeps, squares=False),
        cpu.gram(block),
    ]
    counts, inside = cpu.collect(block, [low] * 3, [1 << 20] * 3)
    found += [counts, *inside, cpu.locate(block, 1, int(sources[1, 9] & magnitudes.MAGNITUDE), 0)]
    blended = cpu.blend(block, out, 1.0, [0.5, -0.25, 1.0], 7, True)
    elected = cpu.consensus(block, other, keeps, Election((0.6, 0.4, 1.0), "weighted", True, "weights", 1.0), 3)
    found += [out, blended.counts, blended.sums, other, elected.counts, elected.sums, *cpu.tally(block)]
    derived = [cpu.variance(block, 4), cpu.share(block, 1e-3, [1.0, 2.0, 3.0]), cpu.select(block, block, keeps[0])]
    fused, *parts = cpu.fuse(block, [1.0, 2.0, 3.0])
    largest, *more = cpu.largest(block, [1.0, -2.0, 3.0])
    ranked = [RankedKeep(np.linspace(0, 1 << 32, width).astype(np.uint64), key) for key in range(3)]
    derived += [
        fused,
        largest,
        cpu.drop_ranked(block, width, 1, ranked),
        cpu.swap(Block(0, base, sources[:1], True), 1e-3),
    ]
    extremes, ones = cpu.products(block), np.ones((3, 3))
    competing = cpu.scores(block, extremes[0], ones, ones)
    won, *counted = cpu.compete(block, competing, keeps, [1.0] * 3, [0.5] * 3)
    more += [extremes, cpu.exponential_sums(block, extremes[0], ones), *counted]
    derived += [competing, won]
    derived.append(cpu.mix(block, np.ones((3, width)), width, across=True))
    found += [*(b.sources for b in derived), *parts, *more, *cpu.overlaps(block, 1e-3)]
    found += [cpu.gram_rows(block, width), cpu.gram_columns(block, width)]
    picked = np.zeros((4, size), np.uint32)
    found += [kernels.pick(base, sources, False, 0, 2, picked, kernels.lines(1)), picked]
    edges, below, bins, sums = (
        np.array([low], np.uint32),
        np.zeros(1, np.int64),
        np.zeros(kernels.BINS, np.int64),
        np.zeros(2),
    )
    gone, weight = np.zeros(1, np.int64), np.zeros(1)
    found += [kernels.measure(sources[1], base, edges, below, bins, sums, gone, weight, kernels.lines(1))]
    found += [below, bins.copy(), sums, gone, weight]
    counts, lows = np.zeros((2, 1, kernels.BINS), np.int64)
    kernels.unpack(bins[None].copy(), counts, lows)
    found += [counts, lows]
    pair, pair_sums, shared, square = (
        np.zeros(4, np.int64),
        np.zeros(5),
        np.zeros(4, np.int64),
        np.zeros(1),
    )
    kernels.compare(sources[0], sources[1], np.uint32(low), pair, pair_sums)
    kernels.shared_support(sources[0], sources[1], 0, np.full(2, low, np.uint32), np.zeros(2, np.int64), shared)
    kernels.add_squares(sources[1], square)
    found += surveyed(base, sources, low)
    product = np.empty((rows, width), np.float32)
    kernels.product(left, right, product)
    found += coded(sources[0].view(np.float32))
    return [np.array(one) for one in (*found, pair, pair_sums, shared, square, product)]


def coded(values: np.ndarray) -> list[np.ndarray]:
    """Values rounded to codes of each kind, at random too."""
    found: list[np.ndarray] = []
    held = np.ascontiguousarray(np.nan_to_num(values[: values.size // 64 * 64]).reshape(-1, 64))
    bits, form = np.full((len(held), 4), 0x3F80, np.uint16), FloatScales("BF16")
    for grid in (E2M1, IntGrid(-8, 7, 8), LevelGrid(np.linspace(-1, 1, 16, dtype=np.float32))):
        for key in (0, 3):
            made = round_blocks(
                held, grid, Layout.of(1, 16, 64), Scales(bits, form.values(bits), form), Rounding(key=key)
            )
            found += [made.codes, made.scales, made.values]
    counts, sums, (merged, base) = np.empty(2, np.int64), np.empty(2), held[: len(held) // 2 * 2].reshape(2, -1)
    kernels.lost(merged, base, made.values.reshape(-1)[: merged.size], counts, sums, kernels.lines(2, of=np.float64))
    codes, table = np.arange(96, dtype=np.uint8), np.linspace(-1, 1, 512, dtype=np.float32).reshape(256, 2)
    scales, line = np.linspace(0.5, 2, 12, dtype=np.float32).reshape(6, 2), np.empty(TURNED, np.float32)
    values, turned = np.empty(192, np.float32), np.empty((32, 6), np.float32)
    kernels.decode(codes, table, scales, np.empty((0, 0), np.float32), 32, 16, 0, values)
    kernels.decode_turned(codes.reshape(6, 16), table, scales, 16, line, turned)
    return [*found, values, turned, counts, sums]


def surveyed(base: np.ndarray, sources: np.ndarray, low: int) -> list[np.ndarray]:
    """What `kernels.survey` counts and sums in one block of three sources, and its preview."""
    edges, integers, size = np.array([low], np.uint32), np.int64, sources.shape[1]
    one = [np.zeros((3, 1), integers), np.zeros((3, kernels.BINS), integers), *np.zeros((2, 3, kernels.BINS), integers)]
    one += [np.zeros(3, np.uint32), np.zeros((3, 2)), np.zeros(3, integers), np.zeros(3)]
    two = [np.zeros((3, 4), integers), np.zeros((3, 5)), np.zeros((3, 4), integers)]
    bounds = np.full((1, 3), low, np.uint32), np.full((1, 3), 1 << 16, np.uint32)
    three = [np.zeros((1, size), np.int32), np.zeros((1, 4, size), np.float32), np.zeros((1, 3, size), np.uint32)]
    three += [np.zeros((1, 4, 2), integers)]
    four = [np.zeros((3, 8), integers), np.zeros((3, 4)), np.zeros(1)]
    weights, memory = np.full(3, 0.5, np.float32), (np.empty((2, 3), np.uint32), np.empty(2, integers))
    below, packed, *rest = one
    assert (
        kernels.survey(
            base, sources, False, FULL, np.empty((3, 0), np.float32), edges, below, packed, size, *rest, np.uint32(low), *two,
            *bounds, *three, weights, 1, True, 1, 1.0, *four, memory[0][0], memory[0][1, :2], memory[1], kernels.lines(8),
        ) == 0
    )  # fmt: skip
    return [*one, *two, *three, *four]


def test_every_kernel_gives_the_same_bits_by_numba_s_cache(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = results()
    assert not object_cache._FALLEN_BACK
    assert all(getattr(kernels, name)._entry for name in every_loop()), "a kernel is not compared"
    for name in every_loop():
        monkeypatch.setattr(getattr(kernels, name), "_entry", 0)
        monkeypatch.setattr(getattr(kernels, name), "_function", None)
    monkeypatch.setattr(object_cache, "_load", broken)
    found = results()
    assert all(getattr(kernels, name)._entry for name in every_loop())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(r"llvmlite \S+ \(AttributeError: .*'Target'\); numba's cache is used instead", record.getMessage())


@pytest.mark.parametrize(("step", "harm"), [("_machine", broken), ("_compile", refusing), ("_load", refusing)])
def test_llvm_may_refuse_at_any_step(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str, harm: object
) -> None:  # fmt: skip
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(object_cache, step, harm)
    some, picked = np.arange(64, dtype=np.uint32), np.zeros((2, 64), np.uint32)
    assert kernels.pick(some, some[None, :], False, 0, 1, picked, kernels.lines(1)) == 64
    np.testing.assert_array_equal(picked, np.stack([some, some]))
    assert len(caplog.records) == 1


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
