"""Our methods inside mergekit, and `paft-mergekit-yaml`: mergekit-yaml with them, and with adapters applied as they are read.

`register()` puts the methods in `OURS` into mergekit's registry, where every tool of mergekit finds them.
`adapters_on_the_fly()` lets `base+adapter` be a source without `--lora-merge-cache`: no merged checkpoint is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    TensorGroup,
)
from mergekit.merge_methods.base import MISSING, ParameterSpec
from pydantic import BeforeValidator, Field, ValidationError

from paft_merge.errors import CheckpointError
from paft_merge.hub import fetch
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.links import following_links
from paft_merge.inputs.quantized.recognition import quantised
from paft_merge.methods import METHODS, REQUIRED, Method, Parameter
from paft_merge.methods.rules.whole_tensors import merge_tensors
from paft_merge.plan import Model

OURS = ("l1_ties", "sign_election", "geometric_median", "magmax", "pcb")
"""Methods that mergekit does not have, which `register` adds."""

_ACROSS_TENSORS = ("trim_scope", "weight_scope")
"""Parameters that need more than one tensor; a method of mergekit sees one tensor at a time."""


class OurMethod(GroupMergeMethod):  # type: ignore[misc]
    """One of our methods as mergekit calls it: float32 inside, rounded once into the base's type."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.spec = MergeMethodSpec(
            name=method.name,
            pretty_name=method.title,
            parameters=tuple(_spec_of(p) for p in method.parameters if p.name not in _ACROSS_TENSORS),
            contract=InputContract(
                base=BasePolicy.REQUIRED, min_non_base=method.min_sources, max_non_base=method.max_sources
            ),
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge the deltas of a group's inputs from its base."""
        base, entries = group.base.tensor, group.non_base
        deltas = [entry.tensor.float() - base.float() for entry in entries]
        per_input = [p.name for p in self.spec.input_parameters]
        sources = [{name: parameters[name][entry.id] for name in per_input} for entry in entries]
        shared = {p.name: parameters[p.name] for p in self.spec.shared_parameters}
        rule = self.method.rule(sources, shared, [1] * len(entries))
        merged = merge_tensors(rule, deltas).to(base.device)  # type: ignore[arg-type]
        result: torch.Tensor = (base.float() + merged).to(base.dtype)
        return result


def _spec_of(parameter: Parameter) -> ParameterSpec:
    scope = ParameterScope.SHARED if parameter.scope == "shared" else ParameterScope.NON_BASE
    default = MISSING if parameter.default is REQUIRED else parameter.default
    return ParameterSpec(parameter.name, _type_of(parameter), scope, default, parameter.doc)


def _type_of(parameter: Parameter) -> Any:
    """The type with which pydantic checks a parameter: its choices, or a number within its bounds."""
    if parameter.choices:
        words: Any = Literal[parameter.choices]
        return Annotated[words, BeforeValidator(lambda value: _word(parameter, value))]
    if parameter.type in (int, float):
        low, high = (bound if math.isfinite(bound) else None for bound in (parameter.low, parameter.high))
        number: Any = Annotated[parameter.type, Field(ge=low, le=high)]
        return number | None if parameter.default is None else number
    return parameter.type


def _word(parameter: Parameter, value: Any) -> Any:
    """The word for true or false."""
    return parameter.flags[bool(value)] if parameter.flags and isinstance(value, bool | int | float) else value


def register() -> None:
    """Add our methods to mergekit's registry, unless they are in it already."""
    known = {method.spec.name for method in merge_methods.registered_methods()}
    for name in OURS:
        if name not in known:
            merge_methods.register(OurMethod(METHODS[name]))


class AdaptedLoader(LazyTensorLoader):  # type: ignore[misc]
    """Reads a checkpoint as if an adapter had been merged into it.

    Args:
        folder: the checkpoint; a quantised one is refused.
        adapter: the adapter's folder.
        dtype: of all tensors, as mergekit's `--lora-merge-dtype`; None keeps the checkpoint's own types.
    """

    def __init__(self, folder: Path, adapter: Path, dtype: torch.dtype | None) -> None:
        checkpoint = Checkpoint.open(folder, unpickle=True)
        if found := quantised(checkpoint):
            checkpoint.close()
            uses = "mergekit would write its plain weights with a config that says they are codes"
            raise CheckpointError([found.problem(folder, uses)])
        self.model = Model(f"{folder}+{adapter}", checkpoint, Adapter.open(adapter, checkpoint))
        self.dtype = dtype
        names = [*checkpoint.tensors, *(self.model.adapter.unties if self.model.adapter else ())]
        super().__init__(ShardedTensorIndex(str(folder), True, dict.fromkeys(names, ""), []))

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        """The tensor `key`, or the first of `aliases` that exists: base plus delta, rounded once."""
        name = next((n for n in (key, *(aliases or ())) if n in self.index.tensor_paths), None)
        if name is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        read = self.model.read(name)
        tensor = read.tensor(baked=self.dtype is None)
        if read.delta:
            read.delta.release()
        return tensor.to(device, self.dtype or tensor.dtype)

    def flush(self) -> None:
        """Do nothing: no tensor is cached."""


@contextmanager
def adapters_on_the_fly() -> Iterator[None]:
    """Within the block, mergekit reads `base+adapter` through `AdaptedLoader`, and takes config and tokenizer from the base."""
    patched: Mapping[tuple[type, str], Any] = {
        (LoaderCache, "get"): _get,
        (ModelReference, "merged"): _merged,
        (ModelReference, "local_path"): _local_path,
    }
    before = {place: getattr(*place) for place in patched}
    for (owner, name), function in patched.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)
        for ref in [ref for ref, loader in LoaderCache.loaders.items() if isinstance(loader, AdaptedLoader)]:
            LoaderCache.loaders.pop(ref).model.close()


_plain_get, _plain_path = LoaderCache.get, ModelReference.local_path


def _get(cache: LoaderCache, model: ModelReference) -> LazyTensorLoader:
    if model.lora and model not in cache.loaders:
        folder = Path(_plain_path(model, cache_dir=cache.hf_cache_dir, ignore_lora=True))
        with following_links(True):  # mergekit follows the links of the other models too
            adapter = fetch(model.lora.path, model.lora.revision)
        cache.loaders[model] = AdaptedLoader(folder, adapter, dtype_from_name(cache.lora_merge_dtype))
    return _plain_get(cache, model)


def _merged(model: ModelReference, *_: Any, **__: Any) -> ModelReference:
    return ModelReference(model=model.model, override_architecture=model.override_architecture)


def _local_path(model: ModelReference, cache_dir: str | None = None, ignore_lora: bool = True) -> str:
    return str(_plain_path(model, cache_dir=cache_dir, ignore_lora=True))


def run(program: str, arguments: Sequence[str], epilog: str) -> None:
    """Run mergekit-yaml with our methods and adapters on the fly, raise its errors, and add `epilog` to its help."""
    from mergekit.scripts import run_yaml

    run_yaml.main.epilog = epilog
    register()
    with adapters_on_the_fly():
        run_yaml.main.main(list(arguments), prog_name=program, standalone_mode=False)


def in_one_line(error: Exception) -> str:
    """An error of mergekit, pydantic or Python as one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
