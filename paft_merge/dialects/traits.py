"""What can be unusual about an adapter: one function a trait, each returning the tensors or modules that have it.

A trait says nothing about readers; `rules` has a row for every reader that minds it.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from paft_merge.dialects.held import KOHYA, MLX, PEFT, Held, Pair, is_copy
from paft_merge.errors import CheckpointError
from paft_merge.inputs.adapters.config import Settings
from paft_merge.inputs.adapters.peft_types import NO_DELTA, TYPES
from paft_merge.inputs.architecture import Architecture
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.training.engine_schema import MAX_RANKS

JOINED_BY_PEFT = frozenset({
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "minimax", "minimax_m2", "mixtral",
    "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open",
})  # fmt: skip
"""Values of `model_type` for which PEFT 0.21.2 with transformers 5.23 joins the factors of single experts
(peft/utils/transformers_weight_conversion.py). A test compares them with the installed PEFT."""

_LAYER = re.compile(r"layers\.(\d+)\.")
"""How SGLang finds the layer of a tensor (sglang/srt/lora/utils.py)."""
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>.+)")
_TOWER = r"(^|\.)(vision|visual|audio|image|multi_?modal|mm)\w*\."
_TOLD_APART = 1e-6
"""Relative difference of two scales that are not the same number rounded twice."""
_RANDOM_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NO_DELTA = ("arrow_config", "use_qalora", "kasa_config", "enable_lora", "use_bdlora")


@dataclass(frozen=True)
class Trait:
    """The tensors or modules that have a trait, and a number or word for messages; both may be empty."""

    names: tuple[str, ...] = ()
    detail: str = ""


def _settings(held: Held) -> Settings:
    """The settings of a LoRA of PEFT; of others, those that fit nothing."""
    return held.settings if held.settings is not None and held.dialect == PEFT else Settings({"r": 1, "lora_alpha": 1})


def _lora(held: Held) -> tuple[Pair, ...]:
    return held.pairs if held.dialect == PEFT else ()


def _found(names: Iterable[str], detail: str = "") -> Trait | None:
    """The trait of these names; None if there are none."""
    listed = tuple(dict.fromkeys(names))
    return Trait(listed, detail) if listed else None


def _flag(given: object, detail: str = "") -> Trait | None:
    return Trait((), detail) if given else None


# --- the kind of adapter ----------------------------------------------------------------------------------------------


def _mlx(held: Held) -> Trait | None:
    return _flag(held.dialect == MLX)


def _kohya(held: Held) -> Trait | None:
    return _flag(held.dialect == KOHYA)


def _peft(held: Held) -> Trait | None:
    return _flag(held.dialect == PEFT and held.settings is not None)


def _other_type(held: Held) -> Trait | None:
    return _flag(held.dialect == PEFT and held.settings is None, str(held.config.get("peft_type")))


def _unknown_type(held: Held) -> Trait | None:
    kind = str(held.config.get("peft_type") or "LORA")
    return _flag(held.dialect == PEFT and kind not in {**TYPES, **NO_DELTA}, kind)


def _empty(held: Held) -> Trait | None:
    is_empty = not held.pairs and not held.keys.saved and not held.keys.tokens
    return _flag(held.dialect != KOHYA and (held.settings is not None or held.dialect == MLX) and is_empty)


def _unfit(held: Held) -> Trait | None:
    return Trait((), "; ".join(problem.what for problem in held.unfit[:3])) if held.unfit else None


# --- variants of LoRA -------------------------------------------------------------------------------------------------


def _dora(held: Held) -> Trait | None:
    named = [pair.parts["magnitude_vector"] for pair in _lora(held) if "magnitude_vector" in pair.parts]
    return _found(named) or _flag(_settings(held).flag("use_dora"))


def _alora(held: Held) -> Trait | None:
    return _flag(held.dialect == PEFT and held.config.get("alora_invocation_tokens"))


def _variant(held: Held) -> Trait | None:
    fields = [field for field in _NO_DELTA if held.dialect == PEFT and held.config.get(field)]
    return _flag(fields, ", ".join(fields))


def _unknown_fields(held: Held) -> Trait | None:
    """Fields of the configuration that this version does not know, so that they may change the weights."""
    unknown = (problem.what.partition(":")[0] for problem in held.faults if "this version knows" in problem.what)
    return _found(unknown) if held.settings is not None else None


def _replicated(held: Held) -> Trait | None:
    return _flag(held.dialect == PEFT and held.config.get("layer_replication"))


def _start(held: Held) -> Trait | None:
    start = str(held.config.get("init_lora_weights", True)).lower()
    return _flag(held.dialect == PEFT and start.startswith(_RANDOM_STARTS), start)


# --- ranks and scales -------------------------------------------------------------------------------------------------


def _rank_option(held: Held) -> Trait | None:
    """A rank above vLLM's default; the detail is the value to give."""
    rank = _most(held)
    wanted = next((most for most in MAX_RANKS if most >= rank), None)
    return _flag(wanted is not None and wanted > 16, str(wanted))


