"""Headers: what is accepted is what safetensors accepts or less, and every fault is named."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.dtypes import DTYPES

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file; a header that is not bytes is written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read_header(path: Path) -> tuple[dict[str, TensorInfo], Mapping[str, str]]:
    """The tensors and the metadata of one file."""
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.tensors, checkpoint.files[0].metadata


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def faults_of(path: Path) -> list[tuple[str, str]]:
    """Code and text of each problem; none when the file is accepted."""
    try:
        read_header(path)
    except CheckpointError as error:
        return [(problem.code, str(problem)) for problem in error.problems if problem.where == str(path)]
    return []


def theirs_accept(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_every_dtype_that_torch_saves_is_read_back_with_its_place(tmp_path):
    path = tmp_path / "all.safetensors"
    tensors = {
        name: torch.arange(6, dtype=torch.uint8).repeat(row.bits // 8).view(getattr(torch, row.torch))
        for name, row in DTYPES.items()
        if row.torch
    }
    save_file(tensors, path, metadata={"format": "pt", "who": "é"})

    infos, metadata = read_header(path)

    assert metadata == {"format": "pt", "who": "é"}
    assert {info.dtype for info in infos.values()} == {name for name, row in DTYPES.items() if row.torch}
    content = path.read_bytes()
    for name, info in infos.items():
        assert (info.name, info.dtype, info.shape, info.file) == (name, name, (6,), "all.safetensors")
        assert content[info.offset : info.offset + info.nbytes] == bytes(tensors[name].view(torch.uint8).tolist())


@pytest.mark.parametrize("row", DTYPES.values(), ids=lambda row: row.name)
def test_the_dtype_table_is_that_of_safetensors(tmp_path, row):
    content = raw({"a": {"dtype": row.name, "shape": [8], "data_offsets": [0, row.bits]}}, bytes(row.bits))

    assert theirs_accept(content)
    assert read_header(write(tmp_path, content))[0]["a"].nbytes == row.bits
    assert row.torch is None or getattr(torch, row.torch).itemsize * 8 == row.bits


def test_only_floating_point_types_of_values_are_mergeable():
    mergeable = {name for name, row in DTYPES.items() if row.mergeable}
    assert mergeable == {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def test_tensors_come_in_the_order_of_their_offsets_whatever_the_header_says(tmp_path):
    entry = {"dtype": "U8", "shape": [2]}
    header = {"b": {**entry, "data_offsets": [2, 4]}, "a": {**entry, "data_offsets": [0, 2]}}

    infos, _ = read_header(write(tmp_path, raw(header, b"1234")))

    assert list(infos) == ["a", "b"]


def test_scalars_and_empty_tensors_are_accepted_and_files_without_tensors_are_not(tmp_path):
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]},
        "last": {"dtype": "I64", "shape": [3, 0], "data_offsets": [4, 4]},
    }
    infos, _ = read_header(write(tmp_path, raw(header, b"1234")))
    assert [(info.numel, info.nbytes) for info in infos.values()] == [(0, 0), (1, 4), (0, 0)]
    for empty in (raw({}), raw(b'{"__metadata__":null}  \n ')):
        with pytest.raises(CheckpointError, match="holds no tensors"):
            read_header(write(tmp_path, empty))


def test_offsets_beyond_32_bits_are_exact(tmp_path):
    size = 5 * 2**31 + 3
    header = raw({"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    path = write(tmp_path, header)
    os.truncate(path, len(header) + size)  # sparse: takes no disk

    info = read_header(path)[0]["big"]

    assert info == TensorInfo("big", "U8", (size,), "model.safetensors", len(header), size)
    assert info.numel == size


@pytest.mark.parametrize("name", ["", "../../x", "/etc/passwd", "a" * 10_000, "nul\0", "\x1b[2J\nmodel: fine"])
def test_odd_names_are_opaque_keys_and_cannot_drive_a_terminal(tmp_path, name):
    assert read_header(write(tmp_path, raw({name: ONE}, bytes(8))))[0][name].name == name

    (_, text), *rest = faults_of(write(tmp_path, raw({name: {**ONE, "shape": [3]}}, bytes(8))))

    assert not rest
    assert text.isprintable()
    assert len(text) < 1000 + len(str(tmp_path))


# --- what is refused --------------------------------------------------------------------------------------------------

U8 = {"dtype": "U8", "shape": [4]}
OVERLAP = {"one": {**U8, "data_offsets": [0, 4]}, "two": {**U8, "data_offsets": [3, 7]}}
HOLE = {"one": {**U8, "data_offsets": [0, 4]}, "two": {**U8, "data_offsets": [5, 9]}}
SAME = {"one": {**U8, "data_offsets": [0, 4]}, "two": {**U8, "data_offsets": [0, 4]}}
INSIDE = {
    "one": {**U8, "data_offsets": [0, 4]},
    "two": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
    "three": {**U8, "data_offsets": [4, 8]},
}


def entry(**changes: Any) -> bytes:
    return raw({"w": {**ONE, **changes}}, bytes(8))


REFUSED = {
    # rows 1 and 5 of the fault matrix
    "empty": (b"", "SHARD_TRUNCATED", "is 0 bytes long"),
    "7 bytes": (b"1234567", "SHARD_TRUNCATED", "is 7 bytes long"),
    "cut data": (raw({"w": ONE}, bytes(7)), "SHARD_TRUNCATED", "holds 7 of 8 bytes of data; tensor 'w'"),
    # 2
    "header beyond file": (raw(b"{}", length=3), "SHARD_HEADER", "states a header of 3 bytes in a file of 10"),
    "header of 2^63": (
        raw(b"{}", length=2**63),
        "SHARD_HEADER",
        "9,223,372,036,854,775,808 bytes; at most 100,000,000",
    ),
    "header of 100 MB + 1": (raw(b"{}", length=10**8 + 1), "SHARD_HEADER", "100,000,001 bytes; at most"),
    "header of nothing": (raw(b"", b"{}"), "SHARD_HEADER", "not JSON at byte 0"),
    # 3
    "not UTF-8": (raw(b'{"\xff":1}'), "SHARD_HEADER", "not UTF-8 at byte 10"),
    "not JSON": (raw('{"é":1,}'.encode()), "SHARD_HEADER", "not JSON at byte 8"),
    "cut JSON": (raw(b'{"w":{"dtype":"F32"'), "SHARD_HEADER", "not JSON at byte 19"),
    "a list": (raw(b"[]"), "SHARD_HEADER", "does not begin with '{' (at byte 8)"),
    "leading space": (raw(b" {}"), "SHARD_HEADER", "does not begin with '{' (at byte 8)"),
    "text after it": (raw(b"{}x"), "SHARD_HEADER", "not JSON at byte 2"),
    "NUL after it": (raw(b"{}\0"), "SHARD_HEADER", "not JSON at byte 2"),
    # 4
    "deep lists": (raw(b'{"a":' + b"[" * 100_000), "SHARD_HEADER", "more brackets than tensors need"),
    "deep objects": (raw(b'{"abcdefghijklmnop":' * 100_000), "SHARD_HEADER", "nested too deep"),
    "many lists": (raw(b'{"a":[' + b"[]," * 1000 + b"[]]}"), "SHARD_HEADER", "more brackets than tensors need"),
    # 6 to 9
    "trailing bytes": (raw({"w": ONE}, bytes(9)), "SHARD_LAYOUT", "1 bytes follow the last tensor"),
    "bytes without tensors": (raw({}, bytes(9)), "SHARD_LAYOUT", "9 bytes follow the last tensor"),
    "overlap": (raw(OVERLAP, bytes(7)), "SHARD_LAYOUT", "tensors 'one' and 'two' share bytes from 3 on"),
    "hole": (raw(HOLE, bytes(9)), "SHARD_LAYOUT", "1 bytes between tensor 'one' and tensor 'two' are unused"),
    "hole at the front": (
        raw({"w": {**ONE, "data_offsets": [8, 16]}}, bytes(16)),
        "SHARD_LAYOUT",
        "8 bytes between the header and tensor 'w'",
    ),
    "same range": (raw(SAME, bytes(4)), "SHARD_LAYOUT", "tensors 'one' and 'two' share bytes from 0 on"),
    "one inside another": (raw(INSIDE, bytes(8)), "SHARD_LAYOUT", "tensors 'one' and 'two' share bytes from 1 on"),
    # 10
    "begin after end": (entry(data_offsets=[8, 0]), "SHARD_LAYOUT", "data_offsets [8, 0] are impossible"),
    "negative offset": (entry(data_offsets=[-8, 0]), "SHARD_LAYOUT", "data_offsets [-8, 0] are impossible"),
    "minus zero": (entry(data_offsets=[-0.0, 8]), "SHARD_LAYOUT", "data_offsets [-0.0, 8] are impossible"),
    "float offset": (entry(data_offsets=[0, 8.0]), "SHARD_LAYOUT", "data_offsets [0, 8.0] are impossible"),
    "true offset": (entry(data_offsets=[False, 8]), "SHARD_LAYOUT", "data_offsets [False, 8] are impossible"),
    "huge offset": (entry(data_offsets=[0, 2**64]), "SHARD_LAYOUT", "[0, 18446744073709551616] are impossible"),
    "endless number": (
        raw(b'{"w":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 5000), bytes(8)),
        "SHARD_LAYOUT",
        "shape [999999999999999999999999] is impossible",
    ),
    "offset of 2^63": (
        entry(data_offsets=[0, 2**63]),
        "SHARD_LAYOUT",
        "data_offsets span 9,223,372,036,854,775,808 bytes",
    ),
    "size of 2^63": (entry(shape=[2**63, 0], data_offsets=[0, 0]), "SHARD_LAYOUT", "is too large for any file"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "SHARD_LAYOUT", "data_offsets [0, 4, 8] are impossible"),
    "NaN size": (entry(shape=[float("nan")]), "SHARD_LAYOUT", "shape [NaN] is impossible"),
    "negative size": (entry(shape=[-2]), "SHARD_LAYOUT", "shape [-2] is impossible"),
    "true size": (entry(shape=[True, 2]), "SHARD_LAYOUT", "shape [True, 2] is impossible"),
    "text size": (entry(shape=["2"]), "SHARD_LAYOUT", "shape [2] is impossible"),
    "overflow": (entry(shape=[2**40, 2**40]), "SHARD_LAYOUT", "is too large for any file"),
    "overflow and zero": (
        entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]),
        "SHARD_LAYOUT",
        "too large for any file",
    ),
    "a million sizes": (
        entry(shape=[9] * 1_000_000),
        "SHARD_LAYOUT",
        "shape [9, 9, 9, 9, 9, 9, 9, 9, ...] is impossible",
    ),
    # 11
    "shape and bytes": (entry(shape=[3]), "SHARD_LAYOUT", "F32 [3] takes 12 bytes, its data_offsets span 8 bytes"),
    "half a byte": (
        raw({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)),
        "SHARD_LAYOUT",
        "12 bits",
    ),
    # 12
    "unknown dtype": (entry(dtype="F31"), "DTYPE_UNSUPPORTED", "tensor 'w': dtype 'F31' is not one of F64, F32"),
    # 14
    "same name twice": (
        raw(b'{"w":%b,"w":%b}' % ((json.dumps(ONE).encode(),) * 2), bytes(8)),
        "SHARD_HEADER",
        "name 'w' occurs more than once",
    ),
    "same key twice": (
        raw(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "SHARD_HEADER",
        "name 'dtype' occurs more than once",
    ),
    # entries of the wrong kind
    "entry is a list": (raw({"w": ["F32", [2], [0, 8]]}, bytes(8)), "SHARD_HEADER", "not {dtype, shape, data_offsets}"),
    "entry lacks shape": (raw({"w": {"dtype": "F32"}}), "SHARD_HEADER", "not {dtype, shape, data_offsets}"),
    "entry says more": (entry(strides=[1]), "SHARD_HEADER", "not {dtype, shape, data_offsets}"),
    "dtype is a map": (entry(dtype={"F32": None}), "SHARD_HEADER", "not {dtype: string, shape: list"),
    "shape is a number": (entry(shape=2), "SHARD_HEADER", "not {dtype: string, shape: list"),
    "half a surrogate pair": (
        raw(b'{"\\ud800":%b}' % json.dumps(ONE).encode(), bytes(8)),
        "SHARD_HEADER",
        "not Unicode",
    ),
    "metadata not texts": (raw({"__metadata__": {"a": 1}}), "SHARD_HEADER", "__metadata__ is not a map of strings"),
    "metadata a list": (raw({"__metadata__": []}), "SHARD_HEADER", "__metadata__ is not a map of strings"),
    # 16 and 17
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "LFS_POINTER",
        "run `git lfs pull`",
    ),
    "web page": (b"\n <!DOCTYPE html><html><body>404 Not Found</body></html>", "NOT_SAFETENSORS", "is a web page"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(40), "NOT_SAFETENSORS", "is gzip data"),
    "zip": (b"PK\x03\x04" + b"\x14" * 40, "NOT_SAFETENSORS", "is a zip archive, perhaps a PyTorch pickle"),
    "pickle": (b"\x80\x02" + b"}q\0." * 40, "NOT_SAFETENSORS", "is a Python pickle"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "NOT_SAFETENSORS", "is a GGUF model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_file_is_refused_by_name(tmp_path, case):
    content, code, text = REFUSED[case]

    (found, message), *more = faults_of(write(tmp_path, content))

    assert not more
    assert found == code
    assert text in message


@pytest.mark.parametrize("case", [case for case in REFUSED if not case.startswith("deep")])
def test_what_we_refuse_and_safetensors_does_not_is_known(case):
    ours_only = {
        *("leading space", "same name twice", "entry is a list", "entry says more", "dtype is a map"),
    }
    assert theirs_accept(REFUSED[case][0]) == (case in ours_only)


def test_all_faults_of_a_header_are_told_at_once(tmp_path):
    header = {"a": {**ONE, "dtype": "F31"}, "b": {**ONE, "shape": [3]}, "c": {**ONE, "data_offsets": [8, 0]}, "d": 1}
    assert [code for code, _ in faults_of(write(tmp_path, raw(header, bytes(8))))] == [
        "DTYPE_UNSUPPORTED",
        "SHARD_LAYOUT",
        "SHARD_LAYOUT",
        "SHARD_HEADER",
    ]


def test_thousands_of_faults_are_counted_and_not_all_printed(tmp_path):
    faults = faults_of(write(tmp_path, raw({f"t{i}": 0 for i in range(5000)})))
    assert len(faults) == 21
    assert "and 4,980 more faults" in faults[-1][1]


def test_deep_nesting_is_refused_quickly_and_in_little_memory(tmp_path):
    path = write(tmp_path, raw(b'{"abcdefghijklmnop":' * 100_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    assert faults_of(path)
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path):
    path = write(tmp_path, raw(b"{}", length=10**8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert faults_of(path)[0][0] == "SHARD_HEADER"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo.safetensors", tmp_path / "zero.safetensors"):
        assert faults_of(path) == [("SHARD_UNREADABLE", f"{path}: is not a regular file")]


def test_links_lead_to_files_or_to_clear_errors(tmp_path):
    real = write(tmp_path, raw({"w": ONE}, bytes(8)))
    for name, target in {"good": real, "dangling": "nowhere", "loop": "loop.safetensors"}.items():
        (tmp_path / f"{name}.safetensors").symlink_to(target)

    assert read_header(tmp_path / "good.safetensors")[0]["w"].file == "good.safetensors"
    assert faults_of(tmp_path / "dangling.safetensors")[0][0] == "SHARD_MISSING"
    assert "symlink to nowhere, which does not exist" in faults_of(tmp_path / "dangling.safetensors")[0][1]
    assert faults_of(tmp_path / "loop.safetensors")[0][0] == "SHARD_UNREADABLE"
    assert faults_of(tmp_path / "none.safetensors") == [
        ("SHARD_MISSING", f"{tmp_path / 'none.safetensors'}: no such file; download it again")
    ]


def test_a_refused_file_is_closed(tmp_path):
    path = write(tmp_path, raw({"w": ONE}, bytes(9)))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert faults_of(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_importing_it_does_not_import_torch():
    code = "import sys, paft_merge.inputs.checkpoint, paft_merge.output.shards; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- against safetensors ----------------------------------------------------------------------------------------------

NAMES = st.one_of(st.sampled_from(["a", "b", "", "__metadata__", "é", "\0", "dtype"]), st.text(max_size=4))
SIZES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([-1, -0.0, 1.0, True, None, "1", 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]),
)
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def sound_entries(draw: st.DrawFn) -> dict[str, Any]:
    """A header in which everything is right, in an order of its own."""
    header: dict[str, Any] = {}
    reached = 0
    for name in draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3)) + ([8] if DTYPES[dtype].bits % 8 else [])
        bits = DTYPES[dtype].bits
        for size in shape:
            bits *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [reached, reached := reached + bits // 8]}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    return dict(draw(st.permutations(list(header.items()))))


def total(header: dict[str, Any]) -> int:
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A file that began sound and had one to three things done to it."""
    header = draw(sound_entries())
    size = total(header)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.one_of(NAMES, st.sampled_from([*header, "a"])))
        kind = draw(st.sampled_from(["replace", "field", "size", "offset", "drop", "shift"]))
        inner = header.get(name)
        if kind == "drop":
            header.pop(name, None)
        elif kind == "replace" or not isinstance(inner, dict) or "shape" not in inner:
            header[name] = draw(ODD)
        elif kind == "field":
            inner[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(ODD)
        elif kind == "size" and isinstance(inner["shape"], list):
            inner["shape"] = [*inner["shape"], draw(SIZES)]
        elif isinstance(inner.get("data_offsets"), list) and inner["data_offsets"]:
            inner["data_offsets"][draw(st.integers(0, len(inner["data_offsets"]) - 1))] = draw(SIZES)
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        text = draw(altered(text))
    text += draw(st.sampled_from([b"", b"", b" ", b"\n\t", b"\0", b"}", b"//"]))
    content = raw(text, bytes(max(0, size + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 8])))))
    return draw(altered(content)) if draw(st.booleans()) else content


