"""`MergePlan` and its tensors."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from paft_merge.compute.blocks import TILE, Block, tile_bounds
from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.adapters.deltas import FUSED, LayerKind
from paft_merge.inputs.checkpoint import DTYPES
from paft_merge.inputs.models import Model
from paft_merge.inputs.quantized.weights import QuantizedWeight
from paft_merge.inputs.tensor_inputs import Inputs, Read
from paft_merge.methods.rules.rule import Rule, WholeRule
from paft_merge.output.shards import Shard
from paft_merge.plan.formatting import html_lines, html_table, show_bytes, show_value
from paft_merge.plan.output_tensors import OutputTensor
from paft_merge.plan.side_files import SideFiles
from paft_merge.plan.vocabulary import Vocabulary
from paft_merge.recipe import Recipe

COPY = "copy"
"""The method of a tensor that no source changes: its bytes are copied."""

COPY_BYTES = 4 * TILE
"""Bytes that are copied at a time."""


class TensorKind(NamedTuple):
    """What the tensors of one row of a summary have in common."""

    method: str
    inputs: str
    dtype: str
    parameters: str


class Factor(NamedTuple):
    """What a tensor of an adapter is a factor of."""

    module: str
    """The module, as PEFT names it."""
    layer: LayerKind
    part: Literal["A", "B"]
    delta: PlannedTensor
    """The merged delta, as a tensor of the base's shape: its blocks have no base."""
    subtracted: Read | None = None
    """The base's tensor, where the delta is what the method writes minus it; None if the method writes the delta itself."""
    in_space: bool = False
    """Whether the method merges the deltas' coordinates in a space of the adapters, so that no delta is computed."""
    wrapper: str = ""
    """PEFT's name of a wrapper of experts, before `lora_A`; empty of other layers."""

    @property
    def experts(self) -> int:
        """Number of matrices in the delta: one for each of the experts in one tensor."""
        return self.delta.shape[0] if self.layer in FUSED else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """O, I of each matrix."""
        return matrix_of(self.delta.shape, self.layer)


def matrix_of(shape: tuple[int, ...], layer: LayerKind) -> tuple[int, int]:
    """O, I of a delta, or of each of the experts in one."""
    outer, *inner = shape[1:] if layer in FUSED else shape
    return outer, math.prod(inner)


class StoredBlock(NamedTuple):
    """The entries of one block of a sparse delta."""

    place: int
    """Number of stored entries before them."""
    entries: int
    """Entries that are not zero."""
    zeros: int = 0
    """Zeros that are stored too: SHiRA has room for more entries than the delta."""


class SparsePart(NamedTuple):
    """What a tensor of a sparse delta holds (see `inputs.adapters.sparse_delta`)."""

    part: Literal["mask", "values", "delta", "indices"]
    delta: PlannedTensor
    """The merged delta, as a tensor of the base's shape, in float32."""
    subtracted: Read | None = None
    """As in `Factor`."""
    blocks: Mapping[int, StoredBlock] = {}
    """Of `values`: every block of the delta by its first element."""
    module: str = ""
    """Of SHiRA: the module, as PEFT names it."""


class CodedPart(NamedTuple):
    """A stored tensor of a weight that is merged and rounded to codes with scales again."""

    weight: PlannedTensor
    """The merged weight, in float32."""
    written: QuantizedWeight
    """The weight as its model stores it."""
    template: Read
    """The same, as float32 values."""
    place: int
    """0 for the codes, which have the statistics of the weight."""


class StreamedTensor:
    """A tensor that is read block by block."""

    shape: tuple[int, ...]
    inputs: Inputs
    rule: Rule | WholeRule | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def row(self) -> int:
        """Elements of a row; a block is a number of whole rows."""
        rule = self.rule
        return self.inputs.row_size(self.shape, 1 if rule is None or rule.wants == "whole" else rule.row(self.shape))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Flat `[start, stop)` of every block."""
        return tile_bounds(self.numel, self.row)

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Read elements `[start, stop)`; see `Inputs.block`."""
        return self.inputs.block(start, stop, all_sources=all_sources)

    @property
    def source_names(self) -> list[str]:
        """The reference of each source."""
        return [read.source for read in self.inputs.sources]

    @property
    def products(self) -> list[tuple[Any, Any] | None] | None:
        """Of each source, the factors whose product its delta is, or None without a delta; None if a delta is not a product."""
        found = {i: self.inputs.factors(i) for i in self.inputs.active}
        return None if None in found.values() else [found.get(i) for i in range(len(self.inputs.sources))]

    def release(self) -> None:
        """Free the factors of the adapters; they are read again when needed."""
        self.inputs.release()


