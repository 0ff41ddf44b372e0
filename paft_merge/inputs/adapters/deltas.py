"""Float32 deltas of one adapter for one tensor, computed for ranges of rows.

O = rows of the stored tensor, I = elements per row, R = rank, N = requested rows.
A factor pair is `left [O, R]`, `right [R, I]` in the order of the *stored* tensor, with the adapter's scale in `left`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.kernels import multiply, product
from paft_merge.compute.kernels.block_source import packed, unpacked
from paft_merge.inputs.adapters.rows import Array, Rows

T = TypeVar("T")
Pair = tuple[Array, Array]
LayerKind = Literal[
    "linear", "conv1d", "convolution", "embedding", "parameter", "expert", "experts", "transposed_experts", ""
]  # fmt: skip
"""`conv1d` is the linear layer of HF's class, which stores its weight `[in, out]`. `parameter` is a matrix of a module
that is not a layer, as routers are in transformers 5. `expert` is one expert's own tensor; `experts` are
all of a layer in one tensor `[experts, out, in]`, and `transposed_experts` in one `[experts, in, out]`."""
FUSED = ("experts", "transposed_experts")


class Lazy(Generic[T]):
    """A value made on first use, by one thread, and freed when all its users have released it.

    Args:
        make: makes the value; called again if the value is used after it was freed.
        users: number of calls of `release` that free the value.
    """

    def __init__(self, make: Callable[[], T], users: int = 1) -> None:
        self._make, self._users, self._releases = make, users, 0
        self._lock = Lock()
        self._made: tuple[T] | None = None

    def get(self) -> T:
        """Return the value; other threads wait while the first one makes it."""
        made = self._made
        if made is None:
            with self._lock:
                made = self._made = self._made or (self._make(),)
        return made[0]

    @property
    def held(self) -> T | None:
        """The value if it is made, else None."""
        made = self._made
        return made[0] if made else None

    def release(self) -> None:
        """Count one user who no longer needs the value."""
        with self._lock:
            self._releases += 1
            if self._releases >= self._users:
                self._made, self._releases = None, 0


class AdapterDelta(ABC):
    """The delta that one adapter adds to one tensor. Thread-safe; caches factors, never a dense delta.

    Attributes:
        shape: shape of the sum; differs from the base's only if the vocabulary was resized.
        row_size: elements per row; the tensor is `[numel // row_size, row_size]`.
        kind: `lora`, `experts`, `bias`, `pissa`, `olora`, `dora`, `replace`, `tokens`, `shira`, or `untied` (a zero delta
            of a tensor that must be written separately); for reports.
        stored_as: the checkpoint tensor that holds the weight if the changed name itself is not stored
            (`lm_head.weight` of a model with tied embeddings); else None.
        module: the trained module as the adapter names it; empty if the delta is not that of one module's weight.
        layer: what the module is; empty if the adapter does not show it.
    """

    module = ""
    layer: LayerKind = ""
    needs_weight: bool = False
    """Whether the delta depends on the base's weight."""

    rank = 0
    """Multiplications that one entry of the delta takes: the rank of a low-rank product, from headers alone."""

    def __init__(self, shape: tuple[int, ...], row_size: int, kind: str, stored_as: str | None = None) -> None:
        self.shape = shape
        self.row_size = row_size
        self.kind = kind
        self.stored_as = stored_as

    @property
    def entries(self) -> int:
        """Entries of the factors of a low-rank delta; of another one, those of a new value."""
        rows = math.prod(self.shape) // max(self.row_size, 1)
        pairs = self.shape[0] if self.kind == "experts" else 1
        return self.rank * (rows + pairs * self.row_size) if self.rank else rows * self.row_size

    @abstractmethod
    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        """Write rows `[start, stop)` of the delta into `out`.

        Args:
            start: first row.
            stop: one past the last row; at most the rows of `shape`.
            weight: the same rows of the base's tensor, float32 `[N, row_size]`; not modified. May be None unless
                `needs_weight`. If the vocabulary has grown, `weight` holds only the rows that the base has (None if
                it has none), and the delta of the other rows is their full value.
            out: float32 `[N, row_size]`; overwritten.

        Raises:
            AdapterError: NONFINITE, in tensors of the adapter that are read by this call.
        """

    @abstractmethod
    def release(self) -> None:
        """Free the cached inputs of `compute`; the next call reads or computes them again."""

    def product(self, start: int, stop: int) -> Pair | None:
        """Return rows `[start, stop)` as one low-rank product; None if the delta is not one product.

        Returns:
            The rows of B `[N, R]`, and A in panels (see `kernels.multiply`).
        """
        return None

    def factors(self) -> list[Pair] | None:
        """Return the delta as low-rank products.

        Returns:
            Pairs (B `[O, R]`, A `[R, I]`) float32 with the scale in B. Their products, concatenated along the rows, are
            the delta as `[numel // row_size, row_size]`; there is one pair, or one per fused expert. None if the delta
            is not low-rank or depends on the weight.
        """
        return None


