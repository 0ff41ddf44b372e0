"""`paft study`: seeds, resume, verdicts by intervals, and the pages of docs/studies/, which are made from results."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import docs_studies
import numpy as np
import pytest
import scipy.stats
from click.testing import CliRunner

from paft_merge.cli import cli
from paft_merge.errors import Problems, RecipeError, RunError
from paft_merge.pipeline import load_run
from paft_merge.pipeline.arms import merges_of
from paft_merge.pipeline.preflight import check_merge
from paft_merge.pipeline.steps import Planner
from paft_merge.recipe.yaml_source import dump_yaml
from paft_merge.studies import frozen_lake, run_study
from paft_merge.studies.frontiers import draw_frontiers, frontiers_of
from paft_merge.studies.pages import Results, _verdict, body, claims
from paft_merge.studies.plots import draw, plots_of
from paft_merge.studies.seed_intervals import Interval, interval_of
from paft_merge.studies.seeds import _each_said_once, _kept, _Tuned
from paft_merge.studies.study import Metric, folders, known_studies, load_study

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


def test_what_is_said_of_many_trainings_is_said_once(caplog):
    with _each_said_once():
        for name in ("sft", "dpo", "ift"):
            logging.getLogger("paft_merge.training.job").warning("%s: 995 rows are cut", name)
        logging.getLogger("paft_merge.training.job").warning("dpo: another thing")
        for _ in range(2):
            logging.getLogger("paft_merge.evaluating.light").warning("text: no answer ended")
    assert caplog.messages == ["sft: 995 rows are cut", "dpo: another thing", *["text: no answer ended"] * 2]


def edited(text: str, change: str) -> str:
    """The record of a seed with a fault."""
    record = json.loads(text)
    rows = record["tables"]["solid ice, untrained start"]
    if change == "cut":
        return text[: len(text) // 2]
    if change in record:
        del record[change]
    elif change == "other seed":
        record["seed"] = 0
    elif change == "row":
        del rows["start"]
    elif change == "metric":
        rows["start"]["more"] = 1.0
    else:
        rows["start"]["mse"] = json.loads(change)
    return json.dumps(record)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("cut", "1\\.json: "), ("seconds", "is damaged at seconds: Field required"), ("tables", "is damaged at tables"),
        ("other seed", "has the numbers of seed 0"), ("row", "has no number for solid ice, untrained start: start: kl, unlike seed 0"),
        ("metric", "has a number for solid ice, untrained start: start: more, unlike seed 0"),
        ("NaN", "is damaged at tables.*start.mse: Input should be a finite number"), ('"0.1"', "is damaged at tables"),
        ("null", "is damaged at tables"), ("[1.0]", "is damaged at tables"),
    ],
)  # fmt: skip
def test_a_damaged_seed_is_refused(done, tmp_path, change, expected):
    shutil.copytree(done[0], tmp_path / "out")
    seed = tmp_path / "out" / "seeds" / "1.json"
    seed.write_text(edited(seed.read_text(), change))
    with pytest.raises(RunError, match=f"{expected}.*; remove it; that part is then run again"):
        lake(tmp_path / "out")


def test_results_of_before_a_file_had_a_digest_are_continued(tmp_path):
    (tmp_path / "0.json").write_text(json.dumps({"data": {"model.safetensors": "a"}, "seconds": 1.0, "settings": {}}))
    assert _kept(tmp_path / "0.json", {"data": {"model.safetensors": "a", "config.json": "b"}}, _Tuned) is not None
    with pytest.raises(RunError, match=r"has results with data\.model\.safetensors 'a' instead of 'c'"):
        _kept(tmp_path / "0.json", {"data": {"model.safetensors": "c", "config.json": "b"}}, _Tuned)


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
        likely__on=[a + b for a, b in zip(offline, reversed(noise), strict=True)], likely__off=offline,
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


def test_a_difference_without_spread_has_no_interval():
    same = planted(unlikely__on=[0.5] * 3, unlikely__off=[0.25] * 3, likely__on=[0.5] * 3, likely__off=[0.5] * 3)
    found = [verdict for _, *verdicts in claims(load_study("on-policy").definition, same) for verdict in verdicts]
    assert (
        found[0] == "DPO: **the same in every seed, which gives no interval**; 0.500 against 0.250, difference +0.250"
    )
    assert found[1].startswith("DPO: **no difference is shown**; 0.500 against 0.500, difference 0.000")
    added = _verdict(Metric(title="x", better="higher"), [[0.1] * 3, [0.2] * 3], [[0.3] * 3, [0.0] * 3])
    assert added.startswith("**no difference is shown**"), "0.1 + 0.2 is more than 0.3 only by rounding"


def test_tables_that_the_definition_does_not_name_have_claims_and_a_table():
    rows = {
        name: {"skill": [v, v + 0.1, v + 0.05], "text": [5.0, 5.1, 5.2]}
        for name, v in (("sft (dense)", 0.5), ("sequential (dense)", 0.1))
    }
    given = {"seeds": [0, 1, 2], "seconds": 1, "smoke": False, "versions": {"torch": "x"}}
    shown = body(load_study("paft-small").definition, Results({**given, "tables": {"weak": rows, "mine": rows}}))
    [claim] = [part for part in shown.split("\n\n**") if part.startswith("The sequence forgets skill")]
    assert [line[: len("- weak: **the same")] for line in claim.splitlines()[2:4]] == [
        "- weak: **the same",
        "- mine: **the same",
    ]
    assert "### mine\n\n| | skill | perplexity of the retained text |\n" in shown
    assert "win rate" not in shown, "columns without a number are left out"


def test_a_page_of_two_seeds_says_that_it_has_no_finding(done):
    definition = load_study("frozen-lake").definition
    shown = body(definition, Results(json.loads((done[0] / "results.json").read_text())))
    assert "Fewer than 3 seeds have no interval, so nothing here is a finding." in shown
    assert "The ± of a number" not in shown


# --- definitions and pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_studies())
def test_a_definition_names_rows_that_its_study_has(name, tmp_path):
    study = load_study(name)
    if name not in docs_studies.NAMES:
        pytest.skip("no committed results")
    results, definition = docs_studies.results(name), study.definition
    here = results.data["tables"]  # a definition may have tables of parameters that are not the default
    for claim in definition.claims:
        for each in claim.each:
            cells = [*claim.cells("plus", each), *claim.cells("minus", each)]
            assert all(results.has(c, claim.metric) for c in cells if c[0] in here)
    for spec in definition.tables:
        assert all(results.has((t, row), spec.metrics[0]) for t in spec.tables if t in here for row in spec.rows)
    assert set(here) <= {t for spec in definition.tables for t in spec.tables}
    for plot in plots_of(definition, results):
        assert all(results.has(cell, plot.metric) for cell in plot.cells())
    for picture in (*plots_of(definition, results), *frontiers_of(definition, results)):
        assert (docs_studies.FOLDER / f"{name}-{picture.name}.svg").is_file()


def test_the_reward_that_is_not_measured_by_default_has_a_table_claims_and_a_plot_too(tmp_path):
    definition, data = load_study("on-policy-lm").definition, docs_studies.results("on-policy-lm").data
    results = Results({**data, "tables": {"length": data["tables"]["valence"]}})
    shown = body(definition, results)
    assert "### Reward: length" in shown
    assert shown.count("- length: **") == len(definition.claims)
    assert [spec.name for spec in plots_of(definition, results)] == ["length"]


@pytest.mark.parametrize("name", ["paft-small", "paft-small-l1"])
def test_a_definition_names_arms_that_its_recipe_has(name, tmp_path):
    study = load_study(name)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml({"base_model": "base", "seeds": [0], **study.parameters.recipe}))
    recipe, problems = load_run(file), Problems()
    arms = {arm.name for arm in Planner.plan(recipe, tmp_path / "run").arms}
    for merge in merges_of(recipe):
        check_merge(recipe, merge.written, merge.steps, problems)
    assert [problem for problem in problems.found if problem.code != "MODEL"] == []
    definition = study.definition
    named = {row for claim in definition.claims for each in claim.each
             for side in ("plus", "minus") for _, row in claim.cells(side, each)}  # fmt: skip
    named |= {row for spec in definition.tables for row in spec.rows}
    named |= {row for spec in definition.frontiers for points in spec.lines.values() for row in points.values()}
    assert named <= arms, sorted(named - arms)
    assert {table for claim in definition.claims for each in claim.each for table, _ in claim.cells("plus", each)} <= {
        *study.parameters.settings
    }


@pytest.mark.parametrize("name", docs_studies.NAMES)
def test_committed_results_are_those_of_the_definition(name):
    study, data = load_study(name), docs_studies.results(name).data
    assert data["parameters"] == study.expected()
    assert (data["study"], data["smoke"], data["seeds"]) == (name, False, list(range(study.definition.seeds)))


@pytest.mark.parametrize("name", known_studies())
def test_pages_are_made_from_the_committed_results(name):
    assert docs_studies.page(name) == (docs_studies.FOLDER / f"{name}.md").read_text(), (
        "run python tools/docs_studies.py"
    )


def test_the_index_and_the_page_of_a_study_say_that_it_was_not_run():
    rows = (docs_studies.FOLDER / "index.md").read_text().splitlines()
    for name in known_studies():
        [row] = [row for row in rows if row.startswith(f"| [`{name}`]({name}.md)")]
        assert (
            ("not run yet" in row)
            == (docs_studies.NOT_RUN in docs_studies.page(name))
            == (name not in docs_studies.NAMES)
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
    shown = [(tmp_path / file).read_text() for _, file in pictures]
    assert shown
    assert not [text for text in shown if "mathdefault" in text]


# --- frontiers ----------------------------------------------------------------------------------------------------------


def measured(skill: float, win: float, text: float, seeds: int) -> dict[str, list[float]]:
    spread = [0.02 * (seed - 1) for seed in range(seeds)]
    return {"skill": [skill + s for s in spread], "win": [win + s for s in spread], "text": [text] * seeds}


def of_runs(seeds: int = 3) -> Results:
    """Results of the form of paft-small, in which one merge is better than another on both axes."""
    rows = {
        "base": measured(0.0, 0.5, 5.0, seeds), "sft (dense)": measured(0.7, 0.5, 6.0, seeds),
        "sequential (dense)": measured(0.4, 0.9, 9.0, seeds), "sequential beta=0.3 (dense)": measured(0.5, 0.8, 8.0, seeds),
        "sequential beta=0.5 (dense)": measured(0.55, 0.7, 8.0, seeds),
        **{f"parallel {m} weight={w} (dense)": measured(s - w / 4, 0.5 + w / 4, 7.0, seeds)
           for m, s in (("ties", 0.7), ("task_arithmetic", 0.9)) for w in (0.5, 1)},
        "sft (l1)": measured(0.6, 0.5, 6.0, seeds),
    }  # fmt: skip
    recipe = {"compare": {"frontier": ["skill", "win", "text"]}}
    return Results({"parameters": {"recipe": recipe}, "tables": {"weak": rows}, "seeds": list(range(seeds))})


def test_a_study_of_runs_has_the_frontiers_that_its_recipe_names():
    dense, sparse = frontiers_of(load_study("paft-small").definition, of_runs())
    assert (dense.name, dense.title, dense.x, dense.y, dense.shade) == (
        "frontier-weak-dense", "Frontiers: weak, dense", "skill", "win", "text",
    )  # fmt: skip
    assert dense.lines == {
        "base": {"base": "base"}, "sft": {"sft": "sft (dense)"}, "sequential": {"sequential": "sequential (dense)"},
        "sequential, beta": {w: f"sequential beta={w} (dense)" for w in ("0.3", "0.5")},
        "ties, weight": {w: f"parallel ties weight={w} (dense)" for w in ("0.5", "1")},
        "task_arithmetic, weight": {w: f"parallel task_arithmetic weight={w} (dense)" for w in ("0.5", "1")},
    }  # fmt: skip
    assert sparse.lines == {"base": {"base": "base"}, "sft": {"sft": "sft (l1)"}}


def test_a_frontier_shows_models_intervals_and_the_models_that_none_beats(tmp_path):
    definition = load_study("paft-small").definition
    (_, file), _ = draw_frontiers(definition, of_runs(), tmp_path)
    drawn = (tmp_path / file).read_text()
    assert drawn.count("<title>") == 9
    assert drawn.count('class="whisker"') == 18
    assert drawn.count(' ring"') + drawn.count('"ring"') == 4, "task arithmetic twice, SFT alone, and the sequence"
    assert "skill, % ↑" in drawn
    assert {shape for shape in ("<circle", "<polygon") if shape in drawn} == {"<circle", "<polygon"}
    assert "parallel ties weight=0.5 (dense): skill, % 57.500" in drawn
    draw_frontiers(definition, of_runs(seeds=2), tmp_path)
    assert 'whisker"/>' not in (tmp_path / file).read_text(), "two seeds have no interval"
    shown = body(
        definition,
        Results({**of_runs().data, "seconds": 1, "smoke": False, "versions": {"torch": "x"}}),
        (),
        [("T", file)],
    )
    assert shown.index("### Frontiers") < shown.index(f"![T]({file})") < shown.index("### Claims")
    assert "| parallel ties weight=0.5 (dense) | 57.5 %" in shown, "a table without a list of rows has all rows"
