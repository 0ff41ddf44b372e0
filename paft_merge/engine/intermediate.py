"""`Intermediate`: the result of one document of a recipe file, merged while other documents read it, never written.

Tensors are computed block by block, in float32, without rounding in between. Statistics of a whole tensor that the
method needs are measured once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import xxhash

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.scratch import SCRATCH
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint, CheckpointFile, TensorInfo
from paft_merge.inputs.dtypes import cast, stored_bytes
from paft_merge.inputs.safetensors_header import ByteBuffer, as_bytes
from paft_merge.inputs.tensor_inputs import RAW
from paft_merge.methods.rules.measured_weights import MeasuredWeights
from paft_merge.methods.rules.model_wide import measure_over_model
from paft_merge.methods.rules.rule import Combine, TensorPass
from paft_merge.plan import COPY, MergePlan, PlannedTensor


class Intermediate(Checkpoint):
    """The result of a plan as a checkpoint: its tensors are computed when they are read.

    Attributes:
        name: the document's name.
        plan: the plan of the document.
    """

    computed = True

    def __init__(self, name: str, plan: MergePlan, *, rounded: bool) -> None:
        """With `rounded`, values have the type that the document would be written in; else they are float32."""
        super().__init__(
            plan.config_source.checkpoint.folder, (), {**plan.config_source.checkpoint.config, **plan.config}, {}
        )
        self.name, self.plan = name, plan
        self.tokenizer_files = (
            plan.vocabulary.files if plan.vocabulary else plan.config_source.checkpoint.tokenizer_files
        )
        self._planned = {tensor.name: tensor for tensor in plan.tensors}
        self.files = tuple(CheckpointFile(shard.file, shard.size, 0, {}, "") for shard in plan.shards)
        self.tensors = {
            slot.name: self._info(slot.name, shard.file, rounded) for shard in plan.shards for slot in shard.slots
        }
        self._ready: dict[str, _Ready] = {}
        self._locks = {name: Lock() for name in self.tensors}
        self._fixing, self._fixed = Lock(), dict[str, PlannedTensor]()

    def _info(self, name: str, file: str, rounded: bool) -> TensorInfo:
        planned = self._planned[name]
        dtype = planned.dtype if rounded or planned.method == COPY or planned.dtype == "F64" else "F32"
        return TensorInfo(name, dtype, planned.shape, file, 0, planned.numel * DTYPES[dtype].bits // 8)

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        """Compute the bytes of a tensor from byte `start` on; whole blocks are computed and the rest is discarded.

        Raises:
            PaftMergeError: as for a merge of the document.
        """
        planned, view = self._planned[name], as_bytes(buffer)
        if planned.method == COPY:
            read = planned.inputs.reads[0]
            read.checkpoint.read_into(read.name, start, view)
            return
        ready, width = self._prepared(name), DTYPES[self.tensors[name].dtype].bits // 8
        stop = start + len(view)
        for first, last in ready.bounds:
            a, b = max(first * width, start), min(last * width, stop)
            if a < b:
                with SCRATCH.nested():
                    made = ready.compute(first, last, self.tensors[name].dtype)
                    view[a - start : b - start] = as_bytes(made)[a - first * width : b - first * width]

    def planned(self, name: str) -> PlannedTensor:
        """Return the plan of a tensor."""
        return self._planned[name]

    def _prepared(self, name: str) -> _Ready:
        """Return the tensor with its measured statistics; the first call measures them."""
        with self._locks[name]:
            if name not in self._ready:
                planned = self._measured_over_model(self._planned[name])
                with SCRATCH.nested():
                    self._ready[name] = _Ready.of(planned)
            return self._ready[name]

    def _measured_over_model(self, planned: PlannedTensor) -> PlannedTensor:
        """Return the tensor with what its rule needs to know about all tensors of the document."""
        if planned.rule.wants == "whole" or not planned.rule.needs_model:
            return planned
        with self._fixing, SCRATCH.nested():
            if not self._fixed:
                tensors = self.plan.tensors
                found = measure_over_model([tensor.rule for tensor in tensors], tensors, None, CpuOps())
                self._fixed = {tensors[i].name: replace(tensors[i], rule=rule) for i, rule in found.items()}
        return self._fixed[planned.name]

    def close(self) -> None:
        """Close the inputs of the plan."""
        self._ready.clear()
        self.plan.close()

    def check_unchanged(self) -> None:
        """See `MergePlan.check_inputs_unchanged`."""
        self.plan.check_inputs_unchanged()

    def fingerprint(self) -> dict[str, Any]:
        """Return the document and the fingerprints of its inputs."""
        files = {model.ref: model.checkpoint.fingerprint() for model in self.plan.models}
        adapters = {model.ref: model.adapter.fingerprint() for model in self.plan.models if model.adapter}
        vocabulary = {"vocabulary": self.plan.vocabulary.digest()} if self.plan.vocabulary else {}
        return {"recipe": self.plan.recipe.resolved(), "inputs": files, "adapters": adapters, **vocabulary}

    def sample(self) -> str:
        """Return the XXH3-128 of the samples of all inputs."""
        return xxhash.xxh3_128_hexdigest("".join(model.checkpoint.sample() for model in self.plan.models).encode())

    @property
    def identity(self) -> tuple[str, int]:
        return self.name, id(self.plan)

    @property
    def folders(self) -> list[Path]:
        own = [folder for model in self.plan.models for folder in model.checkpoint.folders]
        return own + [part.folder for model in self.plan.models if model.adapter for part in model.adapter.parts]

    def written_dtype(self, name: str) -> str:
        return self._planned[name].dtype

    def bytes_read(self, name: str) -> int:
        return sum(read.checkpoint.bytes_read(read.name) for read in self._planned[name].inputs.reads)

    def working_bytes(self, name: str) -> int:
        return self._planned[name].block_bytes

    def release(self, name: str) -> None:
        with self._locks[name]:
            self._ready.pop(name, None)
            self._planned[name].release()


@dataclass(frozen=True)
class _Ready:
    """A tensor with its measured statistics: its blocks can be computed from any thread."""

    tensor: PlannedTensor
    combine: Combine | None
    whole: Any = None
    """The merged tensor, for a method that needs whole tensors."""

    @classmethod
    def of(cls, tensor: PlannedTensor) -> _Ready:
        if tensor.rule.wants == "whole":
            base, sources = tensor.inputs.whole(baked=tensor.rule.baked)
            return cls(tensor, None, tensor.rule.merge(base, sources, tensor.name).reshape(-1))
        walk = TensorPass(tensor.numel, BlockWalk([tensor]), CpuOps(), tensor.inputs.active, tensor.shape)
        rule = tensor.rule
        if isinstance(rule, MeasuredWeights):
            rule = rule.measured(tensor, walk.each, walk.ops).resolved
        return cls(tensor, rule.prepare(walk, tensor.inputs.deltas))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return self.tensor.bounds

    def compute(self, start: int, stop: int, dtype: str) -> Any:
        """Return elements `[start, stop)`, one of `bounds`, as bytes of `dtype`; valid until this thread's next block."""
        key = self.tensor.rounding_key if dtype == self.tensor.dtype else 0
        if self.combine is None:
            return stored_bytes(self.whole[start:stop], dtype, key, start)
        block = self.tensor.inputs.block(start, stop)
        out = SCRATCH.array("out", stop - start, RAW.get(dtype, np.uint32))
        self.combine(block, out, key)
        return out if dtype in RAW else cast(out.view(np.float32), dtype, key, start)
