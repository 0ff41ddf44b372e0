"""Whether models can be merged: the same tensors in the same shapes, and configs and tokenizers that agree."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from paft_merge.errors import Problem, Problems
from paft_merge.inputs.adapters.binding import vocabulary_of
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.safetensors_header import join_first, quote
from paft_merge.plan import layer_kinds
from paft_merge.plan.effective_config import SIZES, Difference, differences, is_limit, ties_embeddings

Named = tuple[str, Checkpoint]
"""A model reference as messages show it, and its checkpoint."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_OTHER_MODEL = "merge models of one architecture"
_OF_MLX = "one of them was written by MLX, in its own layout: merge the checkpoint that it was made from, or models that MLX wrote"


def compare_tensors(
    template: Named,
    others: Sequence[Named],
    problems: Problems,
    names: Collection[str] | None = None,
    resized: Collection[str] = (),
) -> set[str]:
    """Check that every model has the tensors of `template`, in the same shapes, and no other.

    Args:
        template: the model to compare with.
        others: the models to check.
        problems: receives one problem for each difference.
        names: the tensors to compare; None: all.
        resized: tensors whose number of rows, one per token, may differ.

    Returns:
        The template's tensors that some model lacks or has in another shape.
    """
    faulty, ours = set[str](), _shapes(template[1], names)
    for ref, checkpoint in others:
        theirs = _shapes(checkpoint, names)
        fix = _OF_MLX if _is_of_mlx(checkpoint) != _is_of_mlx(template[1]) else _OTHER_MODEL
        compare_names(ours, theirs, ref, template[0], problems, fix)
        unlike = defaultdict[tuple[tuple[int, ...], tuple[int, ...]], list[str]](list)
        for name, shape in ours.items():
            if name not in theirs:
                faulty.add(name)
            elif not (theirs[name] == shape or (name in resized and _of_a_token(theirs[name]) == _of_a_token(shape))):
                faulty.add(name)
                unlike[theirs[name], shape].append(name)
        for (one, other), held in unlike.items():
            more = f" and {len(held) - 2} more" if len(held) > 2 else ""
            what = f"{'are' if held[1:] else 'is'} {list(one)}, and {template[0]} has {list(other)}"
            problems.add("SHAPE_MISMATCH", f"{ref}: {', '.join(held[:2])}{more}", what, _shape_fix(one, other, fix))
    return faulty


def _is_of_mlx(checkpoint: Checkpoint) -> bool:
    """Whether MLX wrote a checkpoint; it stacks experts and stores convolutions in another order."""
    return any(file.metadata.get("format") == "mlx" for file in checkpoint.files)


_FACTOR = re.compile(
    r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector|E)(\.|$)|base_layer\.|modules_to_save\.|lora_[ab]$|hada_w\d|lokr_w\d)"
)


def refuse_adapters_inside(models: Sequence[Named], problems: Problems) -> set[int]:
    """Note models that still hold the tensors of an adapter: PEFT's state saved as a model. Loaders ignore the factors.

    Returns:
        The ids of their checkpoints.
    """
    found = set[int]()
    for ref, checkpoint in models:
        inside = [name for name in checkpoint.tensors if _FACTOR.search(name)]
        if inside and id(checkpoint) not in found:
            found.add(id(checkpoint))
            what = f"holds {len(inside)} tensors of an adapter that was never merged into it ({join_first(inside, 2)}), which loaders ignore"
            fix = "save the adapter with PEFT and merge it as BASE+ADAPTER, or pass allow_crimes=True if the model's own code reads them"
            problems.add("ADAPTER_INSIDE", ref, what, fix)
    return found


def compare_names(
    ours: Collection[str], theirs: Collection[str], where: str, owner: str, problems: Problems, fix: str
) -> None:
    """Note the names that only one of two models has.

    Args:
        ours: names that `owner` has.
        theirs: names that the checked model has.
        where: the checked model, for the message.
        owner: the model to compare with, for the message.
        problems: receives KEYS_MISSING and KEYS_EXTRA.
        fix: of both messages.
    """
    if missing := [name for name in ours if name not in theirs]:
        problems.add("KEYS_MISSING", where, f"lacks {join_first(missing)}, which {owner} has", fix)
    if extra := [name for name in theirs if name not in ours]:
        problems.add("KEYS_EXTRA", where, f"has {join_first(extra)}, which {owner} lacks", fix)


