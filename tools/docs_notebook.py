"""Run docs/notebooks/paft.ipynb and keep its outputs, which GitHub and the site show; about two minutes on a CPU.

python tools/docs_notebook.py
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

BOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "paft.ipynb"


def sources(book: Any) -> str:
    """The SHA-256 of all cells without their outputs; the notebook has that of the cells that were run."""
    return hashlib.sha256("\0".join(cell.source for cell in book.cells).encode()).hexdigest()


def run() -> None:
    """Run the notebook in an empty folder, and write its outputs into it."""
    book: Any = nbformat.read(BOOK, 4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                lines = output.text.replace(f"{folder}/", "").splitlines(keepends=True)
                output.text = "".join(
                    line for line in lines if "kernels-community" not in line
                )  # of bitsandbytes, which is not needed
        if "outputs" in cell:
            cell.outputs = [one for one in cell.outputs if one.get("text") != ""]
    assert "/tmp" not in nbformat.writes(book), "an output has a path of this machine"
    book.metadata |= {"language_info": {"name": "python"}, "sources": sources(book)}
    nbformat.write(book, BOOK)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run()
