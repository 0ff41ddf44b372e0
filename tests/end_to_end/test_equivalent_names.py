"""One model under two spellings of its tensor names: merged as transformers loads both, and written under the base's names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import adapters as toys
from toys.merge import on, recipe, same

from paft_merge import audit, merge, open_plan, reproduce
from paft_merge.cli import cli
from paft_merge.errors import PaftMergeError

State = dict[str, Tensor]
Spelling = Callable[[State], State]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


def of(architecture: str, config: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, architecture)(getattr(transformers, config)(**fields))

    return make


def as_it_is(state: State) -> State:
    return state


def renamed(*pairs: tuple[str, str]) -> Spelling:
    """Every name with each pattern replaced; the first that matches wins."""

    def spell(state: State) -> State:
        def new(name: str) -> str:
            return next((re.sub(a, b, name) for a, b in pairs if re.search(a, name)), name)

        return {new(name): tensor for name, tensor in state.items()}

    return spell


def copied(**copies: str) -> Spelling:
    """Tied tensors stored as well; `__` stands for a dot."""

    def spell(state: State) -> State:
        return {**state, **{new.replace("__", "."): state[old].clone() for new, old in copies.items()}}

    return spell


def moved(old: str, new: str) -> Spelling:
    """One tied tensor stored under the name of another."""
    return lambda state: {new if name == old else name: tensor for name, tensor in state.items()}


def without(pattern: str) -> Spelling:
    return lambda state: {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


def buffers(**made: Tensor) -> Spelling:
    """Buffers stored as well; `__` stands for a dot."""
    return lambda state: {**state, **{name.replace("__", "."): tensor.clone() for name, tensor in made.items()}}


def both(*spellings: Spelling) -> Spelling:
    def spell(state: State) -> State:
        for one in spellings:
            state = one(state)
        return state

    return spell


def fused(model: nn.Module) -> Spelling:
    """The names and the fused experts of the modules of transformers 5, from what it saves."""

    def spell(state: State) -> State:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            loaded = type(model).from_pretrained(folder).state_dict()  # type: ignore[attr-defined]
        seen, kept = set[int](), {}
        for name, tensor in loaded.items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                kept[name] = tensor.clone().contiguous()
        return kept

    return spell


def of_model(make: Callable[[], Any]) -> Spelling:
    return lambda state: fused(make())(state)


class Case(NamedTuple):
    """A model of transformers, and the spellings of what it saves."""

    make: Callable[[], Any]
    spellings: dict[str, Spelling]


MASK = torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8)
FREQUENCIES = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
LAYERS = "transformer__h__{}__attn__{}"
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40, "pad_token_id": 0}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "vocab_size": 60,
}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
WHISPER = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
WHISPER |= {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1}
WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 1}


WAV2VEC2 = {**SMALL, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
WAV2VEC2 |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}


def nomic_bert() -> Any:
    """A model that is saved with one tensor for queries, keys and values."""
    return of("NomicBertModel", "NomicBertConfig", **SMALL, max_position_embeddings=16)()


def marian() -> Any:
    """A model that computes the embeddings of positions, and does not save them."""
    return of("MarianMTModel", "MarianConfig", **{**BART, "decoder_vocab_size": 60})()


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"fullatt_block_indexes": [1], "window_size": 8, "patch_size": 2, "spatial_patch_size": 2}
    text = {**SMALL, "num_key_value_heads": 1, "rope_parameters": rope, "max_position_embeddings": 64}
    ids = {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**GROUPED)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    config = Mistral3Config(
        text_config=MistralConfig(**GROUPED), vision_config=PixtralVisionConfig(**{**VISION, "head_dim": 8}),
        image_token_index=39, vision_feature_layer=-1, spatial_merge_size=1,
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(config)


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, "max_position_embeddings": 16, "projection_dim": 8, "eos_token_id": 2, "bos_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 8}, projection_dim=8))


_TREES_2025 = renamed(  # transformers 4.52 to 4.57
    (r"^(model\.)?language_model\.lm_head\.|^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.model\.", "model.language_model."),
    (r"^model\.language_model\.", "model.language_model."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
_TREES_2024 = renamed(  # as published
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)
_QWEN = renamed((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
_ALL_OF_T5 = {f"{side}__embed_tokens__weight": "shared.weight" for side in ("encoder", "decoder")}
_ALL_OF_BART = {f"model__{side}__embed_tokens__weight": "model.shared.weight" for side in ("encoder", "decoder")}
CASES = {
    "qwen3": Case(
        of("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, tie_word_embeddings=True),
        {
            "saved": as_it_is,
            "bare": renamed((r"^model\.", "")),
            "with head": copied(lm_head__weight="model.embed_tokens.weight"),
            "only head": moved("model.embed_tokens.weight", "lm_head.weight"),
            "old": buffers(**{f"model__layers__{i}__self_attn__rotary_emb__inv_freq": FREQUENCIES for i in range(2)}),
        },
    ),
    "gpt2": Case(
        toys.gpt2,
        {
            "saved": as_it_is,
            "bare": renamed((r"^transformer\.", "")),
            "old": both(
                buffers(**{LAYERS.format(i, "bias"): MASK for i in range(2)}),
                buffers(**{LAYERS.format(i, "masked_bias"): torch.tensor(-1e4) for i in range(2)}),
                renamed((r"^transformer\.", "")),
            ),
        },
    ),
    "gptj": Case(
        of("GPTJForCausalLM", "GPTJConfig", n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=40, rotary_dim=4),
        {
            "saved": as_it_is,
            "old": both(
                buffers(**{LAYERS.format(0, "bias"): MASK.bool()}),
                buffers(**{LAYERS.format(0, "masked_bias"): torch.tensor(-1e9)}),
            ),
        },
    ),
    "bert": Case(
        of("BertForMaskedLM", "BertConfig", **SMALL, max_position_embeddings=16),
        {
            "saved": as_it_is,
            "2018": renamed((r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta")),
            "with head": both(
                copied(cls__predictions__decoder__weight="bert.embeddings.word_embeddings.weight"),
                copied(cls__predictions__decoder__bias="cls.predictions.bias"),
            ),
            "positions": buffers(bert__embeddings__position_ids=torch.arange(16)[None]),
        },
    ),
    "bert encoder": Case(
        of("BertModel", "BertConfig", **SMALL, max_position_embeddings=16),
        {"saved": as_it_is, "with prefix": renamed((r"^", "bert."))},
    ),
    "opt": Case(
        toys.opt,
        {
            "saved": as_it_is,
            "bare": renamed((r"^model\.", "")),
            "with head": copied(lm_head__weight="model.decoder.embed_tokens.weight"),
        },
    ),
    "bloom": Case(
        of("BloomForCausalLM", "BloomConfig", vocab_size=40, hidden_size=16, n_layer=2, n_head=2),
        {"saved": as_it_is, "bare": renamed((r"^transformer\.", ""))},
    ),
    "t5": Case(
        of("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0),
        {
            "saved": as_it_is,
            "all": copied(**_ALL_OF_T5, lm_head__weight="shared.weight"),
            "encoder's": moved("shared.weight", "encoder.embed_tokens.weight"),
        },
    ),
    "flan-t5": Case(
        of("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0, tie_word_embeddings=False),
        {"saved": as_it_is, "all": copied(**_ALL_OF_T5)},
    ),
    "bart": Case(
        of("BartForConditionalGeneration", "BartConfig", **BART),
        {
            "saved": as_it_is,
            "all": copied(**_ALL_OF_BART, lm_head__weight="model.shared.weight"),
            "2020": both(without("final_logits_bias"), buffers(model__encoder__version=torch.tensor([3.0]))),
        },
    ),
    "whisper": Case(
        of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        {"saved": as_it_is, "with head": copied(proj_out__weight="model.decoder.embed_tokens.weight")},
    ),
    "clip": Case(
        clip,
        {
            "saved": as_it_is,
            "2021": buffers(
                text_model__embeddings__position_ids=torch.arange(16)[None],
                vision_model__embeddings__position_ids=torch.arange(5)[None],
            ),
        },
    ),
    "qwen2.5-vl": Case(
        qwen2_5_vl, {"saved": as_it_is, "module names": of_model(qwen2_5_vl), "hub": both(of_model(qwen2_5_vl), _QWEN)}
    ),
    "llava": Case(
        llava,
        {
            "saved": as_it_is, "modules": of_model(llava), "2024": both(of_model(llava), _TREES_2024),
            "2025": both(of_model(llava), _TREES_2025),
        },
    ),
    "gemma3": Case(
        toys.gemma3, {"saved": as_it_is, "modules": of_model(toys.gemma3), "2024": both(of_model(toys.gemma3), _TREES_2024)}
    ),
    "mistral3": Case(
        mistral3, {"saved": as_it_is, "modules": of_model(mistral3), "2024": both(of_model(mistral3), _TREES_2024)}
    ),
    "wav2vec2": Case(
        of("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAV2VEC2),
        {
            "saved": as_it_is,
            "new": renamed((r"\.weight_g$", ".parametrizations.weight.original0"), (r"\.weight_v$", ".parametrizations.weight.original1")),
            "old": renamed((r"\.parametrizations\.weight\.original0$", ".weight_g"), (r"\.parametrizations\.weight\.original1$", ".weight_v")),
        },
    ),
    "nomic-bert": Case(nomic_bert, {"saved": as_it_is, "split": of_model(nomic_bert)}),
    "marian": Case(marian, {"saved": as_it_is, "positions": of_model(marian)}),
    "mixtral": Case(toys.mixtral, {"saved": as_it_is, "fused": of_model(toys.mixtral)}),
    "qwen3-moe": Case(toys.qwen3_moe, {"saved": as_it_is, "fused": of_model(toys.qwen3_moe)}),
}  # fmt: skip
PAIRS = [(name, a, b) for name, case in CASES.items() for a in case.spellings for b in case.spellings if a != b]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, in which every spelling has a base and a fine-tune; each made once."""
    known: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            known[name] = folder = tmp_path_factory.mktemp("case")
            model = CASES[name].make()
            save_model(model, folder / "saved")
            base = load_file(folder / "saved/model.safetensors")
            other = {n: tuned(t, i) if n != "final_logits_bias" else t for i, (n, t) in enumerate(base.items())}
            for spelling, spell in CASES[name].spellings.items():
                for kind, state in (("base", base), ("tuned", other)):
                    put(folder / "saved", folder / f"{spelling} {kind}", spell(state))
        return known[name]

    return make


