"""What a merge would keep of each source, computed by the rule of the merge, before the merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from paft_merge.auditing.opening import AuditedTensor, Placed
from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import KeepThreshold
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.errors import AuditError, Problems
from paft_merge.methods import METHODS, REQUIRED
from paft_merge.methods.rules.measured_weights import MeasuredWeights
from paft_merge.methods.rules.model_wide import measure_over_model
from paft_merge.methods.rules.rule import Rule
from paft_merge.methods.rules.thresholds import stream_key
from paft_merge.recipe.resolution import SettingError, coerce, rivals
from paft_merge.recipe.yaml_source import did_you_mean
from paft_merge.stats.metrics import UNDEFINED, ratio


@dataclass(frozen=True)
class Proposal:
    """A method with its parameters; a parameter of a source has one value for all sources, or one a source.

    Raises:
        AuditError: PREVIEW, with everything that is wrong with the method, the names and the values.
    """

    method: str = "ties"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Values, or their texts. TIES without parameters is TIES at density 0.2."""
    seed: int = 0
    """Of random drops, as in a recipe."""

    def __post_init__(self) -> None:
        method, problems, made = METHODS.get(self.method), Problems(), dict[str, Any]()
        if method is None:
            fix = did_you_mean(self.method, METHODS) or f"methods are {', '.join(METHODS)}"
            raise AuditError.of("PREVIEW", self.method, "is not a method", fix)
        if method.core_only:
            fix = "preview a method that merges deltas, such as ties"
            raise AuditError.of("PREVIEW", self.method, "merges adapters in their core space, not their entries", fix)
        names = [p.name for p in method.parameters]
        given = self.parameters or ({"density": 0.2, "weight": 1.0} if self.method == "ties" else {})
        for name, value in given.items():
            spec = method.parameter(name)
            if spec is None:
                fix = did_you_mean(name, names) or f"its parameters are {', '.join(names)}"
                problems.add("PREVIEW", name, f"{self.method} has no parameter {name!r}", fix)
                continue
            listed = isinstance(value, tuple | list) and spec.scope == "source"
            try:
                made[name] = tuple(coerce(spec, one) for one in value) if listed else coerce(spec, value)
            except SettingError as error:
                problems.add("PREVIEW", name, error.what, error.fix)
        if len(rival := [name for name in rivals(method) if name in given]) > 1:
            problems.add("PREVIEW", self.method, f"{' and '.join(rival)} are both given", "keep one of them")
        for name in (p.name for p in method.parameters if p.default is REQUIRED and p.name not in given):
            if name != "weight":
                problems.add("PREVIEW", self.method, f"{name} must be given", f"-p {name}=...")
        problems.raise_as(AuditError)
        object.__setattr__(self, "parameters", made)

    @classmethod
    def parse(cls, method: str, settings: Sequence[str]) -> Proposal:
        """Parse `NAME=VALUE` texts; `NAME=V1,V2` gives each source its own value."""
        pairs = (text.partition("=")[::2] for text in settings)
        return cls(method, {name: value.split(",") if "," in value else value for name, value in pairs})

    def rule(self, sources: Sequence[str], name: str) -> Rule:
        """The rule for the tensor `name`.

        Raises:
            AuditError: PREVIEW, a parameter does not have one value a source, or values do not go together.
        """
        method = METHODS[self.method]
        defaults = {p.name: 1.0 if p.default is REQUIRED else p.default for p in method.parameters}
        keys = [stream_key(self.seed, source, name, "drop") for source in sources]
        try:
            rule = method.build(*method.spread({**defaults, **self.parameters}, len(sources)), keys)
        except ValueError as error:
            raise AuditError.of("PREVIEW", self.method, str(error)) from error
        if rule.wants == "whole":
            raise AuditError.of(
                "PREVIEW", self.method, "is merged by mergekit, which does not report which entries it keeps"
            )
        return rule


