"""A run of seconds: a tiny Llama, two adapters of two steps each, and everything that comes after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from toys import train as train_toys

from paft_merge.pipeline.state import State

REWARD = """
def words(completions, **columns):
    return [float(len(text.split())) for text in completions]
"""


def make_world(folder: Path, **changes: Any) -> Path:
    """Write a base, data and `recipe.yaml` into a folder; returns the recipe. `changes` replace sections, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    train_toys.saved(folder / "base", train_toys.pretrained(60))
    write_rows(folder / "sft.jsonl", [{"text": row["text"]} for row in train_toys.texts(count=16, length=8)])
    write_rows(folder / "pairs.jsonl", list(train_toys.preferences(8)))
    write_rows(folder / "test.jsonl", [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i + 2}"} for i in range(6)])
    (folder / "text.txt").write_text("\n".join(row["text"] for row in train_toys.texts(count=6, seed=9)))
    (folder / "reward.py").write_text(REWARD)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({k: v for k, v in {**sections(), **changes}.items() if v is not None}, sort_keys=False)
    )
    return recipe


def sections() -> dict[str, Any]:
    """The sections of the toy's recipe."""
    training = {**train_toys.FAST, "max_steps": 2, "max_length": 32}
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    return {
        "base_model": "base",
        "adapters": {
            "sft": {
                "objective": "sft",
                "data": "sft.jsonl",
                "lora": lora,
                "l1": {"strength": 1e-4},
                "training": training,
            },
            "dpo": {"objective": "dpo", "data": "pairs.jsonl", "lora": lora, "training": training},
        },
        "audit": {"epsilon": 1e-5, "html": False},
        "merge": {
            "merge_method": "l1_ties",
            "models": [{"model": "sft"}, {"model": "dpo", "parameters": {"weight": 0.5}}],
            "out_dtype": "float32",
        },
        "evaluate": {
            "metrics": {
                "skill": {"kind": "exact_match", "data": "test.jsonl", "max_new_tokens": 2},
                "pairs": {"kind": "preference", "data": "pairs.jsonl"},
                "words": {"kind": "reward", "data": "test.jsonl", "function": "reward.py:words", "max_new_tokens": 2},
                "text": {"kind": "perplexity", "data": "text.txt", "by": "line"},
            }
        },
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def outcome(run: Path) -> dict[str, Any]:
    """What a run gives, whatever its folder is called and however long it took: weights, evaluations, the table."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if (path.suffix == ".safetensors" or "evaluations/" in name) and path.is_file():
            found[name] = path.read_bytes()
    table = json.loads((run / "table.json").read_text())
    return {**found, "table": {**table, "rows": [{**row, "cost": None} for row in table["rows"]]}}


class Killed(BaseException):
    """Stands for a process that ends here: nothing catches it."""


def dying(monkeypatch: Any, after: int, *, before_it_is_noted: bool) -> None:
    """Let the run end at the `after`-th step (from 1): when its output is there but not noted, or right after the note."""
    done, count = State.done, iter(range(1, 10_000))

    def step(self: State, *given: Any) -> None:
        last = next(count) == after
        if last and before_it_is_noted:
            raise Killed
        done(self, *given)
        if last:
            raise Killed

    monkeypatch.setattr(State, "done", step)
