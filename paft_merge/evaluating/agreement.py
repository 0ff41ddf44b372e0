"""How often answers agree, with each other or with those of other models: evaluations that need no right answers.

Imports no torch. An empty answer, or one without a match of `extract`, agrees with none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from paft_merge.errors import EvaluateError, Problems
from paft_merge.hub import resolve
from paft_merge.recipe.sections import beside_recipe, not_found
from paft_merge.recipe.yaml_source import did_you_mean


def consistency(answers: Sequence[str]) -> float:
    """The share of sampled answers that equal the most frequent one.

    It is the consistency of Wang et al. 2022 (arXiv:2203.11171): the share of samples that agree with their majority.
    """
    return max(_counted(answers).values(), default=0) / len(answers)


def agrees(answer: str, sources: Sequence[str]) -> bool:
    """Whether an answer is the most frequent one of the sources, or one of several that are equally frequent."""
    counts = _counted(sources)
    return answer.strip() in counts and counts[answer.strip()] == max(counts.values())


def _counted(answers: Sequence[str]) -> Counter[str]:
    return Counter(filter(None, map(str.strip, answers)))


def source_parts(source: str, folder: Path) -> tuple[str, ...]:
    """Split a model of `with:`, a folder, a Hub name or `base+adapter`, into its parts; paths begin at the recipe's folder."""
    whole = (source,) if beside_recipe(source, folder).exists() else source.split("+")
    return tuple(str(place) if (place := beside_recipe(part, folder)).exists() else part for part in whole)


def check_source(source: str, folder: Path, named: Collection[str]) -> None:
    """Check that a model of `with:` exists, without downloading its weights.

    Args:
        source: as in the recipe.
        folder: the recipe's folder.
        named: the names that the caller gives to models, which need no check.

    Raises:
        EvaluateError, HubError: it does not exist, or is not a model.
    """
    if source in named:
        return
    parts, problems = source_parts(source, folder), Problems()
    for at, part in enumerate(parts):
        kind, file = ("an adapter", "adapter_config.json") if at else ("a model", "config.json")
        if Path(part).exists() and not (Path(part) / file).is_file():
            fix = "write BASE+ADAPTER, or the folder of a model"
            problems.add("SOURCE", part, f"has no {file}, so it is not the folder of {kind}", fix)
        with problems.catching():
            resolve(part, kind="side")
    if problems.found and named and parts == (source,) and "/" not in source:
        fix = did_you_mean(source, named) or f"names are {', '.join(named)}"
        raise EvaluateError.of("SOURCE", source, f"is not a name in the recipe, and is {not_found(folder)}", fix)
    problems.raise_as(EvaluateError)
