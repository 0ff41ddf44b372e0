"""Small models in a bucket, and a merge of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys.merge import on, recipe
from toys.object_store import S3

Family = Callable[..., dict[str, Path]]


def ties(place: str) -> dict[str, Any]:
    """A merge of a fine-tune and an adapter, whose folders are in `place`."""
    sources = [(ref, {"weight": 0.5, "density": 0.5}) for ref in (f"{place}/x", on(f"{place}/base", f"{place}/sft"))]
    return recipe("ties", f"{place}/base", *sources)


@pytest.fixture
def models(s3: S3, family: Family) -> S3:
    """A base in three files, a fine-tune and an adapter in the bucket."""
    for name, folder in family(shards=3).items():
        s3.put("bkt", folder, f"m/{name}/")
    s3.seen.clear()
    return s3
