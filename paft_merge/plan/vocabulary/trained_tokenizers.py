"""The tokenizers and chat templates that adapters were trained with, compared with the output's, from their files alone.

An adapter's folder often holds the tokenizer of its training: with added tokens, another end of sequence, a chat template.
Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft_merge.errors import Problem
from paft_merge.inputs.safetensors_header import join_first, quote
from paft_merge.plan.vocabulary.tokenizers import MORE_TEMPLATES, TokenizerFiles, files_in

if TYPE_CHECKING:
    from paft_merge.inputs.models import Model

TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
SPECIAL = ("eos_token", "bos_token", "pad_token")
_DEFAULT = "default"


@dataclass(frozen=True, eq=False)
class TrainedTokenizer:
    """What the files of a tokenizer say.

    Attributes:
        files: by name.
    """

    files: TokenizerFiles

    @cached_property
    def templates(self) -> dict[str, str]:
        """Chat templates by name, as transformers finds them; most tokenizers have one, `default`."""
        found: dict[str, str] = {}
        for name in (_OLD_TEMPLATE, _CONFIG):
            one = _json(self.files[name]).get("chat_template") if name in self.files else None
            if isinstance(one, list):
                one = {each.get("name"): each.get("template") for each in one if isinstance(each, Mapping)}
            named = one if isinstance(one, Mapping) else {_DEFAULT: one}
            found |= {str(key): text for key, text in named.items() if isinstance(text, str) and text.strip()}
        for name, content in self.files.items():
            if name == TEMPLATE or name.startswith(MORE_TEMPLATES):
                key = _DEFAULT if name == TEMPLATE else Path(name).stem
                found[key] = content_of(content).decode("utf-8", "replace")
        return {key: text for key, text in found.items() if text.strip()}

    @property
    def template(self) -> str | None:
        """The default chat template."""
        return self.templates.get(_DEFAULT)

    @cached_property
    def special(self) -> dict[str, str]:
        """The tokens of end, begin and padding, by their keys of tokenizer_config.json."""
        config, mapped = (_json(self.files[name]) if name in self.files else {} for name in (_CONFIG, _MAP))
        found = {key: _text(config.get(key, mapped.get(key))) for key in SPECIAL}
        return {key: text for key, text in found.items() if text}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token and its id; empty where only transformers knows them, as for tokenizer.model."""
        try:
            if "tokenizer.json" in self.files:
                return ids_in(content_of(self.files["tokenizer.json"]))
            return dict(_json(self.files.get("vocab.json", b"{}")) | _json(self.files.get("added_tokens.json", b"{}")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    def same_ids(self, other: TrainedTokenizer) -> bool:
        """Whether both give every token the same id, without parsing files that are equal."""
        ours, theirs = (one.files.get("tokenizer.json") for one in (self, other))
        if ours is not None and theirs is not None and (ours == theirs or content_of(ours) == content_of(theirs)):
            return True
        return self.ids == other.ids

    def with_end(self, token: str) -> dict[str, bytes | Path]:
        """The files with another end of sequence."""
        made = dict(self.files)
        for name in (_CONFIG, _MAP):
            if name in made and (name == _CONFIG or "eos_token" in _json(made[name])):
                changed = {**_json(made[name]), "eos_token": token}
                made[name] = (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
        return made


def own_tokenizer(model: Model) -> TrainedTokenizer | None:
    """The tokenizer files in the folder of a model's adapter; None without an adapter, or if the folder has none."""
    files = files_in(model.adapter.folder) if model.adapter else {}
    return TrainedTokenizer(files) if files else None


def lost_in_output(
    models: Iterable[Model],
    output: TokenizerFiles,
    base: TrainedTokenizer,
    *,
    tokens: bool,
    special: bool,
    template: bool,
) -> list[Problem]:
    """Warn of adapters that were trained with a tokenizer or a chat template that the output lacks.

    Args:
        models: the models of the merge.
        output: the output's tokenizer files.
        base: the base's tokenizer; an adapter that has its end and template changed nothing.
        tokens: compare the vocabularies; False where the recipe chooses one.
        special: compare the tokens of end, begin and padding.
        template: compare the chat templates; False where the recipe chooses one.
    """
    ours, found = TrainedTokenizer(output), dict[tuple[str, ...], list[str]]()
    for model in models:
        theirs = own_tokenizer(model)
        if theirs is None or theirs.files == output:
            continue
        more = _token_differences(ours, theirs) if tokens else []
        ends = _special_differences(ours, theirs, base) if special else []
        named = _template_differences(ours, theirs, base) if template else []
        if not (more or named or any(not end.startswith("pad_token") for end in ends)):
            continue  # padding alone changes no answer
        by_template = not more and any(text.endswith("chat template") for text in named)
        found.setdefault((*more, *ends, *named, "chat_template" if by_template else ""), []).append(model.ref)
    return [
        Problem(
            "TOKENIZER", ", ".join(refs), f"trained with what the output lacks: {'; '.join(parts)}",
            "write `chat_template: auto` to take it" if key else f"write `tokenizer_source: {refs[0]}` to take it",
        )
        for (*parts, key), refs in found.items()
    ]  # fmt: skip


def _token_differences(ours: TrainedTokenizer, theirs: TrainedTokenizer) -> list[str]:
    if not theirs.ids or ours.same_ids(theirs):
        return []
    more = [token for token, _ in sorted(theirs.ids.items(), key=lambda item: item[1]) if token not in ours.ids]
    moved = sum(ours.ids.get(token, number) != number for token, number in theirs.ids.items())
    found = [f"{_count(len(more), 'more token')} ({join_first(more)})"] if more else []
    return [*found, *([f"{_count(moved, 'token')} with another id"] if moved else [])]


def _special_differences(ours: TrainedTokenizer, theirs: TrainedTokenizer, base: TrainedTokenizer) -> list[str]:
    found = []
    for key, token in theirs.special.items():
        before = ours.special.get(key)
        if token not in (before, base.special.get(key)) and not (key == "pad_token" and before is None):
            found.append(
                f"{key} {quote(token)} ({f'the output has {quote(before)}' if before else 'the output has none'})"
            )
    return found


def _template_differences(ours: TrainedTokenizer, theirs: TrainedTokenizer, base: TrainedTokenizer) -> list[str]:
    known = {(key, text.strip()) for one in (ours, base) for key, text in one.templates.items()}
    lost = [key for key, text in theirs.templates.items() if (key, text.strip()) not in known]
    if not lost:
        return []
    if lost != [_DEFAULT]:
        return [f"the chat templates {join_first(lost)}"]
    return ["another chat template"] if ours.template else ["a chat template"]


def grown_by(models: Iterable[Model]) -> dict[str, tuple[int, TrainedTokenizer | None]]:
    """By reference of each model whose adapter resizes the vocabulary: the new number of rows, and its tokenizer."""
    return {
        m.ref: (m.adapter.vocab_size, own_tokenizer(m)) for m in models if m.adapter and m.adapter.vocab_size
    }  # fmt: skip


def only_tokenizer_of(
    grown: Mapping[str, tuple[int, TrainedTokenizer | None]], base: TrainedTokenizer
) -> tuple[str, TrainedTokenizer] | None:
    """The only tokenizer that fits embeddings which adapters made longer; None if there is none, or more than one.

    It fits if it has more tokens than the base's, each of them a row, and those of the base keep their ids.

    Args:
        grown: from `grown_by`.
        base: the base's tokenizer.
    """
    fitting = [(ref, own) for ref, (rows, own) in grown.items() if own and _fits(own, base, rows)]
    if not fitting or any(not one.same_ids(fitting[0][1]) for _, one in fitting[1:]):
        return None
    return fitting[0]


def _fits(own: TrainedTokenizer, base: TrainedTokenizer, rows: int) -> bool:
    if "tokenizer.json" not in own.files or len(own.ids) <= len(base.ids) or max(own.ids.values()) >= rows:
        return False
    return all(own.ids.get(token) == number for token, number in base.ids.items())


def ids_in(text: bytes) -> dict[str, int]:
    """Every token of a tokenizer.json and its id."""
    data = json.loads(text)
    pieces = data["model"]["vocab"]
    known = pieces if isinstance(pieces, dict) else {piece[0]: i for i, piece in enumerate(pieces)}
    return known | {token["content"]: token["id"] for token in data.get("added_tokens") or ()}


def with_end_of(config: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """A generation_config.json that also stops at the tokens `ids`, which come first."""
    before = config.get("eos_token_id")
    known = before if isinstance(before, list) else [] if before is None else [before]
    every = [*ids, *(number for number in known if number not in ids)]
    return {**config, "eos_token_id": every if len(every) > 1 else every[0]}


def content_of(content: bytes | Path) -> bytes:
    """The content of a side file that is held in memory or named by its path."""
    return content if isinstance(content, bytes) else content.read_bytes()


def _json(content: bytes | Path) -> dict[str, Any]:
    """A JSON object; empty if invalid (an error that loading the tokenizer reports)."""
    try:
        found = json.loads(content_of(content))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) else None


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
