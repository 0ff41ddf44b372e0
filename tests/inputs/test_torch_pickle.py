"""Pickled checkpoints: refused unless asked for, and then read without running anything."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from toys.merge import python

from paft_merge.errors import CheckpointError
from paft_merge.inputs import torch_pickle
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
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


@pytest.mark.parametrize("name", [BIN, f"{BIN}.index.json", "optimizer.pt", "model.ckpt"])
def test_pickles_are_refused_and_not_loaded(tmp_path, name):
    torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / name)
    code, text = refused(tmp_path)
    assert code == "PICKLE_REFUSED"
    assert f"holds only pickles ('{name}')" in text
    assert "convert it to safetensors" in text
    assert ("lazy_unpickle=True" in text) == name.startswith(BIN)
    assert not (tmp_path / "ran").exists()


def test_other_pickles_are_refused_even_where_pickles_are_allowed(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "optimizer.pt")
    assert refused(tmp_path, unpickle=True)[0] == "PICKLE_REFUSED"


@pytest.mark.parametrize("unpickle", [False, True])
def test_a_pickled_adapter_in_place_of_a_model_is_named_as_one(tmp_path, unpickle):
    torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    code, text = refused(tmp_path, unpickle=unpickle)
    assert code == "CHECKPOINT_MISSING"
    assert "holds an adapter and no checkpoint" in text
    assert not (tmp_path / "ran").exists()


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
    assert Stored("w", DTYPES["F32"], shape, stride, 0, 0).contiguous == contiguous


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


# --- what torch.load(weights_only=True) reads, and what it does not --------------------------------------------------------


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.tag = {"layer": 1, "names": ["a", ("b", None)], "kind": torch.float16, "more": torch.zeros(2)}
    return tensor


def parameter_with_attribute(tensor: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(tensor.clone(), requires_grad=False)
    parameter.output_dim = 0
    return parameter


def module_state() -> collections.OrderedDict[str, torch.Tensor]:
    """A state dict with `_metadata`, views of one storage, and tied weights."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    module[2].weight = torch.nn.Parameter(torch.randn(4, 8)[:, ::2])
    return module.state_dict(keep_vars=True)


READ = {
    "attributes": lambda: {name: with_attribute(t) for name, t in state().items()},
    "parameters": lambda: {name: torch.nn.Parameter(t, requires_grad=False) for name, t in state().items()},
    "trained parameters": lambda: {"w": torch.nn.Parameter(torch.randn(3, 2))},
    "parameters with attributes": lambda: {name: parameter_with_attribute(t) for name, t in state().items()},
    "buffers": lambda: {"w": torch.nn.Buffer(torch.randn(3, 2)), "v": torch.nn.Buffer(torch.randn(3, 2), persistent=False)},
    "a module": module_state,
    "hooks": lambda: {"w": torch.randn(3, requires_grad=True)},
    "float8 and unsigned": lambda: {
        **{str(t): torch.arange(12).reshape(3, 4).to(torch.float32).to(t).t() for t in (torch.float8_e4m3fn, torch.float8_e5m2)},
        **{str(t): torch.arange(12).to(t) for t in (torch.uint16, torch.uint32, torch.uint64, torch.complex64)},
    },
    "parts of one storage": lambda: dict(zip("abcd", torch.randn(8, 5).chunk(4), strict=True)),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", READ)
def test_what_torch_reads_safely_is_read(tmp_path, kind, legacy):
    if legacy and kind == "float8 and unsigned":
        pytest.skip("torch cannot read what it saved")
    torch.save(READ[kind](), tmp_path / BIN, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(tmp_path / BIN, weights_only=True)
    with Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            got = checkpoint.tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            same = got.contiguous().view(-1).view(torch.uint8), tensor.detach().contiguous().view(-1).view(torch.uint8)
            assert same[0].equal(same[1])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_newer_protocols_are_read(tmp_path, protocol):
    torch.save(state(), tmp_path / BIN, pickle_protocol=protocol)
    with Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
        assert all(checkpoint.tensor(name).equal(tensor) for name, tensor in state().items())


UNUSABLE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    "on the meta device": lambda: torch.zeros(3, device="meta"),
    "negated": lambda: torch._neg_view(torch.randn(3)),
    "conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "complex128": lambda: torch.randn(3, dtype=torch.complex128),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values_are_refused_by_name(tmp_path, kind):
    torch.save({"fine": torch.zeros(1), "odd": UNUSABLE[kind]()}, tmp_path / BIN)
    code, text = refused(tmp_path, unpickle=True)
    assert code == "PICKLE_REFUSED"
    assert "tensor 'odd' is" in text
    assert "which no merge reads; save it as a plain tensor" in text


@pytest.mark.parametrize("content", [{"w": 1}, {"w": None}, {"state_dict": {"w": 1}}, [1], {3: torch.zeros(1)}])
def test_what_is_not_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / BIN)
    assert refused(tmp_path, unpickle=True)[0] == "PICKLE_UNREADABLE"


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_the_model_in_what_a_trainer_saved_is_read(tmp_path, key):
    weights, state = {"w": torch.randn(2, 3)}, {"exp_avg": torch.zeros(6)}
    saved = {
        "epoch": 3,
        "lr": 1e-4,
        "version": "2.5",
        key: weights,
        "optimizer": {"state": {0: state}, "groups": [{"lr": 1}]},
    }
    torch.save(saved, tmp_path / "last.ckpt")
    with Checkpoint.open(tmp_path / "last.ckpt", unpickle=True) as opened:
        assert list(opened.tensors) == ["w"]
        assert torch.equal(opened.tensor("w"), weights["w"])


def test_one_of_several_models_in_a_file_is_not_chosen(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}, "module": {"w": torch.ones(1)}}, tmp_path / BIN)
    assert "'model' is a dict, not a tensor" in refused(tmp_path, unpickle=True)[1]


