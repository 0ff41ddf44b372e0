"""Checkpoints: which files a folder means, reading them from many threads, and every fault told at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paft_merge.inputs.safetensors_header
from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.weight_files import UNFINISHED

INDEX = "model.safetensors.index.json"


def tensors_of(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(7, 4, generator=random),
        "norm": torch.randn(4, generator=random).bfloat16(),
        "head": torch.randn(3, 5, generator=random).to(torch.float8_e4m3fn),
        "steps": torch.tensor(17),
        "empty": torch.zeros(0, 3),
    }


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of two shards with an index, and a config."""
    folder.mkdir(exist_ok=True)
    tensors = tensors_of()
    parts = {
        "model-00001-of-00002.safetensors": ["norm", "embed"],
        "model-00002-of-00002.safetensors": ["head", "steps", "empty"],
    }
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    write_index(folder, {name: file for file, names in parts.items() for name in names})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return tensors


def write_index(folder: Path, weight_map: object, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def edit_index(folder: Path, **changes: str | None) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"] | changes
    write_index(folder, {name: file for name, file in weight_map.items() if file is not None})


def single(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = tensors_of()
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return tensors


def faults_of(folder: Path, **options: bool) -> list[tuple[str, str]]:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, **options)
    return [(problem.code, str(problem)) for problem in caught.value.problems]


def only_fault_of(folder: Path, **options: bool) -> tuple[str, str]:
    (fault,) = faults_of(folder, **options)
    return fault


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [single, sharded])
def test_tensors_are_read_whole_in_their_own_dtype(tmp_path, make):
    expected = make(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            got = checkpoint.tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert got.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_tensors_are_ordered_by_file_and_then_by_offset(tmp_path):
    sharded(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        places = [(info.file, info.offset) for info in checkpoint.tensors.values()]
        assert places == sorted(places)
        assert list(checkpoint.tensors) == ["embed", "norm", "steps", "empty", "head"]
        assert [file.name for file in checkpoint.files] == sorted({file for file, _ in places})
        assert all(file.metadata == {"format": "pt"} for file in checkpoint.files)
        assert checkpoint.config == {"model_type": "llama"}


def test_any_range_of_bytes_is_read_into_any_buffer(tmp_path):
    expected = single(tmp_path)["embed"].numpy().tobytes()
    with Checkpoint.open(tmp_path) as checkpoint:
        for start, stop in [(0, 112), (5, 9), (111, 112), (112, 112), (0, 0)]:
            for buffer in (bytearray(stop - start), np.zeros(stop - start, np.uint8)):
                checkpoint.read_into("embed", start, buffer)
                assert bytes(buffer) == expected[start:stop]
        floats = np.zeros((2, 4), np.float32)
        checkpoint.read_into("embed", 16, floats)
        assert floats.tobytes() == expected[16:48]


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (112, 1), (0, 113), (200, 0)])
def test_a_range_outside_the_tensor_is_a_bug_of_the_caller(tmp_path, start, count):
    single(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(ValueError, match="'embed', which has 112"):
        checkpoint.read_into("embed", start, bytearray(count))


def test_a_tensor_beyond_two_to_the_31_elements_is_read_at_its_far_end(tmp_path):
    size = 2**32 + 5
    header = json.dumps({"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)  # sparse: takes no disk
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"end")
    with Checkpoint.open(tmp_path) as checkpoint:
        buffer = bytearray(4)
        checkpoint.read_into("big", size - 4, buffer)
        assert buffer == b"\0end"


def test_many_threads_read_the_same_as_one(tmp_path):
    tensors = {f"t{i}": torch.randint(0, 255, (50_000 + i,), dtype=torch.uint8) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    wrong: list[str] = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(200):
            name = f"t{random.integers(4)}"
            start, count = int(random.integers(40_000)), int(random.integers(1, 9_000))
            buffer = np.empty(count, np.uint8)
            checkpoint.read_into(name, start, buffer)
            if buffer.tobytes() != tensors[name][start : start + count].numpy().tobytes():
                wrong.append(name)

    with Checkpoint.open(tmp_path) as checkpoint:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_reads_that_the_system_cuts_short_go_on(tmp_path, monkeypatch):
    expected = single(tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:3]], at))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensor("embed").equal(expected["embed"])


