"""Evaluations: each number against its definition, adapters without a merged model, bad input found first, lm-eval offline."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from toys import train as train_toys
from toys.merge import python, recipe
from toys.quantized import CONFIG, coded
from toys.run import write_rows
from toys.train import THEIR_WARNINGS
from transformers import LlamaConfig, LlamaForCausalLM

from paft_merge import merge
from paft_merge.cli import cli
from paft_merge.errors import DOCS, EvaluateError, PaftMergeError, RecipeError
from paft_merge.evaluating import EvaluateProgress, check_evaluate, evaluate, harness, light, loading
from paft_merge.evaluating.agreement import consistency
from paft_merge.evaluating.alpaca import read_instructions
from paft_merge.evaluating.data_rows import rows_for
from paft_merge.evaluating.harness import check_data
from paft_merge.evaluating.light import _with_answer, generate, measure, token_ids
from paft_merge.evaluating.loading import load_subject
from paft_merge.evaluating.schema import EvaluateSpec, Measurement
from paft_merge.training.child_process import in_child, match_in_time

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


def test_an_empty_prompt_begins_after_the_end_token_where_no_token_begins_a_text(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    assert subject.tokenizer.bos_token_id is None
    assert generate(subject, [""], 5, 1) == generate(subject, ["</s>"], 5, 1)
    subject.tokenizer.eos_token = None
    with pytest.raises(EvaluateError, match="a prompt is empty, and the tokenizer has no token that begins or ends"):
        generate(subject, [""], 5, 1)


def test_tokens_without_a_row_of_the_embedding_are_refused_and_a_pad_token_is_replaced(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    words = train_toys.tokenizer()
    words.add_tokens(["w99"])
    words.add_special_tokens({"pad_token": "<more>"})
    words.save_pretrained(tmp_path / "base")
    subject, before = (load_subject(folder / "base", EvaluateSpec()) for folder in (tmp_path, place))
    prompts = ["w1", "w2 w3 w4"]
    assert generate(subject, prompts, 5, 2) == generate(before, prompts, 5, 2)
    with pytest.raises(
        EvaluateError, match="embedding has no row for 1 of the data's tokens: 'w99'; use the model's own"
    ):
        generate(subject, ["w1 w99"], 5, 2)
    (tmp_path / "text.txt").write_text("w1 w99\n")
    with pytest.raises(EvaluateError, match="no row for 1 of the data's tokens"):
        evaluate(tmp_path / "base", spec_of(text={"kind": "perplexity", "data": "text.txt"}), folder=tmp_path)


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
    found = evaluate(
        place / "base", spec_of(p={"kind": "perplexity", "data": "text.txt", "unit": "line"}), folder=place
    )
    assert found["p"].value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    whole = evaluate(place / "base", spec_of(p={"kind": "perplexity", "data": "text.txt"}), folder=place)
    assert whole["p"].value != found["p"].value


def test_an_adapter_is_evaluated_as_the_model_it_would_be_merged_into(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    section = spec_of(p={"kind": "perplexity", "data": "text.txt", "unit": "line"})
    base = evaluate(place / "base", section, folder=place)["p"].value
    wanted = evaluate(tmp_path / "merged", section, folder=place)["p"].value
    found = evaluate(f"{place / 'base'}+{tmp_path / 'adapter'}", section, folder=place)["p"].value
    assert found == pytest.approx(wanted, rel=1e-5)
    assert abs(found - base) > 1e-3
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config |= {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}  # PEFT imports this module
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    assert evaluate(f"{place / 'base'}+{tmp_path / 'adapter'}", section, folder=place)["p"].value == found
    with pytest.raises(EvaluateError, match="is an adapter, and an adapter is evaluated on its base"):
        evaluate(tmp_path / "adapter", section, folder=place)
    monkeypatch.setattr(loading, "match_in_time", partial(match_in_time, seconds=1.0))
    for field, value, message in (
        ("target_modules", r"(([a-z_.0-9])+)+!", "takes longer than"),
        ("exclude_modules", r"(([a-z_.0-9])+)+!", "takes longer than"),
        ("rank_pattern", {r"(([a-z_.0-9])+)+!": 2}, "takes longer than"),
        ("layers_pattern", [r"(([a-z_.0-9])+)+!"], "takes longer than"),
        ("modules_to_save", [r"(([a-z_.0-9])+)+!"], "takes longer than"),
        ("target_modules", "(q", "is not a regular expression"),
        ("r", 10**9, "r: must be at most"),
    ):
        layers = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
        changed = {**config, **layers, field: value}
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(EvaluateError, match=message):
            evaluate(f"{place / 'base'}+{tmp_path / 'adapter'}", section, folder=place)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    os.mkfifo(tmp_path / "adapter/adapter_model.bin")  # PEFT would wait for its writer, if there were no other file
    with pytest.raises(PaftMergeError, match=r"adapter_model.bin: is not a regular file"):
        evaluate(f"{place / 'base'}+{tmp_path / 'adapter'}", section, folder=place)
    (tmp_path / "adapter/adapter_model.bin").unlink()
    usual = {**config, "target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.x\b)"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(usual))
    assert evaluate(f"{place / 'base'}+{tmp_path / 'adapter'}", section, folder=place)["p"].value == found


def test_a_sparse_delta_is_added_to_the_tensors_of_its_base(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {n: t + 0.02 * torch.randn(t.shape) for n, t in load_file(place / "base/model.safetensors").items()}
    shutil.copytree(place / "base", tmp_path / "tuned")
    save_file(state, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    given = recipe("dare_linear", place / "base", (tmp_path / "tuned", {"weight": 1.0, "density": 0.5}))
    merge(given, tmp_path / "merged")
    merge({**given, "output": {"kind": "delta"}}, tmp_path / "delta")
    section = spec_of(p={"kind": "perplexity", "data": "text.txt", "unit": "line"})
    found = evaluate(f"{place / 'base'}+{tmp_path / 'delta'}", section, folder=place)["p"].value
    assert found == evaluate(tmp_path / "merged", section, folder=place)["p"].value
    assert found != evaluate(place / "base", section, folder=place)["p"].value
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(EvaluateError, match="write the sparse delta first"):
        evaluate([str(place / "base"), str(tmp_path / "lora"), str(tmp_path / "delta")], section, folder=place)
    shutil.copytree(place / "base", tmp_path / "coded")
    fields = json.loads((place / "base/config.json").read_text())
    (tmp_path / "coded/config.json").write_text(json.dumps({**fields, "quantization_config": CONFIG}))
    stored, _ = coded(load_file(place / "base/model.safetensors"))
    save_file(stored, tmp_path / "coded/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaftMergeError, match=r"is quantised \(FP8.*a sparse delta is added"):
        evaluate(f"{tmp_path / 'coded'}+{tmp_path / 'delta'}", section, folder=place)


def test_an_expression_that_takes_too_long_for_the_answers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light, "_MOST_SECONDS", 1.0)
    with pytest.raises(EvaluateError, match="takes longer than 1 s"):
        light._extracted(["a" * 60], "(a+)+!")
    assert light._extracted(["a b", "", "\ud800 c"], r"(\w)?$") == ["b", "", "c"]


def test_files_without_an_end_are_refused_soon(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    with (tmp_path / "base/chat_template.jinja").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(PaftMergeError, match=r"chat_template.jinja: is larger than"):
        load_subject(tmp_path / "base", EvaluateSpec())
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    (tmp_path / "reward.py").symlink_to("/dev/zero")
    metrics = {"m": {"kind": "exact_match", "data": "rows.jsonl"}, "p": {"kind": "perplexity", "data": "rows.jsonl"}}
    reward = {"kind": "reward", "data": str(place / "text.txt"), "function": "reward.py:f"}
    spec = EvaluateSpec.model_validate({"metrics": {**metrics, "r": reward}})
    with pytest.raises(EvaluateError) as caught:
        check_evaluate(spec, tmp_path)
    assert str(caught.value).count("rows.jsonl: is not a file") == 2
    assert "is not a regular file" in str(caught.value)


def test_a_tokenizer_without_a_pad_and_an_end_token_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "base/tokenizer_config.json").unlink()
    with pytest.raises(EvaluateError, match="has neither a pad nor an eos token"):
        load_subject(tmp_path / "base", EvaluateSpec())


def test_sampled_answers_vary_with_the_seed_and_repeat_with_it(place: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    first, same, other = (generate(subject, ["w1"] * 4, 8, 2, 1.0, seed) for seed in (0, 0, 1))
    assert first == same != other
    assert len(set(first)) > 1


def test_self_consistency_is_the_share_of_samples_that_equal_the_most_frequent_answer(
    place: Path, tmp_path: Path
) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i}"} for i in range(5)])
    given = {"kind": "self_consistency", "data": "rows.jsonl", "max_new_tokens": 2, "samples": 4}
    score = measure(subject, Measurement.model_validate(given), tmp_path, 3, seed=1)
    assert len(score.outputs) == 20
    answers = [[text.strip() for text in score.outputs[at : at + 4]] for at in range(0, 20, 4)]
    assert list(score.rows) == [max(map(one.count, one)) / 4 for one in answers]
    assert 0.25 < score.value < 1
    assert measure(subject, Measurement.model_validate(given), tmp_path, 3, seed=1) == score
    assert measure(subject, Measurement.model_validate(given), tmp_path, 3, seed=2).outputs != score.outputs
    cold = measure(subject, Measurement.model_validate({**given, "temperature": 1e-4}), tmp_path, 3)
    assert cold.value == 1
    last = measure(subject, Measurement.model_validate({**given, "extract": r"(w\d+)$"}), tmp_path, 3, seed=1)
    assert list(last.rows) == [max(map(e.count, e)) / 4 for e in [[t.split()[-1] for t in one] for one in answers]]
    assert last.rows != score.rows
    assert len(measure(subject, Measurement.model_validate({**given, "samples": None}), tmp_path, 3).outputs) == 40


def test_empty_answers_and_those_without_a_match_agree_with_none(place: Path, tmp_path: Path) -> None:
    subject = load_subject(place / "base", EvaluateSpec())
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}])
    given = {"kind": "self_consistency", "data": "rows.jsonl", "max_new_tokens": 2, "extract": "#### (.*)"}
    assert measure(subject, Measurement.model_validate(given), tmp_path, 3).value == 0
    assert consistency(["", " ", "a"]) == consistency(["a", "b ", "c"]) == 1 / 3
    assert consistency(["", ""]) == 0


def test_self_consistency_is_an_option_of_the_command(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}])
    args = ["--self-consistency", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "2", "--json"]
    done = CliRunner().invoke(cli, ["evaluate", str(place / "base"), *args])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["self_consistency"]["outputs"]) == 8


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"temperature": 0}, "self_consistency needs a `temperature` above 0: greedy answers are all equal"),
        ({"samples": 1}, "samples"),
        ({"function": "r.py:f"}, "`function` has no effect for self_consistency"),
        ({"answer": "a"}, "`answer` has no effect for self_consistency"),
        ({"kind": "reward", "function": "r.py:f", "samples": 3}, "`samples` has no effect for reward"),
    ],
)
def test_settings_without_effect_on_self_consistency_are_refused(change: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        Measurement.model_validate({"kind": "self_consistency", "data": "rows.jsonl", **change})


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
        "broken.jsonl:2: is not JSON", "the columns are promt, completion; did you mean prompt by promt? Or name them with rename",
        "has no function 'goood'; did you mean 'good'?", "none.txt: no such file, neither beside the recipe (",
        "rows.jsonl: needs chosen and rejected; the columns are prompt", "extract has no group",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"metrics": {"a": {"kind": "reward", "data": "x"}}}, "kind: reward needs `function`"),
        ({"metrics": {"a": {"kind": "exact", "data": "x"}}}, "metrics.a.kind: must be one of exact_match, preference"),
        ({"metrics": {"a": {"kind": "perplexity", "dta": "x"}}}, "metrics.a.dta: unknown key; did you mean 'data'?"),
        ({"batchsize": 3}, "batchsize: unknown key; did you mean 'batch_size'?"),
        ({"suite": "open-llm-v3"}, "suite: must be open-llm-v1, got 'open-llm-v3'; did you mean 'open-llm-v1'?"),
        (
            {"metrics": {"a": {"kind": "perplexity", "data": "x", "function": "f:g"}}},
            "`function` has no effect for perplexity",
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
    with pytest.raises(
        EvaluateError, match="the longest prompt and its answer take 140 tokens, the model's limit is 128"
    ):
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


def test_without_lm_eval_its_tasks_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
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
    section = {"tasks": ["mine.yaml"], "batch_size": 2}
    found = evaluate(place / "base", section, folder=tmp_path)
    assert list(found) == ["mine"]
    assert 0.5 < found["mine"].value <= 1
    with pytest.raises(EvaluateError, match="lm-eval has no task 'hellaswg'; did you mean 'hellaswag'"):
        check_evaluate(EvaluateSpec(tasks=["hellaswg"]))


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the suite's data sets under their own names, a few generated rows in each; `datasets` looks there first."""
    folder, draw = tmp_path_factory.mktemp("hub"), random.Random(0)

    def text(count: int = 3) -> str:
        return " ".join(draw.choices(["the", "red", "fox", "went", "to", "a", "hill"], k=count))

    def put(repository: str, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
        card = []
        for name, splits in configs.items():
            card.append(
                {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}.jsonl"} for s in splits]}
            )
            (folder / repository / name).mkdir(parents=True)
            for split, rows in splits.items():
                write_rows(folder / repository / name / f"{split}.jsonl", rows)
        (folder / repository / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")

    def both(row: Callable[[], dict[str, Any]], held_out: str = "validation") -> dict[str, list[dict[str, Any]]]:
        return {"train": [row() for _ in range(30)], held_out: [row() for _ in range(3)]}

    four = [text() for _ in range(4)]
    put("allenai/ai2_arc", {"ARC-Challenge": both(lambda: {
        "question": text(), "choices": {"text": four, "label": list("ABCD")}, "answerKey": draw.choice("ABCD"),
    }, "test")})  # fmt: skip
    put("Rowan/hellaswag", {"default": both(lambda: {
        "activity_label": text(1), "ctx_a": text(), "ctx_b": "then", "endings": four, "label": draw.choice("0123"),
    })})  # fmt: skip
    put("allenai/winogrande", {"winogrande_xl": both(lambda: {
        "sentence": "the fox and the hill , _ was red", "option1": "fox", "option2": "hill", "answer": draw.choice("12"),
    })})  # fmt: skip
    put(
        "openai/gsm8k",
        {"main": both(lambda: {"question": text(), "answer": f"{text()}\n#### {draw.randint(1, 9)}"}, "test")},
    )
    targets = {"choices": four, "labels": [1, 1, 0, 0]}
    rows = [{"question": text(), "mc1_targets": targets, "mc2_targets": targets} for _ in range(3)]
    put("truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows}})

    def question() -> dict[str, Any]:
        return {"question": text(), "choices": four, "answer": draw.randrange(4)}

    own = Path(find_spec("lm_eval").origin).parent / "tasks/mmlu/default"
    subjects = [yaml.safe_load(file.read_text())["dataset_name"] for file in sorted(own.glob("mmlu_*.yaml"))]
    assert len(subjects) == 57
    put("cais/mmlu", {
        subject: {"dev": [question() for _ in range(5)], "test": [question() for _ in range(1 + at % 3)]}
        for at, subject in enumerate(subjects)
    })  # fmt: skip
    return folder


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (extra [eval])")
@pytest.mark.filterwarnings("default")
def test_the_suite_is_the_leaderboards_and_runs_offline(
    data_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own tasks, shots and metrics, on rows that stand in for their data; the mean, and MMLU's over subjects."""
    import datasets
    import lm_eval

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(data_sets)
    base = tmp_path / "base"
    world = Path(__file__).parents[2] / "recipes/quickstart/base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, initializer_range=0.5,
    )).save_pretrained(base)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world / name, base)
    asked, told = lm_eval.simple_evaluate, dict[str, dict[str, Any]]()

    def listening(**given: Any) -> Any:
        found = asked(**{**given, "log_samples": True})
        for key in ("results", "n-shot", "samples", "group_subtasks", "configs"):
            told.setdefault(key, {}).update(found[key])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", listening)
    found = evaluate(base, {"suite": "open-llm-v1", "batch_size": 32})
    shots = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
    assert list(found) == [*shots, "open-llm-v1"]
    assert found["open-llm-v1"].value == pytest.approx(sum(found[name].value for name in shots) / 6)
    parts = [name for group in told["group_subtasks"]["mmlu"] for name in told["group_subtasks"][group]]
    assert len(parts) == 57
    of_parts = [told["results"][name]["acc,none"] for name in parts]
    assert found["mmlu"].value == pytest.approx(sum(of_parts) / 57), "of subjects, as the leaderboard's was"
    assert found["mmlu"].value != pytest.approx(told["results"]["mmlu"]["acc,none"]), "lm-eval weighs by rows"
    for name, count in {**dict.fromkeys(parts, 5), **shots}.items():
        if name != "mmlu":
            assert told["n-shot"][name] == count, name
            metric = "acc_norm" if count > 5 else "exact_match" if name == "gsm8k" else "acc"
            assert metric in [one["metric"] for one in told["configs"][name]["metric_list"]], name
    for name, metric in (("arc_challenge", "acc_norm,none"), ("gsm8k", "exact_match,strict-match")):
        assert found[name].value == told["results"][name][metric]
        asked_with = str(told["samples"][name][0]["arguments"])
        assert asked_with.count("Question:") - asked_with.count("'Question:'") == {
            "arc_challenge": 4 * 26, "gsm8k": 6,
        }[name]  # fmt: skip


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (extra [eval])")
@pytest.mark.filterwarnings("default")
def test_a_task_whose_data_is_not_here_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TASK.format(name="mine", rows=tmp_path / "none.jsonl"))
    with pytest.raises(EvaluateError, match=r"mine: .*none.jsonl.*; its data must be loadable here"):
        check_data(EvaluateSpec(tasks=["mine.yaml"]), tmp_path, run_files=True)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (extra [eval])")