def _rank_beyond(held: Held) -> Trait | None:
    return _flag(_most(held) > MAX_RANKS[-1], str(_most(held)))


def _most(held: Held) -> int:
    """The largest rank of a module, and that of the configuration, which vLLM checks."""
    ranks = [pair.rank for pair in _lora(held) if not pair.is_fused]
    return max([*ranks, _settings(held).rank if held.settings and held.dialect == PEFT else 0], default=0)


def _scaled_unlike(held: Held, scale: Callable[[Settings, Pair], float]) -> Trait | None:
    """The modules that a reader with the given formula scales wrongly; the detail is the worst factor."""
    settings, wrong = _settings(held), dict[str, float]()
    for pair in _lora(held):
        if not pair.is_fused and pair.scale and held.multiplies(pair):
            factor = scale(settings, pair) / pair.scale
            if abs(factor - 1) > _TOLD_APART:
                wrong[pair.path] = factor
    worst = max(wrong.values(), key=lambda factor: abs(math.log(abs(factor))), default=1.0)
    return _found(wrong, f"{worst:.3g}")


def _global_scale(held: Held) -> Trait | None:
    """As vLLM: alpha / r, or alpha / sqrt(r) with rsLoRA, of the configuration for every module."""
    return _scaled_unlike(held, lambda s, _: _alpha(s) / (math.sqrt(s.rank) if s.flag("use_rslora") else s.rank))


def _plain_scale(held: Held) -> Trait | None:
    """As SGLang: alpha / r of the configuration for every module, whatever `use_rslora` says."""
    return _scaled_unlike(held, lambda s, _: _alpha(s) / s.rank)


def _own_rank_scale(held: Held) -> Trait | None:
    """As llama.cpp: alpha of the configuration over the rank of the module's own factors."""
    return _scaled_unlike(held, lambda s, pair: _alpha(s) / pair.rank)


def _alpha(settings: Settings) -> float:
    return float(settings.raw["lora_alpha"])


def _uneven_rank(held: Held) -> Trait | None:
    """Modules of an adapter of MLX whose rank is not the one of `lora_parameters`."""
    if held.dialect != MLX or held.settings is None:
        return None
    return _found(pair.path for pair in held.pairs if pair.is_whole and pair.rank != held.settings.rank)


# --- tensors that are not factors -------------------------------------------------------------------------------------


def _saved(held: Held) -> list[str]:
    return [one.key for one in held.keys.saved if not one.is_base_layer] if held.dialect == PEFT else []


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _biases(held: Held) -> Trait | None:
    factors = [pair.parts["B.bias"] for pair in _lora(held) if "B.bias" in pair.parts]
    listed = _found([*filter(_is_bias, _saved(held)), *factors])
    trained = held.dialect == PEFT and (held.config.get("bias") or "none") != "none"
    return listed or _flag(trained or _settings(held).flag("lora_bias"))


def _whole(held: Held) -> Trait | None:
    named = held.dialect == PEFT and held.settings is not None and held.config.get("modules_to_save")
    return _found(name for name in _saved(held) if not _is_bias(name)) or _flag(named)


def _norms(held: Held) -> Trait | None:
    """Whole weights that llama.cpp's converter takes for norms, by their names."""
    return _found(name for name in _saved(held) if _is_norm(name))


def _is_norm(name: str) -> bool:
    return not _is_bias(name) and ("_layernorm" in name or ".norm" in name)


def _whole_besides_norms(held: Held) -> Trait | None:
    return _found(name for name in _saved(held) if not _is_norm(name) and not _is_bias(name))


def _base_copies(held: Held) -> Trait | None:
    """Weights saved beside factors of the same module, unless a sample shows that they are those of the base."""
    copies = (one for one in held.keys.saved if one.is_base_layer)
    return _found(one.key for one in copies if held.base is None or not is_copy(held, one, held.base, sampled=True))


def _tokens(held: Held) -> Trait | None:
    return _found(held.keys.tokens.values())


def _others(held: Held) -> Trait | None:
    return _found(held.others) if held.dialect != KOHYA and (held.settings or held.dialect == MLX) else None


def _added_tokens(held: Held) -> Trait | None:
    """Tokens in `added_tokens.json` that the base's vocabulary does not hold, or all of them if the base is not known."""
    path = held.place / "added_tokens.json"
    if held.dialect != PEFT or not path.is_file():
        return None
    try:
        added = json.loads(read_text(path, "ADAPTER_CONFIG"))
    except (CheckpointError, ValueError, RecursionError):
        return None  # SGLang warns of it and ignores it, too
    size = held.base.config.get("vocab_size") if held.base else None
    numbers = added.items() if isinstance(added, dict) else ()
    return _found(
        token for token, number in numbers if not isinstance(size, int) or not isinstance(number, int) or number >= size
    )


