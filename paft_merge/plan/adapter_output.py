"""The plan of an adapter (`output: {kind: adapter}`): two factors of every merged delta in place of the merged tensor.

Shapes: a delta is `[O, I]` as the base stores it, with the kernel of a convolution in I. PEFT stores lora_A `[r, in]` and
lora_B `[out, r]`; in and out are O and I for an embedding and for HF's `Conv1D`. The delta of E experts in one tensor is
`[E, O, I]`, with lora_A `[E r, in]`, expert by expert, and lora_B `[out, r E]`, the expert varying fastest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from paft_merge.errors import Problem, Problems, RecipeError
from paft_merge.inputs.adapters.deltas import FUSED, LayerKind, Lazy
from paft_merge.inputs.adapters.selection import Selection
from paft_merge.inputs.architecture import Architecture
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.safetensors_header import join_first, truncate
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.output.shards import plan_shards
from paft_merge.plan.expert_modules import beside, is_expert
from paft_merge.plan.merged_deltas import (
    is_sum_of_products,
    is_zero,
    merged_delta,
    rank_of,
    scales_base,
    summands,
    zero_delta,
)
from paft_merge.plan.planned import Factor, MergePlan, PlannedTensor, matrix_of
from paft_merge.plan.side_files import SideFiles
from paft_merge.recipe import ModelRef, Recipe
from paft_merge.training.engine_schema import MAX_RANKS

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PREFIX = "base_model.model."
TRANSPOSED = ("conv1d", "embedding", "transposed_experts")
"""Layers whose stored weight is the transpose of B A."""

_PARAMETERS = (*FUSED, "parameter")
"""Layers that PEFT adapts by the names of their parameters (`target_parameters`)."""

_CLASSES: Mapping[str, LayerKind] = {"Linear": "linear", "Conv1D": "conv1d", "Embedding": "embedding"}


class _Delta(NamedTuple):
    """A merged delta (see `MergedDelta`), and the layer whose weight it changes."""

    tensor: PlannedTensor
    subtracted: Read | None
    module: str
    """As in `Factor`."""
    layer: LayerKind
    wrapper: str = ""
    """The name before `lora_A`, if it is not `module`: PEFT wraps a module with experts once for each of its adapted parameters."""


def adapter_of(plan: MergePlan) -> MergePlan:
    """Turn the plan of a merged checkpoint into that of an adapter with the same merged deltas.

    Args:
        plan: the merged checkpoint. With `rank: auto`, the result has the largest ranks that are possible.

    Raises:
        RecipeError: ADAPTER_OUTPUT, what cannot be stored as an adapter of one base, all of it together.
    """
    planner = _Planner(plan)
    deltas, saved = planner.deltas()
    ranks = {delta.tensor.name: planner.rank(delta) for delta in deltas}
    planner.problems.found = list(dict.fromkeys(planner.problems.found))
    if planner.problems.found:
        raise RecipeError(truncate(planner.problems.found, "the recipe"))
    if not deltas:
        what, fix = (
            "the merged delta is zero, so there is no module to write an adapter for",
            "check weights and sources",
        )
        if planner.excluded:
            what, fix = "include and exclude leave no module to write an adapter for", "name fewer modules in exclude"
        raise RecipeError.of("ADAPTER_OUTPUT", planner.spot, what, fix)
    made = _planned(plan, deltas, saved, ranks)
    output, rank, most = plan.recipe.output, made.config["r"], MAX_RANKS[-1]
    if output.portable and output.rank != "auto" and rank > most:
        what = f"the adapter has rank {rank:,}, and vLLM reads ranks of at most {most}"
        planner.left_out.append(Problem("RANK", str(planner.spot), what, f"write rank: {most}, or less"))
    reads = [read for delta in deltas for read in delta.tensor.inputs.sources]
    for source in dict.fromkeys(read.source for read in reads if read.delta and read.delta.kind == "dora"):
        what = "its delta is that of DoRA, which the base's weights scale, and plain LoRA approximates it"
        planner.left_out.append(
            Problem("DORA", source, what, "see the error; paft resize keeps DoRA, and kind: checkpoint is exact")
        )
    planner.left_out += _not_joined(plan, planner.architecture.get(), deltas)
    return replace(made, warnings=(*plan.warnings, *planner.left_out))


def _not_joined(plan: MergePlan, architecture: Architecture | None, deltas: Sequence[_Delta]) -> list[Problem]:
    """A warning about single experts that transformers holds in one tensor, and whose factors PEFT does not join."""
    from paft_merge.dialects.traits import JOINED_BY_PEFT

    kind = str(plan.config_source.checkpoint.config.get("model_type"))
    names = [delta.tensor.name for delta in deltas if is_expert(delta.tensor.name)]
    if architecture is None or kind in JOINED_BY_PEFT:
        return []
    if all((architecture.name_of(name) or name).endswith(".weight") for name in names):
        return []
    what = (
        f"PEFT has no module for single experts of {kind} with transformers 5, and ignores their factors without a word"
    )
    return [
        Problem(
            "EXPERTS",
            plan.config_source.ref,
            what,
            "for PEFT write kind: checkpoint; paft check says what other programs do",
        )
    ]


def with_ranks(plan: MergePlan, ranks: Mapping[str, int]) -> MergePlan:
    """The plan of an adapter with other ranks.

    Args:
        plan: an adapter, from `adapter_of`.
        ranks: by the name of the delta.
    """
    factors = [tensor.factor for tensor in plan.tensors if tensor.factor and tensor.factor.part == "A"]
    deltas = [_Delta(f.delta, f.subtracted, f.module, f.layer, f.wrapper) for f in factors]
    return _planned(plan, deltas, [tensor for tensor in plan.tensors if not tensor.factor], ranks)


def base_of(recipe: Recipe) -> ModelRef:
    """The model that an adapter is written for: the base, or the first source without its adapters."""
    first = recipe.slices[0]
    return recipe.base_model or first.base or first.sources[0].ref.base


def check_recipe(plan: MergePlan, problems: Problems) -> None:
    """Note what keeps the deltas of a merge from being those of one base."""
    recipe, base = plan.recipe, base_of(plan.recipe)

    def refuse(what: str, fix: str) -> None:
        problems.add("ADAPTER_OUTPUT", recipe.located.spot(("output",)), what, fix)

    if recipe.language.slices or recipe.language.modules:
        form = "slices" if recipe.language.slices else "modules"
        refuse(f"the recipe has {form}, and an adapter keeps the layers of one base", "list models")
    if base.adapters:
        what = f"the base {base} has an adapter itself, and an adapter is of one checkpoint"
        refuse(what, f"write base_model: {base.base}, or merge {base} to a checkpoint first")
    if plan.config_source.checkpoint.computed:
        what = f"the base {base} is another document of the file, which nobody could load with the output"
        refuse(what, "merge that document first, and write its folder as base_model")
    if plan.vocabulary and recipe.tokenizer is not None:
        refuse("the recipe changes the tokenizer, which an adapter does not hold", "remove it")
    if recipe.arithmetic == "mergekit":
        what = "mergekit's arithmetic rounds adapters into their checkpoint, so there is no exact delta"
        refuse(what, "remove arithmetic: mergekit")
    if recipe.language.base_model is None and len({id(m.checkpoint) for m in plan.models}) > 1:
        refuse("the sources are several checkpoints, and none is named as the base", "write base_model")


def module_of(tensor: PlannedTensor, architecture: Lazy[Architecture | None]) -> tuple[str, LayerKind]:
    """Return the module of a tensor as PEFT names it, and its kind; the kind is empty if PEFT cannot adapt it."""
    name = tensor.name
    if is_expert(name) and len(tensor.shape) == 2:
        return name.removesuffix(".weight"), "expert"
    named = [read.delta for read in tensor.inputs.sources if read.delta and read.delta.module]
    module = next((d.module for d in named if f"{d.module}.weight" == name), named[0].module if named else "")
    layer: LayerKind = next((d.layer for d in named if d.layer), "")
    if module and layer and not module.endswith(".router"):
        return module, layer
    known = architecture.get() if len(tensor.shape) > 1 else None
    if known is not None and len(tensor.shape) == 3 and (parameter := known.name_of(name)):
        path = parameter.rpartition(".")[0]
        declared = known.parameters_of(path)
        if declared and type(known.module(path)).__name__ != "Conv1d":
            return parameter, "transposed_experts" if declared[1] else "experts"
    if not name.endswith(".weight") and not module:
        return name, ""
    if known is None and layer:
        return module, layer
    if known is None:
        layer = "embedding" if "embed" in name else "linear"
        layer = "convolution" if len(tensor.shape) > 3 else "" if len(tensor.shape) == 3 else layer
        return module or name.removesuffix(".weight"), layer
    path = module or (known.name_of(name) or name).removesuffix(".weight")
    held = known.module(path)
    found = type(held).__name__
    if found in ("Conv1d", "Conv2d", "Conv3d"):
        return path, "convolution"
    is_matrix = (
        len(tensor.shape) == 2 and "weight" in dict(held.named_parameters(recurse=False)) if held is not None else False
    )
    return path, _CLASSES.get(found, "parameter" if is_matrix else layer)


class _Planner:
    def __init__(self, plan: MergePlan) -> None:
        self.plan, self.recipe, self.problems = plan, plan.recipe, Problems()
        self.output, self.spot = plan.recipe.output, plan.recipe.located.spot(("output",))
        self.base, self.left_out, self.excluded = base_of(plan.recipe), list[Problem](), False
        self.architecture = Lazy(lambda: Architecture.of(plan.config_source.checkpoint))

    def deltas(self) -> tuple[list[_Delta], list[PlannedTensor]]:
        """Every merged delta that is not zero, and the tensors that are stored whole; notes what an adapter cannot hold."""
        check_recipe(self.plan, self.problems)
        if self.recipe.rounding == "stochastic":
            self._refuse("an adapter's factors are rounded to nearest", "remove rounding: stochastic")
        if "float64" in (self.recipe.out_dtype, self.recipe.dtype):
            self._refuse("an adapter is not float64, which no server reads", "write out_dtype: float32")
        found, saved, unfit = list[_Delta](), list[PlannedTensor](), dict[str, list[str]]()
        selection, modules = Selection(self.output.include, self.output.exclude), list[str]()
        for tensor in self.plan.tensors:
            merged = merged_delta(self.plan, tensor)
            if merged is None:
                continue
            if scales_base(merged.tensor.rule):
                why = f"{tensor.method} multiplies the base by {math.fsum(merged.tensor.rule.weights):g}"
                unfit.setdefault(why, []).append(tensor.name)
                continue
            module, layer = module_of(merged.tensor, self.architecture)
            modules.append(module)
            if module not in selection:
                self.excluded = True
                continue
            why = self._unfit(merged.tensor, layer)
            if why and is_zero(merged, self.plan.config_source.checkpoint):
                continue
            if why in (_VECTOR, _EMBEDDING) and not self.output.portable and tensor.name.endswith((".weight", ".bias")):
                saved.append(tensor)
            elif why:
                unfit.setdefault(why, []).append(tensor.name)
            else:
                found.append(_Delta(*merged, module, layer))
        found = [self._wrapped(delta, found) for delta in [*found, *self._zeros_beside(found)]]
        selection.check(modules, self.spot, self.problems)
        for why, names in unfit.items():
            if self.output.unfit == "leave_out":
                self.left_out.append(Problem("LEFT_OUT", str(self.spot), f"{join_first(names)}: {why}"))
            else:
                self._refuse(f"{join_first(names)}: {why}", _way_out(why))
        if self.recipe.space != "weight":
            self._check_space(found, saved)
        adapted = {delta.module for delta in found}
        return found, [replace(one, name=f"{_PREFIX}{self._saved_name(one.name, adapted)}") for one in saved]

    def _zeros_beside(self, found: Sequence[_Delta]) -> list[_Delta]:
        """Deltas of zero for the experts that need factors because of others."""
        tensors = {tensor.name: tensor for tensor in self.plan.tensors if len(tensor.shape) == 2}
        needed = (tensors[name] for name in beside({delta.tensor.name for delta in found}, tensors))
        return [_Delta(*zero_delta(self.plan, one), *module_of(one, self.architecture)) for one in needed]

    def _wrapped(self, delta: _Delta, found: Sequence[_Delta]) -> _Delta:
        """A delta with the name of the wrapper that PEFT has for it: the parameter that its module declares first is innermost."""
        architecture = self.architecture.get() if delta.layer in FUSED else None
        path, _, parameter = delta.module.rpartition(".")
        declared = architecture.parameters_of(path) if architecture else None
        if declared is None:
            return delta
        adapted = {one.module for one in found}
        outside = declared[0][declared[0].index(parameter) + 1 :]
        return delta._replace(wrapper=path + ".base_layer" * sum(f"{path}.{name}" in adapted for name in outside))

    def _saved_name(self, name: str, adapted: Collection[str]) -> str:
        """The name of a whole tensor in the model that PEFT trains."""
        architecture = self.architecture.get()
        module, _, leaf = ((architecture.name_of(name) if architecture else None) or name).rpartition(".")
        return f"{module}.base_layer.{leaf}" if module in adapted else f"{module}.{leaf}"

    def _check_space(self, deltas: Sequence[_Delta], saved: Sequence[PlannedTensor]) -> None:
        """Refuse what has no coordinates in a space of adapters."""
        if saved and self.recipe.method.core_only:
            what = f"{join_first([tensor.name for tensor in saved])}: {self.recipe.merge_method} merges matrices"
            self._refuse(what, "leave these tensors out of the sources, or use another method, such as ties")
        dense = dict[str, list[str]]()
        for delta in deltas:
            inputs = delta.tensor.inputs
            if delta.layer in FUSED:
                what = f"{delta.tensor.name} holds a matrix of each expert, and space: {self.recipe.space} is one of single matrices"
                self._refuse(what, "write space: weight")
                continue
            if not inputs.deltas or delta.tensor.rule.wants == "whole":
                what = f"{delta.tensor.method} merges values, and space: {self.recipe.space} is one of deltas"
                self._refuse(what, "write space: weight, or a method that merges deltas, such as ties")
                continue
            for read in (inputs.sources[i] for i in inputs.active):
                if rank_of(read, inputs.base) is None:
                    dense.setdefault(read.source, []).append(delta.tensor.name)
        for source, names in dense.items():
            what = f"space: {self.recipe.space} is made from the factors of adapters, and the delta of {source} is not a low-rank product"
            self._refuse(f"{what} ({join_first(names)})",
                         "leave this source out, or write space: weight with a number as rank")  # fmt: skip

    def rank(self, delta: _Delta) -> int:
        """The rank of the factors; with `rank: auto`, the largest that is possible."""
        most = min(*matrix_of(delta.tensor.shape, delta.layer), self.output.max_rank or delta.tensor.numel)
        asked = self.output.rank or "sum"
        if isinstance(asked, int):
            return asked
        inputs, rule = delta.tensor.inputs, delta.tensor.rule
        added = summands(inputs, rule)
        active = [i for i, _ in added] if added is not None else inputs.active
        ranks = [rank_of(inputs.sources[i], delta.subtracted or inputs.base) for i in active]
        if self.recipe.space != "weight":
            return min(most, sum(r or 0 for r in ranks)) if asked == "auto" else sum(r or 0 for r in ranks)
        if asked == "auto":
            return most if None in ranks or added is None else min(most, sum(r or 0 for r in ranks))
        if None in ranks:
            name = inputs.sources[active[ranks.index(None)]].source
            self._refuse(f"rank: sum adds up the ranks of adapters, and the delta of {name} is not a low-rank product",
                         "write a number, such as rank: 32, or rank: auto with energy")  # fmt: skip
        return sum(r or 0 for r in ranks)

    def _unfit(self, tensor: PlannedTensor, layer: LayerKind) -> str:
        """Why an adapter cannot hold a delta; empty if it can."""
        base = tensor.inputs.base or tensor.inputs.reads[0]
        if tensor.shape != base.stored_shape:
            return "the vocabulary has other rows than the base"
        if any(read.delta and read.delta.stored_as for read in tensor.inputs.sources) and not layer:
            return "it is tied to another tensor of the base"
        if len(tensor.shape) < 2:
            return _VECTOR
        if layer in FUSED and self.output.portable:
            return _FUSED
        if layer == "parameter" and self.output.portable:
            return "LoRA on a matrix of a module that is not a layer (a router) is not read by every server"
        if self.output.portable and any(read.delta and read.delta.stored_as for read in tensor.inputs.sources):
            return "LoRA on a head that the base ties to its embeddings is not read by every server"
        if layer == "transposed_experts" and tensor.shape[0] == 1:
            return "it is a single expert stored [in, out], which PEFT does not merge correctly"
        if layer == "embedding" and self._feeds_head(tensor.name):
            return "the output head is tied to it, and an adapter would change the embedding alone"
        if layer == "embedding" and not any(read.delta and read.delta.layer for read in tensor.inputs.sources):
            return _EMBEDDING
        if layer in ("embedding", "convolution") and self.output.portable:
            return f"LoRA on {layer}s is not read by every server"
        return "" if layer else "PEFT has no LoRA layer for it"

    def _feeds_head(self, name: str) -> bool:
        """Whether an embedding stays tied to another parameter, which then changes with it in a merged checkpoint."""
        architecture = self.architecture.get()
        if architecture is None:
            tied = self.plan.config_source.checkpoint.config.get("tie_word_embeddings") is True
            return tied and not any(tensor.name.endswith("lm_head.weight") for tensor in self.plan.tensors)
        twins = architecture.tied_to(architecture.name_of(name) or name)
        return bool(twins) and not any(tensor.name in twins for tensor in self.plan.tensors)

    def _refuse(self, what: str, fix: str) -> None:
        self.problems.add("ADAPTER_OUTPUT", self.spot, what, fix)


_VECTOR = "it is a bias or a norm, which LoRA does not change"
_EMBEDDING = "it is an embedding that changes as a whole"


_FUSED = "LoRA on experts in one tensor is not read by every server"


def _way_out(why: str) -> str:
    if why == _FUSED:
        return "write portable: false in output, and then paft convert --to vllm, or leave these modules out of the sources"
    if "multiplies the base" in why:
        return "write merge_method: task_arithmetic, or weights that add up to 1"
    if "not read by every server" in why or why in (_VECTOR, _EMBEDDING):
        return "write portable: false in output, or leave these modules out of the sources"
    return "write kind: checkpoint, or leave these tensors out of the sources"


def _planned(
    plan: MergePlan, deltas: Sequence[_Delta], saved: Sequence[PlannedTensor], ranks: Mapping[str, int]
) -> MergePlan:
    uniform = max(1, *ranks.values())
    # The ranks of experts are equal, because PEFT stacks their factors.
    one_rank = [d.tensor.name for d in deltas if plan.recipe.output.portable or d.layer == "expert"]
    ranks = {**ranks, **dict.fromkeys(one_rank, uniform)}
    dtype = _dtype(plan, deltas, ranks)
    in_space = plan.recipe.space != "weight"
    tensors = [one for delta in deltas for one in _factors(delta, max(1, ranks[delta.tensor.name]), dtype, in_space)]
    tensors = sorted([*tensors, *saved], key=lambda tensor: tensor.name)
    shards = plan_shards({FILE: [(t.name, t.dtype, t.shape) for t in tensors]})
    patterns = {_target(d): ranks[d.tensor.name] for d in deltas if ranks[d.tensor.name] != uniform}
    config = _config(plan, deltas, [tensor.name.removeprefix(_PREFIX) for tensor in saved], uniform, patterns)
    return replace(
        plan, tensors=tuple(tensors), shards=shards, config=config, vocabulary=None, side_files=SideFiles()
    )  # fmt: skip


def _factors(delta: _Delta, rank: int, dtype: str, in_space: bool) -> list[PlannedTensor]:
    """Both factors of a delta, as PEFT stores them."""
    outer, inner = matrix_of(delta.tensor.shape, delta.layer)
    kernel = delta.tensor.shape[2:]
    rows = rank * delta.tensor.shape[0] if delta.layer in FUSED else rank
    shapes: dict[str, tuple[int, ...]] = {"A": (rows, inner), "B": (outer, rows)}
    if delta.layer in TRANSPOSED:
        shapes = {"A": (rows, outer), "B": (inner, rows)}
    elif kernel and delta.layer not in FUSED:
        shapes = {"A": (rank, *delta.tensor.shape[1:]), "B": (outer, rank, *(1 for _ in kernel))}
    name = "lora_embedding_{}" if delta.layer == "embedding" else "lora_{}.weight"
    return [
        replace(
            delta.tensor,
            name=f"{_PREFIX}{delta.wrapper or delta.module}.{name.format(part)}",
            shape=shape,
            dtype=dtype,
            factor=Factor(delta.module, delta.layer, part, delta.tensor, delta.subtracted, in_space, delta.wrapper),  # type: ignore[arg-type]
        )
        for part, shape in shapes.items()
    ]


def _dtype(plan: MergePlan, deltas: Sequence[_Delta], ranks: Mapping[str, int]) -> str:
    """The storage type of the factors: the recipe's; else float32 where they are exact, and otherwise that of the adapters."""
    if wanted := plan.recipe.out_dtype or plan.recipe.dtype:
        return next(d.name for d in DTYPES.values() if d.torch == wanted)
    parts = [part for model in plan.models if model.adapter for part in model.adapter.parts]
    held = {info.dtype for part in parts for info in part.file.tensors.values()}
    exact = all(_is_exact(delta, ranks[delta.tensor.name], plan.recipe.space) for delta in deltas)
    return held.pop() if len(held) == 1 and held <= {"BF16", "F16"} and not exact else "F32"


