"""The kinds of differences, and the result: one entry a tensor, and one a setting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from paft_merge.errors import Problem
from paft_merge.plan.formatting import html_lines, html_table

Kind = Literal[
    "different", "moved", "permuted", "shape", "only in A", "only in B", "rounded", "close", "same delta", "equal", "renamed", "derived", "same"
]  # fmt: skip
"""How two tensors compare, the worst first:

different    values differ by more than one rounding
moved        both have the name, and the bits of A's are those of another tensor of B
permuted     the rows or columns of A's tensor are in another order in B, or it is transposed
shape        the shapes differ
only in A    B has no such tensor, under any name
only in B    likewise
rounded      rounded to one of their two types, all entries are equal or neighbours
close        the relative norm of the difference is at most the tolerance
same delta   the factors of two adapters differ, and their product does not, up to rounding in float32
equal        equal values in other bits: another type, -0.0 for 0.0, another NaN
renamed      the same bits under another name
derived      only one stores it, and the model computes it itself: a buffer, a copy of a tied weight
same         the same bits
"""

HARMLESS: tuple[Kind, ...] = ("close", "same delta", "equal", "renamed", "derived", "same")
"""The kinds of tensors that count as the same."""

NUMBERS = ("relative", "norm", "largest", "differ", "where")
"""The columns of `TensorDifference.shown`."""

_ROWS = 40
"""Tensors in a notebook."""


@dataclass(frozen=True)
class TensorDifference:
    """The comparison of one tensor.

    Attributes:
        name: in A; in B where only B has it.
        kind: see `Kind`.
        other: the name in B, if it is another one; of a moved tensor the one that has its bits.
        dtypes: the storage types in A and in B; empty where a model has no such tensor.
        shapes: likewise; None where a model has no such tensor.
        unequal: number of entries whose values differ; None where no values were compared.
        nonfinite: how many of them are NaN or infinite in A or B; they are not in the norms.
        norm: ||B - A||; None where no values were compared.
        relative: `norm` / ||A||; None where A is zero.
        largest: the largest |B - A|.
        at: index of the first entry that has it.
        pair: its values in A and in B.
        order: of a permuted tensor, in words, how.
    """

    name: str
    kind: Kind
    other: str = ""
    dtypes: tuple[str, str] = ("", "")
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    unequal: int | None = None
    nonfinite: int = 0
    norm: float | None = None
    relative: float | None = None
    largest: float | None = None
    at: tuple[int, ...] | None = None
    pair: tuple[float, float] | None = None
    order: str = ""

    @property
    def entries(self) -> int:
        """Number of entries, in A if it has the tensor."""
        return math.prod(next(shape for shape in self.shapes if shape is not None))

    @property
    def harmless(self) -> bool:
        """Whether it counts as the same."""
        return self.kind in HARMLESS

    def shown(self) -> tuple[str, ...]:
        """Return a text for each of `NUMBERS`; types and shapes are under `where`."""
        if self.norm is None or self.unequal is None:
            return ("", "", "", "", "  ".join(filter(None, (self.order, self.types))))
        share = f"{self.unequal / self.entries:.2%}"
        if self.nonfinite == self.unequal:
            return "", "", "", share, self.odd
        relative = "from zero" if self.relative is None else f"{self.relative:.2e}"
        at, pair = self.at, self.pair
        where = "" if at is None or pair is None else f"{list(at)}: {pair[0]:.6g} -> {pair[1]:.6g}"
        types = self.types if self.dtypes[0] != self.dtypes[1] else ""
        more = "  ".join(filter(None, (self.order or where, self.odd, types)))
        return relative, f"{self.norm:.3g}", f"{self.largest:.3g}", share, more

    @property
    def odd(self) -> str:
        """How many entries are NaN or infinite, in words; empty if none is."""
        return f"{self.nonfinite:,} NaN or infinite" if self.nonfinite else ""

    @property
    def types(self) -> str:
        """Types and shapes, of both where they differ."""
        (a, b), shapes = self.dtypes, list(dict.fromkeys(shape for shape in self.shapes if shape is not None))
        if len(shapes) == 1:
            return f"{' -> '.join(dict.fromkeys(filter(None, (a, b))))} {list(shapes[0])}"
        return f"{a} {list(shapes[0])} -> {b} {list(shapes[1])}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data; what was not measured is null."""
        return {
            "name": self.name, "kind": self.kind, "other_name": self.other or None, "dtypes": [d or None for d in self.dtypes],
            "shapes": [None if shape is None else list(shape) for shape in self.shapes], "unequal": self.unequal,
            "nonfinite": self.nonfinite, "norm": _json_number(self.norm), "relative": self.relative, "largest": self.largest,
            "at": None if self.at is None else list(self.at), "values": None if self.pair is None else list(self.pair),
            "order": self.order or None,
        }  # fmt: skip


