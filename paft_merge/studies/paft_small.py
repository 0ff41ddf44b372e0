"""Study 1: PAFT in small (arXiv:2406.17923). Adapters trained in parallel and merged, against the sequence and the mixture.

Every seed is a `paft run` of the recipe in the definition, once in each setting. The table of the run becomes the rows of
the study, without a change.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from paft_merge.compute.cores import available_cores
from paft_merge.errors import RunError
from paft_merge.pipeline import run
from paft_merge.pipeline.fingerprints import file_print, key_of
from paft_merge.pipeline.trial_processes import Child
from paft_merge.recipe.yaml_source import dump_yaml
from paft_merge.studies import story_model
from paft_merge.studies.paft_small_data import (
    BASE,
    FILES,
    REWARD,
    SKILL,
    Files,
    Sizes,
    preference_of,
    prepare,
    read_skill,
)
from paft_merge.studies.story_model import StoryModel
from paft_merge.studies.study import Tables

log = logging.getLogger(__name__)

USUAL = Files().model_dump()


class Parameters(StoryModel, Files):
    """The parameters of the study."""

    data: Sizes = Field(default_factory=Sizes)
    settings: dict[str, list[str]] = Field(default_factory=dict)
    """By name, the changes of the recipe (`key=value`) that a setting makes."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """A recipe of `paft run` without its base and its seeds; the names of its files are those that `prepare` writes."""

    @model_serializer(mode="wrap")
    def _without_usual_files(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the usual files out, so that results of before these keys can be continued."""
        found: dict[str, Any] = dump(self)
        return {key: value for key, value in found.items() if key not in USUAL or value != USUAL[key]}


def check(spec: Parameters, data: Path | None) -> dict[str, str]:
    """Digests of the inputs; RunError STUDY if one is not there, or has lines of another form."""
    digests = _digests(spec, data)
    assert data is not None
    asked = {"skill_train": spec.data.rows, "skill_dev": spec.data.chosen, "skill_test": spec.data.tested}
    prompts = {key: [row["prompt"] for row in read_skill(data / getattr(spec, key))] for key in SKILL}
    trained = {*prompts["skill_train"][: spec.data.rows]}
    for key, count in asked.items():
        file = data / getattr(spec, key)
        if len(prompts[key]) < count:
            log.warning("%s: the study asks for %d rows, and there are %d", file, count, len(prompts[key]))
        if key != "skill_train" and (seen := sum(prompt in trained for prompt in prompts[key][:count])):
            log.warning("%s: %d of its rows have a prompt that is trained on (%s)", file, seen, spec.skill_train)
    return digests


def _digests(spec: Parameters, data: Path | None) -> dict[str, str]:
    digests = story_model.check(spec, data, lexicon=not spec.preference)
    assert data is not None
    if ":" in preference_of(spec, data):
        digests["preference"] = file_print(data / spec.preference.rpartition(":")[0])
    for key in FILES:
        file = data / getattr(spec, key)
        if not file.is_file():
            raise RunError.of("STUDY", file, "does not exist", f"put it there, or name another with --set {key}=...")
        digests[file.name if getattr(spec, key) == USUAL[key] else key] = file_print(file)
    return digests


def run_seed(spec: Parameters, seed: int, data: Path | None, tuned: Any, work: Path) -> Tables:
    """Run the recipe in every setting with one seed; each setting on a core of its own where there are as many.

    Args:
        spec: the parameters of the study.
        seed: seed of the training. All seeds share one set of data.
        data: the folder that `check` accepted.
        tuned: not used.
        work: the folder for the data and the runs; a run that was interrupted there is continued.

    Returns:
        A table for each setting: the rows and columns of the run's table, and the cost of each arm.
    """
    base, words = story_model.inputs(spec, data, lexicon=not spec.preference)
    assert data is not None
    inputs = work / "inputs"
    made = inputs / "made_of"  # an interrupted run may have had other parameters or other data
    key = key_of(
        sizes=spec.data.model_dump(), files={one: getattr(spec, one) for one in USUAL}, digests=_digests(spec, data)
    )
    if made.exists() and made.read_text(encoding="utf-8") != key:
        shutil.rmtree(inputs)
    if not (inputs / REWARD).exists():
        prepare(base, words, data, inputs, spec.data, spec)
        made.write_text(key, encoding="utf-8")
    recipe = {"base_model": BASE, "seeds": [seed], **spec.recipe}
    (inputs / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    runs = [(inputs / "recipe.yaml", work / f"{name}-{seed}", changes) for name, changes in spec.settings.items()]
    count = min(len(runs), available_cores())
    if count < 2:
        return dict(zip(spec.settings, starmap(_rows, runs), strict=True))
    children = [Child.start("spawn", "study", "a setting") for _ in range(count)]
    try:
        found = []
        for first in range(0, len(runs), count):
            some = runs[first : first + count]
            for child, one in zip(children, some, strict=False):
                child.send(partial(_rows, *one))
            found += [child.result() for child, _ in zip(children, some, strict=False)]
    finally:
        for child in children:
            child.stop()
    return dict(zip(spec.settings, found, strict=True))


def _rows(recipe: Path, folder: Path, changes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run the recipe in one setting, and return the rows of its table."""
    found = run(recipe, folder, overrides=changes).table.to_json()
    return {row["arm"]: _metrics(row) for row in found["rows"]}


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one row."""
    found = {column: cell["mean"] for column, cell in row["cells"].items()}
    return found | {key: values[0] for key, values in row["cost"].items()}
