"""The stage `verify` of a run: its report, its gate, and the section of the model card."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from toys.adapters import llama, train
from toys.merge import paft

from paft_merge.output.card import write_card

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*"
)  # PEFT reads a name that transformers renamed


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(llama(), found, LoraConfig(r=2, target_modules=["q_proj"]))
    return found


def recipe(top: Path, name: str, **verify: object) -> Path:
    merge = {
        "merge_method": "task_arithmetic",
        "models": [{"model": "own", "parameters": {"weight": 1.0}}],
        "out_dtype": "bfloat16",
    }
    data = {
        "base_model": "base",
        "adapters": {"own": {"path": "adapter"}},
        "merge": merge,
        "verify": {"rows": 2, "new_tokens": 1, **verify},
    }
    (top / name).write_text(yaml.safe_dump(data))
    return top / name


def test_a_run_verifies_its_merge_and_the_card_says_so(top: Path) -> None:
    file = recipe(top, "run.yaml", require=["kl < 0.001", "top1 [source=adapter] > 0.5"])
    done = paft("run", file, top / "run", "--quiet")
    assert done.exit_code == 0, done.output
    report = json.loads((top / "run" / "verify.json").read_text())
    assert report["verdict"].startswith("is the model of its recipe up to one rounding")
    card = (top / "run" / "merged" / "README.md").read_text()
    assert "## Verification" in card
    assert "| the recipe in float32 | " in card
    record = json.loads((top / "run" / "run.json").read_text())["steps"]["verify/merged"]
    assert record["result"]["recipe"] < 1e-3
    again = paft("run", file, top / "run", "--dry-run")
    assert "nothing to do" in again.output or "0 of" in again.output, again.output
    (top / "run" / "merged" / "verify.json").write_text(
        '{"schema": "paft_merge.verify/1", "verdict": ["a|b"], "behaviour": {"base": {"drift": 3}}}'
    )
    write_card(top / "run" / "merged")
    assert "| the base | - | - | - |" in (top / "run" / "merged" / "README.md").read_text()


def test_a_gate_that_fails_stops_the_run_with_3(top: Path) -> None:
    failed = paft(
        "run", recipe(top, "gate.yaml", require="relative_error < 1e-9", tensors_only=True), top / "gate", "--quiet"
    )
    assert failed.exit_code == 3
    assert "relative_error is" in failed.output


def test_faults_of_the_section_have_their_lines(top: Path) -> None:
    refused = paft(
        "run", recipe(top, "odd.yaml", require=["kll < 1"], data="none.txt", memory="much"), top / "odd", "--quiet"
    )
    assert refused.exit_code == 1
    assert "verify.memory" in refused.output
    refused = paft("run", recipe(top, "odd.yaml", require=["kll < 1"], data="none.txt"), top / "odd", "--quiet")
    assert "did you mean 'kl'" in refused.output
    assert "none.txt" in refused.output
    unmeasured = recipe(top, "odd.yaml", require="kl < 1", tensors_only=True)
    refused = paft("run", unmeasured, top / "odd", "--dry-run")
    assert refused.exit_code == 1
    assert "require one of relative_error" in refused.output
