"""Plans each output tensor: the tensors to read, the rule that merges them, and the dtype to write."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from paft_merge.errors import CheckpointError, Problem, Problems, RecipeError
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.models import Model
from paft_merge.inputs.quantized.recognition import Quantised, quantised
from paft_merge.inputs.safetensors_header import quote, without_wrappers
from paft_merge.inputs.tensor_inputs import Inputs, Read, inputs_for
from paft_merge.methods import Method
from paft_merge.methods.mergekit_methods import as_mergekit
from paft_merge.methods.rules.rule import Rule, WeightedSum, WholeRule
from paft_merge.methods.rules.thresholds import stream_key
from paft_merge.plan.compatibility import (
    compare_configs,
    compare_tensors,
    compare_tokenizers,
    find_untied_copies,
    refuse_adapters_inside,
)
from paft_merge.plan.layer_stacks import split
from paft_merge.plan.output_tensors import OutputTensor, OutputTensors, ResolvedSlice
from paft_merge.plan.planned import COPY, PlannedTensor
from paft_merge.plan.routers import find_routers
from paft_merge.plan.side_files import read_side_files
from paft_merge.plan.vocabulary import read_vocabulary, truncation
from paft_merge.recipe import ModelRef, ParameterCache, Recipe, Resolved, resolve_all


class _Reads(NamedTuple):
    """The stored tensors that one output tensor is made of."""

    base: Read | None
    stored: Read
    """The template's tensor, which decides the dtype; the base's own wherever the method has a base."""
    sources: list[Read]

    @property
    def merged(self) -> list[Read]:
        """The base, if the method has one, and the sources."""
        return [*([self.base] if self.base else []), *self.sources]


class Planner:
    """Decides for each output tensor which tensors are read and which rule merges them.

    Args:
        recipe: the merge to plan.
        models: every model that the recipe refers to, opened.
        allow_crimes: skip the comparison of configs.
        tensor_names: `intersection` or `union`, for files that hold different tensors; None: that is an error.
        truncate_embeddings: cut embeddings to the smallest vocabulary, unless the recipe has a tokenizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[ModelRef, Model],
        allow_crimes: bool,
        tensor_names: str | None = None,
        *,
        truncate_embeddings: bool = False,
    ) -> None:
        self.recipe, self.models = recipe, models
        self.method, self.parameters = recipe.method, ParameterCache(recipe.method)
        self.problems = Problems()
        self.warnings: list[Problem] = [w for m in models.values() for w in m.checkpoint.warnings]
        self.warnings += [w for m in models.values() if m.adapter for w in m.adapter.warnings]
        self.truncated: Mapping[int, int] = {}
        if truncate_embeddings and recipe.tokenizer is None:
            with self.problems.catching():
                self.truncated, cut = truncation.truncate_embeddings(list(models.values()))
                self.warnings += cut
        self.outputs = OutputTensors(recipe, models, self.problems, set(), [], self.warnings, tensor_names)
        self.config_source = self.outputs.config_source
        self.vocabulary, warnings = read_vocabulary(recipe, models, self.config_source)
        self.warnings += warnings
        self.side_files = read_side_files(
            list(models.values()), self.config_source, allow_unread=allow_crimes, plain=recipe.quantization is None,
            problems=self.problems, warnings=self.warnings,
        )  # fmt: skip
        source, others = (self.config_source.ref, self.config_source.checkpoint), self._others()
        if tensor_names and not (self.outputs.whole and all(m.checkpoint.file for m in models.values())):
            what = f"the {tensor_names} of tensors is for single files; models must hold the same tensors"
            self.problems.add("TENSOR_NAMES", source[0], what, "leave it out, or name files")
        self._inside = set() if allow_crimes else refuse_adapters_inside([source, *others], self.problems)
        for _, (slice_, *_) in self.outputs.modules:
            if slice_.output.sources[0].layers is None:
                self._compare(slice_)
        if not allow_crimes:
            sizes = self.outputs.whole and recipe.tokenizer is None and not self.problems.found and not self.truncated
            self.warnings += compare_configs(source, others, self.problems, sizes=sizes)
        if recipe.router not in (None, "merge"):
            self._check_routers()
        if recipe.tokenizer is None:
            self.warnings += compare_tokenizers(source, others)
        self.warnings += find_untied_copies([source, *others])
        found = self._quantised(self.config_source.checkpoint)
        if found.claims and not found:
            what = f"says in config.json that it is quantised ({found.claims}), and none of its tensors is"
            self.warnings.append(Problem("QUANTISED", source[0], what, "remove quantization_config if that is wrong"))
        self.warnings += _widened([source, *others]) if recipe.quantization is None else []
        names = self.config_source.checkpoint.tensors if self.config_source.checkpoint.config else ()
        if wrapped := next(
            (n for n in names if without_wrappers(n) != n or n.startswith(("module.", "base_model.model."))), None
        ):
            what = f"has names of a wrapper, such as {quote(wrapped)}, which the output keeps and transformers does not load"
            self.warnings.append(Problem("NAMES", source[0], what, "give a base that save_pretrained wrote"))
        if self.config_source.checkpoint.file and self.config_source.checkpoint.config:
            what = "is a single file, so the output has no config and no tokenizer"
            self.warnings.append(Problem("RAW", source[0], what, "name its folder to have them"))

    def _others(self, of: ResolvedSlice | None = None) -> list[tuple[str, Checkpoint]]:
        """Every checkpoint once, without the config source's (of a slice: without its template's)."""
        slices = [of] if of else [slice_ for _, slices in self.outputs.modules for slice_ in slices]
        pairs = [pair for slice_ in slices for pair in slice_.sources]
        found = {id(m.checkpoint): (str(source.ref.base), m.checkpoint) for source, m in reversed(pairs)}
        found.pop(id(of.template.checkpoint if of else self.config_source.checkpoint), None)
        return list(reversed(found.values()))

    def _compare(self, slice_: ResolvedSlice) -> None:
        """Check that whole models have the same tensors, within the module if there is one."""
        others = self._others(slice_)
        checkpoints = [slice_.template.checkpoint, *(checkpoint for _, checkpoint in others)]
        names = None
        if slice_.module is not None:
            names = {name for one in checkpoints for name in self.outputs.names_in(one, slice_.module)}
        if self.outputs.tensor_names:
            names = {name for name in checkpoints[0].tensors if all(name in one.tensors for one in checkpoints)}
        if self._inside.intersection(map(id, checkpoints)):
            self.outputs.faulty |= slice_.template.checkpoint.tensors.keys()  # reported in one line
            return
        others = [other for other in others if not self._differs_in_codes(slice_.template, *other)]
        resized = self.vocabulary.tensors if self.vocabulary else ()
        template = (slice_.template.ref, slice_.template.checkpoint)
        self.outputs.faulty |= compare_tensors(template, others, self.problems, names, resized)

    def _differs_in_codes(self, template: Model, ref: str, checkpoint: Checkpoint) -> bool:
        """Whether one of two models is quantised and the other is not, or not in the same way; notes it in one line."""
        ours, theirs = self._quantised(template.checkpoint), self._quantised(checkpoint)
        if ours.parts.keys() == theirs.parts.keys():
            return False
        if ours:
            uses = f"{ref} {f'is quantised otherwise ({theirs.how})' if theirs else 'is not'}"
            self.problems.found.append(ours.problem(template.ref, uses))
        else:
            self.problems.found.append(theirs.problem(ref, f"{template.ref} is not"))
        held, coded = checkpoint.tensors, ours.parts.keys() | theirs.parts.keys()
        for name, info in template.checkpoint.tensors.items():
            if name in coded or name not in held or held[name].shape != info.shape:
                self.outputs.faulty.add(name)
        return True

    def tensors(self) -> Iterator[PlannedTensor]:
        """Plan every output tensor; the errors of a tensor are noted in `problems`, and it is left out."""
        for output in self.outputs:
            with self.problems.catching():
                yield self._tensor(output)

    def check_global_trim(self, tensors: Sequence[PlannedTensor]) -> None:
        """Check that a trim over the whole model is the same for all of its tensors."""
        trims = {t.rule.global_trims for t in tensors if t.rule.wants != "whole"} - {None}
        if len(trims) > 1:
            self.problems.add(
                "RECIPE", self.recipe.located.spot(("parameters", "trim_scope")),
                "global ranks all tensors together, but the trim of a source is not the same for all of them",
                "give each source one density (or l1_mass, epsilon) without gradients and filters",
            )  # fmt: skip

    def _tensor(self, output: OutputTensor) -> PlannedTensor:
        reads = self._reads(output)
        stored, sources = reads.stored, reads.sources
        self._check_formats(reads.merged)
        if self.recipe.router == "base" and self._is_router(output):
            return self._base_router(output, reads.base or stored)
        if any(read.checkpoint.is_derived(read.name) for read in sources):
            return self._derived(output, stored)
        if any(read.name in self._quantised(read.checkpoint).parts for read in (stored, *sources)):
            self._check_unchanged(stored, sources)
            return self._copied(output, stored, "it is a part of a quantised weight, which no source changes")
        if not all(DTYPES[read.dtype].mergeable for read in (stored, *sources)):
            return self._verbatim(output, stored, sources)
        if not self.outputs.whole or self.outputs.tensor_names:
            self._check_shapes(stored, sources)
        if self.recipe.router == "average" and sources and self._is_router(output):
            return self._averaged_router(output, reads)
        return self._merged(output, reads) if sources else self._base_alone(output, stored)

    def _reads(self, output: OutputTensor) -> _Reads:
        """The tensors to read, in the output's vocabulary.

        Where a tied tensor gets a weight of its own, a model that does not store it reads the tensor it is tied to.
        """
        slice_, name = output.slice, output.template_name
        tied_to = slice_.untied.get(name)

        def read(model: Model, name: str) -> Read:
            return model.read(name if tied_to is None or model.has(name) else tied_to)

        base = read(slice_.base, name) if slice_.base else None
        sources = [read(model, output.name_in(i)) for i, (_, model) in enumerate(slice_.sources)]
        reads = _Reads(base, read(slice_.template, name), sources)
        if self.vocabulary is None or name not in self.vocabulary.tensors:
            return reads
        having = [m for m in self.models.values() if m.has(name) or (tied_to is not None and m.has(tied_to))]
        everywhere = {model.ref: read(model, name) for model in having}
        found = self.vocabulary.align(reads.merged, name, everywhere)
        if base:
            return _Reads(found[0], found[0], found[1:])
        return _Reads(None, self.vocabulary.align([reads.stored], name, everywhere)[0], found)

    def _merged(self, output: OutputTensor, reads: _Reads) -> PlannedTensor:
        """A tensor with at least one source, merged by the recipe's method, or copied where nothing changes it."""
        name, slice_, (base, stored, sources) = output.name, output.slice, reads
        shape = max((read.shape for read in reads.merged), key=math.prod)
        self._check_added_rows(sources)
        shared, per_source = self._parameters(output)
        keys = [stream_key(self.recipe.seed, source.ref.stream, name, "drop") for source, _ in slice_.sources]
        rule = self._rule(slice_, per_source, shared, keys)
        if rule.wants in ("values", "either") or (rule.wants == "offsets" and not base):
            self._warn_of_absent_rows(reads.merged if rule.wants == "values" else sources)
        dtype = self._out_dtype(stored, rule, reads.merged)
        if base and rule.wants == "values":  # slerp: the base is the first of the values
            sources, per_source, base = [base, *sources], [{}, *per_source], None
        inputs = inputs_for(base, sources, rule.wants)
        if inputs.unchanged and rule.keeps_equals:
            only = base or stored
            inputs, rule = Inputs.one(only), WeightedSum((), "deltas")
            if only.plain and stored.dtype == dtype:
                return PlannedTensor(name, shape, dtype, COPY, inputs, rule, place=output, why=_why(slice_))
        parameters = {**shared, "sources": per_source}
        return PlannedTensor(
            name, shape, dtype, self.method.name, inputs, rule, parameters, self._rounding_key(name, dtype), output
        )

    def _rounding_key(self, name: str, dtype: str) -> int:
        rounds = self.recipe.rounding == "stochastic" and DTYPES[dtype].bits < 32
        return stream_key(self.recipe.seed, "", name, "round") if rounds else 0

    def _is_router(self, output: OutputTensor) -> bool:
        return output.template_name in self._routers_of(output.slice)

    def _routers_of(self, slice_: ResolvedSlice) -> frozenset[str]:
        checkpoint = slice_.template.checkpoint
        if id(checkpoint) not in self._known_routers:
            self._known_routers[id(checkpoint)] = find_routers(checkpoint.tensors)
        return self._known_routers[id(checkpoint)]

    @cached_property
    def _known_routers(self) -> dict[int, frozenset[str]]:
        return {}

    def _check_routers(self) -> None:
        """Check that `router: base` has a base wherever there is a router; warn of a `router` that has no effect."""
        spot, word = self.recipe.located.spot(("router",)), self.recipe.router
        slices = [slice_ for _, slices in self.outputs.modules for slice_ in slices if self._routers_of(slice_)]
        if not slices:
            what = (
                f"no tensor of {self.config_source.ref} is the router of a mixture of experts, so {word} has no effect"
            )
            self.warnings.append(Problem("ROUTER", str(spot), what, "remove it"))
        for slice_ in slices if word == "base" else ():
            base = slice_.output.base
            if base is None:
                self.problems.add(
                    "RECIPE",
                    spot,
                    "base keeps the base's routers, and the recipe has no base_model",
                    "add base_model: ...",
                )
            elif slice_.base is None and slice_.template is not self.models[base]:
                what = f"base keeps the routers of {base}, which is not among the sources of this slice"
                self.problems.add("RECIPE", slice_.output.spot, what, "add it to sources, or write router: average")

    def _base_router(self, output: OutputTensor, base: Read) -> PlannedTensor:
        """A router as the base has it (`router: base`)."""
        why = "router: base keeps the base's router"
        if DTYPES[base.dtype].mergeable and base.name not in self._quantised(base.checkpoint).parts:
            return replace(self._base_alone(output, base), parameters={"router": "base"}, why=why)
        return replace(self._copied(output, base, why), parameters={"router": "base"})

    def _averaged_router(self, output: OutputTensor, reads: _Reads) -> PlannedTensor:
        """A router as the weighted mean of the sources' routers (`router: average`), in the arithmetic of `linear`.

        A method that moves the base towards one source (slerp, nearswap) has two models to average.
        """
        both = reads.base is not None and self.method.max_sources == 1
        sources = reads.merged if both else reads.sources
        given = [one.get("weight", 1.0) for one in self._parameters(output)[1]]
        weights = [1.0, *given] if both else given
        words = [weight for weight in weights if isinstance(weight, str)]
        if words or abs(sum(weights)) < 1e-8:
            what = f"a source has weight: {words[0]}" if words else "the weights of the sources add up to zero"
            spot, fix = output.slice.output.spot, "write weights that are numbers, or router: base"
            raise RecipeError.of("PARAM_RANGE", spot, f"{what}, so their routers have no mean", fix)
        rule, inputs = (
            WeightedSum(tuple(w / sum(weights) for w in weights), "values"),
            inputs_for(None, sources, "either"),
        )
        dtype, parameters = self._out_dtype(reads.stored, rule, sources), {"router": "average"}
        if inputs.unchanged and sources[0].plain and sources[0].dtype == dtype:
            return replace(self._copied(output, sources[0], "every source has the same router"), parameters=parameters)
        if inputs.unchanged:
            inputs, rule = Inputs.one(sources[0]), WeightedSum((), "deltas")
        shown = {**parameters, "sources": [{"weight": weight} for weight in weights]}
        key = self._rounding_key(output.name, dtype)
        return PlannedTensor(output.name, reads.stored.shape, dtype, "linear", inputs, rule, shown, key, output)

    def _check_shapes(self, stored: Read, sources: Sequence[Read]) -> None:
        """Check that paired tensors have equal shapes, and that stacked layers have those of the config source."""
        known = self._known_shapes.get(_without_layer(stored.name))
        if known and stored.shape not in known and not stored.delta:
            what = f"is {list(stored.shape)}, and in {self.config_source.ref} it is {list(known[0])}"
            fix = "stack layers of models of one size"
            raise CheckpointError.of("SHAPE_MISMATCH", f"{stored.source}: {stored.name}", what, fix)
        for read in sources:
            if not read.delta and read.shape != stored.shape:
                what = f"is {list(read.shape)}, and {stored.source}: {stored.name} is {list(stored.shape)}"
                fix = "merge models of one architecture and size"
                raise CheckpointError.of("SHAPE_MISMATCH", f"{read.source}: {read.name}", what, fix)

    def _check_added_rows(self, sources: Sequence[Read]) -> None:
        """Check that all adapters that add rows to an embedding add the same number: the rows mean tokens."""
        added = {read.shape: read for read in sources if read.delta and read.shape[:1] > read.stored_shape[:1]}
        if len(added) > 1:
            one, other, *_ = added.values()
            what = f"has {one.shape[0]:,} rows with {one.source} and {other.shape[0]:,} with {other.source}"
            fix = "their added tokens differ: write tokenizer_source: union in the recipe"
            raise CheckpointError.of("SHAPE_MISMATCH", one.name, what, fix)

    def _warn_of_absent_rows(self, reads: Sequence[Read]) -> None:
        """Warn once when values are averaged over models of which some lack the rows of added tokens."""
        most, least = (end(reads, key=lambda read: read.shape[:1]) for end in (max, min))
        if most.shape[:1] == least.shape[:1] or any(warning.code == "ABSENT_ROWS" for warning in self.warnings):
            return
        what = (
            f"has {most.shape[0]:,} rows with {most.source} and {least.shape[0]:,} with {least.source}; {self.method.name} "
            "counts the rows that a source lacks as zero, so added tokens get smaller rows"
        )
        self.warnings.append(
            Problem("ABSENT_ROWS", most.name, what, "write tokenizer_source: union in the recipe, which fills them")
        )

    @cached_property
    def _known_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """The shapes of the config source's tensors in any layer, by the name without the layer's number."""
        found: dict[str, list[tuple[int, ...]]] = {}
        for name, info in self.config_source.checkpoint.tensors.items():
            shapes = found.setdefault(_without_layer(name), [])
            if info.shape not in shapes:
                shapes.append(info.shape)
        return found

    def _verbatim(self, output: OutputTensor, stored: Read, sources: Sequence[Read]) -> PlannedTensor:
        """A tensor that cannot be merged, such as one of integers: copied where it is the same in all sources."""
        for read in sources:
            if read.delta or not (read.same_weight(stored) or _equal(read, stored)):
                raise CheckpointError.of(
                    "DTYPE_UNSUPPORTED", f"{read.source}: {read.name}",
                    f"is {read.dtype} and differs from that of {stored.source}, which is {stored.dtype}",
                    "only floating-point tensors can be merged; dequantise the models first",
                )  # fmt: skip
        return self._copied(output, stored, f"{stored.dtype} is not merged, and it is the same in all sources")

    def _copied(self, output: OutputTensor, stored: Read, why: str) -> PlannedTensor:
        """A tensor whose bytes are copied, whatever dtype the recipe asks for."""
        inputs, rule = Inputs.one(stored), WeightedSum((), "deltas")
        return PlannedTensor(output.name, stored.shape, stored.dtype, COPY, inputs, rule, place=output, why=why)

    def _derived(self, output: OutputTensor, stored: Read) -> PlannedTensor:
        """A buffer that the model computes itself, and that some source does not store: copied."""
        return self._copied(output, stored, "the model derives it, and not every source stores it")

    def _quantised(self, checkpoint: Checkpoint) -> Quantised:
        if id(checkpoint) not in self._known_quantised:
            self._known_quantised[id(checkpoint)] = quantised(checkpoint)
        return self._known_quantised[id(checkpoint)]

    @cached_property
    def _known_quantised(self) -> dict[int, Quantised]:
        return {}

    def _check_unchanged(self, stored: Read, sources: Sequence[Read]) -> None:
        """Check that no source changes a part of a quantised weight. The error is the same for all parts of a model."""
        for read in sources:
            if read.source in self._requantised or read.delta or not (read.same_weight(stored) or _equal(read, stored)):
                self._requantised.add(read.source)
                owner = read if self._quantised(read.checkpoint) else stored
                uses = f"its values differ from those of {stored.source}, or the merge changes them"
                raise CheckpointError([self._quantised(owner.checkpoint).problem(owner.source, uses)])

    def _check_formats(self, reads: Sequence[Read]) -> None:
        """Check that all reads are quantised in one format, or none is: else a delta is the rounding error of a format.

        The error is the same for all tensors of two models.
        """
        for read in reads[1:]:
            ours, theirs = (one.checkpoint.stored_format(one.name) for one in (reads[0], read))
            if ours != theirs:
                (owner, has), (other, has_not) = sorted([(reads[0], ours), (read, theirs)], key=lambda one: not one[1])
                uses = f"{other.source} {f'is in {has_not}' if has_not else 'is not'}"
                what = f"is quantised ({has}; for example {quote(owner.name)}), and {uses}"
                fix = "give both in one form: paft dequantize MODEL OUT writes plain weights"
                problem = Problem("DTYPE_UNSUPPORTED", owner.source, what, fix)
                raise CheckpointError([self._mixed.setdefault((owner.source, other.source), problem)])

    @cached_property
    def _mixed(self) -> dict[tuple[str, str], Problem]:
        """By two models that are not quantised alike, the problem with the first of their tensors."""
        return {}

    @cached_property
    def _requantised(self) -> set[str]:
        """Sources that would change a quantised weight."""
        return set()

    def _base_alone(self, output: OutputTensor, stored: Read) -> PlannedTensor:
        """A tensor that only the base has: copied, or converted to the output's dtype."""
        rule = WeightedSum((), "deltas")
        dtype = self._out_dtype(stored, rule, [stored])
        method = COPY if stored.plain and stored.dtype == dtype else self.method.name
        return PlannedTensor(
            output.name, stored.shape, dtype, method, Inputs.one(stored), rule, place=output, why="only the base has it"
        )

    def _parameters(self, output: OutputTensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The values of all parameters for one tensor: the shared ones, and one mapping for each source."""
        shared = self.parameters.values(output.slice.output.levels, "shared", output.name, output.t)
        return shared, [
            self.parameters.values(source.levels, "source", output.name_in(i), output.t, model=source.ref)
            for i, (source, _) in enumerate(output.slice.sources)
        ]

    def _rule(
        self, slice_: ResolvedSlice, per_source: list[dict[str, Any]], shared: dict[str, Any], keys: list[int]
    ) -> Rule | WholeRule:
        recipe = self.recipe
        try:
            if recipe.arithmetic == "mergekit":
                return as_mergekit(self.method, per_source, shared, keys[0], recipe.dtype, recipe.out_dtype)
            return self.method.build(per_source, shared, keys)
        except ValueError as error:  # parameters that are valid one by one but not together
            raise RecipeError.of("PARAM_RANGE", slice_.output.spot, str(error)) from error

    def _out_dtype(self, stored: Read, rule: Rule | WholeRule, reads: Sequence[Read]) -> str:
        """The dtype to write: the recipe's, else the stored one; with mergekit's arithmetic, the result's."""
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if rule.wants == "whole" and rule.baked:
            wanted = rule.result_dtype([str(DTYPES[read.dtype].torch) for read in reads])
        if wanted is None:
            return DTYPES[stored.checkpoint.written_dtype(stored.name)].name
        return next(d.name for d in DTYPES.values() if d.torch == wanted)


def resolved(output: OutputTensor, method: Method) -> tuple[dict[str, Resolved], list[dict[str, Resolved]]]:
    """The value and the origin of every parameter for one tensor: the shared ones, and one mapping for each source.

    As in mergekit, filters match the output's name for shared parameters and the source's name for its own.
    """
    shared = resolve_all(output.slice.output.levels, method, "shared", output.name, output.t)
    per_source = [
        resolve_all(source.levels, method, "source", output.name_in(i), output.t, model=source.ref)
        for i, (source, _) in enumerate(output.slice.sources)
    ]
    return shared, per_source


def _widened(checkpoints: Sequence[tuple[str, Checkpoint]]) -> list[Problem]:
    """A notice for each checkpoint whose quantised weights are read as values; `checkpoints`: with their references."""
    found = []
    for ref, checkpoint in checkpoints:
        formats = Counter(filter(None, map(checkpoint.stored_format, checkpoint.tensors)))
        if formats:
            held = ", ".join(f"{count:,} in {form}" for form, count in formats.items())
            what = f"has quantised weights ({held}), which are read as their values; the output has plain weights"
            found.append(Problem("QUANTISED", ref, what))
    return found


def _without_layer(name: str) -> str:
    found = split(name)
    return f"{found[0]}{found[2]}" if found else name


def _why(slice_: ResolvedSlice) -> str:
    """Why a tensor with sources is copied."""
    if slice_.base is None and len(slice_.sources) == 1:
        return "it has one source, which nothing changes"
    return "every source has the base's own tensor" if slice_.base else "every source has the same tensor"


def _equal(one: Read, other: Read) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes."""
    return one.checkpoint.same_bytes(one.name, other.checkpoint, other.name)
