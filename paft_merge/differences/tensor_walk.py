"""All tensors of two models, compared by name; those without an equal one are looked for under other names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from paft_merge.differences.kinds import Kind, TensorDifference
from paft_merge.differences.tensor_pairs import Pair, dtype_of, equal_bits, is_constant
from paft_merge.errors import CheckpointError
from paft_merge.inputs.tensor_inputs import Read


class DiffProgress(NamedTuple):
    """How many tensors and entries are compared, and how many there are."""

    tensors: int
    tensors_total: int
    entries_done: int
    entries_total: int


OnProgress = Callable[[DiffProgress], None]
"""Called after every tensor."""


@dataclass(frozen=True)
class TensorWalk:
    """Compares the tensors of two models.

    Attributes:
        pool: reads and compares blocks.
        tolerance, only, progress: as for `diff`.
    """

    pool: Executor
    tolerance: float
    only: str
    progress: OnProgress

    def compare(
        self,
        a: Mapping[str, Read],
        b: Mapping[str, Read],
        *,
        derived: set[str] | frozenset[str] = frozenset(),
        rescalable: bool = False,
        required: bool = True,
    ) -> tuple[TensorDifference, ...]:
        """Every tensor that matches `only`, in the order of A.

        Args:
            a, b: tensors by name; those of B by their names in A where these are known.
            derived: names that only one of the two stores, and the model computes.
            rescalable: as for `Pair`.
            required: whether a tensor has to match.

        Raises:
            CheckpointError: EMPTY.
        """
        names = [n for n in dict.fromkeys((*a, *b)) if self._is_wanted(n, b.get(n))]
        if required and not names:
            raise CheckpointError.of("EMPTY", self.only, "matches no tensor of either model", "see `paft explain`")
        found, done = dict[str, TensorDifference](), 0
        entries = sum(_entries(a.get(name) or b[name]) for name in names)
        for number, name in enumerate(names, 1):
            one, other = a.get(name), b.get(name)
            if one and other and name not in derived:
                found[name] = Pair(one, other, rescalable).compared(
                    name, _stored_name(other, name), self.tolerance, self.pool
                )
            elif one:
                kind: Kind = "derived" if name in derived else "only in A"
                found[name] = TensorDifference(name, kind, dtypes=(dtype_of(one), ""), shapes=(one.shape, None))
            elif other:
                found[name] = TensorDifference(
                    _stored_name(other, name),
                    "derived" if name in derived else "only in B",
                    dtypes=("", dtype_of(other)),
                    shapes=(None, other.shape),
                )
            done += _entries(one or other)
            self.progress(DiffProgress(number, len(names), done, entries))
        return tuple(self._renamed(found, a, b).values())

    def _is_wanted(self, name: str, other: Read | None) -> bool:
        return fnmatchcase(name, self.only) or (other is not None and fnmatchcase(_stored_name(other, name), self.only))

    def _renamed(
        self, found: dict[str, TensorDifference], a: Mapping[str, Read], b: Mapping[str, Read]
    ) -> dict[str, TensorDifference]:
        """Find among the tensors without an equal one those whose bits the other model has under another name."""
        left = {n: a[n] for n, one in found.items() if one.kind == "only in A" and a[n].plain}
        right = {n: read for n, read in b.items() if n not in a and read.plain}
        for name, other in equal_bits(left, right):
            read = b[other]
            found[name] = replace(
                found[name], kind="renamed", other=_stored_name(read, other), dtypes=(found[name].dtypes[0], dtype_of(read)),
                shapes=(found[name].shapes[0], read.shape),
            )  # fmt: skip
            found.pop(other, None)
        unlike = [n for n, one in found.items() if one.kind in ("different", "shape") and a[n].plain and b[n].plain]
        varied = {n: a[n] for n in unlike if not is_constant(a[n])}
        others = {n: b[n] for n in [*unlike, *(n for n in found if n in right)]}
        for name, other in equal_bits(varied, others):
            if name != other:
                found[name] = replace(found[name], kind="moved", other=_stored_name(b[other], other))
        return found


def _stored_name(read: Read, name: str) -> str:
    """The name of a tensor in its files; of one that is made of several the first."""
    names = read.checkpoint.stored_names(read.name)
    return name if read.name == name and name in names else names[0] if names else name


def _entries(read: Read | None) -> int:
    return math.prod(read.shape) if read else 0
