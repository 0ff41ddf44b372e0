"""The tensors of a finished model beside those that the recipe means, and beside the base's: what the stored values show.

Norms and products are of the whole tensor; `d` is the recipe's update of the base, `e` the stored one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.blocks import tile_bounds
from paft_merge.compute.scratch import SCRATCH
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.models import Model
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.verifying.meaning import Meaning

Array = NDArray[np.float32]

_GRIDS: Mapping[str, tuple[int, int]] = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126), "F8_E4M3": (3, -6), "F8_E5M2": (2, -14)}  # fmt: skip
"""Bits after the leading one, and the least exponent of normal numbers."""

COARSER = {
    "F32": ("F8_E5M2", "F8_E4M3", "BF16", "F16"),
    "F64": ("F8_E5M2", "F8_E4M3", "BF16", "F16", "F32"),
    "BF16": ("F8_E5M2", "F8_E4M3"),
    "F16": ("F8_E5M2", "F8_E4M3", "BF16"),
}
"""Types of fewer bits, to which the values of a stored type may have been rounded before; the coarsest first."""


@dataclass
class StoredTensor:
    """One tensor of the finished model, and how far it is from the recipe's and from the base's.

    Attributes:
        name: its name.
        dtype: the type that it is stored in.
        shape: its shape.
        wanted: the type that the recipe writes it in.
        error: sum of (stored - meant)^2.
        meant: sum of meant^2.
        update: sum of d^2; 0 if the base has no tensor of that shape.
        made: sum of e^2.
        product: sum of d e.
        stored: sum of stored^2.
        steps: the largest |stored - meant|, in steps of the stored type.
        worst: the largest |stored - meant|.
        at: flat index of that element.
        beyond: number of elements that are more than half a step away.
        nonfinite: number of elements that are NaN or infinite in one of the two.
        constant: the value of all elements, if they are equal.
        rounded_to: a type of fewer bits to which the meant values were rounded first; else empty.
        held_in: a type of fewer bits that holds every stored value; else empty.
        is_base: whether every element is the base's, rounded to the stored type.
        code: the format of codes that it is stored in; else empty.
        by_factors: whether an adapter's factors give it.
        stochastic: whether the recipe rounds it up or down at random.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    wanted: str
    code: str = ""
    by_factors: bool = False
    stochastic: bool = False
    error: float = 0.0
    meant: float = 0.0
    update: float = 0.0
    made: float = 0.0
    product: float = 0.0
    stored: float = 0.0
    steps: float = 0.0
    worst: float = 0.0
    at: int = 0
    beyond: int = 0
    nonfinite: int = 0
    constant: float | None = None
    rounded_to: str = ""
    held_in: str = ""
    is_base: bool = False
    likeness: dict[str, float] = field(default_factory=dict)
    """Of a tensor that is not the recipe's: names of other tensors with the cosine to them, best first."""
    rows: str = ""
    """How its rows or columns are ordered, if it holds those of the recipe at other places."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def relative(self) -> float:
        """||stored - meant|| / ||meant||."""
        return root(self.error, self.meant)

    @property
    def lost(self) -> float:
        """||stored - meant|| / ||d||: the share of the update that is lost; 0 without an update."""
        return root(self.error, self.update) if self.update else 0.0

    @property
    def scale(self) -> float:
        """The factor of d in e that fits best: 1 if the update is the recipe's, 0 if there is none."""
        return self.product / self.update if self.update else 1.0

    @property
    def unscaled(self) -> float:
        """||e - scale * d|| / ||e||: what no scale explains."""
        rest = self.made - self.product**2 / self.update if self.update else self.made
        return root(max(rest, 0.0), self.made)

    @property
    def factor(self) -> float:
        """The factor of the recipe's tensor in the stored one; 0 if the two are not alike."""
        product = (self.meant + self.stored - self.error) / 2
        alike = abs(product) > 0.98 * math.sqrt(self.meant) * math.sqrt(self.stored)
        return product / self.meant if alike and self.meant else 0.0

    @property
    def is_rounding(self) -> bool:
        """Whether no element is farther from the recipe's than half a step of the stored type."""
        return not self.nonfinite and not self.beyond

    @property
    def is_projection(self) -> bool:
        """Whether e is a projection of d, as the best factors of a rank give it, up to the rounding of factors of 16 bits."""
        return self.by_factors and abs(self.product - self.made) <= 0.01 * self.made

    def to_json(self) -> dict[str, Any]:
        """The tensor as plain data."""
        return {
            "name": self.name, "dtype": self.dtype, "wanted": self.wanted, "shape": list(self.shape), "code": self.code,
            "relative_error": self.relative, "update_lost": self.lost, "scale": self.scale, "largest_error": self.worst,
            "at": self.at, "steps": self.steps, "beyond_half_a_step": self.beyond, "nonfinite": self.nonfinite,
        }  # fmt: skip


