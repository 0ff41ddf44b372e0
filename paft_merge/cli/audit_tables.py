"""Tables of the terminal for an audit, and for a finished merge and its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from paft_merge.auditing.preview import Preview
from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.report.figures import MANY, abridged, exponent, shown_advice, shown_pairs
from paft_merge.auditing.report.html import percent, sampled_line, short
from paft_merge.auditing.results import Group, PairAudit, SourceAudit
from paft_merge.cli.terminal import console, plain
from paft_merge.inputs.source_labels import label_of
from paft_merge.output.manifest import ManifestCheck

_SIGNS = {"warn": "[bold yellow]![/]", "note": "[bold blue]·[/]", "good": "[bold green]✓[/]"}


def audit_table(audit: Audit, *, offer_html: bool) -> None:
    """Print the numbers of an audit, the advice and, with `offer_html`, the option that writes the page."""
    out = console()
    base = f"on {label_of(audit.base)}" if audit.base else "without a base: metrics that need its weights are left out"
    lines = [f"sparse means |delta| < {exponent(audit.epsilon)}; {plain(base)}"]
    lines += [] if audit.sampled is None else [plain(sampled_line(audit.sampled))]
    for part in (*lines, *_tables(audit, out.width)):
        out.print(part, highlight=False)
    shown, about = shown_advice(audit, audit.advice)
    for advice in shown:
        number = f"[dim]({plain(advice.metric)} = {short(advice.value)})[/]"
        out.print(f"{_SIGNS[advice.level]} {plain(in_options(advice.text))} {number}", highlight=False)
    if about:
        out.print(f"[dim]{about}[/]", highlight=False)
    for skipped in audit.skipped:
        names = ", ".join(skipped.names[:3]) + (f" and {len(skipped.names) - 3} more" if len(skipped.names) > 3 else "")
        text = plain(labelled(f"{skipped.source}: {names}: {skipped.why}", audit))
        out.print(f"[dim]left out: {text}[/]", highlight=False)
    if offer_html:
        out.print("[dim]--html FILE writes figures, all numbers and a glossary[/]", highlight=False)


def _tables(audit: Audit, width: int) -> Iterator[Table]:
    many = len(audit.sources) > MANY
    if many:
        sources = [Group(abridged(source.label), source.tensors) for source in audit.sources if source.tensors]
        yield _groups("", sources, audit.epsilon, "source")
    else:
        yield from _sources(audit, width)
    for source in audit.sources:
        if len(source.modules) > 1 and not many:
            title = f"{abridged(source.label, 40)}, by kind of module"
            yield _groups(title, list(source.modules.values()), audit.epsilon)
    if audit.pairs:
        pairs, about = shown_pairs(audit)
        yield _pairs(pairs, f"against each other{about and ': '}{about}")
    if audit.preview:
        yield _preview(audit, audit.preview)


def manifest_table(check: ManifestCheck, audit: Audit | None, *, offer_html: bool) -> None:
    """Print the audit that a finished merge recorded, and whether its bytes are those that the merge wrote."""
    out = console()
    if audit:
        audit_table(audit, offer_html=offer_html)
    for warning in check.manifest.get("warnings", []):
        text = labelled(str(warning), audit) if audit else str(warning)
        out.print(f"{_SIGNS['warn']} {plain(text)}", highlight=False)
    if check.ok:
        text = f"{check.folder}: {check.tensors:,} tensors, {check.nbytes:,} bytes: all as the merge wrote them"
        out.print(f"[bold green]✓[/] {plain(text)}", highlight=False)


_OPTIONS = (
    ("fetch_base=True", "--fetch-base"), ("lazy_unpickle=True", "--lazy-unpickle"),
    ("follow_links=True", "--follow-links"), ("base=...", "--base"),
)  # fmt: skip
"""Arguments of `paft_merge.audit` as its texts name them, and the options that set them."""


def in_options(text: str) -> str:
    """`text` with options of the command in place of arguments of the function."""
    for argument, option in _OPTIONS:
        text = text.replace(argument, option)
    return text


def labelled(text: str, audit: Audit) -> str:
    """`text` with the label of each source in place of its reference, and with options in place of arguments."""
    for source in sorted(audit.sources, key=lambda s: -len(s.header.source)):
        text = text.replace(source.header.source, source.label)
    return in_options(text)


def _table(title: str, headings: Sequence[str]) -> Table:
    """A table for 80 columns, with headings in two rows; the first column is words, the others are numbers."""
    padding = (0, 1, 0, 0)
    table = Table(title=plain(title), box=box.SIMPLE, title_justify="left", title_style="bold", padding=padding)
    for at, heading in enumerate(headings):
        widest = max(map(len, heading.split("\n"))) if at else 4
        table.add_column(
            heading, justify="right" if at else "left", overflow="fold", min_width=widest, vertical="bottom" if at else "top"
        )  # fmt: skip
    return table


_WORDS = 32
"""Characters of the first column of the sources' table, with its borders."""


