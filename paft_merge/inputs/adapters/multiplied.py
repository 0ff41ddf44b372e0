"""Types that multiply the weight entry by entry: IA3 (arXiv:2205.05638) and HiRA (ICLR 2025).

O = rows, I = columns of the stored weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from paft_merge.inputs.adapters.binding import About
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy, Pair
from paft_merge.inputs.adapters.linear_layers import Layer, native
from paft_merge.inputs.adapters.rows import Array


class Scaled(AdapterDelta):
    """`W * (l - 1)`.

    Args:
        shape: of the weight or the bias.
        row_size: elements per row.
        vector: `l`.
        rows: whether `l` has one entry a row; else one a column.
        stored_as: as in `AdapterDelta`.
    """

    needs_weight = True

    def __init__(
        self, shape: tuple[int, ...], row_size: int, vector: Lazy[Array], rows: bool, stored_as: str | None
    ) -> None:
        super().__init__(shape, row_size, "ia3", stored_as)
        self._vector, self._rows = vector, rows

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        assert weight is not None, "`needs_weight` is true"
        vector = self._vector.get()
        np.multiply(weight, vector[start:stop, None] if self._rows else vector, out=out)
        out -= weight

    def release(self) -> None:
        self._vector.release()


class Modulated(AdapterDelta):
    """`W * (left right)`; `left [O, R]`, `right [R, I]`."""

    needs_weight = True

    def __init__(self, layer: Layer, pair: Lazy[Pair], rank: int) -> None:
        super().__init__(layer.shape, layer.row_size, "hira", layer.builder.stored_as)
        self._pair, self.rank = pair, rank

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        assert weight is not None, "`needs_weight` is true"
        left, right = self._pair.get()
        np.matmul(left[start:stop], right, out=out)
        out *= weight

    def release(self) -> None:
        self._pair.release()


def _make_ia3(layer: Layer) -> Callable[[], AdapterDelta] | None:
    """`ia3_l` `[out, 1]`, which scales the outputs and so the bias too, or `[1, in]`, which scales the inputs."""
    if len(layer.shape) != 2:
        return None
    (vector,) = layer.require("l")
    if len(vector.shape) != 2 or 1 not in vector.shape:
        raise layer.unfit()
    outputs, size = vector.shape[1] == 1, vector.shape[0] * vector.shape[1]
    transposed = layer.is_transposed(size if outputs else None, None if outputs else size)
    lazy = Lazy(lambda: vector.load().reshape(-1), users=2)
    if outputs and (bias := layer.binding.find(f"{layer.path}.bias")):
        builder: Any = layer.binding.builder(bias)
        builder.make = lambda: Scaled(builder.shape, builder.row_size, lazy, True, builder.stored_as)
    return lambda: Scaled(layer.shape, layer.row_size, lazy, outputs != transposed, layer.builder.stored_as)


def _make_hira(layer: Layer) -> Callable[[], AdapterDelta] | None:
    """`hira_A` `[r, in]`, `hira_B` `[out, r]`; of an embedding `[r, tokens]`, `[dim, r]`, whose product is transposed."""
    if len(layer.shape) != 2:
        return None
    embedding = "embedding_A" in layer.parts
    a, b = layer.require("embedding_A", "embedding_B") if embedding else layer.require("A", "B")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise layer.unfit()
    if embedding and layer.shape != (a.shape[1], b.shape[0]):
        raise layer.unfit()
    transposed = embedding or layer.is_transposed(b.shape[0], a.shape[1])

    def pair() -> Pair:
        left, right = b.load(), a.load()
        return (np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)) if transposed else (left, right)

    lazy = Lazy(pair)
    return lambda: Modulated(layer, lazy, a.shape[0])


IA3 = native(
    "IA3", "ia3_",
    About("IA3 (arXiv:2205.05638)", "linear, Conv1D, Conv2d, Conv3d", "here", "rows", "diag(l) W or W diag(l)"),
    ("l",), {"feedforward_modules": (list, str), "fan_in_fan_out": (bool,), "init_ia3_weights": (), "modules_to_save": ()},
    _make_ia3, bias=True,
)  # fmt: skip
HIRA = native(
    "HIRA", "hira_",
    About("HiRA (ICLR 2025)", "linear, Conv1D, embedding, convolutions", "here", "rows", "W + W ⊙ (B A)"),
    ("A", "B", "embedding_A", "embedding_B"),
    {**dict.fromkeys(("r", "hira_dropout", "init_weights"), ()), "rank_pattern": (dict,), "fan_in_fan_out": (bool,), "modules_to_save": ()},
    _make_hira,
)  # fmt: skip
