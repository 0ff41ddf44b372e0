"""The files that hold the weights of a model's folder: which of them are read, and what is said of a folder without any."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from paft_merge.errors import CheckpointError, Problem
from paft_merge.inputs.adapter_places import CONFIG, MLX_FILE, PEFT_FILES, base_of, hint
from paft_merge.inputs.safetensors_header import join_first, quote, read_text, strict_json, truncate

UNFINISHED = "merge_state.json"
"""The journal of an unfinished merge. A folder that holds one, or is called `*.part`, is not opened: its files have
their full size from the start and would look complete."""

INSIDE, PLACING = ".paft.part", "placing.json"
"""The work folder of a merge into a mount point, and its list of files while they are moved up: until then the folder is
not opened either."""

_STEMS = ("model", "diffusion_pytorch_model")
_INDEX = ".index.json"
_MODULES = "modules.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of pickles."""
LAZY = "lazy_unpickle=True"
"""The option that reads pickles."""
_OTHER_FORMATS = (
    (r"\.gguf$", "llama.cpp (GGUF)", "give the model that it was made from"),
    (
        r"\.distcp$",
        "a distributed checkpoint of PyTorch",
        "run `accelerate merge-weights` on it, then merge the result",
    ),
    (
        r"^(global_step\d+|zero_to_fp32\.py)$",
        "DeepSpeed",
        "run its zero_to_fp32.py with --safe_serialization, then merge the result",
    ),
    (r"^pytorch_model_fsdp_\d+$", "FSDP", "run `accelerate merge-weights` on it, then merge the result"),
    (r"\.(msgpack|h5|onnx|tflite|nemo|mlpackage)$", "another framework", "convert it with the program that wrote it"),
)
"""A pattern of files or folders, what wrote them, and what to do."""