@dataclass(frozen=True)
class PlannedTensor(StreamedTensor):
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Storage type, as safetensors names it."""
    method: str
    """A key of `METHODS`, or `copy`."""
    inputs: Inputs
    rule: Rule | WholeRule
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Shared parameters after gradients and filters, and `sources`: one mapping for each source. Of a router that is not merged as other
    tensors, `router` instead of the method's."""
    rounding_key: int = 0
    """Stream of stochastic rounding; 0 rounds to nearest."""
    place: OutputTensor | None = field(default=None, compare=False)
    """The place in the recipe's slices and modules."""
    why: str = ""
    """Why the tensor is copied."""
    is_delta: bool = False
    """Whether it is a merged delta, of which blocks hold whole rows `[I]` of `[O, I]`."""
    factor: Factor | None = field(default=None, compare=False)
    """Of a tensor of an adapter: the merged delta that it is a factor of. `inputs` and `rule` are those of the delta."""

    sparse: SparsePart | None = field(default=None, compare=False)
    """Of a tensor of a sparse delta: the merged delta whose entries it holds. `inputs` and `rule` are those of the delta."""
    coded: CodedPart | None = field(default=None, compare=False)
    """Of codes or scales: the merged weight. `inputs` and `rule` are those of the weight."""
    together: int = 1
    """Entries that are written together, which a block holds whole."""

    def __repr__(self) -> str:
        return f"PlannedTensor({self.name!r}, {self.method!r}, {self.dtype}, {self.shape}, {len(self.inputs.sources)} sources)"

    @property
    def width(self) -> int:
        """Bytes of one element in the output."""
        return DTYPES[self.dtype].bits // 8

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @property
    def tile_bytes(self) -> int:
        """Bytes of a block in the output; a digest is computed block by block."""
        if self.method == COPY or self.merged is not self:
            return COPY_BYTES
        return max((self.bounds[0][1] if self.bounds else 0) * self.width, 1)

    @property
    def block_bytes(self) -> int:
        """Approximate working memory of one block: every input and intermediate, as float32."""
        return self._block_bytes + sum(read.checkpoint.working_bytes(read.name) for read in self.inputs.reads)

    @property
    def merged(self) -> PlannedTensor:
        """The tensor that the method merges: of an adapter's tensor, the delta; of codes, the weight; else the tensor itself."""
        if self.coded:
            return self.coded.weight
        made_of = self.factor or self.sparse
        return made_of.delta if made_of else self

    @cached_property
    def row(self) -> int:
        """Elements of a row; of a merged delta the last dimensions together, which are a row of its factors."""
        own = math.lcm(super().row, self.together)
        return math.lcm(own, self.numel // max(self.shape[0], 1)) if self.is_delta else own

    def with_rule(self, rule: Rule) -> PlannedTensor:
        """The tensor with a rule whose weights or thresholds are known."""
        factor = self.factor and self.factor._replace(delta=replace(self.factor.delta, rule=rule))
        sparse = self.sparse and self.sparse._replace(delta=replace(self.sparse.delta, rule=rule))
        coded = self.coded and self.coded._replace(weight=replace(self.coded.weight, rule=rule))
        return replace(self, rule=rule, factor=factor, sparse=sparse, coded=coded)

    @property
    def _block_bytes(self) -> int:
        if self.factor and self.factor.in_space:  # the factors of all sources in float64, and bases of as many vectors
            rank = sum(read.delta.rank for read in self.inputs.sources if read.delta)
            shape = self.factor.delta.shape
            return 4 * 8 * rank * (shape[0] + math.prod(shape[1:]))
        if self.coded:  # the codes and the values that are tried for two scales
            return self.merged.block_bytes + 40 * self.merged.bounds[0][1]
        if self.merged is not self:
            return self.merged.block_bytes
        if self.method == COPY:
            return 2 * COPY_BYTES  # one is written while the other is read
        if self.rule.wants == "whole":
            return self.numel * self.rule.bytes_per_element()
        elements = self.bounds[0][1] if self.bounds else 0
        return elements * 4 * (2 * len(self.inputs.reads) + 3)

    def weighed(self, weights: Sequence[float]) -> PlannedTensor:
        """Return the tensor with measured weights in its parameters; without any, the same."""
        if not weights:
            return self
        pairs = zip(self.parameters["sources"], weights, strict=True)
        return replace(
            self, parameters={**self.parameters, "sources": [{**one, "weight": weight} for one, weight in pairs]}
        )

    @property
    def kind(self) -> TensorKind:
        """The row of a summary that this tensor belongs to."""
        if self.method == COPY:
            router = self.parameters.get("router")
            return TensorKind(COPY, "", self.dtype, f"router={router}" if router else "")
        adapters = Counter(read.delta.kind for read in self.inputs.sources if read.delta)
        inputs = ", ".join(f"{n} x {kind}" for kind, n in sorted(adapters.items())) or self.inputs.form
        sources = self.parameters.get("sources", [])
        names = dict.fromkeys(name for source in sources for name in source)
        shown = {name: [source.get(name) for source in sources] for name in names}
        shown |= {name: value for name, value in self.parameters.items() if name != "sources"}
        text = " ".join(f"{name}={show_value(value)}" for name, value in shown.items())
        return TensorKind(self.method, inputs, self.dtype, text)

    def to_json(self) -> dict[str, Any]:
        """Return the tensor with its inputs and resolved parameters as plain data."""
        inputs = self.inputs
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "method": self.method,
            "form": inputs.form,
            "base": inputs.base.source if inputs.base else None,
            "sources": [read.source for read in inputs.sources],
            "adapters": {read.source: read.delta.kind for read in inputs.sources if read.delta},
            "parameters": dict(self.parameters),
        }


