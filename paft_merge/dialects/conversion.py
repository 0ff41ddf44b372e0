"""Converts an adapter from one dialect to another, without a change of any value where that is possible."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paft_merge.dialects import experts, kohya_form, mlx_form, peft_form
from paft_merge.dialects.held import KOHYA, MLX, PEFT, Held, is_copy, open_held, unfit
from paft_merge.dialects.matrices import Matrix
from paft_merge.dialects.modules import Lora, refuse
from paft_merge.dialects.writing import write
from paft_merge.errors import AdapterError, Problem
from paft_merge.inputs.adapter_places import CONFIG
from paft_merge.inputs.checkpoint import Checkpoint

Target = Literal["vllm", "peft", "mlx", "kohya"]

_START = "save it again with PEFT's path_initial_model_for_weight_conversion"


@dataclass(frozen=True)
class _Written:
    """The files of an adapter: its tensors, `adapter_config.json` if it has one, and the metadata of its tensors."""

    file: str
    tensors: Mapping[str, Matrix]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    notes: tuple[Problem, ...]


def convert(
    adapter: Path,
    out: Path,
    to: Target,
    base: Checkpoint | None = None,
    *,
    overwrite: bool = False,
    lazy_unpickle: bool = False,
) -> list[Problem]:
    """Write an adapter in another dialect.

    Args:
        adapter: a folder of PEFT or mlx-lm, or a file of kohya's scripts.
        out: the folder to write.
        to: `vllm` for what vLLM, SGLang, llama.cpp and PEFT all read; `peft`, `mlx`, `kohya`.
        base: its base, open; needed to split or join fused experts, and for the names of kohya's files.
        overwrite: replace an adapter in `out`.
        lazy_unpickle: read `adapter_model.bin` where there is no safetensors file, without running its code.

    Returns:
        What was changed or left out, apart from names and layout.

    Raises:
        AdapterError: it is not an adapter, it does not fit the base, or a part of it has no place in the dialect.
        CheckpointError: a file of it cannot be read.
        OutputError: `out` cannot be written.
    """
    with open_held(adapter, unpickle=lazy_unpickle) as held:
        if base is not None and (wrong := unfit(held, base, lazy_unpickle)):
            raise AdapterError(wrong)
        made = _converted(held, to, base)
        others = {CONFIG: json.dumps(made.config, indent=2).encode()} if made.config is not None else {}
        inputs = [adapter, *([base.folder] if base is not None else [])]
        write(out, made.file, made.tensors, others, inputs=inputs, metadata=made.metadata, overwrite=overwrite)
    return [*made.notes, *_left_out(adapter)]


def _converted(held: Held, to: Target, base: Checkpoint | None) -> _Written:
    lora = _read(held, base)
    if not lora.modules:
        raise AdapterError.of("ADAPTER_CONFIG", held.place, "holds no factors", "check how it was saved")
    if held.dialect == PEFT and to != "peft":
        if held.faults:
            raise AdapterError(held.faults)
        start = held.settings.decomposition if held.settings else ""
        what = "was trained against a base from which its start was subtracted"
        refuse(held.place, filter(None, [start]), what, _START)
        blocks = ["use_bdlora"] if held.config.get("use_bdlora") else []
        refuse(held.place, blocks, "has factors in blocks (BD-LoRA)", "use it with PEFT")
        lora = _without_copies(lora, held, base)
    lora = experts.split(lora, held, base if to != "peft" else None)
    if to == "peft":
        return _to_peft(lora, held, base)
    config = peft_form.original_of(held.file.files[0].metadata) or dict(lora.config)
    kept = {peft_form.ORIGINAL: json.dumps(config)} if config else {}
    if to == "vllm":
        lora = peft_form.portable(lora, held.place)
        made = peft_form.config_of(lora, keep=False)
        return _Written(peft_form.FILE, peft_form.tensors_of(lora), made, {"format": "pt", **kept}, lora.notes)
    if to == "mlx":
        lora, tensors, made = mlx_form.written(lora, held.place)
        return _Written(mlx_form.FILE, tensors, made, {"format": "mlx", **kept}, lora.notes)
    lora, tensors, metadata = kohya_form.written(lora, held.place)
    return _Written(kohya_form.FILE, tensors, None, {**metadata, **kept}, lora.notes)


def _read(held: Held, base: Checkpoint | None) -> Lora:
    if held.dialect == KOHYA:
        return kohya_form.read(held, base.tensors if base is not None else ())
    return mlx_form.read(held) if held.dialect == MLX else peft_form.read(held)


def _to_peft(lora: Lora, held: Held, base: Checkpoint | None) -> _Written:
    """PEFT's own form, with the configuration that the adapter had before, where it still fits."""
    fused = experts.fuse(lora, base) if base is not None else lora
    keep = held.dialect == PEFT and fused is lora
    original = peft_form.original_of(held.file.files[0].metadata)
    if original:
        back = peft_form.restored(fused, original)
        if back is not None:
            fused, keep = back, True
        else:
            fused = fused.noting("the configuration that it had before does not fit its factors, so a new one was made")
    config = peft_form.config_of(fused, keep=keep)
    return _Written(peft_form.FILE, peft_form.tensors_of(fused), config, {"format": "pt"}, fused.notes)


def _without_copies(lora: Lora, held: Held, base: Checkpoint | None) -> Lora:
    """Leave out the base's embeddings that PEFT saved beside their factors.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED, they differ from those of the base.
    """
    copies = {one.key.removeprefix("base_model.model."): one for one in held.keys.saved if one.is_base_layer}
    changed = [name for name, one in copies.items() if base is not None and not is_copy(held, one, base, sampled=False)]
    what = "has stored embeddings that are not those of the base"
    refuse(held.place, changed, what, "merge it into a checkpoint with paft merge")
    whole = {name: matrix for name, matrix in lora.whole.items() if name not in copies}
    if len(whole) == len(lora.whole):
        return lora
    made, count = replace(lora, whole=whole), len(lora.whole) - len(whole)
    doubt = "" if base is not None else "; give --base BASE to check that they are those of the base"
    return made.noting(f"{count} stored weights of the base were left out{doubt}")


_OURS = (CONFIG, "README.md", "adapter_model.bin", "lock")


def _left_out(adapter: Path) -> list[Problem]:
    """A note of other files in the adapter's folder, such as a tokenizer."""
    if not adapter.is_dir():
        return []
    names = sorted(path.name for path in adapter.iterdir() if path.is_file() and path.suffix != ".safetensors")
    others = [name for name in names if name not in _OURS]
    what = f"other files were not copied: {', '.join(others[:3])}{', ...' if others[3:] else ''}"
    return [Problem("CONVERTED", str(adapter), what)] if others else []
