"""What the numbers of an audit mean, in plain words: each line with its number and the page that explains it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from paft_merge.auditing.results import Advice, AuditData, PairAudit, SourceAudit
from paft_merge.engine.imbalance import FOLD

PAGE = "docs/audit.md"

DENSE, SPARSE = 0.5, 0.9
"""Below the first a delta is called dense, from the second on sparse (PAFT's sparse adapters have over 0.9)."""
HARSH = 0.25
"""A share of energy that is worth a warning when trimming or election takes it."""
STEEP = 1.3
"""How fast sparsity follows the L1 strength: logit(sparsity) against log(strength), measured on toys (1.2 to 1.4)."""
ERASED = 0.5
"""A share of entries below bfloat16's resolution that is worth a warning."""


def advise(audit: AuditData) -> tuple[Advice, ...]:
    """All advice for an audit, source by source, then pairs, then the preview."""
    lines = [a for source in audit.sources if source.tensors for a in _of_source(audit, source)]
    lines += [a for pair in audit.pairs for a in _of_pair(audit, pair)]
    return (*lines, *_of_preview(audit))


def _of_source(audit: AuditData, source: SourceAudit) -> Iterator[Advice]:
    measure, label, epsilon = source.total.measure, source.label, audit.epsilon
    if not measure.square:
        yield Advice(
            "warn",
            f"The {label} delta is zero everywhere: merging it changes nothing. Was it trained, and saved?",
            "norm",
            0.0,
            f"{PAGE}#zero",
        )
        return
    yield _density(source, epsilon)
    erased = measure.bf16_sparsity
    if erased is None:
        yield Advice(
            "note", f"The weights beneath {label} are not known here, so what a cast to bfloat16 would erase is not measured: pass "
            f"{'--base' if audit.base is None else '--fetch-base'}.",
            "rms", measure.rms, f"{PAGE}#bf16",
        )  # fmt: skip
    elif erased - measure.zero_share >= ERASED:
        yield Advice(
            "warn", f"{erased:.0%} of the {label} delta is below bfloat16's resolution at these weights: write float32, use stochastic rounding, "
            "or keep it as an adapter.", "bf16_sparsity", erased, f"{PAGE}#bf16",
        )  # fmt: skip
    factors = source.total.factors
    if factors and factors.zero_components:
        share = factors.zero_components / factors.components
        yield Advice(
            "good" if share < 0.9 else "warn",
            f"{share:.0%} of {label}'s rank components are idle ({factors.zero_components:,} of {factors.components:,}): a lower r would hold the same delta.",
            "zero_components", share, f"{PAGE}#factors",
        )  # fmt: skip


def _density(source: SourceAudit, epsilon: float) -> Advice:
    """How sparse a source is, and what TIES at density 0.2 would take from it."""
    sparsity, measure, label = source.paft_sparsity(epsilon), source.total.measure, source.label
    lost = 1 - measure.top_energy(0.2)
    number = f"sparsity({epsilon:g})"
    if sparsity >= SPARSE:
        text = f"The {label} delta is sparse ({sparsity:.0%} below {epsilon:g}): its {measure.density_for(0.99):.1%} largest entries hold 99 % of its energy."
        return Advice("good", text, number, sparsity, f"{PAGE}#sparsity")
    if lost < HARSH:
        return Advice(
            "note", f"{sparsity:.0%} of the {label} delta is below {epsilon:g}; TIES at density 0.2 will drop {lost:.0%} of its energy.",
            number, sparsity, f"{PAGE}#sparsity",
        )  # fmt: skip
    kind = "dense" if sparsity < DENSE else "half sparse"
    return Advice(
        "warn", f"The {label} delta is {kind} ({sparsity:.0%} below {epsilon:g}); TIES at density 0.2 will drop {lost:.0%} of its energy: "
        f"{_train_sparser(source, sparsity)}, or use l1_ties.", number, sparsity, f"{PAGE}#sparsity",
    )  # fmt: skip


def _train_sparser(source: SourceAudit, sparsity: float) -> str:
    """What to ask of the next training, by what the last one was asked for."""
    trained, wanted = source.header.details.get("trained"), f"l1: {{target: {SPARSE:g}}}"
    l1 = trained["l1"] if trained else None
    if not l1 or not l1["strength"]:
        how = "it was trained without; add" if trained else "train with"
        return f"{how} {wanted}, which finds the l1.strength"
    if not 0 < sparsity < 1:
        return f"it was trained with l1.strength {l1['strength']:.2g}; train with {wanted}, which finds another"
    apart = math.log(SPARSE / (1 - SPARSE)) - math.log(sparsity / (1 - sparsity))
    more = l1["strength"] * math.exp(apart / STEEP)
    return f"it was trained with l1.strength {l1['strength']:.2g}; train with about {more:.2g}, or {wanted}, which finds it"


def _of_pair(audit: AuditData, pair: PairAudit) -> Iterator[Advice]:
    total, names = pair.total, f"{pair.left} and {pair.right}"
    if total.size_ratio > FOLD:
        norms = sorted(((math.sqrt(total.left_square), pair.left), (math.sqrt(total.right_square), pair.right)))
        (least, small), (most, large) = norms
        yield Advice(
            "warn", f"The {large} delta is {total.size_ratio:.0f} times as large as that of {small} (norms {most:.3g} and {least:.3g}): with equal "
            f"weights {large} decides the merge nearly alone; give {small} up to {total.size_ratio:.0f} times the weight.",
            "size_ratio", total.size_ratio, f"{PAGE}#scale",
        )  # fmt: skip
    if not total.both:
        yield Advice(
            "good",
            f"{names} change no entry in common: merging them loses nothing, and no sign needs electing.",
            "conflict",
            0.0,
            f"{PAGE}#conflict",
        )
        return
    weighted, raw = total.conflict_weighted, total.conflict
    if weighted >= 0.45:
        yield Advice(
            "note" if weighted <= 0.55 else "warn",
            f"The signs of {names} differ on {raw:.0%} of the entries ({weighted:.0%} by magnitude), which is chance: an election drops "
            "entries that do not oppose each other on purpose; try elect: none, or task_arithmetic beside it.",
            "conflict_weighted", weighted, f"{PAGE}#conflict",
        )  # fmt: skip
    else:
        yield Advice(
            "good" if weighted < 0.25 else "note",
            f"The signs of {names} differ on {raw:.0%} of the entries ({weighted:.0%} by magnitude), less than chance: they pull the same way, cosine {total.cosine:.2f}.",
            "conflict_weighted", weighted, f"{PAGE}#conflict",
        )  # fmt: skip
    if total.kept_either and total.overlap_chance and total.overlap > 1.5 * total.overlap_chance:
        yield Advice(
            "note", f"The largest {audit.density:.0%} of {names} overlap {total.overlap / total.overlap_chance:.1f} times as much as chance: they work on the same weights.",
            "overlap_excess", total.overlap / total.overlap_chance, f"{PAGE}#overlap",
        )  # fmt: skip


def _of_preview(audit: AuditData) -> Iterator[Advice]:
    if audit.preview is None:
        return
    for source in audit.sources:
        if not any(source.label in t.sources for t in audit.preview.tensors):
            continue
        left = audit.preview.of(source.label)
        lost = 1 - left.elected_energy
        if not left.square or lost < HARSH:
            continue
        yield Advice(
            "warn", f"{audit.preview.method} {'as previewed keeps' if audit.sampled is None else 'kept'} {left.elected_energy:.0%} of the energy of {source.label}: trimming takes "
            f"{1 - left.kept_energy:.0%}, the election {max(left.kept_energy - left.elected_energy, 0):.0%}.",
            "elected_energy", left.elected_energy, f"{PAGE}#preview",
        )  # fmt: skip
