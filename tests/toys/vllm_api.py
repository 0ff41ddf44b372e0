"""A stand-in for vLLM's API, as of 0.22 to 0.31: `LLM`, `SamplingParams`, `LoRARequest` and the shape of what they return.

It computes one row and one token at a time with the model in float32, and refuses arguments and values that vLLM refuses.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from paft_merge.training import trainers, vllm_engine

assert trainers  # TRL looks for vLLM and its version when it is imported, so that it comes before the stand-in


@dataclass(kw_only=True)
class SamplingParams:
    """vllm/sampling_params.py: the fields that this project gives, with their defaults and checks."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not all(isinstance(one, int) for one in self.stop_token_ids or []):
            raise ValueError(f"stop_token_ids must contain only integers, got {self.stop_token_ids}.")


@dataclass
class LoRARequest:
    """vllm/lora/request.py."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class LLM:
    """vllm/entrypoints/llm.py; `made` has every instance, and `asked` every call of `generate`."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    max_model_len: int | None = None
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    asked: list[SimpleNamespace] = field(default_factory=list)

    made: ClassVar[list[LLM]] = []

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM

        if self.gpu_memory_utilization > 0.99:
            raise RuntimeError("Free memory on device is less than desired GPU memory utilization\nsecond line")
        if self.max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError("max_lora_rank")
        self.loaded = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).eval()
        LLM.made.append(self)

    def generate(
        self,
        prompts: list[dict],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
    ) -> list[SimpleNamespace]:
        self.asked.append(SimpleNamespace(prompts=prompts, params=sampling_params, lora=lora_request))
        model = self.loaded
        if lora_request is not None:
            from peft import PeftModel

            if not self.enable_lora:
                raise ValueError("Call to add_lora failed: LoRA is not enabled.")
            model = PeftModel.from_pretrained(model, lora_request.lora_path).eval()
        found = [
            SimpleNamespace(
                prompt=None,
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[self._one(model, prompt["prompt_token_ids"], how, index) for index in reversed(range(how.n))],
                finished=True,
            )
            for prompt, how in zip(prompts, sampling_params, strict=True)
        ]
        if lora_request is not None:
            model.unload()
        return found

    @torch.no_grad()
    def _one(self, model: Any, prompt: list[int], how: SamplingParams, index: int) -> SimpleNamespace:
        if len(prompt) + 1 > (self.max_model_len or 1 << 20):
            raise ValueError(f"The decoder prompt (length {len(prompt)}) is longer than the maximum model length")
        ids, stops = list(prompt), set(how.stop_token_ids or [])
        assert how.ignore_eos or not self.skip_tokenizer_init  # vLLM has no end token without a tokenizer
        drawn = torch.Generator().manual_seed((how.seed or 0) + index)
        while len(ids) < len(prompt) + (how.max_tokens or 16):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            seen = torch.tensor(sorted(set(ids)))
            logits[seen] = torch.where(
                logits[seen] > 0, logits[seen] / how.repetition_penalty, logits[seen] * how.repetition_penalty
            )
            ids.append(_token(logits, how, drawn))
            if ids[-1] in stops:
                break
        reason = "stop" if ids[-1] in stops else "length"
        new = tuple(ids[len(prompt) :])
        return SimpleNamespace(index=index, text="", token_ids=new, finish_reason=reason, stop_reason=None)


def _token(logits: torch.Tensor, how: SamplingParams, drawn: torch.Generator) -> int:
    if how.temperature == 0:
        return int(logits.argmax())
    shares, order = (logits / how.temperature).softmax(-1).sort(descending=True)
    shares[shares.cumsum(0) - shares > how.top_p] = 0
    shares[shares < how.min_p * shares[0]] = 0
    return int(order[torch.multinomial(shares, 1, generator=drawn)])


def install(monkeypatch: pytest.MonkeyPatch, *, gpu: bool = True) -> type[LLM]:
    """Put the stand-in in the place of vLLM, on a machine with a GPU; returns `LLM`."""
    places = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }
    for name, content in places.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_engine, "has_gpu", lambda: gpu)
    monkeypatch.setattr(LLM, "made", [])
    return LLM
