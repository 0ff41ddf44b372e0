"""Writing past the page cache: the same bytes as through it, on any file system, and no fault that is lost."""

from __future__ import annotations

import errno
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, local

import numpy as np
import pytest
import torch
from conftest import save_checkpoint

from paft_merge import merge
from paft_merge.errors import OutputError
from paft_merge.output import direct_io, shards
from paft_merge.output.shards import Shard, ShardWriter, plan_shards

SIZES = {"a": 1 << 20, "b": 4097, "c": (3 << 20) + 5, "d": 700_000, "e": 0, "f": 1}


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_DIRECT_FROM", 0)
    monkeypatch.setattr(direct_io, "_MIN_DIRECT", 4096)


def plan() -> tuple[Shard, ...]:
    return plan_shards({"model.safetensors": [(name, "U8", (size,)) for name, size in SIZES.items()]})


def write_in_pieces(folder: Path) -> dict[str, bytes]:
    """Write every tensor from four threads, in pieces of odd lengths, and say what was written."""
    made = np.random.default_rng(1)
    contents = {name: made.integers(0, 256, size, np.uint8).tobytes() for name, size in SIZES.items()}
    pieces, rng = [], random.Random(1)
    for name, content in contents.items():
        at = 0
        while at < len(content):
            step = rng.choice([1, 100, 4096, 5000, 65536, 1_300_000])
            pieces.append((name, at, content[at : at + step]))
            at += step
    rng.shuffle(pieces)

    def write(piece: tuple[str, int, bytes]) -> None:
        name, at, content = piece
        buffer = bytearray(content)
        writer.write(name, at, buffer)
        buffer[:] = bytes(len(buffer))  # whoever wrote may use its memory again at once

    with ShardWriter(folder, plan()) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(write, pieces))
        for name in contents:
            writer.settle(name)
            assert stored(folder, name, 0, len(contents[name])) == contents[name]
        writer.finish()
    return contents


def stored(folder: Path, name: str, start: int, nbytes: int) -> bytes:
    """Bytes of a tensor in the written file."""
    with (folder / "model.safetensors").open("rb") as file:
        file.seek(writer_offset((name, start)))
        return file.read(nbytes)


def check(folder: Path, contents: dict[str, bytes]) -> None:
    """The file holds exactly what was written, as the page cache and as the disk tell it."""
    (shard,) = plan()
    whole = shard.header + b"".join(contents.values())
    path = folder / "model.safetensors"
    assert path.read_bytes() == whole
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert path.read_bytes() == whole


def test_pieces_of_any_length_at_any_place_from_any_thread(tmp_path: Path) -> None:
    check(tmp_path, write_in_pieces(tmp_path))


