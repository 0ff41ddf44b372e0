"""Where every output tensor comes from: which slice of the recipe makes it, of which tensors, at which point of a gradient.

`models:` keeps the names of the base. `slices:` number the layers of the output anew, slice by slice; what stands before
the layers (embeddings) is made of the first slice's sources and what stands after them (last norm, head) of the last's.
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
from paft_merge.plan.layer_stacks import (
    Stack,
    StackError,
    choose_stack,
    is_before_layers,
    is_for_all_layers,
    layer_t_of,
    modules_of,
    parts,
    split,
    value_at,
)
from paft_merge.recipe import ModelRef, OutputModule, OutputSlice, Recipe, Source, layer_t


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output tensor and what it is made of."""

    name: str
    making: ResolvedSlice
    t: float
    """Place on gradients, in [0, 1]."""
    lead: str
    """What the lead, whose type and shape it has, calls it."""
    names: tuple[str, ...] | None = None
    """What each source calls it; None: as the output does."""

    def name_in(self, i: int) -> str:
        """What source `i` calls it."""
        return self.name if self.names is None else self.names[i]


@dataclass(frozen=True, eq=False)
class ResolvedSlice:
    """An output slice with its models opened."""

    output: OutputSlice
    base: Model | None
    """Whose deltas are merged; None where the method has no base."""
    lead: Model
    """The base where the slice has it, else the first source."""
    sources: tuple[tuple[Source, Model], ...]
    """What is merged: all sources but the base, or all where the method has no base."""
    module: str | None

    @classmethod
    def of(
        cls, output: OutputSlice, module: str | None, models: Mapping[ModelRef, Model], base_counts: bool
    ) -> ResolvedSlice:
        """Open a slice; `base_counts`: the method treats the base like any other source."""
        listed = [source.ref for source in output.sources]
        sources = tuple((s, models[s.ref]) for s in output.sources if base_counts or s.ref != output.base)
        base = models[output.base] if output.base else None
        whole = all(source.layers is None for source in output.sources)
        lead = base if base and (whole or output.base in listed) else models[output.sources[0].ref]
        return cls(output, None if base_counts else base, lead, sources, module)

    @property
    def all_models(self) -> list[Model]:
        """The lead first, then the others, each once."""
        return list(dict.fromkeys([self.lead, *([self.base] if self.base else []), *(m for _, m in self.sources)]))

    @cached_property
    def untied(self) -> dict[str, str]:
        """Tensors that the lead does not store, being tied, but an adapter parts: name to what lies beneath."""
        stored = self.lead.checkpoint.tensors
        adapters = [m.adapter for m in self.all_models if m.adapter]
        return {name: under for a in adapters for name, under in a.unties.items() if name not in stored}


@dataclass(frozen=True)
class Renumbered:
    """A stack of the output whose layers are not those of the donor, one for one."""

    stack: Stack
    layers: tuple[tuple[Checkpoint, int], ...]
    """For every output layer the checkpoint and the layer that it follows."""
    stacks: Mapping[int, Stack]
    """The stack of every checkpoint in the slices, by its id."""

    def count_of(self, checkpoint: Checkpoint) -> int:
        """How many layers the checkpoint has."""
        return self.stacks[id(checkpoint)].count

    @property
    def moved(self) -> bool:
        """Whether a layer has another number than before, or some are left out."""
        return [at for _, at in self.layers] != list(range(self.stack.count))


