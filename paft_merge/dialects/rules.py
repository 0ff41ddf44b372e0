"""What each reader of adapters does with an adapter, as data: a row for each trait that it minds, with the source.

The readers' programs were read at the commits named in `SOURCES`. A trait without a row makes no difference to a reader.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Outcome = Literal["silent", "refuses", "option", "loads"]
"""`silent`: it loads, and a part is ignored or scaled wrongly, without an error. `option`: it loads with an option."""

WORST: tuple[Outcome, ...] = ("silent", "refuses", "option", "loads")
"""The outcomes, the worst first."""


class Rule(NamedTuple):
    """One row.

    Attributes:
        trait: a key of `TRAITS`.
        outcome: what it means for the adapter.
        what: the reader's behaviour, in the third person; `{}` is the detail of the trait.
        source: a key of `SOURCES`.
        fix: how to get around it; empty if there is no way.
    """

    trait: str
    outcome: Outcome
    what: str
    source: str
    fix: str = ""


_MERGE = "merge it into a checkpoint with paft merge"
_PORTABLE = "paft convert ADAPTER OUT --to vllm"
_TO_PEFT = "paft convert ADAPTER OUT --to peft"
_START = "save it again with PEFT's path_initial_model_for_weight_conversion"
_COMPARE = "give --base BASE to compare them; paft convert leaves them out if they are equal"
_RANK = "put the rank of the factors into rank_pattern, if their scale is lora_alpha over that"
_HALF = "save the adapter again: half of a module is missing"
_NO_LORA = "reads LoRA only, and this is {}"
_DIALECT = "does not find adapter_model.safetensors, as PEFT names it"
_FULL_SAVE = "save the adapter again with PEFT's save_pretrained"
_UNFIT = "cannot load it on this base: {}"
_OTHER_BASE = "check which base it was trained on"

SOURCES: dict[str, tuple[str, str]] = {
    "vllm helper": ("vllm-project/vllm: vllm/lora/peft_helper.py", "02143692"),
    "vllm config": ("vllm-project/vllm: vllm/config/lora.py", "01230b40"),
    "vllm names": ("vllm-project/vllm: vllm/lora/utils.py, parse_fine_tuned_lora_name", "001e63a8"),
    "vllm model": ("vllm-project/vllm: vllm/lora/lora_model.py", "0306474e"),
    "vllm manager": ("vllm-project/vllm: vllm/lora/model_manager.py", "01533aa8"),
    "vllm experts": ("vllm-project/vllm#41754, #50252", "2026-07-29"),
    "sglang config": ("sgl-project/sglang: python/sglang/srt/lora/lora_config.py", "0ceb81fe"),
    "sglang adapter": ("sgl-project/sglang: python/sglang/srt/lora/lora.py", "2026-05"),
    "sglang manager": ("sgl-project/sglang: python/sglang/srt/lora/lora_manager.py, validate_new_adapter", "2026-05"),
    "sglang names": ("sgl-project/sglang: python/sglang/srt/lora/utils.py", "2026-05"),
    "sglang rslora": ("sgl-project/sglang#40835", "2026-09-23"),
    "sglang experts": ("sgl-project/sglang#25528", "2026-05-17"),
    "llamacpp converter": ("ggml-org/llama.cpp: convert_lora_to_gguf.py", "0b03adaa"),
    "llamacpp loader": ("ggml-org/llama.cpp: src/llama-adapter.cpp", "0650ea8c"),
    "mlx": ("ml-explore/mlx-lm: mlx_lm/tuner/utils.py, load_adapters", "d78bf58e"),
    "peft": ("huggingface/peft: src/peft/utils/save_and_load.py, peft_model.py", "0.21.2"),
    "peft experts": ("huggingface/peft: src/peft/utils/transformers_weight_conversion.py", "0.21.2"),
    "peft init": ("huggingface/peft: src/peft/tuners/lora/layer.py", "0.21.2"),
    "unsloth": ("unslothai/unsloth-zoo#1232, #1269", "2026-09-17"),
}
"""Repository and file (or thread), and the commit, version or date at which it was read."""

VLLM = (
    Rule("mlx", "refuses", _DIALECT, "vllm model", _PORTABLE),
    Rule("kohya", "refuses", _DIALECT, "vllm model", _PORTABLE),
    Rule("other type", "refuses", _NO_LORA, "vllm helper", _MERGE),
    Rule("empty", "silent", "loads nothing: there is no factor in the file", "vllm manager", _FULL_SAVE),
    Rule("unfit", "refuses", _UNFIT, "vllm model", _OTHER_BASE),
    Rule("alora", "silent", "applies aLoRA from the first token on: it does not read alora_invocation_tokens", "vllm helper"),
    Rule("variant", "silent", "does not read {}, and adds B A as for plain LoRA", "vllm helper", "use it with PEFT"),
    Rule("unknown fields", "silent", "does not read these fields; this version of paft does not know what they change", "vllm helper", "remove those that change nothing"),
    Rule("replicated layers", "silent", "has no replicated layers: factors of the added ones are not used", "vllm manager", "use it with PEFT"),
    Rule("start from the base", "silent", "adds B A to the base, from which {} had subtracted its start", "vllm helper", _START),
    Rule("scale not of r", "silent", "does not read rank_pattern and alpha_pattern: it multiplies by {} times the right scale", "vllm helper", _PORTABLE),
    Rule("wrapped names", "silent", "removes one base_model.model. and finds no such module then, without an error", "vllm names", _PORTABLE),
    Rule("packing of experts", "silent", "reads the experts in the order of PEFT, and they are {}", "unsloth", "set lora_B_layout in adapter_config.json, then paft convert"),
    Rule(
        "fused experts unlike the base", "silent",
        "applies them only for models whose experts it holds in one tensor (is_3d_moe_weight), such as gpt-oss; for others they have no effect",
        "vllm experts", f"{_PORTABLE} --base BASE",
    ),
    Rule("half of the fused", "refuses", "needs both parameters of the experts", "vllm manager", f"{_PORTABLE} --base BASE"),
    Rule("copies of the base", "silent", "ignores stored embeddings: harmless only if they are those of the base", "vllm model", _COMPARE),
    Rule("dora", "refuses", "does not support DoRA", "vllm helper", _MERGE),
    Rule("whole weights", "refuses", "supports modules_to_save: null only", "vllm helper", _MERGE),
    Rule("biases", "refuses", "supports bias: none only", "vllm helper", _MERGE),
    Rule("trained tokens", "refuses", "has no place for trained rows of embeddings", "vllm names", _MERGE),
    Rule("other tensors", "refuses", "knows no such tensor", "vllm names"),
    Rule("adapter's name", "refuses", "expects lora_A.weight and lora_B.weight, without a name between", "vllm names", _PORTABLE),
    Rule("half a pair", "refuses", "needs both factors", "vllm manager", _HALF),
    Rule("malformed factors", "refuses", "needs factors that can be multiplied", "vllm manager", _HALF),
    Rule("rank not of the configuration", "silent", "does not compare the ranks; the scale of these modules is not known", "vllm manager", _RANK),
    Rule("towers", "option", "ignores parts for images and sound, unless it is started with --enable-tower-connector-lora", "vllm manager"),
    Rule("convolutions", "refuses", "supports linear layers and embeddings only", "vllm model", _MERGE),
    Rule("no target_modules", "refuses", "needs r, lora_alpha and target_modules in adapter_config.json", "vllm helper", _PORTABLE),
    Rule("rank above 512", "refuses", "supports ranks up to 512, and this is {}", "vllm config", "paft resize ADAPTER OUT --rank 512"),
    Rule("rank above 16", "option", "start it with --max-lora-rank {}", "vllm config"),
    Rule("embeddings", "loads", "adapts embeddings only for models that list embedding_modules, such as Llama", "vllm model"),
    Rule("float32", "loads", "rounds the factors to the type of the base (--lora-dtype auto)", "vllm config"),
)  # fmt: skip

SGLANG = (
    Rule("mlx", "refuses", _DIALECT, "sglang config", _PORTABLE),
    Rule("kohya", "refuses", "does not find adapter_config.json", "sglang config", _PORTABLE),
    Rule("other type", "refuses", _NO_LORA, "sglang adapter", _MERGE),
    Rule("empty", "silent", "loads nothing: there is no factor in the file", "sglang adapter", _FULL_SAVE),
    Rule("unfit", "refuses", _UNFIT, "sglang adapter", _OTHER_BASE),
    Rule("alora", "silent", "applies aLoRA from the first token on: it does not read alora_invocation_tokens", "sglang config"),
    Rule("variant", "silent", "does not read {}, and adds B A as for plain LoRA", "sglang config", "use it with PEFT"),
    Rule("unknown fields", "silent", "does not read these fields; this version of paft does not know what they change", "sglang config", "remove those that change nothing"),
    Rule("replicated layers", "silent", "has no replicated layers: the factors go to other layers", "sglang config", "use it with PEFT"),
    Rule("start from the base", "silent", "adds B A to the base, from which {} had subtracted its start", "sglang config", _START),
    Rule(
        "scale not alpha / r", "silent", "multiplies every module by lora_alpha / r: {} times the right scale (it ignores rsLoRA; newer versions refuse patterns)",
        "sglang rslora", _PORTABLE,
    ),
    Rule("fused experts", "silent", "does not apply the factors of experts that PEFT stores in one tensor", "sglang experts", f"{_PORTABLE} --base BASE"),
    Rule("packing of experts", "silent", "reads the experts in the order of PEFT, and they are {}", "unsloth", "set lora_B_layout in adapter_config.json, then paft convert"),
    Rule("embeddings not targeted", "silent", "skips embed_tokens and lm_head unless target_modules lists them", "sglang adapter", _PORTABLE),
    Rule("outside layers", "silent", "uses only factors below layers.N, and of embed_tokens and lm_head", "sglang adapter", _MERGE),
    Rule("towers", "silent", "takes factors of layers.N of a tower for those of layer N of the language model", "sglang adapter", _MERGE),
    Rule("half a pair", "silent", "leaves the missing factor zero: the module has no effect", "sglang adapter", _HALF),
    Rule("malformed factors", "refuses", "needs factors that can be multiplied", "sglang adapter", _HALF),
    Rule("rank not of the configuration", "silent", "does not compare the ranks; the scale of these modules is not known", "sglang adapter", _RANK),
    Rule("copies of the base", "silent", "ignores stored embeddings: harmless only if they are those of the base", "sglang adapter", _COMPARE),
    Rule("whole weights", "silent", "has no place for whole weights: it skips those outside of layers, and stops at others", "sglang adapter", _MERGE),
    Rule("biases", "silent", "has no place for biases", "sglang adapter", _MERGE),
    Rule("trained tokens", "silent", "has no place for trained rows of embeddings", "sglang adapter", _MERGE),
    Rule("adapter's name", "loads", "finds the factors by lora_A and lora_B anywhere in the name", "sglang adapter"),
    Rule("dora", "refuses", "does not support DoRA", "sglang manager", _MERGE),
    Rule("added tokens", "refuses", "does not support added_tokens.json with tokens beyond the base's vocabulary", "sglang manager", "remove the file if the base has these tokens"),
    Rule("other tensors", "refuses", "knows no such tensor", "sglang names"),
    Rule("convolutions", "refuses", "supports linear layers and embeddings only", "sglang names", _MERGE),
    Rule("no target_modules", "refuses", "needs r, lora_alpha and target_modules in adapter_config.json", "sglang config", _PORTABLE),
    Rule("target_modules: null", "refuses", "needs a list in target_modules", "sglang config", _PORTABLE),
    Rule("target_modules: pattern", "refuses", "needs a list in target_modules, and has the pattern {}", "sglang names", _PORTABLE),
    Rule("target_modules: all", "option", "start it with --lora-target-modules and the names of the modules", "sglang names"),
    Rule("q and v not both", "refuses", "stacks q, k and v, and needs factors of q_proj and v_proj in a layer that has either", "sglang adapter"),
    Rule("rank above 16", "loads", "takes the largest rank of the adapters given at the start; later ones need --max-lora-rank", "sglang manager"),
    Rule("float32", "loads", "rounds the factors to the type of the base", "sglang manager"),
)  # fmt: skip

LLAMACPP = (
    Rule("mlx", "refuses", _DIALECT, "llamacpp converter", _PORTABLE),
    Rule("kohya", "refuses", _DIALECT, "llamacpp converter", _PORTABLE),
    Rule("other type", "refuses", _NO_LORA, "llamacpp converter", _MERGE),
    Rule("empty", "silent", "loads nothing: there is no factor in the file", "llamacpp converter", _FULL_SAVE),
    Rule("unfit", "refuses", _UNFIT, "llamacpp loader", _OTHER_BASE),
    Rule("variant", "silent", "does not read {}, and adds B A as for plain LoRA", "llamacpp converter", "use it with PEFT"),
    Rule("start from the base", "silent", "adds B A to the base, from which {} had subtracted its start", "llamacpp converter", _START),
    Rule("unknown fields", "silent", "does not read these fields; this version of paft does not know what they change", "llamacpp converter", "remove those that change nothing"),
    Rule(
        "scale not alpha / rank", "silent", "reads lora_alpha alone, no alpha_pattern and no rsLoRA: it multiplies by {} times the right scale",
        "llamacpp converter", _PORTABLE,
    ),
    Rule("whole norms", "silent", "writes trained norms to the GGUF file, and ignores them when it loads it", "llamacpp loader", _MERGE),
    Rule("copies of the base", "silent", "ignores stored embeddings: harmless only if they are those of the base", "llamacpp converter", _COMPARE),
    Rule("dora", "refuses", "stops at lora_magnitude_vector", "llamacpp converter", _MERGE),
    Rule("whole weights besides norms", "refuses", "stops at weights that are not factors", "llamacpp converter", _MERGE),
    Rule("biases", "refuses", "stops at biases", "llamacpp converter", _MERGE),
    Rule("trained tokens", "refuses", "stops at trained rows of embeddings", "llamacpp converter", _MERGE),
    Rule("other tensors", "refuses", "knows no such tensor", "llamacpp converter"),
    Rule("adapter's name", "refuses", "expects lora_A.weight and lora_B.weight, without a name between", "llamacpp converter", _PORTABLE),
    Rule("wrapped names", "refuses", "finds no tensor of GGUF for the name", "llamacpp converter", _PORTABLE),
    Rule("half a pair", "refuses", "needs both factors", "llamacpp converter", _HALF),
    Rule("malformed factors", "refuses", "needs factors that can be multiplied", "llamacpp converter", _HALF),
    Rule("rank not of the configuration", "silent", "does not compare the ranks; the scale of these modules is not known", "llamacpp converter", _RANK),
    Rule("fused experts", "refuses", "finds no tensor of GGUF for the name", "llamacpp converter", f"{_PORTABLE} --base BASE"),
    Rule("some experts", "refuses", "stacks the experts of a layer, and needs factors of all of them", "llamacpp converter"),
    Rule("convolutions", "refuses", "supports matrices only", "llamacpp converter", _MERGE),
    Rule("towers", "refuses", "finds no tensor of GGUF for the name", "llamacpp converter", _MERGE),
    Rule("replicated layers", "refuses", "finds no tensor of GGUF for the added layers", "llamacpp converter", "use it with PEFT"),
    Rule("tied head", "refuses", "has no lm_head of its own where the base ties it to the embeddings", "llamacpp converter", _MERGE),
    Rule("tied embeddings", "refuses", "aborts at the first text: it multiplies the tied head by the factors of the embeddings too", "llamacpp loader", _MERGE),
)  # fmt: skip

MLX_LM = (
    Rule("peft", "refuses", "reads adapters.safetensors, with its own configuration", "mlx", "paft convert ADAPTER OUT --to mlx"),
    Rule("kohya", "refuses", "reads adapters.safetensors, with its own configuration", "mlx", "paft convert ADAPTER OUT --to mlx"),
    Rule("other type", "refuses", _NO_LORA, "mlx", _MERGE),
    Rule("empty", "silent", "loads nothing: there is no factor in the file", "mlx"),
    Rule("unfit", "refuses", _UNFIT, "mlx", _OTHER_BASE),
    Rule("half a pair", "silent", "leaves the missing factor as it starts: zero, or random", "mlx", _HALF),
    Rule("uneven rank", "refuses", "gives every module the rank of lora_parameters", "mlx"),
    Rule("other tensors", "refuses", "knows no such tensor", "mlx"),
)  # fmt: skip

PEFT_ITSELF = (
    Rule("mlx", "refuses", _DIALECT, "peft", _TO_PEFT),
    Rule("kohya", "refuses", "does not find adapter_config.json", "peft", _TO_PEFT),
    Rule("unknown type", "refuses", "knows no peft_type {} in version 0.21.2", "peft"),
    Rule("empty", "silent", "loads nothing: there is no factor in the file", "peft", _FULL_SAVE),
    Rule("unfit", "refuses", _UNFIT, "peft", _OTHER_BASE),
    Rule("adapter's name", "silent", "finds no parameter for the name, and ignores the tensor", "peft", _TO_PEFT),
    Rule("wrapped names", "silent", "finds no parameter for the name, and ignores the tensor", "peft", _TO_PEFT),
    Rule("no prefix", "silent", "finds no parameter for the name, and ignores the tensor", "peft", _TO_PEFT),
    Rule("other tensors", "silent", "ignores tensors for which the model has no parameter", "peft"),
    Rule("half a pair", "silent", "leaves the missing factor as it starts: zero, or random; it warns", "peft", _HALF),
    Rule("malformed factors", "refuses", "needs factors that can be multiplied", "peft", _HALF),
    Rule("rank not of the configuration", "refuses", "makes parameters of the rank in adapter_config.json, which these tensors do not fit", "peft", _RANK),
    Rule("packing of experts", "silent", "reads the experts in its own order, and they are {}", "unsloth", "set lora_B_layout in adapter_config.json, then paft convert"),
    Rule("experts not joined", "silent", "has no module for single experts of {} with transformers 5, and ignores their factors", "peft experts", "merge the adapter, or write it with portable: false"),
    Rule("start from the base", "loads", "computes the start of {} again; where that is random (pissa_niter, lora_ga), the base differs", "peft init", _START),
)  # fmt: skip

READERS: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "vllm": ("vLLM", VLLM),
    "sglang": ("SGLang", SGLANG),
    "llamacpp": ("llama.cpp (convert_lora_to_gguf.py)", LLAMACPP),
    "mlx": ("mlx-lm", MLX_LM),
    "peft": ("PEFT", PEFT_ITSELF),
}
"""By the name on the command line: the program, and its rules."""
