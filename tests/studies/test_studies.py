"""`paft study`: seeds, resume, verdicts by intervals, and the pages of docs/studies/, which are made from results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import docs_studies
import numpy as np
import pytest
import scipy.stats
from click.testing import CliRunner

from paft_merge.cli import cli
from paft_merge.errors import RecipeError, RunError
from paft_merge.studies import frozen_lake, run_study
from paft_merge.studies.pages import Results, body, claims
from paft_merge.studies.plots import draw
from paft_merge.studies.seed_intervals import Interval, interval_of
from paft_merge.studies.study import folders, known_studies, load_study

FAST = ("starts={untrained: 0}", "target_steps=3", "steps=[1, 2]", "variants={IFT: {lambda: 0.2}}")


def lake(out: Path, seeds: int = 2, *overrides: str):
    return run_study("frozen-lake", out, seeds=seeds, smoke=True, overrides=(*FAST, *overrides))


def tables(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["tables"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "out"
    return out, lake(out)


def test_a_second_run_gives_the_same_numbers(done, tmp_path):
    lake(tmp_path / "again")
    assert tables(tmp_path / "again") == tables(done[0])
    assert (tmp_path / "again/frozen-lake-mse.svg").read_bytes() == (done[0] / "frozen-lake-mse.svg").read_bytes()


def test_finished_seeds_are_kept_and_further_ones_are_added(done, monkeypatch):
    out, first = done
    before, ran = tables(out), []
    own = frozen_lake.run_seed
    monkeypatch.setattr(frozen_lake, "run_seed", lambda spec, seed, *more: ran.append(seed) or own(spec, seed, *more))
    assert (first.ran, lake(out).ran, lake(out, 3).ran) == (2, 0, 1)
    assert ran == [2]
    row = tables(out)["solid ice, untrained start"]["IFT, step 2"]["mse"]
    assert row[:2] == before["solid ice, untrained start"]["IFT, step 2"]["mse"]
    assert len(set(row)) == 3


def test_results_of_other_parameters_are_not_mixed_in(done):
    with pytest.raises(RunError, match=r"has results with parameters\.learning_rate 0\.01 instead of 0\.02; choose"):
        lake(done[0], 2, "learning_rate=0.02")


def test_a_damaged_seed_is_refused(tmp_path):
    lake(tmp_path, 1)
    (tmp_path / "seeds" / "0.json").write_text("{")
    with pytest.raises(RunError, match=r"0\.json: .*; remove it; that part is then run again"):
        lake(tmp_path, 1)


@pytest.mark.parametrize("override", ["learning_rat=0.1", "hidden=many", "ice=[wet]", "steps=[]", "hidden=0"])
def test_a_wrong_parameter_is_refused(override, tmp_path):
    with pytest.raises(RecipeError):
        lake(tmp_path, 1, override)


@pytest.mark.parametrize(
    "override", ["batch=15", "samples=5", "group=1", "peaks={off: 100}", "mixing=[2]", "strengths={DPO: [1]}"]
)
def test_a_wrong_parameter_of_the_bandit_is_refused(override):
    with pytest.raises(RecipeError):
        load_study("on-policy", overrides=[override])


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    """It would give a verdict: no comparison with NaN is true."""
    with pytest.raises(
        RunError, match=r"seed 0: solid ice, untrained start: .*: mse is (nan|inf); lower the learning rate"
    ):
        lake(tmp_path, 1, "learning_rate=1e30")


def test_a_definition_with_an_unknown_metric_is_refused(tmp_path):
    text = (folders()[0] / "on-policy.yaml").read_text().replace("metric: reward,", "metric: rewards,", 1)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"there is no metric 'rewards'; did you mean 'reward'"):
        load_study(str(tmp_path / "own.yaml"))


def test_unknown_studies_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(RunError, match="frozen-lak: there is no such study; did you mean 'frozen-lake'"):
        run_study("frozen-lak", tmp_path)
    (tmp_path / "own.yaml").write_text(
        "study: other\ntitle: x\nclaim_of: x\nseeds: 1\nmetrics: {}\ntables: []\nclaims: []\n"
    )
    with pytest.raises(RunError, match=r"own.yaml:1: study: there is no study 'other'; known: frozen-lake"):
        run_study(str(tmp_path / "own.yaml"), tmp_path / "out")


def test_the_command_prints_the_claims_and_the_page(done):
    words = [word for override in FAST for word in ("--set", override)]
    result = CliRunner().invoke(cli, ["study", "frozen-lake", "--out", str(done[0]), "--seeds", "2", "--smoke", *words])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{done[0] / 'frozen-lake.md'}\n"
    assert "IFT comes nearer to the optimal network than SFT (MSE of parameters)." in result.stderr
    assert "fewer than 3 seeds show nothing" in result.stderr


# --- verdicts -----------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_t_test():
    values = np.random.default_rng(1).normal(2, 1, 6)
    found, known = interval_of(values.tolist()), scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((known.low, known.high))


def test_few_seeds_have_no_interval():
    assert interval_of([1.0, 2.0]) == Interval(1.5, -math.inf, math.inf)
    assert interval_of([1.0] * 3).known


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (0.1, 0.2, "higher", "holds"), (0.1, 0.2, "lower", "the opposite holds"), (-0.2, -0.1, "lower", "holds"),
        (-0.2, -0.1, "higher", "the opposite holds"), (-0.1, 0.1, "higher", "no difference is shown"),
        (0.0, 0.0, "higher", "no difference is shown"),
    ],
)  # fmt: skip
def test_a_verdict_needs_an_interval_without_zero(low, high, better, verdict):
    assert Interval((low + high) / 2, low, high).verdict(better) == verdict


def planted(**rows: list[float]) -> Results:
    """Results of the on-policy study's form, with some rows of two tables."""
    found = {"peak unlikely": {}, "peak likely": {}}
    for name, values in rows.items():
        table, row = name.split("__")
        found[f"peak {table}"][f"DPO, mixing {1 if row == 'off' else 0}, reuse 4"] = {"reward": values}
    count = len(next(iter(rows.values())))
    return Results(
        {"tables": found, "seeds": list(range(count)), "seconds": 1, "smoke": False, "versions": {"torch": "x"}}
    )


