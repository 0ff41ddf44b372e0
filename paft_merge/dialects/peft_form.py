"""Adapters as PEFT writes them; with `portable`, what vLLM, SGLang, llama.cpp and PEFT all read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paft_merge.dialects.held import Held, Pair
from paft_merge.dialects.matrices import Matrix
from paft_merge.dialects.modules import Factors, Kind, Lora, common_scale, is_same, refuse
from paft_merge.errors import AdapterError, CheckpointError
from paft_merge.inputs.adapters.config import Settings

FILE = "adapter_model.safetensors"
ORIGINAL = "paft_adapter_config"
"""Key of a file's metadata for the `adapter_config.json` of PEFT that the adapter had before it was converted."""

_PREFIX = "base_model.model."
_MERGE = "merge it into a checkpoint with paft merge, or use it with PEFT"
_KEPT = (
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
    ),
    *("fan_in_fan_out", "init_lora_weights"),
)
"""Fields of a configuration that stay true of converted factors."""
_OF_WHOLE = ("bias", "modules_to_save", "lora_bias", "trainable_token_indices")
"""Fields of a configuration about tensors that are not factors."""
_OUT_IN = "0.19.1"
"""The first version of PEFT that reads fused experts as `[experts, out, in]`."""


def read(held: Held) -> Lora:
    """Read an adapter of PEFT.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED (not LoRA), ADAPTER_CONFIG (half of a pair, unknown tensors).
    """
    if held.settings is None:
        kind = held.config.get("peft_type")
        raise AdapterError.of(
            "ADAPTER_UNSUPPORTED", held.place, f"is of type {kind}, and only LoRA is converted", _MERGE
        )
    refuse(
        held.place, (n for p in held.pairs if not p.is_whole for n in p.names), "has half of a pair", "save it again"
    )
    refuse(held.place, held.others, "has tensors that no conversion knows", "remove them if they have no effect")
    whole = {one.key.removeprefix(_PREFIX): one.key for one in held.keys.saved}
    whole |= {key.removeprefix(_PREFIX): key for key in held.keys.tokens.values()}
    whole |= {f"{pair.path}.lora_B.bias": pair.parts["B.bias"] for pair in held.pairs if "B.bias" in pair.parts}
    tensors = {name: Matrix.stored(held.file, key) for name, key in whole.items()}
    modules = tuple(_factors(held, pair) for pair in held.pairs)
    return Lora(modules, str(held.config.get("base_model_name_or_path") or ""), tensors, held.config)


def _factors(held: Held, pair: Pair) -> Factors:
    kind: Kind = "embedding" if pair.is_embedding else "experts" if pair.is_fused else "linear"
    names = ("embedding_A", "embedding_B") if pair.is_embedding else ("A", "B")
    a, b = (Matrix.stored(held.file, pair.parts[name]) for name in names)
    if kind == "linear" and len(a.shape) > 2:
        kind = "convolution"
    magnitude = pair.parts.get("magnitude_vector")
    values = Matrix.stored(held.file, magnitude) if magnitude else None
    rank = held.settings.rank_of(pair.path) if kind == "experts" and held.settings else pair.rank
    if not held.multiplies(pair):
        what = f"{pair.path!r} has lora_A {a.shape} and lora_B {b.shape}, which cannot be multiplied"
        raise AdapterError.of("ADAPTER_SHAPE", held.place, what)
    if not held.has_own_rank(pair) and not held.config.get("target_parameters"):
        what = f"{pair.path!r} has factors of rank {pair.rank}, and adapter_config.json gives it another"
        raise AdapterError.of("ADAPTER_SHAPE", held.place, what, "put its rank into rank_pattern")
    return Factors(pair.path, a, b, pair.scale, kind, values, pair.depth, rank)


def tensors_of(lora: Lora) -> dict[str, Matrix]:
    """The tensors by the names that PEFT gives them."""
    found = dict[str, Matrix]()
    for module in lora.modules:
        stem = f"{_PREFIX}{module.path}{'.base_layer' * module.depth}.lora_"
        if module.kind == "embedding":
            found |= {f"{stem}embedding_A": module.a, f"{stem}embedding_B": module.b}
        else:
            found |= {f"{stem}A.weight": module.a, f"{stem}B.weight": module.b}
        if module.magnitude is not None:
            found[f"{stem}magnitude_vector"] = module.magnitude
    return found | {f"{_PREFIX}{name}": matrix for name, matrix in lora.whole.items()}


def portable(lora: Lora, where: object) -> Lora:
    """Make one rank and one scale of the factors, for readers that read no other.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED, a part of it has no place in the portable form.
    """
    refuse(
        where,
        [m.path for m in lora.modules if m.magnitude is not None],
        "has DoRA, which these programs refuse",
        _MERGE,
    )
    refuse(where, [m.path for m in lora.modules if m.kind == "convolution"], "adapts convolutions", _MERGE)
    refuse(where, lora.whole, "has weights that are not factors, which these programs refuse or ignore", _MERGE)
    fused = [module for module in lora.modules if module.kind == "experts"]
    what = "has fused experts, which few models of vLLM apply"
    fix = "give --base BASE: they are split if its files hold them one by one"
    refuse(where, [module.path for module in fused if not module.parameter], what, fix)
    depths = {path: {m.depth for m in fused if m.path == path} for path in dict.fromkeys(m.path for m in fused)}
    what = "has factors of one of the two parameters of its experts, and vLLM needs both"
    refuse(where, [path for path, found in depths.items() if found != {0, 1}], what, _MERGE)
    if fused:
        what = "fused experts stay fused, as in the base's files: vLLM reads them, SGLang and llama.cpp do not"
        lora = lora.noting(what)
    return lora.with_one_rank().with_one_scale()