def locate(path: Path, unpickle: bool, far: Sequence[str] = ()) -> tuple[Path, list[str], dict[str, str] | None, bool]:
    """The folder, its files sorted by name, the index's weight_map if there is an index, and whether they are pickles."""
    if path.suffix == ".safetensors" and not path.is_dir():
        return path.parent, [path.name], None, False
    if path.suffix in PICKLES and path.is_file():
        if not unpickle:
            fix = f"convert it to safetensors, or read it, without running its code, with {LAZY}"
            raise CheckpointError.of("PICKLE_REFUSED", path, "is a pickle, which can run code when it is loaded", fix)
        return path.parent, [path.name], None, True
    if path.is_file():
        fix = "give the folder of the model, or a .safetensors file"
        raise CheckpointError.of("CHECKPOINT_MISSING", path, "is not a file of tensors that is read here", fix)
    try:
        present = sorted({*os.listdir(path), *far})
    except OSError as error:
        raise CheckpointError.of("CHECKPOINT_MISSING", path, f"cannot be opened: {error.strerror}") from None
    if UNFINISHED in present or is_unfinished(path):
        what = "is the output of a merge that did not finish"
        raise CheckpointError.of("CHECKPOINT_UNFINISHED", path, what, "finish it with resume=True")
    chosen = _choose(path, present, unpickle)
    pickled = chosen.startswith("pytorch_model.bin")
    if not chosen.endswith(_INDEX):
        return path, [chosen], None, pickled
    weight_map = _read_index(path / chosen)
    return path, sorted(set(weight_map.values())), weight_map, pickled


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is the output of a merge that did not finish."""
    return folder.name.endswith(".part") or any(
        (folder / name).exists() for name in (UNFINISHED, f"{INSIDE}/{PLACING}")
    )


def _choose(folder: Path, present: Sequence[str], unpickle: bool) -> str:
    """The file that defines the checkpoint: a safetensors file or an index; see `Checkpoint.open`."""
    for stem in _STEMS:
        both = [name for name in (f"{stem}.safetensors", f"{stem}.safetensors{_INDEX}") if name in present]
        if len(both) == 2 and set(_read_index(folder / both[1]).values()) != {both[0]}:
            what = f"holds both {both[0]} and an index of other files"
            raise CheckpointError.of("CHECKPOINT_AMBIGUOUS", folder, what, "remove the wrong one")
        if both:
            return both[-1]
    ours = [name for name in present if not name.startswith(("consolidated", "adapter_model", "."))]
    if CONFIG in present:  # also not those of mlx-lm
        ours = [name for name in ours if not name.endswith(MLX_FILE)]
    indices = [name for name in ours if name.endswith(f".safetensors{_INDEX}")]
    files = indices or [name for name in ours if name.endswith(".safetensors")]
    if len(files) == 1 and not _is_part_of_many(files[0]):
        return files[0]
    if files:
        what = f"holds {join_first(files)}, and no index of them"
        raise CheckpointError.of("INDEX_MISSING", folder, what, f"download model.safetensors{_INDEX} too")
    return _choose_pickle(folder, present, unpickle)


def module_files(folder: Path, far: Iterable[str] = ()) -> list[str]:
    """The weights of the modules that sentence-transformers adds to a model (`modules.json`), as names with `/`.

    Args:
        folder: the model.
        far: names of files that are not in the folder.
    """
    try:
        entries = json.loads(read_text(folder / _MODULES, "CONFIG_INVALID")) if (folder / _MODULES).is_file() else []
        places = [entry["path"] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError.of("CONFIG_INVALID", folder / _MODULES, "is not a list of modules") from None
    found: list[str] = []
    for place in dict.fromkeys(p for p in places if isinstance(p, str) and p and all(map(_is_plain, p.split("/")))):
        below = (file.relative_to(folder).as_posix() for file in (folder / place).rglob("*") if file.is_file())
        names = sorted({*below, *(name for name in far if name.startswith(f"{place}/"))})
        held = [name for name in names if name.endswith(".safetensors")]
        found += held or [name for name in names if name.endswith("pytorch_model.bin")]
    return found


def _is_part_of_many(name: str) -> bool:
    part = re.search(r"-(\d+)-of-(\d+)\.safetensors$", name)
    return part is not None and int(part[2]) != 1


def _choose_pickle(folder: Path, present: Sequence[str], unpickle: bool) -> str:
    pickles = [name for name in present if name.endswith((*PICKLES, f".bin{_INDEX}"))]
    known = [name for name in (f"pytorch_model.bin{_INDEX}", "pytorch_model.bin") if name in pickles]
    if not known and {CONFIG, *PEFT_FILES}.intersection(present):
        held = any(name in present for name in (*PEFT_FILES, MLX_FILE))
        fix = f"write {base_of(folder)}+{folder}" if held else hint(folder, base_of(folder))
        what = "holds an adapter and no checkpoint" if held else "holds the settings of an adapter and no checkpoint"
        raise CheckpointError.of("CHECKPOINT_MISSING", folder, what, fix or "name the folder of the whole model")
    if known and unpickle:
        return known[0]
    if not known and (below := hint(folder, base_of(folder))):
        what = "holds no checkpoint, only adapters in folders below it"
        raise CheckpointError.of("CHECKPOINT_MISSING", folder, what, below)
    if pickles:
        fix = f"convert it to safetensors, or read it, without running its code, with {LAZY}"
        what = f"holds only pickles ({join_first(pickles)}), which can run code when they are loaded"
        raise CheckpointError.of("PICKLE_REFUSED", folder, what, fix if known else "convert it to safetensors")
    if consolidated := [name for name in present if name.startswith("consolidated")]:
        what, fix = f"holds only {consolidated[0]}, not in Hugging Face's format", "convert it to model.safetensors"
    elif other := next((one for one in _OTHER_FORMATS if any(re.search(one[0], name) for name in present)), None):
        names = join_first([name for name in present if re.search(other[0], name)])
        what, fix = f"holds no safetensors file, only {names} of {other[1]}", other[2]
    else:
        what, fix = "holds no safetensors file", "check the path"
    raise CheckpointError.of("CHECKPOINT_MISSING", folder, what, fix)


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name to the plain name of a file beside the index."""
    try:
        document, twice = strict_json(read_text(path, "INDEX_INVALID"))
    except ValueError as error:
        raise CheckpointError.of("INDEX_INVALID", path, str(error), "download it again") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError.of("INDEX_INVALID", path, "has no weight_map of tensor names to files")
    faults = [Problem("INDEX_INVALID", str(path), f"key {quote(key)} occurs more than once") for key in twice]
    for name, file in weight_map.items():
        if type(file) is not str:
            faults.append(Problem("INDEX_INVALID", str(path), f"the file of tensor {quote(name)} is not a string"))
    for file in sorted({file for file in weight_map.values() if type(file) is str and not _is_plain(file)}):
        faults.append(Problem("INDEX_PATH", str(path), f"names {quote(file)}, which is not a plain file name"))
    if faults:
        raise CheckpointError(truncate(faults, path))
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether a file name cannot lead out of its folder on any system; `links` checks where links lead."""
    return (
        name.isprintable() and name.strip(" .") != "" and not re.search(r"[/\\:]", name) and len(name.encode()) <= 255
    )
