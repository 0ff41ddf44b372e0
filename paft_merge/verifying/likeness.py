"""Where the values of a tensor come from that is not the recipe's: another tensor, other rows, or its transpose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paft_merge.inputs.models import Model
from paft_merge.verifying.evidence import Array, StoredTensor, blocks_of, values_of
from paft_merge.verifying.meaning import Meaning

SAMPLE = 8192
"""Elements of a tensor, from its beginning, that are compared with those of others."""

MOST_OTHERS = 256
"""Tensors that one is compared with."""

_ROWS, _COLUMNS, _MOST = 48, 64, 1 << 24
ALIKE = 0.98
"""Least correlation of samples of the same values, of which one may be a fine-tune of the other."""


def explain(found: Sequence[StoredTensor], meaning: Meaning, finished: Model) -> None:
    """Fill `likeness` and `rows` of tensors that are far from the recipe's."""
    samples = Samples(meaning)
    for one in found:
        if rows := _rows(one, meaning, finished):
            one.rows = rows
            continue
        stored = sample(finished, one.name)
        likely = samples.nearest(stored, one.shape, without=one.name)
        if likely and likely[1] > max(ALIKE, correlation(stored, samples[one.name]) + 0.01):
            one.likeness = {likely[0]: likely[1]}


class Samples(dict[str, Array]):
    """The samples of the recipe's tensors by name; each is computed when it is asked for, and kept."""

    def __init__(self, meaning: Meaning) -> None:
        super().__init__()
        self._model = meaning.model

    def __missing__(self, name: str) -> Array:
        self[name] = found = sample(self._model, name)
        return found

    def nearest(self, stored: Array, shape: tuple[int, ...], without: str = "") -> tuple[str, float] | None:
        """The tensor whose sample is most like `stored`, with the correlation.

        Args:
            stored: a sample.
            shape: of its tensor; only tensors of this shape are compared.
            without: a name that is left out.
        """
        names = self._model.checkpoint.tensors
        alike = [name for name in names if name != without and self._model.read(name).shape == shape][:MOST_OTHERS]
        best = max(((correlation(stored, self[name]), name) for name in alike), default=None)
        return (best[1], best[0]) if best else None


def sample(model: Model, name: str) -> Array:
    """The first elements of a tensor, at most `SAMPLE`."""
    read = model.read(name)
    try:
        return next(held[0][:SAMPLE].copy() for _, _, held in blocks_of([read]))
    finally:
        read.checkpoint.release(read.name)


def correlation(left: Array, right: Array) -> float:
    """Pearson's correlation of two samples; 0 where one is constant."""
    if left.size != right.size or left.size < 2:
        return 0.0
    a, b = (one.astype(np.float64) - one.mean(dtype=np.float64) for one in (left, right))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else 0.0


def _rows(found: StoredTensor, meaning: Meaning, finished: Model) -> str:
    """How the recipe's rows are ordered in a matrix, in words; empty if they are not in it."""
    if len(found.shape) != 2 or found.numel > _MOST * 64 or min(found.shape) < 2:
        return ""
    stored, meant = _heads(finished, found), _heads(meaning.model, found)
    count = len(stored)
    at = np.unique(np.linspace(0, count - 1, min(count, _ROWS)).astype(int))
    cosines = _unit(stored[at]) @ _unit(meant).T
    best = cosines.argmax(1)
    alike = cosines[np.arange(len(at)), best] > ALIKE
    if np.count_nonzero(alike) >= 0.8 * len(at) and found.shape[1] > 3:
        moved = (best - at)[alike]
        shift = int(np.median(moved))
        if shift and np.count_nonzero(moved == shift) > 0.8 * len(moved):
            return f"its rows are shifted by {abs(shift)}: row {max(0, -shift)} is the recipe's row {max(0, shift)}"
        if np.count_nonzero(moved) > 0.2 * len(moved):
            return "it holds the recipe's rows in another order"
    if found.shape[0] == found.shape[1] and found.numel <= _MOST:
        turned = values_of(meaning.model.read(found.name)).T
        if correlation(values_of(finished.read(found.name)).ravel(), np.ascontiguousarray(turned).ravel()) > ALIKE:
            return "it is transposed"
    return ""


def _heads(model: Model, found: StoredTensor) -> Array:
    """`[O, c]`: the first columns of every row."""
    width = found.shape[1]
    read = model.read(found.name)
    parts = [held[0].reshape(-1, width)[:, :_COLUMNS].copy() for _, _, held in blocks_of([read], width)]
    read.checkpoint.release(read.name)
    return np.concatenate(parts)


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    norms[norms == 0] = 1
    made: Array = (rows / norms).astype(np.float32)
    return made
