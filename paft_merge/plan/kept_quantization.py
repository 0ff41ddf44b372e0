"""The plan of a merge that keeps the quantisation of its config source (`quantization: keep`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from paft_merge.errors import Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.models import Model
from paft_merge.inputs.quantized import named_otherwise, settings_of
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.inputs.quantized.weights import QuantizedWeight
from paft_merge.inputs.safetensors_header import join_first
from paft_merge.inputs.tensor_inputs import Inputs, Read
from paft_merge.methods.rules.rule import WeightedSum
from paft_merge.methods.rules.thresholds import stream_key
from paft_merge.plan.planned import COPY, CodedPart, PlannedTensor
from paft_merge.recipe import Recipe


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the codes and scales of its files."""
    return checkpoint.inner if isinstance(checkpoint, Dequantized) else checkpoint


def kept(recipe: Recipe, source: Model, tensors: Sequence[PlannedTensor], problems: Problems) -> list[PlannedTensor]:
    """Return the tensors with codes and scales in place of each weight that the template of its slice stores as such.

    Those of a weight that no source changes are copied.

    Args:
        recipe: the merge.
        source: its config source, whose `quantization_config` the output has.
        tensors: the plan with plain weights.
        problems: receives weights that cannot be written in the format of the config source.
    """
    if not isinstance(source.checkpoint, Dequantized):
        what = f"keep needs a quantised model in a format that is read, and {source.ref} is not one"
        problems.add("RECIPE", recipe.located.spot(("quantization",)), what, "remove it")
        return list(tensors)
    found, refused = list[PlannedTensor](), dict[str, list[str]]()
    for tensor in tensors:
        template = tensor.place.slice.template if tensor.place else source
        name = tensor.place.template_name if tensor.place else tensor.name
        held = template.checkpoint
        if not isinstance(held, Dequantized) or name not in held.weights:
            found.append(tensor)
        elif settings_of(held.inner.config) != settings_of(source.checkpoint.inner.config):
            refused.setdefault(f"of {template.ref}, which is quantised otherwise than {source.ref}", []).append(name)
        elif (only := _unchanged(tensor)) is not None:
            found += _copies(tensor, only)
        elif tensor.shape != held.weights[name].shape:
            refused.setdefault("with another shape than the codes have", []).append(name)
        else:
            found += _coded(recipe, tensor, held.weights[name], Read(template.ref, held, name))
    moved = [
        (one.place.template_name, one.name) for one in tensors if one.place and one.place.template_name != one.name
    ]
    if other := named_otherwise(settings_of(source.checkpoint.inner.config), moved):
        what = f"numbers its layers otherwise in the output, and its quantization_config names {join_first(other)} by number"
        problems.add("CONFIG_MISMATCH", source.ref, what, "remove quantization: keep, which gives plain weights")
    for why, names in refused.items():
        what = f"the merge changes {join_first(names)}, {why}"
        problems.add("DTYPE_UNSUPPORTED", source.ref, what, "remove quantization: keep, which gives plain weights")
    return _in_order([*found, *_others(source, found, problems)], source.checkpoint.inner)


