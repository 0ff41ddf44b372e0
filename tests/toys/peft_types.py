"""An adapter of every PEFT type, on tiny models: the cases of the tests, and of the table in docs/adapters.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from toys.adapters import Convolutions, llama

wide = partial(llama, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=8, **ids))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    fields = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=40, num_attention_heads=2, max_position_embeddings=8, **fields))


TARGETS: dict[Any, list[str]] = {
    wide: ["q_proj", "v_proj", "down_proj"],
    gpt2: ["c_attn", "c_proj"],
    opt: ["q_proj", "fc1"],
    Convolutions: ["conv1", "conv1x1", "conv2", "linear"],
}


@dataclass(frozen=True)
class TypeCase:
    """An adapter of one type on one model; `fields` are those of its configuration that are not PEFT's default."""

    peft_type: str
    make: Callable[[], nn.Module] = wide
    fields: dict[str, Any] = field(default_factory=dict)
    targets: list[str] | None = None
    free: bool = False
    """Whether the type chooses its targets itself."""

    def config(self) -> Any:
        """The configuration for PEFT."""
        kind = next(kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value == self.peft_type)
        made, fields = PEFT_TYPE_TO_CONFIG_MAPPING[kind], dict(self.fields)
        if not self.free:
            fields["target_modules"] = list(self.targets or TARGETS[self.make])
        return made(**fields)


def _cases(peft_type: str, *cases: Any, **fields: Any) -> dict[str, TypeCase]:
    """The plain case on Llama, and others: a model, or a name and its fields."""
    named: dict[str, TypeCase] = {}
    for case in ("plain", *cases):
        name, make, extra = case if isinstance(case, tuple) else (case, wide, {}) if case == "plain" else ("", case, {})
        name = name or {gpt2: "Conv1D", opt: "biases", Convolutions: "convolutions"}[make]
        own = {**fields, **extra}
        options = {key: own.pop(key) for key in ("targets", "free") if key in own}
        named[f"{peft_type} {name}"] = TypeCase(peft_type, make, own, **options)
    return named


PRUNED = {
    "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False, False],
    "model.layers.1.mlp.down_proj.lora_E": [False] * 5,
}
"""What AdaLoRA left of some ranks."""

