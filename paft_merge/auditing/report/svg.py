"""Figures as SVG without script, font or second file: inline in the page, and standing alone for PNG files.

Colours are CSS classes, so that the page can show the same drawing light and dark. Every source has a hue of Okabe and
Ito (2008) and a mark of its own shape.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from unicodedata import east_asian_width

from paft_merge.auditing.report.figures import Chart, Dots, Figure, Heat, Line, Scatter, Spot, abridged, share_limits
from paft_merge.errors import escape as printable


@dataclass(frozen=True)
class Palette:
    """The colours of a page and its figures."""

    named: Mapping[str, str]
    """Colours of texts, rules and surfaces, by name."""
    hues: tuple[str, ...]
    """One for each source, the furthest apart first."""
    share: tuple[str, ...]
    """Stops of the scale for shares, from 0 to 1."""
    around_half: tuple[str, ...]
    """Stops of the scale whose middle is 0.5."""


LIGHT = Palette(
    {
        "ink": "#1c2430", "soft": "#5b6675", "rule": "#e3e7ec", "wash": "#f6f8fa", "paper": "#ffffff", "warn": "#a34700",
        "good": "#00664a", "note": "#005c91", "line": "#e8ebef", "axis": "#9aa4b0", "none": "#f0f1f3",
    },
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777"),
    ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b"),
    ("#05518d", "#68aacf", "#f4f4f2", "#f0a050", "#b34800"),
)  # fmt: skip
DARK = Palette(
    {
        "ink": "#e6eaf0", "soft": "#a3adba", "rule": "#2b333d", "wash": "#1a2028", "paper": "#12161c", "warn": "#ffa057",
        "good": "#4fd1a5", "note": "#6cbcf5", "line": "#27303a", "axis": "#6b7684", "none": "#191e25",
    },
    ("#4aa8e0", "#f0803c", "#26b98f", "#dd94bd", "#f0b429", "#8fd0f5", "#a0a0a0"),
    ("#1a2531", "#1c4467", "#2670a8", "#62ace0", "#d6ecfb"),
    ("#8fcdf0", "#2f7fb0", "#262c33", "#b8691f", "#ffc07a"),
)  # fmt: skip

_STEPS = 24
"""Colours of a heat map's scale, less one."""
_WIDTH, _LEFT, _RIGHT = 560, 58, 44
_PLOT = 220
"""Height of a chart inside its axes."""
_SHAPES = ("circle", "square", "triangle", "diamond", "wedge", "cross", "star", "upright", "flat", "ex")
_STRIDES = (1, 2, 5, 10, 20, 25, 50, 100, 200, 500)

Place = Callable[[float], float]
"""From a value to a coordinate."""


def stylesheet(palette: Palette) -> str:
    """The CSS of figures, below an element of class `paft`."""
    c = palette.named
    rules = [
        f".tick,.cell,.mark-text{{font-size:11px;fill:{c['soft']}}}",
        f".label{{font-size:12px;fill:{c['ink']}}}",
        f".legend{{font-size:12.5px;fill:{c['ink']}}}",
        f".title{{font-size:15px;font-weight:700;fill:{c['ink']}}}",
        f".caption{{font-size:12px;fill:{c['soft']}}}",
        f".gridline{{stroke:{c['line']}}}",
        f".axis{{stroke:{c['axis']}}}",
        f".mark{{stroke:{c['axis']};stroke-dasharray:2 3}}",
        f".strong{{stroke:{c['ink']};stroke-dasharray:none}}",
        f".none{{fill:{c['none']}}}",
        f".whole{{fill:{c['line']}}}",
        f".part{{fill:{c['axis']}}}",
        ".curve{fill:none;stroke-width:2;stroke-linejoin:round}",
        ".dashed{stroke-dasharray:5 4}",
        f".outline{{stroke:{c['ink']};stroke-width:1.2}}",
        f".ring{{fill:none;stroke:{c['ink']};stroke-width:1.2}}",
        f".whisker{{stroke:{c['axis']};stroke-width:1}}",
        ".band{opacity:.15}",
    ]
    for i, hue in enumerate(palette.hues):
        rules += [f".fill{i}{{fill:{hue}}}", f".stroke{i}{{stroke:{hue}}}"]
    for name, stops in (("share", palette.share), ("around_half", palette.around_half)):
        for step in range(_STEPS + 1):
            colour = _blend(stops, step / _STEPS)
            light = sum(int(colour[i : i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.59), (5, 0.11))) > 140
            rules += [
                f".{name}{step}{{fill:{colour}}}",
                f".on-{name}{step}{{fill:{'#1c2430' if light else '#ffffff'}}}",
            ]
    return "".join(".paft " + rule.replace(",.", ",.paft .") for rule in rules)


