"""The sparsity of each source along the layers, as a PNG for the model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from paft_merge.errors import escape
from paft_merge.inputs.source_labels import labels_of
from paft_merge.stats.record import shape_of

PICTURE = "sparsity.png"

_LAYER = re.compile(r"^(?:[^.]*[^.\d][^.]*\.)*?(\d+)\.")
_LINES = (("below_1e-05", "|delta| below 1e-5", ":"), ("dropped", "not merged", "-"))


def by_layer(manifest: Mapping[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """The shares of entries below 1e-5 (`below_1e-05`) and not merged (`dropped`), for each source and layer."""
    sums: dict[str, dict[int, dict[str, float]]] = {}
    for name, tensor in manifest["tensors"].items():
        layer = _LAYER.match(name)
        for source in tensor.get("sources", ()) if layer else ():
            if "kept" in source and layer:
                row = sums.setdefault(source["source"], {}).setdefault(int(layer[1]), {"entries": 0.0})
                row["entries"] += (entries := prod(shape_of(tensor)))
                row["below_1e-05"] = row.get("below_1e-05", 0.0) + source["below_1e-05"]
                row["dropped"] = row.get("dropped", 0.0) + entries - source["kept"]
    return {
        source: {n: {k: row[k] / row["entries"] for k in row if k != "entries"} for n, row in sorted(rows.items())}
        for source, rows in sums.items()
    }


def draw(manifest: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw the picture into `folder`; None where matplotlib is not installed, or no source has two layers."""
    shares = by_layer(manifest)
    if find_spec("matplotlib") is None or max(map(len, shares.values()), default=0) < 2:
        return None
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(7, 3.2 + 0.18 * len(shares)), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="share of the delta's entries", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    keys = [Line2D([], [], linestyle=style, color="#555555", label=text) for _, text, style in _LINES]
    for i, (source, rows) in enumerate(zip(labels_of(list(shares)), shares.values(), strict=True)):
        dot = "." if len(rows) <= 48 else ""
        for key, _, style in _LINES:
            axes.plot(list(rows), [row[key] for row in rows.values()], style, color=f"C{i}", marker=dot, markersize=4)
        # A leading underscore hides an entry of a legend, and dollars make it mathematics.
        label = escape(source).lstrip("_").replace("$", r"\$")[:60] or "source"
        keys.append(Line2D([], [], color=f"C{i}", label=label))
    figure.legend(handles=keys, loc="outside lower left", ncols=2, fontsize="small", frameon=False)
    figure.savefig(folder / PICTURE, dpi=150, metadata={"Software": None})
    return folder / PICTURE
