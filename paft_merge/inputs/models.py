"""One opened model reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.tensor_inputs import Read

if TYPE_CHECKING:
    from paft_merge.inputs.adapters import Adapter


@dataclass(frozen=True)
class Model:
    """One opened model reference: a checkpoint, and the adapter on it if there is one."""

    ref: str
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def read(self, name: str) -> Read:
        """How this model has the tensor `name`."""
        delta = self.adapter.deltas.get(name) if self.adapter else None
        return Read(self.ref, self.checkpoint, (delta.stored_as if delta else None) or name, delta)

    def has(self, name: str) -> bool:
        """Whether this model has a tensor `name`, stored or made by its adapter."""
        return name in self.checkpoint.tensors or bool(self.adapter and name in self.adapter.deltas)

    def close(self) -> None:
        """Close the files of both; a second call does nothing."""
        self.checkpoint.close()
        if self.adapter:
            self.adapter.close()
