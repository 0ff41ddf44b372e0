"""What differs between a finished model and what its recipe means, in words, from the evidence of the stored tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paft_merge.inputs.architecture import Architecture
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.equivalent_names import NamedLike
from paft_merge.inputs.safetensors_header import without_wrappers
from paft_merge.verifying.evidence import StoredTensor, root

TWICE = 2.01
"""Most steps of the stored type by which rounding twice moves an element."""

CODES = 0.25
"""Largest relative error that codes of four bits or more leave."""


@dataclass(frozen=True)
class Finding:
    """One difference.

    Attributes:
        kind: `missing`, `key`, `shape`, `nonfinite`, `constant`, `unmerged`, `scale`, `factor`, `moved`, `rows`, `dtype`, `twice`,
            `lost`, `rank`, `codes`, `value`; of files: `config`, `vocabulary`, `tokenizer`, `template`, `file`; `answers`.
        where: the tensors, or the file.
        what: the difference.
        fix: what to do.
        count: number of tensors.
        fault: whether the model is not what the recipe means; else it is what rounding does.
    """

    kind: str
    where: str
    what: str
    fix: str = ""
    count: int = 1
    fault: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}{f'; {self.fix}' if self.fix else ''}"

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        return {
            "kind": self.kind, "where": self.where, "what": self.what, "fix": self.fix, "tensors": self.count, "fault": self.fault,
        }  # fmt: skip


Said = tuple[str, str, str, bool]
"""The kind of a difference, its words with `{lost}`, `{scale}`, `{error}` and the like for the numbers of all tensors that have it, the fix, and
whether it is a fault. The kind is empty for a tensor that is as it should be."""

_FINE: Said = ("", "", "", False)


def findings_of(tensors: Sequence[StoredTensor]) -> Iterator[Finding]:
    """Yield a finding for each kind of difference, with the tensors that have it."""
    groups: dict[tuple[Said, float], list[StoredTensor]] = {}
    for tensor in tensors:
        said = said_of(tensor)
        if said[0]:
            scale = {"scale": tensor.scale, "factor": tensor.factor}.get(said[0], 0.0)
            groups.setdefault((said, round(scale, 1)), []).append(tensor)
    for ((kind, what, fix, fault), _), own in groups.items():
        error, meant, update = (math.fsum(getattr(t, name) for t in own) for name in ("error", "meant", "update"))
        scale = math.fsum(t.product for t in own) / update if update else 1.0
        beyond, elements = (sum(getattr(t, name) for t in own) for name in ("beyond", "numel"))
        numbers = {
            "{lost}": f"{min(1.0, root(error, update)):.1%}",
            "{noise}": f"{root(error, update):.1%}",
            "{scale}": f"{scale:.3g}",
            "{factor}": f"{own[0].factor:.3g}",
            "{error}": f"{root(error, meant):.2g}",
            "{part}": f"{beyond:,} of {elements:,} elements",
            "{others}": names_of([name for t in own for name in t.likeness]),
        }
        for mark, text in numbers.items():
            what = what.replace(mark, text)
        yield Finding(kind, names_of([tensor.name for tensor in own]), what, fix, len(own), fault)


def names_of(names: Sequence[str]) -> str:
    """Names for a message, at most three of them."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest:,} more" if rest > 0 else "")


def is_far(tensor: StoredTensor) -> bool:
    """Whether neither rounding nor a scale explains a tensor, so that its values may be from another place."""
    kind, few = said_of(tensor)[0], tensor.beyond < 0.05 * tensor.numel
    return kind in ("value", "scale", "twice", "factor") and (tensor.relative > 0.02 or (kind == "value" and few))


def said_of(t: StoredTensor) -> Said:
    """The difference of a tensor."""
    return next(found for rule in _RULES if (found := rule(t)) is not None)


def _nonfinite(t: StoredTensor) -> Said | None:
    if not t.nonfinite:
        return None
    return (
        "nonfinite",
        "has elements that are NaN or infinite where the recipe's are not, or the reverse",
        "merge again",
        True,
    )


def _factors(t: StoredTensor) -> Said | None:
    """An update that an adapter's factors approximate: the best ones of a rank give a projection of it."""
    if not t.update or not t.is_projection:
        return None
    if t.lost < 0.005:
        return _FINE
    fix = "write a larger rank in output, or kind: checkpoint" if t.lost > 0.2 else ""
    return (
        "rank",
        "has the recipe's update up to the rank and the type of its factors, which loses {lost} of it",
        fix,
        False,
    )


def _narrow(t: StoredTensor) -> Said | None:
    if t.code or t.wanted == t.dtype or DTYPES[t.dtype].bits >= DTYPES[t.wanted].bits or not t.is_rounding:
        return None
    what = f"is stored as {torch_name(t.dtype)}, and the recipe writes {torch_name(t.wanted)}{_share(t)}"
    return "dtype", what, f"store it as {torch_name(t.wanted)}", True


