"""`pull`: what a merge reads of a reference, downloaded before the merge."""

from __future__ import annotations

from pathlib import Path

from paft_merge.errors import StoreError
from paft_merge.hub.pulling import HF, download, fetch_file, resolve
from paft_merge.hub.run_checkpoints import checkpoints
from paft_merge.hub.wanted_files import Kind
from paft_merge.recipe import ModelRef
from paft_merge.stores import is_url, shown


def pull(reference: str, *, unpickle: bool = False) -> list[Path]:
    """Download what a merge needs of a reference into the Hub's cache, at the newest commit of a branch.

    Args:
        reference: `user/name`, `user/name/folder`, `user/name@revision`, `BASE+ADAPTER`, `user/name/checkpoint-*`,
            or a file, `hf://user/name/recipe.yaml`.
        unpickle: as for `fetch`.

    Returns:
        The folders of the models and of their adapters; or the file.

    Raises:
        HubError: as for `fetch`.
        RecipeError: the reference is invalid.
    """
    if reference.startswith(HF):
        return [fetch_file(reference, refresh=True)]
    if any(is_url(part) for part in reference.split("+")):
        what = "is in an object store, from which a merge reads what it needs"
        raise StoreError.of("STORE_URL", shown(reference), what, "merge it without pulling it")
    places = dict[tuple[str, str | None, Kind], None]()
    for ref in checkpoints(ModelRef.parse(reference), refresh=True):
        places[ref.path, ref.revision, "model" if ref.lora else "any"] = None
        places |= {(*adapter, "adapter"): None for adapter in ref.adapters}
    return download(
        [resolve(path, revision, kind=kind, unpickle=unpickle, refresh=True) for path, revision, kind in places]
    )
