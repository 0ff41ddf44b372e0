"""`--json`: every command has it, stdout has one document, and an error is a document too."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from toys.merge import manifest_of, paft, recipe, write_recipe

from paft_merge import hub
from paft_merge.cli import GATE_FAILED, INTERRUPTED, REFUSED, cli
from paft_merge.cli.terminal import AS_JSON, print_json
from paft_merge.errors import HubError, Problem
from paft_merge.methods import METHODS
from paft_merge.pipeline.recipe_schemas import schema_of
from paft_merge.pipeline.search_result import Trial, TuneResult

ROOT = Path(__file__).parents[2]
COMMANDS = [name for name, command in cli.commands.items() if not command.hidden]


def document(*arguments: object, code: int = 0) -> Any:
    """The JSON document of a command on stdout."""
    done = paft(*arguments, "--json")  # type: ignore[arg-type]
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_it_and_a_row_in_the_documentation(name: str) -> None:
    assert "--json" in {text for option in cli.commands[name].params for text in option.opts}
    table = (ROOT / "docs" / "cli.md").read_text().partition("## JSON")[2].partition("\n## ")[0]
    assert f"| `{name}" in table or f"`, `{name}" in table


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_a_document_and_exits_with_2(name: str) -> None:
    found = document(name, "--no-such-option", code=2)
    assert found["error"]["code"] == "USAGE"
    assert found["error"]["where"].endswith(name)
    assert "--no-such-option" in found["error"]["what"]
    assert found["errors"] == [found["error"]]


def test_errors_are_a_document_with_all_problems(tmp_path: Path) -> None:
    data = recipe("tise", tmp_path / "b", tmp_path / "x", dtype="bf16")
    path = write_recipe(tmp_path / "r.yaml", data)
    done = paft("merge", path, tmp_path / "out", "--json")
    assert done.exit_code == REFUSED
    found = json.loads(done.stdout)
    assert found["error"] == found["errors"][0]
    assert {"RECIPE"} == {one["code"] for one in found["errors"]}
    assert [sorted(one) for one in found["errors"]] == [["code", "fix", "what", "where"]] * len(found["errors"])
    for one in found["errors"]:
        assert f"error[{one['code']}]: {one['where']}: {one['what']}" in done.stderr


def test_options_in_errors_are_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HubError.of("HUB", "org/x", "is there", "write overwrite=True")

    monkeypatch.setattr(hub, "pull", refuse)
    assert document("pull", "org/x", code=REFUSED)["error"]["fix"] == "write --overwrite"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "x"), MemoryError(), ImportError("x", name="optuna")]
)
def test_errors_of_the_machine_are_a_document(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub, "pull", fail)
    assert document("pull", "org/x", code=REFUSED)["error"]["code"] in ("DISK_FULL", "MEMORY", "MISSING")


def test_an_interruption_is_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "pull", stop)
    assert document("pull", "org/x", code=INTERRUPTED)["error"]["code"] == "INTERRUPTED"


def test_without_it_an_error_writes_nothing_to_stdout() -> None:
    assert paft("methods", "tise").stdout == ""


def test_a_failed_gate_leaves_the_result_alone_on_stdout(
    family: Callable[..., dict[str, Path]],
) -> None:
    adapter = family(torch.bfloat16)["sft"]
    found = document("audit", adapter, "--quiet", "--require", "sparsity(1e-5) >= 2", code=GATE_FAILED)
    assert "error" not in found
    broken = document("audit", adapter, "--quiet", "--require", "what", code=2)
    assert broken["error"]["code"] in ("GATE", "OPTION")


def test_a_merge_is_a_document(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family(torch.bfloat16)
    path = write_recipe(tmp_path / "r.yaml", recipe("linear", None, (paths["x"], {"weight": 1})))
    found = document("merge", path, tmp_path / "out", "--quiet")
    assert found["out"] == str(tmp_path / "out")
    assert json.loads(Path(found["manifest"]).read_text()) == manifest_of(tmp_path / "out")
    assert found["bytes_written"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert document("card", tmp_path / "out") == {"card": f"{tmp_path / 'out'}/README.md"}


def test_methods_are_a_document_with_every_parameter() -> None:
    found = document("methods")
    assert list(found) == list(METHODS)
    density = document("methods", "ties")["ties"]["parameters"]["density"]
    assert (density["type"], density["low"], density["high"], density["default"]) == ("float", 0, 1, 1)
    assert document("methods", "linear")["linear"]["parameters"]["weight"]["required"] is True


def test_the_folders_and_addresses_of_the_hub_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "pull", lambda *_, **__: [tmp_path])
    assert document("pull", "org/x") == {"folders": [str(tmp_path)]}
    monkeypatch.setattr(hub, "push", lambda *_, **__: "https://hub/x")
    assert document("push", tmp_path, "org/x") == {"url": "https://hub/x"}


def test_a_search_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import paft_merge.pipeline.schema
    import paft_merge.pipeline.tuning

    trials = (Trial(1, 0.5, {"w": None}, {"skill": 0.5}, True), Trial(2, float("nan"), {"w": 1.0}, {"skill": 0.1}))
    result = TuneResult(trials[0], trials, tmp_path / "best.yaml", trials[:1])
    monkeypatch.setattr(paft_merge.pipeline.tuning, "tune", lambda *_, **__: result)
    monkeypatch.setattr(paft_merge.pipeline.schema, "load_run", lambda *_: None)
    (tmp_path / "r.yaml").write_text("")
    found = document("tune", tmp_path / "r.yaml", tmp_path / "run", "--quiet")
    assert (found["best"], found["front"]) == (1, [1])
    assert [one["values"] for one in found["trials"]] == [[0.5], [None]]


def test_a_study_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import paft_merge.studies

    done = SimpleNamespace(page=Path("p.md"), results=Path("r.json"), claims=(("c", "holds"),), ran=2)
    monkeypatch.setattr(paft_merge.studies, "run_study", lambda *_, **__: done)
    found = document("study", "x", "--out", tmp_path, "--quiet")
    assert found == {
        "page": "p.md", "results": "r.json", "seeds_run": 2, "claims": [{"claim": "c", "findings": ["holds"]}]
    }  # fmt: skip


def test_schema_and_init_are_documents(tmp_path: Path) -> None:
    assert document("schema", "merge") == schema_of("merge")
    assert document("schema", "-o", tmp_path / "s.json") == {"schema": str(tmp_path / "s.json")}
    made = document("init", "--base", "org/base", tmp_path / "r.yaml")
    assert made == {"recipe": str(tmp_path / "r.yaml"), "schema": str(tmp_path / "paft.schema.json"), "text": None}
    assert document("init", "--base", "org/base")["text"].startswith("# A PAFT run")


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    table = (ROOT / "docs" / "cli.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    rows = [int(row) for row in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert rows == [0, REFUSED, click.UsageError.exit_code, GATE_FAILED, INTERRUPTED]


def test_numbers_that_are_not_finite_are_null() -> None:
    values = {"a": float("nan"), "b": [1.5, (float("inf"), -2)], "c": "nan"}
    context = click.Context(cli)
    with context, redirect_stdout(io.StringIO()) as printed:
        print_json(values)
    assert json.loads(printed.getvalue()) == {"a": None, "b": [1.5, [None, -2]], "c": "nan"}
    assert context.meta[AS_JSON] is False


def test_a_problem_has_the_fields_of_the_document() -> None:
    assert list(Problem.__dataclass_fields__) == ["code", "where", "what", "fix"]