# --- names ------------------------------------------------------------------------------------------------------------


def _half(held: Held) -> Trait | None:
    return _found(name for pair in held.pairs if not pair.is_whole for name in pair.names)


def _malformed(held: Held) -> Trait | None:
    """Modules whose factors have shapes that cannot be multiplied."""
    return _found(pair.path for pair in _lora(held) if pair.is_whole and not held.multiplies(pair))


def _other_rank(held: Held) -> Trait | None:
    """Modules whose factors do not have the rank of the configuration: their scale is not known."""
    targeted = _settings(held).names("target_parameters")  # whose ranks have the name of the parameter
    pairs = (pair for pair in _lora(held) if not targeted and held.multiplies(pair))
    return _found(pair.path for pair in pairs if not held.has_own_rank(pair))


def _adapter_names(held: Held) -> Trait | None:
    """Names with the adapter's name in them, as torch saves them: `lora_A.default.weight`."""
    named = (name for pair in _lora(held) for name in pair.names)
    return _found(name for name in named if re.search(r"\.lora_\w+\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$", name))


def _prefixes(held: Held) -> dict[str, str]:
    """The text before the module's path, by tensor name."""
    names = (
        (name, name.replace(".base_layer", "").partition(f"{pair.path}."))
        for pair in _lora(held)
        for name in pair.names
    )
    return {name: before if found else name for name, (before, found, _) in names}


def _wrapped(held: Held) -> Trait | None:
    """Names with more around the model than PEFT's `base_model.model.`."""
    return _found(name for name, before in _prefixes(held).items() if before not in ("", "base_model.model."))


def _bare(held: Held) -> Trait | None:
    """Names without PEFT's `base_model.model.`."""
    return _found(name for name, before in _prefixes(held).items() if not before)


def _fused(held: Held) -> Trait | None:
    return _found(name for pair in _lora(held) if pair.is_fused for name in pair.names)


def _fused_unlike_base(held: Held) -> Trait | None:
    """Fused experts, unless the base's files hold them in one tensor, too."""
    stored = held.base.tensors if held.base is not None else ()

    def is_fused_there(path: str) -> bool:
        return any(name.startswith(f"{path}.") and not name[len(path) + 1 :][:1].isdigit() for name in stored)

    return _found(
        name for pair in _lora(held) if pair.is_fused and not is_fused_there(pair.path) for name in pair.names
    )


def _half_fused(held: Held) -> Trait | None:
    """Layers whose experts have factors of one of their two parameters only."""
    depths = defaultdict[str, set[int]](set)
    for pair in _lora(held):
        if pair.is_fused:
            depths[pair.path].add(pair.depth)
    return _found(path for path, found in depths.items() if found != {0, 1})


def _packing(held: Held) -> Trait | None:
    """Fused experts that are not, or may not be, in the order of PEFT."""
    return _found(
        (pair.path for pair in _lora(held) if pair.is_fused and _settings(held).packing != "rank_major"),
        _settings(held).packing,
    )


def _some_experts(held: Held) -> Trait | None:
    """Layers with factors for some experts and not for others."""
    layers = defaultdict[str, set[tuple[int, str]]](set)
    for pair in _lora(held):
        if found := _EXPERT.fullmatch(pair.path):
            layers[found["experts"]].add((int(found["number"]), found["leaf"]))
    counts = {path: (max(n for n, _ in found) + 1) * len({leaf for _, leaf in found}) for path, found in layers.items()}
    return _found(path for path, found in layers.items() if len(found) != counts[path])


def _not_joined(held: Held) -> Trait | None:
    """Single experts that the model of transformers holds in one tensor, and that PEFT does not join."""
    single = [pair.path for pair in _lora(held) if _EXPERT.fullmatch(pair.path)]
    kind = str(held.base.config.get("model_type")) if held.base is not None else ""
    if held.base is None or not single or kind in JOINED_BY_PEFT:
        return None
    architecture = Architecture.of(held.base)
    named = {path: architecture.name_of(f"{path}.weight") or "" for path in single} if architecture else {}
    return _found((path for path, name in named.items() if name and not name.endswith(".weight")), kind)


def _towers(held: Held) -> Trait | None:
    """Modules of the parts of a multimodal model that read images or sound."""
    return _found(pair.path for pair in _lora(held) if re.search(_TOWER, pair.path))


def _convolutions(held: Held) -> Trait | None:
    shapes = held.file.tensors
    return _found(pair.path for pair in _lora(held) if any(len(shapes[name].shape) > 2 for name in pair.names))


