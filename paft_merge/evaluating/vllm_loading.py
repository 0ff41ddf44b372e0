"""Load the model whose answers vLLM generates: a model, or a base and one LoRA, which vLLM applies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from paft_merge.dialects.checking import check
from paft_merge.errors import EvaluateError
from paft_merge.evaluating import loading
from paft_merge.evaluating.loading import EvaluatedModel
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.hub import fetch
from paft_merge.inputs.adapter_places import CONFIG
from paft_merge.inputs.adapters.config import read_config
from paft_merge.training.engine_schema import Engine
from paft_merge.training.vllm_engine import VllmModel, generation_of, missing_vllm, unlike

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load_for(
    engine: Engine, model: Path | str | Sequence[str], spec: EvaluateSpec, *, trust_code: bool = False,
    template: str | None = None,
) -> EvaluatedModel:  # fmt: skip
    """Load a model into transformers or into vLLM; the other arguments are those of `load_subject`.

    Raises:
        EvaluateError: MODEL, as in `load_subject`; MISSING, DEVICE, ENGINE, when vLLM cannot run the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    if engine == "transformers":
        return loading.load_subject(model, spec, trust_code=trust_code, template=template)
    name, folder, places = loading.base_and_adapters(model)
    problems = missing_vllm(name)
    if len(places) > 1:
        what = f"vLLM applies one adapter at a time, and these are {len(places)}"
        raise EvaluateError.of("ENGINE", name, what, "merge them with paft merge, or use engine: transformers")
    adapter = fetch(places[0]) if places else None
    if adapter is not None and (reason := unserved_files(adapter)):
        raise EvaluateError.of("ENGINE", name, reason, "use engine: transformers; paft check ADAPTER has the details")
    with loading.errors_of_loading(name):
        generation = generation_of(folder, trust_code=trust_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_code)
        tokenizer = loading.trained_tokenizer(adapter, tokenizer) if adapter else tokenizer
    if problems := problems + unlike(generation, name):
        raise EvaluateError(problems)
    loading.complete_tokenizer(tokenizer, template, name)
    most, dtype = loading.longest(config, spec), spec.dtype
    if dtype == "auto" and config.dtype in _DTYPES:
        dtype = str(config.dtype).removeprefix("torch.")  # vLLM's auto converts float32 to 16 bits
    loaded = VllmModel.load(
        EvaluateError, name, folder, spec.vllm, tokenizer, generation, max_length=most, dtype=dtype, adapter=adapter,
        rank=_rank(adapter) if adapter else 0, trust_code=trust_code,
    )  # fmt: skip
    return EvaluatedModel(name, None, tokenizer, torch.device("cuda"), most, loaded)


def unserved_files(adapter: Path) -> str:
    """Why vLLM cannot apply an adapter, by the headers of its files; empty if it can."""
    (verdict,) = check(adapter, ("vllm",))
    return "" if verdict.passes else f"vLLM {verdict.findings[0].what}"


def _rank(adapter: Path) -> int:
    """The largest rank of an adapter's factors."""
    config = read_config(adapter / CONFIG)
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
