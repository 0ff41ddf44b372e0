"""Sphinx builds the site of these pages: python -m sphinx -W --keep-going docs build/site (extra `docs`)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
REPOSITORY = "https://github.com/paft-merge/paft-merge"
ELSEWHERE = {
    "gallery": DOCS.parent / "recipes" / "README.md",
    "changelog": DOCS.parent / "CHANGELOG.md",
    "notebook": DOCS / "notebooks" / "paft.ipynb",
}
"""Pages of the site whose text is another file. The gallery has the recipes, too."""
REMOTE = re.compile(
    r"""<(?:script|img|iframe|source|video|link(?![^>]*rel="(?:canonical|next|prev)"))\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^>]*>"""
)
"""A tag with which a browser loads something from another site."""

project = "paft_merge"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["studies/results"]
smartquotes = False  # `--option` keeps its dashes
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "paft_merge"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}


def relinked(text: str, page: Path, name: str) -> str:
    """The text of a file as the page `name` of the site: links to files that the site does not have lead to the repository."""
    pages = {path: DOCS / f"{name}.md" for name, path in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        target = (page.parent / match[1]).resolve()
        if not target.exists() or not target.is_relative_to(DOCS.parent):  # Sphinx reports it
            return match[0]
        if target.suffix == ".yaml" and page == ELSEWHERE["gallery"]:
            return f"](#{target.name.replace('.', '')})"
        target = pages.get(target, target)
        if target.is_file() and target.is_relative_to(DOCS):
            return f"]({os.path.relpath(target, (DOCS / name).parent)}{_anchor(match[2], target)})"
        return f"]({REPOSITORY}/blob/main/{target.relative_to(DOCS.parent)}{match[2]})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#?[^)\s]*)\)", link, text)


def _anchor(anchor: str, page: Path) -> str:
    """The anchor of a heading in place of that of the `<a id>` above it, which MyST does not know."""
    heading = re.search(rf'<a id="{anchor[1:]}"></a>\n+#+ (.+)', page.read_text(encoding="utf-8")) if anchor else None
    return "#" + re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-") if heading else anchor


def notebook_page(book: dict[str, Any]) -> str:
    """A Jupyter notebook as Markdown: its texts, its code, and of each output the richest form."""
    parts = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            html, plain = data.get("text/html"), "".join(data["text/plain"])
            fence, kind, shown = (
                ("~~~~", "{raw} html", f'<div class="output">{"".join(html)}</div>') if html else ("```", "text", plain)
            )
            parts.append(f"{fence}{kind}\n{shown}\n{fence}")
    return "\n\n".join(parts) + "\n"


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    page = ELSEWHERE.get(name, Path(app.env.doc2path(name)))
    text = page.read_text(encoding="utf-8") if name in ELSEWHERE else source[0]
    source[0] = relinked(notebook_page(json.loads(text)) if page.suffix == ".ipynb" else text, page, name)
    if name == "gallery":
        for path in sorted((DOCS.parent / "recipes").glob("*.yaml")):
            source[0] += f"\n## {path.name}\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"


def _docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Read a docstring: code in single backticks, as in Markdown, and Google's sections. The list at the top of a module is left out."""
    from sphinx.ext.napoleon import Config, GoogleDocstring

    text = "" if what == "module" else "\n".join(lines)
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)|\|", lambda match: f"``{match[1]}``" if match[1] else r"\|", text)
    if what not in ("attribute", "property"):  # there a colon does not end a type
        text = str(GoogleDocstring(text, Config(strip_signature_backslash=True), app, what, name, obj, options))
    lines[:] = text.split("\n")


def _check(app: Sphinx, error: Exception | None) -> None:
    """Warn of everything that the site would load from elsewhere: it can be read without a network."""
    from sphinx.util import logging

    for page in [] if error else sorted(Path(app.outdir).rglob("*.html")):
        for tag in REMOTE.findall(page.read_text(encoding="utf-8")):
            logging.getLogger(__name__).warning("%s loads something from another site: %s", page.name, tag)


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("build-finished", _check)
