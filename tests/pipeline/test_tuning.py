"""`paft tune`: trials are merges that were made and judged, a search goes on where it was, and the winner is a recipe."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from functools import partial
from operator import ge
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from toys.run import Killed, make_world, sections
from toys.train import THEIR_WARNINGS

from paft_merge.cli import cli
from paft_merge.errors import RecipeError, RunError
from paft_merge.pipeline import run, trial_processes, tuning
from paft_merge.pipeline.execution import Event
from paft_merge.pipeline.search_plot import plot
from paft_merge.pipeline.search_result import chosen, front_of, terms
from paft_merge.pipeline.search_space import Dimension
from paft_merge.pipeline.trials import TrialModel
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
            tune(world, folder, on_event=STARTED.append, parallel=1)
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
        ("tune.metric=[]", "tune.metric"),
        ("tune.metric=[text, text]", "an objective is written twice"),
        ("tune.metric=[pairs, -text]", "'-text' has a sign, and each objective has its direction; write text"),
        ("tune.metric=[pairs, txet]", "there is no evaluation 'txet'; did you mean 'text'?"),
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


@pytest.fixture(scope="module")
def fronted(world: Path, searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search with two objectives on the same adapters."""
    folder = shutil.copytree(searched, tmp_path_factory.mktemp("runs") / "front")
    tune(world, folder, overrides=FRONT, parallel=1)
    return folder


FRONT = ("tune.metric=[text, pairs]", "tune.trials=8")


