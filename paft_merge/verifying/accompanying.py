"""Config, tokenizer and chat template of a finished model beside those that the recipe means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paft_merge.errors import AuditError, reading
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.recipe.yaml_source import show
from paft_merge.verifying.findings import Finding

_MOST = 64 << 20
_QUIET = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "compression_config",
    "use_cache",
    "architectures",
)
"""Keys of a config that do not change what a model computes, or that the output's type changes."""

_SHOWN = 5


def compare_files(folder: Path, meant: Path, *, adapter: bool) -> Iterator[Finding]:
    """Yield what differs between the side files of two folders.

    Args:
        folder: of the finished model.
        meant: with the files that the recipe means.
        adapter: the finished model is an adapter, which may have no config or tokenizer: its base has them.
    """
    if not adapter:
        yield from _config(_json(folder / "config.json"), _json(meant / "config.json"))
    ours, theirs = _vocabulary(folder), _vocabulary(meant)
    if ours and theirs:
        yield from _tokens(ours, theirs)
    elif theirs and not ours and not adapter:
        yield Finding("tokenizer", "tokenizer.json", "is missing", "copy it from the base")
    ours_too, wanted = _template(folder), _template(meant)
    if wanted and not ours_too and not adapter:
        yield Finding(
            "template",
            "chat template",
            "is dropped: the base's tokenizer has one",
            "copy chat_template.jinja from the base",
        )
    elif ours_too != wanted and not (adapter and not (ours_too and wanted)):
        what = "is another than the recipe's" if wanted else "is new: the recipe's tokenizer has none"
        yield Finding("template", "chat template", what, "write chat_template in the recipe, or restore the base's")


def _config(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[Finding]:
    for key in sorted({*ours, *theirs} - {*_QUIET}):
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _config(one, other, f"{prefix}{key}.")
        elif one != other and (key in theirs or other is not None):
            yield Finding(
                "config",
                f"config.json: {prefix}{key}",
                f"is {show(one)}, and the recipe's is {show(other)}",
                "restore it",
            )


def _tokens(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Iterator[Finding]:
    moved = {token: (ours[token], at) for token, at in theirs.items() if token in ours and ours[token] != at}
    lost = [token for token in theirs if token not in ours]
    new = [token for token in ours if token not in theirs]
    fix = "restore the tokenizer of the recipe"
    if moved:
        shifts = {one - other for one, other in moved.values()}
        token, (one, other) = next(iter(moved.items()))
        how = f"all by {shifts.pop():+d}" if len(shifts) == 1 else "by different numbers"
        yield Finding(
            "vocabulary",
            "tokenizer",
            f"{len(moved):,} tokens have other ids, {how}: {show(token)} is {one}, and the recipe's is {other}",
            fix,
        )
    if lost:
        yield Finding(
            "vocabulary", "tokenizer", f"lacks {len(lost):,} tokens: {', '.join(map(show, lost[:_SHOWN]))}", fix
        )
    if new:
        yield Finding(
            "vocabulary",
            "tokenizer",
            f"has {len(new):,} tokens that the recipe's has not: {', '.join(map(show, new[:_SHOWN]))}",
            fix,
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Every token of `tokenizer.json` or `vocab.json` with its id; empty without such a file."""
    whole = _json(folder / "tokenizer.json")
    if not whole:
        return {str(k): v for k, v in _json(folder / "vocab.json").items() if isinstance(v, int)}
    model = whole.get("model")
    held: Any = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(held, Mapping):
        found = {str(k): v for k, v in held.items() if isinstance(v, int)}
    else:  # a unigram model lists pairs of token and score
        found = {str(pair[0]): i for i, pair in enumerate(held or ()) if isinstance(pair, list) and pair}
    for one in whole.get("added_tokens") or ():
        if isinstance(one, Mapping) and isinstance(one.get("id"), int):
            found[str(one.get("content"))] = one["id"]
    return found


def _template(folder: Path) -> str:
    """The chat template of a folder; empty without one."""
    if (file := folder / "chat_template.jinja").is_file():
        return read_text(file, "TEMPLATE", _MOST)
    return str(_json(folder / "tokenizer_config.json").get("chat_template") or "")


def _json(file: Path) -> dict[str, Any]:
    """A JSON file of a mapping; empty if there is none."""
    if not file.is_file():
        return {}
    with reading(file, "VERIFY", AuditError, "restore it"):
        found = json.loads(read_text(file, "VERIFY", _MOST))
    return found if isinstance(found, dict) else {}
