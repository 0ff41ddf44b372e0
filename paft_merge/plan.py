"""The plan of a merge, from the recipe and headers alone: every output tensor, its inputs, its rule and its place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from paft_merge.agreement import compare_configs, compare_tensors, compare_tokenizers
from paft_merge.blocks import TILE, tile_bounds
from paft_merge.bridge import WholeTensor, as_mergekit
from paft_merge.checkpoint import DTYPES, Checkpoint
from paft_merge.errors import CheckpointError, Problem, Problems, RecipeError
from paft_merge.headers import capped
from paft_merge.reading import Inputs, Read, inputs_for
from paft_merge.recipe import ModelRef, Recipe, layer_t, resolve_all
from paft_merge.rules import Consensus, Rule, WeightedSum, row_of
from paft_merge.shards import Shard, plan_shards, split
from paft_merge.sparsify import stream_key

if TYPE_CHECKING:
    from paft_merge.adapters import Adapter

COPY = "copy"
"""The method of a tensor that no source changes: its bytes are copied."""

COPY_BYTES = 4 * TILE
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class Model:
    """One opened model reference: a checkpoint, and the adapter on it if there is one."""

    ref: str
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def read(self, name: str) -> Read:
        """How this model has the tensor `name`."""
        patch = self.adapter.patches.get(name) if self.adapter else None
        return Read(self.ref, self.checkpoint, (patch.beneath if patch else None) or name, patch)

    def has(self, name: str) -> bool:
        """Whether this model has a tensor `name`, stored or made by its adapter."""
        return name in self.checkpoint.tensors or bool(self.adapter and name in self.adapter.patches)

    def close(self) -> None:
        """Close the files of both; a second call does nothing."""
        self.checkpoint.close()
        if self.adapter:
            self.adapter.close()


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
    rule: Rule | WholeTensor
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Shared parameters after gradients and filters, and `sources`: one mapping a source."""
    rounding_key: int = 0
    """Stream of stochastic rounding; 0 rounds to nearest."""

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
        """Elements of a row: blocks are whole rows, as adapters' deltas are."""
        rows = {read.patch.row for read in self.inputs.reads if read.patch}
        return math.lcm(row_of(self.rule, self.shape), *(rows or {max(self.shape[-1] if self.shape else 1, 1)}))

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
        if self.method == COPY:
            return COPY_BYTES
        if isinstance(self.rule, WholeTensor):
            return self.numel * self.rule.bytes_per_element()
        elements = self.bounds[0][1] if self.bounds else 0
        return elements * 4 * (2 * len(self.inputs.reads) + 3)

    def release(self) -> None:
        """Let go of the adapters' factors, which are read when they are first needed."""
        for read in self.inputs.reads:
            if read.patch:
                read.patch.release()


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

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes of stored tensors and adapter files that one pass over all inputs reads."""
        reads = {(r.checkpoint.folder, r.name): r for t in self.tensors for r in t.inputs.reads}
        stored = [r.checkpoint.tensors[r.name].nbytes for r in reads.values()]
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


def plan_merge(
    recipe: Recipe,
    models: Mapping[ModelRef, Model],
    *,
    out_shard_bytes: int | None = None,
    allow_crimes: bool = False,
    allow_nonfinite: bool = False,
) -> MergePlan:
    """Plan a merge from headers.

    Args:
        recipe: a `models:` recipe.
        models: every model that the recipe refers to, opened.
        out_shard_bytes: largest size of an output file; None keeps the donor's files.
        allow_crimes: merge models whose configs differ where tensors do not show it (heads, rope, activation).
        allow_nonfinite: merge NaN and infinity as they come.

    Raises:
        RecipeError, CheckpointError: everything that headers show to be wrong, all at once.
    """
    _refuse_unplanned(recipe)
    planner = _Planner(recipe, models, allow_crimes)
    tensors = list(planner.tensors())
    planner.check_global_trim(tensors)
    if planner.problems.found:
        raise CheckpointError(capped(list(dict.fromkeys(planner.problems.found)), "the recipe"))
    shards = _layout(planner.donor.checkpoint, tensors, out_shard_bytes)
    order = {slot.name: i for i, slot in enumerate(slot for shard in shards for slot in shard.slots)}
    tensors.sort(key=lambda t: order[t.name])
    return MergePlan(
        recipe, tuple(models.values()), planner.donor, tuple(tensors), shards, planner.config(tensors),
        (*recipe.warnings, *planner.warnings), allow_nonfinite,
    )  # fmt: skip


def _refuse_unplanned(recipe: Recipe) -> None:
    """Parts of mergekit's language that have no plan yet: left out, they would make another merge than asked for."""
    language, problems = recipe.language, Problems()
    for key in ("slices", "modules", "tokenizer_source", "tokenizer", "chat_template"):
        if getattr(language, key):
            fix = "remove it, or merge this recipe with mergekit"
            problems.add("UNSUPPORTED", recipe.located.spot((key,)), f"{key} has no plan in this version", fix)
    if recipe.arithmetic == "mergekit" and recipe.rounding == "stochastic":
        where, fix = recipe.located.spot(("rounding",)), "remove one of the two"
        problems.add("RECIPE", where, "mergekit rounds to nearest, so its arithmetic has no stochastic rounding", fix)
    problems.raise_as(RecipeError)


