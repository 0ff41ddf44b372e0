"""What the terminal shows of an audit, and of a finished merge beside its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.report.html import percent, sampled_line, short
from paft_merge.auditing.report.svg import abridged
from paft_merge.auditing.results import Group, PairAudit, SourceAudit
from paft_merge.output.manifest import ManifestCheck

_SIGNS = {"warn": "[bold yellow]![/]", "note": "[bold blue]·[/]", "good": "[bold green]✓[/]"}


def audit_table(audit: Audit) -> None:
    """The answer, the numbers behind it, and what to do."""
    console = Console()
    base = f"on {audit.base}" if audit.base else "without a base: what needs its weights is left out"
    console.print(f"sparse means |delta| < {audit.epsilon:g}; {escape(base)}", highlight=False)
    if audit.sampled is not None:
        console.print(escape(sampled_line(audit.sampled)), highlight=False)
    for table in _sources(audit, console.width):
        console.print(table)
    for source in audit.sources:
        if len(source.modules) > 1:
            console.print(_groups(f"{source.label}, by kind of module", list(source.modules.values()), audit.epsilon))
    if audit.pairs:
        console.print(_pairs(audit.pairs))
    if audit.preview:
        console.print(_preview(audit))
    for line in audit.advice:
        console.print(f"{_SIGNS[line.level]} {escape(line.text)} [dim]({line.page})[/]", highlight=False)
    for skipped in audit.skipped:
        names = ", ".join(skipped.names[:3]) + (f" and {len(skipped.names) - 3} more" if len(skipped.names) > 3 else "")
        console.print(f"[dim]left out: {escape(f'{skipped.source}: {names}: {skipped.why}')}[/]", highlight=False)


def manifest_table(check: ManifestCheck, audit: Audit | None) -> None:
    """What a finished merge measured (`audit`), and whether its bytes are still what it wrote."""
    console = Console()
    if audit:
        audit_table(audit)
    for warning in check.manifest.get("warnings", []):
        console.print(f"{_SIGNS['warn']} {escape(str(warning))}", highlight=False)
    if check.ok:
        text = f"{check.tensors:,} tensors, {check.nbytes:,} bytes: all are what the merge wrote"
        console.print(f"[bold green]✓[/] {escape(str(check.folder))}: {text}", highlight=False)


def _table(title: str, headings: Sequence[str]) -> Table:
    """A table whose headings wrap, so that it fits 80 columns; the first column is words, the others are numbers."""
    padding = (0, 1, 0, 0)
    table = Table(title=escape(title), box=box.SIMPLE, title_justify="left", title_style="bold", padding=padding)
    for at, heading in enumerate(headings):
        table.add_column(escape(heading), justify="right" if at else "left", overflow="fold", min_width=4)
    return table


_WORDS = 32
"""Characters of the first column of the sources' table, with its borders."""


def _sources(audit: Audit, width: int) -> Iterator[Table]:
    """One column a source, and as many sources a table as the terminal is wide."""
    columns = [(abridged(source.label), _numbers(source, audit.epsilon)) for source in audit.sources]
    while columns:
        room, fit = width - _WORDS, 0
        for label, numbers in columns:
            room -= max(len(label), *map(len, numbers.values())) + 2
            fit += room >= 0
        shown, columns = columns[: max(fit, 1)], columns[max(fit, 1) :]
        table = _table("", ("", *(label for label, _ in shown)))
        for name in dict.fromkeys(name for _, numbers in shown for name in numbers):
            table.add_row(name, *(numbers.get(name, "") for _, numbers in shown))
        yield table


def _numbers(source: SourceAudit, epsilon: float) -> dict[str, str]:
    rank = f", r = {source.header.details['rank']}" if "rank" in source.header.details else ""
    head = {"kind": source.header.kind + rank, "tensors": f"{len(source.tensors):,}"}
    if not source.tensors:
        return head
    group, m = source.total, source.total.measure
    return {
        **head,
        "entries": f"{m.entries:,}",
        "sparse, mean over layers": percent(source.paft_sparsity(epsilon)),
        **{f"below {e:g}": percent(m.sparsity(e)) for e in m.below},
        "exactly zero": percent(m.zero_share),
        "erased by a cast to bfloat16": percent(m.bf16_sparsity),
        "Hoyer, participation": f"{short(m.hoyer)}, {short(m.participation)}",
        "energy in the top 1, 5, 20 %": ", ".join(percent(m.top_energy(k), 0) for k in (0.01, 0.05, 0.2)),
        "rms, largest": f"{short(m.rms)}, {short(m.largest)}",
        "norm over that of the weights": short(m.relative_norm),
        "stable, effective rank": f"{short(group.stable_rank)}, {short(group.effective_rank)}",
    }


def _groups(title: str, groups: Sequence[Group], epsilon: float) -> Table:
    table = _table(title, ("module", "sparse", "bf16 erases", "Hoyer", "top 20 %", "rms", "stable rank"))
    for group in groups:
        m = group.measure
        shares = percent(m.sparsity(epsilon)), percent(m.bf16_sparsity)
        rest = short(m.hoyer), percent(m.top_energy(0.2)), short(m.rms), short(group.stable_rank)
        table.add_row(escape(group.key), *shares, *rest)
    return table


def _pairs(pairs: Sequence[PairAudit]) -> Table:
    table = _table(
        "against each other",
        ("pair", "sizes", "cosine", "signs\ndiffer", "weigh-\nted", "over-\nlap", "by\nchance", "sub-\nspaces"),
    )
    for pair in pairs:
        total, (left, right) = pair.total, pair.subspace
        table.add_row(
            escape(f"{abridged(pair.left, 18)}\n{abridged(pair.right, 18)}"), f"x {short(total.size_ratio)}", short(total.cosine),
            percent(total.conflict), percent(total.conflict_weighted), percent(total.overlap), percent(total.overlap_chance), f"{percent(left, 0)}, {percent(right, 0)}",
        )  # fmt: skip
    return table


def _preview(audit: Audit) -> Table:
    preview = audit.preview
    assert preview is not None
    given = ", ".join(f"{k}={v}" for k, v in preview.parameters.items())
    table = _table(
        f"what {preview.method}{f' ({given})' if given else ''} {'would keep' if audit.sampled is None else 'kept'}",
        ("source", "entries", "after election", "energy", "after election"),
    )
    for source in audit.sources:
        if any(source.label in t.sources for t in preview.tensors):
            left = preview.of(source.label)
            elected = left.elected / left.entries if left.entries else None
            table.add_row(
                escape(abridged(source.label)),
                percent(left.kept_share),
                percent(elected),
                percent(left.kept_energy),
                percent(left.elected_energy),
            )
    return table
