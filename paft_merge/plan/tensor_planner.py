"""One output tensor: what is read, which rule merges it, and in which type it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from paft_merge.errors import CheckpointError, Problem, Problems, RecipeError
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.models import Model
from paft_merge.inputs.tensor_inputs import Inputs, Read, inputs_for
from paft_merge.methods import Method
from paft_merge.methods.mergekit_methods import as_mergekit
from paft_merge.methods.rules.rule import Rule, WeightedSum, WholeRule
from paft_merge.methods.rules.thresholds import stream_key
from paft_merge.plan.compatibility import compare_configs, compare_tensors, compare_tokenizers
from paft_merge.plan.layer_stacks import split
from paft_merge.plan.output_tensors import OutputTensor, Places, ResolvedSlice
from paft_merge.plan.planned import COPY, COPY_BYTES, PlannedTensor
from paft_merge.plan.vocabulary import read_vocabulary
from paft_merge.recipe import ModelRef, ParameterCache, Recipe, Resolved, resolve_all


class Planner:
    """Decides, for each output tensor, what is read and which rule merges it."""

    def __init__(
        self, recipe: Recipe, models: Mapping[ModelRef, Model], allow_crimes: bool, tensor_names: str | None = None
    ) -> None:
        self.recipe, self.models = recipe, models
        self.method, self.memory = recipe.method, ParameterCache(recipe.method)
        self.problems = Problems()
        self.warnings: list[Problem] = [w for m in models.values() if m.adapter for w in m.adapter.warnings]
        self.places = Places(recipe, models, self.problems, set(), warnings=self.warnings, tensor_names=tensor_names)
        self.donor = self.places.donor
        self.vocabulary = read_vocabulary(recipe, models, self.donor)
        self.warnings += self.vocabulary.warnings if self.vocabulary else ()
        donor, others = (self.donor.ref, self.donor.checkpoint), self._others()
        if tensor_names and not (self.places.whole and all(m.checkpoint.file for m in models.values())):
            what = f"the {tensor_names} of their tensors is for files of tensors, and models have to hold the same ones"
            self.problems.add("TENSOR_NAMES", self.donor.ref, what, "leave it out, or name files")
        if not allow_crimes:
            compare_configs(donor, others, self.problems)
        for _, (making, *_) in self.places.makings:
            if making.output.sources[0].layers is None:
                self._compare(making)
        if recipe.tokenizer is None:
            self.warnings += compare_tokenizers(donor, others)
        if self.donor.checkpoint.file and self.donor.checkpoint.config:
            what = "is a file of tensors, so the output has no config and no tokenizer"
            self.warnings.append(Problem("RAW", self.donor.ref, what, "name its folder to have them"))

    def _others(self, of: ResolvedSlice | None = None) -> list[tuple[str, Checkpoint]]:
        """Every checkpoint beside the donor's (or the lead's), once, by the first reference that leads to it."""
        makings = [of] if of else [making for _, makings in self.places.makings for making in makings]
        pairs = [pair for making in makings for pair in making.sources]
        found = {id(m.checkpoint): (str(source.ref.base), m.checkpoint) for source, m in reversed(pairs)}
        found.pop(id(of.lead.checkpoint if of else self.donor.checkpoint), None)
        return list(reversed(found.values()))

    def _compare(self, making: ResolvedSlice) -> None:
        """Whole models must have the same tensors, within the module if there is one."""
        within = [making.lead.checkpoint, *(checkpoint for _, checkpoint in self._others(making))]
        names = None
        if making.module is not None:
            names = {name for one in within for name in self.places.names_in(one, making.module)}
        if self.places.tensor_names:
            names = {name for name in within[0].tensors if all(name in one.tensors for one in within)}
        lead = (making.lead.ref, making.lead.checkpoint)
        resized = self.vocabulary.tensors if self.vocabulary else ()
        self.places.faulty |= compare_tensors(lead, self._others(making), self.problems, names, resized)

    def tensors(self) -> Iterator[PlannedTensor]:
        """Every output tensor."""
        for place in self.places:
            with self.problems.catching():
                yield self._tensor(place)

    def check_global_trim(self, tensors: Sequence[PlannedTensor]) -> None:
        """One ranking over the whole model needs one trim for the whole model."""
        trims = {t.rule.global_trims for t in tensors if t.rule.wants != "whole"} - {None}
        if len(trims) > 1:
            self.problems.add(
                "RECIPE", self.recipe.located.spot(("parameters", "trim_scope")),
                "global ranks all tensors together, but the trim of a source is not the same for all of them",
                "give each source one density (or l1_mass, epsilon) without gradients and filters",
            )  # fmt: skip

    def _tensor(self, place: OutputTensor) -> PlannedTensor:
        name, making = place.name, place.making
        under = making.untied.get(place.lead)
        base = self._base(place, under)
        sources = [self._read(m, place.name_in(i), under) for i, (_, m) in enumerate(making.sources)]
        stored = self._read(making.lead, place.lead, under)
        if self.vocabulary and place.lead in self.vocabulary.tensors:
            base, stored, sources = self._aligned(base, stored, sources, place.lead, under)
        shape = max((r.shape for r in [*([base] if base else []), *sources]), key=math.prod)
        kind = DTYPES[stored.checkpoint.written_dtype(stored.name)]
        if not all(DTYPES[read.dtype].mergeable for read in (stored, *sources)):
            return self._verbatim(place, stored, sources)
        self._check_quantised(place.lead, stored, sources)
        if not self.places.whole or self.places.tensor_names:
            self._check_shapes(stored, sources)
        if not sources:
            return self._base_alone(place, stored)
        shared, per_source = self._parameters(place)
        keys = [stream_key(self.recipe.seed, source.ref.stream, name, "drop") for source, _ in making.sources]
        rule = self._rule(making, per_source, shared, keys)
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
            if only.plain and stored.dtype == dtype:
                return PlannedTensor(name, shape, dtype, COPY, inputs, rule, place=place, why=_why(making, place))
        return PlannedTensor(name, shape, dtype, self.method.name, inputs, rule, parameters, key, place)

    def _base(self, place: OutputTensor, under: str | None) -> Read | None:
        """How the base has the tensor; it is the lead wherever the method has a base."""
        return self._read(place.making.base, place.lead, under) if place.making.base else None

    def _read(self, model: Model, name: str, under: str | None) -> Read:
        """How `model` has the tensor; `under`: what stands in for it where it is tied and the model leaves it so."""
        return model.read(name if under is None or model.has(name) else under)

    def _aligned(
        self, base: Read | None, stored: Read, sources: Sequence[Read], name: str, under: str | None
    ) -> tuple[Read | None, Read, list[Read]]:
        """The same tensor in the output's vocabulary."""
        assert self.vocabulary is not None
        having = [m for m in self.models.values() if m.has(name) or (under is not None and m.has(under))]
        everywhere = {model.ref: self._read(model, name, under) for model in having}
        merged = [*([base] if base else []), *sources]
        found = self.vocabulary.align(merged, name, everywhere)
        sources = found[1:] if base else found
        (stored,) = self.vocabulary.align([stored], name, everywhere) if base is None else found[:1]
        return found[0] if base else None, stored, sources

    def _check_shapes(self, stored: Read, sources: Sequence[Read]) -> None:
        """Layers that a slice pairs must have equal shapes, and those that follow each other must be of one width."""
        known = self._donor_shapes.get(_without_layer(stored.name))
        if known and stored.shape not in known and not stored.delta:
            what = f"is {list(stored.shape)}, and in {self.donor.ref} it is {list(known[0])}"
            fix = "stack layers of models of one size"
            raise CheckpointError.of("SHAPE_MISMATCH", f"{stored.source}: {stored.name}", what, fix)
        for read in sources:
            if not read.delta and read.shape != stored.shape:
                what = f"is {list(read.shape)}, and {stored.source}: {stored.name} is {list(stored.shape)}"
                fix = "merge models of one architecture and size"
                raise CheckpointError.of("SHAPE_MISMATCH", f"{read.source}: {read.name}", what, fix)

    @cached_property
    def _donor_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """The shapes that a tensor has in the donor, in any layer, by its name without the layer's number."""
        found: dict[str, list[tuple[int, ...]]] = {}
        for name, info in self.donor.checkpoint.tensors.items():
            shapes = found.setdefault(_without_layer(name), [])
            if info.shape not in shapes:
                shapes.append(info.shape)
        return found

    def _verbatim(self, place: OutputTensor, stored: Read, sources: Sequence[Read]) -> PlannedTensor:
        """A tensor of integers or the like: equal everywhere, or there is no merge."""
        for read in sources:
            if read.delta or not (read.same_weight(stored) or _equal(read, stored)):
                raise CheckpointError.of(
                    "DTYPE_UNSUPPORTED", f"{read.source}: {read.name}",
                    f"is {read.dtype} and differs from that of {stored.source}, which is {stored.dtype}",
                    "only floating-point tensors can be merged; dequantise the models first",
                )  # fmt: skip
        inputs, rule = Inputs.one(stored), WeightedSum((), "deltas")
        why = f"{stored.dtype} is not merged, and it is the same in all sources"
        return PlannedTensor(place.name, stored.shape, stored.dtype, COPY, inputs, rule, place=place, why=why)

    def _base_alone(self, place: OutputTensor, stored: Read) -> PlannedTensor:
        """A tensor that only the base has."""
        rule = WeightedSum((), "deltas")
        dtype = self._out_dtype(DTYPES[stored.checkpoint.written_dtype(stored.name)].name, rule, [stored])
        method = COPY if stored.plain and stored.dtype == dtype else self.method.name
        why = "the base alone has it"
        return PlannedTensor(place.name, stored.shape, dtype, method, Inputs.one(stored), rule, place=place, why=why)

    def _check_quantised(self, name: str, stored: Read, sources: Sequence[Read]) -> None:
        scales = [f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}weight_scale"]
        scale = next((s for s in scales if s in stored.checkpoint.tensors), None)
        if scale and any(read.delta or not read.same_weight(stored) for read in sources):
            raise CheckpointError.of(
                "DTYPE_UNSUPPORTED", f"{stored.source}: {name}",
                f"is quantised: its values count only together with {scale}",
                "dequantise the model first, and merge that",
            )  # fmt: skip

    def _parameters(self, place: OutputTensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The values of all parameters for one tensor: the shared ones, and one mapping a source."""
        shared = self.memory.values(place.making.output.levels, "shared", place.name, place.t)
        return shared, [
            self.memory.values(source.levels, "source", place.name_in(i), place.t, model=source.ref)
            for i, (source, _) in enumerate(place.making.sources)
        ]

    def _rule(
        self, making: ResolvedSlice, per_source: list[dict[str, Any]], shared: dict[str, Any], keys: list[int]
    ) -> Rule | WholeRule:
        recipe = self.recipe
        try:
            if recipe.arithmetic == "mergekit":
                return as_mergekit(self.method, per_source, shared, keys[0], recipe.dtype, recipe.out_dtype)
            return self.method.rule(per_source, shared, keys)
        except ValueError as error:  # numbers that are sound one by one and not together
            raise RecipeError.of("PARAM_RANGE", making.output.spot, str(error)) from error

    def _out_dtype(self, stored: str, rule: Rule | WholeRule, reads: Sequence[Read]) -> str:
        """The type that the recipe asks for, else the donor's own; with mergekit's arithmetic, what its method gives."""
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if rule.wants == "whole" and rule.baked:
            wanted = rule.result_dtype([str(DTYPES[read.dtype].torch) for read in reads])
        return stored if wanted is None else next(d.name for d in DTYPES.values() if d.torch == wanted)


def resolved(place: OutputTensor, method: Method) -> tuple[dict[str, Resolved], list[dict[str, Resolved]]]:
    """The value and the origin of every parameter for one tensor: the shared ones, and one mapping a source.

    Filters see the output's name for shared parameters, and the source's own name for its own, as in mergekit.
    """
    shared = resolve_all(place.making.output.levels, method, "shared", place.name, place.t)
    per_source = [
        resolve_all(source.levels, method, "source", place.name_in(i), place.t, model=source.ref)
        for i, (source, _) in enumerate(place.making.sources)
    ]
    return shared, per_source


def _without_layer(name: str) -> str:
    found = split(name)
    return f"{found[0]}{found[2]}" if found else name


def _why(making: ResolvedSlice, place: OutputTensor) -> str:
    if making.base is None and len(making.sources) == 1:
        return "there is one source, and nothing changes it"
    return "every source has the base's own tensor" if making.base else "every source has the same tensor"


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