def draw(figure: Figure) -> str:
    """A figure as an `<svg>` element, coloured by `stylesheet`."""
    width, height, parts = _parts(figure)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_plain(figure.title)}">{parts}</svg>'


def standalone(figure: Figure) -> str:
    """A figure as an SVG document in light colours on a light page, which a dark site can show, with its title and caption."""
    width, height, parts = _parts(figure)
    texts = [("title", 19, line) for line in textwrap.wrap(printable(figure.title), 54)]
    texts += [("caption", 16, line) for line in textwrap.wrap(figure.caption, 84)]
    head, y = [], 8.0
    for kind, step, line in texts:
        y += step
        head.append(_text(16, y, line, kind, "start"))
    y += 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="paft" width="{width + 16:g}" height="{height + y + 6:g}" font-family="sans-serif">'
        f'<style>{stylesheet(LIGHT)}</style><rect width="100%" height="100%" fill="{LIGHT.named["paper"]}"/>'
        f'{"".join(head)}<g transform="translate(8 {y:g})">{parts}</g></svg>'
    )


def swatch(number: int) -> str:
    """The mark of a source, for use beside its name."""
    point = _point(6, 6, number, 4)
    return f'<svg class="swatch" width="12" height="12" viewBox="0 0 12 12" aria-hidden="true">{point}</svg>'


def _parts(figure: Figure) -> tuple[float, float, str]:
    """Width, height and elements of a figure."""
    if isinstance(figure, Scatter):
        height, parts = _scatter(figure)
        return _WIDE, height, "".join(parts)
    if isinstance(figure, Heat):
        height, parts = _heat(figure)
    else:
        height, parts = _dots(figure) if isinstance(figure, Dots) else _chart(figure)
    return _WIDTH, height, "".join(parts)


def _plain(text: str) -> str:
    return escape(printable(text))


