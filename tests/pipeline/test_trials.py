"""A trial of a search: the model in memory has the tensors of the checkpoint that the same merge writes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toys import adapters as toys
from toys import train as train_toys
from toys.merge import bits_equal
from toys.run import write_rows
from transformers import AutoModelForCausalLM

from paft_merge import merge, open_plan
from paft_merge.evaluating import evaluate, loading
from paft_merge.pipeline import trials
from paft_merge.pipeline.named_models import resolved_merge
from paft_merge.pipeline.ray_steps import Origin
from paft_merge.pipeline.schema import load_run
from paft_merge.pipeline.state import locked
from paft_merge.pipeline.trials import Search, TrialModel, try_merge
from paft_merge.recipe.yaml_source import dump_yaml

pytestmark = train_toys.THEIR_WARNINGS

KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tied, bfloat16 to float32": (lambda: toys.llama(tie_word_embeddings=True).bfloat16(), {"out_dtype": "float32"}),
    "untied, rounded at random": (toys.llama, {"out_dtype": "bfloat16", "rounding": "stochastic", "seed": 3}),
    "names without a prefix": (toys.gpt2, {}),
    "experts that transformers joins": (toys.mixtral, {}),
}


def make_search(folder: Path, make: Callable[[], Any], **more: Any) -> Search:
    """A base, two fine-tunes of it and a text, and the search of a recipe that merges them."""
    for seed, name in enumerate(("base", "x", "y")):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1)
        train_toys.saved(folder / name, model)
    (folder / "text.txt").write_text("w1 w2 w3\nw4 w5 w6\n")
    recipe = {
        "base_model": "base",
        "merge": merged(1.0, **more),
        "evaluate": {"metrics": {"text": {"kind": "perplexity", "data": "text.txt", "unit": "line"}}, "max_length": 8},
        "tune": {"metric": "text", "space": {"models[0].parameters.weight": [0.0, 1.0]}},
    }
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    return Search(load_run(folder / "recipe.yaml"), {}, ("text",), folder, False, str(folder))


def merged(weight: Any, **more: Any) -> dict[str, Any]:
    models = [{"model": "x", "parameters": {"weight": weight}}, {"model": "y", "parameters": {"weight": 0.5}}]
    return {"merge_method": "ties", "models": models, "parameters": {"density": 0.6}, **more}


def written(search: Search, data: dict[str, Any], out: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors and the score of the checkpoint that a merge writes."""
    merge(resolved_merge(data, {}, search.recipe), out, overwrite=True)
    spec = search.recipe.evaluate
    assert spec is not None
    score = evaluate(out, spec, folder=search.recipe.folder)["text"].value
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict(), score


def check(model: TrialModel, search: Search, data: dict[str, Any], folder: Path) -> Any:
    """Evaluate a trial, compare it with the checkpoint, and return the model in memory."""
    resolved = resolved_merge(data, {}, search.recipe)
    found = model.scores(search, resolved, folder / "scratch", 2)
    tensors, score = written(search, data, folder / "written")
    assert found["text"][0] == score
    assert model.subject is not None
    held = model.subject.model.state_dict()
    assert held.keys() == tensors.keys()
    assert [name for name in held if not bits_equal(held[name], tensors[name])] == []
    return model.subject.model


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_in_memory_has_the_bits_of_the_written_checkpoint(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, more = KINDS[kind]
    search, model = make_search(tmp_path, make, **more), TrialModel()
    monkeypatch.setattr(trials, "merge", None)
    attention = [{"filter": "attn", "value": 0.7}, {"value": 0.0}]
    kept = [check(model, search, merged(weight, **more), tmp_path) for weight in (1.0, 0.3, attention, 0.3)]
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    if "experts" not in kind:
        assert all(one is kept[0] for one in kept), "the model stays loaded"


METRICS = {
    "right": {"kind": "exact_match", "data": "rows.jsonl"},
    "extracted": {"kind": "exact_match", "data": "rows.jsonl", "extract": "(w[0-9]+)"},
    "chat": {"kind": "exact_match", "data": "chat.jsonl"},
    "sampled": {"kind": "reward", "data": "rows.jsonl", "function": "reward.py:length", "temperature": 0.8},
    "agrees": {"kind": "self_consistency", "data": "rows.jsonl", "samples": 3},
    "pairs": {"kind": "preference", "data": "pairs.jsonl"},
}


def test_every_metric_has_the_value_of_the_written_checkpoint(tmp_path: Path) -> None:
    make_search(tmp_path, toys.llama)
    rows = [{"prompt": f"w{i} " * (i % 3 + 1), "completion": f"w{i + 1}"} for i in range(9)]
    write_rows(tmp_path / "rows.jsonl", rows)
    turns = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "w3"}] for row in rows]
    write_rows(tmp_path / "chat.jsonl", [{"messages": one} for one in turns])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3 w4"}])
    (tmp_path / "reward.py").write_text("def length(completions, **_):\n    return [len(t) % 7 for t in completions]\n")
    metrics = {
        name: {**of, **({"max_new_tokens": 6} if of["kind"] != "preference" else {})} for name, of in METRICS.items()
    }
    made = load_run(
        tmp_path / "recipe.yaml",
        (f"evaluate.metrics={metrics}", "tune.metric=right", "evaluate.batch_size=4", "evaluate.max_length=64"),
    )
    search, model = Search(made, {}, tuple(METRICS), tmp_path, False, "metrics"), TrialModel()
    assert made.evaluate is not None
    for weight in (1.0, 0.3):
        resolved = resolved_merge(merged(weight), {}, made)
        found = model.scores(search, resolved, tmp_path / "scratch", 1)
        merge(resolved, tmp_path / "written", overwrite=True)
        assert model.subject is not None
        assert model.subject.decoder is not None
        assert all(model.subject.decoder.exact.values())
        expected = evaluate(tmp_path / "written", made.evaluate, folder=tmp_path)
        assert found == {name: (score.value, score.stderr) for name, score in expected.items()}