def compare_stored(
    meaning: Meaning, finished: Model, names: Sequence[str], wanted: Mapping[str, str], threads: int,
    progress: Callable[[int, int], None],
) -> list[StoredTensor]:  # fmt: skip
    """Compare every tensor of `names`, which both have with one shape.

    Args:
        meaning: the recipe.
        finished: the finished model.
        names: the tensors.
        wanted: the types that the recipe writes; the stored one where it does not say.
        threads: tensors compared at a time.
        progress: called with elements done and in total.
    """
    sizes = [math.prod(meaning.model.read(name).shape) for name in names]
    found, done = [], 0

    def one(name: str) -> StoredTensor:
        return _compare(meaning, finished, name, wanted.get(name, ""))

    with ThreadPoolExecutor(threads) as pool:
        for compared, size in zip(pool.map(one, names), sizes, strict=True):
            done += size
            found.append(compared)
            progress(done, sum(sizes))
    return found


def _compare(meaning: Meaning, finished: Model, name: str, wanted: str) -> StoredTensor:
    meant, stored, base = meaning.model.read(name), finished.read(name), _of_base(meaning, name)
    code = stored.checkpoint.stored_format(stored.name)
    dtype = stored.checkpoint.written_dtype(stored.name) if code or stored.plain else "F32"
    stochastic = meaning.rounding == "stochastic"
    found = StoredTensor(
        name, dtype, stored.shape, wanted or dtype, code, bool(stored.delta and stored.delta.rank), stochastic
    )
    grids = COARSER.get(dtype, ())
    fitting, held, half = set(grids), set(grids), 1.0 if stochastic else 0.5
    first: float | None = None
    same = True
    found.is_base = base is not None
    for start, _, (m, s, *b) in blocks_of([meant, stored, *([base] if base else [])], meaning.row(name)):
        m, s, odd = _finite(m, s)
        found.nonfinite += odd
        off = _minus(s, m)
        size = np.abs(off)
        top = int(size.argmax()) if size.size else 0
        if size.size and size[top] > found.worst:
            found.worst, found.at = float(size[top]), start + top
        if found.worst and size[top]:
            steps = _in_steps(size, m, dtype)
            found.steps = max(found.steps, float(steps.max()))
            found.beyond += int(np.count_nonzero(steps > half * (1 + 2e-3)))
        found.error += _dot(off, off)
        found.meant += _dot(m, m)
        found.stored += _dot(s, s)
        if b:
            d, e = _minus(m, b[0]), _minus(s, b[0])
            found.update += _dot(d, d)
            found.made += _dot(e, e)
            found.product += _dot(d, e)
            if found.is_base and e.any():
                found.is_base = not (_in_steps(np.abs(e), b[0], dtype) > half * (1 + 2e-3)).any()
        first = float(s[0]) if first is None and s.size else first
        same = same and bool((s == first).all())
        held = {grid for grid in held if on_grid(s, grid)}
        fitting = {grid for grid in fitting & held if not (_in_steps(size, m, grid) > 1.01).any()}
    found.constant = first if same and found.numel > 1 else None
    if found.beyond and found.constant is None:
        found.rounded_to = next((grid for grid in grids if grid in fitting), "")
        found.held_in = next((grid for grid in grids if grid in held), "")
    for read in (meant, stored, *([base] if base else [])):
        read.checkpoint.release(read.name)
    return found


