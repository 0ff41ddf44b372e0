"""The data of the study `paft-small`: a skill, a preference and a text to retain, by default for a story model of 260K parameters.

The skill is English inflection (SIGMORPHON 2017, task 1, setting high): `walk past:` is answered by ` walked`. The preference
is for stories whose words have a high valence (VADER's lexicon), with pairs of stories of the base. What
should be retained is the likelihood of stories that it was not trained on. Parameters name other data.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from paft_merge.errors import RunError, reading
from paft_merge.evaluating.data_rows import read_lines
from paft_merge.evaluating.light import generate
from paft_merge.evaluating.loading import EvaluatedModel, errors_of_loading, load_subject
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.recipe.sections import Section
from paft_merge.studies.story_model import read_lexicon, valence
from paft_merge.training.rewards import check_function, reward_functions, total
from paft_merge.training.schema import RewardSpec

_ROUNDS = 10
"""Rounds of stories for their first sentences, each of as many stories as there are sentences to find."""

_LINES, _ENDING = 50, 64
"""Lines of the retained text that show which token ends a text, and tokens of each that the base reads."""

SLOTS = {
    "V;NFIN": "infinitive",
    "V;PST": "past",
    "V;3;SG;PRS": "present",
    "V;V.PTCP;PST": "participle",
    "V;V.PTCP;PRS": "gerund",
}
"""The word of each slot of the paradigm in a prompt."""

REWARD = "reward.py"
"""The file with the reward function. It is written last."""

_BY_LEXICON = '''"""Whether a story is happier than the one of the base for the same beginning."""

from paft_merge.studies.story_model import valence

LEXICON = {lexicon!r}


def wins(completions: list[str], base_valence: list[float], **columns: object) -> list[float]:
    """1 for a higher valence than that of the base's story, 0.5 for the same, 0 for a lower one."""
    found = zip((valence(text, LEXICON) for text in completions), base_valence, strict=True)
    return [1.0 if mine > its else 0.5 if mine == its else 0.0 for mine, its in found]
'''

_BY_REWARD = '''"""Whether a text has a higher reward than the one of the base for the same beginning."""

from paft_merge.studies.paft_small_data import scorer

SCORES = scorer({preference!r}, None)


def wins(prompts: list[str], completions: list[str], base_score: list[float], **columns: object) -> list[float]:
    """1 for a higher reward than that of the base's text, 0.5 for the same, 0 for a lower one."""
    found = zip(SCORES(prompts, completions), base_score, strict=True)
    return [1.0 if mine > its else 0.5 if mine == its else 0.0 for mine, its in found]
