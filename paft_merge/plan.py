"""The plan of a merge, from the recipe and from headers alone: every output tensor, its inputs, its rule and its place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from paft_merge.adapters import Adapter
from paft_merge.blocks import tile_bounds
from paft_merge.checkpoint import DTYPES, Checkpoint
from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.reading import Inputs, Read, inputs_for
from paft_merge.recipe import ModelRef, Recipe, layer_t, resolve_all
from paft_merge.rules import Rule, WeightedSum
from paft_merge.shards import Shard, plan_shards, split
from paft_merge.sparsify import stream_key

COPY = "copy"
"""The method of a tensor that no source changes: its bytes are copied."""


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
    rule: Rule
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
        return math.lcm(*rows) if rows else max(self.shape[-1] if self.shape else 1, 1)

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Flat `[start, stop)` of every block."""
        return tile_bounds(self.numel, self.row)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a block in the output, by which it is digested."""
        return max((self.bounds[0][1] if self.bounds else 0) * self.width, 1)

    @property
    def block_bytes(self) -> int:
        """Working memory of one block, about: every input and what is computed from it, float32."""
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
        stored = {(r.checkpoint.folder, r.name): r.checkpoint.tensors[r.name].nbytes for t in self.tensors for r in t.inputs.reads}
        adapters = {m.adapter.folder: m.adapter.nbytes for m in self.models if m.adapter}
        return sum(stored.values()) + sum(adapters.values())

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
        """Close every checkpoint."""
        for model in self.models:
            model.checkpoint.close()


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
    planner = _Planner(recipe, models, allow_crimes)
    tensors = list(planner.tensors())
    planner.problems.raise_as(CheckpointError)
    shards = _layout(planner.donor.checkpoint, tensors, out_shard_bytes)
    order = {slot.name: i for i, slot in enumerate(slot for shard in shards for slot in shard.slots)}
    tensors.sort(key=lambda t: order[t.name])
    return MergePlan(
        recipe, tuple(models.values()), planner.donor, tuple(tensors), shards, planner.config(tensors),
        tuple([*recipe.warnings, *planner.warnings]), allow_nonfinite,
    )  # fmt: skip


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
        if not allow_crimes:
            self._compare_configs()
        self._compare_names()
        self._compare_tokenizers()

    def tensors(self) -> Iterator[PlannedTensor]:
        """Every output tensor in the donor's order, then those that untying adds."""
        layers = _Layers(self.names)
        for name in self.names:
            with self.problems.catching():
                yield self._tensor(name, layers.place(name))

    @cached_property
    def untied(self) -> dict[str, str]:
        """Tensors that the donor does not store because they are tied, but an adapter parts: name to what lies beneath."""
        every = [m for m in (self.base, *(model for _, model in self.sources)) if m and m.adapter]
        return {name: under for m in every for name, under in m.adapter.unties.items() if name not in self.donor.checkpoint.tensors}

    @cached_property
    def names(self) -> list[str]:
        return [*self.donor.checkpoint.tensors, *self.untied]

    def _tensor(self, name: str, t: float) -> PlannedTensor:
        under = self.untied.get(name)
        base = self._read(self.base, name, under) if self.base else None
        sources = [self._read(model, name, under) for _, model in self.sources]
        shape = max((r.shape for r in [*([base] if base else []), *sources]), key=math.prod)
        stored = self._read(self.donor, name, under)
        kind = DTYPES[stored.dtype]
        if not kind.mergeable:
            return self._verbatim(name, stored, sources)
        self._check_quantised(name, stored, sources)
        shared, per_source = self._parameters(name, t)
        keys = [stream_key(self.recipe.seed, model.ref, name, "drop") for _, model in self.sources]
        rule = self.method.rule(per_source, shared, keys)
        inputs = inputs_for(base, sources, rule.wants)
        dtype = self._out_dtype(kind.name)
        parameters = {**shared, "sources": per_source}
        rounding = self.recipe.rounding == "stochastic" and dtype in ("BF16", "F16")
        key = stream_key(self.recipe.seed, "", name, "round") if rounding else 0
        if inputs.unchanged and rule.keeps_equals:
            plain = Inputs.one(stored if base is None else base)
            if plain.base.patch is None and stored.dtype == dtype:
                return PlannedTensor(name, shape, dtype, COPY, plain, WeightedSum((), "deltas"))
            return PlannedTensor(name, shape, dtype, self.method.name, plain, WeightedSum((), "deltas"), parameters, key)
        return PlannedTensor(name, shape, dtype, self.method.name, inputs, rule, parameters, key)

    def _read(self, model: Model, name: str, under: str | None) -> Read:
        """How `model` has the tensor; `under`: what stands in for it where it is tied and the model leaves it so."""
        return model.read(name if under is None or model.has(name) else under)

    def _verbatim(self, name: str, stored: Read, sources: Sequence[Read]) -> PlannedTensor:
        """A tensor of integers or the like: equal everywhere, or there is no merge."""
        first = stored.checkpoint.tensor(stored.name)
        for read in sources:
            if read.patch or not (read.same_weight(stored) or bool((read.checkpoint.tensor(read.name) == first).all())):
                raise CheckpointError.of(
                    "DTYPE_UNSUPPORTED", f"{read.source}: {name}", f"is {read.dtype} and differs from {stored.source}'s",
                    "only floating-point tensors can be merged; dequantise the models first",
                )  # fmt: skip
        return PlannedTensor(name, stored.shape, stored.dtype, COPY, Inputs.one(stored), WeightedSum((), "deltas"))

    def _check_quantised(self, name: str, stored: Read, sources: Sequence[Read]) -> None:
        scales = [f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}weight_scale"]
        scale = next((s for s in scales if s in stored.checkpoint.tensors), None)
        if scale and any(read.patch or not read.same_weight(stored) for read in sources):
            raise CheckpointError.of(
                "DTYPE_UNSUPPORTED", f"{stored.source}: {name}", f"is quantised: its values count only together with {scale}",
                "dequantise the model first, and merge that",
            )  # fmt: skip

    def _parameters(self, name: str, t: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The values of all parameters for one tensor: the shared ones, and one mapping a source."""
        shared = resolve_all(self.slice.levels, self.method, "shared", name, t)
        per_source = [
            resolve_all(source.levels, self.method, "source", name, t, model=source.ref) for source, _ in self.sources
        ]
        return {k: r.value for k, r in shared.items()}, [{k: r.value for k, r in one.items()} for one in per_source]

    def _out_dtype(self, stored: str) -> str:
        wanted = self.recipe.out_dtype or self.recipe.dtype
        return stored if wanted is None else next(d.name for d in DTYPES.values() if d.torch == wanted)

    def _compare_names(self) -> None:
        """Every model must have every tensor of the donor, in its shape, and no other."""
        donor = self.donor.checkpoint
        for model in {m.ref: m for _, m in self.sources}.values():
            if model.checkpoint is donor:
                continue
            theirs = model.checkpoint.tensors
            missing, extra = [n for n in donor.tensors if n not in theirs], [n for n in theirs if n not in donor.tensors]
            if missing:
                self.problems.add("KEYS_MISSING", model.ref, f"lacks {_some(missing)}, which {self.donor.ref} has", _OTHER_MODEL)
            if extra:
                self.problems.add("KEYS_EXTRA", model.ref, f"has {_some(extra)}, which {self.donor.ref} lacks", _OTHER_MODEL)
            for name in donor.tensors.keys() & theirs.keys():
                if theirs[name].shape != donor.tensors[name].shape:
                    self.problems.add(
                        "SHAPE_MISMATCH", f"{model.ref}: {name}",
                        f"is {list(theirs[name].shape)}, and {self.donor.ref} has {list(donor.tensors[name].shape)}",
                        _vocabulary_hint(theirs[name].shape, donor.tensors[name].shape),
                    )  # fmt: skip

    def _compare_configs(self) -> None:
        """Configs must agree in what changes a model's function but not its tensors' shapes."""
        ours = self.donor.checkpoint.config
        for _, model in self.sources:
            theirs = model.checkpoint.config
            different = [k for k in _MEANING if k in ours and k in theirs and ours[k] != theirs[k]]
            if different:
                shown = ", ".join(f"{k} ({theirs[k]} against {ours[k]})" for k in different)
                self.problems.add(
                    "CONFIG_MISMATCH", model.ref, f"differs from {self.donor.ref} in {shown}",
                    "use models of one architecture, or pass --allow-crimes",
                )  # fmt: skip

    def _compare_tokenizers(self) -> None:
        """The output gets the donor's tokenizer; say so when a model was trained with another."""
        ours = _tokenizer(self.donor.checkpoint.folder)
        for folder, ref in {m.checkpoint.folder: m.ref for _, m in reversed(self.sources)}.items():
            theirs = _tokenizer(folder)
            if ours and theirs and ours != theirs:
                what = f"has another tokenizer than {self.donor.ref}, whose tokenizer the output gets"
                self.warnings.append(Problem("TOKENIZER", ref, what))

    def config(self, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
        """What the merge changes in `config.json`: the dtype, a vocabulary that grew, a tie that was cut."""
        changes: dict[str, Any] = {}
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if wanted:
            changes["torch_dtype" if "torch_dtype" in self.donor.checkpoint.config else "dtype"] = wanted
        old = self.donor.checkpoint.tensors
        grown = {t.shape[0] for t in tensors if t.name in old and t.shape and t.shape[0] != old[t.name].shape[0]}
        if grown:
            changes["vocab_size"] = max(grown)
        if self.untied:
            changes["tie_word_embeddings"] = False
        return changes


_OTHER_MODEL = "merge models of one architecture"
_MEANING = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "hidden_act",
    "sliding_window", "partial_rotary_factor", "tie_word_embeddings", "rms_norm_eps", "layer_norm_epsilon",
)  # fmt: skip
"""Fields of a config that give the same tensors another meaning."""


def _tokenizer(folder: Path) -> bytes | None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return next(((folder / name).read_bytes() for name in names if (folder / name).is_file()), None)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _vocabulary_hint(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    if len(one) == len(other) == 2 and one[1:] == other[1:]:
        return "the vocabularies differ; merge them with a tokenizer_source"
    return "merge models of one architecture and size"


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
