"""The results of an audit, frozen and typed: the source of the tables, the JSON, the CSV and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from paft_merge.auditing.opening import Header, Placed, Skipped
from paft_merge.auditing.preview import Preview
from paft_merge.errors import Problem
from paft_merge.stats.metrics import UNDEFINED, Measure
from paft_merge.stats.pairs import PairMeasure
from paft_merge.stats.spectrum import FactorCounts, Spectrum

T = TypeVar("T", bound=Placed)

SCHEMA = "paft_merge.audit/1"
"""The version of the JSON; fields may be added under the same version, but none changes its meaning (docs/audit.md)."""


@dataclass(frozen=True)
class TensorAudit(Placed):
    """One source's delta in one tensor."""

    kind: str
    """`lora`, `dora`, `replace`, ... as `AdapterDelta.kind`, or `checkpoint`."""
    shape: tuple[int, ...]
    measure: Measure = field(repr=False)
    spectrum: Spectrum | None = field(repr=False)
    factors: FactorCounts | None


@dataclass(frozen=True)
class Group:
    """Tensors of one source taken together: a layer, a kind of module, or all."""

    key: str
    tensors: tuple[TensorAudit, ...] = field(repr=False)

    @cached_property
    def measure(self) -> Measure:
        """The measure of all entries of the tensors."""
        return Measure.total([t.measure for t in self.tensors])

    @property
    def stable_rank(self) -> float:
        """Mean stable rank of the tensors that have a spectrum; NaN without one."""
        return _mean(t.spectrum.stable_rank for t in self.tensors if t.spectrum)

    @property
    def effective_rank(self) -> float:
        """Mean effective rank of the tensors that have a spectrum; NaN without one."""
        return _mean(t.spectrum.effective_rank for t in self.tensors if t.spectrum)

    @cached_property
    def factors(self) -> FactorCounts | None:
        """Counts over the tensors that have factors; None when none has."""
        known = [t.factors for t in self.tensors if t.factors]
        return FactorCounts.total(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """As in the JSON of the report."""
        factors = self.factors.to_json() if self.factors else None
        ranks = {"stable_rank": self.stable_rank, "effective_rank": self.effective_rank}
        return {"tensors": len(self.tensors), **self.measure.to_json(), **ranks, "factors": factors}


@dataclass(frozen=True)
class SourceAudit:
    """One source: an adapter or a checkpoint, as a delta from the base."""

    header: Header
    tensors: tuple[TensorAudit, ...] = field(repr=False)

    @property
    def label(self) -> str:
        """Short name, unique in the audit."""
        return self.header.label

    @cached_property
    def total(self) -> Group:
        """Everything that the source changes."""
        return Group("all", self.tensors)

    @cached_property
    def layers(self) -> Mapping[int, Group]:
        """By number; tensors outside layers are in none."""
        return {k: Group(str(k), tuple(own)) for k, own in by_layer(self.tensors).items()}

    @cached_property
    def modules(self) -> Mapping[str, Group]:
        """By kind of module, in the order in which a layer computes them."""
        return {k: Group(k, tuple(own)) for k, own in by_module(self.tensors).items()}

    def paft_sparsity(self, epsilon: float) -> float:
        """Mean over layers of the share of |delta| < `epsilon` (PAFT, Figure 2); without layers, the share of all entries."""
        shares = [group.measure.sparsity(epsilon) for group in self.layers.values()]
        return _mean(shares) if shares else self.total.measure.sparsity(epsilon)

    def to_json(self) -> dict[str, Any]:
        """As in the JSON of the report."""
        return {
            "source": self.header.source,
            "label": self.label,
            "kind": self.header.kind,
            "header": dict(self.header.details),
            "paft_sparsity": {f"{e:g}": self.paft_sparsity(e) for t in self.tensors[:1] for e in t.measure.below},
            "all": self.total.to_json() if self.tensors else None,
            "layers": {str(k): g.to_json() for k, g in self.layers.items()},
            "modules": {k: g.to_json() for k, g in self.modules.items()},
            "tensors": [_tensor_json(t) for t in self.tensors],
        }


@dataclass(frozen=True)
class PairTensor(Placed):
    """Two sources' deltas in one tensor."""

    measure: PairMeasure
    subspace: tuple[float, float] | None
    """Overlap of the left and of the right singular subspaces, where both have factors."""


@dataclass(frozen=True)
class PairAudit:
    """Two sources against each other."""

    left: str
    right: str
    tensors: tuple[PairTensor, ...] = field(repr=False)

    @property
    def total(self) -> PairMeasure:
        """The measure of all tensors that either source changes."""
        return self.of(self.tensors)

    @cached_property
    def layers(self) -> Mapping[int, PairMeasure]:
        """By number of the layer."""
        return {k: self.of(own) for k, own in by_layer(self.tensors).items()}

    @cached_property
    def modules(self) -> Mapping[str, PairMeasure]:
        """By kind of module."""
        return {k: self.of(own) for k, own in by_module(self.tensors).items()}

    def of(self, tensors: Sequence[PairTensor]) -> PairMeasure:
        """The measure of `tensors` taken together."""
        return PairMeasure.total([t.measure for t in tensors])

    @property
    def subspace(self) -> tuple[float, float]:
        """Mean overlap of the left and of the right singular subspaces, over the tensors that have one."""
        known = [t.subspace for t in self.tensors if t.subspace]
        return _mean(k[0] for k in known), _mean(k[1] for k in known)

    def to_json(self) -> dict[str, Any]:
        """As in the JSON of the report."""
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
class AuditData:
    """Everything that an audit measured; the input of the advice, the gate and every report."""

    sources: tuple[SourceAudit, ...]
    pairs: tuple[PairAudit, ...]
    preview: Preview | None
    base: str | None
    epsilon: float
    density: float
    """Density at which supports were compared."""
    skipped: tuple[Skipped, ...]
    warnings: tuple[Problem, ...]
    sampled: float | None = None
    """Of an audit from a manifest: the share of the entries in the sample. None where every entry was counted."""

    def source(self, label: str) -> SourceAudit:
        """The source with that label.

        Raises:
            KeyError: no source has it.
        """
        found = next((s for s in self.sources if s.label == label), None)
        if found is None:
            raise KeyError(f"{label!r}; the sources are {', '.join(s.label for s in self.sources)}")
        return found


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do, with the number behind it."""

    level: str
    """`good`, `note` or `warn`."""
    text: str
    metric: str
    """The name of the number, as a requirement names it (`--require`)."""
    value: float
    page: str
    """File and anchor of the explanation in the documentation."""


def _tensor_json(tensor: TensorAudit) -> dict[str, Any]:
    return {
        "name": tensor.name, "layer": tensor.layer, "module": tensor.module, "kind": tensor.kind, "shape": list(tensor.shape),
        **tensor.measure.to_json(),
        "spectrum": tensor.spectrum.to_json() if tensor.spectrum else None,
        "factors": tensor.factors.to_json() if tensor.factors else None,
    }  # fmt: skip


_ORDER = [
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
]


def in_order(modules: Iterable[str]) -> list[str]:
    """Each kind of module once; known kinds first, in the order in which a transformer's layer computes them."""
    once = list(dict.fromkeys(modules))
    return sorted(once, key=lambda m: _ORDER.index(m) if m in _ORDER else len(_ORDER))


def by_layer(tensors: Iterable[T]) -> dict[int, list[T]]:
    """The tensors of each layer by its number, ascending; tensors outside layers are in none."""
    layers = dict[int, list[T]]()
    for tensor in tensors:
        if tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    return dict(sorted(layers.items()))


def by_module(tensors: Iterable[T]) -> dict[str, list[T]]:
    """The tensors of each kind of module, in the order of `in_order`."""
    modules = dict[str, list[T]]()
    for tensor in tensors:
        modules.setdefault(tensor.module, []).append(tensor)
    return {module: modules[module] for module in in_order(modules)}


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else UNDEFINED
