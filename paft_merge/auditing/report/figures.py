"""The pictures of an audit as data: what is drawn, once, for the page (`svg`) and for PNG files (`plots`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paft_merge.auditing.results import AuditData, PairAudit, SourceAudit, in_order
from paft_merge.compute.magnitudes import EPSILONS


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word."""

    x: float
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """One curve; `hue` numbers its source, and `dashed` tells two curves of one source apart."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    hue: int
    dashed: bool = False
    points: bool = False
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Chart:
    """Curves over an axis."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    percent_x: bool = False
    percent_y: bool = False
    y_range: tuple[float, float] | None = None
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Dots:
    """A value for each category and source."""

    name: str
    title: str
    caption: str
    categories: tuple[str, ...]
    lines: tuple[tuple[str, int, tuple[float | None, ...]], ...]
    """Label, hue and values of each source; None where it has none."""
    x_label: str


@dataclass(frozen=True)
class Heat:
    """A value for each cell; None where there is none."""

    name: str
    title: str
    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    scale: Literal["share", "around_half"]
    """`share`: 0 to 1, pale to dark. `around_half`: 0.5 is pale, blue below and orange above."""
    low: float
    high: float


Figure = Chart | Dots | Heat


def figures_of(audit: AuditData) -> list[Figure]:
    """Every picture that an audit has numbers for."""
    sources = [(i, s) for i, s in enumerate(audit.sources) if s.tensors]
    drawn: list[Figure | None] = [
        _by_layer(sources, audit.epsilon),
        _by_module(sources, audit.epsilon),
        *(_sparsity_map(s, audit.epsilon, i) for i, s in sources),
        _magnitudes(sources, audit.epsilon),
        _energy(sources),
        _spectrum(sources),
        _bf16(sources),
        *(_conflicts(p, i) for i, p in enumerate(audit.pairs)),
        _preview(audit),
    ]
    return [d for d in drawn if d is not None]


Sources = Sequence[tuple[int, SourceAudit]]


def _layer_lines(sources: Sources, value: Callable[[SourceAudit, int], float | None]) -> tuple[Line, ...]:
    lines = []
    for hue, source in sources:
        found = [(layer, v) for layer in source.layers if (v := value(source, layer)) is not None and not math.isnan(v)]
        if len(found) > 1:
            lines.append(
                Line(source.label, tuple(float(x) for x, _ in found), tuple(y for _, y in found), hue, points=True)
            )
    return tuple(lines)


def _by_layer(sources: Sources, epsilon: float) -> Chart | None:
    lines = _layer_lines(sources, lambda s, k: s.layers[k].measure.sparsity(epsilon))
    caption = f"Share of entries with |delta| < {epsilon:g} in each layer: the measure of PAFT's Figure 2."
    title = "Sparsity by layer"
    return (
        Chart("sparsity_by_layer", title, caption, "layer", "sparsity", lines, percent_y=True, y_range=(0, 1))
        if lines
        else None
    )


def _by_module(sources: Sources, epsilon: float) -> Dots | None:
    modules = in_order(m for _, s in sources for m in s.modules)
    if len(modules) < 2:
        return None
    lines = tuple(
        (s.label, hue, tuple(s.modules[m].measure.sparsity(epsilon) if m in s.modules else None for m in modules))
        for hue, s in sources
    )
    caption = f"Share of entries with |delta| < {epsilon:g} in each kind of module, all layers together."
    return Dots("sparsity_by_module", "Sparsity by module", caption, tuple(modules), lines, "sparsity")


def _sparsity_map(source: SourceAudit, epsilon: float, hue: int) -> Heat | None:
    def value(layer: int, module: str) -> float | None:
        parts = [t.measure for t in source.layers[layer].tensors if t.module == module]
        entries = sum(p.entries for p in parts)
        return sum(p.below[epsilon] for p in parts) / entries if entries else None

    modules = [m for m, g in source.modules.items() if any(t.layer is not None for t in g.tensors)]
    if len(source.layers) < 2 or len(modules) < 2:
        return None
    values = tuple(tuple(value(layer, m) for layer in source.layers) for m in modules)
    caption = f"Share of entries with |delta| < {epsilon:g}; rows are modules, columns layers."
    title = f"Where {source.label} is sparse"
    return Heat(
        f"sparsity_map_{hue}", title, caption, tuple(modules), tuple(map(str, source.layers)), values, "share", 0.0, 1.0
    )


def _magnitudes(sources: Sources, epsilon: float) -> Chart | None:
    lines = []
    for hue, source in sources:
        edges, shares = source.total.measure.magnitudes()
        if edges:
            middle = 10 ** (0.5 / 8)
            lines.append(Line(source.label, tuple(e * middle for e in edges), tuple(shares), hue))
    if not lines:
        return None
    # A Gaussian's tail towards zero goes on for ever; the eye needs the decades that hold nearly all entries.
    low = min(_quantile(line, 2e-4) for line in lines)
    lines = [_from(line, low) for line in lines]
    top = max(max(line.x) for line in lines)
    marks = [
        Mark(e, f"{e:.0e}".replace("e-0", "e-"), strong=e == epsilon)
        for e in sorted({*EPSILONS, epsilon})
        if low < e < top / 2
    ]
    caption = "Share of the entries at each magnitude (eighths of a decade). Left of a line lies what that threshold calls zero."
    return Chart(
        "magnitudes",
        "Magnitudes",
        caption,
        "|delta|",
        "share of entries",
        tuple(lines),
        log_x=True,
        percent_y=True,
        marks=tuple(marks),
    )


