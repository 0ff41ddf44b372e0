"""The plot of a search: the front of several objectives, and the values over the trials and over each parameter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

from paft_merge.auditing.report.figures import abridged
from paft_merge.errors import escape
from paft_merge.pipeline.search_result import Trial, chosen, front_of
from paft_merge.pipeline.search_space import Dimension, is_range

log = logging.getLogger(__name__)

_RED, _GREY = "#cc3311", "#777777"


def plot(trials: Sequence[Trial], dimensions: Sequence[Dimension], objectives: Sequence[str], path: Path) -> None:
    """Draw the search as a PNG: the values over the trials and over each parameter; skipped without matplotlib.

    With several objectives, a panel for each pair of them shows the front instead of the course of the search. The colour
    of a dot is the number of its trial; a star marks the best trial, a dashed line or a square the recipe as it is.
    """
    if find_spec("matplotlib") is None:
        log.warning("no %s: matplotlib is not installed (pip install 'paft-merge[plots]')", path.name)
        return
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a name may have a `$`
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        _draw(trials, dimensions, objectives, path)


def _draw(trials: Sequence[Trial], dimensions: Sequence[Dimension], objectives: Sequence[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

    pairs = list(combinations(range(len(objectives)), 2))
    firsts = len(pairs) or 1
    count = firsts + len(dimensions)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 3.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, sharey=not pairs, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    best, own = chosen(trials), next((t for t in trials if t.is_recipe), None)
    numbers = [t.number for t in trials]
    whole = MaxNLocator(nbins=6, integer=True, min_n_ticks=1)

    def dots_of(panel: Any, x: Mapping[int, Any], y: Mapping[int, float], shown: Sequence[Trial]) -> Any:
        style = {"vmin": 1, "vmax": max(2, *numbers), "cmap": "viridis"}
        order = [t.number for t in shown]
        dots = panel.scatter([x[n] for n in order], [y[n] for n in order], s=16, c=order, **style)
        if best in shown:
            ring = {"marker": "*", "s": 170, "facecolor": "none", "edgecolor": _RED, "label": "best trial"}
            panel.scatter([x[best.number]], [y[best.number]], **ring)
        panel.grid(alpha=0.3)
        return dots

    def draw(panel: Any, x: Mapping[int, Any], shown: Sequence[Trial]) -> Any:
        dots = dots_of(panel, x, {t.number: t.value for t in trials}, shown)
        if own:
            panel.axhline(own.value, color=_GREY, linestyle="--", linewidth=1, label="the recipe as it is")
        return dots

    if pairs:
        for panel, (a, b) in zip(panels, pairs, strict=False):
            x, y = ({t.number: t.values[place] for t in trials} for place in (a, b))
            dots = dots_of(panel, x, y, trials)
            steps = sorted((x[t.number], y[t.number]) for t in front_of(trials))
            panel.plot(*zip(*steps, strict=True), color=_RED, linewidth=1, marker="o", mfc="none", label="front")
            if own:
                square = {"marker": "s", "s": 60, "facecolor": "none", "edgecolor": _GREY}
                panel.scatter([x[own.number]], [y[own.number]], label="the recipe as it is", **square)
            panel.set_xlabel(_label(objectives[a], 36))
            panel.set_ylabel(_label(objectives[b], 40))
    else:
        dots = draw(panels[0], {number: number for number in numbers}, trials)
        running = [max(t.value for t in trials[: at + 1]) for at in range(len(trials))]
        panels[0].step(numbers, running, where="post", color=_RED, linewidth=1, label="best so far")
        panels[0].set_xlabel("trial")
        panels[0].xaxis.set_major_locator(whole)
        figure.supylabel(_label(objectives[0], 40), fontsize="medium")
    for panel, one in zip(panels[firsts:], dimensions, strict=False):
        panel.set_xlabel(_label(one.name, 36))
        if pairs:
            panel.set_ylabel(_label(objectives[0], 40))
        choices, values = one.choices, {t.number: t.parameters[one.name] for t in trials}
        if is_range(choices):
            shown: Sequence[Trial] = [t for t in trials if isinstance(values[t.number], int | float)]
        else:
            named = list(dict.fromkeys(_name_of(value) for value in (*choices, *values.values())))
            shown, values = trials, {number: named.index(_name_of(value)) for number, value in values.items()}
            panel.set(xlim=(-0.5, len(named) - 0.5))
            ticks = [abridged(escape(name), 18) for name in named]
            slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": "small"}
            panel.set_xticks(range(len(named)), ticks, **(slant if sum(map(len, ticks)) > 24 else {}))
        draw(panel, values, shown)
        if is_range(choices) and len(choices) == 3:
            panel.set_xscale("log")
            wide = choices[1] > 100 * choices[0]
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.xaxis.set_minor_locator(NullLocator())
        if not shown:
            panel.set_xlim(choices[0], choices[1])
    figure.colorbar(dots, ax=panels, label="trial", pad=0.01).ax.yaxis.set_major_locator(whole)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _label(name: str, width: int) -> str:
    return abridged(escape(name), width)


def _name_of(choice: Any) -> str:
    return "not set" if choice is None else str(choice)
