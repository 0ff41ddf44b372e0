"""How long planning takes for mixture-of-experts layouts, and that it grows with the number of tensors and no faster.

python tools/bench_plan.py [--tensors 90000] [--folder DIR]

The checkpoints are headers and holes: files of the full size that take no disk. Prints one JSON line a size.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import make_layout

from paft_merge.engine.api import open_plan

LAYERS = 60
EXPERT = (64, 128)
OTHERS = {
    "self_attn.q_proj": (128, 128),
    "self_attn.o_proj": (128, 128),
    "input_layernorm": (128,),
    "mlp.gate": (64, 128),
}
SHARD_BYTES = 100_000_000


def names(tensors: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """About so many tensors of a mixture-of-experts model: name, dtype, shape."""
    yield "model.embed_tokens.weight", "BF16", (1000, 128)
    experts = max(1, (tensors // LAYERS - len(OTHERS)) // 3)
    for layer in range(LAYERS):
        for name, shape in OTHERS.items():
            yield f"model.layers.{layer}.{name}.weight", "BF16", shape
        for expert in range(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight", "BF16", EXPERT
    yield "lm_head.weight", "BF16", (1000, 128)


def hollow(folder: Path, tensors: int) -> Path:
    """A checkpoint of headers and holes."""
    config: dict[str, object] = {"model_type": "mixtral", "num_hidden_layers": LAYERS}
    return make_layout.hollow(folder, list(names(tensors)), config, SHARD_BYTES)


def recipe(base: Path, *tuned: Path, sliced: bool = False) -> dict[str, object]:
    """TIES with gradients and filters, of whole models or of slices that overlap."""
    density = [{"filter": "experts", "value": [0.2, 0.5]}, {"value": 0.6}]
    given = {"weight": 0.5, "density": density}
    common = {"merge_method": "ties", "base_model": str(base)}
    if not sliced:
        return {**common, "models": [{"model": str(t), "parameters": given} for t in tuned]}

    def part(first: int, end: int) -> dict[str, object]:
        sources: list[dict[str, object]] = [{"model": str(base), "layer_range": [first, end]}]
        return {
            "sources": sources + [{"model": str(t), "layer_range": [first, end], "parameters": given} for t in tuned]
        }

    return {**common, "slices": [part(0, LAYERS // 2), part(LAYERS // 2, LAYERS)]}


def seconds(folder: Path, tensors: int, *, sliced: bool = False) -> tuple[int, float]:
    """The number of planned tensors, and the seconds of processor time from the recipe to the plan."""
    base, *tuned = (hollow(folder / f"{name}{tensors}", tensors) for name in ("base", "one", "two"))
    begun = time.process_time()
    with open_plan(recipe(base, *tuned, sliced=sliced)) as plan:
        return len(plan.tensors), time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=90_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for sliced in (False, True):
            for share in (4, 2, 1):
                count, took = seconds(Path(folder) / f"{sliced}", options.tensors // share, sliced=sliced)
                form = "slices" if sliced else "models"
                row = {
                    "form": form,
                    "tensors": count,
                    "seconds": round(took, 2),
                    "us_per_tensor": round(took / count * 1e6, 1),
                }
                print(
                    json.dumps({**row, "python": platform.python_version(), "machine": platform.machine()}), flush=True
                )


if __name__ == "__main__":
    main()
