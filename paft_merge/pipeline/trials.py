"""The trials of a search: each merges in memory, puts the tensors into a model that stays loaded, and evaluates it.

Config and tokenizer of a merge hardly ever depend on the parameters that are searched. The first trial of a process writes
them, without weights, and loads the model from them and the merged tensors. Later trials replace the tensors.
"""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft_merge.engine.api import merge, open_plan, planned_again
from paft_merge.engine.options import MergeOptions
from paft_merge.engine.sidefiles import model_files
from paft_merge.errors import EvaluateError, Problem
from paft_merge.evaluating import HARNESS, check_evaluate, evaluate_loaded
from paft_merge.evaluating.joint_decoding import Decoder
from paft_merge.pipeline.arms import writes_adapter
from paft_merge.pipeline.named_models import resolved_merge
from paft_merge.pipeline.ray_steps import Origin
from paft_merge.pipeline.schema import RunRecipe
from paft_merge.pipeline.trained_templates import as_trained, template_of_run
from paft_merge.plan import COPY, MergePlan, PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from paft_merge.evaluating.loading import EvaluatedModel

log = logging.getLogger(__name__)

Scores = Mapping[str, tuple[float, float | None]]
"""The value and the standard error of each evaluation, by name."""


@dataclass(frozen=True)
class Search:
    """What all trials of a search have in common."""

    recipe: RunRecipe
    paths: Mapping[str, Mapping[str, str]]
    """Of the adapters, by name."""
    metrics: tuple[str, ...]
    """The evaluations that are measured; all of lm-eval's tasks together have the name `HARNESS`."""
    folder: Path
    """The run folder."""
    trust_code: bool
    key: str
    """Different for every search of a process."""
    sources: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict, repr=False)
    """The answers of the sources of every `agreement`, by its name."""


def try_merge(search: Search, data: Mapping[str, Any], scratch: Path, threads: int, origin: Origin) -> Scores:
    """Merge and evaluate; the process keeps the model for the next trial of the same search.

    Args:
        search: the search.
        data: the section `merge:` of the trial.
        scratch: a folder that this trial alone uses.
        threads: blocks that are merged at a time.
        origin: the process that started the search.

    Returns:
        The value and the standard error of every score, by name.
    """
    origin.check()
    recipe = search.recipe
    resolved = as_trained(resolved_merge(data, search.paths, recipe, recipe.seeds[0]))
    try:
        found = _model_of(search.key).scores(search, resolved, scratch, threads)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


@lru_cache(maxsize=1)
def _model_of(key: str) -> TrialModel:
    return TrialModel()


def forget_model() -> None:
    """Free the model that this process keeps."""
    _model_of.cache_clear()


