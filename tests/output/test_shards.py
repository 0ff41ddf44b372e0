"""Shards: the bytes of safetensors' own writer, in any order, from any thread, and full disks named."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import paft_merge.output.shards
from paft_merge.errors import OutputError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.safetensors_header import scan
from paft_merge.output.shards import Shard, ShardWriter, index_of, index_text, plan_shards, split

FILE = "model.safetensors"


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    """One tensor of each dtype that torch can save, names that need escaping, a scalar and an empty one."""
    tensors = {
        name: torch.arange(6, dtype=torch.uint8).repeat(row.bits // 8).view(getattr(torch, row.torch))
        for name, row in DTYPES.items()
        if row.torch
    }
    return tensors | {'"é"\\\n\x01\x7f/😀': torch.ones(2, 3), "scalar": torch.tensor(1.5), "none": torch.zeros(0, 4)}


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def planned(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """What a file holds, in its own order."""
    with path.open("rb") as file:
        return [(info.name, info.dtype, info.shape) for info in scan(file.fileno(), path).tensors.values()]


def small(folder: Path) -> tuple[tuple[Shard, ...], bytes]:
    """The plan of a folder of one file with two tensors, and the bytes of tensor `a`."""
    folder.mkdir(exist_ok=True)
    return plan_shards({FILE: [("a", "F32", (3,)), ("b", "U8", (5,))]}), np.arange(3, dtype=np.float32).tobytes()


# --- the bytes --------------------------------------------------------------------------------------------------------


def test_the_bytes_are_those_of_save_file(tmp_path):
    tensors = tensors_of_all_kinds()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shards = plan_shards({"ours": planned(tmp_path / "theirs")})

    with ShardWriter(tmp_path, shards) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, raw(tensor))
        writer.finish()

    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_bytes_are_those_of_save_file_in_any_order_from_many_threads(tmp_path):
    tensors = {
        f"t{i}": torch.randint(0, 255, (random.Random(i).randrange(3000),), dtype=torch.uint8) for i in range(40)
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    pieces = [
        (name, at, raw(tensor)[at : at + 700]) for name, tensor in tensors.items() for at in range(0, len(tensor), 700)
    ]
    random.Random(0).shuffle(pieces)

    with ShardWriter(tmp_path, plan_shards({"ours": planned(tmp_path / "theirs")})) as writer:

        def write() -> None:
            while pieces:
                try:
                    piece = pieces.pop()
                except IndexError:
                    return
                writer.write(*piece)

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_headers_fill_up_to_eight_bytes_and_carry_the_metadata_asked_for(tmp_path):
    for count in range(1, 12):
        (shard,) = plan_shards({FILE: [("a" * count, "U8", (1,))]})
        assert len(shard.header) % 8 == 0
        assert shard.header[8:].startswith(b'{"__metadata__":{"format":"pt"},"a')
    files = {"one": [("a", "U8", (1,))], "two": [("b", "U8", (1,))], "three": [("c", "U8", (1,))]}
    shards = plan_shards(files, {"two": {"z": "1", "a": "é"}, "three": {}})
    assert [json.loads(shard.header[8:]).get("__metadata__") for shard in shards] == [
        {"format": "pt"},
        {"a": "é", "z": "1"},
        None,
    ]
    assert list(json.loads(shards[1].header[8:])["__metadata__"]) == ["a", "z"]


def test_slots_lie_one_behind_the_other_in_the_order_given():
    (shard,) = plan_shards(
        {FILE: [("b", "BF16", (2, 3)), ("none", "F32", (0,)), ("a", "F64", ()), ("six", "F6_E2M3", (4,))]}
    )
    start = len(shard.header)
    assert [(slot.name, slot.offset - start, slot.nbytes) for slot in shard.slots] == [
        ("b", 0, 12),
        ("none", 12, 0),
        ("a", 12, 8),
        ("six", 20, 3),
    ]
    assert shard.size == start + 23
    assert all(slot.file == FILE for slot in shard.slots)


def test_offsets_beyond_32_bits_are_exact():
    (shard,) = plan_shards({FILE: [("big", "F64", (2**31, 5)), ("last", "U8", (1,))]})
    assert shard.slots[1].offset == len(shard.header) + 5 * 2**34
    assert shard.size == shard.slots[1].offset + 1


@pytest.mark.parametrize(
    "files",
    [
        {"x": [("a", "U8", (1,)), ("a", "U8", (1,))]},
        {"x": [("a", "U8", (1,))], "y": [("a", "U8", (1,))]},
        {"x": [("__metadata__", "U8", (1,))]},
        {"x": [("a", "F4", (3,))]},
    ],
)
def test_plans_that_no_reader_would_accept_are_bugs_of_the_caller(files):
    with pytest.raises(ValueError, match=r"two tensors have the same name|does not fill whole bytes"):
        plan_shards(files)


def test_a_header_longer_than_readers_accept_is_refused(monkeypatch):
    monkeypatch.setattr(paft_merge.output.shards, "MAX_JSON_BYTES", 60)
    with pytest.raises(
        OutputError, match=r"x: its header would take 88 bytes; readers accept 60; write smaller shards"
    ):
        plan_shards({"x": [("a", "U8", (1,))]})


# --- how tensors are divided ------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 40))
def test_tensors_are_divided_as_the_hubs_library_divides_them(sizes, limit):
    names = {f"t{i}": size for i, size in enumerate(sizes)}
    theirs = split_state_dict_into_shards_factory(
        names, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    ours = split([(name, "U8", (size,)) for name, size in names.items()], limit)
    assert {file: [name for name, _, _ in group] for file, group in ours.items()} == theirs.filename_to_tensors


def test_without_a_limit_everything_goes_into_one_file():
    tensors = [("a", "F32", (10**12,)), ("b", "F32", (10**12,))]
    assert split(tensors) == {FILE: tensors}
    assert split([]) == {FILE: []}
    assert list(split(tensors, 1, stem="diffusion_pytorch_model")) == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]


def test_index_and_shards_are_byte_for_byte_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    (tmp_path / "ours").mkdir()

    with Checkpoint.open(tmp_path / "theirs") as checkpoint:
        files = {file.name: planned(tmp_path / "theirs" / file.name) for file in checkpoint.files}
        shards = plan_shards(files)
        with ShardWriter(tmp_path / "ours", shards) as writer:
            for name in checkpoint.tensors:
                writer.write(name, 0, raw(checkpoint.tensor(name)))
    index = index_of(shards)
    assert index is not None

    assert len(files) > 3
    assert index_text(index) == (tmp_path / "theirs" / "model.safetensors.index.json").read_text()
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_only_one_file_of_a_plain_name_needs_no_index():
    for name in (FILE, "diffusion_pytorch_model.safetensors"):
        assert index_of(plan_shards({name: [("a", "U8", (1,))]})) is None
    index = index_of(plan_shards({"model-00001-of-00001.safetensors": [("b", "BF16", (2,)), ("a", "F32", ())]}))
    assert index == {
        "metadata": {"total_parameters": 3, "total_size": 8},
        "weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"},
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def test_files_have_their_size_and_header_before_any_tensor_is_written(tmp_path):
    shards, _ = small(tmp_path)
    with ShardWriter(tmp_path, shards):
        assert os.listdir(tmp_path) == [FILE]
        assert load_file(tmp_path / FILE)["a"].equal(torch.zeros(3))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves blocks")
def test_disk_space_is_reserved_before_any_tensor_is_written(tmp_path):
    (shard,) = plan_shards({FILE: [("a", "U8", (1_000_000,))]})
    with ShardWriter(tmp_path, (shard,)):
        assert (tmp_path / FILE).stat().st_blocks * 512 >= shard.size


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_that_cannot_reserve_space_get_sparse_files(tmp_path, monkeypatch, code):
    class Libc:
        def __init__(self, *_: object, **__: object) -> None: ...

        def fallocate(self, *_: object) -> int:
            paft_merge.output.shards.ctypes.set_errno(code)
            return -1

    shards, content = small(tmp_path)
    monkeypatch.setattr(paft_merge.output.shards.ctypes, "CDLL", Libc)
    with ShardWriter(tmp_path, shards) as writer:
        writer.write("a", 0, content)
    assert load_file(tmp_path / FILE)["a"].tolist() == [0, 1, 2]
    assert (tmp_path / FILE).stat().st_size == shards[0].size


def test_systems_without_fallocate_get_sparse_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paft_merge.output.shards.ctypes, "CDLL", lambda *_, **__: object())
    shards, content = small(tmp_path)
    with ShardWriter(tmp_path, shards) as writer:
        writer.write("a", 0, content)
    assert load_file(tmp_path / FILE)["a"].tolist() == [0, 1, 2]


def test_writes_that_the_system_cuts_short_go_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:3], at))
    shards, content = small(tmp_path)
    with ShardWriter(tmp_path, shards) as writer:
        writer.write("a", 0, content)
        writer.write("b", 1, b"1234")
    assert load_file(tmp_path / FILE)["a"].tolist() == [0, 1, 2]
    assert bytes(load_file(tmp_path / FILE)["b"].tolist()) == b"\x001234"


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (12, 1), (0, 13), (20, 0)])
def test_a_write_outside_its_tensor_is_a_bug_of_the_caller_and_writes_nothing(tmp_path, start, count):
    shards, _ = small(tmp_path)
    with ShardWriter(tmp_path, shards) as writer, pytest.raises(ValueError, match="'a', which has 12"):
        writer.write("a", start, b"\xff" * count)
    assert (tmp_path / FILE).read_bytes() == shards[0].header + bytes(17)


def test_finishing_syncs_every_file_and_then_the_folder(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    shards = plan_shards({"x": [("a", "U8", (1,))], "y": [("b", "U8", (1,))]})
    with ShardWriter(tmp_path, shards) as writer:
        writer.finish()
    assert synced == [str(tmp_path / "x"), str(tmp_path / "y"), str(tmp_path)]


def test_files_are_closed_at_the_end(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    shards, _ = small(tmp_path)
    with ShardWriter(tmp_path, shards) as writer:
        assert len(os.listdir("/proc/self/fd")) == before + 1
    writer.close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- going on after a crash -------------------------------------------------------------------------------------------


def test_a_resumed_writer_keeps_what_is_there_and_makes_what_is_not(tmp_path):
    plan = {"x": [("a", "U8", (4,)), ("b", "U8", (4,))], "y": [("c", "U8", (4,))]}
    with ShardWriter(tmp_path, plan_shards({"x": plan["x"]})) as writer:
        writer.write("a", 0, b"aaaa")
    (tmp_path / "y.new").write_bytes(b"left by a crash while y was made" * 100)

    with ShardWriter(tmp_path, plan_shards(plan), resume=True) as writer:
        writer.write("b", 0, b"bbbb")
        writer.write("c", 0, b"cccc")

    assert sorted(os.listdir(tmp_path)) == ["x", "y"]
    content = {name: bytes(t.tolist()) for file in plan for name, t in load_file(tmp_path / file).items()}
    assert content == {"a": b"aaaa", "b": b"bbbb", "c": b"cccc"}


@pytest.mark.parametrize("change", ["longer", "shorter", "header", "empty"])
def test_a_file_of_another_merge_is_not_resumed_and_not_touched(tmp_path, change):
    shards, _ = small(tmp_path)
    ShardWriter(tmp_path, shards).close()
    content = (tmp_path / FILE).read_bytes()
    other = {"longer": content + b"x", "shorter": content[:-1], "header": content.replace(b'"a"', b'"z"'), "empty": b""}
    (tmp_path / FILE).write_bytes(other[change])

    with pytest.raises(
        OutputError, match="is not the file that this merge would write; run without resume=True to start over"
    ) as caught:
        ShardWriter(tmp_path, shards, resume=True)

    assert caught.value.problems[0].code == "RESUME_STALE"
    assert (tmp_path / FILE).read_bytes() == other[change]


def test_links_and_pipes_are_not_resumed(tmp_path):
    shards, _ = small(tmp_path)
    (tmp_path / "victim").write_bytes(bytes(shards[0].size))
    (tmp_path / FILE).symlink_to("victim")
    with pytest.raises(OutputError, match="cannot be written"):
        ShardWriter(tmp_path, shards, resume=True)
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(OutputError):
        ShardWriter(tmp_path, shards, resume=True)
    assert (tmp_path / "victim").read_bytes() == bytes(shards[0].size)


# --- what the system refuses ------------------------------------------------------------------------------------------


def fault_of(folder: Path, shards: tuple[Shard, ...]) -> tuple[str, str]:
    with pytest.raises(OutputError) as caught:
        ShardWriter(folder, shards)
    (problem,) = caught.value.problems
    return problem.code, str(problem)


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    shards, _ = small(tmp_path)
    (tmp_path / FILE).write_text("mine")
    assert fault_of(tmp_path, shards) == ("OUTPUT", f"{tmp_path / FILE}: cannot be written: exists already")
    assert (tmp_path / FILE).read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    shards, _ = small(tmp_path / "out")
    code, text = fault_of(tmp_path / "none", shards)
    assert (code, text) == ("OUTPUT", f"{tmp_path / 'none'}: cannot be written: No such file or directory")

    def readonly(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", readonly)
    code, text = fault_of(tmp_path / "out", shards)
    assert (code, text) == ("OUTPUT", f"{tmp_path / 'out' / FILE}: cannot be written: Read-only file system")


def test_too_little_space_is_known_before_anything_is_written(tmp_path):
    shards = plan_shards({"small": [("a", "U8", (1,))], "big": [("b", "U8", (2**60,))]})
    code, text = fault_of(tmp_path, shards)
    assert code == "DISK"
    assert f"the disk has too little space: {sum(shard.size for shard in shards):,} bytes needed, " in text
    assert not os.listdir(tmp_path)


def test_a_disk_that_fills_while_files_are_made_leaves_nothing_behind(tmp_path, monkeypatch):
    shards = plan_shards({"x": [("a", "U8", (1,))], "y": [("b", "U8", (1,))]})
    reserve = paft_merge.output.shards._reserve

    def full(fd: int, size: int) -> None:
        if os.path.exists(tmp_path / "x"):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(fd, size)

    monkeypatch.setattr(paft_merge.output.shards, "_reserve", full)
    code, text = fault_of(tmp_path, shards)
    assert code == "DISK"
    assert f"y: No space left on device: {shards[1].size:,} bytes needed, " in text
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_write_that_the_system_refuses_is_named(tmp_path, monkeypatch, code):
    shards, content = small(tmp_path)
    with ShardWriter(tmp_path, shards) as writer:

        def refuse(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "pwrite", refuse)
        monkeypatch.setattr(os, "fsync", refuse)
        for act in (lambda: writer.write("a", 0, content), writer.finish):
            with pytest.raises(OutputError, match=os.strerror(code)) as caught:
                act()
            assert caught.value.problems[0].code == ("OUTPUT" if code == errno.EIO else "DISK")


def run_in_small_world(folder: Path, script: str) -> str:
    """What a script prints in a process of its own, whose files may not grow past 64 KiB."""
    head = """
        import resource, sys
        from pathlib import Path
        from paft_merge.errors import OutputError
        from paft_merge.output.shards import ShardWriter, plan_shards
        folder = Path(sys.argv[1])
        limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    """
    code = textwrap.dedent(head) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_limit_on_file_sizes_is_met_when_the_file_is_made(tmp_path):
    said = run_in_small_world(
        tmp_path,
        """
        limit(65536)
        try:
            ShardWriter(folder, plan_shards({"x": [("a", "U8", (100_000,))]}))
        except OutputError as error:
            print(error.problems[0].code, error)
        """,
    )
    assert said.startswith("DISK ")
    assert "x: File too large: 100,104 bytes needed, " in said
    assert not os.listdir(tmp_path)


def test_a_limit_on_file_sizes_is_met_while_writing(tmp_path):
    said = run_in_small_world(
        tmp_path,
        """
        with ShardWriter(folder, plan_shards({"x": [("a", "U8", (100_000,))]})) as writer:
            limit(65536)
            writer.write("a", 0, bytes(1000))
            try:
                writer.write("a", 0, bytes(100_000))
            except OutputError as error:
                print(error.problems[0].code, error)
        """,
    )
    assert said.startswith("DISK ")
    assert "x: File too large" in said
