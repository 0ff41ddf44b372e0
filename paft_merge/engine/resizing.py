"""`resize`: an adapter of another rank, from its factors alone.

Shapes, as PEFT stores them: A `[r, in]`, B `[out, r]`, with the kernel of a convolution in `in`; of E fused experts A `[E r, in]`
and B `[out, E r]`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paft_merge.compute.cores import available_cores
from paft_merge.dialects.places import adapter_at
from paft_merge.engine.factors import rounded, to_stored
from paft_merge.errors import AdapterError, MergeError, OutputError, Problems
from paft_merge.inputs.adapter_places import CONFIG
from paft_merge.inputs.adapters import open_weights
from paft_merge.inputs.adapters.config import Settings
from paft_merge.inputs.adapters.keys import Module
from paft_merge.inputs.adapters.lora_factors import Factors
from paft_merge.inputs.adapters.peft_types import read_settings, sort_keys
from paft_merge.inputs.adapters.rows import Array, Rows
from paft_merge.inputs.adapters.selection import Selection
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.safetensors_header import join_first
from paft_merge.inputs.safetensors_header import truncate as at_most
from paft_merge.lowrank.factors import LowRank, balanced, padded, truncate
from paft_merge.output.card import CARD
from paft_merge.output.folder import Output, check_place
from paft_merge.output.shards import plan_shards
from paft_merge.stats.spectrum import on_one_core

FILE = "adapter_model.safetensors"
_MERGE = "merge it with its base: output: {kind: adapter, rank: ...} in a recipe of paft merge"


class ModuleLoss(NamedTuple):
    """What the new rank costs in one module (or in one fused expert)."""

    rank: int
    """Rank that is kept; the stored factors may be padded with zeros to a larger one."""
    norm: float
    """||D||_F of the delta D."""
    error: float
    """||D - B A||_F of the stored factors."""

    @property
    def relative(self) -> float:
        """`error` relative to `norm`; 0 for a delta of zeros."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Resized(os.PathLike[str]):
    """A resized adapter.

    Attributes:
        path: its folder.
        rank: `r` of its configuration.
        modules: by module, the loss of each delta of it.
    """

    path: Path
    rank: int
    modules: Mapping[str, ModuleLoss]

    @property
    def norm(self) -> float:
        """||D||_F over all modules."""
        return math.hypot(*(one.norm for one in self.modules.values()))

    @property
    def error(self) -> float:
        """||D - B A||_F over all modules, relative to `norm`; 0 for an adapter of zeros."""
        return math.hypot(*(one.error for one in self.modules.values())) / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        modules = {name: one._asdict() for name, one in self.modules.items()}
        return {"path": str(self.path), "rank": self.rank, "relative_error": self.error, "modules": modules}

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def resize(
    adapter: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    portable: bool = True,
    dtype: str | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
    unpickle: bool = False,
) -> Resized:
    """Write the best approximation of a LoRA by one of another rank; its base is not needed.

    Every other tensor of the adapter (trained norms, embeddings, magnitudes of DoRA) is copied. The scale is multiplied into B:
    `lora_alpha` becomes `r`, without rsLoRA.

    Args:
        adapter: a folder that PEFT can load, or a repository of the Hub.
        out: folder to write.
        rank: the new rank of all modules. One above the old rank pads with zeros.
        energy: in place of `rank`: for each module the smallest rank that keeps this share of the squared norm.
        max_rank: limit of the ranks that `energy` finds.
        include, exclude: names of the modules to resize (see `Selection`); the others keep their factors.
        portable: give all modules one rank, the largest of them, with zeros as padding. Otherwise `rank_pattern` has the
            rank of each module.
        dtype: type of the new factors (`bfloat16`); None keeps theirs.
        max_error: raise an error if the relative error is larger.
        overwrite: replace an adapter in `out`.
        unpickle: read `adapter_model.bin` without running its code.

    Raises:
        AdapterError: it is not a LoRA whose factors alone say what it adds.
        MergeError: MAX_ERROR.
        OutputError: `out` cannot be written.
    """
    check_ranks(rank, energy, max_rank)
    folder, out, problems = adapter_at(str(adapter), unpickle=unpickle), Path(out), Problems()
    selection = Selection(include, exclude)
    settings = _settings(folder)
    with open_weights(folder, unpickle=unpickle) as file, on_one_core():
        pairs = _pairs(folder, settings, file)
        selection.check((pair.module.path for pair in pairs), folder, problems)
        problems.raise_as(AdapterError)
        most = rank if rank is not None else max_rank
        work = partial(_approximated, most=most, energy=energy, selection=selection, dtype=_stored(dtype))
        with ThreadPoolExecutor(available_cores()) as pool:
            made = dict(zip((pair.module.path for pair in pairs), pool.map(work, pairs), strict=True))
        kept = {path: max(1, *(low.left.shape[1] for low in lows)) for path, lows in made.items()}
        uniform = max(kept.values())
        if rank is not None and portable:
            uniform = max(rank, uniform)
        ranks = dict.fromkeys(kept, uniform) if portable else kept
        losses = {
            f"{path} {i}" if len(lows) > 1 else path: ModuleLoss(low.left.shape[1], low.norm, low.error)
            for path, lows in made.items()
            for i, low in enumerate(lows)
        }
        resized = Resized(out, max(ranks.values()), losses)
        if max_error is not None and resized.error > max_error:
            what = f"the relative error is {resized.error:.4g}, more than max_error={max_error:g}"
            raise MergeError.of("MAX_ERROR", "", what, "write a larger rank or energy")
        tensors = _tensors(file, settings, pairs, made, ranks, _stored(dtype))
        sizes = {FILE: [(name, kind, shape) for name, (kind, shape, _) in tensors.items()]}
        config = _config(settings, ranks)
        if portable and not isinstance(config.get("target_modules"), list):  # SGLang reads no pattern
            config["target_modules"] = sorted(pair.module.path for pair in pairs if pair.experts == 1)
        shards = plan_shards(sizes)
        check_place(out, [folder], shards[0].size, overwrite=overwrite, problems=problems)
        problems.raise_as(OutputError)
        with Output.open(out, shards, {}, {}, resume=False) as output:
            for name, (_, _, stored) in tensors.items():
                output.write(name, 0, stored)
            file.check_unchanged()
            files = {CONFIG: json.dumps(config, indent=2).encode() + b"\n", CARD: _card(config, resized).encode()}
            output.complete(files, overwrite=overwrite)
    return resized