@pytest.mark.filterwarnings("default")
def test_prompts_that_do_not_fit_are_told_once(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1 " * 200, "choices": ["w2", "w3"], "gold": 1}] * 4)
    (tmp_path / "mine.yaml").write_text(TASK.format(name="mine", rows=tmp_path / "rows.jsonl"))
    evaluate(place / "base", {"tasks": ["mine.yaml"]}, folder=tmp_path)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "lm_eval" not in r.name]
    (warning,) = [text for text in told if not text.startswith("runs mine.yaml")]
    assert warning.startswith("mine: there are prompts longer than the 128 tokens")


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
    assert [line.split(":")[0] for line in shown.stderr.splitlines()] == ["preference", "perplexity"]
    assert re.search(r"^preference: [01]\.\d{4} ± 0\.\d{4} \(\d+\.\d s\)$", shown.stderr, re.MULTILINE)
    written = CliRunner().invoke(cli, [*args, "--json", "--out", str(tmp_path / "scores.json")])
    scores = json.loads(written.stdout)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["preference"]["rows"]) == 6
    by_line = CliRunner().invoke(cli, [*args[:4], "--unit", "line", "--json"])
    metric = {"kind": "perplexity", "data": str(place / "text.txt"), "unit": "line"}
    same = evaluate(place / "base", {"metrics": {"perplexity": metric}})["perplexity"]
    assert json.loads(by_line.stdout)["perplexity"]["value"] == same.value != scores["perplexity"]["value"]
    nothing = CliRunner().invoke(cli, ["evaluate", str(place / "base")])
    assert nothing.exit_code == 2
    assert "Nothing to evaluate" in nothing.stderr


