"""The figures of an audit as data, which `svg` draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from paft_merge.auditing.results import (
    Advice,
    AuditData,
    PairAudit,
    PairTensor,
    SourceAudit,
    TensorAudit,
    by_layer,
    in_order,
)
from paft_merge.compute.magnitudes import EPSILONS


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word."""

    x: float
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """One curve; `hue` is the number of its source, and `dashed` marks the second of two curves of one source."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    hue: int
    dashed: bool = False
    points: bool = False
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Titled:
    """The texts of a figure; `name` is that of its file."""

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Chart(Titled):
    """Curves over an axis."""

    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    percent_x: bool = False
    percent_y: bool = False
    share_y: bool = False
    """y is a share of 0 to 1; the axis follows the data, and a thin bar shows its part of the whole."""
    y_range: tuple[float, float] | None = None
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Dots(Titled):
    """A value for each category and source."""

    categories: tuple[str, ...]
    lines: tuple[tuple[str, int, tuple[float | None, ...]], ...]
    """Label, hue and values of each source; None where it has none."""
    x_label: str


@dataclass(frozen=True)
class Heat(Titled):
    """A value for each cell; None where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    scale: Literal["share", "around_half"]
    """`share`: weak to strong. `around_half`: 0.5 is neutral, blue below and orange above."""
    low: float
    high: float
    x_label: str = "layer"


@dataclass(frozen=True)
class Spot:
    """A model in a scatter plot."""

    label: str
    """Beside the point: the swept value."""
    title: str
    """The whole name."""
    x: float
    y: float
    x_band: tuple[float, float] | None = None
    """The interval of x, drawn as a whisker."""
    y_band: tuple[float, float] | None = None
    shade: float | None = None
    """0 to 1, from weak to strong."""
    ringed: bool = False


@dataclass(frozen=True)
class Scatter(Titled):
    """Models by two values, those of one series joined by a line; shapes and labels distinguish them without colours."""

    x_label: str
    y_label: str
    series: tuple[tuple[str, tuple[Spot, ...]], ...]
    """A name and its spots; the name is empty for a model that is not one of a series."""
    shade_label: str = ""
    shade_ends: tuple[str, str] = ("", "")
    """The values at shades 0 and 1."""


Figure = Chart | Dots | Heat | Scatter


MANY = 8
"""Sources from which on figures and tables show all of them together instead of each source and each pair."""

MOST_PAIRS = 20
"""Rows of a table of pairs, and lines of advice, of many sources."""

MOST_ALIKE = 3
"""Lines of advice about one metric, of many sources."""


def shown_pairs(audit: AuditData) -> tuple[Sequence[PairAudit], str]:
    """The pairs for a table and, of many sources, a sentence about the others: those whose signs differ most are shown."""
    if len(audit.sources) <= MANY or len(audit.pairs) <= MOST_PAIRS:
        return audit.pairs, ""
    found = [pair.total.conflict_weighted for pair in audit.pairs]
    ranked = [audit.pairs[at] for at in np.argsort([1.0 if math.isnan(v) else -v for v in found], kind="stable")]
    return ranked[:MOST_PAIRS], f"the {MOST_PAIRS} of {len(ranked):,} pairs whose signs differ most; the JSON has all"


def shown_advice(audit: AuditData, advice: Sequence[Advice]) -> tuple[Sequence[Advice], str]:
    """The advice to print and, of many sources, a sentence about the rest: warnings first, a few lines for each metric."""
    if len(audit.sources) <= MANY or len(advice) <= MOST_PAIRS:
        return advice, ""
    seen, shown = Counter[str](), list[Advice]()
    for one in sorted(advice, key=lambda one: one.level != "warn"):
        seen[one.metric] += 1
        if seen[one.metric] <= MOST_ALIKE:
            shown.append(one)
    shown = shown[:MOST_PAIRS]
    left = len(advice) - len(shown)
    return shown, f"{left:,} further lines of advice: the JSON has all" if left else ""


