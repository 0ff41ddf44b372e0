"""An opened model reference: a checkpoint, perhaps with an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.tensor_inputs import Read

if TYPE_CHECKING:
    from paft_merge.inputs.adapters import Adapter


@dataclass(frozen=True)
class Model:
    """One opened model reference.

    Attributes:
        ref: the reference, for messages.
        checkpoint: the checkpoint.
        adapter: the adapter on it, if any.
    """

    ref: str
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def read(self, name: str) -> Read:
        """Return the model's tensor `name`, with the adapter's delta."""
        delta = self.adapter.deltas.get(name) if self.adapter else None
        return Read(self.ref, self.checkpoint, (delta.stored_as if delta else None) or name, delta)

    def has(self, name: str) -> bool:
        """Whether the model has a tensor `name`, in the checkpoint or made by the adapter."""
        return name in self.checkpoint.tensors or bool(self.adapter and name in self.adapter.deltas)

    def close(self) -> None:
        """Close the files of both; a second call does nothing."""
        self.checkpoint.close()
        if self.adapter:
            self.adapter.close()
