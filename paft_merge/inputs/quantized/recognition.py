"""Recognises quantised checkpoints: which tensors are codes, scales and zero points, of which weight, and in which format.

A quantised weight is stored as several tensors that have a meaning only together. No delta can be added to them, so they
are copied as they are, or the merge is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paft_merge.errors import Problem
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.safetensors_header import quote


@dataclass(frozen=True)
class _Format:
    """How one format names its tensors.

    Attributes:
        marker: end of the name of a tensor that only this format has; what is before it is the stem.
        parts: a pattern of the ends of all tensors of a weight, after the stem.
        weight: end of the name of the weight itself.
        name: the format, for messages.
    """

    marker: str
    parts: str
    weight: str
    name: str


_ACTIVATIONS = r"|\.(input|output|k|v|q)_(scale|global_scale|zero_point)"
_FORMATS = (
    _Format(".qweight", r"\.(qweight|qzeros|scales|g_idx|bits|qscales)", ".weight", "GPTQ or AWQ"),
    _Format(".weight_packed", rf"\.weight_\w+{_ACTIVATIONS}", ".weight", "compressed-tensors"),
    _Format(".weight.absmax", r"\.weight(\.(nested_)?(absmax|quant_map)|\.quant_state\..+)?", ".weight", "bitsandbytes, 4 bits"),
    _Format(".SCB", r"\.(SCB|CB|weight|weight_format)", ".weight", "bitsandbytes, int8"),
    _Format(".weight_scale_2", rf"\.weight(_scale(_2)?)?{_ACTIVATIONS}", ".weight", "NVFP4"),
    _Format(".weight_scale_inv", rf"\.weight(_scale_inv)?{_ACTIVATIONS}", ".weight", "FP8 with scales"),
    _Format(".weight_scales", r"\.weight(_scales)?", ".weight", "EETQ, int8"),
    _Format(".weight_scale", rf"\.weight(_scale|_zero_point|_g_idx)?{_ACTIVATIONS}", ".weight", "codes with scales"),
    _Format("._weight_qdata", r"\._weight_\w+", ".weight", "torchao"),
    _Format(".weight._data", r"\.weight\._\w+|\.(input|output)_scale", ".weight", "quanto"),
    _Format(".weight._packed", r"\.weight\._\w+|\.(input|output)_scale", ".weight", "quanto"),
    _Format(".W_q", r"\.(W_q|scale|zero|meta|nbits|group_size|shape|axis|packing|channel_wise|unpack_view_dtype\w*)",
            ".weight", "HQQ"),
    _Format(".codebooks", r"\.(codebooks|codes|scales)", ".weight", "AQLM"),
    _Format(".q_weight", r"\.q_\w+", ".weight", "ExLlamaV2"),
    _Format(".trellis", r"\.(trellis|suh|svh|su|sv|mcg|mul1)", ".weight", "ExLlamaV3"),
    _Format(".scales", r"\.(weight|scales|biases)", ".weight", "MLX"),
    _Format("_blocks", r"_(blocks|scales)", "", "MXFP4"),
    _Format("_scale_inv", r"(_scale_inv)?", "", "FP8 with scales"),
    _Format("_scale", r"(_scale)?", "", "codes with scales"),
)  # fmt: skip
_MARKERS = tuple(one.marker for one in _FORMATS)
_CODES = (
    *("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4", "F6_E2M3", "F6_E3M2"),
    *("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"),
)
_COUNTS = re.compile(r"(position_ids|token_type_ids|_index|num_batches_tracked)$")
"""Integers that are not codes."""
_METHODS = {
    **{"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4", "hqq": "HQQ"},
    **{"aqlm": "AQLM", "eetq": "EETQ", "fbgemm_fp8": "FP8 (FBGEMM)", "higgs": "HIGGS", "vptq": "VPTQ", "spqr": "SpQR"},
}


@dataclass(frozen=True)
class Quantised:
    """What is quantised in a checkpoint.

    Attributes:
        how: the format, for messages, such as `GPTQ, 4 bits`; empty if no tensor is quantised.
        parts: for each stored tensor that is a part of a quantised weight, the name of that weight.
        claims: the method that `config.json` states; empty if it states none.
    """

    how: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    claims: str = ""

    def __bool__(self) -> bool:
        return bool(self.parts)

    def problem(self, where: object, uses: str) -> Problem:
        """The refusal of a merge that needs the values of quantised weights; `uses` says which."""
        example = next(iter(self.parts), "")
        what = f"is quantised ({self.how}; it stores {quote(example)}), and {uses}"
        fix = "merge with the checkpoint that was not quantised, or dequantise this one first"
        return Problem("DTYPE_UNSUPPORTED", str(where), what, fix)


def quantised(checkpoint: Checkpoint) -> Quantised:
    """Find the quantised weights of a checkpoint, by its config and by the names and dtypes of its tensors."""
    names, parts, formats = checkpoint.tensors, dict[str, str](), dict[str, str]()
    stems: dict[str, _Format] = {}
    for name in names:
        if name.endswith(_MARKERS):
            known = next(one for one in _FORMATS if name.endswith(one.marker))
            stem = name.removesuffix(known.marker)
            if stem not in stems or _FORMATS.index(known) < _FORMATS.index(stems[stem]):
                stems[stem] = known
    if stems:
        for name in names:
            for cut in _cuts(name):
                one = stems.get(name[:cut])
                if one and re.fullmatch(one.parts, name[cut:]):
                    parts[name], formats[name[:cut] + one.weight] = name[:cut] + one.weight, one.name
                    break
    coded = {weight for name, weight in parts.items() if names[name].dtype in _CODES}
    parts = {name: weight for name, weight in parts.items() if weight in coded}
    config = checkpoint.config
    stated = next(
        (config[k] for k in ("quantization_config", "compression_config", "quantization") if config.get(k)), None
    )
    claims = _stated(stated) if isinstance(stated, Mapping) else ""
    if claims:
        parts |= _beside_codes(checkpoint, parts)
    if not parts:
        return Quantised(claims=claims)
    found = list(dict.fromkeys(formats.get(weight, "") for weight in parts.values()))
    if kind := next((match[1] for name in parts if (match := re.search(r"bitsandbytes__(nf4|fp4)$", name))), None):
        found = [f"bitsandbytes, {kind}"]
    how = claims if claims and not claims[0].isdigit() else ", ".join(filter(None, (" and ".join(found), claims)))
    return Quantised(how, parts, claims)


def _beside_codes(checkpoint: Checkpoint, known: Mapping[str, str]) -> dict[str, str]:
    """Parts in formats that `_FORMATS` lacks: all tensors of each module that stores codes which are not in `known`."""
    coded = (name for name, info in checkpoint.tensors.items() if info.dtype in _CODES and name not in known)
    stems = {name.rpartition(".")[0] for name in coded if not _COUNTS.search(name)}
    found = {}
    for name in checkpoint.tensors:
        around = (name[:at] for at in range(len(name)) if name[at] == ".")
        if name not in known and (stem := next((one for one in around if one in stems), None)):
            found[name] = f"{stem}.weight"
    return found


def _cuts(name: str) -> list[int]:
    """Where a name may be divided into the stem and a part of a weight: before a dot, before `_`, and at its end."""
    last = name.rfind(".", 0, max(name.rfind("."), 0))
    return [at for at in range(len(name)) if name[at] == "." or (name[at] == "_" and at > last)] + [len(name)]


def _stated(config: Mapping[str, Any]) -> str:
    """The method and the width that a `quantization_config` states."""
    method = str(config.get("quant_method") or config.get("quant_algo") or config.get("format") or "")
    facts = [_METHODS.get(method.lower(), method)]
    if config.get("load_in_4bit"):
        facts.append(str(config.get("bnb_4bit_quant_type") or "4 bits"))
    elif config.get("load_in_8bit"):
        facts.append("int8")
    elif type(bits := config.get("bits", config.get("w_bit"))) is int:
        facts.append(f"{bits} bits")
    for key in ("format", "quant_algo", "fmt", "quant_type"):
        if isinstance(value := config.get(key), str) and value != method:
            facts.append(value)
    if isinstance(blocks := config.get("weight_block_size"), list):
        facts.append(f"blocks of {' x '.join(map(str, blocks))}")
    return ", ".join(fact for fact in facts if fact) or "in a way that its config does not name"
