"""Study 1: PAFT in small (arXiv:2406.17923). Adapters trained in parallel and merged, against the sequence and the mixture.

Every seed is a `paft run` of the recipe in the definition, once in each setting. The table of the run becomes the rows of
the study, without a change.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from paft_merge.errors import RunError
from paft_merge.pipeline import run
from paft_merge.recipe.sections import Section
from paft_merge.recipe.yaml_source import dump_yaml
from paft_merge.studies.paft_small_data import REWARD, Sizes, prepare
from paft_merge.studies.study import Tables

BASE = "stories260K_hf"
FILES = (BASE, "sigmorphon2017", "vader", "tinystories_valid_30k.txt")


class Parameters(Section):
    """The parameters of the study."""

    data: Sizes = Sizes()
    settings: dict[str, list[str]] = Field(default_factory=dict)
    """By name, the changes of the recipe (`key=value`) that a setting makes."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """A recipe of `paft run` without its base and its seeds; the names of its files are those that `prepare` writes."""


def check(parameters: Parameters, data: Path | None) -> dict[str, int]:
    """Return the size of each file of the data; RunError STUDY if one is not there."""
    lacking = [name for name in FILES if data is None or not (data / name).exists()]
    if data is None or lacking:
        fix = f"give --data the folder with {', '.join(FILES)}"
        raise RunError.of("STUDY", data or "paft-small", f"{', '.join(lacking)} not found", fix)
    files = (path for name in FILES for path in ([data / name] if (data / name).is_file() else (data / name).iterdir()))
    return {str(path.relative_to(data)): path.stat().st_size for path in sorted(files)}


def run_seed(
    parameters: Parameters, seed: int, data: Path | None, settings: Mapping[str, Any] | None, folder: Path
) -> Tables:
    """Run the recipe in every setting with one seed.

    Args:
        parameters: those of the study.
        seed: seed of the training and of the sampled answers. All seeds share one set of data.
        data: the folder that `check` accepted.
        settings: not used.
        folder: the folder for the data and the runs; a run that was interrupted there is continued.

    Returns:
        A table for each setting: the rows and columns of the run's table, and the cost of each arm.
    """
    assert data is not None
    inputs = folder / "inputs"
    if not (inputs / REWARD).exists():
        prepare(data, inputs, parameters.data)
    recipe = {"base_model": str((data / BASE).resolve()), "seeds": [seed], **parameters.recipe}
    (inputs / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    tables: Tables = {}
    for name, changes in parameters.settings.items():
        made = run(inputs / "recipe.yaml", folder / f"{name}-{seed}", overrides=changes)
        found = made.table.to_json()
        tables[name] = {row["arm"]: _metrics(row) for row in found["rows"]}
    return tables


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one row."""
    found = {column: cell["mean"] for column, cell in row["cells"].items()}
    return found | {key: values[0] for key, values in row["cost"].items()}
