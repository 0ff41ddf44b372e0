"""What a bfloat16 checkpoint loses of a delta: planted deltas, and the whole study on a tiny base."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from toys.train import THEIR_WARNINGS, WORDS, pretrained, saved

from paft_merge.errors import RunError
from paft_merge.studies import on_policy_lm, precision, run_study, story_model
from paft_merge.studies.precision import kept
from paft_merge.studies.story_model import read_lexicon, valence


class Stored:
    """A model that has weights and nothing else."""

    def __init__(self, **weights: torch.Tensor) -> None:
        self.weights = weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights


def test_the_part_that_is_kept_is_that_of_planted_deltas():
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    delta = torch.tensor([0.5, 0.5, 0.0, 1.0])
    stored = base + torch.tensor([0.0, 0.5, 0.25, 2.0])  # one lost, one right, one that should not change, one doubled
    found = kept({"w": delta.double()}, Stored(w=base), Stored(w=stored))
    assert found["unchanged"] == pytest.approx(1 / 3)
    assert found["kept"] == pytest.approx((0.5 * 0.5 + 2.0) / 1.5)
    assert found["error"] == pytest.approx(((0.5**2 + 0.25**2 + 1.0) / 1.5) ** 0.5)


def test_the_valence_of_a_text_is_that_of_its_words(tmp_path):
    (tmp_path / "words.txt").write_text("Good\t1.9\t0.9\t[2]\nbad\t-2.5\n\n")
    lexicon = read_lexicon(tmp_path / "words.txt")
    assert valence("A good, GOOD day; not badly bad.", lexicon) == pytest.approx(1.9 + 1.9 - 2.5)
    (tmp_path / "words.txt").write_text("good 1.9\n")
    with pytest.raises(RunError, match=r"words.txt: .*; each line has a word, a tab and a number"):
        read_lexicon(tmp_path / "words.txt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    saved(folder / "base", pretrained(20))
    (folder / "words.txt").write_text("".join(f"w{i}\t{i % 7 - 3}\n" for i in range(WORDS)))
    return folder


SMALL = (
    "base=base", "lexicon=words.txt", "prompts=12", "held_out=6", "prompt_tokens=4", "learning_rates=[5e-7, 5e-3]",
    "sampling.max_new_tokens=5", "sampling.batch_size=18",
)  # fmt: skip


@THEIR_WARNINGS
def test_a_small_delta_is_lost_to_nearest_and_a_large_one_is_not(data, tmp_path):
    def run(out):
        found = run_study("precision", tmp_path / out, data=data, smoke=True, overrides=SMALL)
        return json.loads(found.results.read_text())["tables"]["stored merges"]

    rows = run("first")
    assert run("second") == rows
    small, large = (f"learning rate {rate}" for rate in ("5e-07", "0.005"))
    assert rows[f"bfloat16, nearest, {small}"]["unchanged"][0] > 0.95
    assert rows[f"bfloat16, nearest, {small}"]["kept"][0] < 0.1
    assert rows[f"bfloat16, nearest, {large}"]["kept"][0] > 0.9
    assert rows[f"float32, {small}"]["kept"][0] == pytest.approx(1, abs=0.05)
    stochastic, nearest = (rows[f"bfloat16, {how}, {small}"]["error"][0] for how in ("stochastic", "nearest"))
    assert stochastic > 2 > nearest
    assert rows[f"float32, {large}"]["margin"][0] > rows[f"float32, {small}"]["margin"][0]
    assert rows[f"float32, {large}"]["same"] == [1.0]
    (data / "words.txt").write_text((data / "words.txt").read_text() + "other\t1\n")
    with pytest.raises(RunError, match=r"has results with data\.words\.txt '.*' instead of"):
        run("first")


@pytest.mark.parametrize(
    ("texts", "ids", "message"),
    [
        (["one"], (1, 2), "writes no text of two words that a space separates"),
        (["a b c"], (None, None), "has no token that begins"),
    ],
)
def test_a_base_that_gives_no_beginnings_is_refused(monkeypatch, texts, ids, message):
    words = SimpleNamespace(bos_token_id=ids[0], eos_token_id=ids[1], name_or_path="base")
    monkeypatch.setattr(story_model, "complete", lambda *given, **options: [texts])
    with pytest.raises(RunError, match=f"base: {message}"):
        story_model.beginnings(None, words, 2, 4)


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"--data: this study needs a base and a lexicon; give the folder that has them"):
        precision.check(precision.Parameters(), None)
    with pytest.raises(
        RunError, match=r"stories260K_hf: does not exist; put it there, or name another with --set base="
    ):
        precision.check(precision.Parameters(), tmp_path)


@THEIR_WARNINGS
def test_the_arms_of_the_language_model_see_the_same_number_of_completions(data, tmp_path, monkeypatch):
    sections, own = {}, on_policy_lm.trained
    first = []

    def watched(base, section, out, *more):
        sections[out.name] = section
        first.append(own(base, section, tmp_path / "adapter", *more) if not first else first[0])
        return first[0]

    monkeypatch.setattr(on_policy_lm, "trained", watched)  # trains one of the six adapters
    small = ("base=base", "lexicon=words.txt", "prompt_tokens=4", "learning_rate=0.05", "sampling.max_new_tokens=5")
    found = run_study("on-policy-lm", tmp_path / "out", data=data, smoke=True, overrides=small)
    asked = {name: (one["objective"], one["sampling"]["rounds"]) for name, one in sections.items()}
    assert asked == {
        f"valence-{objective}-{kind}": (objective, rounds)
        for objective in ("on_policy", "best_of_n", "rwr")
        for kind, rounds in (("offline", 1), ("on-policy", 2))
    }
    assert {one["sampling"]["rounds"] * one["sampling"]["samples_per_round"] for one in sections.values()} == {8}
    (rounds,) = json.loads((first[0] / "paft_train.json").read_text())["run"]["rounds"]
    assert rounds["prompts"] == 8
    rows = json.loads(found.results.read_text())["tables"]["valence"]
    assert rows["base"]["reward"] != rows["DPO, offline"]["reward"] == rows["RWR, on-policy"]["reward"]
