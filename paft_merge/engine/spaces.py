"""Merges inside a space of the adapters (`space: core`, `knots`, `ctm`): a rule on the coordinates of the deltas of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from paft_merge.compute.blocks import Block, tile_bounds
from paft_merge.engine.streamed_deltas import not_finite
from paft_merge.errors import MergeError
from paft_merge.lowrank.core_space import Space, core_of
from paft_merge.lowrank.ctm import compressed_of
from paft_merge.lowrank.factors import Pair
from paft_merge.lowrank.knots import knots_of
from paft_merge.methods.rules.rule import Rule, WholeRule
from paft_merge.methods.rules.whole_tensors import Array, merge_arrays
from paft_merge.plan import PlannedTensor
from paft_merge.recipe import Recipe


class Coordinates:
    """The coordinates of the deltas of one tensor, as a tensor that is merged: a `TiledTensor` and a `SourcedTensor`.

    Args:
        delta: the merged delta, whose sources are low-rank products.
        make: makes the space of such products.
    """

    def __init__(self, delta: PlannedTensor, make: Callable[[Sequence[Pair]], Space]) -> None:
        self.delta, self._make = delta, make
        self._space: Space | None = None

    @classmethod
    def of(cls, tensor: PlannedTensor, recipe: Recipe) -> Coordinates:
        """The coordinates of the delta that a tensor of an adapter is made from, in the recipe's space."""
        if recipe.space == "ctm":
            assert isinstance(recipe.output.rank, int)
            return cls(tensor.merged, partial(compressed_of, rank=recipe.output.rank))
        return cls(tensor.merged, core_of if recipe.space == "core" else knots_of)

    @property
    def name(self) -> str:
        """As the delta's."""
        return self.delta.name

    @property
    def source_names(self) -> Sequence[str]:
        """As the delta's."""
        return self.delta.source_names

    @property
    def products(self) -> Sequence[Pair | None] | None:
        """As the delta's: norms are those of the deltas, which their coordinates share."""
        return self.delta.products

    @property
    def space(self) -> Space:
        """The space, made at the first use.

        Raises:
            MergeError: NONFINITE, or LOW_RANK: a delta that is not a low-rank product.
        """
        if self._space is None:
            pairs = self.delta.products
            if pairs is None:
                fix = "leave the tensor out of this source, or write space: weight with a number as rank"
                raise MergeError.of("LOW_RANK", self.name, "the delta of a source is not one low-rank product", fix)
            known = {i: pair for i, pair in enumerate(pairs) if pair is not None}
            if not all(np.isfinite(factor).all() for pair in known.values() for factor in pair):
                raise not_finite(self.name)
            made = self._make([*known.values()])
            zero = np.zeros_like(made.coordinates[0])
            at = dict(zip(known, made.coordinates, strict=True))
            self._space = made._replace(coordinates=[at.get(i, zero) for i in range(len(pairs))])
        return self._space

    @property
    def shape(self) -> tuple[int, int]:
        """K, L."""
        rows, columns = self.space.coordinates[0].shape
        return rows, columns

    @property
    def row(self) -> int:
        """Elements that the rule needs together."""
        rule = self.delta.rule
        return 1 if rule.wants == "whole" else rule.row(self.shape)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Flat `[start, stop)` of every block."""
        return tile_bounds(self.shape[0] * self.shape[1], self.row)

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Coordinates `[start, stop)`; see `TiledTensor`."""
        rows = range(len(self.delta.inputs.sources)) if all_sources else self.delta.inputs.active
        sources = np.stack([self.array(i).reshape(-1)[start:stop] for i in rows])
        return Block(start, np.zeros(stop - start, np.uint32), sources.view(np.uint32), subtract=False)

    def array(self, source: int) -> Array:
        """The coordinates of one source, float32."""
        return self.space.coordinates[source].astype(np.float32)

    def release(self) -> None:
        """Free the space and the factors."""
        self._space = None
        self.delta.release()

    def merged(self, rule: Rule | WholeRule) -> Any:
        """The coordinates of the merged delta, `[K, L]` float32."""
        assert rule.wants != "whole"
        active = self.delta.inputs.active
        try:
            return merge_arrays(rule, [self.array(i) for i in active], active)
        except ValueError as error:
            raise not_finite(self.name) from error
