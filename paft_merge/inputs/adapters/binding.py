"""Binds the tensors of an adapter to the tensors of a base that they change.

What every PEFT type shares is here: finding parameters, full tensors (`modules_to_save`, trained biases, resized
embeddings) and rows of embeddings. Each type binds its own modules, see `peft_types`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters.config import Settings
from paft_merge.inputs.adapters.deltas import (
    AdapterDelta,
    LayerKind,
    Lazy,
    LowRank,
    Magnitude,
    Pair,
    Replacement,
    TokenRows,
    column_norms,
)
from paft_merge.inputs.adapters.keys import Keys, Module, Saved, TensorNames
from paft_merge.inputs.adapters.rows import Array, Rows
from paft_merge.inputs.architecture import Architecture, Piece, StoredParameter
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.quantized.recognition import quantised
from paft_merge.inputs.safetensors_header import join_first, quote, row_size_of

OTHER_BASE = "was this adapter trained on another base?"
"""The fix for shapes and names that the base does not have."""


@dataclass
class DeltaBuilder:
    """Collects the parts of the delta of one checkpoint tensor; see `Replacement` for how they are combined.

    Attributes:
        name: the checkpoint tensor.
        shape: shape of the sum.
        row_size: elements per row.
        stored_as: as in `AdapterDelta`.
        kind: as in `AdapterDelta`, of a low-rank delta.
        low: low-rank factors.
        rank: their rank.
        columns: whether an output feature is a column of the stored tensor (for `magnitude`).
        magnitude: DoRA's magnitudes.
        new: a full new value.
        shared: whether `new` was trained in the memory of tied parameters, so that it is their value too.
        tokens: new values of single rows.
        make: makes a delta of any other kind, which excludes the parts above.
        module: as in `AdapterDelta`.
        layer: as in `AdapterDelta`.
    """

    name: str
    shape: tuple[int, ...]
    row_size: int
    stored_as: str | None = None
    kind: str = "lora"
    low: Lazy[Pair] | None = None
    rank: int = 0
    columns: bool = False
    magnitude: Array | None = None
    new: Rows | None = None
    shared: bool = False
    tokens: TokenRows | None = None
    make: Callable[[], AdapterDelta] | None = None
    module: str = ""
    layer: LayerKind = ""

    def build(self, base: Checkpoint) -> AdapterDelta:
        """Return the delta; see `_delta`."""
        delta = self._delta(base)
        delta.module, delta.layer = self.module, self.layer
        return delta

    def _delta(self, base: Checkpoint) -> AdapterDelta:
        """The delta. It reads `base` on first use, and only for the norms of columns.

        Raises:
            AdapterError: ADAPTER_UNSUPPORTED if parts exclude each other.
        """
        if self.make is not None:
            if self.new is not None or self.tokens is not None:
                what = f"changes tensor {quote(self.name)} by a delta and also replaces values of it"
                raise AdapterError.of("ADAPTER_UNSUPPORTED", "the adapter", what, "merge it with PEFT instead")
            return self.make()
        low = None
        if self.low is not None:
            low = LowRank(self.shape, self.row_size, self.low, self.kind, self.stored_as, self.rank)
        if self.new is None and self.magnitude is None and self.tokens is None:
            assert low is not None
            return low
        parts: dict[str, Any] = {"new": self.new, "low": low, "tokens": self.tokens, "stored_as": self.stored_as}
        if self.magnitude is not None:
            assert low is not None
            rows = self.new or Rows.of(base, self.stored_as or self.name)
            norms = Lazy(lambda: column_norms(rows, low)) if self.columns else None
            parts["magnitude"] = Magnitude(self.magnitude, norms)
        return Replacement(self.shape, self.row_size, **parts)


class Binding:
    """One adapter being bound to one base; faults go into `problems`, so that all of them are found.

    Args:
        settings: the adapter's configuration.
        keys: its tensors, sorted.
        file: the file that holds them.
        base: the checkpoint that the adapter is added to.
        problems: receives the faults.

    Attributes:
        builders: by checkpoint tensor, filled by `bind`.
        architecture: the base's class, built on first use; None if transformers does not know it.
        absent: modules and parameters that the base does not have.
        made: what a type makes once for all modules of the adapter.
        quantised: the base's quantised weights.
        coded: modules and parameters that the base has as codes only.
    """

    def __init__(self, settings: Settings, keys: Keys, file: Checkpoint, base: Checkpoint, problems: Problems) -> None:
        self.builders: dict[str, DeltaBuilder] = {}
        self.architecture = Lazy(lambda: Architecture.of(base))
        self.settings, self.keys, self.file, self.base = settings, keys, file, base
        self._problems = problems
        self.absent: list[str] = []
        self.made: dict[str, Any] = {}
        self.quantised = Lazy(lambda: quantised(base))
        self.coded: list[str] = []
        self._coded_weights = Lazy(lambda: frozenset(self.quantised.get().parts.values()))

    def bind(self, bind_module: BindModule) -> None:
        """Fill `builders`: first full tensors, then adapted modules on top of them, then single rows."""
        for saved in self.keys.saved:
            with self._problems.catching():
                self._bind_saved(saved)
        for module in self.keys.modules.values():
            with self._problems.catching():
                if module.peft_type != self.settings.peft_type:
                    what = f"has {module.peft_type} tensors, but peft_type is {self.settings.peft_type}"
                    raise self.wrong(module.path, what, "ADAPTER_CONFIG")
                bind_module(self, module)
        for path, key in self.keys.tokens.items():
            with self._problems.catching():
                self.bind_tokens(path, key)
        if self.coded:
            names = list(dict.fromkeys(self.coded))
            uses = (
                f"{len(names)} modules of the adapter {self.file.folder} change quantised weights: {join_first(names)}"
            )
            self._problems.found.append(self.quantised.get().problem(self.base.folder, uses))
        whole = {name for saved in self.keys.saved for name in saved.names}
        if self.builders and self.absent and whole.issuperset(self.absent):
            what = f"holds trained weights that the base lacks: {join_first(self.absent)}"
            fix = "they are of a head, a projector or an encoder: merge it onto the model that has them, or remove them from its file"
            self._problems.add("ADAPTER_TARGET", self.file.folder, what, fix)
        elif self.absent:
            what = f"{len(self.absent)} of its modules are not in the base: {join_first(self.absent)}"
            self._problems.add("ADAPTER_TARGET", self.file.folder, what, OTHER_BASE)

    def find(self, *names: str) -> StoredParameter | None:
        """Find the first of these parameters of the trained model that the base has."""
        for name in names:
            if name in self.base.tensors:
                return StoredParameter.whole(name, self.base.tensors[name].shape)
        architecture = self.architecture.get()
        if architecture is None:
            return None
        return next((found for name in names if (found := architecture.find(name))), None)

    def require(self, path: str, *names: str) -> StoredParameter | None:
        """Find a parameter; if the base does not have it, report `path` as missing and return None."""
        found = self.find(*names)
        weights = self._coded_weights.get()
        coded = bool(weights) and any(self._is_coded(name) for name in names)
        if coded or (found is not None and found.value_in in weights):
            self.coded.append(path)
            return None
        if found is None:
            self.absent.append(path)
        return found

    def _is_coded(self, name: str) -> bool:
        """Whether the base stores a parameter of the trained model as codes, under its name or without a prefix."""
        architecture = self.architecture.get() if name not in self.base.tensors else None
        names = {name, architecture.name_of(name) or name} if architecture else {name}
        names |= {one.partition(".")[2] for one in names}
        weights = self._coded_weights.get()
        return any(one in weights for one in names) or any(w.partition(".")[2] in names for w in weights)

    def builder(self, parameter: StoredParameter, piece: Piece | None = None) -> DeltaBuilder:
        """Return the builder for one piece of a parameter (default: the first), a new one if there is none yet.

        Raises:
            AdapterError: DTYPE_UNSUPPORTED if no delta can be added to the base's tensor.
        """
        name = (piece or parameter.pieces[0]).name
        if name not in self.builders:
            stored = self.base.tensors[parameter.stored_as or name]
            if not DTYPES[stored.dtype].mergeable:
                fix = "use the base that was not quantised, or dequantise it first"
                what = f"tensor {quote(stored.name)} of the base is {stored.dtype}, to which no delta can be added"
                raise AdapterError.of("DTYPE_UNSUPPORTED", self.file.folder, what, fix)
            self.builders[name] = DeltaBuilder(name, stored.shape, row_size_of(stored.shape), parameter.stored_as)
        return self.builders[name]

    def rows(self, key: str, row_size: int | None = None) -> Rows:
        """Return a tensor of the adapter, to be read later.

        Raises:
            AdapterError: DTYPE_UNSUPPORTED if its dtype cannot be merged.
        """
        info = self.file.tensors[key]
        if not DTYPES[info.dtype].mergeable:
            raise AdapterError.of("DTYPE_UNSUPPORTED", self.file.folder, f"tensor {key!r} is {info.dtype}")
        return Rows.of(self.file, key, row_size)

    def values(self, key: str) -> Array:
        """Read a small tensor of the adapter as float32."""
        return self.rows(key).load().reshape(self.file.tensors[key].shape)

    def wrong(self, path: str, what: str, code: str = "ADAPTER_SHAPE", fix: str = "") -> AdapterError:
        """An error about the module or parameter at `path`, ready to raise."""
        return AdapterError.of(code, self.file.folder, f"{path!r} {what}", fix)

    def unlike_base(self, path: str, what: str) -> AdapterError:
        """An ADAPTER_SHAPE error for a shape that does not fit the base, ready to raise."""
        return self.wrong(path, what, fix=OTHER_BASE)

    def _bind_saved(self, saved: Saved) -> None:
        """Bind a full tensor: of `modules_to_save`, a trained bias, or the embeddings of a resized vocabulary."""
        parameter = self.require(saved.names[0], *saved.names)
        if parameter is None:
            return
        path, _, leaf = saved.names[0].rpartition(".")
        if not saved.is_base_layer and leaf == "weight" and (path, 0) in self.keys.modules:
            what = f"tensor {saved.key!r} is a full weight beside an adapter on the same layer; PEFT would not load it"
            raise AdapterError.of("ADAPTER_UNUSED", self.file.folder, what)
        rows = self._saved_rows(saved, parameter)
        if saved.is_base_layer and rows.same(Rows.of(self.base, parameter.value_in)):
            return
        whole = len(parameter.pieces) == 1
        for piece in parameter.pieces:
            builder = self.builder(parameter, piece)
            builder.new = rows if whole else rows.part(piece.first, piece.count)
            builder.shape = self.file.tensors[saved.key].shape if whole else builder.shape
            builder.shared = not saved.wrapped and not self.settings.is_saved_module(path)

    def _saved_rows(self, saved: Saved, parameter: StoredParameter) -> Rows:
        """The rows of a full tensor. Its shape must be the base's, except for the rows of a vocabulary."""
        shape, wanted = self.file.tensors[saved.key].shape, parameter.shape
        resized = shape[1:] == wanted[1:] and wanted[:1] == (vocabulary_of(self.base.config),)
        if shape != wanted and not (resized and len(parameter.pieces) == 1):
            what = f"tensor {saved.key!r} is {shape}, the base has {wanted}"
            raise AdapterError.of("ADAPTER_SHAPE", self.file.folder, what, OTHER_BASE)
        return self.rows(saved.key, parameter.row_size)

    def bind_tokens(self, path: str, key: str) -> None:
        """Bind rows of an embedding. PEFT calls them a delta, but copies them over the old rows."""
        parameter, values = self.require(path, f"{path}.weight"), self.values(key)
        if parameter is None:
            return
        builder, indices = self.builder(parameter), self.settings.tokens_of(path)
        if indices is None:
            raise self.wrong(path, "has token rows whose indices adapter_config.json does not give", "ADAPTER_CONFIG")
        if values.shape != (len(indices), builder.row_size):
            what = f"has {tuple(values.shape)} values for {len(indices)} tokens of {builder.row_size}"
            raise self.wrong(path, what)
        if len(set(indices)) < len(indices) or not all(0 <= index < builder.shape[0] for index in indices):
            what = f"has token indices that repeat, or are outside the {builder.shape[0]:,} rows of the base"
            raise self.wrong(path, what)
        order = np.argsort(indices)
        builder.tokens = TokenRows(np.array(indices, np.int64)[order], values[order])


BindModule: TypeAlias = "Callable[[Binding, Module], None]"


class About(NamedTuple):
    """What the documentation says about a type.

    Attributes:
        method: the method and its paper.
        layers: the layers that it adapts.
        computed: `here` or `PEFT`.
        memory: `rows` if blocks of rows are computed alone, else what is in memory at once.
        formula: the new weight W' of a linear layer.
    """

    method: str
    layers: str
    computed: str
    memory: str
    formula: str = ""


class PeftType(NamedTuple):
    """How adapters of one `peft_type` are read.

    Attributes:
        names: how the tensors of a module are named.
        check_config: notes the faults of an `adapter_config.json`, given its path and content. Fields that have no
            exact delta, and unknown fields, are ADAPTER_UNSUPPORTED.
        bind_module: puts the delta of one module into `Binding.builders`.
        about: for the documentation.
    """

    names: TensorNames
    check_config: Callable[[Path, Mapping[str, Any], Problems], None]
    bind_module: BindModule
    about: About = About("", "", "here", "rows")


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """`vocab_size` of a config.json or of the text model in it; None if it has none."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None
