"""MiSS (Kang and Yin 2024, arXiv:2409.15371): a small block that is added to every group of r inputs.

D `[r, out]`; W'[o, i] = W[o, i] + D[i mod r, o], which is a product of rank r: Dᵀ times unit matrices side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paft_merge.inputs.adapters.binding import About
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy, LowRank, Pair
from paft_merge.inputs.adapters.linear_layers import Layer, native


def _make(layer: Layer) -> Callable[[], AdapterDelta] | None:
    """`miss_block` `[r, out]`, or `[r, mini_r]` of which copies make it as wide; `bat` depends on the weight."""
    if layer.raw.get("init_weights") == "bat":
        return None
    (block,) = layer.require("block")
    mini = layer.raw.get("init_weights") == "mini"
    wide = layer.raw.get("mini_r") if mini else layer.shape[0]
    if len(layer.shape) != 2 or len(block.shape) != 2 or block.shape[1] != wide or layer.shape[0] % block.shape[1]:
        raise layer.unfit()
    rank = block.shape[0]
    if rank > layer.row_size:
        raise layer.unfit()

    def pair() -> Pair:
        left = np.tile(block.load().T, (layer.shape[0] // block.shape[1], 1))
        right = np.tile(np.eye(rank, dtype=np.float32), -(-layer.row_size // rank))[:, : layer.row_size]
        return np.ascontiguousarray(left), np.ascontiguousarray(right)

    lazy = Lazy(pair)
    return lambda: LowRank(layer.shape, layer.row_size, lazy, "miss", layer.builder.stored_as, rank)


_FIELDS: dict[str, tuple[type, ...]] = {
    **{
        "r": (int,),
        "mini_r": (int,),
        "miss_dropout": (),
        "bone_dropout": (),
        "init_weights": (bool, str),
        "bias": (str,),
    },
    "modules_to_save": (),
}

_FORMULA = "W + Dᵀ [1 1 ... 1]"

MISS = native(
    "MISS", "miss_", About("MiSS (arXiv:2409.15371)", "linear", "here", "rows", _FORMULA), ("block",), _FIELDS, _make
)
BONE = native(
    "BONE", "bone_", About("Bone, the old name of MiSS", "linear", "here", "rows", _FORMULA), ("block",), _FIELDS, _make
)
