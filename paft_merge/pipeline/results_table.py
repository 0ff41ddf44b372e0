"""The table of a run: a row per arm, a column per evaluation, the spread over seeds, and sentences that compare arms."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft_merge.evaluating.schema import LOWER_IS_BETTER, EvaluateSpec
from paft_merge.output.card.markdown import escape_markdown
from paft_merge.pipeline.arms import Arm
from paft_merge.pipeline.state import State
from paft_merge.pipeline.steps import SPARSITY, Evaluate, Step


@dataclass(frozen=True)
class Cell:
    """One evaluation of one arm."""

    values: tuple[float, ...]
    """One value per seed."""
    stderr: float | None = None
    """Standard error over the rows of the evaluation; mean over seeds."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def noise(self) -> float:
        """Standard error of the mean: over rows or over seeds, whichever is larger."""
        rows = (self.stderr or 0.0) / math.sqrt(len(self.values))
        return max(rows, (self.spread or 0.0) / math.sqrt(len(self.values)))

    def __str__(self) -> str:
        text = _number(self.mean)
        return f"{text} ± {_number(self.spread)}" if self.spread is not None else text


def _cell(found: Sequence[tuple[float, float | None]]) -> Cell:
    errors = [error for _, error in found if error is not None]
    return Cell(tuple(value for value, _ in found), statistics.fmean(errors) if errors else None)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Row:
    """One arm."""

    name: str
    group: str
    cells: dict[str, Cell]