class _Planner:
    """Walks the names of the donor and decides, for each, what is read and which rule merges it."""

    def __init__(self, recipe: Recipe, models: Mapping[ModelRef, Model], allow_crimes: bool) -> None:
        self.recipe, self.models = recipe, models
        self.method = recipe.method
        (self.slice,) = recipe.slices
        self.problems = Problems()
        self.warnings: list[Problem] = [w for m in models.values() if m.adapter for w in m.adapter.warnings]
        self.base = models[self.slice.base] if self.slice.base else None
        self.donor = self.base or models[self.slice.sources[0].ref]
        self.sources = [
            (source, models[source.ref])
            for source in self.slice.sources
            if self.method.base == "ignored" or source.ref != self.slice.base
        ]
        donor, others = (self.donor.ref, self.donor.checkpoint), self._others()
        if not allow_crimes:
            compare_configs(donor, others, self.problems)
        self.faulty = compare_tensors(donor, others, self.problems)
        self.warnings += compare_tokenizers(donor, others)

    def _others(self) -> list[tuple[str, Checkpoint]]:
        """Every checkpoint beside the donor's, once, by the first reference that leads to it."""
        sources = {id(m.checkpoint): (str(source.ref.base), m.checkpoint) for source, m in reversed(self.sources)}
        sources.pop(id(self.donor.checkpoint), None)
        return list(reversed(sources.values()))

    def tensors(self) -> Iterator[PlannedTensor]:
        """Every output tensor in the donor's order, then those that untying adds."""
        layers = _Layers(self.names)
        for name in (name for name in self.names if self.untied.get(name, name) not in self.faulty):
            with self.problems.catching():
                yield self._tensor(name, layers.place(name))

    def check_global_trim(self, tensors: Sequence[PlannedTensor]) -> None:
        """One ranking over the whole model needs one trim for the whole model."""
        trims = {t.rule.thin for t in tensors if isinstance(t.rule, Consensus) and t.rule.trim_scope == "global"}
        if len(trims) > 1:
            self.problems.add(
                "RECIPE", self.recipe.located.spot(("parameters", "trim_scope")),
                "global ranks all tensors together, but the trim of a source is not the same for all of them",
                "give each source one density (or l1_mass, epsilon) without gradients and filters",
            )  # fmt: skip

    @cached_property
    def untied(self) -> dict[str, str]:
        """Tensors that the donor does not store, being tied, but an adapter parts: name to what lies beneath."""
        adapters = [m.adapter for m in (self.base, *(model for _, model in self.sources)) if m and m.adapter]
        stored = self.donor.checkpoint.tensors
        return {name: under for a in adapters for name, under in a.unties.items() if name not in stored}

    @cached_property
    def names(self) -> list[str]:
        return [*self.donor.checkpoint.tensors, *self.untied]

    def _tensor(self, name: str, t: float) -> PlannedTensor:
        under = self.untied.get(name)
        base = self._read(self.base, name, under) if self.base and self.method.base != "ignored" else None
        sources = [self._read(model, name, under) for _, model in self.sources]
        shape = max((r.shape for r in [*([base] if base else []), *sources]), key=math.prod)
        stored = self._read(self.donor, name, under)
        kind = DTYPES[stored.dtype]
        if not all(DTYPES[read.dtype].mergeable for read in (stored, *sources)):
            return self._verbatim(name, stored, sources)
        self._check_quantised(name, stored, sources)
        shared, per_source = self._parameters(name, t)
        keys = [stream_key(self.recipe.seed, model.ref, name, "drop") for _, model in self.sources]
        rule = self._rule(per_source, shared, keys)
        dtype = self._out_dtype(kind.name, rule, [*([base] if base else []), *sources])
        if base and rule.wants == "values":  # the base is the first of the values (slerp)
            sources, per_source = [base, *sources], [{}, *per_source]
            base = None
        inputs = inputs_for(base, sources, rule.wants)
        parameters = {**shared, "sources": per_source}
        rounding = self.recipe.rounding == "stochastic" and DTYPES[dtype].bits < 32
        key = stream_key(self.recipe.seed, "", name, "round") if rounding else 0
        if inputs.unchanged and rule.keeps_equals:
            only = base or stored
            inputs, rule = Inputs.one(only), WeightedSum((), "deltas")
            if only.patch is None and stored.dtype == dtype:
                return PlannedTensor(name, shape, dtype, COPY, inputs, rule)
        return PlannedTensor(name, shape, dtype, self.method.name, inputs, rule, parameters, key)

    def _read(self, model: Model, name: str, under: str | None) -> Read:
        """How `model` has the tensor; `under`: what stands in for it where it is tied and the model leaves it so."""
        return model.read(name if under is None or model.has(name) else under)

    def _verbatim(self, name: str, stored: Read, sources: Sequence[Read]) -> PlannedTensor:
        """A tensor of integers or the like: equal everywhere, or there is no merge."""
        for read in sources:
            if read.patch or not (read.same_weight(stored) or _equal(read, stored)):
                raise CheckpointError.of(
                    "DTYPE_UNSUPPORTED", f"{read.source}: {name}",
                    f"is {read.dtype} and differs from that of {stored.source}, which is {stored.dtype}",
                    "only floating-point tensors can be merged; dequantise the models first",
                )  # fmt: skip
        return PlannedTensor(name, stored.shape, stored.dtype, COPY, Inputs.one(stored), WeightedSum((), "deltas"))

    def _check_quantised(self, name: str, stored: Read, sources: Sequence[Read]) -> None:
        scales = [f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}weight_scale"]
        scale = next((s for s in scales if s in stored.checkpoint.tensors), None)
        if scale and any(read.patch or not read.same_weight(stored) for read in sources):
            raise CheckpointError.of(
                "DTYPE_UNSUPPORTED", f"{stored.source}: {name}",
                f"is quantised: its values count only together with {scale}",
                "dequantise the model first, and merge that",
            )  # fmt: skip

    def _parameters(self, name: str, t: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The values of all parameters for one tensor: the shared ones, and one mapping a source."""
        shared = resolve_all(self.slice.levels, self.method, "shared", name, t)
        per_source = [
            resolve_all(source.levels, self.method, "source", name, t, model=source.ref) for source, _ in self.sources
        ]
        return {k: r.value for k, r in shared.items()}, [{k: r.value for k, r in one.items()} for one in per_source]

    def _rule(self, per_source: list[dict[str, Any]], shared: dict[str, Any], keys: list[int]) -> Rule | WholeTensor:
        recipe = self.recipe
        try:
            if recipe.arithmetic == "mergekit":
                return as_mergekit(self.method, per_source, shared, keys[0], recipe.dtype, recipe.out_dtype)
            return self.method.rule(per_source, shared, keys)
        except ValueError as error:  # numbers that are sound one by one and not together
            raise RecipeError.of("PARAM_RANGE", self.slice.spot, str(error)) from error

    def _out_dtype(self, stored: str, rule: Rule | WholeTensor, reads: Sequence[Read]) -> str:
        """The type that the recipe asks for, else the donor's own; with mergekit's arithmetic, what its method gives."""
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if isinstance(rule, WholeTensor) and rule.baked:
            wanted = rule.result_dtype([str(DTYPES[read.dtype].torch) for read in reads])
        return stored if wanted is None else next(d.name for d in DTYPES.values() if d.torch == wanted)

    def config(self, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
        """What the merge changes in `config.json`: the dtype, a vocabulary that grew, a tie that was cut."""
        config, old = self.donor.checkpoint.config, self.donor.checkpoint.tensors
        dtype = self.recipe.out_dtype or self.recipe.dtype
        rows = {old[t.name].shape[:1]: t.shape[0] for t in tensors if t.name in old and t.shape != old[t.name].shape}
        changes = _changes(config, dtype, {count: new for (count,), new in rows.items()}, bool(self.untied))
        if dtype and not {"dtype", "torch_dtype"} & config.keys():
            changes["dtype"] = dtype
        if any(m.adapter.unties for m in (self.base, *(model for _, model in self.sources)) if m and m.adapter):
            changes["tie_word_embeddings"] = False
        return changes


def _changes(config: Mapping[str, Any], dtype: str | None, rows: Mapping[int, int], untied: bool) -> dict[str, Any]:
    """What has to change in a config, and in the configs inside it; `rows`: an embedding's rows before and after."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            new: Any = dtype or value
        elif key == "vocab_size":
            new = rows.get(value, value)
        elif key == "tie_word_embeddings":
            new = value and not untied
        elif key.endswith("_config") and isinstance(value, Mapping):
            new = {**value, **_changes(value, dtype, rows, untied)}
        else:
            continue
        if new != value:
            changes[key] = new
    return changes


def _equal(one: Read, other: Read) -> bool:
    """Whether two stored tensors are the same bytes of the same type."""
    infos = [read.checkpoint.tensors[read.name] for read in (one, other)]
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return False
    for start in range(0, infos[0].nbytes, COPY_BYTES):
        held = [bytearray(min(COPY_BYTES, infos[0].nbytes - start)) for _ in infos]
        for read, buffer in zip((one, other), held, strict=True):
            read.checkpoint.read_into(read.name, start, buffer)
        if held[0] != held[1]:
            return False
    return True


class _Layers:
    """Where a tensor stands in the stack of layers, for gradients: 0 for the first layer, 1 for the last.

    A layer is the first numbered segment of a name; layers are counted among the names that share what comes before it.
    Tensors outside of layers (embeddings, last norm, head) stand at 0, a single layer at 1, as in mergekit.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.last: dict[str, int] = {}
        for name in names:
            if found := _LAYER.match(name):
                self.last[found[1]] = max(self.last.get(found[1], 0), int(found[2]))

    def place(self, name: str) -> float:
        """The `t` of a tensor, in [0, 1]."""
        found = _LAYER.match(name)
        if not found:
            return 0.0
        return layer_t(int(found[2]), self.last[found[1]] + 1)


_LAYER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*?)(\d+)\.")


def _layout(donor: Checkpoint, tensors: Sequence[PlannedTensor], out_shard_bytes: int | None) -> tuple[Shard, ...]:
    """The output's files: the donor's own, unless a size is given or the donor is no safetensors checkpoint."""
    rows = [(t.name, t.dtype, t.shape) for t in tensors]
    if out_shard_bytes is not None or not all(f.name.endswith(".safetensors") for f in donor.files):
        return plan_shards(split(rows, out_shard_bytes or 5_000_000_000))
    last = donor.files[-1].name
    files: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {f.name: [] for f in donor.files}
    for row in rows:
        info = donor.tensors.get(row[0])
        files[info.file if info else last].append(row)
    return plan_shards(files, {f.name: f.metadata for f in donor.files if f.metadata})
