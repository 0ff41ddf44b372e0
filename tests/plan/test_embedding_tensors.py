"""Which tensors have one row per token: what transformers resizes in each architecture is what the names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from toys.merge import recipe, tensors_of
from toys.vocabulary import ids_of, save_tokenizer
from transformers import AutoConfig

import paft_merge
from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.plan import Model
from paft_merge.plan.vocabulary.embedding_tensors import vocabulary_rows, vocabulary_tensors

ROWS = 101
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 32, "vocab_size": ROWS,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": ROWS}
BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": ROWS,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", SMALL),
    "Qwen2ForCausalLM": ("qwen2", SMALL),
    "Gemma2ForCausalLM": ("gemma2", SMALL),
    "Phi3ForCausalLM": ("phi3", {**SMALL, "pad_token_id": 0}),
    "PhiForCausalLM": ("phi", SMALL),
    "GPT2LMHeadModel": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": ROWS}),
    "GPTNeoXForCausalLM": ("gpt_neox", SMALL),
    "OPTForCausalLM": ("opt", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BertForMaskedLM": ("bert", SMALL),
    "RobertaForMaskedLM": ("roberta", SMALL),
    "DistilBertForMaskedLM": ("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": ROWS}),
    "T5ForConditionalGeneration": ("t5", T5),
    "BartForConditionalGeneration": ("bart", BART),
    "WhisperForConditionalGeneration": ("whisper", WHISPER),
    "MambaForCausalLM": ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": ROWS, "state_size": 4}),
    "MixtralForCausalLM": ("mixtral", {**SMALL, "num_local_experts": 2}),
    "LlavaForConditionalGeneration": (
        "llava",
        {
            "text_config": {**SMALL, "model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
            },
        },
    ),
}  # fmt: skip


def saved(folder: Path, name: str, rows: int) -> dict[str, tuple[int, ...]]:
    """A random tiny model, whose vocabulary transformers brought to `rows`: the shapes that were saved."""
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(rows)
    model = getattr(transformers, name)(AutoConfig.for_model(kind, **settings))
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n == "final_logits_bias")):
        torch.nn.init.normal_(tensor, std=0.02)
    model.save_pretrained(folder)
    with Checkpoint.open(folder) as checkpoint:
        return {name: info.shape for name, info in checkpoint.tensors.items()}


@pytest.mark.filterwarnings("ignore")  # of transformers, on models nobody would run
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_transformers_resizes_has_a_row_per_token(tmp_path: Path, name: str) -> None:
    before, after = saved(tmp_path / "before", name, ROWS), saved(tmp_path / "after", name, ROWS + 3)
    resized = {n for n in before if before[n] != after[n]}
    with Checkpoint.open(tmp_path / "before") as checkpoint:
        model = Model("m", checkpoint)
        assert vocabulary_rows(model) == ROWS
        assert vocabulary_tensors(model, ROWS) == resized != set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["BertForMaskedLM", "BartForConditionalGeneration", "GPT2LMHeadModel", "T5ForConditionalGeneration", "PhiForCausalLM",
     "LlavaForConditionalGeneration"],
)  # fmt: skip
def test_two_vocabularies_of_any_architecture_become_one(tmp_path: Path, name: str) -> None:
    folders = {one: tmp_path / one for one in ("base", "x")}
    for one, folder in folders.items():
        saved(folder, name, save_tokenizer(folder, one))
    data = recipe("linear", folders["base"], (folders["base"], {"weight": 0.4}), (folders["x"], {"weight": 0.6}))
    paft_merge.merge({**data, "tokenizer_source": "union"}, tmp_path / "out", warn=lambda _: None)
    getattr(transformers, name).from_pretrained(tmp_path / "out")
    ids, own = ids_of(tmp_path / "out"), {one: ids_of(folder) for one, folder in folders.items()}
    states = {one: tensors_of(folder) for one, folder in folders.items()}
    flat = 0
    for tensor, got in tensors_of(tmp_path / "out").items():
        held = {one: state[tensor].double() for one, state in states.items()}
        if got.shape == held["base"].shape:
            torch.testing.assert_close(got.double(), 0.4 * held["base"] + 0.6 * held["x"], rtol=1e-5, atol=1e-8)
            continue
        if len(got) == 1:
            got, held, flat = got[0], {one: t[0] for one, t in held.items()}, flat + 1
        assert len(got) == len(ids)
        for token, i in ids.items():
            has = {one: held[one][own[one][token]] for one in held if token in own[one]}
            want = 0.4 * has.get("base", has.get("x")) + 0.6 * has.get("x", has.get("base"))
            torch.testing.assert_close(got[i].double(), want, rtol=1e-5, atol=1e-8, msg=f"{tensor} {token}")
    assert flat == (name == "BartForConditionalGeneration")


def test_an_architecture_without_an_embedding_is_refused(tmp_path: Path) -> None:
    from conftest import save_checkpoint

    folder = save_checkpoint(tmp_path / "m", {"conv.weight": torch.zeros(4, 4)}, config={"model_type": "unheard_of"})
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="its embedding is not known"):
        vocabulary_rows(Model("m", checkpoint))
