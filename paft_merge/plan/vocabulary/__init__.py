"""The vocabulary of the output: its tokenizer, and the source of every row of every embedding.

| module | contents |
|---|---|
| tokenizers | tokenizers loaded, cut, joined and saved |
| alignment | the model and row that each row of an embedding comes from |
| embedding_tensors | the tensors with one row per token |
| chat_templates | the chat template |
| trained_tokenizers | tokenizers and templates of adapters, compared with the output's |

`inputs.remapped_embeddings` reads the rows, in blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from paft_merge.errors import CheckpointError, PaftMergeError, Problem, Problems, RecipeError
from paft_merge.inputs.remapped_embeddings import Gathered
from paft_merge.inputs.safetensors_header import join_first, quote, read_text
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.plan.layer_stacks import with_nested
from paft_merge.plan.vocabulary.alignment import Alignment, Word
from paft_merge.plan.vocabulary.embedding_tensors import vocabulary_rows, vocabulary_tensors
from paft_merge.plan.vocabulary.tokenizers import (
    Tokenizer,
    TokenizerFiles,
    checkpoint_tokenizer,
    files_in,
    is_tokenizer,
    is_tokenizer_file,
    join,
    tokenizer_files,
)
from paft_merge.plan.vocabulary.trained_tokenizers import (
    TrainedTokenizer,
    grown_by,
    lost_in_output,
    only_tokenizer_of,
    own_tokenizer,
    with_end_of,
)
from paft_merge.recipe import ModelRef, Recipe, TokenizerEntry, TokenRow, ZeroRow, did_you_mean

if TYPE_CHECKING:
    from paft_merge.inputs.models import Model

__all__ = ["Vocabulary", "is_tokenizer_file", "read_vocabulary"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer and the embedding rows of the output, by a recipe's `tokenizer` and `chat_template`.

    Attributes:
        files: the tokenizer's files by name: content, or the file to copy. They replace those of the config source.
        alignment: the rows of the embeddings; None where they do not change.
        tensors: names of tensors with one row per token.
        facts: the entry of the manifest.
        end: the id of the end of sequence, where an adapter was trained with another one than the config source has.
    """

    files: TokenizerFiles
    alignment: Alignment | None = None
    tensors: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    end: int | None = None

    def align(self, reads: Sequence[Read], name: str, everywhere: Mapping[str, Read]) -> list[Read]:
        """Read tensors in the output's vocabulary.

        Args:
            reads: the tensors that one output tensor is merged from.
            name: its name; a tensor without a row per token does not change.
            everywhere: the tensor in every model of the recipe that has it, by model.

        Raises:
            CheckpointError: VOCABULARY, the recipe takes a row from a model that lacks the tensor.
        """
        alignment = self.alignment
        if alignment is None or name not in self.tensors:
            return list(reads)
        for word in alignment.words.values():
            if word.model is not None and word.model not in everywhere:
                what = f"lacks {quote(name)}, from which the recipe takes a token's row"
                raise CheckpointError.of("VOCABULARY", word.model, what, "take the row from another model")
        donors = tuple(everywhere.get(ref, reads[0]) for ref in alignment.own)  # models without it provide no rows
        merged = tuple(dict.fromkeys(read.source for read in reads))
        made = []
        for read in reads:
            rows = alignment.map(read.source, merged)
            at, size = list(alignment.own).index(read.source), alignment.sizes[read.source]
            made.append(read if rows.is_own(at, size) else Gathered.of(read, donors, rows))
        return made

    def in_config(self, config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """`changes` of a config, with the output's `vocab_size` and `eos_token_id` where the config has others."""
        made = dict(changes) | ({} if self.end is None else {"eos_token_id": self.end})
        if self.alignment is None:
            return made
        rows = self.alignment.rows
        inner = next((key for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)), None)
        if inner and "vocab_size" not in config:
            section = {**config[inner], **made.get(inner, {})}
            if section.get("vocab_size") != rows:
                made[inner] = {**section, "vocab_size": rows}
        elif {**config, **made}.get("vocab_size") != rows:
            made["vocab_size"] = rows
        return made

    def in_generation_config(self, content: bytes) -> bytes:
        """A generation_config.json that stops at the end of sequence of the training too."""
        if self.end is None:
            return content
        try:
            changed = with_end_of(json.loads(content), [self.end])
        except (ValueError, AttributeError, TypeError):
            return content
        return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()

    def digest(self) -> str:
        """A digest of tokenizer files and row maps; a merge is resumed only with an equal one."""
        digest = xxhash.xxh3_128()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + (content if isinstance(content, bytes) else content.read_bytes()))
        for ref, own in self.alignment.own.items() if self.alignment else ():
            digest.update(ref.encode() + own.tobytes())
        return digest.hexdigest()


