"""The tensors of the output: from which slice of the recipe and which stored tensors each is made, and its place on gradients.

`models:` keeps the names of the base. `slices:` renumbers the layers, slice by slice. Tensors before the layers (embeddings)
are made of the first slice's sources, tensors after them (last norm, head) of the last slice's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.models import Model
from paft_merge.inputs.safetensors_header import join_first, quote
from paft_merge.plan.compatibility import compare_names
from paft_merge.plan.layer_stacks import (
    Stack,
    StackError,
    choose_stack,
    is_before_layers,
    is_for_all_layers,
    layer_counts,
    modules_of,
    parts,
    split,
    tails_of,
    value_at,
)
from paft_merge.recipe import ModelRef, OutputModule, OutputSlice, Recipe, Source, layer_t


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output tensor and its sources."""

    name: str
    slice: ResolvedSlice
    t: float
    """Place on gradients, in [0, 1]."""
    template_name: str
    """The template's name of the tensor, whose dtype and shape it has."""
    names: tuple[str, ...] | None = None
    """Each source's name of the tensor; None: the output's."""

    def name_in(self, i: int) -> str:
        """Source `i`'s name of the tensor."""
        return self.name if self.names is None else self.names[i]


@dataclass(frozen=True, eq=False)
class ResolvedSlice:
    """An output slice with its models opened."""

    output: OutputSlice
    base: Model | None
    """The model that deltas are taken from; None where the method has no base."""
    template: Model
    """The model whose names, dtypes and shapes the slice has: the base where the slice has it, else the first source."""
    sources: tuple[tuple[Source, Model], ...]
    """The models that are merged: all sources but the base, or all where the method has no base."""
    module: str | None

    @classmethod
    def of(
        cls, output: OutputSlice, module: str | None, models: Mapping[ModelRef, Model], base_counts: bool
    ) -> ResolvedSlice:
        """Resolve a slice; `base_counts`: the method treats the base like any other source."""
        listed = [source.ref for source in output.sources]
        sources = tuple((s, models[s.ref]) for s in output.sources if base_counts or s.ref != output.base)
        base = models[output.base] if output.base else None
        whole = all(source.layers is None for source in output.sources)
        template = base if base and (whole or output.base in listed) else models[output.sources[0].ref]
        return cls(output, None if base_counts else base, template, sources, module)

    @property
    def all_models(self) -> list[Model]:
        """Every model once, the template first."""
        base = [self.base] if self.base else []
        return list(dict.fromkeys([self.template, *base, *(model for _, model in self.sources)]))

    @cached_property
    def untied(self) -> dict[str, str]:
        """Tied tensors that an adapter unties and the template does not store, with the tensor each is tied to."""
        stored = self.template.checkpoint.tensors
        adapters = [m.adapter for m in self.all_models if m.adapter]
        return {name: tied_to for a in adapters for name, tied_to in a.unties.items() if name not in stored}


@dataclass(frozen=True)
class Renumbered:
    """A stack of the output that is made by slices."""

    stack: Stack
    layers: tuple[tuple[Checkpoint, int], ...]
    """For every output layer the template's checkpoint and layer."""
    stacks: Mapping[int, Stack]
    """The stack of every checkpoint in the slices, by its id."""

    def count_of(self, checkpoint: Checkpoint) -> int:
        """The number of layers of a checkpoint's stack."""
        return self.stacks[id(checkpoint)].count

    @property
    def moved(self) -> bool:
        """Whether a layer changes its number or is left out."""
        return [at for _, at in self.layers] != list(range(self.stack.count))


