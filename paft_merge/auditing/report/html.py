"""The report as one self-contained HTML page, or in short for a notebook (`page.html.j2`)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from paft_merge.auditing.report.advice import advise
from paft_merge.auditing.report.figures import MANY, abridged, exponent, figures_of, shown_advice, shown_pairs
from paft_merge.auditing.report.svg import DARK, LIGHT, draw, stylesheet, swatch
from paft_merge.auditing.results import AuditData, Group, SourceAudit
from paft_merge.errors import escape as printable
from paft_merge.inputs.source_labels import label_of

SIGNS = {"warn": ("▲", "look here"), "note": ("●", "to know"), "good": ("✔", "good")}

Table = tuple[list[tuple[str, list[str]]], list[list[str]]]
"""A heading with its sub-headings for each group of columns, and the rows."""


def page(audit: AuditData) -> str:
    """A whole HTML document: answer, advice, figures, all numbers, glossary."""
    return _render(audit, whole=True)


def fragment(audit: AuditData) -> str:
    """The report for a notebook: answer and advice; the rest is folded."""
    return _render(audit, whole=False)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none. Only exact shares are shown as 0 % or 100 %."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.{digits}%}"
    if 0 < value < 0.5 * 10 ** (-digits - 2):
        return f"<{10.0**-digits:g}%"
    return f"99.{'9' * (digits + 1)}%" if text.startswith("100") and value < 1 else text


def short(value: float | None, digits: int = 3) -> str:
    """A number in `digits` significant digits; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def sampled_line(share: float) -> str:
    """Which numbers of a merge's own record are estimates, and from what share of the entries."""
    return (
        "As measured during the merge. Thresholds, zeros, norms, Hoyer, kept and elected entries are counted on every entry; "
        "spectra, and cosines between adapters, are exact from the factors; everything else (bf16, participation, energy of the "
        f"largest, histogram, signs, overlap) is estimated from {percent(share)} of the entries."
    )


