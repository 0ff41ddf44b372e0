"""The table of a run: a row per arm, a column per evaluation, the spread over seeds, costs, and sentences that compare arms."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paft_merge.errors import RunError, reading
from paft_merge.evaluating.schema import LOWER_IS_BETTER, EvaluateSpec
from paft_merge.output.card.markdown import escape_markdown
from paft_merge.pipeline.arms import Arm
from paft_merge.pipeline.comparisons import Cell, Row, TableData
from paft_merge.pipeline.paired_intervals import Sample
from paft_merge.pipeline.results_page import ARROWS, page, write_picture
from paft_merge.pipeline.state import State
from paft_merge.pipeline.steps import SPARSITY, Evaluate, Merge, Step, Train

__all__ = ["Cell", "Row", "Table"]

PARETO = "◆"
"""Marks an arm on the Pareto front."""


class Table(TableData):
    """All arms. `print` shows it as Markdown, a notebook as HTML."""

    @classmethod
    def of(
        cls,
        arms: Sequence[Arm],
        steps: Sequence[Step],
        state: State,
        spec: EvaluateSpec | None,
        frontier: Sequence[str] | None = None,
    ) -> Table:
        """The table of the finished evaluations of a run; arms without any are left out.

        Args:
            arms: the arms of every seed.
            steps: all steps.
            state: the records of the steps.
            spec: the section `evaluate:`.
            frontier: the columns of the plot; None: the first three evaluations, if an arm is a point of a frontier.
        """
        found: dict[str, dict[str, dict[int | None, Sample]]] = {arm.name: {} for arm in arms}
        for step in steps:
            if isinstance(step.job, Evaluate) and state.finished(step):
                for column, sample in _samples(step, _kind_of(spec)):
                    found[step.job.arm.name].setdefault(column, {})[step.job.arm.seed] = sample
        costs = _costs(arms, steps, state)
        first = {arm.name: arm for arm in reversed(arms)}
        rows = tuple(
            Row(
                name,
                first[name].group,
                {c: Cell.of(got) for c, got in cells.items()},
                first[name].frontier,
                first[name].point,
                costs[name],
            )
            for name, cells in found.items()
            if cells
        )
        named = [*(spec.metrics if spec else ()), *(c for row in rows for c in row.cells if c != SPARSITY), SPARSITY]
        columns = tuple(c for c in dict.fromkeys(named) if any(c in row.cells for row in rows))
        seeds = tuple(dict.fromkeys(arm.seed for arm in arms if arm.seed is not None))
        better = {column: _direction(column, spec) for column in columns}
        if frontier is None and any(row.frontier for row in rows):
            frontier = [column for column in columns if better[column]][:3]
        plotted = tuple(frontier or ())
        return cls(columns, rows, seeds, better, plotted if len(plotted) > 1 else ())

    def __repr__(self) -> str:
        return f"Table({len(self.rows)} arms, {len(self.columns)} columns)"

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return page(self, whole=False)

    # --- on disk ----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The table as plain data, with the value of every seed, and the intervals of all differences that sentences are about."""
        return {
            "seeds": list(self.seeds),
            "better": {c: {1: "higher", -1: "lower", 0: None}[d] for c, d in self.better.items()},
            "frontier": list(self.frontier),
            "rows": [self._row_json(row) for row in self.rows],
            "differences": [difference.to_json() for difference in self.compared],
            "verdicts": self.verdicts(),
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        cells = {}
        for column, cell in row.cells.items():
            found = self.interval(row, column)
            cells[column] = {
                "mean": cell.mean, "spread": cell.spread, "values": list(cell.values), "stderr": cell.stderr,
                "low": found.low if found else None, "high": found.high if found else None,
            }  # fmt: skip
        swept = {"frontier": row.frontier, "point": dict(row.point)} if row.frontier else {}
        pareto = {"pareto": row.name in self.pareto} if self.frontier else {}
        cost = {key: list(values) for key, values in row.cost.items()}
        return {"arm": row.name, "group": row.group, **swept, **pareto, "cells": cells, "cost": cost}

    def to_csv(self) -> str:
        """The table as CSV: a row per arm, mean and spread of each column, mean costs, and whether it is on the Pareto front."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        costs, front = self.costs(), ["pareto"] if self.frontier else []
        writer.writerow(["arm", "group", *(name for c in self.columns for name in (c, f"{c}_spread")), *costs, *front])
        for row in self.rows:
            cells = [row.cells.get(c) for c in self.columns]
            numbers = [n for cell in cells for n in ((cell.mean, cell.spread) if cell else (None, None))]
            numbers += [statistics.fmean(row.cost[key]) if key in row.cost else None for key in costs]
            marks = [str(int(row.name in self.pareto))] if front else []
            writer.writerow([row.name, row.group, *("" if n is None else n for n in numbers), *marks])
        return text.getvalue()

    def to_markdown(self) -> str:
        """The table as Markdown, the best of each column in bold, with the sentences and the differences below."""
        costs = self.shown_costs()
        head = ["arm", *(f"{escape_markdown(c)}{ARROWS[self.better[c]]}" for c in self.columns), *costs]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in self.rows:
            cells = [self._marked(row, c) for c in self.columns] + [texts[row.name] for texts in costs.values()]
            mark = f"{PARETO} " if row.name in self.pareto else ""
            lines.append(f"| {mark}{escape_markdown(row.name)} | {' | '.join(cells)} |")
        if len(self.seeds) > 1:
            lines += ["", f"Mean ± standard deviation over seeds {', '.join(map(str, self.seeds))}."]
        lines += ["", *(f"- {escape_markdown(verdict)}" for verdict in self.verdicts())]
        for rival, found in self.against.items():
            columns = list(dict.fromkeys(d.column for mine in found.values() for d in mine))
            lines += ["", f"Differences from {escape_markdown(rival)}, with 95 % intervals:", ""]
            headings = (f"{escape_markdown(c)}{ARROWS[self.better[c]]}" for c in columns)
            lines += [f"| arm | {' | '.join(headings)} |", f"|{'---|' * (len(columns) + 1)}"]
            for name, mine in found.items():
                texts = {d.column: f"**{d}**" if d.verdict else str(d) for d in mine}
                lines.append(f"| {escape_markdown(name)} | {' | '.join(texts.get(c, '') for c in columns)} |")
        return "\n".join(lines).rstrip() + "\n"

    def _marked(self, row: Row, column: str) -> str:
        cell = row.cells.get(column)
        if cell is None:
            return ""
        return f"**{cell}**" if cell.mean == self.best(column) else str(cell)

    def write(self, folder: Path) -> None:
        """Write `table.md`, `.csv`, `.json`, `.html` and `frontier.png`; remove them when nothing was evaluated."""
        as_json = json.dumps(self.to_json(), indent=2) + "\n"
        texts = {"md": self.to_markdown(), "csv": self.to_csv(), "json": as_json, "html": page(self)}
        write_picture(self, folder)
        for suffix, text in texts.items():
            path = folder / f"table.{suffix}"
            if self.rows:
                path.write_text(text, encoding="utf-8")
            else:
                path.unlink(missing_ok=True)


def _kind_of(spec: EvaluateSpec | None) -> Mapping[str, str]:
    return {name: of.kind for name, of in spec.metrics.items()} if spec else {}


def _samples(step: Step, kinds: Mapping[str, str]) -> Iterable[tuple[str, Sample]]:
    """The scores of a finished evaluation with their values by item."""
    assert step.out is not None
    with reading(step.out, "STATE", RunError, "remove it, and run again"):
        scores = json.loads(step.out.read_text(encoding="utf-8"))
    for column, score in scores.items():
        if score["value"] is not None:
            yield column, Sample(
                float(score["value"]), score.get("stderr"), tuple(score.get("rows") or ()),
                tuple(score.get("tokens") or ()), kinds.get(column) == "perplexity",
            )  # fmt: skip


def _costs(arms: Sequence[Arm], steps: Sequence[Step], state: State) -> dict[str, dict[str, tuple[float, ...]]]:
    """Seconds and tokens of all steps that each arm needs, by arm and kind of cost, per seed."""
    by_name = {step.name: step for step in steps}

    def needed(names: Iterable[str]) -> set[str]:
        return {name for one in names for name in {one, *needed(by_name[one].needs)}}

    found: dict[str, list[dict[str, float]]] = {}
    for arm in arms:
        mine = [(by_name[name].job, state.steps.get(name, {})) for name in sorted(needed(arm.needs))]
        trained = [record for job, record in mine if isinstance(job, Train)]
        tokens = [record.get("result", {}).get("tokens") for record in trained]
        # The seconds of training itself are counted over interruptions; those of the step also load the base.
        seconds = [record.get("result", {}).get("seconds") or record.get("seconds", 0.0) for record in trained]
        cost = {"train_seconds": sum(seconds)}
        if None not in tokens:
            cost["train_tokens"] = sum(tokens)
        cost["merge_seconds"] = sum(record.get("seconds", 0.0) for job, record in mine if isinstance(job, Merge))
        found.setdefault(arm.name, []).append(cost)
    return {
        name: {key: tuple(cost[key] for cost in costs) for key in costs[0] if all(key in cost for cost in costs)}
        for name, costs in found.items()
    }


def _direction(column: str, spec: EvaluateSpec | None) -> int:
    if column == SPARSITY:
        return 0
    kind = spec.metrics[column].kind if spec and column in spec.metrics else column
    return -1 if kind in LOWER_IS_BETTER else 1