def check_ranks(rank: int | None, energy: float | None, max_rank: int | None) -> None:
    """Raise ValueError for sizes of an adapter that contradict each other or are out of range."""
    if (rank is None) == (energy is None):
        raise ValueError("give either rank or energy")
    if max_rank is not None and energy is None:
        raise ValueError("max_rank is a limit of the ranks that energy finds, and needs energy")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and not (type(value) is int and value > 0):
            raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is a share of the squared norm, above 0 and at most 1, not {energy!r}")


class _Pair(NamedTuple):
    """The factors of one module, or of all fused experts of one parameter."""

    module: Module
    a: Rows
    b: Rows
    scale: float
    experts: int = 1
    grouped: bool = False
    """Whether lora_B is packed expert by expert, as in old Unsloth."""

    @property
    def rank(self) -> int:
        """r of one delta."""
        return self.a.shape[0] // self.experts

    @property
    def dtype(self) -> str:
        """The storage type of the factors; float32 if they have two."""
        kinds = {rows.file.tensors[rows.name].dtype for rows in (self.a, self.b)}
        return kinds.pop() if len(kinds) == 1 else "F32"

    def load(self) -> list[tuple[Array, Array]]:
        """Read B `[out, r]`, with the scale, and A `[r, in]` of each delta."""
        stack = Factors(self.a, self.b).stacked(self.experts, self.scale, self.grouped, False)
        return list(zip(*stack, strict=True))

    def packed(self, lows: Sequence[LowRank], rank: int) -> tuple[Array, Array]:
        """A and B in the file's layout, padded to a rank."""
        lefts, rights = zip(*(padded((low.left, low.right), rank) for low in lows), strict=True)
        axes = (1, 0, 2) if self.grouped else (1, 2, 0)
        b = np.stack(lefts).transpose(axes)
        out, (_, *kernel) = self.b.shape[0], self.a.shape
        ones = [1] * (len(self.b.shape) - 2)
        return np.concatenate(rights).reshape(-1, *kernel), b.reshape(out, -1, *ones)


def _settings(folder: Path) -> Settings:
    """The configuration of a LoRA that can be resized without its base."""
    settings, problems = read_settings(folder), Problems()
    where = folder / CONFIG
    if settings.peft_type != "LORA":
        what = f"is an adapter of type {settings.peft_type}, and only a LoRA has a rank to change"
        problems.add("ADAPTER_UNSUPPORTED", where, what, _MERGE)
    elif settings.decomposition:
        what = f"init_lora_weights: {settings.decomposition} makes the delta depend on the base"
        problems.add("ADAPTER_UNSUPPORTED", where, what, _MERGE)
    elif settings.raw.get("use_bdlora"):
        problems.add("ADAPTER_UNSUPPORTED", where, "use_bdlora: its factors are blocks of one shape", _MERGE)
    elif settings.names("target_parameters") and (
        settings.raw.get("rank_pattern") or settings.raw.get("alpha_pattern")
    ):
        what = "has target_parameters and a rank_pattern or alpha_pattern, whose names need the base"
        problems.add("ADAPTER_UNSUPPORTED", where, what, _MERGE)
    problems.raise_as(AdapterError)
    return settings


