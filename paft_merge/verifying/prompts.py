"""The tokens at which models are compared: prompts of a file, runs of tokens, or samples of the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paft_merge.errors import EvaluateError
from paft_merge.evaluating.data_rows import read_lines, rows_for
from paft_merge.evaluating.light import token_ids
from paft_merge.evaluating.loading import EvaluatedModel
from paft_merge.evaluating.schema import Measurement
from paft_merge.training.row_files import suffix_of

RUN = 16
"""Tokens of a prompt without data."""

LONGEST = 128
"""Most tokens of a prompt; of a longer one the last are taken."""


def read_prompts(data: Path, count: int) -> list[Any]:
    """At most `count` prompts of a file: texts, or turns of a conversation.

    Args:
        data: rows with `prompt` or `messages` (`.jsonl`, `.json`, `.csv`, `.parquet`), or a text file, of which each line is a prompt.
        count: most prompts.

    Raises:
        EvaluateError: EVAL_DATA, the file cannot be read.
    """
    if suffix_of(data) in (".txt", ".md", ""):
        return list(read_lines(data, count))
    of = Measurement.model_validate({"kind": "self_consistency", "data": str(data), "max_rows": count})
    return [row["prompt"] for row in rows_for(of, data, chat=True)]


def of_data(prompts: Sequence[Any], tokenizer: Any, name: str, longest: int) -> list[list[int]]:
    """Token ids of prompts.

    Args:
        prompts: as `read_prompts` returns them.
        tokenizer: the finished model's.
        name: the model, for messages.
        longest: most tokens of a prompt that the model can read.

    Raises:
        EvaluateError: EVAL_DATA, no prompt has a token; TEMPLATE, the tokenizer has no chat template for conversations.
    """
    subject = EvaluatedModel(name, None, tokenizer, torch.device("cpu"), LONGEST)
    most = max(1, min(LONGEST, longest))
    found = [ids[-most:] for ids in token_ids(subject, [(prompt, True) for prompt in prompts]) if ids]
    if not found:
        raise EvaluateError.of("EVAL_DATA", name, "its tokenizer finds no token in the prompts", "give other prompts")
    return found


def of_tokens(count: int, vocabulary: int, special: Sequence[int], longest: int, seed: int) -> list[list[int]]:
    """`count` runs of `RUN` tokens, or of `longest`, drawn from the vocabulary without the special ones."""
    run = max(1, min(RUN, longest))
    drawn = torch.randint(0, vocabulary, (count * run * 2,), generator=torch.Generator().manual_seed(seed)).tolist()
    avoided = set(special)
    plain = [token for token in drawn if token not in avoided] or drawn
    return [[plain[(i * run + k) % len(plain)] for k in range(run)] for i in range(count)]


@torch.no_grad()
def sampled(model: nn.Module, starts: Sequence[Sequence[int]], seed: int, device: torch.device) -> list[list[int]]:
    """Texts that the base itself writes: each begins with the first token of one of `starts`, and has as many tokens."""
    made = torch.tensor([[row[0]] for row in starts], device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _continued(model, made, len(starts[0]) - 1, sample=True)


@torch.no_grad()
def continued(
    model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int, batch: int, device: torch.device
) -> list[list[int]]:
    """Continue each prompt greedily by exactly `tokens` tokens; prompts of one length are continued together."""
    found: list[list[int]] = [[]] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for own in by_length.values():
        for start in range(0, len(own), batch):
            part = own[start : start + batch]
            ids = torch.tensor([list(prompts[i]) for i in part], device=device)
            for i, row in zip(part, _continued(model, ids, tokens), strict=True):
                found[i] = row
    return found


def _continued(model: nn.Module, ids: torch.Tensor, tokens: int, *, sample: bool = False) -> list[list[int]]:
    """Continue rows of one length, with the model's cache where it has one. A model may end nothing: the rows are compared, not read."""
    held, fed = None, ids
    for _ in range(tokens):
        out = model(input_ids=fed, use_cache=True, **({} if held is None else {"past_key_values": held}))
        logits = out.logits[:, -1].float()
        chosen = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
        held = getattr(out, "past_key_values", None)
        fed = chosen if held is not None else ids
    return [[int(token) for token in row] for row in ids.tolist()]