@dataclass(frozen=True, repr=False)
class Table:
    """All arms. `print` and a notebook show it as Markdown."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int | None, ...]
    better: dict[str, int]
    """By column: +1 if more is better, -1 if less is, 0 if neither (sparsity)."""

    @classmethod
    def of(cls, arms: Sequence[Arm], steps: Sequence[Step], state: State, spec: EvaluateSpec | None) -> Table:
        """The table of the finished evaluations of a run; arms without any are left out."""
        found: dict[str, dict[str, list[tuple[float, float | None]]]] = {arm.name: {} for arm in arms}
        for step in steps:
            if isinstance(step.job, Evaluate) and state.finished(step):
                for column, score in state.result(step).items():
                    if score["value"] is not None:
                        cells = found[step.job.arm.name].setdefault(column, [])
                        cells.append((float(score["value"]), score.get("stderr")))
        groups = {arm.name: arm.group for arm in arms}
        rows = tuple(
            Row(name, groups[name], {c: _cell(got) for c, got in cells.items()})
            for name, cells in found.items()
            if cells
        )
        named = [*(spec.metrics if spec else ()), *(c for row in rows for c in row.cells if c != SPARSITY), SPARSITY]
        columns = tuple(c for c in dict.fromkeys(named) if any(c in row.cells for row in rows))
        seeds = tuple(dict.fromkeys(arm.seed for arm in arms if arm.seed is not None))
        return cls(columns, rows, seeds, {column: _direction(column, spec) for column in columns})

    def __repr__(self) -> str:
        return f"Table({len(self.rows)} arms, {len(self.columns)} columns)"

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def best(self, column: str) -> float | None:
        """The best mean of a column; None where there is nothing to compare."""
        means = [row.cells[column].mean for row in self.rows if column in row.cells]
        sign = self.better[column]
        return sign * max(sign * mean for mean in means) if len(means) > 1 and sign else None

    def verdicts(self) -> list[str]:
        """Sentences on the alignment tax, and on merging against sequential training."""
        return [*self._tax(), *self._against_sequential()]

    def _judged(self) -> list[str]:
        return [column for column in self.columns if self.better[column]]

    def _tax(self) -> list[str]:
        sentences = []
        pairs = [(s, i) for s in self.rows if s.group == "sequential" for i in self.rows if i.group == "individual"]
        for sequential, alone in pairs:
            if _kind(sequential.name) == _kind(alone.name) or not _kind(sequential.name):
                losses = self._worse(sequential, alone)
                gains = self._worse(alone, sequential)
                if losses and gains:
                    sentences.append(
                        f"{sequential.name} against {alone.name}: gains in {', '.join(gains)}; pays in {', '.join(losses)}"
                    )
        return sentences

    def _against_sequential(self) -> list[str]:
        sentences = []
        merged = [row for row in self.rows if row.group in ("parallel", "merge")]
        for sequential in (row for row in self.rows if row.group == "sequential" and merged):
            kinds: dict[str, list[str]] = {}
            for row in merged:
                loses, wins = self._worse(row, sequential), self._worse(sequential, row)
                kind = "trade" if loses and wins else "win" if wins else "lose" if loses else "tie"
                kinds.setdefault(kind, []).append(row.name)
            words = {
                "win": "better and nowhere worse",
                "tie": "no difference",
                "lose": "worse and nowhere better",
            }
            parts = [f"{words[kind]}: {', '.join(kinds[kind])}" for kind in words if kind in kinds]
            if "win" not in kinds:
                parts.insert(0, "none is better without being worse somewhere")
            if "trade" in kinds:
                parts.append(f"{len(kinds['trade'])} of {len(merged)} better in one column and worse in another")
            sentences.append(f"merges against {sequential.name}: {'; '.join(parts)}")
        if sentences:
            sentences.append("a difference counts when it is above its standard error")
        return sentences

    def _worse(self, one: Row, other: Row) -> list[str]:
        """Columns in which the mean of `one` is worse than that of `other` by more than the standard error of their difference."""
        found = []
        for column in self._judged():
            if column in one.cells and column in other.cells:
                a, b = one.cells[column], other.cells[column]
                noise = math.hypot(a.noise, b.noise)
                if self.better[column] * (b.mean - a.mean) > noise:
                    found.append(column)
        return found

    # --- on disk ----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The table as plain data, with the value of every seed."""
        return {
            "seeds": list(self.seeds),
            "better": {c: {1: "higher", -1: "lower", 0: None}[d] for c, d in self.better.items()},
            "rows": [
                {
                    "arm": row.name,
                    "group": row.group,
                    "cells": {
                        c: {
                            "mean": cell.mean,
                            "spread": cell.spread,
                            "values": list(cell.values),
                            "stderr": cell.stderr,
                        }
                        for c, cell in row.cells.items()
                    },
                }
                for row in self.rows
            ],
            "verdicts": self.verdicts(),
        }

    def to_csv(self) -> str:
        """The table as CSV: a row per arm, mean and spread of each column."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["arm", "group", *(name for c in self.columns for name in (c, f"{c}_spread"))])
        for row in self.rows:
            cells = [row.cells.get(c) for c in self.columns]
            numbers = [n for cell in cells for n in ((cell.mean, cell.spread) if cell else (None, None))]
            writer.writerow([row.name, row.group, *("" if n is None else n for n in numbers)])
        return text.getvalue()

    def to_markdown(self) -> str:
        """The table as Markdown, the best of each column in bold, with the sentences below."""
        arrows = {1: " ↑", -1: " ↓", 0: ""}
        head = ["arm", *(f"{escape_markdown(c)}{arrows[self.better[c]]}" for c in self.columns)]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in self.rows:
            cells = [self._marked(row, c) for c in self.columns]
            lines.append(f"| {escape_markdown(row.name)} | {' | '.join(cells)} |")
        if len(self.seeds) > 1:
            lines += ["", f"Mean ± standard deviation over seeds {', '.join(map(str, self.seeds))}."]
        lines += ["", *(f"- {escape_markdown(verdict)}" for verdict in self.verdicts())]
        return "\n".join(lines).rstrip() + "\n"

    def _marked(self, row: Row, column: str) -> str:
        cell = row.cells.get(column)
        if cell is None:
            return ""
        return f"**{cell}**" if cell.mean == self.best(column) else str(cell)

    def write(self, folder: Path) -> None:
        """Write `table.md`, `table.csv` and `table.json`; remove them when nothing was evaluated."""
        as_json = json.dumps(self.to_json(), indent=2) + "\n"
        for suffix, text in {"md": self.to_markdown(), "csv": self.to_csv(), "json": as_json}.items():
            path = folder / f"table.{suffix}"
            if self.rows:
                path.write_text(text, encoding="utf-8")
            else:
                path.unlink(missing_ok=True)


def _kind(name: str) -> str:
    """`l1` of `sequential (l1)`."""
    return name.rpartition("(")[2].rstrip(")") if name.endswith(")") else ""


def _direction(column: str, spec: EvaluateSpec | None) -> int:
    if column == SPARSITY:
        return 0
    kind = spec.metrics[column].kind if spec and column in spec.metrics else column
    return -1 if kind in LOWER_IS_BETTER else 1