def _text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{more}>{_plain(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    place = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" class="{kind}"'
    return f"<rect {place}><title>{_plain(title)}</title></rect>" if title else f"<rect {place}/>"


def _point(x: float, y: float, number: int, size: float = 3, kind: str = "") -> str:
    shape, fill = _SHAPES[number % len(_SHAPES)], f'class="{kind or f"fill{number % len(LIGHT.hues)}"}"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {fill}/>'
    corners = {
        "square": [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
        "triangle": [(0.0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        "diamond": [(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
        "wedge": [(0.0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
        "cross": [
            *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
            *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
        ],
        "star": [
            *((0.0, -1.4), (0.33, -0.45), (1.33, -0.43), (0.53, 0.17), (0.82, 1.13)),
            *((0.0, 0.56), (-0.82, 1.13), (-0.53, 0.17), (-1.33, -0.43), (-0.33, -0.45)),
        ],
        "upright": [(-0.5, -1.4), (0.5, -1.4), (0.5, 1.4), (-0.5, 1.4)],
        "flat": [(-1.4, -0.5), (1.4, -0.5), (1.4, 0.5), (-1.4, 0.5)],
        "ex": [
            *((-0.6, -1.2), (0.0, -0.6), (0.6, -1.2), (1.2, -0.6), (0.6, 0.0), (1.2, 0.6)),
            *((0.6, 1.2), (0.0, 0.6), (-0.6, 1.2), (-1.2, 0.6), (-0.6, 0.0), (-1.2, -0.6)),
        ],
    }[shape]
    return f'<polygon points="{" ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)}" {fill}/>'


# --- curves -----------------------------------------------------------------------------------------------------------


def _chart(chart: Chart) -> tuple[float, list[str]]:
    legend, top = _legend([(line.label, line.hue) for line in chart.lines if line.label])
    bottom, right = top + _PLOT, _WIDTH - _RIGHT
    bands = [v for line in chart.lines if line.band for side in line.band for v in side]
    x_low, x_high = _limits([v for line in chart.lines for v in line.x], chart.log_x)
    values = [*(v for line in chart.lines for v in line.y), *bands]
    if chart.share_y:
        y_low, y_high = share_limits(values)
    else:
        y_low, y_high = chart.y_range or _limits(values, chart.log_y, pad=not chart.log_y)
    place_x, place_y = (
        _scale(x_low, x_high, _LEFT, right, chart.log_x),
        _scale(y_low, y_high, bottom, top, chart.log_y),
    )
    parts = legend
    for value, text in _labelled(ticks(y_low, y_high, chart.log_y), chart.percent_y):
        parts += [_line(_LEFT, place_y(value), right, place_y(value), "gridline")]
        parts += [_text(_LEFT - 8, place_y(value) + 4, text, anchor="end")]
    whole = all(float(v).is_integer() for line in chart.lines for v in line.x)
    for value, text in _labelled(ticks(x_low, x_high, chart.log_x, whole), chart.percent_x):
        parts.append(_text(place_x(value), bottom + 18, text))
    for mark in chart.marks:
        parts.append(_line(place_x(mark.x), top, place_x(mark.x), bottom, "mark strong" if mark.strong else "mark"))
        parts.append(_text(place_x(mark.x), top - 5, mark.text, "mark-text"))
    parts += [part for line in chart.lines for part in _curve(line, place_x, place_y, chart)]
    if chart.share_y:
        parts += _part_of_whole(right + 26, bottom, y_low, y_high, _PLOT, upright=True)
    middle = (top + bottom) / 2
    turned = f' transform="rotate(-90 14 {middle:.1f})"'
    parts += [_line(_LEFT, bottom, right, bottom, "axis"), _text(14, middle, chart.y_label, "label", more=turned)]
    parts.append(_text((_LEFT + right) / 2, bottom + 38, chart.x_label, "label"))
    return bottom + 46, parts


def _curve(line: Line, place_x: Place, place_y: Place, chart: Chart) -> list[str]:
    number, parts = line.hue % len(LIGHT.hues), []
    if line.band:
        low, high = ([(place_x(x), place_y(y)) for x, y in zip(line.x, side, strict=True)] for side in line.band)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*low, *reversed(high)])
        parts.append(f'<polygon points="{points}" class="band fill{number}"/>')
    at = [(place_x(x), place_y(y)) for x, y in zip(line.x, line.y, strict=True)]
    points, dashed = " ".join(f"{x:.1f},{y:.1f}" for x, y in at), " dashed" if line.dashed else ""
    parts.append(f'<polyline points="{points}" class="curve stroke{number}{dashed}"/>')
    size = 3 if len(at) <= 48 else 1.8
    for (x, y), value_x, value_y in zip(at, line.x, line.y, strict=True) if line.points else ():
        value = f"{value_y:.2%}" if chart.percent_y else f"{value_y:.3g}"
        title = f"{line.label}: {chart.x_label} {value_x:g}, {chart.y_label} {value}"
        parts.append(f"<g>{_point(x, y, line.hue, size)}<title>{_plain(title)}</title></g>")
    return parts


def _legend(entries: Sequence[tuple[str, int]], wide: float = _WIDTH) -> tuple[list[str], float]:
    """The marks and names of the sources in as many rows as they need, and where the plot begins below them."""
    parts, x, y = [], float(_LEFT), 14.0
    for label, number in entries:
        text = abridged(printable(label), 44)
        width = 46 + sum(12.5 if one.isupper() or east_asian_width(one) in "WF" else 8 for one in text)
        if x > _LEFT and x + width > wide:
            x, y = float(_LEFT), y + 19
        parts += [
            _line(x, y, x + 20, y, _stroke(number)),
            _point(x + 10, y, number),
            _text(x + 26, y + 4, text, "legend", "start"),
        ]
        x += width
    return parts, y + 26


def _stroke(number: int) -> str:
    """The class of a curve; those whose hue was used before are dashed."""
    return f"curve stroke{number % len(LIGHT.hues)}{' dashed' * (number // len(LIGHT.hues) % 2)}"


# --- scatter ----------------------------------------------------------------------------------------------------------

_WIDE, _TALL = 760, 420
"""Width of a scatter plot, and the height inside its axes."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def _scatter(scatter: Scatter) -> tuple[float, list[str]]:
    named = [(name, number) for number, (name, _) in enumerate(scatter.series) if name]
    parts, top = _legend(named, _WIDE)
    spots = [spot for _, mine in scatter.series for spot in mine]
    right, bottom = float(_WIDE - _RIGHT), top + _TALL
    x_low, x_high, place_x = _padded([v for s in spots for v in (s.x, *(s.x_band or ()))], _LEFT, right)
    y_low, y_high, place_y = _padded([v for s in spots for v in (s.y, *(s.y_band or ()))], bottom, top)
    for value, text in _labelled(ticks(x_low, x_high, False), False):
        parts += [_line(place_x(value), top, place_x(value), bottom, "gridline")]
        parts += [_text(place_x(value), bottom + 18, text)]
    for value, text in _labelled(ticks(y_low, y_high, False), False):
        parts += [_line(_LEFT, place_y(value), right, place_y(value), "gridline")]
        parts += [_text(_LEFT - 8, place_y(value) + 4, text, anchor="end")]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in ((place_x(spot.x), place_y(spot.y)) for spot in spots)]
    frame, marks, texts = (float(_LEFT), top, right + _RIGHT, bottom), list[str](), list[str]()
    # Names of single models come first, where there is still room for a label.
    for number, (name, mine) in sorted(enumerate(scatter.series), key=lambda one: bool(one[1][0])):
        way = " ".join(f"{place_x(spot.x):.1f},{place_y(spot.y):.1f}" for spot in mine)
        if len(mine) > 1:
            parts.append(f'<polyline points="{way}" class="{_stroke(number)}"/>')
        for spot in mine:
            x, y = place_x(spot.x), place_y(spot.y)
            if spot.x_band:
                parts.append(_line(place_x(spot.x_band[0]), y, place_x(spot.x_band[1]), y, "whisker"))
            if spot.y_band:
                parts.append(_line(x, place_y(spot.y_band[0]), x, place_y(spot.y_band[1]), "whisker"))
            marks.append(_spot(spot, x, y, number))
            texts += _beside(abridged(printable(spot.label), 28), x, y, taken, frame, far=not name)
    turned = f' transform="rotate(-90 14 {(top + bottom) / 2:.1f})"'
    parts += [*marks, *texts, _line(_LEFT, bottom, right, bottom, "axis"), _line(_LEFT, top, _LEFT, bottom, "axis")]
    parts.append(_text(14, (top + bottom) / 2, abridged(printable(scatter.y_label), 44), "label", more=turned))
    parts.append(_text((_LEFT + right) / 2, bottom + 38, abridged(printable(scatter.x_label), 64), "label"))
    if not scatter.shade_label:
        return bottom + 46, parts
    return bottom + 84, parts + _shades(scatter, bottom + 54)


def _spot(spot: Spot, x: float, y: float, number: int) -> str:
    kind = f"fill{number % len(LIGHT.hues)}" if spot.shade is None else f"share{round(spot.shade * _STEPS)}"
    ring = _point(x, y, number, 8.5, "ring") if spot.ringed else ""
    return f"<g>{ring}{_point(x, y, number, 5, f'{kind} outline')}<title>{_plain(spot.title)}</title></g>"


_ASIDE = (
    (11, 4, "start"), (-11, 4, "end"), (0, -13, "middle"), (0, 21, "middle"), (11, -9, "start"), (-11, -9, "end"),
    (11, 17, "start"), (-11, 17, "end"),
)  # fmt: skip
"""Where the label of a point may be: its distance, and the end of the text that is there."""
_FAR = tuple((dx, dy, "start" if dx > 0 else "end") for r in (30, 55, 80, 110) for dx in (r, -r) for dy in (-r, r, 4))


def _beside(text: str, x: float, y: float, taken: list[Box], frame: Box, *, far: bool) -> list[str]:
    """A label where it covers nothing, if there is such a place; `far`: also further away, with a line to the point."""
    wide = 6.2 * len(text)
    for dx, dy, anchor in (*_ASIDE, *_FAR) if far else _ASIDE:
        left = x + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
        box = left, y + dy - 9, left + wide, y + dy + 2
        inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
        clear = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
        if text and inside and clear:
            taken.append(box)
            line = [_line(x, y, x + dx, y + dy - 4, "mark")] if abs(dx) > 20 else []
            return [*line, _text(x + dx, y + dy, text, anchor=anchor)]
    return []


def _padded(values: Sequence[float], start: float, stop: float) -> tuple[float, float, Place]:
    """The ends of an axis with some room around the values, and its scale."""
    low, high = _limits(values, False)
    pad = 0.05 * (high - low)
    return low - pad, high + pad, _scale(low - pad, high + pad, start, stop, False)


def _shades(scatter: Scatter, y: float) -> list[str]:
    """The scale of shades below a scatter plot."""
    width, steps, left = 160.0, _STEPS + 1, _LEFT + 240.0
    parts = [_rect(left + i * width / steps, y, width / steps + 0.3, 10, f"share{i}") for i in range(steps)]
    parts.append(_text(left - 10, y + 9, abridged(printable(scatter.shade_label), 42), "label", "end"))
    ends = zip((left, left + width), scatter.shade_ends, strict=True)
    return parts + [_text(x, y + 24, abridged(printable(text), 16)) for x, text in ends]


# --- dots and cells ---------------------------------------------------------------------------------------------------


def _dots(dots: Dots) -> tuple[float, list[str]]:
    parts, top = _legend([(label, number) for label, number, _ in dots.lines])
    left, step, right = 24 + 6.6 * min(max(map(len, dots.categories)), 22), 22, _WIDTH - _RIGHT
    bottom = top + step * len(dots.categories)
    low, high = share_limits([v for _, _, values in dots.lines for v in values if v is not None])
    place = _scale(low, high, left, right, False)
    for value, text in _labelled(ticks(low, high, False), True):
        parts += [_line(place(value), top, place(value), bottom, "gridline"), _text(place(value), bottom + 16, text)]
    for row, category in enumerate(dots.categories):
        y = top + step * (row + 0.5)
        parts += [_line(left, y, right, y, "gridline"), _text(left - 10, y + 4, abridged(category), anchor="end")]
        for at, (label, number, values) in enumerate(dots.lines):
            share, aside = values[row], min(7.0, 16 / len(dots.lines)) * (at - (len(dots.lines) - 1) / 2)
            if share is not None:
                title = _plain(f"{label}, {category}: {share:.2%}")
                parts.append(f"<g>{_point(place(share), y + aside, number, 4)}<title>{title}</title></g>")
    bar = _part_of_whole(left, bottom + 28, low, high, right - left, upright=False)
    below = bottom + (52 if bar else 36)
    return below + 8, [*parts, *bar, _text((left + right) / 2, below, dots.x_label, "label")]


def _heat(heat: Heat) -> tuple[float, list[str]]:
    left, tall, top = 24 + 6.6 * min(max(map(len, heat.rows)), 22), 20, 4.0
    room = _WIDTH - left - 12
    wide, bottom, parts = room / len(heat.columns), top + tall * len(heat.rows), list[str]()
    gap = 1.0 if wide >= 6 else 0.0
    for row, (name, values) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = top + tall * row
        parts.append(_text(left - 10, y + tall / 2 + 4, abridged(name), anchor="end"))
        for column, value in enumerate(values):
            x, where = left + wide * column, f"{name}, {heat.x_label} {heat.columns[column]}"
            if value is None or math.isnan(value):
                parts.append(_rect(x, y, wide - gap, tall - 1, "none", f"{where}: none"))
                continue
            colour = _colour(value, heat)
            parts.append(_rect(x, y, wide - gap, tall - 1, colour, f"{where}: {value:.1%}"))
            if wide >= 30:
                parts.append(_text(x + wide / 2, y + tall / 2 + 3.5, f"{value * 100:.0f}", f"cell on-{colour}"))
    widest = 6.8 * max(map(len, heat.columns)) + 6
    every = next((s for s in _STRIDES if s * wide >= widest), len(heat.columns))
    for column in range(0, len(heat.columns), every):
        parts.append(_text(left + wide * (column + 0.5), bottom + 14, heat.columns[column]))
    parts.append(_text(left + room / 2, bottom + 32, heat.x_label, "label"))
    return bottom + 74, parts + _key(heat, left, bottom + 44)


def _key(heat: Heat, left: float, y: float) -> list[str]:
    """The colour scale below a heat map."""
    width, steps = 280.0, _STEPS + 1
    parts = [_rect(left + i * width / steps, y, width / steps + 0.3, 10, f"{heat.scale}{i}") for i in range(steps)]
    words = ("agree", "chance", "oppose") if heat.scale == "around_half" else ("", "", "")
    middle = (heat.low + heat.high) / 2
    for (_, text), at, word in zip(_labelled((heat.low, middle, heat.high), True), (0.0, 0.5, 1.0), words, strict=True):
        parts.append(_text(left + at * width, y + 24, f"{text} {word}".strip(), anchor="middle" if at else "start"))
    return parts


def _colour(value: float, heat: Heat) -> str:
    """The class of a cell."""
    share = min(max((value - heat.low) / (heat.high - heat.low), 0.0), 1.0)
    return f"{heat.scale}{round(share * _STEPS)}"


def _blend(stops: Sequence[str], share: float) -> str:
    at = share * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    pairs = [(int(stops[low][i : i + 2], 16), int(stops[low + 1][i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)


# --- axes -------------------------------------------------------------------------------------------------------------


def _part_of_whole(x: float, y: float, low: float, high: float, length: float, *, upright: bool) -> list[str]:
    """A thin bar from 0 to 100 % that starts at (x, y), with the part that the axis shows."""
    if (low, high) == (0.0, 1.0):
        return []
    start, size = low * length, max((high - low) * length, 2.0)
    title = f"the axis shows {low:.1%} to {high:.1%} of 0 to 100 %"
    if upright:
        bars = [
            _rect(x - 2, y - length, 4, length, "whole", title),
            _rect(x - 2, y - start - size, 4, size, "part", title),
        ]
        return [*bars, _text(x, y - length - 5, "100%"), _text(x, y + 14, "0%")]
    bars = [_rect(x, y - 2, length, 4, "whole", title), _rect(x + start, y - 2, size, 4, "part", title)]
    return [*bars, _text(x - 6, y + 4, "0%", anchor="end"), _text(x + length, y + 16, "100%", anchor="end")]


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
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _labelled(values: Sequence[float], percent: bool) -> list[tuple[float, str]]:
    """The ticks of an axis with their labels, all with the digits that the closest two need."""
    if percent:
        enough = (d for d in range(4) if all(abs(round(100 * v, d) - 100 * v) < 1e-7 for v in values))
        digits = next(enough, 4)
        return [(v, f"{v:.{digits}%}") for v in values]
    return [(v, f"{v:.0e}".replace("e-0", "e-") if v and abs(v) < 1e-2 else f"{v:.3g}") for v in values]


def _limits(values: Sequence[float], log: bool, pad: bool = False) -> tuple[float, float]:
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
