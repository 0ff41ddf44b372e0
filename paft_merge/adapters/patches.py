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

import torch
from torch import Tensor

from paft_merge.adapters.rows import Rows
from paft_merge.products import product

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]


class Once(Generic[T]):
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


class Patch(ABC):
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
    def delta(self, start: int, stop: int, weight: Tensor | None, out: Tensor) -> None:
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

    def factors(self) -> list[Pair] | None:
        """The delta as low-rank products, when it is nothing else.

        Returns:
            Pairs (B `[O, R]`, A `[R, I]`) float32 with the scale in B, whose products, one below the other, are the
            delta as `[numel // row, row]`; one pair but for fused experts. None when the delta depends on the weight.
        """
        return None


class LowRank(Patch):
    """`left @ right`: LoRA on a linear layer, an embedding, a convolution, one expert; and a bias, with rank 1."""

    def __init__(
        self, shape: tuple[int, ...], row: int, pair: Once[Pair], kind: str = "lora", beneath: str | None = None
    ) -> None:
        super().__init__(shape, row, kind, beneath)
        self.pair = pair

    def delta(self, start: int, stop: int, weight: Tensor | None, out: Tensor) -> None:
        left, right = self.pair.get()
        multiply(left[start:stop], right, out)

    def factors(self) -> list[Pair]:
        return [self.pair.get()]

    def release(self) -> None:
        self.pair.release()


@dataclass(frozen=True)
class Part:
    """One expert of stacked factors, or rows `[first, first + count)` of its product."""

    stack: Once[Pair]
    expert: int
    first: int
    count: int

    def pair(self) -> Pair:
        """A view of the stacked factors."""
        left, right = self.stack.get()
        return left[self.expert, self.first : self.first + self.count], right[self.expert]


class Experts(Patch):
    """Rows of the products of stacked factors, `left [E, O, R]`, `right [E, R, I]`, one below the other.

    All of them for a fused tensor `[experts, rows, row]`; one part when each expert is a tensor of its own.
    """

    def __init__(self, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
        super().__init__(shape, shape[-1], "experts")
        self._parts = parts

    def delta(self, start: int, stop: int, weight: Tensor | None, out: Tensor) -> None:
        rows = self._parts[0].count
        for at in range(start // rows, -(-stop // rows)):
            left, right = self._parts[at].pair()
            first, end = max(start, at * rows), min(stop, (at + 1) * rows)
            multiply(left[first - at * rows : end - at * rows], right, out[first - start : end - start])

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

    values: Tensor
    norms: Once[Tensor] | None

    def apply(self, start: int, value: Tensor) -> None:
        """Scale `value` `[N, I]`, rows `start` and on of V, in place. A V of norm 0 stays 0 (PEFT: NaN)."""
        if self.norms is None:
            norm = torch.linalg.vector_norm(value, dim=1)
            value.mul_(_ratio(self.values[start : start + len(value)], norm)[:, None])
        else:
            value.mul_(_ratio(self.values, self.norms.get()))


@dataclass(frozen=True)
class Tokens:
    """Rows that take the place of others: `indices [K]` int64, ascending, `values [K, I]` float32."""

    indices: Tensor
    values: Tensor

    def apply(self, start: int, value: Tensor) -> None:
        """Overwrite those of the rows `start` and on, in `value`, that are listed."""
        first, end = torch.searchsorted(self.indices, torch.tensor([start, start + len(value)])).tolist()
        value.index_copy_(0, self.indices[first:end] - start, self.values[first:end])


class Rewritten(Patch):
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

    def delta(self, start: int, stop: int, weight: Tensor | None, out: Tensor) -> None:
        if self.new is not None:
            out.copy_(self.new.read(start, stop))
        else:
            assert weight is not None, "this patch needs the weight beneath"
            out.copy_(weight)
        if self.low is not None:
            left, right = self.low.pair.get()
            out.add_(multiply(left[start:stop], right, torch.empty_like(out)))
        if self.magnitude is not None:
            self.magnitude.apply(start, out)
        if self.tokens is not None:
            self.tokens.apply(start, out)
        if weight is not None:
            out[: len(weight)].sub_(weight)

    def release(self) -> None:
        if self.low is not None:
            self.low.release()


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` into `out` (all float32), by the product whose bits do not depend on which rows are asked for."""
    if out.device.type == "cpu":
        product(left.numpy(), right.numpy(), out.numpy())
        return out
    return torch.mm(left.to(out.device), right.to(out.device), out=out)


def column_norms(beneath: Rows, low: LowRank) -> Tensor:
    """`||weight + delta||` of every column, `[I]` float32, from one pass over all rows (sums in float64)."""
    left, right = low.pair.get()
    total = torch.zeros(beneath.row, dtype=torch.float64)
    for start, stop in beneath.blocks():
        value = beneath.read(start, stop)
        value += multiply(left[start:stop], right, torch.empty_like(value))
        total += value.double().square_().sum(0)
    return total.sqrt_().float()


def pissa_taken(weight: Tensor, rank: int, transposed: bool) -> Pair:
    """What PiSSA took out of the base (Meng et al. 2024, arXiv:2404.02948), negated: the largest `rank` components.

    Args:
        weight: `[O, I]` float32, the whole tensor as stored.
        rank: at most min(O, I).
        transposed: the layer is an HF `Conv1D`, which stores `[in, out]`. Only rounding depends on it.
    """
    u, s, vh = torch.linalg.svd(weight.T if transposed else weight, full_matrices=False)
    left, right = u[:, :rank] * -s[:rank], vh[:rank]
    return (right.T.contiguous(), left.T.contiguous()) if transposed else (left, right.contiguous())


def olora_taken(weight: Tensor, rank: int, scale: float) -> Pair:
    """What OLoRA took out of the base (Buyukakyuz 2024, arXiv:2406.01775), negated: `scale` times the first of QR.

    PEFT takes the QR of the weight as stored, for HF `Conv1D` too.
    """
    q, r = torch.linalg.qr(weight)
    return q[:, :rank] * -scale, r[:rank].contiguous()


def joined(pairs: Sequence[Pair]) -> Pair:
    """One pair whose product is the sum of the products."""
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])


def _ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 0.0, magnitude / norm)
