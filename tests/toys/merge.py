"""Small merges: their recipes, their outputs as tensors and as bytes, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from paft_merge.cli import cli
from paft_merge.methods import METHODS, REQUIRED

State = dict[str, torch.Tensor]
Ref = str | Path
Place = Path | os.PathLike[str]
"""A folder, or what `merge` returns."""

VALUES = {"weight": 0.6, "t": 0.3, "density": 0.4, "gamma": 0.05, "epsilon": 1e-3, "select_topk": 0.5}
"""What tests give a method's parameters, where it has them."""

WEIGHT_SPACE = [name for name, method in METHODS.items() if not method.core_only]
"""Methods that merge deltas as they are, without a space of adapters."""


def on(base: Ref, adapter: Ref) -> str:
    """A reference to an adapter on a base."""
    return f"{base}+{adapter}"


def recipe(
    method: str, base: Ref | None, *sources: Ref | tuple[Ref, Mapping[str, Any]], **extra: Any
) -> dict[str, Any]:
    """A recipe of `models:`; a source is a reference, or one with its parameters."""
    pairs = [source if isinstance(source, tuple) else (source, {}) for source in sources]
    models = [{"model": str(ref), **({"parameters": dict(given)} if given else {})} for ref, given in pairs]
    return {"merge_method": method, **({"base_model": str(base)} if base else {}), "models": models, **extra}


def recipe_for(name: str, base: Ref, *sources: Ref, **extra: Any) -> dict[str, Any]:
    """A recipe that any method can run: as many of the sources as it takes, and values for what it needs."""
    method = METHODS[name]
    count = min(len(sources), method.max_sources or len(sources))
    given = {p.name: VALUES[p.name] for p in method.parameters if p.name in VALUES and _is_wanted(name, p.name)}
    needed = [p.name for p in method.parameters if p.default is REQUIRED and p.name not in given]
    assert not needed, f"VALUES lacks {needed}"
    own = {p.name: given[p.name] for p in method.parameters if p.scope == "source" and p.name in given}
    shared = {name: value for name, value in given.items() if name not in own}
    pairs = [
        (ref, {**own, **({"weight": 0.6 - 0.2 * i} if "weight" in own else {})})
        for i, ref in enumerate(sources[:count])
    ]
    return recipe(name, base if method.base == "required" else None, *pairs, parameters=shared, **extra)


def _is_wanted(method: str, parameter: str) -> bool:
    """Whether a test sets it: of the three ways to trim only one can be given, and some epsilons have a narrow range."""
    return parameter not in ("density", "epsilon") if method == "l1_ties" else parameter != "epsilon"


def tensors_of(folder: Place) -> State:
    """Every tensor of a checkpoint folder."""
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def files_of(folder: Place) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def same(one: State, other: State) -> bool:
    """Whether two states hold the same names, types and bits."""
    return one.keys() == other.keys() and all(bits_equal(one[name], other[name]) for name in one)


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits, NaN and -0 included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def manifest_of(folder: Place) -> dict[str, Any]:
    """`merge_manifest.json`."""
    return json.loads((Path(folder) / "merge_manifest.json").read_text())  # type: ignore[no-any-return]


def write_recipe(path: Path, data: Mapping[str, Any]) -> Path:
    """A recipe as a file; JSON is YAML."""
    path.write_text(json.dumps(data, indent=1))
    return path


def paft(*arguments: Ref) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def python(code: str, *arguments: Ref, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python text in a process of its own, with this package and these tests to import."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    here = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, str(Path(__file__).parents[1])])} | environment
    return subprocess.run(command, capture_output=True, text=True, env=here, timeout=300)


def paft_process(*arguments: Ref, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, after the Python text `before`."""
    return python(f"{before}\nimport sys\nfrom paft_merge.cli import cli\ncli(sys.argv[1:])", *arguments, **environment)


HERE = str(Path(__file__).parents[2])