@cache
def _template(name: str) -> Template:
    # Names come from files: every value is escaped, and control characters are spelt out.
    environment = Environment(
        loader=PackageLoader("paft_merge", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
    )  # fmt: skip
    return environment.get_template(name)


def rendered(template: str, **context: Any) -> str:
    """A page or a notebook's part of one, from a template of the package that uses `frame.html.j2`."""
    return _template(template).render(
        light=LIGHT.named, dark=DARK.named, style=stylesheet(LIGHT), dark_style=stylesheet(DARK), **context
    )


def _render(audit: AuditData, *, whole: bool) -> str:
    advice, further = shown_advice(audit, advise(audit))
    cards = [_card(audit, source) for source in audit.sources]
    return rendered(
        "auditing/report/page.html.j2", audit=audit, whole=whole, base=label_of(audit.base) if audit.base else "", epsilon=exponent(audit.epsilon),
        sampled=None if audit.sampled is None else sampled_line(audit.sampled), signs=SIGNS, short=short, percent=percent,
        cards=cards, table=_table(cards) if len(cards) > MANY else None, advice=advice, further=further, others=shown_pairs(audit)[1], pairs=_pairs(audit),
        figures=[(figure, draw(figure)) for figure in figures_of(audit)], numbers=_numbers(audit), swatch=swatch,
    )  # fmt: skip


def _card(audit: AuditData, source: SourceAudit) -> dict[str, Any]:
    """Name, description and the few large numbers of a source, each with its unit."""
    details = source.header.details
    about = source.header.kind
    if "rank" in details:
        about += f", r = {details['rank']}, scale {short(details.get('scale'))}"
    if not source.tensors:
        return {"label": source.label, "about": about, "numbers": []}
    measure = source.total.measure
    numbers = [(percent(source.paft_sparsity(audit.epsilon)), f"of the entries below {exponent(audit.epsilon)}")]
    if measure.bf16_sparsity is not None:
        numbers.append((percent(measure.bf16_sparsity), "of the entries erased by bf16"))
    if measure.coded:
        numbers.append((percent(measure.quantised_sparsity), "of the entries erased by the base's codes"))
    numbers.append((percent(measure.top_energy(0.2), 0), "of the energy in the top 20 %"))
    if audit.preview and any(source.label in t.sources for t in audit.preview.tensors):
        kept = audit.preview.of(source.label).elected_energy
        numbers.append((percent(kept, 0), f"of the energy survives {audit.preview.method}"))
    about += f"; {len(source.tensors):,} tensors, {measure.entries:,} entries"
    return {"label": source.label, "about": about, "numbers": numbers}


def _table(cards: list[dict[str, Any]]) -> Table:
    """The cards of many sources as one table, a row for each."""
    units = list(dict.fromkeys(unit for card in cards for _, unit in card["numbers"]))
    rows = []
    for card in cards:
        values = {unit: value for value, unit in card["numbers"]}
        rows.append([card["label"], *(values.get(unit, "–") for unit in units), card["about"]])
    return [("source", []), *((unit, []) for unit in units), ("what it is", [])], rows


def _pairs(audit: AuditData) -> Table:
    head = [
        ("pair", []), ("ratio of norms", []), ("cosine", []), ("signs that differ", ["all", "weighted", "both ≥ ε"]),
        ("overlap", ["found", "by chance"]), ("common subspace", ["left", "right"]),
    ]  # fmt: skip
    rows = []
    for pair in shown_pairs(audit)[0]:
        total = pair.total
        shares = total.conflict, total.conflict_weighted, total.conflict_above, total.overlap, total.overlap_chance
        numbers = f"x {short(total.size_ratio)}", short(total.cosine), *map(percent, (*shares, *pair.subspace))
        rows.append([f"{abridged(pair.left, 44)} and {abridged(pair.right, 44)}", *numbers])
    return head, rows


def _numbers(audit: AuditData) -> list[tuple[int | None, str, Table]]:
    """Two tables for each source: all and by kind of module; and by layer. Of many sources, one table with a row for each."""
    if len(audit.sources) > MANY:
        groups = [Group(abridged(source.label, 44), source.tensors) for source in audit.sources if source.tensors]
        return [(None, "Every source; by kind of module and by layer: see the CSV or the JSON", _groups(groups))]
    tables: list[tuple[int | None, str, Table]] = []
    for number, source in enumerate(audit.sources):
        if source.tensors:
            layers = [Group(f"layer {k}", g.tensors) for k, g in source.layers.items()]
            tables.append(
                (
                    number,
                    f"{abridged(source.label, 44)} by kind of module",
                    _groups([source.total, *source.modules.values()]),
                )
            )
            tables.append((number, f"{abridged(source.label, 44)} by layer", _groups(layers)))
    return tables


def _groups(groups: list[Group]) -> Table:
    thresholds = list(groups[0].measure.below) if groups else []
    coded = any(group.measure.coded for group in groups)
    head = [
        ("", []), ("entries", []), ("zeros", []), ("entries below", list(map(exponent, thresholds))), ("bf16 erases", []),
        *([("codes erase", [])] if coded else []), ("≤ 0.1 rms", []), ("Hoyer", []), ("participation", []), ("energy in the top", ["1 %", "20 %"]),
        ("norm / weights", []), ("rank", ["stable", "effective"]),
    ]  # fmt: skip
    rows = []
    for group in groups:
        m = group.measure
        below = [percent(m.sparsity(e)) for e in thresholds]
        rows.append([
            group.key, f"{m.entries:,}", percent(m.zero_share), *below, percent(m.bf16_sparsity),
            *([percent(m.quantised_sparsity)] if coded else []), percent(m.relative_rms(0.1)),
            short(m.hoyer), short(m.participation), percent(m.top_energy(0.01)), percent(m.top_energy(0.2)),
            short(m.relative_norm), short(group.stable_rank), short(group.effective_rank),
        ])  # fmt: skip
    return head, rows