@st.composite
def altered(draw: st.DrawFn, content: bytes) -> bytes:
    """A few bytes replaced, put in or taken out."""
    piece = st.one_of(
        st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"e1", b".0", b" ", b"\\", b"\\ud800"]),
        st.sampled_from(
            [b"\\u0000", b"NaN", b"Infinity", b"null", b"true", b"\x00", b"\x1f", b"\xff", b"\xef\xbb\xbf"]
        ),
        st.binary(max_size=2),
    )
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(piece) + content[at + draw(st.integers(0, 2)) :]
    return content


def check_against_safetensors(path: Path, content: bytes) -> bool:
    """If we accept the file, safetensors must, and see the same in it. Returns whether we did."""
    path.write_bytes(content)
    try:
        infos, metadata = read_header(path)
    except CheckpointError:
        return False
    theirs = dict(safetensors.deserialize(content))
    assert infos.keys() == theirs.keys()
    for name, info in infos.items():
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert content[info.offset : info.offset + info.nbytes] == theirs[name]["data"]
    with safetensors.safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata
    return True


@settings(max_examples=150, deadline=None, database=None)
@given(sound_entries().filter(lambda header: header.keys() - {"__metadata__"}))
def test_every_sound_header_is_accepted_and_read_as_safetensors_reads_it(tmp_path_factory, header):
    content = raw(json.dumps(header, ensure_ascii=False).encode(), os.urandom(total(header)))
    assert check_against_safetensors(tmp_path_factory.getbasetemp() / "sound.safetensors", content)


@settings(max_examples=400, deadline=None, database=None)
@given(broken_files())
@example(raw(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'))
@example(raw(b'{"__metadata__":{"a":"\\ud800"}}'))
@example(raw(b'{"__metadata__":{"\\udc00":"a"}}'))
def test_whatever_we_accept_safetensors_accepts_and_sees_the_same(tmp_path_factory, content):
    check_against_safetensors(tmp_path_factory.getbasetemp() / "broken.safetensors", content)


def test_flipped_bits_in_every_byte_of_a_header_and_every_cut_agree_with_safetensors(tmp_path):
    path = tmp_path / "three.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(1, 2).bfloat16(), "c": torch.ones(3, dtype=torch.uint8)}, path)
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    accepted = 0
    for at in range(header_bytes):
        for bit in (at % 8, (at + 5) % 8):
            flipped = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
            accepted += check_against_safetensors(path, flipped)
    for end in range(len(whole)):
        assert not check_against_safetensors(path, whole[:end])
    assert 0 < accepted < header_bytes  # a letter of a name may change; hardly anything else