def read_vocabulary(
    recipe: Recipe, models: Mapping[ModelRef, Model], config_source: Model
) -> tuple[Vocabulary | None, list[Problem]]:
    """Read a recipe's `tokenizer`, `tokenizer_source` and `chat_template`.

    Without them the output has the tokenizer of the config source; or an adapter's, if adapters make the embeddings longer
    and exactly one tokenizer has the new tokens.

    Args:
        recipe: the recipe.
        models: every model that the recipe refers to, opened.
        config_source: the base, or the first model.

    Returns:
        None where the tokenizer files of the config source are copied; and warnings.

    Raises:
        RecipeError: all errors together.
    """
    reader = _Reader(recipe, models, config_source)
    found = reader.read()
    return found, reader.warnings


_MOST_HOLES = 1 << 17
"""Limit of unused ids in a tokenizer; each is a row in every embedding."""


class _Reader:
    def __init__(self, recipe: Recipe, models: Mapping[ModelRef, Model], config_source: Model) -> None:
        self.recipe, self.models, self.config_source = recipe, models, config_source
        self.problems, self.warnings = Problems(), list[Problem]()
        self.loaded: dict[tuple[object, ...], Tokenizer | None] = {}

    def read(self) -> Vocabulary | None:
        entry, own = self.recipe.tokenizer, TrainedTokenizer(checkpoint_tokenizer(self.config_source))
        made = self._with_tokenizer(entry) if entry is not None else self._copied(own)
        files = self._with_template(made.files) if made is not None else {}
        self.problems.raise_as(RecipeError)
        assert made is not None, "a missing vocabulary has a problem"
        self._warn_of_lost(entry, files, own)
        if files == own.files and entry is None and not self.recipe.chat_template:
            return None
        return Vocabulary(files, made.alignment, made.tensors, made.facts, end=_end_of(files, own))

    def _warn_of_lost(self, entry: TokenizerEntry | None, files: TokenizerFiles, own: TrainedTokenizer) -> None:
        """Warn of adapters that were trained with another tokenizer or chat template than the recipe gives the output."""
        if self.config_source.checkpoint.file:  # the output has no tokenizer at all
            return
        free = entry is None
        self.warnings += lost_in_output(
            self.models.values(), files, own, tokens=free, special=free or (entry is not None and entry.source == "union"),
            template=not self.recipe.chat_template,
        )  # fmt: skip

    # Rows

    def _with_tokenizer(self, entry: TokenizerEntry) -> Vocabulary | None:
        """The recipe's tokenizer, and the rows of its tokens in every model."""
        sizes: dict[str, int] = {}
        for model in self.models.values():
            with self.problems.catching():
                sizes[model.ref] = vocabulary_rows(model)
        owned = {model.ref: self._of(model, sizes) for model in self.models.values()}
        base = owned[self.config_source.ref]
        if self.problems.found or base is None or None in owned.values():
            return None
        output = None
        with self.problems.catching():
            output = self._output(entry, {ref: t for ref, t in owned.items() if t}, sizes)
        if output is None:
            return None
        known = {ref: tokenizer.ids for ref, tokenizer in owned.items() if tokenizer}
        words = self._words(entry, output, known, sizes)
        count = max(output.ids.values(), default=-1) + 1
        if count > 2 * len(output.ids) + _MOST_HOLES:
            what = f"the ids of its {len(output.ids):,} tokens go up to {count - 1:,}"
            self.problems.add("TOKENIZER", output.ref, what, "take a tokenizer that numbers its tokens one by one")
            return None
        multiple = entry.pad_to_multiple_of or 1
        rows = -(-count // multiple) * multiple
        alignment = Alignment.of(rows, output.ids, known, sizes, words, self._base_ref())
        self._warn(output, alignment, base)
        facts = {
            "tokens": len(output.ids), "rows": rows,
            "models": {ref: alignment.counts(ref) for ref in alignment.own},
        }  # fmt: skip
        if not alignment.is_needed:
            return Vocabulary(output.files(), facts=facts)
        return Vocabulary(output.files(), alignment, self._tensors(sizes), facts)

    def _of(self, model: Model, sizes: Mapping[str, int]) -> Tokenizer | None:
        """A model's tokenizer; without one, the config source's if the models have equally many rows."""
        files = tokenizer_files(model)
        if (
            files is None
            and model is not self.config_source
            and sizes.get(model.ref) == sizes.get(self.config_source.ref)
        ):
            what = f"has no tokenizer, so that of {self.config_source.ref} is used"
            self.warnings.append(Problem("TOKENIZER", model.ref, what, "put its tokenizer files beside its weights"))
            files = tokenizer_files(self.config_source)
        if files is None:
            what, fix = "has no tokenizer", "put its tokenizer files beside its weights"
            self.problems.add("TOKENIZER", model.ref, what, fix)
            return None
        return self._load(files, model.ref)

    def _load(self, files: TokenizerFiles, ref: str) -> Tokenizer | None:
        """Load a tokenizer once, although several models may share it."""
        key = tuple(files.values())
        if key not in self.loaded:
            self.loaded[key] = None
            with self.problems.catching():
                self.loaded[key] = Tokenizer.load(files, ref)
        return self.loaded[key]

    def _output(
        self, entry: TokenizerEntry, owned: Mapping[str, Tokenizer], sizes: Mapping[str, int]
    ) -> Tokenizer | None:
        """The output's tokenizer, including the tokens that the recipe adds."""
        ref = self.config_source.ref
        if isinstance(entry.source, ModelRef):
            chosen, rows = self._chosen(entry.source, owned, sizes)
            if chosen is None:
                return None
        else:
            chosen, rows = owned[ref], sizes[ref]
        output = chosen.cut(rows) if rows is not None else chosen
        if gone := [token for token in chosen.ids if token not in output.ids]:
            what = f"{len(gone):,} of its tokens have no row in the model and are left out: {join_first(gone)}"
            self.warnings.append(Problem("TOKENIZER", chosen.ref, what, "resize its embeddings to keep them"))
        if entry.source == "union":
            others = [(tokenizer, sizes[other]) for other, tokenizer in owned.items() if other != ref]
            output, doubtful = join(output, others)
            for token in doubtful:
                what = f"token {quote(token)} was added with different settings in several models"
                self.warnings.append(
                    Problem("TOKENIZER", self._spot("source"), what, "those of the first model are kept")
                )
        return output.with_tokens([token for token in entry.tokens or () if token not in output.ids])

    def _chosen(
        self, source: ModelRef, owned: Mapping[str, Tokenizer], sizes: Mapping[str, int]
    ) -> tuple[Tokenizer | None, int | None]:
        """The tokenizer of any model, and the model's rows if it is one of the merged models."""
        from paft_merge.hub import fetch

        if source in self.models:
            ref = self.models[source].ref
            return owned[ref], sizes[ref]
        try:
            folders = [fetch(source.path, source.revision, kind="side")]
            for path, revision in source.adapters:
                folders.insert(0, fetch(path, revision, kind="side"))
        except PaftMergeError as error:
            for problem in error.problems:
                self.problems.add(problem.code, self._spot("source"), f"{problem.where} {problem.what}", problem.fix)
            return None, None
        found = [files for folder in folders if is_tokenizer(files := files_in(folder))]
        if not found:
            self.problems.add(
                "TOKENIZER", self._spot("source"), f"{source} has no tokenizer", "name a model that has one"
            )
            return None, None
        return self._load(found[0], str(source)), None

    def _words(
        self, entry: TokenizerEntry, output: Tokenizer, known: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int]
    ) -> dict[int, Word]:
        """The entries of `tokens:` by token id; errors are noted."""
        words: dict[int, Word] = {}
        for token, said in (entry.tokens or {}).items():
            if token not in output.ids:
                continue  # empty text cannot be a token
            number = output.ids[token]
            needed = said.force or not all(-1 < ids.get(token, -1) < sizes[ref] for ref, ids in known.items())
            if isinstance(said.source, ZeroRow):
                words[number] = Word(None, 0, said.force)
                continue
            ref = self._referenced(token, said.source.model if isinstance(said.source, TokenRow) else said.source)
            if ref is None:
                continue
            wanted: str | int = token
            if isinstance(said.source, TokenRow):
                wanted = said.source.token or said.source.token_id or 0
            row = wanted if isinstance(wanted, int) else known[ref].get(wanted, -1)
            if not 0 <= row < sizes[ref] and needed:
                self._no_row(token, ref, wanted, known[ref], sizes[ref])
            else:
                words[number] = Word(ref, row, said.force)
        return words

    def _referenced(self, token: str, source: ModelRef) -> str | None:
        """The model that a token's row is taken from."""
        if source in self.models:
            return self.models[source].ref
        names = [model.ref for model in self.models.values()]
        fix = did_you_mean(str(source), names) or f"name one of {', '.join(names)}"
        self.problems.add(
            "TOKENIZER", self._spot("tokens", token, "source"), f"{source} is not a model of this merge", fix
        )
        return None

    def _no_row(self, token: str, ref: str, wanted: str | int, ids: Mapping[str, int], size: int) -> None:
        if isinstance(wanted, int):
            what, fix = f"{ref} has {size:,} rows and no row {wanted:,}", f"give a token_id from 0 to {size - 1:,}"
        elif wanted in ids:
            what, fix = (
                f"{quote(wanted)} of {ref} has id {ids[wanted]:,}, beyond its {size:,} rows",
                "name another token",
            )
        else:
            what = f"{ref} has no token {quote(wanted)}"
            fix = did_you_mean(wanted, list(ids)) or "name a token that it has"
        self.problems.add("TOKENIZER", self._spot("tokens", token, "source"), what, fix)

    def _base_ref(self) -> str | None:
        base = self.recipe.base_model
        return self.models[base].ref if base else None

    def _tensors(self, sizes: Mapping[str, int]) -> frozenset[str]:
        """The tensors that have one row per token in any model, and therefore must in all."""
        found: set[str] = set()
        for model in self.models.values():
            with self.problems.catching():
                found |= vocabulary_tensors(model, sizes[model.ref])
        return frozenset(found)

    # Warnings

    def _warn(self, output: Tokenizer, alignment: Alignment, base: Tokenizer) -> None:
        old, rows = alignment.sizes[self.config_source.ref], alignment.rows
        if rows < old:
            what = f"the vocabulary shrinks from {old:,} to {rows:,} rows, {len(output.ids):,} of them tokens"
            fix = f"write pad_to_multiple_of: {_multiple(rows, old)} to keep {old:,}"
            fix = fix if _multiple(rows, old) else "no token of the output uses the rows left out"
            self.warnings.append(Problem("VOCABULARY", self._spot(), what, fix))
        if lacking := alignment.lacking():
            what = f"{len(lacking):,} tokens have no row in any model and become zeros: {join_first(lacking)}"
            self.warnings.append(
                Problem("VOCABULARY", self._spot(), what, "give the source of their rows under tokens:")
            )
        self._warn_of_moved_ids(output, base)

    def _warn_of_moved_ids(self, output: Tokenizer, base: Tokenizer) -> None:
        """Warn of each token id in the configs that changes its meaning."""
        before, after = ({number: token for token, number in t.ids.items()} for t in (base, output))
        folder = self.config_source.checkpoint.folder
        for name in ("config.json", "generation_config.json"):
            for key, number in _ids_in(_config(folder / name)):
                token = before.get(number)
                if token is None or after.get(number) == token:
                    continue
                now = f"{quote(after[number])} now" if number in after else "unused now"
                what = f"{key} is {number}, which was {quote(token)} and is {now}"
                fix = f"set it to {output.ids[token]}" if token in output.ids else "set it to a token of the output"
                self.warnings.append(Problem("TOKENIZER", f"{self.config_source.ref}: {name}", what, fix))

    def _spot(self, *steps: str) -> str:
        """The line of the recipe's `tokenizer` or `tokenizer_source`."""
        language = self.recipe.language
        key = "tokenizer_source" if language.tokenizer_source else "tokenizer"
        return str(self.recipe.located.spot((key,) if key == "tokenizer_source" else (key, *steps)))

    # The chat template

    def _copied(self, own: TrainedTokenizer) -> Vocabulary:
        """The config source's tokenizer, or the only one that fits embeddings which adapters made longer."""
        grown = grown_by(self.models.values())
        found = only_tokenizer_of(grown, own) if grown else None
        if found:
            ref, taken = found
            more = [token for token in taken.ids if token not in own.ids]
            what = f"makes the embeddings longer, so the output has its tokenizer, with {len(more):,} more tokens"
            what, fix = (
                f"{what} ({join_first(more)})",
                "write `tokenizer_source: base` for the base's tokenizer and rows",
            )
            self.warnings.append(Problem("TOKENIZER", ref, what, fix))
            return Vocabulary(taken.files)
        for ref, (rows, theirs) in grown.items():
            known = max(own.ids.values(), default=-1) + 1
            if own.ids and known < rows:
                what = f"makes the embeddings {rows:,} rows long, and the output's tokenizer has {known:,} tokens"
                fix = (
                    f"write `tokenizer_source: {ref}`" if theirs and theirs.ids else "put its tokenizer into its folder"
                )
                self.warnings.append(Problem("TOKENIZER", ref, what, fix))
        return Vocabulary(own.files)

    def _with_template(self, files: TokenizerFiles) -> TokenizerFiles:
        written, spot = self.recipe.chat_template, self.recipe.located.spot(("chat_template",))
        if not written:
            return files
        from paft_merge.plan.vocabulary.chat_templates import ChatTemplateError, choose_template, with_template

        try:
            offered = self._templates()
            text = choose_template(written, offered)
        except ChatTemplateError as fault:
            self.problems.add("CHAT_TEMPLATE", spot, fault.what, fault.fix)
            return files
        if not is_tokenizer(files):
            what = f"{self.config_source.ref} has no tokenizer to write a chat template to"
            self.problems.add("CHAT_TEMPLATE", spot, what, "put its tokenizer files beside its weights, or remove it")
            return files
        if text is None:
            self.warnings.append(Problem("CHAT_TEMPLATE", str(spot), "no model has a chat template", "name one"))
            return files
        files = with_template(files, text)
        end = next((one.special.get("eos_token") for one in offered if (one.template or "").strip() == text), None)
        made = TrainedTokenizer(files)
        if written == "auto" and self.recipe.tokenizer is None and end and end in made.ids:
            return made.with_end(end) if made.special.get("eos_token") != end else files
        return files

    def _templates(self) -> list[TrainedTokenizer]:
        """The tokenizers whose templates `auto` chooses from: those of adapters, if any of these has a template."""
        own = [one for model in self.models.values() if (one := own_tokenizer(model)) and one.template]
        return own or [TrainedTokenizer(tokenizer_files(model) or {}) for model in self.models.values()]


