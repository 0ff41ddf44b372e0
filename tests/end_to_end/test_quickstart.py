"""The quickstart: what is committed is what the tool makes, and its recipe runs to its table (shortened here)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import docs_quickstart
import yaml
from toys.train import THEIR_WARNINGS

from paft_merge.evaluating import evaluate
from paft_merge.pipeline import plan, run
from paft_merge.pipeline.results_page import frontier_figure
from paft_merge.pipeline.steps import Train
from paft_merge.pipeline.tuning import _checked
from paft_merge.verifying import verify

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
WORLD = ROOT / "recipes" / "quickstart"

from make_quickstart import corpus, letters, line, make_tokenizer, shifted, write_data  # noqa: E402

pytestmark = THEIR_WARNINGS

TRAINED = yaml.safe_load(RECIPE.read_text())["adapters"]
FEW = {
    "sft": {**TRAINED["sft"], "data": {"path": TRAINED["sft"]["data"], "max_rows": 200}},
    "dpo": {**TRAINED["dpo"], "data": {"path": TRAINED["dpo"]["data"], "max_rows": 100}},
}
SHORT = (
    "seeds=[0]", f"adapters={json.dumps(FEW)}", "adapters.sft.training.max_steps=3", "adapters.dpo.training.max_steps=2",
    "adapters.dpo.training.per_device_train_batch_size=4", "compare.arms=[base, individual, sequential, parallel]",
    "compare.sequential={shrink: [0.6]}", "compare.methods=[{merge_method: ties, sweep: {weight: [0.7, 1.0]}}, slerp]",
    "evaluate.metrics.skill.max_rows=10", "evaluate.metrics.happy.max_rows=5", "evaluate.metrics.happy.max_new_tokens=8",
    "evaluate.metrics.text.max_rows=10",
)  # fmt: skip


def test_the_data_and_the_tokenizer_that_are_committed_are_those_the_tool_makes(tmp_path: Path) -> None:
    write_data(tmp_path)
    names = {path.name for path in (WORLD / "data").iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (WORLD / "data" / name).read_bytes(), name
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer/tokenizer.json").read_bytes() == (WORLD / "base/tokenizer.json").read_bytes()
    assert sum(path.stat().st_size for path in WORLD.rglob("*") if path.is_file()) < 5e6


def test_no_question_of_the_test_was_trained_on() -> None:
    train, test = ((WORLD / "data" / f"skill_{part}.jsonl").read_text().splitlines() for part in ("train", "test"))
    assert not set(train) & set(test)


def test_the_base_knows_its_text_copies_letters_and_not_the_skill(tmp_path: Path) -> None:
    draw = random.Random(77)
    rows = {"copy": [], "shift": []}
    for _ in range(40):
        given = letters(draw)
        for task, answer in (("copy", given), ("shift", shifted(given))):
            prompt, completion = line(task, given, answer)
            rows[task].append(f'{{"prompt": "{prompt}", "answer": "{completion}"}}\n')
    for task, lines in rows.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(lines))
    lines = corpus(random.Random(78))
    (tmp_path / "text.txt").write_text("".join(f"{next(lines)}\n" for _ in range(60)))
    metrics = {task: {"kind": "exact_match", "data": f"{task}.jsonl", "max_new_tokens": 6} for task in rows}
    metrics["text"] = {"kind": "perplexity", "data": "text.txt", "by": "line"}
    found = evaluate(WORLD / "base", {"metrics": metrics, "batch_size": 40}, folder=tmp_path)
    assert found["copy"].value > 0.9
    assert found["shift"].value < 0.1
    assert found["text"].value < 2.6


def test_the_whole_recipe_is_valid(tmp_path: Path) -> None:
    ready = plan(RECIPE, tmp_path / "run")
    assert {step.stage for step in ready.todo} == {"train", "audit", "merge", "evaluate"}
    assert len(_checked(ready.recipe).dimensions) == 2
    trained = [
        step.name for step in ready.todo if isinstance(step.job, Train) and step.name.startswith("train/seed-0/")
    ]
    assert [name.removeprefix("train/seed-0/") for name in trained] == [
        "sft",
        "sft-l1",
        "dpo",
        "after-sft/dpo",
        "mixed/mixed",
    ]


def test_a_shortened_quickstart_runs_to_its_table_and_the_page_shows_it(tmp_path: Path) -> None:
    done = run(RECIPE, tmp_path / "run", overrides=SHORT)
    rows = {row.name: row.cells for row in done.table.rows}
    merges = ["parallel ties weight=0.7", "parallel ties weight=1", "parallel slerp", "merged"]
    assert list(rows) == ["base", "sft", "dpo", "sequential", "sequential shrink=0.6", *merges]
    assert all(set(cells) >= {"skill", "happy", "text"} for cells in rows.values())
    assert run(RECIPE, tmp_path / "run", overrides=SHORT).done == ()
    found = verify(tmp_path / "run" / "seed-0" / "merged", rows=2, new_tokens=1)
    assert found.ok, found.findings
    assert found.behaviours["recipe"].top1 > 0.9
    results = json.loads(json.dumps(docs_quickstart.results_of(tmp_path / "run")))
    assert (tmp_path / "run/table.md").read_text().rstrip() in docs_quickstart.made(results)
    again, figure = docs_quickstart.Stored.read(results["table"]), frontier_figure(done.table)
    assert figure is not None
    assert frontier_figure(again) == figure
    results["table"]["differences"][-1]["difference"] += 1
    assert docs_quickstart.Stored.read(results["table"]).to_markdown() != again.to_markdown()


def test_the_page_is_made_from_the_committed_results() -> None:
    text, results = docs_quickstart.PAGE.read_text(), docs_quickstart.stored()
    assert docs_quickstart.page(text, results) == text, "run python tools/docs_quickstart.py"
    if results is not None:
        recipe = yaml.safe_load(RECIPE.read_text())
        assert results["table"]["seeds"] == recipe["seeds"]
        assert set(results["table"]["better"]) == {*recipe["evaluate"]["metrics"], "sparsity"}
