"""The Markdown text of a card."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml

from paft_merge.errors import HOME, escape
from paft_merge.inputs.source_labels import labels_of
from paft_merge.output.card.metadata import Score, card_metadata, licence
from paft_merge.output.card.verified import rows_of
from paft_merge.output.manifest import MANIFEST


def page(
    manifest: Mapping[str, Any], scores: Sequence[Score], picture: str | None, verified: Mapping[str, Any] | None = None
) -> str:
    """Return the card without the digest at its end.

    Args:
        manifest: the manifest of the merge.
        scores: evaluation results.
        picture: file name of the picture, if any.
        verified: the report of `paft verify`, if any.
    """
    recipe = manifest["recipe"]
    name = recipe.get("name") or "Merged model"
    data = yaml.safe_dump(card_metadata(manifest, name, scores), sort_keys=False, allow_unicode=True).strip()
    space = recipe.get("space", "weight")
    where = "" if space == "weight" else " in " + _code(f"space: {space}")
    made = f"Made by paft_merge with the method {_code(recipe['merge_method'])}{where}."
    parts = [
        ["---", data, "---", "", f"# {escape_markdown(name)}", "", made, ""],
        _adapter(manifest),
        _sources(manifest),
        _use(manifest),
        _measured(manifest),
        _codes(manifest),
        [f"![Sparsity of each source, layer by layer]({picture})", ""] if picture else [],
        _scores(scores),
        _verified(dict(verified or {})),
        ["## Recipe", "", *_fenced((manifest.get("recipe_text") or _yaml(manifest)).strip()), ""],
        _reproduce(manifest),
    ]
    return "\n".join(line for part in parts for line in part)


def escape_markdown(text: object) -> str:
    """Text of a stranger for a cell or a line of Markdown: one line, without control characters, and with the marks of Markdown and HTML escaped."""
    return _MARKS.sub(r"\\\g<0>", html.escape(escape(" ".join(str(text).split())), quote=False))


_MARKS = re.compile(r"[\\`*{}\[\]|#!~$]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is text


def _code(text: object) -> str:
    """Text of a stranger as code in a cell of a card."""
    return f"`{escape(' '.join(str(text).split())).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _fenced(text: str) -> list[str]:
    """Text as a block of YAML whose fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    return [f"{'`' * (longest + 1)}yaml", text, "`" * (longest + 1)]


def _yaml(manifest: Mapping[str, Any]) -> str:
    return yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True)


def _sources(manifest: Mapping[str, Any]) -> list[str]:
    rows = []
    for source in manifest.get("sources", ()):
        role = "adapter" if source["kind"] == "adapter" else "base" if source.get("donor") else "model"
        licensed = source.get("card", {}).get("license_name") or source.get("card", {}).get("license") or "not stated"
        if source.get("repo_id"):
            repo, commit = source["repo_id"], source["commit"]
            asked = f" ({_code(source['revision'])})" if source.get("revision") not in (None, commit) else ""
            inside = quote(f"/tree/{commit}/{source['folder']}") if source.get("folder") else ""
            place = f"[{escape_markdown(source['path'])}](https://huggingface.co/{quote(repo)}{inside})"
            revision = f"{_code(commit)}{asked}"
        else:
            place, revision = _code(source["path"]), "a local folder"
        rows.append(f"| {place} | {role} | {revision} | {escape_markdown(licensed)} |")
    if not rows:
        return []
    problems = [line for problem in licence(manifest)[1] for line in (f"Note: {escape_markdown(problem.what)}.", "")]
    head = ["| source | as | revision | licence |", "|---|---|---|---|"]
    return ["## Sources", "", *head, *rows, "", *problems]


def _use(manifest: Mapping[str, Any]) -> list[str]:
    """How a sparse delta is added to its base; nothing for other outputs."""
    output, base = manifest["recipe"].get("output") or {}, manifest.get("donor", "BASE")
    if output.get("kind") != "delta":
        return []
    if output.get("format") == "shira":
        text = f"A SHiRA adapter of {_code(base)}: `PeftModel.from_pretrained(base, FOLDER)` loads it."
    else:
        text = f"The entries that the merge changes in {_code(base)}. {_code(f'{base}+FOLDER')} is the merged model in recipes of paft_merge."
    return ["## Use", "", text, ""]


def _adapter(manifest: Mapping[str, Any]) -> list[str]:
    """What an adapter is for, and how far it is from the merged deltas; nothing for a checkpoint."""
    found = manifest.get("adapter")
    if not found:
        return []
    base = manifest.get("recipe", {}).get("base_model") or manifest.get("donor", "").partition("+")[0]
    named = base if isinstance(base, str) else base.get("model", {}).get("path", "its base")
    error = found["relative_error"]
    exact = "exactly, but for rounding" if error < 1e-5 else f"with a relative error of {error:.3g}"
    outside = found.get("outside")
    lost = "" if outside is None else (
        f" D is merged in subspaces of rank {found['rank']}, which hold {1 - outside:.1%} of the squared norms of the sources."
    )  # fmt: skip
    text = (
        f"A LoRA of rank {found['rank']} on {found['modules']} modules of {_code(named)}. It holds the merged delta D {exact} "
        f"(norm of D - B A over norm of D, over all modules).{lost}"
    )
    rows = [f"| {_code(module)} | {value:.3g} |" for module, value in found["largest"].items() if value >= 1e-5]
    table = ["| largest errors | |", "|---|---|", *rows, ""] if rows else []
    return ["## Adapter", "", text, "", *table]


