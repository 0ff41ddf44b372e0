"""Tokenizers: loaded by transformers, cut to a model's rows, joined, and saved.

transformers is imported only when a recipe has a tokenizer or a chat template.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from paft_merge.errors import CheckpointError
from paft_merge.inputs.links import may_be_read
from paft_merge.inputs.model_config import refuse_outside_files
from paft_merge.inputs.safetensors_header import quote

if TYPE_CHECKING:
    from paft_merge.inputs.models import Model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""The files of a tokenizer."""
MORE_TEMPLATES = "additional_chat_templates/"
"""The folder of chat templates with names."""

TokenizerFiles = Mapping[str, bytes | Path]
"""A tokenizer's files by name: the content, or the path of the file."""

_ANY_OF = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_OF_THIS_RUN = ("is_local", "local_files_only", "name_or_path")
"""Keys in a saved tokenizer_config.json that describe where it was loaded."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One model's tokenizer.

    Attributes:
        ref: its model, for messages.
        source: the files that it was loaded from.
        ids: every token and its id.
        added: added tokens with their settings, by id.
        loaded: the transformers object.
        changed: whether it differs from the files.
    """

    ref: str
    source: TokenizerFiles
    ids: Mapping[str, int]
    added: Mapping[int, Any]
    loaded: Any
    changed: bool = False

    @classmethod
    def load(cls, source: TokenizerFiles, ref: str) -> Tokenizer:
        """Load a tokenizer without running remote code.

        Raises:
            CheckpointError: TOKENIZER, it cannot be loaded, or it has no fast form.
        """
        with _as_folder(source) as folder:
            return cls._of(ref, source, _load(folder))

    @classmethod
    def _of(cls, ref: str, source: TokenizerFiles, loaded: Any, changed: bool = False) -> Tokenizer:
        ids = dict(sorted(loaded.get_vocab().items(), key=lambda item: item[1]))
        return cls(ref, source, ids, dict(sorted(loaded.added_tokens_decoder.items())), loaded, changed)

    def beyond(self, rows: int) -> list[str]:
        """The tokens that a model of `rows` rows has no row for."""
        return [token for token, number in self.ids.items() if number >= rows]

    def cut(self, rows: int) -> Tokenizer:
        """The tokenizer without the tokens beyond `rows`.

        Raises:
            CheckpointError: TOKENIZER, its format does not allow their removal.
        """
        gone = set(self.beyond(rows))
        if not gone:
            return self
        with TemporaryDirectory() as folder:
            self._save(Path(folder))
            file = Path(folder) / "tokenizer.json"
            data = json.loads(file.read_text())
            data["added_tokens"] = [one for one in data["added_tokens"] if one["id"] < rows]
            _cut_model(data["model"], gone, rows)
            file.write_text(json.dumps(data, ensure_ascii=False))
            return Tokenizer._of(self.ref, self.source, _load(Path(folder)), changed=True)

    def with_tokens(self, tokens: Sequence[Any]) -> Tokenizer:
        """The tokenizer with those of `tokens` (texts, or texts with settings) that it lacks, numbered after its last id."""
        if not tokens:
            return self
        with TemporaryDirectory() as folder:  # a copy, because the loaded object is shared
            self._save(Path(folder))
            loaded = _load(Path(folder))
        loaded.add_tokens(list(tokens))
        return Tokenizer._of(self.ref, self.source, loaded, changed=True)

    def files(self) -> dict[str, bytes | Path]:
        """Its files by name: the ones it was loaded from, or new ones if it was changed."""
        if not self.changed:
            return dict(self.source)
        with TemporaryDirectory() as folder:
            self._save(Path(folder))
            return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}

    def _save(self, folder: Path) -> None:
        with quiet():
            self.loaded.save_pretrained(str(folder))
        file = folder / "tokenizer_config.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k not in _OF_THIS_RUN}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


_FAST = "load it where it works and save it again: AutoTokenizer.from_pretrained(...).save_pretrained(...)"


