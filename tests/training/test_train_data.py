"""Rows: loading and mixing, what is refused before the first step, what is counted, fingerprints."""

from __future__ import annotations

import json

import pytest
from toys.train import FAST, THEIR_WARNINGS, dataset, preferences, saved, texts, tiny_llama, tokenizer

from paft_merge.errors import RecipeError, TrainError
from paft_merge.plan.vocabulary.chat_templates import choose_template
from paft_merge.recipe import Located
from paft_merge.training import train_adapter
from paft_merge.training.base_model import load_tokenizer
from paft_merge.training.data import Loaded, fingerprint, shorten_prompts
from paft_merge.training.data import load_rows as load
from paft_merge.training.prepared_rows import prepare_rows
from paft_merge.training.schema import DataSpec, read_adapter, read_adapters
from paft_merge.training.train_options import TrainOptions

pytestmark = THEIR_WARNINGS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def spec(objective="sft", **more):
    return read_adapter({"objective": objective, "data": "x", **more})


def load_rows(sources, folder=None, objective="sft", **more):
    more = more | ({"reward": {"rule": "length"}} if objective == "grpo" else {})
    return load(sources, spec(objective, **more), chat=True, **({} if folder is None else {"folder": folder})).plain


def prepared(rows, section, words, **arguments):
    """What a training begins with, of rows in memory."""
    from trl import SFTConfig

    arguments = SFTConfig(output_dir="none", bf16=False, report_to="none", **arguments)
    return prepare_rows(section, words, arguments, TrainOptions(rows=rows))


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def codes(error):
    return [problem.code for problem in error.value.problems]


def test_json_lines_json_parquet_and_saved_sets_give_the_same_rows(tmp_path):
    rows = [{"text": "w1 w2"}, {"text": "w3"}]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    dataset(rows).to_parquet(tmp_path / "c.parquet")
    dataset(rows).save_to_disk(tmp_path / "d")
    for name in ("a.jsonl", "b.json", "c.parquet", "d"):
        loaded = load_rows([DataSpec(path=name)], tmp_path)
        assert loaded.to_list() == rows, name
    assert len({fingerprint(load_rows([DataSpec(path=n)], tmp_path)) for n in ("a.jsonl", "c.parquet", "d")}) == 1


def test_a_folder_as_on_the_hub_loads_by_its_card(tmp_path):
    card = (
        "---\nconfigs:\n- config_name: chat\n  data_files:\n  - {split: train_sft, path: data/train-*.parquet}\n---\n"
    )
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text(card)
    dataset([{"text": f"w{i}"} for i in range(4)]).to_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    source = DataSpec(path="set", name="chat", split="train_sft[:3]")
    assert load_rows([source], tmp_path)["text"][:] == ["w0", "w1", "w2"]
    with pytest.raises(TrainError, match="set: cannot be loaded"):
        load_rows([DataSpec(path="set", name="chat", split="test_sft")], tmp_path)


def test_every_source_that_cannot_be_read_is_told_at_once(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    sources = [DataSpec(path="nowhere.jsonl"), DataSpec(path="x.txt")]
    with pytest.raises(TrainError, match="not a known format") as caught:
        load_rows(sources, tmp_path)
    assert codes(caught) == ["DATA", "DATA"]


def test_columns_are_renamed_and_selected_and_a_misspelt_one_gets_a_hint(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b", "id": 1}] * 3)
    source = DataSpec(
        path="a.jsonl", rename={"question": "prompt", "answer": "completion"}, columns=["prompt", "completion"]
    )
    rows = load_rows([source], tmp_path)
    assert rows.column_names == ["prompt", "completion"]
    assert len(load_rows([DataSpec(path="a.jsonl", max_rows=2)], tmp_path)) == 2
    with pytest.raises(TrainError, match="did you mean 'question'"):
        load_rows([DataSpec(path="a.jsonl", rename={"qestion": "prompt"})], tmp_path)


def test_a_mixture_by_fraction_never_repeats_a_row(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(10)])
    write_lines(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(40)])
    rows = load_rows([DataSpec(path="a.jsonl", fraction=1), DataSpec(path="b.jsonl", fraction=1)], tmp_path)
    assert sorted(t["text"][0] for t in rows) == ["a"] * 10 + ["b"] * 10
    assert len(load_rows([DataSpec(path="a.jsonl"), DataSpec(path="b.jsonl")], tmp_path)) == 50
    with pytest.raises(TrainError, match="some sets of the mixture have a fraction"):
        load_rows([DataSpec(path="a.jsonl", fraction=1), DataSpec(path="b.jsonl")], tmp_path)