def _end_of(files: TokenizerFiles, base: TrainedTokenizer) -> int | None:
    """The id of the output's end of sequence, if the base's tokenizer has another end."""
    output = TrainedTokenizer(files)
    end = output.special.get("eos_token")
    return None if files == base.files or end is None or end == base.special.get("eos_token") else output.ids.get(end)


def _multiple(rows: int, old: int) -> int:
    """The smallest usual multiple that pads `rows` to `old`; 0 when none does."""
    return next((m for m in (8, 16, 32, 64, 128, 256, 512, 1024) if -(-rows // m) * m == old), 0)


def _config(path: Path) -> Any:
    """A JSON file; empty if it is missing or broken (an error that opening the checkpoint reports)."""
    try:
        return json.loads(read_text(path, "CONFIG_INVALID"))
    except (CheckpointError, ValueError):
        return {}


def _ids_in(config: Any) -> list[tuple[str, int]]:
    """Every token id in a config and the configs nested in it, with its key."""
    found: list[tuple[str, int]] = []
    for within, section in with_nested(config if isinstance(config, dict) else {}):
        for key, value in section.items():
            if key.endswith(("_token_id", "_token_ids", "_token_index")):
                values = value if isinstance(value, list) else [value]
                found += [(f"{within}{key}", v) for v in values if type(v) is int]
    return found
