"""What only the model's class knows, asked of transformers on the meta device, and only when names do not suffice.

Four things are not in a checkpoint's headers: which layers are `Conv1D` (stored transposed, and square ones look like
any other), where a module of transformers 5 has its tensors on disk (renamed, or one per expert), in which order a
module declares its parameters (PEFT nests its wrappers in that order), and which parameters are tied. The model is
built from `config.json` without memory for weights, by classes that ship with transformers: remote code is never run.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters.rows import row_of
from paft_merge.inputs.checkpoint import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """Rows `[first, first + count)` of a parameter, which are checkpoint tensor `name`."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Place:
    """Where a parameter of the model lies in the checkpoint.

    Attributes:
        shape: of the parameter in memory.
        row: elements in a row of it.
        sites: the tensors that hold its rows, in order; several for fused experts.
        beneath: the tensor that holds the value when the one site is not stored (a tied parameter).
    """

    shape: tuple[int, ...]
    row: int
    sites: tuple[Site, ...]
    beneath: str | None = None

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], beneath: str | None = None) -> Place:
        """A parameter that is one tensor."""
        row = row_of(shape)
        return cls(shape, row, (Site(name, 0, prod(shape) // row),), beneath)

    @property
    def stored(self) -> str:
        """The checkpoint tensor to read the value of a whole parameter from."""
        return self.beneath or self.sites[0].name


class Architecture:
    """A model of the base's class, without weights, beside the base's tensors."""

    def __init__(self, model: Any, base: Checkpoint) -> None:
        self._model, self._base = model, base
        self._prefix = f"{model.base_model_prefix}."
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._renamings, self._converters = _conversions(model)
        self._origins = self._locate()
        self._ties = model.get_expanded_tied_weights_keys(all_submodels=True)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "tie_word_embeddings"):
                module.config.tie_word_embeddings = False
        self._fixed_ties = model.get_expanded_tied_weights_keys(all_submodels=True)

    @classmethod
    def of(cls, base: Checkpoint) -> Architecture | None:
        """Build the model that `base` is a checkpoint of; None when transformers has no class of its own for it."""
        try:
            model = _meta_model(base)
        except Exception as error:  # transformers raises anything on a config that it does not know
            log.info("transformers has no architecture for %s: %s", base.folder, error)
            return None
        return cls(model, base)

    def name_of(self, name: str) -> str | None:
        """The parameter of the model that an adapter calls `name`; None when there is none.

        That is `name` itself; or, for an adapter of another head or of an older transformers, `name` with or without
        the prefix of the base model, or renamed as transformers renames the tensors of a checkpoint.
        """
        return next((known for known in (name, self._rename(name)[0]) if known in self._parameters), None)

    def place(self, name: str) -> Place | None:
        """Where the parameter that an adapter calls `name` lies; None when it is not in the base.

        Raises:
            AdapterError: ADAPTER_UNSUPPORTED when transformers computes it from the stored tensors in a way that a
                delta cannot follow.
        """
        known = self.name_of(name)
        if known is None:
            return None
        if known in self._origins:
            return self._assemble(known)
        twin = next((other for other in sorted(self.tied_to(known)) if other in self._origins), None)
        if twin is None or self._rename(known)[0] != known:
            return None
        stored = self._assemble(twin)
        return Place.whole(known, stored.shape, stored.stored)

    def is_conv1d(self, path: str) -> bool | None:
        """Does the module that an adapter calls `path` store its weight `[in, out]`? None when it is not known."""
        module = self._module(path)
        return None if module is None else type(module).__name__ == "Conv1D"

    def parameters_of(self, path: str) -> tuple[list[str], bool] | None:
        """The own parameters of a module, as declared, and whether its experts are stored `[experts, in, out]`."""
        module = self._module(path)
        if module is None:
            return None
        names = [name for name, _ in module.named_parameters(recurse=False)]
        return names, bool(getattr(module, "is_transposed", False))

    def tied_to(self, name: str, always: bool = False) -> set[str]:
        """The parameters that share the memory of parameter `name`, which is not among them.

        Args:
            name: of the model, not of an adapter.
            always: only those that stay tied when the configuration says `tie_word_embeddings: false`.
        """
        ties = self._fixed_ties if always else self._ties
        source = ties.get(name, name)
        return ({source} | {target for target, of in ties.items() if of == source}) - {name}

    def source_of(self, name: str) -> str:
        """The parameter that owns the memory of `name`, as transformers counts it; itself when it is not tied."""
        return str(self._ties.get(name, name))

    def vocabulary(self) -> list[str]:
        """The parameters of the model that have one row per token: its input and output embeddings."""
        ends = [self._model.get_input_embeddings(), self._model.get_output_embeddings()]
        weights = [end.weight for end in ends if getattr(end, "weight", None) is not None]
        return [name for name, p in self._parameters.items() if any(p is weight for weight in weights)]

    def _module(self, path: str) -> Any | None:
        known = (self.name_of(f"{path}.weight") or "").rpartition(".")[0]
        for name in (path, self._prefix + path, path.removeprefix(self._prefix), known):
            with suppress(AttributeError):
                return self._model.get_submodule(name) if name else None
        return None

    def _rename(self, name: str) -> tuple[str, str | None]:
        """The parameter that transformers' loader makes of tensor `name`, and the converter pattern that matched."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        found: tuple[str, str | None]
        found = rename_source_key(name, self._renamings, self._converters, prefix, self._parameters)
        if found[0] not in self._parameters and name in self._parameters:
            found = rename_source_key(name, [], [], prefix, self._parameters)
        return found

    def _locate(self) -> dict[str, dict[str, list[str]]]:
        """For every parameter the tensors of the base that it is made of, by converter pattern, experts in order."""
        from transformers.core_model_loading import dot_natural_key

        origins: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in sorted(self._base.tensors, key=dot_natural_key):
            known, pattern = self._rename(name)
            if known in self._parameters:
                origins[known][pattern or ""].append(name)
        return dict(origins)

    def _assemble(self, known: str) -> Place:
        """The place of a parameter that is stored: as it is, or stacked from one tensor (or several) per expert."""
        origin = self._origins[known]
        if origin.keys() == {""} and len(origin[""]) == 1:
            name = origin[""][0]
            return Place.whole(name, self._base.tensors[name].shape)
        converter = next((c for c in self._converters if origin.keys() <= set(c.source_patterns)), None)
        steps = [(type(op).__name__, op.dim) for op in converter.operations] if converter else []
        shapes = [[self._base.tensors[name].shape for name in names] for names in origin.values()]
        even = all(len(s) == len(shapes[0]) and len(set(s)) == 1 and len(s[0]) == 2 for s in shapes)
        if not (even and steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])):
            first = next(iter(origin.values()))[0]
            what = (
                f"parameter {known!r} is computed from tensors such as {first!r}, in a way that a delta cannot follow"
            )
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self._base.folder, what)
        assert converter is not None
        return self._stack([origin[pattern] for pattern in converter.source_patterns if pattern in origin])

    def _stack(self, parts: list[list[str]]) -> Place:
        """Experts, each the tensors of one place in every list of `parts`, one below the other."""
        sites, first = [], 0
        for names in zip(*parts, strict=True):
            for name in names:
                count = self._base.tensors[name].shape[0]
                sites.append(Site(name, first, count))
                first += count
        row = self._base.tensors[parts[0][0]].shape[1]
        return Place((len(parts[0]), first // len(parts[0]), row), row, tuple(sites))


def _meta_model(base: Checkpoint) -> Any:
    """The model of `config.json`: the class it names, else what transformers makes of its type."""
    import torch
    import transformers

    loud = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            folder = str(base.folder)
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            named = [getattr(transformers, str(name), None) for name in config.architectures or []]
            models = [
                kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
            ]
            if models:
                return models[0](config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    finally:
        transformers.utils.logging.set_verbosity(loud)


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """What transformers does to names, and to values, when it loads a checkpoint of this class."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    return renamings, [t for t in transforms if isinstance(t, WeightConverter)]