def compare_configs(
    template: Named, others: Sequence[Named], problems: Problems, *, sizes: bool = True
) -> list[Problem]:
    """Check that configs mean the same; see `effective_config` for the fields that are passed over.

    Args:
        template: the model to compare with.
        others: the models to check.
        problems: receives one CONFIG_MISMATCH for each model that differs.
        sizes: compare numbers of layers and tokens and values by layer, which recipes with slices or a tokenizer change.

    Returns:
        A warning for each model that differs only in its longest sequence.
    """
    warnings = []
    for ref, checkpoint in others:
        found = [one for one in differences(template[1].config, checkpoint.config) if sizes or not _is_size(one)]
        limits = [one for one in found if is_limit(one, template[1].config)]
        if different := [one for one in found if one not in limits]:
            fix = f"{_OTHER_MODEL}, or pass allow_crimes=True"
            more = f" and {len(different) - 12} more" if len(different) > 12 else ""
            what = f"differs from {template[0]} in {', '.join(map(str, different[:12]))}{more}"
            problems.add("CONFIG_MISMATCH", ref, what, fix)
        elif limits:
            what = f"differs from {template[0]} in {', '.join(map(str, limits))}"
            warnings.append(Problem("CONFIG_LIMIT", ref, what, f"the output gets that of {template[0]}"))
    return warnings


def compare_tokenizers(template: Named, others: Sequence[Named]) -> list[Problem]:
    """Warn of every model whose tokenizer differs from the template's, which the output gets."""
    warnings = []
    for ref, checkpoint in others:
        folders = (template[1].folder, checkpoint.folder)
        file = next((f for f in _TOKENIZERS if all((folder / f).is_file() for folder in folders)), None)
        if file is None:
            continue
        ours, theirs = ((folder / file).read_bytes() for folder in folders)
        if ours != theirs:
            what = f"its {file} differs from that of {template[0]}{_token_differences(ours, theirs)}"
            warnings.append(Problem("TOKENIZER", ref, what, f"the output gets that of {template[0]}"))
    return warnings


def find_untied_copies(models: Sequence[Named]) -> list[Problem]:
    """Warn of models that store tied embeddings several times with different values, of which older loaders read one.

    Samples of the copies are compared.
    """
    warnings = []
    for ref, checkpoint in models:
        rows = vocabulary_of(checkpoint.config)
        outside = {
            name: info.shape
            for name, info in checkpoint.tensors.items()
            if not re.search(r"(^|\.)\d+\.|(?<!\.weight)$", name)
        }
        matrices = (name for name, shape in outside.items() if len(shape) == 2 and shape[0] == rows)
        first = next((name for name in matrices if re.search(r"embed|shared|wte", name)), None)
        if first is None or checkpoint.computed:
            continue
        for name in (name for name, shape in outside.items() if shape == outside[first]):
            if not checkpoint.same_bytes(name, checkpoint, first, sampled=True) and ties_embeddings(checkpoint.config):
                what = f"stores {quote(name)}, which differs from {quote(first)} although its config ties the two"
                fix = "transformers 5 loads both, and older versions only one: write tie_word_embeddings: false if both are meant"
                warnings.append(Problem("TIED_DIFFERS", ref, what, fix))
    return warnings


def _is_size(found: Difference) -> bool:
    """Whether a field counts layers or tokens, or has one entry for each layer."""
    if found.leaf in SIZES | layer_kinds.INDEX_LISTS:
        return True
    listed = [value for value in (found.ours, found.theirs) if isinstance(value, list | str)]
    return any(layer_kinds.is_by_layer(found.leaf, value, len(value)) for value in listed)


def _shapes(checkpoint: Checkpoint, names: Collection[str] | None) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items() if names is None or name in names}


def _of_a_token(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the dimension that counts tokens, which is the first that is longer than one."""
    return (1,) if len(shape) == 2 and shape[0] == 1 else shape[1:]


def _token_differences(ours: bytes, theirs: bytes) -> str:
    """Counts of the tokens that differ between two tokenizer.json files; empty if one cannot be read."""
    try:
        one, other = _vocabulary(ours), _vocabulary(theirs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    counts = {
        "tokens more": len(other.keys() - one.keys()),
        "fewer": len(one.keys() - other.keys()),
        "with another id": sum(one[token] != other[token] for token in one.keys() & other.keys()),
    }
    return f" ({', '.join(f'{count:,} {what}' for what, count in counts.items())})"


def _vocabulary(text: bytes) -> dict[str, int]:
    data = json.loads(text)
    pieces = data["model"]["vocab"]
    known = pieces if isinstance(pieces, dict) else {piece[0]: i for i, piece in enumerate(pieces)}
    return known | {token["content"]: token["id"] for token in data.get("added_tokens") or ()}


def _shape_fix(one: tuple[int, ...], other: tuple[int, ...], fix: str) -> str:
    if len(one) == len(other) == 2 and one[1:] == other[1:]:
        return "the vocabularies differ: write tokenizer_source: union or base in the recipe, or unsafe_truncate_embeddings=True"
    return f"{_OTHER_MODEL} and size" if fix == _OTHER_MODEL else fix
