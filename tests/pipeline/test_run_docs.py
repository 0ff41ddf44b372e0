"""The recipe of docs/run.md for existing adapters runs."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from toys.run import make_world, sections
from toys.train import THEIR_WARNINGS

from paft_merge.pipeline import plan
from paft_merge.training import train

pytestmark = THEIR_WARNINGS


def test_the_recipe_for_existing_adapters_is_one_that_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/run.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(# compare\.yaml\n.*?)```", page, re.DOTALL)
    data = yaml.safe_load(text)
    assert data["adapters"]["dpo"] == {"path": "me/dpo", "revision": "v1"}
    train(make_world(tmp_path), tmp_path / "runs/mine")
    for kind, name in (("skill", "test.jsonl"), ("text", "text.txt")):
        (tmp_path / name).rename(tmp_path / data["evaluate"]["metrics"][kind]["data"])
    data |= {"base_model": sections()["base_model"]}
    data["adapters"]["dpo"] = "runs/mine/dpo"
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    planned = plan(tmp_path / "compare.yaml", tmp_path / "run")
    methods = [f"parallel {name}" for name in data["compare"]["methods"]]
    assert [arm.name for arm in planned.planner.arms] == ["base", "sft", "dpo", *methods, "merged"]
