"""The keys `engine` and `vllm` of sections that generate text. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from paft_merge.recipe.sections import Section

Engine = Literal["transformers", "vllm"]

ENGINES: tuple[Engine, ...] = ("vllm", "transformers")
"""In the order in which a model is loaded: vLLM takes most of the memory, and is stopped before transformers loads."""

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`; 16 is its default (vllm/config/lora.py)."""

_TEMPERATURES = (0.01, 2.0)
"""Sampling temperatures of vLLM: it raises lower ones to the first, and refuses those above the second."""


class VllmSpec(Section):
    """Arguments of `vllm.LLM`."""

    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that hold the model together."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the memory of each GPU that vLLM takes."""


class EngineSpec(Section):
    """A section that generates text, with the library that does it."""

    engine: Engine = "transformers"
    """What generates answers: `transformers`, or `vllm` (experimental), which needs a GPU and `pip install vllm`."""
    vllm: VllmSpec = VllmSpec()
    """Settings of `engine: vllm`."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.engine != "vllm" and "vllm" in self.model_fields_set:
            raise ValueError("`vllm` has no effect without engine: vllm")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the default, so that records and fingerprints of before these keys hold."""
        found: dict[str, Any] = dump(self)
        if self.engine == "transformers":
            found.pop("engine", None)
            found.pop("vllm", None)
        return found


def check_temperature(value: float) -> None:
    """Raise ValueError if vLLM does not sample at this temperature."""
    lowest, highest = _TEMPERATURES
    if value and not lowest <= value <= highest:
        raise ValueError(f"engine: vllm samples at temperatures from {lowest} to {highest:g}, got {value:g}")