def _sources(audit: Audit, width: int) -> Iterator[Table]:
    """One column a source, and as many sources a table as the terminal has room for."""
    columns = [(abridged(source.label), _numbers(source, audit.epsilon)) for source in audit.sources]
    while columns:
        room, fit = width - _WORDS, 0
        for label, numbers in columns:
            room -= max(len(label), *map(len, numbers.values())) + 2
            fit += room >= 0
        shown, columns = columns[: max(fit, 1)], columns[max(fit, 1) :]
        table = _table("", ("", *(plain(label) for label, _ in shown)))
        for name in dict.fromkeys(name for _, numbers in shown for name in numbers):
            table.add_row(name, *(numbers.get(name, "") for _, numbers in shown))
        yield table


def _numbers(source: SourceAudit, epsilon: float) -> dict[str, str]:
    rank = f", r = {source.header.details['rank']}" if source.header.details.get("rank") else ""
    head = {"kind": source.header.kind + rank, "tensors": f"{len(source.tensors):,}"}
    if not source.tensors:
        return head
    group, m = source.total, source.total.measure
    return {
        **head,
        "entries": f"{m.entries:,}",
        "sparse, mean over layers": percent(source.paft_sparsity(epsilon)),
        **{f"below {exponent(e)}": percent(m.sparsity(e)) for e in m.below},
        "exactly zero": percent(m.zero_share),
        "erased by a cast to bfloat16": percent(m.bf16_sparsity),
        **({"erased by the base's codes": percent(m.quantised_sparsity)} if m.coded else {}),
        "Hoyer, participation": f"{short(m.hoyer)}, {short(m.participation)}",
        "energy in the top 1, 5, 20 %": ", ".join(percent(m.top_energy(k), 0) for k in (0.01, 0.05, 0.2)),
        "rms, largest": f"{short(m.rms)}, {short(m.largest)}",
        "norm over that of the weights": short(m.relative_norm),
        "stable, effective rank": f"{short(group.stable_rank)}, {short(group.effective_rank)}",
    }


def _groups(title: str, groups: Sequence[Group], epsilon: float, first: str = "module") -> Table:
    coded = any(group.measure.coded for group in groups)
    erases = ("bf16\nerases", "codes\nerase") if coded else ("bf16\nerases",)
    table = _table(title, (first, "sparse", *erases, "Hoyer", "energy in\ntop 20 %", "rms", "stable\nrank"))
    for group in groups:
        m = group.measure
        shares = percent(m.sparsity(epsilon)), *map(percent, (m.bf16_sparsity, m.quantised_sparsity)[: len(erases)])
        rest = short(m.hoyer), percent(m.top_energy(0.2)), short(m.rms), short(group.stable_rank)
        table.add_row(plain(group.key), *shares, *rest)
    return table


def _pairs(pairs: Sequence[PairAudit], title: str) -> Table:
    headings = (
        "pair", "norm\nratio", "cosine", "signs\ndiffer", "signs,\nweighted", "overlap", "by\nchance", "common\nsubspaces",
    )  # fmt: skip
    table = _table(title, headings)
    for pair in pairs:
        total = pair.total
        shares = total.conflict, total.conflict_weighted, total.overlap, total.overlap_chance
        table.add_row(
            f"{plain(abridged(pair.left, 15))}\n{plain(abridged(pair.right, 15))}", f"x {short(total.size_ratio)}", short(total.cosine, 2),
            *map(percent, shares), ", ".join(percent(share, 0) for share in pair.subspace),
        )  # fmt: skip
    return table


def _preview(audit: Audit, preview: Preview) -> Table:
    given = ", ".join(f"{k}={v}" for k, v in preview.parameters.items())
    title = f"what {preview.method}{f' ({given})' if given else ''} {'would keep' if audit.sampled is None else 'kept'}"
    headings = "source", "entries\nkept", "entries after\nelection", "energy\nkept", "energy after\nelection"
    table = _table(title, headings)
    for source in audit.sources:
        if any(source.label in t.sources for t in preview.tensors):
            left = preview.of(source.label)
            elected = left.elected / left.entries if left.entries else None
            shares = left.kept_share, elected, left.kept_energy, left.elected_energy
            table.add_row(plain(abridged(source.label)), *map(percent, shares))
    return table
