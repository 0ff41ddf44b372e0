"""The notebook in docs/notebooks runs from data to a merged model, with few steps of training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import docs_notebook
import nbformat
import pytest
from docs_notebook import BOOK
from nbclient import NotebookClient

SHOWN = ("<Audit of sft, dpo", "MergePlan(", "MergeResult(", "Verification(", "ModelDiff(", "Run(")


def test_the_outputs_are_those_of_the_cells() -> None:
    book: Any = nbformat.read(BOOK, 4)
    assert book.metadata["sources"] == docs_notebook.sources(book), "run python tools/docs_notebook.py"
    text = nbformat.writes(book)
    assert all(f'"{name}' in text for name in SHOWN)
    assert not re.search(r"Traceback|/tmp|/home|/root", text)


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_the_notebook_runs_and_shows_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book: Any = nbformat.read(BOOK, 4)
    nbformat.validate(book)
    (settings,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    assert settings.source.startswith("STEPS = ")
    settings.source = "STEPS = 3"
    for cell in book.cells:
        cell.source = cell.source.replace("max_rows: 50,", "max_rows: 2,").replace("max_rows: 600", "max_rows: 40")
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = [out.data for cell in book.cells for out in cell.get("outputs", ()) if out.output_type != "stream"]
    for name in SHOWN:
        assert any(name in one["text/plain"] and one.get("text/html") for one in results), name
