"""Finished merges, in a folder or at a URL: their manifest, the comparison with it, and their card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paft_merge.errors import Problem
from paft_merge.hub.pulling import resolve
from paft_merge.hub.ranges import Remote
from paft_merge.hub.store_folders import named_by_url
from paft_merge.hub.wanted_files import ResolvedRepo
from paft_merge.output.card import CARD, write_card
from paft_merge.output.card.plot import PICTURE
from paft_merge.output.manifest import MANIFEST, ManifestCheck, read_manifest, verify
from paft_merge.stores import Store, is_url


def manifest_at(place: Path | str) -> dict[str, Any]:
    """The manifest of a finished merge; raises as `read_manifest` and `hub.resolve`."""
    found = resolve(str(place), kind="side") if is_url(place) else ResolvedRepo(Path(place), str(place))
    with named_by_url(found):
        return read_manifest(found.folder / MANIFEST)


def verify_at(
    place: Path | str,
    progress: Callable[[int, int, str], None] = lambda *_: None,
    manifest: Mapping[str, Any] | None = None,
) -> ManifestCheck:
    """Compare a finished merge with its manifest, see `verify`; one at a URL is read by ranges.

    Raises:
        PaftMergeError: as for `verify` and `hub.resolve`.
    """
    if not is_url(place):
        return verify(place, progress, manifest)
    found = resolve(str(place), kind="model")
    with Remote.open([found]) as remote, named_by_url(found):
        return verify(found.folder, progress, manifest, far=remote.files(found), where=found.where)


def write_card_at(place: Path | str, *, overwrite: bool = False) -> list[Problem]:
    """Write the card of a finished merge, see `write_card`; at a URL it is uploaded, with its picture.

    Raises:
        PaftMergeError: as for `write_card` and `hub.resolve`.
    """
    if not is_url(place):
        return write_card(Path(place), overwrite=overwrite)
    found, store = resolve(str(place), kind="side"), Store(str(place))
    folder = found.folder
    with named_by_url(found):
        notes = write_card(folder, overwrite=overwrite)
    for name in (PICTURE, CARD):
        if (folder / name).is_file():
            store.upload(name, folder / name)
    return notes