def test_pages_in_an_aligned_buffer_are_written_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy, from any thread, and the buffer is not filled again before it is on the disk."""
    monkeypatch.setattr(direct_io.Background, "write_copy", None)
    pwrite = os.pwrite

    def slow(fd: int, view: memoryview, at: int) -> int:
        time.sleep(0.002)
        return pwrite(fd, view, at)

    monkeypatch.setattr(os, "pwrite", slow)
    made = np.random.default_rng(2)
    contents = {name: made.integers(0, 256, size, np.uint8) for name, size in SIZES.items()}
    step = 50_001
    pieces = [(name, at) for name, content in contents.items() for at in range(0, len(content), step)]
    random.Random(2).shuffle(pieces)
    buffers = local()

    def write(piece: tuple[str, int]) -> None:
        name, at = piece
        part = contents[name][at : at + step]
        buffers.mine = getattr(buffers, "mine", None) or direct_io.PageAlignedBuffer()
        offset = writer.offset(name, at)
        held = buffers.mine.array(len(part), offset)
        assert offset % 4 or (held.ctypes.data - offset) % 4096 == 0
        held[:] = part
        writer.write(name, at, held, buffers.mine)

    # Where a tensor begins at an odd byte, memory for its elements cannot lie as the file does.
    aligned = [piece for piece in pieces if writer_offset(piece) % 4 == 0]
    assert len(aligned) > 20
    with ShardWriter(tmp_path, plan()) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(write, aligned))
        for name in contents:
            writer.settle(name)
        for name, at in aligned:
            part = contents[name][at : at + step].tobytes()
            assert stored(tmp_path, name, at, len(part)) == part


def writer_offset(piece: tuple[str, int]) -> int:
    name, at = piece
    (shard,) = plan()
    return next(slot.offset for slot in shard.slots if slot.name == name) + at


def test_whole_pages_do_pass_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = direct_io.open_direct(Path(__file__))
    if fd is None:
        pytest.skip("this file system knows no direct writes")
    os.close(fd)
    pwrite, past = os.pwrite, []

    def watch(fd: int, view: memoryview, at: int) -> int:
        if os.get_blocking(fd) and os.O_DIRECT & _flags(fd):
            past.append((at, len(view)))
        return pwrite(fd, view, at)

    monkeypatch.setattr(os, "pwrite", watch)
    write_in_pieces(tmp_path)
    assert all(at % 4096 == size % 4096 == 0 for at, size in past)
    assert sum(size for _, size in past) > 0.5 * sum(SIZES.values())


def _flags(fd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("flags:")), 8)


@pytest.mark.parametrize("way", ["no flag", "no file", "no write"])
def test_where_it_cannot_be_writes_go_through_the_page_cache(tmp_path, monkeypatch, caplog, way):
    caplog.set_level("INFO", direct_io.__name__)
    monkeypatch.setattr(direct_io, "_first_fallback", Lock())
    refused = []
    if way == "no flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif way == "no file":
        monkeypatch.setattr(direct_io, "open_direct", lambda path: None)
        monkeypatch.setattr(shards, "open_direct", lambda path: None)
    else:
        pwrite = os.pwrite

        def refuse(fd: int, view: memoryview, at: int) -> int:
            if os.O_DIRECT & _flags(fd):
                refused.append(at)
                raise OSError(errno.EINVAL, "another alignment")
            return pwrite(fd, view, at)

        monkeypatch.setattr(os, "pwrite", refuse)
    check(tmp_path, write_in_pieces(tmp_path))
    assert caplog.text.count("another alignment") == (1 if refused else 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_fault_in_the_background_is_told_where_the_tensor_ends(tmp_path, monkeypatch, code):
    with ShardWriter(tmp_path, plan()) as writer:

        def refuse(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(direct_io, "write_all", lambda fd, view, at: refuse() if len(view) >= 4096 else None)
        monkeypatch.setattr(os, "pwrite", refuse)
        for _ in range(3):  # more pieces than there are buffers: none is lost with its write
            writer.write("c", 0, bytes(SIZES["c"]))
        with pytest.raises(OutputError, match=os.strerror(code)) as caught:
            writer.settle("c")
        assert caught.value.problems[0].code == ("OUTPUT" if code == errno.EIO else "DISK")


def test_a_merge_writes_the_same_bytes_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(0)
    states = {
        who: {name: torch.randn(300, 701, generator=made).bfloat16() for name in ("x.weight", "y.weight", "z.weight")}
        for who in ("base", "one", "two")
    }
    folders = {who: save_checkpoint(tmp_path / who, state) for who, state in states.items()}
    recipe = {
        "merge_method": "ties",
        "base_model": str(folders["base"]),
        "models": [
            {"model": str(folders[who]), "parameters": {"weight": 0.5, "density": 0.3}} for who in ("one", "two")
        ],
    }
    merge(recipe, tmp_path / "past")
    monkeypatch.setattr(shards, "_DIRECT_FROM", 1 << 60)
    merge(recipe, tmp_path / "through")
    past, through = ((tmp_path / way / "model.safetensors").read_bytes() for way in ("past", "through"))
    assert past == through


def test_a_descriptor_is_open_only_while_its_file_grows(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    files = plan_shards({f"{i}.safetensors": [("x" + str(i), "U8", (1 << 20,))] for i in range(20)})
    with ShardWriter(tmp_path, files) as writer:
        before = descriptors()
        for i in range(20):
            writer.write(f"x{i}", 0, bytes(1 << 20))
            assert descriptors() <= before + 1
            writer.settle(f"x{i}")
        assert descriptors() == before
