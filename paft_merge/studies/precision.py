"""Study 4 (ours): the part of a trained DPO delta that a bfloat16 checkpoint loses, and what that does to the model.

The base is rounded to bfloat16 once. Prompts are beginnings of the base's own texts; of two of its completions the one with
the higher valence by a lexicon is preferred. A DPO adapter is trained at each learning rate, on the same pairs. Its merge
with the base is stored in float32, or in bfloat16 with either rounding, by `paft merge`. All models then compute in float32,
so that only the stored weights differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from paft_merge.errors import RunError
from paft_merge.studies.policy_losses import preference_margin
from paft_merge.studies.story_model import (
    StoryModel,
    beginnings,
    inputs,
    loaded,
    read_lexicon,
    tokenizer_of,
    trained,
    valence,
)
from paft_merge.studies.story_model import check as check
from paft_merge.studies.study import Tables
from paft_merge.training.base_model import load_base, restoring_base
from paft_merge.training.factors import adapted, chunks
from paft_merge.training.generation import complete, padded, token_ids
from paft_merge.training.schema import BaseSpec, LoraSpec, SamplingSpec

STORED = {
    "float32": {"dtype": "float32"},
    "bfloat16, nearest": {"dtype": "bfloat16"},
    "bfloat16, stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
}
"""How a merge is stored: keys of its recipe."""


class Parameters(StoryModel):
    """The parameters of the study."""

    prompts: PositiveInt = 300
    """Prompts that pairs are made of; prompts whose completions score alike give none."""
    held_out: PositiveInt = 100
    """Further prompts, for the measurements."""
    prompt_tokens: PositiveInt = 16
    sampling: SamplingSpec = Field(
        default_factory=lambda: SamplingSpec(completions=3, max_new_tokens=40, batch_size=50)
    )
    lora: LoraSpec = Field(default_factory=lambda: LoraSpec(r=16, lora_alpha=32))
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: [5e-7, 5e-6, 5e-5, 5e-4], min_length=1)
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of TRL's DPOConfig."""


def _answers(model: Any, tokenizer: Any, prompts: Sequence[str], spec: Parameters) -> list[str]:
    """The greedy completion of each prompt."""
    ids, size = [token_ids(tokenizer, prompt) for prompt in prompts], spec.sampling.batch_size
    batches = (ids[at : at + size] for at in range(0, len(ids), size))
    tokens = spec.sampling.max_new_tokens
    return [text for batch in batches for (text,) in complete(model, tokenizer, batch, max_new_tokens=tokens)]


