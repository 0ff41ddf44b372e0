"""The source of each row of the output's embeddings. Token ids in, row maps out.

The rules are mergekit's. A model keeps its own row of a token. If it has none, its row comes from the first of: the
recipe's entry for the token, the only model that has the token, the base, the mean of all models that have it. A token that
no model has is zero, and padding is the mean row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from paft_merge.inputs.remapped_embeddings import MEAN, PAD, ZERO, Ids, RowMap


@dataclass(frozen=True)
class Word:
    """The recipe's entry for one token: row `row` of `model`, or zeros without a model."""

    model: str | None
    row: int
    force: bool
    """Whether it also replaces the rows of models that have the token."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """The rows of the output and of every model.

    Attributes:
        rows: number of rows of the output, including padding.
        ids: the output's token ids.
        own: for each model the row of each output row's token, `[rows]`; -1: none.
        sizes: number of rows of each model.
        words: the recipe's entries by token id.
        base: the model whose row is used when several have the token.
    """

    rows: int
    ids: Mapping[str, int]
    own: Mapping[str, Ids]
    sizes: Mapping[str, int]
    words: Mapping[int, Word]
    base: str | None
    _made: dict[tuple[str, tuple[str, ...]], RowMap] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, rows: int, ids: Mapping[str, int], models: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int],
        words: Mapping[int, Word], base: str | None,
    ) -> Alignment:  # fmt: skip
        """Align `models`, which are the token ids of every model; the other arguments are the attributes."""
        own = {ref: _rows(rows, ids, theirs, sizes[ref]) for ref, theirs in models.items()}
        return cls(rows, ids, own, sizes, words, base)

    @property
    def is_needed(self) -> bool:
        """Whether any model's rows differ from the output's."""
        every = tuple(self.own)
        return not all(self.map(ref, every).is_own(i, self.sizes[ref]) for i, ref in enumerate(every))

    def map(self, model: str, merged: Sequence[str]) -> RowMap:
        """The sources of the rows of `model`, whose donors are all models in the order of `own`.

        Args:
            model: one of `merged`.
            merged: the models that this tensor is merged from, which provide the rows that the recipe does not name.
        """
        key = (model, tuple(merged))
        if key not in self._made:
            donor, row, shared = self._default(tuple(merged))
            number = list(self.own).index(model)
            forced = np.zeros(self.rows, bool)
            forced[[i for i, word in self.words.items() if word.force]] = True
            keeps = (self.own[model] >= 0) & ~forced
            self._made[key] = RowMap(np.where(keeps, number, donor), np.where(keeps, self.own[model], row), shared)
        return self._made[key]

    def lacking(self) -> list[str]:
        """Tokens that no model has and that the recipe has no entry for."""
        owned = np.any([own >= 0 for own in self.own.values()], axis=0)
        return [token for token, i in self.ids.items() if not owned[i] and i not in self.words]

    def counts(self, model: str) -> dict[str, int]:
        """The number of rows of a model, and of the output's tokens that it has."""
        return {"rows": self.sizes[model], "own_tokens": int((self.own[model] >= 0).sum())}

    def _default(self, merged: tuple[str, ...]) -> tuple[Ids, Ids, Ids]:
        """Donor and row of every token for the models that lack it, and the rows that means are taken of."""
        refs = list(self.own)
        own = np.stack([self.own[ref] for ref in merged])
        has = own >= 0
        count = has.sum(0)
        numbers = np.array([refs.index(ref) for ref in merged])
        first = has.argmax(0)  # the only owner
        donor, row = numbers[first], own[first, np.arange(self.rows)]
        donor, row = np.where(count == 0, ZERO, donor), np.where(count == 0, 0, row)
        several = count > 1
        if self.base in merged:
            at = merged.index(self.base)
            donor, row = np.where(several & has[at], numbers[at], donor), np.where(several & has[at], own[at], row)
            several &= ~has[at]
        donor[several] = MEAN
        for i, word in self.words.items():
            donor[i], row[i] = (ZERO, 0) if word.model is None else (refs.index(word.model), word.row)
        means = np.flatnonzero(donor == MEAN)
        shared = np.full((len(means), len(refs)), -1, np.int64)
        shared[:, numbers] = own[:, means].T
        row[means] = np.arange(len(means))
        padding = np.ones(self.rows, bool)
        padding[list(self.ids.values())] = False
        donor[padding], row[padding] = PAD, 0
        return donor.astype(np.int64), row.astype(np.int64), shared


def _rows(rows: int, ids: Mapping[str, int], theirs: Mapping[str, int], size: int) -> Ids:
    """The row of each output row's token in a model of `size` rows, `[rows]`; -1 where it has none."""
    found = np.full(rows, -1, np.int64)
    for token, i in ids.items():
        row = theirs.get(token, -1)
        if row < size:  # the model has no embedding for a token beyond its rows
            found[i] = row
    return found
