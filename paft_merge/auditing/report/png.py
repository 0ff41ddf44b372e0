"""The figures of the page as PNG files, rendered by resvg (the `plots` extra)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from paft_merge.auditing.report.figures import Figure, figures_of
from paft_merge.auditing.report.svg import standalone
from paft_merge.auditing.results import AuditData
from paft_merge.errors import AuditError
from paft_merge.output.report_files import write_file

_ZOOM = 2.0
"""Pixels for each unit of the drawing."""


def write_png(audit: AuditData, folder: Path) -> list[Path]:
    """Write every figure of an audit as a PNG into `folder`.

    Returns:
        The files.

    Raises:
        AuditError: PLOTS, resvg_py or matplotlib (for its fonts) is not installed.
        OutputError: OUTPUT, the folder cannot be written.
    """
    if not can_draw():
        what, fix = "resvg_py and matplotlib are not both installed", "pip install 'paft-merge[plots]', or write HTML"
        raise AuditError.of("PLOTS", folder, what, fix)
    written = []
    for figure in figures_of(audit):
        place = folder / f"{figure.name}.png"
        write_file(place, drawn(figure))
        written.append(place)
    return written


def can_draw() -> bool:
    """Whether the packages that `drawn` needs are installed."""
    return find_spec("resvg_py") is not None and find_spec("matplotlib") is not None


def drawn(figure: Figure) -> bytes:
    """A figure as a PNG, with its title and caption."""
    from matplotlib import get_data_path
    from resvg_py import svg_to_bytes

    # matplotlib brings DejaVu Sans, so that pictures have text on machines without fonts, and look the same everywhere.
    fonts = [str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{weight}.ttf")) for weight in ("", "-Bold")]
    picture: bytes = svg_to_bytes(
        standalone(figure), background="white", zoom=_ZOOM, font_files=fonts, sans_serif_family="DejaVu Sans"
    )
    return picture
