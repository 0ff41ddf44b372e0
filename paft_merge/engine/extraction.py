"""`extract`: a LoRA from a full fine-tune, as the merge of one source into its base whose output is an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paft_merge.compute.cores import available_cores
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.engine.api import merge, open_plan
from paft_merge.engine.merge_result import MergeResult
from paft_merge.engine.options import MergeKeywords, MergeOptions
from paft_merge.engine.resizing import check_ranks
from paft_merge.engine.streamed_deltas import StreamedDelta
from paft_merge.errors import RecipeError
from paft_merge.lowrank.factors import Array
from paft_merge.plan.merged_deltas import merged_delta

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Extracted(os.PathLike[str]):
    """An extracted adapter.

    Attributes:
        merge: the result of the merge that wrote it; its manifest has the error of each module.
        left_out: norms of the deltas that are not in the adapter, by the name of the tensor, largest first.
    """

    merge: MergeResult
    left_out: Mapping[str, float]

    @property
    def error(self) -> float:
        """||D - B A||_F over the modules of the adapter, relative to the norm of their deltas D."""
        return self.merge.error or 0.0

    @property
    def left_out_share(self) -> float:
        """The share of the squared norm of the whole fine-tune that `left_out` holds."""
        lost = math.fsum(norm**2 for norm in self.left_out.values())
        whole = lost + float(self.merge.manifest["adapter"]["norm"]) ** 2
        return lost / whole if whole else 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        about = self.merge.manifest["adapter"]
        return {
            "path": str(self.merge.path),
            **about,
            "left_out": dict(self.left_out),
            "left_out_share": self.left_out_share,
        }

    def __fspath__(self) -> str:
        return os.fspath(self.merge)


def extract(
    finetune: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    portable: bool = True,
    dtype: str | None = None,
    options: MergeOptions | None = None,
    **overrides: Unpack[MergeKeywords],
) -> Extracted:
    """Write the best low-rank approximation of what a fine-tune adds to its base, as a LoRA.

    Args:
        finetune: the fine-tuned checkpoint: a folder, or a repository of the Hub.
        base: the checkpoint that it was trained from.
        out: folder to write.
        rank: the rank of all modules.
        energy: in place of `rank`: for each module the smallest rank that keeps this share of the squared norm.
        max_rank: limit of the ranks that `energy` finds.
        include, exclude: names of modules (see `Selection`) that get factors, or get none.
        portable: leave out what not every server reads: changed norms, biases, embeddings. Otherwise they are stored where
            PEFT loads them.
        dtype: type of the factors, such as `bfloat16`; None for float32.
        options: see `MergeOptions`, such as `max_error` and `overwrite`.
        overrides: single options, which replace those of `options`.

    Raises:
        PaftMergeError: the models cannot be merged, or do not differ.
    """
    output = output_of(rank, energy, max_rank, include, exclude, portable)
    return extracted(recipe_of(finetune, base, dtype=dtype, **output), out, MergeOptions.of(options, overrides))


def extracted(recipe: Mapping[str, Any], out: Path | str, options: MergeOptions) -> Extracted:
    """Merge a recipe whose output is an adapter, and measure what the adapter leaves out."""
    made = merge(recipe, out, options)
    return Extracted(made, left_out_of(recipe, options))


def left_out_of(recipe: Mapping[str, Any], options: MergeOptions) -> dict[str, float]:
    """||D||_F of the merged deltas that are not in the adapter of a recipe, largest first; without those of zero."""
    with open_plan(recipe, options) as plan:
        held = {t.factor.delta.name if t.factor else t.inputs.reads[0].name for t in plan.tensors}
    found = dict[str, float]()
    dense = {name: value for name, value in recipe.items() if name != "output"}
    with open_plan(dense, options) as plan, ThreadPoolExecutor(options.threads or available_cores()) as pool:
        for tensor in plan.tensors:
            merged = merged_delta(plan, tensor) if tensor.name not in held else None
            if merged is not None:
                rows = StreamedDelta.of(merged, merged.tensor.rule, pool, CpuOps())
                found[tensor.name] = math.sqrt(math.fsum(rows.each(_squares)))
                merged.tensor.release()
    return dict(sorted(((name, norm) for name, norm in found.items() if norm), key=lambda item: -item[1]))


def output_of(
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    include: Sequence[str],
    exclude: Sequence[str],
    portable: bool,
) -> dict[str, Any]:
    """The `output` of a recipe for an adapter; raises ValueError for sizes that contradict each other."""
    check_ranks(rank, energy, max_rank)
    sizes = {"rank": rank} if energy is None else {"rank": "auto", "energy": energy}
    limit = {} if max_rank is None else {"max_rank": max_rank}
    names = {name: list(value) for name, value in (("include", include), ("exclude", exclude)) if value}
    return {"kind": "adapter", **sizes, **limit, **names, "portable": portable, "unfit": "leave_out"}


def recipe_of(finetune: Path | str, base: Path | str, *, dtype: str | None = None, **output: Any) -> dict[str, Any]:
    """The recipe whose merged delta is the difference of two checkpoints.

    Raises:
        RecipeError: both are the same.
    """
    if str(finetune) == str(base):
        what = f"the fine-tune and the base are both {base}"
        raise RecipeError.of("RECIPE", "base", what, "name the model that the fine-tune was trained from")
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(finetune), "parameters": {"weight": 1.0}}],
        **({"out_dtype": dtype} if dtype else {}),
        "output": output,
    }


def _squares(first: int, rows: Array) -> float:
    return float(np.square(rows, dtype=np.float64).sum())
