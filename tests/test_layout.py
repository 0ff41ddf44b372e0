"""The house: imports go down only, foreign packages stay in their rooms, and every file is one small concept."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from toys.merge import python

import paft_merge

PACKAGE = Path(paft_merge.__file__).parent

ROWS: list[set[str]] = [
    {"errors"},
    {"compute", "stores"},
    {"inputs", "lowrank", "methods", "stats"},
    {"recipe"},
    {"output"},
    {"hub", "training"},
    {"dialects"},
    {"plan", "evaluating"},
    {"engine", "exporting", "mergekit_plugin"},
    {"auditing"},
    {"differences"},
    {"verifying"},
    {"pipeline"},
    {"studies"},
    {"cli"},
]
"""The rooms at the top of the package, from the bottom to the top. A room imports rooms of lower rows only."""

ONLY_IN = {
    "mergekit": {"methods", "mergekit_plugin"},
    "trl": {"training"},
    "datasets": {"training"},
    "huggingface_hub": {"hub"},
    "fsspec": {"stores"},
    "numba": {"compute"},
    "llvmlite": {"compute"},
    "lm_eval": {"evaluating"},
    "vllm": {"training"},
    "matplotlib": {"auditing", "output", "pipeline", "studies"},
    "resvg_py": {"auditing"},
    "optuna": {"pipeline"},
    "ray": {"engine"},
    "gguf": {"exporting"},
    "click": {"cli"},
    "jinja2": {"auditing", "plan"},
    "rich": {"cli"},
    "yaml": {"recipe", "output"},
    "pydantic": {"output", "recipe", "training", "mergekit_plugin", "evaluating", "pipeline", "engine", "studies"},
}
"""The rooms that import a foreign package; no other room does."""


def files() -> Iterator[tuple[str, Path]]:
    """Every module by its dotted name inside the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(files())
NAMES = sorted(name for name in MODULES if name)


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module; parsed on first use, for pytest imports this file in every process."""
    return ast.parse(MODULES[module].read_text())


ROW_OF = {room: number for number, rooms in enumerate(ROWS) for room in rooms}


def room_of(module: str) -> str:
    """The room that a module belongs to."""
    return "cli" if module == "__main__" else module.split(".")[0]


@cache
def imported(module: str) -> list[str]:
    """Dotted names that a module imports anywhere: at the top, inside functions, under `TYPE_CHECKING`."""
    names: list[str] = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return names


@cache
def below(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for name in imported(module):
        if name.startswith("paft_merge."):
            parts = name.split(".")[1:]
            ways = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            found.add(next(way for way in ways if way in MODULES))
    return found - {module}


def test_every_room_has_a_row_and_says_what_it_holds() -> None:
    assert sorted(chain.from_iterable(ROWS)) == sorted({room_of(name) for name in NAMES})


@pytest.mark.parametrize("module", NAMES)
def test_imports_go_down_only(module: str) -> None:
    wrong = {
        name for name in below(module) if room_of(name) != room_of(module) and ROW_OF[room_of(name)] >= ROW_OF[room_of(module)]
    }  # fmt: skip
    assert not wrong, f"{module} in row {ROW_OF[room_of(module)]} imports {wrong}"


def test_the_picture_in_the_documentation_goes_down_too() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    picture = text[text.index("```\ncli/") :].split("```")[1].strip().splitlines()
    row = {room: i for i, line in enumerate(picture) for room in re.findall(r"(\w+)(?:\.py|/)(?=\s)", line)}
    assert row.keys() == ROW_OF.keys()
    for module in NAMES:
        for room in {room_of(name) for name in below(module)} - {room_of(module)}:
            assert row[room] > row[room_of(module)], f"{module} imports {room}"


def test_no_files_import_each_other_in_a_circle() -> None:
    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in below(name):
                visit(other, (*way, name))
            done.add(name)

    done: set[str] = set()
    for name in NAMES:
        visit(name, ())


def test_no_module_is_called_like_what_it_exports() -> None:
    for name in set(NAMES) - {"cli"}:  # click's group has its usual name, and nothing imports it from above
        defined = {node.name for node in tree_of(name).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name.split(".")[-1] not in defined, name


SHARED_NAMES = {
    "schema": "the keys of a recipe that the room reads",
    "run": "the main path of the room",
    "spherical": "methods, and the rules behind them",
    "singular_vectors": "methods, and the rules behind them",
    "elementwise": "methods, and the rules behind them",
    "thresholds": "rules, and the kernels below them",
    "merging": "the command, and the kernels of its main loop",
    "factors": "the factors of an adapter in training, and sums and truncations of factors",
    "tuning": "the command, and its search",
}
"""File names that stand in two rooms, and why."""


def test_no_two_files_share_a_name_without_a_reason() -> None:
    last = [path.stem for path in MODULES.values() if path.stem not in ("__init__", "__main__")]
    assert {name for name in last if last.count(name) > 1} == SHARED_NAMES.keys()


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_foreign_package_stays_in_its_rooms(package: str) -> None:
    users = {room_of(name) for name in NAMES if package in {i.split(".")[0] for i in imported(name)}}
    assert users == ONLY_IN[package]


def test_what_merges_checkpoints_is_imported_without_torch() -> None:
    light = [
        "cli", "engine.api", "engine.streaming", "engine.sidefiles", "inputs.adapters", "plan", "output.folder", "methods",
        "methods.rules.consensus", "recipe", "compute.devices", "hub", "cli.plan_tables",
    ]  # fmt: skip
    code = f"""if True:
        import importlib, sys
        for name in {light}:
            importlib.import_module(f"paft_merge.{{name}}")
        heavy = {{"torch", "transformers", "peft", "mergekit", "trl", "datasets", "matplotlib", "huggingface_hub"}}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
    """
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_what_the_package_offers_is_there_and_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    for name in paft_merge.__all__:
        assert getattr(paft_merge, name) is not None
    assert set(dir(paft_merge)) == set(paft_merge.__all__)
    # A module of the same name would take its place as soon as somebody imports it.
    assert {name for name in paft_merge.__all__ if name in MODULES} == {"hub", "methods"}
    with pytest.raises(AttributeError, match="has no attribute 'mergee'"):
        paft_merge.mergee  # noqa: B018


# --- one file, one concept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", NAMES)
def test_a_file_says_what_it_is_and_is_not_too_long(module: str) -> None:
    text = ast.get_docstring(tree_of(module)) or ""
    assert re.match(r"\S.*[.:]$", text.split("\n\n")[0].replace("\n", " ")), text
    assert len(tree_of(module).body) > 1 or MODULES[module].name == "__init__.py"
    assert len(MODULES[module].read_text().splitlines()) <= 620
    assert module.split(".")[-1] not in {"utils", "common", "base", "misc", "helpers"}


@pytest.mark.parametrize("module", NAMES)
def test_the_library_prints_nothing_and_swallows_nothing_without_a_reason(module: str) -> None:
    lines = MODULES[module].read_text().splitlines()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert not ast.unparse(node.exc).startswith(("RuntimeError", "Exception(")), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type).endswith("Exception")):
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raises or "#" in lines[node.lineno - 1], f"line {node.lineno} swallows an error"


def test_no_path_of_a_machine_is_written_down() -> None:
    root = PACKAGE.parent
    known = [str(root), str(Path.home()) + "/"]
    for path in chain.from_iterable(
        root.glob(p) for p in ("paft_merge/**/*.py", "tests/**/*.py", "tools/*", "recipes/*", "*.md", "*.toml")
    ):
        if path.is_file():
            text = path.read_text(errors="replace")
            assert not [name for name in known if len(name) > 8 and name in text], path
