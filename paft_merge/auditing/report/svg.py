"""Figures as inline SVG: no script, no font, no file beside it. Colours of Okabe and Ito (2008), and every curve has its own mark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from paft_merge.auditing.report.figures import Chart, Dots, Figure, Heat, Line

HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
"""Okabe and Ito's palette, in the order in which its colours are furthest apart; yellow is left out (too pale for a line)."""

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 46
_SHAPES = ("circle", "square", "triangle", "diamond")

Place = Callable[[float], float]


def hue(number: int) -> str:
    """The colour of the source of that number."""
    return HUES[number % len(HUES)]


def draw(figure: Figure) -> str:
    """One figure as an `<svg>` element."""
    if isinstance(figure, Heat):
        return _heat(figure)
    return _dots(figure) if isinstance(figure, Dots) else _chart(figure)


def swatch(number: int) -> str:
    """A source's mark, to stand beside its name."""
    return f'<svg class="swatch" width="12" height="12" viewBox="0 0 12 12" aria-hidden="true">{_point(6, 6, number, 4)}</svg>'


def blend(value: float, heat: Heat) -> str:
    """The colour of a cell."""
    share = min(max((value - heat.low) / (heat.high - heat.low), 0.0), 1.0)
    stops = _SHARE if heat.scale == "share" else _AROUND
    at = share * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    return "#" + "".join(
        f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(stops[low], stops[low + 1], strict=True)
    )


_SHARE = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_AROUND = ((5, 81, 141), (104, 170, 207), (244, 244, 242), (240, 160, 80), (179, 72, 0))


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _point(x: float, y: float, number: int, size: float = 3) -> str:
    shape, colour = _SHAPES[number % len(_SHAPES)], hue(number)
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" fill="{colour}"/>'
    if shape == "square":
        return (
            f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:g}" height="{2 * size:g}" fill="{colour}"/>'
        )
    corners = (
        [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)] if shape == "triangle" else [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
    )
    points = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


# --- curves -----------------------------------------------------------------------------------------------------------


def _chart(chart: Chart) -> str:
    x_low, x_high = _range([v for line in chart.lines for v in line.x], chart.log_x)
    bands = [v for line in chart.lines if line.band for side in line.band for v in side]
    y_low, y_high = chart.y_range or _range(
        [*(v for line in chart.lines for v in line.y), *bands], chart.log_y, pad=not chart.log_y
    )
    place_x = _scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT, chart.log_x)
    place_y = _scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP, chart.log_y)
    parts = [_legend([(line.label, line.hue, line.dashed) for line in chart.lines if line.label])]
    whole = all(float(v).is_integer() for line in chart.lines for v in line.x)
    for value in ticks(y_low, y_high, chart.log_y):
        parts.append(_line(_LEFT, place_y(value), _WIDTH - _RIGHT, place_y(value), "grid"))
        parts.append(_text(_LEFT - 8, place_y(value) + 4, shown(value, chart.percent_y, y_high - y_low), anchor="end"))
    for value in ticks(x_low, x_high, chart.log_x, whole):
        parts.append(_text(place_x(value), _HEIGHT - _BOTTOM + 18, shown(value, chart.percent_x, x_high - x_low)))
    for mark in chart.marks:
        parts.append(
            _line(place_x(mark.x), _TOP, place_x(mark.x), _HEIGHT - _BOTTOM, "mark strong" if mark.strong else "mark")
        )
        # Where the axis is fixed, curves fill the top; a word there would lie on one of them.
        level = _HEIGHT - _BOTTOM - 7 if chart.y_range else _TOP + 11
        parts.append(_text(place_x(mark.x) + 4, level, mark.text, "mark-text", "start"))
    parts += [_curve(line, place_x, place_y, chart) for line in chart.lines]
    parts.append(_line(_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, "axis"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, chart.x_label, "label"))
    parts.append(
        _text(
            14,
            (_TOP + _HEIGHT - _BOTTOM) / 2,
            chart.y_label,
            "label",
            more=f' transform="rotate(-90 14 {(_TOP + _HEIGHT - _BOTTOM) / 2:.1f})"',
        )
    )
    return _svg(_WIDTH, _HEIGHT, chart.title, parts)


