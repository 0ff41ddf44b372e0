"""Sparse adapters: one section of a recipe becomes one PEFT adapter. Everything heavy is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paft_merge.train.launch import train_recipe
    from paft_merge.train.run import train

__all__ = ["train", "train_recipe"]


def __getattr__(name: str) -> Any:
    """Import `train` and `train_recipe` on first use: torch and TRL take seconds."""
    if name == "train":
        from paft_merge.train.run import train

        return train
    if name == "train_recipe":
        from paft_merge.train.launch import train_recipe

        return train_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
