"""OFT (Qiu et al. 2023, arXiv:2306.07280; arXiv:2506.19847): W' = W Rᵀ, where R is orthogonal and block diagonal.

N = blocks, b = size of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from paft_merge.inputs.adapters.binding import About
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy
from paft_merge.inputs.adapters.linear_layers import Layer, native
from paft_merge.inputs.adapters.rows import Array


class Rotated(AdapterDelta):
    """`W (Rᵀ - 1)`, for blocks `Rᵀ - 1` `[N, b, b]`, or `[1, b, b]` if all blocks share one."""

    needs_weight = True

    def __init__(self, layer: Layer, turns: Lazy[Array]) -> None:
        super().__init__(layer.shape, layer.row_size, "oft", layer.builder.stored_as)
        self._turns = turns

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        assert weight is not None, "`needs_weight` is true"
        turns = self._turns.get()
        size = turns.shape[1]
        for at in range(self.row_size // size):
            columns = slice(at * size, (at + 1) * size)
            out[:, columns] = weight[:, columns] @ turns[at if len(turns) > 1 else 0]

    def release(self) -> None:
        self._turns.release()


def _make(layer: Layer) -> Callable[[], AdapterDelta] | None:
    """`oft_R.weight` `[N, b (b - 1) / 2]`: the entries above the diagonals of skew-symmetric matrices."""
    if len(layer.shape) != 2 or "embedding_R" in layer.parts:
        return None
    (vectors,) = layer.require("R")
    if len(vectors.shape) != 2:
        raise layer.unfit()
    size = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    share, raw = bool(layer.raw.get("block_share")), layer.raw
    count = 1 if share else layer.row_size // size
    if layer.row_size % size or vectors.shape != (count, size * (size - 1) // 2):
        raise layer.unfit()
    layer.is_transposed(None, layer.row_size)

    def turns() -> Array:
        skew = np.zeros((count, size, size), np.float32)
        skew[:, *np.triu_indices(size, 1)] = vectors.load()
        skew -= skew.swapaxes(1, 2).copy()
        if raw.get("coft"):
            skew = _projected(skew, float(raw.get("eps", 6e-5)))
        terms = int(raw.get("num_cayley_neumann_terms", 5)) if raw.get("use_cayley_neumann", True) else None
        return np.ascontiguousarray((_cayley(skew, terms) - np.eye(size, dtype=np.float32)).swapaxes(1, 2))

    lazy = Lazy(turns)
    return lambda: Rotated(layer, lazy)


def _cayley(skew: Array, terms: int | None) -> Array:
    """(1 - Q)(1 + Q)⁻¹ as PEFT computes it.

    Args:
        skew: Q, `[N, b, b]` float32.
        terms: of PEFT's Neumann series 1 + 2 Q + 2 Q² + ... + Qⁿ⁻¹; None solves exactly.
    """
    one = np.broadcast_to(np.eye(skew.shape[1], dtype=np.float32), skew.shape)
    if terms is None:
        solved: Array = np.linalg.solve((one + skew).swapaxes(1, 2), (one - skew).swapaxes(1, 2)).swapaxes(1, 2)
        return solved
    total = one.copy()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total


def _projected(skew: Array, eps: float) -> Array:
    """COFT: matrices whose norm exceeds `eps / sqrt(N)` are scaled down to it."""
    limit = np.float32(eps / math.sqrt(len(skew)))
    norms = np.sqrt(np.square(skew).sum((1, 2), keepdims=True))
    return np.where(norms <= limit, skew, limit * skew / np.maximum(norms, np.float32(1e-30)))


_FIELDS: dict[str, tuple[type, ...]] = {
    **{"r": (int,), "oft_block_size": (int,), "num_cayley_neumann_terms": (int,), "eps": (int, float)},
    **dict.fromkeys(("coft", "block_share", "use_cayley_neumann", "fan_in_fan_out"), (bool,)),
    **{"module_dropout": (), "init_weights": (), "bias": (str,), "modules_to_save": ()},
}

OFT = native(
    "OFT", "oft_", About("OFT (arXiv:2306.07280)", "linear, Conv2d, embedding", "here", "rows", "W Rᵀ, R = Cayley(Q)"),
    ("R", "embedding_R"), _FIELDS, _make,
)  # fmt: skip
