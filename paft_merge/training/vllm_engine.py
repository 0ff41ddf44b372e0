"""Text generation with vLLM: the prompts, token limits and end tokens that `generation.complete` gives to transformers.

Written for vLLM 0.22 to 0.31, which TRL 1.16 supports: `LLM.generate`, `SamplingParams` (vllm/sampling_params.py at 00388f65),
`RequestOutput` (vllm/outputs.py) and `LoRARequest` (vllm/lora/request.py). TRL trains `rloo` and `grpo` with its own
(`training: {use_vllm: true}`). Rounds do not use that one: it adds the adapter to the base's weights and subtracts it after every
generation (`merge_adapter` in trl/generation/vllm_generation.py), which does not restore the bits of a 16-bit base.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from paft_merge.errors import PaftMergeError, Problem, TrainError
from paft_merge.training.engine_schema import MAX_RANKS, VllmSpec
from paft_merge.training.generation import texts_of
from paft_merge.training.schema import SAMPLING, AdapterSpec, LoraSpec

_LACKS: dict[str, Any] = {
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": None,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
"""Settings of transformers' generation that are not passed to vLLM, which lacks most of them, and the value without effect."""

_EXTRA = {
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "revision", "task_type",
}  # fmt: skip
"""Further fields of a LoRA that change nothing in how it is applied."""

_STRIDE = 1_000_003
"""Distance between the seeds of two runs' first prompts."""


def missing_vllm(where: str) -> list[Problem]:
    """Why this machine cannot run vLLM; empty if it can."""
    found = []
    if find_spec("vllm") is None:
        found.append(
            Problem(
                "MISSING", where, "engine: vllm, and vllm is not installed", "pip install vllm, or engine: transformers"
            )
        )
    if not has_gpu():
        found.append(
            Problem("DEVICE", where, "engine: vllm needs a GPU, and there is none", "use engine: transformers")
        )
    return found


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def generation_of(source: Path | str, revision: str | None = None, *, trust_code: bool = False) -> Any:
    """Return the generation config of a model, as transformers loads it; raises OSError if there is no model."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_code)
        return GenerationConfig.from_model_config(config)


def unlike(generation: Any, where: str) -> list[Problem]:
    """The settings of a generation config that change the answers of transformers, and that vLLM does not get."""
    given = {name: getattr(generation, name, None) for name in _LACKS}
    named = [f"{name}: {value}" for name, value in given.items() if value not in (None, [], _LACKS[name])]
    if not named:
        return []
    what = f"its generation_config.json has {', '.join(named)}, which engine: vllm does not apply"
    return [Problem("ENGINE", where, what, "use engine: transformers")]


def unlike_stored(source: Path | str, revision: str | None = None, *, trust_code: bool = False) -> list[Problem]:
    """`unlike` of the generation config of a folder or Hub name; empty if it cannot be read, which loading the model reports."""
    try:
        return unlike(generation_of(source, revision, trust_code=trust_code), str(source))
    except (OSError, ValueError):  # no such model, or one whose code may not run
        return []


def unserved(spec: AdapterSpec) -> str:
    """Why vLLM cannot apply the adapter that a section trains; empty if it can."""
    trimmed = "trim writes a sparse adapter (SHiRA), and vLLM reads LoRA only"
    return trimmed if spec.trim else _unserved_lora(spec.lora)


def _unserved_lora(lora: LoraSpec) -> str:
    if lora.bias != "none":
        return f"vLLM supports bias: none only, and this is {lora.bias}"
    if lora.modules_to_save:
        return "vLLM supports no modules_to_save"
    if lora.r > MAX_RANKS[-1]:
        return f"vLLM supports ranks up to {MAX_RANKS[-1]}, and this is {lora.r}"
    if other := sorted(name for name, value in lora.extra.items() if name not in _EXTRA and value):
        return f"vLLM may not apply lora.extra.{other[0]}"
    start = lora.extra.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        return f"init_lora_weights: {start} subtracts the start from the base, which vLLM does not do"
    return ""


def samples_by_vllm(spec: AdapterSpec) -> bool:
    """Whether vLLM generates the completions of an adapter's rounds."""
    return spec.objective in SAMPLING and spec.sampling.engine == "vllm"


def in_memory(name: str) -> TrainError:
    """The error for a base that is not read from its folder."""
    what = "engine: vllm loads the base from its folder, and this base is a model in memory"
    return TrainError.of("ENGINE", name, what, "give the folder or the Hub name, or use engine: transformers")


def check_rounds(spec: AdapterSpec, source: str | None, name: str) -> None:
    """Check that vLLM can generate the completions of an adapter's rounds.

    Args:
        spec: the section, with `sampling: {engine: vllm}`.
        source: folder or Hub name of the base; None if it cannot be used.
        name: of the adapter.

    Raises:
        TrainError: MISSING, DEVICE, ENGINE; every problem at once.
    """
    found = missing_vllm(name)
    if spec.base.quantization:
        what = "engine: vllm loads the base as it is stored, and training loads it in 4 or 8 bits"
        found.append(Problem("ENGINE", name, what, "remove base.quantization, or use engine: transformers"))
    if reason := _unserved_lora(spec.lora):  # trim comes after the rounds
        found.append(Problem("ENGINE", name, reason, "use engine: transformers"))
    if source is not None:
        found += unlike_stored(source, spec.base.revision, trust_code=spec.base.trust_remote_code)
    if found:
        raise TrainError(found)


