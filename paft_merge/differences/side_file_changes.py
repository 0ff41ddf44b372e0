"""Differences of two models beside their tensors, in words: config, tokenizer, chat template, generation and other files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from paft_merge.differences.kinds import Change
from paft_merge.errors import CheckpointError
from paft_merge.inputs.safetensors_header import join_first, quote, read_text
from paft_merge.inputs.side_file_kinds import OtherFile, other_files, same_content
from paft_merge.plan.effective_config import NAMES, RUNTIME, TRAINING, differences
from paft_merge.plan.vocabulary.tokenizers import TokenizerFiles, is_tokenizer_file
from paft_merge.plan.vocabulary.trained_tokenizers import SPECIAL, TrainedTokenizer, content_of

Sides = tuple[str, str]
"""What messages call the two models."""
AB: Sides = ("A", "B")
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
_LOADED = frozenset(("architectures", "auto_map"))
"""Keys that name the class of the model."""
_IDLE_OF_ADAPTERS = frozenset((
    *("peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type", "lora_dropout"),
    *("init_lora_weights", "runtime_config", "parent_library"),
))  # fmt: skip
_VERSIONS = frozenset(("transformers_version", "_from_model_config", "_commit_hash"))
_DEFAULTS: Mapping[str, Any] = {
    **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "num_beams": 1},
    **{"use_cache": True, "output_attentions": False, "output_hidden_states": False, "max_length": 20},
}
"""What generation does without a setting."""
_OF_A_SAVE = frozenset((
    *("name_or_path", "tokenizer_file", "special_tokens_map_file", "chat_template", "added_tokens_decoder"),
    *("tokenizer_class", "is_local", "local_files_only", "padding_side", "truncation_side", "model_max_length"),
))  # fmt: skip
"""Keys of a tokenizer_config.json that are compared elsewhere, or that change no token of a text."""


def of_configs(a: Mapping[str, Any], b: Mapping[str, Any], sides: Sides = AB) -> Iterator[Change]:
    """Differences of two config.json. A field counts unless it only names something, or both configs mean the same."""
    if bool(a) != bool(b):
        yield Change("config.json", f"is only in {sides[not a]}")
        return
    keys = list(_changed(a, b, sides))
    leaves = {key: key.rpartition(".")[2] for key, *_ in keys}
    means_other = bool(keys) and bool(differences(a, b))
    for key, what in keys:
        leaf = leaves[key]
        idle = leaf in NAMES - _LOADED or leaf in RUNTIME or TRAINING.fullmatch(leaf)
        of_text = leaf.endswith("_token_id") or leaf in _LOADED
        of_codes = key == "quantization_config"  # only one of the two has it
        yield Change("config.json", what, of_codes or (not idle and (means_other or of_text)))


def of_adapter_configs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    """Differences of two adapter_config.json; a list of targets is a set."""
    one, other = ({k: sorted(v) if _is_texts(v) else v for k, v in c.items()} for c in (a, b))
    for key, what in _changed(one, other, AB):
        yield Change(ADAPTER, what, key.partition(".")[0] not in _IDLE_OF_ADAPTERS)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def of_generation(a: Path, b: Path, sides: Sides = AB) -> Iterator[Change]:
    """Differences of the generation_config.json of two folders. What a file lacks is that of config.json, or a default."""
    found = [settings(folder / GENERATION) for folder in (a, b)]
    used = [{**_DEFAULTS, **settings(folder / "config.json"), **one} for folder, one in zip((a, b), found, strict=True)]
    for key, what in _changed(found[0], found[1], sides):
        one, other = (values.get(key.partition(".")[0]) for values in used)
        yield Change(GENERATION, what, key not in _VERSIONS and one != other)


def of_tokenizers(a: TokenizerFiles, b: TokenizerFiles, sides: Sides = AB) -> Iterator[Change]:
    """Differences of two tokenizers: tokens and ids, special tokens, chat templates, and how text is split."""
    ours, theirs = TrainedTokenizer(a), TrainedTokenizer(b)
    if not a or not b:
        if a or b:
            yield Change("tokenizer", f"only {sides[not a]} has one")
        return
    yield from _of_tokens(ours, theirs, sides)
    for key in dict.fromkeys((*ours.special, *theirs.special)):
        if (one := ours.special.get(key)) != (other := theirs.special.get(key)):
            yield Change("tokenizer", _words(key, one, other, sides))
    for name in dict.fromkeys((*ours.templates, *theirs.templates)):
        one, other = (tokenizer.templates.get(name, "").strip() for tokenizer in (ours, theirs))
        if one != other:
            named = "" if name == "default" else f" {quote(name)}"
            how = "differs" if one and other else f"is only in {sides[not one]}"
            yield Change("chat template", f"the template{named} {how}{_first_line(one, other)}")
    for name in dict.fromkeys((*a, *b)):
        yield from _of_tokenizer_file(name, a, b, sides)


def _of_tokens(ours: TrainedTokenizer, theirs: TrainedTokenizer, sides: Sides) -> Iterator[Change]:
    if ours.same_ids(theirs):
        return
    one, other = ours.ids, theirs.ids
    moved = {t: other[t] - number for t, number in one.items() if t in other and other[t] != number}
    by = {*moved.values()}
    for what, tokens, more in (
        (f"only {sides[0]} has", [token for token in one if token not in other], ""),
        (f"only {sides[1]} has", [token for token in other if token not in one], ""),
        (f"another id in {sides[1]} have", list(moved), f", each moved by {by.pop():+d}" if len(by) == 1 else ""),
    ):
        if tokens:
            count = f"{len(tokens):,} token{'s' * (len(tokens) != 1)}"
            yield Change("tokens", f"{what} {count}{more}: {join_first(tokens)}")


def _of_tokenizer_file(name: str, a: TokenizerFiles, b: TokenizerFiles, sides: Sides) -> Iterator[Change]:
    """Settings of one file that no other comparison covers."""
    if name not in a or name not in b:
        if name.endswith((".model", "tokenizer.json", "vocab.txt", "merges.txt")):
            yield Change("tokenizer", f"only {sides[name not in a]} has {name}", counts=False)
        return
    one, other = content_of(a[name]), content_of(b[name])
    if one == other:
        return
    if name == "tokenizer.json":
        ours, theirs = (_object(held, f"{name} of {side}") for held, side in zip((one, other), sides, strict=True))
        for part in dict.fromkeys((*ours, *theirs)):
            if part in ("added_tokens", "version", "truncation", "padding"):
                continue
            left, right = (_without_vocabulary(held.get(part)) for held in (ours, theirs))
            if left != right:
                keys = (
                    [key for key, _ in _changed(left, right, sides)]
                    if isinstance(left, dict) and isinstance(right, dict)
                    else []
                )
                yield Change(
                    "tokenizer", f"tokenizer.json: {part} differs" + (f" ({join_first(keys)})" if keys else "")
                )
    elif name == "tokenizer_config.json":
        ours, theirs = (_object(held, f"{name} of {side}") for held, side in zip((one, other), sides, strict=True))
        for key, what in _changed(ours, theirs, sides):
            if key.partition(".")[0] not in {*_OF_A_SAVE, *SPECIAL}:
                only = key not in ours or key not in theirs
                idle = key == "transformers_version" or (only and {**ours, **theirs}.get(key, 1) in (None, [], {}))
                yield Change("tokenizer", f"tokenizer_config.json: {what}", counts=not idle)
    elif name.endswith((".model", ".txt")):
        yield Change("tokenizer", f"{name} differs")


def _without_vocabulary(held: Any) -> Any:
    """A part of a tokenizer.json; merges are pairs, which older versions write as a text with a blank."""
    if not isinstance(held, dict):
        return held
    kept, merges = {key: value for key, value in held.items() if key != "vocab"}, held.get("merges")
    if isinstance(merges, list):
        kept["merges"] = [one.split(" ", 1) if isinstance(one, str) else one for one in merges]
    return kept


def of_other_files(
    a: Path, b: Path, listings: tuple[Mapping[str, int] | None, Mapping[str, int] | None], sides: Sides = AB
) -> Iterator[Change]:
    """Other files of two folders that a model may need: processors, code. Licences and cards do not count."""
    ours, theirs = (other_files(folder, listing) for folder, listing in zip((a, b), listings, strict=True))
    for name in sorted({*ours, *theirs}):
        one, other = ours.get(name), theirs.get(name)
        if not _is_of_model(name, one or other):
            continue
        if one is None or other is None:
            yield Change(name, f"is only in {sides[not one]}", counts=_is_read(name))
        elif not same_content(one, other):
            yield Change(name, "differs", counts=_is_read(name))


def _is_of_model(name: str, file: OtherFile | None) -> bool:
    """Whether no other comparison covers a file, and it is not a result or a picture."""
    known = name in (GENERATION, "merge_manifest.json") or is_tokenizer_file(name) or name.endswith(".index.json")
    return file is not None and file.kind in ("side", "code") and not known


def _is_read(name: str) -> bool:
    """Whether a library reads a file when it loads the model."""
    return name.endswith((".py", "config.json")) or name in ("modules.json", "configuration.json")


def settings(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    return _object(read_text(path, "CONFIG_INVALID").encode(), path) if path.exists() else {}


def _object(content: bytes, where: Path | str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError.of("CONFIG_INVALID", where, f"is not JSON: {error}", "download it again") from None
    return found if isinstance(found, dict) else {}


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], sides: Sides, within: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys in which two JSON objects differ, each with the difference in words."""
    for key in dict.fromkeys(chain(a, b)):
        one, other, name = a.get(key), b.get(key), f"{within}{key}"
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changed(one, other, sides, f"{name}.")
        elif key not in b:
            yield name, f"{name} is only in {sides[0]}: {_short(one)}"
        elif key not in a:
            yield name, f"{name} is only in {sides[1]}: {_short(other)}"
        elif one != other or isinstance(one, bool) != isinstance(other, bool):
            yield name, _words(name, one, other, sides)


def _words(name: str, one: Any, other: Any, sides: Sides) -> str:
    left, right = _short(one), _short(other)
    if left == right:  # the difference is in the part that is cut
        left, right = f"{len(str(one)):,} characters", f"{len(str(other)):,} characters"
    return f"{name}: {left} in {sides[0]}, {right} in {sides[1]}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(one: str, other: str) -> str:
    """Where two texts begin to differ."""
    if not one or not other:
        return ""
    pairs = zip(one.splitlines(), other.splitlines(), strict=False)
    at = next((i for i, (left, right) in enumerate(pairs, 1) if left != right), None)
    return f" from line {at or min(one.count(chr(10)), other.count(chr(10))) + 2} on"