def _json_number(value: float | None) -> float | None:
    """A number; None where it is too large for a float, as JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


class Change(NamedTuple):
    """A setting that differs.

    Attributes:
        file: the file, or `tokens`, `chat template` and the like.
        what: the difference in words.
        counts: whether it can change what the model does.
    """

    file: str
    what: str
    counts: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return self._asdict()


@dataclass(frozen=True, repr=False)
class ModelDiff:
    """Two models compared.

    Attributes:
        refs: A and B as they were named.
        of_adapters: whether they are adapters.
        tensors: every tensor; of adapters, as their files store them.
        deltas: of adapters whose files or scales differ: what they add to every tensor of a base. None where it was not
            computed.
        changes: settings that differ, in config, tokenizer, chat template and generation.
        warnings: what was unusual.
    """

    refs: tuple[str, str]
    of_adapters: bool
    tensors: tuple[TensorDifference, ...]
    deltas: tuple[TensorDifference, ...] | None
    changes: tuple[Change, ...]
    warnings: tuple[Problem, ...]

    @property
    def counted(self) -> tuple[TensorDifference, ...]:
        """The tensors that decide: the deltas of adapters where they were computed, else the stored ones."""
        return self.tensors if self.deltas is None else self.deltas

    @property
    def same(self) -> bool:
        """Whether no tensor and no setting makes a difference."""
        return all(one.harmless for one in self.counted) and not any(change.counts for change in self.changes)

    @property
    def kinds(self) -> Mapping[Kind, int]:
        """Number of tensors of each kind, in the order of `Kind`."""
        return kinds_of(self.tensors)

    def __repr__(self) -> str:
        return f"ModelDiff({', '.join(map(repr, self.refs))}, {self._counts()})"

    def _counts(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in kinds_of(self.counted).items())

    def _repr_html_(self) -> str:
        verdict = "are the same" if self.same else "differ"
        lines = [f"{' and '.join(self.refs)} {verdict}: {self._counts()}"]
        lines += [f"{change.file}: {change.what}" for change in self.changes]
        rows = worst_first(self.counted)
        cells = [(one.kind, f"{one.name}{f' (in B: {one.other})' * bool(one.other)}", *one.shown()) for one in rows]
        table = html_table(cells[:_ROWS], ("kind", "tensor", *NUMBERS)) if rows else ""
        return html_lines(lines) + table + html_lines([f"and {len(rows) - _ROWS:,} more"] * (len(rows) > _ROWS))

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        deltas = None if self.deltas is None else [one.to_json() for one in self.deltas]
        return {
            "a": self.refs[0], "b": self.refs[1], "same": self.same, "adapters": self.of_adapters, "kinds": dict(self.kinds),
            "tensors": [one.to_json() for one in self.tensors], "deltas": deltas,
            "changes": [change.to_json() for change in self.changes],
        }  # fmt: skip


def worst_first(tensors: Iterable[TensorDifference]) -> list[TensorDifference]:
    """Return the tensors that are not the same, by kind and then by the size of the difference."""
    order: Mapping[Kind, int] = {kind: i for i, kind in enumerate(Kind.__args__)}  # type: ignore[attr-defined]

    def size(one: TensorDifference) -> float:
        if one.norm is None or one.nonfinite:
            return math.inf if one.nonfinite else 0.0
        return math.inf if one.relative is None else one.relative

    return sorted((one for one in tensors if one.kind != "same"), key=lambda one: (order[one.kind], -size(one)))


def kinds_of(tensors: tuple[TensorDifference, ...]) -> dict[Kind, int]:
    """Number of tensors of each kind, in the order of `Kind`."""
    held = Counter(one.kind for one in tensors)
    return {kind: held[kind] for kind in Kind.__args__ if held[kind]}  # type: ignore[attr-defined]
