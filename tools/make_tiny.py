"""Make a tiny random Llama and two LoRA adapters for it: something real to merge, in some seconds and half a megabyte.

    python tools/make_tiny.py runs/tiny      # runs/tiny/base, runs/tiny/sft, runs/tiny/dpo

The weights are random but seeded: the same versions of torch, transformers and peft give the same files.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

UPDATE_RMS = {"sft": 2e-3, "dpo": 5e-4}
"""Root mean square of each adapter's update; preference training moves weights less than supervised training does."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: three special tokens, then the 256 bytes."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_base(folder: Path) -> LlamaForCausalLM:
    """Write a two-layer bfloat16 Llama with its tokenizer to `folder`."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def make_adapter(model: LlamaForCausalLM, folder: Path, rms: float) -> None:
    """Write a rank-8 LoRA on every linear layer of `model` to `folder`; its update B A has root mean square `rms`."""
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(model, config)
    for name, factor in lora.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(factor, std=factor.shape[1] ** -0.5)
        if "lora_B" in name:  # PEFT starts B at zero, an adapter that does nothing
            torch.nn.init.normal_(factor, std=rms)
    with torch.no_grad():
        for name, factor in lora.named_parameters():
            if "lora_B" in name:
                a_RI = lora.get_parameter(name.replace("lora_B", "lora_A"))
                factor.mul_(rms / (factor @ a_RI).pow(2).mean().sqrt())
    lora.save_pretrained(folder)
    lora.unload()


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Make FOLDER/base, FOLDER/sft and FOLDER/dpo afresh."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks by the old name
    torch.manual_seed(0)
    for name in ("base", *UPDATE_RMS):
        shutil.rmtree(folder / name, ignore_errors=True)
    model = make_base(folder / "base")
    for name, rms in UPDATE_RMS.items():
        make_adapter(model, folder / name, rms)


if __name__ == "__main__":
    main()
