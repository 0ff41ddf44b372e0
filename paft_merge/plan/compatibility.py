"""Whether models can be merged at all: the same tensors in the same shapes, configs of one meaning, one tokenizer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from paft_merge.errors import Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.safetensors_header import join_first

Named = tuple[str, Checkpoint]
"""A model reference as messages show it, and the checkpoint that it leads to."""

MUST_MATCH = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "sliding_window",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings",
    "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps",
)  # fmt: skip
"""Fields of a config that give the same tensors another meaning."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_OTHER_MODEL = "merge models of one architecture"


def compare_tensors(
    donor: Named,
    others: Sequence[Named],
    problems: Problems,
    names: Collection[str] | None = None,
    resized: Collection[str] = (),
) -> set[str]:
    """Every model must have every tensor of the donor, in its shape, and no other.

    Args:
        names: compare only these; all without it.
        resized: tensors that may have another number of rows, one per token.

    Returns:
        The donor's tensors that some model lacks, or has in another shape.
    """
    faulty = set[str]()
    ours = {n: info for n, info in donor[1].tensors.items() if names is None or n in names}
    for ref, checkpoint in others:
        theirs = {n: info for n, info in checkpoint.tensors.items() if names is None or n in names}
        missing, extra = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
        if missing:
            problems.add("KEYS_MISSING", ref, f"lacks {join_first(missing)}, which {donor[0]} has", _OTHER_MODEL)
        if extra:
            problems.add("KEYS_EXTRA", ref, f"has {join_first(extra)}, which {donor[0]} lacks", _OTHER_MODEL)
        both = [n for n in ours if n in theirs]
        free = {n for n in both if n in resized and _of_a_token(theirs[n].shape) == _of_a_token(ours[n].shape)}
        different = [n for n in both if theirs[n].shape != ours[n].shape and n not in free]
        for name in different:
            what = f"is {list(theirs[name].shape)}, and {donor[0]} has {list(ours[name].shape)}"
            problems.add("SHAPE_MISMATCH", f"{ref}: {name}", what, _shape_fix(theirs[name].shape, ours[name].shape))
        faulty.update(missing, different)
    return faulty


def compare_configs(donor: Named, others: Sequence[Named], problems: Problems) -> None:
    """Configs must agree in what changes a model's function but not its tensors' shapes."""
    ours = _meaning(donor[1].config)
    for ref, checkpoint in others:
        theirs = _meaning(checkpoint.config)
        different = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        if different:
            shown_ = ", ".join(f"{key} ({theirs[key]} against {ours[key]})" for key in different)
            fix = f"{_OTHER_MODEL}, or pass allow_crimes=True"
            problems.add("CONFIG_MISMATCH", ref, f"differs from {donor[0]} in {shown_}", fix)


def compare_tokenizers(donor: Named, others: Sequence[Named]) -> list[Problem]:
    """A warning for every model that was trained with another tokenizer than the donor's, which the output gets."""
    warnings = []
    for ref, checkpoint in others:
        file = next((f for f in _TOKENIZERS if all((c.folder / f).is_file() for c in (donor[1], checkpoint))), None)
        if file is None:
            continue
        ours, theirs = (donor[1].folder / file).read_bytes(), (checkpoint.folder / file).read_bytes()
        if ours != theirs:
            what = f"has another {file} than {donor[0]}{_tokens_that_differ(ours, theirs)}"
            warnings.append(Problem("TOKENIZER", ref, what, f"the output gets that of {donor[0]}"))
    return warnings


def _of_a_token(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape but for the dimension that counts tokens: the first that is longer than one."""
    return (1,) if len(shape) == 2 and shape[0] == 1 else shape[1:]


def _meaning(config: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """The fields of a config, and of the configs inside it, that give the same tensors another meaning."""
    found = {f"{within}{key}": config[key] for key in MUST_MATCH if key in config}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:  # where transformers 5 keeps it
        found.setdefault(f"{within}rope_theta", rope["rope_theta"])
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            found |= _meaning(value, f"{within}{key}.")
    return found


def _tokens_that_differ(ours: bytes, theirs: bytes) -> str:
    """How far two tokenizer.json are apart; nothing for what cannot be read as such."""
    try:
        one, other = _vocabulary(ours), _vocabulary(theirs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    counts = {
        "tokens more": len(other.keys() - one.keys()),
        "fewer": len(one.keys() - other.keys()),
        "with another number": sum(one[token] != other[token] for token in one.keys() & other.keys()),
    }
    return f" ({', '.join(f'{count:,} {what}' for what, count in counts.items())})"


def _vocabulary(text: bytes) -> dict[str, int]:
    data = json.loads(text)
    pieces = data["model"]["vocab"]
    known = pieces if isinstance(pieces, dict) else {piece[0]: i for i, piece in enumerate(pieces)}
    return known | {token["content"]: token["id"] for token in data.get("added_tokens") or ()}


def _shape_fix(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    if len(one) == len(other) == 2 and one[1:] == other[1:]:
        return "the vocabularies differ: give all models the same one first"
    return "merge models of one architecture and size"
