"""Cuts embeddings to the smallest vocabulary of the models, by position, as mergekit's option of that name does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.models import Model
from paft_merge.inputs.safetensors_header import quote
from paft_merge.plan.vocabulary.embedding_tensors import vocabulary_rows, vocabulary_tensors


class Truncated(NamedTuple):
    """The new number of rows and the warnings.

    Attributes:
        rows: the new number of rows, by each old one.
        warnings: one for each model that was cut.
    """

    rows: Mapping[int, int] = {}
    warnings: Sequence[Problem] = ()


def truncate_embeddings(models: Sequence[Model]) -> Truncated:
    """Let every checkpoint end its embeddings after the smallest vocabulary: only headers in memory change.

    Raises:
        CheckpointError: VOCABULARY, a model whose rows are unclear, change with an adapter, or are computed.
    """
    problems, counts = Problems(), dict[int, tuple[Model, int]]()
    for model in models:
        with problems.catching():
            counts[id(model.checkpoint)] = (model, vocabulary_rows(model))
    problems.raise_as(CheckpointError)
    smallest, rows, warnings = min(count for _, count in counts.values()), dict[int, int](), list[Problem]()
    for model, count in counts.values():
        if count == smallest:
            continue
        names = vocabulary_tensors(model, count)
        adapted = [
            n for m in models if m.checkpoint is model.checkpoint and m.adapter for n in names & m.adapter.deltas.keys()
        ]
        if adapted or model.checkpoint.computed:
            why = f"an adapter changes {quote(adapted[0])}" if adapted else "it is computed by another document"
            what = f"its {count:,} rows cannot be cut to {smallest:,}, because {why}"
            problems.add("VOCABULARY", model.ref, what, "write tokenizer: {source: ...} in the recipe")
            continue
        rows[count] = smallest
        _cut(model, names, smallest)
        what = f"{len(names)} tensors are cut from {count:,} to {smallest:,} rows by position"
        fix = "the tokens after that are lost; the ids of the others must be the same in all models"
        warnings.append(Problem("TRUNCATED", model.ref, what, fix))
    problems.raise_as(CheckpointError)
    return Truncated(rows, warnings)


def _cut(model: Model, names: set[str], rows: int) -> None:
    tensors = model.checkpoint.tensors
    for name in names & tensors.keys():
        info = tensors[name]
        is_flat = len(info.shape) == 2 and info.shape[0] == 1
        old = info.shape[1] if is_flat else info.shape[0]
        shape = (1, rows) if is_flat else (rows, *info.shape[1:])
        tensors[name] = replace(info, shape=shape, nbytes=info.nbytes // old * rows)
