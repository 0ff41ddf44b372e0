"""What the numbers of an audit mean, in plain words: each line with its number and the page that explains it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from paft_merge.auditing.report.figures import abridged, exponent
from paft_merge.auditing.results import Advice, AuditData, PairAudit, SourceAudit
from paft_merge.engine.imbalance import FOLD
from paft_merge.errors import DOCS

PAGE = f"{DOCS}/audit.md"
L1_STUDY = f"{DOCS}/studies/paft-small-l1.md"

DENSE, SPARSE = 0.5, 0.9
"""A delta is dense below the first sparsity and sparse from the second on (PAFT's sparse adapters have over 0.9)."""
HARSH = 0.25
"""Share of the energy lost to trimming or election from which advice warns."""
LOW, HIGH = 0.45, 0.55
"""Signs that differ on this share of the magnitude differ by chance."""
STEEP = 1.3
"""Slope of logit(sparsity) against log(L1 strength), measured on toys (1.2 to 1.4)."""
ERASED = 0.5
"""Share of entries below bfloat16's resolution from which advice warns."""


def advise(audit: AuditData) -> tuple[Advice, ...]:
    """All advice for an audit, source by source, then pairs, then the preview."""
    lines = [a for source in audit.sources if source.tensors for a in _of_source(audit, source)]
    chance = [pair for pair in audit.pairs if pair.total.both and LOW <= pair.total.conflict_weighted <= HIGH]
    if several := len(chance) > 1:
        lines.append(_by_chance(f"{len(chance)} of the {len(audit.pairs)} pairs", chance))
    for pair in audit.pairs:
        lines += _of_pair(audit, pair, leave_out_chance=several)
    return (*lines, *_of_preview(audit))


def _advice(level: str, text: str, metric: str, value: float, anchor: str) -> Advice:
    return Advice(level, text, metric, value, f"{PAGE}#{anchor}")


def _name(label: str) -> str:
    return abridged(label, 40)


def _of_source(audit: AuditData, source: SourceAudit) -> Iterator[Advice]:
    measure, label = source.total.measure, _name(source.label)
    if not measure.square:
        text = f"The {label} delta is zero everywhere: merging it changes nothing. Was it trained, and saved?"
        yield _advice("warn", text, "norm", 0.0, "zero")
        return
    yield _density(source, audit.epsilon)
    erased = measure.bf16_sparsity
    if erased is None:
        need = "pass base=... to measure it" if audit.base is None else "pass fetch_base=True to measure it"
        text = f"What a cast to bfloat16 would erase of {label} is not measured, since the base's weights were not read: {need}."
        yield _advice("note", text, "rms", measure.rms, "bf16")
    elif erased - measure.zero_share >= ERASED:
        text = (
            f"{erased:.0%} of the {label} delta is below bfloat16's resolution at these weights: write float32, use "
            "stochastic rounding, or keep it as an adapter."
        )
        yield _advice("warn", text, "bf16_sparsity", erased, "bf16")
    lost = measure.quantised_sparsity
    if lost is not None and lost - measure.zero_share >= ERASED:
        text = (
            f"{lost:.0%} of the {label} delta is below the resolution of the base's codes: write plain weights, or "
            "quantization: keep with stochastic rounding."
        )
        yield _advice("warn", text, "quantised_sparsity", lost, "quantised")
    factors = source.total.factors
    if factors and factors.zero_components:
        share, counts = (
            factors.zero_components / factors.components,
            f"{factors.zero_components:,} of {factors.components:,}",
        )
        text = f"{share:.0%} of {label}'s rank components are idle ({counts}): a lower r would hold the same delta."
        yield _advice("good" if share < 0.9 else "warn", text, "zero_components", share, "factors")


def _density(source: SourceAudit, epsilon: float) -> Advice:
    """How sparse a source is, and what TIES at density 0.2 would drop of it."""
    sparsity, measure, label = source.paft_sparsity(epsilon), source.total.measure, _name(source.label)
    lost, number, below = 1 - measure.top_energy(0.2), f"sparsity({exponent(epsilon)})", f"below {exponent(epsilon)}"
    drops = f"TIES at density 0.2 will drop {lost:.0%} of its energy"
    if sparsity >= SPARSE:
        held = f"its {measure.density_for(0.99):.1%} largest entries hold 99 % of its energy"
        return _advice(
            "good", f"The {label} delta is sparse ({sparsity:.0%} {below}): {held}.", number, sparsity, "sparsity"
        )
    if lost < HARSH:
        return _advice(
            "note", f"{sparsity:.0%} of the {label} delta is {below}; {drops}.", number, sparsity, "sparsity"
        )
    kind = "dense" if sparsity < DENSE else "half sparse"
    text = f"The {label} delta is {kind} ({sparsity:.0%} {below}); {drops}, task_arithmetic none, and l1_ties trims by content. For a sparser delta: {_train_sparser(source, sparsity)}, at a price in skill ({L1_STUDY})."
    return _advice("warn", text, number, sparsity, "sparsity")


def _train_sparser(source: SourceAudit, sparsity: float) -> str:
    """The L1 setting for the next training, from the setting of the last one where its record is known."""
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


def _by_chance(names: str, pairs: Sequence[PairAudit]) -> Advice:
    """That signs differ as often as chance has it, for one pair or for several."""
    shares = sorted(pair.total.conflict for pair in pairs)
    weighted = sorted(pair.total.conflict_weighted for pair in pairs)
    entries, magnitude = (" to ".join(dict.fromkeys((f"{s[0]:.0%}", f"{s[-1]:.0%}"))) for s in (shares, weighted))
    text = (
        f"The signs of {names} differ on {entries} of the entries ({magnitude} by magnitude), which is chance: an election drops "
        "entries that do not oppose each other on purpose; try elect: none, or task_arithmetic beside it."
    )
    return _advice("note", text, "conflict_weighted", weighted[-1], "conflict")


def _of_pair(audit: AuditData, pair: PairAudit, *, leave_out_chance: bool) -> Iterator[Advice]:
    total, names = pair.total, f"{_name(pair.left)} and {_name(pair.right)}"
    if total.size_ratio > FOLD:
        norms = sorted(((math.sqrt(total.left_square), pair.left), (math.sqrt(total.right_square), pair.right)))
        (least, small), (most, large) = ((norm, _name(label)) for norm, label in norms)
        text = (
            f"The {large} delta is {total.size_ratio:.0f} times as large as that of {small} (norms {most:.3g} and {least:.3g}): with "
            f"equal weights {large} decides elections nearly alone. A sum (task_arithmetic) keeps both as they were trained; for an election give {small} more weight, at most {total.size_ratio:.0f} times, or write weight: equal_norm."
        )
        yield _advice("warn", text, "size_ratio", total.size_ratio, "scale")
    if not total.both:
        text = f"{names} change no entry in common: merging them loses nothing, and no sign needs electing."
        yield _advice("good", text, "conflict", 0.0, "conflict")
        return
    weighted = total.conflict_weighted
    differ = f"The signs of {names} differ on {total.conflict:.0%} of the entries ({weighted:.0%} by magnitude)"
    if weighted > HIGH:
        text = f"{differ}, more than chance: they oppose each other, and an election drops much of both."
        yield _advice("warn", text, "conflict_weighted", weighted, "conflict")
    elif weighted >= LOW:
        yield from () if leave_out_chance else (_by_chance(names, [pair]),)
    else:
        text = f"{differ}, less than chance: they pull the same way, cosine {total.cosine:.2f}."
        yield _advice("good" if weighted < 0.25 else "note", text, "conflict_weighted", weighted, "conflict")
    if total.kept_either and total.overlap_chance and total.overlap > 1.5 * total.overlap_chance:
        excess = total.overlap / total.overlap_chance
        text = f"The largest {audit.density:.0%} of {names} overlap {excess:.1f} times as much as chance: they change the same weights."
        yield _advice("note", text, "overlap_excess", excess, "overlap")


def _of_preview(audit: AuditData) -> Iterator[Advice]:
    preview = audit.preview
    for source in audit.sources if preview else ():
        assert preview is not None
        left = preview.of(source.label)
        if not left.square or 1 - left.elected_energy < HARSH:
            continue
        text = (
            f"{preview.method} {'would keep' if audit.sampled is None else 'kept'} {left.elected_energy:.0%} of the energy of "
            f"{_name(source.label)}: trimming takes {1 - left.kept_energy:.0%}, the election "
            f"{max(left.kept_energy - left.elected_energy, 0):.0%}."
        )
        yield _advice("warn", text, "elected_energy", left.elected_energy, "preview")
