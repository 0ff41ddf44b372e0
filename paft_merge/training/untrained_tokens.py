"""Tokens whose rows in the base's embedding or head were never trained, so that an adapter cannot learn them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paft_merge.training.factors import whole
from paft_merge.training.schema import AdapterSpec

_FEW = 4096
"""Labels whose rows are compared with all others; of more labels, only those of special and added tokens."""

_CHUNK = 8192
"""Rows that are measured at once."""

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out")


def unlearnable(labels: NDArray[np.bool_], model: Any, tokenizer: Any, spec: AdapterSpec) -> list[str]:
    """Tokens with a label that the adapter cannot learn to give, with the reason: `'</s>' (like 211 other rows)`.

    A row counts as never trained if its norm is below a quarter or above four times the median norm, if it equals
    another row (cosine above 0.9999, norms within 1 %), or if it is the mean of all rows, as of tokens that were added.

    Args:
        labels: The token ids that have a label, `[V]`.
        model: The base.
        tokenizer: Its tokenizer.
        spec: The adapter's section; tokens whose rows it trains are left out.
    """
    if _trains_rows(spec):
        return []
    head = model.get_output_embeddings()
    rows_VD = whole((head if head is not None else model.get_input_embeddings()).weight.detach())
    known = {int(i) for i in np.flatnonzero(labels) if i < rows_VD.shape[0]} - _trained_indices(spec)
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    tested = sorted(known if len(known) <= _FEW else known & special)
    if not tested or not rows_VD.is_floating_point() or rows_VD.dim() != 2:
        return []
    reasons = _reasons(rows_VD, tested, sorted(known))
    return [f"{tokenizer.convert_ids_to_tokens(i)!r} ({why})" for i, why in reasons.items()]


def _reasons(rows_VD: Tensor, tested: Sequence[int], known: Sequence[int]) -> dict[int, str]:
    """Why each row was never trained, of `tested` rows in full and of `known` rows by their norms."""
    chunks = [rows_VD[i : i + _CHUNK] for i in range(0, rows_VD.shape[0], _CHUNK)]
    norms_V = torch.cat([chunk.float().norm(dim=1) for chunk in chunks])
    mean_D = torch.stack([chunk.float().sum(0) for chunk in chunks]).sum(0) / rows_VD.shape[0]
    middle = float(norms_V.median())
    found: dict[int, str] = {}
    for i in known:
        ratio = float(norms_V[i]) / middle if middle else 1.0
        if not 0.25 <= ratio <= 4:
            found[i] = "its row is zero" if ratio == 0 else f"the norm of its row is {ratio:.2g} times the median"
    probes_TD = rows_VD[list(tested)].float()
    probe_norms_T = norms_V[list(tested)].clamp(min=1e-30)
    alike_T = torch.zeros(len(tested), dtype=torch.long, device=rows_VD.device)
    for start, chunk in zip(range(0, rows_VD.shape[0], _CHUNK), chunks, strict=True):
        norms_C = norms_V[start : start + len(chunk)].clamp(min=1e-30)
        cosines_TC = (probes_TD @ chunk.float().T) / probe_norms_T[:, None] / norms_C
        near_TC = (norms_C / probe_norms_T[:, None] - 1).abs() < 0.01
        alike_T += ((cosines_TC > 0.9999) & near_TC).sum(1)
    off_T = (probes_TD - mean_D).norm(dim=1) / probe_norms_T
    for at, i in enumerate(tested):
        others = int(alike_T[at]) - 1
        if i not in found and others > 0:
            found[i] = f"its row is like {others} other rows" if others > 1 else "its row is like another row"
        elif i not in found and float(off_T[at]) < 0.02:
            found[i] = "its row is the mean of all rows"
    return dict(sorted(found.items()))


def _trains_rows(spec: AdapterSpec) -> bool:
    """Whether the adapter trains the head or the embedding as a whole."""
    targets = spec.lora.target_modules
    named = [*(spec.lora.modules_to_save or ()), *([] if isinstance(targets, str) else targets)]
    return any(name.rpartition(".")[2] in _EMBEDDINGS for name in named)


def _trained_indices(spec: AdapterSpec) -> set[int]:
    """Tokens of PEFT's `trainable_token_indices`."""
    given = spec.lora.extra.get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, dict) else [given]
    return {int(i) for each in lists for i in each}
