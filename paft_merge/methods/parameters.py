"""A method as a recipe sees it: its parameters, the sources it takes, and the rule that it builds from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from paft_merge.compute.blocks import Election
    from paft_merge.methods.rules.rule import Rule, WholeRule
    from paft_merge.methods.rules.thresholds import Rescale

REQUIRED: Final = object()
"""The default of a parameter that a recipe must give."""

Sources: TypeAlias = Sequence[Mapping[str, Any]]
"""Resolved parameters, one mapping a source."""
Shared: TypeAlias = Mapping[str, Any]
"""Resolved parameters that hold for all sources."""

Weights: TypeAlias = float | str | Sequence[float | str]
"""The weight of all deltas, or of each: numbers, or words of `delta_weight`."""


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
    """The values of a str."""
    flags: tuple[str, str] | None = None
    """The choices that `false` and `true` mean."""
    low: float = -math.inf
    high: float = math.inf
    """Closed bounds of a number."""
    words: tuple[str, ...] = ()
    """Words that a recipe may write in place of a number."""
    inert: bool = False
    """Accepted for compatibility with mergekit's recipes, without effect."""

    def checked(self, value: Any) -> Any:
        """`value`, or the choice that a bool means.

        Raises:
            ValueError: it cannot be used.
        """
        if self.flags and isinstance(value, bool):
            return self.flags[value]
        if fault := self.fault(value):
            raise ValueError(f"{self.name} {fault}, got {value!r}")
        return value

    def fault(self, value: Any) -> str:
        """What `value`, of this type, must be and is not; empty where it can be used."""
        if self.choices:
            return "" if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.type not in (int, float) or (self.words and value in self.words):
            return ""
        if isinstance(value, str):
            return f"must be a number{' or one of ' * bool(self.words)}{', '.join(self.words)}"
        if not math.isfinite(value):
            return "must be finite"
        if self.low <= value <= self.high:
            return ""
        if math.isinf(self.high):
            return f"must be at least {self.low:g}"
        return f"must be at most {self.high:g}" if math.isinf(self.low) else f"must be in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Method:
    """A merge method: its parameters, its source in the literature, and the inputs it accepts."""

    name: str
    title: str
    paper: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "ignored"]
    """`ignored`: a base that is listed is a source like any other."""
    rule: Callable[[Sources, Shared, Sequence[int]], Rule | WholeRule]
    """`rule(per source, shared, keys)` from resolved parameters and each source's random stream.

    Raises ValueError for values that do not go together.
    """
    min_sources: int = 1
    """Fewest sources besides the base (with `ignored`: in all)."""
    max_sources: int | None = None
    streamed: bool = True
    """Merged block by block; else by mergekit's own function, on whole tensors."""
    core_only: bool = False
    """Defined on full-rank matrices only, and so refused where the deltas of adapters are merged outside their core space."""

    def __repr__(self) -> str:
        return f"Method({self.name!r}, {self.title!r}, {len(self.parameters)} parameters)"

    def build(self, sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule | WholeRule:
        """The rule, as `rule` makes it; weights that are words are measured when it merges (see `rules.measured_weights`).

        Raises:
            ValueError: values do not go together.
        """
        if not any(isinstance(source.get("weight"), str) for source in sources):
            return self.rule(sources, shared, keys)
        given: tuple[float | str, ...] = tuple(source["weight"] for source in sources)
        from paft_merge.methods.rules.measured_weights import MeasuredWeights

        def rule(weights: Sequence[float]) -> Rule:
            weighed = [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=True)]
            return self.rule(weighed, shared, keys)  # type: ignore[return-value]

        unit = rule([1.0 if isinstance(weight, str) else weight for weight in given])
        return MeasuredWeights(given, shared.get("weight_scope", "global"), unit, rule)

    def parameter(self, name: str) -> Parameter | None:
        """The parameter called `name`, or None."""
        return next((p for p in self.parameters if p.name == name), None)

    def spread(self, values: Mapping[str, Any], count: int) -> tuple[Sources, Shared]:
        """The parameters of each of `count` sources, and those of all, from values by name.

        A parameter of a source has one value for all, or a list with one a source.

        Raises:
            ValueError: a value cannot be used, or a list has another length.
        """
        sources: list[dict[str, Any]] = [{} for _ in range(count)]
        shared: dict[str, Any] = {}
        for name, value in values.items():
            parameter = self.parameter(name)
            assert parameter is not None
            if parameter.scope == "shared":
                shared[name] = parameter.checked(value)
                continue
            each = value if isinstance(value, tuple | list) else [value] * count
            if len(each) != count:
                raise ValueError(f"{name} has {len(each)} values for {count} sources")
            for source, one in zip(sources, each, strict=True):
                source[name] = one if one is None else parameter.checked(one)
        return sources, shared


