"""The table of a run as text: escaped for Markdown, and short in a notebook."""

from __future__ import annotations

from pathlib import Path

from paft_merge.evaluating.light import Score
from paft_merge.pipeline import Run
from paft_merge.pipeline.results_table import Cell, Row, Table
from paft_merge.pipeline.tuning import Trial, TuneResult

HOSTILE = "<script>|a\n\x1b[31m\u202e *b* `c` [d](e) $x$ {{7*7}}"
TABLE = Table(
    ("dare_ties", HOSTILE),
    (
        Row("parallel dare_ties", "parallel", {"dare_ties": Cell((0.5,)), HOSTILE: Cell((0.25,))}),
        Row(HOSTILE, "merge", {"dare_ties": Cell((1.0,))}),
    ),
    (),
    {"dare_ties": 1, HOSTILE: 0},
)


def test_names_cannot_write_into_the_markdown_of_a_table() -> None:
    shown = "&lt;script&gt;\\|a \\x1b\\[31m\\u202e \\*b\\* \\`c\\` \\[d\\](e) \\$x\\$ \\{\\{7\\*7\\}\\}"
    shown = shown.replace("\\x1b", "\\\\x1b").replace("\\u202e", "\\\\u202e")
    assert TABLE.to_markdown().splitlines() == [
        f"| arm | dare_ties ↑ | {shown} |",
        "|---|---|---|",
        "| parallel dare_ties | 0.500 | 0.250 |",
        f"| {shown} | **1.000** |  |",
    ]


def test_names_cannot_write_into_the_verdicts_of_a_table() -> None:
    rows = (Row("a", "merge", {"s": Cell((0.1,))}), Row(HOSTILE, "sequential", {"s": Cell((0.9,))}))
    told = [line for line in Table(("s",), rows, (), {"s": 1}).to_markdown().splitlines() if line.startswith("- ")]
    assert told[0].startswith("- merges against &lt;script&gt;\\|a ")


def test_a_notebook_and_print_show_the_table_and_repr_one_line() -> None:
    assert str(TABLE) == TABLE._repr_markdown_() == TABLE.to_markdown()
    assert repr(TABLE) == "Table(2 arms, 2 columns)"
    done = Run(Path("a|b"), TABLE, ("merge/merged",))
    assert done._repr_markdown_() == f"a\\|b: 1 step done\n\n{TABLE.to_markdown()}"
    assert len(repr(done)) < 120


def test_a_score_is_shown_without_its_rows() -> None:
    assert repr(Score(0.5, None, (0.0,) * 1000, ("text",) * 1000)) == "Score(value=0.5, stderr=None, warning='')"


def test_a_search_is_shown_without_its_trials() -> None:
    trial = Trial(1, 0.5, {"parameters.density": 0.2}, {"skill": 0.5})
    assert len(repr(TuneResult(trial, (trial,) * 1000, Path("best.yaml")))) < 300
