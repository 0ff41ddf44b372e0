"""The output of a merge in an object store: each file is written in a folder of scratch, uploaded, and then deleted there.

The folder counts as finished by its manifest, which is uploaded last. Until then `merge_state.json` names the merge, and
`.paft.part/` has a record of every uploaded file: its size, its tag, and the statistics of its tensors. So a merge that was
killed resumes anywhere: a file that the store still has as its record says is not merged again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from paft_merge.errors import OutputError, Problem, Problems, StoreError
from paft_merge.inputs.weight_files import INSIDE, UNFINISHED
from paft_merge.output.folder import Finished, Output, check_identity, index_name
from paft_merge.output.manifest import MANIFEST
from paft_merge.output.placing import LOCK, held, remove_entries, write_durably, writing
from paft_merge.output.shards import START_OVER, Shard, index_of, index_text
from paft_merge.stores import Found, Store, inside

_CARD = "README.md"
_LAST = ("config.json", "model_index.json")
"""Files without which readers do not load a folder."""
_FORCE = "choose another folder, or pass force=True too to delete all of it"


@dataclass(frozen=True)
class Content:
    """What the folder of a merge holds before it."""

    files: Mapping[str, Found]
    state: Mapping[str, Any] = field(default_factory=dict)
    """`merge_state.json` of an unfinished merge; {} without one."""
    written: frozenset[str] = frozenset()
    """The files that merges left, by their manifest, index or state."""

    @classmethod
    def of(cls, store: Store) -> Content:
        """List a folder, and read its manifest, its index and its state, if it has them.

        Raises:
            StoreError: the store cannot be read.
        """
        files = store.list()
        state = _json_of(store, UNFINISHED) if UNFINISHED in files else {}
        identity = state.get("identity")
        named = [
            identity.get("files") if isinstance(identity, dict) else (),
            state.get("beside"),
            state.get("replaces"),
        ]
        written = {name for names in named for name in _names(names)}
        written |= {name for name in files if name.startswith(f"{INSIDE}/")}
        if MANIFEST in files:
            manifest = _json_of(store, MANIFEST)
            written |= {*_names(manifest.get("files")), MANIFEST, _CARD}
            written |= _weights(store, files, manifest)
        return cls(files, state, frozenset(written & files.keys()) | ({UNFINISHED} & files.keys()))

    @property
    def is_finished(self) -> bool:
        """Whether it is a finished merge."""
        return MANIFEST in self.files

    def check(self, where: str, *, overwrite: bool, force: bool, problems: Problems) -> None:
        """Add to `problems` why a merge cannot be written there; see `check_place`."""
        foreign = sorted(self.files.keys() - self.written)
        if not self.files or (not self.is_finished and self.state and not foreign):
            return
        named = f"{', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}"
        if not overwrite:
            fix = "choose another folder, or pass overwrite=True to replace it"
            problems.add("OUTPUT", where, "exists and is not empty", fix)
        elif foreign and not force:
            problems.add("OUTPUT", where, f"holds {named}, which no merge left there", _FORCE)


def check_stored(
    store: Store, inputs: Sequence[str], needed: int, *, scratch: Path, overwrite: bool, force: bool, problems: Problems
) -> None:
    """Check that a merge can be written to a folder in a store.

    Args:
        store: the folder.
        inputs: URLs that are read; the folder may not be one of them, be inside one, or contain one.
        needed: size of the largest file, which is written to `scratch` first.
        scratch: a folder on this machine.
        overwrite, force: as for `check_place`, but only files that a merge left are deleted without `force`.
        problems: receives OUTPUT and DISK faults.
    """
    for url in dict.fromkeys(inputs):
        if inside(store.url, url) or inside(url, store.url):
            what = f"is, contains or is inside the input {url}"
            problems.add("OUTPUT", store.url, what, "choose a folder outside the inputs")
    if "/" not in store.url.partition("://")[2]:
        problems.add("OUTPUT", store.url, "is a whole bucket", "name a folder in it")
        return
    if store.url.endswith(".part"):
        problems.add("OUTPUT", store.url, "cannot be the name of a model", "choose a name that does not end in .part")
        return
    Content.of(store).check(store.url, overwrite=overwrite, force=force, problems=problems)
    if not scratch.is_dir() or not os.access(scratch, os.W_OK | os.X_OK):
        problems.add("OUTPUT", scratch, "is not a folder that can be written to", "name another one as scratch")
    elif (free := shutil.disk_usage(scratch).free) < needed:
        fix = "free some space, or name a folder on another disk as scratch"
        what = f"{needed:,} bytes are needed for one file before it is uploaded, and {free:,} are free"
        problems.add("DISK", scratch, what, fix)


class StoredOutput:
    """The unfinished output of one merge in a store: `with StoredOutput.open(...) as output: ...; output.complete(...)`.

    Attributes:
        store: the folder.
        scratch: the folder on this machine.
        shards: the files of weights.
        identity: of the merge.
        finished: finished tensors by name.
    """

    def __init__(
        self,
        store: Store,
        scratch: Path,
        shards: Sequence[Shard],
        identity: Mapping[str, Any],
        uploads: ThreadPoolExecutor,
    ) -> None:
        self.store, self.scratch, self.shards, self.identity = store, scratch, tuple(shards), identity
        self.finished = dict[str, Finished]()
        self._sent = dict[str, Found]()
        self._run = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._uploads, self._waiting = uploads, list[tuple[int, Future[None]]]()
        self._replaces: list[str] = []

    @classmethod
    @contextmanager
    def open(
        cls,
        store: Store,
        shards: Sequence[Shard],
        identity: Mapping[str, Any],
        *,
        scratch: Path,
        resume: bool,
        force: bool,
    ) -> Iterator[StoredOutput]:
        """Begin the output, or resume it, and hold a folder of scratch; `check_stored` has found no fault.

        Args:
            store: the folder.
            shards: its files, from `plan_shards`.
            identity: recipe, inputs and versions of the merge; a resumed merge must have the same.
            scratch: a folder on this machine, in which one is made that is deleted at the end.
            resume: keep the files that an unfinished merge has uploaded; otherwise start over.
            force: delete files that no merge left, too.

        Raises:
            OutputError: BUSY, another merge writes there; RESUME_STALE, names the changes; DISK, OUTPUT.
            StoreError: the store cannot be read or written.
        """
        with _held(scratch, store) as part, ThreadPoolExecutor(1) as uploads:
            output = cls(store, part, shards, json.loads(json.dumps(identity)), uploads)
            try:
                output._begin(Content.of(store), resume=resume, force=force)
                yield output
            except BaseException:
                for _, one in output._waiting:
                    one.cancel()
                raise
            finally:
                uploads.shutdown()

    @property
    def missing(self) -> list[int]:
        """The positions of the files that are not in the store yet."""
        return [number for number, shard in enumerate(self.shards) if shard.file not in self._sent]

    @contextmanager
    def file(self, number: int) -> Iterator[Output]:
        """Create the file `number` in the scratch, to be merged into, as soon as there is room; upload it after the block."""
        shard = self.shards[number]
        self._wait_for_room(shard.size)
        folder = self.scratch / f"{number:05d}"
        folder.mkdir()
        with Output.file(folder, folder, shard, self.identity) as output:
            yield output
        self._waiting.append((shard.size, self._uploads.submit(self._send, folder, shard, output.finished)))

    def wait(self) -> None:
        """Wait until every file is uploaded; raises what an upload raised."""
        while self._waiting:
            self._waiting.pop(0)[1].result()

    def complete(self, files: Mapping[str, bytes | Path], *, overwrite: bool) -> None:
        """Upload index and side files, and the manifest last; check all, and remove the marks of an unfinished merge.

        Args:
            files: side files: name to content, or to a file to copy.
            overwrite: as for `Output.complete`; what is replaced was deleted when the merge began.
        """
        files = dict(files)
        if (index := index_of(self.shards)) is not None:
            files[index_name(self.shards)] = index_text(index).encode()
        self._mark(beside=sorted(files))
        manifest = files.pop(MANIFEST)
        for name in sorted(files, key=lambda name: (name in _LAST, name.endswith(".index.json"), name)):
            self._put(name, files[name])
        self._check()
        self._put(MANIFEST, manifest)
        tidy(self.store)

    def _begin(self, content: Content, *, resume: bool, force: bool) -> None:
        """Keep what the unfinished merge has uploaded, mark the folder, and delete what it replaces."""
        begun = content.state.get("identity")
        if resume and begun is not None and not content.is_finished:
            check_identity(self.store.url, begun, self.identity, START_OVER)
            self._keep(content)
        keep = {*self._sent, *(f"{INSIDE}/{name}.json" for name in self._sent), UNFINISHED}
        self._replaces = [name for name in (content.files if force else content.written) if name not in keep]
        self._mark(exclusive=UNFINISHED not in content.files)
        # The manifest first: without it, no half of a model looks whole. Then what readers need.
        order = sorted(
            self._replaces, key=lambda name: (name != MANIFEST, name not in _LAST, not name.endswith(".json"), name)
        )
        self.store.delete(order)

    def _keep(self, content: Content) -> None:
        """Take over the files that the store has as their records say."""
        for shard in self.shards:
            record, there = f"{INSIDE}/{shard.file}.json", content.files.get(shard.file)
            if record not in content.files or there is None:
                continue
            try:
                first, *lines = self.store.read(record).decode().splitlines()
                sent = json.loads(first)
                finished = [Finished.from_json(json.loads(line)) for line in lines]
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            known = (
                isinstance(sent, dict)
                and (sent.get("size"), sent.get("etag")) == (there.size, there.etag)
                and there.size == shard.size
            )
            if (
                known
                and sent.get("version") in (there.version, "")
                and {one.name for one in finished} == {s.name for s in shard.slots}
            ):
                self._sent[shard.file] = there
                self.finished |= {one.name: one for one in finished}

    def _mark(self, *, beside: Sequence[str] = (), exclusive: bool = False) -> None:
        """Write `merge_state.json`, which shows that the folder is unfinished, and whose it is."""
        state = {"identity": self.identity, "run": self._run, "replaces": self._replaces, "beside": list(beside)}
        try:
            self.store.write(UNFINISHED, json.dumps(state).encode() + b"\n", exclusive=exclusive)
        except StoreError as error:
            if error.problems[0].code != "STORE_EXISTS":
                raise
            self._check_run()  # a request whose answer was lost is sent twice

    def _check_run(self) -> None:
        """Raise BUSY if another merge has begun to write to the folder since this one."""
        run = _json_of(self.store, UNFINISHED).get("run")
        if run != self._run:
            who = f"{run.rpartition(':')[0]} writes there" if isinstance(run, str) else "its merge_state.json is gone"
            fix = "wait for it, or choose another folder"
            raise OutputError.of("BUSY", self.store.url, f"another merge has begun since this one: {who}", fix)

    def _send(self, folder: Path, shard: Shard, finished: Mapping[str, Finished]) -> None:
        """Upload one file and its record, and delete it here."""
        self._check_run()
        sent = self.store.upload(shard.file, folder / shard.file)
        first = {"size": sent.size, "etag": sent.etag, "version": "" if sent.etag else self._version(shard.file)}
        record = json.dumps(first).encode() + b"\n" + b"".join(one.line() for one in finished.values())
        self.store.write(f"{INSIDE}/{shard.file}.json", record)
        self._sent[shard.file] = sent
        self.finished |= finished
        shutil.rmtree(folder)

    def _version(self, name: str) -> str:
        found = self.store.list().get(name)
        return found.version if found else ""

    def _wait_for_room(self, needed: int) -> None:
        """Wait for uploads until the next file fits beside those that wait; at most one waits."""
        with writing(self.scratch):
            while self._waiting and (len(self._waiting) > 1 or shutil.disk_usage(self.scratch).free < needed):
                self._waiting.pop(0)[1].result()
        for _, one in self._waiting:
            if one.done():
                one.result()

    def _put(self, name: str, content: bytes | Path) -> None:
        """Upload a side file."""
        made = self.scratch / PurePosixPath(name).name
        with writing(self.scratch):
            write_durably(made, content)
        self._sent[name] = self.store.upload(name, made)
        made.unlink()

    def _check(self) -> None:
        """Check, before the manifest is written, that the store has every file as it was sent, and that none but this merge wrote."""
        self._check_run()
        now = self.store.list()
        for name, sent in self._sent.items():
            there = now.get(name)
            if there is None or (there.size, there.etag) != (sent.size, sent.etag):
                what = f"{name} was {'deleted' if there is None else 'replaced'} since it was uploaded"
                fix = "run again with resume=True, when no other process writes there"
                raise OutputError([Problem("OUTPUT", self.store.url, what, fix)])


def tidy(store: Store, scratch: Path | None = None) -> None:
    """Remove from a finished merge the marks of an unfinished one; with `scratch` also what a killed process left there."""
    marks = [name for name in store.list() if name.startswith(f"{INSIDE}/") or name == UNFINISHED]
    store.delete(marks)
    if scratch is not None and _part(scratch, store).is_dir():
        with _held(scratch, store):
            pass


def _part(scratch: Path, store: Store) -> Path:
    return scratch.resolve() / f"paft-{xxhash.xxh3_64_hexdigest(store.url.encode())}.part"


@contextmanager
def _held(scratch: Path, store: Store) -> Iterator[Path]:
    """The empty folder in `scratch` for an output, locked, and removed at the end. It has a fixed name, so that killed merges leave one."""
    part = _part(scratch, store)
    with held(part, part.with_suffix("")):
        with writing(part):
            remove_entries(part, keep=[LOCK])
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _json_of(store: Store, name: str) -> dict[str, Any]:
    """A JSON object in a file of the store; {} for anything else."""
    try:
        found = json.loads(store.read(name))
    except ValueError:
        return {}
    except StoreError as error:
        if error.problems[0].code != "STORE_NOT_FOUND":
            raise
        return {}
    return found if isinstance(found, dict) else {}


def _weights(store: Store, files: Collection[str], manifest: Mapping[str, Any]) -> set[str]:
    """The files of weights of a finished merge: those of its index, else the only one; and those of its modules."""
    found = set[str]()
    for index in (name for name in files if name.endswith(".safetensors.index.json") and "/" not in name):
        weight_map = _json_of(store, index).get("weight_map")
        found |= {index, *_names(list(weight_map.values()) if isinstance(weight_map, dict) else ())}
    alone = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    folders = {name.rpartition("/")[0] for name in _names(manifest.get("tensors")) if "/" in name}
    inner = {name for name in files if name.endswith(".safetensors") and name.rpartition("/")[0] in folders}
    return (found or {*alone[: len(alone) == 1]}) | inner


def _names(found: Any) -> list[str]:
    """The texts in a list, or the keys of a mapping; the JSON may come from anybody."""
    return [name for name in found if isinstance(name, str)] if isinstance(found, dict | list) else []


def default_scratch() -> Path:
    """The folder of temporary files, as TMPDIR says."""
    return Path(tempfile.gettempdir())
