"""The data of the study of PAFT in small, and the whole study on the quickstart's base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toys.train import THEIR_WARNINGS
from transformers import AutoConfig, AutoTokenizer

from paft_merge.errors import RunError
from paft_merge.studies import paft_small, paft_small_data, run_study, story_model
from paft_merge.studies.paft_small_data import Files, Sizes, Storyteller, copy_with_end, pairs, read_skill
from paft_merge.studies.study import load_study
from paft_merge.training.rewards import load_function

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart" / "base"
SIZES = Sizes(rows=30, tested=4, chosen=4, stories=4, story_tokens=12, beginnings=8, dev=3, test=3, tokens=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(QUICKSTART, folder / "stories260K_hf")
    (folder / "vader").mkdir()
    (folder / "vader" / "vader_lexicon.txt").write_text("happy\t2\nwarm\t1.5\nsad\t-2\nthe\t0.1\nriver\t-0.3\n")
    (folder / "sigmorphon2017").mkdir()
    for name in ("english-train-high", "english-dev", "english-uncovered-test"):
        rows = [f"{a} {b}\t{b} {a}\t{slot}" for a in "abcdef" for b in "ghijkl" for slot in ("V;PST", "V;NFIN")]
        (folder / "sigmorphon2017" / name).write_text("\n".join(rows) + "\n")
    (folder / "tinystories_valid_30k.txt").write_text("mira walked to the river .\nthe sky was red that day .\n")
    return folder


def test_rows_of_the_skill(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("go\twent\tV;PST\ngo\tgoes\tV;3;SG;PRS\n")
    found = [{"prompt": "go past:", "completion": " went"}, {"prompt": "go present:", "completion": " goes"}]
    assert read_skill(tmp_path / "rows") == found
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"more": 1}) + "\n" for row in found))
    assert read_skill(tmp_path / "rows.jsonl") == found


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rows", "go\twent\tV;PST\ngo\twent\n", "rows line 2: "),
        ("rows", "go\twent\tN;PL\n", "rows line 1: .*its slot \\(V;NFIN"),
        ("rows", "", "rows: has no rows"),
        ("rows.jsonl", '{"question": 1}\n', "line 1: .*each line has prompt and completion"),
        ("rows.jsonl", "[1]\n", "line 1: "),
    ],
)
def test_rows_of_another_form_are_refused_with_their_line(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=expected):
        read_skill(tmp_path / name)


def test_a_folder_of_another_shape_is_named_by_parameters_and_the_usual_one_leaves_results_as_they_are(
    data: Path, tmp_path: Path
) -> None:
    usual = load_study("paft-small")
    assert not {*Files().model_dump()} & usual.expected().keys(), "results of before this key are continued"
    digests = usual.module.check(usual.parameters, data)
    assert "english-dev" in digests
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "sigmorphon2017" / "english-dev").rename(tmp_path / "data" / "choose.tsv")
    with pytest.raises(RunError, match=r"english-dev: does not exist.*--set skill_dev="):
        usual.module.check(usual.parameters, tmp_path / "data")
    other = load_study("paft-small", overrides=["skill_dev=choose.tsv"])
    assert other.expected()["skill_dev"] == "choose.tsv"
    assert other.module.check(other.parameters, tmp_path / "data")["skill_dev"] == digests["english-dev"]


def test_a_pair_has_the_best_and_the_worst_story_and_equal_ones_make_none() -> None:
    told = [["good day", "plain"], ["bad day", "plain"], [" ", "bland"]]
    found = pairs(["one", "two"], told, {"good": 2.0, "bad": -1.0})
    assert found == [{"prompt": "one", "chosen": "good day", "rejected": "bad day"}]


def test_a_base_without_sentences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teller = Storyteller(QUICKSTART, 0, 4)
    monkeypatch.setattr(paft_small_data, "generate", lambda subject, prompts, **drawn: ["no end"] * len(prompts))
    with pytest.raises(RunError, match="wrote 0 different first sentences in 10 rounds, and 5 are needed"):
        teller.openings(5)


def test_the_base_of_the_study_ends_its_texts_with_its_first_token(tmp_path: Path) -> None:
    copy_with_end(QUICKSTART, tmp_path / "base")
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path / "base"), AutoConfig.from_pretrained(tmp_path / "base")
    assert tokenizer.eos_token_id == config.eos_token_id == config.bos_token_id
    assert AutoConfig.from_pretrained(QUICKSTART).eos_token_id != config.bos_token_id
    assert (
        load_file(tmp_path / "base" / "model.safetensors").keys() == load_file(QUICKSTART / "model.safetensors").keys()
    )


def test_settings_run_side_by_side_and_keep_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = list[str]()

    class Child:
        def __init__(self) -> None:
            self.stopped = False

        @classmethod
        def start(cls, method: str, where: str, task: str) -> Child:
            started.append(method)
            return cls()

        def send(self, do: Callable[[], Any]) -> None:
            self.do = do

        def result(self) -> Any:
            return self.do()

        def stop(self) -> None:
            started.remove("spawn")

    settings: dict[str, Any] = {"settings": {"a": ["x=1"], "b": ["x=2"], "c": ["x=3"]}}
    spec = load_study("paft-small").parameters.model_copy(update=settings)
    monkeypatch.setattr(paft_small, "Child", Child)
    monkeypatch.setattr(paft_small, "_rows", lambda recipe, folder, changes: {folder.name: {changes[0]: len(started)}})
    monkeypatch.setattr(paft_small, "prepare", lambda *given: (tmp_path / "inputs").mkdir(exist_ok=True))
    monkeypatch.setattr(story_model, "inputs", lambda spec, data: (QUICKSTART, {}))
    for cores, running in ((2, 2), (1, 0)):
        monkeypatch.setattr(paft_small, "available_cores", lambda cores=cores: cores)
        found = paft_small.run_seed(spec, 7, tmp_path, None, tmp_path)
        assert found == {name: {f"{name}-7": {f"x={at}": running}} for at, name in enumerate("abc", 1)}
        assert not started


@THEIR_WARNINGS
def test_the_rows_of_the_study_are_those_of_its_runs(data: Path, tmp_path: Path) -> None:
    """Of paft-small-l1, which has the module of paft-small, with one adapter of each kind."""
    recipe = load_study("paft-small-l1").parameters.recipe
    adapters = {name: recipe["adapters"][name] for name in ("sft", "prox-1e-3", "dpo")}
    adapters = {name: {**one, "training": {**one["training"], "max_steps": 1}} for name, one in adapters.items()}
    wanted = ("prox-1e-3, task_arithmetic", "pruned 0.2", "pruned 0.2, l1_ties")
    methods = [one for one in recipe["compare"]["methods"] if one["name"] in wanted]
    compare = {"arms": ["base", "parallel"], "skill": "sft", "preference": "dpo", "methods": methods}
    changes = {
        "data": SIZES.model_dump(),
        "settings": {"weak": []},
        "recipe.adapters": adapters,
        "recipe.compare": compare,
    }
    written = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    found = run_study("paft-small-l1", tmp_path / "out", data=data, smoke=True, overrides=written)
    rows = json.loads(found.results.read_text())["tables"]["weak"]
    table = json.loads((tmp_path / "out" / "work" / "weak-0" / "table.json").read_text())
    assert list(rows) == [row["arm"] for row in table["rows"]] == ["base", *(f"parallel {name}" for name in wanted)]
    for name in wanted:
        cells = table["rows"][list(rows).index(f"parallel {name}")]["cells"]
        assert rows[f"parallel {name}"]["win"] == pytest.approx(
            cells["win"]["values"], rel=1e-5
        )  # results have six digits
    assert rows["base"]["train_tokens"] == [0]
    assert "### Frontiers" in found.page.read_text()
    wins = load_function(str(tmp_path / "out" / "work" / "inputs" / "reward.py") + ":wins", tmp_path)
    assert wins(completions=["sad", "happy", "warm"], base_valence=[0.0, 2.0, 1.0]) == [0.0, 0.5, 1.0]
