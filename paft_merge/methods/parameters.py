"""What a method is to a recipe: its parameters, the sources it takes, and the rule it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from paft_merge.compute.blocks import Election
    from paft_merge.methods.rules.rule import Rule, WholeRule

REQUIRED: Final = object()
"""The default of a parameter that a recipe must give."""

Sources: TypeAlias = Sequence[Mapping[str, Any]]
"""Resolved parameters, one mapping a source."""
Shared: TypeAlias = Mapping[str, Any]
"""Resolved parameters that hold for all sources."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method as a recipe writes it."""

    name: str
    type: type
    """bool, int, float or str."""
    scope: Literal["source", "shared"]
    """`source`: one value per source, never for the base. `shared`: one value per tensor."""
    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    """The words that a str may be. A bool is read as `(no, yes)` by `flags`."""
    flags: tuple[str, str] | None = None
    low: float = -float("inf")
    high: float = float("inf")
    """Closed bounds of a number."""
    inert: bool = False
    """Accepted because recipes have it, and without any effect."""


@dataclass(frozen=True)
class Method:
    """A merge method: what it accepts, and whose it is."""

    name: str
    title: str
    paper: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "ignored"]
    """`ignored`: the base, when it is listed, is a source like any other."""
    rule: Callable[[Sources, Shared, Sequence[int]], Rule | WholeRule]
    """`rule(per source, shared, keys)` from resolved parameters and each source's random stream.

    Raises ValueError for values that do not go together.
    """
    min_sources: int = 1
    """Fewest sources besides the base (with `ignored`: in all)."""
    max_sources: int | None = None
    streamed: bool = True
    """Merged block by block; else by mergekit's own function, on whole tensors."""

    def parameter(self, name: str) -> Parameter | None:
        """The parameter called `name`, or None."""
        return next((p for p in self.parameters if p.name == name), None)


LAMBDA = Parameter("lambda", float, "shared", 1.0, "Multiplies the merged delta.")
INT8_MASK = Parameter(
    "int8_mask", bool, "shared", False, "Accepted for mergekit's recipes; masks are never stored here.", inert=True
)
TRIM_SCOPE = Parameter(
    "trim_scope", str, "shared", "tensor",
    "Rank magnitudes in each tensor (mergekit, PEFT) or over the whole model (TIES paper; every tie of the last is kept).",
    choices=("tensor", "global"),
)  # fmt: skip

_RESCALE = (
    "Scale what survives so that the delta keeps its L1 norm (mergekit's rule; the DARE paper divides by the density)."
)


def weight(default: Any = REQUIRED) -> Parameter:
    return Parameter("weight", float, "source", default, "The scalar of this source. May be negative.")


def density(doc: str = "Share of the delta's entries that is kept, by magnitude, in each tensor.") -> Parameter:
    return Parameter("density", float, "source", 1.0, doc, low=0.0, high=1.0)


def rescale(default: bool) -> Parameter:
    return Parameter("rescale", bool, "shared", default, _RESCALE)


def by_all_weights(default: bool) -> Parameter:
    """`normalize` of a method without an election."""
    return Parameter("normalize", bool, "shared", default, "Divide by the sum of the weights.")


def normalize(default: str) -> Parameter:
    """`normalize` of a method with an election."""
    return Parameter(
        "normalize", str, "shared", default,
        "Divide by the weights of what an entry keeps (mergekit; true), by its number (TIES paper, PEFT), or not at all (false).",
        choices=("weights", "count", "none"), flags=("none", "weights"),
    )  # fmt: skip


def elect(default: str) -> tuple[Parameter, Parameter]:
    return (
        Parameter(
            "elect", str, "shared", default,
            "What decides a sign: the sum of weight * delta (mergekit), of deltas (TIES paper, PEFT), of signs (PAFT), or nothing.",
            choices=("weighted", "unweighted", "count", "none"),
        ),
        Parameter(
            "elect_tie", str, "shared", "positive",
            "What a sum of zero elects: + (mergekit, PEFT) or nothing (sgn(0) = 0 in the papers' formulas).",
            choices=("positive", "zero"),
        ),
    )  # fmt: skip


def election(sources: Sources, shared: Shared) -> Election:
    """The election of resolved parameters; a plain weighted sum for a method without `elect`.

    Such a method normalizes by all the weights, as in mergekit, not by those of the entries that survive.
    """
    from paft_merge.compute.blocks import Election

    weights = tuple(s["weight"] for s in sources)
    if "elect" not in shared:
        return Election(shares(weights, shared["normalize"], zero=1.0), "none", True, "none", shared["lambda"])
    positive = shared["elect_tie"] == "positive"
    return Election(weights, shared["elect"], positive, shared["normalize"], shared["lambda"])


def shares(weights: Sequence[float], normalized: bool, zero: float | None = None) -> tuple[float, ...]:
    """`weights` over their sum; a sum of (nearly) zero is taken as `zero`, or refused.

    Raises:
        ValueError: the weights add up to zero, `normalized` is set, and there is no `zero`.
    """
    total = sum(weights) if normalized else 1.0
    if abs(total) < 1e-8:
        if zero is None:
            raise ValueError("the weights add up to zero, so they cannot be normalized; write normalize: false")
        total = zero
    return tuple(w / total for w in weights)
