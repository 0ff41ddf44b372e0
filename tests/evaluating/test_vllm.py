"""Answers of vLLM, by a stand-in of its API: the same prompts and limits as transformers gets, and the same metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from toys import train as train_toys
from toys.run import write_rows
from toys.vllm_api import install
from transformers import GenerationConfig

from paft_merge.cli import cli
from paft_merge.errors import EvaluateError, RecipeError
from paft_merge.evaluating import evaluate, light, read_evaluate
from paft_merge.evaluating.vllm_loading import load_for
from paft_merge.recipe.yaml_source import Located
from paft_merge.training import vllm_engine

pytestmark = train_toys.THEIR_WARNINGS

METRICS: dict[str, Any] = {
    "match": {"kind": "exact_match", "data": "rows.jsonl", "extract": r"(w\d+)", "max_new_tokens": 5},
    "chat": {"kind": "exact_match", "data": "chats.jsonl", "max_new_tokens": 4},
    "text": {"kind": "perplexity", "data": "text.txt"},
    "long": {"kind": "reward", "data": "rows.jsonl", "function": "long.py:long", "max_new_tokens": 3},
    "like": {"kind": "agreement", "data": "rows.jsonl", "with": "it", "max_new_tokens": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter on it, rows, and a function that scores."""
    folder = tmp_path_factory.mktemp("place")
    model = train_toys.pretrained(20)
    train_toys.saved(folder / "base", model)
    GenerationConfig(eos_token_id=[model.config.eos_token_id, *range(8, 10)], repetition_penalty=3.0).save_pretrained(
        folder / "base"
    )
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "lora")
    prompts = [f"w{i} w{i + 1} w{2 * i}"[: 5 + i] for i in range(6)]
    write_rows(folder / "rows.jsonl", [{"prompt": one, "answer": "w9"} for one in prompts])
    chats = [[{"role": "user", "content": one}] for one in prompts]
    write_rows(folder / "chats.jsonl", [{"prompt": one, "answer": "w9"} for one in chats])
    (folder / "text.txt").write_text("w1 w2 w3\nw4 w5\n")
    (folder / "long.py").write_text(
        "def long(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    return folder


def spec_of(engine: str, *names: str, **changes: Any) -> Any:
    metrics = {name: METRICS[name] for name in names or METRICS}
    given = {"metrics": metrics, "batch_size": 4, "max_length": 64, "engine": engine, **changes}
    return read_evaluate(Located.of(given))


@pytest.mark.parametrize("model", ["base", "base+lora"])
def test_both_engines_get_the_same_prompts_and_give_the_same_greedy_metrics(
    place: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    given, real = list[SimpleNamespace](), light.complete

    def spied(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        stops = model.generation_config.eos_token_id
        given.extend(SimpleNamespace(ids=tuple(ids), tokens=options["max_new_tokens"], stops=stops) for ids in prompts)
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(light, "complete", spied)
    names = "+".join(str(place / part) for part in model.split("+"))
    source = {"it": [str(place / "base")]}
    theirs = evaluate(names, spec_of("transformers"), folder=place, models=source)
    llm = install(monkeypatch)
    before = len(given)
    ours = evaluate(names, spec_of("vllm"), folder=place, models=source)
    assert len(given) == before
    assert list(ours) == list(METRICS)
    for name, score in theirs.items():
        assert ours[name].rows == pytest.approx(score.rows), name
        assert (ours[name].outputs, ours[name].warning) == (score.outputs, score.warning), name
        assert ours[name].to_json().get("engine") == (None if name == "text" else "vllm")
        assert "engine" not in score.to_json()
    assert any(len(set(score.outputs)) > 2 for score in theirs.values())
    assert {len(score.warning) > 0 for score in theirs.values()} == {True, False}, "some answers end and some do not"
    asked = [
        SimpleNamespace(ids=tuple(prompt["prompt_token_ids"]), tokens=how.max_tokens, stops=how.stop_token_ids)
        for made in llm.made
        for call in made.asked
        for prompt, how in zip(call.prompts, call.params, strict=True)
    ]
    in_order = sorted(map(repr, given))
    assert sorted(map(repr, asked)) == in_order
    (source_llm, mine) = llm.made
    assert (source_llm.enable_lora, mine.enable_lora, mine.max_lora_rank) == (False, "+" in model, 16)
    assert {call.lora and call.lora.lora_path for call in mine.asked} == {str(place / "lora") if "+" in model else None}
    assert (mine.dtype, mine.max_model_len, mine.skip_tokenizer_init) == ("float32", 64, True)


def test_sampled_answers_depend_on_the_seed_and_differ_between_equal_prompts(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    metric = {"kind": "self_consistency", "data": "rows.jsonl", "samples": 4, "max_new_tokens": 3, "temperature": 1.5}
    found = {}
    for seed in (0, 0, 1):
        spec = spec_of("vllm", metrics={"agree": metric}, seed=seed)
        score = evaluate(str(place / "base"), spec, folder=place)["agree"]
        assert found.setdefault(seed, score) == score
    assert found[0].outputs != found[1].outputs
    subject = load_for("vllm", place / "base", spec)
    assert subject.vllm is not None
    texts = subject.vllm.complete([[5, 6]] * 3, max_new_tokens=6, temperature=1.0, stops=[], completions=2)
    assert len({text for pair in texts for text in pair}) == 6
    assert subject.vllm.complete([[5, 6]], max_new_tokens=6, temperature=1.0, stops=[]) == [texts[0][:1]], (
        "in the order of seeds"
    )
    assert subject.vllm.complete([[5, 6]] * 2, max_new_tokens=6, temperature=1.0, stops=[], completions=2) == texts[:2]


def test_both_engines_sample_from_the_same_distribution(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = install(monkeypatch)
    counts = []
    for engine in ("transformers", "vllm"):
        subject = load_for(engine, place / "base", spec_of("vllm"))
        ids = [[5, 6, 7]]
        found = light._answers(subject, ids, 1, 400, 1.0, 0, lambda done, rows: None, [], 400)[0]
        counts.append({text: found.count(text) / 400 for text in set(found)})
    assert llm.made
    words = {*counts[0], *counts[1]}
    assert len(words) > 5
    assert sum(abs(counts[0].get(one, 0) - counts[1].get(one, 0)) for one in words) / 2 < 0.2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"text": METRICS["text"]}}, "`engine: vllm` has no effect: it generates answers for exact_match"),
        ({"device": "cpu"}, "engine: vllm needs a GPU, and device is cpu"),
        ({"device": "cuda:1"}, "choose one by CUDA_VISIBLE_DEVICES"),
        ({"metrics": {"long": {**METRICS["long"], "temperature": 0.001}}}, "temperatures from 0.01 to 2, got 0.001"),
        ({"metrics": {"long": {**METRICS["long"], "temperature": 3}}}, "temperatures from 0.01 to 2, got 3"),
        ({"engine": "vlm"}, "transformers"),
        ({"vllm": {"gpu_memory_utilization": 1.5}}, "gpu_memory_utilization"),
        ({"vllm": {"worker_cls": "mine.py"}}, "worker_cls"),
        ({"engine": "transformers", "vllm": {"tensor_parallel_size": 2}}, "`vllm` has no effect without engine: vllm"),
    ],
)
def test_settings_that_vllm_does_not_have_are_refused_with_the_reason(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        spec_of(**{"engine": "vllm", **changes})
    assert said in str(caught.value)


def test_without_vllm_or_a_gpu_nothing_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluateError, match=r"vllm is not installed.*pip install vllm(.|\n)*needs a GPU"):
        evaluate(str(place / "none"), spec_of("vllm", "match"), folder=place)
    install(monkeypatch, gpu=False)
    with pytest.raises(EvaluateError, match="needs a GPU") as caught:
        evaluate(str(place / "none"), spec_of("vllm", "match"), folder=place)
    assert "MISSING" not in str(caught.value)


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"use_dora": True}, "vLLM does not support DoRA"),
        ({"peft_type": "SHIRA"}, "reads LoRA only"),
        ({"bias": "all"}, "supports bias: none only"),
        ({"r": 6}, "rank"),
        ("twice", "vLLM applies one adapter at a time, and these are 2"),
    ],
)
def test_adapters_that_vllm_does_not_apply_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Any, said: str
) -> None:
    llm = install(monkeypatch)
    (tmp_path / "lora").mkdir()
    for file in (place / "lora").iterdir():
        (tmp_path / "lora" / file.name).write_bytes(file.read_bytes())
    parts = [str(place / "base"), str(tmp_path / "lora")]
    if adapter == "twice":
        parts.append(str(place / "lora"))
    else:
        changed(tmp_path / "lora", **adapter)
    with pytest.raises(EvaluateError) as caught:
        evaluate(parts, spec_of("vllm", "match"), folder=place)
    assert said in str(caught.value)
    assert not llm.made