def _rounded(t: StoredTensor) -> Said | None:
    """A tensor that is rounded once, which may lose a small update."""
    if not t.is_rounding or t.code:
        return None
    if t.lost > 0.2 and t.worst:
        if t.stochastic:
            what = f"stochastic rounding to {torch_name(t.dtype)} adds noise of {{noise}} of the update's norm"
            return "lost", what, "write out_dtype: float32 in the recipe", False
        what = f"rounding to {torch_name(t.dtype)} loses {{lost}} of the update, which is smaller than its steps"
        return "lost", what, "write out_dtype: float32 in the recipe, or rounding: stochastic", False
    return _FINE


def _codes(t: StoredTensor) -> Said | None:
    if not t.code or t.relative > CODES or _scaled(t) is not None:
        return None
    return ("codes", f"is rounded to codes ({t.code}){_share(t)}", "", False) if t.worst else _FINE


def _constant(t: StoredTensor) -> Said | None:
    if t.constant is None:
        return None
    what = f"is lost: every element is {t.constant:g}, and the recipe's are not"
    return "constant", what, "store the recipe's values", True


def _unmerged(t: StoredTensor) -> Said | None:
    if not t.update or (t.made and not t.is_base):
        return None
    return "unmerged", "is the base's: the update is not in it", "merge again", True


def _moved(t: StoredTensor) -> Said | None:
    if t.rows:
        return "rows", t.rows, "check the vocabulary, or the layout that wrote it", True
    return ("moved", "holds the values of {others}", "check the names of the tensors", True) if t.likeness else None


def _multiplied(t: StoredTensor) -> Said | None:
    if not t.factor or abs(t.factor - 1) < 0.02:
        return None
    return "factor", "is {factor} times the recipe's", "check weight and normalize in the recipe", True


def _scaled(t: StoredTensor) -> Said | None:
    if not t.update or not t.made or t.unscaled > 0.5:
        return None
    doubt = 5 * t.unscaled * (t.made / (t.numel * t.update)) ** 0.5
    if abs(t.scale - 1) <= max(doubt, 0.02):
        return None
    rounded = f", rounded to {torch_name(t.held_in)} before it was stored as {torch_name(t.dtype)}" if t.held_in else ""
    fix = "check weight, lambda, and lora_alpha / r of the adapter"
    return "scale", f"has {{scale}} times the recipe's update{rounded}", fix, True


def _coarse(t: StoredTensor) -> Said | None:
    if not t.rounded_to:
        return None
    what = f"was rounded to {torch_name(t.rounded_to)} before it was stored as {torch_name(t.dtype)}{_share(t)}"
    return "dtype", what, f"merge in {torch_name(t.dtype)}", True


def _twice(t: StoredTensor) -> Said | None:
    if t.steps > TWICE or t.code:
        return None
    what = f"was rounded more than once: elements are more than half a step of {torch_name(t.dtype)} away{_share(t)}"
    return "twice", what, "round once, from float32", True


def _other(t: StoredTensor) -> Said | None:
    return "value", "differs from the recipe's in {part}, with a relative error of {error}", "merge again", True


_RULES: tuple[Callable[[StoredTensor], Said | None], ...] = (
    _nonfinite, _factors, _narrow, _rounded, _codes, _unmerged, _constant, _moved, _scaled, _multiplied, _coarse, _twice, _other,
)  # fmt: skip
"""In order: the first that applies names the difference."""


def _share(t: StoredTensor) -> str:
    return ", which loses {lost} of the update" if t.update and t.lost >= 0.005 else ""


def torch_name(dtype: str) -> str:
    """A storage type as torch names it."""
    return DTYPES[dtype].torch or dtype


def missing_of(
    missing: Sequence[str], extra: Sequence[str], renamed: Mapping[str, str], copies: Mapping[str, str]
) -> Iterator[Finding]:
    """Yield what names show.

    Args:
        missing: the recipe's tensors that the model does not store.
        extra: the model's tensors that the recipe does not have.
        renamed: missing tensors whose values the model stores under another name.
        copies: extra tensors with the bits of another tensor.
    """
    for name, other in renamed.items():
        yield Finding("key", name, f"is stored as {other}, which transformers does not load", f"rename it to {name}")
    for name, other in copies.items():
        yield Finding("key", name, f"is a copy of {other}, which the recipe stores once", fault=False)
    lost = [name for name in missing if name not in renamed]
    if lost:
        what = "is missing, so that transformers fills in values of a new model"
        yield Finding("missing", names_of(lost), what, "merge again", len(lost))
    new = [name for name in extra if name not in renamed.values() and name not in copies]
    if new:
        yield Finding("key", names_of(new), "is not a tensor of the recipe", "remove it", len(new))


def not_loaded(model: Checkpoint, names: Sequence[str]) -> Iterator[Finding]:
    """Yield the tensors of `names` that are stored under names which transformers does not load, such as those of a wrapper."""
    renamed = {stored: name for name in names for stored in model.stored_names(name) if stored != name}
    if not renamed:
        return
    known = Architecture.of(model.inner if isinstance(model, NamedLike) else model)
    lost = [name for name in renamed if (name in known.unmatched if known else without_wrappers(name) != name)]
    if lost:
        what = f"has a name that transformers does not load; it looks for {renamed[lost[0]]}"
        yield Finding("key", names_of(lost), what, "save the model that is inside of the wrapper", len(lost))