# --- hostile files --------------------------------------------------------------------------------------------------------

NAME = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOSTILE = {
    "a function": b"cos\nsystem\n(X\x01\0\0\0xtR.",
    "eval": b"cbuiltins\neval\n(X\x01\0\0\0xtR.",
    "getattr": b"cbuiltins\ngetattr\n(ctorch\nTensor\nX\x04\0\0\0savetR.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0bstorage.sys\x93.",
    "torch.load": b"ctorch\nload\n(X\x01\0\0\0xtR.",
    "bytes of a storage": b"ctorch.storage\n_load_from_bytes\n(X\x01\0\0\0xtR.",
    "attributes of a function": NAME + b"}X\x0c\0\0\0__defaults__)sb.",
    "state of a function": NAME + b"(}}X\x0c\0\0\0__defaults__)stb.",
    "attributes of a class": b"ctorch\nSize\n}X\x01\0\0\0xK\x01sb.",
    "an instance": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a huge bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\x0f\0\0.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\x0f\0\0.",
    "a huge memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a key with an endless hash": b"\x80\x02})" + b"q\x00h\x00h\x00\x86" * 60 + b"K\x01s.",
    "a persistent name": b"Pfile\n.",
    "a deep rebuild": b"ctorch._tensor\n_rebuild_from_type_v2\n" * 5000 + b".",
    "a storage that is not one": b"X\x04\0\0\0evilQ.",
    "a tensor of no storage": NAME + b"(K\x01K\x01)tR.",
    "a class called": b"ctorch\nFloatStorage\n(K\x01tR.",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_at_once(tmp_path, kind):
    torch.save({"w": torch.zeros(1)}, tmp_path / BIN)
    rewritten(tmp_path / BIN, {"data.pkl": HOSTILE[kind]})
    start = time.perf_counter()
    code, text = refused(tmp_path, unpickle=True)
    assert code in ("PICKLE_REFUSED", "PICKLE_UNREADABLE")
    assert len(text) < 600
    assert time.perf_counter() - start < 2
    assert torch_pickle._tensor.__defaults__ is None


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_give_one_problem_or_the_same_tensors(tmp_path, legacy):
    torch.save(state(), tmp_path / "whole", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "whole").read_bytes()
    first = whole.index(b"ctorch")
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(first, first + 1500)] = random.integers(256)
        if random.integers(4) == 0:
            del damaged[random.integers(len(damaged)) :]
        (tmp_path / BIN).write_bytes(damaged)
        with contextlib.suppress(CheckpointError), Checkpoint.open(tmp_path, unpickle=True) as checkpoint:
            assert all(info.nbytes < 1 << 20 or info.numel for info in checkpoint.tensors.values())


def test_reading_a_pickle_imports_neither_torch_nor_mergekit(tmp_path):
    torch.save(state(), tmp_path / BIN)
    code = f"""
import sys
from pathlib import Path
from paft_merge.inputs.checkpoint import Checkpoint
with Checkpoint.open(Path({str(tmp_path)!r}), unpickle=True) as checkpoint:
    for name, info in checkpoint.tensors.items():
        checkpoint.read_into(name, 0, bytearray(info.nbytes))
print(sorted({{"torch", "mergekit"}} & sys.modules.keys()))
"""
    assert python(code).stdout.strip() == "[]"
