"""Adapters as kohya's sd-scripts and LyCORIS write them: one file, `PREFIX_module_name.lora_down.weight` and `.alpha`.

LyCORIS' wrapper for any model has the prefix `lycoris`, kohya's scripts `lora_te` for the text encoder and `lora_unet` for
the UNet of Stable Diffusion 1 and 2. Dots of a module's name become underscores, so its name is kept in the metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import prod

import numpy as np

from paft_merge.dialects.held import KOHYA_NAME, Held
from paft_merge.dialects.matrices import Matrix
from paft_merge.dialects.modules import Factors, Lora, refuse
from paft_merge.errors import AdapterError

FILE = "lora.safetensors"
MODULES = "paft_modules"
"""Key of the metadata for the names of the modules, by their names with underscores."""

_PREFIX = re.compile(r"(lycoris|lora_unet|lora_te\d?|lora_transformer)_")
_MERGE = "merge it into a checkpoint with paft merge, or use it with PEFT"
_OTHER_NAMES = re.compile(
    r"(single_)?transformer_blocks\.|double_blocks\.|joint_blocks\.|down_blocks\..*\.transformer_blocks\.[1-9]"
)
"""Names of diffusers whose layers kohya's scripts call otherwise, or fuse: SDXL, Flux, SD3."""


def read(held: Held, names: Iterable[str]) -> Lora:
    """Read a file of kohya's scripts or LyCORIS.

    Args:
        held: the file.
        names: tensor names of the base, for a file that does not say which modules it adapts.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED (not a plain LoRA, several models), ADAPTER_CONFIG, ADAPTER_TARGET.
    """
    parts = dict[str, dict[str, str]]()
    unknown = list[str]()
    for name in held.file.tensors:
        found = KOHYA_NAME.fullmatch(name)
        if found is None or found["part"] == "lora_mid.weight":
            unknown.append(name)
        else:
            parts.setdefault(found["module"], {})[found["part"]] = name
    refuse(held.place, unknown, "has tensors that are not of a plain LoRA", _MERGE)
    half = [flat for flat, own in parts.items() if not {"lora_down.weight", "lora_up.weight"} <= own.keys()]
    refuse(held.place, half, "has half of a pair", "save it again")
    prefixes = sorted({found[1] if (found := _PREFIX.match(flat)) else "" for flat in parts})
    if len(prefixes) > 1:
        what = f"holds adapters of several models ({', '.join(map(repr, prefixes))})"
        raise AdapterError.of(
            "ADAPTER_UNSUPPORTED", held.place, what, "split the file, and convert one model at a time"
        )
    paths = _paths(held, list(parts), names)
    return Lora(tuple(_factors(held, paths[flat], own) for flat, own in parts.items()))


def _paths(held: Held, flats: list[str], names: Iterable[str]) -> dict[str, str]:
    """The module of each name with underscores: from the metadata, else from the base."""
    stated = _stated(held.file.files[0].metadata.get(MODULES, "{}"))
    if stated.keys() >= set(flats) and len({stated[flat] for flat in flats}) == len(flats):
        return stated
    modules = dict[str, list[str]]()
    for name in names:
        if name.endswith(".weight"):
            path = name.removesuffix(".weight")
            modules.setdefault(path.replace(".", "_"), []).append(path)
    found = {flat: modules.get(_PREFIX.sub("", flat, count=1), []) for flat in flats}
    fix = "give its base with --base BASE" if not modules else "check which base it was trained on"
    refuse(
        held.place, [flat for flat, paths in found.items() if len(paths) != 1], "names modules that are not known", fix
    )
    return {flat: paths[0] for flat, paths in found.items()}


def _stated(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(path, str) for path in found.values()) else {}


