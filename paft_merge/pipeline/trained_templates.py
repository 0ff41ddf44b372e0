"""The chat template of a run: the one that its adapters are trained with, for merged models and for evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from paft_merge.errors import PaftMergeError, Problems
from paft_merge.evaluating.data_rows import read_rows
from paft_merge.evaluating.schema import Measurement
from paft_merge.hub import fetch
from paft_merge.pipeline.schema import RunRecipe
from paft_merge.plan.vocabulary.chat_templates import ChatTemplateError, choose_template
from paft_merge.plan.vocabulary.tokenizers import files_in
from paft_merge.plan.vocabulary.trained_tokenizers import TrainedTokenizer
from paft_merge.recipe import load_recipe
from paft_merge.recipe.sections import beside_recipe

_CHOSEN = ("chat_template", "tokenizer", "tokenizer_source")


def as_trained(merge: Mapping[str, Any]) -> dict[str, Any]:
    """A merge recipe with `chat_template: auto`, if its adapters have one template and the base does not have it.

    Args:
        merge: a resolved merge recipe; one that chooses a tokenizer or a template is not changed.
    """
    if any(merge.get(key) is not None for key in _CHOSEN):
        return dict(merge)
    refs = load_recipe(dict(merge)).references
    found = {_template_in(ref.lora, ref.lora_revision) for ref in refs if ref.lora} - {None}
    bases = {_template_in(ref.path, ref.revision) for ref in refs}
    return {**merge, "chat_template": "auto"} if len(found) == 1 and not found <= bases else dict(merge)


def template_of_run(recipe: RunRecipe, folder: Path) -> str | None:
    """The template of the first adapter that has one, for models of a run that have none, such as its base."""
    made = (path for name in recipe.names for path in sorted(folder.glob(f"**/adapters/{name}")))
    return next(filter(None, (*map(_template_in, map(str, made)), *_of_existing(recipe), _of_merge(recipe))), None)


def check_turns(recipe: RunRecipe, problems: Problems) -> None:
    """Note the evaluations of chat turns in a run where neither the base nor an adapter has a chat template."""
    metrics = recipe.evaluate.metrics if recipe.evaluate else {}
    named = [name for name, of in metrics.items() if _has_turns(of, recipe.folder)]
    if not named or any(spec.chat_template for spec in recipe.adapters.values()):
        return
    with suppress(PaftMergeError):  # the check of the base reports a base that is not found
        if TrainedTokenizer(files_in(fetch(recipe.base, kind="side"))).template or any(_of_existing(recipe)):
            return
        if _of_merge(recipe):
            return
        where = "the adapters (chatml, a Jinja file, ...)" if recipe.adapters else "merge: (chatml, llama3, ...)"
        fix = f"set chat_template: of {where}, or put the template into the base's folder"
        for name in named:
            where, what = (
                recipe.where("evaluate", "metrics", name),
                "its rows are chat turns, and no model has a template",
            )
            problems.add("TEMPLATE", where, what, fix)


def _has_turns(of: Measurement, folder: Path) -> bool:
    if of.kind == "perplexity":
        return False
    with suppress(PaftMergeError):  # the check of the evaluation reports it
        row = read_rows(beside_recipe(of.data, folder), 1)[0]
        return any(isinstance(row.get(key), list) for key in (of.prompt, "chosen", "messages", "conversations"))
    return False


def _of_existing(recipe: RunRecipe) -> Iterator[str | None]:
    for spec in recipe.existing.values():
        yield _template_in(spec.path, spec.revision)


def _of_merge(recipe: RunRecipe) -> str | None:
    """The template that `merge:` names or holds; None for `auto`."""
    written = recipe.merge.data.get("chat_template") if recipe.merge else None
    with suppress(ChatTemplateError):  # the check of the merge reports it
        return choose_template(written, []) if isinstance(written, str) else None
    return None


def _template_in(place: str, revision: str | None = None) -> str | None:
    """The chat template, without blanks at its ends, of a folder or repository."""
    found = TrainedTokenizer(files_in(fetch(place, revision, kind="side"))).template
    return found.strip() if found else None
