"""Models, adapters and recipes at a URL: read by ranges, equal to local ones, and every way in which a store fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toys.merge import files_of, on, recipe
from toys.object_store import S3, s3, server

import paft_merge

__all__ = ["s3", "server"]

Family = Callable[..., dict[str, Path]]


def ties(place: str) -> dict[str, object]:
    """A merge of a fine-tune and an adapter, whose folders are in `place`."""
    sources = [(ref, {"weight": 0.5, "density": 0.5}) for ref in (f"{place}/x", on(f"{place}/base", f"{place}/sft"))]
    return recipe("ties", f"{place}/base", *sources)


@pytest.fixture
def models(s3: S3, family: Family, tmp_path: Path) -> S3:
    """A base in three files, a fine-tune and an adapter in the bucket."""
    for name, folder in family(shards=3).items():
        s3.put("bkt", folder, f"m/{name}/")
    s3.seen.clear()
    return s3


def weights(folder: Path) -> dict[str, bytes]:
    return {n: c for n, c in files_of(folder).items() if n.endswith((".safetensors", "config.json", "index.json"))}


def test_a_merge_of_models_in_a_bucket_is_that_of_local_ones(models: S3, tmp_path: Path) -> None:
    local = paft_merge.merge(ties(str(tmp_path)), tmp_path / "local")
    far = paft_merge.merge(ties("s3://bkt/m"), tmp_path / "far")
    assert weights(far.path) == weights(local.path)
    etags = [file["etag"] for file in far.manifest["inputs"]["s3://bkt/m/base"]["checkpoint"]["files"].values()]
    assert len(etags) == 3
    assert all(etags)
