"""The figures of the page as PNG files, rendered by resvg (the `plots` extra)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from paft_merge.auditing.report.figures import figures_of
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
    if find_spec("resvg_py") is None or find_spec("matplotlib") is None:
        what, fix = "resvg_py and matplotlib are not both installed", "pip install 'paft-merge[plots]', or write HTML"
        raise AuditError.of("PLOTS", folder, what, fix)
    from matplotlib import get_data_path
    from resvg_py import svg_to_bytes

    # matplotlib brings DejaVu Sans, so that pictures have text on machines without fonts, and look the same everywhere.
    fonts = [str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{weight}.ttf")) for weight in ("", "-Bold")]
    written = []
    for figure in figures_of(audit):
        place = folder / f"{figure.name}.png"
        drawn = svg_to_bytes(
            standalone(figure), background="white", zoom=_ZOOM, font_files=fonts, sans_serif_family="DejaVu Sans"
        )
        write_file(place, drawn)
        written.append(place)
    return written