'''


class Sizes(Section):
    """The sizes of the data."""

    rows: Annotated[int, Field(ge=1)] = 5_000
    """Rows of the skill to train on."""
    tested: Annotated[int, Field(ge=1)] = 500
    """Rows of the skill to report it on."""
    chosen: Annotated[int, Field(ge=1)] = 200
    """Rows of the skill to choose settings on."""
    stories: Annotated[int, Field(ge=0)] = 1_000
    """Stories of the base among the rows of the skill, so that the model does not forget them."""
    story_tokens: Annotated[int, Field(ge=2)] = 140
    """Tokens of these. The training cuts them, so that it does not teach where a story ends."""
    beginnings: Annotated[int, Field(ge=1)] = 700
    """Beginnings of stories for the pairs."""
    samples: Annotated[int, Field(ge=2)] = 3
    """Stories for each of these; the best and the worst make a pair unless their valence is equal."""
    dev: Annotated[int, Field(ge=1)] = 120
    """Beginnings to choose settings on."""
    test: Annotated[int, Field(ge=1)] = 300
    """Beginnings to report the preference on."""
    tokens: Annotated[int, Field(ge=1)] = 40
    """Tokens of a story of a pair after its beginning, which is a sentence."""


class Files(Section):
    """The files in the folder of `--data`, beside those of `StoryModel`, and what the base and the preference are like."""

    skill_train: str = "sigmorphon2017/english-train-high"
    """Rows of the skill to train on: lemma, form and slot, separated by tabs; or a .jsonl file with `prompt` and `completion`."""
    skill_dev: str = "sigmorphon2017/english-dev"
    """Rows of the skill to choose settings on."""
    skill_test: str = "sigmorphon2017/english-uncovered-test"
    """Rows of the skill to report it on."""
    retained: str = "tinystories_valid_30k.txt"
    """The text whose likelihood should be retained."""
    preference: str = ""
    """What texts are preferred by: `short`, `length`, or `rewards.py:function` in the folder. Empty: the lexicon's valence."""
    first: str = "Once upon a time"
    """The first words of the base's texts; empty: the base chooses them."""
    sentence_end: Annotated[str, Field(min_length=1)] = "."
    """What ends the first sentence of such a text."""


FILES = ("skill_train", "skill_dev", "skill_test", "retained")
"""The parameters that name files."""

SKILL = ("skill_train", "skill_dev", "skill_test")
"""The files that have rows of the skill."""

BASE = "base"
"""The folder of the base with the end token that it was trained with."""


def prepare(base: Path, words: Path, data: Path, out: Path, sizes: Sizes, files: Files, seed: int = 0) -> None:
    """Write what the recipe names: the base, rows of the skill, pairs, prompts, the text, and the reward function.

    Args:
        base: the folder of the base.
        words: the file of the lexicon; read if `files` has no other preference.
        data: the folder with the files.
        out: an empty or new folder.
        sizes: how much of each.
        files: names in the folder.
        seed: seed of the stories, and of the order of the rows.

    Raises:
        RunError: STUDY, the base or the files do not give enough.
    """
    out.mkdir(parents=True, exist_ok=True)
    preference = preference_of(files, data)
    score = scorer(preference, words)
    copy_with_end(base, out / BASE, data / files.retained)
    storyteller = Storyteller(out / BASE, seed, sizes.tokens)
    openings = storyteller.openings(sizes.beginnings + sizes.dev + sizes.test, files.first, files.sentence_end)
    rows = read_skill(data / files.skill_train)[: sizes.rows]
    rows += storyteller.stories(sizes.stories, sizes.story_tokens)
    random.Random(seed).shuffle(rows)
    write_rows(out / "skill_train.jsonl", rows)
    for part, name, count in (("dev", files.skill_dev, sizes.chosen), ("test", files.skill_test, sizes.tested)):
        write_rows(out / f"skill_{part}.jsonl", read_skill(data / name)[:count])
    first, second = sizes.beginnings, sizes.beginnings + sizes.dev
    told = [storyteller.complete(openings[:first]) for _ in range(sizes.samples)]
    found = pairs(openings[:first], told, [score(openings[:first], texts) for texts in told])
    if not found:
        what = f"scores all texts that the base wrote from {first} beginnings alike, so no pair has a better one"
        fix = "take a lexicon of the base's words, name another preference, or raise data.beginnings or data.tokens"
        raise RunError.of("STUDY", files.preference or words, what, fix)
    write_rows(out / "pairs_train.jsonl", found)
    for part, prompts in (("dev", openings[first:second]), ("test", openings[second:])):
        of_base = score(prompts, storyteller.complete(prompts))
        column = "base_score" if preference else "base_valence"
        asked = [{"prompt": prompt, column: its} for prompt, its in zip(prompts, of_base, strict=True)]
        write_rows(out / f"prompts_{part}.jsonl", asked)
    shutil.copyfile(data / files.retained, out / "retained.txt")
    source = _BY_REWARD.format(preference=preference) if preference else _BY_LEXICON.format(lexicon=read_lexicon(words))
    (out / REWARD).write_text(source, encoding="utf-8")


def preference_of(files: Files, data: Path) -> str:
    """The preference with the path of its file; empty for the lexicon.

    Raises:
        RunError: STUDY, there is no such preference. TrainError: REWARD, the file has no such function.
    """
    source, colon, function = files.preference.rpartition(":")
    if not colon and files.preference in ("", "short", "length"):
        return files.preference
    if not source.endswith(".py"):
        fix = "write short, length, or rewards.py:function for a file in the folder of --data"
        raise RunError.of("STUDY", "preference", f"there is no preference {files.preference!r}", fix)
    check_function(files.preference, data)
    return f"{(data / source).resolve()}:{function}"


def scorer(preference: str, words: Path | None) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """The function that scores texts, from their beginnings and the texts.

    Args:
        preference: as `preference_of` returns it.
        words: the file of the lexicon; not used if there is a preference.
    """
    if not preference:
        assert words is not None
        lexicon = read_lexicon(words)
        return lambda prompts, texts: [valence(text, lexicon) for text in texts]
    spec = RewardSpec.model_validate({"function" if ":" in preference else "rule": preference})
    rewards = reward_functions([spec])
    return lambda prompts, texts: total(rewards, prompts=list(prompts), completions=list(texts))


def copy_with_end(base: Path, out: Path, text: Path) -> None:
    """Copy a base, and name its first token as the end of a text if it has learned this rather than its end token.

    The stories of the usual base were separated by its first token, and the token that its tokenizer names as the end never occurred
    in its training: its embedding is that of every other unused token, so an adapter cannot learn to write it. The one
    that the base finds more likely after the lines of `text` is the end.
    """
    shutil.copytree(base, out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    with errors_of_loading(str(base)):
        tokenizer, config = AutoTokenizer.from_pretrained(out), AutoConfig.from_pretrained(out)
    if config.bos_token_id in (None, tokenizer.eos_token_id) or not _ends_with_first(out, text, config.bos_token_id):
        return
    tokenizer.eos_token = tokenizer.bos_token
    tokenizer.save_pretrained(out)
    for name in ("config.json", "generation_config.json"):
        if (out / name).exists():
            read = json.loads((out / name).read_text(encoding="utf-8"))
            (out / name).write_text(json.dumps(read | {"eos_token_id": config.bos_token_id}), encoding="utf-8")


@torch.no_grad()
def _ends_with_first(base: Path, text: Path, first: int) -> bool:
    """Whether the first token is more likely after lines of a text than the tokenizer's end token."""
    subject = load_subject(base, EvaluateSpec())
    lines = [
        ids for ids in (subject.tokenizer(line)["input_ids"][-_ENDING:] for line in read_lines(text, _LINES)) if ids
    ]
    found = torch.stack([_after(subject, ids).log_softmax(-1) for ids in lines]).logsumexp(0)
    end = subject.tokenizer.eos_token_id
    return end is None or bool(found[first] > found[end])


def _after(subject: EvaluatedModel, ids: list[int]) -> Tensor:
    """The logits `[V]` of the token that follows."""
    logits: Tensor = subject.model(torch.tensor([ids], device=subject.device)).logits[0, -1].float()
    return logits


def read_skill(file: Path) -> list[dict[str, str]]:
    """The rows of the skill: of a SIGMORPHON file (lemma, form and slot, separated by tabs), or of a .jsonl file.

    Raises:
        RunError: STUDY, a line has another form, or there is none.
    """
    found = list[dict[str, str]]()
    rows = file.suffix == ".jsonl"
    form = "prompt and completion" if rows else f"a word, its form and its slot ({', '.join(SLOTS)}), separated by tabs"
    with reading(file, "STUDY", RunError, "give UTF-8 text"):
        lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        with reading(f"{file} line {number}", "STUDY", RunError, f"each line has {form}"):
            if rows and line.strip():
                row = json.loads(line)
                if odd := [key for key in ("prompt", "completion") if not isinstance(row.get(key), str | int | float)]:
                    raise RunError.of(
                        "STUDY", f"{file} line {number}", f"has no text in {odd[0]!r}", f"each line has {form}"
                    )
                if not str(row["completion"]).strip():
                    raise RunError.of("STUDY", f"{file} line {number}", "has an empty completion", "give an answer")
                found.append({"prompt": str(row["prompt"]), "completion": str(row["completion"])})
            elif line:
                lemma, inflected, slot = line.split("\t")
                found.append({"prompt": f"{lemma} {SLOTS[slot]}:", "completion": f" {inflected}"})
    if not found:
        raise RunError.of("STUDY", file, "has no rows", f"each line has {form}")
    return found


def pairs(
    prompts: Sequence[str], told: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> list[dict[str, str]]:
    """For each prompt the story with the highest score and the one with the lowest, unless all are equal; blank ones do not count.

    Args:
        prompts: the beginnings.
        told: several lists, each with a story for every prompt.
        scores: the scores of these.
    """
    found = []
    for prompt, stories, theirs in zip(prompts, zip(*told, strict=True), zip(*scores, strict=True), strict=True):
        ranked = sorted((one for one in zip(theirs, stories, strict=True) if one[1].strip()), key=itemgetter(0))
        if ranked and ranked[-1][0] > ranked[0][0]:
            found.append({"prompt": prompt, "chosen": ranked[-1][1], "rejected": ranked[0][1]})
    return found


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


class Storyteller:
    """The base, which writes stories at temperature 1; every call draws others, in the order of the calls."""

    def __init__(self, model: Path, seed: int, tokens: int) -> None:
        self._subject, self._seed, self._tokens = load_subject(model, EvaluateSpec()), seed, tokens
        tokenizer = self._subject.tokenizer
        one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a a"))
        self._keeps_spaces = tokenizer.decode(two[len(one) :]).startswith(" ")

    def complete(self, prompts: Sequence[str], tokens: int | None = None) -> list[str]:
        """One story of at most `tokens` tokens for each beginning, with what is between them.

        Tokenizers that leave out the space before a text's first word need one here.
        """
        self._seed += 1
        drawn: Any = {
            "max_new_tokens": tokens or self._tokens,
            "batch_size": 200,
            "temperature": 1.0,
            "seed": self._seed,
        }
        told = generate(self._subject, list(prompts), **drawn)
        return [text if self._keeps_spaces or text.startswith((" ", ",")) else f" {text}" for text in told]

    def openings(self, count: int, first: str, end: str) -> list[str]:
        """Different first sentences of stories, which begin with the words `first` and end with `end`.

        Raises:
            RunError: STUDY, the base does not write that many.
        """
        found = dict[str, None]()
        for _ in range(_ROUNDS):
            told = (f"{first}{text}".lstrip() for text in self.complete([first] * max(count, 100)))
            found |= {text[: text.index(end) + len(end)]: None for text in told if end in text}
            if len(found) >= count:
                return list(found)[:count]
        what = f"wrote {len(found)} different first sentences in {_ROUNDS} rounds, and {count} are needed"
        fix = f"set first (its texts begin with {first!r} now) and sentence_end ({end!r}), raise data.tokens, or lower data.beginnings, dev and test"
        raise RunError.of("STUDY", self._subject.name, what, fix)

    def stories(self, count: int, tokens: int) -> list[dict[str, str]]:
        """Stories from their first word on, as prompt and completion; about `count`, since a blank one does not count."""
        told = self.complete([""] * count, tokens) if count else []
        split = (text.strip().partition(" ") for text in told)
        return [{"prompt": first, "completion": f" {rest}"} for first, _, rest in split if rest]
