"""The contributor files: their example runs, the paths that they name exist, and the workflow runs the project's scripts."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import near, random_state, save_checkpoint
from packaging.requirements import Requirement
from toys.merge import recipe, tensors_of

import paft_merge
from paft_merge.methods import METHODS

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())


def example() -> Any:
    """The method of the guide, as a module."""
    (text,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len([line for line in text.splitlines() if line and not line.startswith(("#", "import", "from"))]) <= 20
    module = ModuleType("equal_norms")
    exec(text, vars(module))
    return module


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_method_of_the_guide_merges(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example()
    monkeypatch.setitem(METHODS, module.METHOD.name, module.METHOD)  # type: ignore[arg-type]
    states = {"base": random_state(0)}
    states |= {name: near(states["base"], i, i * 1e-3) for i, name in enumerate("xy", 1)}
    for name, state in states.items():
        save_checkpoint(tmp_path / name, state)
    given = recipe("equal_norms", tmp_path / "base", tmp_path / "x", tmp_path / "y", parameters={"lambda": factor})
    paft_merge.merge(given, tmp_path / "out")
    for name, merged in tensors_of(tmp_path / "out").items():
        base, *deltas = (states[key][name].float() for key in states)
        deltas = [delta - base for delta in deltas]
        norms = torch.stack([delta.double().norm() for delta in deltas])
        expected = sum(
            delta.double() * (factor * norms.mean() / norm) for delta, norm in zip(deltas, norms, strict=True)
        )
        torch.testing.assert_close(module.equal_norms(deltas, lambda_=factor).double(), expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(
            merged.float(), (base + expected.float()).to(merged.dtype).float(), rtol=1e-2, atol=1e-6
        )


@pytest.mark.parametrize("file", ["CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_files_that_a_guide_names_are_there(file: str) -> None:
    text = (ROOT / file).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    named = re.findall(r"`((?:paft_merge|tests|tools|recipes|docs|\.ci)/[\w./-]*|[A-Z]+\.md)`", text)
    made = {"paft_merge/methods/equal_norms.py"}
    assert links + named
    assert [path for path in {*links, *named} - made if not (ROOT / path).exists()] == []


def test_the_workflow_runs_what_continuous_integration_runs() -> None:
    jobs = WORKFLOW["jobs"]
    for job in jobs.values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands[-1] == ".ci/run"
        assert all((ROOT / word).exists() for command in commands for word in command.split() if "/" in word)
    assert jobs["oldest"]["steps"][-1]["env"]["PAFT_CONSTRAINTS"] == "oldest.txt"


def test_versions_of_python_are_the_same_everywhere() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = WORKFLOW["jobs"]["pinned"]["strategy"]["matrix"]["python"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named == tested
    minors = [int(version.split(".")[1]) for version in tested]
    assert project["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_forms_and_workflows_are_valid_yaml(file: Path) -> None:
    data = yaml.safe_load(file.read_text())
    assert isinstance(data, dict)
    if "body" in data:
        assert {"name", "description"} <= data.keys()
        assert {field["type"] for field in data["body"]} <= {"textarea", "checkboxes", "input", "dropdown", "markdown"}
        ids = [field["id"] for field in data["body"]]
        assert len(ids) == len(set(ids))


def test_hooks_need_no_network() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}


def test_the_oldest_versions_are_the_lower_bounds_of_the_project() -> None:
    import tomllib

    from oldest import oldest

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = dict(line.split("==") for line in oldest())
    requirements = [Requirement(r) for r in project["dependencies"]]
    assert {r.name for r in requirements} <= versions.keys()
    for requirement in requirements:
        assert versions[requirement.name] in requirement.specifier
        assert f">={versions[requirement.name]}" in str(requirement.specifier)
