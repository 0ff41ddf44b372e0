"""Every tensor of an adapter, bound to the tensors of a base that it changes.

Shapes: A `[r, in]`, B `[out, r]` as PEFT stores them; `left`, `right` as `patches` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paft_merge.adapters.architecture import Architecture, Place, Site
from paft_merge.adapters.config import Settings
from paft_merge.adapters.keys import Keys, Module, Saved
from paft_merge.adapters.patches import (
    Experts,
    LowRank,
    Magnitude,
    Once,
    Pair,
    Patch,
    Rewritten,
    Tokens,
    column_norms,
    joined,
    olora_residual,
    pissa_residual,
)
from paft_merge.adapters.rows import Rows, row_of
from paft_merge.checkpoint import DTYPES, Checkpoint
from paft_merge.errors import AdapterError, Problems
from paft_merge.headers import shown

_OTHER_BASE = "was this adapter trained on another base?"


@dataclass
class Draft:
    """What is known so far of the patch of one checkpoint tensor; see `Rewritten` for how the parts act together.

    Attributes:
        shared: `new` was trained in the memory that tied parameters share, so it is theirs too.
        columns: an output feature is a column of the stored tensor, not a row (`magnitude`).
    """

    name: str
    shape: tuple[int, ...]
    row: int
    beneath: str | None = None
    kind: str = "lora"
    low: Pair | Once[Pair] | None = None
    experts: Pair | None = None
    new: Rows | None = None
    shared: bool = False
    magnitude: Tensor | None = None
    columns: bool = False
    tokens: Tokens | None = None

    def finish(self, base: Checkpoint) -> Patch:
        """The patch of this draft; `base` is read later, and only for the norms of columns."""
        if self.experts is not None:
            return Experts(self.shape, *self.experts)
        low = LowRank(self.shape, self.row, self.low, self.kind, self.beneath) if self.low is not None else None
        if self.new is None and self.magnitude is None and self.tokens is None:
            assert low is not None
            return low
        parts: dict[str, Any] = {"new": self.new, "low": low, "tokens": self.tokens, "beneath": self.beneath}
        if self.magnitude is not None:
            assert low is not None
            rows = self.new or Rows.of(base, self.beneath or self.name)
            norms = Once(lambda: column_norms(rows, low)) if self.columns else None
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
        self.architecture = Once(lambda: Architecture.of(base))
        self._settings, self._keys, self._file, self._base, self._problems = settings, keys, file, base, problems
        self._where = file.folder
        self._absent: list[str] = []

    def bind(self) -> None:
        """Fill `drafts`: first full tensors, then factors on top of them, then single rows."""
        for saved in self._keys.saved:
            with self._problems.catching():
                self._bind_saved(saved)
        for module in self._keys.modules.values():
            with self._problems.catching():
                self._bind_module(module)
        for path, key in self._keys.tokens.items():
            with self._problems.catching():
                self._bind_tokens(path, key)
        self._tell_absent()

    def place(self, *names: str) -> Place | None:
        """Where the first of these parameters of the trained model lies in the base: by its own name if that is stored."""
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
                what = f"tensor {shown(stored.name)} of the base is {stored.dtype}, to which no delta can be added"
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
        first, second = ("embedding_A", "embedding_B") if "embedding_A" in parts or "embedding_B" in parts else "AB"
        for here, missing in ((first, second), (second, first)):
            if missing not in parts:
                raise self._wrong(
                    module.path, f"has lora_{here} without lora_{missing}" if here in parts else "has no factors"
                )
        a, b = self._factor(parts[first]), self._factor(parts[second])
        if first == "embedding_A":
            self._bind_embedding(module, a, b)
        elif not self._bind_parameter(module, a, b):
            self._bind_layer(module, *self._unblocked(module.path, a, b))

    def _bind_embedding(self, module: Module, a: Tensor, b: Tensor) -> None:
        """`[vocab, dim]`: the transpose of s B A. PEFT scales an embedding's output, never its weight, by a model's own."""
        place = self.place(f"{module.path}.weight")
        if place is None:
            self._absent.append(module.path)
            return
        draft = self.draft(place.sites[0], place)
        if not _is_product(a, b) or (a.shape[1], b.shape[0]) != draft.shape:
            raise self._unequal(module.path, a, b, draft.shape)
        self._refuse_start(module.path)
        self._add(draft, module, (a.T * self._scale(module.path, a), b.T.contiguous()), columns=True)

    def _bind_layer(self, module: Module, a: Tensor, b: Tensor) -> None:
        """A linear layer, a `Conv1D`, a convolution, or the projections of an `nn.MultiheadAttention`."""
        place = self.place(f"{module.path}.weight", f"{module.path}.in_proj_weight")
        if place is None:
            self._absent.append(module.path)
            return
        draft = self.draft(place.sites[0], place)
        scale = self._scale(self._targeted(module.path), a)
        if len(draft.shape) > 2:
            self._check_convolution(module.path, a, b, draft.shape)
            self._refuse_start(module.path)
            self._add(draft, module, (b.flatten(1) * scale, a.flatten(1)), columns=False)
            return
        transposed = self._is_transposed(module.path, a, b, place)
        if module.attention and self.place(f"{module.path.rpartition('.')[0]}.in_proj_weight"):
            scale *= 2  # PEFT adds the delta of this out_proj twice, when it trains as when it merges
        pair = (a.T * scale, b.T.contiguous()) if transposed else (b * scale, a)
        self._add(draft, module, pair, columns=transposed)
        if self._settings.start and draft.new is None:
            draft.kind, draft.low = self._settings.start, Once(lambda: self._restarted(pair, place, transposed, scale))

    def _restarted(self, pair: Pair, place: Place, transposed: bool, scale: float) -> Pair:
        """`pair`, less what the start of training took out of the base."""
        weight, rank = Rows.of(self._base, place.stored).load(), pair[1].shape[0]
        if self._settings.start == "pissa":
            return joined([pair, pissa_residual(weight, rank, transposed)])
        return joined([pair, olora_residual(weight, rank, scale)])

    def _add(self, draft: Draft, module: Module, pair: Pair, columns: bool) -> None:
        """Put factors, magnitude and the bias of a module into its drafts."""
        if draft.low is not None:
            raise self._wrong(module.path, "has two pairs of factors for one tensor", "ADAPTER_CONFIG")
        draft.low, draft.columns = pair, columns
        dora, bias = self._settings.flag("use_dora"), self._settings.flag("lora_bias")
        for part, wanted, field in (("magnitude_vector", dora, "use_dora"), ("B.bias", bias, "lora_bias")):
            if (part in module.parts) != wanted:
                what = f"{'has no' if wanted else 'has a'} lora_{part}, but {field} is {str(wanted).lower()}"
                raise self._wrong(module.path, what, "ADAPTER_SHAPE" if wanted else "ADAPTER_UNUSED")
        if dora:
            draft.magnitude = self._factor(module.parts["magnitude_vector"]).flatten()
            if len(draft.magnitude) != (draft.row if columns else draft.shape[0]):
                raise self._wrong(module.path, f"has {len(draft.magnitude)} magnitudes for a weight of {draft.shape}")
        if bias:
            self._add_bias(module, draft.name)

    def _add_bias(self, module: Module, weight: str) -> None:
        """bias + s * (the bias of lora_B), as a product of rank 1."""
        place, values = self._bias_of(weight), self._factor(module.parts["B.bias"])
        if place is None:
            raise self._wrong(
                module.path, "has a lora_B.bias, and the layer has no bias to add it to", "ADAPTER_TARGET"
            )
        if values.shape != place.shape:
            raise self._wrong(module.path, f"has a lora_B.bias of {tuple(values.shape)}, the base has {place.shape}")
        scale = self._settings.scale(module.path, self._settings.rank_of(module.path))
        draft = self.draft(place.sites[0], place)
        draft.kind, draft.low = "bias", (values[:, None] * scale, torch.ones(1, 1))

    # Parameters that PEFT wraps by name (`target_parameters`): fused experts

    def _bind_parameter(self, module: Module, a: Tensor, b: Tensor) -> bool:
        """Bind a module whose parameter was targeted by name; False when it is an ordinary layer."""
        targets = self._settings.names("target_parameters")
        if not targets or (module.depth == 0 and self._is_layer(module.path)):
            return False
        architecture = self.architecture.get()
        known = architecture.parameters_of(module.path) if architecture else None
        if architecture is None:
            what = "was targeted by parameter, and transformers does not know the architecture that says which"
            raise self._wrong(module.path, what, "ADAPTER_UNSUPPORTED")
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
            self._bind_experts(name, place, a, b, known[1])
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

    def _bind_experts(self, name: str, place: Place, a: Tensor, b: Tensor, transposed: bool) -> None:
        """`[experts, out, in]` (or `[experts, in, out]`, transposed); A `[experts * r, in]`, B `[out, experts * r]`."""
        if len(place.shape) != 3 or not _is_product(a, b) or a.shape[0] % place.shape[0]:
            raise self._unequal(name, a, b, place.shape)
        count = place.shape[0]
        rank = a.shape[0] // count
        self._check_rank(name, rank)
        in_out = self._experts_in_out(name, place.shape, a, b, transposed)
        a = a.reshape(count, rank, -1)
        b = self._unpacked(name, b, count, rank) * self._settings.scale(name, rank)
        left, right = (a.mT, b.mT) if in_out else (b, a)
        left, right = left.contiguous(), right.contiguous()
        for site in place.sites:
            draft = self.draft(site, place)
            if draft.low is not None or draft.experts is not None or draft.new is not None:
                raise self._wrong(name, "has two changes for one tensor", "ADAPTER_CONFIG")
            draft.kind = "experts"
            if len(place.sites) == 1:
                draft.row, draft.experts = place.shape[2], (left, right)
            else:
                expert, first = divmod(site.first, place.shape[1])
                draft.low = left[expert, first : first + site.count], right[expert]

    def _experts_in_out(self, name: str, shape: tuple[int, ...], a: Tensor, b: Tensor, transposed: bool) -> bool:
        """Do the factors read the parameter as `[experts, in, out]`? PEFT before 0.19.1 always did."""
        made = (a.shape[1], b.shape[0])
        fits_in_out, fits_out_in = made == shape[1:], made == (shape[2], shape[1])
        if transposed and shape[0] == 1:
            what = "is one expert stored [in, out], for which PEFT's own merge has no sound rule"
            raise self._wrong(name, what, "ADAPTER_UNSUPPORTED")
        if not (fits_in_out if transposed else fits_in_out or fits_out_in):
            raise self._unequal(name, a, b, shape)
        if transposed or not fits_out_in:
            return True
        if fits_in_out and not self._settings.swaps_experts:
            what = f"has square experts {shape}, and which way round they were trained depends on the version of PEFT"
            fix = 'if it was 0.19.1 or later, say so in adapter_config.json: "peft_version": "0.19.1"'
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self._where, f"{name!r} {what}", fix)
        return False

    def _unpacked(self, name: str, b: Tensor, count: int, rank: int) -> Tensor:
        """lora_B of all experts as `[experts, out, r]`: PEFT packs the experts fastest, old Unsloth slowest."""
        packing = self._settings.packing
        if packing == "unknown" and min(count, rank) > 1:
            what = f"{name!r} was trained with Unsloth, which packed the experts otherwise until 2026-09-17"
            fix = 'say which in adapter_config.json: "lora_B_layout": "rank_major" (since), or "grouped_by_expert" (before)'
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self._where, what, fix)
        if packing == "grouped_by_expert":
            return b.reshape(len(b), count, rank).permute(1, 0, 2)
        return b.reshape(len(b), rank, count).permute(2, 0, 1)

    # Rows of an embedding

    def _bind_tokens(self, path: str, key: str) -> None:
        """Rows of an embedding that PEFT replaces (it calls them a delta, and copies them over the old ones)."""
        place, values = self.place(f"{path}.weight"), self._factor(key)
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
        order = torch.tensor(indices).argsort()
        draft.tokens = Tokens(torch.tensor(indices)[order], values[order])

    # Checks

    def _factor(self, key: str) -> Tensor:
        """One tensor of the adapter, whole, float32."""
        info = self._file.tensors[key]
        if not DTYPES[info.dtype].mergeable:
            raise AdapterError.of("DTYPE_UNSUPPORTED", self._where, f"tensor {key!r} is {info.dtype}")
        return Rows.of(self._file, key).load().reshape(info.shape)

    def _unblocked(self, path: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of BD-LoRA as ordinary ones: their blocks on a diagonal (Wang et al. 2025, arXiv:2510.23346)."""
        blocks = self._settings.raw.get("use_bdlora") or {}

        def whole(factor: Tensor, field: str) -> Tensor:
            if not any(pattern in path for pattern in blocks.get(field) or ()):
                return factor
            return torch.block_diag(*factor.chunk(int(blocks.get("nblocks", 1))))

        return whole(a, "target_modules_bd_a"), whole(b, "target_modules_bd_b")

    def _scale(self, path: str, a: Tensor) -> float:
        self._check_rank(path, a.shape[0])
        return self._settings.scale(path, a.shape[0])

    def _check_rank(self, path: str, rank: int) -> None:
        if rank != (stated := self._settings.rank_of(path)):
            raise self._wrong(path, f"has factors of rank {rank}, but adapter_config.json gives it rank {stated}")

    def _check_convolution(self, path: str, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> None:
        """The base `[out, in, *kernel]`, A `[r, in, *kernel]`, B `[out, r, 1, ...]`."""
        if a.ndim != len(shape) or b.ndim != len(shape) or b.shape[0] != shape[0] or a.shape[2:] != shape[2:]:
            raise self._unequal(path, a, b, shape)
        if a.shape[0] != b.shape[1] or a.shape[1] != shape[1]:
            if a.shape[0] % b.shape[1] == 0 and a.shape[1] % shape[1] == 0 and a.shape[1] > shape[1]:
                what = "is a convolution in groups: what the adapter adds crosses them, so no weight can hold it"
                raise self._wrong(path, what, "ADAPTER_UNSUPPORTED")
            raise self._unequal(path, a, b, shape)

    def _is_transposed(self, path: str, a: Tensor, b: Tensor, place: Place) -> bool:
        """Is the weight stored `[in, out]`, as HF's `Conv1D` does? By shape, else by bias, else by the class.

        PEFT decides by the class of the layer and overrules `fan_in_fan_out` of the file, so that field decides nothing
        here either. (It never transposes a weight that was targeted as a parameter.)
        """
        if not _is_product(a, b):
            raise self._unequal(path, a, b, place.shape)
        made = (b.shape[0], a.shape[1])
        can_be = self._targeted(path) == path and self._bias_of(place.sites[0].name) is not None  # Conv1D has a bias
        if made == place.shape and (made[0] != made[1] or not can_be):
            return False
        if made[::-1] != place.shape or not can_be:
            raise self._unequal(path, a, b, place.shape)
        if made[0] != made[1]:
            return True
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

    def _unequal(self, path: str, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> AdapterError:
        what = f"has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, which do not make the base's {shape}"
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


def _is_product(a: Tensor, b: Tensor) -> bool:
    """Are these the A and B of one product of matrices?"""
    return a.ndim == 2 and b.ndim == 2 and a.shape[0] == b.shape[1]


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)