@torch.no_grad()
def _logps(model: Any, tokenizer: Any, pairs: Sequence[Mapping[str, str]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the completions of pairs, chosen ones first, `[2P, T]`, and their mask."""
    rows = [(pair["prompt"], pair["prompt"] + pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    ids, present = padded([token_ids(tokenizer, text) for _, text in rows], 0, model.device, left=False)
    starts = torch.tensor([len(token_ids(tokenizer, prompt)) for prompt, _ in rows])
    mask = present * (torch.arange(ids.shape[1]) >= starts[:, None])
    logps = model(input_ids=ids, attention_mask=present).logits[:, :-1].double().log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None])[..., 0], mask[:, 1:].double()


def _deltas(base: Any, adapter: Path) -> dict[str, Tensor]:
    """The exact delta of each weight, from the adapter's factors."""
    from peft import PeftModel

    with restoring_base(base):
        found = adapted(PeftModel.from_pretrained(base, str(adapter)))
        return {f"{one.name}.weight": torch.cat(list(chunks(one))).double() for one in found}


def kept(deltas: Mapping[str, Tensor], base: Any, merged: Any) -> dict[str, float]:
    """The part of a delta that stored weights have.

    Returns:
        `unchanged`: share of the delta's nonzero entries whose stored weight is the base's. `kept`: inner product of the
        stored change with the delta, over the delta's square. `error`: norm of stored change minus delta, over the delta's.
    """
    before, after = base.state_dict(), merged.state_dict()
    change = torch.cat([(after[name].double() - before[name].double()).flatten() for name in deltas])
    delta = torch.cat([deltas[name].flatten() for name in deltas])
    square = delta @ delta
    return {
        "unchanged": float((change[delta != 0] == 0).double().mean()),
        "kept": float(change @ delta / square),
        "error": float((change - delta).norm() / square.sqrt()),
    }


def run_seed(spec: Parameters, seed: int, data: Path | None, tuned: Any, work: Path) -> Tables:
    """Train an adapter at each learning rate, store its merges, and measure them on prompts that it was not trained on."""
    from paft_merge.engine.api import merge
    from paft_merge.training.on_policy import Sampled, pairs_of, sample

    folder, file = inputs(spec, data)
    lexicon = read_lexicon(file)
    tokenizer = tokenizer_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        load_base(str(folder), BaseSpec(dtype="bfloat16")).save_pretrained(place / "base")
        tokenizer.save_pretrained(place / "base")
        base = loaded(place / "base")
        torch.manual_seed(seed)
        prompts = beginnings(base, tokenizer, spec.prompts + spec.held_out, spec.prompt_tokens)
        completions = sample(base, tokenizer, prompts, spec.sampling, seed)
        scored = [
            Sampled(
                prompt, tuple(f" {text.strip()}" for text in texts), tuple(valence(text, lexicon) for text in texts)
            )
            for prompt, texts in zip(prompts, completions, strict=True)
            if all(text.strip() for text in texts)
        ]
        unseen, known = scored[: spec.held_out], scored[spec.held_out :]
        pairs, test = pairs_of(known, spec.sampling), pairs_of(unseen, spec.sampling)
        if not pairs or not test:
            fix = "use a lexicon of the base's words, or raise prompts and held_out"
            raise RunError.of("STUDY", file, "all completions of every prompt have the same valence", fix)
        rows: dict[str, dict[str, float]] = {}
        reference, mask = _logps(base, tokenizer, test)
        held = [one.prompt for one in unseen]
        answers = _answers(base, tokenizer, held, spec)
        rows["base"] = {"margin": 0.0, "valence": _mean(valence(text, lexicon) for text in answers)}
        for rate in spec.learning_rates:
            adapter = _trained(base, place / f"adapter-{rate:g}", pairs, rate, seed, spec, tokenizer)
            deltas, exact = _deltas(base, adapter), [""]
            for name, how in STORED.items():
                out = place / f"merged-{rate:g}-{name}"
                given = {
                    "merge_method": "task_arithmetic",
                    "base_model": str(place / "base"),
                    "seed": seed,
                    "parameters": {"weight": 1.0},
                }
                models = [{"model": f"{place / 'base'}+{adapter}"}]
                merge({**given, **how, "models": models}, out, write_model_card=False, threads=1)
                model = loaded(out)
                logps, _ = _logps(model, tokenizer, test)
                margins = preference_margin(logps, reference, mask)
                answers = _answers(model, tokenizer, held, spec)
                exact = answers if name == "float32" else exact
                rows[f"{name}, learning rate {rate:g}"] = {
                    **kept(deltas, base, model),
                    "margin": float(margins.mean()),
                    "accuracy": float((margins > 0).double().mean()),
                    "valence": _mean(valence(text, lexicon) for text in answers),
                    "same": _mean(float(a == b) for a, b in zip(answers, exact, strict=True)),
                }
    return {"stored merges": rows}


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def _trained(
    base: Any, out: Path, pairs: list[dict[str, Any]], rate: float, seed: int, spec: Parameters, tokenizer: Any
) -> Path:
    """A DPO adapter; its training is on the pairs in their order from the seed."""
    fixed = {"learning_rate": rate, "seed": seed, "save_strategy": "no", "gradient_checkpointing": False}
    section = {
        "objective": "dpo", "data": "memory", "lora": spec.lora.model_dump(), "training": {**spec.training, **fixed}
    }  # fmt: skip
    return trained(base, section, out, pairs, tokenizer, out.parent / "base")
