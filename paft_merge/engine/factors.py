"""The factors of a merged delta (`output: {kind: adapter}`).

They follow from the sources' factors where the method adds up deltas, exactly if the rank allows it. Any other delta is streamed
block by block, as it is for a checkpoint, and approximated.

O = rows of the delta, I = its columns, R = rank of the output.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Block, Ops, Tally
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.kernels import SUMS
from paft_merge.engine.spaces import Coordinates
from paft_merge.engine.streamed_deltas import StreamedDelta, not_finite
from paft_merge.errors import MergeError
from paft_merge.inputs.adapters.deltas import FUSED, Lazy
from paft_merge.inputs.dtypes import cast, widen
from paft_merge.inputs.tensor_inputs import RAW
from paft_merge.lowrank.factors import Array, LowRank, Pair, balanced, padded, stacked, truncate
from paft_merge.lowrank.range_finder import T, approximate
from paft_merge.methods.rules.measured_weights import MeasuredWeights, product_square
from paft_merge.methods.rules.thresholds import stream_key
from paft_merge.output.folder import Finished
from paft_merge.plan import MergePlan, PlannedTensor
from paft_merge.plan.adapter_output import TRANSPOSED
from paft_merge.plan.merged_deltas import MergedDelta, summands
from paft_merge.recipe import Recipe

_LARGEST = 3
"""Modules whose errors are listed."""


class MergedFactors(NamedTuple):
    """The factors of one delta, and statistics of its sources."""

    low: LowRank
    tally: Tally
    active: Sequence[int] = ()
    """The planned sources that the rows of `tally` belong to. Without a stream of the deltas, only their squared norms are known."""
    weights: Sequence[float] = ()
    """The weight of each planned source, if they were measured."""
    outside: float | None = None
    """Norm of what the sources' deltas have outside the subspaces of `space: ctm`, in which they were merged."""

    def noted(self) -> dict[str, Any]:
        """The entry of the journal: kept rank, norm of the delta, and norm of the difference."""
        noted = {"rank": self.low.left.shape[-1], "norm": self.low.norm, "error": self.low.error}
        if self.outside is not None:
            noted |= {"outside": self.outside, "sources": math.sqrt(math.fsum(self.tally.total()[:, _SQUARE]))}
        return noted