@dataclass(frozen=True, repr=False)
class MergePlan:
    """Everything that a merge will do, known from the recipe and the headers of its inputs."""

    recipe: Recipe
    models: tuple[Model, ...]
    config_source: Model
    """The model that gives the output its tensor names, order, config and tokenizer: the base, or the first model."""
    tensors: tuple[PlannedTensor, ...]
    """In output order."""
    shards: tuple[Shard, ...]
    """The files of the output."""
    config: Mapping[str, Any]
    """Changes to the config source's `config.json`."""
    warnings: tuple[Problem, ...]
    allow_nonfinite: bool = False
    vocabulary: Vocabulary | None = None
    """The output's tokenizer and chat template; None: those of the config source."""
    side_files: SideFiles = field(default_factory=SideFiles)
    """The other files of the config source."""

    def __repr__(self) -> str:
        method, models, tensors = self.recipe.merge_method, len(self.models), len(self.tensors)
        return f"MergePlan({method!r}, {models} models, {tensors:,} tensors, {show_bytes(self.bytes_written)})"

    def _repr_html_(self) -> str:
        head = ("tensors", "method", "inputs", "output", "parameters")
        rows = [(f"{count:,}", *kind) for kind, count in self.summary()]
        return html_lines([repr(self)]) + html_table(rows, head)

    def summary(self, limit: int = 12) -> list[tuple[TensorKind, int]]:
        """Count the tensors of each kind, most frequent first; kinds beyond `limit` are counted together."""
        kinds = Counter(tensor.kind for tensor in self.tensors).most_common()
        rest = sum(count for _, count in kinds[limit:])
        return kinds[:limit] + [(TensorKind("...", "", "", "other parameters"), rest)] * bool(rest)

    def to_json(self, out: Path | str | None = None) -> dict[str, Any]:
        """Return the whole plan as plain data: sizes, files, and every tensor with its inputs and parameters.

        Args:
            out: folder to be written, whose disk `bytes_free` is about; the current folder by default, null at a URL.
        """
        return {
            "recipe": self.recipe.resolved(),
            "arithmetic": self.recipe.arithmetic,
            "bytes_read": self.bytes_read,
            "bytes_on_hub": self.bytes_on_hub,
            "bytes_written": self.bytes_written,
            **({"bytes_written_at_most": True} if self.recipe.output.kind == "delta" else {}),
            "bytes_free": bytes_free(out),
            "files": {shard.file: shard.size for shard in self.shards},
            "config": dict(self.config),
            "vocabulary": dict(self.vocabulary.facts) if self.vocabulary else {},
            "warnings": [str(warning) for warning in self.warnings],
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }

    @property
    def bytes_written(self) -> int:
        """Size of the weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def stored_reads(self) -> list[Read]:
        """The reads whose stored tensors are read; none where adapters are merged to an adapter."""
        made_of = [tensor.factor or tensor.sparse for tensor in self.tensors]
        subtracted = [one.subtracted for one in made_of if one and one.subtracted]
        return [*(read for tensor in self.tensors for read in tensor.inputs.stored), *subtracted]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors and adapter files that one pass over all inputs reads."""
        reads = {read.stored_at: read for read in self.stored_reads}
        stored = [r.checkpoint.bytes_read(r.name) for r in reads.values()]
        adapters = {a.folder: a.fingerprint() for m in self.models if m.adapter for a in m.adapter.parts}
        return sum(stored) + sum(int(file["size"]) for files in adapters.values() for file in files.values())

    @property
    def bytes_on_hub(self) -> int:
        """Bytes of input files that are read, and are on the Hub and not in its cache."""
        return sum(_files_on_hub(self).values())

    def check_inputs_unchanged(self) -> None:
        """Raise `CheckpointError` INPUT_CHANGED if an input file changed since it was opened."""
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


def bytes_free(out: Path | str | None) -> int | None:
    """Return the free bytes of the disk that `out` (default: the current folder) is on, whether it exists or not; None at a URL."""
    if isinstance(out, str):
        return None
    folder = (out or Path()).resolve()
    return shutil.disk_usage(next(path for path in [folder, *folder.parents] if path.exists())).free


def _files_on_hub(plan: MergePlan) -> dict[tuple[Path, str], int]:
    found: dict[tuple[Path, str], int] = {}
    is_read = bool(plan.stored_reads)
    for model in plan.models:
        adapters = [part.file for part in model.adapter.parts] if model.adapter else []
        for checkpoint in [*([model.checkpoint] if is_read else []), *adapters]:
            found |= {(checkpoint.folder, name): size for name, size in checkpoint.far.items()}
        if isinstance(inner := getattr(model.checkpoint, "plan", None), MergePlan):
            found |= _files_on_hub(inner)
    return found
