"""The sparsity of each source along the layers, as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

PICTURE = "sparsity.png"

_LAYER = re.compile(r"^(?:[^.]*[^.\d][^.]*\.)*?(\d+)\.")
_LINES = (("below_1e-05", "|delta| below 1e-5", ":"), ("dropped", "not merged", "-"))


def by_layer(manifest: Mapping[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """Per source and layer the share of entries that are almost zero, and that the method dropped."""
    sums: dict[str, dict[int, dict[str, float]]] = {}
    for name, tensor in manifest["tensors"].items():
        layer = _LAYER.match(name)
        for source in tensor.get("sources", ()) if layer else ():
            if "kept" in source and layer:
                row = sums.setdefault(source["source"], {}).setdefault(int(layer[1]), {"entries": 0.0})
                row["entries"] += (entries := prod(tensor["shape"]))
                row["below_1e-05"] = row.get("below_1e-05", 0.0) + source["below_1e-05"]
                row["dropped"] = row.get("dropped", 0.0) + entries - source["kept"]
    return {
        source: {n: {k: row[k] / row["entries"] for k in row if k != "entries"} for n, row in sorted(rows.items())}
        for source, rows in sums.items()
    }


def draw(manifest: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw it into `folder`; None where matplotlib is not installed, or there are not two layers to compare."""
    shares = by_layer(manifest)
    if find_spec("matplotlib") is None or max(map(len, shares.values()), default=0) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="share of the delta's entries", ylim=(-0.02, 1.02))
    for i, (source, rows) in enumerate(shares.items()):
        for key, told, style in _LINES:
            label = f"{source.rsplit('/', 1)[-1]}: {told}"
            axes.plot(list(rows), [row[key] for row in rows.values()], style, color=f"C{i}", label=label, marker=".")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(folder / PICTURE, dpi=150, metadata={"Software": None})
    return folder / PICTURE
