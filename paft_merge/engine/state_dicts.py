"""Merges whose result stays in memory, by the engine that merges checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from paft_merge.compute.cores import available_cores
from paft_merge.engine.streaming import merge_checkpoint
from paft_merge.errors import CheckpointError, Problems
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint, CheckpointFile, TensorInfo
from paft_merge.inputs.models import Model
from paft_merge.inputs.safetensors_header import ByteBuffer, as_bytes
from paft_merge.output.folder import Finished, Output
from paft_merge.plan import MergePlan, PlannedTensor, plan_merge
from paft_merge.recipe import ModelRef, load_recipe

if TYPE_CHECKING:
    from paft_merge.output.direct_io import PageAlignedBuffer

StateDict = Mapping[str, torch.Tensor]

_DTYPES = {getattr(torch, str(dtype.torch), None): dtype.name for dtype in DTYPES.values()}
_FILE = "model.safetensors"
_BASE = "base_model"
"""Name of the base; no random mask depends on it."""


def merge_state_dicts(
    base: StateDict | None,
    sources: Sequence[StateDict] | Mapping[str, StateDict],
    method: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    source_parameters: Sequence[Mapping[str, Any]] = (),
    router: Literal["base", "average", "merge"] | None = None,
    dtype: str | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    threads: int | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, torch.Tensor]:
    """Merge state dicts. The result has the bits of a merge of the same checkpoints on disk.

    Args:
        base: tensors by name; None for a method without a base. Not modified.
        sources: state dicts with the names and shapes of `base`. Random masks (`dare_ties`) depend on the name of a
            source: its key in a mapping, or `"0"`, `"1"`, ... in a sequence. A recipe has the same names in `label`, or
            in the path.
        method: a key of `paft_merge.methods.METHODS`.
        parameters: parameters of the method, as in a recipe; gradients and filters too.
        source_parameters: parameters of each source (`[{"weight": 0.6}, {"weight": 0.4}]`), in the order of `sources`.
        router: how the routers of mixture-of-experts layers are merged, as in a recipe.
        dtype: type of the result, as torch names it (`"bfloat16"`). None: the type of each tensor of the base.
        rounding: how float32 becomes that type.
        seed: seed of random masks and of stochastic rounding.
        threads: blocks computed at a time; changes no bit. None: one for each core.
        allow_nonfinite: merge NaN and infinity instead of raising an error.

    Returns:
        New tensors on the CPU, in the order of the base, or of the first source.

    Raises:
        RecipeError: the method or a parameter is invalid.
        CheckpointError: names or shapes differ, with all differences; or a tensor has a type that cannot be merged.
        MergeError: an input or a result is not finite.
        ValueError: `source_parameters` has another length than `sources`.
    """
    named = dict(sources) if isinstance(sources, Mapping) else {str(i): one for i, one in enumerate(sources)}
    if _BASE in named:
        raise ValueError(f"a source cannot have the name {_BASE!r}")
    if source_parameters and len(source_parameters) != len(named):
        raise ValueError(f"source_parameters has {len(source_parameters)} entries for {len(named)} sources")
    models = [
        {"model": {"model": {"path": name}}, "parameters": dict(given)}
        for name, given in zip(named, source_parameters or [{}] * len(named), strict=True)
    ]
    recipe = load_recipe(
        {
            "merge_method": method,
            "models": models,
            "parameters": dict(parameters or {}),
            "rounding": rounding,
            "seed": seed,
            **({"base_model": {"model": {"path": _BASE}}} if base is not None else {}),
            **({"out_dtype": dtype} if dtype else {}),
            **({"router": router} if router is not None else {}),
        },
        strict=True,
    )
    held = named if base is None else {_BASE: base, **named}
    opened = {ModelRef(name): Model(name, _InMemory(name, tensors)) for name, tensors in held.items()}
    plan = plan_merge(recipe, opened, allow_nonfinite=allow_nonfinite)
    output = _Tensors(plan.tensors)
    merge_checkpoint(plan, output, threads=threads or available_cores())
    return {name: output.tensors[name] for name in plan.config_source.checkpoint.tensors}


_LEFT_OUT = Finished("", "", (), np.empty((0, 0), np.int64), np.empty((0, 0)))


def merge_to(
    receive: Callable[[str, torch.Tensor], None], plan: MergePlan, *, threads: int, leave_out: Iterable[str] = ()
) -> None:
    """Merge every tensor of a plan in memory, with the bits of the checkpoint that the plan writes.

    Args:
        receive: called in this thread with the name and the tensor, on the CPU, of each that is merged.
        plan: the merge.
        threads: blocks computed at a time; changes no bit.
        leave_out: names of tensors that are not needed.

    Raises:
        PaftMergeError: as for a merge of the plan to disk.
    """
    left_out = {*leave_out}
    output = _Received([one for one in plan.tensors if one.name not in left_out], receive)
    output.finished = dict.fromkeys(left_out, _LEFT_OUT)
    merge_checkpoint(plan, output, threads=threads)


class _InMemory(Checkpoint):
    """A state dict as a checkpoint."""

    def __init__(self, name: str, tensors: StateDict) -> None:
        super().__init__(Path(name), (), {}, {})
        self.files = (CheckpointFile(_FILE, 0, 0, {}, ""),)
        self._held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        problems = Problems()
        for key, held in self._held.items():
            if held.dtype not in _DTYPES:
                problems.add("DTYPE_UNSUPPORTED", f"{name}: {key}", f"{held.dtype} cannot be merged")
        problems.raise_as(CheckpointError)
        self.tensors = {
            key: TensorInfo(key, _DTYPES[held.dtype], tuple(held.shape), _FILE, 0, held.nbytes)
            for key, held in self._held.items()
        }
        self._place = id(tensors)

    @property
    def identity(self) -> Hashable:
        return self._place

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        view = as_bytes(buffer)
        view[:] = _bytes_of(self._held[name])[start : start + len(view)].data

    def check_unchanged(self) -> None:
        """Do nothing: there are no files."""


class _Tensors(Output):
    """An output in memory."""

    def __init__(self, planned: Sequence[PlannedTensor]) -> None:
        kinds = {one.name: getattr(torch, str(DTYPES[one.dtype].torch)) for one in planned}
        self.tensors = {one.name: torch.empty(one.shape, dtype=kinds[one.name]) for one in planned}
        self._bytes = {name: _bytes_of(tensor) for name, tensor in self.tensors.items()}
        self.finished = {}

    def memory(self, room: PageAlignedBuffer, name: str, start: int, nbytes: int) -> Any:
        return room.array(nbytes, 0)

    def write(self, name: str, start: int, buffer: Any, room: PageAlignedBuffer | None = None) -> None:
        self._bytes[name][start : start + buffer.nbytes] = buffer.view(np.uint8)

    def finish_tensor(self, finished: Finished) -> None:
        self.finished[finished.name] = finished


class _Received(_Tensors):
    """An output in memory that keeps a tensor until it is merged."""

    def __init__(self, planned: Sequence[PlannedTensor], receive: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__(planned)
        self._receive = receive

    def finish_tensor(self, finished: Finished) -> None:
        del self._bytes[finished.name]
        self._receive(finished.name, self.tensors.pop(finished.name))


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return the memory of a contiguous tensor, `[bytes]`."""
    raw: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw
