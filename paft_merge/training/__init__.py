"""Sparse adapters: one section of a recipe becomes one PEFT adapter. Everything heavy is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paft_merge.training.launch import train as train
    from paft_merge.training.run import train_adapter as train_adapter

_HOMES = {"train": "launch", "train_adapter": "run"}

__all__ = ["train", "train_adapter"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and TRL take seconds."""
    if name in _HOMES:
        return getattr(import_module(f"paft_merge.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