LAMBDA = Parameter("lambda", float, "shared", 1.0, "Multiplies the merged delta.")
INT8_MASK = Parameter(
    "int8_mask",
    bool,
    "shared",
    False,
    "Accepted for mergekit's recipes, without effect: no masks are stored.",
    inert=True,
)
TRIM_SCOPE = Parameter(
    "trim_scope", str, "shared", "tensor",
    "Rank magnitudes in each tensor (mergekit, PEFT) or over the whole model (TIES paper; every tie of the last is kept).",
    choices=("tensor", "global"),
)  # fmt: skip
WEIGHT_WORDS: Final = ("equal_norm", "inverse_norm", "auto")
"""Weights that follow from the norms of the deltas; `auto` is `equal_norm`."""
WEIGHT_SCOPE = Parameter(
    "weight_scope", str, "shared", "global",
    "For weight: equal_norm and inverse_norm: the norms are those of the whole delta, or those in each tensor.",
    choices=("global", "tensor"),
)  # fmt: skip


def weight(default: Any = REQUIRED) -> Parameter:
    """The weight of each source."""
    return Parameter("weight", float, "source", default, "The scalar of this source. May be negative.")


def delta_weight(default: Any = REQUIRED) -> Parameter:
    """The weight of each delta, which may follow from the norms of the deltas."""
    return Parameter(
        "weight", float, "source", default,
        "The scalar of this source; may be negative. equal_norm (or auto): weight * delta has the same norm for all. inverse_norm: 1 / norm, with a mean of 1 (NAN).",
        words=WEIGHT_WORDS,
    )  # fmt: skip


def density(doc: str = "Share of the delta's entries that is kept, by magnitude, in each tensor.") -> Parameter:
    """The kept share of each source's delta."""
    return Parameter("density", float, "source", 1.0, doc, low=0.0, high=1.0)


def rescale(default: Rescale) -> Parameter:
    """The norm that a sparsified delta keeps."""
    return Parameter(
        "rescale", str, "shared", default,
        "Scale what survives so that the delta keeps its L1 norm (mergekit's rule; true), its L2 norm (DoTS), or not at all (false).",
        choices=("none", "l1", "l2"), flags=("none", "l1"),
    )  # fmt: skip


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
    """How signs are elected, and the result of a tie."""
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


def signs(normalize: str | bool, lambda_: float, elect: str, elect_tie: str) -> dict[str, Any]:
    """The parameters of an election by name, for `in_memory.run`."""
    return {"normalize": normalize, "lambda_": lambda_, "elect": elect, "elect_tie": elect_tie}


def election(sources: Sources, shared: Shared) -> Election:
    """The election of resolved parameters; a plain weighted sum for a method without `elect`.

    Such a method normalizes by all weights, as mergekit does, not by the weights of the entries that survive.
    """
    from paft_merge.compute.blocks import Election

    if "elect" not in shared:
        return Election(weights(sources, shared["normalize"], zero=1.0), "none", True, "none", shared["lambda"])
    positive = shared["elect_tie"] == "positive"
    return Election(weights(sources, False), shared["elect"], positive, shared["normalize"], shared["lambda"])


def weights(sources: Sources, normalized: bool, zero: float | None = None) -> tuple[float, ...]:
    """The weight of each source.

    Args:
        sources: their resolved parameters.
        normalized: divide by the sum of the weights.
        zero: divisor to use if that sum is nearly zero; None: refuse it.

    Raises:
        ValueError: the weights add up to zero, `normalized` is set, and there is no `zero`.
    """
    given = [source["weight"] for source in sources]
    total = sum(given) if normalized else 1.0
    if abs(total) < 1e-8:
        if zero is None:
            raise ValueError(
                "the weights add up to zero, so they cannot be normalized; change one, or do not normalize"
            )
        total = zero
    return tuple(w / total for w in given)