def _curve(line: Line, place_x: Place, place_y: Place, chart: Chart) -> str:
    at = [(place_x(x), place_y(y)) for x, y in zip(line.x, line.y, strict=True)]
    parts = []
    if line.band:
        low, high = ([(place_x(x), place_y(y)) for x, y in zip(line.x, side, strict=True)] for side in line.band)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*low, *reversed(high)])
        parts.append(f'<polygon points="{points}" fill="{hue(line.hue)}" opacity="0.15"/>')
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    parts.append(
        f'<polyline points="{points}" fill="none" stroke="{hue(line.hue)}" stroke-width="2" stroke-linejoin="round"{dash}/>'
    )
    for (x, y), value_x, value_y in zip(at, line.x, line.y, strict=True) if line.points else ():
        told = f"{line.label}: {chart.x_label} {value_x:g}, {chart.y_label} {shown(value_y, chart.percent_y, 0.001)}"
        parts.append(f"<g>{_point(x, y, line.hue)}<title>{escape(told)}</title></g>")
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    parts, x = [], float(_LEFT)
    room = (_WIDTH - _LEFT - _RIGHT) / max(len(entries), 1)
    for label, number, dashed in entries:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(
            f'<line x1="{x:.1f}" y1="14" x2="{x + 20:.1f}" y2="14" stroke="{hue(number)}" stroke-width="2"{dash}/>'
        )
        parts.append("" if dashed else _point(x + 10, 14, number))
        most = max(int((min(room, 230) - 30) / 7.0), 4)
        text = abridged(label, most)
        parts.append(_text(x + 26, 18, text, "legend", "start"))
        x += min(room, 40 + 7.2 * len(text))
    return "".join(parts)


# --- dots and cells ---------------------------------------------------------------------------------------------------


def _dots(dots: Dots) -> str:
    left, step = 24 + 6.6 * min(max(map(len, dots.categories)), 22), 22
    height = _TOP + step * len(dots.categories) + 44
    place = _scale(0.0, 1.0, left, _WIDTH - _RIGHT - 8, False)
    parts = [_legend([(label, number, False) for label, number, _ in dots.lines])]
    bottom = _TOP + step * len(dots.categories)
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(place(value), _TOP, place(value), bottom, "grid"))
        parts.append(_text(place(value), bottom + 16, f"{value:.0%}"))
    for row, category in enumerate(dots.categories):
        y = _TOP + step * (row + 0.5)
        parts.append(_line(left, y, _WIDTH - _RIGHT - 8, y, "rail"))
        parts.append(_text(left - 10, y + 4, _short(category, 22), anchor="end"))
        for at, (label, number, values) in enumerate(dots.lines):
            share, aside = values[row], min(7.0, 16 / len(dots.lines)) * (at - (len(dots.lines) - 1) / 2)
            if share is not None:
                told = f"{label}, {category}: {share:.2%}"
                parts.append(f"<g>{_point(place(share), y + aside, number, 4)}<title>{escape(told)}</title></g>")
    parts.append(_text((left + _WIDTH - _RIGHT) / 2, height - 8, dots.x_label, "label"))
    return _svg(_WIDTH, height, dots.title, parts)


