"""Pickled checkpoints: refused unless asked for, and then read without running anything."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.torch_pickle import Stored

BIN = "pytorch_model.bin"


def state() -> dict[str, torch.Tensor]:
    """Tensors of every layout that a state dict may hold."""
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    return {
        "rows": base[2:4],
        "plain": base,
        "tied": base,
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "half": base.half(),
        "long": torch.arange(7),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "empty rows": torch.zeros(3, 0),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "sliced": torch.arange(100)[10:50:3],
        "expanded": torch.full((1,), 7.0).expand(4, 5),
        "single row": torch.arange(20.0).reshape(4, 5).t()[:1],
    }


def refused(folder: Path, **options: bool) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, **options)
    (problem,) = caught.value.problems
    return problem.code, str(problem)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", [BIN, f"{BIN}.index.json", "adapter_model.bin", "optimizer.pt", "model.ckpt"])
def test_pickles_are_refused_and_not_loaded(tmp_path, name):
    torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / name)
    code, text = refused(tmp_path)
    assert code == "PICKLE_REFUSED"
    assert f"holds only pickles ('{name}')" in text
    assert "convert it to safetensors" in text
    assert ("lazy_unpickle=True" in text) == name.startswith(BIN)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt"])
def test_other_pickles_are_refused_even_where_pickles_are_allowed(tmp_path, name):
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    assert refused(tmp_path, unpickle=True)[0] == "PICKLE_REFUSED"


def test_safetensors_are_preferred_to_pickles(tmp_path):
    from safetensors.torch import save_file

    torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / BIN)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
        assert checkpoint.tensor("w").item() == 1
    assert not (tmp_path / "ran").exists()


def test_a_safetensors_index_cannot_lead_to_a_pickle(tmp_path):
    torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / BIN)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": BIN}}))
    assert refused(tmp_path, unpickle=True)[0] == "NOT_SAFETENSORS"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_every_layout_is_read_as_torch_reads_it(tmp_path, kind):
    expected = state()
    torch.save(kind(expected), tmp_path / BIN)
    with Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            got = checkpoint.tensor(name)
            assert (got.dtype, got.is_contiguous()) == (tensor.dtype, True)
            assert got.equal(tensor)
            assert checkpoint.tensors[name].nbytes == tensor.numel() * tensor.element_size()
        offsets = [info.offset for info in checkpoint.tensors.values()]
        assert offsets == sorted(offsets)
        assert checkpoint.fingerprint()[BIN]["size"] == (tmp_path / BIN).stat().st_size


def test_shards_of_pickles_are_read_by_their_index(tmp_path):
    expected = state()
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    weight_map = {name: files["a" if name < "e" else "b"] for name in expected}
    for file in files.values():
        torch.save({name: expected[name] for name in expected if weight_map[name] == file}, tmp_path / file)
    (tmp_path / f"{BIN}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
        assert {name: info.file for name, info in checkpoint.tensors.items()} == weight_map
        assert all(checkpoint.tensor(name).equal(tensor) for name, tensor in expected.items())


def test_ranges_are_read_by_many_threads_from_tensors_that_need_packing(tmp_path):
    tensors = {f"t{i}": torch.randn(40, 30, generator=torch.Generator().manual_seed(i)).t() for i in range(3)}
    torch.save(tensors, tmp_path / BIN)
    packed = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    wrong: list[str] = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(50):
            name, start = f"t{random.integers(3)}", int(random.integers(4000))
            buffer = bytearray(500)
            checkpoint.read_into(name, start, buffer)
            if buffer != packed[name][start : start + 500]:
                wrong.append(name)

    with Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_not_run(tmp_path):
    torch.save({"w": torch.zeros(1), "evil": Evil(tmp_path / "ran")}, tmp_path / BIN)
    code, text = refused(tmp_path, unpickle=True)
    assert code == "PICKLE_REFUSED"
    assert "its pickle needs more than tensors" in text
    assert "mkdir" in text
    assert not (tmp_path / "ran").exists()


def test_reading_a_pickle_leaves_pythons_own_pickle_as_it_was(tmp_path):
    before = pickle.Unpickler, pickle.load, torch._utils._rebuild_tensor
    torch.save({"w": torch.zeros(1)}, tmp_path / BIN)
    Checkpoint.open(tmp_path, unpickle=True).close()
    torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / BIN)
    refused(tmp_path, unpickle=True)
    assert before == (pickle.Unpickler, pickle.load, torch._utils._rebuild_tensor)


@pytest.mark.parametrize(
    ("shape", "stride", "contiguous"),
    [
        *(((), (), True), ((3,), (1,), True), ((2, 3), (3, 1), True), ((1, 3), (99, 1), True), ((3, 1), (1, 7), True)),
        *(((3,), (2,), False), ((2, 3), (1, 2), False), ((4, 5), (0, 0), False), ((2, 3), (6, 1), False)),
    ],
)
def test_only_gaps_and_other_orders_need_packing(shape, stride, contiguous):
    assert Stored("w", torch.float32, shape, stride, 0, 0).contiguous == contiguous


def test_the_state_is_the_pickle_at_the_root_of_the_archive(tmp_path):
    torch.save({"w": torch.arange(3.0)}, tmp_path / BIN)
    content = io.BytesIO()
    with zipfile.ZipFile(tmp_path / BIN) as old, zipfile.ZipFile(content, "w") as new:
        new.writestr("pytorch_model/extra/data.pkl", pickle.dumps({}))
        for member in old.namelist():
            new.writestr(member, old.read(member))
    (tmp_path / BIN).write_bytes(content.getvalue())
    with Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
        assert checkpoint.tensor("w").tolist() == [0, 1, 2]


def rewritten(path: Path, change: dict[str, bytes | None], compress: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with some members changed (None: left out)."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", compress) as new:
        for member in old.namelist():
            data = change.get(member.split("/", 1)[1], old.read(member))
            if data is not None:
                new.writestr(member, data)
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data.pkl": None}, "no data.pkl inside"),
        ({"data/0": None}, "There is no item named"),
        ({"data/0": b"short"}, "'w' reaches beyond its storage"),
        ({"byteorder": b"big"}, "written on a big-endian machine"),
        ({"data.pkl": pickle.dumps([1, 2])}, "not a map of names to tensors"),
        ({"data.pkl": pickle.dumps(["w"])}, "not a map of names to tensors"),
        ({"data.pkl": pickle.dumps({1: 2})}, "not a map of names to tensors"),
        ({"data.pkl": pickle.dumps({"w": {"nested": 1}})}, "'w' is a dict, not a tensor"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, change, text):
    torch.save({"w": torch.arange(9.0)}, tmp_path / BIN)
    rewritten(tmp_path / BIN, change)
    code, message = refused(tmp_path, unpickle=True)
    assert code == "PICKLE_UNREADABLE"
    assert text in message or "KeyError" in message or "data/0" in message


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / BIN)
    rewritten(tmp_path / BIN, {}, zipfile.ZIP_DEFLATED)
    assert "is compressed, or longer than" in refused(tmp_path, unpickle=True)[1]


@pytest.mark.parametrize("content", [b"", b"not a zip", pickle.dumps({"w": 1})])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / BIN).write_bytes(content)
    code, text = refused(tmp_path, unpickle=True)
    assert code == "PICKLE_UNREADABLE"
    assert "load it with a current PyTorch where you trust it" in text


def test_a_damaged_pickle_is_one_fault(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / BIN)
    rewritten(tmp_path / BIN, {"data.pkl": b"\x80\x02}q\0(X\x01\0\0\0w"})
    assert refused(tmp_path, unpickle=True)[0] == "PICKLE_REFUSED"
