"""Agreement with the answers of other models, which needs no labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from toys import adapters as toys
from toys import train as train_toys
from toys.run import write_rows

from paft_merge.errors import PaftMergeError
from paft_merge.evaluating import EvaluateSpec, evaluate, loading
from paft_merge.evaluating.agreement import agrees, source_parts
from paft_merge.evaluating.light import generate
from paft_merge.evaluating.loading import load_subject
from paft_merge.evaluating.schema import Measurement

pytestmark = train_toys.THEIR_WARNINGS

PROMPTS = [{"prompt": f"w{i} w{i + 1}"} for i in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and three models with different answers to most of them."""
    folder = tmp_path_factory.mktemp("place")
    write_rows(folder / "prompts.jsonl", PROMPTS)
    torch.manual_seed(0)
    model = toys.llama()
    for name in ("x", "y", "z"):
        train_toys.saved(folder / name, model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    return folder


def spec_of(**changes: object) -> EvaluateSpec:
    given = {"kind": "agreement", "data": "prompts.jsonl", "with": "x", "max_new_tokens": 1, **changes}
    return EvaluateSpec.model_validate({"metrics": {"agree": given}, "batch_size": 3, "max_length": 8})


def answers(place: Path, name: str) -> list[str]:
    subject = load_subject(place / name, EvaluateSpec(max_length=8))
    return [text.strip() for text in generate(subject, [row["prompt"] for row in PROMPTS], 1, 3)]


def test_agreement_is_the_share_of_prompts_whose_answer_is_that_of_the_source(place: Path) -> None:
    x, y = answers(place, "x"), answers(place, "y")
    found = evaluate(str(place / "y"), spec_of(), folder=place)["agree"]
    assert list(found.rows) == [float(mine == its) for mine, its in zip(y, x, strict=True)]
    assert 0 < found.value < 1
    assert [text.strip() for text in found.outputs] == y
    assert evaluate(str(place / "x"), spec_of(), folder=place)["agree"].value == 1
    named = evaluate(str(place / "y"), spec_of(**{"with": "it"}), folder=place, models={"it": [str(place / "x")]})
    assert named["agree"] == found


@pytest.mark.parametrize(
    ("answer", "sources", "expected"),
    [
        ("a ", ["a"], True),
        ("b", ["a"], False),
        ("a", ["a", "b"], True),
        ("b", ["a", "b"], True),
        ("b", ["a", "a", "b"], False),
        ("a", ["a", " a", "b"], True),
        ("", [""], False),
        ("", ["", "", "a"], False),
        ("a", ["", "", "a"], True),
    ],
)
def test_the_most_frequent_answers_of_the_sources_count_and_empty_ones_do_not(
    answer: str, sources: list[str], expected: bool
) -> None:
    assert agrees(answer, sources) is expected


def test_with_an_expression_only_what_it_extracts_is_compared(place: Path) -> None:
    same = evaluate(str(place / "y"), spec_of(extract="(w)"), folder=place)["agree"]
    both = zip(answers(place, "x"), answers(place, "y"), strict=True)
    assert same.value == sum("w" in mine and "w" in its for mine, its in both) / 8 > 0.5
    none = evaluate(str(place / "y"), spec_of(extract="#(.)"), folder=place)["agree"]
    assert none.value == 0
    assert none.warning == "prompts.jsonl: no source has an answer to any prompt, so no answer can agree"


def test_each_source_is_loaded_once_and_only_for_an_evaluation_that_is_wanted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, real = list[str](), loading.load_subject

    def counted(model: object, *given: object, **named: object) -> object:
        loads.append(Path(str(model[0] if isinstance(model, tuple) else model)).name)
        return real(model, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_subject", counted)
    one = spec_of(**{"with": ["x", "z"]})
    both = one.model_copy(update={"metrics": {**one.metrics, "more": one.metrics["agree"]}})
    assert evaluate(str(place / "y"), both, folder=place).keys() == {"agree", "more"}
    assert loads == ["x", "z", "y"]
    evaluate(str(place / "y"), both, folder=place, only=[])
    assert loads[3:] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"with": None}, "kind: agreement needs `with`, the models to agree with"),
        ({"with": []}, "at least 1 item"),
        ({"with": ["x", "x"]}, "`with` names a model twice"),
        ({"temperature": 1}, "`temperature` has no effect for agreement"),
        ({"kind": "perplexity"}, "`with` has no effect for perplexity"),
        ({"answer": "a"}, "`answer` has no effect for agreement"),
    ],
)
def test_settings_without_sense_are_refused(change: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        Measurement.model_validate({"kind": "agreement", "data": "a.jsonl", "with": "x", **change})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("sfd", "agree: sfd: is not a name in the recipe, and is neither beside"),
        ("sfd", "did you mean 'sft'?"),
        ("elsewhere", "names are sft"),
        ("../none/there", "none/there: not a local folder"),
        (
            "lora",
            "lora: has no config.json, so it is not the folder of a model; write BASE+ADAPTER, or the folder of a model",
        ),
        ("x+y", "y: has no adapter_config.json, so it is not the folder of an adapter"),
        ("x+nothing", "nothing: not a local folder"),
    ],
)
def test_a_source_that_does_not_exist_is_found_before_a_model_is_loaded(
    place: Path, source: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "lora").mkdir(exist_ok=True)
    monkeypatch.setattr(loading, "load_subject", None)
    with pytest.raises(PaftMergeError, match=re.escape(expected)):
        evaluate(str(place / "y"), spec_of(**{"with": source}), folder=place, models={"sft": ["a", "b"]})


def test_the_parts_of_a_source_are_beside_the_recipe(place: Path) -> None:
    assert source_parts("x+y", place) == (str(place / "x"), str(place / "y"))
    assert source_parts("me/model+y", place) == ("me/model", str(place / "y"))
    (place / "a+b").mkdir()
    assert source_parts("a+b", place) == (str(place / "a+b"),)
