"""Kernels that come with a wheel: the same bits as those of this machine, loaded only where the processor can run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llvmlite import binding

from paft_merge.compute import kernels, magnitudes
from paft_merge.compute.blocks import Block, Election, KeepThreshold, RankedKeep
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.kernels import object_cache, processors
from paft_merge.compute.kernels.block_source import FULL, TURNED, BlockSource, packed
from paft_merge.compute.kernels.object_cache import Compiled
from paft_merge.inputs.quantized.grids import E2M1, IntGrid, LevelGrid
from paft_merge.inputs.quantized.rounding import Layout, Rounding, round_blocks
from paft_merge.inputs.quantized.scale_forms import FloatScales, Scales

EVERY = [value for value in vars(kernels).values() if isinstance(value, Compiled)]
AVX2, AVX512 = (processors.LEVELS[name].needs for name in ("x86-64-v3", "x86-64-v4"))


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (AVX512, "x86-64-v4"),
        (AVX512 | {"avx512_vbmi2", "amx_tile"}, "x86-64-v4"),
        (AVX512 - {"avx512vl"}, "x86-64-v3"),
        (AVX2, "x86-64-v3"),
        (AVX2 - {"avx2"}, None),
        ({"asimd", "fp"}, None),
        (set(), None),
    ],
)
def test_the_level_of_a_processor_has_only_what_it_can_run(flags: set[str], level: str | None) -> None:
    assert processors.level_of(flags) == level


def test_the_kernel_s_names_of_features_are_those_of_llvm() -> None:
    names = {"abm": "lzcnt", "bmi1": "bmi", "lahf_lm": "sahf", "sse4_2": "sse4.2"}
    has = {name for name, present in binding.get_host_cpu_features().items() if present}
    for level in processors.LEVELS.values():
        if level.needs <= set(processors._listed().get("flags", "").split()):
            assert {names.get(name, name) for name in level.needs} <= has


@pytest.mark.parametrize("name", ["NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"])
def test_another_processor_can_be_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = processors.identity()
    assert here != "|".join(processors.processor())
    monkeypatch.setenv(name, "")
    assert processors.identity.__wrapped__() == "|".join(processors.processor()) != here
    assert processors.level.__wrapped__() == (None if name == "NUMBA_CPU_NAME" else processors.level())


@pytest.fixture(scope="module")
def packaged() -> Path:
    """A folder with every kernel for the lower level, as a wheel has it; made once and kept beside the compiled kernels."""
    if processors.level() is None:
        pytest.skip("a processor without AVX2")
    folder = object_cache.folders()[0] / "x86-64-v3"
    made_for = {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": processors.LEVELS["x86-64-v3"].tuning}
    subprocess.run([sys.executable, "-m", "paft_merge.compute.kernels", folder], env=os.environ | made_for, check=True)
    return folder


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no kernel be loaded."""
    for kernel in EVERY:
        monkeypatch.setattr(kernel, "_entry", 0)
        monkeypatch.setattr(kernel, "_function", None)


def refusing(*_: object) -> Any:
    raise AssertionError("a kernel is compiled")


def use(folder: Path, monkeypatch: pytest.MonkeyPatch, level: str | None = "x86-64-v3") -> None:
    """Load kernels of a folder, as if they had come with the package."""
    forget(monkeypatch)
    monkeypatch.setattr(object_cache, "PACKAGED", folder)
    monkeypatch.setattr(processors, "level", lambda: level)


def test_every_packaged_kernel_gives_the_same_bits(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forget(monkeypatch)  # another test may have left kernels that numba loads
    expected = results()
    assert all(kernel._entry for kernel in EVERY), "a kernel is not compared"
    use(packaged, monkeypatch)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(object_cache, "_compile", refusing)
    monkeypatch.setattr(object_cache, "_compile_cached", refusing)
    assert all(kernel.is_packaged for kernel in EVERY)
    assert object_cache.compiled_kernels()[0] >= len(EVERY)
    found = results()
    assert all(kernel._entry for kernel in EVERY)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if ours.dtype == np.float64:  # sums of strips in float32, in as many lanes as the vectors of the processor have
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        else:
            assert ours.tobytes() == theirs.tobytes()


def test_our_loader_and_that_of_llvm_give_the_same_bits(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(packaged, monkeypatch)
    expected = results()
    forget(monkeypatch)
    loaded = list[str]()

    def by_llvm(machine: bytes, symbol: str) -> None:
        loaded.append(symbol)
        raise ValueError

    monkeypatch.setattr(object_cache.elf, "load", by_llvm)
    assert [one.tobytes() for one in results()] == [one.tobytes() for one in expected]
    assert len(loaded) == len(EVERY)


def test_every_kernel_is_loaded_without_llvm(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(packaged, monkeypatch)
    monkeypatch.setattr(object_cache, "_load_by_llvm", refusing)
    kernels.prepare()


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [(0, b"\xcf\xfa", "not an object file"), (4, b"\1", "not an object file"), (18, b"\xb7\0", "not an object file")],
)
def test_an_object_file_of_another_system_is_left_to_llvm(packaged: Path, at: int, value: bytes, what: str) -> None:
    held = (packaged / kernels.add_squares._file("x86-64-v3")).read_bytes()
    symbol, _, machine = held[16:].partition(b"\0")
    with pytest.raises(ValueError, match=what):
        object_cache.elf.load(machine[:at] + value + machine[at + len(value) :], symbol.decode())


def test_unknown_relocations_and_variables_are_refused(packaged: Path) -> None:
    elf = object_cache.elf
    held = (packaged / kernels.blend._file("x86-64-v3")).read_bytes()
    symbol, _, machine = held[16:].partition(b"\0")
    start, count = elf._HEADER.unpack_from(machine)[7], elf._HEADER.unpack_from(machine)[-2]
    changed = {"a relocation of kind 10": bytearray(machine), "has variables": bytearray(machine)}
    for i in range(count):
        at = start + i * elf._SECTION.size
        one = elf._Section(*elf._SECTION.unpack_from(machine, at))
        if one.kind == 4:
            changed["a relocation of kind 10"][one.offset + 8] = 10
        elif one.flags & 2 and one.size:
            changed["has variables"][at + 8] |= 1
    for what, text in changed.items():
        with pytest.raises(ValueError, match=what):
            elf.load(bytes(text), symbol.decode())


def test_a_broken_packaged_kernel_is_not_loaded(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(tmp_path, monkeypatch)
    name = kernels.add_squares._file("x86-64-v3")
    whole = (packaged / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert kernels.add_squares.is_packaged
    sums = np.zeros(1)
    kernels.add_squares(np.full(30, 2, np.float32).view(np.uint32), sums)
    assert sums[0] == 120


def test_another_level_or_source_has_another_file(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(packaged, monkeypatch, "x86-64-v4")
    assert not kernels.add_squares.is_packaged
    use(packaged, monkeypatch, None)
    assert not kernels.add_squares.is_packaged
    use(packaged, monkeypatch)
    assert kernels.add_squares.is_packaged
    monkeypatch.setattr(object_cache, "_environment", lambda level: f"other sources|{level}")
    assert not kernels.add_squares.is_packaged


def results() -> list[np.ndarray]:
    """What every kernel computes of one block."""
    cpu, made, rows, width = CpuOps(), np.random.default_rng(0), 40, 70
    size = rows * width
    left, right = (made.normal(0, 0.05, shape).astype(np.float32) for shape in ((rows, 5), (5, width)))
    dense = made.normal(0, 1e-2, size).astype(np.float32)
    base = (made.normal(0, 0.1, size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    fed = BlockSource(size, width, refusing)
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
