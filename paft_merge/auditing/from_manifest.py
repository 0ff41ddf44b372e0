"""The audit that a merge recorded in its manifest, read without computing anything again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from paft_merge.auditing.header_only_base import natural
from paft_merge.auditing.opening import Header
from paft_merge.auditing.preview import Preview, PreviewTensor, Survived
from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.results import PairAudit, PairTensor, SourceAudit, TensorAudit
from paft_merge.compute.magnitudes import EPSILON
from paft_merge.errors import AuditError, reading
from paft_merge.inputs.source_labels import labels_of
from paft_merge.output.manifest import MANIFEST
from paft_merge.stats.pairs import PairMeasure
from paft_merge.stats.record import DENSITY, RecordedTensor, shape_of


def recorded(manifest: Mapping[str, Any]) -> Audit | None:
    """The audit in a `merge_manifest.json`; None when no tensor had deltas.

    Its `sampled` is the share of the entries in the sample from which some numbers are estimated.

    Raises:
        AuditError: MANIFEST, its statistics are damaged.
    """
    with reading(MANIFEST, "MANIFEST", AuditError, "merge again"):
        return _recorded(manifest)


def _recorded(manifest: Mapping[str, Any]) -> Audit | None:
    held = {
        entry.get("delta_of", name): (entry, tensor)
        for name, entry in sorted(manifest["tensors"].items(), key=lambda item: natural(item[0]))
        if (tensor := RecordedTensor.of(entry))
    }
    changing = {ref for _, tensor in held.values() for ref in tensor.sources}
    refs = [row["source"] for row in manifest["totals"] if row["source"] in changing]
    if not refs:
        return None
    labels = dict(zip(refs, labels_of(refs), strict=True))
    sources = tuple(_source(ref, labels[ref], held) for ref in refs)
    pairs = tuple(_pair(a, b, labels, held) for a, b in combinations(refs, 2) if _were_compared(a, b, held))
    previewed = tuple(_kept(name, entry, tensor, labels) for name, (entry, tensor) in held.items())
    entries = sum(math.prod(shape_of(entry)) for entry, _ in held.values())
    return Audit(
        sources, pairs, Preview(manifest["recipe"]["merge_method"], {}, previewed), manifest["donor"], EPSILON, DENSITY, (), (),
        sampled=sum(tensor.sampled for _, tensor in held.values()) / entries,
    )  # fmt: skip


Held = Mapping[str, tuple[Mapping[str, Any], RecordedTensor]]


def _source(ref: str, label: str, held: Held) -> SourceAudit:
    tensors = []
    for name, (entry, tensor) in held.items():
        if found := tensor.sources.get(ref):
            spectrum = found.spectra[0] if found.spectra else None
            place = name, tensor.kinds[ref], tuple(shape_of(entry))
            tensors.append(TensorAudit(*place, found.measure, spectrum, found.factors))
    return SourceAudit(Header(ref, label, _most(t.kind for t in tensors)), tuple(tensors))


def _were_compared(left: str, right: str, held: Held) -> bool:
    """Whether the pair was measured wherever both change a tensor; a merge of many sources measures no pairs."""
    return all(t.pair(left, right) for _, t in held.values() if left in t.sources and right in t.sources)


def _pair(left: str, right: str, labels: Mapping[str, str], held: Held) -> PairAudit:
    tensors = []
    for name, (_, tensor) in held.items():
        if found := tensor.pair(left, right):
            tensors.append(PairTensor(name, *found))
        elif alone := tensor.sources.get(left):
            tensors.append(PairTensor(name, PairMeasure(left_square=alone.measure.square), None))
        elif alone := tensor.sources.get(right):
            tensors.append(PairTensor(name, PairMeasure(right_square=alone.measure.square), None))
    return PairAudit(labels[left], labels[right], tuple(tensors))


def _kept(name: str, entry: Mapping[str, Any], tensor: RecordedTensor, labels: Mapping[str, str]) -> PreviewTensor:
    """The entries and energy of each source that the merge kept; the norm of the merged delta is not recorded."""
    kept, entries = {}, math.prod(shape_of(entry))
    for row in entry["sources"]:
        if row["source"] in tensor.sources:
            square = row["l2"] ** 2
            energies = square, row["kept_energy"] * square, row["elected_energy"] * square
            kept[labels[row["source"]]] = Survived(entries, row["kept"], row["elected"], *energies)
    return PreviewTensor(name, kept, 0.0, 0.0)


def _most(kinds: Iterable[str]) -> str:
    """The most frequent kind."""
    held = list(kinds)
    return max(dict.fromkeys(held), key=held.count)
