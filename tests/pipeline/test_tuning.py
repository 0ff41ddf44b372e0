"""`paft tune`: trials are merges that were made and judged, a search goes on where it was, and the winner is a recipe."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from toys.run import Killed, make_world, sections
from toys.train import THEIR_WARNINGS

from paft_merge.cli import cli
from paft_merge.errors import RecipeError
from paft_merge.pipeline import run, tuning
from paft_merge.pipeline.execution import Event
from paft_merge.pipeline.search_plot import plot
from paft_merge.pipeline.search_result import terms
from paft_merge.pipeline.search_space import Dimension
from paft_merge.pipeline.tuning import Trial, tune

pytestmark = [THEIR_WARNINGS, pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")]

SPACE = {
    "models[1].parameters.weight": [0.0, 4.0],
    "parameters.trim.l1_mass": [0.5, 1.0],
    "parameters.rescale": ["l1", "none"],
}
TUNE = {"metric": "text", "space": SPACE, "trials": 4, "startup_trials": 2, "seed": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a search whose adapters are trained strongly enough to matter."""
    adapters = sections()["adapters"]
    for adapter in adapters.values():
        adapter["training"] = {**adapter["training"], "learning_rate": 2e-2, "max_steps": 3}
    evaluate = {"metrics": {key: sections()["evaluate"]["metrics"][key] for key in ("pairs", "text")}}
    return make_world(tmp_path_factory.mktemp("world"), adapters=adapters, evaluate=evaluate, tune=TUNE)


STARTED: list[Event] = []
"""Of the search in `searched`."""


@pytest.fixture(scope="module")
def searched(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search that was killed once in its third trial."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    merges, real = iter(range(1, 100)), tuning.try_merge

    def dies(*given):
        if next(merges) == 3:
            raise Killed
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "try_merge", dies)
        with pytest.raises(Killed):
            tune(world, folder, on_event=STARTED.append)
    tune(world, folder, on_event=STARTED.append)
    return folder


def test_events_are_the_steps_of_training_and_the_starts_of_trials(searched: Path) -> None:
    steps = list(dict.fromkeys(event.step for event in STARTED))
    assert steps == ["train/sft", "train/dpo", *(f"trial {i}/4" for i in (1, 2, 3, 4))]
    assert [event.step for event in STARTED if event.what == "done"] == ["train/sft", "train/dpo"]


