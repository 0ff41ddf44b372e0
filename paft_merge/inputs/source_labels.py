"""Short names of models and adapters for tables, pictures and messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_SNAPSHOT = re.compile(r"^.*models--(?:(?P<owner>.+?)--)?(?P<name>[^/]+)/snapshots/[^/]+")


def label_of(ref: str) -> str:
    """A short name of a reference: the last part of its path, or those of its adapters, joined by `+`.

    A snapshot in the Hub's cache has the repository's name.
    """
    return _label(ref, 1)


def labels_of(refs: Sequence[str]) -> list[str]:
    """The short name of each reference, with as many parts of its path as make it unique; the whole reference if none do."""
    labels = list(refs)
    for count in range(max((ref.count("/") for ref in refs), default=0) + 1, 0, -1):
        names = [_label(ref, count) for ref in refs]
        seen = Counter(names)
        labels = [name if seen[name] == 1 else label for name, label in zip(names, labels, strict=True)]
    return labels


def _label(ref: str, count: int) -> str:
    return "+".join(_last_parts(place, count) for place in ref.split("+")[1:] or [ref])


def _last_parts(place: str, count: int) -> str:
    path = _SNAPSHOT.sub(lambda found: "/".join(filter(None, found.groups())), place.split("@")[0].rstrip("/"))
    return "/".join(path.split("/")[-count:]) or place
