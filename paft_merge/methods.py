"""The methods: what a recipe may ask for, whose idea it is, its parameters, and METHODS, the one table of them.

Each method is also a function on plain tensors (`ties(deltas, ...)`) that runs the very code of a merge, on one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import torch

    from paft_merge.rules import Rule

REQUIRED: Final = object()
"""The default of a parameter that a recipe must give."""


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


@dataclass(frozen=True)
class Method:
    """A merge method: what it accepts, and whose it is."""

    name: str
    title: str
    paper: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "ignored"]
    """`ignored`: the base, when it is listed, is a source like any other."""
    rule: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any], Sequence[int]], Rule]
    """`rule(per source, shared, keys)` from resolved parameters and each source's random stream."""
    min_sources: int = 1
    """Fewest sources besides the base (with `ignored`: in all)."""
    max_sources: int | None = None

    def parameter(self, name: str) -> Parameter | None:
        """The parameter called `name`, or None."""
        return next((p for p in self.parameters if p.name == name), None)


_ELECT = ("weighted", "unweighted", "count", "none")
_NORMALIZE = ("weights", "count", "none")


def _weight(default: Any = REQUIRED) -> Parameter:
    return Parameter("weight", float, "source", default, "The scalar of this source. May be negative.")


def _density(doc: str = "Share of the delta's entries that is kept, by magnitude, in each tensor.") -> Parameter:
    return Parameter("density", float, "source", 1.0, doc, low=0.0, high=1.0)


_LAMBDA = Parameter("lambda", float, "shared", 1.0, "Multiplies the merged delta.")
_INT8_MASK = Parameter("int8_mask", bool, "shared", False, "Accepted for mergekit's recipes; masks are never stored here.")
_RESCALE = "Scale what survives so that the delta keeps its L1 norm (mergekit's rule; the DARE paper divides by the density)."


def _rescale(default: bool) -> Parameter:
    return Parameter("rescale", bool, "shared", default, _RESCALE)


def _elect(default: str) -> tuple[Parameter, Parameter]:
    return (
        Parameter(
            "elect", str, "shared", default,
            "Whose sum gives an entry its sign: weight * delta (mergekit), the delta (TIES paper, PEFT), its sign (PAFT), or nobody's.",
            choices=_ELECT,
        ),
        Parameter(
            "elect_tie", str, "shared", "positive",
            "What a sum of zero elects: + (mergekit, PEFT) or nothing (sgn(0) = 0 in the papers' formulas).",
            choices=("positive", "zero"),
        ),
    )  # fmt: skip


def _normalize(default: str) -> Parameter:
    return Parameter(
        "normalize", str, "shared", default,
        "Divide by the weights of what is kept at an entry (mergekit; true), by their number (TIES paper, PEFT), or not at all (false).",
        choices=_NORMALIZE, flags=("none", "weights"),
    )  # fmt: skip


_TRIM_SCOPE = Parameter(
    "trim_scope", str, "shared", "tensor",
    "Rank magnitudes within each tensor (mergekit, PEFT) or over the whole model (the TIES paper; every tie of the last one is kept).",
    choices=("tensor", "global"),
)  # fmt: skip


def _linear_rule(sources: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], keys: Sequence[int]) -> Rule:
    from paft_merge.rules import WeightedSum

    return WeightedSum(_shares([s["weight"] for s in sources], shared["normalize"]), "values")


def _task_rule(sources: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], keys: Sequence[int]) -> Rule:
    from paft_merge.rules import WeightedSum

    weights = _shares([s["weight"] for s in sources], shared["normalize"], zero=1.0)
    return WeightedSum(tuple(w * shared["lambda"] for w in weights), "deltas")


def _ties_rule(sources: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], keys: Sequence[int]) -> Rule:
    from paft_merge.rules import Consensus

    return Consensus(
        weights=tuple(s["weight"] for s in sources),
        thin=tuple(_trim(s, soft=shared.get("shrink") == "soft") for s in sources),
        elect=shared["elect"],
        tie_positive=shared["elect_tie"] == "positive",
        normalize=shared["normalize"],
        factor=shared["lambda"],
        rescale=shared.get("rescale") in (True, "l1"),
        trim_scope=shared.get("trim_scope", "tensor"),
    )


