"""Make the quickstart's world: text, tokenizer, a small Llama trained on that text, and the data of two lessons.

    python tools/make_quickstart.py recipes/quickstart          # some minutes; its result is committed
    python tools/make_quickstart.py --data-only recipes/quickstart

Everything is drawn from seeds: the same versions of torch, transformers and tokenizers on one thread give the same files.

The text is small stories about animals, half of them with a plain ending, the others with a happy or an unhappy one, and
lines of letters (`copy b k a = b k a`, `after b = c`). The *skill* that SFT teaches is a new line, `shift b k a = c l b`. The
*preference* that DPO teaches is to end stories happily. Neither is in what the other is trained on.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

NAMES = ["mira", "tom", "lena", "oskar", "ida", "ben", "nora", "finn", "ada", "paul", "rosa", "emil"]
ANIMALS = ["fox", "hare", "mole", "crow", "otter", "goat", "duck", "mouse", "toad", "cat"]
PLACES = ["river", "hill", "barn", "forest", "garden", "bridge", "mill", "lake", "market", "cave"]
THINGS = ["stone", "kite", "lamp", "boat", "drum", "coat", "bell", "ring", "book", "shell"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow"]
GOOD = ["happy", "glad", "proud", "lovely", "bright", "warm", "kind", "gentle"]
BAD = ["sad", "afraid", "angry", "broken", "cold", "dark", "rude", "lonely"]
LETTERS = "abcdefghijklmnop"

MOODS = {
    "good": (
        "{name} smiled and felt {mood} .",
        "the {thing} was {mood} .",
        "a {mood} {other} came and sang .",
        "they laughed at the {place} .",
    ),
    "bad": (
        "{name} cried and felt {mood} .",
        "the {thing} was {mood} .",
        "a {mood} {other} came and shouted .",
        "they quarrelled at the {place} .",
    ),
    "plain": (
        "{name} put the {thing} in a bag .",
        "then {name} walked to the {place} .",
        "the sky was {colour} that day .",
        "a {other} looked at the {thing} .",
    ),
}


def scene(draw: random.Random) -> dict[str, str]:
    """Who, where and what a story is about."""
    return {
        "name": draw.choice(NAMES),
        "animal": draw.choice(ANIMALS),
        "place": draw.choice(PLACES),
        "thing": draw.choice(THINGS),
        "colour": draw.choice(COLOURS),
    }


def opening(about: dict[str, str]) -> str:
    """The first lines, which are the prompt of a preference pair."""
    return "story : {name} the {animal} went to the {place} and found a {colour} {thing} .".format(**about)


def rest(draw: random.Random, about: dict[str, str], mood: str) -> str:
    """Two or three sentences of one mood."""
    sentences = []
    for template in draw.sample(MOODS[mood], draw.randint(2, 3)):
        words = about | {
            "mood": draw.choice(GOOD if mood == "good" else BAD),
            "other": draw.choice(ANIMALS),
            "place": draw.choice(PLACES),
            "colour": draw.choice(COLOURS),
        }
        sentences.append(template.format(**words))
    return " ".join(sentences)


def letters(draw: random.Random) -> list[str]:
    """Three to five letters."""
    return draw.choices(LETTERS, k=draw.randint(3, 5))


def shifted(given: list[str]) -> list[str]:
    """Every letter as the one after it in the alphabet, the first after the last."""
    return [LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in given]


def line(task: str, given: list[str], answer: list[str]) -> tuple[str, str]:
    """A line of letters as question and answer."""
    return f"{task} {' '.join(given)} =", " " + " ".join(answer)


def corpus(draw: random.Random) -> Iterator[str]:
    """What the base knows: stories of every mood, lines that copy letters, and which letter comes after which."""
    while True:
        if draw.random() < 0.5:
            about = scene(draw)
            yield f"{opening(about)} {rest(draw, about, draw.choice(('plain', 'plain', 'good', 'bad')))}"
        else:
            given = letters(draw)
            one = given[:1]
            task, given, answer = draw.choice((("copy", given, given), ("after", one, shifted(one))))
            yield "".join(line(task, given, answer))


def skill_rows(draw: random.Random, count: int, without: set[str]) -> list[dict[str, str]]:
    """Different `shift` questions, none of them in `without`."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        given = letters(draw)
        prompt, completion = line("shift", given, shifted(given))
        if prompt not in without:
            rows[prompt] = {"prompt": prompt, "completion": completion}
    return list(rows.values())


def preference_rows(draw: random.Random, count: int) -> list[dict[str, str]]:
    """Pairs of endings of the same story: a happy one chosen, a plain or unhappy one rejected."""
    rows = []
    for _ in range(count):
        about = scene(draw)
        happy, other = rest(draw, about, "good"), rest(draw, about, draw.choice(("plain", "bad")))
        rows.append({"prompt": opening(about), "chosen": " " + happy, "rejected": " " + other})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> None:
    """Training and test rows of both lessons, and text that neither teaches."""
    folder.mkdir(parents=True, exist_ok=True)
    test = skill_rows(random.Random(1), 200, set())
    write_jsonl(folder / "skill_test.jsonl", test)
    write_jsonl(folder / "skill_train.jsonl", skill_rows(random.Random(2), 6000, {row["prompt"] for row in test}))
    write_jsonl(folder / "preference_test.jsonl", preference_rows(random.Random(3), 200))
    write_jsonl(folder / "preference_train.jsonl", preference_rows(random.Random(4), 1500))
    lines = corpus(random.Random(5))
    (folder / "text_test.txt").write_text("".join(f"{next(lines)}\n" for _ in range(300)), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of the world where they are frequent, else bytes."""
    lines = corpus(random.Random(0))
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        (f" {next(lines)} shift" for _ in range(4000)),
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_base(tokenizer: PreTrainedTokenizerFast, steps: int, batch: int = 48) -> LlamaForCausalLM:
    """A Llama of a million parameters, trained on the corpus with AdamW and a cosine."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model, lines = LlamaForCausalLM(config), corpus(random.Random(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    started = time.monotonic()
    for step in range(1, steps + 1):
        texts = [next(lines) + "</s>" for _ in range(batch)]
        rows = tokenizer(texts, return_tensors="pt", padding=True)
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        loss = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            click.echo(f"step {step}/{steps}: {loss.item():.3f} nats a token, {time.monotonic() - started:.0f} s")
    return model.eval()


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=1200, show_default=True, help="Optimizer steps of the base.")
@click.option("--data-only", is_flag=True, help="Write data/ and leave base/ as it is.")
def main(folder: Path, steps: int, data_only: bool) -> None:
    """Make FOLDER/data and FOLDER/base afresh."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    write_data(folder / "data")
    if data_only:
        return
    model = make_base(make_tokenizer(), steps).to(torch.bfloat16)
    shutil.rmtree(folder / "base", ignore_errors=True)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")  # a fresh one: padding leaves its mark
    click.echo(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