def _measured(manifest: Mapping[str, Any]) -> list[str]:
    """Statistics of each source's delta, and how much of it was merged."""
    rows = [row for row in manifest.get("totals", ()) if row.get("l2")]
    notes = [line for text in manifest.get("warnings", ()) for line in (f"Note: {escape_markdown(text)}", "")]
    if not rows:
        return notes
    if not any("kept" in row for row in rows):
        return [*_norms(rows), *notes]
    measured = any(row.get("weights") for row in rows)
    head = ["| source | delta entries | below 1e-5 | kept | elected | L2 norm |", "|---|---|---|---|---|---|"]
    head = [f"{line}{more}" for line, more in zip(head, (" weight |", "---|"), strict=True)] if measured else head
    body = [
        f"| {_code(label)} | {r['entries']:,} | {_share(r, 'below_1e-05')} | {_share(r, 'kept')} | {_share(r, 'elected')} "
        f"| {r['l2']:.4g} |{f' {_weights(r)} |' if measured else ''}"
        for label, r in zip(labels_of([row["source"] for row in rows]), rows, strict=True)
    ]
    legend = (
        "Entries of each source's delta (its difference from the base); the shares of them that are almost zero, that "
        "the method kept, and whose sign was elected."
    )
    return ["## Deltas", "", legend, "", *head, *body, "", *notes]


def _norms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The norms of deltas that were merged by their factors, alone and weighted."""
    whole = sum(row["weighted_l2"] ** 2 for row in rows if row.get("weighted_l2"))
    weighed = [(row.get("weighted_l2") or 0.0) for row in rows]
    body = [
        f"| {_code(label)} | {row['l2']:.4g} | {own:.4g} | {own**2 / whole if whole else 0:.1%} |"
        for label, row, own in zip(labels_of([row["source"] for row in rows]), rows, weighed, strict=True)
    ]
    legend = "L2 norm of each source's delta, also times its weight, and the share of the squares of the latter."
    head = ["| source | L2 norm | times weight | share |", "|---|---|---|---|"]
    return ["## Deltas", "", legend, "", *head, *body, ""]


def _codes(manifest: Mapping[str, Any]) -> list[str]:
    """What rounding to codes lost (`quantization: keep`); nothing for other outputs."""
    found = manifest.get("quantization")
    if not found:
        return []
    text = (
        f"The weights are quantised as those of the base. The merge changes {found['updated']:,} of their entries; "
        f"{found['unmoved_share']:.1%} of these did not move, because codes are coarse. The relative error of the update "
        f"(norm of the error over norm of the update) is {found['relative_error']:.3g}."
    )
    return ["## Quantisation", "", text, ""]


def _weights(row: Mapping[str, Any]) -> str:
    """The measured weight of a source, or the smallest and the largest of its tensors."""
    return " to ".join(dict.fromkeys(f"{weight:g}" for weight in row.get("weights") or ())) or "-"


def _share(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key] / row['entries']:.1%}" if row["entries"] and row.get(key) is not None else "-"


def _scores(scores: Sequence[Score]) -> list[str]:
    if not scores:
        return []
    head = ["| task | metric | shots | value | standard error |", "|---|---|---|---|---|"]
    body = [
        f"| {escape_markdown(s.task)} | {escape_markdown(s.metric)} | {'-' if s.shots is None else s.shots} | {s.value:.4g} "
        f"| {'-' if s.stderr is None else f'{s.stderr:.2g}'} |"
        for s in scores
    ]
    return ["## Evaluation", "", *head, *body, ""]


def _verified(report: dict[str, Any]) -> list[str]:
    """What `paft verify` found; nothing without its report."""
    if not report:
        return []
    head = ["| compared with | KL of a token, in nats | same next token | drift of a layer |", "|---|---|---|---|"]
    rows = [f"| {' | '.join(row)} |" for row in rows_of(report)]
    table = [*head, *rows, ""] if rows else []
    return [
        "## Verification",
        "",
        f"`paft verify`: this model {escape_markdown(report.get('verdict', ''))}.",
        "",
        *table,
    ]


def _reproduce(manifest: Mapping[str, Any]) -> list[str]:
    version = manifest.get("versions", {}).get("paft-merge", "unknown")
    local = [s["path"] for s in manifest.get("sources", ()) if not s.get("repo_id")]
    needs = f" Reproduction needs {', '.join(_code(path) for path in local)} unchanged." if local else ""
    record = f"`{MANIFEST}` records the parameters, counts and digest of every tensor, and the commit of every source."
    return [
        "## Reproduce", "", f"Written by paft-merge {_code(version)} ([how to install it]({HOME}#install)).", "", "```sh",
        "paft reproduce REPOSITORY_OR_FOLDER   # merges again and compares every byte", "```", "",
        f"{record}{needs}", "",
    ]  # fmt: skip
