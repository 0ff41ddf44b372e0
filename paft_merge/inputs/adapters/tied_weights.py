"""Tied embeddings: the effect of an adapter on one of several parameters that share memory.

PEFT's `merge_and_unload` adds to the shared memory in place. A delta on the input embedding then also changes the
output head, and two deltas, one on each, are both added to both, although in training each changed only the forward
pass of its own layer. Here each parameter gets the delta that was trained for it, and the tie is cut if the deltas
differ. Where PEFT keeps the parameters apart (`modules_to_save`) or together (`trainable_token_indices`), the result is
the same as PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters.binding import DeltaBuilder, vocabulary_of
from paft_merge.inputs.adapters.config import Settings
from paft_merge.inputs.adapters.deltas import Lazy, Pair
from paft_merge.inputs.architecture import Architecture, StoredParameter
from paft_merge.inputs.safetensors_header import join_first


def may_be_tied(config: Mapping[str, Any], builders: Iterable[DeltaBuilder]) -> bool:
    """Whether an adapter may change tied parameters; a cheap test, as the exact answer needs the model's class.

    For many classes an absent `tie_word_embeddings` means true.
    """
    inner = [part.get("tie_word_embeddings") for part in config.values() if isinstance(part, dict)]
    if config.get("tie_word_embeddings") is False and True not in inner:
        return False
    rows = vocabulary_of(config)
    return any(one.stored_as or one.new is not None or one.shape[:1] == (rows,) for one in builders)


def untie(
    builders: dict[str, DeltaBuilder], architecture: Architecture, settings: Settings, where: object
) -> dict[str, str]:
    """Give every tied parameter the delta that was trained for it.

    Args:
        builders: by checkpoint tensor; modified: those of tied parameters are added, or removed if they stay tied.
        architecture: the base's class.
        settings: the adapter's configuration.
        where: the adapter's folder, for messages.

    Returns:
        The tensors that were tied to another and must now be written separately, each with the checkpoint tensor that
        holds its old value. Empty if all ties remain.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED if the architecture cannot untie them.
    """
    cut: dict[str, str] = {}
    seen: set[str] = set()
    for name in list(builders):
        known = architecture.name_of(name)
        if known is None or known in seen or not (twins := architecture.tied_to(known)):
            continue
        group = {twin: found for twin in sorted({known, *twins}) if (found := architecture.find(twin))}
        seen |= group.keys()
        _share(group, builders, settings)
        if _all_equal([builders.get(parameter.name) for parameter in group.values()]):
            for parameter in group.values():
                if parameter.stored_as:
                    builders.pop(parameter.name, None)
            continue
        if architecture.tied_to(known, always=True):
            what = f"changes {name!r} unlike {join_first(sorted(twins))}, and this architecture always ties them"
            raise AdapterError.of("ADAPTER_UNSUPPORTED", where, what)
        source = architecture.source_of(known)
        cut |= {parameter.name: parameter.value_in for twin, parameter in group.items() if twin != source}
        for parameter in group.values():
            if parameter.stored_as and parameter.name not in builders:
                builders[parameter.name] = _unchanged(parameter)
    return cut


def _share(group: Mapping[str, StoredParameter], builders: dict[str, DeltaBuilder], settings: Settings) -> None:
    """Copy whatever was trained in shared memory to all: full values, and the rows of `trainable_token_indices`."""
    own = [builder for parameter in group.values() if (builder := builders.get(parameter.name))]
    tying = settings.flag("ensure_weight_tying")
    new = next((one for one in own if one.new is not None and (one.shared or tying)), None)
    tokens = [one for one in own if one.tokens is not None]
    for parameter in group.values():
        name = parameter.name
        builder = builders.get(name) or DeltaBuilder(name, parameter.shape, parameter.row_size, parameter.stored_as)
        if new is not None and builder.new is None:
            builder = replace(builder, new=new.new, shape=new.shape)
        if len(tokens) == 1 and builder.tokens is None and tokens[0].stored_as is None:
            builder = replace(builder, tokens=tokens[0].tokens)
        if builder.new is not None or builder.tokens is not None or builder.low is not None:
            builders[name] = builder


def _unchanged(parameter: StoredParameter) -> DeltaBuilder:
    """A zero delta, as a product of rank 0, of a parameter that must be written separately."""
    count, row_size = parameter.pieces[0].count, parameter.row_size
    nothing = Lazy(lambda: (np.empty((count, 0), np.float32), np.empty((0, row_size), np.float32)))
    return DeltaBuilder(parameter.name, parameter.shape, row_size, parameter.stored_as, "untied", nothing)


def _all_equal(builders: list[DeltaBuilder | None]) -> bool:
    """Whether all of these make the same delta."""
    first = builders[0]
    return all(one is first or (one is not None and first is not None and _equal(one, first)) for one in builders)


def _equal(a: DeltaBuilder, b: DeltaBuilder) -> bool:
    if a.shape != b.shape or (a.new is None) != (b.new is None) or (a.tokens is None) != (b.tokens is None):
        return False
    if not (_equal_pairs(a.low, b.low) and a.magnitude is None and b.magnitude is None and a.make is b.make):
        return False
    if a.tokens is not None and b.tokens is not None and a.tokens is not b.tokens:
        same = np.array_equal(a.tokens.indices, b.tokens.indices) and np.array_equal(a.tokens.values, b.tokens.values)
        if not same:
            return False
    return a.new is None or b.new is None or a.new is b.new or a.new.same(b.new)


def _equal_pairs(a: Lazy[Pair] | None, b: Lazy[Pair] | None) -> bool:
    if a is None or b is None:
        return a is None and b is None
    try:
        return all(
            one.shape == other.shape and np.array_equal(one, other) for one, other in zip(a.get(), b.get(), strict=True)
        )
    finally:
        a.release()
        b.release()
