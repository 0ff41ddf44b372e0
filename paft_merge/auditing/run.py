"""The main path of an audit: open the sources, survey every tensor, and collect the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from paft_merge.auditing.opening import AuditedTensor, Opened, Skipped, Source, open_sources
from paft_merge.auditing.preview import Preview, PreviewTensor, Proposal, rules_for
from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.report.gate import epsilons_of
from paft_merge.auditing.results import PairAudit, PairTensor, SourceAudit, TensorAudit
from paft_merge.auditing.tensor_survey import TensorStats, Wanted, survey
from paft_merge.auditing.walk import Arena, HeldDeltas, working_pools
from paft_merge.compute.magnitudes import EPSILON, EPSILONS
from paft_merge.errors import AuditError, Problem, Problems
from paft_merge.inputs.links import following_links
from paft_merge.methods.rules.rule import Rule
from paft_merge.stats.pairs import PairMeasure

HELD_BYTES = 512 << 20
"""Memory for the deltas of one tensor; larger ones are recomputed for each walk."""


@dataclass(frozen=True)
class AuditProgress:
    """How far an audit is."""

    tensors: int
    tensors_total: int
    entries_done: int
    entries_total: int
    name: str


def audit(
    *sources: Source,
    base: Path | str | None = None,
    preview: Proposal | str | Mapping[str, Any] | None = "ties",
    epsilon: float = EPSILON,
    epsilons: Sequence[float] = (),
    density: float = 0.2,
    require: str | Sequence[str] = (),
    fetch_base: bool = False,
    lazy_unpickle: bool = False,
    follow_links: bool = False,
    threads: int | None = None,
    held_bytes: int = HELD_BYTES,
    progress: Callable[[AuditProgress], None] = lambda _: None,
) -> Audit:
    """Audit adapters, fine-tuned checkpoints, or the sources of a recipe: how sparse they are, and how they will merge.

    Args:
        sources: folders or Hub names of adapters and checkpoints, `base+adapter`, or one recipe (file, mapping, text).
        base: the model that the sources change. Optional for adapters: metrics that need its weights are then left out.
        preview: what to preview for several sources: a method's name, `{"method": ..., parameter: ...}`, a `Proposal`, or
            None for nothing. A recipe brings its own. The default is TIES at density 0.2.
        epsilon: threshold of PAFT's sparsity, and of `conflict_above`.
        epsilons: further thresholds to count.
        density: share of the largest entries whose overlap is compared, in (0, 1].
        require: requirements whose thresholds are to be counted, for a later `Audit.check`.
        fetch_base: fetch the weights of a base that is on the Hub only. By default only the headers of the base of adapters
            are read, and metrics that need its weights are left out.
        lazy_unpickle: read `.bin` files through a reader that runs no code of them.
        follow_links: follow links of the folders to files outside of them.
        threads: blocks computed at a time; all cores by default. Does not change the counts.
        held_bytes: memory for the deltas of one tensor; larger ones are recomputed for each walk.
        progress: called after each tensor.

    Returns:
        Every number, typed. `print` shows a few lines, a notebook a short report.

    Raises:
        AuditError: NO_BASE, EMPTY, OPTION, PREVIEW, GATE, NONFINITE; with every problem that is found at once.
        PaftMergeError: a source cannot be opened.
    """
    if not sources:
        raise TypeError("audit() needs at least one source")
    require = [require] if isinstance(require, str) else require
    problems = Problems()
    for name, value in [("epsilon", epsilon), *(("epsilons", one) for one in epsilons)]:
        if not 0 <= value < math.inf:
            problems.add("OPTION", name, f"must be finite and at least 0, got {value:g}")
    if not 0 < density <= 1:
        problems.add("OPTION", "density", f"must be above 0 and at most 1, got {density:g}")
    problems.raise_as(AuditError)
    proposal = _proposal(preview)
    counted = tuple(sorted({*EPSILONS, epsilon, *epsilons, *epsilons_of(require)}))
    with (
        following_links(follow_links),
        open_sources(sources, base, fetch_base=fetch_base, lazy_unpickle=lazy_unpickle) as opened,
        working_pools(threads, torch_too=_uses_torch(opened.subjects)) as (pool, tensors),
    ):
        several = len(opened.headers) > 1
        wanted = Wanted(epsilon, counted, opened.weights, several, density)
        arena = Arena(opened.subjects, held_bytes)
        rules = rules_for(opened.subjects, proposal if several else None, pool)
        if several and proposal and opened.recipe is None and rules and not any(rules):
            opened = replace(opened, warnings=(*opened.warnings, _no_preview(proposal.method)))

        def measure(subject: AuditedTensor, rule: Rule | None) -> TensorStats:
            subject = replace(subject, rule=rule or subject.rule)  # its blocks are whole rows of the rule
            with arena.opened(subject):
                return survey(subject, HeldDeltas(subject, pool, arena), wanted, rule)

        found, total, done = list[TensorStats](), sum(s.numel for s in opened.subjects), 0
        # While one tensor waits for its last block, or for its thresholds, the blocks of others are computed.
        for subject, stats in zip(opened.subjects, tensors.map(measure, opened.subjects, rules), strict=True):
            found.append(stats)
            done += subject.numel
            progress(AuditProgress(len(found), len(opened.subjects), done, total, subject.name))
        return _results(opened, found, wanted, proposal)


def _uses_torch(subjects: Sequence[AuditedTensor]) -> bool:
    """Whether torch may compute a delta: it decomposes the weights of PiSSA and OLoRA, and PEFT's own layers need it."""
    deltas = [read.delta for subject in subjects for read in subject.inputs.reads if read.delta]
    return any(delta.needs_weight or {"pissa", "olora"} & {*delta.kind.split("+")} for delta in deltas)


