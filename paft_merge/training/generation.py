"""Text generation from prompts, for rounds of sampling and for evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def token_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a prompt: text, or chat turns through the tokenizer's template."""
    chat = not isinstance(prompt, str)  # a template writes the special tokens itself
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if chat else prompt
    return list(tokenizer(text, add_special_tokens=not chat)["input_ids"])


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to `[B, T]` int64; also returns the attention mask `[B, T]`."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[at, span], mask[at, span] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    completions: int = 1,
    ended: list[bool] | None = None,
    spaced: list[bool] | None = None,
    **options: Any,
) -> list[tuple[str, ...]]:
    """Generate completions of one batch, without prompts and special tokens.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer, which needs a pad token.
        prompts: Token ids.
        max_new_tokens: Longest completion, in tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        completions: Number of completions per prompt.
        ended: Receives for every completion whether an end token stopped it.
        spaced: Receives for every completion whether a space separates it from its prompt; some tokenizers leave out the space
            before the first word of a text, so that a completion alone does not show it.
        options: Further arguments of `model.generate`.

    Returns:
        The completions of every prompt, in the order of the prompts.
    """
    input_ids, mask = padded(prompts, tokenizer.pad_token_id, model.device, left=True)
    how = {
        "max_new_tokens": max_new_tokens,
        "num_return_sequences": completions,
        "num_beams": 1,
        "do_sample": temperature > 0,
        "temperature": temperature or None,  # of a greedy run transformers would warn
        "top_k": 0 if temperature else None,
        "top_p": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = model.generate(input_ids=input_ids, attention_mask=mask, **{**how, **options})
    if ended is not None:
        stops = {**how, **options}.get("eos_token_id", model.generation_config.eos_token_id)
        ids = torch.tensor([stops] if isinstance(stops, int) else stops or [], device=made.device, dtype=made.dtype)
        ended += torch.isin(made[:, input_ids.shape[1] :], ids).any(1).tolist()
    width = input_ids.shape[1]
    texts = texts_of(tokenizer, [(row[:width], row[width:]) for row in made.tolist()], spaced)
    return [tuple(texts[i : i + completions]) for i in range(0, len(texts), completions)]


def texts_of(
    tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]], spaced: list[bool] | None = None
) -> list[str]:
    """Texts of completions without special tokens, from the token ids of each prompt and its completion.

    `spaced` is that of `complete`.
    """
    texts: list[str] = tokenizer.batch_decode([new for _, new in rows], skip_special_tokens=True)
    if spaced is not None:
        whole = tokenizer.batch_decode([ids + new for ids, new in rows], skip_special_tokens=True)
        spaced += [text != "" and both.endswith(f" {text}") for text, both in zip(texts, whole, strict=True)]
    return texts
