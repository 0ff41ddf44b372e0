"""The house: imports go down only, foreign packages stay in their rooms, and every file is one small concept."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from merge_toys import python

import paft_merge

PACKAGE = Path(paft_merge.__file__).parent

FLOORS: list[set[str]] = [
    {"errors", "scratch", "direct", "methods.parameters"},
    {"headers", "loops", "unpickle", "bridge"},
    {"checkpoint", "casting", "shards", "blocks"},
    {"brackets"},
    {"agreement", "scales", "adapters", "output", "sparsify", "torch_ops"},
    {"settling", "device", "manifest", "measures"},
    {"rules"},
    {"reading", "angles", "entries", "ranks", "tensors", "hub", "card"},
    {"methods", "gathering"},
    {"recipe"},
    {"vocabulary"},
    {"plan", "training"},
    {"engine", "sidefiles", "sources", "report", "plugin", "explain", "graph"},
    {"api"},
    {"reproduce"},
    {"auditing", "evaluating"},
    {"pipeline"},
    {"tuning", "starter"},
    {"cli"},
]
"""Every room, and how high it stands. A folder is one room; `methods.parameters` is the part of `methods` that all know."""

ONLY_IN = {
    "mergekit": {"bridge", "unpickle", "plugin"},
    "trl": {"training"},
    "datasets": {"training"},
    "huggingface_hub": {"hub"},
    "numba": {"loops"},
    "llvmlite": {"loops"},
    "lm_eval": {"evaluating"},
    "matplotlib": {"auditing", "card", "tuning"},
    "optuna": {"tuning"},
    "click": {"cli", "auditing", "training", "plugin"},
    "jinja2": {"vocabulary"},
    "rich": {"cli", "report", "auditing"},
    "yaml": {"recipe", "card", "plugin", "training"},
    "pydantic": {"recipe", "training", "auditing", "plugin", "evaluating", "pipeline"},
}
"""Packages that some rooms alone may import."""


def files() -> Iterator[tuple[str, Path]]:
    """Every module by its dotted name inside the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


MODULES = {name: ast.parse(path.read_text()) for name, path in files()}
NAMES = sorted(name for name in MODULES if name)


def room_of(module: str) -> str:
    """The room that a module stands in."""
    return module if module == "methods.parameters" else module.split(".")[0]


def imported(node: ast.AST, *, lazily: bool = True) -> Iterator[str]:
    """Dotted names that are imported in a module when it runs; with `lazily`, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from chain.from_iterable(imported(other, lazily=lazily) for other in child.orelse)
        elif lazily or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(child, lazily=lazily)


def of_ours(names: Iterator[str]) -> Iterator[str]:
    """The modules of this package among imported names."""
    for name in names:
        if name.startswith("paft_merge."):
            parts = name.split(".")[1:]
            ways = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            yield next(way for way in ways if way in MODULES)


def test_every_room_has_one_floor() -> None:
    standing = sorted(chain.from_iterable(FLOORS))
    assert standing == sorted({room_of(name) for name in NAMES})


@pytest.mark.parametrize("module", NAMES)
def test_imports_go_down_only(module: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    here = room_of(module)
    below = {room_of(name) for name in of_ours(imported(MODULES[module]))} - {here}
    if here == "methods":  # its own package's door; the part that all know stands lower
        below -= {"methods.parameters"}
    wrong = {room for room in below if floor[room] >= floor[here]}
    assert not wrong, f"{module} on floor {floor[here]} imports {wrong}"


def test_the_picture_in_the_readme_goes_down_too() -> None:
    text = (PACKAGE.parent / "README.md").read_text()
    picture = text[text.index("```\ncli/") :].split("```")[1].strip().splitlines()
    row = {room: i for i, line in enumerate(picture) for room in re.findall(r"(\w+)(?:\.py|/)(?=\s)", line)}
    for module in NAMES:
        for below in {room_of(name) for name in of_ours(imported(MODULES[module]))} - {
            room_of(module),
            "methods.parameters",
        }:
            assert row[below] > row[module.split(".")[0]], f"{module} imports {below}"


def test_within_a_room_imports_do_not_run_in_circles() -> None:
    below = {name: set(of_ours(imported(tree, lazily=False))) - {name} for name, tree in MODULES.items()}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in below[name]:
                # A package's door imports its rooms, and they name the package only to find each other.
                if not name.startswith(f"{other}."):
                    visit(other, (*way, name))
            done.add(name)

    done: set[str] = set()
    for name in NAMES:
        visit(name, ())


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_foreign_package_stays_in_its_rooms(package: str) -> None:
    users = {room_of(name) for name in NAMES if package in {i.split(".")[0] for i in imported(MODULES[name])}}
    assert users <= ONLY_IN[package]


def test_what_merges_checkpoints_is_imported_without_torch() -> None:
    light = [
        "cli",
        "api",
        "adapters",
        "engine",
        "plan",
        "output",
        "sidefiles",
        "methods",
        "recipe",
        "report",
        "rules",
        "device",
        "hub",
    ]
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
    assert {name for name in paft_merge.__all__ if name in MODULES} == {"methods"}
    with pytest.raises(AttributeError, match="has no attribute 'mergee'"):
        paft_merge.mergee  # noqa: B018


# --- one file, one concept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", NAMES)
def test_a_file_says_what_it_is_and_is_not_too_long(module: str) -> None:
    text = ast.get_docstring(MODULES[module]) or ""
    assert re.match(r"\S.*[.:]$", text.split("\n\n")[0].replace("\n", " ")), text
    assert len(MODULES[module].body) > 1 or module.count(".") == 0
    assert len(dict(files())[module].read_text().splitlines()) <= 620
    assert module.split(".")[-1] not in {"utils", "common", "base", "misc", "helpers"}


@pytest.mark.parametrize("module", NAMES)
def test_the_library_prints_nothing_and_swallows_nothing_without_a_reason(module: str) -> None:
    lines = dict(files())[module].read_text().splitlines()
    for node in ast.walk(MODULES[module]):
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
        root.glob(p) for p in ("paft_merge/**/*.py", "tests/*.py", "tools/*", "recipes/*", "*.md", "*.toml")
    ):
        if path.is_file():
            text = path.read_text(errors="replace")
            assert not [name for name in known if len(name) > 8 and name in text], path