def _pairs(folder: Path, settings: Settings, file: Checkpoint) -> list[_Pair]:
    """Every pair of factors in the file."""
    problems, found = Problems(), list[_Pair]()
    keys = sort_keys(file.tensors, folder, problems, settings.peft_type)
    for module in keys.modules.values():
        with problems.catching():
            found.append(_pair(folder, settings, file, module))
    if not found and not problems.found:
        problems.add("ADAPTER_CONFIG", folder, "has no factors to resize")
    if problems.found:
        raise AdapterError(at_most(problems.found, folder))
    return found


def _pair(folder: Path, settings: Settings, file: Checkpoint, module: Module) -> _Pair:
    names = ("embedding_A", "embedding_B") if "embedding_A" in module.parts else ("A", "B")
    if not {*names} <= module.parts.keys():
        what = f"has {join_first(sorted(module.parts.values()))} alone: lora_A and lora_B are needed"
        raise AdapterError.of("ADAPTER_SHAPE", f"{folder}: {module.path}", what)
    a, b = (Rows.of(file, module.parts[name]) for name in names)
    rank = settings.rank_of(module.path)
    experts = a.shape[0] // rank if settings.names("target_parameters") and len(a.shape) == len(b.shape) == 2 else 1
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or a.shape[0] != b.shape[1] or a.shape[0] != experts * rank:
        what = f"has lora_A {a.shape} and lora_B {b.shape}, and adapter_config.json gives it rank {rank}"
        raise AdapterError.of("ADAPTER_SHAPE", f"{folder}: {module.path}", what)
    if settings.packing == "unknown" and min(experts, rank) > 1:
        what = "was trained with Unsloth, which changed its order of the experts on 2026-09-17"
        fix = 'set the order in adapter_config.json: "lora_B_layout": "rank_major" (since) or "grouped_by_expert" (before)'
        raise AdapterError.of("ADAPTER_UNSUPPORTED", f"{folder}: {module.path}", what, fix)
    return _Pair(module, a, b, settings.scale(module.path, rank), experts, settings.packing == "grouped_by_expert")


def _approximated(
    pair: _Pair, *, most: int | None, energy: float | None, selection: Selection, dtype: str | None
) -> list[LowRank]:
    """The new factors of each delta of a pair, as they are stored."""
    if pair.module.path not in selection:
        most, energy = None, None
    store, found = partial(rounded, dtype=dtype or pair.dtype), []
    for left, right in pair.load():
        low = truncate(left, right, most, energy, store)
        if energy is None and (most is None or pair.rank <= most):  # they fit as they are
            low = balanced(left.astype(np.float64), right.astype(np.float64), low.singular, low.norm, 0.0, store)
        found.append(low)
    return found


def _stored(dtype: str | None) -> str | None:
    """The storage type of a name of torch."""
    known = {row.torch: row.name for row in DTYPES.values() if row.name in ("F32", "F16", "BF16")}
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype must be one of {', '.join(sorted(map(str, known)))}, not {dtype!r}")
    return known.get(dtype)


def _tensors(
    file: Checkpoint,
    settings: Settings,
    pairs: Sequence[_Pair],
    made: Mapping[str, Sequence[LowRank]],
    ranks: Mapping[str, int],
    dtype: str | None,
) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """Storage type, shape and bytes of every tensor to write, in the order of the file."""
    changed = dict[str, tuple[str, Array]]()
    for pair in pairs:
        path, kind = pair.module.path, dtype or pair.dtype
        for rows, values in zip((pair.a, pair.b), pair.packed(made[path], ranks[path]), strict=True):
            changed[rows.name] = kind, values
        if bias := pair.module.parts.get("B.bias"):
            changed[bias] = file.tensors[bias].dtype, Rows.of(file, bias).load().reshape(-1) * np.float32(pair.scale)
    found = dict[str, tuple[str, tuple[int, ...], Any]]()
    for name, info in file.tensors.items():
        if name in changed:
            kind, values = changed[name]
            found[name] = kind, values.shape, to_stored(values, kind)
        else:
            raw = np.empty(info.nbytes, np.uint8)
            file.read_into(name, 0, raw)
            found[name] = info.dtype, info.shape, raw
    return found


def _config(settings: Settings, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the new ranks, and scales of 1."""
    most = max(ranks.values())
    other = {path: rank for path, rank in ranks.items() if rank != most}
    return {
        **settings.raw, "r": most, "lora_alpha": most, "use_rslora": False, "rank_pattern": other, "alpha_pattern": other
    }  # fmt: skip


def _card(config: Mapping[str, Any], resized: Resized) -> str:
    base = config.get("base_model_name_or_path")
    named = [f"base_model: {json.dumps(base)}"] if base else []
    head = ["---", "library_name: peft", *named, "tags: [lora, paft]", "---", "", "# Resized LoRA", ""]
    said = f"{len(resized.modules):,} deltas with factors of rank {resized.rank} or less, by `paft resize`."
    return "\n".join([*head, said, "", f"Relative error of the deltas: {resized.error:.3g}.", ""])
