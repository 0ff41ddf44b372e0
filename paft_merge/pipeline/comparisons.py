"""The numbers of a run's table: cells, rows, the differences of arms with their intervals, and sentences about them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from paft_merge.pipeline.paired_intervals import Floats, Interval, Sample, draws, interval, mcnemar

ALONE, IN_TURN = ("individual",), ("sequential", "mixed")
"""Groups of arms: one adapter; and the trainings that merges are compared with."""
MERGED = ("parallel", "polish", "merge")


COSTS = {"train_seconds": "trained, s", "train_tokens": "trained, tokens", "merge_seconds": "merged, s"}
"""The headings of costs."""


def number(value: float) -> str:
    """A score in a table."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Cell:
    """One evaluation of one arm."""

    values: tuple[float, ...]
    """One value per seed."""
    stderr: float | None = None
    """Standard error over the rows of the evaluation; mean over seeds."""
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    """The values by item, one sample per seed."""
    seeds: tuple[int | None, ...] = ()
    """The seed of each value; empty or None for an arm that has none."""

    @classmethod
    def of(cls, found: Mapping[int | None, Sample]) -> Cell:
        """The cell of samples by seed."""
        errors = [sample.stderr for sample in found.values() if sample.stderr is not None]
        stderr = statistics.fmean(errors) if errors else None
        return cls(tuple(sample.value for sample in found.values()), stderr, tuple(found.values()), tuple(found))

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        text = number(self.mean)
        return f"{text} ± {number(self.spread)}" if self.spread is not None else text


@dataclass(frozen=True)
class Row:
    """One arm."""

    name: str
    group: str
    cells: Mapping[str, Cell]
    frontier: str = ""
    """The frontier that it is a point of."""
    point: Mapping[str, Any] = field(default_factory=dict)
    """The swept values of the point."""
    cost: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """`train_seconds`, `train_tokens` and `merge_seconds` of all steps that it needs, per seed; shared steps count in each arm."""

    @property
    def label(self) -> str:
        """The swept values, as text; the name of an arm without any."""
        return " ".join(f"{axis}={value}" for axis, value in self.point.items()) or self.name


