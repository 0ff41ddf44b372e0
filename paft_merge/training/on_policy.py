"""Rounds of generate, score, pair and train: preference learning on the policy's own samples (arXiv:2404.14367).

Round `k` writes `<work folder>/rounds/k`: `samples.jsonl` (every completion with its score) and, after training,
`adapter/`. A resumed run reuses finished rounds and samples.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from paft_merge.errors import TrainError
from paft_merge.training.arguments import training_arguments
from paft_merge.training.base_model import restoring_base
from paft_merge.training.checkpoint_parts import file_fault
from paft_merge.training.generation import complete, token_ids
from paft_merge.training.job import Job, finish, make_trainer, run_trainer
from paft_merge.training.losses import rwr_weights
from paft_merge.training.rewards import reward_functions, total
from paft_merge.training.run_folder import RunFolder, write_json
from paft_merge.training.schema import SamplingSpec
from paft_merge.training.vllm_engine import VllmModel


@dataclass(frozen=True)
class Sampled:
    """The completions of one prompt, and their rewards."""

    prompt: Any
    """Text, or chat turns."""
    completions: tuple[str, ...]
    rewards: tuple[float, ...]


def pairs_of(sampled: Sequence[Sampled], spec: SamplingSpec) -> list[dict[str, Any]]:
    """Turn scored completions into preference rows.

    `best_worst` gives at most one pair per prompt, `threshold` every ordered pair; in both cases the rewards must differ
    by more than `spec.threshold`. Of equal rewards the first completion is the best, or the worst.
    """
    rows = []
    for one in sampled:
        order = range(len(one.rewards))
        if spec.pairing == "best_worst":
            candidates = [(max(order, key=lambda i: one.rewards[i]), min(order, key=lambda i: one.rewards[i]))]
        else:
            candidates = [(i, j) for i in order for j in order if i != j]
        for win, lose in candidates:
            if one.rewards[win] - one.rewards[lose] > spec.threshold:
                rows.append(_row(one.prompt, chosen=one.completions[win], rejected=one.completions[lose]))
    return rows


def best_of(sampled: Sequence[Sampled]) -> list[dict[str, Any]]:
    """Rows of every prompt and its best completion (the first of equals)."""
    return [_row(one.prompt, completion=one.completions[one.rewards.index(max(one.rewards))]) for one in sampled]


def weighted(sampled: Sequence[Sampled], temperature: float) -> list[dict[str, Any]]:
    """Rows of every completion with its reward-weighted-regression weight."""
    rows = []
    for one in sampled:
        weights = rwr_weights(one.rewards, temperature)
        for completion, weight in zip(one.completions, weights, strict=True):
            rows.append(_row(one.prompt, completion=completion) | {"weight": weight})
    return rows


def _row(prompt: Any, **texts: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, **texts}
    return {"prompt": prompt, **{k: [{"role": "assistant", "content": v}] for k, v in texts.items()}}


def mixed(rows: list[dict[str, Any]], offline: Any, ratio: float, seed: int) -> list[dict[str, Any]]:
    """Add offline preference pairs so that they are `ratio` of the result, or all pairs if there are fewer."""
    wanted = min(len(offline), round(len(rows) * ratio / (1 - ratio))) if ratio else 0
    if not wanted:
        return rows
    chosen = torch.randperm(len(offline), generator=torch.Generator().manual_seed(seed))[:wanted]
    return rows + [{k: offline[i][k] for k in ("prompt", "chosen", "rejected")} for i in chosen.tolist()]


def sample(model: Any, tokenizer: Any, prompts: Sequence[Any], spec: SamplingSpec, seed: int) -> list[tuple[str, ...]]:
    """Sample `spec.completions` texts for every prompt; the same seed and batch size give the same texts.

    A completion of a text begins with the space that separates it from its prompt, unless the prompt ends with one: rows of
    training join them.
    """
    was, ids = model.training, _ids(tokenizer, prompts)
    model.eval()
    try:
        torch.manual_seed(seed)
        found: list[tuple[str, ...]] = []
        spaced: list[bool] = []
        for start in range(0, len(ids), spec.batch_size):
            found += complete(
                model,
                tokenizer,
                ids[start : start + spec.batch_size],
                max_new_tokens=spec.max_new_tokens,
                temperature=spec.temperature,
                completions=spec.completions,
                top_p=spec.top_p,
                eos_token_id=tokenizer.eos_token_id,
                spaced=spaced,
            )
    finally:
        model.train(was)
    return _joined(prompts, found, spaced)


def _ids(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    return [token_ids(tokenizer, prompt) for prompt in prompts]


def _joined(prompts: Sequence[Any], found: Sequence[tuple[str, ...]], spaced: Sequence[bool]) -> list[tuple[str, ...]]:
    """Completions, each with the space before it that its prompt does not have."""
    apart = iter(spaced)
    return [
        tuple(f" {text}" if next(apart) and _needs_space(prompt) else text for text in texts)
        for prompt, texts in zip(prompts, found, strict=True)
    ]


def _sample_by_vllm(job: Job, prompts: Sequence[Any], adapter: Path | None, seed: int) -> list[tuple[str, ...]]:
    """The completions that `sample` makes, by vLLM, which holds the memory of the GPU until they are made."""
    spec, lora, base = job.spec.sampling, job.spec.lora, job.spec.base
    ids, spaced = _ids(job.tokenizer, prompts), list[bool]()
    job.base.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    source, end = job.options.base_path or job.base_name, job.tokenizer.eos_token_id
    with closing(
        VllmModel.load(
            TrainError, job.name, source, spec.vllm, job.tokenizer, job.base.generation_config,
            max_length=max(map(len, ids)) + spec.max_new_tokens, dtype=str(job.base.dtype).removeprefix("torch."),
            adapter=adapter, rank=lora.r, revision=base.revision, trust_code=base.trust_remote_code,
        )
    ) as model:  # fmt: skip
        found = model.complete(
            ids, max_new_tokens=spec.max_new_tokens, temperature=spec.temperature, completions=spec.completions, seed=seed,
            top_p=spec.top_p, stops=[] if end is None else [end], spaced=spaced,
        )  # fmt: skip
    return _joined(prompts, found, spaced)


def _needs_space(prompt: Any) -> bool:
    """Whether a completion that follows after a space has to begin with it."""
    return isinstance(prompt, str) and prompt != "" and not prompt[-1].isspace()


@dataclass(frozen=True)
class RoundPlace(RunFolder):
    """A round's folder, which is not renamed."""

    @property
    def part(self) -> Path:
        """The folder that the round writes to."""
        return self.final


