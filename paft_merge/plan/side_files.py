"""The files beside the weights: what the output gets of the config source, and weights of the sources that nothing reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.models import Model
from paft_merge.inputs.safetensors_header import join_first, read_text
from paft_merge.inputs.side_file_kinds import MOST_BYTES, OtherFile, other_files, same_content

_SHOWN = ("side", "weights", "data", "same weights")
"""Kinds whose files are named in a warning if they are left out."""

_OF_QUANTIZATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files by which other programs take a model for a quantised one (ModelOpt, GPTQ, AWQ); not of a model with plain weights."""


@dataclass(frozen=True)
class SideFiles:
    """Files of the config source that are not read as tensors.

    Attributes:
        copied: by name.
        code: Python files, which are copied only on request.
        left_out: names of all other files.
    """

    copied: Mapping[str, Path] = field(default_factory=dict)
    code: Mapping[str, Path] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def read_side_files(
    models: Sequence[Model],
    config_source: Model,
    *,
    allow_unread: bool,
    plain: bool,
    problems: Problems,
    warnings: list[Problem],
) -> SideFiles:
    """Find the files to copy, and check that no source has trained weights in a file that is not read.

    Args:
        models: all models of the merge.
        config_source: the model whose files are copied.
        allow_unread: merge without the weights that are not read.
        plain: whether the output has plain weights.
        plain: whether the output has plain weights.
        problems: receives UNREAD_WEIGHTS.
        warnings: receives SIDE_FILES for files that are left out, and UNREAD_WEIGHTS with `allow_unread`.
    """
    donor, found, ours = config_source.checkpoint, SideFiles(), dict[str, OtherFile]()
    if donor.computed:
        found = getattr(donor, "plan").side_files  # noqa: B009  # the document that it is computed from
    elif donor.file is None:
        ours = _beside(donor)
        if plain and not ours.keys().isdisjoint(_OF_QUANTIZATION) and any(map(donor.stored_format, donor.tensors)):
            ours = {name: one for name, one in ours.items() if name not in _OF_QUANTIZATION}
        found = _copied(ours)
        warnings += _left_out(config_source.ref, [ours[name] for name in found.left_out])
    used = {part.folder.resolve() for model in models if model.adapter for part in model.adapter.parts}
    seen = {donor.folder.resolve()}
    for model in models:
        adapters = [part.file for part in model.adapter.parts] if model.adapter else []
        for checkpoint in (model.checkpoint, *adapters):
            folder, is_adapter = checkpoint.folder.resolve(), checkpoint is not model.checkpoint
            if checkpoint.computed or (checkpoint.file is not None and not is_adapter):
                continue
            theirs = _beside(checkpoint) if folder not in seen or checkpoint is donor else {}
            seen.add(folder)
            unread = [] if checkpoint is donor else _unread(theirs, ours, is_adapter)
            _note(model.ref, unread, _FIX, problems, warnings, allow_unread)
            if not is_adapter and checkpoint is not donor:
                warnings += _differing(model.ref, config_source.ref, theirs, ours)
            if not is_adapter and folder not in used:
                names = [name for name, one in theirs.items() if one.kind == "adapter" and "/" not in name]
                fix = f"write {model.ref}+{model.ref} to merge it too, or {_FIX}"
                _note(model.ref, names, fix, problems, warnings, allow_unread)
    return found


def _beside(checkpoint: Checkpoint) -> dict[str, OtherFile]:
    read = {file.name for file in checkpoint.files}
    folders = {name.rpartition("/")[0] for name in read if "/" in name}
    found = {n: one for n, one in other_files(checkpoint.folder, checkpoint.listing).items() if n not in read}
    for name, one in found.items():
        if one.folder in folders and one.kind == "weights":  # another form of the weights of a module
            found[name] = replace(one, kind="same weights")
    return found


