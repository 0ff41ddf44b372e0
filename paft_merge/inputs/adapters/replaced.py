"""Types that replace values: LN tuning (arXiv:2312.11420) whole layers, trainable tokens rows of an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paft_merge.errors import Problems
from paft_merge.inputs.adapters.binding import About, Binding, PeftType
from paft_merge.inputs.adapters.config import INERT, check_kinds, refuse_unknown
from paft_merge.inputs.adapters.keys import Module, TensorNames


def _check_norms(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    refuse_unknown(path, raw, INERT | {"modules_to_save"}, "LN tuning", problems)


def _bind_norm(binding: Binding, module: Module) -> None:
    """Bind the parameters of a layer that was copied and trained."""
    for part, key in module.parts.items():
        leaf = "bias" if part.endswith(".bias") else "weight"
        parameter = binding.require(module.path, f"{module.path}.{leaf}")
        if parameter is None:
            return
        shape = binding.file.tensors[key].shape
        if len(parameter.pieces) > 1 or shape != parameter.shape:
            raise binding.unlike_base(module.path, f"has a {leaf} of {shape}, and the base has {parameter.shape}")
        binding.builder(parameter).new = binding.rows(key, parameter.row_size)


def _check_tokens(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    refuse_unknown(path, raw, INERT | {"token_indices", "init_weights"}, "trainable tokens", problems)
    check_kinds(path, raw, {"token_indices": (list,)}, problems)


def _bind_tokens(binding: Binding, module: Module) -> None:
    binding.bind_tokens(module.path, module.parts["delta"])


_NORMS = About("LN tuning (arXiv:2312.11420)", "any layer, mostly norms", "here", "rows", "the trained value")
_ROWS = About("trainable tokens", "embedding, linear", "here", "rows", "the trained rows")

LN_TUNING = PeftType(TensorNames("ln_tuning_", ("layers",)), _check_norms, _bind_norm, _NORMS)
TRAINABLE_TOKENS = PeftType(TensorNames("trainable_tokens_", ("delta",)), _check_tokens, _bind_tokens, _ROWS)
