"""The tensors of a checkpoint that have one row per token: input and output embeddings, and their biases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from paft_merge.errors import CheckpointError, Problems
from paft_merge.inputs.remapped_embeddings import rows_of
from paft_merge.inputs.safetensors_header import quote
from paft_merge.plan.layer_stacks import with_nested

if TYPE_CHECKING:
    from paft_merge.inputs.models import Model

_INPUT = r"embed_tokens|tok_embeddings|word_embeddings|embed_in|wte|shared|embeddings|embedding|embed"
_OUTPUT = (
    r"lm_head|lm_head\.(decoder|linear)|embed_out|output_layer|output|proj_out|vocab_projector|predictions|decoder"
)
_IS_INPUT = re.compile(rf"(^|\.)({_INPUT})\.weight$")
_IS_KNOWN = re.compile(rf"(^|\.)({_INPUT}|{_OUTPUT}|linear)\.(weight|bias)$|(^|\.)final_logits_bias$")
_IS_OTHER = re.compile(
    r"(^|\.)(embed_tokens_per_layer|embed_tokens|word_embeddings|wte|lm_head|embed_out)\.(weight|bias)$"
)
_LAYERED = re.compile(r"\.\d+\.")
_FIX = "merge this architecture without tokenizer, or give all models one vocabulary first"


def vocabulary_rows(model: Model) -> int:
    """The number of rows of a model's embeddings: one per token, plus padding.

    Raises:
        CheckpointError: VOCABULARY, its input embedding is not known.
    """
    if model.adapter and model.adapter.vocab_size:
        return model.adapter.vocab_size
    tensors = model.checkpoint.tensors
    inputs = [name for name in tensors if _IS_INPUT.search(name) and len(tensors[name].shape) == 2]
    said = {v for v in _vocab_sizes(model.checkpoint.config) if any(tensors[n].shape[0] == v for n in inputs)}
    inputs = [name for name in inputs if not said or tensors[name].shape[0] in said] or _embeddings_of_class(model)
    if not inputs:
        raise CheckpointError.of("VOCABULARY", model.ref, "its embedding is not known", _FIX)
    return tensors[inputs[0]].shape[0]


def vocabulary_tensors(model: Model, rows: int) -> set[str]:
    """The names of a model's tensors that have one row per token, including those that only its adapter has.

    Raises:
        CheckpointError: VOCABULARY, tensors for which that is unclear.
    """
    stored = {name: info.shape for name, info in model.checkpoint.tensors.items()}
    before = rows if not (model.adapter and model.adapter.vocab_size) else _stored_rows(stored)
    of_adapter = {name: delta.shape for name, delta in model.adapter.deltas.items()} if model.adapter else {}
    shapes = {**stored, **of_adapter}
    found = {name for name, shape in shapes.items() if _IS_KNOWN.search(name) and rows_of(shape) in (rows, before)}
    unclear = [n for n, shape in shapes.items() if n not in found and _may_be(n, shape, (rows, before))]
    if unclear:
        asked = set(_embeddings_of_class(model))
        found |= asked & set(unclear)
        problems = Problems()
        for name in (name for name in unclear if name not in asked):
            what = f"tensor {quote(name)} of shape {list(shapes[name])} may or may not have one row per token"
            problems.add("VOCABULARY", model.ref, what, _FIX)
        problems.raise_as(CheckpointError)
    return found


def _may_be(name: str, shape: tuple[int, ...], rows: Iterable[int]) -> bool:
    """Whether the rows or the name of an unknown tensor suggest one row per token."""
    return bool(_IS_OTHER.search(name)) or (rows_of(shape) in rows and len(shape) < 3 and not _LAYERED.search(name))


def _stored_rows(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of embedding rows before an adapter resized them."""
    return next((rows_of(shape) for name, shape in shapes.items() if _IS_INPUT.search(name)), 0)


def _embeddings_of_class(model: Model) -> list[str]:
    """The embeddings of the model's transformers class, by their names in the checkpoint."""
    from paft_merge.inputs.architecture import Architecture

    architecture = Architecture.of(model.checkpoint)
    stored = [architecture.find(name) for name in architecture.vocabulary()] if architecture else []
    return [one.value_in for one in stored if one and one.value_in in model.checkpoint.tensors]


def _vocab_sizes(config: Mapping[str, Any]) -> list[int]:
    """Every `vocab_size` in a config and the configs nested in it."""
    sizes = (section.get("vocab_size") for _, section in with_nested(config))
    return [size for size in sizes if isinstance(size, int)]