def _dare_rule(sources: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], keys: Sequence[int]) -> Rule:
    from paft_merge.rules import Consensus, Drop

    weights, factor, normalize = [s["weight"] for s in sources], shared["lambda"], shared["normalize"]
    if "elect" not in shared and normalize:
        # Without an election mergekit divides by all the weights, not by those that happened to survive at an entry.
        weights = list(_shares(weights, True, zero=1.0))
    return Consensus(
        weights=tuple(weights),
        thin=tuple(Drop(s["density"], key) for s, key in zip(sources, keys, strict=True)),
        elect=shared.get("elect", "none"),
        tie_positive=shared.get("elect_tie", "positive") == "positive",
        normalize=normalize if "elect" in shared else "none",
        factor=factor,
        rescale=shared["rescale"],
    )


def _slerp_rule(sources: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], keys: Sequence[int]) -> Rule:
    from paft_merge.rules import Slerp

    return Slerp(shared["t"])


def _trim(source: Mapping[str, Any], *, soft: bool) -> Any:
    from paft_merge.sparsify import Trim

    rule = next(r for r in ("epsilon", "density", "l1_mass") if source.get(r) is not None)
    return Trim(rule, source[rule], soft=soft)  # type: ignore[arg-type]


def _shares(weights: Sequence[float], normalize: bool, zero: float | None = None) -> tuple[float, ...]:
    """`weights` over their sum; a sum of (nearly) zero is taken as `zero`, or refused."""
    total = sum(weights) if normalize else 1.0
    if abs(total) < 1e-8:
        if zero is None:
            raise ValueError("the weights add up to zero, so they cannot be normalized; write normalize: false")
        total = zero
    return tuple(w / total for w in weights)


_LIST: tuple[Method, ...] = (
    Method(
        "linear", "Linear (model soups)", "arXiv:2203.05482",
        (_weight(), Parameter("normalize", bool, "shared", True, "Divide by the sum of the weights.")),
        "ignored", _linear_rule,
    ),
    Method(
        "task_arithmetic", "Task arithmetic", "arXiv:2212.04089",
        (
            _weight(),
            _density("Accepted for mergekit's recipes, and without effect, as there."),
            Parameter("normalize", bool, "shared", False, "Divide by the sum of the weights."),
            _LAMBDA,
            Parameter("rescale", bool, "shared", False, "Accepted for mergekit's recipes, and without effect, as there."),
            _INT8_MASK,
        ),
        "required", _task_rule,
    ),
    Method(
        "ties", "TIES", "arXiv:2306.01708",
        (_weight(), _density(), _normalize("weights"), _rescale(False), _LAMBDA, *_elect("weighted"), _TRIM_SCOPE, _INT8_MASK),
        "required", _ties_rule,
    ),
    Method(
        "dare_linear", "DARE", "arXiv:2311.03099",
        (
            _weight(),
            _density("Share of the delta's entries that is kept, at random."),
            Parameter("normalize", bool, "shared", False, "Divide by the sum of the weights."),
            _rescale(True), _LAMBDA, _INT8_MASK,
        ),
        "required", _dare_rule,
    ),
    Method(
        "dare_ties", "DARE with TIES' election", "arXiv:2311.03099",
        (
            _weight(),
            _density("Share of the delta's entries that is kept, at random."),
            _normalize("none"), _rescale(True), _LAMBDA, *_elect("weighted"), _INT8_MASK,
        ),
        "required", _dare_rule,
    ),
    Method(
        "slerp", "SLERP", "Shoemake 1985",
        (Parameter("t", float, "shared", REQUIRED, "0 is the base, 1 the other source."),),
        "required", _slerp_rule, min_sources=1, max_sources=1,
    ),
    Method(
        "l1_ties", "L1-aware TIES", "ours, after arXiv:2306.01708 and PAFT (arXiv:2406.17923)",
        (
            _weight(1.0),
            Parameter("density", float, "source", None, "trim: keep this share of the entries.", low=0.0, high=1.0),
            Parameter("l1_mass", float, "source", 0.95, "trim: keep the fewest entries with this share of the L1 norm.", low=0.0, high=1.0),
            Parameter("epsilon", float, "source", None, "trim: keep the entries with |delta| > epsilon.", low=0.0),
            Parameter("shrink", str, "shared", "hard", "soft: also take the threshold off what is kept.", choices=("hard", "soft")),
            Parameter("rescale", str, "shared", "l1", "Scale what survives back to the delta's L1 norm.", choices=("none", "l1"), flags=("none", "l1")),
            _normalize("none"), _LAMBDA, *_elect("none"), _TRIM_SCOPE,
        ),
        "required", _ties_rule,
    ),
    Method(
        "sign_election", "Sign election", "ours, after PAFT (arXiv:2406.17923) and arXiv:2306.01708",
        (_weight(1.0), _density(), _normalize("none"), _LAMBDA, *_elect("weighted"), _TRIM_SCOPE),
        "required", _ties_rule,
    ),
)  # fmt: skip