def _copied(files: Mapping[str, OtherFile]) -> SideFiles:
    copied, code, left_out = dict[str, Path](), dict[str, Path](), []
    for name, one in files.items():
        if one.kind == "written":
            continue
        if one.path and one.kind in ("side", "weights") and one.size <= MOST_BYTES:
            copied[name] = one.path
        elif one.path and name.endswith(".py") and "/" not in name:
            code[name] = one.path
        else:
            left_out.append(name)
    return SideFiles(copied, code, tuple(left_out))


def _left_out(ref: str, files: Sequence[OtherFile]) -> list[Problem]:
    """A warning that names the files which the output lacks."""
    named = [one for one in files if one.kind in _SHOWN]
    again = _short(one for one in named if one.kind == "same weights")
    rest = _short(one for one in named if one.kind != "same weights")
    parts = [f"does not copy {join_first(rest)}"] if rest else []
    parts += [f"neither merges nor copies {join_first(again)}, other forms of its weights"] if again else []
    if not parts:
        return []
    fix = f"copy what you need; files of up to {MOST_BYTES:,} bytes are copied, but no data, links and pickled objects"
    return [
        Problem(
            "SIDE_FILES",
            ref,
            f"the merge {', and '.join(parts)}",
            fix if rest else "convert the output if you need them",
        )
    ]


def _short(files: Iterable[OtherFile]) -> list[str]:
    """Names of files; of a folder, the folder."""
    return list(dict.fromkeys(f"{one.name.split('/')[0]}/" if "/" in one.name else one.name for one in files))


_FIX = "move it out of the folder, or pass allow_crimes=True to merge without it"


def _unread(theirs: Mapping[str, OtherFile], ours: Mapping[str, OtherFile], is_adapter: bool) -> list[str]:
    """Names of a source's weights that are not read, unless the config source has the same.

    A folder with its own config is a further model, and concerns the merge only if the config source has it too.
    """
    models = {one.folder for name, one in theirs.items() if name.endswith(("/config.json", "/adapter_config.json"))}
    adapters = is_adapter and "config.json" not in theirs  # a merged model may be saved beside its adapter
    return [
        name
        for name, one in theirs.items()
        if (one.may_be_trained if adapters else one.kind == "weights")
        and not (name in ours and same_content(one, ours[name]))
        and (name in ours or one.folder not in models)
    ]


_COMPARED = (
    "modules.json", "*/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "*processor_config.json",
)  # fmt: skip
_VERSIONS = ("__version__", "transformers_version")


def _differing(ref: str, owner: str, theirs: Mapping[str, OtherFile], ours: Mapping[str, OtherFile]) -> list[Problem]:
    """A warning if a source pools or prepares its inputs otherwise than the config source does."""
    names = [name for name in theirs if name in ours and any(fnmatch(name, pattern) for pattern in _COMPARED)]
    different = [n for n in names if not same_content(theirs[n], ours[n]) and _json(theirs[n]) != _json(ours[n])]
    if not different:
        return []
    what = f"differs from {owner} in {join_first(different)}"
    return [Problem("SIDE_FILES", ref, what, f"the output gets that of {owner}; check that both mean the same")]


def _json(one: OtherFile) -> Any:
    """A JSON file without its versions; None if it cannot be read."""
    try:
        found = json.loads(read_text(one.path, "CONFIG_INVALID")) if one.path else None
    except (CheckpointError, ValueError, RecursionError):
        return None
    return {k: v for k, v in found.items() if k not in _VERSIONS} if isinstance(found, dict) else found


def _note(
    ref: str, names: Sequence[str], fix: str, problems: Problems, warnings: list[Problem], allow_unread: bool
) -> None:
    if not names:
        return
    what = f"has trained weights that are not read in {join_first(sorted(names))}"
    if allow_unread:
        warnings.append(Problem("UNREAD_WEIGHTS", ref, what, "the output is merged without them"))
    else:
        problems.add("UNREAD_WEIGHTS", ref, what, fix)
