"""Rounds whose completions vLLM generates, by a stand-in of its API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from toys.train import FAST, THEIR_WARNINGS, dataset, pretrained, saved, sentences, tokenizer
from toys.vllm_api import install
from transformers import GenerationConfig

from paft_merge.cli import cli
from paft_merge.errors import PaftMergeError, TrainError
from paft_merge.training import on_policy, train, train_adapter
from paft_merge.training.schema import SamplingSpec, read_adapter, settings_of

pytestmark = THEIR_WARNINGS

PROMPTS = [{"prompt": text + " " * (at % 2)} for at, text in enumerate(sentences(torch.ones(32, 32), 8, 3, 7))]


def section(objective: str = "best_of_n", **sampling: Any) -> dict[str, Any]:
    knobs = {"rounds": 2, "samples_per_round": 5, "completions": 3, "max_new_tokens": 4, "batch_size": 2, "top_p": 0.9}
    return {
        "objective": objective, "data": "m", "lora": {"r": 4}, "training": FAST,
        "sampling": knobs | {"engine": "vllm", "seed": 3} | sampling, "reward": {"rule": "short"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    import datasets

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    return saved(tmp_path_factory.mktemp("place") / "base", pretrained(20))


def test_rounds_give_vllm_the_prompts_and_limits_of_transformers_and_the_adapter_of_the_round_before(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, real = list[Any](), on_policy.complete

    def spied(model: Any, words: Any, prompts: Any, **options: Any) -> Any:
        given.extend((ids, options["max_new_tokens"], options["top_p"], [options["eos_token_id"]]) for ids in prompts)
        return real(model, words, prompts, **options)

    monkeypatch.setattr(on_policy, "complete", spied)
    rows = dataset(PROMPTS)
    train_adapter(base, section(engine="transformers", rounds=1), tmp_path / "theirs", rows=rows)
    llm = install(monkeypatch)
    before, loras = len(given), list[list[str]]()
    real_generate = llm.generate

    def noted(self: Any, *prompts: Any, **options: Any) -> Any:
        lora = options["lora_request"]
        loras.append(sorted(file.name for file in Path(lora.lora_path).iterdir()) if lora else [])
        return real_generate(self, *prompts, **options)

    monkeypatch.setattr(llm, "generate", noted)
    out = train_adapter(base, section(), tmp_path / "ours", rows=rows, base_name="the/base")
    assert len(given) == before == 5
    asked = [
        (prompt["prompt_token_ids"], how.max_tokens, how.top_p, how.stop_token_ids)
        for made in llm.made
        for call in made.asked
        for prompt, how in zip(call.prompts, call.params, strict=True)
    ]
    assert asked[:5] == given
    assert len({repr(ids) for ids, *_ in asked}) == 8, "the second round has the next prompts"
    assert [made.model for made in llm.made] == [base, base]
    assert [made.dtype for made in llm.made] == ["float32", "float32"]
    assert (loras[0], {"adapter_config.json", "adapter_model.safetensors"} <= set(loras[1])) == ([], True)
    seeds = [how.seed + at for made in llm.made for call in made.asked for how in call.params for at in range(how.n)]
    assert len(set(seeds)) == 30
    record = json.loads((out / "paft_train.json").read_text())
    assert record["spec"]["sampling"]["engine"] == "vllm"
    texts = [json.loads(line) for line in (out / "rounds" / "0" / "samples.jsonl").read_text().splitlines()]
    assert all(len(one["completions"]) == 3 for one in texts)
    spaced = {(one["prompt"][-1] == " ", text[0] == " ") for one in texts for text in one["completions"] if text}
    assert spaced == {(True, False), (False, True)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora": {"bias": "all"}}, "vLLM supports bias: none only, and this is all"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "vLLM supports no modules_to_save"),
        ({"lora": {"extra": {"use_dora": True}}}, "vLLM may not apply lora.extra.use_dora"),
        ({"lora": {"extra": {"init_lora_weights": "pissa"}}}, "pissa subtracts the start from the base"),
        ({"lora": {"r": 600}}, "ranks up to 512, and this is 600"),
        ({"base": {"quantization": {"load_in_4bit": True}}}, "training loads it in 4 or 8 bits"),
    ],
)
def test_adapters_that_vllm_does_not_apply_are_refused_before_the_base_is_loaded(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    llm = install(monkeypatch)
    monkeypatch.setattr("paft_merge.training.run.load_base", None)
    with pytest.raises(TrainError, match=said):
        train_adapter(base, section() | change, tmp_path / "x", rows=dataset(PROMPTS))
    assert not llm.made


def test_a_base_in_memory_and_settings_of_its_generation_are_refused(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match=r"vllm is not installed(.|\n)*needs a GPU"):
        train_adapter(base, section(), tmp_path / "x", rows=dataset(PROMPTS))
    install(monkeypatch)
    model = pretrained(20)
    with pytest.raises(TrainError, match="this base is a model in memory"):
        train_adapter(model, section(), tmp_path / "x", rows=dataset(PROMPTS), tokenizer=tokenizer(), base_name=base)
    with pytest.raises(TrainError, match="this base is a model in memory"):
        train({"base_model": base, "adapters": {"a": section()}}, tmp_path / "x", base=model)
    other = saved(tmp_path / "other", model)
    GenerationConfig(no_repeat_ngram_size=2).save_pretrained(other)
    with pytest.raises(TrainError, match="no_repeat_ngram_size: 2, which engine: vllm does not apply"):
        train_adapter(other, section(), tmp_path / "x", rows=dataset(PROMPTS))


def test_a_section_without_an_engine_has_the_settings_of_before() -> None:
    plain = settings_of(read_adapter(section(engine="transformers")), "base")["spec"]["sampling"]
    assert not {"engine", "vllm"} & plain.keys()
    assert settings_of(read_adapter(section()), "base")["spec"]["sampling"]["vllm"]["tensor_parallel_size"] == 1
    with pytest.raises(PaftMergeError, match=r"temperatures from 0\.01 to 2, got 2\.5"):
        read_adapter(section(temperature=2.5))
    assert SamplingSpec(temperature=2.5).engine == "transformers"


def test_a_dry_run_names_the_engine_and_rows_are_shown_without_vllm(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"base_model": base, "adapters": {"a": section() | {"data": str(rows)}}}))
    shown = CliRunner().invoke(cli, ["train", str(recipe), "--show", "1"])
    assert (shown.exit_code, "a: row 1, prompt" in shown.output) == (0, True), shown.output
    refused = CliRunner().invoke(cli, ["train", str(recipe), "--dry-run"])
    assert refused.exit_code == 1
    assert "vllm is not installed; pip install vllm" in refused.output
    install(monkeypatch)
    done = CliRunner().invoke(cli, ["train", str(recipe), "--dry-run"])
    assert "a: 8 rows are right\n  vLLM generates the completions, which is experimental" in done.stdout
