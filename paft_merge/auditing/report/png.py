"""The same pictures as PNG files, by matplotlib (the `plots` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.report.figures import Chart, Dots, Figure, Heat, figures_of
from paft_merge.auditing.report.svg import blend, hue, shown
from paft_merge.errors import AuditError, OutputError

_MARKERS = ("o", "s", "^", "D")


def plot(audit: Audit, folder: Path) -> list[Path]:
    """Write every picture of an audit as a PNG into `folder`.

    Returns:
        The files.

    Raises:
        AuditError: PLOTS, matplotlib is not installed.
        OutputError: OUTPUT, the folder cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise AuditError.of(
            "PLOTS", folder, "matplotlib is not installed", "pip install 'paft-merge[plots]', or use --html"
        ) from error
    written = []
    for figure in figures_of(audit):
        height = (
            1.6 + 0.3 * len(figure.rows if isinstance(figure, Heat) else figure.categories)
            if not isinstance(figure, Chart)
            else 4.2
        )
        canvas = Canvas(figsize=(8, height), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        _draw(figure, axes, canvas)
        axes.set_title(figure.title, loc="left", fontsize=12, fontweight="bold")
        place = folder / f"{figure.name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            canvas.savefig(place, dpi=150, facecolor="white")
        except OSError as error:
            raise OutputError.of(
                "OUTPUT", place, error.strerror or str(error), "choose a folder that can be written"
            ) from error
        written.append(place)
    return written


def _draw(figure: Figure, axes: Any, canvas: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if isinstance(figure, Heat):
        _heat(figure, axes, canvas)
    elif isinstance(figure, Dots):
        _dots(figure, axes)
    else:
        _chart(figure, axes)


def _chart(chart: Chart, axes: Any) -> None:
    for line in chart.lines:
        style = {
            "color": hue(line.hue),
            "linestyle": "--" if line.dashed else "-",
            "label": _plain(line.label) if line.label else None,
        }
        marker = {"marker": _MARKERS[line.hue % len(_MARKERS)], "markersize": 4} if line.points else {}
        axes.plot(line.x, line.y, linewidth=1.8, **style, **marker)
        if line.band:
            axes.fill_between(line.x, *line.band, color=hue(line.hue), alpha=0.15, linewidth=0)
    if any(line.dashed for line in chart.lines):
        axes.plot([], [], color="#5b6672", linestyle="--", linewidth=1.8, label="after trimming alone")
    for mark in chart.marks:
        axes.axvline(
            mark.x, color="#1c2430" if mark.strong else "#aab3bd", linestyle="-" if mark.strong else ":", linewidth=1
        )
        axes.annotate(
            mark.text,
            (mark.x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            fontsize=8,
        )
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    if chart.y_range:
        axes.set_ylim(chart.y_range[0] - 0.02, chart.y_range[1] + 0.02)
    span_y = 1.0 if chart.y_range else 0.1
    for is_share, axis, span in ((chart.percent_x, axes.xaxis, 1.0), (chart.percent_y, axes.yaxis, span_y)):
        if is_share:
            axis.set_major_formatter(lambda value, _, span=span: shown(value, True, span))
    if all(float(x).is_integer() for line in chart.lines for x in line.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e8ebef")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.legend(frameon=False, fontsize=9)


def _dots(dots: Dots, axes: Any) -> None:
    for place, (label, number, values) in enumerate(dots.lines):
        aside = 0.12 * (place - (len(dots.lines) - 1) / 2)
        at = [(v, row + aside) for row, v in enumerate(values) if v is not None]
        x, y = [v for v, _ in at], [row for _, row in at]
        axes.scatter(
            x, y, color=hue(number), marker=_MARKERS[number % len(_MARKERS)], s=44, label=_plain(label), zorder=3
        )
    axes.set_yticks(range(len(dots.categories)), [_plain(c) for c in dots.categories])
    axes.set_ylim(len(dots.categories) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color="#e8ebef")
    axes.set_xlabel(dots.x_label)
    axes.legend(frameon=False, fontsize=9)


def _heat(heat: Heat, axes: Any, canvas: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    steps = 128
    middles = [heat.low + (heat.high - heat.low) * (i + 0.5) / steps for i in range(steps)]
    colours = ListedColormap([blend(m, heat) for m in middles]).with_extremes(bad="#f0f1f3")
    values = [[float("nan") if v is None else v for v in row] for row in heat.values]
    norm = Normalize(heat.low, heat.high)
    axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    axes.set_yticks(range(len(heat.rows)), [_plain(r) for r in heat.rows])
    every = max(1, len(heat.columns) // 16)
    axes.set_xticks(range(0, len(heat.columns), every), heat.columns[::every])
    axes.set_xlabel("layer")
    bar = canvas.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)


def _plain(text: str) -> str:
    """`text` with nothing that matplotlib would read as mathematics or hide from its legend."""
    return text.replace("$", r"\$").lstrip("_") or "?"
