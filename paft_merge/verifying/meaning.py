"""What a recipe means: its merged tensors in float32, computed from the sources when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paft_merge.engine.api import Source, merge, open_plan, read_documents
from paft_merge.engine.intermediate import Intermediate
from paft_merge.engine.options import MergeOptions
from paft_merge.engine.reproduction import open_recorded, recorded_recipe
from paft_merge.engine.sidefiles import model_files
from paft_merge.hub import fetch
from paft_merge.inputs.adapter_places import PEFT_FILES
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.stack import AdapterStack
from paft_merge.inputs.models import Model
from paft_merge.methods import METHODS
from paft_merge.methods.mergekit_methods import import_methods
from paft_merge.plan import MergePlan
from paft_merge.plan.vocabulary.tokenizers import tokenizer_files
from paft_merge.recipe import load_recipe
from paft_merge.recipe.documents import Documents

_OF_WRITING = ("quantization", "rounding", "name")
"""Keys that say how results are written."""


@dataclass(frozen=True)
class Meaning:
    """The model that a recipe means."""

    plan: MergePlan
    """The merge, with float32 as its output."""
    model: Model
    """Its tensors; each is computed when it is read."""
    base: Model
    """The base; without one, the first model."""
    folder: Path
    """Its config and tokenizer, as files."""
    rounding: str
    """`nearest` or `stochastic`, as the recipe writes it."""

    def row(self, name: str) -> int:
        """Elements of a row of a tensor, of which blocks have whole ones."""
        made = self.model.checkpoint
        return made.planned(name).row if isinstance(made, Intermediate) else 1

    @property
    def adapter(self) -> tuple[Model, Path] | None:
        """The base and the folder of an adapter, if the recipe means the base with that one adapter of weight 1.

        Raises:
            PaftMergeError: the adapter cannot be fetched.
        """
        if self.model.adapter is not None:
            return self.base, self.model.adapter.parts[0].folder
        sources = [model for model in self.plan.models if model.adapter is not None]
        if len(sources) != 1 or sources[0].adapter is None or len(sources[0].adapter.parts) != 1:
            return None
        others = {model.checkpoint.folder for model in self.plan.models}
        weights = {
            source.get("weight", 1.0)
            for tensor in self.plan.tensors
            for source in tensor.parameters.get("sources", ())
            if tensor.inputs.active
        }
        shared = {tensor.parameters.get("lambda", 1.0) for tensor in self.plan.tensors if tensor.parameters}
        method = self.plan.recipe.merge_method
        if (
            len(others) > 1
            or weights - {1.0}
            or shared - {1.0}
            or method not in ("linear", "task_arithmetic", "passthrough")
        ):
            return None
        folder = sources[0].adapter.parts[0].folder
        if not any((folder / name).is_file() for name in PEFT_FILES):  # it is read from afar
            ((path, revision),) = next(r for r in self.plan.recipe.references if str(r) == sources[0].ref).adapters
            folder = fetch(path, revision)
        return replace(sources[0], adapter=None), folder


@contextmanager
def open_meaning(
    place: str, manifest: Mapping[str, Any] | None, recipe: Path | str | None, options: MergeOptions
) -> Iterator[Meaning]:
    """Open the sources of a merged model.

    Args:
        place: the model, for messages.
        manifest: its manifest; used without `recipe`.
        recipe: a recipe, for a model that another tool merged.
        options: as for `reproduce`.

    Raises:
        PaftMergeError: a source is missing or has changed; the recipe is invalid.
    """
    source: Source
    with ExitStack() as opened:
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="paft-verify-")))
        asked = replace(options, stream_from_hub=True, write_model_card=False)
        if recipe is not None:
            source, written = _of_file(recipe, place, asked)
            plan = opened.enter_context(open_plan(source, asked))
        else:
            assert manifest is not None
            written, trusted = manifest["recipe"], manifest.get("options", {}).get("trust_remote_code", False)
            asked = replace(asked, trust_remote_code=asked.trust_remote_code and bool(trusted))
            plan = opened.enter_context(open_recorded(manifest, place, options, _in_float32))
            source = recorded_recipe({**manifest, "recipe": _in_float32(written)})
        base = next((model for model in plan.models if model.ref == str(plan.recipe.base_model)), plan.config_source)
        base, rounding = replace(base, adapter=None), written.get("rounding") or "nearest"
        if plan.recipe.space == "weight":
            made = Intermediate("the recipe", plan, rounded=False)
            made.folder = _written(model_files(plan, asked), folder)
            yield Meaning(plan, Model("the recipe", made), base, folder, rounding)
            return
        merge(source, folder / "adapter", asked)
        adapter = opened.enter_context(Adapter.open(folder / "adapter", base.checkpoint))
        config = json.dumps(base.checkpoint.config).encode()
        _written({**(tokenizer_files(base) or {}), **model_files(plan, asked), "config.json": config}, folder)
        yield Meaning(plan, Model("the recipe", base.checkpoint, AdapterStack.of([adapter])), base, folder, rounding)


def _in_float32(written: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with a result in float32: a checkpoint, and of a space of adapters the adapter, which is all that it gives."""
    space = written.get("space") or "weight"
    dropped = _OF_WRITING if space != "weight" else ("output", *_OF_WRITING)
    return {key: value for key, value in written.items() if key not in dropped} | {"out_dtype": "float32"}


def _of_file(recipe: Path | str, place: str, options: MergeOptions) -> tuple[Documents, dict[str, Any]]:
    """The recipe of a file in float32, and as it is written; of several results that with the name of the model's folder.

    Raises:
        RecipeError: it is invalid, or has several results of other names.
    """
    documents, name = read_documents(recipe, options), Path(place).name
    results = [one.name for one in documents.finals]
    final = documents.only(name if len(results) > 1 and name in results else None)
    changed = replace(final.located, data=_in_float32(final.resolved()), text="")
    made = load_recipe(changed, methods=import_methods(options.imports, METHODS))
    return Documents((*documents.parts_of(final)[:-1], made)), final.resolved()


def _written(files: Mapping[str, bytes | Path], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder
