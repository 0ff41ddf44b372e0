"""Checkpoints that are stored quantised: recognised by config, names and types, and read as float32 values.

A file for each format; `FORMATS` says which `quant_method` it reads. A format that is not there is recognised
(`recognition`), and copied as it is or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from paft_merge.errors import CheckpointError, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import bnb, compressed, fp8, gptq, modelopt, mxfp4
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.inputs.quantized.recognition import quantised
from paft_merge.inputs.quantized.weights import ModulePatterns, QuantizedWeight, Settings, texts
from paft_merge.inputs.safetensors_header import join_first, truncate

Find = Callable[[Checkpoint, Settings, Problems], Iterator[QuantizedWeight]]

FORMATS: Mapping[str, Find] = {
    "fp8": fp8.find,
    "fbgemm_fp8": fp8.find,
    "mxfp4": mxfp4.find,
    "compressed-tensors": compressed.find,
    "modelopt": modelopt.find,
    "gptq": gptq.find_gptq,
    "awq": gptq.find_awq,
    "bitsandbytes": bnb.find,
}
"""By `quant_method`, how the weights of a checkpoint are found."""

_OF_ACTIVATIONS = re.compile(r"[._](input|output|activation|[kvq])_(scale|global_scale|zero_point)(_ub)?$")
"""Tensors of one value for the activations of a quantised model."""


_EXCLUDING = ("modules_to_not_convert", "ignore", "exclude_modules", "llm_int8_skip_modules")
"""Keys of a `quantization_config` that list modules which are not quantised."""


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a quantised checkpoint as its values; the checkpoint itself if it is not quantised in a format of `FORMATS`.

    Which tensors belong together is decided by `quantization_config` and by names, types and shapes, which must agree.

    Raises:
        CheckpointError: with all faults: codes without scales, scales of a wrong shape, layers that the config excludes.
            The checkpoint is closed.
    """
    settings = settings_of(checkpoint.config)
    find = FORMATS.get(_method(settings))
    if find is None:
        return checkpoint
    problems, found = Problems(), quantised(checkpoint)
    weights = {weight.name: weight for weight in find(checkpoint, settings, problems)}
    if not problems.found and not weights and not found:
        return checkpoint
    if not problems.found:
        patterns = ModulePatterns(one for key in _EXCLUDING for one in texts(settings.get(key)))
        excluded = [name for name in weights if patterns.naming(name.removesuffix(".weight"))]
        if excluded:
            what = f"says in config.json that {join_first(excluded)} are not quantised, and they are stored as codes"
            problems.add(
                "CONFIG_MISMATCH", checkpoint.folder, what, "correct quantization_config, or download it again"
            )
        if empty := [name for name, weight in weights.items() if 0 in weight.shape]:
            problems.add(
                "SHAPE_MISMATCH", checkpoint.folder, f"has no entries in {join_first(empty)}", "download it again"
            )
        unknown = [name for name, weight in found.parts.items() if weight not in weights]
        if unknown:
            what = f"is quantised ({found.how}), and {join_first(unknown)} do not belong to a weight of this format"
            problems.add("DTYPE_UNSUPPORTED", checkpoint.folder, what, "dequantise it with the library that wrote it")
    if problems.found:
        checkpoint.close()
        raise CheckpointError(truncate(problems.found, checkpoint.folder))
    activations = [n for n, info in checkpoint.tensors.items() if info.numel == 1 and _OF_ACTIVATIONS.search(n)]
    parts = [part for weight in weights.values() for part in weight.parts]
    return Dequantized(checkpoint, weights.values(), {*found.parts, *parts, *activations})


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Return the `quantization_config` of a model's config, or of a config in it; empty if there is none."""
    for key in ("quantization_config", "compression_config"):
        if isinstance(own := config.get(key), Mapping):
            return own
    nested = (value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping))
    return next((held for inner in nested if (held := settings_of(inner))), {})


def _method(settings: Settings) -> str:
    """The `quant_method`; configs of older versions of bitsandbytes have only its other keys."""
    bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if bits else "")).lower()


def named_otherwise(settings: Settings, names: Iterable[tuple[str, str]]) -> list[str]:
    """Return the new names of weights that a text in a config, such as a module that is not quantised, names before or after only.

    Args:
        settings: a `quantization_config`.
        names: the old name and the new one of each weight.
    """
    patterns = ModulePatterns(_all_texts(settings))
    return [
        new
        for old, new in names
        if patterns.naming(old.removesuffix(".weight")) != patterns.naming(new.removesuffix(".weight"))
    ]


def _all_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _all_texts(one)