def test_several_objectives_give_a_front_and_a_best_by_the_rule(world: Path, fronted: Path) -> None:
    found = tune(world, fronted, overrides=FRONT)
    assert len(found.trials) == 8
    for trial in found.trials:
        assert trial.values == (-trial.scores["text"], trial.scores["pairs"]), "less perplexity is better"
        beaten = [o for o in found.trials if o.values != trial.values and all(map(ge, o.values, trial.values))]
        equal = [o for o in found.front if o.values == trial.values]
        assert bool(beaten) != bool(equal)
    rows = list(csv.DictReader((fronted / "trials.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in rows if row["front"] == "true"] == sorted(t.number for t in found.front)
    assert {path.name for path in (fronted / "front").iterdir()} == {f"{t.number}.yaml" for t in found.front}
    for trial in found.front:
        made = yaml.safe_load((fronted / "front" / f"{trial.number}.yaml").read_text())["merge"]
        weight = made["models"][1]["parameters"]["weight"]
        assert weight == (0.5 if trial.is_recipe else trial.parameters["models[1].parameters.weight"])
    top = max(found.front, key=lambda t: t.values[0])
    assert top.noise[0] > 0
    near = [trial for trial in found.front if trial.values[0] >= top.values[0] - top.noise[0]]
    assert found.best == max(near, key=lambda t: t.values[1])
    assert (fronted / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert f"# Scores of text, pairs: {found.best.scores['text']:.4f}, {found.best.scores['pairs']:.4f}, trial" in (
        (fronted / "best.yaml").read_text()
    )


def test_the_command_prints_the_front_and_writes_the_trial_that_is_picked(world: Path, fronted: Path) -> None:
    args = ["tune", str(world), str(fronted), "--set", FRONT[0], "--trials", "8"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    front = tune(world, fronted, overrides=FRONT).front
    assert f"front ({len(front)} of 8 trials, each in " in done.stderr
    for trial in front:
        assert (
            f"  trial {trial.number}: text {trial.scores['text']:.4f}, pairs {trial.scores['pairs']:.4f}  "
            in done.stderr
        )
    picked = CliRunner().invoke(cli, [*args, "--pick", "3"])
    assert picked.exit_code == 0, picked.output
    assert "picked: trial 3, text" in picked.stderr
    assert ", trial 3 of 8, " in (fronted / "best.yaml").read_text()
    wrong = CliRunner().invoke(cli, [*args, "--pick", "9"])
    assert wrong.exit_code == 1
    assert "there is no trial 9; its trials are 1 to 8" in wrong.stderr


def trial_of(number: int, *values: float, noise: float = 0.0, **more: bool) -> Trial:
    return Trial(number, values[0], {"p": number}, {}, more=values[1:], noise=(noise,) * len(values), **more)


def test_the_rule_takes_the_second_objective_among_those_near_in_the_first() -> None:
    trials = [
        trial_of(1, 0.50, 1.0, noise=0.02),
        trial_of(2, 0.49, 3.0),
        trial_of(3, 0.40, 9.0),
        trial_of(4, 0.49, 2.0),
    ]
    assert [t.number for t in front_of(trials)] == [1, 2, 3]
    assert chosen(trials).number == 2
    assert chosen([trial_of(1, 0.5, 1.0), *trials[1:]]).number == 1, "without noise the first objective decides"
    equal = [trial_of(1, 1.0, 1.0), trial_of(2, 1.0, 1.0, is_recipe=True), trial_of(3, 1.0, 1.0)]
    assert [t.number for t in front_of(equal)] == [2], "the recipe as it is"
    three = [trial_of(1, 1.0, 1.0, 0.0, noise=0.5), trial_of(2, 0.6, 2.0, 0.0, noise=0.5), trial_of(3, 0.6, 1.6, 5.0)]
    assert chosen(three).number == 3


def test_the_plot_of_several_objectives_has_a_panel_for_each_pair(tmp_path: Path) -> None:
    from matplotlib.image import imread

    space = [Dimension("p", [0, 9], "p")]
    sizes = []
    for count in (2, 3):
        trials = [
            trial_of(i, *(float(i * (-1) ** place) for place in range(count)), is_recipe=i == 1) for i in (1, 2, 3)
        ]
        plot(trials, space, ["a", "b", "c"][:count], tmp_path / f"{count}.png")
        sizes.append(imread(tmp_path / f"{count}.png").shape[1])
    assert sizes[1] > 1.5 * sizes[0]


def test_trials_on_several_cores_are_those_of_one(
    world: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    found = []
    for cores in (1, 3):
        shutil.copytree(searched, tmp_path / str(cores))
        monkeypatch.setattr(trial_processes, "available_cores", lambda cores=cores: cores)
        found.append(tune(world, tmp_path / str(cores), overrides=("tune.seed=5",), trials=5))
    assert [t.parameters for t in found[0].trials] == [t.parameters for t in found[1].trials]
    assert [t.value for t in found[0].trials] == pytest.approx([t.value for t in found[1].trials], rel=1e-4)
    assert not multiprocessing.active_children()
    assert threading.active_count() == before


def test_an_error_of_a_trial_in_a_child_is_that_of_the_search(
    world: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, real = os.getpid(), TrialModel.scores

    def in_children(act: Callable[[], Any]) -> None:
        monkeypatch.setattr(TrialModel, "scores", lambda *given: act() if os.getpid() != parent else real(*given))

    def fails(error: Exception) -> Any:
        raise error

    class OddError(Exception):
        """An error that cannot be pickled."""

    monkeypatch.setattr(trial_processes, "available_cores", lambda: 2)
    shutil.copytree(searched, tmp_path / "run")
    for act, expected in (
        (lambda: fails(RunError.of("TUNE", "here", "a child fails")), "here: a child fails"),
        (lambda: fails(OddError("strange")), "a trial failed: OddError: strange"),
        (lambda: os._exit(1), "the process of a trial ended"),
    ):
        in_children(act)
        with pytest.raises(RunError, match=expected):
            tune(world, tmp_path / "run", overrides=("tune.seed=6",), trials=6)
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert len(tune(world, tmp_path / "run", overrides=("tune.seed=6",), trials=3, parallel=1).trials) == 3


def warnings_shown() -> list[bool]:
    """Whether this process shows two warnings."""
    found = []
    for category in (FutureWarning, UserWarning):
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("is hidden", category, stacklevel=1)
        found.append(bool(caught))
    return found


def test_a_spawned_child_returns_values_and_errors_and_ends_with_its_tasks() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="is hidden", category=UserWarning)
        warnings.filterwarnings("ignore", message="is hidden", category=FutureWarning)
        child = trial_processes.Child.start("spawn", "study", "a setting")
    try:
        child.send(partial(divmod, 7, 2))
        assert child.result() == (3, 1)
        child.send(warnings_shown)
        assert child.result() == [False, True], "a child hides what its parent hides"
        child.send(partial(int, "seven"))
        with pytest.raises(RunError, match="study: a setting failed: ValueError: invalid literal"):
            child.result()
        child.send(partial(os._exit, 1))
        with pytest.raises(RunError, match="study: the process of a setting ended"):
            child.result()
        with pytest.raises(RunError, match="study: the process of a setting ended"):
            child.send(partial(divmod, 7, 2))
    finally:
        child.stop()
    assert not multiprocessing.active_children()


def test_a_metric_may_be_a_sum() -> None:
    assert terms("skill + 0.1 * happy") == {"skill": 1.0, "happy": 0.1}
    assert terms("skill - 2*text") == {"skill": 1.0, "text": -2.0}
    assert terms("skill - text") == {"skill": 1.0, "text": -1.0}
    with pytest.raises(RecipeError, match="is not a sum of evaluations"):
        terms("skill + x * happy")
    for twice in ("skill + skill", "0.5 * skill - 0.1*happy + 2 * skill"):
        with pytest.raises(RecipeError, match="has 'skill' twice"):
            terms(twice)


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
