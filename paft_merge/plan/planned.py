"""What a plan is made of: opened models, the tensors of the output, and all of it together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from paft_merge.compute.blocks import TILE, tile_bounds
from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.checkpoint import DTYPES
from paft_merge.inputs.models import Model
from paft_merge.inputs.tensor_inputs import Inputs
from paft_merge.methods.rules.rule import Rule, WholeRule, row_of
from paft_merge.output.shards import Shard
from paft_merge.plan.output_tensors import OutputTensor
from paft_merge.plan.vocabulary import Vocabulary
from paft_merge.recipe import Recipe

COPY = "copy"
"""The method of a tensor that no source changes: its bytes are copied."""

COPY_BYTES = 4 * TILE
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Storage type, as safetensors names it."""
    method: str
    """A name of METHODS, or `copy`."""
    inputs: Inputs
    rule: Rule | WholeRule
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Shared parameters after gradients and filters, and `sources`: one mapping a source."""
    rounding_key: int = 0
    """Stream of stochastic rounding; 0 rounds to nearest."""
    place: OutputTensor | None = field(default=None, compare=False)
    """Where the recipe puts it."""
    why: str = ""
    """Why it is copied."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of an element in the output."""
        return DTYPES[self.dtype].bits // 8

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].bits // 8

    @cached_property
    def row(self) -> int:
        """Elements of a row, of which blocks hold whole ones."""
        return self.inputs.row(self.shape, row_of(self.rule, self.shape))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Flat `[start, stop)` of every block."""
        return tile_bounds(self.numel, self.row)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a block in the output, by which it is digested."""
        if self.method == COPY:
            return COPY_BYTES
        return max((self.bounds[0][1] if self.bounds else 0) * self.width, 1)

    @property
    def block_bytes(self) -> int:
        """Working memory of one block, about: every input and what is computed from it, float32."""
        beneath = sum(read.checkpoint.working_bytes(read.name) for read in self.inputs.reads)
        return beneath + self._block_bytes

    @property
    def _block_bytes(self) -> int:
        if self.method == COPY:
            return 2 * COPY_BYTES  # one is written while the other is read
        if self.rule.wants == "whole":
            return self.numel * self.rule.bytes_per_element()
        elements = self.bounds[0][1] if self.bounds else 0
        return elements * 4 * (2 * len(self.inputs.reads) + 3)

    def release(self) -> None:
        """Let go of the adapters' factors, which are read when they are first needed."""
        self.inputs.release()


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do."""

    recipe: Recipe
    models: tuple[Model, ...]
    donor: Model
    """Whose names, order, files and side files the output has: the base, or the first model."""
    tensors: tuple[PlannedTensor, ...]
    """In the order they are written."""
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    """What changes in the donor's `config.json`."""
    warnings: tuple[Problem, ...]
    allow_nonfinite: bool = False
    vocabulary: Vocabulary | None = None
    """The output's tokenizer and chat template; None: the donor's."""

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes of stored tensors and adapter files that one pass over all inputs reads."""
        reads = {(r.checkpoint.place, r.name): r for t in self.tensors for r in t.inputs.reads}
        stored = [r.checkpoint.bytes_behind(r.name) for r in reads.values()]
        adapters = {m.adapter.folder: m.adapter.fingerprint() for m in self.models if m.adapter}
        return sum(stored) + sum(int(file["size"]) for files in adapters.values() for file in files.values())

    def check_inputs_unchanged(self) -> None:
        """Raise CheckpointError INPUT_CHANGED when a file is not what it was when it was opened."""
        problems = Problems()
        for model in self.models:
            with problems.catching():
                model.checkpoint.check_unchanged()
            if model.adapter:
                with problems.catching():
                    model.adapter.check_unchanged()
        problems.raise_as(CheckpointError)

    def close(self) -> None:
        """Close every input."""
        for model in self.models:
            model.close()