def _finite(meant: Array, stored: Array) -> tuple[Array, Array, int]:
    """Both with 0 where one of them is not finite, and at how many of these elements the other differs."""
    kept = np.isfinite(meant) & np.isfinite(stored)
    if kept.all():
        return meant, stored, 0
    equal = (meant == stored) | (np.isnan(meant) & np.isnan(stored))
    zero = np.float32(0)
    return np.where(kept, meant, zero), np.where(kept, stored, zero), int(np.count_nonzero(~kept & ~equal))


def _minus(left: Array, right: Array) -> Array:
    """The difference; the largest number of the type where it is beyond it, and 0 where `right` is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Array = left - right
    return found if np.isfinite(found).all() else np.where(np.isfinite(right), np.nan_to_num(found), np.float32(0))


def _in_steps(sizes: Array, values: Array, dtype: str) -> Array:
    """Sizes in steps of a storage type at each value."""
    with np.errstate(over="ignore"):
        found: Array = np.minimum(sizes / step_of(values, dtype), np.finfo(np.float32).max)
    return found


def _of_base(meaning: Meaning, name: str) -> Read | None:
    """The base's tensor, if it has the shape of the recipe's."""
    base = meaning.base
    if not base.has(name):
        return None
    read = base.read(name)
    return read if read.shape == meaning.model.read(name).shape else None


def blocks_of(reads: Sequence[Read], row: int = 1) -> Iterator[tuple[int, int, list[Array]]]:
    """Each block of all tensors as float32; valid until the next one."""
    numel = math.prod(reads[0].shape)
    for start, stop in tile_bounds(numel, math.lcm(row, *(read.row_size for read in reads))):
        held = [SCRATCH.array(f"verified_{i}", stop - start, np.float32) for i in range(len(reads))]
        for read, out in zip(reads, held, strict=True):
            with SCRATCH.nested():
                read.value(start, stop, out)
        yield start, stop, held


def values_of(read: Read, row: int = 1) -> Array:
    """A whole tensor as float32."""
    return np.concatenate([held[0].copy() for _, _, held in blocks_of([read], row)]).reshape(read.shape)


def step_of(values: Array, dtype: str) -> Array:
    """The distance of neighbouring numbers of a storage type at each value, `[E]`."""
    bits, least = _GRIDS.get(dtype, _GRIDS["F32"])
    exponent = np.frexp(np.where(np.isfinite(values), values, np.float32(1)))[1] - 1
    found: Array = np.ldexp(np.float32(1), np.maximum(exponent, least) - bits).astype(np.float32)
    return found


def on_grid(values: Array, dtype: str) -> bool:
    """Whether a storage type holds every value exactly."""
    if dtype == "BF16":
        return not (values.view(np.uint32) & np.uint32(0xFFFF)).any()
    import torch

    given = torch.from_numpy(np.ascontiguousarray(values))
    return bool(torch.equal(given, given.to(getattr(torch, str(DTYPES[dtype].torch))).float()))


def _dot(left: Array, right: Array) -> float:
    """The product of finite values; in float64 where that of float32 overflows or is lost."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        found = float(np.dot(left, right))
    if math.isfinite(found) and (abs(found) > 1e-30 or not (left.any() and right.any())):
        return found
    return float(np.dot(left.astype(np.float64), right.astype(np.float64)))


def root(part: float, whole: float) -> float:
    """The ratio of two norms, from their squares; infinite for a norm over 0."""
    return math.sqrt(part / whole) if whole else (0.0 if not part else math.inf)
