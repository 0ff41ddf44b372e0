"""The metadata of a card for the Hub: base models, licence, tags, data sets, and evaluation results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paft_merge.errors import CheckpointError, Problem, reading
from paft_merge.inputs.safetensors_header import open_regular, read_text

_KEPT = ("license", "license_name", "license_link", "datasets", "language")
_RESULTS = ("evaluation.json", "results*.json")


@dataclass(frozen=True)
class Score:
    """One result of an evaluation."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    shots: int | None = None


def about(folder: Path) -> dict[str, Any]:
    """Licence, data sets and languages in the card of a source; empty if it has no card or the card does not state them."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        with reading(path, "CARD", CheckpointError):
            fd = open_regular(path)
            with os.fdopen(fd, "rb") as file:
                head, _, rest = file.read(_HEAD_BYTES).decode("utf-8", "ignore").partition("---\n")
            if head.strip() or "---" not in rest:
                return {}
            data = yaml.safe_load(rest.partition("\n---")[0])
    except CheckpointError:  # a card without metadata that can be read states nothing
        return {}
    found = {k: data[k] for k in _KEPT if isinstance(data, Mapping) and isinstance(data.get(k), str | list)}
    return {k: v for k, v in found.items() if all(map(_is_text, [v] if isinstance(v, str) else v))}


_HEAD_BYTES = 1 << 16
"""A card's metadata is looked for in this many bytes."""


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be written as UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def licence(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The common licence of all sources that state one, as metadata; if they differ, none and a warning."""
    stated: dict[tuple[Any, ...], list[str]] = {}
    fields = ("license", "license_name", "license_link")
    for source in manifest.get("sources", ()):
        if said := source.get("card", {}).get("license"):
            key = (tuple(said) if isinstance(said, list) else said, *(source["card"].get(f) for f in fields[1:]))
            stated.setdefault(key, []).append(source["path"])
    if len(stated) > 1:
        stated_by = "; ".join(f"{', '.join(paths)}: {key[1] or key[0]}" for key, paths in stated.items())
        fix = "read them, and set `license` in the card yourself"
        return {}, [
            Problem("LICENSE", "", f"the sources have different licences ({stated_by}), so the card states none", fix)
        ]
    values = next(iter(stated), ())
    return {
        f: list(v) if isinstance(v, tuple) else v for f, v in zip(fields, values, strict=False) if v is not None
    }, []


def card_metadata(manifest: Mapping[str, Any], name: str, scores: Sequence[Score]) -> dict[str, Any]:
    """Return the content of the card's YAML header.

    Args:
        manifest: the manifest of the merge.
        name: the name of the model.
        scores: evaluation results.
    """
    sources = manifest.get("sources", ())
    hub = list(dict.fromkeys(s["repo_id"] for s in sources if s.get("repo_id")))
    data_sets = sorted({name for s in sources for name in _listed(s, "datasets")})
    languages = sorted({name for s in sources for name in _listed(s, "language")})
    output = manifest["recipe"].get("output") or {}
    relation, library, kind = "merge", "transformers", list[str]()
    if output.get("kind") in ("adapter", "delta"):
        relation, hub = "adapter", [s["repo_id"] for s in sources if s.get("repo_id") and s.get("donor")]
        library = "peft" if output["kind"] == "adapter" or output.get("format") == "shira" else "paft_merge"
        kind = ["lora"] if output["kind"] == "adapter" else []
    found: dict[str, Any] = {"base_model": hub, "base_model_relation": relation} if hub else {}
    found |= {"library_name": library, "tags": ["mergekit", "merge", "paft", *kind], **licence(manifest)[0]}
    found |= {key: value for key, value in (("datasets", data_sets), ("language", languages)) if value}
    return found | ({"model-index": [_index(name, scores)]} if scores else {})


def _listed(source: Mapping[str, Any], key: str) -> list[str]:
    value = source.get("card", {}).get(key, [])
    return [value] if isinstance(value, str) else list(value)


def _index(name: str, scores: Sequence[Score]) -> dict[str, Any]:
    """Results in the format of the Hub's leaderboards (model-index)."""
    results = []
    for task in dict.fromkeys(score.task for score in scores):
        metrics = [{"type": s.metric, "value": s.value, "name": s.metric} for s in scores if s.task == task]
        data_set = {"type": task, "name": task}
        results.append({"task": {"type": "text-generation"}, "dataset": data_set, "metrics": metrics})
    return {"name": name, "results": results}


def scores_in(folder: Path) -> list[Score]:
    """Evaluation results in a folder: lm-eval's `results*.json`, or `evaluation.json` with one number for each task."""
    found = dict.fromkeys(path for pattern in _RESULTS for path in sorted(folder.glob(pattern)))
    return [score for path in found for score in _scores_of(path)]


def _scores_of(path: Path) -> Iterator[Score]:
    try:
        data = json.loads(read_text(path, "CARD"))
    except (CheckpointError, ValueError, RecursionError):
        return
    results = data.get("results", data) if isinstance(data, dict) else {}
    shots = data.get("n-shot", {}) if isinstance(data, dict) else {}
    for task, numbers in results.items() if isinstance(results, dict) else ():
        if is_number(numbers):
            numbers = {"value": numbers}
        if not isinstance(numbers, dict):
            continue
        for metric, value in numbers.items():
            name = metric.split(",")[0]
            if is_number(value) and not name.endswith("stderr") and name not in ("sample_len", "rows"):
                deviation = numbers.get(metric.replace(name, f"{name}_stderr", 1), numbers.get("stderr"))
                shot = shots.get(task) if isinstance(shots, dict) else None
                yield Score(
                    task, "score" if name == "value" else name, value,
                    deviation if is_number(deviation) else None, shot if isinstance(shot, int) else None,
                )  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