def test_generation_settings_that_vllm_does_not_get_are_refused() -> None:
    kept = GenerationConfig(
        repetition_penalty=1.1, min_p=0.1, top_k=5, eos_token_id=[1, 2], temperature=0.5, do_sample=True
    )
    assert vllm_engine.unlike(kept, "x") == []
    assert vllm_engine.unlike(GenerationConfig(), "x") == []
    assert vllm_engine.unlike_stored("no/such-model") == [], "loading it says so"
    for name, value in {
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [5],
        "forced_bos_token_id": 0,
        "min_length": 4,
    }.items():
        (problem,) = vllm_engine.unlike(GenerationConfig(**{name: value}), "x")
        assert f"{name}: {value}" in problem.what


def test_an_error_of_vllm_names_the_model_and_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    spec = spec_of("vllm", "match", vllm={"gpu_memory_utilization": 1.0})
    with pytest.raises(
        EvaluateError, match=r"vLLM cannot load .*base: Free memory.* utilization second line; use engine: transformers"
    ):
        evaluate(str(place / "base"), spec, folder=place)


def test_the_command_has_an_option_for_the_engine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*options: Any) -> Any:
        return CliRunner().invoke(cli, ["evaluate", str(place / "base"), "--engine", "vllm", *map(str, options)])

    rows = ("--exact-match", place / "rows.jsonl", "--max-new-tokens", 5, "--json")
    refused = asked(*rows)
    assert refused.exit_code == 1
    assert "vllm is not installed; pip install vllm" in refused.output
    llm = install(monkeypatch)
    refused = asked("--perplexity", place / "text.txt")
    assert "has no effect" in refused.output
    done = asked(*rows)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["exact_match"]["engine"] == "vllm"
    (place / "asked.json").write_text('[{"instruction": "w1 w2"}]')
    done = asked("--alpaca-eval", place / "answers.json", "--instructions", place / "asked.json")
    assert done.exit_code == 0, done.output
    assert len(json.loads((place / "answers.json").read_text())) == 1
    recipe = {"base_model": str(place / "base"), "evaluate": {"metrics": {"match": METRICS["match"]}, "max_length": 64}}
    (place / "recipe.yaml").write_text(json.dumps(recipe | {"adapters": {"it": str(place / "lora")}}))
    done = asked("--recipe", place / "recipe.yaml", "--json")
    assert json.loads(done.stdout)["match"]["engine"] == "vllm"
    assert len(llm.made) == 3


def test_the_command_takes_the_engine_of_a_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = install(monkeypatch)
    recipe = {"base_model": str(place / "base"), "evaluate": {"metrics": {"match": METRICS["match"]}, "max_length": 64}}
    (place / "recipe.yaml").write_text(json.dumps(recipe | {"adapters": {"it": str(place / "lora")}}))
    command = [
        "evaluate",
        str(place / "base"),
        "--recipe",
        str(place / "recipe.yaml"),
        "--set",
        "evaluate.engine=vllm",
        "--json",
    ]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["match"]["engine"] == "vllm"
    assert len(llm.made) == 1
