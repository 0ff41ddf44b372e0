"""Tiny Llamas with tokenizers of their own: real byte-level BPE, trained in a moment, that share most of their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from conftest import State, near, save_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from toys.mergekit import CONFIG, HIDDEN, llama_state
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPORA = {
    "base": "the quick brown fox jumps over the lazy dog and the other dogs of the town",
    "x": "the quick brown fox reads the rows of the other models, and merges them over the town",
    "y": "the dogs of the town read quickly, row by row, brown and lazy over the models of others",
}
ADDED = {"base": ["<pad>"], "x": ["<pad>", "<|im_start|>", "<|im_end|>"], "y": ["<|im_end|>", "<tool>", "<pad>"]}
"""Special tokens of each: overlapping, and in different orders."""

PIECES = {"base": 276, "x": 280, "y": 272}
TEXT = "the quick brown dog reads <|im_start|> merging rows<|im_end|> over <tool> the lazy town\n  ok"


@lru_cache
def trained(corpus: str, size: int) -> str:
    """A byte-level BPE of `size` pieces, as tokenizer.json."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([corpus] * 4, trainer)
    return made.to_str()


def save_tokenizer(folder: Path, name: str, added: Sequence[str] | None = None, template: str | None = None) -> int:
    """Write the tokenizer `name` into a folder; how many tokens it has."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(CORPORA[name], PIECES[name])), bos_token="<s>", eos_token="</s>"
    )
    for token in ADDED[name] if added is None else added:
        made.add_tokens(AddedToken(token, special=True, normalized=False))
    if template:
        made.chat_template = template
    made.save_pretrained(folder)
    return len(made.get_vocab())


def ids_of(folder: Path) -> dict[str, int]:
    """Every token of a folder's tokenizer with its id."""
    return AutoTokenizer.from_pretrained(folder).get_vocab()  # type: ignore[no-any-return]


def with_rows(state: State, rows: int, seed: int) -> State:
    """A Llama's state with embeddings of `rows` rows."""
    made = torch.Generator().manual_seed(seed)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    fresh = {n: torch.randn(rows, HIDDEN, generator=made) * 0.02 for n in names if n in state}
    return {n: fresh.get(n, t).to(t.dtype) for n, t in state.items()}


def save_llama(folder: Path, state: State, rows: int, shards: int = 1, **config: Any) -> Path:
    """A checkpoint of `rows` rows."""
    more = {"vocab_size": rows, "eos_token_id": 1, "bos_token_id": 0, **config}
    save_checkpoint(folder, state, shards, {**CONFIG, **more})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "pad_token_id": None}))
    return folder


def vocabulary_family(
    folder: Path, dtype: torch.dtype = torch.float32, *, padding: int = 0, tied: bool = False, shards: int = 1
) -> dict[str, Path]:
    """A base and two models that began with it and have other tokenizers; `padding` rows behind the tokens of each."""
    base, found = llama_state(0, dtype), {}
    if tied:
        del base["lm_head.weight"]
    for seed, name in enumerate(("base", "x", "y")):
        place = folder / name
        rows = save_tokenizer(place, name) + padding
        state = with_rows(base if name == "base" else near(base, seed), rows, 10 + seed)
        found[name] = save_llama(place, state, rows, shards, tie_word_embeddings=tied)
    return found