def test_verdicts_are_paired_within_seeds_and_worded_by_the_interval():
    offline = [0.1, 0.5, 0.2, 0.8, 0.4, 0.9]  # the spread over seeds is far larger than the difference
    noise = [0.001, -0.001, 0.002, 0.0, -0.002, 0.001]
    results = planted(
        unlikely__on=[a + 0.05 + b for a, b in zip(offline, noise, strict=True)], unlikely__off=offline,
        likely__on=[a + b for a, b in zip(offline, noise, strict=True)], likely__off=offline,
    )  # fmt: skip
    found = {head.split("**")[1]: verdicts for head, *verdicts in claims(load_study("on-policy").definition, results)}
    assert len(found) == 3  # claims about rows that are not there are left out
    first = "On-policy samples are better than samples of the reference, peak "
    assert found[f"{first}unlikely"][0].startswith(
        "DPO: **holds**; 0.533 against 0.483, difference +0.050, 95 % interval +0.049"
    )
    assert found[f"{first}likely"][0].startswith("DPO: **no difference is shown**; 0.483 against 0.483")
    gain = found["On-policy samples help more where the peak is unlikely than where it is likely"]
    assert gain[0].startswith("DPO: **holds**; a change of +0.050 against one of +0.000, difference +0.050")


# --- definitions and pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_studies())
def test_a_definition_names_rows_that_its_study_has(name, tmp_path):
    study = load_study(name)
    if name not in docs_studies.NAMES:
        pytest.skip("no committed results")
    results, definition = docs_studies.results(name), study.definition
    for claim in definition.claims:
        for each in claim.each:
            assert all(results.has(c, claim.metric) for c in (*claim.cells("plus", each), *claim.cells("minus", each)))
    for spec in definition.tables:
        assert all(results.has((t, row), spec.metrics[0]) for t in spec.tables for row in spec.rows)
    for plot in definition.plots:
        assert all(results.has(cell, plot.metric) for cell in plot.cells())
        assert (docs_studies.FOLDER / f"{name}-{plot.name}.svg").is_file()


@pytest.mark.parametrize("name", docs_studies.NAMES)
def test_committed_results_are_those_of_the_definition(name):
    study, data = load_study(name), docs_studies.results(name).data
    assert data["parameters"] == study.expected()
    assert (data["study"], data["smoke"], data["seeds"]) == (name, False, list(range(study.definition.seeds)))


@pytest.mark.parametrize("name", docs_studies.NAMES)
def test_pages_are_made_from_the_committed_results(name):
    assert docs_studies.page(name) == (docs_studies.FOLDER / f"{name}.md").read_text(), (
        "run python tools/docs_studies.py"
    )


def test_a_page_shows_every_row_of_its_tables(done):
    definition = load_study("frozen-lake").definition
    shown = body(definition, Results(json.loads((done[0] / "results.json").read_text())), [])
    rows = {definition.labels.get(row, row) for row in ("start", "IFT, nearest", "SFT, nearest", "optimal network")}
    assert all(f"| {row} |" in shown for row in rows)
    assert "This is the smoke form" in shown


def test_a_logarithmic_axis_has_numbers_and_not_formulas(done, tmp_path):
    study = load_study("frozen-lake", smoke=True, overrides=FAST)
    pictures = draw(study.definition, Results(json.loads((done[0] / "results.json").read_text())), tmp_path)
    shown = [(tmp_path / file).read_text() for spec, file in pictures if spec.log_x]
    assert shown
    assert not [text for text in shown if "mathdefault" in text]
