"""The start of a command imports only what it uses, and leaves the process as it was."""

from __future__ import annotations

import gc
import json
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from toys.merge import on, paft, paft_process, recipe_for, write_recipe

from paft_merge.cli.terminal import importing

HEAVY = {
    "torch", "transformers", "peft", "mergekit", "huggingface_hub", "numba", "llvmlite", "scipy", "matplotlib", "rich",
    "paft_merge.cli.plan_tables", "paft_merge.output.manifest_schema", "paft_merge.training.schema",
}  # fmt: skip
"""Modules that a merge of LoRA adapters does not need."""

SHOW = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules.keys() & {HEAVY!r}))))
"""


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="LLVM loads the kernels")
def test_a_plain_merge_imports_only_what_it_uses(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    made = family()
    text = recipe_for("ties", made["base"], *(on(made["base"], made[name]) for name in ("sft", "dpo")))
    path = write_recipe(tmp_path / "recipe.yaml", text)
    assert paft("merge", path, tmp_path / "first").exit_code == 0  # compiles the kernels, if need be
    run = paft_process("merge", path, tmp_path / "out", "--quiet", before=SHOW)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == []
    assert (tmp_path / "out" / "merge_manifest.json").exists()


@pytest.mark.parametrize("enabled", [True, False])
def test_importing_leaves_the_process_as_it_was(enabled: bool) -> None:
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    try:
        gc.enable() if enabled else gc.disable()
        with suppress(ImportError), importing():
            assert not gc.isenabled()
            import_module("absent_package")
        assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, frozen)
    finally:
        gc.enable() if before else gc.disable()


def test_imported_modules_are_left_out_of_later_searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "imported_once.py").write_text("found = [[] for _ in range(1000)]")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with importing():
        import_module("imported_once")
    assert gc.get_freeze_count() >= before + 1000
