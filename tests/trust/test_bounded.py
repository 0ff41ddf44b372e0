"""A stranger's file cannot stop or fill the machine: templates, patterns of adapters, and files that are no files."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import random_state, save_checkpoint

from paft_merge.engine.api import merge, open_plan
from paft_merge.errors import PaftMergeError
from paft_merge.evaluating import evaluate
from paft_merge.inputs.adapters import patterns
from paft_merge.inputs.adapters.peft_types import read_settings
from paft_merge.inputs.architecture import Architecture
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.plan.vocabulary import chat_templates
from paft_merge.plan.vocabulary.chat_templates import ChatTemplateError, check_template
from paft_merge.training.base_model import load_tokenizer
from paft_merge.training.schema import read_adapter

PATHS = (
    "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "a.b", "", "model.layers.1.mlp.experts.3.up_proj",
    "text.encoder.layer.2.x-y", "q_proj",
)  # fmt: skip
PATTERNS = (
    "q_proj", "model.layers.0.self_attn.q_proj", r"layers\.(0|1|2)\..*q_proj", r".*\.\d+\..*", "[a-z_]+", "[^.]+", r"(q|k|v)_proj", "a?b?",
    r"layers\.[0-9]{1,2}\.mlp\.(up|down)_proj", r"^model\.layers", r"\bq_proj\b", r".{3,7}", "(?:up|down)_proj$", r"(a|b)*\.b", "x-y", ".*?", r"\w+-\w",
    r"experts\.\d+\.up_proj", r"(layers\.1)?.*", "()", "(|a)b", "q_proj|lm_head", r"\S+", r"[\d.a]+", r"(?:){9}a\.b",
)  # fmt: skip


@pytest.mark.parametrize("key", PATTERNS)
def test_a_pattern_means_what_it_means_to_re(key: str) -> None:
    for path in PATHS:
        wanted = re.match(rf"(.*\.)?({key})$", path) is not None
        assert patterns.Budget().matches(key, path) == wanted, path


def test_random_patterns_mean_what_they_mean_to_re() -> None:
    chance = random.Random(0)

    def make(depth: int) -> str:
        if not depth:
            return chance.choice(("a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", ""))
        parts = [make(depth - 1) for _ in range(chance.randrange(1, 4))]
        return f"({chance.choice(('', '|')).join(parts)}){chance.choice(('', '*', '+', '?', '{0,2}', '{2}', '*?'))}"

    for _ in range(300):
        key = make(2)
        for _ in range(6):
            path = "".join(chance.choice("ab.") for _ in range(chance.randrange(6)))
            wanted = re.match(rf"(.*\.)?({key})$", path) is not None
            assert patterns.Budget().matches(key, path) == wanted, (key, path)


@pytest.mark.parametrize(
    "key",
    [
        "(([a-z_.0-9])+)+!", "(a|a)*b", "(.*)*(.*)*(.*)*x", "((a{1000}){1000}){1000}", "a{99999999999999999999}", "(" * 3000, "(?i)a", "(?=a)b.*",
        r"(a)\1+", "x" * 20_000, "(?:(?:){999999}){999999}", "(?:a{60000}){60000}", "(a?){900}a{900}",
    ],
)  # fmt: skip
def test_a_costly_pattern_is_matched_or_refused_soon(key: str) -> None:
    began, budget = time.monotonic(), patterns.Budget()
    with suppress(patterns.PatternError):
        patterns.check_pattern(key)
        for layer in range(50):
            budget.matches(key, f"model.layers.{layer}.self_attn.q_proj.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    assert time.monotonic() - began < 7


def test_an_adapter_with_a_costly_pattern_is_one_line(family: Callable[..., dict[str, Path]]) -> None:
    models = family()
    path = models["sft"] / "adapter_config.json"
    config = json.loads(path.read_text())
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models["base"]),
        "models": [{"model": f"{models['base']}+{models['sft']}", "parameters": {"weight": 1.0}}],
    }
    for key, error in (
        ("(([a-z_.0-9])+)+!", ""),
        ("a{99999999999999999999}", "counts too far"),
        ("(" * 3000, "nested too deeply"),
    ):
        path.write_text(json.dumps({**config, "rank_pattern": {key: 4}, "alpha_pattern": {key: 8}}))
        with open_plan(recipe) if not error else pytest.raises(PaftMergeError, match=error):
            if error:
                open_plan(recipe).__enter__()


@pytest.mark.parametrize(
    "text",
    [
        '{{ "a"|center(2000000000) }}', "{{ 10**5000 }}", "{{ 'a' * 10**10 }}", "{% for a in range(99999999) %}{{ range(99999999)|list }}{% endfor %}",
        "{{ " + "9" * 5000 + " }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% if 1 %}" * 2000,
    ],
)  # fmt: skip
def test_a_template_is_parsed_and_not_computed(text: str) -> None:
    began = time.monotonic()
    with suppress(ChatTemplateError):
        check_template(text)
    assert time.monotonic() - began < 2


def test_no_filter_runs_while_a_template_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    monkeypatch.setitem(chat_templates._ENVIRONMENT.filters, "center", lambda *given: runs.append(given))
    check_template('{{ "a"|center(2000000000) }}')
    assert runs == []


def test_a_template_with_an_unknown_filter_is_refused_with_its_line() -> None:
    with pytest.raises(ChatTemplateError, match="line 2 of the template is not valid Jinja: No filter named 'nope'"):
        check_template("{{ a }}\n{{ a|nope }}")
    check_template("{% for m in messages %}{% generation %}{{ m|tojson }}{% endgeneration %}{% break %}{% endfor %}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_labels", 10**9),
        ("num_hidden_layers", 10**9),
        ("text_config", {"num_experts": 10**9}),
        ("num_hidden_layers", 200_000),
    ],
)
def test_a_config_cannot_ask_for_any_number_of_parts(tmp_path: Path, field: str, value: object) -> None:
    save_checkpoint(tmp_path, random_state(0))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    began = time.monotonic()
    with suppress(PaftMergeError), Checkpoint.open(tmp_path) as base:
        assert value == 200_000
        assert Architecture.of(base) is None
    assert time.monotonic() - began < 30
    if value != 200_000:
        section = {"objective": "sft", "data": [], "lora": {"r": 2}}
        with pytest.raises(PaftMergeError, match=r"config\.json: num_\w+: 1000000000 is too large"):
            load_tokenizer(str(tmp_path), read_adapter({**section, "data": "rows"}))
        with pytest.raises(PaftMergeError, match="is too large"):
            evaluate(tmp_path, {"metrics": {"a": {"kind": "perplexity", "data": str(tmp_path / "config.json")}}})


@pytest.fixture
def odd_files(family: Callable[..., dict[str, Path]]) -> Callable[[str, str], dict[str, Path]]:
    models = family()

    def make(name: str, kind: str) -> dict[str, Path]:
        file = models["base"] / name
        file.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(file)
        elif kind == "zero":
            file.symlink_to("/dev/zero")
        elif kind == "loop":
            file.symlink_to(file.name)
        elif kind == "folder":
            file.mkdir()
        else:
            with file.open("wb") as out:  # sparse: no disk is filled
                out.write(b"---\nlicense: mit\n")
                out.truncate(1 << 32)
        return models

    return make


@pytest.mark.parametrize("kind", ["fifo", "zero", "loop", "folder", "large"])
@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_is_no_small_regular_file_is_refused_or_left_out_soon(
    odd_files: Callable[[str, str], dict[str, Path]], tmp_path: Path, name: str, kind: str
) -> None:
    models, began = odd_files(name, kind), time.monotonic()
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(models[one]), "parameters": {"weight": 0.5}} for one in ("base", "x")],
        **({"chat_template": "auto"} if name == "chat_template.jinja" else {}),
    }
    with suppress(PaftMergeError), open_plan(recipe):
        pass
    if kind != "large" or name == "README.md":
        with suppress(PaftMergeError):
            merge(recipe, tmp_path / "out")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "key", ["(([a-z_.0-9])+)+!", "(a|a)*b", ".*.*.*.*!", "(a?){30}a{30}", "a?" * 30 + "!", "(?=(a+)+!)x"]
)
def test_a_pattern_that_peft_may_match_for_ever_is_refused(key: str) -> None:
    with pytest.raises(patterns.PatternError):
        patterns.check_pattern_of_re(key)


@pytest.mark.parametrize(
    "key",
    ["q_proj", r".*\.q_proj", r"layers\.\d+\.mlp", "(q|k)_proj", r"^model\.(.*)\.up_proj$", r"layers\.[0-9]{2}\..*"],
)
def test_a_usual_pattern_is_left_to_peft(key: str) -> None:
    patterns.check_pattern_of_re(key)


def test_patterns_of_a_type_that_peft_merges_are_checked(tmp_path: Path) -> None:
    for field, value, wrong in (
        ("block_size_pattern", {"(([a-z_.0-9])+)+!": 3}, "repeats or chooses too often"),
        ("target_modules", "(a+)+!", "repeats or chooses too often"),
        ("block_size_pattern", 3, "must be names or patterns, got 3"),
        ("depth", 10**9, "must be at most 1000"),
        ("theta_d_length", 10**9, "must be at most 10000000"),
        ("rank_pattern", {"q_proj": 10**9}, "must be at most 100000"),
        ("modules_to_save", 3, "must be a list of strings, got 3"),
        ("modules_to_save", [None], "must be a list of strings"),
    ):
        config = {"peft_type": "C3A", "block_size": 16, field: value}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(PaftMergeError, match=rf"{field}: .*{wrong}"):
            read_settings(tmp_path)