@dataclass(frozen=True)
class Factorization:
    """Factors of the deltas of one merge, each made once for the two tensors that are written from it.

    Attributes:
        recipe: of the merge.
        pool: computes the blocks.
        ops: operations of the device.
        tensors: the adapter's tensors that are still to be written.
    """

    recipe: Recipe
    pool: Executor
    ops: Ops
    tensors: Sequence[PlannedTensor]
    _made: dict[str, Lazy[MergedFactors]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        users = Counter(tensor.merged.name for tensor in self.tensors)
        for tensor in self.tensors:
            name = tensor.merged.name
            self._made.setdefault(name, Lazy(partial(self.factors_of, tensor), users[name]))

    def take(self, tensor: PlannedTensor) -> tuple[Any, MergedFactors]:
        """Return the stored bytes of one tensor of the adapter, and how it was made."""
        lazy = self._made[tensor.merged.name]
        made = lazy.get()
        stored = to_stored(as_peft(tensor, made.low), tensor.dtype)
        lazy.release()
        return stored, made

    def rank_needed(self, tensor: PlannedTensor) -> int:
        """The rank that keeps the recipe's `energy` of the delta of a tensor; at least 1."""
        made = self.factors_of(tensor, energy=self.recipe.output.energy)
        return max(1, int(made.low.left.shape[-1]))

    def factors_of(self, tensor: PlannedTensor, *, energy: float | None = None) -> MergedFactors:
        """Compute the factors of the delta that a tensor of the adapter is made from; at most of the tensor's rank.

        Args:
            tensor: either of the two tensors.
            energy: keep no more than this share of the squared norm needs.
        """
        delta, rank, tiles = tensor.merged, rank_of(tensor), BlockWalk([tensor.merged], self.pool)
        store = partial(rounded, dtype=tensor.dtype)
        rule, weights = delta.rule, tuple[float, ...]()
        try:
            if isinstance(rule, MeasuredWeights):
                measured = rule.measured(delta, tiles, self.ops)
                rule, weights = measured.resolved, measured.known or ()
            assert tensor.factor is not None
            if (made := _from_factors(tensor, rule, self.recipe, rank, energy)) is not None:
                return made._replace(weights=weights)
            rows = StreamedDelta.of(MergedDelta(delta, tensor.factor.subtracted), rule, self.pool, self.ops)
            limits: dict[str, Any] = (
                {"rank": rank} if energy is None else {"rank": None, "energy": energy, "max_rank": rank}
            )
            seed = stream_key(self.recipe.seed, "", delta.name, "sketch")
            if tensor.factor.layer in FUSED:

                def of_experts(first: int, chunk: Array) -> list[LowRank]:
                    matrices = enumerate(chunk.reshape(-1, *tensor.merged.shape[1:]), first)
                    return [approximate(_Held(one), **limits, seed=seed + at, store=store) for at, one in matrices]

                low = _joined(tensor, [one for part in rows.each(of_experts) for one in part])
            else:
                low = approximate(rows, **limits, seed=seed, store=store)
            return MergedFactors(low, rows.tally, delta.inputs.active if delta.inputs.deltas else (), weights)
        finally:
            delta.release()


def rank_of(tensor: PlannedTensor) -> int:
    """The rank of the factors that a tensor of the adapter belongs to."""
    assert tensor.factor is not None
    return tensor.shape[0 if tensor.factor.part == "A" else 1] // tensor.factor.experts


class _Held(NamedTuple):
    """A matrix in memory: `lowrank.range_finder.Rows`."""

    values: Array

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def each(self, work: Callable[[int, Array], T]) -> list[T]:
        return [work(0, self.values)]


def _joined(tensor: PlannedTensor, lows: Sequence[LowRank]) -> LowRank:
    """The factors of one delta from those of its matrices: of experts B `[E, O, K]` and A `[E, K, I]`.

    `singular` then has, for each i, the root of the sum of the squares of the experts' singular values i.
    """
    assert tensor.factor is not None
    if tensor.factor.layer not in FUSED:
        return lows[0]
    rank, known = (max(sizes) for sizes in zip(*((one.left.shape[1], len(one.singular)) for one in lows), strict=True))
    pairs = [padded((one.left, one.right), rank) for one in lows]
    singular = np.linalg.norm([np.pad(one.singular, (0, known - len(one.singular))) for one in lows], axis=0)
    error, norm = (
        math.sqrt(math.fsum(value**2 for value in values))
        for values in ([one.error for one in lows], [one.norm for one in lows])
    )
    return LowRank(np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs]), error, norm, singular)


def as_peft(tensor: PlannedTensor, low: LowRank) -> Array:
    """One factor as PEFT stores it, padded with zeros to the shape of the adapter's tensor."""
    assert tensor.factor is not None
    turned = tensor.factor.layer in TRANSPOSED
    pair = (low.left.swapaxes(-1, -2), low.right.swapaxes(-1, -2)) if turned else (low.right, low.left)
    made = pair[0] if tensor.factor.part == "A" else pair[1]
    if made.ndim == 3:
        return _packed(made, tensor)
    rows, columns = tensor.shape[0], int(np.prod(tensor.shape[1:]))
    out = np.zeros((rows, columns), np.float32)
    out[: made.shape[0], : made.shape[1]] = made
    return out.reshape(tensor.shape)


def _packed(made: Array, tensor: PlannedTensor) -> Array:
    """The factors A `[E, K, in]` or B `[E, out, K]` of experts in PEFT's order, padded to the rank R of the tensor."""
    assert tensor.factor is not None
    more = rank_of(tensor) - made.shape[1 if tensor.factor.part == "A" else 2]
    if tensor.factor.part == "A":
        return np.pad(made, ((0, 0), (0, more), (0, 0))).reshape(tensor.shape)
    return np.pad(made, ((0, 0), (0, 0), (0, more))).transpose(1, 2, 0).reshape(tensor.shape)


