"""`--require`: a metric, a scope and a bound. Each failure is a `Problem`, and `paft audit` then exits with 3.

    sparsity(1e-5) >= 0.9                       of every source, all its tensors together
    sparsity(1e-5) [source=sft, layer=*] >= 90% in each layer of sft by itself
    hoyer [module=q_proj] > 0.3                 over the q_proj of all layers
    conflict_weighted < 0.4                     of every pair
    elected_energy [layer=*] >= 0.5             of every source in the preview, layer by layer

A scope names `source`, `layer`, `module`, `tensor`, each with a pattern (`*`, `?`); every group that matches must pass.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from paft_merge.auditing.report.figures import exponent
from paft_merge.auditing.results import AuditData, Group, SourceAudit
from paft_merge.errors import AuditError, Problem, Problems
from paft_merge.recipe.yaml_source import did_you_mean

_TEXT = re.compile(
    r"\s*(?P<metric>\w+)\s*(?:\((?P<argument>[^()]*)\))?\s*(?:\[(?P<scope>[^\]]*)\])?\s*"
    r"(?P<operator>>=|<=|==|>|<)\s*(?P<value>[^\s%]+)\s*(?P<percent>%)?\s*"
)
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip
_KEYS = ("source", "layer", "module", "tensor")
_EXAMPLES = {"threshold": "1e-5", "share": "0.2", "multiple": "0.1"}
"""An argument of each kind, for messages."""


@dataclass(frozen=True)
class Metric:
    """One number that a gate can ask for."""

    of: Literal["source", "pair", "preview"]
    value: Callable[[Any, float], float | None]
    """From a `Group`, a `PairMeasure` or a `Survived`, and the argument; None when it was not measured."""
    doc: str
    argument: str = ""
    """The name of the argument in parentheses; empty without one."""


def _factors(name: str, of: str) -> Callable[[Group, float], float | None]:
    def value(group: Group, _: float) -> float | None:
        counts = group.factors
        return getattr(counts, name) / getattr(counts, of) if counts else None

    return value


def _paft_sparsity(source: SourceAudit | Group, epsilon: float) -> float | None:
    """Of a whole source; None for a layer, a kind of module or a tensor."""
    return source.paft_sparsity(epsilon) if isinstance(source, SourceAudit) else None


METRICS: Mapping[str, Metric] = {
    "sparsity": Metric("source", lambda g, x: g.measure.sparsity(x), "share of |delta| below a threshold", "threshold"),
    "paft_sparsity": Metric("source", _paft_sparsity, "the same per layer, then the mean over layers (PAFT, Figure 2)", "threshold"),
    "zeros": Metric("source", lambda g, _: g.measure.zero_share, "share of entries that are exactly zero"),
    "bf16_sparsity": Metric("source", lambda g, _: g.measure.bf16_sparsity, "share of entries that a cast to bfloat16 erases"),
    "quantised_sparsity": Metric("source", lambda g, _: g.measure.quantised_sparsity, "share of entries that the grid of a quantised base erases"),
    "relative_rms": Metric("source", lambda g, x: g.measure.relative_rms(x), "share of |delta| <= x * rms", "multiple"),
    "relative_max": Metric("source", lambda g, x: g.measure.relative_max(x), "share of |delta| <= x * largest", "multiple"),
    "hoyer": Metric("source", lambda g, _: g.measure.hoyer, "Hoyer sparsity, 0 flat to 1 a single entry"),
    "participation": Metric("source", lambda g, _: g.measure.participation, "share of entries that carries the energy"),
    "top_energy": Metric("source", lambda g, x: g.measure.top_energy(x), "energy held by the largest share x", "share"),
    "density_for": Metric("source", lambda g, x: g.measure.density_for(x), "smallest share of entries with energy x", "share"),
    "norm": Metric("source", lambda g, _: g.measure.norm, "Frobenius norm"),
    "rms": Metric("source", lambda g, _: g.measure.rms, "root mean square"),
    "largest": Metric("source", lambda g, _: g.measure.largest, "largest |delta|"),
    "relative_norm": Metric("source", lambda g, _: g.measure.relative_norm, "norm over the norm of the weights"),
    "stable_rank": Metric("source", lambda g, _: g.stable_rank, "mean stable rank"),
    "effective_rank": Metric("source", lambda g, _: g.effective_rank, "mean effective rank"),
    "zero_rows": Metric("source", _factors("zero_rows", "rows"), "share of rows of B that are zero"),
    "zero_components": Metric("source", _factors("zero_components", "components"), "share of rank components that are zero"),
    "size_ratio": Metric("pair", lambda p, _: p.size_ratio, "norm of the larger delta over that of the smaller"),
    "cosine": Metric("pair", lambda p, _: p.cosine, "cosine of two deltas"),
    "conflict": Metric("pair", lambda p, _: p.conflict, "share of signs that differ where neither is zero"),
    "conflict_above": Metric("pair", lambda p, _: p.conflict_above, "the same where both reach the audit's epsilon"),
    "conflict_weighted": Metric("pair", lambda p, _: p.conflict_weighted, "the same, weighted by min(|d1|, |d2|)"),
    "overlap": Metric("pair", lambda p, _: p.overlap, "Jaccard index of the largest entries"),
    "overlap_excess": Metric("pair", lambda p, _: p.overlap / p.overlap_chance if p.overlap_chance else math.nan, "overlap over its chance level"),
    "kept_energy": Metric("preview", lambda s, _: s.kept_energy, "energy that survives trimming"),
    "elected_energy": Metric("preview", lambda s, _: s.elected_energy, "energy that survives trimming and election"),
    "kept": Metric("preview", lambda s, _: s.kept_share, "share of entries that survives trimming"),
}  # fmt: skip


@dataclass(frozen=True)
class Requirement:
    """One requirement, read."""

    text: str
    metric: str
    argument: float
    scope: Mapping[str, str]
    operator: str
    bound: float

    @classmethod
    def parse(cls, text: str, metrics: Mapping[str, Metric] = METRICS) -> Requirement:
        """Read `METRIC(ARGUMENT) [SCOPE] OPERATOR NUMBER`, with one of `metrics`.

        Raises:
            AuditError: GATE, with what is wrong.
        """
        found = _TEXT.fullmatch(text)
        if not found:
            example = "sparsity(1e-5) [layer=*] >= 0.9" if metrics is METRICS else f"{next(iter(metrics))} < 0.001"
            raise _unreadable(text, "is not a requirement", f'write for example "{example}"')
        name = found["metric"]
        if name not in metrics:
            near = did_you_mean(name, metrics)
            raise _unreadable(text, f"there is no metric {name!r}", near or f"metrics are {', '.join(metrics)}")
        wanted = metrics[name].argument
        if bool(wanted) != (found["argument"] is not None):
            takes = f"a {wanted} in parentheses" if wanted else "nothing in parentheses"
            example = f"{name}({_EXAMPLES[wanted]})" if wanted else name
            rest = f"{found['operator']} {found['value']}{found['percent'] or ''}"
            raise _unreadable(text, f"{name} takes {takes}", f'write for example "{example} {rest}"')
        bound = _number(text, found["value"]) / (100 if found["percent"] else 1)
        argument = _number(text, found["argument"]) if wanted else 0.0
        if argument < 0 or (wanted == "share" and argument > 1):
            limits = "of 0 to 1" if wanted == "share" else "of at least 0"
            raise _unreadable(text, f"{name} takes a {wanted} {limits}, got {argument:g}")
        return cls(text, name, argument, _scope(text, found["scope"] or ""), found["operator"], bound)

    def holds(self, value: float) -> bool:
        """Whether a value meets the bound."""
        return _OPERATORS[self.operator](value, self.bound)


def epsilons_of(requirements: Sequence[str]) -> list[float]:
    """The thresholds that must be counted for them.

    Raises:
        AuditError: GATE, with every requirement that cannot be read.
    """
    problems, found = Problems(), list[Requirement]()
    for text in requirements:
        with problems.catching():
            found.append(Requirement.parse(text))
    problems.raise_as(AuditError)
    return [r.argument for r in found if r.metric in ("sparsity", "paft_sparsity")]


def failures(audit: AuditData, requirements: Sequence[str]) -> list[Problem]:
    """A problem for each group that does not meet one of `requirements`.

    Raises:
        AuditError: GATE, a requirement cannot be read or matches nothing, or its metric was not measured.
    """
    found = list[Problem]()
    for wanted in map(Requirement.parse, requirements):
        values = list(_values(audit, wanted))
        if not values:
            raise _unreadable(wanted.text, "matches nothing", _known(audit, wanted))
        name = f"{wanted.metric}({exponent(wanted.argument)})" if METRICS[wanted.metric].argument else wanted.metric
        for where, value in values:
            if not wanted.holds(value):
                shown = "undefined, since the delta is zero there" if math.isnan(value) else f"{value:.4g}"
                what = f"{name} is {shown}, and {wanted.operator} {wanted.bound:g} is required"
                found.append(Problem("REQUIRED", where, what))
    return found


def _values(audit: AuditData, wanted: Requirement) -> Iterator[tuple[str, float]]:
    """The name and value of every group that a requirement selects."""
    pattern, metric = wanted.scope.get("source", "*"), METRICS[wanted.metric]
    if metric.of == "preview" and audit.preview is None:
        raise _unreadable(wanted.text, "there is no preview", "audit several sources, or a recipe that trims")
    for pair in audit.pairs if metric.of == "pair" else ():
        if _fits(pattern, pair.left) or _fits(pattern, pair.right):
            for where, tensors in _groups(pair.tensors, wanted):
                yield _one(f"{pair.left} and {pair.right}", where, metric, pair.of(tensors), wanted)
    for source in audit.sources if metric.of != "pair" else ():
        if _fits(pattern, source.label):
            for where, group in _of_source(audit, source, wanted):
                yield _one(source.label, where, metric, group, wanted)


def _of_source(audit: AuditData, source: SourceAudit, wanted: Requirement) -> Iterator[tuple[str, Any]]:
    """The name of every group of a source, and the object that the metric is read from."""
    if wanted.metric == "paft_sparsity" and not wanted.scope.keys() - {"source"}:
        yield "", source
    elif METRICS[wanted.metric].of == "source":
        yield from ((where, Group(where, tuple(tensors))) for where, tensors in _groups(source.tensors, wanted))
    elif audit.preview is not None:
        present = [t for t in audit.preview.tensors if source.label in t.sources]
        for where, tensors in _groups(present, wanted):
            yield where, audit.preview.of(source.label, tensors)


def _one(label: str, where: str, metric: Metric, group: Any, wanted: Requirement) -> tuple[str, float]:
    try:
        value = metric.value(group, wanted.argument)
    except KeyError:
        fix = f"audit with epsilons=[{wanted.argument:g}]"
        raise _unreadable(wanted.text, f"{wanted.argument:g} was not counted", fix) from None
    if value is None:
        base = "pass base=... (and fetch_base=True where it is on the Hub), or do not require it"
        fixes = {
            "paft_sparsity": "it is a mean over layers, so name no layer, module or tensor",
            "quantised_sparsity": f"it needs weights that the base stores quantised; {base}",
        }
        raise _unreadable(wanted.text, f"{wanted.metric} was not measured for {label}", fixes.get(wanted.metric, base))
    return (f"{label}: {where}" if where else label), value


def _groups(tensors: Sequence[Any], wanted: Requirement) -> Iterator[tuple[str, list[Any]]]:
    """The tensors that the scope selects, grouped by the keys that it names."""
    keys = [k for k in _KEYS[1:] if k in wanted.scope]
    groups: dict[str, list[Any]] = {}
    for tensor in tensors:
        own = {"layer": str(tensor.layer), "module": tensor.module, "tensor": tensor.name}
        if ("layer" in keys and tensor.layer is None) or not all(_fits(wanted.scope[k], own[k]) for k in keys):
            continue
        where = own["tensor"] if "tensor" in keys else ", ".join(f"{k} {own[k]}" for k in keys)
        groups.setdefault(where, []).append(tensor)
    yield from groups.items()


def _known(audit: AuditData, wanted: Requirement) -> str:
    labels = ", ".join(s.label for s in audit.sources)
    modules = ", ".join(dict.fromkeys(t.module for s in audit.sources for t in s.tensors))
    need = " (a pair needs two sources)" if METRICS[wanted.metric].of == "pair" and not audit.pairs else ""
    return f"sources are {labels}, modules are {modules}{need}"


def _scope(text: str, scope: str) -> dict[str, str]:
    found = {}
    for part in filter(None, (p.strip() for p in scope.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or key not in _KEYS or not value:
            raise _unreadable(text, f"{part!r} is not a scope", f"write KEY=PATTERN with one of {', '.join(_KEYS)}")
        found[key] = value
    return found


def _number(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _unreadable(text, f"{number!r} is not a number")
    return value


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern)


def _unreadable(text: str, what: str, fix: str = "") -> AuditError:
    return AuditError.of("GATE", text, what, fix)
