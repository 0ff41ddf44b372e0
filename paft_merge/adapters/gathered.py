"""What several models' adapters do to one tensor whose rows come from all of them (see `gathering`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paft_merge.adapters.patches import Patch
from paft_merge.adapters.rows import Array

Fetch = Callable[[int, int, Array], None]


class GatheredPatch(Patch):
    """The rows of other patches in another order; it has no factors of its own.

    Args:
        shape, row, kind: as for `Patch`; `kind` is that of the model's own adapter.
        patches: those whose rows are taken.
        fetch: writes rows `[start, stop)` of the delta into its last argument.
    """

    def __init__(self, shape: tuple[int, ...], row: int, kind: str, patches: Sequence[Patch], fetch: Fetch) -> None:
        super().__init__(shape, row, kind)
        self._patches, self._fetch = patches, fetch

    def delta(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        self._fetch(start, stop, out)

    def release(self) -> None:
        for patch in self._patches:
            patch.release()
