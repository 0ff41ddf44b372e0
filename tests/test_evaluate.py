"""Evaluations: each number against its definition, adapters without a merged model, bad input found first, lm-eval offline."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import train_toys
from click.testing import CliRunner
from run_toys import write_rows
from train_toys import THEIR_WARNINGS

from paft_merge.cli import cli
from paft_merge.errors import EvaluateError, PaftMergeError, RecipeError
from paft_merge.evaluating import check_evaluate, evaluate
from paft_merge.evaluating.light import generate
from paft_merge.evaluating.models import load_subject
from paft_merge.evaluating.spec import EvaluateSpec

pytestmark = THEIR_WARNINGS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that knows a language, and rows of it."""
    folder = tmp_path_factory.mktemp("place")
    train_toys.saved(folder / "base", train_toys.pretrained(60))
    lines = train_toys.sentences(train_toys.chain(0), 12, 10, 5)
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    write_rows(folder / "pairs.jsonl", [
        {"prompt": "w1 w2 ", "chosen": good, "rejected": bad}
        for good, bad in zip(lines[:6], train_toys.sentences(train_toys.chain(2), 6, 10, 6), strict=True)
    ])  # fmt: skip
    return folder


def spec_of(**metrics: dict) -> EvaluateSpec:
    """A section with these light metrics, three rows at a time."""
    return EvaluateSpec.model_validate({"metrics": metrics, "batch_size": 3})


def ids_of(subject, text: str) -> torch.Tensor:
    """Token ids `[1, T]`."""
    return torch.tensor([subject.tokenizer(text)["input_ids"]])


