"""The models of a recipe: each is located once, at one commit, then opened from disk or from the Hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from paft_merge.errors import PaftMergeError, Problem, Problems
from paft_merge.hub import Kind, Remote, ResolvedRepo, check_room, download, resolve
from paft_merge.hub.store_folders import named_by_url
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.stack import AdapterStack
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.equivalent_names import Names
from paft_merge.inputs.quantized import dequantized
from paft_merge.plan import Model
from paft_merge.recipe import ModelRef
from paft_merge.recipe.sections import beside_recipe
from paft_merge.stores import Store, is_url, joined

_Place = tuple[str, str | None, Kind]


class Sources:
    """The located models and adapters of a recipe."""

    def __init__(
        self,
        refs: Sequence[ModelRef],
        unpickle: bool,
        computed: Collection[str] = (),
        template: ModelRef | None = None,
        spots: Mapping[ModelRef, str] | None = None,
    ) -> None:
        self.refs, self.unpickle, self.computed, self.template = tuple(refs), unpickle, computed, template
        self.spots = spots or {}
        self.repos: dict[_Place, ResolvedRepo] = {}
        self.errors: dict[_Place, PaftMergeError] = {}
        """Errors of places that were not found; `opened` raises them together with all other problems."""
        self.warnings: list[Problem] = []
        self.headers_only = False
        """Whether only headers of models are read, so that `pull` downloads only adapters."""

    @classmethod
    def find(
        cls,
        refs: Sequence[ModelRef],
        *,
        unpickle: bool = False,
        computed: Collection[str] = (),
        template: ModelRef | None = None,
        spots: Mapping[ModelRef, str] | None = None,
        beside: Path | str | None = None,
    ) -> Sources:
        """Locate every reference. Of Hub repositories only small files are downloaded, and pickles, which have no header.

        Args:
            refs: models; a computed model comes after its inputs.
            unpickle: read `.bin` checkpoints through a reader that runs no code of them.
            computed: names of documents of the recipe file; `opened` computes their checkpoints.
            template: the model whose tensor names the others get where theirs differ; one of `refs`, not computed.
            spots: `file:line` of the references in the recipe, for messages.
            beside: the recipe's folder, or its URL, where relative paths are looked for first; None for a recipe without a file.
        """
        found = cls(refs, unpickle, computed, template, spots)
        for place in dict.fromkeys(place for ref in refs for place in found.places(ref)):
            path, revision, kind = place
            try:
                here = found._beside(path, beside)
                found.repos[place] = one = resolve(here, revision, kind=kind, unpickle=unpickle)
                if any(file.name.endswith(".bin") for file in one.missing):
                    download([one])
                    found.repos[place] = replace(one, missing=())
            except PaftMergeError as error:
                found.errors[place] = error
                found.repos.pop(place, None)
        return found

    def _beside(self, path: str, beside: Path | str | None) -> str:
        """A path as `resolve` takes it: relative to the recipe's folder or URL if it exists there, else as written."""
        if is_url(path) or beside is None:
            return path
        if is_url(beside):
            at = joined(str(beside), path)
            return at if is_url(at) and Store(at).list() else path
        first = beside_recipe(path, Path(beside))
        if first != Path(path) and Path(path).exists() and not first.samefile(path):
            what = f"is both beside the recipe ({first}) and in the working directory; the first is read"
            self.warnings.append(Problem("PATHS", path, what, "write an absolute path if that is not meant"))
        return str(first if first.exists() else path)  # a name on the Hub stays as written

    @property
    def missing_bytes(self) -> int:
        """Bytes of weights that are only on the Hub; those in object stores are never downloaded."""
        files = {(one.commit, file.name): file.size for one in self._on_hub.values() for file in one.missing}
        return sum(files.values())

    def check_room(self, also: int, beside: Path) -> None:
        """Raise `HubError` DISK if the missing weights, and `also` bytes of output at `beside`, do not fit on the disk."""
        check_room(self._on_hub.values(), also, beside)

    @property
    def _on_hub(self) -> dict[_Place, ResolvedRepo]:
        """The repositories of the Hub whose weights are read."""
        found = {place: one for place, one in self.repos.items() if one.store is None}
        return {place: one for place, one in found.items() if not self.headers_only or place[2] == "adapter"}

    def pull(self) -> None:
        """Download all missing weights of the Hub that are read.

        Raises:
            HubError: as for `hub.download`.
        """
        hub = self._on_hub
        download(list(hub.values()))
        self.repos |= {place: replace(one, missing=()) for place, one in hub.items()}

    @contextmanager
    def opened(
        self, compute: Callable[[str, Mapping[ModelRef, Model]], Checkpoint] | None = None
    ) -> Iterator[dict[ModelRef, Model]]:
        """Open every model, each checkpoint once; weights that are only on the Hub are read from there.

        Args:
            compute: returns the checkpoint of a computed model, from the models that are already open.

        Raises:
            PaftMergeError: all problems of all models.
        """
        problems, models, errors = Problems(), dict[ModelRef, Model](), dict(self.errors)
        checkpoints: dict[Path | str, Checkpoint | None] = {}
        """By folder or computed name; None for one that failed to open, which is reported once."""

        def checkpoint_of(ref: ModelRef, repo: ResolvedRepo | None, remote: Remote) -> Checkpoint | None:
            key = repo.folder.resolve() if repo else ref.path
            if key not in checkpoints:
                checkpoints[key] = None
                if repo:
                    with named_by_url(repo):
                        opened = Checkpoint.open(repo.folder, unpickle=self.unpickle, far=remote.files(repo))
                    opened.listing = repo.listing
                    checkpoints[key] = dequantized(opened)
                else:
                    assert compute is not None
                    checkpoints[key] = compute(ref.path, models)
            return checkpoints[key]

        with Remote.open(list(self.repos.values())) as remote:
            try:
                names: Names | None = None
                if self.template and (repo := self.repos.get(self.places(self.template)[0])):
                    with problems.catching(self.spots.get(self.template, "")):
                        template = checkpoint_of(self.template, repo, remote)
                        names = Names(template, str(self.template.base)) if template else None
                for ref in self.refs:
                    with problems.catching(self.spots.get(ref, "")):
                        places, computed = self.places(ref), ref.path in self.computed
                        if lost := [p for at in places if at in errors for p in errors.pop(at).problems]:
                            raise PaftMergeError(lost)
                        repos = [self.repos[at] for at in places if at in self.repos]
                        if len(repos) < len(places) or (computed and problems.found):
                            continue
                        checkpoint = checkpoint_of(ref, None if computed else repos[0], remote)
                        adapters = repos if computed else repos[1:]
                        if checkpoint is not None:
                            checkpoint = names.of(checkpoint, str(ref.base)) if names else checkpoint
                            models[ref] = Model(str(ref), checkpoint, self._adapter(checkpoint, adapters, remote))
                problems.raise_as(PaftMergeError)
                yield models
            finally:
                for opened in filter(None, checkpoints.values()):
                    opened.close()
                for model in models.values():
                    model.close()

    def _adapter(self, base: Checkpoint, repos: Sequence[ResolvedRepo], remote: Remote) -> Adapter | None:
        """Open the adapters of a reference as one; None if it has none."""
        with ExitStack() as on_failure:
            parts = []
            for repo in repos:
                with named_by_url(repo):
                    opened = Adapter.open(repo.folder, base, remote.files(repo), unpickle=self.unpickle)
                opened.file.listing = repo.listing
                parts.append(on_failure.enter_context(opened))
            found = AdapterStack.of(parts) if parts else None
            on_failure.pop_all()
        return found

    def places(self, ref: ModelRef) -> list[_Place]:
        """Return the places of a reference: its model, unless that is computed, and its adapters."""
        model: list[_Place] = [] if ref.path in self.computed else [(ref.path, ref.revision, "model")]
        return [*model, *((path, revision, "adapter") for path, revision in ref.adapters)]