def _heat(heat: Heat) -> str:
    left, tall = 24 + 6.6 * min(max(map(len, heat.rows)), 22), 20
    wide = (_WIDTH - left - _RIGHT) / len(heat.columns)
    top, bottom = 12.0, 12.0 + tall * len(heat.rows)
    parts = []
    for row, (name, values) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = top + tall * row
        parts.append(_text(left - 10, y + tall / 2 + 4, _short(name, 22), anchor="end"))
        for column, value in enumerate(values):
            parts.append(
                _cell(heat, left + wide * column, y, wide, tall, value, f"{name}, layer {heat.columns[column]}")
            )
    every = max(1, math.ceil(len(heat.columns) * 18 / (_WIDTH - left - _RIGHT)))
    for column, name in enumerate(heat.columns):
        if column % every == 0:
            parts.append(_text(left + wide * (column + 0.5), bottom + 15, name))
    parts.append(_text((left + _WIDTH - _RIGHT) / 2, bottom + 34, "layer", "label"))
    parts.append(_key(heat, left, bottom + 46))
    return _svg(_WIDTH, bottom + 84, heat.title, parts)


def _cell(heat: Heat, x: float, y: float, wide: float, tall: float, value: float | None, where: str) -> str:
    if value is None or math.isnan(value):
        return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}" class="none"><title>{escape(where)}: none</title></rect>'
    colour = blend(value, heat)
    told = f"{where}: {value:.1%}"
    cell = f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(wide - 1, 0.5):.1f}" height="{tall - 1:.1f}" fill="{colour}"><title>{escape(told)}</title></rect>'
    if wide < 30:
        return cell
    dark = sum(int(colour[i : i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.59), (5, 0.11))) < 140
    return cell + _text(x + wide / 2, y + tall / 2 + 3.5, f"{value * 100:.0f}", "cell light" if dark else "cell")


def _key(heat: Heat, left: float, y: float) -> str:
    """The colour scale beneath a heat map."""
    steps, width = 60, 200.0
    parts = []
    for i in range(steps):
        value = heat.low + (heat.high - heat.low) * (i + 0.5) / steps
        parts.append(
            f'<rect x="{left + i * width / steps:.2f}" y="{y:.1f}" width="{width / steps + 0.3:.2f}" height="10" fill="{blend(value, heat)}"/>'
        )
    middle = (heat.low + heat.high) / 2
    words = ("agree", "chance", "oppose") if heat.scale == "around_half" else ("dense", "", "sparse")
    for value, share, word in zip((heat.low, middle, heat.high), (0.0, 0.5, 1.0), words, strict=True):
        parts.append(
            _text(
                left + share * width, y + 24, f"{value:.0%} {word}".strip(), anchor="start" if not share else "middle"
            )
        )
    return "".join(parts)


# --- axes -------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, log: bool, whole: bool = False) -> list[float]:
    """Round numbers along an axis, about five."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        every = max(1, (last - first) // 6 + 1)
        decades = [10.0**e for e in range(first, last + 1, every)]
        return decades if len(decades) > 1 else [low, high]
    raw = (high - low) / 5 or 1.0
    unit = 10 ** math.floor(math.log10(raw))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= raw)
    step = max(1.0, float(round(step))) if whole else step
    count = int((high - math.ceil(low / step - 1e-9) * step) / step + 1e-9)
    return [math.ceil(low / step - 1e-9) * step + i * step for i in range(count + 1)]


def shown(value: float, percent: bool, span: float) -> str:
    """A number as an axis shows it; `span` says how many digits matter."""
    if percent:
        return f"{value:.{0 if span > 0.3 else 1 if span > 0.005 else 2}%}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if value and abs(value) < 1e-2 else f"{value:.3g}"


def _range(values: Sequence[float], log: bool, pad: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low, high) if high > low else (low / 2, high * 2)
    if pad:
        low, high = min(low, 0.0), high * 1.08
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _scale(low: float, high: float, start: float, stop: float, log: bool) -> Place:
    if log:
        a, b = math.log10(low), math.log10(high)
        return lambda v: start + (math.log10(max(v, low)) - a) / (b - a) * (stop - start)
    return lambda v: start + (v - low) / (high - low) * (stop - start)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def abridged(label: str, most: int = 22) -> str:
    """A label in at most so many characters: its beginning and its end, since names of runs differ at either."""
    return label if len(label) <= most else f"{label[: most // 2]}…{label[len(label) - (most - most // 2 - 1) :]}"
