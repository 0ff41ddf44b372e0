"""PEFT types whose deltas PEFT itself computes: one layer at a time, as its `merge_and_unload` does.

The layer is built alone, with the base's weight in float32 and the adapter's tensors for it, merged, and the old weight
is subtracted. So the memory is that of one layer, but the whole layer is computed even if only some rows are needed.
Types whose layers share state that depends on the other layers get stand-ins for those (see `Scope`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters.binding import About, Binding, PeftType
from paft_merge.inputs.adapters.config import INERT, refuse_unknown
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy
from paft_merge.inputs.adapters.keys import SHARED, Module, TensorNames
from paft_merge.inputs.adapters.patterns import PatternError, check_pattern_of_re
from paft_merge.inputs.adapters.rows import Array
from paft_merge.inputs.architecture import StoredParameter
from paft_merge.inputs.safetensors_header import quote

Scope = Literal["layer", "shapes", "numbers"]
"""What the merge of one layer depends on.

`layer`    that layer alone
`shapes`   also the shapes of all adapted layers: they are built once, without memory for weights
`numbers`  also the place of the layer among all adapted ones: the others are tiny stand-ins
"""

Changes = dict[str, Array]
"""Delta by name of a parameter of one layer (`weight`, `bias`), float32, in the shape of the parameter."""

_MATCHED = ("target_modules", "exclude_modules", "layers_pattern")
"""Fields of a regular expression or several names, apart from those that end in `_pattern`."""

_UPGRADE = "upgrade peft, or merge it with PEFT where it was trained"


class ByPeft(AdapterDelta):
    """A delta that PEFT computes for a whole layer on first use.

    Args:
        shape: shape of the tensor.
        changes: the deltas of the layer's parameters.
        leaf: the name of this one, `weight` or `bias`.
        peft_type: the adapter's type, for reports.
        stored_as: as in `AdapterDelta`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        row_size: int,
        changes: Lazy[Changes],
        leaf: str,
        peft_type: str,
        stored_as: str | None,
    ) -> None:
        super().__init__(shape, row_size, f"{peft_type.lower()}, computed by PEFT", stored_as)
        self._changes, self._leaf = changes, leaf

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        out[:] = self._changes.get()[self._leaf].reshape(-1, self.row_size)[start:stop]

    def release(self) -> None:
        self._changes.release()


def by_peft(
    peft_type: str,
    prefix: str,
    about: str,
    *,
    scope: Scope = "layer",
    layers: str = "linear",
    bias: bool = False,
    only_bias: bool = False,
    refuse: Callable[[Mapping[str, Any]], str] | None = None,
) -> PeftType:
    """A row of the table of types for a type that PEFT computes.

    Args:
        peft_type: as in adapter_config.json.
        prefix: start of the names of its tensors.
        about: method and paper.
        scope: what the merge of one layer depends on.
        layers: the layers that it can adapt.
        bias: whether it also changes the layer's bias.
        only_bias: whether it changes nothing but the bias.
        refuse: gives a reason why an adapter with this configuration has no exact delta; empty if it has one.
    """

    def check_config(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
        known = _fields_of(peft_type)
        if known is None:
            what = f"peft_type: the installed version of peft does not have {peft_type}"
            problems.add("ADAPTER_UNSUPPORTED", path, what, _UPGRADE)
            return
        refuse_unknown(path, raw, known | INERT, peft_type, problems)
        _check_matched(path, raw, problems)
        if refuse and (reason := refuse(raw)):
            problems.add("ADAPTER_UNSUPPORTED", path, reason, "merge it with PEFT where it was trained")

    def bind_module(binding: Binding, module: Module) -> None:
        from paft_merge.inputs.adapters.peft_layer import LayerMerger

        if "merger" not in binding.made:
            binding.made["merger"] = LayerMerger(binding, prefix, scope)
        merger: LayerMerger = binding.made["merger"]
        if module.path != SHARED:
            if module.depth:
                raise binding.wrong(module.path, "is an adapter on an adapter, which PEFT does not merge alone")
            _bind_layer(binding, merger, module.path, "bias" if only_bias else "weight", bias)
        elif binding.keys.modules.keys() == {(SHARED, 0)}:
            for path in merger.targets:
                _bind_layer(binding, merger, path, "weight", bias)

    text = About(about, layers, "PEFT", "one layer" if scope == "layer" else "one layer and the adapter")
    return PeftType(TensorNames(prefix), check_config, bind_module, text)


def _check_matched(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    """Note patterns that PEFT may need very long to match."""
    for field in sorted(field for field in raw if field.endswith("_pattern") or field in _MATCHED):
        given = [raw[field]] if isinstance(raw[field], str) else raw[field] or []
        if not isinstance(given, list | dict):
            problems.add("ADAPTER_CONFIG", path, f"{field}: must be names or patterns, got {given!r}")
            continue
        for key in map(str, given):
            try:
                check_pattern_of_re(key)
            except PatternError as error:
                problems.add("ADAPTER_CONFIG", path, f"{field}: {quote(key)} {error}")


def _bind_layer(binding: Binding, merger: Any, path: str, leaf: str, bias: bool) -> None:
    """Bind a layer's weight, and its bias if the type changes it and the layer has one."""
    main = binding.require(path, f"{path}.{leaf}")
    if main is None:
        return
    found: dict[str, StoredParameter] = {leaf: main}
    if bias and (other := binding.find(f"{path}.bias")):
        found["bias"] = other
    changes = Lazy(lambda: merger.changes(path, found), users=len(found))
    for name, parameter in found.items():
        builder = binding.builder(parameter)
        if len(parameter.pieces) > 1:
            raise binding.wrong(path, "is not a separate layer of the base", "ADAPTER_UNSUPPORTED")
        if builder.make is not None:
            raise binding.wrong(path, "has two deltas for one tensor", "ADAPTER_CONFIG")

        def make(builder: Any = builder, name: str = name) -> AdapterDelta:
            kind = binding.settings.peft_type
            return ByPeft(builder.shape, builder.row_size, changes, name, kind, builder.stored_as)

        builder.make = make
    merger.check(path)


def _fields_of(peft_type: str) -> frozenset[str] | None:
    """The fields of the type's configuration in the installed PEFT; None if it does not have the type.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED, PEFT is not installed.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        what = f"peft_type: PEFT computes the deltas of {peft_type}, and it cannot be imported: {error}"
        raise AdapterError.of("ADAPTER_UNSUPPORTED", peft_type, what, "pip install peft") from None
    config = next((config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == peft_type), None)
    return None if config is None else frozenset(field.name for field in fields(config))
