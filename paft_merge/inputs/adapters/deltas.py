"""What an adapter does to one tensor, as float32 deltas of ranges of rows.

O = rows of the tensor as it is stored, I = elements in a row, R = rank, N = rows asked for.
A factor pair is `left [O, R]`, `right [R, I]` in the order of the *stored* tensor, with the adapter's scale in `left`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.kernels import multiply, product
from paft_merge.compute.kernels.block_source import packed
from paft_merge.inputs.adapters.rows import Array, Rows

T = TypeVar("T")
Pair = tuple[Array, Array]


class Lazy(Generic[T]):
    """A value made at its first use, by one thread, and kept until all its users have released it.

    Args:
        make: makes it; called again when it is wanted after all.
        users: how many times `release` is called before the value is let go.
    """

    def __init__(self, make: Callable[[], T], users: int = 1) -> None:
        self._make, self._users, self._releases = make, users, 0
        self._lock = Lock()
        self._made: tuple[T] | None = None

    def get(self) -> T:
        """The value; other threads wait while the first one makes it."""
        made = self._made
        if made is None:
            with self._lock:
                made = self._made = self._made or (self._make(),)
        return made[0]

    def release(self) -> None:
        """Count one user who needs the value no more."""
        with self._lock:
            self._releases += 1
            if self._releases >= self._users:
                self._made, self._releases = None, 0


class AdapterDelta(ABC):
    """What one adapter does to one tensor. Thread-safe; holds factors once they are used, never a dense delta.

    Attributes:
        shape: of the tensor once patched; differs from the base's only when the vocabulary was resized.
        row: elements per row; the tensor is `[numel // row, row]`.
        kind: `lora`, `experts`, `bias`, `pissa`, `olora`, `dora`, `replace`, `tokens`, `shira`, or `untied` (it keeps its value,
            but must be written by itself); for reports.
        beneath: the checkpoint tensor that holds the weight beneath when the patched name is not stored itself
            (`lm_head.weight` of a model with tied embeddings); None when it is.
    """

    needs_weight: bool = False

    def __init__(self, shape: tuple[int, ...], row: int, kind: str, beneath: str | None = None) -> None:
        self.shape = shape
        self.row = row
        self.kind = kind
        self.beneath = beneath

    @abstractmethod
    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        """Write rows `[start, stop)` of the delta into `out`.

        Args:
            start: first row.
            stop: one past the last row; at most the rows of `shape`.
            weight: those rows of the tensor beneath, float32 `[N, row]`; not modified. May be None unless
                `needs_weight`. When the vocabulary has grown, rows past the base's have no weight: `weight` then holds
                the rows that there are (None when there is none), and the delta of the others is their full value.
            out: float32 `[N, row]`; overwritten.

        Raises:
            AdapterError: NONFINITE, for tensors that are read from the adapter only now.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of what was read or worked out for `delta`; it is made again, at a price, when it is wanted again."""

    def product(self, start: int, stop: int) -> Pair | None:
        """What rows `[start, stop)` of the delta are the product of, when they are one and nothing else.

        Returns:
            Those rows of B `[N, R]`, and A in panels (see `kernels.multiply`).
        """
        return None

    def factors(self) -> list[Pair] | None:
        """The delta as low-rank products, when it is nothing else.

        Returns:
            Pairs (B `[O, R]`, A `[R, I]`) float32 with the scale in B, whose products, one below the other, are the
            delta as `[numel // row, row]`; one pair but for fused experts. None when the delta depends on the weight.
        """
        return None


class LowRank(AdapterDelta):
    """`left @ right`: LoRA on a linear layer, an embedding, a convolution, one expert; and a bias, with rank 1."""

    def __init__(
        self, shape: tuple[int, ...], row: int, pair: Lazy[Pair], kind: str = "lora", beneath: str | None = None
    ) -> None:
        super().__init__(shape, row, kind, beneath)
        self.pair = pair
        self._panels = Lazy(lambda: packed(self.pair.get()[1]))

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        multiply(*self.product(start, stop), out)

    def product(self, start: int, stop: int) -> Pair:
        return self.pair.get()[0][start:stop], self._panels.get()

    def factors(self) -> list[Pair]:
        return [self.pair.get()]

    def release(self) -> None:
        self._panels.release()
        self.pair.release()


@dataclass(frozen=True)
class Part:
    """One expert of stacked factors, or rows `[first, first + count)` of its product."""

    stack: Lazy[Pair]
    expert: int
    first: int
    count: int

    def pair(self) -> Pair:
        """A view of the stacked factors."""
        left, right = self.stack.get()
        return left[self.expert, self.first : self.first + self.count], right[self.expert]


class Experts(AdapterDelta):
    """Rows of the products of stacked factors, `left [E, O, R]`, `right [E, R, I]`, one below the other.

    All of them for a fused tensor `[experts, rows, row]`; one part when each expert is a tensor of its own.
    """

    def __init__(self, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
        super().__init__(shape, shape[-1], "experts")
        self._parts = parts

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
        norms: None when an output feature is a row; else the norms of the columns, `[I]`, from all rows of V.
    """

    values: Array
    norms: Lazy[Array] | None

    def apply(self, start: int, value: Array) -> None:
        """Scale `value` `[N, I]`, rows `start` and on of V, in place. A V of norm 0 stays 0 (PEFT: NaN)."""
        if self.norms is None:
            value *= _ratio(self.values[start : start + len(value)], _row_norms(value))[:, None]
        else:
            value *= _ratio(self.values, self.norms.get())