def _quantile(line: Line, share: float) -> float:
    at = int(np.searchsorted(np.cumsum(line.y), share * sum(line.y)))
    return line.x[max(min(at, len(line.x) - 2), 0)]


def _from(line: Line, low: float) -> Line:
    kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x >= low]
    return Line(line.label, tuple(x for x, _ in kept), tuple(y for _, y in kept), line.hue)


def _energy(sources: Sources) -> Chart | None:
    shares = [0.0, *np.geomspace(0.001, 1.0, 60).tolist()]
    lines = []
    for hue, source in sources:
        measure = source.total.measure
        if measure.square:
            lines.append(Line(source.label, tuple(shares), tuple(measure.top_energy(s) for s in shares), hue))
    if not lines:
        return None
    caption = "Energy (sum of squares) held by the largest entries: what TIES keeps at a density. The higher the curve, the cheaper the trim."
    marks = (Mark(0.2, "density 0.2"),)
    return Chart("energy", "Energy held by the largest entries", caption, "share of entries kept", "energy kept", tuple(lines),
                 percent_x=True, percent_y=True, y_range=(0, 1), marks=marks)  # fmt: skip


def _spectrum(sources: Sources) -> Chart | None:
    lines = []
    for hue, source in sources:
        spectra = [t.spectrum.values for t in source.tensors if t.spectrum and t.spectrum.values[0] > 0]
        if not spectra:
            continue
        width = (
            min(map(len, spectra)) if max(map(len, spectra)) > 4 * min(map(len, spectra)) else max(map(len, spectra))
        )
        table = np.array([[*s[:width], *[np.nan] * (width - len(s))] for s in spectra]) / np.array(
            [[s[0]] for s in spectra]
        )
        low, middle, high = (np.maximum(np.nanquantile(table, q, axis=0), 1e-6) for q in (0.1, 0.5, 0.9))
        x = tuple(float(i + 1) for i in range(width))
        lines.append(
            Line(
                source.label,
                x,
                tuple(middle.tolist()),
                hue,
                points=width <= 32,
                band=(tuple(low.tolist()), tuple(high.tolist())),
            )
        )
    if not lines or max(len(line.x) for line in lines) < 2:
        return None
    caption = "Singular values over the largest: median over the tensors, and the band that holds 80 % of them. Flat is full rank."
    return Chart("spectrum", "Spectrum", caption, "component", "singular value / largest", tuple(lines), log_y=True)


def _bf16(sources: Sources) -> Chart | None:
    lines = _layer_lines(sources, lambda s, k: s.layers[k].measure.bf16_sparsity)
    caption = "Share of entries that vanish when weight + delta is cast to bfloat16."
    title = "What a cast to bfloat16 erases"
    return (
        Chart("bf16_by_layer", title, caption, "layer", "erased", lines, percent_y=True, y_range=(0, 1))
        if lines
        else None
    )


def _conflicts(pair: PairAudit, number: int) -> Heat | None:
    inside = [t for t in pair.tensors if t.layer is not None and t.measure.both]
    layers = sorted({t.layer for t in inside if t.layer is not None})
    modules = in_order(t.module for t in inside)
    if not inside:
        return None

    def value(layer: int, module: str) -> float | None:
        parts = [t for t in inside if t.layer == layer and t.module == module]
        return pair.of(parts).conflict_weighted if parts else None

    values = tuple(tuple(value(layer, m) for layer in layers) for m in modules)
    reach = max([abs(v - 0.5) for row in values for v in row if v is not None] + [0.05])
    reach = min(0.5, math.ceil(reach * 20) / 20)
    caption = "Share of signs that differ, weighted by the smaller magnitude. Pale is chance (50 %), blue agrees, orange opposes."
    title = f"Sign conflict of {pair.left} and {pair.right}"
    return Heat(
        f"conflict_{number}",
        title,
        caption,
        tuple(modules),
        tuple(map(str, layers)),
        values,
        "around_half",
        0.5 - reach,
        0.5 + reach,
    )


def _preview(audit: AuditData) -> Chart | None:
    preview = audit.preview
    if preview is None:
        return None
    lines = []
    for hue, source in enumerate(audit.sources):
        own = [t for t in preview.tensors if source.label in t.sources and t.layer is not None]
        layers = sorted({t.layer for t in own if t.layer is not None})
        if len(layers) < 2:
            continue
        left = [preview.of(source.label, [t for t in own if t.layer == k]) for k in layers]
        x = tuple(map(float, layers))
        lines.append(Line("", x, tuple(s.kept_energy for s in left), hue, dashed=True))
        lines.append(Line(source.label, x, tuple(s.elected_energy for s in left), hue, points=True))
    caption = "Share of each source's energy that survives trimming (dashed) and then the election (solid)."
    title = f"What {preview.method} {'would keep' if audit.sampled is None else 'kept'}"
    return (
        Chart("preview", title, caption, "layer", "energy kept", tuple(lines), percent_y=True, y_range=(0, 1))
        if lines
        else None
    )