def to_stored(values: Array, dtype: str, key: int = 0, index: int = 0) -> Any:
    """The bytes of float32 values in a storage type; `key` and `index` as in `cast`."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if dtype not in RAW:
        return cast(flat, dtype, key, index)
    out = np.empty(flat.size, RAW[dtype])
    nothing = np.empty((0, flat.size), np.uint32)
    CpuOps().blend(Block(index, flat.view(np.uint32), nothing, subtract=False), out, 1.0, [], key, False)
    return out.view(np.uint8)


def rounded(values: Array, dtype: str) -> Array:
    """Float32 values after rounding to a storage type."""
    if dtype == "F32":
        return values
    out = np.empty(values.size, np.float32)
    widen(to_stored(values, dtype), dtype, out)
    return out.reshape(values.shape)


def _from_factors(
    tensor: PlannedTensor, rule: Any, recipe: Recipe, rank: int, energy: float | None
) -> MergedFactors | None:
    """The factors of a merged delta that follow from those of its sources; None if the delta has to be streamed.

    Args:
        tensor: of the adapter.
        rule: its rule, with weights and thresholds that are known.
        recipe: of the merge.
        rank: the largest rank.
        energy: as for `truncate`.
    """
    assert tensor.factor is not None
    store, outside = partial(rounded, dtype=tensor.dtype), None
    if tensor.factor.in_space:
        coordinates = Coordinates.of(tensor, recipe)
        low = coordinates.space.truncated(coordinates.merged(rule), rank, energy, store)
        outside = coordinates.space.outside if recipe.space == "ctm" else None
    elif (pairs := _sums_of_products(tensor, rule)) is not None:
        low = _joined(tensor, [_within(pair, rank, energy, store) for pair in pairs])
    else:
        return None
    inputs = tensor.merged.inputs
    tally = Tally.empty(len(inputs.active))
    sums = np.zeros((len(inputs.active), len(SUMS)))
    sums[:, _SQUARE] = [math.fsum(product_square(*pair) for pair in inputs.all_factors(i) or ()) for i in inputs.active]
    tally.sums.append(sums)
    norms = dict(zip(inputs.active, np.sqrt(sums[:, _SQUARE]), strict=True))
    if not tensor.factor.in_space and low.norm < _CANCELLED * sum(
        abs(weight) * norms[i] for i, weight in summands(inputs, rule) or ()
    ):
        zero = low.left[..., :0], low.right[..., :0, :]
        low = LowRank(*zero, 0.0, 0.0, low.singular[:0])
    return MergedFactors(low, tally, inputs.active, outside=outside)


_CANCELLED = 1e-6
"""A sum this small beside its terms is rounding: they cancel."""


_SQUARE = SUMS.index("square")


def _sums_of_products(tensor: PlannedTensor, rule: Any) -> list[Pair] | None:
    """Each matrix of a merged delta as one product, if the method adds up low-rank products; else None."""
    assert tensor.factor is not None
    delta, count, (outer, inner) = tensor.merged, tensor.factor.experts, tensor.factor.matrix
    inputs = delta.inputs
    added = summands(inputs, rule) if inputs.without_base else None
    if added is None:
        return None
    found = [inputs.all_factors(i) for i, _ in added]
    known = [pairs for pairs in found if pairs is not None and len(pairs) == count]
    if len(known) < len(found):
        return None
    if not known:
        return [(np.zeros((outer, 0), np.float32), np.zeros((0, inner), np.float32))] * count
    if not all(np.isfinite(factor).all() for pairs in known for pair in pairs for factor in pair):
        raise not_finite(delta.name)
    return [stacked(pairs, [weight for _, weight in added]) for pairs in zip(*known, strict=True)]


def _within(pair: Pair, rank: int, energy: float | None, store: Callable[[Array], Array]) -> LowRank:
    """A product as factors of at most `rank`: as it is if it fits, else its best approximation."""
    left, right = pair
    best = truncate(left, right, rank, energy, store)
    if energy is not None or left.shape[1] > rank:
        return best
    wide = left.astype(np.float64), right.astype(np.float64)
    return balanced(*wide, best.singular, best.norm, 0.0, store)


class Loss(NamedTuple):
    """What the rank and the storage type of an adapter cost, over all modules."""

    modules: int
    rank: int
    """Largest rank that a module uses; the others are padded with zeros."""
    norm: float
    """||D||_F of all merged deltas together."""
    error: float
    """||D - B A||_F of the stored factors together."""
    largest: Mapping[str, float]
    """Relative error of the modules where it is largest."""
    outside: float | None = None
    """Share of the squared norms of all sources that is outside the subspaces of `space: ctm`, and is lost before the merge."""

    @property
    def relative(self) -> float:
        """`error` relative to `norm`; 0 without a delta."""
        return self.error / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        found = {**self._asdict(), "relative_error": self.relative}
        return {name: value for name, value in found.items() if value is not None}


def loss_of(plan: MergePlan, finished: Mapping[str, Finished]) -> Loss | None:
    """Add up the errors of all factors; None for a checkpoint."""
    factors = [t for t in plan.tensors if t.factor and t.factor.part == "B"]
    noted = {t.factor.module: json.loads(finished[t.name].noted)["factors"] for t in factors if t.factor}
    return _summed(noted) if noted else None


def predicted_loss(plan: MergePlan) -> Loss | None:
    """Return the loss of the modules whose factors follow from those of the sources; None if there are none.

    With `rank: auto`, the rank that these modules need is found first.
    """
    output, found = plan.recipe.output, dict[str, PlannedTensor]()
    for tensor in plan.tensors:
        rule = tensor.merged.rule
        is_ready = rule.wants != "whole" and not rule.weighs and not rule.needs_model
        if tensor.factor and tensor.factor.part == "B" and is_ready:
            found[tensor.factor.module] = tensor

    def known(ranks: Mapping[str, int], energy: float | None) -> Iterator[tuple[str, MergedFactors]]:
        for module, rank in ranks.items():
            tensor = found[module]
            made = _from_factors(tensor, tensor.merged.rule, plan.recipe, rank, energy)
            tensor.release()
            if made is not None:
                yield module, made

    ranks = {module: rank_of(tensor) for module, tensor in found.items()}
    if output.rank == "auto":
        ranks = {module: max(1, one.low.left.shape[-1]) for module, one in known(ranks, output.energy)}
        ranks = dict.fromkeys(ranks, max(ranks.values(), default=1)) if output.portable else ranks
    noted = {module: one.noted() for module, one in known(ranks, None)}
    return _summed(noted) if noted else None


def _summed(noted: Mapping[str, Mapping[str, Any]]) -> Loss:
    """The loss of all modules from the `MergedFactors.noted` of each."""
    relative = {module: one["error"] / one["norm"] if one["norm"] else 0.0 for module, one in noted.items()}
    largest = dict(sorted(relative.items(), key=lambda item: -item[1])[:_LARGEST])
    norm, error = (math.sqrt(math.fsum(one[key] ** 2 for one in noted.values())) for key in ("norm", "error"))
    outside = None
    if any("outside" in one for one in noted.values()):
        lost, whole = (math.fsum(one[key] ** 2 for one in noted.values()) for key in ("outside", "sources"))
        outside = lost / whole if whole else 0.0
    return Loss(len(noted), max(one["rank"] for one in noted.values()), norm, error, largest, outside)


def check_loss(loss: Loss | None, most: float | None) -> None:
    """Raise MergeError MAX_ERROR if an adapter differs from the merged deltas by more than `most`, ADAPTER_OUTPUT if these are zero."""
    if loss is not None and not loss.norm:
        what = "every merged delta is zero: the sources do not differ from the base, or cancel each other"
        raise MergeError.of("ADAPTER_OUTPUT", "", what, "check that the right models are named, and their weights")
    if loss is not None and loss.relative > 1 - 1e-6:
        what = "the merged delta is so small that its factors are zero in the type that stores them"
        raise MergeError.of("ADAPTER_OUTPUT", "", what, "write out_dtype: float32")
    if loss is None or most is None or loss.relative <= most:
        return
    module, error = next(iter(loss.largest.items()))
    what = f"the relative error is {loss.relative:.4g}, more than max_error={most:g} (largest in {module}: {error:.4g})"
    raise MergeError.of("MAX_ERROR", "", what, "write a larger rank, or out_dtype: float32 if that is not given")