class LowRank(AdapterDelta):
    """`left @ right`: LoRA on a linear layer, an embedding, a convolution or one expert; for a bias, with rank 1."""

    def __init__(
        self,
        shape: tuple[int, ...],
        row_size: int,
        pair: Lazy[Pair],
        kind: str = "lora",
        stored_as: str | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__(shape, row_size, kind, stored_as)
        self.pair, self.rank = pair, rank
        self._packed = Lazy(self._pack)
        """`left`, and `right` in panels, in place of `pair`."""

    def _pack(self) -> Pair:
        left, right = self.pair.get()
        panels = packed(right)
        self.pair.release()
        return left, panels

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        multiply(*self.product(start, stop), out)

    def product(self, start: int, stop: int) -> Pair:
        left, panels = self._packed.get()
        return left[start:stop], panels

    def factors(self) -> list[Pair]:
        if held := self._packed.held:
            return [(held[0], unpacked(held[1], self.row_size))]
        return [self.pair.get()]

    def release(self) -> None:
        self._packed.release()
        self.pair.release()


@dataclass(frozen=True)
class ExpertRows:
    """Rows `[first, first + count)` of the delta of one expert, from stacked factors."""

    stack: Lazy[Pair]
    expert: int
    first: int
    count: int

    def pair(self) -> Pair:
        """Return the factors of these rows, as views of the stacked factors."""
        left, right = self.stack.get()
        return left[self.expert, self.first : self.first + self.count], right[self.expert]


class Experts(AdapterDelta):
    """Products of stacked factors `left [E, O, R]`, `right [E, R, I]`, concatenated along the rows.

    Args:
        shape: `[experts, rows, row_size]` of fused experts, or that of one expert's tensor.
        parts: every expert of a fused tensor, each with all its rows, or the one part that is the whole tensor.
        rank: of each product.
    """

    def __init__(self, shape: tuple[int, ...], parts: Sequence[ExpertRows], rank: int) -> None:
        super().__init__(shape, shape[-1], "experts")
        self._parts, self.rank = parts, rank

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        rows = self._parts[0].count
        for at in range(start // rows, -(-stop // rows)):
            left, right = self._parts[at].pair()
            first, end = max(start, at * rows), min(stop, (at + 1) * rows)
            product(left[first - at * rows : end - at * rows], right, out[first - start : end - start])

    def factors(self) -> list[Pair]:
        return [part.pair() for part in self._parts]

    def release(self) -> None:
        self._parts[0].stack.release()


@dataclass(frozen=True)
class Magnitude:
    """DoRA: `m / ||V||` times V (Liu et al. 2024, arXiv:2402.09353), as PEFT merges it.

    Attributes:
        values: `m`, float32, one per output feature.
        norms: norms of the columns of V, `[I]`, if an output feature is a column; None if it is a row.
    """

    values: Array
    norms: Lazy[Array] | None

    def apply(self, start: int, value: Array) -> None:
        """Scale `value` `[N, I]`, the rows of V from `start` on, in place. A V of norm 0 stays 0 (PEFT: NaN)."""
        if self.norms is None:
            value *= _ratio(self.values[start : start + len(value)], _row_norms(value))[:, None]
        else:
            value *= _ratio(self.values, self.norms.get())


@dataclass(frozen=True)
class TokenRows:
    """New values of some rows: `indices [K]` int64, ascending, `values [K, I]` float32."""

    indices: NDArray[np.int64]
    values: Array

    def apply(self, start: int, value: Array) -> None:
        """Overwrite the listed rows in `value`, which holds the rows from `start` on."""
        first, end = np.searchsorted(self.indices, [start, start + len(value)])
        value[self.indices[first:end] - start] = self.values[first:end]


class Replacement(AdapterDelta):
    """The delta of a new value that is not the weight plus a product: the new value minus the weight.

    The new value is `new` (or the weight if that is None), plus `low`, scaled by `magnitude`, with the rows of `tokens`
    replaced.
    """

    needs_weight = True

    def __init__(
        self,
        shape: tuple[int, ...],
        row_size: int,
        *,
        new: Rows | None = None,
        low: LowRank | None = None,
        magnitude: Magnitude | None = None,
        tokens: TokenRows | None = None,
        stored_as: str | None = None,
    ) -> None:
        kind = "dora" if magnitude else "tokens" if tokens else "replace"
        super().__init__(shape, row_size, kind, stored_as)
        self.new, self.low, self.magnitude, self.tokens = new, low, magnitude, tokens
        self.rank = low.rank if low else 0

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        if self.new is not None:
            out[:] = self.new.read(start, stop)
        else:
            assert weight is not None, "`needs_weight` is true"
            out[:] = weight
        if self.low is not None:
            left, right = self.low.pair.get()
            out += _product(left[start:stop], right)
        if self.magnitude is not None:
            self.magnitude.apply(start, out)
        if self.tokens is not None:
            self.tokens.apply(start, out)
        if weight is not None:
            out[: len(weight)] -= weight

    def release(self) -> None:
        if self.low is not None:
            self.low.release()


def column_norms(weight: Rows, low: LowRank) -> Array:
    """`||weight + delta||` of every column, `[I]` float32, from one pass over all rows (sums in float64)."""
    left, right = low.pair.get()
    total = np.zeros(weight.row_size)
    for start, stop in weight.blocks():
        value = (weight.read(start, stop) + _product(left[start:stop], right)).astype(np.float64)
        total += np.square(value, out=value).sum(0)
    return np.sqrt(total).astype(np.float32)


def _product(left: Array, right: Array) -> Array:
    out = np.empty((len(left), right.shape[1]), np.float32)
    product(left, right, out)
    return out


def _row_norms(value: Array) -> Array:
    """Norm of each row `[N]`, in float64 and rounded once."""
    norms: Array = np.sqrt(np.einsum("ij,ij->i", value, value, dtype=np.float64)).astype(np.float32)
    return norms


def _ratio(magnitude: Array, norm: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norm == 0, np.float32(0), magnitude / norm)
