"""The table of a run as text: escaped for Markdown, and short in a notebook."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from paft_merge.auditing.report.svg import draw
from paft_merge.evaluating.light import Score
from paft_merge.pipeline import Run
from paft_merge.pipeline.results_page import frontier_figure, page
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


POINTS = ((0.5, 0.9, 0.1, 2.0), (1, 0.8, 0.5, 3.0), (2, 0.7, 0.4, 9.0))
"""Weights, with a skill, a happiness and a perplexity."""


def scores(**values: float) -> dict[str, Cell]:
    """Cells with a standard error of 0.01."""
    return {name: Cell((value,), 0.01) for name, value in values.items()}


SWEPT = Table(
    ("skill", "happy", "text"),
    (
        *(
            Row(f"{HOSTILE} {w}", "parallel", scores(skill=s, happy=h, text=t), HOSTILE, {"weight": w},
                {"train_seconds": (12.0,), "train_tokens": (3_456_789,)})
            for w, s, h, t in POINTS
        ),
        Row("sequential", "sequential", scores(skill=0.8, happy=0.5)),
    ),
    (), {"skill": 1, "happy": 1, "text": -1}, ("skill", "happy", "text"),
)  # fmt: skip
"""A frontier, and an arm with the means of one of its points."""


def test_the_page_shows_every_name_as_text_and_loads_nothing() -> None:
    for made, shown in ((SWEPT, SWEPT._repr_html_()), (SWEPT, page(SWEPT)), (TABLE, page(TABLE))):
        assert "<script" not in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "&lt;script&gt;|a" in shown
        assert "{{7*7}}" in shown, "not computed"
        assert not re.search(r"(href|src)=|url\(|@import|https?://", shown.replace("http://www.w3.org", ""))
        outside = [tag for tag in re.findall(r"<(\w+)", shown) if tag in ("script", "link", "img", "iframe", "d")]
        assert outside == []
        assert all(column in shown for column in made.columns[:1])
    whole = page(SWEPT)
    assert whole.lstrip().startswith("<!doctype html>")
    assert "prefers-color-scheme:dark" in whole
    assert "@media print" in whole
    assert "<!doctype" not in SWEPT._repr_html_()
    # JupyterLab's dark theme colours tables and their rows itself.
    assert ".paft tbody tr:nth-child(n),.paft tbody tr:hover{background:none}" in SWEPT._repr_html_()
    assert re.search(r"\.paft table\{[^}]*color:var\(--ink\)", SWEPT._repr_html_())
    done = Run(Path("<b>"), SWEPT, ())._repr_html_()
    assert done.startswith("<p>&lt;b&gt;: 0 steps done</p>")


def test_the_picture_has_a_mark_a_label_and_whiskers_for_every_arm() -> None:
    figure = frontier_figure(SWEPT)
    assert figure is not None
    assert [(name, [spot.label for spot in mine]) for name, mine in figure.series] == [
        (HOSTILE, ["0.5", "1", "2"]), ("", ["sequential"]),
    ]  # fmt: skip
    spots = [spot for _, mine in figure.series for spot in mine]
    assert [spot.shade for spot in spots] == [1.0, pytest.approx(6 / 7), 0.0, None], "less is better, so darker"
    assert [spot.ringed for spot in spots] == [True, True, False, True]
    low, high = spots[0].x_band or (0, 0)
    assert (low, high) == (pytest.approx(0.9 - 0.0196, abs=0.002), pytest.approx(0.9 + 0.0196, abs=0.002))
    drawn = draw(figure)
    assert drawn.count('class="whisker"') == 8
    assert drawn.count("ring") == 3
    assert all(f">{label}</text>" in drawn for label in ("0.5", "sequential"))
    assert frontier_figure(TABLE) is None
    assert frontier_figure(replace(SWEPT, frontier=("skill", "lost"))) is None


def test_one_arm_far_off_does_not_take_the_shades_of_the_others() -> None:
    values = {"a": 5.0, "b": 6.0, "c": 7.0, "d": 8.0, "far": 1e5}
    cells = {name: {"skill": Cell((0.5,)), "happy": Cell((0.5,)), "text": Cell((v,))} for name, v in values.items()}
    rows = tuple(replace(SWEPT.rows[-1], name=name, cells=one) for name, one in cells.items())
    figure = frontier_figure(replace(SWEPT, rows=rows))
    assert figure is not None
    shades = {spot.label: spot.shade for _, mine in figure.series for spot in mine}
    assert shades == {"a": 1.0, "b": pytest.approx(2 / 3), "c": pytest.approx(1 / 3), "d": 0.0, "far": 0.0}
    assert figure.shade_ends == ("8 or worse", "5")


@pytest.mark.parametrize("many", [1, 2, 40])
def test_a_picture_of_equal_or_many_points_can_be_drawn(many: int, tmp_path: Path) -> None:
    cells = {"skill": Cell((0.5,)), "happy": Cell((0.5,))}
    rows = tuple(Row(f"arm {at}", "parallel", cells) for at in range(many))
    Table(("skill", "happy"), rows, (), {"skill": 1, "happy": 1}, ("skill", "happy")).write(tmp_path)
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    Table((), (), (), {}).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_pareto_front_is_marked_in_every_file() -> None:
    lines = [line for line in SWEPT.to_markdown().splitlines() if line.startswith("| ")]
    assert [line.startswith("| ◆ ") for line in lines[1:5]] == [True, True, False, True]
    assert [row["pareto"] for row in SWEPT.to_json()["rows"]] == [True, True, False, True]
    rows = list(csv.reader(io.StringIO(SWEPT.to_csv())))
    assert rows[0][-3:] == ["train_seconds", "train_tokens", "pareto"]
    assert [row[-3:] for row in rows[1:]] == [["12.0", "3456789.0", m] for m in "110"] + [["", "", "1"]]
    assert "pareto" not in TABLE.to_csv()
    assert "◆" not in TABLE.to_markdown()


def test_costs_are_short_in_the_table_and_whole_in_the_files() -> None:
    lines = SWEPT.to_markdown().splitlines()
    assert lines[0].endswith("| trained, s | trained, tokens |")
    assert lines[2].endswith("| 12 | 3.46M |")
    assert lines[5].endswith("|  |  |"), "an arm whose cost is not known"
    assert SWEPT.to_json()["rows"][0]["cost"] == {"train_seconds": [12.0], "train_tokens": [3456789]}


def test_the_files_have_every_difference_with_its_interval() -> None:
    found = SWEPT.to_json()["differences"]
    assert [(d["metric"], d["verdict"]) for d in found] == [
        ("skill", "better"), ("happy", "worse"), ("skill", "not told apart"), ("happy", "not told apart"),
        ("skill", "worse"), ("happy", "worse"),
    ]  # fmt: skip
    assert all(d["low"] < d["difference"] < d["high"] for d in found)
    head = SWEPT.to_markdown().index("Differences from sequential, with 95 % intervals:")
    assert "| **+0.100 (+0.0" in SWEPT.to_markdown()[head:]


def test_a_score_is_shown_without_its_rows() -> None:
    assert repr(Score(0.5, None, (0.0,) * 1000, ("text",) * 1000)) == "Score(value=0.5, stderr=None, warning='')"


def test_a_search_is_shown_without_its_trials() -> None:
    trial = Trial(1, 0.5, {"parameters.density": 0.2}, {"skill": 0.5})
    assert len(repr(TuneResult(trial, (trial,) * 1000, Path("best.yaml")))) < 300
