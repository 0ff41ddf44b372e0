"""Draw the pictures of docs/methods.md: small deltas, and the results of every method on them.

python tools/docs_methods.py

The functions of `paft_merge.methods` run the code of a merge, so a picture shows a real result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from paft_merge import methods
from paft_merge.auditing.report.svg import DARK, LIGHT, Palette

FOLDER = Path(__file__).parent.parent / "docs" / "methods"

FIRST = torch.tensor([0.9, 0.3, -0.5, 0.1, 0.7, -0.2, 0.0, 0.4, -0.8, 1.6, -0.1, 0.6])
SECOND = torch.tensor([0.5, -0.4, -0.6, 0.2, -0.3, 0.1, 0.8, 0.0, -0.2, 0.2, 0.5, -0.6])
NOTHING = torch.zeros(12)
BOTH = [FIRST, SECOND]

ARROWS = [torch.tensor(pair) for pair in ([1.9, 0.1], [1.2, 0.5], [-0.6, 1.1])]
"""Three models of two weights."""
POINTS = [torch.tensor(pair) for pair in ([0.4, 1.3], [1.2, 1.5], [0.5, 0.6], [3.6, -1.2])]
"""Four deltas of two weights, the last one far from the others."""
CORES = [
    torch.diag(torch.tensor([3.0, 1.0, 0.3, 0.1])),
    torch.tensor([[2.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0.2]]),
]

PANEL_WIDTH, PANEL_HEIGHT, GAP, HEAD = 232, 100, 14, 40


def style(palette: Palette) -> str:
    """The colours of a picture."""
    c, hue = palette.named, palette.hues
    return (
        f"text{{fill:{c['ink']}}}.soft{{fill:{c['soft']}}}.bar{{fill:{hue[0]}}}.was{{fill:none;stroke:{c['soft']}}}"
        f".axis{{stroke:{c['axis']}}}.source{{stroke:{c['soft']};fill:{c['soft']}}}.way{{fill:none;stroke:{hue[0]};stroke-width:2}}"
        f".mean{{fill:{hue[1]};stroke:{hue[1]}}}.result{{fill:{hue[0]};stroke:{hue[0]}}}"
    )


STYLE = (
    "text{font:13px sans-serif}.name{font:600 13px monospace}.soft{font-size:12px}.was{stroke-dasharray:2 2}"
    f".dash{{stroke-dasharray:5 4}}{style(LIGHT)}@media(prefers-color-scheme:dark){{{style(DARK)}}}"
)


@dataclass(frozen=True)
class Panel:
    """The bars of one tensor."""

    name: str
    """A method or a delta."""
    about: str
    values: torch.Tensor
    """`[n]`."""
    before: torch.Tensor | None = None
    """`[n]`: drawn as outlines."""


def call(name: str, *args: Any, before: torch.Tensor | None = None, about: str = "", **given: Any) -> Panel:
    """The panel of a method: its result beside the plain sum of the deltas, or beside `before`."""
    result = getattr(methods, name)(*args, **given)
    settings = ", ".join(f"{key.rstrip('_')} {value}" for key, value in given.items())
    return Panel(name, about or settings, result, FIRST + SECOND if before is None else before)


def sums() -> list[Panel]:
    """Sums, means and limits, entry by entry."""
    return [
        Panel("delta 1", "twelve entries", FIRST),
        Panel("delta 2", "twelve entries", SECOND),
        call("task_arithmetic", BOTH, weight=1.0),
        call("linear", BOTH, weight=[0.75, 0.25]),
        call("magmax", BOTH, about="the larger entry"),
        call("passthrough", FIRST, scale=0.5, before=FIRST),
        call("nearswap", FIRST, t=0.4, before=FIRST),
        call("arcee_fusion", NOTHING, FIRST, before=FIRST, about="the entries that matter most"),
    ]


def trims() -> list[Panel]:
    """Trim by size, elect a sign, merge what agrees."""
    return [
        call("ties", [FIRST], weight=1.0, density=0.5, before=FIRST, about="step 1: delta 1 trimmed, density 0.5"),
        call("ties", [SECOND], weight=1.0, density=0.5, before=SECOND, about="step 1: delta 2 trimmed"),
        call("ties", BOTH, weight=1.0, density=0.5, about="steps 2, 3: elect and average"),
        call("sign_election", BOTH, about="elect, nothing trimmed"),
        call("l1_ties", BOTH, l1_mass=0.8),
        call("l1_ties", BOTH, l1_mass=0.8, shrink="soft"),
        call("breadcrumbs", [FIRST], weight=1.0, density=0.5, gamma=0.1, before=FIRST, about="delta 1, density 0.5, gamma 0.1"),
        call("breadcrumbs", BOTH, weight=1.0, density=0.5, gamma=0.1),
        call("breadcrumbs_ties", BOTH, weight=1.0, density=0.5, gamma=0.1),
    ]  # fmt: skip


def drops() -> list[Panel]:
    """Drop at random, rescale, add up."""
    given: dict[str, Any] = {"weight": 1.0, "density": 0.5}
    return [
        call("dare_linear", [FIRST, NOTHING], **given, before=FIRST, about="delta 1 alone"),
        call("dare_linear", [NOTHING, SECOND], **given, before=SECOND, about="delta 2 alone"),
        call("dare_linear", BOTH, **given),
        call("dare_ties", BOTH, **given),
        call("della_linear", [FIRST, NOTHING], **given, epsilon=0.4, before=FIRST, about="delta 1 alone, epsilon 0.4"),
        call("della_linear", [NOTHING, SECOND], **given, epsilon=0.4, before=SECOND, about="delta 2 alone, epsilon 0.4"),
        call("della_linear", BOTH, **given, epsilon=0.4),
        call("della", BOTH, **given, epsilon=0.4),
    ]  # fmt: skip


def scores() -> list[Panel]:
    """Compete, overlap, vary."""
    return [
        call("pcb", BOTH, density=0.5),
        call("sce", BOTH, select_topk=0.5),
        call("ram", BOTH, about="sum where one changes, else mean"),
        call("ramplus_tl", BOTH, r=0.5, alpha=1.0),
    ]


def spectra() -> list[Panel]:
    """Singular values of sums of two cores of adapters."""

    def singular(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(matrix)

    total = singular(CORES[0] + CORES[1])
    return [
        Panel("core 1", "its singular values", singular(CORES[0])),
        Panel("core 2", "its singular values", singular(CORES[1])),
        Panel("tsv", "outlined: those of the sum", singular(methods.tsv(CORES)), total),
        Panel("iso_c", "outlined: those of the sum", singular(methods.iso_c(CORES)), total),
    ]


def bars(panels: Sequence[Panel], title: str) -> str:
    """Two columns of bar charts."""
    shown = [
        0.0,
        *(
            value
            for panel in panels
            for tensor in (panel.values, panel.before)
            if tensor is not None
            for value in tensor.tolist()
        ),
    ]
    unit = PANEL_HEIGHT / (max(shown) - min(shown))  # one scale for all panels
    parts = []
    for number, panel in enumerate(panels):
        x = number % 2 * (PANEL_WIDTH + GAP)
        y = number // 2 * (PANEL_HEIGHT + HEAD + GAP)
        zero, step = y + HEAD + max(shown) * unit, PANEL_WIDTH / len(panel.values)
        parts.append(f'<text class="name" x="{x}" y="{y + 14}">{escape(panel.name)}</text>')
        parts.append(f'<text class="soft" x="{x}" y="{y + 30}">{escape(panel.about)}</text>')
        for values, kind, inset in ((panel.values, "bar", 0.22), (panel.before, "was", 0.12)):
            for i, value in enumerate([] if values is None else values.tolist()):
                size = abs(value) * unit
                if size >= 0.05:
                    top = zero - size if value > 0 else zero
                    parts.append(
                        f'<rect class="{kind}" x="{x + (i + inset) * step:.1f}" y="{top:.1f}" '
                        f'width="{(1 - 2 * inset) * step:.1f}" height="{size:.1f}"/>'
                    )
        parts.append(f'<line class="axis" x1="{x}" y1="{zero:.1f}" x2="{x + PANEL_WIDTH}" y2="{zero:.1f}"/>')
    rows = (len(panels) + 1) // 2
    return document(2 * PANEL_WIDTH + GAP, rows * (PANEL_HEIGHT + HEAD + GAP), title, parts)


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A whole SVG file; its colours follow the colour scheme of the page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


@dataclass(frozen=True)
class Plane:
    """Where points of two weights are drawn."""

    x: float
    y: float
    """Of the origin."""
    scale: float = 90.0

    def __call__(self, point: torch.Tensor) -> tuple[float, float]:
        """The coordinates of a point in the picture."""
        a, b = point.tolist()
        return self.x + a * self.scale, self.y - b * self.scale

    def arrow(self, point: torch.Tensor, name: str, beside: str) -> str:
        """The line from the origin to a model."""
        x, y = self(point)
        line = f'<line class="source" x1="{self.x:g}" y1="{self.y:g}" x2="{x:.1f}" y2="{y:.1f}"/>'
        return line + self.spot(point, "source", name, beside)

    def spot(self, point: torch.Tensor, kind: str, name: str, beside: str) -> str:
        """A point with its name to the left or right of it, above or below it."""
        x, y = self(point)
        dx, dy, anchor = {
            "left": (-8, 4, "end"),
            "right": (8, 4, "start"),
            "above": (0, -9, "middle"),
            "below": (0, 18, "middle"),
        }[beside]
        text = f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>{text}'

    def way(self, points: Iterable[torch.Tensor], kind: str) -> str:
        """A curve through points."""
        through = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self, points))
        return f'<polyline class="{kind}" points="{through}"/>'


def directions(title: str) -> str:
    """Interpolation along an arc and along a line, and means of three directions."""
    shares = [i / 20 for i in range(21)]
    first, second, third = ARROWS
    left, right = Plane(80, 160), Plane(305, 160, 75.0)
    parts = [
        left.arrow(first, "model 1", "below"),
        left.arrow(third, "model 2", "above"),
        left.way([methods.slerp(first, third, t=t) for t in shares], "way"),
        left.way([methods.linear([first, third], [1 - t, t]) for t in shares], "way dash"),
        left.spot(methods.slerp(first, third, t=0.5), "result", "slerp", "above"),
        left.spot(methods.nuslerp([first, third], [0.75, 0.25]), "result", "nuslerp", "right"),
        left.spot(methods.linear([first, third], [0.5, 0.5]), "mean", "linear", "below"),
        right.arrow(first, "model 1", "below"),
        right.arrow(second, "model 2", "right"),
        right.arrow(third, "model 3", "above"),
        right.spot(methods.karcher(ARROWS), "result", "karcher", "left"),
        right.spot(methods.multislerp(ARROWS, 1.0), "result", "multislerp", "right"),
        right.spot(methods.linear(ARROWS, 1.0), "mean", "linear", "left"),
    ]
    return document(478, 190, title, parts)


def centres(title: str) -> str:
    """Means of deltas, one of which is far away."""
    plane, base = Plane(40, 150), torch.zeros(2)
    mean = methods.task_arithmetic(POINTS, 1.0, normalize=True)
    parts = [
        plane.way([base, mean], "way dash"),
        plane.spot(base, "source", "base", "below"),
        *(plane.spot(point, "source", f"delta {i}", "right") for i, point in enumerate(POINTS, 1)),
        plane.spot(mean, "mean", "mean (task_arithmetic)", "right"),
        plane.spot(methods.model_stock(POINTS), "result", "model_stock", "below"),
        plane.spot(methods.geometric_median(POINTS), "result", "geometric_median", "right"),
    ]
    return document(478, 290, title, parts)


PICTURES: dict[str, tuple[str, Callable[[str], str]]] = {
    "sums": ("Two deltas of twelve entries, and their sums, means and limits", lambda title: bars(sums(), title)),
    "trims": ("Deltas trimmed by size, signs elected, agreeing entries merged", lambda title: bars(trims(), title)),
    "drops": ("Entries dropped at random, the others enlarged", lambda title: bars(drops(), title)),
    "scores": ("Entries chosen by scores, variance and overlap", lambda title: bars(scores(), title)),
    "directions": ("Models of two weights: interpolation on an arc, and means of directions", directions),
    "centres": ("Deltas of two weights: the mean, Model Stock and the geometric median", centres),
    "spectra": ("Singular values of two cores, and of their merges", lambda title: bars(spectra(), title)),
}


def picture(name: str) -> str:
    """The text of docs/methods/NAME.svg."""
    title, draw = PICTURES[name]
    return draw(title)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(picture(name), encoding="utf-8")
