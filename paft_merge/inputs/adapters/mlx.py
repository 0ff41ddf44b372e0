"""Adapters of mlx-lm: `adapters.safetensors` with lora_a `[in, r]` and lora_b `[r, out]`, W' = W + scale (lora_a lora_b)^T.

They are read as LoRA of PEFT: both factors transposed, alpha = scale * rank, and `m` of DoRA as the magnitudes. An
adapter of `fine_tune_type: full` holds whole weights, which replace those of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.errors import Problems
from paft_merge.inputs.adapter_places import MLX_FILE
from paft_merge.inputs.adapters.binding import Binding, PeftType
from paft_merge.inputs.adapters.config import Settings, check_positive
from paft_merge.inputs.adapters.keys import Keys, Module, Saved, TensorNames
from paft_merge.inputs.adapters.lora import bind_embedding, bind_layer
from paft_merge.inputs.adapters.lora_factors import Factors
from paft_merge.inputs.adapters.rows import Array, Rows

NAME = "MLX"
"""The `peft_type` that settings of these adapters have."""

_PART = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_PARTS = {"lora_a": "A", "lora_b": "B", "m": "magnitude_vector"}
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|\w*embeddings?)$")


def is_embedding(path: str) -> bool:
    """Whether a module of an adapter is an embedding, by its name: the shapes of its factors do not show it."""
    return bool(_EMBEDDING.search(path))


def is_mlx(raw: Mapping[str, Any], folder: Path) -> bool:
    """Whether a folder with this `adapter_config.json` was written by mlx-lm."""
    return "peft_type" not in raw and (
        "lora_parameters" in raw or "fine_tune_type" in raw or (folder / MLX_FILE).exists()
    )


def settings_of(path: Path, raw: Mapping[str, Any], problems: Problems) -> Settings:
    """The settings in the terms of PEFT; faults are noted in `problems`."""
    kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") else "lora")
    numbers = raw.get("lora_parameters")
    if kind not in ("lora", "dora", "full"):
        problems.add("ADAPTER_UNSUPPORTED", path, f"fine_tune_type: {kind!r} is not lora, dora or full of mlx-lm")
    if kind != "full" and not isinstance(numbers, dict):
        what = "is beside adapters.safetensors, an adapter of MLX, and has no lora_parameters with its rank and scale"
        problems.add(
            "ADAPTER_UNSUPPORTED", path, what, "fuse it with the program that trained it, and merge the result"
        )
        numbers = None
    numbers = numbers if isinstance(numbers, dict) else {}
    rank, scale = numbers.get("rank"), numbers.get("scale")
    if numbers and kind != "full":
        check_positive(path, "lora_parameters.rank", rank, problems)
        if not isinstance(scale, int | float) or not np.isfinite(scale) or not scale:
            problems.add("ADAPTER_CONFIG", path, f"lora_parameters.scale: must be a number other than 0, got {scale!r}")
        for field in sorted(numbers.keys() - {"rank", "scale", "dropout", "keys"}):
            what = f"lora_parameters.{field}: versions of mlx-lm differ in what it means"
            fix = "write the factor of the product into scale, and remove it"
            problems.add("ADAPTER_UNSUPPORTED", path, what, fix)
    alpha = scale * rank if isinstance(scale, int | float) and isinstance(rank, int) else 1.0
    return Settings({
        "peft_type": NAME, "r": rank or 1, "lora_alpha": alpha, "use_dora": kind == "dora",
        "base_model_name_or_path": raw.get("model"),
    })  # fmt: skip


def sort_mlx(keys: Iterable[str]) -> Keys:
    """Sort tensor names: factors by module, and whole weights."""
    found = Keys()
    for key in keys:
        if match := _PART.fullmatch(key):
            module = found.modules.setdefault((match["path"], 0), Module(NAME, match["path"]))
            module.parts[_PARTS[match["part"]]] = key
        else:
            found.saved.append(Saved(key, (key,)))
    return found


@dataclass(frozen=True)
class _Transposed(Rows):
    """A matrix that is stored transposed; read as a whole."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.name].shape[::-1]

    def load(self) -> Array:
        return np.ascontiguousarray(super().load().T)


def _bind(binding: Binding, module: Module) -> None:
    parts = module.parts
    if "A" not in parts or "B" not in parts:
        raise binding.wrong(module.path, f"has {', '.join(parts.values())} alone: lora_a and lora_b are needed")
    stored = [binding.rows(parts[part]) for part in ("A", "B")]
    if any(len(rows.shape) != 2 for rows in stored):
        what = "has factors of experts, which mlx-lm stacks; no exact delta is known"
        fix = "fuse it with mlx-lm, dequantised, and merge the result"
        raise binding.wrong(module.path, what, "ADAPTER_UNSUPPORTED", fix)
    a, b = (_Transposed(r.file, r.name, r.row_size, r.first, r.count) for r in stored)
    factors = Factors(a, b)
    if is_embedding(module.path):
        if "magnitude_vector" in parts:
            raise binding.wrong(
                module.path, "is an embedding with DoRA, which PEFT computes otherwise", "ADAPTER_UNSUPPORTED"
            )
        module = replace(module, parts={"embedding_A": parts["A"], "embedding_B": parts["B"]})
        bind_embedding(binding, module, factors)
    else:
        bind_layer(binding, module, factors)


MLX = PeftType(TensorNames("", ("lora_a", "lora_b", "m")), lambda *_: None, _bind)
