"""The files of a model's or adapter's folder besides the tensors that are read: what each is, and which may be copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from paft_merge.inputs.links import may_be_read

Kind = Literal["side", "weights", "same weights", "adapter", "training", "code", "picture", "data", "written", "hidden"]
"""What a file is:

side           config, tokenizer, processor, voices, licence: whatever no other kind describes
weights        trained values, in a file that is not known to repeat the model's weights
same weights   the model's weights in another format or precision
adapter        the weights of an adapter
training       states and logs of a training
code           Python, scripts, notebooks, pickled objects
picture        pictures, films, documents
data           rows of data
written        every merge writes a new one
hidden         names that begin with a dot
"""

MOST_BYTES = 2**30
"""Size up to which a file is copied."""
DEPTH = 4
"""Folders in folders that are looked at."""
_MOST_FILES = 10_000

_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "code": ("py", "pyc", "so", "sh", "ipynb", "pkl", "pickle", "joblib", "dll", "exe", "bat"),
    "picture": ("png", "jpg", "jpeg", "gif", "svg", "webp", "mp4", "pdf", "drawio", "pptx", "html"),
    "data": ("jsonl", "parquet", "arrow", "log"),
    "weights": (
        "safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "onnx_data", "ot", "nemo",
        "mlmodel", "tflite", "pdparams", "engine", "distcp", "keras", "pb",
    ),
}  # fmt: skip
_TRAINING = (
    "optimizer*", "scheduler.*", "rng_state*", "random_states_*", "scaler.pt", "training_args*", "trainer_state.json",
    "all_results.json", "*_results.json", "trainer_log.jsonl", "events.out.tfevents*", "*_states.pt", "latest",
    "zero_to_fp32.py", "paft_train.json", "pytorch_model_fsdp*", "requirements*.txt", "*.index.json",
)  # fmt: skip
_TRAINING_FOLDERS = ("checkpoint-*", "global_step*", "runs", "wandb", "logs", "__pycache__", "*_fsdp_*", "tensorboard")
_FORMATS = (
    "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.mlmodel", "*.tflite", "rust_model.ot", "tf_model*", "flax_model*",
    "openvino_model*", "*.fp16.*", "*.bf16.*",
)  # fmt: skip
_MODEL = ("model*", "diffusion_pytorch_model*", "pytorch_model*", "consolidated*")
_SAME_FOLDERS = ("onnx", "openvino", "original", "coreml", "gguf", "ggml", "mlx", "tensorrt", "*.mlpackage")
_ADAPTER = ("adapter_model*", "*adapters.safetensors")
_WRITTEN = ("config.json", "adapter_config.json", "README.md", "merge_manifest.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class OtherFile:
    """A file that is not read as tensors.

    Attributes:
        name: its path in the folder, with `/`.
        kind: see `Kind`.
        size: in bytes.
        path: the file; None if it is only on the Hub, if it is not a regular file, or a link that leaves the folder and
            the Hub's cache.
    """

    name: str
    kind: Kind
    size: int
    path: Path | None

    @property
    def may_be_trained(self) -> bool:
        """Whether it may hold trained values, if it is in the folder of an adapter."""
        return self.kind == "weights" or (self.kind == "same weights" and _matches(self.name, _MODEL))

    @property
    def folder(self) -> str:
        """The folder that it is in, with `/`; empty at the top."""
        return self.name.rpartition("/")[0]


def kind_of(name: str) -> Kind:
    """What a file is, by its path in the folder."""
    *folders, last = name.split("/")
    suffix = last.rpartition(".")[2].lower()
    if any(part.startswith(".") for part in (*folders, last)):
        return "hidden"
    if not folders and last in _WRITTEN:
        return "written"
    if _matches(last, _TRAINING) or any(_matches(folder, _TRAINING_FOLDERS) for folder in folders):
        return "training"
    if any(_matches(folder, _SAME_FOLDERS) for folder in folders):
        return "same weights"
    if suffix in _SUFFIXES["weights"]:
        if _matches(last, _ADAPTER):
            return "adapter"
        # In a folder, `model.safetensors` is the usual name of any weights.
        return "same weights" if _matches(last, _FORMATS if folders else (*_FORMATS, *_MODEL)) else "weights"
    return next((kind for kind in ("code", "picture", "data") if suffix in _SUFFIXES[kind]), "side")


def other_files(folder: Path, listing: Mapping[str, int] | None = None) -> dict[str, OtherFile]:
    """Every file of a folder and its folders by name, but not hidden ones.

    Args:
        folder: of a model or an adapter.
        listing: sizes of the files of a Hub repository by name; those that are not in the folder have no path.
    """
    found = {name: OtherFile(name, kind_of(name), size, None) for name, size in (listing or {}).items()}
    for at, folders, files in os.walk(folder):
        inside = Path(at).relative_to(folder).as_posix()
        depth = 0 if inside == "." else inside.count("/") + 1
        prefix = "" if inside == "." else f"{inside}/"
        links = [one for one in folders if os.path.islink(Path(at, one))]
        folders[:] = sorted(one for one in folders if not one.startswith(".") and one not in links and depth < DEPTH)
        for one in (*sorted(files), *links):
            name, path = f"{prefix}{one}", Path(at, one)
            held = path if may_be_read(path, folder) else None
            found[name] = OtherFile(name, kind_of(name), held.stat().st_size if held else 0, held)
        if len(found) > _MOST_FILES:
            break
    return {name: one for name, one in found.items() if one.kind != "hidden" and name.count("/") <= DEPTH}


def same_content(one: OtherFile, other: OtherFile) -> bool:
    """Whether two files have the same bytes; of files that are only on the Hub the sizes are compared."""
    if one.size != other.size or one.path is None or other.path is None:
        return one.size == other.size
    with one.path.open("rb") as ours, other.path.open("rb") as theirs:
        while block := ours.read(1 << 20):
            if block != theirs.read(len(block)):
                return False
    return True


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