@dataclass(frozen=True)
class Survived:
    """What trimming and election keep of one source's delta; counts and energies add up over tensors."""

    entries: int
    kept: int
    """Entries that survive trimming (or dropping)."""
    elected: int
    """Entries that also agree with the elected sign."""
    square: float
    """Sum of d^2 of the whole delta."""
    kept_square: float
    elected_square: float

    @classmethod
    def total(cls, parts: Sequence[Survived]) -> Survived:
        """The sum of `parts`."""
        return cls(*(sum(getattr(p, name) for p in parts) for name in cls.__dataclass_fields__))

    @property
    def kept_share(self) -> float:
        """Share of the entries that survive trimming."""
        return ratio(self.kept, self.entries)

    @property
    def kept_energy(self) -> float:
        """Share of sum d^2 that survives trimming."""
        return ratio(self.kept_square, self.square)

    @property
    def elected_energy(self) -> float:
        """Share of sum d^2 that survives trimming and election."""
        return ratio(self.elected_square, self.square)

    def to_json(self) -> dict[str, Any]:
        """The fields of the report's JSON."""
        counts = {"entries": self.entries, "kept": self.kept, "elected": self.elected}
        return {**counts, "kept_energy": self.kept_energy, "elected_energy": self.elected_energy}


@dataclass(frozen=True)
class PreviewTensor(Placed):
    """What a merge would keep of one tensor."""

    sources: Mapping[str, Survived]
    merged_square: float
    """Sum of squares of the merged delta."""
    sum_square: float
    """Sum of squares of the sum of weight * delta without trimming."""


@dataclass(frozen=True)
class Preview:
    """What a merge would keep, per tensor."""

    method: str
    parameters: Mapping[str, Any]
    """Empty when a recipe gives each tensor its own."""
    tensors: tuple[PreviewTensor, ...] = field(repr=False)

    def of(self, source: str, tensors: Sequence[PreviewTensor] | None = None) -> Survived:
        """Entries and energy that the method keeps of one source.

        Args:
            source: its label.
            tensors: to add up; all by default.
        """
        parts = [t.sources[source] for t in (self.tensors if tensors is None else tensors) if source in t.sources]
        return Survived.total(parts)

    @property
    def norm_ratio(self) -> float:
        """Norm of the merged delta over the norm of the plain weighted sum."""
        merged, plain = (math.fsum(getattr(t, n) for t in self.tensors) for n in ("merged_square", "sum_square"))
        return math.sqrt(ratio(merged, plain)) if plain else UNDEFINED


def rules_for(
    subjects: Sequence[AuditedTensor], proposal: Proposal | None, pool: ThreadPoolExecutor
) -> list[Rule | None]:
    """The rule to preview for each tensor: the recipe's, or the proposal's; None for a rule that does not select entries.

    Thresholds over the whole model (`trim_scope: global`) and weights that follow from norms are found here, which takes walks over
    every tensor.
    """
    rules = [_rule_for(subject, proposal) for subject in subjects]
    measured = measure_over_model(rules, subjects, pool, CpuOps())
    found = [measured.get(i, rule) for i, rule in enumerate(rules)]
    return [_weighed(rule, subject, pool) for rule, subject in zip(found, subjects, strict=True)]


def _weighed(rule: Rule | None, subject: AuditedTensor, pool: ThreadPoolExecutor) -> Rule | None:
    """`rule` with its weights, which may follow from norms."""
    if not isinstance(rule, MeasuredWeights):
        return rule
    try:
        return rule.measured(subject, BlockWalk([subject], pool), CpuOps()).resolved
    finally:
        subject.release()


def with_survivals(rule: Rule, survivals: Sequence[KeepThreshold], sources: int, active: Sequence[int]) -> Rule:
    """`rule` with thresholds that are known for the active ones of its `sources`."""
    found = [KeepThreshold()] * sources
    for i, survival in zip(active, survivals, strict=True):
        found[i] = survival
    return rule.with_thresholds(found)


def _rule_for(subject: AuditedTensor, proposal: Proposal | None) -> Rule | None:
    rule = subject.rule
    if rule is None and proposal is not None:
        rule = proposal.rule([r.source for r in subject.inputs.sources], subject.name)
    return rule if rule is not None and rule.selection_weights is not None else None