@dataclass
class VllmModel:
    """A model in vLLM, with at most one adapter.

    Attributes:
        llm: `vllm.LLM`.
        tokenizer: The tokenizer that made the prompts; vLLM receives and returns token ids.
        generation: The model's generation config, whose `repetition_penalty`, `min_p` and end tokens apply.
        adapter: `LoRARequest`, or None.
    """

    llm: Any
    tokenizer: Any
    generation: Any
    adapter: Any = None

    @classmethod
    def load(
        cls, error: type[PaftMergeError], where: str, source: Path | str, spec: VllmSpec, tokenizer: Any, generation: Any, *,
        max_length: int, dtype: str, adapter: Path | None = None, rank: int = 0, revision: str | None = None,
        trust_code: bool = False,
    ) -> VllmModel:  # fmt: skip
        """Start vLLM with a model.

        Args:
            error: Type of the error.
            where: Name of the model or adapter in the error.
            source: Folder or Hub name of the model.
            spec: Arguments of `vllm.LLM`.
            tokenizer: The tokenizer of the prompts.
            generation: `generation_of` the model.
            max_length: Longest prompt with its answer, in tokens.
            dtype: torch dtype of the weights, or `auto`: as stored, but 16 bits for float32.
            adapter: Folder of a LoRA on the model.
            rank: Largest rank of its factors.
            revision: Commit, tag or branch of a Hub repository.
            trust_code: Run the Python code of the model's folder.

        Raises:
            PaftMergeError: ENGINE, when vLLM cannot load the model.
        """
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        options: dict[str, Any] = {}
        request = None
        if adapter is not None:
            options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in MAX_RANKS if r >= rank)}
        try:
            from vllm import LLM

            if adapter is not None:
                from vllm.lora.request import LoRARequest

                request = LoRARequest("adapter", 1, str(adapter))
            llm = LLM(
                model=str(source), revision=revision, trust_remote_code=trust_code, dtype=dtype,
                max_model_len=max_length, skip_tokenizer_init=True, generation_config="vllm", **spec.model_dump(), **options,
            )  # fmt: skip
        except Exception as problem:  # vLLM raises anything on models that it does not know, and without memory
            what = f"vLLM cannot load {Path(source).name}: {' '.join(str(problem).split())[:300]}"
            fix = "use engine: transformers, or another vllm: {gpu_memory_utilization: ...}"
            raise error.of("ENGINE", where, what, fix) from problem
        return cls(llm, tokenizer, generation, request)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        completions: int = 1,
        seed: int = 0,
        top_p: float = 1.0,
        stops: Sequence[int] | None = None,
        ended: list[bool] | None = None,
        spaced: list[bool] | None = None,
    ) -> list[tuple[str, ...]]:
        """Generate completions of all prompts, as `generation.complete` does for one batch.

        A sampled completion depends on the seed, the number of its prompt and its own number; not on other prompts.

        Args:
            prompts: Token ids.
            max_new_tokens: Longest completion, in tokens.
            temperature: Sampling temperature; 0 is greedy decoding.
            completions: Number of completions per prompt.
            seed: Seed of sampled completions.
            top_p: Share of the probability from which tokens are sampled.
            stops: End tokens; None for those of the generation config.
            ended: Receives for every completion whether an end token stopped it.
            spaced: Receives for every completion whether a space separates it from its prompt.

        Returns:
            The completions of every prompt, in the order of the prompts.
        """
        from vllm import SamplingParams

        given = self.generation.eos_token_id if stops is None else stops
        stops = [given] if isinstance(given, int) else list(given or ())
        how: dict[str, Any] = {
            "n": completions, "temperature": temperature, "max_tokens": max_new_tokens, "detokenize": False,
            "stop_token_ids": stops, "ignore_eos": True,  # vLLM would add the end tokens of the model's files
            "repetition_penalty": self.generation.repetition_penalty or 1.0,
        }  # fmt: skip
        if temperature:
            how |= {"top_p": top_p, "top_k": 0, "min_p": self.generation.min_p or 0.0}
        first = seed * _STRIDE
        made = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            [
                # vLLM adds a completion's number to the seed of its prompt.
                SamplingParams(**how, **({"seed": (first + at * completions) % 2**62} if temperature else {}))
                for at in range(len(prompts))
            ],
            use_tqdm=False,
            lora_request=self.adapter,
        )
        rows = [
            (list(ids), list(one.token_ids))
            for ids, request in zip(prompts, made, strict=True)
            for one in sorted(request.outputs, key=lambda one: int(one.index))
        ]
        if ended is not None:
            ended += [not {*stops}.isdisjoint(new) for _, new in rows]
        texts = texts_of(self.tokenizer, rows, spaced)
        return [tuple(texts[i : i + completions]) for i in range(0, len(texts), completions)]

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        self.llm = None
        gc.collect()
        torch.cuda.empty_cache()