@dataclass(frozen=True)
class Difference:
    """One arm minus another in one evaluation."""

    column: str
    arm: str
    against: str
    value: float
    interval: Interval | None
    """None for one seed of an evaluation without values by item and without a standard error."""
    mcnemar: tuple[float, ...] = ()
    """p-values of McNemar's exact test by seed, of an evaluation that is 0 or 1 by item."""
    better: int = 1
    """+1 if more is better, -1 if less is."""

    @property
    def verdict(self) -> int:
        """1 if the arm is better than the other, -1 if it is worse, 0 if the two are not told apart.

        The interval must exclude zero; of one seed, McNemar's test must reject equality at the same level too.
        """
        if self.interval is None or (len(self.mcnemar) == 1 and self.mcnemar[0] >= 0.05):
            return 0
        return self.better * self.interval.sign

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:+.3f} (no interval)"
        return f"{self.value:+.3f} ({self.interval.low:+.3f} to {self.interval.high:+.3f})"

    def to_json(self) -> dict[str, Any]:
        """The difference as JSON values."""
        found = self.interval
        return {
            "metric": self.column, "arm": self.arm, "against": self.against, "difference": self.value,
            "low": found.low if found else None, "high": found.high if found else None, "mcnemar": list(self.mcnemar),
            "verdict": {1: "better", -1: "worse", 0: "not told apart"}[self.verdict],
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class TableData:
    """All arms of a run and what can be said about them."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int | None, ...]
    better: Mapping[str, int]
    """By column: +1 if more is better, -1 if less is, 0 if neither (sparsity)."""
    frontier: tuple[str, ...] = ()
    """The columns of the plot: its axes and, if there is a third, the shade of its points."""

    def best(self, column: str) -> float | None:
        """The best mean of a column; None where there is nothing to compare."""
        means = [row.cells[column].mean for row in self.rows if column in row.cells]
        sign = self.better[column]
        return sign * max(sign * mean for mean in means) if len(means) > 1 and sign else None

    @cached_property
    def pareto(self) -> frozenset[str]:
        """Names of the arms that no other arm beats in the axes of the plot: as good in both means and better in one."""
        return self._front(self.rows)

    def _front(self, rows: Sequence[Row]) -> frozenset[str]:
        axes = self.frontier[:2]
        points = {
            row.name: tuple(self.better[c] * row.cells[c].mean for c in axes)
            for row in rows
            if axes and all(c in row.cells for c in axes)
        }
        return frozenset(
            name
            for name, one in points.items()
            if not any(
                other != one and all(b >= a for a, b in zip(one, other, strict=True)) for other in points.values()
            )
        )

    def costs(self) -> list[str]:
        """The kinds of cost that any arm has."""
        found = dict.fromkeys(key for row in self.rows for key, values in row.cost.items() if any(values))
        return [key for key in COSTS if key in found]

    def shown_costs(self) -> dict[str, dict[str, str]]:
        """The columns of costs in the table by heading, each with the text for every arm: those of training, if any arm has them."""
        keys = [key for key in self.costs() if key != "merge_seconds"]
        return {COSTS[key]: {row.name: _cost(row.cost.get(key)) for row in self.rows} for key in keys}

    # --- differences ------------------------------------------------------------------------------------------------

    @cached_property
    def _drawn(self) -> dict[str, dict[str, Floats]]:
        """The draws of every cell, `[B, S]`, by column and arm."""
        found = {}
        for column in self.columns:
            cells = {row.name: row.cells[column] for row in self.rows if column in row.cells}
            samples = [sample for cell in cells.values() for sample in _samples(cell)]
            drawn, at, found[column] = draws(samples), 0, dict[str, Floats]()
            for name, cell in cells.items():
                found[column][name] = drawn[:, at : at + len(cell.values)]
                at += len(cell.values)
        return found

    def interval(self, row: Row, column: str) -> Interval | None:
        """The 95 % interval of a cell's mean; None where nothing is known about it."""
        cell = row.cells[column]
        if len(cell.values) == 1 and not _has_noise(cell):
            return None
        return interval(cell.values, self._drawn[column][row.name])

    def difference(self, column: str, row: Row, other: Row) -> Difference | None:
        """`row` minus `other`, paired over items and seeds; None if one of them lacks the evaluation, or they share no seed."""
        if column not in row.cells or column not in other.cells:
            return None
        one, two = row.cells[column], other.cells[column]
        pairs = _pairs(one, two)
        if not pairs:
            return None
        mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        values = [one.values[a] - two.values[b] for a, b in pairs]
        drawn = self._drawn[column][row.name][:, mine] - self._drawn[column][other.name][:, theirs]
        known = len(pairs) > 1 or (_has_noise(one) and _has_noise(two))
        tests = [mcnemar(_samples(one)[a].rows, _samples(two)[b].rows) for a, b in pairs]
        return Difference(
            column, row.name, other.name, statistics.fmean(values), interval(values, drawn) if known else None,
            tuple(p for p in tests if p is not None), self.better[column],
        )  # fmt: skip

    def differences(self, row: Row, other: Row) -> list[Difference]:
        """The differences of two arms in all evaluations of which more or less is better."""
        found = (self.difference(column, row, other) for column in self.columns if self.better[column])
        return [one for one in found if one is not None]

    @cached_property
    def against(self) -> dict[str, dict[str, list[Difference]]]:
        """The differences of every merge from each arm of the other groups that it is compared with, by that arm and merge."""
        merged = [row for row in self.rows if row.group in MERGED]
        return {
            rival.name: {row.name: self.differences(row, rival) for row in merged}
            for rival in self._shown(IN_TURN)
            if merged
        }

    @cached_property
    def tax(self) -> list[tuple[Row, Row, list[Difference]]]:
        """Each sequence, a skill or preference alone that belongs to it, and their differences."""
        return [
            (row, alone, self.differences(row, alone))
            for row in self._shown(IN_TURN)
            for alone in self.rows
            if alone.group in ALONE and (_kind(row.name) == _kind(alone.name) or not _kind(row.name))
        ]

    @property
    def compared(self) -> list[Difference]:
        """All differences that the sentences are about."""
        return [
            difference
            for found in ([d for _, _, d in self.tax], *(mine.values() for mine in self.against.values()))
            for differences in found
            for difference in differences
        ]

    def _shown(self, groups: Sequence[str]) -> Iterator[Row]:
        """The arms of groups; of a frontier the points that no other point of it beats."""
        for row in self.rows:
            if row.group in groups:
                points = [one for one in self.rows if one.frontier == row.frontier]
                if not row.frontier or not self.frontier or row.name in self._front(points):
                    yield row

    # --- sentences --------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[str]:
        """Sentences on the alignment tax, and on merging against sequential training."""
        sentences = [
            f"{row.name} against {alone.name}: {'; '.join(_judged(found))}"
            for row, alone, found in self.tax
            if {-1, 1} <= {difference.verdict for difference in found}
        ]
        sentences += [self._sentence(rival, found) for rival, found in self.against.items()]
        if sentences:
            sentences.append(
                "a difference counts where its 95 % interval, paired over items and seeds, excludes zero; of differences "
                "that are none, 1 in 20 does so by chance"
            )
        missing = [column for column in self.frontier if column not in self.columns]
        if missing:
            sentences.append(f"no frontier: nothing has the evaluation {' or '.join(missing)}")
        elif self.frontier:
            sentences.append(f"◆: no arm is better in both {' and '.join(self.frontier[:2])} (of means)")
        return sentences

    def _sentence(self, rival: str, found: Mapping[str, Sequence[Difference]]) -> str:
        kinds: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.name in found:
                signs = {difference.verdict for difference in found[row.name]}
                kind = "trade" if {-1, 1} <= signs else "win" if 1 in signs else "lose" if -1 in signs else "tie"
                kinds.setdefault(kind, []).append(row)
        words = {"win": "better and nowhere worse", "tie": "not told apart", "lose": "worse and nowhere better"}
        parts = [f"{words[kind]}: {', '.join(_names(kinds[kind], self.rows))}" for kind in words if kind in kinds]
        if "win" not in kinds:
            parts.insert(0, "none is better without being worse somewhere")
        if "trade" in kinds:
            parts.append(f"{len(kinds['trade'])} of {len(found)} better in one column and worse in another")
        return f"merges against {rival}: {'; '.join(parts)}"


def _judged(found: Sequence[Difference]) -> list[str]:
    """`better in happy +0.5 (+0.4 to +0.6); not told apart in pairs ...`."""
    words = {1: "better in", -1: "worse in", 0: "not told apart in"}
    kinds = {sign: [f"{d.column} {d}" for d in found if d.verdict == sign] for sign in words}
    return [f"{words[sign]} {', '.join(texts)}" for sign, texts in kinds.items() if texts]


def _names(rows: Sequence[Row], every: Sequence[Row]) -> list[str]:
    """Names of arms, those of one frontier together: `parallel ties at weight=0.6/1`, `parallel slerp at all 3 points`."""
    together: dict[str, list[Row]] = {}
    for row in rows:
        together.setdefault(row.frontier or row.name, []).append(row)
    found = []
    for name, mine in together.items():
        points = [row for row in every if row.frontier == name]
        axes = {tuple(row.point) for row in mine}
        if len(mine) == 1 or not mine[0].frontier:
            found += [row.name for row in mine]
        elif len(mine) == len(points):
            found.append(f"{name} at all {len(points)} points")
        elif len(axes) == 1 and len(mine[0].point) == 1:
            (axis,) = mine[0].point
            found.append(f"{name} at {axis}={'/'.join(str(row.point[axis]) for row in mine)}")
        else:
            found.append(f"{name} at {' / '.join(row.label for row in mine)}")
    return found


def _samples(cell: Cell) -> Sequence[Sample]:
    return cell.samples or [Sample(value, cell.stderr) for value in cell.values]


def _has_noise(cell: Cell) -> bool:
    return all(sample.resampled or sample.stderr is not None for sample in _samples(cell))


def _pairs(one: Cell, two: Cell) -> list[tuple[int, int]]:
    """The positions of the values that belong together: those of one seed; a value without a seed belongs to all."""
    if not one.seeds or not two.seeds:
        if 1 in (len(one.values), len(two.values)):
            count = max(len(one.values), len(two.values))
            return [(min(at, len(one.values) - 1), min(at, len(two.values) - 1)) for at in range(count)]
        return [(at, at) for at in range(min(len(one.values), len(two.values)))]
    alike = ((a, b) for a, s in enumerate(one.seeds) for b, t in enumerate(two.seeds) if s == t or None in (s, t))
    return list(alike)


def _kind(name: str) -> str:
    """`l1` of `sequential (l1)`."""
    return name.rpartition("(")[2].rstrip(")") if name.endswith(")") else ""


def _cost(values: Sequence[float] | None) -> str:
    """The mean of a cost over seeds in three digits: 52, 1.2k, 3.4M."""
    if values is None:
        return ""
    mean = statistics.fmean(values)
    power = next((p for p in (9, 6, 3) if mean >= 0.9995 * 10**p), 0)
    return f"{float(f'{mean / 10**power:.3g}'):g}{ {9: 'G', 6: 'M', 3: 'k', 0: ''}[power] }"