def tokenizer_files(model: Model) -> TokenizerFiles | None:
    """The files of a model's tokenizer: its last adapter's that has one, else its checkpoint's; None without one.

    An adapter's folder with a chat template and no tokenizer changes the template of the checkpoint's tokenizer.
    """
    files = checkpoint_tokenizer(model)
    for part in model.adapter.parts if model.adapter else ():
        own = files_in(part.folder)
        template = {name: content for name, content in own.items() if name.startswith("chat_template.")}
        kept = {
            name: content for name, content in files.items() if not (template and name.startswith("chat_template."))
        }
        files = own if is_tokenizer(own) else {**kept, **template}
    return files if is_tokenizer(files) else None


def checkpoint_tokenizer(model: Model) -> dict[str, bytes | Path]:
    """The tokenizer and chat-template files of a model's checkpoint."""
    given = model.checkpoint.tokenizer_files
    return files_in(model.checkpoint.folder) if given is None else dict(given)


def files_in(folder: Path) -> dict[str, bytes | Path]:
    """The tokenizer and chat-template files in a folder."""
    found: dict[str, bytes | Path] = {
        name: folder / name for name in TOKENIZER_FILES if may_be_read(folder / name, folder)
    }
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja")) if (folder / MORE_TEMPLATES).is_dir() else []
    return found | {f"{MORE_TEMPLATES}{file.name}": file for file in more if may_be_read(file, folder)}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer."""
    return name in TOKENIZER_FILES or name.startswith(MORE_TEMPLATES)


def is_tokenizer(files: TokenizerFiles) -> bool:
    """Whether these files make a tokenizer."""
    return any(name in files for name in _ANY_OF)


def join(base: Tokenizer, others: Sequence[tuple[Tokenizer, int]]) -> tuple[Tokenizer, list[str]]:
    """The union of tokenizers: the base's ids, then the tokens of the others in the order of tokenizers and ids.

    mergekit adds the same tokens in random order.

    Args:
        base: cut to its rows.
        others: each with the number of rows of its model; tokens beyond them are left out.

    Returns:
        The union, and the tokens that were added with different settings (the first ones are kept).
    """
    settings = {info.content: info for info in base.added.values()}
    doubtful: dict[str, None] = {}
    for other, rows in others:
        for number, info in other.added.items():
            if number < rows and settings.setdefault(info.content, info) != info:
                doubtful[info.content] = None
    tokens = {info.content: info for info in settings.values() if info.content in base.ids}
    for other, rows in others:
        tokens |= {t: settings.get(t, t) for t, number in other.ids.items() if number < rows and t not in base.ids}
    kept = {info.content for info in base.added.values()}
    return base.with_tokens([info for token, info in tokens.items() if token not in kept]), list(doubtful)


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    refuse_outside_files(folder)
    try:
        with quiet():
            loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises anything on unknown files
        first = str(error).strip().split("\n")[0][:200]
        what = f"its tokenizer cannot be loaded: {type(error).__name__}: {first}"
        raise CheckpointError.of("TOKENIZER", folder, what, _FAST) from error
    if not loaded.is_fast:
        raise CheckpointError.of("TOKENIZER", folder, "has no fast tokenizer (tokenizer.json)", _FAST)
    return loaded


@contextmanager
def _as_folder(files: TokenizerFiles) -> Iterator[Path]:
    """A folder with the files: their own if they share one, else a temporary one."""
    folders = {content.parent for content in files.values() if isinstance(content, Path)}
    if len(folders) == 1 and not any(isinstance(content, bytes) for content in files.values()):
        yield folders.pop()
        return
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        yield Path(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log and the warnings of transformers."""
    from transformers.utils import logging

    loud = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(loud)


def _cut_model(model: dict[str, Any], gone: set[str], rows: int) -> None:
    """Remove tokens, and the merges that contain them, from the `model` of a tokenizer.json."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {token: number for token, number in vocabulary.items() if number < rows}
    elif isinstance(vocabulary, list):
        model["vocab"] = vocabulary[:rows]
    else:
        what = (
            f"has tokens without a row, such as {quote(sorted(gone)[0])}, in a format from which they cannot be removed"
        )
        raise CheckpointError.of("TOKENIZER", "tokenizer.json", what, "remove them first")
    if "merges" in model:
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if not gone & {*pair, "".join(pair)}]