@dataclass
class OutputTensors:
    """An iterable of the output's tensors; iterating notes errors in `problems` and `warnings`."""

    recipe: Recipe
    models: Mapping[ModelRef, Model]
    problems: Problems
    faulty: set[str]
    """Tensors of whole-model slices that some model lacks or has in another shape; they are left out."""
    renumbered: list[Renumbered] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    tensor_names: str | None = None
    """`intersection` or `union`, for files that hold different tensors."""

    @cached_property
    def modules(self) -> list[tuple[OutputModule, list[ResolvedSlice]]]:
        """Every module of the recipe with its slices, resolved."""
        base_counts = self.recipe.method.base == "ignored"
        return [
            (module, [ResolvedSlice.of(output, module.name, self.models, base_counts) for output in module.slices])
            for module in self.recipe.modules
        ]

    @cached_property
    def config_source(self) -> Model:
        """The model whose names, order, config and side files the output has: the base, or the first model."""
        base = self.recipe.base_model
        return self.models[base] if base else self.modules[0][1][0].template

    @property
    def whole(self) -> bool:
        """Whether every module is made of whole models, which keeps the names of tensors."""
        return not any(source.layers for output in self.recipe.slices for source in output.sources)

    def __iter__(self) -> Iterator[OutputTensor]:
        """Every output tensor, in the template's order for whole models; for slices, the tensors in layers come layer by layer."""
        self._warn_of_omitted_modules()
        for module, slices in self.modules:
            if slices[0].output.sources[0].layers is None:
                yield from self._of_some(slices[0]) if self.tensor_names else self._whole(slices[0])
            else:
                with self.problems.catching():
                    yield from list(self._sliced(module, slices))

    def names_in(self, checkpoint: Checkpoint, module: str | None) -> Sequence[str]:
        """The names of a checkpoint that belong to a module; None: all names."""
        if module is None:
            return list(checkpoint.tensors)
        held = self._parts.setdefault(id(checkpoint), parts(list(checkpoint.tensors), self._wanted))
        return [name for name, part in held.items() if part == module]

    @cached_property
    def _parts(self) -> dict[int, dict[str, str]]:
        return {}

    @cached_property
    def _wanted(self) -> list[str]:
        return [module.name for module in self.recipe.modules if module.name is not None]

    def _whole(self, slice_: ResolvedSlice) -> Iterator[OutputTensor]:
        names = [*self.names_in(slice_.template.checkpoint, slice_.module)]
        names += [name for name in slice_.untied if slice_.module is None or self._takes(name, slice_.module)]
        counts = layer_counts(names)
        for name in names:
            if slice_.untied.get(name, name) not in self.faulty:
                found = split(name)
                yield OutputTensor(name, slice_, layer_t(found[1], counts[found[0]]) if found else 0.0, name)

    def _of_some(self, slice_: ResolvedSlice) -> Iterator[OutputTensor]:
        """Tensors that all models have, or with `union` that some have, each made of the models that have it."""
        models, left = slice_.all_models, list[str]()
        names = list(dict.fromkeys(name for model in models for name in model.checkpoint.tensors))
        counts, reduced = layer_counts(names), dict[tuple[int, ...], ResolvedSlice | None]()
        for name in names:
            having = [model for model in models if model.has(name)]
            made: ResolvedSlice | None = slice_
            if len(having) < len(models):
                left.append(name)
                key = tuple(map(id, having))
                if key not in reduced:
                    reduced[key] = self._among(slice_, having, name) if self.tensor_names == "union" else None
                made = reduced[key]
            if made and name not in self.faulty:
                found = split(name)
                yield OutputTensor(name, made, layer_t(found[1], counts[found[0]]) if found else 0.0, name)
        if left:
            done = "merged from those that have them" if self.tensor_names == "union" else "left out"
            what = f"{len(left):,} tensors are not in every file ({join_first(left, 2)}) and are {done}"
            self.warnings.append(Problem("TENSOR_NAMES", self.config_source.ref, what))

    def _among(self, slice_: ResolvedSlice, having: Sequence[Model], name: str) -> ResolvedSlice | None:
        """The slice with only the models that have a tensor; None, with a problem, if the method needs the others."""
        method, least = self.recipe.method, self.recipe.method.min_sources
        sources = tuple((source, model) for source, model in slice_.sources if model in having)
        fix = "leave such tensors out with tensor_names='intersection'"
        if slice_.base and slice_.base not in having:
            what = f"lacks {quote(name)}, which {having[0].ref} has, and {method.name} needs the base's"
            self.problems.add("KEYS_MISSING", slice_.base.ref, what, fix)
        elif len(sources) < least and not (slice_.base and not sources):
            what = f"is in {len(sources)} of the sources, and {method.name} takes at least {least}"
            self.problems.add("KEYS_MISSING", quote(name), what, fix)
        else:
            return replace(slice_, template=slice_.base or sources[0][1], sources=sources)
        return None

    def _takes(self, name: str, module: str) -> bool:
        return parts([*self.config_source.checkpoint.tensors, name], self._wanted).get(name) == module

    # --- slices -------------------------------------------------------------------------------------------------------

    def _sliced(self, module: OutputModule, slices: Sequence[ResolvedSlice]) -> Iterator[OutputTensor]:
        stacks = self._stacks(slices)
        first, last = slices[0], slices[-1]
        prefix = stacks[id(first.template.checkpoint)].prefix
        self._warn_of_tied_head(module, first, last)
        yield from self._outside(first, stacks, before=True)
        follows: list[tuple[Checkpoint, int]] = []
        for slice_ in slices:
            yield from self._layers(slice_, stacks, prefix, follows)
        yield from self._outside(last, stacks, before=False)
        yield from self._predicting(last, stacks, prefix, len(follows))
        self.renumbered.append(Renumbered(stacks[id(self.config_source.checkpoint)], tuple(follows), stacks))

    def _stacks(self, slices: Sequence[ResolvedSlice]) -> dict[int, Stack]:
        """The stack that layer ranges count, for every checkpoint in the slices.

        Raises:
            CheckpointError: a checkpoint has no such stack, or a range ends after its last layer.
        """
        problems, stacks = Problems(), dict[int, Stack]()
        for slice_ in slices:
            for source in slice_.output.sources:
                model = self.models[source.ref]
                self._stack(model, slice_, stacks, problems)
                stack = stacks.get(id(model.checkpoint))
                if stack and source.layers and source.layers[1] > stack.count:
                    what, fix = _range_error(source, source.layers, stack)
                    problems.add("LAYER_RANGE", f"{source.spot}.layer_range", what, fix)
        self._stack(self.config_source, slices[0], stacks, problems)
        problems.raise_as(CheckpointError)
        return stacks

    def _stack(self, model: Model, slice_: ResolvedSlice, stacks: dict[int, Stack], problems: Problems) -> None:
        if id(model.checkpoint) not in stacks:
            try:
                names = self.names_in(model.checkpoint, slice_.module)
                stacks[id(model.checkpoint)] = choose_stack(names, model.checkpoint.config)
            except StackError as refusal:
                problems.add("LAYERS", model.ref, refusal.what, refusal.fix)

    def _layers(
        self, slice_: ResolvedSlice, stacks: Mapping[int, Stack], prefix: str, follows: list[tuple[Checkpoint, int]]
    ) -> Iterator[OutputTensor]:
        """The tensors of a slice's layers; `follows`, the template's layer for every output layer, grows by them."""
        ranges = {source.ref: source.layers or (0, 0) for source in slice_.output.sources}
        template = slice_.template.checkpoint
        first = next(start for ref, (start, _) in ranges.items() if self.models[ref] is slice_.template)
        start, end = next(iter(ranges.values()))
        for k in range(end - start):
            at, t = len(follows), layer_t(k, end - start)
            tails = self._common_tails(slice_, first + k, ranges, k, stacks)
            own = f"{stacks[id(template)].prefix}{first + k}."
            prefixes = [f"{stacks[id(m.checkpoint)].prefix}{ranges[s.ref][0] + k}." for s, m in slice_.sources]
            for tail in tails:
                names = tuple(f"{one}{tail}" for one in prefixes)
                yield OutputTensor(f"{prefix}{at}.{tail}", slice_, t, f"{own}{tail}", names)
            follows.append((template, first + k))

    def _tails(self, checkpoint: Checkpoint, stacks: Mapping[int, Stack]) -> Mapping[int, dict[str, None]]:
        """For each layer of a checkpoint the names of its tensors without stack and number, in order."""
        if id(checkpoint) not in self._known_tails:
            self._known_tails[id(checkpoint)] = tails_of(checkpoint.tensors, stacks[id(checkpoint)].prefix)
        return self._known_tails[id(checkpoint)]

    @cached_property
    def _known_tails(self) -> dict[int, Mapping[int, dict[str, None]]]:
        return {}

    def _common_tails(
        self, slice_: ResolvedSlice, layer: int, ranges: Mapping[ModelRef, tuple[int, int]], k: int,
        stacks: Mapping[int, Stack],
    ) -> list[str]:  # fmt: skip
        """The tensors that all sources have in their `k`-th layer, `layer` of the template; notes the others."""
        tails = self._tails(slice_.template.checkpoint, stacks)[layer]
        common, owner = list(tails), f"layer {layer} of {slice_.template.ref}"
        for ref, (first, _) in ranges.items():
            theirs = self._tails(self.models[ref].checkpoint, stacks)[first + k]
            where = f"{ref}: layer {first + k}"
            compare_names(tails, theirs, where, owner, self.problems, "pair layers of the same kind")
            common = [tail for tail in common if tail in theirs]
        return common

    def _predicting(
        self, last: ResolvedSlice, stacks: Mapping[int, Stack], prefix: str, end: int
    ) -> Iterator[OutputTensor]:
        """The layers after the last that predict further tokens, made of the last slice's sources like the head."""
        template = stacks[id(last.template.checkpoint)]
        for k in range(template.beyond):
            layer = template.count + k
            tails = list(self._tails(last.template.checkpoint, stacks)[layer])
            for model in last.all_models:
                own = stacks[id(model.checkpoint)]
                theirs = self._tails(model.checkpoint, stacks).get(own.count + k, {})
                if missing := [tail for tail in tails if tail not in theirs]:
                    owner = f"layer {layer} of {last.template.ref}"
                    what = f"lacks {join_first(missing)} of {owner}, which predicts further tokens"
                    self.problems.add("KEYS_MISSING", model.ref, what, "merge models that both have it")
                    tails = [tail for tail in tails if tail in theirs]
            of_sources = [stacks[id(model.checkpoint)] for _, model in last.sources]
            for tail in tails:
                names = tuple(f"{own.prefix}{own.count + k}.{tail}" for own in of_sources)
                yield OutputTensor(f"{prefix}{end + k}.{tail}", last, 0.0, f"{template.prefix}{layer}.{tail}", names)

    def _outside(self, slice_: ResolvedSlice, stacks: Mapping[int, Stack], *, before: bool) -> Iterator[OutputTensor]:
        """The tensors before the layers, other stacks included, or after them, made of a slice's sources."""
        template, fix = slice_.template, "merge models of one architecture"
        names = [*self._names_outside(template.checkpoint, slice_, stacks, before), *slice_.untied]
        for model in slice_.all_models:
            theirs = self._names_outside(model.checkpoint, slice_, stacks, before)
            if extra := [name for name in theirs if name not in names]:
                self.problems.add("KEYS_EXTRA", model.ref, f"has {join_first(extra)}, which {template.ref} lacks", fix)
            if missing := [name for name in names if not model.has(slice_.untied.get(name, name))]:
                self.problems.add(
                    "KEYS_MISSING", model.ref, f"lacks {join_first(missing)}, which {template.ref} has", fix
                )
                names = [name for name in names if name not in missing]
        for name in names:
            if is_before_layers(name) == before or name not in slice_.untied:
                yield OutputTensor(name, slice_, 0.0, name)

    def _names_outside(
        self, checkpoint: Checkpoint, slice_: ResolvedSlice, stacks: Mapping[int, Stack], before: bool
    ) -> list[str]:
        own = stacks[id(checkpoint)].prefix
        found = [(name, split(name)) for name in self.names_in(checkpoint, slice_.module)]
        outside = [(n, at) for n, at in found if at is None or at[0] != own or is_for_all_layers(at[2])]
        return [name for name, place in outside if (place is not None or is_before_layers(name)) == before]

    # --- warnings ----------------------------------------------------------------------------------------------------

    def _warn_of_tied_head(self, module: OutputModule, first: ResolvedSlice, last: ResolvedSlice) -> None:
        """A head that is tied to the embedding is made of the first slice's sources, not of the last's."""
        config = self.config_source.checkpoint.config
        tied = any(value_at(config, (*section, "tie_word_embeddings")) for section in ((), ("text_config",)))
        if tied and first.all_models != last.all_models and self._has_embedding_and_no_head(module):
            used = ", ".join(model.ref for model in first.all_models)
            what = f"the head is tied to the embedding, so it is made of {used}, as the first slice is"
            self.warnings.append(Problem("TIED_HEAD", str(module.slices[-1].spot), what))

    def _has_embedding_and_no_head(self, module: OutputModule) -> bool:
        names = self.names_in(self.config_source.checkpoint, module.name)
        return any(re.search(r"embed_tokens|embed_in|wte|word_embeddings", n) for n in names) and not any(
            re.search(r"lm_head|embed_out|output\.weight", n) for n in self.config_source.checkpoint.tensors
        )

    def _warn_of_omitted_modules(self) -> None:
        """Modules that the recipe does not list are left out of the output, as in mergekit."""
        if not self._wanted:
            return
        names = list(self.config_source.checkpoint.tensors)
        taken = parts(names, self._wanted)
        where = self.recipe.located.spot(("modules",))
        for module in self.recipe.modules:
            if module.name not in taken.values():
                known = ", ".join(sorted(set(modules_of(names).values())))
                what = f"{self.config_source.ref} has no tensors of a module {module.name}"
                self.problems.add(
                    "MODULE_UNKNOWN", module.spot, what, f"it has {known}; or name a prefix of its tensors"
                )
        left = [name for name in names if name not in taken]
        if left:
            what = f"{len(left):,} tensors belong to no module listed here ({join_first(left, 2)}) and are not written"
            self.warnings.append(Problem("MODULE_OMITTED", str(where), what, "list their module to keep them"))


def _range_error(source: Source, layers: tuple[int, int], stack: Stack) -> tuple[str, str]:
    """The message and the fix for a range that ends after the last layer of its model."""
    (first, end), count = layers, stack.count
    what = f"[{first}, {end}] goes to layer {end - 1}, and {source.ref} has {count}, 0 to {count - 1}"
    if stack.beyond:
        what += f"; those for multi-token prediction ({stack.beyond}) follow the last layer automatically"
    return what, f"the end is not included: [{min(first, count - 1)}, {count}] ends with the last layer"
