"""The base of the studies of language models, a lexicon whose valence is a reward, and prompts from the base's own texts."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from paft_merge.errors import RunError, reading
from paft_merge.pipeline.fingerprints import file_print
from paft_merge.recipe.sections import Section
from paft_merge.training.base_model import load_base, load_tokenizer
from paft_merge.training.generation import complete
from paft_merge.training.schema import AdapterSpec, BaseSpec

_OF_A_BASE = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
"""The files of a base that decide what it computes: weights, configs, the tokenizer and its template."""


class StoryModel(Section):
    """The files of a study."""

    base: str = "stories260K_hf"
    """Folder of the base, in the folder of `--data`."""
    lexicon: str = "vader/vader_lexicon.txt"
    """File in the folder of `--data` with a word, a tab and its valence in each line."""


def inputs(spec: StoryModel, data: Path | None, *, lexicon: bool = True) -> tuple[Path, Path]:
    """The folder of the base and the file of the lexicon.

    Args:
        spec: their names.
        data: the folder of `--data`.
        lexicon: the study reads the lexicon.

    Raises:
        RunError: STUDY, one of them is not there.
    """
    if data is None:
        what = f"this study needs a base{' and a lexicon' * lexicon}"
        raise RunError.of("STUDY", "--data", what, "give the folder that has them" if lexicon else "give its folder")
    base, words = data / spec.base, data / spec.lexicon
    for key, path, there in (("base", base, base.is_dir()), ("lexicon", words, words.is_file() or not lexicon)):
        if not there:
            what = f"is not a {'folder' if key == 'base' else 'file'}" if path.exists() else "does not exist"
            raise RunError.of("STUDY", path, what, f"put it there, or name another with --set {key}=...")
    return base, words


def check(spec: StoryModel, data: Path | None, *, lexicon: bool = True) -> dict[str, str]:
    """Digests of the inputs, as for `inputs`: results of other inputs are not mixed."""
    base, words = inputs(spec, data, lexicon=lexicon)
    files = [path for path in sorted(base.iterdir()) if path.is_file() and path.suffix in _OF_A_BASE]
    if lexicon:
        read_lexicon(words)
    return {path.name: file_print(path) for path in (*files, *([words] if lexicon else []))}


def read_lexicon(path: Path) -> dict[str, float]:
    """The valence of each word."""
    with reading(path, "STUDY", RunError, "each line has a word, a tab and a number"):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row[0].lower(): float(row[1]) for row in rows}


def valence(text: str, lexicon: Mapping[str, float]) -> float:
    """The sum of the valences of a text's words."""
    return sum(lexicon.get(word, 0.0) for word in re.findall(r"[\w']+", text.lower()))


def beginnings(model: Any, tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Up to `count` different beginnings of the model's own texts, of at most `tokens` tokens; whole words."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        what = "has no token that begins or ends a text"
        raise RunError.of("STUDY", tokenizer.name_or_path, what, "take another base")
    found: dict[str, None] = {}
    for _ in range(20):
        groups = complete(model, tokenizer, [[first]], max_new_tokens=tokens, temperature=1.0, completions=count)
        found |= dict.fromkeys(start for text in groups[0] if (start := text.strip().rpartition(" ")[0]))  # whole words
        if len(found) >= count:
            break
    if not found:
        what, fix = "writes no text of two words that a space separates", "take another base, or raise prompt_tokens"
        raise RunError.of("STUDY", tokenizer.name_or_path, what, fix)
    return list(found)[:count]


def valence_reward(completions: Sequence[str], lexicon: Sequence[str], **_: Any) -> list[float]:
    """The valence of each completion, as a reward of `paft train`: the rows have the path of a lexicon in `lexicon`."""
    return [valence(text, _cached_lexicon(path)) for text, path in zip(completions, lexicon, strict=True)]


@cache
def _cached_lexicon(path: str) -> dict[str, float]:
    return read_lexicon(Path(path))


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a base, with a pad token."""
    tokenizer = load_tokenizer(str(folder), AdapterSpec.model_validate({"objective": "dpo", "data": "memory"}))
    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def loaded(folder: Path) -> Any:
    """A model that computes in float32."""
    return load_base(str(folder), BaseSpec(dtype="float32")).eval()


def trained(
    base: Any, section: Mapping[str, Any], out: Path, rows: Sequence[Mapping[str, Any]], tokenizer: Any, folder: Path
) -> Path:
    """Train an adapter on rows in memory as `paft train` does, without its warnings.

    They are the same for each of many trainings: completions are cut at their length, so their end token is not learned, and
    the reward is code of this package.
    """
    from paft_merge.training.run import train_adapter

    levels = {name: logging.getLogger(name).level for name in ("paft_merge", "transformers")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return train_adapter(
            base, section, out, rows=list(rows), tokenizer=tokenizer, base_name=str(folder), trust_code=True
        )  # fmt: skip
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
