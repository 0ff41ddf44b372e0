"""How a model answers: logits and hidden states of one model at fixed tokens, and another model beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paft_merge.verifying.loaded_models import layers_of

HELD_BYTES = 512 << 20
"""Most bytes of logits that are kept of the finished model."""

DRIFT_BYTES = 64 << 20
"""Most bytes of hidden states that are kept of it, of all layers together."""


@dataclass(frozen=True)
class Rows:
    """Token ids of prompts, each with the finished model's continuation.

    Attributes:
        ids: `[R, S]`, filled with `0` on the right.
        lengths: tokens of each row.
        prompts: tokens of each row's prompt.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> Rows:
        """Fill rows of different lengths."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        return cls(ids, tuple(map(len, rows)), tuple(prompts))

    @property
    def mask(self) -> Tensor:
        """`[R, S]`: 1 where there is a token."""
        return (torch.arange(self.ids.shape[1])[None] < torch.tensor(self.lengths)[:, None]).long()

    def places(self, most: int) -> Tensor:
        """`[N, 2]`: row and column of at most `most` tokens in order, those that continuations follow first."""
        every = self.mask.nonzero()
        if len(every) <= most:
            return every
        starts = torch.tensor(self.prompts)[every[:, 0]] - 1
        order = torch.argsort((every[:, 1] < starts).long(), stable=True)
        spread = (
            torch.linspace(0, len(every) - 1, most).long() if not (every[:, 1] >= starts).any() else torch.arange(most)
        )
        return every[order[spread].sort().values]


@dataclass
class Answers:
    """What a model computes for the rows.

    Attributes:
        places: `[N, 2]`, where.
        logits: `[N, V]`; of a model without a head its last hidden states, `[N, H]`.
        hidden: of each layer `[n, H]`, at the first places.
        is_features: whether `logits` are hidden states.
    """

    places: Tensor
    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    is_features: bool = False


@torch.no_grad()
def answers_of(model: nn.Module, rows: Rows, places: Tensor, batch: int, device: torch.device) -> Answers:
    """Run a model.

    Args:
        model: in memory, or with weights that are read while it runs: then one batch reads them once.
        rows: the tokens.
        places: as `Rows.places` returns them.
        batch: rows at a time.
        device: where it runs.
    """
    logits, hidden = list[Tensor](), list[list[Tensor]]()
    mask, features = rows.mask, True
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for start in range(0, len(rows.lengths), batch):
        stop = min(start + batch, len(rows.lengths))
        here = places[(places[:, 0] >= start) & (places[:, 0] < stop)] - torch.tensor([start, 0])
        if not len(here):
            continue
        ids, kept = rows.ids[start:stop].to(device), mask[start:stop].to(device)
        given = {"decoder_input_ids": ids} if both else {}
        with _gathered(model, here, ids.shape) as found:
            out = model(input_ids=ids, attention_mask=kept, **given)
        features = found.head is False
        if features:
            last = out.last_hidden_state if hasattr(out, "last_hidden_state") else found.layers[-1]
            logits.append(_at(last, here, ids.shape).cpu())
        else:
            logits.append(out.logits.reshape(-1, out.logits.shape[-1]).cpu())
        hidden.append([one.cpu() for one in found.layers])
    layers = [torch.cat([one[i] for one in hidden]) for i in range(len(hidden[0]))] if hidden else []
    keep = max(1, DRIFT_BYTES // max(1, sum(one.shape[-1] * one.element_size() for one in layers)))
    return Answers(places, torch.cat(logits), [one[:keep] for one in layers], features)


@dataclass
class _Found:
    head: bool = False
    layers: list[Tensor] = field(default_factory=list)


@contextmanager
def _gathered(model: nn.Module, here: Tensor, shape: Any) -> Iterator[_Found]:
    """Let the head see only the tokens at `here`, and collect what the layers return there."""
    found = _Found()
    with ExitStack() as hooks:
        ends: Any = model
        head = ends.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

        def gather(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            found.head = True
            return (_at(args[0], here, shape)[None], *args[1:])

        def collect(_: Any, __: Any, out: Any) -> None:
            found.layers.append(_at(out[0] if isinstance(out, tuple | list) else out, here, shape))

        if head is not None:
            hooks.callback(head.register_forward_pre_hook(gather).remove)
        for layer in layers_of(model):
            hooks.callback(layer.register_forward_hook(collect).remove)
        yield found


def _at(values: Tensor, here: Tensor, shape: Any) -> Tensor:
    """`[n, H]` of `[R, S, H]` at the places of this batch."""
    grid = values.reshape(*shape, values.shape[-1])
    return grid[here[:, 0].to(grid.device), here[:, 1].to(grid.device)]


@dataclass(frozen=True)
class Difference:
    """How far the finished model is from another one, over tokens.

    Attributes:
        kl: `[N]`, KL(other || finished) at each token, in nats; None without logits.
        agree: `[N]`, whether both have the same most likely token.
        largest: the largest difference of two logits, or of two features.
        relative: norm of that difference over the other's norm.
        parted: of each row with a continuation, its first token at which the most likely tokens differ; None if none does.
        drift: of each layer, the norm of the difference of the hidden states over the other's.
    """

    kl: Tensor | None
    agree: Tensor
    largest: float
    relative: float
    parted: tuple[int | None, ...]
    drift: tuple[float, ...]


def difference(finished: Answers, other: Answers, rows: Rows, step: int = 64) -> Difference:
    """Compare two models that answered at the same places.

    Args:
        finished: the finished model.
        other: what it should be, or the base.
        rows: the tokens.
        step: tokens that are compared at a time.
    """
    kl, agree, largest, off, size = list[Tensor](), list[Tensor](), 0.0, 0.0, 0.0
    width = min(finished.logits.shape[-1], other.logits.shape[-1])  # a resized vocabulary
    for start in range(0, len(finished.places), step):
        q = finished.logits[start : start + step, :width].double()
        p = other.logits[start : start + step, :width].double()
        largest = max(largest, float((p - q).abs().max()))
        off, size = off + float((p - q).square().sum()), size + float(p.square().sum())
        agree.append(p.argmax(-1) == q.argmax(-1))
        if not finished.is_features:
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
    same = torch.cat(agree)
    drift = tuple(
        float((o.double() - f.double()).norm() / o.double().norm().clamp_min(1e-300))
        for f, o in zip(finished.hidden, other.hidden, strict=False)
    )
    return Difference(
        torch.cat(kl) if kl else None, same, largest, (off / size) ** 0.5 if size else 0.0,
        _parted(same, finished.places, rows), drift,
    )  # fmt: skip


def _parted(same: Tensor, places: Tensor, rows: Rows) -> tuple[int | None, ...]:
    """Of each row with a continuation, the first token of it that the models choose differently."""
    found = []
    for row, (length, prompt) in enumerate(zip(rows.lengths, rows.prompts, strict=True)):
        if length > prompt:
            own = (places[:, 0] == row) & (places[:, 1] >= prompt - 1) & (places[:, 1] < length - 1)
            differing = places[own & ~same][:, 1]
            found.append(int(differing[0]) - prompt + 1 if len(differing) else None)
    return tuple(found)
