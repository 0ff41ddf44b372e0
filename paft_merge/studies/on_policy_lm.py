"""Study 3 with a language model: offline and on-policy preference learning by `paft train` (arXiv:2404.14367).

Every arm scores the same number of completions by the same reward. An offline arm samples all of them from the base, in one
round; an on-policy arm in several rounds from the policy so far. The objectives are the product's: `on_policy` (DPO on
best-against-worst pairs), `best_of_n` and `rwr`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from paft_merge.errors import RunError
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
from paft_merge.training.base_model import restoring_base
from paft_merge.training.schema import LoraSpec, SamplingSpec

OBJECTIVES = {"DPO": "on_policy", "Best-of-N": "best_of_n", "RWR": "rwr"}
REWARDS = {
    "valence": {"function": "paft_merge.studies.story_model:valence_reward"},
    "length": {"rule": "length"},
    "shortness": {"rule": "short"},
}


class Parameters(StoryModel):
    """The parameters of the study."""

    rewards: list[str] = Field(default_factory=lambda: list(REWARDS), min_length=1)
    """Of `valence`, `length` and `shortness` (both in words)."""
    prompts: PositiveInt = 128
    """Prompts of an arm, all rounds together."""
    rounds: PositiveInt = 4
    """Rounds of the on-policy arms; it divides `prompts`."""
    held_out: PositiveInt = 100
    prompt_tokens: PositiveInt = 16
    sampling: SamplingSpec = Field(
        default_factory=lambda: SamplingSpec(completions=4, max_new_tokens=24, batch_size=32)
    )
    """`rounds` and `samples_per_round` are set for each arm."""
    lora: LoraSpec = Field(default_factory=lambda: LoraSpec(r=16, lora_alpha=32))
    learning_rate: PositiveFloat = 5e-4
    training: dict[str, Any] = Field(default_factory=dict)
    """Further fields of TRL's config."""


def run_seed(spec: Parameters, seed: int, data: Path | None, tuned: Any, work: Path) -> Tables:
    """Train every arm for each reward, and score sampled completions of prompts that no arm saw."""
    from peft import PeftModel

    from paft_merge.training.on_policy import sample

    if unknown := [name for name in spec.rewards if name not in REWARDS]:
        raise RunError.of("STUDY", "rewards", f"there is no reward {unknown[0]!r}", f"known: {', '.join(REWARDS)}")
    folder, lexicon = inputs(spec, data)
    words, tokenizer, base = read_lexicon(lexicon), tokenizer_of(folder), loaded(folder)
    torch.manual_seed(seed)
    prompts = beginnings(base, tokenizer, spec.prompts + spec.held_out, spec.prompt_tokens)
    unseen, known = prompts[: spec.held_out], prompts[spec.held_out :]
    rows = [{"prompt": prompt, "lexicon": str(lexicon)} for prompt in known]
    score = {
        "valence": lambda text: valence(text, words),
        "length": lambda text: float(len(text.split())),
        "shortness": lambda text: -float(len(text.split())),
    }

    def reward_of(model: Any, name: str) -> float:
        texts = [text for group in sample(model, tokenizer, unseen, spec.sampling, 1_000_000 + seed) for text in group]
        return sum(map(score[name], texts)) / len(texts)

    tables: Tables = {name: {"base": {"reward": reward_of(base, name)}} for name in spec.rewards}
    with tempfile.TemporaryDirectory() as scratch:
        for name in spec.rewards:
            for method, objective in OBJECTIVES.items():
                for kind, rounds in (("offline", 1), ("on-policy", spec.rounds)):
                    sampling = spec.sampling.model_dump() | {
                        "rounds": rounds, "samples_per_round": max(spec.prompts // rounds, 1), "seed": seed,
                    }  # fmt: skip
                    section = {
                        "objective": objective, "data": "memory", "lora": spec.lora.model_dump(), "sampling": sampling,
                        "reward": [REWARDS[name]],
                        "training": {**spec.training, "learning_rate": spec.learning_rate, "seed": seed, "save_strategy": "no"},
                    }  # fmt: skip
                    out = Path(scratch) / f"{name}-{objective}-{kind}"
                    adapter = trained(base, section, out, rows, tokenizer, folder)
                    with restoring_base(base):
                        policy = PeftModel.from_pretrained(base, str(adapter)).eval()
                        tables[name][f"{method}, {kind}"] = {"reward": reward_of(policy, name)}
    return tables
