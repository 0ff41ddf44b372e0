"""The result of a verification: the tensors, the behaviour, the findings and the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paft_merge.auditing.report.gate import Metric, Requirement
from paft_merge.errors import AuditError, Problem
from paft_merge.plan.formatting import html_lines, html_table
from paft_merge.stats.json_numbers import finite
from paft_merge.verifying.behaviour import Difference
from paft_merge.verifying.evidence import StoredTensor, root
from paft_merge.verifying.findings import Finding

NUMBERS = ("KL mean", "KL p99", "top-1", "largest", "continuations", "drift")
"""The columns of `Behaviour.shown`."""

OTHERS = {"recipe": "the recipe in float32", "base": "the base", "adapter": "PEFT, not merged"}
"""The models that a finished model is compared with, in words."""
FAR = 0.25
"""Largest relative difference of logits that rounding of weights and of sums to 16 bits leaves; it is a few per cent at most."""


@dataclass(frozen=True)
class Behaviour:
    """How the finished model answers beside one other model.

    Attributes:
        other: `recipe`, `base` or `adapter` (PEFT's model with the adapter that is not merged).
        tokens: number of tokens that were compared.
        kl: mean KL divergence at a token, in nats; None of a model without logits.
        kl_p99: its 99th percentile.
        kl_largest: the largest.
        top1: share of the tokens at which both have the same most likely next token; None of a model without logits.
        largest: largest difference of two logits; of a model without a head, of two features.
        relative: norm of the difference over the norm of the other's logits.
        continued: number of greedy continuations.
        parted: those that differ, each with its first token that does.
        drift: of each layer, the relative difference of the hidden states.
        how: how the other model was run.
    """

    other: str
    tokens: int
    kl: float | None
    kl_p99: float | None
    kl_largest: float | None
    top1: float | None
    largest: float
    relative: float
    continued: int
    parted: Mapping[int, int]
    drift: tuple[float, ...]
    how: str = "whole"

    @classmethod
    def of(cls, other: str, found: Difference, how: str) -> Behaviour:
        """Sum up a difference."""
        kl = found.kl
        mean, p99, top = (
            (None, None, None) if kl is None else (float(kl.mean()), float(kl.quantile(0.99)), float(kl.max()))
        )
        return cls(
            other, len(found.agree), mean, p99, top,
            None if kl is None else float(found.agree.double().mean()), found.largest, found.relative, len(found.parted),
            {row: at for row, at in enumerate(found.parted) if at is not None}, found.drift, how,
        )  # fmt: skip

    @property
    def is_far(self) -> bool:
        """Whether it differs by more than the arithmetic of 16 bits explains, or is not a number."""
        return not self.relative <= FAR

    @property
    def breaks_at(self) -> int | None:
        """The first layer whose hidden states are NaN or much farther apart than those before; None if there is none."""
        before = 2.0**-9
        for number, drift in enumerate(self.drift):
            if not drift <= max(5 * before, 0.05):  # NaN is far, too
                return number
            before = max(before, drift)
        return None

    def shown(self) -> list[str]:
        """Return a text for each of `NUMBERS`; empty where there is no number."""

        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.2g}"

        parted = f"{len(self.parted)} of {self.continued} differ" if self.continued else ""
        if self.parted:
            parted += f", first at token {min(self.parted.values()) + 1}"
        last = number(max(self.drift, default=None))
        top1 = "" if self.top1 is None else f"{self.top1:.1%}"
        return [number(self.kl), number(self.kl_p99), top1, number(self.largest), parted, last]

    def to_json(self) -> dict[str, Any]:
        """The behaviour as plain data."""
        return {
            "tokens": self.tokens, "kl": self.kl, "kl_p99": self.kl_p99, "kl_largest": self.kl_largest, "top1": self.top1,
            "largest_difference": self.largest, "relative_difference": self.relative, "continuations": self.continued,
            "parted": {str(row): at for row, at in self.parted.items()}, "drift": list(self.drift), "run": self.how,
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Verification:
    """A finished model beside what its recipe means."""

    where: str
    tensors: tuple[StoredTensor, ...]
    findings: tuple[Finding, ...]
    behaviours: Mapping[str, Behaviour]
    """By `recipe`, `base`, `adapter`."""
    skipped: Mapping[str, str]
    """Why a comparison was not made, by its name."""
    prompts: str = ""
    """Where the tokens come from."""

    @property
    def ok(self) -> bool:
        """Whether the model is what its recipe means, up to one rounding."""
        return not any(finding.fault for finding in self.findings)

    @property
    def exact(self) -> bool:
        """Whether every stored value is the recipe's."""
        return self.ok and not any(t.worst for t in self.tensors)

    @property
    def relative_error(self) -> float:
        """Norm of all errors over the norm of the recipe's weights."""
        return root(*(math.fsum(getattr(t, name) for t in self.tensors) for name in ("error", "meant")))

    @property
    def lost(self) -> float:
        """Norm of all errors over the norm of the recipe's update; 0 without an update."""
        error, update = (math.fsum(getattr(t, name) for t in self.tensors if t.update) for name in ("error", "update"))
        return root(error, update) if update else 0.0

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if not self.ok:
            kinds = dict.fromkeys(finding.kind for finding in self.findings if finding.fault)
            return f"is not the model of its recipe: {', '.join(kinds)}"
        if self.exact:
            return "is the model of its recipe, bit for bit"
        seen = {finding.kind for finding in self.findings}
        how = "the rank of its factors" if "rank" in seen else "the codes" if "codes" in seen else "one rounding"
        if self.lost < 0.0005:
            return f"is the model of its recipe up to {how}"
        if how == "one rounding" and any(t.stochastic for t in self.tensors):
            return f"is the model of its recipe up to {how}, whose noise is {self.lost:.1%} of the update"
        return f"is the model of its recipe up to {how}, which loses {min(self.lost, 1):.1%} of the update"

    def __repr__(self) -> str:
        return f"Verification({self.where!r}, {self.verdict!r}, {len(self.tensors):,} tensors, {len(self.findings):,} findings)"

    def _repr_html_(self) -> str:
        lines = [f"{self.where} {self.verdict}", *map(str, self.findings)]
        rows = [(OTHERS[name], *one.shown()) for name, one in self.behaviours.items()]
        table = html_table(rows, ("compared with", *NUMBERS)) if rows else ""
        skipped = (
            f"{f'not compared with {OTHERS[name]}' if name in OTHERS else name}: {why}"
            for name, why in self.skipped.items()
        )
        return html_lines(lines) + table + html_lines(skipped)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; the fields are in docs/verify.md. Numbers that are not finite are None."""
        far = sorted((t for t in self.tensors if t.worst), key=lambda t: -t.relative)
        found = {
            "schema": "paft_merge.verify/1",
            "where": self.where,
            "ok": self.ok,
            "verdict": self.verdict,
            "tensors": len(self.tensors),
            "relative_error": self.relative_error,
            "update_lost": self.lost,
            "findings": [finding.to_json() for finding in self.findings],
            "prompts": self.prompts,
            "behaviour": {name: one.to_json() for name, one in self.behaviours.items()},
            "skipped": dict(self.skipped),
            "farthest": [t.to_json() for t in far[:20]],
        }
        return dict(finite(found))

    def faults(self) -> list[Problem]:
        """A problem for each finding that is a fault."""
        return [Problem("REQUIRED", one.where, one.what, one.fix) for one in self.findings if one.fault]

    def failures(self, require: Sequence[str]) -> list[Problem]:
        """A problem for each requirement that does not hold.

        Raises:
            AuditError: GATE, a requirement cannot be read, or its number was not measured.
        """
        found = []
        for wanted in map(read_requirement, require):
            other = wanted.scope.get("source", "recipe")
            value = METRICS[wanted.metric].value((self, self.behaviours.get(other)), 0.0)
            if value is None:
                why = self.skipped.get(other) or "it was not measured"
                raise AuditError.of("GATE", wanted.text, f"there is no {wanted.metric}: {why}")
            if not wanted.holds(value):
                what = f"{wanted.metric} is {value:.4g}, and {wanted.operator} {wanted.bound:g} is required"
                found.append(Problem("REQUIRED", self.where, what))
        return found


def _measured(name: str) -> Callable[[Any, float], float | None]:
    return lambda pair, _: None if pair[1] is None else getattr(pair[1], name)


METRICS: Mapping[str, Metric] = {
    "kl": Metric("source", _measured("kl"), "mean KL divergence at a token, in nats"),
    "kl_p99": Metric("source", _measured("kl_p99"), "its 99th percentile"),
    "kl_largest": Metric("source", _measured("kl_largest"), "the largest"),
    "top1": Metric("source", _measured("top1"), "share of tokens with the same most likely next token"),
    "largest_difference": Metric("source", _measured("largest"), "largest difference of two logits"),
    "relative_difference": Metric("source", _measured("relative"), "norm of the difference of the logits over their norm"),
    "parted": Metric("source", lambda p, _: len(p[1].parted) / p[1].continued if p[1] and p[1].continued else None, "share of greedy continuations that differ"),
    "drift": Metric("source", lambda p, _: max(p[1].drift, default=None) if p[1] else None, "largest relative difference of hidden states of a layer"),
    "relative_error": Metric("source", lambda p, _: p[0].relative_error, "norm of the errors of the weights over the norm of the weights"),
    "update_lost": Metric("source", lambda p, _: p[0].lost, "norm of the errors of the weights over the norm of the update"),
    "faults": Metric("source", lambda p, _: float(sum(f.fault for f in p[0].findings)), "number of differences that rounding does not explain"),
}  # fmt: skip
"""What `--require` can ask for; `[source=base]` asks for the comparison with the base."""

_OF_TENSORS = ("relative_error", "update_lost", "faults")
"""Those of `METRICS` for which no model runs."""

_SOURCES = ("recipe", "base", "adapter")


def read_requirement(text: str, *, tensors_only: bool = False) -> Requirement:
    """Read `METRIC [source=recipe|base|adapter] OPERATOR NUMBER`.

    Args:
        text: the requirement.
        tensors_only: whether no model runs.

    Raises:
        AuditError: GATE, with what is wrong, or because its number will not be measured.
    """
    wanted = Requirement.parse(text, METRICS)
    if wanted.scope.keys() - {"source"} or wanted.scope.get("source", "recipe") not in _SOURCES:
        raise AuditError.of(
            "GATE", text, "has a scope that verify does not know", f"write [source=X] with one of {', '.join(_SOURCES)}"
        )
    if tensors_only and wanted.metric not in _OF_TENSORS:
        what = f"{wanted.metric} is a number of models that run, and only tensors are compared"
        raise AuditError.of("GATE", wanted.text, what, f"require one of {', '.join(_OF_TENSORS)}")
    return wanted
