"""What the terminal shows of an audit, and of a finished merge beside its manifest."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paft_merge.auditing.page import percent, short
from paft_merge.auditing.results import Audit, Group, PairAudit
from paft_merge.auditing.verify import ManifestCheck

_SIGNS = {"warn": "[bold yellow]![/]", "note": "[bold blue]·[/]", "good": "[bold green]✓[/]"}


def audit_table(audit: Audit) -> None:
    """The answer, the numbers behind it, and what to do."""
    console = Console()
    base = f"on {audit.base}" if audit.base else "without a base: what needs its weights is left out"
    console.print(f"sparse means |delta| < {audit.epsilon:g}; {escape(base)}", highlight=False)
    console.print(_sources(audit))
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


def manifest_table(check: ManifestCheck) -> None:
    """What a finished merge measured, and whether its bytes are still what it wrote."""
    console = Console()
    table = _table(
        "as measured when it was merged",
        ("source", "entries", "< 1e-5", "zeros", "kept", "elected", "kept energy", "elected energy", "norm"),
    )
    for row in check.manifest.get("totals", []):
        entries = row.get("entries") or 0
        shares = [
            percent(row[key] / entries if entries and key in row else None)
            for key in ("below_1e-05", "zeros", "kept", "elected")
        ]
        energies = [percent(row.get(key)) for key in ("kept_energy", "elected_energy")]
        table.add_row(escape(str(row["source"])), f"{entries:,}", *shares, *energies, short(row.get("l2")))
    console.print(table)
    if check.ok:
        text = f"{check.tensors:,} tensors, {check.nbytes:,} bytes: all are what the merge wrote"
        console.print(f"[bold green]✓[/] {escape(str(check.folder))}: {text}", highlight=False)


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE, title_justify="left", title_style="bold")
    for at, heading in enumerate(headings):
        table.add_column(escape(heading), justify="right" if at else "left", overflow="fold")
    return table


def _sources(audit: Audit) -> Table:
    headings = (
        "source",
        "kind",
        "entries",
        "sparse",
        "zeros",
        "bf16 erases",
        "Hoyer",
        "top 20 %",
        "norm/weights",
        "stable rank",
        "eff. rank",
    )
    table = _table("", headings)
    for source in audit.sources:
        if not source.tensors:
            table.add_row(escape(source.label), source.header.kind, "nothing", *[""] * 8)
            continue
        group, m = source.total, source.total.measure
        rank = f" r={source.header.details['rank']}" if "rank" in source.header.details else ""
        table.add_row(
            escape(source.label), source.header.kind + rank, f"{m.entries:,}", percent(source.paft_sparsity(audit.epsilon)), percent(m.zero_share),
            percent(m.bf16_sparsity), short(m.hoyer), percent(m.top_energy(0.2)), short(m.relative_norm), short(group.stable_rank), short(group.effective_rank),
        )  # fmt: skip
    return table


def _groups(title: str, groups: Sequence[Group], epsilon: float) -> Table:
    table = _table(
        title, ("module", "entries", "sparse", "bf16 erases", "Hoyer", "top 20 %", "rms", "largest", "stable rank")
    )
    for group in groups:
        m = group.measure
        table.add_row(
            escape(group.key), f"{m.entries:,}", percent(m.sparsity(epsilon)), percent(m.bf16_sparsity), short(m.hoyer), percent(m.top_energy(0.2)),
            short(m.rms), short(m.largest), short(group.stable_rank),
        )  # fmt: skip
    return table


def _pairs(pairs: Sequence[PairAudit]) -> Table:
    table = _table(
        "against each other", ("pair", "cosine", "signs differ", "weighted", "overlap", "by chance", "subspaces")
    )
    for pair in pairs:
        total, (left, right) = pair.total, pair.subspace
        table.add_row(
            escape(f"{pair.left}, {pair.right}"), short(total.cosine), percent(total.conflict), percent(total.conflict_weighted),
            percent(total.overlap), percent(total.overlap_chance), f"{percent(left)} / {percent(right)}",
        )  # fmt: skip
    return table


def _preview(audit: Audit) -> Table:
    preview = audit.preview
    assert preview is not None
    given = ", ".join(f"{k}={v}" for k, v in preview.parameters.items())
    table = _table(
        f"what {preview.method}{f' ({given})' if given else ''} would keep",
        ("source", "entries", "after election", "energy", "after election"),
    )
    for source in audit.sources:
        if any(source.label in t.sources for t in preview.tensors):
            left = preview.of(source.label)
            elected = left.elected / left.entries if left.entries else None
            table.add_row(
                escape(source.label),
                percent(left.kept_share),
                percent(elected),
                percent(left.kept_energy),
                percent(left.elected_energy),
            )
    return table
