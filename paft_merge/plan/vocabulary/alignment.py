"""From which row of which model each row of the output's vocabulary comes. Ids in, row maps out.

The rules are mergekit's: a model keeps its own row of a token; where it has none, the recipe's word counts, else the only
owner's row, else the base's, else the mean of the owners'; a token that nobody has is zero, and padding is the mean row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from paft_merge.inputs.remapped_embeddings import MEAN, PAD, ZERO, Ids, RowMap


@dataclass(frozen=True)
class Word:
    """What the recipe says of one token's row: row `row` of `model`, or, without a model, zeros."""

    model: str | None
    row: int
    force: bool
    """For the models that have the token, too."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """The output's rows, and those of every model.

    Attributes:
        rows: of the output, padding included.
        ids: the output's token ids.
        own: per model the row of each output row's token, `[rows]`, -1 where it has none.
        sizes: per model its own number of rows.
        words: by token id, what the recipe says.
        base: the model whose row stands in when several have the token.
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
        """`models`: every model's token ids."""
        own = {ref: _rows(rows, ids, theirs, sizes[ref]) for ref, theirs in models.items()}
        return cls(rows, ids, own, sizes, words, base)

    @property
    def is_needed(self) -> bool:
        """Whether any model's tensors are not already what the output wants."""
        every = tuple(self.own)
        return not all(self.map(ref, every).is_own(i, self.sizes[ref]) for i, ref in enumerate(every))

    def map(self, model: str, merged: Sequence[str]) -> RowMap:
        """Where the rows of `model` come from; donors are all models, in the order of `own`.

        Args:
            model: one of `merged`.
            merged: the models that this tensor is merged from. Only they lend rows that the recipe does not name.
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
        """Tokens that no model has and of which the recipe says nothing."""
        owned = np.any([own >= 0 for own in self.own.values()], axis=0)
        return [token for token, i in self.ids.items() if not owned[i] and i not in self.words]

    def counts(self, model: str) -> dict[str, int]:
        """How many of the output's tokens a model has itself, for reports."""
        return {"rows": self.sizes[model], "own_tokens": int((self.own[model] >= 0).sum())}

    def _default(self, merged: tuple[str, ...]) -> tuple[Ids, Ids, Ids]:
        """Donor and row of every token for the models that lack it, and the rows of the means."""
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
        if row < size:  # a token beyond the rows is one that the model was never given
            found[i] = row
    return found