CASES: dict[str, TypeCase] = {
    **_cases(
        "ADALORA", gpt2, opt, ("convolution", Convolutions, {"targets": ["conv2"]}), ("pruned", wide, {"rank_pattern": PRUNED}),
        total_step=10, init_r=5, lora_alpha=3
    ),
    **_cases("ADAMSS", opt, r=12, num_subspaces=3),
    **{"BEFT biases": TypeCase("BEFT", opt)},
    **_cases(
        "BOFT", opt, ("convolution", Convolutions, {"targets": ["conv2"], "boft_block_size": 3}),
        ("butterfly", wide, {"boft_n_butterfly_factor": 2}), boft_block_size=4,
    ),
    **_cases("C3A", opt, ("pattern", wide, {"block_size_pattern": {"down_proj": 8}}), block_size=16),
    **_cases("DEFT", gpt2, opt, r=4),
    **_cases(
        "DELORA", opt, ("patterns", wide, {"rank_pattern": {"q_proj": 3}, "lambda_pattern": {"v_proj": 7.0}}), r=4
    ),
    **_cases("FOURIERFT", gpt2, opt, ("pattern", wide, {"n_frequency_pattern": {"q_proj": 20}}), n_frequency=50),
    **_cases("FROD", gpt2, opt, progressbar=False),
    **_cases("GLORA", opt, ("vectors", opt, {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}), r=4),
    **_cases("GRALORA", gpt2, opt, ("hybrid", wide, {"hybrid_r": 4}), r=8),
    **_cases(
        "HIRA", gpt2, opt, ("patterns", wide, {"rank_pattern": {"q_proj": 2}}), ("embedding", wide, {"targets": ["embed_tokens"]}),
        Convolutions, r=4,
    ),
    **_cases("HRA", opt, ("Gram-Schmidt", wide, {"apply_GS": True}), ("convolution", Convolutions, {"targets": ["conv2"], "r": 2}), r=4),
    **_cases(
        "IA3", ("Conv1D", gpt2, {"feedforward_modules": ["c_proj"]}), ("biases", opt, {"feedforward_modules": ["fc1"]}),
        ("no feedforward", opt, {"feedforward_modules": []}),
        ("convolutions", Convolutions, {"targets": ["conv1x1", "conv2", "conv3"], "feedforward_modules": ["conv2"]}),
        feedforward_modules=["down_proj"],
    ),
    **_cases("LN_TUNING", ("Conv1D", gpt2, {}), ("biases", opt, {"free": False, "targets": ["final_layer_norm"]}), free=True),
    **_cases(
        "LOHA", opt, ("patterns", wide, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}), Convolutions,
        ("effective convolutions", Convolutions, {"use_effective_conv2d": True}), r=4, alpha=6,
    ),
    **_cases(
        "LOKR", opt, ("patterns", wide, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("both factors", wide, {"decompose_both": True, "r": 1, "decompose_factor": 4}), ("full", wide, {"r": 64}), Convolutions,
        ("effective convolution", Convolutions, {"use_effective_conv2d": True, "r": 1, "targets": ["conv2"]}), r=2, alpha=6,
    ),
    **_cases(
        "MISS", opt, ("mini", wide, {"init_weights": "mini", "mini_r": 8}), ("bat", wide, {"init_weights": "bat", "r": 8}),
        ("remainder", wide, {"r": 5}), r=4,
    ),
    **_cases(
        "OFT", opt, ("shared block", wide, {"block_share": True}), ("exact Cayley", wide, {"use_cayley_neumann": False}),
        ("three terms", wide, {"num_cayley_neumann_terms": 3}), ("two terms", wide, {"num_cayley_neumann_terms": 2}),
        ("seven terms", wide, {"num_cayley_neumann_terms": 7}), ("constrained", wide, {"coft": True, "eps": 0.5}),
        ("embedding", wide, {"targets": ["embed_tokens"]}), ("convolution", Convolutions, {"targets": ["conv2"], "oft_block_size": 9}),
        oft_block_size=8,
    ),
    **_cases("OSF", opt),
    **_cases("PEANUT", opt, ("deep", wide, {"depth": 2}), r=4),
    **_cases(
        "PSOFT", opt, ("free", wide, {"psoft_orth": False}), ("low rank", wide, {"psoft_svd": "lowrank"}),
        ("Neumann", wide, {"use_cayley_neumann": True}), r=4,
    ),
    **_cases("PVERA", gpt2, opt, ("no projection", wide, {"save_projection": False}), r=4),
    **_cases(
        "RANDLORA", gpt2, opt, ("no projection", wide, {"save_projection": False}), ("sparse", wide, {"sparse": True}), r=4
    ),
    **_cases("ROAD", opt, ("2", opt, {"variant": "road_2"}), ("4", wide, {"variant": "road_4"}), group_size=8),
    **_cases("SUPERTUNING", opt, ("no indices", wide, {"save_precomputed_indices": False})),
    **_cases(
        "TINYLORA", gpt2, opt, ("tied", wide, {"weight_tying": 0.5}), ("no projection", wide, {"save_projection": False}),
        ("embedding", wide, {"targets": ["embed_tokens", "q_proj"]}), r=2,
    ),
    **_cases("TRAINABLE_TOKENS", gpt2, ("tied", partial(wide, tie_word_embeddings=True), {}), token_indices=[7, 3, 39], free=True),
    **_cases("UNILORA", gpt2, opt, ("indices", wide, {"save_indices": True})),
    **_cases("VBLORA", gpt2, opt, ("top weights", wide, {"save_only_topk_weights": True}), vector_length=8, num_vectors=16),
    **_cases("VERA", gpt2, opt, ("no projection", wide, {"save_projection": False}), r=4),
    **_cases("WAVEFT", gpt2, opt, ("proportional", wide, {"proportional_parameters": True}), n_frequency=50),
}  # fmt: skip
