"""Several adapters on one base, `BASE+P+Q`: as if P were merged into the base, and then Q into the result.

The deltas are summed in that order. An adapter whose delta depends on the weight (DoRA, saved modules) sees the weight with
the adapters before it. All are bound to the base, so that no merged weight is written in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy, LowRank, Pair, Replacement
from paft_merge.inputs.adapters.lora_factors import concatenated
from paft_merge.inputs.adapters.merged_by_peft import ByPeft
from paft_merge.inputs.adapters.rows import Array
from paft_merge.inputs.safetensors_header import quote

_DECOMPOSED = ("pissa", "olora")


class StackedDelta(AdapterDelta):
    """The sum of the deltas of several adapters for one tensor, each computed on the weight with those before it."""

    def __init__(self, parts: Sequence[AdapterDelta]) -> None:
        last = parts[-1]
        kinds = list(dict.fromkeys(part.kind for part in parts if part.kind != "untied")) or ["untied"]
        decisive = next((p.kind for p in parts if p.needs_weight or p.kind in _DECOMPOSED), None)
        stored_as = next((part.stored_as for part in parts if part.stored_as), None)
        super().__init__(last.shape, last.row_size, decisive or "+".join(kinds), stored_as)
        self.parts = tuple(parts)
        self.needs_weight = any(part.needs_weight for part in parts)
        self.rank = sum(part.rank for part in parts)

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        self.parts[0].compute(start, stop, weight, out)
        held = np.empty_like(out)
        for part in self.parts[1:]:
            so_far = None
            if part.needs_weight:
                so_far = out.copy()
                if weight is not None:
                    so_far[: len(weight)] += weight
            part.compute(start, stop, so_far, held)
            out += held

    def factors(self) -> list[Pair] | None:
        every = [part.factors() for part in self.parts]
        if self.needs_weight or not all(pairs is not None and len(pairs) == len(every[0] or ()) for pairs in every):
            return None
        return [concatenated(pairs) for pairs in zip(*(pairs or () for pairs in every), strict=True)]

    def release(self) -> None:
        for part in self.parts:
            part.release()


class AdapterStack(Adapter):
    """Several adapters as one.

    Attributes:
        parts: the adapters, in their order.
        config: that of the last adapter, as are `folder` and `file`; `record` is empty.
    """

    def __init__(self, parts: Sequence[Adapter]) -> None:
        super().__init__(parts[-1].folder, parts[-1].config, parts[-1].file)
        self._parts = tuple(parts)
        self.vocab_size = next((part.vocab_size for part in reversed(parts) if part.vocab_size), None)
        self.warnings = [warning for part in parts for warning in part.warnings]

    @classmethod
    def of(cls, parts: Sequence[Adapter]) -> Adapter:
        """Return the sum of adapters that were opened on one base; the adapter itself if it is the only one.

        Raises:
            AdapterError: ADAPTER_UNSUPPORTED, an adapter depends on a whole weight (PiSSA, OLoRA, DoRA on columns, types
                that PEFT computes) that one before it changes; ADAPTER_SHAPE, two give a tensor different shapes.
        """
        if len(parts) == 1:
            return parts[0]
        stack, sums, problems = cls(parts), dict[str, list[AdapterDelta]](), Problems()
        for at, part in enumerate(parts):
            for name, tied_to in part.unties.items():
                if name not in stack.unties:
                    stack.unties[name] = tied_to
                    if at and name not in sums and tied_to in sums:
                        # Until now the tensor followed the one that it was tied to.
                        sums[name] = list(sums[tied_to])
            for name, delta in part.deltas.items():
                before = sums.setdefault(name, [])
                if before and (what := _conflict(name, before[-1], delta)):
                    code = "ADAPTER_SHAPE" if before[-1].shape != delta.shape else "ADAPTER_UNSUPPORTED"
                    fix = "merge the adapters before it first, in a document of their own"
                    problems.add(code, part.folder, what, fix)
                before.append(delta)
        problems.raise_as(AdapterError)
        stack.deltas = {name: _sum(deltas) for name, deltas in sums.items()}
        return stack

    @property
    def parts(self) -> tuple[Adapter, ...]:
        """The adapters, in their order."""
        return self._parts

    def close(self) -> None:
        """Close the files of all adapters."""
        for part in self._parts:
            part.close()

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """The fingerprints of all files; names begin with the adapter's place in the stack."""
        return {f"{at}/{name}": one for at, part in enumerate(self._parts) for name, one in part.fingerprint().items()}

    def check_unchanged(self) -> None:
        """Compare all files with their state when they were opened.

        Raises:
            CheckpointError: INPUT_CHANGED.
        """
        for part in self._parts:
            part.check_unchanged()


def _conflict(name: str, before: AdapterDelta, delta: AdapterDelta) -> str:
    """Why a delta cannot follow another one; empty if it can."""
    if before.shape != delta.shape:
        return f"tensor {quote(name)} is {delta.shape} with it, and {before.shape} with the adapter before it"
    columns = isinstance(delta, Replacement) and delta.magnitude is not None and delta.magnitude.norms is not None
    if delta.kind in _DECOMPOSED or columns or isinstance(delta, ByPeft):
        return f"its delta of tensor {quote(name)} starts from the whole weight, which an adapter before it changes"
    return ""


def _sum(deltas: Sequence[AdapterDelta]) -> AdapterDelta:
    """One delta for several."""
    if len(deltas) == 1:
        return deltas[0]
    total, named = _total(deltas), next((delta for delta in deltas if delta.module), deltas[0])
    total.module, total.layer = named.module, named.layer
    return total


def _total(deltas: Sequence[AdapterDelta]) -> AdapterDelta:
    """The sum of several deltas; low-rank products become one product, of the concatenated factors."""
    low = [delta for delta in deltas if type(delta) is LowRank]
    if len(low) < len(deltas):
        return StackedDelta(deltas)
    kinds = "+".join(dict.fromkeys(delta.kind for delta in low if delta.kind != "untied")) or "untied"
    stored_as = next((delta.stored_as for delta in low if delta.stored_as), None)

    def joined() -> Pair:
        pair = concatenated([delta.pair.get() for delta in low])
        for delta in low:
            delta.release()
        return pair

    return LowRank(low[0].shape, low[0].row_size, Lazy(joined), kinds, stored_as, sum(delta.rank for delta in low))