@pytest.mark.parametrize(
    ("objective", "rows", "message"),
    [
        ("sft", [{"body": "x"}], "needs messages, or a question and an answer, or text; the columns are body"),
        ("dpo", [{"prompt": "x", "chosen": "y"}], "needs chosen and rejected; the columns are prompt, chosen"),
        ("grpo", [{"text": "x"}], "needs a prompt; the columns are text"),
        ("sft", [{"text": ""}], "row 1: text is blank"),
        (
            "dpo",
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": ""}],
            "row 2: rejected is blank",
        ),
    ],
)
def test_rows_that_do_not_fit_the_objective_are_refused(objective, rows, message):
    reward = {"reward": {"rule": "length"}} if objective == "grpo" else {}
    with pytest.raises(TrainError, match=message) as caught:
        prepared(dataset(rows), spec(objective, **reward), tokenizer())
    assert codes(caught) == ["DATA"]


def test_an_empty_split_and_a_missing_template_are_refused():
    with pytest.raises(TrainError, match="the data set is empty"):
        prepared(texts().select([]), spec(), tokenizer())
    chat = dataset([{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}])
    with pytest.raises(TrainError, match="no chat template") as caught:
        prepared(chat, spec(), tokenizer(chat=False))
    assert codes(caught) == ["TEMPLATE"]
    marks = tokenizer(pad=False)
    marks.eos_token = None
    with pytest.raises(TrainError, match="neither a pad nor an eos token"):
        prepared(texts(), spec(), marks)
    with pytest.raises(TrainError, match="assistant_only_loss needs conversations"):
        prepared(texts(), spec(training={"assistant_only_loss": True}), tokenizer())


def test_rows_longer_than_the_limit_are_counted_with_their_end_token():
    rows = dataset([{"text": "w1 " * n} for n in (3, 7, 8, 20)])
    facts = prepared(rows, spec(), tokenizer(), max_length=8).facts
    del facts["fingerprint"]
    assert facts == {
        "rows": 4, "rows_looked_at": 4, "rows_cut": 2, "longest_tokens": 21, "max_length": 8, "rows_without_answer": 0,
    }  # fmt: skip
    pairs = dataset([{"prompt": "w1 w2 ", "chosen": "w3 " * 8, "rejected": "w4"}])
    assert prepared(pairs, spec("dpo"), tokenizer(), max_length=10).facts["rows_cut"] == 1
    assert "rows_cut" not in prepared(rows, spec(), tokenizer(), max_length=None).facts


def test_prompts_are_shortened_from_the_left_turns_first():
    words = tokenizer()
    rows = dataset(
        [
            {"prompt": "w1 w2 w3 w4", "chosen": "w5", "rejected": "w6"},
            {"prompt": "w1", "chosen": "w5", "rejected": "w6"},
        ]
    )
    shorter, cut = shortened(rows, words, 2)
    assert cut == 1
    assert shorter[0]["prompt"].split() == ["w3", "w4"]
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4 w5 w6")]
    chat = [{"role": role, "content": content} for role, content in turns]
    answer = {"chosen": [{"role": "assistant", "content": "w7"}], "rejected": [{"role": "assistant", "content": "w8"}]}
    shorter, _ = shortened(dataset([{"prompt": chat, **answer}]), words, 5)
    assert [turn["content"] for turn in shorter[0]["prompt"]] == ["w4 w5 w6"]
    shorter, _ = shortened(dataset([{"prompt": chat, **answer}]), words, 3)
    assert shorter[0]["prompt"][0]["content"].strip() == "w6"


def shortened(rows, words, most):
    """The rows with shorter prompts, and how many were cut."""
    loaded = Loaded(rows)
    cut = shorten_prompts(loaded, words, most)
    return loaded.rows, cut