def _factors(held: Held, path: str, own: Mapping[str, str]) -> Factors:
    a, b = (Matrix.stored(held.file, own[f"lora_{name}.weight"]) for name in ("down", "up"))
    rank = a.shape[0] if a.shape else 0
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or b.shape[1] != rank or not rank:
        what = f"{path!r} has lora_down {a.shape} and lora_up {b.shape}, which cannot be multiplied"
        raise AdapterError.of("ADAPTER_SHAPE", held.place, what)
    alpha = _number(Matrix.stored(held.file, own["alpha"])) if "alpha" in own else 0.0
    if not np.isfinite(alpha):
        raise AdapterError.of("ADAPTER_CONFIG", held.place, f"{path!r} has the alpha {alpha}")
    magnitude = Matrix.stored(held.file, own["dora_scale"]) if "dora_scale" in own else None
    if magnitude is not None:
        if magnitude.shape[0] != b.shape[0] or prod(magnitude.shape) != b.shape[0]:
            what = f"{path!r} has DoRA over inputs, which PEFT does not have"
            raise AdapterError.of("ADAPTER_UNSUPPORTED", held.place, what, _MERGE)
        magnitude = magnitude.reshaped(b.shape[0])
    kind = "convolution" if len(a.shape) > 2 else "linear"
    scale = alpha / rank if alpha else 1.0  # LyCORIS and kohya take an alpha of 0 for the rank
    return Factors(path, a, b, scale, kind, magnitude, rank=rank)  # type: ignore[arg-type]


def _number(matrix: Matrix) -> float:
    """The value of a tensor of one element."""
    from paft_merge.inputs.dtypes import widen

    bits = np.ascontiguousarray(matrix.read()).reshape(-1)
    if len(bits) != 1:
        return float("nan")
    value = np.empty(1, np.float32)
    widen(bits.view(np.uint8), matrix.dtype, value)
    return float(value[0])


def written(lora: Lora, where: object) -> tuple[Lora, dict[str, Matrix], dict[str, str]]:
    """Write an adapter as LyCORIS does for any model, or as kohya's scripts do for a text encoder or a UNet.

    Returns:
        The adapter, its tensors by name, and the metadata.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED, a part of it has no place in these files.
    """
    paths = [module.path for module in lora.modules]
    refuse(where, [m.path for m in lora.modules if m.kind == "embedding"], "adapts embeddings, for which these files have no place", _MERGE)  # fmt: skip
    refuse(where, [m.path for m in lora.modules if m.kind == "experts"], "has fused experts", "give --base BASE, if its files hold them one by one")  # fmt: skip
    refuse(where, lora.whole, "has weights that are not factors, for which these files have no place", _MERGE)
    refuse(where, filter(_OTHER_NAMES.match, paths), "adapts layers that kohya's scripts call otherwise (SDXL, Flux, SD3)", "convert it with the scripts of diffusers")  # fmt: skip
    prefix = _prefix_of(paths)
    flats = {path: f"{prefix}_{path.replace('.', '_')}" for path in paths}
    twice = (
        [path for path in paths if list(flats.values()).count(flats[path]) > 1]
        if len(set(flats.values())) < len(flats)
        else []
    )
    refuse(where, twice, "has modules whose names are equal with underscores for dots", _MERGE)
    tensors, rounded = dict[str, Matrix](), list[str]()
    for module in lora.modules:
        stem, alpha = flats[module.path], module.scale * module.rank
        if float(np.float32(alpha)) != alpha:
            rounded.append(module.path)
        tensors[f"{stem}.alpha"] = Matrix.of_float32(np.array(alpha, np.float32))
        tensors |= {f"{stem}.lora_down.weight": module.a, f"{stem}.lora_up.weight": module.b}
        if module.magnitude is not None:
            ones = (1,) * (len(module.a.shape) - 1)
            tensors[f"{stem}.dora_scale"] = module.magnitude.reshaped(module.b.shape[0], *ones)
    if rounded:
        lora = lora.noting(f"alpha is rounded to float32 in {len(rounded):,} modules")
    return lora, tensors, {"format": "pt", MODULES: json.dumps({flat: path for path, flat in flats.items()})}


def _prefix_of(paths: list[str]) -> str:
    if all(path.startswith("text_model.") for path in paths):
        return "lora_te"
    is_unet = any(path.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for path in paths)
    return "lora_unet" if is_unet else "lycoris"