def train_in_rounds(job: Job) -> None:
    """Run all rounds of a job and write its adapter; the record lists the rounds under `run.rounds`."""
    job.tokenizer.pad_token = job.tokenizer.pad_token or job.tokenizer.eos_token
    done: list[dict[str, Any]] = []
    adapter: Path | None = None
    for number in range(job.spec.sampling.rounds):
        folder = job.place.part / "rounds" / str(number)
        finished = _finished(job, folder)
        if finished:
            done.append(finished)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with restoring_base(job.base):
                _round(job, number, folder, adapter, done)
        adapter = folder / "adapter"


def _finished(job: Job, folder: Path) -> dict[str, Any] | None:
    """The record of a finished round; None for another, and with a warning for one whose files are damaged."""
    record, weights = folder / "round.json", folder / "adapter" / "adapter_model.safetensors"
    if not record.exists():
        return None
    if fault := file_fault(record) or file_fault(weights):
        job.warn(f"round {folder.name} is not whole: {fault}; it is trained again")
        return None
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def _round(job: Job, number: int, folder: Path, adapter: Path | None, done: list[dict[str, Any]]) -> None:
    began = time.monotonic()
    sampled = _samples(job, number, folder, adapter)
    rows = _training_rows(job, sampled, number)
    if not rows:
        what = f"round {number} gave no pair: all completions of a prompt score alike"
        raise TrainError.of("REWARD", job.name, what, "raise sampling.completions or temperature, or lower threshold")
    inner = _inner(job, number, folder, done)
    trainer = _trainer(inner, Dataset.from_list(rows), adapter)
    run_trainer(inner, trainer)
    rewards = torch.tensor([one.rewards for one in sampled])
    done.append(
        {
            "round": number,
            "prompts": len(sampled),
            "rows": len(rows),
            "mean_reward": float(rewards.mean()),
            "mean_best": float(rewards.max(1).values.mean()),
            "steps": trainer.state.global_step,
            "seconds": round(time.monotonic() - began, 2),
            "tokens": trainer.watch.tokens,
            "loss": inner.facts["train_loss"],
            "l1_strength": trainer.l1.strength if trainer.l1 else None,
        }
    )
    if number == job.spec.sampling.rounds - 1:
        job.facts |= {"train_loss": inner.facts["train_loss"], "rows_trained_on": sum(one["rows"] for one in done)}
        _tidy(job.place.part / "rounds")
        cost = {key: sum(one.get(key, 0) for one in done) for key in ("seconds", "tokens")}
        rounds = [{key: value for key, value in one.items() if key != "seconds"} for one in done]  # equal in every run
        finish(job, trainer, rounds=rounds, **cost)
    else:
        trainer.save_model(str(folder / "adapter"))
        write_json(folder / "round.json", done[-1])


def _tidy(rounds: Path) -> None:
    """Keep of every round its samples and its logs."""
    for folder in rounds.iterdir():
        RoundPlace(folder).tidy()
        shutil.rmtree(folder / "adapter", ignore_errors=True)


