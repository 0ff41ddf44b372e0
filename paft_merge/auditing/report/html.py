"""The report as one self-contained HTML page: the answer first, then the advice, the pictures, and every number beneath."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from paft_merge.auditing.report.advice import advise
from paft_merge.auditing.report.figures import Heat, figures_of
from paft_merge.auditing.report.svg import draw, swatch
from paft_merge.auditing.results import AuditData, Group, SourceAudit

_STYLE = """
.paft{--ink:#1c2430;--soft:#5b6675;--rule:#e3e7ec;--wash:#f6f8fa;--card:#fff;--warn:#a34700;--good:#00664a;--note:#005c91;--grid:#e8ebef;--axis:#9aa4b0;--mark:#aab3bd;--none:#f0f1f3;
color:var(--ink);background:var(--card);font:15px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;max-width:1240px;margin:0 auto;padding:32px 28px 64px;box-sizing:border-box}
.paft *{box-sizing:border-box}
.paft h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
.paft h2{font-size:19px;margin:40px 0 12px;letter-spacing:-.005em}
.paft h3{font-size:15px;margin:0 0 2px}
.paft p{margin:0 0 8px}
.paft .soft{color:var(--soft)}
.paft .cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:16px;margin-top:22px}
.paft .card{border:1px solid var(--rule);border-radius:10px;padding:16px 18px;background:var(--card)}
.paft .card .name{font-weight:650;font-size:17px;overflow-wrap:anywhere}
.paft .big{display:grid;grid-template-columns:repeat(auto-fit,minmax(104px,1fr));gap:12px;margin:12px 0 4px}
.paft .big b{display:block;font-size:25px;line-height:1.15;font-weight:650;font-variant-numeric:tabular-nums}
.paft .big span{color:var(--soft);font-size:12.5px}
.paft .swatch{vertical-align:-1px;margin-right:7px}
.paft ul.advice{list-style:none;margin:0;padding:0}
.paft ul.advice li{display:grid;grid-template-columns:86px 1fr;gap:14px;padding:10px 0;border-top:1px solid var(--rule)}
.paft ul.advice li:last-child{border-bottom:1px solid var(--rule)}
.paft .tag{font-size:12.5px;font-weight:600;white-space:nowrap}
.paft .tag i{font-style:normal;display:inline-block;width:20px}
.paft .warn .tag{color:var(--warn)}.paft .good .tag{color:var(--good)}.paft .note .tag{color:var(--note)}
.paft .why{color:var(--soft);font-size:13px}
.paft div.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(520px,100%),1fr));gap:18px}
.paft figure{margin:0;border:1px solid var(--rule);border-radius:10px;padding:16px 18px 10px;background:var(--card);break-inside:avoid}
.paft figure p{color:var(--soft);font-size:13px;margin:0 0 8px}
.paft figure svg{width:100%;height:auto;display:block}
.paft svg text{font-family:inherit}
.paft .tick,.paft .mark-text,.paft .cell{font-size:11px;fill:var(--soft)}
.paft .cell{fill:#1c2430;font-size:10.5px}.paft .cell.light{fill:#fff}
.paft .label{font-size:12px;fill:var(--ink)}.paft .legend{font-size:12.5px;fill:var(--ink)}
.paft line.grid{stroke:var(--grid)}.paft .axis{stroke:var(--axis)}.paft .rail{stroke:var(--grid)}
.paft .mark{stroke:var(--mark);stroke-dasharray:2 3}.paft .mark.strong{stroke:var(--ink);stroke-dasharray:none;stroke-width:1.2}
.paft .none{fill:var(--none)}
.paft table{border-collapse:collapse;width:100%;font-size:12.5px;font-variant-numeric:tabular-nums}
.paft th,.paft td{padding:5px 6px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
.paft th{font-weight:600;color:var(--soft);background:var(--wash)}
.paft th:first-child,.paft td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:110px}
.paft .scroll{overflow-x:auto}
.paft details{border-top:1px solid var(--rule);padding:10px 0}
.paft summary{cursor:pointer;font-weight:600}
.paft dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:13px;margin:8px 0}
.paft dt{font-weight:600}.paft dd{margin:0;color:var(--soft)}
@media print{.paft{padding:0;max-width:none}.paft .grid{grid-template-columns:1fr 1fr}}
"""

_DARK = """
:root{color-scheme:light dark}
body{margin:0;background:#fff}
@media screen and (prefers-color-scheme:dark){body{background:#12161c}
.paft{--ink:#e6eaf0;--soft:#a3adba;--rule:#2b333d;--wash:#1a2028;--card:#12161c;--warn:#ffa057;--good:#4fd1a5;--note:#6cbcf5;--grid:#27303a;
--axis:#6b7684;--mark:#6b7684;--none:#1f262e}}
"""
"""Only of the whole page: a notebook has colours of its own, in which the report stays light."""

_TAGS = {"warn": ("▲", "look here"), "note": ("●", "to know"), "good": ("✔", "good")}

_WORDS = (
    (
        "sparsity",
        "share of entries with |delta| below the threshold; by layer first, and of these the mean (PAFT, arXiv:2406.17923)",
    ),
    (
        "bf16 erases",
        "share of entries where bf16(weight + delta) = bf16(weight): what is lost when the merge is written as bfloat16",
    ),
    (
        "Hoyer",
        "(√n − L1/L2) / (√n − 1): 0 when all entries are equal, 1 when one holds everything, 0.20 for a Gaussian",
    ),
    (
        "top 20 %",
        "energy (sum of squares) held by the largest fifth of the entries: what TIES at density 0.2 keeps; 0.66 for a Gaussian",
    ),
    ("participation", "(Σd²)² / (n Σd⁴): the share of entries that carries the energy; 0.33 for a Gaussian"),
    (
        "stable, effective rank",
        "‖D‖²F/‖D‖²₂, and the exponential of the entropy of the singular values; means over tensors",
    ),
    (
        "conflict",
        "share of signs that differ where neither delta is zero; weighted: each entry counts min(|d1|, |d2|). 50 % is chance",
    ),
    ("overlap", "Jaccard index of the largest entries of both, beside what random positions would give"),
)


def page(audit: AuditData) -> str:
    """A whole HTML document."""
    title = escape("Audit of " + ", ".join(s.label for s in audit.sources))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{fragment(audit)}<style>{_DARK}</style></body></html>\n'


def fragment(audit: AuditData) -> str:
    """The report without the document around it, for notebooks."""
    parts = [
        _head(audit),
        _cards(audit),
        _advice(audit),
        _pairs(audit),
        _pictures(audit),
        _numbers(audit),
        _left_out(audit),
        _glossary(),
    ]
    return f'<style>{_STYLE}</style><main class="paft">{"".join(parts)}</main>'


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a person reads it; a dash where there is none. Shares that are all but 0 or 1 do not say 0 % or 100 %."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.{digits}%}"
    if 0 < value < 0.5 * 10 ** (-digits - 2):
        return f"<{10.0**-digits:g}%"
    return f"99.{'9' * (digits + 1)}%" if text.startswith("100") and value < 1 else text


def short(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def _head(audit: AuditData) -> str:
    names = " and ".join(s.label for s in audit.sources) if len(audit.sources) < 3 else f"{len(audit.sources)} sources"
    whose = "its" if len(audit.sources) == 1 else "their"
    base = f"on {audit.base}" if audit.base else f"without {whose} base: what needs its weights is left out"
    asked, note = ("How sparse, and will it merge?", "")
    if audit.sampled is not None:
        asked, note = "How sparse, and what was merged?", f'<p class="soft">{escape(sampled_line(audit.sampled))}</p>'
    return f'<h1>{asked}</h1><p class="soft">{escape(names)}, {escape(base)}. Sparse means |delta| &lt; {audit.epsilon:g}.</p>{note}'


def sampled_line(share: float) -> str:
    """Which numbers of a merge's own record are estimates, and from how much."""
    return (
        "As the merge measured on the way. Thresholds, zeros, norms, Hoyer, and what was kept and elected are counted on every entry; "
        "spectra, and cosines between adapters, are exact from the factors; everything else (bf16, participation, energy of the "
        f"largest, histogram, signs, overlap) is estimated from {percent(share)} of the entries."
    )


def _cards(audit: AuditData) -> str:
    return f'<div class="cards">{"".join(_card(audit, i, s) for i, s in enumerate(audit.sources))}</div>'


def _card(audit: AuditData, number: int, source: SourceAudit) -> str:
    details = source.header.details
    about = source.header.kind + (
        f", r = {details['rank']}, scale {short(details.get('scale'))}" if "rank" in details else ""
    )
    name = f'<div class="name">{swatch(number)}{escape(source.label)}</div>'
    if not source.tensors:
        return f'<div class="card">{name}<p class="soft">{escape(about)}</p><p>Nothing of it could be audited; see below.</p></div>'
    measure = source.total.measure
    big = [(percent(source.paft_sparsity(audit.epsilon)), f"sparse (below {audit.epsilon:g})".replace("-", "\u2011"))]
    big += [(percent(measure.bf16_sparsity), "erased by a bf16 cast")] if measure.bf16_sparsity is not None else []
    big += [(percent(measure.top_energy(0.2), 0), "energy in the top 20 %")]
    if audit.preview and any(source.label in t.sources for t in audit.preview.tensors):
        big.append((percent(audit.preview.of(source.label).elected_energy, 0), f"survives {audit.preview.method}"))
    numbers = "".join(f"<div><b>{escape(value)}</b><span>{escape(word)}</span></div>" for value, word in big)
    size = f"{about}; {len(source.tensors):,} tensors, {measure.entries:,} entries"
    return f'<div class="card">{name}<p class="soft">{escape(size)}</p><div class="big">{numbers}</div></div>'


def _advice(audit: AuditData) -> str:
    items = []
    for line in advise(audit):
        sign, word = _TAGS[line.level]
        why = f"{line.metric} = {short(line.value)}; see {line.page}"
        items.append(
            f'<li class="{line.level}"><span class="tag"><i>{sign}</i>{word}</span><div>{escape(line.text)}<div class="why">{escape(why)}</div></div></li>'
        )
    return f'<h2>What this means</h2><ul class="advice">{"".join(items)}</ul>' if items else ""


def _pairs(audit: AuditData) -> str:
    if not audit.pairs:
        return ""
    head = (
        "pair",
        "sizes",
        "cosine",
        "signs differ",
        "weighted",
        "both ≥ ε",
        "overlap",
        "by chance",
        "left subspace",
        "right subspace",
    )
    rows = []
    for pair in audit.pairs:
        total, (left, right) = pair.total, pair.subspace
        rows.append([
            f"{pair.left} and {pair.right}", f"x {short(total.size_ratio)}", short(total.cosine), percent(total.conflict), percent(total.conflict_weighted), percent(total.conflict_above),
            percent(total.overlap), percent(total.overlap_chance), percent(left), percent(right),
        ])  # fmt: skip
    return f"<h2>Against each other</h2>{_table(head, rows)}"


def _pictures(audit: AuditData) -> str:
    drawn = []
    for figure in figures_of(audit):
        extra = ' class="heat"' if isinstance(figure, Heat) else ""
        drawn.append(
            f"<figure{extra}><h3>{escape(figure.title)}</h3><p>{escape(figure.caption)}</p>{draw(figure)}</figure>"
        )
    return f'<h2>Pictures</h2><div class="grid">{"".join(drawn)}</div>' if drawn else ""


def _numbers(audit: AuditData) -> str:
    parts = ["<h2>Numbers</h2>"]
    for number, source in enumerate(audit.sources):
        if not source.tensors:
            continue
        groups = [source.total, *source.modules.values()]
        layers = [Group(f"layer {k}", g.tensors) for k, g in source.layers.items()]
        for title, chosen, is_open in (("by kind of module", groups, True), ("by layer", layers, False)):
            rows = [_row(group, audit.epsilon) for group in chosen]
            summary = f"{swatch(number)}{escape(source.label)} {title}"
            parts.append(
                f"<details{' open' if is_open else ''}><summary>{summary}</summary>{_table(_columns(audit.epsilon), rows)}</details>"
            )
    return "".join(parts)


def _columns(epsilon: float) -> tuple[str, ...]:
    return (
        "", "entries", "zeros", "&lt; 1e-6", f"&lt; {epsilon:g}", "&lt; 1e-4", "&lt; 1e-3", "bf16 erases", "≤ 0.1 rms", "Hoyer", "participation", "top 1 %", "top 20 %",
        "norm / weights", "stable rank", "eff. rank",
    )  # fmt: skip


def _row(group: Group, epsilon: float) -> list[str]:
    m = group.measure
    return [
        group.key, f"{m.entries:,}", percent(m.zero_share), percent(m.sparsity(1e-6)), percent(m.sparsity(epsilon)), percent(m.sparsity(1e-4)), percent(m.sparsity(1e-3)),
        percent(m.bf16_sparsity), percent(m.relative_rms(0.1)), short(m.hoyer), short(m.participation), percent(m.top_energy(0.01)), percent(m.top_energy(0.2)),
        short(m.relative_norm), short(group.stable_rank), short(group.effective_rank),
    ]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`head` is markup of our own; what stands in `rows` is escaped."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _left_out(audit: AuditData) -> str:
    lines = [
        f"{s.source + ': ' if s.source else ''}{len(s.names):,} tensors ({', '.join(s.names[:3])}{', …' if len(s.names) > 3 else ''}): {s.why}"
        for s in audit.skipped
    ]
    lines += [str(w) for w in audit.warnings]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>Left out, and odd</h2><ul>{items}</ul>" if lines else ""


def _glossary() -> str:
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in _WORDS)
    return f"<h2>Words</h2><dl>{items}</dl>"