def test_a_killed_search_goes_on_with_the_trials_it_has(world: Path, searched: Path) -> None:
    rows = list(csv.DictReader((searched / "trials.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["1", "2", "3", "4"], "the one that was killed does not count"
    assert rows[0]["models[1].parameters.weight"] == "0.5", "the recipe as it is"
    assert rows[0]["parameters.trim.l1_mass"] == "null", "which leaves this one to its default"
    assert len({row["parameters.trim.l1_mass"] for row in rows}) == 4, "nothing is tried twice"
    told = []
    found = tune(world, searched, trials=5, progress=lambda trial, done, total: told.append((done, total)))
    assert told == [(5, 5)]
    assert len(found.trials) == 5
    assert tune(world, searched, trials=5).best == found.best


def test_the_winner_is_a_recipe_whose_run_gives_its_value(world: Path, searched: Path, tmp_path: Path) -> None:
    found = tune(world, searched)
    assert found.best.value == max(trial.value for trial in found.trials) == -found.best.scores["text"]
    assert not found.best.is_recipe
    best = yaml.safe_load((searched / "best.yaml").read_text())
    assert "tune" not in best
    assert best["merge"]["parameters"]["trim"]["l1_mass"] == found.best.parameters["parameters.trim.l1_mass"]
    assert best["merge"]["models"][1]["parameters"]["weight"] == found.best.parameters["models[1].parameters.weight"]
    recipe = world.with_name("best.yaml")
    recipe.write_text((searched / "best.yaml").read_text())
    done = run(recipe, searched)
    assert "train/sft" not in done.done, "the adapters of the search are those of the winner"
    assert done.table.rows[0].cells["text"].mean == pytest.approx(found.best.scores["text"], rel=1e-6)


def test_the_first_trial_is_the_recipe_as_it_is(world: Path, searched: Path, tmp_path: Path) -> None:
    first = tune(world, searched).trials[0]
    assert first.is_recipe
    done = run(world, searched, overrides=("tune=false",))
    assert done.table.rows[0].cells["text"].mean == pytest.approx(first.scores["text"], rel=1e-6)


def test_a_search_that_finds_nothing_better_says_so(world: Path, searched: Path) -> None:
    args = ["--set", "tune.space={'models[1].parameters.weight': [0.5]}", "--trials", "2"]
    done = CliRunner().invoke(cli, ["tune", str(world), str(searched), *args])
    assert done.exit_code == 0, done.output
    assert "trial 1/2: " in done.stderr
    assert "best of 2: trial 1, " in done.stderr
    assert "the recipe as it is; no other trial is better" in done.stderr
    text = (searched / "best.yaml").read_text()
    assert "trial 1 of 2, the recipe as it is, which no trial improves." in text
    assert yaml.safe_load(text)["merge"] == sections()["merge"]


def test_the_search_leaves_a_plot_and_no_scratch(searched: Path) -> None:
    assert (searched / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert not (searched / "scratch").exists()


def test_the_search_writes_a_log_of_its_trials(world: Path, searched: Path) -> None:
    trials = tune(world, searched).trials
    text = (searched / "logs" / "tune.log").read_text()
    assert [f"trial {i} of " in text for i, _ in enumerate(trials, 1)] == [True] * len(trials)


def test_another_space_is_another_search_in_the_same_storage(world: Path, searched: Path) -> None:
    narrower = ("tune.space={parameters.trim.l1_mass: [0.9, 1.0]}", "tune.trials=1")
    found = tune(world, searched, overrides=narrower)
    assert len(found.trials) == 1
    assert len(tune(world, searched).trials) >= 4


def test_the_command_tells_trials_and_prints_the_winner(world: Path, searched: Path) -> None:
    done = CliRunner().invoke(cli, ["tune", str(world), str(searched), "--trials", "6"])
    assert done.exit_code == 0, done.output
    assert "best of 6" in done.stderr
    assert done.stdout.strip() == str(searched / "best.yaml")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("tune.metric=txet", "tune.metric: there is no evaluation 'txet'; did you mean 'text'?"),
        (
            "tune.metric=pairs - 2 * text",
            "less of text counts as better already, so 'pairs - 2 * text' would seek more of it; add it: + 2 * text",
        ),
        ("tune.space={parameters.trim.l1_mass: [0.5, 3.0]}", "l1_mass"),
        (
            "tune.space={parameters.densty: [0.1, 0.2]}",
            "tune.space[\"parameters.densty\"]: unknown parameter densty; did you mean 'density'?",
        ),
        ("tune.space={merge.parameters.lambda: [0.1, 2]}", "a key is a path inside merge:; write parameters.lambda"),
        ("tune.space={'models[5].parameters.weight': [0, 1]}", "models is a list of 2"),
        ("tune.space={parameters.lambda: [2.0, 1.0]}", "2.0 is not below 1.0"),
        ("tune.space={parameters.lambda: [0.0, 1.0, log]}", "a logarithmic range starts above 0"),
        ("tune.space={}", "tune.space"),
        ("tune=false", "has no section tune"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_training(
    change: str, expected: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        tune(world, tmp_path / "run", overrides=(change,))
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_metric_may_be_a_sum() -> None:
    assert terms("skill + 0.1 * happy") == {"skill": 1.0, "happy": 0.1}
    assert terms("skill - 2*text") == {"skill": 1.0, "text": -2.0}
    assert terms("skill - text") == {"skill": 1.0, "text": -1.0}
    with pytest.raises(RecipeError, match="is not a sum of evaluations"):
        terms("skill + x * happy")


def test_choices_and_logarithms_are_drawn(tmp_path: Path) -> None:
    space = [Dimension("a.b", [1e-3, 1.0, "log"], "a.b"), Dimension("c", ["x", "y"], "c")]
    trials = [Trial(i, i / 3, {"a.b": 10.0**-i, "c": "xy"[i % 2]}, {"m": i / 3}) for i in range(3)]
    plot(trials, space, ["m"], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


@pytest.mark.filterwarnings("error")
def test_any_name_is_drawn_and_many_parameters_have_rows(tmp_path: Path) -> None:
    from matplotlib.image import imread

    name = r"$\bad_{a$ 日本" + "x" * 300
    space = {f"{name}{i}": [0.0, 1.0] if i % 2 else [name, "ties", "$^$"] for i in range(8)}
    first = Trial(1, 0.5, dict.fromkeys(space), {name: 0.5}, is_recipe=True)
    second = Trial(2, 0.4, {key: choices[0] for key, choices in space.items()}, {name: 0.4})
    for number, trials in enumerate(([first], [first, second])):
        plot(trials, [Dimension(key, given, key) for key, given in space.items()], [name], tmp_path / f"{number}.png")
        height, width, _ = imread(tmp_path / f"{number}.png").shape
        assert width < 2000
        assert height > 3 * 300