def _inner(job: Job, number: int, folder: Path, done: Sequence[dict[str, Any]]) -> Job:
    """The job of one round: its own folder, seed and epochs; a controlled strength continues from the round before."""
    spec = job.spec
    if spec.l1 and spec.l1.target and done:
        spec = spec.model_copy(update={"l1": spec.l1.model_copy(update={"strength": done[-1]["l1_strength"]})})
    place, seed = RoundPlace(folder), job.arguments.seed + number
    passes = spec.sampling.inner_passes
    arguments = training_arguments(spec, place.checkpoints, job.name, num_train_epochs=passes, seed=seed)
    return dataclasses.replace(job, spec=spec, place=place, arguments=arguments, facts={})


def _trainer(job: Job, rows: Any, adapter: Path | None) -> Any:
    """The round's trainer, warm-started; its reference is the base, or the policy at the start of the round."""
    if adapter is None or job.spec.objective != "on_policy" or job.spec.sampling.reference == "base":
        return make_trainer(job, rows=rows, adapter=adapter)
    from peft import PeftModel

    # Given a PeftModel, TRL takes a frozen copy of its adapter as the reference.
    policy = PeftModel.from_pretrained(job.base, str(adapter), is_trainable=True)
    return make_trainer(job, rows=rows, policy=policy)


def _training_rows(job: Job, sampled: Sequence[Sampled], number: int) -> list[dict[str, Any]]:
    spec = job.spec.sampling
    if job.spec.objective == "best_of_n":
        return best_of(sampled)
    if job.spec.objective == "rwr":
        return weighted(sampled, spec.rwr_temperature)
    return mixed(pairs_of(sampled, spec), job.rows, spec.mixing_ratio, spec.seed + number)


@contextmanager
def _policy(job: Job, adapter: Path | None) -> Iterator[Any]:
    """The policy: the base, with the adapter of the previous round if there is one."""
    device = PartialState().device
    if job.base.device != device and not job.spec.base.quantization:
        job.base.to(device)  # before the first round no trainer has moved it
    if adapter is None:
        yield job.base
        return
    from peft import PeftModel

    with restoring_base(job.base):
        yield PeftModel.from_pretrained(job.base, str(adapter))


def _samples(job: Job, number: int, folder: Path, adapter: Path | None) -> list[Sampled]:
    """The round's scored completions: read if they exist, else generated by the policy."""
    path, spec = folder / "samples.jsonl", job.spec.sampling
    if path.exists():
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if len(lines) == spec.samples_per_round:
                return [Sampled(one["prompt"], tuple(one["completions"]), tuple(one["rewards"])) for one in lines]
        except (ValueError, KeyError, TypeError):
            pass
        job.warn(f"the samples of round {number} are damaged; they are generated again")
    columns = _prompts(job, number)
    prompts = columns.pop("prompt")
    seed = spec.seed * 1_000_003 + number
    if spec.engine == "vllm":
        completions = _sample_by_vllm(job, prompts, adapter, seed)
    else:
        with _policy(job, adapter) as policy:
            completions = sample(policy, job.tokenizer, prompts, spec, seed)
    rewards = _score(job, prompts, completions, columns)
    sampled = [Sampled(*one) for one in zip(prompts, completions, rewards, strict=True)]
    lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) for one in sampled]
    beside = path.with_suffix(".tmp")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)
    return sampled


def _prompts(job: Job, number: int) -> dict[str, list[Any]]:
    """The round's prompts and the other columns of their rows: the next window of one shuffled order, cyclically."""
    from trl import extract_prompt

    spec, rows = job.spec.sampling, job.rows
    if "prompt" not in rows.column_names:
        rows = rows.map(extract_prompt)
        job.rows = rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(spec.seed)).tolist()
    start = number * spec.samples_per_round
    chosen = [order[i % len(order)] for i in range(start, start + spec.samples_per_round)]
    found: dict[str, list[Any]] = rows.select(chosen).to_dict()
    return found


def _score(
    job: Job, prompts: Sequence[Any], completions: Sequence[tuple[str, ...]], columns: dict[str, list[Any]]
) -> list[tuple[float, ...]]:
    n = job.spec.sampling.completions
    flat = [one for group in completions for one in group]
    repeated = {key: [v for v in values for _ in range(n)] for key, values in columns.items()}
    given = [[{"role": "assistant", "content": one}] for one in flat] if not isinstance(prompts[0], str) else flat
    functions = reward_functions(job.spec.reward, job.options.folder)
    scores = total(functions, prompts=[p for p in prompts for _ in range(n)], completions=given, **repeated)
    return [tuple(scores[i : i + n]) for i in range(0, len(scores), n)]
