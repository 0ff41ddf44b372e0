"""Every tensor of an adapter, bound to the tensors of a base that it changes.

Shapes: A `[r, in]`, B `[out, r]` as PEFT stores them; `left`, `right` as `deltas` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters.architecture import Architecture, Place, Site
from paft_merge.inputs.adapters.config import Settings
from paft_merge.inputs.adapters.deltas import (
    AdapterDelta,
    Experts,
    Lazy,
    LowRank,
    Magnitude,
    Pair,
    Part,
    Rewritten,
    Tokens,
    column_norms,
    joined,
    olora_taken,
    pissa_taken,
)
from paft_merge.inputs.adapters.keys import Keys, Module, Saved
from paft_merge.inputs.adapters.rows import Array, Rows, row_of
from paft_merge.inputs.adapters.shira import Entries, Scattered, Sparse
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.safetensors_header import quote

_OTHER_BASE = "was this adapter trained on another base?"


@dataclass(frozen=True)
class Factors:
    """A and B of one module, in the adapter's file; `a_blocks`, `b_blocks`: how many diagonal blocks BD-LoRA stores."""

    a: Rows
    b: Rows
    a_blocks: int = 1
    b_blocks: int = 1

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Of lora_A, its blocks put on a diagonal."""
        return _with_blocks(self.a.shape, self.a_blocks)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Of lora_B, its blocks put on a diagonal."""
        return _with_blocks(self.b.shape, self.b_blocks)

    @property
    def rank(self) -> int:
        """Rows of A; 0 when it is no matrix."""
        return self.a_shape[0] if self.a_shape else 0

    @property
    def makes(self) -> tuple[int, int] | None:
        """`(out, in)` of B A; None when they cannot be multiplied."""
        a, b = self.a_shape, self.b_shape
        return (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else None

    def load(self) -> Pair:
        """Read A `[r, in]` and B `[out, r]` as float32; of a convolution as `[r, in * kernel]` and `[out, r]`."""
        return _unblocked(self.a.load(), self.a_blocks), _unblocked(self.b.load(), self.b_blocks)

    def oriented(self, scale: float, transposed: bool) -> Pair:
        """`left`, `right`, rows contiguous, for a tensor that stores s B A, or its transpose."""
        a, b = self.load()
        scaled = np.float32(scale)
        return (np.ascontiguousarray(a.T) * scaled, np.ascontiguousarray(b.T)) if transposed else (b * scaled, a)

    def stacked(self, count: int, scale: float, grouped: bool, in_out: bool) -> Pair:
        """The factors of `count` experts as `left [experts, rows, r]`, `right [experts, r, row]`, rows contiguous.

        Args:
            count: the number of experts.
            scale: goes into `left`.
            grouped: lora_B is packed expert by expert, not (as PEFT does) with the experts fastest.
            in_out: the tensor is `[experts, in, out]`.
        """
        a, b = self.load()
        a = a.reshape(count, -1, a.shape[1])
        b = (
            b.reshape(len(b), count, -1).transpose(1, 0, 2)
            if grouped
            else b.reshape(len(b), -1, count).transpose(2, 0, 1)
        )
        left, right = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if in_out else (b, a)
        return np.ascontiguousarray(left) * np.float32(scale), np.ascontiguousarray(right)


@dataclass
class Draft:
    """What is known so far of the delta of one checkpoint tensor; see `Rewritten` for how the parts act together.

    Attributes:
        shared: `new` was trained in the memory that tied parameters share, so it is theirs too.
        columns: an output feature is a column of the stored tensor, not a row (`magnitude`).
    """

    name: str
    shape: tuple[int, ...]
    row: int
    beneath: str | None = None
    kind: str = "lora"
    low: Lazy[Pair] | None = None
    experts: list[Part] | None = None
    new: Rows | None = None
    shared: bool = False
    magnitude: Array | None = None
    columns: bool = False
    tokens: Tokens | None = None
    sparse: Lazy[Entries] | None = None

    def finish(self, base: Checkpoint) -> AdapterDelta:
        """The delta of this draft; `base` is read later, and only for the norms of columns."""
        if self.sparse is not None:
            return Sparse(self.shape, self.sparse, self.beneath)
        if self.experts is not None:
            return Experts(self.shape, self.experts)
        low = LowRank(self.shape, self.row, self.low, self.kind, self.beneath) if self.low is not None else None
        if self.new is None and self.magnitude is None and self.tokens is None:
            assert low is not None
            return low
        parts: dict[str, Any] = {"new": self.new, "low": low, "tokens": self.tokens, "beneath": self.beneath}
        if self.magnitude is not None:
            assert low is not None
            rows = self.new or Rows.of(base, self.beneath or self.name)
            norms = Lazy(lambda: column_norms(rows, low)) if self.columns else None
            parts["magnitude"] = Magnitude(self.magnitude, norms)
        return Rewritten(self.shape, self.row, **parts)


class Binder:
    """Binds one adapter to one base; faults go into `problems`, so that all of them are found.

    Attributes:
        drafts: by checkpoint tensor, filled by `bind`.
        architecture: the base's class, built when first asked for; None when transformers does not know it.
    """

    def __init__(self, settings: Settings, keys: Keys, file: Checkpoint, base: Checkpoint, problems: Problems) -> None:
        self.drafts: dict[str, Draft] = {}
        self.architecture = Lazy(lambda: Architecture.of(base))
        self._settings, self._keys, self._file, self._base, self._problems = settings, keys, file, base, problems
        self._where = file.folder
        self._absent: list[str] = []

    def bind(self) -> None:
        """Fill `drafts`: first full tensors, then factors on top of them, then single rows, then single entries."""
        for saved in self._keys.saved:
            with self._problems.catching():
                self._bind_saved(saved)
        for module in self._keys.modules.values():
            with self._problems.catching():
                self._bind_module(module)
        for path, key in self._keys.tokens.items():
            with self._problems.catching():
                self._bind_tokens(path, key)
        for path, parts in self._keys.sparse.items():
            with self._problems.catching():
                self._bind_sparse(path, parts)
        self._tell_absent()

    def place(self, *names: str) -> Place | None:
        """Where the first of these parameters of the trained model that there is lies in the base."""
        for name in names:
            if name in self._base.tensors:
                return Place.whole(name, self._base.tensors[name].shape)
        architecture = self.architecture.get()
        if architecture is None:
            return None
        return next((place for name in names if (place := architecture.place(name))), None)

    def draft(self, site: Site, place: Place) -> Draft:
        """The draft of one site of a place, begun if there is none yet."""
        if site.name not in self.drafts:
            stored = self._base.tensors[place.beneath or site.name]
            if not DTYPES[stored.dtype].mergeable:
                fix = "take the base that was not quantised, or dequantise it first"
                what = f"tensor {quote(stored.name)} of the base is {stored.dtype}, to which no delta can be added"
                raise AdapterError.of("DTYPE_UNSUPPORTED", self._where, what, fix)
            self.drafts[site.name] = Draft(site.name, stored.shape, row_of(stored.shape), place.beneath)
        return self.drafts[site.name]

    # Full tensors: modules_to_save, trained biases, the embeddings of a resized vocabulary

    def _bind_saved(self, saved: Saved) -> None:
        place = self.place(*saved.names)
        if place is None:
            self._absent.append(saved.names[0])
            return
        path, _, leaf = saved.names[0].rpartition(".")
        if not saved.beneath and leaf == "weight" and (path, 0) in self._keys.modules:
            what = f"tensor {saved.key!r} is beside factors of the same layer, and PEFT would not load it"
            raise AdapterError.of("ADAPTER_UNUSED", self._where, what)
        rows = self._saved_rows(saved, place)
        if saved.beneath and rows.same(Rows.of(self._base, place.stored)):
            return
        for site in place.sites:
            draft = self.draft(site, place)
            whole = len(place.sites) == 1
            draft.new = rows if whole else rows.part(site.first, site.count)
            draft.shape = self._file.tensors[saved.key].shape if whole else draft.shape
            draft.shared = not saved.wrapped and not self._settings.is_saved_module(path)

    def _saved_rows(self, saved: Saved, place: Place) -> Rows:
        """The rows of a full tensor; its shape is the base's, but for the rows of a vocabulary."""
        info = self._file.tensors[saved.key]
        resized = info.shape[1:] == place.shape[1:] and place.shape[:1] == (vocabulary_of(self._base.config),)
        if info.shape != place.shape and not (resized and len(place.sites) == 1):
            what = f"tensor {saved.key!r} is {info.shape}, the base has {place.shape}"
            raise AdapterError.of("ADAPTER_SHAPE", self._where, what, _OTHER_BASE)
        if not DTYPES[info.dtype].mergeable:
            raise AdapterError.of("DTYPE_UNSUPPORTED", self._where, f"tensor {saved.key!r} is {info.dtype}")
        return Rows.of(self._file, saved.key, place.row)

    # Factors

    def _bind_module(self, module: Module) -> None:
        parts = module.parts
        if self._settings.sparse:
            raise self._wrong(module.path, "has the factors of a LoRA, and peft_type is SHIRA", "ADAPTER_CONFIG")
        first, second = ("embedding_A", "embedding_B") if "embedding_A" in parts or "embedding_B" in parts else "AB"
        for here, missing in ((first, second), (second, first)):
            if missing not in parts:
                what = f"has lora_{here} without lora_{missing}" if here in parts else "has no factors"
                raise self._wrong(module.path, what)
        factors = Factors(self._source(parts[first]), self._source(parts[second]), *self._blocks(module.path))
        if first == "embedding_A":
            self._bind_embedding(module, factors)
        elif not self._bind_parameter(module, factors):
            self._bind_layer(module, factors)

    def _bind_embedding(self, module: Module, factors: Factors) -> None:
        """`[vocab, dim]`: the transpose of s B A. (Where a model scales its embeddings, it scales their output.)"""
        place = self.place(f"{module.path}.weight")
        if place is None:
            self._absent.append(module.path)
            return
        draft = self.draft(place.sites[0], place)
        if factors.makes is None or factors.makes[::-1] != draft.shape:
            raise self._unequal(module.path, factors, draft.shape)
        self._refuse_start(module.path)
        scale = self._scale(module.path, factors)
        self._add(draft, module, lambda: factors.oriented(scale, transposed=True), columns=True)

    def _bind_layer(self, module: Module, factors: Factors) -> None:
        """A linear layer, a `Conv1D`, a convolution, or the projections of an `nn.MultiheadAttention`."""
        place = self.place(f"{module.path}.weight", f"{module.path}.in_proj_weight")
        if place is None:
            self._absent.append(module.path)
            return
        draft = self.draft(place.sites[0], place)
        scale = self._scale(self._targeted(module.path), factors)
        if len(draft.shape) > 2:
            self._check_convolution(module.path, factors, draft.shape)
            self._refuse_start(module.path)
            self._add(draft, module, lambda: factors.oriented(scale, transposed=False), columns=False)
            return
        transposed = self._is_transposed(module.path, factors, draft)
        if module.attention and self.place(f"{module.path.rpartition('.')[0]}.in_proj_weight"):
            scale *= 2  # PEFT adds the delta of this out_proj twice, when it trains as when it merges
        make = self._started(factors, place, scale, transposed) if draft.new is None else None
        draft.kind = self._settings.start if make else "lora"
        self._add(draft, module, make or (lambda: factors.oriented(scale, transposed)), columns=transposed)

    def _started(self, factors: Factors, place: Place, scale: float, transposed: bool) -> Callable[[], Pair] | None:
        """The factors, less what the start of training took out of the base; None when it took out nothing."""
        start = self._settings.start
        if not start:
            return None

        def make() -> Pair:
            weight, pair = Rows.of(self._base, place.stored).load(), factors.oriented(scale, transposed)
            rank = factors.rank
            taken = pissa_taken(weight, rank, transposed) if start == "pissa" else olora_taken(weight, rank, scale)
            return joined([pair, taken])

        return make

    def _add(self, draft: Draft, module: Module, make: Callable[[], Pair], columns: bool) -> None:
        """Put factors, magnitude and the bias of a module into its drafts."""
        if draft.low is not None:
            raise self._wrong(module.path, "has two pairs of factors for one tensor", "ADAPTER_CONFIG")
        draft.low, draft.columns = Lazy(make), columns
        dora, bias = self._settings.flag("use_dora"), self._settings.flag("lora_bias")
        for part, wanted, field in (("magnitude_vector", dora, "use_dora"), ("B.bias", bias, "lora_bias")):
            if (part in module.parts) != wanted:
                what = f"{'has no' if wanted else 'has a'} lora_{part}, but {field} is {str(wanted).lower()}"
                raise self._wrong(module.path, what, "ADAPTER_SHAPE" if wanted else "ADAPTER_UNUSED")
        if dora:
            draft.magnitude = self._values(module.parts["magnitude_vector"]).flatten()
            if len(draft.magnitude) != (draft.row if columns else draft.shape[0]):
                raise self._wrong(module.path, f"has {len(draft.magnitude)} magnitudes for a weight of {draft.shape}")
        if bias:
            self._add_bias(module, draft.name)

    def _add_bias(self, module: Module, weight: str) -> None:
        """bias + s * (the bias of lora_B), as a product of rank 1."""
        place, values = self._bias_of(weight), self._values(module.parts["B.bias"])
        if place is None:
            raise self._wrong(
                module.path, "has a lora_B.bias, and the layer has no bias to add it to", "ADAPTER_TARGET"
            )
        if values.shape != place.shape:
            raise self._wrong(module.path, f"has a lora_B.bias of {tuple(values.shape)}, the base has {place.shape}")
        scale = self._settings.scale(module.path, self._settings.rank_of(module.path))
        draft = self.draft(place.sites[0], place)
        draft.kind, draft.low = "bias", Lazy(lambda: (values[:, None] * np.float32(scale), np.ones((1, 1), np.float32)))

    # Parameters that PEFT wraps by name (`target_parameters`): fused experts

    def _bind_parameter(self, module: Module, factors: Factors) -> bool:
        """Bind a module whose parameter was targeted by name; False when it is an ordinary layer."""
        targets = self._settings.names("target_parameters")
        if not targets or (module.depth == 0 and self._is_layer(module.path)):
            return False
        architecture = self.architecture.get()
        if architecture is None:
            what = "was targeted by parameter, and transformers does not know the architecture that says which"
            raise self._wrong(module.path, what, "ADAPTER_UNSUPPORTED")
        known = architecture.parameters_of(module.path)
        if known is None:
            self._absent.append(module.path)
            return True
        names = [name for name in known[0] if _matches(f"{module.path}.{name}", targets)]
        depths = {depth for path, depth in self._keys.modules if path == module.path}
        if depths != set(range(len(names))):
            what = f"has {len(depths)} pairs of factors for the targeted parameters {', '.join(names) or '(none)'}"
            raise self._wrong(module.path, what)
        name = f"{module.path}.{names[len(names) - 1 - module.depth]}"  # PEFT wraps the first declared first: innermost
        place = self.place(name)
        if place is None:
            self._absent.append(name)
        else:
            self._bind_experts(name, place, factors, known[1])
        return True

    def _is_layer(self, path: str) -> bool:
        """Has the module a `weight`, other than experts that were themselves the targeted parameter?"""
        place = self.place(f"{path}.weight")
        return place is not None and (len(place.shape) != 3 or self._targeted(path) == path)

    def _targeted(self, path: str) -> str:
        """What `rank_pattern` and `alpha_pattern` call the layer: its weight, if that was targeted as a parameter."""
        name = f"{path}.weight"
        return name if _matches(name, self._settings.names("target_parameters")) else path

    def _bias_of(self, weight: str) -> Place | None:
        """The bias beside a weight of the base, by the name on disk."""
        name = weight.removesuffix("weight") + "bias"
        return self.place(name) if name in self._base.tensors else None

    def _bind_experts(self, name: str, place: Place, factors: Factors, transposed: bool) -> None:
        """`[experts, out, in]` (or `[experts, in, out]`, transposed); A `[experts * r, in]`, B `[out, experts * r]`."""
        if len(place.shape) != 3 or factors.makes is None or factors.rank % place.shape[0]:
            raise self._unequal(name, factors, place.shape)
        count, rows, row = place.shape
        rank = factors.rank // count
        self._check_rank(name, rank)
        scale, grouped = self._settings.scale(name, rank), self._is_grouped(name, count, rank)
        in_out = self._experts_in_out(name, place.shape, factors, transposed)
        stack = Lazy(lambda: factors.stacked(count, scale, grouped, in_out), users=len(place.sites))
        for site in place.sites:
            draft = self.draft(site, place)
            if draft.low is not None or draft.experts is not None or draft.new is not None:
                raise self._wrong(name, "has two changes for one tensor", "ADAPTER_CONFIG")
            expert, first = divmod(site.first, rows)
            whole = [Part(stack, at, 0, rows) for at in range(count)]
            draft.experts = whole if len(place.sites) == 1 else [Part(stack, expert, first, site.count)]
            draft.row = row

    def _experts_in_out(self, name: str, shape: tuple[int, ...], factors: Factors, transposed: bool) -> bool:
        """Do the factors read the parameter as `[experts, in, out]`? PEFT before 0.19.1 always did."""
        fits_in_out, fits_out_in = factors.makes == shape[:0:-1], factors.makes == shape[1:]
        if transposed and shape[0] == 1:
            what = "is one expert stored [in, out], for which PEFT's own merge has no sound rule"
            raise self._wrong(name, what, "ADAPTER_UNSUPPORTED")
        if not (fits_in_out if transposed else fits_in_out or fits_out_in):
            raise self._unequal(name, factors, shape)
        if transposed or not fits_out_in:
            return True
        if fits_in_out and not self._settings.swaps_experts:
            what = f"has square experts {shape}, and which way round they were trained depends on the version of PEFT"
            fix = 'if it was 0.19.1 or later, say so in adapter_config.json: "peft_version": "0.19.1"'
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self._where, f"{name!r} {what}", fix)
        return False

    def _is_grouped(self, name: str, count: int, rank: int) -> bool:
        """Is lora_B packed expert by expert, as Unsloth did? PEFT has the experts fastest."""
        packing = self._settings.packing
        if packing == "unknown" and min(count, rank) > 1:
            what = f"{name!r} was trained with Unsloth, which packed the experts otherwise until 2026-09-17"
            fix = (
                'say how in adapter_config.json: "lora_B_layout": "rank_major" (since) or "grouped_by_expert" (before)'
            )
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self._where, what, fix)
        return packing == "grouped_by_expert"

    # Rows of an embedding

    def _bind_tokens(self, path: str, key: str) -> None:
        """Rows of an embedding that PEFT replaces (it calls them a delta, and copies them over the old ones)."""
        place, values = self.place(f"{path}.weight"), self._values(key)
        if place is None:
            self._absent.append(path)
            return
        draft, indices = self.draft(place.sites[0], place), self._settings.tokens_of(path)
        if indices is None:
            raise self._wrong(path, "has rows that trainable_token_indices does not number", "ADAPTER_CONFIG")
        if values.shape != (len(indices), draft.row):
            raise self._wrong(path, f"has {tuple(values.shape)} values for {len(indices)} tokens of {draft.row}")
        if len(set(indices)) < len(indices) or not all(0 <= index < draft.shape[0] for index in indices):
            what = f"has token indices that repeat, or lie outside the {draft.shape[0]:,} rows of the base"
            raise self._wrong(path, what)
        order = np.argsort(indices)
        draft.tokens = Tokens(np.array(indices, np.int64)[order], values[order])

    # Single entries of a weight

    def _bind_sparse(self, path: str, parts: Mapping[str, str]) -> None:
        """The entries that SHiRA adds to a linear layer; it has no scale."""
        if not self._settings.sparse:
            raise self._wrong(path, "has the entries of a SHiRA adapter, and peft_type is LORA", "ADAPTER_CONFIG")
        if parts.keys() != {"weight", "indices"}:
            raise self._wrong(path, f"has shira_{next(iter(parts))} alone")
        place, held = self.place(f"{path}.weight"), Scattered(self._file, parts["weight"], parts["indices"])
        if held.fault:
            raise self._wrong(path, held.fault)
        if place is None:
            self._absent.append(path)
            return
        draft, wanted = self.draft(place.sites[0], place), self._settings.rank * sum(place.shape)
        if len(place.sites) > 1 or len(draft.shape) != 2 or draft.new is not None:
            raise self._wrong(path, "is no linear layer of the base by itself, and SHiRA knows no other")
        if held.count != wanted:
            what = (
                f"has {held.count:,} values, and rank {self._settings.rank} on the base's {draft.shape} has {wanted:,}"
            )
            raise AdapterError.of("ADAPTER_SHAPE", self._where, f"{path!r} {what}", _OTHER_BASE)
        shape = draft.shape
        draft.kind, draft.sparse = "shira", Lazy(lambda: held.load(shape))

    # Checks

    def _source(self, key: str) -> Rows:
        """A tensor of the adapter, to be read later."""
        info = self._file.tensors[key]
        if not DTYPES[info.dtype].mergeable:
            raise AdapterError.of("DTYPE_UNSUPPORTED", self._where, f"tensor {key!r} is {info.dtype}")
        return Rows.of(self._file, key)

    def _values(self, key: str) -> Array:
        """A small tensor of the adapter, whole, float32."""
        return self._source(key).load().reshape(self._file.tensors[key].shape)

    def _blocks(self, path: str) -> tuple[int, int]:
        """Into how many blocks BD-LoRA cut lora_A and lora_B of a module (arXiv:2510.23346); 1 without it."""
        blocks = self._settings.raw.get("use_bdlora") or {}
        fields = ("target_modules_bd_a", "target_modules_bd_b")
        count = int(blocks.get("nblocks", 1))
        a, b = (count if any(p in path for p in blocks.get(field) or ()) else 1 for field in fields)
        return a, b

    def _scale(self, path: str, factors: Factors) -> float:
        self._check_rank(path, factors.rank)
        return self._settings.scale(path, factors.rank)

    def _check_rank(self, path: str, rank: int) -> None:
        if rank != (stated := self._settings.rank_of(path)):
            raise self._wrong(path, f"has factors of rank {rank}, but adapter_config.json gives it rank {stated}")

    def _check_convolution(self, path: str, factors: Factors, shape: tuple[int, ...]) -> None:
        """The base `[out, in, *kernel]`, A `[r, in, *kernel]`, B `[out, r, 1, ...]`."""
        a, b = factors.a_shape, factors.b_shape
        if len(a) != len(shape) or len(b) != len(shape) or b[0] != shape[0] or a[2:] != shape[2:]:
            raise self._unequal(path, factors, shape)
        if a[0] != b[1] or a[1] != shape[1]:
            if b[1] and shape[1] and a[0] % b[1] == 0 and a[1] % shape[1] == 0 and a[1] > shape[1]:
                what = "is a convolution in groups: what the adapter adds crosses them, so no weight can hold it"
                raise self._wrong(path, what, "ADAPTER_UNSUPPORTED")
            raise self._unequal(path, factors, shape)

    def _is_transposed(self, path: str, factors: Factors, draft: Draft) -> bool:
        """Is the weight stored `[in, out]`, as HF's `Conv1D` does? By shape, else by bias, else by the class.

        PEFT decides by the class of the layer and overrules `fan_in_fan_out` of the file, so that field decides nothing
        here either. (It never transposes a weight that was targeted as a parameter.)
        """
        shape, makes = draft.shape, factors.makes
        can_be = self._targeted(path) == path and self._bias_of(draft.name) is not None  # a Conv1D has a bias
        if makes is None or (makes != shape and (makes[::-1] != shape or not can_be)):
            raise self._unequal(path, factors, shape)
        if shape[0] != shape[1] or not can_be:
            return makes != shape
        architecture = self.architecture.get()
        found = architecture.is_conv1d(path) if architecture else None
        if found is None and self._settings.flag("fan_in_fan_out"):
            what = "is square, and transformers does not know its class, which says if it is stored transposed"
            raise self._wrong(path, what, "ADAPTER_UNSUPPORTED")
        return bool(found)

    def _refuse_start(self, path: str) -> None:
        if self._settings.start:
            what = f"is no linear layer, and PEFT has no {self._settings.start} start for it"
            raise self._wrong(path, what, "ADAPTER_UNSUPPORTED")

    def _unequal(self, path: str, factors: Factors, shape: tuple[int, ...]) -> AdapterError:
        what = f"has lora_A {factors.a_shape} and lora_B {factors.b_shape}, which do not make the base's {shape}"
        return AdapterError.of("ADAPTER_SHAPE", self._where, f"{path!r} {what}", _OTHER_BASE)

    def _wrong(self, path: str, what: str, code: str = "ADAPTER_SHAPE") -> AdapterError:
        return AdapterError.of(code, self._where, f"{path!r} {what}")

    def _tell_absent(self) -> None:
        if self._absent:
            names = ", ".join(map(repr, self._absent[:5])) + (", ..." if len(self._absent) > 5 else "")
            what = f"{len(self._absent)} of its modules are not in the base: {names}"
            self._problems.add("ADAPTER_TARGET", self._where, what, _OTHER_BASE)


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """`vocab_size` of a config.json, or of the text model within it; None when there is none."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


def _with_blocks(shape: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    """The shape of the matrix whose diagonal blocks a tensor of `shape` holds; `()` when it cannot hold them."""
    if blocks == 1:
        return shape
    return (shape[0], shape[1] * blocks) if len(shape) == 2 and shape[0] % blocks == 0 else ()


def _unblocked(factor: Array, blocks: int) -> Array:
    """The matrix whose diagonal blocks `factor` holds, one below the other."""
    if blocks == 1:
        return factor
    rows, columns = len(factor) // blocks, factor.shape[1]
    diagonal = np.zeros((len(factor), columns * blocks), np.float32)
    for i in range(blocks):
        diagonal[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = factor[i * rows : (i + 1) * rows]
    return diagonal


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)