@dataclass
class TrialModel:
    """The loaded model of a process, into which the merge of each trial is put."""

    subject: EvaluatedModel | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    """Config, tokenizer and other files that `subject` was loaded with."""
    places: Mapping[str, Tensor] | None = None
    """The parameters of the model by tensor name; None if a tensor is not one parameter as it is."""
    copied: Mapping[str, Any] = field(default_factory=dict)
    """The tensors of the model that are copies of a source, each with its origin."""
    plan: MergePlan | None = None
    """A plan whose models are open."""
    inputs: ExitStack = field(default_factory=ExitStack)
    """Closes the models of `plan`."""
    process: int = 0
    """The process that opened them: a fork would share the places in their files."""
    written: bool = False
    """Every trial writes its checkpoint, because transformers cannot load this model from memory."""

    def __post_init__(self) -> None:
        weakref.finalize(self, self.inputs.close)

    def scores(self, search: Search, resolved: Mapping[str, Any], scratch: Path, threads: int) -> Scores:
        """Merge a resolved recipe and evaluate the result; see `try_merge`."""
        spec, folder = search.recipe.evaluate, search.recipe.folder
        assert spec is not None
        if self.subject is None:
            check_evaluate(spec, folder, trust_code=search.trust_code, models=("base", *search.recipe.names))
        try:
            self._merge(search, resolved, scratch, threads)
        except BaseException:
            self.subject = None  # some of its tensors may be those of this trial
            raise
        assert self.subject is not None
        found = evaluate_loaded(self.subject, spec, folder=folder, only=search.metrics, sources=search.sources)
        return {name: (score.value, score.stderr) for name, score in found.items()}

    def _merge(self, search: Search, resolved: Mapping[str, Any], scratch: Path, threads: int) -> None:
        if not self.written and not writes_adapter(resolved):
            plan = self._plan(resolved)
            _log(plan.warnings)
            files = model_files(plan, MergeOptions())
            if self.subject is not None and self.places is not None and files == self.files:
                self._put(plan, threads)
                return
            try:
                self._load(search, plan, files, scratch, threads)
                return
            except EvaluateError as error:
                log.info("each trial writes its checkpoint, because the model cannot be loaded from memory: %s", error)
                self.written = True
        out = scratch / "written"
        merge(dict(resolved), out, overwrite=True, write_model_card=False, threads=threads, warn=_log)
        base = resolved.get("base_model", search.recipe.base)
        self.subject = _loaded(search, (str(base), str(out)) if writes_adapter(resolved) else out)

    def _plan(self, resolved: Mapping[str, Any]) -> MergePlan:
        """Plan the merge of a trial; the models of the plan stay open for the next trial of this process."""
        again = planned_again(self.plan, dict(resolved)) if self.plan and self.process == os.getpid() else None
        if again is None:
            self.inputs.close()
            self.plan = None
            self.plan = again = self.inputs.enter_context(open_plan(dict(resolved)))
            self.process = os.getpid()
        return again

    def _put(self, plan: MergePlan, threads: int) -> None:
        """Merge into the parameters of the loaded model; tensors that stay copies of the same source are left out."""
        import torch

        from paft_merge.engine.state_dicts import merge_to

        places, copied = self.places, _copied(plan.tensors)
        assert places is not None

        def put(name: str, made: Tensor) -> None:
            places[name].copy_(made)

        same = [name for name, origin in copied.items() if self.copied.get(name) == origin]
        with torch.no_grad():
            merge_to(put, plan, threads=threads, leave_out=same)
        self.copied = copied

    def _load(
        self, search: Search, plan: MergePlan, files: Mapping[str, bytes | Path], scratch: Path, threads: int
    ) -> None:
        """Merge, and load the model from the merged tensors."""
        from paft_merge.engine.state_dicts import merge_to

        before, tensors = self.subject if files == self.files else None, dict[str, Any]()
        merge_to(tensors.__setitem__, plan, threads=threads)
        folder = scratch / "files"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        self.subject = _loaded(search, folder, tensors)
        self.subject.decoder = Decoder()
        if before is not None:
            self.subject.prepared, self.subject.decoder = before.prepared, before.decoder
        self.files, self.copied, self.places = files, _copied(plan.tensors), _places(self.subject.model, tensors)


def _loaded(search: Search, model: Path | Sequence[str], tensors: Mapping[str, Tensor] | None = None) -> EvaluatedModel:
    from paft_merge.evaluating.loading import load_subject

    spec = search.recipe.evaluate
    assert spec is not None
    template = template_of_run(search.recipe, search.folder)
    return load_subject(model, spec, trust_code=search.trust_code, template=template, weights=tensors)


def _copied(tensors: Iterable[PlannedTensor]) -> dict[str, Any]:
    """The tensors that no source changes, and the checkpoint and the name that each is copied from."""
    reads = {one.name: one.inputs.reads[0] for one in tensors if one.method == COPY}
    return {name: (read.checkpoint.identity, read.name) for name, read in reads.items()}


def _places(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The parameters that a checkpoint's tensors became, by name.

    Returns:
        None if transformers renamed, joined or changed a tensor, if two are one parameter, or if the model has a parameter
        that is not in the checkpoint.
    """
    import torch

    state = model.state_dict()
    places = {name: state[name] for name in tensors if name in state}
    memory = {place.data_ptr() for place in places.values()}
    if not len(memory) == len(places) == len(tensors) or not all(one.data_ptr() in memory for one in state.values()):
        return None
    same = (torch.equal(place, tensors[name].to(place.device, place.dtype)) for name, place in places.items())
    return places if all(same) else None


def _log(problems: Sequence[Problem]) -> None:
    for problem in problems:
        log.info("%s", problem)


def metrics_of(recipe: RunRecipe, scores: Iterable[str]) -> tuple[str, ...]:
    """The evaluations that give scores, for `evaluate_loaded`."""
    light = recipe.evaluate.metrics if recipe.evaluate else {}
    return tuple(dict.fromkeys(name if name in light else HARNESS for name in scores))
