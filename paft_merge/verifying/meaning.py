"""What a recipe means: its merged tensors in float32, computed from the sources when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paft_merge.engine.api import open_plan
from paft_merge.engine.intermediate import Intermediate
from paft_merge.engine.options import MergeOptions
from paft_merge.engine.reproduction import open_recorded
from paft_merge.engine.sidefiles import model_files
from paft_merge.errors import AuditError
from paft_merge.inputs.models import Model
from paft_merge.plan import MergePlan, PlannedTensor
from paft_merge.recipe import load_recipe


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

    def planned(self, name: str) -> PlannedTensor:
        """The plan of a tensor."""
        made = self.model.checkpoint
        assert isinstance(made, Intermediate)
        return made.planned(name)

    @property
    def adapter(self) -> tuple[Path, Path] | None:
        """The folders of the base and of the adapter, if the merge adds one adapter with weight 1 to the base."""
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
        return sources[0].checkpoint.folder, sources[0].adapter.parts[0].folder


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
        AuditError: VERIFY, the recipe has no meaning as a model.
        PaftMergeError: a source is missing or has changed; the recipe is invalid.
    """
    rounding = "nearest"

    def in_float32(written: dict[str, Any]) -> dict[str, Any]:
        nonlocal rounding
        if (space := written.get("space") or "weight") != "weight":
            what = f"was merged with space: {space}, whose result exists only as an adapter"
            raise AuditError.of("VERIFY", place, what, "evaluate it, or compare it with another model by paft diff")
        rounding = written.get("rounding") or rounding
        dropped = ("output", "quantization", "rounding", "name")
        return {key: value for key, value in written.items() if key not in dropped} | {"out_dtype": "float32"}

    with ExitStack() as opened:
        if recipe is not None:
            loaded = load_recipe(recipe)
            changed = load_recipe(replace(loaded.located, data=in_float32(loaded.resolved()), text=""))
            plan = opened.enter_context(open_plan(changed, replace(options, stream_from_hub=True)))
        else:
            assert manifest is not None
            plan = opened.enter_context(open_recorded(manifest, place, options, in_float32))
        made = Intermediate("the recipe", plan, rounded=False)
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="paft-verify-")))
        for name, content in model_files(plan, replace(options, write_model_card=False)).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        made.folder = folder
        base = next((model for model in plan.models if model.ref == str(plan.recipe.base_model)), plan.config_source)
        yield Meaning(plan, Model("the recipe", made), replace(base, adapter=None), folder, rounding)
