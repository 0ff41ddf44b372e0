"""Data sets of a recipe become rows that TRL trains on as a person would mean them, or are refused before training."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from toys.train import FAST, THEIR_WARNINGS, saved, tiny_llama, tokenizer

from paft_merge.cli import cli
from paft_merge.errors import TrainError
from paft_merge.training import child_process, train_adapter, train_options
from paft_merge.training.data import load_rows
from paft_merge.training.prepared_rows import PreparedRows, prepare_rows
from paft_merge.training.schema import read_adapter
from paft_merge.training.train_options import TrainOptions
from paft_merge.training.untrained_tokens import unlearnable

pytestmark = THEIR_WARNINGS

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches inside the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def said(text: str) -> Row:
    return {"role": "assistant", "content": text}


def loaded(folder: Path, data: Any, objective: str = "sft", *, chat: bool = True, **more: Any) -> list[Row]:
    more |= {"reward": {"rule": "length"}} if objective == "grpo" else {}
    spec = read_adapter({"objective": objective, "data": data, **more})
    rows: list[Row] = load_rows(spec.data, spec, chat=chat, folder=folder).plain.to_list()
    return rows


def prepared(rows: list[Row], objective: str = "sft", words: Any = None, **section: Any) -> PreparedRows:
    from paft_merge.training.arguments import training_arguments

    spec = read_adapter({"objective": objective, "data": "x", **section})
    arguments = training_arguments(spec, Path("none"), "a")
    return prepare_rows(spec, words or tokenizer(), arguments, TrainOptions(rows=rows))


A, B = (
    [{"prompt": f"p{i}", "completion": f" c{i}", "id": i} for i in range(4)],
    [{"prompt": f"p{i}", "completion": f" c{i}", "id": f"x{i}", "more": {"k": [1]}} for i in range(4, 6)],
)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ("a.jsonl", 4), ("set/b.jsonl.gz", 2), ({"path": "set"}, 6), ({"path": "set", "data_files": "b.*"}, 2),
        ({"path": "json", "data_files": ["a.jsonl", "set/b.jsonl.gz"]}, 6), ("set/*.jsonl*", 6),
        ({"path": "a.jsonl", "split": "train[1:3]"}, 2), ({"path": "a.jsonl", "split": "train[:50%]"}, 2),
        ({"path": "a.jsonl", "max_rows": 3}, 3), (["a.jsonl", "set/b.jsonl.gz"], 6),
    ],
)  # fmt: skip
def test_files_globs_folders_and_slices(data: Any, count: int, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", A)
    write(tmp_path / "set/a.jsonl", A)
    write(tmp_path / "set/b.jsonl.gz", B)
    rows = loaded(tmp_path, data)
    assert len(rows) == count
    assert all(row.keys() == {"prompt", "completion"} for row in rows)


@pytest.mark.parametrize("name", ["st*r", "q[1]", "h?x"])
def test_a_file_whose_name_is_a_pattern_is_this_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    write(tmp_path / "stXr" / "more.jsonl", [{"text": "other"}])
    write(folder / f"{name}.jsonl", [{"text": "own"}])
    for data in (f"{name}/{name}.jsonl", f"{name}/*.jsonl", name, {"path": name, "data_files": "*.jsonl"}):
        assert loaded(tmp_path, data) == [{"text": "own"}], data
    assert loaded(folder, "*.jsonl") == [{"text": "own"}]
    assert loaded(tmp_path, {"path": "json", "data_files": f"{name}/{name}.jsonl"}) == [{"text": "own"}]


def test_the_splits_of_a_folder_are_known_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "set/train.jsonl", A)
    write(tmp_path / "set/test.jsonl", B)
    assert len(loaded(tmp_path, "set")) == 4
    assert len(loaded(tmp_path, {"path": "set", "split": "test[:1]"})) == 1
    with pytest.raises(TrainError, match="Unknown split 'valid'; it has train, test"):
        loaded(tmp_path, {"path": "set", "split": "valid"})


def test_missing_files_are_reported_as_that_and_all_at_once(tmp_path: Path) -> None:
    data = ["no.jsonl", "no.csv.gz", "./folder", {"path": "json", "data_files": "no*.jsonl"}]
    with pytest.raises(TrainError) as caught:
        loaded(tmp_path, data)
    assert len(caught.value.problems) == 4
    assert all("no such file" in problem.what for problem in caught.value.problems)


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,completion\nzip,00501\nnone,None\nday,2024-01-02\n")
    assert [row["completion"] for row in loaded(tmp_path, "t.csv")] == ["00501", "None", "2024-01-02"]
    write(tmp_path / "n.jsonl", [{"prompt": "1-1=", "completion": 0}, {"prompt": "a", "completion": "b"}])
    assert [row["completion"] for row in loaded(tmp_path, "n.jsonl")] == ["0", "b"]


def test_reward_functions_get_the_other_columns_with_their_types(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "level": 3, "score": 0.5, "answer": "4", "tests": [1, {"x": 2}]}] * 2
    write(tmp_path / "p.jsonl", rows)
    assert loaded(tmp_path, "p.jsonl", "grpo") == rows


def test_sets_of_a_mixture_become_one_form_or_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "chat.jsonl", [{"messages": [user("a"), said("b")]}])
    write(tmp_path / "alpaca.jsonl", [{"instruction": "c", "output": "d"}])
    write(tmp_path / "text.jsonl", [{"prompt": "e", "completion": "f"}])
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    write(tmp_path / "tools.jsonl", [{"messages": [user("a"), {**said(""), **call}, said("b")]}])
    rows = loaded(tmp_path, ["chat.jsonl", "alpaca.jsonl"])
    assert rows == [{"messages": [user("a"), said("b")]}, {"messages": [user("c"), said("d")]}]
    rows = loaded(tmp_path, ["chat.jsonl", "tools.jsonl"])
    assert rows[1]["messages"][1]["tool_calls"] == call["tool_calls"]
    with pytest.raises(
        TrainError, match=r"chat.jsonl has messages as turns, text.jsonl has completion, prompt as texts"
    ):
        loaded(tmp_path, ["chat.jsonl", "text.jsonl"])


def test_an_answer_that_grows_into_its_prompt_is_refused_with_its_row() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {mark: i for i, mark in enumerate(["</s>", "u", "n", "d", "o", " ", "un", "un d", " d", "do"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("u", "n"), (" ", "d")]))
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    good = {"prompt": "u", "completion": " do"}
    with pytest.raises(TrainError, match=r"row 2: the prompt's end 'u' and the answer's beginning are one token 'un'"):
        prepared([good, {"prompt": "u", "completion": "no"}], words=words)
    found = prepared([good, {"prompt": "u ", "completion": "do"}], words=words)
    assert any("in 1 rows the space at the end of the prompt" in note for note in found.notes)


def test_a_row_that_the_template_refuses_is_named_with_its_roles() -> None:
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    rows = [{"messages": [user("w1"), said("w2")]}] * 1500
    rows.insert(1200, {"messages": [{"role": "system", "content": "x"}, user("w1"), said("w2")]})
    with pytest.raises(TrainError, match=r"row 1201: .*no system \(roles: system, user, assistant\)") as caught:
        prepared(rows, words=words)
    assert [problem.code for problem in caught.value.problems] == ["TEMPLATE"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "takes longer than 2 seconds",
        ),
        ("{{ 'a' * 10**11 }}", "needs more than 1 GiB of memory"),
        ("{{ 'a'|center(2000000000) }}", "needs more than 1 GiB of memory"),
        (
            "{% if messages|length > 2 %}{{ 'a'|center(2000000000) }}{% endif %}",
            "row 3: the chat template needs more",
        ),
        ("{{ 'a' * 3000000 }}", "it writes more than 1,000,000 characters"),
        ("{{ raise_exception('') }}", "refuses the row: TemplateError"),
    ],
)
@pytest.mark.parametrize("most", [None, 8])
def test_a_hostile_template_is_one_line_and_takes_bounded_time_and_memory(
    template: str, why: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process.in_child, "__defaults__", (2.0, 1 << 30))
    words = tokenizer()
    words.chat_template = template
    rows = [{"prompt": [user("w1")], "chosen": [said("w2")], "rejected": [said("w3")]}] * 3
    rows[2] = {**rows[2], "prompt": [user("w1"), said("w2"), user("w3")]}
    with pytest.raises(TrainError, match=why) as caught:
        prepared(rows, "dpo", words, **({"max_prompt_tokens": most} if most else {}))
    assert {problem.code for problem in caught.value.problems} == {"TEMPLATE"}


@pytest.mark.parametrize(
    ("then", "why"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "takes longer than 2 seconds",
        ),
        ("{{ raise_exception('too few turns') }}", r"refuses the row: too few turns \(roles: user, assistant, user\)"),
    ],
)
def test_a_template_that_is_hostile_to_shortened_prompts_is_one_line(
    then: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process.in_child, "__defaults__", (2.0, 1 << 30))
    words = tokenizer()
    words.chat_template = f"{{% if messages|length == 1 %}}{then}{{% endif %}}{words.chat_template}"
    long = [user("w1"), said("w2"), user("w3 w4 w5")]
    rows = [{"prompt": long, "chosen": [said("w2")], "rejected": [said("w3")]}] * 2
    with pytest.raises(TrainError, match=f"row 1.*: the chat template {why}") as caught:
        prepared(rows, "dpo", words, max_prompt_tokens=6)
    assert [problem.code for problem in caught.value.problems] == ["TEMPLATE"]


def test_a_tokenizer_works_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    words = tokenizer()
    expected = words(["w1 w2"] * 100)["input_ids"]
    assert list(child_process.in_child(lambda: words(["w1 w2"] * 100)["input_ids"], seconds=5)) == expected


def test_a_child_that_dies_is_reported() -> None:
    with pytest.raises(child_process.LimitError, match="ended its process"):
        list(child_process.in_child(lambda: (os._exit(3) for _ in range(1))))


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_tools_reach_the_template(objective: str) -> None:
    words = tokenizer()
    words.chat_template = "{% if tools %}{{ raise_exception(tools[0].name) }}{% endif %}" + words.chat_template
    row = {"messages": [user("w1"), said("w2")]} if objective == "sft" else {"prompt": [user("w1")], "chosen": [said("w2")], "rejected": [said("w3")]}  # fmt: skip
    with pytest.raises(TrainError, match=r"row 2: .*w9 .roles"):
        prepared([row, {**row, "tools": [{"name": "w9"}]}], objective, words)


def test_questions_of_weight_0_are_trained_with_the_loss_on_answers() -> None:
    rows = [{"messages": [{**user("w1"), "weight": 0}, {**said("w2"), "weight": 1}]}]
    made = prepared(rows, training={"assistant_only_loss": True}).train
    assert made.to_list() == [{"messages": [user("w1"), said("w2")]}]


def test_rows_whose_answer_is_cut_off_are_counted_and_refused_when_none_is_left() -> None:
    long, short = {"prompt": "w1 " * 9, "completion": "w2"}, {"prompt": "w1 ", "completion": "w2"}
    found = prepared([long, short], training={"max_length": 8})
    assert found.facts["rows_without_answer"] == 1
    assert any("1 of 2 rows have no token of an answer" in note for note in found.notes)
    with pytest.raises(TrainError, match="no row has a token of an answer within max_length 8"):
        prepared([long, long], training={"max_length": 8})
    pair = {"prompt": "w1 " * 9, "chosen": "w2", "rejected": "w3"}
    with pytest.raises(TrainError, match="no row has a token of an answer"):
        prepared([pair], "dpo", training={"max_length": 8})
    assert prepared([pair], "dpo", training={"max_length": 8}, max_prompt_tokens=4).facts["prompts_cut"] == 1


def test_all_problems_of_rows_and_evaluation_rows_are_reported_together() -> None:
    spec = read_adapter({"objective": "dpo", "data": "x"})
    options = TrainOptions(rows=[{"prompt": "a", "chosen": "", "rejected": "b"}], eval_rows=[{"prompt": "a"}])
    with pytest.raises(TrainError) as caught:
        prepare_rows(spec, tokenizer(), None, options)
    assert [problem.where for problem in caught.value.problems] == ["data", "eval_data"]


def test_equal_pairs_are_in_the_record(tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "chosen": " w2", "rejected": " w3"}] * 4 + [
        {"prompt": "w1", "chosen": "w2", "rejected": "w2"}
    ]
    section = {"objective": "dpo", "data": "m", "training": {**FAST, "max_steps": 1}}
    out = train_adapter(tiny_llama(), section, tmp_path / "x", rows=rows, tokenizer=tokenizer(), base_name="toy")
    record = json.loads((out / "paft_train.json").read_text())
    assert record["data"]["rows"] == 4
    assert "1 pairs have equal answers and are left out" in record["run"]["warnings"]


@pytest.mark.parametrize("fault", ["zero", "alike", "mean", "large"])
def test_tokens_whose_rows_were_never_trained_are_reported(fault: str, tmp_path: Path) -> None:
    model, words = tiny_llama(), tokenizer()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[1] = {"zero": 0 * head[1], "alike": head[2], "mean": head.mean(0), "large": 40 * head[1]}[fault]
    labels = np.zeros(38, bool)
    labels[10:20] = True

    def found(**lora: Any) -> list[str]:
        return unlearnable(labels, model, words, read_adapter({"objective": "sft", "data": "x", "lora": lora}))

    assert found() == []
    labels[1] = True
    (one,) = found()
    assert one.startswith("'</s>' (")
    assert found(modules_to_save=["lm_head"]) == found(extra={"trainable_token_indices": [1]}) == []
    section = {"objective": "sft", "data": "m", "training": {**FAST, "max_steps": 1}}
    rows = [{"prompt": "w1", "completion": " w2"}] * 4
    out = train_adapter(model, section, tmp_path / "x", rows=rows, tokenizer=words, base_name="toy")
    warnings = json.loads((out / "paft_train.json").read_text())["run"]["warnings"]
    assert any("never trained in the base" in text and "modules_to_save" in text for text in warnings)


@pytest.mark.parametrize("package", ["trl", "datasets", "psutil"])
@pytest.mark.parametrize("command", [["--show", "1"], ["--dry-run"], ["out"], ["out", "--devices", "cpu:2"]])
def test_a_missing_package_is_one_line_that_names_its_extra(
    package: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "base")
    write(tmp_path / "chat.jsonl", [{"instruction": "w1", "output": "w2 w3"}])
    adapters = {"sft": {"objective": "sft", "data": "chat.jsonl"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"base_model": "base", "adapters": adapters}))
    monkeypatch.setattr(train_options, "find_spec", lambda name: None if name == package else name)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["train", "r.yaml", *command])
    assert done.exit_code == 1
    assert done.stderr == f"error[MISSING]: train: {package} not installed; pip install 'paft-merge[train]'\n"


def test_show_prints_rows_with_their_labels_marked(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    write(tmp_path / "chat.jsonl", [{"instruction": f"w{i}", "output": "w2 w3"} for i in range(5)])
    write(tmp_path / "pairs.jsonl", [{"prompt": "w1", "chosen": " w2", "rejected": " w3"}] * 3)
    adapters = {
        "sft": {"objective": "sft", "data": "chat.jsonl", "training": {"packing": True, "max_length": 5}},
        "dpo": {"objective": "dpo", "data": "pairs.jsonl"},
        "grpo": {"objective": "grpo", "data": "pairs.jsonl", "reward": {"rule": "length"}},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"base_model": "base", "adapters": adapters}))
    done = CliRunner().invoke(cli, ["train", str(tmp_path / "r.yaml"), "--show", "2", "--dry-run"])
    assert done.exit_code == 0, done.output
    for part in (
        "--- sft: row 2, text, 5 tokens ---\n<user> w1 <assistant>[[ w2 w3]]\n",
        "--- dpo: row 1, chosen, 3 tokens ---\nw1[[ w2 </s>]]\n", "--- dpo: row 1, rejected, 3 tokens ---\nw1[[ w3 </s>]]\n",
        "--- grpo: row 1, prompt, 1 tokens ---\nw1\n", "sft: 5 rows are right\n", "grpo: 3 rows are right\n",
    ):  # fmt: skip
        assert part in done.stdout, done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [
        "base",
        "chat.jsonl",
        "pairs.jsonl",
        "r.yaml",
    ]
    write(tmp_path / "pairs.jsonl", [{"prompt": "w1", "chosen": " w2", "rejected": ""}])
    done = CliRunner().invoke(cli, ["train", str(tmp_path / "r.yaml"), "--dry-run"])
    assert done.exit_code == 1
    line = next(n for n, text in enumerate((tmp_path / "r.yaml").read_text().splitlines(), 1) if "dpo:" in text)
    place = f"{tmp_path / 'r.yaml'}:{line}: adapters.dpo"
    assert f"error[DATA]: {place}: pairs.jsonl: row 1: rejected is blank" in done.stderr


QUESTION, GOOD = "w1 " * 9, [user("w1 " * 9), said("w2 w3")]
FORMS = {
    "HuggingFaceH4/ultrachat_200k": {"prompt": QUESTION, "prompt_id": "i", "messages": [*GOOD, user("w4"), said("w5")]},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": QUESTION, "prompt_id": "i", "chosen": GOOD, "rejected": [GOOD[0], said("w6")], "messages": GOOD,
        "score_chosen": 8.0, "score_rejected": 3.0,
    },
}  # fmt: skip
"""One row of each data set of `recipes/`, in its own form."""

HARDWARE = {
    "gradient_checkpointing": False, "optim": "adamw_torch", "max_steps": 1, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "save_strategy": "no", "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("train-*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_trains_on_rows_in_the_form_of_its_data(recipe: Path, tmp_path: Path) -> None:
    sections = yaml.safe_load(recipe.read_text())["adapters"]
    base = saved(tmp_path / "base")
    for name, section in sections.items():
        for key in {"data", "eval_data"} & section.keys():
            file = write(tmp_path / f"{name}-{key}.jsonl", [FORMS[section[key]["path"]]] * 4)
            section[key] = {"path": str(file), "columns": section[key]["columns"]}
        section |= {"base": {"dtype": "float32"}, "training": {**section["training"], **HARDWARE}}
        section.pop("chat_template", None)
        out = train_adapter(base, section, tmp_path / name)
        assert json.loads((out / "paft_train.json").read_text())["data"]["rows"] == 4
