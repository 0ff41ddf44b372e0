"""The numbers of an audit as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from paft_merge.auditing.preview import Survived
from paft_merge.auditing.results import AuditData, Group
from paft_merge.stats.pairs import PairMeasure

_PLACE = ("source", "other", "scope", "key")
_SURVIVED = {"kept": "kept_share", "kept_energy": "kept_energy", "elected_energy": "elected_energy"}


def csv_text(audit: AuditData) -> str:
    """One row for each source, layer, kind of module and tensor, and the same for each pair (with `other` filled).

    Columns are the union of all metrics, named as in a gate; a cell is empty where its metric has no value.
    """
    rows = list(_rows(audit))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: v for k, v in row.items() if v is not None and v == v} for row in rows)
    return text.getvalue()


def _rows(audit: AuditData) -> Iterator[dict[str, Any]]:
    for source in audit.sources:
        groups = [("all", "", source.total)] if source.tensors else []
        groups += [("layer", str(k), g) for k, g in source.layers.items()]
        groups += [("module", k, g) for k, g in source.modules.items()]
        groups += [("tensor", t.name, Group(t.name, (t,))) for t in source.tensors]
        survived = (
            {t.name: t.sources[source.label] for t in audit.preview.tensors if source.label in t.sources}
            if audit.preview
            else {}
        )
        for scope, key, group in groups:
            held = [survived[t.name] for t in group.tensors if t.name in survived]
            place = dict(zip(_PLACE, (source.label, "", scope, key), strict=True))
            yield place | _metrics(group, Survived.total(held) if held else None)
    for pair in audit.pairs:
        pairs = [("all", "", pair.total), *(("layer", str(k), m) for k, m in pair.layers.items())]
        pairs += [("module", k, m) for k, m in pair.modules.items()]
        pairs += [("tensor", t.name, t.measure) for t in pair.tensors]
        for scope, key, measure in pairs:
            yield dict(zip(_PLACE, (pair.left, pair.right, scope, key), strict=True)) | _pair_metrics(measure)


def _metrics(group: Group, survived: Survived | None) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in group.to_json().items():
        if isinstance(value, dict):
            flat |= {f"{name}_{key}": inner for key, inner in value.items()}
        elif name != "factors":
            flat[name] = value
    if survived is not None:
        flat |= {name: getattr(survived, attribute) for name, attribute in _SURVIVED.items()}
    return flat


def _pair_metrics(measure: PairMeasure) -> dict[str, Any]:
    flat = {k: v for k, v in measure.to_json().items() if k != "conflict_energy"}
    left, right = measure.conflict_energy
    return {**flat, "conflict_energy_left": left, "conflict_energy_right": right}
