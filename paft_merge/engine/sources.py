"""The models that a recipe names: looked for once, each at one commit, then opened from here or from the Hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paft_merge.errors import PaftMergeError, Problem, Problems
from paft_merge.hub import Kind, Remote, ResolvedRepo, check_room, download, resolve
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.plan import Model
from paft_merge.recipe import ModelRef

if TYPE_CHECKING:
    from paft_merge.inputs.adapters import Adapter

_Place = tuple[str, str | None, Kind]


class Sources:
    """Where every reference of a recipe leads."""

    def __init__(self, refs: Sequence[ModelRef], unpickle: bool, computed: Collection[str] = ()) -> None:
        self.refs, self.unpickle, self.computed = tuple(refs), unpickle, computed
        self.looks: dict[_Place, ResolvedRepo] = {}
        self.faults: dict[_Place, PaftMergeError] = {}
        """What could not be found; raised by `opened`, together with what is wrong with the rest."""

    @classmethod
    def find(cls, refs: Sequence[ModelRef], *, unpickle: bool = False, computed: Collection[str] = ()) -> Sources:
        """Look every reference up; of what is on the Hub the small files are fetched, and no weights.

        Pickles are the exception, as nothing is known of them without reading them.

        Args:
            refs: a computed model after all that it is made of.
            unpickle: read `.bin` checkpoints through mergekit's restricted unpickler.
            computed: paths that are no places but documents of the recipe's file; `opened` makes their checkpoints.
        """
        found = cls(refs, unpickle, computed)
        for place in dict.fromkeys(place for ref in refs for place in found.places(ref)):
            path, revision, kind = place
            try:
                found.looks[place] = one = resolve(path, revision, kind=kind, unpickle=unpickle)
                if any(file.name.endswith(".bin") for file in one.missing):
                    download([one])
                    found.looks[place] = replace(one, missing=())
            except PaftMergeError as error:
                found.faults[place] = error
                found.looks.pop(place, None)
        return found

    @property
    def missing_bytes(self) -> int:
        """Bytes of weights that are on the Hub only."""
        files = {(one.commit, file.name): file.size for one in self.looks.values() for file in one.missing}
        return sum(files.values())

    def check_room(self, also: int, beside: Path) -> None:
        """Raise HubError DISK when what is missing, and `also` bytes of output `beside` it, do not fit on the disk."""
        check_room(self.looks.values(), also, beside)

    def pull(self) -> None:
        """Fetch all weights that are not here.

        Raises:
            HubError: as `hub.download`.
        """
        download(list(self.looks.values()))
        self.looks = {place: replace(one, missing=()) for place, one in self.looks.items()}

    @contextmanager
    def opened(
        self, compute: Callable[[str, Mapping[ModelRef, Model]], Checkpoint] | None = None
    ) -> Iterator[dict[ModelRef, Model]]:
        """Open every reference once, a checkpoint that several share too; what is on the Hub only is read from there.

        Args:
            compute: makes the checkpoint of a computed path, of the models that are already open.

        Raises:
            PaftMergeError: everything that is wrong with them, at once.
        """
        problems, models = Problems(), dict[ModelRef, Model]()
        faults = dict(self.faults)
        checkpoints: dict[Path | str, Checkpoint | None] = {}
        with Remote.open(list(self.looks.values())) as remote:
            try:
                for ref in self.refs:
                    looks = [self.looks.get(place) for place in self.places(ref)]
                    problems.found += [p for place in self.places(ref) for p in _told(faults.pop(place, None))]
                    at, adapter = (None, looks) if ref.path in self.computed else (looks[0], looks[1:])
                    if None in looks or (at is None and problems.found):
                        continue
                    with problems.catching():
                        if at is None:
                            assert compute is not None
                            if ref.path not in checkpoints:
                                checkpoints[ref.path] = None
                                checkpoints[ref.path] = compute(ref.path, models)
                            checkpoint = checkpoints[ref.path]
                        else:
                            checkpoint = self._checkpoint(at, checkpoints, remote)
                        if checkpoint is not None:
                            bound = _open_adapter(adapter[0], checkpoint, remote) if adapter and adapter[0] else None
                            models[ref] = Model(str(ref), checkpoint, bound)
                problems.raise_as(PaftMergeError)
                yield models
            finally:
                for opened in filter(None, checkpoints.values()):
                    opened.close()
                for model in models.values():
                    model.close()

    def places(self, ref: ModelRef) -> list[_Place]:
        """What has to be looked up for a reference."""
        return [place for place in _places(ref) if place[2] == "adapter" or ref.path not in self.computed]

    def _checkpoint(
        self, at: ResolvedRepo, checkpoints: dict[Path | str, Checkpoint | None], remote: Remote
    ) -> Checkpoint | None:
        """The checkpoint there; None when it has failed to open for another reference, which was told."""
        key = at.folder.resolve()
        if key not in checkpoints:
            checkpoints[key] = None
            checkpoints[key] = Checkpoint.open(at.folder, unpickle=self.unpickle, far=remote.files(at))
        return checkpoints[key]


def _told(error: PaftMergeError | None) -> tuple[Problem, ...]:
    return error.problems if error else ()


def _places(ref: ModelRef) -> list[_Place]:
    model: _Place = (ref.path, ref.revision, "model")
    return [model, (ref.lora, ref.lora_revision, "adapter")] if ref.lora else [model]


def _open_adapter(at: ResolvedRepo, checkpoint: Checkpoint, remote: Remote) -> Adapter:
    from paft_merge.inputs.adapters import Adapter  # imports torch, which a merge of plain checkpoints does without

    return Adapter.open(at.folder, checkpoint, remote.files(at))