def figures_of(audit: AuditData) -> list[Figure]:
    """Every figure that the audit has numbers for."""
    sources = [(i, s) for i, s in enumerate(audit.sources) if s.tensors]
    many = len(sources) > MANY
    figures: list[Figure | None] = [
        _by_layer(sources, audit.epsilon),
        _by_module(sources, audit.epsilon),
        *([] if many else [_sparsity_map(s, audit.epsilon, i) for i, s in sources]),
        _magnitudes(sources, audit.epsilon),
        _energy(sources),
        _spectrum(sources),
        _bf16(sources),
        *([_conflicts_of_all(audit)] if many else [_conflicts(p, i) for i, p in enumerate(audit.pairs)]),
        _preview(audit),
    ]
    return [_of_many(f) if many else f for f in figures if f is not None]


Sources = Sequence[tuple[int, SourceAudit]]


T = TypeVar("T", TensorAudit, PairTensor)


def abridged(label: str, most: int = 22) -> str:
    """`label` in at most `most` characters: its beginning and its end, since names of runs differ at either."""
    return label if len(label) <= most else f"{label[: most // 2]}…{label[len(label) - (most - most // 2 - 1) :]}"


def exponent(value: float) -> str:
    """A threshold in its shortest form: 1e-5, 0.02."""
    digits, _, power = f"{value:e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if 0 < value < 0.01 else f"{value:g}"


def share_limits(values: Sequence[float]) -> tuple[float, float]:
    """The part of 0 to 1 that an axis of shares shows: all of it, unless the values lie close together."""
    low, high = min(values), max(values)
    pad = max(0.15 * (high - low), 0.005)
    low, high = max(low - pad, 0.0), min(high + pad, 1.0)
    low = 0.0 if low < 0.5 * (high - low) else math.floor(low * 100) / 100
    return (0.0, 1.0) if high - low > 0.6 else (low, math.ceil(high * 100) / 100)


def _layer_chart(
    name: str,
    title: str,
    caption: str,
    y_label: str,
    sources: Sources,
    value: Callable[[SourceAudit, int], float | None],
) -> Chart | None:
    """A share of each layer as a curve for every source that has at least two; None without one."""
    lines = []
    for hue, source in sources:
        found = {float(k): v for k in source.layers if (v := value(source, k)) is not None and not math.isnan(v)}
        if len(found) > 1:
            lines.append(Line(source.label, tuple(found), tuple(found.values()), hue, points=True))
    return Chart(name, title, caption, "layer", y_label, tuple(lines), percent_y=True, share_y=True) if lines else None


def _by_layer(sources: Sources, epsilon: float) -> Chart | None:
    caption = f"Share of entries with |delta| < {exponent(epsilon)} in each layer (Figure 2 of the PAFT paper)."
    return _layer_chart(
        "sparsity_by_layer", "Sparsity by layer", caption, "sparsity", sources, lambda s, k: s.layers[k].measure.sparsity(epsilon)
    )  # fmt: skip


def _bf16(sources: Sources) -> Chart | None:
    caption = "Share of entries that vanish when weight + delta is cast to bfloat16."
    return _layer_chart(
        "bf16_by_layer", "What a cast to bfloat16 erases", caption, "erased", sources, lambda s, k: s.layers[k].measure.bf16_sparsity
    )  # fmt: skip


def _by_module(sources: Sources, epsilon: float) -> Dots | None:
    modules = in_order(m for _, s in sources for m in s.modules)
    if len(modules) < 2:
        return None
    lines = tuple(
        (s.label, hue, tuple(s.modules[m].measure.sparsity(epsilon) if m in s.modules else None for m in modules))
        for hue, s in sources
    )
    caption = f"Share of entries with |delta| < {exponent(epsilon)} in each kind of module, over all layers."
    return Dots("sparsity_by_module", "Sparsity by module", caption, tuple(modules), lines, "sparsity")