def kept_config(config: Mapping[str, Any], plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes to a config without quantisation that give it the quantisation of the stored one.

    Args:
        config: as it is stored.
        plain: the same without quantisation.
        changes: changes to `plain`.
    """
    found = dict(changes)
    for key, value in config.items():
        if key not in plain:
            found[key] = value
        elif isinstance(value, Mapping) and value != plain[key]:
            found[key] = {**plain[key], **kept_config(value, plain[key], found.get(key, {}))}
    return found


def notice(source: Model, tensors: Sequence[PlannedTensor]) -> list[Problem]:
    """Return a notice of the weights that are rounded to codes again."""
    formats = Counter(tensor.coded.written.format for tensor in tensors if tensor.coded and not tensor.coded.place)
    if not formats:
        return []
    held = ", ".join(f"{count:,} in {form}" for form, count in formats.items())
    what = f"has quantised weights that the merge changes ({held}), which are rounded to codes again"
    return [Problem("QUANTISED", source.ref, what)]


def _unchanged(tensor: PlannedTensor) -> Read | None:
    """The tensor that a planned tensor equals; None: it is computed."""
    reads, rule = tensor.inputs.reads, tensor.rule
    alone = len(reads) == 1 and reads[0].plain and isinstance(rule, WeightedSum) and not rule.weights
    quantised = alone and isinstance(reads[0].checkpoint, Dequantized) and reads[0].name in reads[0].checkpoint.weights
    return reads[0] if quantised else None


def _copies(tensor: PlannedTensor, read: Read) -> Iterator[PlannedTensor]:
    assert isinstance(read.checkpoint, Dequantized)
    for part, name in _parts(read.checkpoint, read.checkpoint.weights[read.name], tensor.name):
        yield _copy(tensor, Read(read.source, read.checkpoint.inner, part), name)


def _copy(tensor: PlannedTensor, read: Read, name: str) -> PlannedTensor:
    inputs, rule = Inputs.one(read), WeightedSum((), "deltas")
    why = tensor.why or "no source changes it"
    return PlannedTensor(name, read.shape, read.dtype, COPY, inputs, rule, place=tensor.place, why=why)


def _coded(recipe: Recipe, tensor: PlannedTensor, weight: QuantizedWeight, template: Read) -> Iterator[PlannedTensor]:
    assert isinstance(template.checkpoint, Dequantized)
    held = template.checkpoint.inner
    together = min(weight.unit * weight.shape[-1], prod(weight.shape))
    merged = replace(tensor, dtype="F32", rounding_key=0, together=together)
    key = stream_key(recipe.seed, "", tensor.name, "round") if recipe.rounding == "stochastic" else 0
    for place, (part, name) in enumerate(_parts(template.checkpoint, weight, tensor.name)):
        info = held.tensors[part]
        if part not in weight.computed:  # such as the shape of packed codes, and scales of activations
            yield _copy(replace(tensor, why="it belongs to the codes"), Read(template.source, held, part), name)
            continue
        made = CodedPart(merged, weight, template, place)
        yield replace(merged, name=name, shape=info.shape, dtype=info.dtype, rounding_key=key, coded=made, together=1)


def _parts(checkpoint: Dequantized, weight: QuantizedWeight, name: str) -> Iterator[tuple[str, str]]:
    """The stored tensors of a weight, and their names in the output; then those for the activations of its module."""
    stem, new = weight.name.removesuffix(".weight"), name.removesuffix(".weight")
    for part in (*weight.parts, *checkpoint.beside.get(stem, ())):
        yield part, new + part.removeprefix(stem)


def _others(source: Model, found: Sequence[PlannedTensor], problems: Problems) -> Iterator[PlannedTensor]:
    """Copies of the stored tensors that belong to no weight, such as scales of a cache."""
    checkpoint = source.checkpoint
    assert isinstance(checkpoint, Dequantized)
    known = {part for weight in checkpoint.weights.values() for part, _ in _parts(checkpoint, weight, weight.name)}
    left = sorted(checkpoint.hidden - known)
    moved = [tensor for tensor in found if tensor.name not in checkpoint.inner.tensors]
    if left and moved:
        what = f"stores {join_first(left)}, which belong to no weight, and layers are renumbered"
        problems.add("DTYPE_UNSUPPORTED", source.ref, what, "remove quantization: keep, which gives plain weights")
        return
    for name in left:
        yield _copy(
            replace(found[0], why="it belongs to no weight", place=None), Read(source.ref, checkpoint.inner, name), name
        )


def _in_order(tensors: list[PlannedTensor], stored: Checkpoint) -> list[PlannedTensor]:
    """The tensors in the order of the stored ones, if they have the same names."""
    order = {name: at for at, name in enumerate(stored.tensors)}
    return sorted(tensors, key=lambda one: order[one.name]) if all(t.name in order for t in tensors) else tensors
