"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W' = W + s B diag(E) A, with ranks that training chose per layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paft_merge.inputs.adapters.binding import About
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy, LowRank, Pair
from paft_merge.inputs.adapters.linear_layers import Layer, native


def _make(layer: Layer) -> Callable[[], AdapterDelta] | None:
    """A `[r, in]`, E `[r, 1]`, B `[out, r]`."""
    if len(layer.shape) != 2 or "embedding_A" in layer.parts:
        return None
    a, e, b = layer.require("A", "E", "B")
    if len(a.shape) != 2 or len(b.shape) != 2 or e.shape != (a.shape[0], 1) or b.shape[1] != a.shape[0]:
        raise layer.unfit()
    transposed = layer.is_transposed(b.shape[0], a.shape[1])
    rank, alpha = float(layer.raw["init_r"]), float(layer.raw["lora_alpha"])
    # PEFT divides by the initial rank, which it keeps in `ranknum`, also if training has lowered the rank.
    scale = np.float32(alpha if alpha > 0 else rank) / (np.float32(rank) + np.float32(1e-5))

    def pair() -> Pair:
        left, right = b.load() * scale, a.load() * e.load()
        return (np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)) if transposed else (left, right)

    lazy = Lazy(pair)
    return lambda: LowRank(layer.shape, layer.row_size, lazy, "adalora", layer.builder.stored_as, a.shape[0])


_NUMBER: tuple[type, ...] = (int, float)
_TRAINING = (
    *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern"),
    *("lora_dropout", "init_lora_weights", "r", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "monteclora_config", "qalora_group_size", "alpha_pattern"),
)
"""Fields that do not change the delta: `rank_pattern` lists the ranks that the tensors have."""

_FIELDS = dict.fromkeys(_TRAINING, ()) | {
    **{"init_r": _NUMBER, "lora_alpha": _NUMBER, "fan_in_fan_out": (bool,), "bias": (str,), "modules_to_save": ()},
    "trainable_token_indices": (list, dict),
}

_ABOUT = About("AdaLoRA (arXiv:2303.10512)", "linear, Conv1D", "here", "rows", "W + α/r₀ · B diag(E) A")

ADALORA = native(
    "ADALORA", "lora_", _ABOUT, ("A", "B", "E", "embedding_A", "embedding_B"), _FIELDS, _make,
    whole=("init_r",), real=("lora_alpha",),
)  # fmt: skip