def test_the_fingerprint_follows_the_content_and_nothing_else():
    one, again, other = texts(seed=1), texts(seed=1), texts(seed=2)
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)
    doubled = dataset(one.to_list() * 2)
    assert fingerprint(doubled.select(range(len(one)))) == fingerprint(one)


def test_cut_rows_and_a_missing_pad_token_are_warnings_in_the_record(tmp_path):
    section = {"objective": "sft", "data": "m", "training": {**FAST, "max_steps": 1, "max_length": 8}}
    out = train_adapter(
        tiny_llama(), section, tmp_path / "x", rows=texts(), tokenizer=tokenizer(pad=False), base_name="toy"
    )
    record = json.loads((out / "paft_train.json").read_text())
    assert record["data"]["rows_cut"] == 64
    assert any("64 of 64 rows looked at are longer than max_length 8" in w for w in record["run"]["warnings"])
    assert any("no pad token" in w for w in record["run"]["warnings"])


def test_a_pad_token_without_a_row_is_replaced_and_other_tokens_without_one_are_refused(tmp_path):
    words = tokenizer()
    words.add_special_tokens({"pad_token": "<more>"})
    section = {"objective": "sft", "data": "m", "training": {**FAST, "max_steps": 1}}
    options = {"tokenizer": words, "base_name": "toy"}
    out = train_adapter(tiny_llama(), section, tmp_path / "x", rows=texts(), **options)
    warnings = json.loads((out / "paft_train.json").read_text())["run"]["warnings"]
    assert any("no row for the pad token '<more>'; the eos token is used" in one for one in warnings)
    words.add_tokens(["w99"])
    with pytest.raises(
        TrainError, match=r"1 of their tokens have no row in the base's embedding: 'w99'; use the base's"
    ):
        train_adapter(tiny_llama(), section, tmp_path / "y", rows=dataset([{"text": "w1 w99 w2"}] * 8), **options)


def test_an_unknown_target_a_training_typo_and_a_bad_loss_are_refused_before_training(tmp_path):
    def start(eval_rows=None, **section):
        options = {"eval_rows": eval_rows, "tokenizer": tokenizer(), "base_name": "toy"}
        train_adapter(tiny_llama(), section, tmp_path / "x", rows=preferences(), **options)

    with pytest.raises(TrainError, match="did you mean 'q_proj'") as caught:
        start(objective="dpo", data="m", lora={"target_modules": ["q_porj", "v_proj", "lm_head"]}, training=FAST)
    assert codes(caught) == ["TARGET", "TARGET"]
    for pattern, message in (
        ("q_proj", "no module of the base matches"), ("(q", "not a regular expression"), ("([a-z_.0-9]+)+!", "takes longer"),
    ):  # fmt: skip
        with pytest.raises(TrainError, match=message) as caught:
            start(objective="dpo", data="m", lora={"target_modules": pattern}, training=FAST)
        assert codes(caught) == ["TARGET"]
    eval_rows = dataset([{"prompt": "w1", "chosen": "w2"}])
    with pytest.raises(TrainError, match=r"eval_data: needs chosen and rejected"):
        start(objective="dpo", data="m", eval_rows=eval_rows, training=FAST)
    with pytest.raises(TrainError, match="did you mean 'learning_rate'") as caught:
        start(objective="dpo", data="m", training={"lerning_rate": 1, "loss_type": ["sigmod"], "betta": 1})
    assert codes(caught) == ["TRAINING"] * 3
    assert "did you mean 'sigmoid'" in str(caught.value)
    with pytest.raises(TrainError, match=r"use orpo: \{beta: \.\.\.\}"):
        start(objective="orpo", data="m", training={"beta": 0.1})
    with pytest.raises(TrainError, match="loss_weights"):
        start(objective="dpo", data="m", training={"loss_weights": [1.0, 2.0]})
    assert not (tmp_path / "x.part").exists()