def _proposal(preview: Proposal | str | Mapping[str, Any] | None) -> Proposal | None:
    if preview is None or isinstance(preview, Proposal):
        return preview
    if isinstance(preview, str):
        return Proposal(preview)
    given = dict(preview)
    return Proposal(given.pop("method", "ties"), given)


def _results(opened: Opened, found: Sequence[TensorStats], wanted: Wanted, proposal: Proposal | None) -> Audit:
    labels = {h.source: h.label for h in opened.headers}
    held = list(zip(opened.subjects, found, strict=True))
    sources = tuple(SourceAudit(h, tuple(_tensors(h.source, held))) for h in opened.headers)
    pairs = tuple(_pair(a.source, b.source, labels, held) for a, b in combinations(opened.headers, 2))
    return Audit(
        sources, pairs, _preview(opened, held, labels, proposal), opened.base, wanted.epsilon, wanted.density,
        (*opened.skipped, *_no_spectrum(sources)),
        (*opened.warnings, *_other_records(sources)),
    )  # fmt: skip


def _no_preview(method: str) -> Problem:
    """The warning for a method that uses every entry."""
    what, fix = "neither trims nor elects, so there is nothing to preview", "preview a method that does, such as ties"
    return Problem("PREVIEW", method, what, fix)


def _no_spectrum(sources: Sequence[SourceAudit]) -> list[Skipped]:
    """Tensors of fused experts, which hold a product for each expert and have no low rank as a whole."""
    fused = {s.label: tuple(t.name for t in s.tensors if t.kind == "experts" and not t.spectrum) for s in sources}
    why = "each expert is a separate product, so spectrum and common subspace are left out; all else is measured"
    return [Skipped(label, names, why) for label, names in fused.items() if names]


TRAINED_KINDS = ("lora", "shira")
"""Kinds of deltas that the record of a training covers."""


def _other_records(sources: Sequence[SourceAudit]) -> list[Problem]:
    """A warning for each training record that does not belong to the adapter beside it."""
    found = []
    for source in sources:
        trained = source.header.details.get("trained")
        norm = math.sqrt(math.fsum(t.measure.square for t in source.tensors if t.kind in TRAINED_KINDS))
        if trained and abs(norm - trained["norm"]) > 0.01 * max(norm, trained["norm"]):
            what = f"paft_train.json says that the delta's norm is {trained['norm']:.4g}; it is {norm:.4g}"
            fix = "the record is of another adapter, or this one has changed since"
            found.append(Problem("TRAIN_RECORD", source.label, what, fix))
    return found


Held = Sequence[tuple[AuditedTensor, TensorStats]]


def _row(subject: AuditedTensor, source: str) -> int | None:
    """Index of `source` among those that change the tensor; None where it does not."""
    return next((i for i in subject.inputs.active if subject.inputs.sources[i].source == source), None)


def _tensors(source: str, held: Held) -> list[TensorAudit]:
    audits = []
    for subject, seen in held:
        row = _row(subject, source)
        if row is None:
            continue
        delta, decomposed = subject.inputs.sources[row].delta, seen.spectra.get(row, (None, None))
        kind = delta.kind if delta else "checkpoint"
        audits.append(TensorAudit(subject.name, kind, subject.shape, seen.measures[row], *decomposed))
    return audits


def _pair(left: str, right: str, labels: Mapping[str, str], held: Held) -> PairAudit:
    tensors = []
    for subject, seen in held:
        a, b = _row(subject, left), _row(subject, right)
        if a is None and b is None:
            continue
        if a is None or b is None:
            square = seen.measures[b if a is None else a].square  # type: ignore[index]
            alone = PairMeasure(left_square=square) if b is None else PairMeasure(right_square=square)
            tensors.append(PairTensor(subject.name, alone, None))
            continue
        tensors.append(PairTensor(subject.name, seen.pairs[a, b], seen.subspaces.get((a, b))))
    return PairAudit(labels[left], labels[right], tuple(tensors))


def _preview(opened: Opened, held: Held, labels: Mapping[str, str], proposal: Proposal | None) -> Preview | None:
    tensors = []
    for subject, seen in held:
        if seen.survived:
            kept = {labels[subject.inputs.sources[i].source]: s for i, s in seen.survived.items()}
            tensors.append(PreviewTensor(subject.name, kept, seen.merged_square, seen.sum_square))
    if not tensors:
        return None
    if opened.recipe is not None:
        return Preview(opened.recipe.merge_method, {}, tuple(tensors))
    assert proposal is not None
    return Preview(proposal.method, proposal.parameters, tuple(tensors))
