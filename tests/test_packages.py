"""The files for other tools agree with the project: names, versions, dependencies, commands and options."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import wheel_backend
import yaml
from release_notes import notes

from paft_merge.cli import cli
from paft_merge.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"huggingface_hub": "huggingface-hub", "pytorch": "torch", "python-xxhash": "xxhash"}


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def fake_paft(folder: Path, exit_code: str = "0") -> dict[str, str]:
    """The environment of a shell whose `paft` writes its arguments, one on a line, to `calls`, and exits with `exit_code`."""
    program = folder / "paft"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> "{folder}/calls"\nexit {exit_code}\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def check_options(command: str, words: list[str]) -> None:
    """Fail unless a command has the options among some words."""
    known = {text for one in cli.commands[command].params if isinstance(one, click.Option) for text in one.opts}
    assert {word for word in words if word.startswith("--") and word != "--"} <= known


def test_the_citation_is_of_this_version() -> None:
    cited = load("CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]
    assert cited["keywords"] == PROJECT["keywords"]
    assert cited["authors"] == PROJECT["authors"]


class TestHook:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    words = shlex.split(hook["entry"])

    def test_its_command_exists(self) -> None:
        (command, options) = re.search(r"paft (\w+) ((?:--[\w-]+ )+)", self.hook["entry"]).groups()  # type: ignore[union-attr]
        assert (command, options.split()) == ("merge", ["--dry-run", "--strict"])
        check_options(command, options.split())
        assert self.hook["language"] == "system"

    @pytest.mark.parametrize("code", ["0", "1"])
    def test_every_recipe_is_checked_by_itself(self, code: str, tmp_path: Path) -> None:
        done = subprocess.run([*self.words, "a b.yaml", "$(x).yaml"], env=fake_paft(tmp_path, code), check=False)
        assert done.returncode == int(code)
        assert (tmp_path / "calls").read_text().split("\n") == [
            "merge", "--dry-run", "--strict", "a b.yaml", "merge", "--dry-run", "--strict", "$(x).yaml", ""
        ]  # fmt: skip


class TestAction:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    install, audit = (step for step in action["runs"]["steps"] if "run" in step)

    def run(self, folder: Path, code: str = "0", **inputs: str) -> tuple[int, list[str]]:
        """Run the step of the audit; its exit code, and the arguments of `paft`."""
        given = {"SOURCES": "a", "BASE": "", "REQUIRE": "", "HTML": "r.html", "GITHUB_OUTPUT": str(folder / "output")}
        environment = fake_paft(folder, code) | given | inputs
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", self.audit["run"]]
        done = subprocess.run(command, env=environment, cwd=folder, check=False)
        return done.returncode, (folder / "calls").read_text().splitlines()

    def test_inputs_are_options_of_the_audit(self, tmp_path: Path) -> None:
        code, words = self.run(
            tmp_path, SOURCES="a b/c\nd", BASE="my base", REQUIRE="sparsity(1e-5) >= 0.9\n\nx >= 1; $(no)\n"
        )
        assert (code, words) == (
            0,
            ["audit", "--quiet", "--json", "--html", "r.html", "--base", "my base", "--require", "sparsity(1e-5) >= 0.9",
             "--require", "x >= 1; $(no)", "--", "a", "b/c", "d"],
        )  # fmt: skip
        check_options("audit", words)
        assert (tmp_path / "output").read_text() == "json=audit.json\n"
        assert (tmp_path / "audit.json").exists()

    def test_a_failed_requirement_fails_the_step(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, code="3")[0] == 3

    def test_no_input_is_part_of_a_script(self) -> None:
        assert "${{" not in self.audit["run"] + self.install["run"]
        used = set(re.findall(r"inputs\.(\w+)", (ROOT / "action.yml").read_text()))
        assert used == self.action["inputs"].keys()

    @pytest.mark.parametrize(
        ("version", "package"), [("", "--config-settings=kernels=no /action"), ("==0.1.0", "paft-merge==0.1.0")]
    )
    def test_it_installs_itself_or_a_version(self, version: str, package: str, tmp_path: Path) -> None:
        (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / "pip").chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VERSION": version, "ACTION": "/action"}
        done = subprocess.run(["bash", "-ec", self.install["run"]], env=environment, capture_output=True, text=True)
        assert done.stdout.split() == ["install", *package.split()]


def test_the_page_about_ci_uses_the_action_and_the_hook_as_they_are() -> None:
    page = (ROOT / "docs" / "how-to" / "audit-in-ci.md").read_text()
    workflow, hooks = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(# \..*?)```", page, re.DOTALL))
    action = workflow["jobs"]["audit"]["steps"][-1]
    assert action["with"].keys() <= TestAction.action["inputs"].keys()
    (repo,) = hooks["repos"]
    assert [hook["id"] for hook in repo["hooks"]] == [TestHook.hook["id"]]
    assert {repo["repo"], f"https://github.com/{action['uses'].partition('@')[0]}"} == {PROJECT["urls"]["Repository"]}
    assert {repo["rev"], action["uses"].partition("@")[2]} == {f"v{PROJECT['version']}"}


def test_the_container_has_what_the_project_has() -> None:
    lines = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).splitlines()
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", "\n".join(lines), re.MULTILINE))
    assert f"Programming Language :: Python :: {arguments['PYTHON']}" in PROJECT["classifiers"]
    assert set(arguments["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    backend = "tools/wheel_backend.py"
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "paft_merge", "recipes", backend} == set(
        copied
    )
    assert all((ROOT / name).exists() for name in copied)
    (module,) = re.findall(r"python -m ([\w.]+)", "\n".join(lines))
    assert (ROOT / module.replace(".", "/") / "__main__.py").is_file()
    assert 'ENTRYPOINT ["paft"]' in lines
    assert "paft" in PROJECT["scripts"]
    used = {word for line in lines for word in re.findall(r"\$\{?(\w+)", line)}
    assert used <= arguments.keys() | {"NUMBA_CACHE_DIR"}


def test_the_container_is_built_where_no_kernel_is_left_to_compile(tmp_path: Path) -> None:
    (command,) = re.findall(r"^RUN (python .*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    given = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    subprocess.run(["sh", "-c", command], env=given, check=True)
    assert (tmp_path / "kernels").is_dir()


def test_the_conda_recipe_has_the_dependencies_of_the_project() -> None:
    recipe = load("conda/recipe.yaml")
    assert recipe["context"]["version"] == PROJECT["version"]
    assert recipe["package"]["name"] == PROJECT["name"]
    assert recipe["about"]["license"] == PROJECT["license"]
    points = dict(point.split(" = ") for point in recipe["build"]["python"]["entry_points"])
    assert points == PROJECT["scripts"]
    at_build = {re.match(r"[\w-]+", text)[0] for text in recipe["requirements"]["host"]}  # type: ignore[index]
    assert {CONDA_NAMES.get(name, name) for name in at_build} >= {"pip", "setuptools", *wheel_backend.COMPILER}
    needed = [text.split(" ", 1) for text in recipe["requirements"]["run"]]
    assert needed[0] == ["python", PROJECT["requires-python"]]
    assert [f"{CONDA_NAMES.get(name, name)}{bounds}" for name, bounds in needed[1:]] == PROJECT["dependencies"]
    for command in recipe["tests"][0]["script"].split(" && "):
        program, verb = command.split()[:2]
        assert program in PROJECT["scripts"]
        assert verb.startswith("--") or verb in cli.commands


SKILL = ROOT / "paft_merge" / ".agents" / "skills" / "paft-merge" / "SKILL.md"


@pytest.mark.parametrize("page", [ROOT / "AGENTS.md", SKILL], ids=lambda path: path.name)
def test_the_guides_for_agents_name_files_and_commands_that_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / link).exists(), link
    for command, words in re.findall(r"paft ([a-z]+) ?([^`\n]*)", text):
        check_options(command, words.split())


def test_the_skill_is_in_the_wheel_and_has_a_recipe_that_loads() -> None:
    _, head, body = SKILL.read_text().split("---\n", 2)
    described = yaml.safe_load(head)
    assert described["name"] == SKILL.parent.name == PROJECT["name"]
    assert 100 < len(described["description"]) < 1024
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["paft_merge"]
    assert SKILL in {path for one in patterns for path in (ROOT / "paft_merge").glob(one)}
    (recipe,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert not load_recipe(textwrap.dedent(recipe)).warnings


def test_the_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    found = notes(PROJECT["version"])
    assert found.startswith("The first release.")
    assert "### Added" in found
    assert "\n## " not in found
    with pytest.raises(SystemExit, match="no section 0"):
        notes("0")


class TestWheel:
    def test_the_compiler_is_required_in_the_versions_of_the_project(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(wheel_backend.build_meta, "get_requires_for_build_wheel", lambda _: ["setuptools"])
        needed = wheel_backend.get_requires_for_build_wheel()
        assert {re.match(r"[\w-]+", text)[0] for text in needed} == {"setuptools", *wheel_backend.COMPILER}  # type: ignore[index]
        assert set(needed[1:]) <= set(PROJECT["dependencies"])
        monkeypatch.setattr(wheel_backend.platform, "machine", lambda: "arm64")
        assert wheel_backend.get_requires_for_build_wheel() == ["setuptools"]
        monkeypatch.setattr(wheel_backend.platform, "machine", lambda: "x86_64")
        assert wheel_backend.get_requires_for_build_wheel({"kernels": "no"}) == ["setuptools"]

    @pytest.fixture
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder of compiled kernels, where an earlier build left one, as in setuptools' copy."""
        monkeypatch.chdir(tmp_path)
        for place in (wheel_backend.PLACE, "build/lib" / wheel_backend.PLACE):
            place.mkdir(parents=True)
            (place / "old.o").touch()
        return wheel_backend.PLACE

    def test_kernels_are_in_the_tree_only_while_a_wheel_is_built(
        self, tree: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands = list[tuple[list[str], str, str]]()

        class Compiler:
            def __init__(self, command: list[str], env: dict[str, str]) -> None:
                commands.append((command[1:], env["NUMBA_CPU_NAME"], env["NUMBA_CPU_FEATURES"]))
                assert "NUMBA_CACHE_DIR" not in env

            def wait(self) -> int:
                tree.mkdir(parents=True, exist_ok=True)
                (tree / "new.o").touch()
                return self.code

            code = 0

        def packaged(*_: object) -> str:
            return " ".join(path.name for path in Path().rglob("*.o"))

        monkeypatch.setenv("NUMBA_CACHE_DIR", "somewhere")
        monkeypatch.setattr(wheel_backend.subprocess, "Popen", Compiler)
        monkeypatch.setattr(wheel_backend.build_meta, "build_wheel", packaged)
        assert wheel_backend.build_wheel("dist") == "new.o"
        assert not tree.exists()
        command = ["-m", "paft_merge.compute.kernels", str(tree)]
        assert commands == [(command, "x86-64-v4", "-prefer-256-bit"), (command, "x86-64-v3", "")]
        Compiler.code = 1
        with pytest.raises(subprocess.CalledProcessError):
            wheel_backend.build_wheel("dist")
        assert not tree.exists()

    @pytest.mark.parametrize("lacks", ["numba", "x86_64", "kernels=no"])
    def test_a_wheel_without_the_compiler_says_so(
        self, tree: Path, lacks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(wheel_backend, "find_spec", lambda name: None if name == lacks else name)
        monkeypatch.setattr(wheel_backend.platform, "machine", lambda: "arm64" if lacks == "x86_64" else "x86_64")
        monkeypatch.setattr(wheel_backend.build_meta, "build_wheel", lambda *_: str(any(Path().rglob("*.o"))))
        assert wheel_backend.build_wheel("dist", dict([lacks.split("=")]) if "=" in lacks else None) == "False"
        assert "the wheel has no compiled kernels: " in capsys.readouterr().err

    def test_the_files_of_the_build_are_packaged(self) -> None:
        tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
        assert tables["build-system"] == {
            "requires": ["setuptools>=77"], "build-backend": "wheel_backend", "backend-path": ["tools"],
        }  # fmt: skip
        assert "compute/kernels/packaged/*.o" in tables["tool"]["setuptools"]["package-data"]["paft_merge"]
        assert "tools/wheel_backend.py" in (ROOT / "MANIFEST.in").read_text()