def _embeddings(held: Held) -> Trait | None:
    return _found(pair.path for pair in _lora(held) if pair.is_embedding)


def _tied_head(held: Held) -> Trait | None:
    tied = held.base is not None and held.base.config.get("tie_word_embeddings")
    return _found(pair.path for pair in _lora(held) if tied and pair.path.endswith("lm_head"))


def _tied_embeddings(held: Held) -> Trait | None:
    tied = held.base is not None and held.base.config.get("tie_word_embeddings")
    return _found(pair.path for pair in _lora(held) if tied and pair.is_embedding)


# --- target_modules ---------------------------------------------------------------------------------------------------


def _no_targets(held: Held) -> Trait | None:
    return _flag(held.dialect == PEFT and held.settings is not None and "target_modules" not in held.config)


def _null_targets(held: Held) -> Trait | None:
    return _flag(held.dialect == PEFT and held.settings is not None and held.config.get("target_modules", 0) is None)


def _pattern_targets(held: Held) -> Trait | None:
    given = held.config.get("target_modules")
    return _flag(held.dialect == PEFT and isinstance(given, str) and given not in ("all-linear", "all"), str(given))


def _all_targets(held: Held) -> Trait | None:
    return _flag(held.dialect == PEFT and held.config.get("target_modules") in ("all-linear", "all"))


def _untargeted_embeddings(held: Held) -> Trait | None:
    """Factors of embeddings and heads that `target_modules` does not list by the last part of their name."""
    given = held.config.get("target_modules")
    if not isinstance(given, list):
        return None
    listed = {str(name).rsplit(".", 1)[-1] for name in given}
    found = (pair.path for pair in _lora(held) if re.search(r"(embed_tokens|lm_head)$", pair.path))
    return _found(path for path in found if path.rsplit(".", 1)[-1] not in listed)


def _outside_layers(held: Held) -> Trait | None:
    """Factors that are in none of `layers.N.`, `embed_tokens` and `lm_head`."""
    return _found(
        p.path for p in _lora(held) if not _LAYER.search(f"{p.path}.") and not re.search("embed_tokens|lm_head", p.path)
    )


def _partial_attention(held: Held) -> Trait | None:
    """Attention layers of which q_proj and v_proj do not both have factors, although one of q, k and v has."""
    layers = defaultdict[str, set[str]](set)
    for pair in _lora(held):
        if found := re.fullmatch(r"(.+)\.([qkv])_proj", pair.path):
            layers[found[1]].add(found[2])
    return _found(path for path, found in layers.items() if not {"q", "v"} <= found)


def _wide(held: Held) -> Trait | None:
    names = (name for pair in _lora(held) for name in pair.names)
    return _flag(any(held.file.tensors[name].dtype in ("F32", "F64") for name in names))


TRAITS: dict[str, Callable[[Held], Trait | None]] = {
    "mlx": _mlx,
    "kohya": _kohya,
    "peft": _peft,
    "other type": _other_type,
    "unknown type": _unknown_type,
    "empty": _empty,
    "unfit": _unfit,
    "dora": _dora,
    "alora": _alora,
    "variant": _variant,
    "unknown fields": _unknown_fields,
    "replicated layers": _replicated,
    "start from the base": _start,
    "rank above 16": _rank_option,
    "rank above 512": _rank_beyond,
    "scale not of r": _global_scale,
    "scale not alpha / r": _plain_scale,
    "scale not alpha / rank": _own_rank_scale,
    "uneven rank": _uneven_rank,
    "biases": _biases,
    "whole weights": _whole,
    "whole norms": _norms,
    "whole weights besides norms": _whole_besides_norms,
    "copies of the base": _base_copies,
    "trained tokens": _tokens,
    "other tensors": _others,
    "added tokens": _added_tokens,
    "half a pair": _half,
    "malformed factors": _malformed,
    "rank not of the configuration": _other_rank,
    "adapter's name": _adapter_names,
    "wrapped names": _wrapped,
    "no prefix": _bare,
    "fused experts": _fused,
    "fused experts unlike the base": _fused_unlike_base,
    "half of the fused": _half_fused,
    "packing of experts": _packing,
    "some experts": _some_experts,
    "experts not joined": _not_joined,
    "towers": _towers,
    "convolutions": _convolutions,
    "embeddings": _embeddings,
    "tied head": _tied_head,
    "tied embeddings": _tied_embeddings,
    "no target_modules": _no_targets,
    "target_modules: null": _null_targets,
    "target_modules: pattern": _pattern_targets,
    "target_modules: all": _all_targets,
    "embeddings not targeted": _untargeted_embeddings,
    "outside layers": _outside_layers,
    "q and v not both": _partial_attention,
    "float32": _wide,
}
"""By the name that `rules` has for it."""
