"""The routers of mixture-of-experts layers: the tensors that decide which experts a token goes to, and with which weight.

A name such as `mlp.gate` says too little, because dense models have gates too. So a router needs a name of the table and the experts
beside it, in the same module.
"""

from __future__ import annotations

from collections.abc import Iterable

ROUTERS = frozenset({
    "gate",  # Mixtral, Qwen MoE, DeepSeek (with e_score_correction_bias), OLMoE, PhiMoE, Hunyuan (gate.wg), LFM2
    "router",  # gpt-oss, Llama 4, Jamba, Granite and DBRX (router.layer), Switch and NLLB (router.classifier), Gemma 4
    "shared_expert_gate",  # Qwen MoE: the weight of the shared expert
    "e_score_correction_bias", "expert_bias", "expert_biases", "moe_statics",  # biases of the choice outside the gate: LFM2, AFMoE, ERNIE 4.5
})  # fmt: skip
"""Names of the modules and parameters that route."""

EXPERTS = frozenset({"experts", "local_experts", "switch_mlp", "input_linear", "output_linear"})
"""Names of the modules beside a router that hold the experts; `input_linear` is Granite's and JetMoE's."""

BLOCKS = frozenset({"block_sparse_moe", "moe"})
"""Names of modules that are mixtures of experts, whatever their experts are called."""


def find_routers(names: Iterable[str]) -> frozenset[str]:
    """The names among a model's tensor names that belong to a router; none in a dense model."""
    split = {name: name.split(".") for name in names}
    mixtures = set()
    for parts in split.values():
        for i, part in enumerate(parts):
            if part in EXPERTS or part in BLOCKS:
                mixtures.add(tuple(parts[: i + (part in BLOCKS)]))
    return frozenset(
        name
        for name, parts in split.items()
        if any(part in ROUTERS and tuple(parts[:i]) in mixtures for i, part in enumerate(parts))
    )