def _is_exact(delta: _Delta, rank: int, space: str) -> bool:
    """Whether factors of a rank hold a delta exactly, by the headers of its sources."""
    inputs = delta.tensor.inputs
    if space == "ctm":
        return True
    added = summands(inputs, delta.tensor.rule) or ()
    if space != "weight":
        added = [(i, 1.0) for i in inputs.active]
    elif not is_sum_of_products(delta.tensor):
        return False
    ranks = [rank_of(inputs.sources[i], inputs.base) for i, _ in added]
    return None not in ranks and sum(r or 0 for r in ranks) <= rank


def _config(
    plan: MergePlan, deltas: Sequence[_Delta], saved: Sequence[str], rank: int, patterns: Mapping[str, int]
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        plan: the merge.
        deltas: of the adapted modules.
        saved: names of whole tensors.
        rank: of the modules that are not in `patterns`; alpha is the rank everywhere, so that factors are not scaled.
        patterns: other ranks by module.
    """
    modules, base = [delta.module for delta in deltas if delta.layer not in _PARAMETERS], base_of(plan.recipe)
    parameters = _parameters([delta for delta in deltas if delta.layer in _PARAMETERS], plan.config_source.checkpoint)
    wholes = {name.rpartition(".")[0] for name in saved if not name.endswith(".bias")}
    biases = any(name.endswith(".bias") and name.rpartition(".")[0] not in wholes for name in saved)
    checkpoint = plan.config_source.checkpoint
    return {
        "alpha_pattern": dict(patterns),
        "auto_mapping": None,
        "base_model_name_or_path": base.path,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": bool(modules) and all(d.layer == "conv1d" for d in deltas if d.layer not in _PARAMETERS),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": targets_of(sorted(wholes), checkpoint) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(patterns),
        "revision": base.revision,
        "target_modules": targets_of(modules, checkpoint),
        "task_type": task_type_of(plan),
        "use_dora": False,
        "use_rslora": False,
        **(
            {"target_parameters": parameters, "peft_version": "0.19.1", "lora_B_layout": "rank_major"}
            if parameters
            else {}
        ),
    }


def _target(delta: _Delta) -> str:
    """The name of what PEFT adapts: a module, or a parameter."""
    return f"{delta.module}.weight" if delta.layer == "parameter" else delta.module


def _parameters(experts: Sequence[_Delta], base: Checkpoint) -> list[str]:
    """`target_parameters`: the ends of the names, or whole names where an end would also match others that have no factors."""
    adapted, found = {delta.tensor.name for delta in experts}, set[str]()
    for delta in experts:
        end = ".".join(_target(delta).split(".")[-3:])
        wide = any(name.endswith(f".{end}") and name not in adapted for name in base.tensors)
        found.add(_target(delta) if wide else end)
    return sorted(found)


def targets_of(modules: Sequence[str], base: Checkpoint) -> list[str]:
    """Return `target_modules`: the last parts of the names, or whole names where a part would also match other modules."""
    others = {name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")} - {*modules}
    ends = {module.rpartition(".")[2] for module in modules}
    wide = {end for end in ends if any(other == end or other.endswith(f".{end}") for other in others)}
    return sorted({end if (end := module.rpartition(".")[2]) not in wide else module for module in modules})


def task_type_of(plan: MergePlan) -> str | None:
    """Return the task that all adapters state; else that of the base's class."""
    parts = [part for model in plan.models if model.adapter for part in model.adapter.parts]
    stated = {part.config.get("task_type") for part in parts}
    if len(stated) == 1 and isinstance(task := stated.pop(), str):
        return task
    classes = plan.config_source.checkpoint.config.get("architectures") or ()
    return "CAUSAL_LM" if any(str(name).endswith("ForCausalLM") for name in classes) else None
