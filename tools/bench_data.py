"""A Llama-shaped base with two fine-tunes and two adapters of random weights, for benchmarks; half a minute for 1.1 B.

Everything is a function of (shape, SEED): the same numpy and torch give the same files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from make_layout import Llama
from make_tiny import byte_tokenizer
from safetensors.torch import save_file

SEED = 20240614
WEIGHT_STD = 0.02
"""Standard deviation of the base's matrices, as Llama initialises them."""
TUNED_RMS = {"sft": 1e-3, "dpo": 1e-3}
"""Root mean square of what each full fine-tune adds to the base."""
ADAPTER_RMS = {"sft_lora": 5e-4, "dpo_lora": 3e-4}
"""Root mean square of each adapter's update B A."""
RANK = 64
CHUNK = 4 << 20
"""Elements made at a time."""
SHARD_BYTES = 5_000_000_000

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


PRESETS = {
    "tiny": Llama(128, 352, 2, 4, 2, 512),
    "1.1b": Llama(2048, 5632, 22, 32, 4, 32000),
    "3b": Llama(3072, 8192, 28, 24, 8, 32000),
    "7b": Llama(4096, 11008, 32, 32, 32, 32000),
    "7b-layer": Llama(4096, 11008, 1, 32, 32, 32000),
    "8b-layer": Llama(4096, 14336, 1, 32, 8, 128256),
}
"""TinyLlama's shapes; Llama 3.2 3B's with a small vocabulary; Llama 2 7B's; Llama 2 7B and Llama 3 8B with one layer left."""


@dataclass(frozen=True)
class Piece:
    """`count` elements of a tensor from element `start` on, and where they lie in the checkpoint's `file`."""

    name: str
    file: str
    start: int
    count: int
    offset: int
    is_norm: bool


def headers(tensors: dict[str, tuple[int, ...]]) -> dict[str, bytes]:
    """The safetensors header of each file, its 8 bytes of length included."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    if len(shards) == 1:
        return {"model.safetensors": header(shards[0])}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": header(shard) for i, shard in enumerate(shards, 1)}


def header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """One file's header for bfloat16 tensors that follow each other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        end = at + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces(files: dict[str, bytes]) -> Iterator[Piece]:
    """Every piece of a checkpoint, in the order of its files."""
    for file, head in files.items():
        for name, entry in json.loads(head[8:]).items():
            if name == "__metadata__":
                continue
            numel = math.prod(entry["shape"])
            for start in range(0, numel, CHUNK):
                offset = len(head) + entry["data_offsets"][0] + 2 * start
                yield Piece(name, file, start, min(CHUNK, numel - start), offset, len(entry["shape"]) == 1)


def normals(*key: int | str, count: int, std: float) -> torch.Tensor:
    """float32 `[count]` of N(0, std^2), a function of `key` alone."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in key]
    values = np.random.Generator(np.random.SFC64([SEED, *words])).standard_normal(count, dtype=np.float32)
    return torch.from_numpy(values).mul_(std)


def write_piece(piece: Piece, folder: Path, tuned: Mapping[str, float]) -> None:
    """Write one piece of the base and of the fine-tunes."""
    base = normals("base", piece.name, piece.start, count=piece.count, std=WEIGHT_STD)
    if piece.is_norm:
        base += 1
    base = base.bfloat16()
    write_at(folder / "base" / piece.file, piece.offset, base)
    for source, rms in tuned.items():
        update = normals(source, piece.name, piece.start, count=piece.count, std=rms)
        write_at(folder / source / piece.file, piece.offset, (base + update).bfloat16())


def write_at(path: Path, offset: int, values: torch.Tensor) -> None:
    """Write bfloat16 `values` at `offset` of a file that exists."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, values.view(torch.int16).numpy().data, offset)
    finally:
        os.close(fd)


def write_checkpoints(shape: Llama, folder: Path, tuned: Mapping[str, float]) -> None:
    """Write the base and the fine-tunes under `folder`: weights, index, configs and tokenizer."""
    files = headers(shape.tensors())
    for name in ("base", *tuned):
        (folder / name).mkdir()
        for file, head in files.items():
            (folder / name / file).write_bytes(head)
        write_side_files(shape, files, folder / name)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(lambda piece: write_piece(piece, folder, tuned), pieces(files)):
            pass


def write_side_files(shape: Llama, files: dict[str, bytes], folder: Path) -> None:
    """What a checkpoint's folder holds besides weights."""
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "do_sample": True})
    )
    byte_tokenizer().save_pretrained(folder)
    if len(files) > 1:
        tensors = shape.tensors()
        names = ((name, file) for file, head in files.items() for name in json.loads(head[8:]) if name in tensors)
        index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": dict(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_adapter(shape: Llama, folder: Path, rms: float, rank: int = RANK) -> None:
    """Write a float32 adapter on every linear layer, as PEFT lays it out; its scale alpha / r is 1."""
    factors = {}
    for i in range(shape.layers):
        for linear, (out_features, in_features) in shape.linears().items():
            name = f"base_model.model.model.layers.{i}.{linear}"
            std_a = in_features**-0.5
            a_RI = normals(folder.name, name, "A", count=rank * in_features, std=std_a)
            b_OR = normals(folder.name, name, "B", count=out_features * rank, std=rms / (std_a * rank**0.5))
            factors[f"{name}.lora_A.weight"] = a_RI.reshape(rank, in_features)
            factors[f"{name}.lora_B.weight"] = b_OR.reshape(out_features, rank)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LINEARS),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def make(shape: Llama, folder: Path, tuned: Mapping[str, float] = TUNED_RMS) -> bool:
    """Make the data set in `folder` unless it is there already; say whether it had to be made.

    Args:
        shape: of all models.
        folder: to write.
        tuned: the fine-tunes, each with the root mean square of its update.

    `made.json` is written last, so a folder without it is an unfinished one and is made again.
    """
    made = folder / "made.json"
    spec = asdict(shape) | {"seed": SEED, "tuned": dict(tuned), "adapters": ADAPTER_RMS, "rank": RANK}
    if made.is_file() and json.loads(made.read_text()) == spec:
        return False
    for name in ("base", *TUNED_RMS, *ADAPTER_RMS):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    made.unlink(missing_ok=True)
    write_checkpoints(shape, folder, tuned)
    for name, rms in ADAPTER_RMS.items():
        write_adapter(shape, folder / name, rms)
    made.write_text(json.dumps(spec))
    return True
