"""What a method does to one tensor, in two steps: *measure* it block by block, then *combine* block by block.

A rule knows its numbers (weights, densities, keys of random streams) and nothing of files or recipes. `prepare` reads
whatever it must know of the whole tensor and returns a function that writes one merged block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from paft_merge.compute.blocks import Block, BlockMap, Ops, Outcome, Tally, Wants

if TYPE_CHECKING:
    from torch import Tensor

Combine = Callable[[Block, Any, int], Outcome]
"""`combine(block, out, key)`: write the merged block into `out`; `key` is the stream of stochastic rounding, or 0."""


@dataclass(frozen=True)
class TensorPass:
    """One tensor as a rule sees it: its size, how to walk its blocks and what to compute on them."""

    numel: int
    each: BlockMap
    ops: Ops
    active: Sequence[int]
    """Which sources the rows of a block's `sources` are, as indices into the rule's own tuples."""
    shape: tuple[int, ...] = ()
    """Of the tensor; rules by rows need it."""


class WholeRule(Protocol):
    """A rule that needs a tensor in one piece, in memory: a method of mergekit that has no streaming form here."""

    @property
    def wants(self) -> Literal["whole"]:
        """Tells it from a `Rule`."""

    @property
    def keeps_equals(self) -> bool:
        """As in `Rule`."""

    @property
    def dtype(self) -> str | None:
        """torch's name of the type that the arithmetic is done in; None: what torch promotes the inputs to."""

    @property
    def baked(self) -> bool:
        """Whether adapters are rounded into their checkpoint's type first, as mergekit does; else they stay float32."""

    def merge(self, base: Tensor | None, sources: Sequence[Tensor], name: str) -> Tensor:
        """Merge one tensor; raises MergeError where the method refuses or fails."""

    def result_dtype(self, dtypes: Sequence[str]) -> str:
        """torch's name of the type that inputs of the types `dtypes` come out in, base first where there is one."""

    def bytes_per_element(self) -> int:
        """Estimated working memory of `merge` for each element of the tensor."""


class Rule(Protocol):
    """The law of one merged tensor."""

    @property
    def wants(self) -> Wants:
        """What a block's sources have to be."""

    @property
    def keeps_equals(self) -> bool:
        """Whether sources that are all equal (to the base too, where there is one) come out as they went in."""

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the tensor. `deltas`: the blocks hold deltas or, with `subtract`, stand for them."""


@runtime_checkable
class ByRow(Protocol):
    """A rule whose blocks must hold whole rows."""

    def row(self, shape: tuple[int, ...]) -> int:
        """Elements that must not be parted, for a tensor of `shape`."""


def row_of(rule: object, shape: tuple[int, ...]) -> int:
    """Elements that `rule` wants together in one block."""
    return rule.row(shape) if isinstance(rule, ByRow) else 1


def write_merged(ops: Ops, block: Block, merged: Block, out: Any, key: int, deltas: bool) -> Outcome:
    """Write a computed row, on top of the base if it is a delta, and tally the block it was computed from."""
    outcome = ops.blend(merged, out, 1.0 if deltas else 0.0, [1.0], key, False)
    if deltas:
        return Outcome(outcome.bad, *ops.tally(block))
    nothing = Tally.empty(block.count)
    return Outcome(outcome.bad, nothing.counts, nothing.total())


@dataclass(frozen=True)
class WeightedSum:
    """Sum of weight times source, over values (linear) or over deltas on top of the base (task arithmetic)."""

    weights: tuple[float, ...]
    of: Literal["values", "deltas"]

    @property
    def wants(self) -> Wants:
        return "either" if self.of == "values" else "deltas"

    @property
    def keeps_equals(self) -> bool:
        return self.of == "deltas" or abs(math.fsum(self.weights) - 1) < 1e-6

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        weights = [self.weights[i] for i in walk.active]
        # A sum of values that share a base is that base times all weights, plus the weighted deltas.
        base = 1.0 if self.of == "deltas" else math.fsum(self.weights) if deltas else 0.0

        def combine(block: Block, out: Any, key: int) -> Outcome:
            return walk.ops.blend(block, out, base, weights, key, deltas)

        return combine