def test_the_models_stay_open_and_another_process_opens_them_again(tmp_path: Path) -> None:
    search, model = make_search(tmp_path, toys.llama), TrialModel()

    def planned(data: dict[str, Any]) -> Any:
        resolved = resolved_merge(data, {}, search.recipe)
        found = model._plan(resolved)
        with open_plan(dict(resolved)) as expected:
            assert found.recipe.resolved() == expected.recipe.resolved()
            assert [one.to_json() for one in found.tensors] == [one.to_json() for one in expected.tensors]
        return found.models

    first = planned(merged(1.0))
    assert planned(merged([{"filter": "attn", "value": 0.7}, {"value": 0.1}])) == first
    model.process += 1
    second = planned(merged(0.2))
    assert second != first
    slerp = {"merge_method": "slerp", "models": [{"model": "x"}], "parameters": {"t": 0.5}}
    assert len(planned(slerp)) == 2
    assert planned(merged(0.2)) != second
    model.inputs.close()


def adapted(search: Search, target: str) -> dict[str, Any]:
    """A merge of one adapter, made here, on one kind of layers of the base."""
    folder = search.folder / target
    base = AutoModelForCausalLM.from_pretrained(search.folder / "base")
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)
    one = {"model": {"model": "base", "lora": str(folder)}, "parameters": {"weight": 1.0}}
    return {"merge_method": "task_arithmetic", "models": [one]}


def test_tensors_that_a_trial_does_not_change_are_those_of_the_base_again(tmp_path: Path) -> None:
    search, model = make_search(tmp_path, toys.llama), TrialModel()
    of_q, of_up = adapted(search, "q_proj"), adapted(search, "up_proj")
    check(model, search, of_q, tmp_path)
    assert set(model.copied) == {name for name in model.places or () if "q_proj" not in name}
    for data in (of_up, of_q, of_q, merged(1.0), of_up):
        check(model, search, data, tmp_path)


def test_another_config_or_tokenizer_loads_the_model_again(tmp_path: Path) -> None:
    search, model = make_search(tmp_path, toys.llama), TrialModel()
    first = check(model, search, merged(1.0), tmp_path)
    second = check(model, search, merged(1.0, out_dtype="bfloat16"), tmp_path)
    assert second is not first
    check(model, search, merged(0.5, chat_template="chatml"), tmp_path)
    assert model.subject is not None
    assert "im_start" in model.subject.tokenizer.chat_template
    check(model, search, merged(0.5), tmp_path)


def test_a_model_that_cannot_be_loaded_from_memory_is_written_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("this kind has no such way")

    monkeypatch.setattr(loading, "_with_weights", fails)
    caplog.set_level(logging.INFO, "paft_merge.pipeline.trials")
    search, model = make_search(tmp_path, toys.llama), TrialModel()
    for weight in (1.0, 0.3):
        check(model, search, merged(weight), tmp_path)
    said = [text for text in caplog.messages if "each trial writes its checkpoint" in text]
    assert len(said) == 1
    assert "this kind has no such way" in said[0]


def test_the_trial_after_one_that_failed_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, model = make_search(tmp_path, toys.llama), TrialModel()
    of_q, of_up = adapted(search, "q_proj"), adapted(search, "up_proj")
    check(model, search, of_q, tmp_path)
    real, calls = torch.Tensor.copy_, iter(range(100))

    def breaks(self: torch.Tensor, *given: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise MemoryError
        return real(self, *given)

    resolved = resolved_merge(of_up, {}, search.recipe)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", breaks)
        with pytest.raises(MemoryError):
            model.scores(search, resolved, tmp_path / "scratch", 2)
    check(model, search, of_q, tmp_path)


def test_a_process_keeps_the_model_and_the_data_of_its_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, loads, real = make_search(tmp_path, toys.llama), list[Any](), loading.load_subject

    def counted(*given: Any, **named: Any) -> Any:
        loads.append(given[0])
        return real(*given, **named)

    monkeypatch.setattr(loading, "load_subject", counted)
    with locked(tmp_path):
        for weight in (1.0, 0.5, 0.1):
            try_merge(search, merged(weight), tmp_path / "scratch", 1, Origin.here(tmp_path))
            (tmp_path / "text.txt").unlink(missing_ok=True)
    assert len(loads) == 1
    assert not (tmp_path / "scratch").exists()