def tuned(tensor: Tensor, seed: int = 0) -> Tensor:
    """A tensor moved by a Gaussian."""
    return tensor + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def save_model(model: Any, folder: Path) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)


def put(like: Path, folder: Path, state: State, **config: Any) -> Path:
    """A checkpoint with the config of another."""
    folder.mkdir()
    text = {**json.loads((like / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(text))
    save_file({n: t.contiguous().clone() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def loaded(folder: Path) -> State:
    """What transformers loads, every parameter and persistent buffer in float64."""
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def check(base: Path, source: Path, out: Path, weight: float = 0.5) -> None:
    """That the output is base + weight * (source - base), as transformers loads the three, under the base's names."""
    ours, theirs, merged = loaded(base), loaded(source), loaded(out)
    assert ours.keys() == theirs.keys() == merged.keys()
    assert any((ours[name] - theirs[name]).abs().max() > 0.01 for name in ours)
    for name in ours:
        wanted = ours[name] + weight * (theirs[name] - ours[name])
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert set(load_file(out / "model.safetensors")) == set(load_file(base / "model.safetensors"))


def task(base: object, source: object, weight: float = 0.5, **extra: Any) -> dict[str, Any]:
    return recipe("task_arithmetic", str(base), (str(source), {"weight": weight}), dtype="float32", **extra)


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS, ids=lambda value: str(value).replace(" ", "_"))
def test_two_spellings_of_one_model_merge(
    name: str, ours: str, theirs: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    base, source = made(name) / f"{ours} base", made(name) / f"{theirs} tuned"
    merge(task(base, source), tmp_path / "out")
    check(base, source, tmp_path / "out")


def code_of(run: Callable[[], object]) -> tuple[set[str], str]:
    with pytest.raises(PaftMergeError) as caught:
        run()
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return {problem.code for problem in caught.value.problems}, text


@pytest.fixture
def qwen(made: Callable[[str], Path]) -> Path:
    return made("qwen3")


def state_of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["v_head.summary.weight", "mm_projector.0.weight"])
@pytest.mark.parametrize("spelling", ["saved", "bare"])
def test_a_weight_that_only_a_source_has_is_refused_by_name(
    name: str, spelling: str, qwen: Path, tmp_path: Path
) -> None:
    source = put(qwen / "saved", tmp_path / "m", {**state_of(qwen / f"{spelling} tuned"), name: torch.ones(3, 16)})
    codes, text = code_of(lambda: merge(task(qwen / "saved base", source), tmp_path / "out"))
    assert codes == {"KEYS_EXTRA"}
    assert name in text


def test_a_weight_that_a_source_lacks_is_refused_by_name(qwen: Path, tmp_path: Path) -> None:
    state = state_of(qwen / "bare tuned")
    del state["layers.1.mlp.up_proj.weight"]
    codes, text = code_of(
        lambda: merge(task(qwen / "saved base", put(qwen / "saved", tmp_path / "m", state)), tmp_path / "o")
    )
    assert codes == {"KEYS_MISSING"}
    assert "'model.layers.1.mlp.up_proj.weight'" in text


def test_a_tied_head_with_values_of_its_own_is_refused(qwen: Path, tmp_path: Path) -> None:
    state = state_of(qwen / "with head tuned")
    state["lm_head.weight"] += 1e-3
    source = put(qwen / "saved", tmp_path / "m", state)
    codes, text = code_of(lambda: merge(task(qwen / "saved base", source), tmp_path / "out"))
    assert codes == {"TIED_DIFFERS"}
    assert "'lm_head.weight', which differs from 'model.embed_tokens.weight'" in text


def test_a_buffer_that_was_trained_is_a_weight(made: Callable[[str], Path], tmp_path: Path) -> None:
    """BART may lack `final_logits_bias`, which is then zero; other values of it cannot be left out."""
    folder = made("bart")
    state = {**state_of(folder / "saved tuned"), "final_logits_bias": torch.ones(1, 60)}
    source = put(folder / "saved", tmp_path / "m", state)
    codes, text = code_of(lambda: merge(task(folder / "2020 base", source), tmp_path / "out"))
    assert (codes, "final_logits_bias" in text) == ({"KEYS_EXTRA"}, True)


def test_an_untied_head_is_a_weight(tmp_path: Path) -> None:
    save_model(toys.llama(), tmp_path / "base")
    state = {n.removeprefix("model."): tuned(t) for n, t in state_of(tmp_path / "base").items()}
    whole = put(tmp_path / "base", tmp_path / "whole", state)
    merge(task(tmp_path / "base", whole), tmp_path / "out")
    check(tmp_path / "base", whole, tmp_path / "out")
    del state["lm_head.weight"]
    bare = put(tmp_path / "base", tmp_path / "bare", state, architectures=["LlamaModel"])
    codes, text = code_of(lambda: merge(task(tmp_path / "base", bare), tmp_path / "refused"))
    assert (codes, "lm_head.weight" in text) == ({"KEYS_MISSING"}, True)
    codes, text = code_of(lambda: merge(task(bare, tmp_path / "base"), tmp_path / "refused"))
    assert (codes, "lm_head.weight" in text) == ({"KEYS_EXTRA"}, True)


def test_the_model_without_its_head_merges_with_the_one_that_has_it(qwen: Path, tmp_path: Path) -> None:
    bare = {name: put(qwen / "saved", tmp_path / name, state_of(qwen / f"bare {name}"), architectures=["Qwen3Model"])
            for name in ("base", "tuned")}  # fmt: skip
    for i, spelling in enumerate(("saved", "with head")):
        merge(task(bare["base"], qwen / f"{spelling} tuned"), tmp_path / f"bare {i}")
        check(bare["base"], bare["tuned"], tmp_path / f"bare {i}")
        merge(task(qwen / f"{spelling} base", bare["tuned"]), tmp_path / f"whole {i}")
        check(qwen / f"{spelling} base", qwen / "saved tuned", tmp_path / f"whole {i}")


def test_an_encoder_lacks_the_head_of_a_masked_language_model(made: Callable[[str], Path], tmp_path: Path) -> None:
    head, encoder = made("bert"), made("bert encoder")
    with pytest.raises(PaftMergeError) as caught:
        merge(task(encoder / "saved base", head / "saved tuned"), tmp_path / "out")
    assert [problem.code for problem in caught.value.problems] == ["KEYS_MISSING", "KEYS_EXTRA"]
    missing, extra = map(str, caught.value.problems)
    assert "lacks 'pooler.dense.bias', 'pooler.dense.weight'" in missing
    assert "has 'cls.predictions.bias'" in extra
    assert "encoder.layer" not in missing + extra


def test_weights_that_the_class_does_not_load_are_those_of_the_base(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """bert-base-uncased: its config names BertForMaskedLM, and it stores the pooler and the head of BertForPreTraining."""
    folder = made("bert")
    more = {"bert.pooler.dense.weight": torch.randn(16, 16), "cls.seq_relationship.weight": torch.randn(2, 16)}
    base = put(folder / "saved", tmp_path / "base", {**state_of(folder / "2018 base"), **more})
    merge(task(base, folder / "saved tuned"), tmp_path / "out")
    got = state_of(tmp_path / "out")
    check(base, folder / "saved tuned", tmp_path / "out")
    assert all(torch.equal(got[name], tensor) for name, tensor in more.items())
    with open_plan(task(base, folder / "saved tuned")) as plan:
        assert ["'bert.pooler.dense.weight'" in one.what for one in plan.warnings if one.code == "NOT_LOADED"] == [True]
    state = {
        n: t for n, t in state_of(folder / "saved tuned").items() if n != "bert.encoder.layer.1.output.dense.weight"
    }
    with pytest.raises(PaftMergeError, match=r"lacks .*'bert\.pooler\.dense\.weight'"):
        merge(task(base, put(folder / "saved", tmp_path / "part", state)), tmp_path / "refused")


def test_a_form_that_must_be_computed_is_refused_by_name(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Experts of which each has another dtype cannot be read as one tensor."""
    folder = made("mixtral")
    state = state_of(folder / "saved tuned")
    first = next(name for name in state if ".experts.1." in name)
    state[first] = state[first].bfloat16()
    codes, text = code_of(
        lambda: merge(task(folder / "fused base", put(folder / "saved", tmp_path / "m", state)), tmp_path / "o")
    )
    assert codes == {"KEYS_CONVERTED"}
    assert "experts" in text


def test_an_adapter_on_a_base_of_another_spelling(qwen: Path, made: Callable[[str], Path], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    _, adapter = toys.train(CASES["qwen3"].make(), tmp_path, config)
    for i, (base, other) in enumerate((("saved", "bare"), ("bare", "saved"), ("old", "with head"))):
        merge(task(qwen / f"{base} base", on(qwen / f"{other} tuned", adapter), 1.0), tmp_path / f"ours {i}")
        merge(task(qwen / f"{other} tuned", on(qwen / f"{other} tuned", adapter), 1.0), tmp_path / f"theirs {i}")
        ours, theirs = loaded(tmp_path / f"ours {i}"), loaded(tmp_path / f"theirs {i}")
        assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in theirs)
        assert set(state_of(tmp_path / f"ours {i}")) == set(state_of(qwen / f"{base} base"))


def test_slices_of_two_spellings(qwen: Path, tmp_path: Path) -> None:
    def stack(first: str, second: str) -> dict[str, Any]:
        sources = [{"model": str(qwen / f"{first} base"), "layer_range": [0, 2]},
                   {"model": str(qwen / f"{second} tuned"), "layer_range": [0, 2]}]  # fmt: skip
        return {"slices": [{"sources": [one]} for one in sources], "merge_method": "passthrough", "dtype": "float32"}

    merge(stack("saved", "saved"), tmp_path / "wanted")
    for other in ("bare", "with head", "old"):
        merge(stack("saved", other), tmp_path / other)
        wanted, got = state_of(tmp_path / "wanted"), state_of(tmp_path / other)
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_slices_of_a_deeper_model_of_another_spelling(qwen: Path, tmp_path: Path) -> None:
    save_model(
        of("Qwen3ForCausalLM", "Qwen3Config", **{**GROUPED, "num_hidden_layers": 5}, tie_word_embeddings=True)(),
        tmp_path / "deep",
    )
    state = state_of(tmp_path / "deep")
    bare = put(tmp_path / "deep", tmp_path / "bare", {n.removeprefix("model."): t for n, t in state.items()})
    sources = [{"model": str(qwen / "saved base"), "layer_range": [0, 2]}, {"model": str(bare), "layer_range": [3, 5]}]
    merge({"slices": [{"sources": [one]} for one in sources], "merge_method": "passthrough"}, tmp_path / "out")
    got = state_of(tmp_path / "out")
    assert torch.equal(got["model.layers.3.mlp.up_proj.weight"], state["model.layers.4.mlp.up_proj.weight"])
    loaded(tmp_path / "out")


@pytest.mark.parametrize("arithmetic", ["float32", "mergekit"])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "model_stock"])
def test_every_arithmetic_gives_the_bits_of_one_spelling(
    method: str, arithmetic: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    gpt2 = made("gpt2")
    base, tuned = gpt2 / "old base", ["saved tuned", "bare tuned", "old tuned"]
    own = {"linear": {"weight": 0.7}, "ties": {"weight": 0.7, "density": 0.5}}.get(method, {})
    shared = {"slerp": {"t": 0.3}, "linear": {"normalize": False}}.get(method, {})
    for i, first in enumerate(tuned[:2]):
        sources = [base, gpt2 / first] if method == "slerp" else [gpt2 / first, gpt2 / "saved base"]
        sources = [base, *sources] if method == "linear" else sources
        made_of = recipe(method, None if method == "linear" else base, *((one, own) for one in sources), parameters=shared,
                         arithmetic=arithmetic, dtype="float32")  # fmt: skip
        merge(made_of, tmp_path / str(i))
    one, other = state_of(tmp_path / "0"), state_of(tmp_path / "1")
    assert set(one) == set(state_of(base))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["h.0.attn.bias"], MASK)
    loaded(tmp_path / "0")


def test_the_manifest_and_explain_say_the_names_that_were_read(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("qwen3-moe")
    base, source = folder / "fused base", folder / "saved tuned"
    merge(task(base, source), tmp_path / "out")
    names = json.loads((tmp_path / "out/merge_manifest.json").read_text())["names"][str(source)]["tensors"]
    assert names["model.layers.0.mlp.experts.gate_up_proj"][:3] == [
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.gate_proj.weight",
    ]
    assert "model.norm.weight" not in names
    (tmp_path / "r.yaml").write_text(json.dumps(task(base, source)))
    told = CliRunner().invoke(cli, ["explain", str(tmp_path / "r.yaml"), "--tensor", "*.0.mlp.experts.gate_up_proj"])
    assert "model.layers.0.mlp.experts.0.gate_proj.weight and 23 more" in told.output.replace("\n", " "), told.output
    dry = CliRunner().invoke(cli, ["merge", str(tmp_path / "r.yaml"), str(tmp_path / "dry"), "--dry-run"])
    assert dry.exit_code == 0, dry.output


def test_documents_of_several_spellings(qwen: Path, tmp_path: Path) -> None:
    """Every document reads its models under the names of the result's base."""

    def text(a: str, b: str) -> str:
        one = {"name": "one", **task(qwen / f"{a} base", qwen / f"{b} tuned")}
        return json.dumps(one) + "\n---\n" + json.dumps(task(qwen / "saved base", "one", 0.25)) + "\n"

    merge(text("saved", "saved"), tmp_path / "wanted")
    for i, (a, b) in enumerate((("bare", "with head"), ("old", "saved"), ("only head", "bare"))):
        merge(text(a, b), tmp_path / str(i))
        wanted, got = state_of(tmp_path / "wanted"), state_of(tmp_path / str(i))
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_merge_of_two_spellings_is_reproduced(qwen: Path, tmp_path: Path) -> None:
    merge(task(qwen / "saved base", qwen / "bare tuned"), tmp_path / "out")
    assert reproduce(tmp_path / "out").identical


def test_a_buffer_that_the_model_derives_is_the_bases_bit_for_bit(qwen: Path, tmp_path: Path) -> None:
    merge({**task(qwen / "old base", qwen / "saved tuned"), "dtype": "bfloat16"}, tmp_path / "out")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    assert torch.equal(state_of(tmp_path / "out")[name], FREQUENCIES)
    manifest = json.loads((tmp_path / "out/merge_manifest.json").read_text())
    assert manifest["names"][str(qwen / "saved tuned")]["derived"] == [name.replace("1", str(i)) for i in range(2)]


def test_an_audit_measures_a_fine_tune_of_another_spelling(made: Callable[[str], Path]) -> None:
    folder = made("gpt2")
    one = audit(folder / "saved tuned", base=folder / "old base")
    other = audit(folder / "bare tuned", base=folder / "bare base")
    assert [row.name for row in one.sources[0].tensors] == [row.name for row in other.sources[0].tensors]
    assert one.sources[0].total.measure.norm == other.sources[0].total.measure.norm > 0
    assert one.skipped == ()


def test_names_that_agree_import_no_torch(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(task(qwen / "saved base", qwen / "saved tuned")))
    command = ["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]
    code = f"import sys; from paft_merge.cli import cli; cli({command}, standalone_mode=False); "
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_model_that_transformers_does_not_know_is_compared_by_names(qwen: Path, tmp_path: Path) -> None:
    folders = [
        put(qwen / "saved", tmp_path / name, state_of(qwen / f"{name} base"), model_type="unheard_of")
        for name in ("with head", "only head", "saved", "bare")
    ]
    with pytest.raises(PaftMergeError) as caught:
        merge(task(*folders[:2]), tmp_path / "out")
    assert {problem.code for problem in caught.value.problems} == {"KEYS_MISSING"}
    merge(task(*folders[2:]), tmp_path / "out")  # all names but for one prefix
    assert state_of(tmp_path / "out").keys() == state_of(folders[2]).keys()


def inside_layers(wrapper: str) -> Spelling:
    return renamed((r"\.(\d+)\.", rf".\1.{wrapper}."))


WRAPPERS = {
    "DDP": renamed(("^", "module.")),
    "compiled": renamed(("^", "_orig_mod.")),
    "DeepSpeed, compiled": renamed(("^", "module._orig_mod.")),
    "Lightning": renamed(("^", "model.")),
    "Lightning, compiled": renamed(("^", "model._orig_mod.")),
    "PEFT": renamed(("^", "base_model.model.")),
    "an attribute": renamed(("^", "student.")),
    "FSDP": inside_layers("_fsdp_wrapped_module"),
    "checkpointing": inside_layers("_checkpoint_wrapped_module"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("name", "spelling"), [("qwen3", "with head"), ("gpt2", "old"), ("flan-t5", "saved"), ("mixtral", "fused")]
)
def test_names_that_a_wrapper_changed(
    name: str, spelling: str, wrapper: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, wrap = made(name), WRAPPERS[wrapper]
    base, source = folder / f"{spelling} base", folder / "saved tuned"
    merge(task(base, source), tmp_path / "wanted")
    wanted = state_of(tmp_path / "wanted")
    merge(task(base, put(source, tmp_path / "source", wrap(state_of(source)))), tmp_path / "out")
    assert same(state_of(tmp_path / "out"), wanted)
    result = merge(task(put(base, tmp_path / "base", wrap(state_of(base))), source), tmp_path / "wrapped")
    assert same(state_of(tmp_path / "wrapped"), wrap(wanted))
    told = any("transformers does not load" in str(warning) for warning in result.warnings if warning.code == "NAMES")
    assert told == (wrapper not in ("Lightning", "an attribute"))  # which may be names of a model


def test_names_with_another_first_segment_are_not_those_of_a_wrapper(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made("bert encoder")
    state = {
        name.replace("bert.", "roberta."): tensor for name, tensor in state_of(folder / "with prefix tuned").items()
    }
    source = put(folder / "saved", tmp_path / "m", state, model_type="unheard_of")
    base = put(folder / "saved", tmp_path / "base", state_of(folder / "with prefix base"), model_type="unheard_of")
    with pytest.raises(PaftMergeError) as caught:
        merge(task(base, source), tmp_path / "out")
    assert {problem.code for problem in caught.value.problems} == {"KEYS_MISSING", "KEYS_EXTRA"}
