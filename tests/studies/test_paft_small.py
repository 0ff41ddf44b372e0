"""The data of the study of PAFT in small, and the whole study on the quickstart's base."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.train import THEIR_WARNINGS
from transformers import AutoConfig, AutoTokenizer

from paft_merge.errors import EvaluateError, RunError, TrainError
from paft_merge.studies import paft_small, paft_small_data, run_study, story_model
from paft_merge.studies.paft_small_data import (
    Files,
    Sizes,
    Storyteller,
    copy_with_end,
    pairs,
    preference_of,
    prepare,
    read_skill,
    scorer,
)
from paft_merge.studies.study import load_study
from paft_merge.training.rewards import load_function

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart" / "base"
FILES_HERE = Files(first="mira", sentence_end=" .")
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
        ("rows.jsonl", '{"question": 1}\n', "line 1: has no text in 'prompt'; each line has prompt and completion"),
        ("rows.jsonl", "[1]\n", "line 1: "),
        (
            "rows.jsonl",
            '{"prompt": ["a"], "completion": "b"}\n',
            "line 1: has no text in 'prompt'; each line has prompt",
        ),
        ("rows.jsonl", '{"prompt": "a", "completion": null}\n', "line 1: has no text in 'completion'"),
        ("rows.jsonl", '{"prompt": "a", "completion": " "}\n', "line 1: has an empty completion"),
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


def test_rows_that_are_missing_or_trained_on_are_named(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    paft_small.check(load_study("paft-small", smoke=True).parameters, data)
    assert "english-dev: 4 of its rows have a prompt that is trained on" in caplog.text
    caplog.clear()
    study = load_study("paft-small", smoke=True, overrides=["data.rows=1", "data.tested=73"])
    paft_small.check(study.parameters, data)
    assert "english-uncovered-test: the study asks for 73 rows, and there are 72" in caplog.text
    assert "english-dev: 1 of its rows" in caplog.text


def test_another_preference_needs_no_lexicon(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "vader")
    (tmp_path / "data" / "own.py").write_text(
        "def rivers(completions, **columns):\n    return [float('river' in c) for c in completions]\n"
    )
    for given, expected in (("short", [-2.0, -1.0]), ("length", [2.0, 1.0]), ("own.py:rivers", [1.0, 0.0])):
        files = Files(preference=given)
        score = scorer(preference_of(files, tmp_path / "data"), None)
        assert score(["a", "b"], ["the river", "sky"]) == expected
        study = load_study("paft-small", smoke=True, overrides=[f"preference={given}"])
        digests = paft_small.check(study.parameters, tmp_path / "data")
        assert ("preference" in digests, "vader_lexicon.txt" in digests) == (":" in given, False)
    with pytest.raises(
        RunError, match=r"there is no preference 'shorter'; write short, length, or rewards\.py:function"
    ):
        preference_of(Files(preference="shorter"), data)
    with pytest.raises(TrainError, match="has no function 'river'; did you mean 'rivers'"):
        preference_of(Files(preference="own.py:river"), tmp_path / "data")


def test_a_preference_that_scores_all_texts_alike_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("absent\t1\n")
    with pytest.raises(RunError, match=r"words: scores all texts that the base wrote from 8 beginnings alike"):
        prepare(data / "stories260K_hf", tmp_path / "words", data, tmp_path / "inputs", SIZES, FILES_HERE)


def test_inputs_of_an_interrupted_run_with_other_parameters_are_made_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[int]()

    def prepare(base: Path, words: Path, data: Path, out: Path, sizes: Sizes, files: Files) -> None:
        made.append(sizes.rows)
        out.mkdir()
        (out / paft_small_data.REWARD).write_text("")

    monkeypatch.setattr(paft_small, "prepare", prepare)
    for rows in (5, 5, 6):
        spec = load_study("paft-small", overrides=["settings={}", f"data.rows={rows}"]).parameters
        assert paft_small.run_seed(spec, 0, data, None, tmp_path) == {}
    assert made == [5, 6]


def test_a_pair_has_the_best_and_the_worst_story_and_equal_ones_make_none() -> None:
    told = [["good day", "plain"], ["bad day", "plain"], [" ", "bland"]]
    found = pairs(["one", "two"], told, [[2.0, 0.0], [-1.0, 0.0], [9.0, 0.0]])
    assert found == [{"prompt": "one", "chosen": "good day", "rejected": "bad day"}]


def test_a_base_without_sentences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teller = Storyteller(QUICKSTART, 0, 4)
    monkeypatch.setattr(paft_small_data, "generate", lambda subject, prompts, **drawn: ["no end"] * len(prompts))
    with pytest.raises(RunError, match="wrote 0 different first sentences in 10 rounds, and 5 are needed; set first"):
        teller.openings(5, "Once", ".")


@pytest.mark.parametrize(
    ("keeps", "told", "expected"), [(False, ["a", " b", ", c"], [" a", " b", ", c"]), (True, ["a", " b"], ["a", " b"])]
)
def test_a_space_is_put_before_texts_of_tokenizers_that_leave_it_out(
    monkeypatch: pytest.MonkeyPatch, keeps: bool, told: list[str], expected: list[str]
) -> None:
    teller = Storyteller(QUICKSTART, 0, 4)
    teller._keeps_spaces = keeps
    monkeypatch.setattr(paft_small_data, "generate", lambda subject, prompts, **drawn: told)
    assert teller.complete(["x"] * len(told)) == expected


def test_beginnings_have_the_first_words_and_the_end_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    teller, told = Storyteller(QUICKSTART, 0, 4), itertools.cycle(["猫买水。狗", " 我吃鱼。", "no end"])
    monkeypatch.setattr(paft_small_data, "generate", lambda subject, prompts, **drawn: [next(told) for _ in prompts])
    assert teller.openings(2, "", "。") == ["猫买水。", "我吃鱼。"]


@pytest.mark.parametrize("untrained", [True, False])
def test_a_base_whose_end_token_is_not_trained_ends_its_texts_with_its_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: bool
) -> None:
    def logits(subject: Any, ids: list[int]) -> torch.Tensor:
        found = torch.zeros(subject.model.config.vocab_size)
        found[2 - untrained] = 1.0
        return found

    monkeypatch.setattr(paft_small_data, "_after", logits)
    (tmp_path / "text").write_text("mira walked to the river .\n")
    copy_with_end(QUICKSTART, tmp_path / "base", tmp_path / "text")
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path / "base"), AutoConfig.from_pretrained(tmp_path / "base")
    assert tokenizer.eos_token_id == config.eos_token_id == 2 - untrained
    assert (
        AutoConfig.from_pretrained(QUICKSTART).bos_token_id,
        AutoConfig.from_pretrained(QUICKSTART).eos_token_id,
    ) == (1, 2)
    assert (
        load_file(tmp_path / "base" / "model.safetensors").keys() == load_file(QUICKSTART / "model.safetensors").keys()
    )


def test_a_folder_that_is_not_a_base_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(EvaluateError, match=r"none: cannot be loaded: .*; give a causal language model"):
        copy_with_end(tmp_path / "none", tmp_path / "base", data / "tinystories_valid_30k.txt")


def test_the_quickstarts_base_was_trained_to_end_its_texts(data: Path, tmp_path: Path) -> None:
    copy_with_end(QUICKSTART, tmp_path / "base", data / "tinystories_valid_30k.txt")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").eos_token_id == 2


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
    monkeypatch.setattr(paft_small, "_digests", lambda spec, data: {})
    monkeypatch.setattr(story_model, "inputs", lambda spec, data, lexicon: (QUICKSTART, {}))
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