@torch.no_grad()
def greedy(subject, prompt: str, tokens: int) -> str:
    """A greedy answer by the definition: one row, one token at a time, no cache, no padding."""
    ids = ids_of(subject, prompt)
    for _ in range(tokens):
        ids = torch.cat([ids, subject.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == subject.tokenizer.eos_token_id:
            break
    return str(subject.tokenizer.decode(ids[0, ids_of(subject, prompt).shape[1] :], skip_special_tokens=True))


def test_greedy_answers_do_not_depend_on_the_batch(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    prompts = ["w1", "w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11"]
    expected = [greedy(subject, prompt, 5) for prompt in prompts]
    for size in (1, 2, 4):
        assert generate(subject, prompts, 5, size) == expected


def test_exact_match_is_the_share_of_right_answers(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    prompts = ["w1 w2", "w3", "w4 w5 w6", "w7"]
    right = [greedy(subject, prompt, 2) for prompt in prompts]
    rows = [{"prompt": p, "answer": f" {a} "} for p, a in zip(prompts, right, strict=True)]
    rows[3]["answer"] = "w0 w0 w0"
    write_rows(place / "exact.jsonl", rows)
    found = evaluate(
        place / "base", spec_of(em={"kind": "exact_match", "data": "exact.jsonl", "max_new_tokens": 2}), folder=place
    )
    assert found["em"].value == 0.75
    assert found["em"].rows == (1, 1, 1, 0)
    assert [o.strip() for o in found["em"].outputs] == [a.strip() for a in right]
    assert found["em"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_an_answer_can_be_cut_out_of_what_was_written(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    last = greedy(subject, "w1 w2", 4).split()[-1]
    write_rows(place / "cut.jsonl", [{"prompt": "w1 w2", "answer": last}])
    one = {"kind": "exact_match", "data": "cut.jsonl", "max_new_tokens": 4}
    found = evaluate(place / "base", spec_of(whole=one, cut={**one, "extract": r"(\w+)$"}), folder=place)
    assert (found["whole"].value, found["cut"].value) == (0.0, 1.0)


def test_preference_accuracy_compares_summed_log_probabilities(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]

    def logp(row: dict, key: str) -> tuple[float, int]:
        start = ids_of(subject, row["prompt"]).shape[1]
        ids = ids_of(subject, row["prompt"] + row[key] + "</s>")
        with torch.no_grad():
            logps = subject.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return float(logps[start - 1 :].sum()), ids.shape[1] - start

    wins = [float(logp(row, "chosen")[0] > logp(row, "rejected")[0]) for row in rows]
    mean_wins = [
        float(logp(row, "chosen")[0] / logp(row, "chosen")[1] > logp(row, "rejected")[0] / logp(row, "rejected")[1])
        for row in rows
    ]
    one = {"kind": "preference", "data": "pairs.jsonl"}
    found = evaluate(place / "base", spec_of(sums=one, means={**one, "normalize": True}), folder=place)
    assert list(found["sums"].rows) == wins
    assert list(found["means"].rows) == mean_wins
    assert 0.5 < found["sums"].value <= 1, "the base knows the language of the chosen ones"


def test_a_reward_is_the_mean_of_a_function_that_sees_every_column(place: Path) -> None:
    (place / "rewards.py").write_text(
        "def bonus(prompts, completions, extra, **columns):\n"
        "    return [len(p.split()) + e for p, e in zip(prompts, extra)]\n"
    )
    write_rows(place / "bonus.jsonl", [{"prompt": "w1 w2", "extra": 10}, {"prompt": "w3", "extra": 20}])
    section = {"kind": "reward", "data": "bonus.jsonl", "function": "rewards.py:bonus", "max_new_tokens": 1}
    assert evaluate(place / "base", spec_of(r=section), folder=place)["r"].value == (12 + 21) / 2


def test_perplexity_is_that_of_transformers_own_loss(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    lines = (place / "text.txt").read_text().splitlines()
    total = tokens = 0.0
    with torch.no_grad():
        for line in lines:
            ids = ids_of(subject, line)
            loss = subject.model(input_ids=ids, labels=ids).loss
            total, tokens = total + float(loss) * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    found = evaluate(place / "base", spec_of(p={"kind": "perplexity", "data": "text.txt", "by": "line"}), folder=place)
    assert found["p"].value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    whole = evaluate(place / "base", spec_of(p={"kind": "perplexity", "data": "text.txt"}), folder=place)
    assert whole["p"].value != found["p"].value


def test_an_adapter_is_evaluated_as_the_model_it_would_be_merged_into(place: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(place / "base", dtype="float32"),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    train_toys.saved(tmp_path / "merged", merged)
    section = spec_of(p={"kind": "perplexity", "data": "text.txt", "by": "line"})
    base = evaluate(place / "base", section, folder=place)["p"].value
    wanted = evaluate(tmp_path / "merged", section, folder=place)["p"].value
    found = evaluate(f"{place / 'base'}+{tmp_path / 'adapter'}", section, folder=place)["p"].value
    assert found == pytest.approx(wanted, rel=1e-5)
    assert abs(found - base) > 1e-3
    with pytest.raises(EvaluateError, match="is an adapter, and an adapter is evaluated on its base"):
        evaluate(tmp_path / "adapter", section, folder=place)


def test_sampled_answers_vary_with_the_seed_and_repeat_with_it(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    first, same, other = (generate(subject, ["w1"] * 4, 8, 2, 1.0, seed) for seed in (0, 0, 1))
    assert first == same != other
    assert len(set(first)) > 1


# --- bad input --------------------------------------------------------------------------------------------------------


def test_everything_that_would_stop_an_evaluation_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    write_rows(tmp_path / "columns.jsonl", [{"promt": "a", "answer": "b"}])
    (tmp_path / "r.py").write_text("def good(**given):\n    return [0.0]\n")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    section = EvaluateSpec.model_validate({
        "metrics": {
            "one": {"kind": "exact_match", "data": "broken.jsonl"},
            "two": {"kind": "exact_match", "data": "columns.jsonl"},
            "three": {"kind": "reward", "data": "rows.jsonl", "function": "r.py:goood"},
            "four": {"kind": "perplexity", "data": "none.txt"},
            "five": {"kind": "preference", "data": "rows.jsonl"},
            "six": {"kind": "exact_match", "data": "rows.jsonl", "answer": "prompt", "extract": "abc"},
        }
    })  # fmt: skip
    with pytest.raises(EvaluateError) as caught:
        check_evaluate(section, tmp_path)
    text = str(caught.value)
    for part in (
        "broken.jsonl:2: is no JSON", "two needs the column 'prompt'; did you mean 'promt'?",
        "has no function 'goood'; did you mean 'good'?", "none.txt: cannot be read: No such file",
        "five needs the column 'chosen'", "five needs the column 'rejected'", "extract has no group",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"metrics": {"a": {"kind": "reward", "data": "x"}}}, "kind: reward needs `function`"),
        (
            {"metrics": {"a": {"kind": "exact", "data": "x"}}},
            "metrics.a.kind: Input should be 'exact_match', 'preference'",
        ),
        ({"metrics": {"a": {"kind": "perplexity", "dta": "x"}}}, "metrics.a.dta: unknown key; did you mean 'data'?"),
        ({"batchsize": 3}, "batchsize: unknown key; did you mean 'batch_size'?"),
        ({"suite": "open-llm-v3"}, "suite: Input should be 'open-llm-v1'"),
        (
            {"metrics": {"a": {"kind": "perplexity", "data": "x", "function": "f:g"}}},
            "`function` means nothing for perplexity",
        ),
    ],
)
def test_a_section_that_is_wrong_is_refused_with_its_place(section: dict, told: str, place: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        evaluate(place / "base", section)
    assert told in str(caught.value)


def test_a_prompt_that_does_not_fit_is_told_and_not_cut(place: Path) -> None:
    write_rows(place / "long.jsonl", [{"prompt": "w1 " * 100, "answer": "w2"}])
    section = spec_of(a={"kind": "exact_match", "data": "long.jsonl", "max_new_tokens": 40})
    with pytest.raises(EvaluateError, match="the longest prompt and its answer take 140 tokens, the model sees 128"):
        evaluate(place / "base", section, folder=place)


def test_a_model_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(PaftMergeError, match="cannot be loaded"):
        load_subject(tmp_path / "x", EvaluateSpec())


# --- lm-eval ----------------------------------------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_lm_eval_its_tasks_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match=r"lm_eval.* not installed; pip install 'paft-merge\[eval\]'"):
        evaluate(tmp_path / "nothing", {"suite": "open-llm-v1"})


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (extra [eval])")
@pytest.mark.filterwarnings("default")
def test_lm_eval_runs_a_local_task_file_offline(place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "rows.jsonl", [
        {"prompt": row["prompt"].strip(), "choices": [row["rejected"], row["chosen"]], "gold": 1} for row in rows
    ])  # fmt: skip
    (tmp_path / "mine.yaml").write_text(TASK.format(name="mine", rows=tmp_path / "rows.jsonl"))
    section = {"tasks": [str(tmp_path / "mine.yaml")], "batch_size": 2}
    found = evaluate(place / "base", section)
    assert list(found) == ["mine"]
    assert 0.5 < found["mine"].value <= 1
    with pytest.raises(EvaluateError, match="lm-eval has no task 'hellaswg'; did you mean 'hellaswag'"):
        check_evaluate(EvaluateSpec(tasks=["hellaswg"]))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(place: Path, tmp_path: Path) -> None:
    args = [
        "evaluate",
        str(place / "base"),
        "--perplexity",
        str(place / "text.txt"),
        "--preference",
        str(place / "pairs.jsonl"),
    ]
    shown = CliRunner().invoke(cli, args)
    assert shown.exit_code == 0, shown.output
    assert "perplexity" in shown.stdout
    written = CliRunner().invoke(cli, [*args, "--json", "--out", str(tmp_path / "scores.json")])
    scores = json.loads(written.stdout)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["preference"]["rows"]) == 6
    nothing = CliRunner().invoke(cli, ["evaluate", str(place / "base")])
    assert nothing.exit_code == 2
    assert "Nothing to evaluate" in nothing.stderr


def test_answers_are_written_in_alpacaevals_format(place: Path, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(json.dumps([{"instruction": "w1 w2", "dataset": "toy"}, {"instruction": "w3"}]))
    out = tmp_path / "out.json"
    args = ["evaluate", str(place / "base"), "--alpaca-eval", str(out), "--instructions", str(tmp_path / "set.json")]
    done = CliRunner().invoke(cli, [*args, "--max-new-tokens", "3"])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [row["instruction"] for row in rows] == ["w1 w2", "w3"]
    assert {row["generator"] for row in rows} == {"base"}
    assert [row["dataset"] for row in rows] == ["toy", "set"]
    assert all(len(row["output"].split()) <= 4 for row in rows)
    assert CliRunner().invoke(cli, args[:4]).exit_code == 2