def test_the_command_draws_rows_on_a_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    args = ["evaluate", str(place / "base"), "--preference", str(place / "pairs.jsonl"), "--batch-size", "5"]
    cli(args, standalone_mode=False)
    assert "preference" in terminal.getvalue()
    assert "12/12" in terminal.getvalue()  # chosen and rejected


def test_progress_is_reported_at_the_start_after_every_batch_and_at_the_end(place: Path) -> None:
    told: list[EvaluateProgress] = []
    found = evaluate(
        place / "base", spec_of(p={"kind": "preference", "data": "pairs.jsonl"}), folder=place, progress=told.append
    )
    assert [(now.name, now.done, now.rows) for now in told] == [
        ("p", 0, None), *(("p", done, 12) for done in (3, 6, 9, 12)), ("p", 0, None),
    ]  # fmt: skip
    assert told[-1].scores == {"p": found["p"]}


def test_bars_of_other_packages_do_not_reach_a_file(place: Path) -> None:
    run = python(
        "import sys; from paft_merge.cli import cli; cli(sys.argv[1:])",
        "evaluate", place / "base", "--perplexity", place / "text.txt",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "%|" not in run.stderr
    assert run.stderr.startswith("perplexity: ")


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


@pytest.mark.parametrize("rows", ['{"instruction": "w1"}\n{"output": "w2"}\n', '[{"instruction": ""}]'])
def test_instructions_are_checked(rows: str, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(rows)
    with pytest.raises(EvaluateError, match="rows without an instruction"):
        read_instructions(tmp_path / "set.json")


@pytest.mark.parametrize("option", ["--out", "--alpaca-eval"])
def test_a_place_that_cannot_be_written_is_reported_before_the_evaluation(
    option: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "set.jsonl").write_text('{"instruction": "w1"}\n')
    monkeypatch.setattr("paft_merge.evaluating.loading.load_subject", None)  # no model is loaded
    monkeypatch.setattr("paft_merge.evaluating.alpaca.load_for", None)
    args = (
        ["--perplexity", str(place / "text.txt")]
        if option == "--out"
        else ["--instructions", str(tmp_path / "set.jsonl")]
    )
    done = CliRunner().invoke(
        cli, ["evaluate", str(place / "base"), *args, option, str(tmp_path / "file" / "out.json")]
    )
    assert done.exit_code == 1
    assert done.output.startswith(f"error[OUTPUT]: {tmp_path}/file/out.json: cannot be written: ")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("row", "more", "why"),
    [
        ({"prompt": "q", "answer": "a"}, {"answer": "gold"}, "no row has the column 'gold'; correct answer:"),
        ({"prompt": "q", "answer": "a"}, {"prompt": "ask"}, "no row has the column 'ask'; correct prompt:"),
        (
            {"messages": [{"role": "user", "content": "q"}, CALL]},
            {},
            "row 1: the last answer is a tool call without text",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {**CALL, "content": "a"}], "tools": [{}]},
            {},
            "rows have tools",
        ),
    ],
)
def test_rows_that_would_be_scored_as_something_else_are_refused(
    row: dict[str, Any], more: dict[str, str], why: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    spec = EvaluateSpec.model_validate(spec_of(m={"kind": "exact_match", "data": "rows.jsonl", **more}))
    with pytest.raises(EvaluateError, match=why):
        check_evaluate(spec, tmp_path)


def test_rows_in_other_forms_give_the_scores_of_the_same_rows_in_turns(place: Path) -> None:
    good, bad = "w3 w4", "w5 w6 w7"
    forms = {
        "turns": {"prompt": [user("w1")], "chosen": [said(good)], "rejected": [said(bad)]},
        "implicit": {"chosen": [user("w1"), said(good)], "rejected": [user("w1"), said(bad)]},
        "feedback": {"prompt": "w1", "chosen": [user("w1"), said(good)], "rejected": [user("w1"), said(bad)]},
        "alpaca": {"instruction": "w1", "chosen": good, "rejected": bad},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "w1"}],
            "chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad},
        },
    }  # fmt: skip
    subject = load_subject(place / "base", EvaluateSpec())
    seen = {}
    for name, row in forms.items():
        write_rows(place / f"{name}.jsonl", [row])
        of = Measurement.model_validate({"kind": "preference", "data": f"{name}.jsonl"})
        (made,) = rows_for(of, place / f"{name}.jsonl", chat=True)
        assert made == forms["turns"], name
        seen[name] = measure(subject, of, place, 2).rows
    assert len(set(seen.values())) == 1
    ids = subject.tokenizer.apply_chat_template([user("w1"), said(good)], tokenize=True, return_dict=True)["input_ids"]
    assert token_ids(subject, [(_with_answer(subject, [user("w1")], [said(good)]), False)]) == [ids], (
        "the tokens that training has"
    )
    asked = [
        {"instruction": "w1", "output": 0},
        {"messages": [user("w1"), said("0")]},
        {"question": "w1", "answer": "0"},
    ]
    for row in asked:
        write_rows(place / "asked.jsonl", [row])
        of = Measurement.model_validate({"kind": "exact_match", "data": "asked.jsonl"})
        assert rows_for(of, place / "asked.jsonl", chat=True) == [{"prompt": [user("w1")], "completion": "0"}]
    (place / "table.csv").write_text("prompt,answer\nw1,007\n")
    of = Measurement.model_validate({"kind": "exact_match", "data": "table.csv"})
    assert rows_for(of, place / "table.csv", chat=True) == [{"prompt": "w1", "completion": "007"}]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "takes longer than 2 seconds",
        ),
        ("{{ 'a'|center(2000000000) }}", "needs more than 1 GiB of memory"),
        ("{{ 'a' * 3000000 }}", "refuses a row: it writes more than 1,000,000 characters"),
        ("{{ raise_exception('no') }}", r"refuses a row: no \(roles: user"),
    ],
)
@pytest.mark.parametrize("kind", ["exact_match", "preference"])
def test_a_hostile_template_is_one_line_and_takes_bounded_time_and_memory(
    place: Path, template: str, why: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_child, "__defaults__", (2.0, 1 << 30))
    shutil.copytree(place / "base", place / "hostile", dirs_exist_ok=True)
    for file in (place / "hostile").glob("chat_template*"):
        file.unlink()
    (place / "hostile/chat_template.jinja").write_text(template)
    turns = {"prompt": [user("w1")], "chosen": [said("w2")], "rejected": [said("w3")]}
    write_rows(place / "turns.jsonl", [turns if kind == "preference" else {"messages": [user("w1"), said("w2")]}])
    with pytest.raises(EvaluateError, match=why) as caught:
        evaluate(place / "hostile", spec_of(m={"kind": kind, "data": "turns.jsonl"}), folder=place)
    assert [problem.code for problem in caught.value.problems] == ["TEMPLATE"]


def test_answers_that_never_end_and_cut_texts_are_reported_beside_the_score(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(place / "short.jsonl", [{"prompt": "w1 w2", "answer": "w3"}])
    found = evaluate(
        place / "base", spec_of(m={"kind": "exact_match", "data": "short.jsonl", "max_new_tokens": 1}), folder=place
    )
    assert "none of the 1 answers ended within 1 tokens" in found["m"].warning
    assert f"see {DOCS}/training.md" in found["m"].warning
    assert found["m"].to_json()["warning"] in caplog.text
    one = {"kind": "perplexity", "data": "text.txt"}
    spec = EvaluateSpec.model_validate({"metrics": {"text": one, "line": {**one, "unit": "line"}}, "max_length": 16})
    found = evaluate(place / "base", spec, folder=place)
    assert "the text is longer than the model's window and was cut into 8 windows of 16 tokens" in found["text"].warning
    assert found["line"].warning == ""
    args = ["evaluate", str(place / "base"), "--perplexity", str(place / "text.txt"), "--unit", "line", "--json"]
    shown = CliRunner().invoke(cli, args)
    assert json.loads(shown.stdout)["perplexity"]["value"] == pytest.approx(found["line"].value, rel=1e-6)