def test_a_dtype_that_torch_lacks_is_refused_when_read_whole_but_its_bytes_can_be_copied(tmp_path):
    header = json.dumps({"six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with Checkpoint.open(tmp_path) as checkpoint:
        buffer = bytearray(3)
        checkpoint.read_into("six", 0, buffer)
        assert buffer == b"abc"
        with pytest.raises(CheckpointError, match="tensor 'six' is F6_E2M3, for which this torch has no dtype"):
            checkpoint.tensor("six")


def test_files_are_closed_at_the_end_and_after_a_fault(tmp_path):
    sharded(tmp_path / "good")
    sharded(tmp_path / "bad")
    edit_index(tmp_path / "bad", more="model-00001-of-00002.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    with Checkpoint.open(tmp_path / "good") as checkpoint:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    checkpoint.close()
    assert only_fault_of(tmp_path / "bad")[0] == "INDEX_MISMATCH"
    (tmp_path / "bad" / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert "SHARD_TRUNCATED" in dict(faults_of(tmp_path / "bad"))
    assert len(os.listdir("/proc/self/fd")) == before


# --- inputs that change -----------------------------------------------------------------------------------------------


def test_the_fingerprint_tells_files_apart_by_size_time_and_header(tmp_path):
    sharded(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with Checkpoint.open(tmp_path / "a") as a, Checkpoint.open(tmp_path / "b") as b:
        assert a.fingerprint() == b.fingerprint()
        assert json.loads(json.dumps(a.fingerprint())) == a.fingerprint()
    first = tmp_path / "b" / "model-00001-of-00002.safetensors"
    seen = first.stat()
    content = first.read_bytes()
    first.write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"'))
    os.utime(first, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    with Checkpoint.open(tmp_path / "b") as b:
        new, old = b.fingerprint()[first.name], a.fingerprint()[first.name]
        assert new["header"] != old["header"]
        assert (new["size"], new["mtime_ns"]) == (old["size"], old["mtime_ns"])


def test_a_file_that_changes_while_open_is_told(tmp_path):
    sharded(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.check_unchanged()
        os.utime(first, ns=(0, 1))
        second.unlink()
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check_unchanged()
    assert [(p.code, p.where) for p in caught.value.problems] == [
        ("INPUT_CHANGED", str(first)),
        ("INPUT_CHANGED", str(second)),
    ]


def test_a_file_that_grows_is_told_even_where_its_time_stands_still(tmp_path):
    single(tmp_path)
    path = tmp_path / "model.safetensors"
    seen = path.stat()
    with Checkpoint.open(tmp_path) as checkpoint:
        with path.open("ab") as file:
            file.write(b"more")
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        with pytest.raises(
            CheckpointError, match=f"was {seen.st_size} bytes when opened and is {seen.st_size + 4} now"
        ):
            checkpoint.check_unchanged()


def test_a_file_replaced_while_open_is_told_and_still_read_as_it_was(tmp_path):
    expected = single(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        save_file({"other": torch.zeros(3)}, tmp_path / "model.safetensors")  # a new file under the old name
        assert checkpoint.tensor("embed").equal(expected["embed"])
        with pytest.raises(CheckpointError, match="bytes when opened and is 84 now"):
            checkpoint.check_unchanged()


def test_a_file_cut_while_open_is_an_error_and_not_a_crash(tmp_path):
    single(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", checkpoint.tensors["embed"].offset + 10)
        with pytest.raises(CheckpointError, match="and was longer when it was opened") as caught:
            checkpoint.tensor("embed")
    assert caught.value.problems[0].code == "INPUT_CHANGED"


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    single(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read at byte .*: Input/output error"):
            checkpoint.tensor("embed")
    assert only_fault_of(tmp_path)[0] == "SHARD_UNREADABLE"
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        Checkpoint.open(tmp_path / "model.safetensors")


# --- which files a folder means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "weights.safetensors"])
def test_one_file_of_any_name_is_found_beside_consolidated_ones_and_adapters(tmp_path, name):
    expected = single(tmp_path, name)
    for other in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "adapter_model.safetensors"):
        save_file({"other": torch.zeros(1)}, tmp_path / other)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        assert [file.name for file in checkpoint.files] == [name]


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "weights"])
def test_an_index_of_another_name_is_found(tmp_path, stem):
    sharded(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / f"{stem}.safetensors.index.json")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 2


def test_a_model_is_preferred_to_other_safetensors_files(tmp_path):
    single(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "vision.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert [file.name for file in checkpoint.files] == ["model.safetensors"]


def test_an_adapter_or_any_one_file_is_opened_by_its_path(tmp_path):
    tensors = single(tmp_path, "adapter_model.safetensors")
    with Checkpoint.open(tmp_path / "adapter_model.safetensors") as checkpoint:
        assert checkpoint.folder == tmp_path
        assert checkpoint.tensor("embed").equal(tensors["embed"])
        assert checkpoint.files[0].metadata == {"format": "pt"}
        assert isinstance(checkpoint.tensors["embed"], TensorInfo)


def test_a_folder_given_as_text_is_opened(tmp_path):
    single(tmp_path)
    with Checkpoint.open(str(tmp_path)) as checkpoint:  # type: ignore[arg-type]
        assert checkpoint.folder == tmp_path


def test_an_index_of_the_single_file_beside_it_is_no_contradiction(tmp_path):
    expected = single(tmp_path)
    write_index(tmp_path, dict.fromkeys(expected, "model.safetensors"))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
    write_index(tmp_path, {"embed": "model.safetensors"})
    assert {code for code, _ in faults_of(tmp_path)} == {"INDEX_MISMATCH"}


def test_an_index_of_other_files_beside_a_single_file_is_refused(tmp_path):
    sharded(tmp_path)
    single(tmp_path)
    code, text = only_fault_of(tmp_path)
    assert code == "CHECKPOINT_AMBIGUOUS"
    assert "holds both model.safetensors and an index of other files" in text


def test_files_without_their_index_are_refused(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    code, text = only_fault_of(tmp_path)
    assert code == "INDEX_MISSING"
    assert "'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'" in text
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert only_fault_of(tmp_path)[0] == "INDEX_MISSING"


def test_the_only_part_of_one_is_a_checkpoint(tmp_path):
    expected = single(tmp_path, "model-00001-of-00001.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([], "holds no safetensors file; check the path"),
        (["README.md"], "holds no safetensors file"),
        (["adapter_model.safetensors"], "holds an adapter and no checkpoint; write BASE+"),
        (["consolidated.safetensors"], "holds only consolidated.safetensors, not in Hugging Face's format"),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_it_has(tmp_path, files, text):
    for file in files:
        save_file({"x": torch.zeros(1)}, tmp_path / file)
    code, message = only_fault_of(tmp_path)
    assert code == "CHECKPOINT_MISSING"
    assert text in message


def test_an_adapter_of_a_trainer_is_named_after_its_base_though_a_pickle_is_beside_it(tmp_path):
    for folder in (tmp_path, tmp_path / "checkpoint-250", tmp_path / "checkpoint-500"):
        folder.mkdir(exist_ok=True)
        save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
        (folder / "training_args.bin").write_bytes(b"PK")
    what = "holds an adapter and no checkpoint"
    assert only_fault_of(tmp_path) == ("CHECKPOINT_MISSING", f"{tmp_path}: {what}; write me/base+{tmp_path}")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
    last = tmp_path / "checkpoint-500"
    fix = f"write me/base+{last} (or an earlier one: checkpoint-250)"
    what = "holds no checkpoint, only adapters in folders below it"
    assert only_fault_of(tmp_path) == ("CHECKPOINT_MISSING", f"{tmp_path}: {what}; {fix}")


def test_a_folder_that_is_none_is_named(tmp_path):
    assert only_fault_of(tmp_path / "none") == (
        "CHECKPOINT_MISSING",
        f"{tmp_path / 'none'}: cannot be opened: No such file or directory",
    )
    (tmp_path / "file").write_text("")
    assert "is not a file of tensors that is read here" in only_fault_of(tmp_path / "file")[1]


def test_the_output_of_an_unfinished_merge_is_refused(tmp_path):
    single(tmp_path / "out.part")
    single(tmp_path / "renamed")
    (tmp_path / "renamed" / UNFINISHED).write_text("{}")
    for folder in ("out.part", "renamed"):
        code, text = only_fault_of(tmp_path / folder)
        assert code == "CHECKPOINT_UNFINISHED"
        assert "is the output of a merge that did not finish; finish it with resume=True" in text


# --- the index --------------------------------------------------------------------------------------------------------


OUTSIDE = [
    *("../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "sub/..\\x", "\\\\host\\share", "C:x"),
    *("nul\0", ".", "..", "", " .", "a\nb", "x" * 256, "é" * 128),
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_index_that_points_out_of_its_folder_is_refused_before_anything_is_opened(tmp_path, path, monkeypatch):
    sharded(tmp_path / "model")
    save_file({"embed": torch.zeros(7, 4)}, tmp_path / "secret.safetensors")
    edit_index(tmp_path / "model", embed=path)
    opened = []
    monkeypatch.setattr(paft_merge.inputs.checkpoint, "scan", lambda fd, file: opened.append(file))
    code, text = only_fault_of(tmp_path / "model")
    assert code == "INDEX_PATH"
    assert "which is not a plain file name" in text
    assert text.isprintable()
    assert not opened


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "not JSON at byte 1"),
        (b'{"weight_map": "\xff"}', "is not UTF-8 at byte 16"),
        (b"[]", "has no weight_map of tensor names to files"),
        (b"{}", "has no weight_map of tensor names to files"),
        (b'{"weight_map": {}}', "has no weight_map of tensor names to files"),
        (b'{"weight_map": ["a"]}', "has no weight_map of tensor names to files"),
        (b'{"weight_map": {"a": 1}}', "the file of tensor 'a' is not a string"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "key 'a' occurs more than once"),
        (b"[" * 100_000, "it has more brackets than tensors need"),
        (b"<html></html>", "is a web page, not the file itself"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, content, text):
    (tmp_path / INDEX).write_bytes(content)
    code, message = only_fault_of(tmp_path)
    assert code == "INDEX_INVALID"
    assert text in message


def test_a_huge_index_is_refused_unread(tmp_path):
    (tmp_path / INDEX).write_bytes(b"{")
    os.truncate(tmp_path / INDEX, 200_000_000)
    assert only_fault_of(tmp_path) == (
        "INDEX_INVALID",
        f"{tmp_path / INDEX}: is 200,000,000 bytes long; at most 100,000,000 are read",
    )


def test_all_missing_shards_are_listed(tmp_path):
    sharded(tmp_path)
    edit_index(tmp_path, one="lost-1.safetensors", two="lost-2.safetensors")
    faults = faults_of(tmp_path)
    assert [code for code, _ in faults] == ["SHARD_MISSING"] * 2
    assert all(f"lost-{i}.safetensors: no such file" in text for i, (_, text) in enumerate(faults, 1))


def test_index_and_shards_must_agree_on_every_tensor(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    sharded(tmp_path)
    edit_index(tmp_path, phantom=first, norm=None, head=first)
    assert faults_of(tmp_path) == [
        ("INDEX_MISMATCH", f"{tmp_path / first}: tensor 'head' is missing, though the index lists it; {second} has it"),
        (
            "INDEX_MISMATCH",
            f"{tmp_path / first}: tensor 'phantom' is missing, though the index lists it; no file has it",
        ),
        ("INDEX_MISMATCH", f"{tmp_path / first}: tensor 'norm' is not in the index"),
    ]


def test_a_tensor_in_two_shards_is_refused_with_both_places(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    sharded(tmp_path)
    save_file(load_file(tmp_path / first) | {"head": torch.zeros(1)}, tmp_path / first)
    assert faults_of(tmp_path) == [("INDEX_MISMATCH", f"{tmp_path / first}: tensor 'head' is in {second} too")]


def test_thousands_of_mismatches_are_counted_and_not_all_printed(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors"} | {f"t{i}": "x.safetensors" for i in range(3000)})
    faults = faults_of(tmp_path)
    assert len(faults) == 21
    assert "and 2,980 more faults" in faults[-1][1]


def test_faults_of_every_file_and_of_the_config_are_told_at_once(tmp_path):
    sharded(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes() + b"more")
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "config.json").write_text("[]")
    edit_index(tmp_path, lost="lost.safetensors")
    codes = [code for code, _ in faults_of(tmp_path)]
    assert codes == ["SHARD_MISSING", "SHARD_LAYOUT", "LFS_POINTER", "CONFIG_INVALID"]


# --- links, pipes, configs --------------------------------------------------------------------------------------------


def test_a_folder_of_symlinks_as_the_hub_caches_it_is_opened(tmp_path):
    expected = sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate((tmp_path / "blobs").iterdir()):
        blob = path.rename(path.with_name(f"blob{number}"))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{blob.name}")
    with Checkpoint.open(tmp_path / "snapshot") as checkpoint:
        assert checkpoint.tensor("embed").equal(expected["embed"])
        checkpoint.check_unchanged()


def test_dangling_links_loops_and_pipes_are_refused_without_waiting(tmp_path):
    sharded(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    edit_index(tmp_path, a="dangling", b="loop", c="folder", d="pipe")
    codes = {Path(text.split(": ")[0]).name: code for code, text in faults_of(tmp_path)}
    assert codes == {
        "dangling": "SHARD_MISSING",
        "loop": "SHARD_UNREADABLE",
        "folder": "SHARD_UNREADABLE",
        "pipe": "SHARD_UNREADABLE",
    }


def test_a_dangling_model_is_missing_and_not_overlooked(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    assert only_fault_of(tmp_path)[0] == "SHARD_MISSING"


def test_a_folder_without_a_config_has_an_empty_one(tmp_path):
    single(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == {}


def test_a_config_may_hold_infinity_as_transformers_writes_it(tmp_path):
    single(tmp_path)
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        ("{", "CONFIG_INVALID", "is not JSON"),
        ("[]", "CONFIG_INVALID", "is not a JSON object"),
        ("[" * 100_000, "CONFIG_INVALID", "is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "LFS_POINTER", "run `git lfs pull`"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, content, code, text):
    single(tmp_path)
    (tmp_path / "config.json").write_text(content)
    found, message = only_fault_of(tmp_path)
    assert found == code
    assert text in message


def test_code_that_a_config_names_is_not_run(tmp_path):
    single(tmp_path)
    (tmp_path / "modeling_evil.py").write_text("open('ran', 'w')")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_evil.Evil"}}')
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config["auto_map"] == {"AutoModel": "modeling_evil.Evil"}
    assert not (tmp_path / "ran").exists()
    assert "modeling_evil" not in __import__("sys").modules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.Q4_K_M.gguf", "only 'model.Q4_K_M.gguf' of llama.cpp (GGUF); give the model that it was made from"),
        ("__0_0.distcp", "a distributed checkpoint of PyTorch; run `accelerate merge-weights`"),
        ("global_step10/mp_rank_00_model_states.pt", "'global_step10' of DeepSpeed; run its zero_to_fp32.py"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "'pytorch_model_fsdp_0' of FSDP"),
        ("flax_model.msgpack", "'flax_model.msgpack' of another framework"),
    ],
)
def test_checkpoints_of_other_programs_are_named(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "m" / name).parent.mkdir(parents=True)
    (tmp_path / "m" / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path / "m")
    assert expected in str(caught.value)