METHODS: Final[Mapping[str, Method]] = {method.name: method for method in _LIST}
"""Every native method by its recipe name."""


def linear(tensors: Sequence[torch.Tensor], weight: float | Sequence[float], *, normalize: bool = True) -> torch.Tensor:
    """Weighted mean of tensors (model soups, arXiv:2203.05482), or their weighted sum.

    Args:
        tensors: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a tensor.
        normalize: divide by the sum of the weights.

    Returns:
        `[*shape]` float32.

    Raises:
        ValueError: the weights add up to zero and `normalize` is set.
    """
    return _run("linear", tensors, {"weight": weight}, {"normalize": normalize})


def task_arithmetic(
    deltas: Sequence[torch.Tensor], weight: float | Sequence[float], *, normalize: bool = False, lambda_: float = 1.0
) -> torch.Tensor:
    """Weighted sum of deltas (task vectors, arXiv:2212.04089).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta.
        normalize: divide by the sum of the weights (a sum under 1e-8 counts as one).
        lambda_: multiplies the result.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return _run("task_arithmetic", deltas, {"weight": weight}, {"normalize": normalize, "lambda": lambda_})


def ties(
    deltas: Sequence[torch.Tensor],
    weight: float | Sequence[float],
    *,
    density: float | Sequence[float] = 1.0,
    normalize: str | bool = "weights",
    rescale: bool = False,
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
) -> torch.Tensor:
    """Trim, elect signs, merge what agrees (TIES-Merging, arXiv:2306.01708, sec. 3.1).

    The defaults are mergekit's: signs are elected on *weighted* deltas, and a negative weight therefore votes for the
    opposite sign and is subtracted where that sign wins. The paper is `elect="unweighted", normalize="count"` (then
    `lambda_`), and so is PEFT's `ties_svd` before its SVD. PAFT's election is `elect="count"` (`elect_tie="zero"` for sgn(0) = 0).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta.
        density: share kept by magnitude in [0, 1] (the paper's k / 100): `sparsify.kept_count` entries, ties by lowest index.
        normalize: `weights`, `count` or `none`; True is `weights`, False `none`.
        rescale: scale each trimmed delta back to its L1 norm.
        lambda_: multiplies the result.
        elect: `weighted`, `unweighted`, `count` or `none`.
        elect_tie: `positive` or `zero`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    shared = {
        "normalize": normalize, "rescale": rescale, "lambda": lambda_, "elect": elect, "elect_tie": elect_tie,
    }  # fmt: skip
    return _run("ties", deltas, {"weight": weight, "density": density}, shared)


def dare_linear(
    deltas: Sequence[torch.Tensor],
    weight: float | Sequence[float],
    *,
    density: float | Sequence[float] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Drop entries at random, rescale, add up (DARE, arXiv:2311.03099, sec. 3.2).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta.
        density: probability in [0, 1] that an entry stays (the paper's 1 - p).
        normalize: divide by the sum of the weights.
        rescale: multiply by (L1 norm before / L1 norm after), as mergekit does; the paper divides by the density.
        lambda_: multiplies the result.
        seed: of the masks, which depend on the seed, the delta's place in the list and the entry.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    shared = {"normalize": normalize, "rescale": rescale, "lambda": lambda_}
    return _run("dare_linear", deltas, {"weight": weight, "density": density}, shared, seed)


def dare_ties(
    deltas: Sequence[torch.Tensor],
    weight: float | Sequence[float],
    *,
    density: float | Sequence[float] = 1.0,
    normalize: str | bool = "none",
    rescale: bool = True,
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
    seed: int = 0,
) -> torch.Tensor:
    """Drop entries at random, rescale, then elect signs and merge as `ties` does.

    Args and result are those of `dare_linear` and `ties`.
    """
    shared = {
        "normalize": normalize, "rescale": rescale, "lambda": lambda_, "elect": elect, "elect_tie": elect_tie,
    }  # fmt: skip
    return _run("dare_ties", deltas, {"weight": weight, "density": density}, shared, seed)


def slerp(base: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical interpolation of two tensors as flat vectors (see `rules.Slerp` for the degenerate cases).

    Args:
        base, other: `[*shape]`, any float dtype; not modified.
        t: 0 gives `base`, 1 gives `other`; values outside [0, 1] extrapolate.

    Returns:
        `[*shape]` float32.
    """
    return _run("slerp", [base, other], {}, {"t": t})


def l1_ties(
    deltas: Sequence[torch.Tensor],
    weight: float | Sequence[float] = 1.0,
    *,
    density: float | Sequence[float] | None = None,
    l1_mass: float | Sequence[float] | None = 0.95,
    epsilon: float | Sequence[float] | None = None,
    shrink: str = "hard",
    rescale: str | bool = "l1",
    normalize: str | bool = "none",
    lambda_: float = 1.0,
    elect: str = "none",
    elect_tie: str = "positive",
) -> torch.Tensor:
    """TIES that trims by what sparse training made: by L1 mass rather than by a fixed density.

    A delta that was trained with an L1 penalty (PAFT, arXiv:2406.17923, eq. 1) holds nearly all of its L1 norm in few
    entries and passes almost untouched; a dense one is cut harder. `shrink="soft"` is the proximal step of the L1 norm.

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta.
        density, l1_mass, epsilon: what is kept (see `sparsify.Trim`); `epsilon` comes before `density`, `density` before `l1_mass`.
        shrink: `hard` or `soft`.
        rescale: `l1` scales each trimmed delta back to its L1 norm; `none` does not.
        normalize, lambda_, elect, elect_tie: as in `ties`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    shared = {
        "shrink": shrink, "rescale": rescale, "normalize": normalize, "lambda": lambda_, "elect": elect, "elect_tie": elect_tie,
    }  # fmt: skip
    source = {"weight": weight, "density": density, "l1_mass": l1_mass, "epsilon": epsilon}
    return _run("l1_ties", deltas, source, shared)


def sign_election(
    deltas: Sequence[torch.Tensor],
    weight: float | Sequence[float] = 1.0,
    *,
    density: float | Sequence[float] = 1.0,
    normalize: str | bool = "none",
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
) -> torch.Tensor:
    """Elect a sign for every entry and add up what agrees with it; nothing is trimmed unless `density` says so.

    Args and result are those of `ties`.
    """
    shared = {"normalize": normalize, "lambda": lambda_, "elect": elect, "elect_tie": elect_tie}
    return _run("sign_election", deltas, {"weight": weight, "density": density}, shared)


def _run(name: str, tensors: Sequence[torch.Tensor], source: dict[str, Any], shared: dict[str, Any], seed: int = 0) -> torch.Tensor:
    """Run a method on whole tensors through the code that a merge runs block by block."""
    from paft_merge.sparsify import stream_key
    from paft_merge.tensors import merge_tensors

    method = METHODS[name]
    for key, value in shared.items():
        parameter = method.parameter(key)
        assert parameter is not None
        if isinstance(value, bool) and parameter.flags:
            shared[key] = parameter.flags[value]
        elif parameter.choices and value not in parameter.choices:
            raise ValueError(f"{key} must be one of {', '.join(parameter.choices)}, got {value!r}")
    sources: list[dict[str, Any]] = [{} for _ in tensors]
    for key, value in source.items():
        values = value if isinstance(value, Sequence) else [value] * len(tensors)
        if len(values) != len(tensors):
            raise ValueError(f"{key} has {len(values)} values for {len(tensors)} tensors")
        for each, one in zip(sources, values, strict=True):
            each[key] = one
    keys = [stream_key(seed, str(i), "", "drop") for i in range(len(tensors))]
    return merge_tensors(method.rule(sources, shared, keys), tensors)
