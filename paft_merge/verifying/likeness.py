"""Where the values of a tensor come from that is not the recipe's: another tensor, other rows or columns, or its transpose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paft_merge.inputs.models import Model
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.verifying.evidence import Array, StoredTensor, blocks_of, values_of
from paft_merge.verifying.meaning import Meaning

SAMPLE = 8192
"""Elements of a tensor, from its beginning, that are compared with those of others."""

MOST_OTHERS = 256
"""Tensors that one is compared with."""

_ROWS = 48
"""Rows of a matrix that are looked for in the recipe's."""
_HEAD = 64
"""Elements at the beginning of a row that are compared; fewer than 8 are not enough to know a row."""
_MOST = 1 << 30
"""Elements of a matrix whose rows are compared."""
ALIKE = 0.98
"""Least correlation of samples of the same values, of which one may be a fine-tune of the other."""


def explain(found: Sequence[StoredTensor], meaning: Meaning, finished: Model) -> None:
    """Fill `likeness` and `rows` of tensors that are far from the recipe's."""
    samples = Samples(meaning)
    for one in found:
        one.rows = _order(one.shape, finished.read(one.name), meaning.model.read(one.name))
        own = samples[one.name]
        if one.rows or correlation(stored := sample(finished, one.name), own) > ALIKE:
            continue
        likely = samples.nearest(stored, one.shape, without=one.name)
        if likely and likely[1] > ALIKE:
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


def _order(shape: tuple[int, ...], stored: Read, meant: Read) -> str:
    """How the recipe's rows, columns or entries are ordered in a tensor, in words; empty if they are not in it."""
    if math.prod(shape) > _MOST or max(shape, default=0) < 8:
        return ""
    if len(shape) == 1:
        return "it holds the recipe's values in another order" if _is_reordered(stored, meant) else ""
    ours, theirs = _heads(stored), _heads(meant)
    if ours.shape[1] >= 8 and (found := _moved_rows(ours, theirs)):
        return _in_words(*found, len(ours), shape)
    if is_transposed(stored, meant):
        return "it is transposed"
    ours, theirs = _corner(stored).T, _corner(meant).T
    if ours.shape[1] >= 8 and (found := _moved_rows(ours, theirs)):
        return _in_words(*found, len(ours), shape, "columns")
    return ""


def _in_words(count: int, moved: NDArray[np.int64], rows: int, shape: tuple[int, ...], noun: str = "rows") -> str:
    """Say where rows are.

    Args:
        count: rows that are at other places.
        moved: of some of them, how far behind it the recipe has them.
        rows: the number of all.
        shape: of the tensor.
        noun: what they are called.
    """
    shift = int(np.median(moved))
    if len(shape) == 3 and noun == "rows" and not (moved % shape[1]).any():
        return "it holds the recipe's matrices in another order"
    if 2 * count <= rows:
        return f"{count:,} of its {rows:,} {noun} are in another order"
    if np.count_nonzero(moved == shift) > 0.8 * len(moved):
        one = noun.removesuffix("s")
        return f"its {noun} are shifted by {abs(shift)}: {one} {max(0, -shift)} is the recipe's {one} {max(0, shift)}"
    return f"it holds the recipe's {noun} in another order"


def _moved_rows(ours: Array, theirs: Array) -> tuple[int, NDArray[np.int64]] | None:
    """How many rows of `[R, c]` differ, and how far some of them have moved; None if they are not rows of `theirs`."""
    a, b = _unit(ours), _unit(theirs)
    off = np.flatnonzero((np.einsum("rc,rc->r", a, b) <= ALIKE) & (ours != theirs).any(1))
    if not len(off):
        return None
    at = off[np.unique(np.linspace(0, len(off) - 1, min(len(off), _ROWS)).astype(int))]
    cosines = a[at] @ b.T
    best = cosines.argmax(1)
    alike = cosines[np.arange(len(at)), best] > ALIKE
    return (len(off), (best - at)[alike]) if np.count_nonzero(alike) >= 0.8 * len(at) else None


def is_transposed(stored: Read, meant: Read) -> bool:
    """Whether the matrices of one tensor are the transposes of the other's, by their corners."""
    if len(stored.shape) < 2 or stored.shape[-1] != meant.shape[-2] or stored.shape[-2] != meant.shape[-1]:
        return False
    ours, theirs = _corner(stored), _corner(meant)
    side = min(*ours.shape, *theirs.shape)
    turned = np.ascontiguousarray(theirs[:side, :side].T)
    return side > 3 and correlation(ours[:side, :side].ravel(), turned.ravel()) > ALIKE


def _is_reordered(stored: Read, meant: Read) -> bool:
    """Whether a vector has the recipe's values at other places, up to rounding."""
    ours, theirs = values_of(stored), values_of(meant)
    varied = len(np.unique(theirs)) > len(theirs) // 2
    return varied and np.allclose(np.sort(ours), np.sort(theirs), rtol=2**-7, atol=0)


def _heads(read: Read) -> Array:
    """`[R, c]`: the first columns of every row."""
    width = read.shape[-1]
    parts = [held[0].reshape(-1, width)[:, :_HEAD].copy() for _, _, held in blocks_of([read], width)]
    read.checkpoint.release(read.name)
    return np.concatenate(parts)


def _corner(read: Read) -> Array:
    """`[r, C]`: the first rows of the first matrix."""
    width = read.shape[-1]
    rows = next(
        held[0].reshape(-1, width)[: min(_HEAD, read.shape[-2])].copy() for _, _, held in blocks_of([read], width)
    )
    read.checkpoint.release(read.name)
    return rows


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    norms[norms == 0] = 1
    made: Array = (rows / norms).astype(np.float32)
    return made
