"""Adapters of mlx-lm: `adapters.safetensors` with lora_a `[in, r]` and lora_b `[r, out]`, and its own configuration.

Experts of a layer are one tensor: lora_a `[E, r, in]`, lora_b `[E, out, r]`, below `switch_mlp`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from paft_merge.dialects.held import Held
from paft_merge.dialects.matrices import Matrix, stacked
from paft_merge.dialects.modules import Factors, Lora, refuse
from paft_merge.errors import AdapterError
from paft_merge.inputs.adapter_places import MLX_FILE
from paft_merge.inputs.adapters.mlx import is_embedding

FILE = MLX_FILE

_EXPERT = re.compile(r"(?P<above>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>\w+)")
_SWITCH = re.compile(r"(?P<above>.+)\.switch_mlp\.(?P<leaf>\w+)")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names of the parts of an expert, below `block_sparse_moe`, and those of mlx-lm."""
_BACK = {new: old for old, new in _MIXTRAL.items()}
_LAYER = re.compile(r".*?\blayers\.\d+\.(.+)")
_MERGE = "merge it into a checkpoint with paft merge, and convert that to MLX"

Config = dict[str, Any]


def read(held: Held) -> Lora:
    """Read an adapter of mlx-lm.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED, ADAPTER_CONFIG (half of a pair), ADAPTER_SHAPE.
    """
    refuse(
        held.place, (n for p in held.pairs if not p.is_whole for n in p.names), "has half of a pair", "save it again"
    )
    refuse(held.place, [one.key for one in held.keys.saved], "has whole weights, and only LoRA is converted", _MERGE)
    modules = [module for pair in held.pairs for module in _modules(held, pair.path, dict(pair.parts))]
    return Lora(tuple(modules), str(held.config.get("model") or ""))


def _modules(held: Held, path: str, parts: dict[str, str]) -> Iterator[Factors]:
    assert held.settings is not None
    a, b = (Matrix.stored(held.file, parts[name]) for name in ("A", "B"))
    scale = held.settings.scale(path, held.settings.rank)
    magnitude = Matrix.stored(held.file, parts["magnitude_vector"]) if "magnitude_vector" in parts else None
    found = _SWITCH.fullmatch(path)
    if len(a.shape) == len(b.shape) == 3 and found and a.shape[:2] == (b.shape[0], b.shape[2]):
        leaf = _BACK.get(found["leaf"], found["leaf"]) if found["above"].endswith("block_sparse_moe") else found["leaf"]
        for e in range(a.shape[0]):
            one_a, one_b = (m.cut(0, e, e + 1).reshaped(*m.shape[1:]) for m in (a, b))
            yield Factors(f"{found['above']}.experts.{e}.{leaf}", one_a, one_b, scale, rank=a.shape[1])
        return
    if not (len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]):
        what = f"{path!r} has lora_a {a.shape} and lora_b {b.shape}, which cannot be multiplied"
        raise AdapterError.of("ADAPTER_SHAPE", held.place, what)
    kind = "embedding" if is_embedding(path) else "linear"
    yield Factors(path, a.transposed, b.transposed, scale, kind, magnitude, rank=a.shape[1])  # type: ignore[arg-type]


def written(lora: Lora, where: object) -> tuple[Lora, dict[str, Matrix], Config]:
    """Write an adapter for mlx-lm.

    Returns:
        The adapter with one rank and one scale, its tensors by name, and `adapter_config.json`.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED, a part of it has no place in mlx-lm.
    """
    refuse(where, [m.path for m in lora.modules if m.kind == "convolution"], "adapts convolutions", _MERGE)
    refuse(where, [m.path for m in lora.modules if m.kind == "experts"], "has fused experts", "give --base BASE, if its files hold them one by one")  # fmt: skip
    refuse(where, lora.whole, "has weights that are not factors, for which mlx-lm has no place", _MERGE)
    with_dora = [module.path for module in lora.modules if module.magnitude is not None]
    without = [module.path for module in lora.modules if module.magnitude is None]
    refuse(
        where, without if with_dora else [], "has DoRA in some modules only, and mlx-lm has it in all or none", _MERGE
    )
    lora = lora.with_one_rank().with_one_scale()
    tensors, layers = dict[str, Matrix](), defaultdict[str, dict[int, Factors]](dict)
    for module in lora.modules:
        if found := _EXPERT.fullmatch(module.path):
            name = f"{found['above']}.switch_mlp.{_MIXTRAL.get(found['leaf'], found['leaf'])}"
            layers[name][int(found["number"])] = module
            continue
        tensors |= {f"{module.path}.lora_a": module.a.transposed, f"{module.path}.lora_b": module.b.transposed}
        if module.magnitude is not None:
            tensors[f"{module.path}.m"] = module.magnitude
    refuse(where, with_dora if layers else [], "has experts with DoRA, which mlx-lm does not support", _MERGE)
    some = [name for name, held in layers.items() if sorted(held) != list(range(len(held)))]
    refuse(where, some, "has factors for some experts of a layer only", _MERGE)
    for name, held in layers.items():
        ordered = [held[e] for e in range(len(held))]
        tensors |= {
            f"{name}.lora_a": stacked([m.a for m in ordered]),
            f"{name}.lora_b": stacked([m.b for m in ordered]),
        }
    keys = {name.rpartition(".")[0] for name in tensors}
    first = lora.modules[0]
    config = {
        "fine_tune_type": "dora" if with_dora else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": first.rank,
            "scale": first.scale,
            "dropout": 0.0,
            "keys": sorted({_key(k) for k in keys}),
        },
        **({"model": lora.base_name} if lora.base_name else {}),
    }
    return lora, tensors, config


def _key(path: str) -> str:
    """The name of a module in its layer, as mlx-lm looks for it; the whole name outside of layers."""
    found = _LAYER.fullmatch(path)
    return found[1] if found else path
