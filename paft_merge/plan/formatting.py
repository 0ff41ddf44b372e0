"""Numbers as short text, and tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from paft_merge.errors import escape


def show_bytes(count: int) -> str:
    """Return a size with a decimal unit: `1.2 GB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def show_seconds(seconds: float) -> str:
    """Return a time: `1.2 s`, `15 min`, `3.4 h`."""
    if seconds < 180:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 10800 else f"{seconds / 3600:.1f} h"


def show_value(value: Any) -> str:
    """Return the value of a parameter as short text: floats with four digits, None as `-`."""
    if isinstance(value, list):
        return f"[{', '.join(map(show_value, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def html_lines(lines: Iterable[str]) -> str:
    """Return an HTML paragraph for each line; the text is escaped."""
    return "".join(f"<p>{html.escape(escape(line))}</p>" for line in lines)


def html_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Return an HTML table; the text of every cell is escaped."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(escape(cell))}</{tag}>' for cell in cells)}</tr>"

    first = f"<thead>{row(head, 'th')}</thead>" if head else ""
    return f"<table>{first}<tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"