@dataclass
class Places:
    """Walks the tensors of the output and notes what keeps it from being made."""

    recipe: Recipe
    models: Mapping[ModelRef, Model]
    problems: Problems
    faulty: set[str]
    """Tensors of whole-model slices that some model lacks, or has in another shape."""
    renumbered: list[Renumbered] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    tensor_names: str | None = None
    """`intersection` or `union`, where models may have other tensors than the others."""

    @cached_property
    def makings(self) -> list[tuple[OutputModule, list[ResolvedSlice]]]:
        """Every module with its slices, opened."""
        ignored = self.recipe.method.base == "ignored"
        return [
            (module, [ResolvedSlice.of(output, module.name, self.models, ignored) for output in module.slices])
            for module in self.recipe.modules
        ]

    @cached_property
    def donor(self) -> Model:
        """Whose names, order, config and side files the output has: the base, or the first model."""
        base = self.recipe.base_model
        return self.models[base] if base else self.makings[0][1][0].lead

    @property
    def whole(self) -> bool:
        """Whether every module is made of whole models, so that names stay what they are."""
        return not any(source.layers for output in self.recipe.slices for source in output.sources)

    def __iter__(self) -> Iterator[OutputTensor]:
        """Every output tensor: in the lead's order for whole models; before, layer by layer, and after, for slices."""
        self._tell_omitted()
        for module, makings in self.makings:
            if makings[0].output.sources[0].layers is None:
                yield from self._of_some(makings[0]) if self.tensor_names else self._whole(makings[0])
            else:
                with self.problems.catching():
                    yield from list(self._sliced(module, makings))

    def names_in(self, checkpoint: Checkpoint, module: str | None) -> Sequence[str]:
        """The names of a checkpoint that belong to a module; all without one."""
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

    def _whole(self, making: ResolvedSlice) -> Iterator[OutputTensor]:
        names = [*self.names_in(making.lead.checkpoint, making.module)]
        names += [name for name in making.untied if making.module is None or self._takes(name, making.module)]
        counts = layer_t_of(names)
        for name in names:
            if making.untied.get(name, name) not in self.faulty:
                found = split(name)
                yield OutputTensor(name, making, layer_t(found[1], counts[found[0]]) if found else 0.0, name)

    def _of_some(self, making: ResolvedSlice) -> Iterator[OutputTensor]:
        """Tensors that all models have, or (`union`) that some have, each made of those."""
        models, left = making.all_models, list[str]()
        names = list(dict.fromkeys(name for model in models for name in model.checkpoint.tensors))
        counts, some = layer_t_of(names), dict[tuple[int, ...], ResolvedSlice | None]()
        for name in names:
            having = [model for model in models if model.has(name)]
            made: ResolvedSlice | None = making
            if len(having) < len(models):
                left.append(name)
                key = tuple(map(id, having))
                if key not in some:
                    some[key] = self._among(making, having, name) if self.tensor_names == "union" else None
                made = some[key]
            if made and name not in self.faulty:
                found = split(name)
                yield OutputTensor(name, made, layer_t(found[1], counts[found[0]]) if found else 0.0, name)
        if left:
            done = "made of those that have them" if self.tensor_names == "union" else "left out"
            what = f"{len(left):,} tensors are not in every file ({join_first(left, 2)}) and are {done}"
            self.warnings.append(Problem("TENSOR_NAMES", self.donor.ref, what))

    def _among(self, making: ResolvedSlice, having: Sequence[Model], name: str) -> ResolvedSlice | None:
        """`making` of only the models that have a tensor; None where its method cannot do with them."""
        method, least = self.recipe.method, self.recipe.method.min_sources
        sources = tuple((source, model) for source, model in making.sources if model in having)
        fix = "leave such tensors out with tensor_names='intersection'"
        if making.base and making.base not in having:
            what = f"lacks {quote(name)}, which {having[0].ref} has, and {method.name} needs the base's"
            self.problems.add("KEYS_MISSING", making.base.ref, what, fix)
        elif len(sources) < least and not (making.base and not sources):
            what = f"is in {len(sources)} of the sources, and {method.name} takes at least {least}"
            self.problems.add("KEYS_MISSING", quote(name), what, fix)
        else:
            return replace(making, lead=making.base or sources[0][1], sources=sources)
        return None

    def _takes(self, name: str, module: str) -> bool:
        return parts([*self.donor.checkpoint.tensors, name], self._wanted).get(name) == module

    # --- slices -------------------------------------------------------------------------------------------------------

    def _sliced(self, module: OutputModule, makings: Sequence[ResolvedSlice]) -> Iterator[OutputTensor]:
        stacks = self._stacks(makings)
        first, last = makings[0], makings[-1]
        prefix = stacks[id(first.lead.checkpoint)].prefix
        self._tell_tied(module, first, last)
        yield from self._outside(first, stacks, before=True)
        follows: list[tuple[Checkpoint, int]] = []
        for making in makings:
            yield from self._layers(making, stacks, prefix, follows)
        yield from self._outside(last, stacks, before=False)
        yield from self._predicting(last, stacks, prefix, len(follows))
        self.renumbered.append(Renumbered(stacks[id(self.donor.checkpoint)], tuple(follows), stacks))

    def _stacks(self, makings: Sequence[ResolvedSlice]) -> dict[int, Stack]:
        """The stack that layer ranges count, of every checkpoint in the slices; checks the ranges.

        Raises:
            CheckpointError: there is none, or a range reaches beyond it.
        """
        problems, stacks = Problems(), dict[int, Stack]()
        for making in makings:
            for source in making.output.sources:
                model = self.models[source.ref]
                self._stack(model, making, stacks, problems)
                stack = stacks.get(id(model.checkpoint))
                if stack and source.layers and source.layers[1] > stack.count:
                    a, b = source.layers
                    what = (
                        f"[{a}, {b}] goes to layer {b - 1}, and {source.ref} has {stack.count}, 0 to {stack.count - 1}"
                    )
                    if stack.beyond:
                        what += f", and behind them {stack.beyond} that predicts further tokens and follows the last by itself"
                    fix = (
                        f"the end is not included: [{min(a, stack.count - 1)}, {stack.count}] ends with the last layer"
                    )
                    problems.add("LAYER_RANGE", f"{source.spot}.layer_range", what, fix)
        self._stack(self.donor, makings[0], stacks, problems)
        problems.raise_as(CheckpointError)
        return stacks

    def _stack(self, model: Model, making: ResolvedSlice, stacks: dict[int, Stack], problems: Problems) -> None:
        if id(model.checkpoint) not in stacks:
            try:
                names = self.names_in(model.checkpoint, making.module)
                stacks[id(model.checkpoint)] = choose_stack(names, model.checkpoint.config)
            except StackError as refusal:
                problems.add("LAYERS", model.ref, refusal.what, refusal.fix)

    def _layers(
        self, making: ResolvedSlice, stacks: Mapping[int, Stack], prefix: str, follows: list[tuple[Checkpoint, int]]
    ) -> Iterator[OutputTensor]:
        """The tensors of one slice; `follows` grows by its layers."""
        ranges = {source.ref: source.layers or (0, 0) for source in making.output.sources}
        lead_first = next(r[0] for ref, r in ranges.items() if self.models[ref] is making.lead)
        firsts = [ranges[source.ref][0] for source, _ in making.sources]
        count = next(iter(ranges.values()))
        count_layers = count[1] - count[0]
        for k in range(count_layers):
            at, t = len(follows), layer_t(k, count_layers)
            lead = self._tails(making.lead.checkpoint, stacks)
            tails = self._compare(making, lead_first + k, lead[lead_first + k], ranges, k, stacks)
            lead_prefix = f"{stacks[id(making.lead.checkpoint)].prefix}{lead_first + k}."
            prefixes = [
                f"{stacks[id(model.checkpoint)].prefix}{first + k}."
                for first, (_, model) in zip(firsts, making.sources, strict=True)
            ]
            for tail in tails:
                names = tuple(f"{one}{tail}" for one in prefixes)
                yield OutputTensor(f"{prefix}{at}.{tail}", making, t, f"{lead_prefix}{tail}", names)
            follows.append((making.lead.checkpoint, lead_first + k))

    def _tails(self, checkpoint: Checkpoint, stacks: Mapping[int, Stack]) -> Mapping[int, dict[str, None]]:
        """What stands in each layer of a checkpoint: the parts of names after the layer's number, in order."""
        if id(checkpoint) not in self._known_tails:
            prefix, tails = stacks[id(checkpoint)].prefix, dict[int, dict[str, None]]()
            for name in checkpoint.tensors:
                found = split(name)
                if found and found[0] == prefix and not is_for_all_layers(found[2]):
                    tails.setdefault(found[1], {})[found[2]] = None
            self._known_tails[id(checkpoint)] = tails
        return self._known_tails[id(checkpoint)]

    @cached_property
    def _known_tails(self) -> dict[int, Mapping[int, dict[str, None]]]:
        return {}

    def _compare(
        self, making: ResolvedSlice, of_lead: int, tails: Mapping[str, None], ranges: Mapping[ModelRef, tuple[int, int]],
        k: int, stacks: Mapping[int, Stack],
    ) -> list[str]:  # fmt: skip
        """Every source must have the layer's tensors, and no others; returns those that all have."""
        common = list(tails)
        for ref, (first, _) in ranges.items():
            model = self.models[ref]
            theirs = self._tails(model.checkpoint, stacks)[first + k]
            if theirs.keys() == tails.keys():
                continue
            problems = [
                ("KEYS_MISSING", "lacks", [t for t in tails if t not in theirs], "has"),
                ("KEYS_EXTRA", "has", [t for t in theirs if t not in tails], "lacks"),
            ]
            for code, verb, found, other in problems:
                if found:
                    what = f"{verb} {join_first(found)}, which layer {of_lead} of {making.lead.ref} {other}"
                    self.problems.add(code, f"{ref}: layer {first + k}", what, "pair layers of the same kind")
            common = [tail for tail in common if tail in theirs]
        return common

    def _predicting(
        self, last: ResolvedSlice, stacks: Mapping[int, Stack], prefix: str, end: int
    ) -> Iterator[OutputTensor]:
        """The layers behind the last that predict further tokens: of the last slice's sources, as the head is."""
        lead = stacks[id(last.lead.checkpoint)]
        for k in range(lead.beyond):
            tails = list(self._tails(last.lead.checkpoint, stacks)[lead.count + k])
            for model in last.all_models:
                own = stacks[id(model.checkpoint)]
                theirs = self._tails(model.checkpoint, stacks).get(own.count + k, {})
                if missing := [tail for tail in tails if tail not in theirs]:
                    what = f"lacks {join_first(missing)} of layer {lead.count + k} of {last.lead.ref}, which predicts further tokens"
                    self.problems.add("KEYS_MISSING", model.ref, what, "merge models that both have it")
                    tails = [tail for tail in tails if tail in theirs]
            own_prefixes = [
                f"{stacks[id(model.checkpoint)].prefix}{stacks[id(model.checkpoint)].count + k}."
                for _, model in last.sources
            ]
            for tail in tails:
                names = tuple(f"{one}{tail}" for one in own_prefixes)
                yield OutputTensor(
                    f"{prefix}{end + k}.{tail}", last, 0.0, f"{lead.prefix}{lead.count + k}.{tail}", names
                )

    def _outside(self, making: ResolvedSlice, stacks: Mapping[int, Stack], *, before: bool) -> Iterator[OutputTensor]:
        """What stands before the layers, or after them, made of a slice's sources; other stacks count as before."""
        lead, fix = making.lead, "merge models of one architecture"
        names = [*self._names_outside(lead.checkpoint, making, stacks, before), *making.untied]
        for model in making.all_models:
            theirs = self._names_outside(model.checkpoint, making, stacks, before)
            if extra := [name for name in theirs if name not in names]:
                self.problems.add("KEYS_EXTRA", model.ref, f"has {join_first(extra)}, which {lead.ref} lacks", fix)
            if missing := [name for name in names if not model.has(making.untied.get(name, name))]:
                self.problems.add("KEYS_MISSING", model.ref, f"lacks {join_first(missing)}, which {lead.ref} has", fix)
                names = [name for name in names if name not in missing]
        for name in names:
            if is_before_layers(name) == before or name not in making.untied:
                yield OutputTensor(name, making, 0.0, name)

    def _names_outside(
        self, checkpoint: Checkpoint, making: ResolvedSlice, stacks: Mapping[int, Stack], before: bool
    ) -> list[str]:
        own = stacks[id(checkpoint)].prefix
        found = [(name, split(name)) for name in self.names_in(checkpoint, making.module)]
        outside = [(n, at) for n, at in found if at is None or at[0] != own or is_for_all_layers(at[2])]
        return [name for name, place in outside if (place is not None or is_before_layers(name)) == before]

    # --- what is odd but possible -------------------------------------------------------------------------------------

    def _tell_tied(self, module: OutputModule, first: ResolvedSlice, last: ResolvedSlice) -> None:
        """A head that is the embedding is made of the first slice's sources, though it is used after the last."""
        config = self.donor.checkpoint.config
        tied = any(
            value_at(config, path) for path in (("tie_word_embeddings",), ("text_config", "tie_word_embeddings"))
        )
        if tied and first.all_models != last.all_models and self._has_embedding_and_no_head(module):
            used = ", ".join(model.ref for model in first.all_models)
            what = f"the head is tied to the embedding, so it is made of {used}, as the first slice is"
            self.warnings.append(Problem("TIED_HEAD", str(module.slices[-1].spot), what))

    def _has_embedding_and_no_head(self, module: OutputModule) -> bool:
        names = self.names_in(self.donor.checkpoint, module.name)
        return any(re.search(r"embed_tokens|embed_in|wte|word_embeddings", n) for n in names) and not any(
            re.search(r"lm_head|embed_out|output\.weight", n) for n in self.donor.checkpoint.tensors
        )

    def _tell_omitted(self) -> None:
        """Modules that the recipe does not name, which mergekit leaves out of the output without a word."""
        if not self._wanted:
            return
        names = list(self.donor.checkpoint.tensors)
        taken = parts(names, self._wanted)
        where = self.recipe.located.spot(("modules",))
        for module in self.recipe.modules:
            if module.name not in taken.values():
                known = ", ".join(sorted(set(modules_of(names).values())))
                what = f"{self.donor.ref} has no tensors of a module {module.name}"
                self.problems.add(
                    "MODULE_UNKNOWN", module.spot, what, f"it has {known}; or name a prefix of its tensors"
                )
        left = [name for name in names if name not in taken]
        if left:
            what = f"{len(left):,} tensors belong to no module listed here ({join_first(left, 2)}) and are not written"
            self.warnings.append(Problem("MODULE_OMITTED", str(where), what, "list their module to keep them"))
