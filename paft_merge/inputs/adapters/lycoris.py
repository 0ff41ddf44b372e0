"""The two products of LyCORIS: LoHa (arXiv:2108.06098) and LoKr (arXiv:2309.14859), on linear layers and convolutions.

O = output features, I = elements per row of the weight, for a convolution its inputs times its kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paft_merge.inputs.adapters.binding import About
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy
from paft_merge.inputs.adapters.linear_layers import Layer, native
from paft_merge.inputs.adapters.rows import Array, Rows


class Hadamard(AdapterDelta):
    """`scale * (a1 b1) * (a2 b2)`, multiplied entry by entry; `a [O, R]`, `b [R, I]`."""

    def __init__(self, layer: Layer, scale: float, factors: Lazy[list[Array]], rank: int) -> None:
        super().__init__(layer.shape, layer.row_size, "loha", layer.builder.stored_as)
        self._scale, self._factors, self.rank = np.float32(scale), factors, 2 * rank

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        a1, b1, a2, b2 = self._factors.get()
        np.matmul(a1[start:stop], b1, out=out)
        out *= a2[start:stop] @ b2
        out *= self._scale

    def release(self) -> None:
        self._factors.release()


class Kronecker(AdapterDelta):
    """`scale * kron(w1, w2)`; `w1 [O1, I1]`, `w2 [O2, I2]` with O = O1 O2 and I = I1 I2."""

    def __init__(self, layer: Layer, scale: float, factors: Lazy[tuple[Array, Array]]) -> None:
        super().__init__(layer.shape, layer.row_size, "lokr", layer.builder.stored_as)
        self._scale, self._factors = np.float32(scale), factors

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        w1, w2 = self._factors.get()
        first, second = np.divmod(np.arange(start, stop), len(w2))
        shaped = out.reshape(stop - start, w1.shape[1], w2.shape[1])
        np.multiply(w1[first][:, :, None], w2[second][:, None, :], out=shaped)
        out *= self._scale

    def release(self) -> None:
        self._factors.release()


def _make_loha(layer: Layer) -> Callable[[], AdapterDelta] | None:
    """`hada_w1_a`, `hada_w2_a` `[out, r]`, `hada_w1_b`, `hada_w2_b` `[r, in]`; with `hada_t1` it is a convolution's core."""
    if "t1" in layer.parts:
        return None
    parts = layer.require("w1_a", "w1_b", "w2_a", "w2_b")
    rank = parts[0].shape[-1]
    if [part.shape for part in parts] != [(layer.shape[0], rank), (rank, layer.row_size)] * 2:
        raise layer.unfit()
    scale, factors = _scale(layer, rank), Lazy(lambda: [part.load() for part in parts])
    return lambda: Hadamard(layer, scale, factors, rank)


def _make_lokr(layer: Layer) -> Callable[[], AdapterDelta] | None:
    """`lokr_w1` or its factors `[a, r]`, `[r, b]`, and the same for `lokr_w2`; with `lokr_t2` it is a convolution's core."""
    if "t2" in layer.parts or ("w2" in layer.parts and len(layer.parts["w2"].shape) == 3):
        return None  # the product of a Conv1d's `[b, d, kernel]` with w1 mixes its dimensions, in training too
    needed = [name for w in ("w1", "w2") for name in ((w,) if w in layer.parts else (f"{w}_a", f"{w}_b"))]
    layer.require(*needed)
    ones = [_matrix_shape(layer, w) for w in ("w1", "w2")]
    if (ones[0][0] * ones[1][0], ones[0][1] * ones[1][1]) != (layer.shape[0], layer.row_size):
        raise layer.unfit()
    factors = Lazy(lambda: (_matrix(layer, "w1"), _matrix(layer, "w2")))
    ranks = [layer.parts[name].shape[-1] for name in ("w1_a", "w2_a") if name in layer.parts]
    scale = _scale(layer, *ranks[:1])
    return lambda: Kronecker(layer, scale, factors)


def _scale(layer: Layer, rank: int | None = None) -> float:
    """alpha / r. The rank of the configuration must be that of the factors, if there are any."""
    settings, path = layer.binding.settings, layer.path
    stated = settings.rank_of(path)
    if rank not in (None, stated):
        raise layer.binding.wrong(path, f"has factors of rank {rank}, but adapter_config.json gives it rank {stated}")
    return settings.number("alpha", "alpha_pattern", path) / stated


def _matrix_shape(layer: Layer, name: str) -> tuple[int, int]:
    """Rows and elements per row of `w1` or `w2`."""
    if name in layer.parts:
        return layer.parts[name].count, layer.parts[name].row_size
    a, b = layer.parts[f"{name}_a"], layer.parts[f"{name}_b"]
    if len(a.shape) != 2 or a.shape[1] != b.shape[0]:
        raise layer.unfit()
    return a.count, b.row_size


def _matrix(layer: Layer, name: str) -> Array:
    parts: dict[str, Rows] = dict(layer.parts)
    if name in parts:
        return parts[name].load()
    product: Array = parts[f"{name}_a"].load() @ parts[f"{name}_b"].load()
    return product


_INERT = ("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d")
_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_INERT, "rank_dropout_scale", "decompose_both", "decompose_factor", "r", "alpha"), ()),
    **{"rank_pattern": (dict,), "alpha_pattern": (dict,), "modules_to_save": ()},
}
_LAYERS = "linear, convolutions"

LOHA = native(
    "LOHA", "hada_", About("LoHa (arXiv:2108.06098)", _LAYERS, "here", "rows", "W + α/r · (A₁B₁) ⊙ (A₂B₂)"),
    ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"), _FIELDS, _make_loha, whole=("r",), real=("alpha",),
)  # fmt: skip
LOKR = native(
    "LOKR", "lokr_", About("LoKr (arXiv:2309.14859)", _LAYERS, "here", "rows", "W + α/r · w₁ ⊗ w₂"),
    ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"), _FIELDS, _make_lokr, whole=("r",), real=("alpha",),
)  # fmt: skip
