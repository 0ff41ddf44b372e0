"""The interface of a rule: how one tensor is merged, in two steps. *Measure* it block by block, then *combine* its blocks.

A rule holds numbers (weights, densities, keys of random streams) and does not depend on files or recipes. `prepare` measures
the tensor and returns a function that writes one merged block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Block, KeepThreshold, Ops, Outcome, Wants
from paft_merge.methods.rules.one_pass import OnePass
from paft_merge.methods.rules.thresholds import AddUp, Trim
from paft_merge.methods.rules.walks import BLEND, TALLIED, Walks

if TYPE_CHECKING:
    from torch import Tensor

Combine = Callable[[Block, Any, int], Outcome]
"""`combine(block, out, key)`: write the merged block into `out`; `key` is the stream of stochastic rounding, or 0."""


MEASURED_AT_ONCE = 16
"""Most sources that are measured at a time."""


@dataclass(frozen=True)
class TensorPass:
    """One tensor as a rule sees it: its size, how to walk its blocks and the operations on them."""

    numel: int
    each: BlockWalk
    ops: Ops
    active: Sequence[int]
    """The sources that the rows of a block's `sources` belong to, as indices into the rule's tuples."""
    shape: tuple[int, ...] = ()
    """Shape of the tensor; rules that work on rows need it."""
    factors: Callable[[int], tuple[Any, Any] | None] = lambda _: None
    """The factors of an active source whose delta is one product (see `threshold_bounds.draw_rows`), by its place in `active`."""
    among: Callable[[Sequence[int]], BlockWalk] | None = None
    """Walks over the tensor with some of the active sources, given by their places; None if that is not possible."""

    @property
    def groups(self) -> list[tuple[range, BlockWalk]]:
        """The active sources in groups, and a walk over the tensor for each: what is measured of each source alone needs memory for one
        group only, and no more time where sources are products."""
        n = len(self.active)
        if self.among is None or n <= MEASURED_AT_ONCE:
            return [(range(n), self.each)]
        parts = [range(first, min(first + MEASURED_AT_ONCE, n)) for first in range(0, n, MEASURED_AT_ONCE)]
        return [(part, self.among(part)) for part in parts]


class WholeRule(Protocol):
    """A rule that merges a tensor in one piece, in memory: a method of mergekit without a streaming form."""

    @property
    def wants(self) -> Literal["whole"]:
        """Distinguishes it from a `Rule`."""

    @property
    def keeps_equals(self) -> bool:
        """As in `Rule`."""

    @property
    def dtype(self) -> str | None:
        """torch's name of the dtype of the arithmetic; None: the dtype that torch promotes the inputs to."""

    @property
    def baked(self) -> bool:
        """Whether adapters are first rounded into their checkpoint's dtype, as in mergekit; else they stay float32."""

    def merge(self, base: Tensor | None, sources: Sequence[Tensor], name: str) -> Tensor:
        """Merge one tensor; raises MergeError where the method refuses or fails."""

    def result_dtype(self, dtypes: Sequence[str]) -> str:
        """torch's name of the result's dtype for inputs of the dtypes `dtypes`, the base first if there is one."""

    def bytes_per_element(self) -> int:
        """Estimated working memory of `merge` for each element of the tensor."""


class Rule(ABC):
    """How one tensor is merged block by block. A subclass overrides the methods for what it can do besides merging."""

    @property
    @abstractmethod
    def wants(self) -> Wants:
        """What the sources of a block must be: see `Wants`."""

    @property
    def keeps_equals(self) -> bool:
        """Whether equal sources (equal to the base too, if there is one) come out unchanged."""
        return True

    @abstractmethod
    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the tensor, and return the function that merges one block.

        Args:
            walk: the tensor.
            deltas: the sources of its blocks are deltas, or values to `subtract` the base from; else they are values.
        """

    def row(self, shape: tuple[int, ...]) -> int:
        """Elements that a block must hold together, for a tensor of `shape`."""
        return 1

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """The walks over a tensor of `numel` entries whose sources `active` differ from the base, for predictions."""
        return Walks(TALLIED)

    def one_pass(self, walk: TensorPass) -> OnePass | None:
        """How to merge the tensor, as deltas, while it is read for the first time; None if it must be measured before."""
        return None

    @property
    def selection_weights(self) -> tuple[float, ...] | None:
        """The factor of each source's kept entries, before normalization; None for a rule that does not select entries."""
        return None

    def trims_by(self, trim: Trim) -> bool:
        """Whether it trims each source of a tensor by `trim`, and does nothing else before it elects signs."""
        return False

    @property
    def needs_model(self) -> bool:
        """Whether something is still to be measured over the whole model, see `model_wide.measure_over_model`."""
        return self.global_trims is not None

    @property
    def weighs(self) -> bool:
        """Whether some of its weights are still to be measured, see `measured_weights.MeasuredWeights`."""
        return False

    @property
    def global_trims(self) -> tuple[Any, ...] | None:
        """The trim of each source if magnitudes are ranked over the whole model (`trim_scope: global`); else None."""
        return None

    def global_thresholds(self, walk: BlockWalk, ops: Ops, add_up: AddUp) -> Sequence[KeepThreshold]:
        """One threshold a source for all tensors of `walk` together; only for a rule with `global_trims`."""
        return ()

    def with_thresholds(self, thresholds: Sequence[KeepThreshold]) -> Rule:
        """This rule with thresholds that are known, one a source, in place of its trims; a rule without trims as it is."""
        return self


def write_merged(ops: Ops, block: Block, merged: Block, out: Any, key: int, deltas: bool) -> Outcome:
    """Write a computed row, on top of the base if it is a delta, and tally the block it was computed from."""
    outcome = ops.blend(merged, out, 1.0 if deltas else 0.0, [1.0], key, False)
    if deltas:
        return Outcome(outcome.bad, *ops.tally(block))
    return replace(Outcome.empty(block.count), bad=outcome.bad)


@dataclass(frozen=True)
class WeightedSum(Rule):
    """Sum of weight times source, over values (linear) or over deltas on top of the base (task arithmetic)."""

    weights: tuple[float, ...]
    of: Literal["values", "deltas"]

    @property
    def wants(self) -> Wants:
        """Values that share their base may be given as deltas: see `prepare`."""
        return "either" if self.of == "values" else "deltas"

    @property
    def keeps_equals(self) -> bool:
        """A sum of values does if its weights add up to one."""
        return self.of == "deltas" or abs(math.fsum(self.weights) - 1) < 1e-6

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """Nothing is measured."""
        return Walks(BLEND if self.of == "values" else TALLIED)

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Nothing is measured."""
        weights = [self.weights[i] for i in walk.active]
        # A sum of values that share a base is that base times all weights, plus the weighted deltas.
        base = 1.0 if self.of == "deltas" else math.fsum(self.weights) if deltas else 0.0

        def combine(block: Block, out: Any, key: int) -> Outcome:
            return walk.ops.blend(block, out, base, weights, key, deltas)

        return combine
