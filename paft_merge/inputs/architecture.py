"""What only the model's class defines, from transformers on the meta device; used only if tensor names do not suffice.

Five things are not in a checkpoint's headers: which layers are `Conv1D` (stored transposed, which the shape of a square
weight does not show), how transformers 5 stores the tensors of a module (renamed, or one per expert), in which order a
module declares its parameters (PEFT nests its wrappers in that order), which parameters are tied, and which stored
tensors the class does not load. The model is built from `config.json` without memory for weights, by classes that ship
with transformers; remote code is never run.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import SimpleNamespace
from typing import Any

from paft_merge.errors import AdapterError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.safetensors_header import row_size_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Rows `[first, first + count)` of a parameter, stored as the checkpoint tensor `name`."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class StoredParameter:
    """How a parameter of the model is stored in the checkpoint.

    Attributes:
        shape: shape of the parameter in memory.
        row_size: elements per row.
        pieces: the tensors that hold its rows, in order; several for fused experts.
        stored_as: the tensor that holds the value if the only piece is not stored (a tied parameter).
    """

    shape: tuple[int, ...]
    row_size: int
    pieces: tuple[Piece, ...]
    stored_as: str | None = None

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], stored_as: str | None = None) -> StoredParameter:
        """A parameter that is one tensor."""
        row_size = row_size_of(shape)
        return cls(shape, row_size, (Piece(name, 0, prod(shape) // row_size),), stored_as)

    @property
    def name(self) -> str:
        """The checkpoint name of its first piece."""
        return self.pieces[0].name

    @property
    def value_in(self) -> str:
        """The checkpoint tensor that holds the value of a parameter of one piece."""
        return self.stored_as or self.name


@dataclass(frozen=True)
class Stretch:
    """Elements `[first, first + count)` of a parameter, stored in tensor `name` from its element `start` on."""

    name: str
    start: int
    first: int
    count: int


@dataclass(frozen=True)
class Layout:
    """The stored tensors that one parameter is made of.

    Attributes:
        origin: the tensors by the loader's pattern for them, in order; equal shapes of `origin` in two checkpoints mean
            that the same conversion makes the parameter of both.
        stretches: where each element of the parameter is stored; None if transformers computes it in another way.
        how: the operations of that computation, for messages.
    """

    origin: Mapping[str, tuple[str, ...]]
    stretches: tuple[Stretch, ...] | None
    how: str = ""


class Architecture:
    """A model of the base's class, without weights, matched with the base's tensors."""

    def __init__(self, model: Any, base: Checkpoint) -> None:
        self._model, self._base = model, base
        self._prefix = f"{model.base_model_prefix}."
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = {k: v for k, v in model.state_dict(keep_vars=True).items() if k not in self._parameters}
        self._state = {**self._parameters, **self._buffers}
        self._renamings, self._converters = _conversions(model)
        self._unmatched: dict[str, str] = {}
        self._origins = self._locate()
        self._ties = model.get_expanded_tied_weights_keys(all_submodels=True)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "tie_word_embeddings"):
                module.config.tie_word_embeddings = False
        self._fixed_ties = model.get_expanded_tied_weights_keys(all_submodels=True)

    @classmethod
    def of(cls, base: Checkpoint) -> Architecture | None:
        """Build the model of which `base` is a checkpoint; None if transformers itself has no class for it."""
        like = base.named_like
        if like is not None and (of_names := _built(like)) is not None:
            return cls._of_class(type(of_names), base) or cls._of_class(None, base)
        return cls._of_class(None, base)

    @classmethod
    def _of_class(cls, kind: Any, base: Checkpoint) -> Architecture | None:
        model = _built(base, kind)
        return cls(model, base) if model is not None else None

    @property
    def base(self) -> Checkpoint:
        """The checkpoint that was matched."""
        return self._base

    def like(self, other: Checkpoint) -> Architecture | None:
        """The same class, for another checkpoint with its own config; None if that is not a config of this class."""
        found = self._of_class(type(self._model), other)
        return found if found and found._model.config.model_type == self._model.config.model_type else None

    def name_of(self, name: str) -> str | None:
        """The model's parameter for the name in an adapter; None if there is none.

        It is `name` itself or, for an adapter of another head or of an older transformers, `name` with or without the
        prefix of the base model, or renamed as transformers renames the tensors of a checkpoint.
        """
        return next((known for known in (name, self._rename(name)[0]) if known in self._parameters), None)

    def find(self, name: str) -> StoredParameter | None:
        """How the base stores the parameter that an adapter calls `name`; None if it does not.

        Raises:
            AdapterError: ADAPTER_UNSUPPORTED if transformers computes it from the stored tensors in a way that a delta
                cannot reproduce.
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
        return StoredParameter.whole(known, stored.shape, stored.value_in)

    def is_conv1d(self, path: str) -> bool | None:
        """Whether the module that an adapter calls `path` stores its weight `[in, out]`; None if it is not found."""
        module = self.module(path)
        return None if module is None else type(module).__name__ == "Conv1D"

    def parameters_of(self, path: str) -> tuple[list[str], bool] | None:
        """A module's direct parameters, as declared, and whether its experts are stored `[experts, in, out]`."""
        module = self.module(path)
        if module is None:
            return None
        names = [name for name, _ in module.named_parameters(recurse=False)]
        return names, bool(getattr(module, "is_transposed", False))

    def tied_to(self, name: str, always: bool = False) -> set[str]:
        """The other parameters that share the memory of parameter `name`.

        Args:
            name: a parameter of the model (not a name in an adapter).
            always: only those that stay tied with `tie_word_embeddings: false` in the configuration.
        """
        ties = self._fixed_ties if always else self._ties
        source = ties.get(name, name)
        return ({source} | {target for target, of in ties.items() if of == source}) - {name}

    def source_of(self, name: str) -> str:
        """The parameter that transformers treats as the owner of the memory of `name`; `name` if it is not tied."""
        return str(self._ties.get(name, name))

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """How the base stores each parameter and persistent buffer of the model that it stores."""
        found: dict[str, Layout] = {}
        for known, origin in self._origins.items():
            found |= self._layouts_of(known, {pattern: tuple(names) for pattern, names in origin.items()})
        return found

    @property
    def unmatched(self) -> Mapping[str, str]:
        """The base's tensors that no parameter is made of, each with its name after the loader's renaming."""
        return self._unmatched

    @property
    def is_named(self) -> bool:
        """Whether the base's config names this class."""
        return type(self._model).__name__ in (self._base.config.get("architectures") or ())

    @property
    def prefix(self) -> str:
        """The prefix, with its dot, of the names of the base model in a model with a head."""
        return self._prefix

    def twins(self, name: str) -> list[str]:
        """The other parameters of the model with the same value as `name`: tied, or one tensor of two modules."""
        parameter = self._parameters.get(name)
        same = {n for n, p in self._parameters.items() if p is parameter} if parameter is not None else set()
        return sorted((same | self.tied_to(name)) - {name})

    def not_loaded(self, names: Iterable[str]) -> set[str]:
        """Those tensor names, after renaming, that the class ignores in a checkpoint, because it derives their values.

        transformers decides: the model's buffers that are not persistent, and what its loader does not report.
        """
        names = set(names)
        derived = {name for name, _ in self._model.named_buffers()} - self._buffers.keys()
        derived |= {name.removeprefix(self._prefix) for name in derived}
        info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
        self._model._adjust_missing_and_unexpected_keys(info)
        return {n for n in names if n not in info.unexpected_keys or n.removeprefix(self._prefix) in derived}

    def not_needed(self, names: Iterable[str]) -> set[str]:
        """Those parameters and persistent buffers that a checkpoint may lack, because the class sets their values."""
        info = SimpleNamespace(missing_keys=set(names), unexpected_keys=set())
        names = set(info.missing_keys)
        self._model._adjust_missing_and_unexpected_keys(info)
        return {name for name in names - info.missing_keys if name in self._buffers or self.is_constant(name)}

    def is_constant(self, name: str) -> bool:
        """Whether the class computes a parameter and never trains or saves it (sinusoidal positions)."""
        parameter = self._parameters.get(name)
        constant = name in (self._model._keys_to_ignore_on_save or ()) or not getattr(parameter, "requires_grad", True)
        return parameter is not None and constant

    def vocabulary(self) -> list[str]:
        """The parameters of the model that have one row per token: its input and output embeddings."""
        ends = [self._model.get_input_embeddings(), self._model.get_output_embeddings()]
        weights = [end.weight for end in ends if getattr(end, "weight", None) is not None]
        return [name for name, p in self._parameters.items() if any(p is weight for weight in weights)]

    def modules(self) -> list[tuple[str, Any]]:
        """All modules with their names, in the order of the model."""
        return list(self._model.named_modules())

    def module(self, path: str) -> Any | None:
        """The module that an adapter calls `path`, without weights; None if it is not found."""
        known = (self.name_of(f"{path}.weight") or "").rpartition(".")[0]
        for name in (path, self._prefix + path, path.removeprefix(self._prefix), known):
            with suppress(AttributeError):
                return self._model.get_submodule(name) if name else None
        return None

    def _rename(self, name: str) -> tuple[str, str | None]:
        """The parameter that transformers' loader makes from tensor `name`, and the converter pattern that matched."""
        from transformers.core_model_loading import rename_source_key

        prefix, state = self._model.base_model_prefix, self._state
        found: tuple[str, str | None]
        found = rename_source_key(name, self._renamings, self._converters, prefix, state)
        if found[0] not in state and name in state:
            found = rename_source_key(name, [], [], prefix, state)
        return found

    def _locate(self) -> dict[str, dict[str, list[str]]]:
        """For every parameter the base's tensors that it is made from, by converter pattern, experts in order."""
        from transformers.core_model_loading import dot_natural_key

        origins: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in sorted(self._base.tensors, key=dot_natural_key):
            known, pattern = self._rename(name)
            if known in self._state:
                origins[known][pattern or ""].append(name)
            else:
                self._unmatched[name] = known
        return dict(origins)

    def _layouts_of(self, known: str, origin: Mapping[str, tuple[str, ...]]) -> dict[str, Layout]:
        """The layouts of a parameter that is made of the tensors in `origin`, and of others that are made of the same."""
        names = [name for of_pattern in origin.values() for name in of_pattern]
        if origin.keys() == {""}:
            return {known: Layout(origin, _end_to_end(names, self._base) if len(names) == 1 else None, "a choice")}
        converter = next((c for c in self._converters if origin.keys() <= set(c.source_patterns)), None)
        if converter is None:
            return {known: Layout(origin, None, "several conversions")}
        steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        how = " and ".join(step for step, _ in steps)
        lists = [origin[pattern] for pattern in converter.source_patterns if pattern in origin]
        targets = [known.replace(converter.target_patterns[0], one) for one in converter.target_patterns]
        if steps in ([("Chunk", 0)], [("Split", 0)]) and len(names) == 1 and len(targets) > 1:
            return self._split(targets, origin, how)
        shapes = [[self._base.tensors[name].shape for name in names] for names in lists]
        even = all(len(s) == len(shapes[0]) and len(set(s)) == 1 for s in shapes)
        stretches: tuple[Stretch, ...] | None = None
        if steps == [("MergeModulelist", 0)] and len(lists) == 1 and even:
            stretches = _end_to_end(lists[0], self._base)
        elif steps == [("MergeModulelist", 0), ("Concatenate", 1)] and even and len(converter.target_patterns) == 1:
            stretches = _end_to_end([name for names in zip(*lists, strict=True) for name in names], self._base)
        elif steps == [("Concatenate", 0)] and len(converter.target_patterns) == 1:
            stretches = _end_to_end([name for names in lists for name in names], self._base)
        return {known: Layout(origin, stretches, how)}

    def _split(self, targets: list[str], origin: Mapping[str, tuple[str, ...]], how: str) -> dict[str, Layout]:
        """The layouts of parameters that are consecutive rows of one tensor."""
        ((name,),) = origin.values()
        counts = [self._state[target].numel() if target in self._state else -1 for target in targets]
        exact = sum(counts) == self._base.tensors[name].numel and min(counts) > 0
        found, start = {}, 0
        for target, count in zip(targets, counts, strict=True):
            found[target] = Layout(origin, (Stretch(name, start, 0, count),) if exact else None, how)
            start += count
        return found

    def _assemble(self, known: str) -> StoredParameter:
        """A parameter that is stored: as one tensor, or stacked from one or several tensors per expert."""
        origin = self._origins[known]
        if origin.keys() == {""} and len(origin[""]) == 1:
            name = origin[""][0]
            return StoredParameter.whole(name, self._base.tensors[name].shape)
        converter = next((c for c in self._converters if origin.keys() <= set(c.source_patterns)), None)
        steps = [(type(op).__name__, op.dim) for op in converter.operations] if converter else []
        shapes = [[self._base.tensors[name].shape for name in names] for names in origin.values()]
        even = all(len(s) == len(shapes[0]) and len(set(s)) == 1 and len(s[0]) == 2 for s in shapes)
        if not (even and steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])):
            first = next(iter(origin.values()))[0]
            what = f"parameter {known!r} is computed from {first!r} and others in a way that a delta cannot reproduce"
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self._base.folder, what)
        assert converter is not None
        return self._stack([origin[pattern] for pattern in converter.source_patterns if pattern in origin])

    def _stack(self, parts: list[list[str]]) -> StoredParameter:
        """Experts, each concatenated along the rows from one tensor of every list in `parts`."""
        pieces, first = [], 0
        for names in zip(*parts, strict=True):
            for name in names:
                count = self._base.tensors[name].shape[0]
                pieces.append(Piece(name, first, count))
                first += count
        row_size = self._base.tensors[parts[0][0]].shape[1]
        return StoredParameter((len(parts[0]), first // len(parts[0]), row_size), row_size, tuple(pieces))


def _end_to_end(names: Iterable[str], base: Checkpoint) -> tuple[Stretch, ...]:
    """A parameter whose elements are those of whole tensors, one after the other."""
    found, first = [], 0
    for name in names:
        count = base.tensors[name].numel
        found.append(Stretch(name, 0, first, count))
        first += count
    return tuple(found)


def _built(base: Checkpoint, kind: Any = None) -> Any | None:
    """The model of `base`; None if transformers itself has no class for it, or if `kind` does not take its config."""
    try:
        return _meta_model(base, kind)
    except Exception as error:  # transformers raises errors of any type on an unknown config
        log.info("transformers has no architecture for %s: %s", base.folder, error)
        return None


_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")


_MODULES, _PER_TENSOR = 2_000, 20
"""A model is built up to this many modules, and as many more for each tensor of its checkpoint."""


@contextmanager
def bounded_modules(most: int) -> Iterator[None]:
    """Stop a block that builds a model of more than `most` modules with a ValueError: a config can ask for any number of layers."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def check(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"its config.json asks for more than {most:,} modules")

    hook = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _meta_model(base: Checkpoint, kind: Any = None) -> Any:
    """The model of `config.json`: of class `kind`, the one that the config names, or one that its type stands for."""
    import torch
    import transformers

    loud = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with (
            warnings.catch_warnings(),
            torch.device("meta"),
            bounded_modules(_MODULES + _PER_TENSOR * len(base.tensors)),
        ):
            warnings.simplefilter("ignore")
            folder = str(base.folder)
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            named = [getattr(transformers, str(name), None) for name in config.architectures or []]
            models = [
                kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
            ]
            if kind is not None or models:
                return (kind or models[0])(config)
            both_sides = getattr(config, "is_encoder_decoder", False)
            order = ["AutoModelForSeq2SeqLM", *_AUTO] if both_sides else _AUTO
            autos = [getattr(transformers, name) for name in order]
            auto = next((one for one in autos if type(config) in one._model_mapping), autos[0])
            return auto.from_config(config, trust_remote_code=False)
    finally:
        transformers.utils.logging.set_verbosity(loud)


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """The renamings and the value conversions that transformers applies when it loads a checkpoint of this class."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    return renamings, [t for t in transforms if isinstance(t, WeightConverter)]
