"""Tied embeddings: what an adapter on one of several parameters that share memory means for the others.

PEFT's `merge_and_unload` adds to the shared memory in place, so that a delta on the input embedding also changes the
output head (and two deltas, one on each, are both added to both), although the forward pass that was trained changed
only the layer that was adapted. Here each parameter gets what was trained for it, and the tie is cut when that differs.
Where PEFT keeps the parameters apart (`modules_to_save`) or together (`trainable_token_indices`), this agrees with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters.architecture import Architecture, Place
from paft_merge.inputs.adapters.binding import Draft, vocabulary_of
from paft_merge.inputs.adapters.config import Settings
from paft_merge.inputs.adapters.deltas import Lazy, Pair


def may_be_tied(config: Mapping[str, Any], drafts: Iterable[Draft]) -> bool:
    """Can tied parameters be concerned? Asked first, since the answer in full needs the model's class.

    An absent `tie_word_embeddings` is a true one for many classes.
    """
    inner = [part.get("tie_word_embeddings") for part in config.values() if isinstance(part, dict)]
    if config.get("tie_word_embeddings") is False and True not in inner:
        return False
    rows = vocabulary_of(config)
    return any(draft.beneath or draft.new is not None or draft.shape[:1] == (rows,) for draft in drafts)


def untie(drafts: dict[str, Draft], architecture: Architecture, settings: Settings, where: object) -> dict[str, str]:
    """Give every tied parameter the draft that was trained for it, in place.

    Args:
        drafts: by checkpoint tensor; those of tied parameters are added, or dropped when they stay tied.
        architecture: of the base.
        settings: of the adapter.
        where: the adapter's folder, for messages.

    Returns:
        The tensors that were tied to another and must now be written by themselves, each with the checkpoint tensor
        that holds its old value. Empty when everything that was tied still is.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED when the architecture has no way to untie them.
    """
    cut: dict[str, str] = {}
    seen: set[str] = set()
    for name in list(drafts):
        known = architecture.name_of(name)
        if known is None or known in seen or not (twins := architecture.tied_to(known)):
            continue
        group = {twin: place for twin in sorted({known, *twins}) if (place := architecture.place(twin))}
        seen |= group.keys()
        _share(group, drafts, settings)
        names = [place.sites[0].name for place in group.values()]
        if _all_equal([drafts.get(name) for name in names]):
            for place in group.values():
                if place.beneath:
                    drafts.pop(place.sites[0].name, None)
            continue
        if architecture.tied_to(known, always=True):
            others = ", ".join(map(repr, sorted(twins)))
            what = f"adapts {name!r} unlike {others}, and this architecture always ties them"
            raise AdapterError.of("ADAPTER_UNSUPPORTED", where, what)
        source = architecture.source_of(known)
        cut |= {place.sites[0].name: place.stored for twin, place in group.items() if twin != source}
        for place in group.values():
            if place.beneath and place.sites[0].name not in drafts:
                drafts[place.sites[0].name] = _unchanged(place)
    return cut


def _share(group: Mapping[str, Place], drafts: dict[str, Draft], settings: Settings) -> None:
    """Hand on what was trained in shared memory: whole values, and the rows of `trainable_token_indices`."""
    own = [draft for place in group.values() if (draft := drafts.get(place.sites[0].name))]
    tying = settings.flag("ensure_weight_tying")
    new = next((d for d in own if d.new is not None and (d.shared or tying)), None)
    tokens = [d for d in own if d.tokens is not None]
    for place in group.values():
        name = place.sites[0].name
        draft = drafts.get(name) or Draft(name, place.shape, place.row, place.beneath)
        if new is not None and draft.new is None:
            draft = replace(draft, new=new.new, shape=new.shape)
        if len(tokens) == 1 and draft.tokens is None and tokens[0].beneath is None:
            draft = replace(draft, tokens=tokens[0].tokens)
        if draft.new is not None or draft.tokens is not None or draft.low is not None:
            drafts[name] = draft


def _unchanged(place: Place) -> Draft:
    """The draft of a parameter that keeps its value, but must be written by itself: a product of rank 0."""
    name, count = place.sites[0].name, place.sites[0].count
    nothing = Lazy(lambda: (np.empty((count, 0), np.float32), np.empty((0, place.row), np.float32)))
    return Draft(name, place.shape, place.row, place.beneath, "untied", nothing)


def _all_equal(drafts: list[Draft | None]) -> bool:
    """Do all these do the same to a tensor?"""
    first = drafts[0]
    return all(one is first or (one is not None and first is not None and _equal(one, first)) for one in drafts)


def _equal(a: Draft, b: Draft) -> bool:
    if a.shape != b.shape or (a.new is None) != (b.new is None) or (a.tokens is None) != (b.tokens is None):
        return False
    if not (_equal_pairs(a.low, b.low) and a.magnitude is None and b.magnitude is None and a.sparse is b.sparse):
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
