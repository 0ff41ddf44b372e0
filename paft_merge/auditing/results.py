"""The results of an audit: frozen, typed, and the same numbers for the table, the JSON, the CSV and the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paft_merge.auditing.opening import Header, Skipped
from paft_merge.auditing.preview import Preview
from paft_merge.errors import Problem
from paft_merge.measures.metrics import UNDEFINED, Measure
from paft_merge.measures.pairs import PairMeasure
from paft_merge.measures.spectrum import FactorCounts, Spectrum

SCHEMA = "paft_merge.audit/1"
"""The version of the JSON; fields may be added under it, and none changes its meaning (docs/audit.md)."""


@dataclass(frozen=True)
class TensorAudit:
    """One source's delta in one tensor."""

    name: str
    layer: int | None
    module: str
    kind: str
    """`lora`, `dora`, `replace`, ... as `adapters.Patch.kind`, or `checkpoint`."""
    shape: tuple[int, ...]
    measure: Measure
    spectrum: Spectrum | None
    factors: FactorCounts | None


@dataclass(frozen=True)
class Group:
    """Some tensors of one source taken together: a layer, a kind of module, or all."""

    key: str
    tensors: tuple[TensorAudit, ...]

    @cached_property
    def measure(self) -> Measure:
        """Of all entries of the tensors together."""
        return Measure.total([t.measure for t in self.tensors])

    @property
    def stable_rank(self) -> float:
        """Mean over the tensors that have a spectrum."""
        return _mean(t.spectrum.stable_rank for t in self.tensors if t.spectrum)

    @property
    def effective_rank(self) -> float:
        """Mean over the tensors that have a spectrum."""
        return _mean(t.spectrum.effective_rank for t in self.tensors if t.spectrum)

    @cached_property
    def factors(self) -> FactorCounts | None:
        """Counts over the tensors that have factors; None when none has."""
        known = [t.factors for t in self.tensors if t.factors]
        return FactorCounts.total(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        factors = self.factors.to_json() if self.factors else None
        ranks = {"stable_rank": self.stable_rank, "effective_rank": self.effective_rank}
        return {"tensors": len(self.tensors), **self.measure.to_json(), **ranks, "factors": factors}


@dataclass(frozen=True)
class SourceAudit:
    """One source: an adapter or a checkpoint, as a delta from the base."""

    header: Header
    tensors: tuple[TensorAudit, ...]

    @property
    def label(self) -> str:
        return self.header.label

    @cached_property
    def total(self) -> Group:
        """Everything that the source changes."""
        return Group("all", self.tensors)

    @cached_property
    def layers(self) -> Mapping[int, Group]:
        """By number; what lies outside of the layers is in none."""
        keys = sorted({t.layer for t in self.tensors if t.layer is not None})
        return {k: Group(str(k), tuple(t for t in self.tensors if t.layer == k)) for k in keys}

    @cached_property
    def modules(self) -> Mapping[str, Group]:
        """By kind of module, attention before MLP as a layer computes them."""
        keys = in_order(t.module for t in self.tensors)
        return {k: Group(k, tuple(t for t in self.tensors if t.module == k)) for k in keys}

    def paft_sparsity(self, epsilon: float) -> float:
        """PAFT's measure (its Figure 2): share of |delta| < `epsilon` in each layer, and of these the mean.

        A source without layers has the share over everything.
        """
        shares = [group.measure.sparsity(epsilon) for group in self.layers.values()]
        return _mean(shares) if shares else self.total.measure.sparsity(epsilon)

    def to_json(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        return {
            "source": self.header.source,
            "label": self.label,
            "kind": self.header.kind,
            "header": dict(self.header.details),
            "paft_sparsity": {f"{e:g}": self.paft_sparsity(e) for e in self.tensors[0].measure.below}
            if self.tensors
            else {},
            "all": self.total.to_json() if self.tensors else None,
            "layers": {str(k): g.to_json() for k, g in self.layers.items()},
            "modules": {k: g.to_json() for k, g in self.modules.items()},
            "tensors": [_tensor_json(t) for t in self.tensors],
        }


@dataclass(frozen=True)
class PairTensor:
    """Two sources' deltas in one tensor."""

    name: str
    layer: int | None
    module: str
    measure: PairMeasure
    subspace: tuple[float, float] | None
    """Overlap of the left and of the right singular subspaces, where both have factors."""


@dataclass(frozen=True)
class PairAudit:
    """Two sources against each other."""

    left: str
    right: str
    tensors: tuple[PairTensor, ...]

    @property
    def total(self) -> PairMeasure:
        """Over all tensors that either changes."""
        return self.of(self.tensors)

    @cached_property
    def layers(self) -> Mapping[int, PairMeasure]:
        keys = sorted({t.layer for t in self.tensors if t.layer is not None})
        return {k: self.of([t for t in self.tensors if t.layer == k]) for k in keys}

    @cached_property
    def modules(self) -> Mapping[str, PairMeasure]:
        keys = in_order(t.module for t in self.tensors)
        return {k: self.of([t for t in self.tensors if t.module == k]) for k in keys}

    def of(self, tensors: Sequence[PairTensor]) -> PairMeasure:
        """The measure of some of the tensors taken together."""
        return PairMeasure.total([t.measure for t in tensors])

    @property
    def subspace(self) -> tuple[float, float]:
        """Mean overlap of the left and right subspaces over the tensors that have one."""
        known = [t.subspace for t in self.tensors if t.subspace]
        return _mean(k[0] for k in known), _mean(k[1] for k in known)

    def to_json(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        return {
            "left": self.left,
            "right": self.right,
            "all": {**self.total.to_json(), "subspace": list(self.subspace)},
            "layers": {str(k): m.to_json() for k, m in self.layers.items()},
            "modules": {k: m.to_json() for k, m in self.modules.items()},
            "tensors": [
                {"name": t.name, **t.measure.to_json(), "subspace": list(t.subspace) if t.subspace else None}
                for t in self.tensors
            ],
        }


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do, with the number behind it."""

    level: str
    """`good`, `note` or `warn`."""
    text: str
    metric: str
    """What the number is, in the words of a gate (`--require`)."""
    value: float
    page: str
    """Where it is explained."""


@dataclass(frozen=True)
class Audit:
    """The whole answer. In a notebook it shows itself as the HTML report."""

    sources: tuple[SourceAudit, ...]
    pairs: tuple[PairAudit, ...]
    preview: Preview | None
    base: str | None
    epsilon: float
    density: float
    """At which supports were compared."""
    skipped: tuple[Skipped, ...]
    warnings: tuple[Problem, ...]
    sampled: float | None = None
    """Of what a merge noted of itself: the share of the entries behind what it did not count on all; None where all were."""

    def source(self, label: str) -> SourceAudit:
        """The source of that label.

        Raises:
            KeyError: there is none.
        """
        found = next((s for s in self.sources if s.label == label), None)
        if found is None:
            raise KeyError(f"{label!r}; the sources are {', '.join(s.label for s in self.sources)}")
        return found

    @cached_property
    def advice(self) -> tuple[Advice, ...]:
        """What the numbers mean, in plain words."""
        from paft_merge.auditing.advice import advise

        return advise(self)

    def check(self, *requirements: str) -> list[Problem]:
        """What fails of some requirements (`"sparsity(1e-5) >= 0.9"`, see `gate`); empty when all hold.

        Raises:
            AuditError: GATE, one cannot be read, or asks for what was not measured.
        """
        from paft_merge.auditing.gate import failures

        return failures(self, requirements)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON (schema `SCHEMA`, described in docs/audit.md); what is undefined is null."""
        document: dict[str, Any] = _defined({
            "schema": SCHEMA,
            "base": self.base,
            "epsilon": self.epsilon,
            "overlap_density": self.density,
            "sampled": self.sampled,
            "sources": [s.to_json() for s in self.sources],
            "pairs": [p.to_json() for p in self.pairs],
            "preview": _preview_json(self.preview, [s.label for s in self.sources]) if self.preview else None,
            "advice": [dict(vars(a)) for a in self.advice],
            "skipped": [{"source": s.source, "names": list(s.names), "why": s.why} for s in self.skipped],
            "warnings": [str(w) for w in self.warnings],
        })  # fmt: skip
        return document

    def dumps(self) -> str:
        """`to_json` as text."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """The report as one self-contained page."""
        from paft_merge.auditing.page import page

        return page(self)

    def _repr_html_(self) -> str:
        from paft_merge.auditing.page import fragment

        return fragment(self)

    def __repr__(self) -> str:
        names = ", ".join(s.label for s in self.sources)
        return f"<Audit of {names}: {sum(len(s.tensors) for s in self.sources)} tensors>"


def _preview_json(preview: Preview, labels: Sequence[str]) -> dict[str, Any]:
    def survived(parts: Iterable[Any]) -> dict[str, Any]:
        held = tuple(parts)
        return {label: preview.of(label, held).to_json() for label in labels if any(label in t.sources for t in held)}

    layers = sorted({t.layer for t in preview.tensors if t.layer is not None})
    return {
        "method": preview.method,
        "parameters": dict(preview.parameters),
        "norm_ratio": preview.norm_ratio,
        "all": survived(preview.tensors),
        "layers": {str(k): survived(t for t in preview.tensors if t.layer == k) for k in layers},
        "tensors": [{"name": t.name, "sources": survived([t])} for t in preview.tensors],
    }


def _tensor_json(tensor: TensorAudit) -> dict[str, Any]:
    return {
        "name": tensor.name, "layer": tensor.layer, "module": tensor.module, "kind": tensor.kind, "shape": list(tensor.shape),
        **tensor.measure.to_json(),
        "spectrum": tensor.spectrum.to_json() if tensor.spectrum else None,
        "factors": tensor.factors.to_json() if tensor.factors else None,
    }  # fmt: skip


def _defined(value: Any) -> Any:
    """`value` with null for every number that is none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _defined(v) for k, v in value.items()}
    return [_defined(v) for v in value] if isinstance(value, (list, tuple)) else value


_ORDER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "out_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "fc1",
    "fc2",
)


def in_order(modules: Iterable[str]) -> list[str]:
    """Each kind of module once, those that every layer of a transformer has first, in the order they act."""
    once = list(dict.fromkeys(modules))
    return sorted(once, key=lambda m: _ORDER.index(m) if m in _ORDER else len(_ORDER))


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else UNDEFINED