@dataclass(frozen=True)
class Tokens:
    """Rows that take the place of others: `indices [K]` int64, ascending, `values [K, I]` float32."""

    indices: NDArray[np.int64]
    values: Array

    def apply(self, start: int, value: Array) -> None:
        """Overwrite those of the rows `start` and on, in `value`, that are listed."""
        first, end = np.searchsorted(self.indices, [start, start + len(value)])
        value[self.indices[first:end] - start] = self.values[first:end]


class Rewritten(AdapterDelta):
    """A new value that is not the weight plus a product: its delta is that value minus the weight.

    The value is `new` (else the weight), plus `low`, scaled by `magnitude`, with the rows of `tokens` put in.
    """

    needs_weight = True

    def __init__(
        self,
        shape: tuple[int, ...],
        row: int,
        *,
        new: Rows | None = None,
        low: LowRank | None = None,
        magnitude: Magnitude | None = None,
        tokens: Tokens | None = None,
        beneath: str | None = None,
    ) -> None:
        kind = "dora" if magnitude else "tokens" if tokens else "replace"
        super().__init__(shape, row, kind, beneath)
        self.new, self.low, self.magnitude, self.tokens = new, low, magnitude, tokens

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        if self.new is not None:
            out[:] = self.new.read(start, stop)
        else:
            assert weight is not None, "this delta needs the weight beneath"
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


def column_norms(beneath: Rows, low: LowRank) -> Array:
    """`||weight + delta||` of every column, `[I]` float32, from one pass over all rows (sums in float64)."""
    left, right = low.pair.get()
    total = np.zeros(beneath.row)
    for start, stop in beneath.blocks():
        value = (beneath.read(start, stop) + _product(left[start:stop], right)).astype(np.float64)
        total += np.square(value, out=value).sum(0)
    return np.sqrt(total).astype(np.float32)


def pissa_taken(weight: Array, rank: int, transposed: bool) -> Pair:
    """What PiSSA took out of the base (Meng et al. 2024, arXiv:2404.02948), negated: the largest `rank` components.

    Args:
        weight: `[O, I]` float32, the whole tensor as stored.
        rank: at most min(O, I).
        transposed: the layer is an HF `Conv1D`, which stores `[in, out]`. Only rounding depends on it.
    """
    import torch

    whole = torch.from_numpy(weight)
    u, s, vh = torch.linalg.svd(whole.T if transposed else whole, full_matrices=False)
    left, right = (u[:, :rank] * -s[:rank]).numpy(), vh[:rank].numpy()
    pair = (right.T, left.T) if transposed else (left, right)
    return np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1])


def olora_taken(weight: Array, rank: int, scale: float) -> Pair:
    """What OLoRA took out of the base (Buyukakyuz 2024, arXiv:2406.01775), negated: `scale` times the first of QR.

    PEFT takes the QR of the weight as stored, for HF `Conv1D` too.
    """
    import torch

    q, r = torch.linalg.qr(torch.from_numpy(weight))
    return (q[:, :rank] * -scale).numpy(), r[:rank].contiguous().numpy()


def joined(pairs: Sequence[Pair]) -> Pair:
    """One pair whose product is the sum of the products."""
    return np.concatenate([left for left, _ in pairs], axis=1), np.concatenate([right for _, right in pairs])


def _product(left: Array, right: Array) -> Array:
    out = np.empty((len(left), right.shape[1]), np.float32)
    product(left, right, out)
    return out


def _row_norms(value: Array) -> Array:
    """`[N]`: in float64 and rounded once."""
    norms: Array = np.sqrt(np.einsum("ij,ij->i", value, value, dtype=np.float64)).astype(np.float32)
    return norms


def _ratio(magnitude: Array, norm: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norm == 0, np.float32(0), magnitude / norm)
