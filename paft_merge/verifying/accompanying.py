"""Config, tokenizer, chat template and other files of a finished model beside those that the recipe means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from paft_merge.differences import side_file_changes as changes
from paft_merge.differences.kinds import Change
from paft_merge.inputs.adapters.binding import vocabulary_of
from paft_merge.plan.vocabulary.tokenizers import files_in
from paft_merge.plan.vocabulary.trained_tokenizers import TrainedTokenizer
from paft_merge.verifying.findings import Finding

_SIDES = ("the recipe", "OUT")
_KINDS = {
    "config.json": "config",
    changes.GENERATION: "config",
    "tokens": "vocabulary",
    "tokenizer": "tokenizer",
    "chat template": "template",
}
_OF_CODES = ("quantization_config", "compression_config")


def compare_files(folder: Path, meant: Path, *, adapter: bool, coded: bool) -> Iterator[Finding]:
    """Yield the differences of the side files of two folders that change what a model does.

    Args:
        folder: of the finished model.
        meant: with the files that the recipe means.
        adapter: the finished model is an adapter: its base has the config, and its tokenizer if it has none itself.
        coded: it stores codes, which its config describes.
    """
    for change in _changes(folder, meant, adapter=adapter, coded=coded):
        if change.counts:
            fix = "restore that of the recipe, or write what you mean in the recipe"
            yield Finding(_KINDS.get(change.file, "file"), change.file, change.what, fix)
    rows = vocabulary_of(changes.settings(folder / "config.json"))
    last = max(TrainedTokenizer(files_in(folder)).ids.values(), default=0)
    if rows and last >= rows:
        what = f"has ids up to {last:,}, and the embeddings have {rows:,} rows: a text with such tokens cannot be read"
        yield Finding(
            "vocabulary", "tokenizer", what, "resize the embeddings, or use the tokenizer of the base", fault=False
        )


def _changes(folder: Path, meant: Path, *, adapter: bool, coded: bool) -> Iterator[Change]:
    tokenizers = files_in(meant), files_in(folder)
    if tokenizers[1] or not adapter:
        yield from changes.of_tokenizers(*tokenizers, _SIDES)
    if adapter:
        return
    ours = changes.settings(folder / "config.json")
    passed = _OF_CODES if coded else ()
    yield from changes.of_configs(
        changes.settings(meant / "config.json"), {k: v for k, v in ours.items() if k not in passed}, _SIDES
    )
    yield from changes.of_generation(meant, folder, _SIDES)
    yield from changes.of_other_files(meant, folder, (None, None), _SIDES)