def test_all_faults_of_all_adapters_are_told_with_hints():
    recipe = {
        "adapters": {
            "a": {"objective": "sft", "data": {"pth": "x"}, "l1": {"strenght": 1}},
            "b": {"objective": "dpo", "data": ["x"], "lora": {"r": 0}, "training": {"output_dir": "y"}},
            "c": {"objective": "on_policy", "data": "x"},
            "d": {"objective": "sft", "data": "x", "l1": {"mode": "prox", "penalize": "product"}},
            "e": {"objective": "sft", "data": "x", "orpo": {"beta": 1}},
        }
    }
    with pytest.raises(RecipeError) as caught:
        read_adapters(Located(recipe, "r.yaml"))
    told = str(caught.value)
    for expected in (
        "r.yaml: adapters.a.data.pth: unknown key; did you mean 'path'?",
        "adapters.a.l1.strenght: unknown key; did you mean 'strength'?",
        "adapters.b.lora.r: must be at least 1, got 0",
        "needs `reward`",
        "the proximal step works on factors",
        "`orpo` has no effect for objective sft",
    ):
        assert expected in told


def test_a_bare_on_which_yaml_reads_as_true_is_the_former_name_of_penalize(caplog):
    import yaml

    section = yaml.safe_load("{objective: sft, data: x, l1: {strength: 1e-4, on: factors}}")
    assert True in section["l1"]
    l1 = read_adapter(section, "bare").l1
    assert (l1.penalize, l1.strength) == ("factors", 1e-4)
    assert "adapters.bare.l1.on: the key `on` was renamed; write `penalize`" in caplog.text


def test_reading_a_section_imports_neither_torch_nor_trl():
    import subprocess
    import sys

    heavy = "{'torch', 'trl', 'transformers'} & set(sys.modules)"
    code = f"import sys, paft_merge.training.schema, paft_merge.training; assert not {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_base_folder_is_loaded_with_its_tokenizer_and_template(tmp_path):
    base = saved(tmp_path / "base")
    chat = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]}] * 8
    write_lines(tmp_path / "rows.jsonl", chat)
    section = {"objective": "sft", "data": "rows.jsonl", "training": {**FAST, "max_steps": 1}}
    out = train_adapter(base, section, tmp_path / "out", folder=tmp_path)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    with pytest.raises(TrainError, match="neither a local folder nor") as caught:
        train_adapter(str(tmp_path / "no-base"), section, tmp_path / "y", folder=tmp_path)
    assert codes(caught) == ["BASE"]


def test_an_empty_file_and_a_template_that_is_not_there_are_told_as_that(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(TrainError, match=r"none\.jsonl: the file is empty"):
        load_rows([DataSpec(path="none.jsonl")], tmp_path)
    base = saved(tmp_path / "base")
    with pytest.raises(TrainError, match=r"there is no file chat\.jinja; check chat_template"):
        train_adapter(base, {"objective": "sft", "data": "x", "chat_template": "chat.jinja"}, tmp_path / "x")


def test_a_named_chat_template_is_the_one_that_a_merge_uses(tmp_path):
    base = saved(tmp_path / "base")
    (tmp_path / "chatml").write_text("not this file")
    loaded = load_tokenizer(base, spec(chat_template="chatml"), tmp_path)
    assert loaded.chat_template == choose_template("chatml", [])
    assert "<|im_start|>" in loaded.chat_template


def test_a_data_set_of_the_hub_is_read_at_its_revision_and_one_that_is_not_there_is_told(monkeypatch, tmp_path):
    import datasets
    from toys.hub import online
    from toys.hub_server import HubServer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")
    with HubServer() as hub:
        online(monkeypatch, hub.url, tmp_path / "home")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        rows = [json.dumps({"prompt": f"p{i} ", "completion": "c"}).encode() for i in range(4)]
        old = hub.add("me/words", {"train.jsonl": b"\n".join(rows[:3]), "test.jsonl": rows[3]})
        hub.add("me/words", {"train.jsonl": rows[3]})
        found = load_rows([DataSpec(path="me/words", split="train[:2]", revision=old)])
        assert found["prompt"] == ["p0 ", "p1 "]
        assert load_rows([DataSpec(path="me/words")])["prompt"] == ["p3 "]
        with pytest.raises(TrainError, match="me/none: cannot be loaded: DatasetNotFoundError"):
            load_rows([DataSpec(path="me/none")])
        with pytest.raises(TrainError, match=r"me/words: cannot be loaded: ValueError: Unknown split .trian"):
            load_rows([DataSpec(path="me/words", split="trian")])