def config_of(lora: Lora, *, keep: bool) -> dict[str, Any]:
    """The `adapter_config.json` for the factors.

    Args:
        lora: the adapter.
        keep: whether its own configuration is still true of its factors.
    """
    if keep and lora.config:
        is_old = lora.config.get("lora_B_layout") == "grouped_by_expert"
        return {**lora.config, "lora_B_layout": "rank_major"} if is_old else dict(lora.config)
    known = {key: lora.config[key] for key in _KEPT if key in lora.config}
    targeted, ranks = [m for m in lora.modules if m.kind == "experts"], Counter(m.rank for m in lora.modules)
    rank, scale = ranks.most_common(1)[0][0], common_scale(lora.modules)
    alphas = {_key(m): _number(m.scale * m.rank) for m in lora.modules if not is_same(m.scale * m.rank, scale * rank)}
    made = {
        **{"task_type": "CAUSAL_LM", "inference_mode": True, "lora_dropout": 0.0, "init_lora_weights": True},
        **{"fan_in_fan_out": False, "base_model_name_or_path": lora.base_name or None},
        **known,
        **{"peft_type": "LORA", "r": rank, "lora_alpha": _number(scale * rank)},
        "rank_pattern": {_key(m): m.rank for m in lora.modules if m.rank != rank},
        "alpha_pattern": alphas,
        "target_modules": _targets(lora),
        **{"bias": "none", "modules_to_save": None},
        **({key: lora.config[key] for key in _OF_WHOLE if key in lora.config} if lora.whole else {}),
        **{"use_rslora": False, "use_dora": any(m.magnitude is not None for m in lora.modules)},
    }
    if targeted:
        kept = lora.config.get("target_parameters") or []
        named = {".".join([*m.path.split(".")[-2:], m.parameter]) for m in targeted if m.parameter}
        made |= {"target_parameters": sorted({*kept, *named}), "peft_version": known.get("peft_version") or _OUT_IN}
        if any(m.parameter for m in targeted):
            made |= {"peft_version": _OUT_IN, "lora_B_layout": "rank_major"}
    return made


def _key(module: Factors) -> str:
    """The key of a module in `rank_pattern`: a regular expression for the end of its name."""
    return re.escape(f"{module.path}.{module.parameter}" if module.parameter else module.path)


def _number(value: float) -> float:
    """A whole number as an int, as people write `lora_alpha`."""
    return int(value) if value == int(value) else value


def _targets(lora: Lora) -> list[str]:
    """The adapted modules: as the configuration lists them, by the last part of their name, or in full.

    The last part alone would name more modules than have factors if the configuration chose them in another way.
    """
    paths = sorted(module.path for module in lora.modules if module.kind != "experts")
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    given = lora.config.get("target_modules")
    chosen = any(lora.config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if isinstance(given, str) or chosen:
        return paths
    if isinstance(given, list) and {str(name).rsplit(".", 1)[-1] for name in given} == set(leaves):
        return sorted(map(str, given))
    return leaves


def original_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration that the adapter had before it was converted; empty if the file does not say."""
    try:
        found = json.loads(metadata.get(ORIGINAL, "{}"))
    except (ValueError, RecursionError):
        return {}
    is_lora = isinstance(found, dict) and (found.get("peft_type") or "LORA") == "LORA"
    return found if is_lora and type(found.get("r")) is int and isinstance(found.get("lora_alpha"), int | float) else {}


def restored(lora: Lora, original: Mapping[str, Any]) -> Lora | None:
    """The adapter with its original configuration, ranks and scales; None if they do not fit the factors.

    Padding is removed where it is zero. A factor that was multiplied is divided again where that gives its bits back.
    """
    settings, modules = Settings(dict(original)), list[Factors]()
    if settings.flag("use_dora") != any(module.magnitude is not None for module in lora.modules):
        return None
    for module in lora.modules:
        name = f"{module.path}.{module.parameter}" if module.parameter else module.path
        try:
            rank = settings.rank_of(name)
            scale = settings.scale(name, rank)
        except (AdapterError, CheckpointError, ArithmeticError, TypeError, ValueError, KeyError):
            return None
        if rank > module.rank or (module.kind == "experts" and rank != module.rank):
            return None
        if rank < module.rank:
            if not (module.a.cut(0, rank, module.rank).is_zero() and module.b.cut(1, rank, module.rank).is_zero()):
                return None
            module = replace(module, a=module.a.cut(0, 0, rank), b=module.b.cut(1, 0, rank), rank=rank)
        if not is_same(module.scale, scale):
            b, _ = module.b.times(module.scale / scale)
            if not b.times(scale / module.scale)[0].same(module.b):
                return None
            module = replace(module, b=b)
        modules.append(replace(module, scale=scale))
    return replace(lora, modules=tuple(modules), config=original)