def _cells(
    tensors: Iterable[T], value: Callable[[list[T]], float]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
    """Modules, layers, and the value of each module (row) in each layer (column); None where no tensor is."""
    cells: dict[tuple[str, int], list[T]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            cells.setdefault((tensor.module, tensor.layer), []).append(tensor)
    modules, layers = in_order(m for m, _ in cells), sorted({layer for _, layer in cells})
    rows = tuple(tuple(value(cells[m, k]) if (m, k) in cells else None for k in layers) for m in modules)
    return tuple(modules), tuple(map(str, layers)), rows


def _sparsity_map(source: SourceAudit, epsilon: float, hue: int) -> Heat | None:
    def share(parts: list[TensorAudit]) -> float:
        return sum(p.measure.below[epsilon] for p in parts) / max(sum(p.measure.entries for p in parts), 1)

    modules, layers, values = _cells(source.tensors, share)
    if len(layers) < 2 or len(modules) < 2:
        return None
    caption = f"Share of entries with |delta| < {exponent(epsilon)}; rows are modules, columns are layers."
    title = f"Where {abridged(source.label, 44)} is sparse"
    limits = share_limits([v for row in values for v in row if v is not None])
    return Heat(f"sparsity_map_{hue}", title, caption, modules, layers, values, "share", *limits)


def _of_many(figure: Figure) -> Figure:
    """A figure of many sources: a map with a row for each source where it can be, else curves without a legend."""
    if isinstance(figure, Dots):
        rows, columns, x_label = (
            {label: values for label, _, values in figure.lines},
            figure.categories,
            "kind of module",
        )
    elif isinstance(figure, Chart) and figure.x_label == "layer":
        curves = {line.label: dict(zip(line.x, line.y, strict=True)) for line in figure.lines if not line.dashed}
        layers = sorted({x for curve in curves.values() for x in curve})
        rows = {label: tuple(map(curve.get, layers)) for label, curve in curves.items()}
        columns, x_label = tuple(f"{layer:g}" for layer in layers), "layer"
    elif isinstance(figure, Chart):
        lines = tuple(replace(line, label="", band=None, points=False) for line in figure.lines)
        return replace(figure, lines=lines, caption=f"{figure.caption} One curve for each source.")
    else:
        return figure
    limits = share_limits([v for values in rows.values() for v in values if v is not None])
    titled, values = (figure.name, figure.title, figure.caption), tuple(rows.values())
    return Heat(*titled, tuple(map(abridged, rows)), columns, values, "share", *limits, x_label)


def _conflicts_of_all(audit: AuditData) -> Heat | None:
    place = {source.label: at for at, source in enumerate(audit.sources)}
    values: list[list[float | None]] = [[None] * len(place) for _ in place]
    for pair in audit.pairs:
        if pair.total.both:
            a, b = place[pair.left], place[pair.right]
            values[a][b] = values[b][a] = pair.total.conflict_weighted
    if not any(v is not None for row in values for v in row):
        return None
    reach = max([abs(v - 0.5) for row in values for v in row if v is not None] + [0.05])
    reach = min(0.5, math.ceil(reach * 20) / 20)
    caption = (
        "Share of signs that differ between two sources, weighted by the smaller magnitude. 50 % is chance; blue agrees, "
        "orange opposes."
    )
    labels = tuple(map(abridged, place))
    return Heat(
        "conflicts", "Sign conflict of every pair", caption, labels, tuple(str(at + 1) for at in range(len(labels))),
        tuple(map(tuple, values)), "around_half", 0.5 - reach, 0.5 + reach, "source",
    )  # fmt: skip


def _magnitudes(sources: Sources, epsilon: float) -> Chart | None:
    lines = []
    for hue, source in sources:
        edges, shares = source.total.measure.magnitudes()
        if edges:
            middle = 10 ** (0.5 / 8)
            lines.append(Line(source.label, tuple(e * middle for e in edges), tuple(shares), hue))
    if not lines:
        return None
    # A Gaussian has a long tail towards zero; the axis shows the decades that hold nearly all entries.
    low = min(_quantile(line, 2e-4) for line in lines)
    lines = [_from(line, low) for line in lines]
    top = max(max(line.x) for line in lines)
    marks = [Mark(e, exponent(e), strong=e == epsilon) for e in sorted({*EPSILONS, epsilon}) if low < e < top / 2]
    caption = (
        "Share of the entries at each magnitude (eighths of a decade). Entries left of a vertical line are below that "
        "threshold."
    )
    return Chart(
        "magnitudes", "Magnitudes", caption, "|delta|", "share of entries", tuple(lines), log_x=True, percent_y=True, marks=tuple(marks)
    )  # fmt: skip


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
    caption = "Energy (sum of squares) of the largest entries: what TIES keeps at a density. The higher the curve, the less a trim removes."
    marks = (Mark(0.2, "density 0.2"),)
    return Chart("energy", "Energy held by the largest entries", caption, "share of entries kept", "energy kept", tuple(lines),
                 percent_x=True, percent_y=True, y_range=(0, 1), marks=marks)  # fmt: skip


def _spectrum(sources: Sources) -> Chart | None:
    lines = []
    for hue, source in sources:
        spectra = [t.spectrum.values for t in source.tensors if t.spectrum and t.spectrum.values[0] > 0]
        if not spectra:
            continue
        least, most = min(map(len, spectra)), max(map(len, spectra))
        width = least if most > 4 * least else most
        padded = np.array([[*s[:width], *[np.nan] * (width - len(s))] for s in spectra])
        table = padded / padded[:, :1]
        low, middle, high = (
            tuple(np.maximum(np.nanquantile(table, q, axis=0), 1e-6).tolist()) for q in (0.1, 0.5, 0.9)
        )
        x = tuple(float(i + 1) for i in range(width))
        lines.append(Line(source.label, x, middle, hue, points=width <= 32, band=(low, high)))
    if not lines or max(len(line.x) for line in lines) < 2:
        return None
    wide = min(v for line in lines if line.band for v in line.band[0]) < 0.1
    caption = "Singular values over the largest: median over the tensors, and the band that holds 80 % of them. Flat is full rank."
    return Chart("spectrum", "Spectrum", caption, "component", "singular value / largest", tuple(lines), log_y=wide)


def _conflicts(pair: PairAudit, number: int) -> Heat | None:
    modules, layers, values = _cells(
        (t for t in pair.tensors if t.measure.both), lambda parts: pair.of(parts).conflict_weighted
    )
    if not modules:
        return None
    reach = max([abs(v - 0.5) for row in values for v in row if v is not None] + [0.05])
    reach = min(0.5, math.ceil(reach * 20) / 20)
    caption = (
        "Share of signs that differ, weighted by the smaller magnitude. 50 % is chance; blue agrees, orange opposes."
    )
    title = f"Sign conflict of {abridged(pair.left, 32)} and {abridged(pair.right, 32)}"
    return Heat(f"conflict_{number}", title, caption, modules, layers, values, "around_half", 0.5 - reach, 0.5 + reach)


def _preview(audit: AuditData) -> Chart | None:
    preview = audit.preview
    if preview is None:
        return None
    lines = []
    for hue, source in enumerate(audit.sources):
        layers = by_layer(t for t in preview.tensors if source.label in t.sources)
        left = {float(k): preview.of(source.label, own) for k, own in layers.items()}
        left = {k: survived for k, survived in left.items() if survived.square}
        if len(left) > 1:
            lines.append(Line("", tuple(left), tuple(s.kept_energy for s in left.values()), hue, dashed=True))
            lines.append(
                Line(source.label, tuple(left), tuple(s.elected_energy for s in left.values()), hue, points=True)
            )
    left_after = (
        "after trimming and the election of signs"
        if len(audit.sources) > MANY
        else ("after trimming (dashed) and then after the election of signs (solid)")
    )
    caption = f"Share of each source's energy that is left {left_after}."
    title = f"What {preview.method} {'would keep' if audit.sampled is None else 'kept'}"
    return (
        Chart("preview", title, caption, "layer", "energy kept", tuple(lines), percent_y=True, share_y=True)
        if lines
        else None
    )
