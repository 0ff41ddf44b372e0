"""Opens the sources of an audit, their base if there is one, and every tensor that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from paft_merge.auditing.header_only_base import Known, ShapesOnly, known_of, natural
from paft_merge.engine import api
from paft_merge.errors import AuditError, Problem, Problems
from paft_merge.hub import HF, Remote, ResolvedRepo, download, resolve
from paft_merge.hub.run_checkpoints import checkpoints
from paft_merge.hub.store_folders import named_by_url
from paft_merge.inputs.adapters import Adapter, AdapterDelta, open_weights
from paft_merge.inputs.adapters.config import CONFIG
from paft_merge.inputs.adapters.peft_types import read_settings
from paft_merge.inputs.adapters.stack import AdapterStack
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.equivalent_names import Names
from paft_merge.inputs.quantized import dequantized
from paft_merge.inputs.source_labels import labels_of
from paft_merge.inputs.tensor_inputs import Inputs, Read, inputs_for
from paft_merge.methods.rules.rule import Rule
from paft_merge.plan import COPY, MergePlan, Model
from paft_merge.plan.planned import PlannedTensor, StreamedTensor
from paft_merge.recipe import ModelRef, Recipe
from paft_merge.stores import has_scheme

Source = Path | str | Mapping[str, Any] | Recipe

_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


@dataclass(frozen=True)
class AuditedTensor(StreamedTensor):
    """One tensor to audit."""

    name: str
    shape: tuple[int, ...]
    inputs: Inputs
    rule: Rule | None = None
    """The rule of a recipe for this tensor."""

    @classmethod
    def of(cls, name: str, base: Read, sources: Sequence[Read], rule: Rule | None = None) -> AuditedTensor:
        """The deltas of `sources` from `base`; the shape is the largest of theirs."""
        inputs = Inputs(base, tuple(sources), "deltas", subtract=False)
        return cls(name, max((r.shape for r in inputs.reads), key=math.prod), inputs, rule)

    @property
    def stored(self) -> AuditedTensor:
        """The same tensor in blocks of stored bits, where all sources are plain tensors of one type; else in blocks of deltas."""
        assert self.inputs.base is not None
        return replace(self, inputs=inputs_for(self.inputs.base, self.inputs.sources, "deltas"))


@dataclass(frozen=True)
class Placed:
    """A tensor by its name, which says where in the model it is."""

    name: str

    @cached_property
    def layer(self) -> int | None:
        """The first number in the name; None outside layers."""
        found = _LAYER.match(self.name)
        return int(found[1]) if found else None

    @cached_property
    def module(self) -> str:
        """The kind of module: the last word of the name, without `weight`; the same in every layer and expert."""
        parts = [p for p in self.name.removesuffix(".weight").split(".") if not p.isdigit()]
        return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


@dataclass(frozen=True)
class Header:
    """Kind and settings of a source, from its own files."""

    source: str
    label: str
    """Short and unique among the sources of an audit."""
    kind: str
    """`lora`, `rslora`, `dora`, `pissa`, `olora`, another PEFT type in lower case, or `checkpoint`."""
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """For an adapter: rank, alpha, scale, target modules, PEFT version, the base it names, digest of its header, training record."""


@dataclass(frozen=True)
class Skipped:
    """Tensors that were not audited, and the reason."""

    source: str
    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Opened:
    """The open inputs of an audit."""

    headers: tuple[Header, ...]
    base: str | None
    """None when adapters are audited from their own files alone."""
    weights: bool
    """The base's weights can be read; otherwise metrics that need them are not measured."""
    subjects: tuple[AuditedTensor, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[Problem, ...]
    recipe: Recipe | None = None


@contextmanager
def open_sources(
    sources: Sequence[Source], base: Path | str | None, *, fetch_base: bool = False, lazy_unpickle: bool = False
) -> Iterator[Opened]:
    """Open the sources of an audit, and close them at the end of the block.

    Args:
        sources: adapters, checkpoints, `base+adapter` references, or one recipe (a file, text with a newline, a mapping).
        base: the model that they change; not with a recipe, which names it.
        fetch_base: fetch the weights of a base that is on the Hub only. By default only headers are read of the base of
            adapters. The base of whole models is always fetched, since their deltas are the difference from it.
        lazy_unpickle: read `.bin` files through a reader that runs no code of them.

    Raises:
        AuditError: NO_BASE, EMPTY (there is nothing to audit), RECIPE.
        PaftMergeError: a source cannot be opened.
    """
    recipe = next((s for s in sources if _is_recipe(s)), None)
    if recipe is not None and (len(sources) > 1 or base is not None):
        raise AuditError.of("RECIPE", "", "a recipe names its sources and its base itself", "give the recipe alone")
    with ExitStack() as stack:
        if recipe is not None:
            opened = _of_plan(_plan_of(recipe, stack, fetch_base, lazy_unpickle))
        else:
            refs = [ref for source in sources for ref in checkpoints(_reference(source))]
            opened = _of_references(refs, base, stack, fetch_base, lazy_unpickle)
        if not opened.subjects:
            why = "; ".join(dict.fromkeys(s.why for s in opened.skipped)) or "no tensor differs from the base"
            where = ", ".join(h.source for h in opened.headers)
            fix = "pass base=..." if opened.base is None else "" if opened.weights else "pass fetch_base=True"
            raise AuditError.of("EMPTY", where, f"there is nothing to audit: {why}", fix)
        yield opened


def _is_recipe(source: Source) -> bool:
    if isinstance(source, (Recipe, Mapping)):
        return True
    return "\n" in str(source) or str(source).startswith(HF) or str(source).endswith((".yaml", ".yml"))


def _reference(source: Source) -> ModelRef:
    assert isinstance(source, (str, Path))
    return ModelRef(str(source)) if Path(source).exists() else ModelRef.parse(str(source))


def _gathered(found: Iterable[AuditedTensor | Skipped | None]) -> tuple[tuple[AuditedTensor, ...], tuple[Skipped, ...]]:
    """The tensors to audit in natural order, and the others with one entry for each source and reason."""
    subjects, names = list[AuditedTensor](), dict[tuple[str, str], tuple[str, ...]]()
    for one in found:
        if isinstance(one, AuditedTensor):
            subjects.append(one)
        elif one is not None:
            names[one.source, one.why] = names.get((one.source, one.why), ()) + one.names
    skipped = (Skipped(source, held, why) for (source, why), held in names.items())
    return tuple(sorted(subjects, key=lambda s: natural(s.name))), tuple(skipped)


# --- from references --------------------------------------------------------------------------------------------------


def _of_references(
    refs: Sequence[ModelRef], base: Path | str | None, stack: ExitStack, fetch_base: bool, unpickle: bool
) -> Opened:
    folders, problems = list[list[Path]](), Problems()
    for ref in {r for r in refs if refs.count(r) > 1}:
        problems.add("TWICE", ref, "is given twice", "give each source once")
    for ref in refs:
        with problems.catching():
            folders.append(
                [_folder(*place, unpickle=unpickle) for place in ref.adapters or ((ref.path, ref.revision),)]
            )
    problems.raise_as(AuditError)
    adapters = [bool(r.lora) or (f[0] / CONFIG).is_file() for r, f in zip(refs, folders, strict=True)]
    named = base if base is not None else next((ref.base for ref in refs if ref.lora), None)
    if named is not None:
        bases = _Bases(stack, list(chain(*folders)) if all(adapters) and not fetch_base else None, unpickle)
        return _on_base(list(zip(refs, folders, adapters, strict=True)), _reference(str(named)), bases, stack)
    for ref, is_adapter in zip(refs, adapters, strict=True):
        if not is_adapter:
            what = "is a whole model, and its delta is the difference from the model that it was fine-tuned from"
            problems.add("NO_BASE", ref, what, "pass that model as base=...")
    problems.raise_as(AuditError)
    return _without_base([str(r) for r in refs], [folder for (folder,) in folders], stack, unpickle)


def _on_base(
    found: Sequence[tuple[ModelRef, Sequence[Path], bool]], named: ModelRef, bases: _Bases, stack: ExitStack
) -> Opened:
    """Sources (reference, folders, whether they are adapters) on their base."""
    checkpoint, models, skipped, problems = bases.open(named), list[Model](), list[Skipped](), Problems()
    names = Names(checkpoint, str(named))
    for ref, folders, is_adapter in found:
        with problems.catching():
            if not is_adapter:
                models.append(Model(str(ref), names.of(bases.open(ref), str(ref))))
                continue
            own = names.of(bases.open(ref), str(ref.base)) if ref.lora else checkpoint
            parts = [stack.enter_context(Adapter.open(folder, own, unpickle=bases.unpickle)) for folder in folders]
            adapter = AdapterStack.of(parts)
            if isinstance(own, ShapesOnly):
                skipped += _drop_what_needs_weights(str(ref), adapter)
            models.append(Model(str(ref), own, adapter))
    problems.raise_as(AuditError)
    return _of_models(models, Model(str(named), checkpoint), str(named), skipped)


def _folder(path: str, revision: str | None, *, unpickle: bool) -> Path:
    """The folder of a source; of a whole model at a URL without its weights, which `_Bases` reads by ranges."""
    found = resolve(path, revision, unpickle=unpickle)
    return found.folder if found.store and not (found.folder / CONFIG).is_file() else download([found])[0]


class _Bases:
    """The base checkpoints, each opened once; only their headers where they are on the Hub and headers are enough."""

    def __init__(self, stack: ExitStack, adapters: Sequence[Path] | None, unpickle: bool) -> None:
        """`adapters`: the folders of all sources when all are adapters; None to fetch missing weights."""
        self.unpickle = unpickle
        self._stack, self._adapters, self._opened = stack, adapters, dict[Path, Checkpoint]()

    def open(self, ref: ModelRef) -> Checkpoint:
        found = resolve(ref.path, ref.revision, unpickle=self.unpickle)
        key = found.folder.resolve()
        if key not in self._opened:
            far = self._adapters is not None and not any(file.name.endswith(".bin") for file in found.missing)
            self._opened[key] = self._headers(found) if far and found.missing else self._whole(found)
        return self._opened[key]

    def _whole(self, found: ResolvedRepo) -> Checkpoint:
        if found.store is not None and not any(file.name.endswith(".bin") for file in found.missing):
            far = self._stack.enter_context(Remote.open([found])).files(found)
            with named_by_url(found):
                return dequantized(self._stack.enter_context(Checkpoint.open(found.folder, far=far)))
        opened = self._stack.enter_context(Checkpoint.open(download([found])[0], unpickle=self.unpickle))
        return dequantized(opened)

    def _headers(self, found: ResolvedRepo) -> Checkpoint:
        with Remote.open([found]) as remote, Checkpoint.open(found.folder, far=remote.files(found)) as checkpoint:
            held = [
                (
                    known_of(f, unpickle=self.unpickle),
                    self._stack.enter_context(open_weights(f, unpickle=self.unpickle)),
                )
                for f in self._adapters or ()
            ]
            return ShapesOnly(held, dequantized(checkpoint))


def _without_base(refs: Sequence[str], folders: Sequence[Path], stack: ExitStack, unpickle: bool) -> Opened:
    """Adapters on a base whose names and shapes come from their own files."""
    known, shapes, problems = list[tuple[Known, Checkpoint]](), dict[str, tuple[int, ...]](), Problems()
    for ref, folder in zip(refs, folders, strict=True):
        with problems.catching():
            one = _known(ref, folder, unpickle)
            known.append((one, stack.enter_context(open_weights(folder, unpickle=unpickle))))
            for name, shape in one.shapes.items():
                if shapes.setdefault(name, shape) != shape:
                    what = f"{name} is {shape}, and {shapes[name]} in another adapter"
                    problems.add("ADAPTER_SHAPE", ref, what, "audit adapters of one base together")
    problems.raise_as(AuditError)
    base, models, skipped = ShapesOnly(known), list[Model](), list[Skipped]()
    for ref, folder in zip(refs, folders, strict=True):
        with problems.catching():
            adapter = stack.enter_context(Adapter.open(folder, base, unpickle=unpickle))
            skipped += _drop_what_needs_weights(ref, adapter)
            models.append(Model(ref, base, adapter))
    problems.raise_as(AuditError)
    opened = _of_models(models, Model("", base), None, skipped)
    what, fix = "carries its own copy of {}, which is taken to be the base's", "pass base=... to be sure"
    copies = [
        Problem("NO_BASE", ref, what.format(name), fix)
        for ref, (one, _) in zip(refs, known, strict=True)
        for name in one.copies
    ]
    return replace(opened, warnings=(*opened.warnings, *copies))


def _known(ref: str, folder: Path, unpickle: bool) -> Known:
    settings = read_settings(folder)
    if settings.peft_type not in ("LORA", "SHIRA"):
        what = f"is of type {settings.peft_type}, whose deltas need the base's architecture or weights"
        raise AuditError.of("NO_BASE", ref, what, "pass base=...")
    if settings.names("target_parameters"):
        what = "targets fused parameters, which need the base's architecture"
        raise AuditError.of("NO_BASE", ref, what, "pass base=...")
    listed = settings.raw.get("trainable_token_indices") or []
    rows = [i for one in (listed.values() if isinstance(listed, dict) else [listed]) for i in one]
    return known_of(folder, rows, settings.rank, unpickle=unpickle)


def _drop_what_needs_weights(ref: str, adapter: Adapter) -> list[Skipped]:
    """Remove the deltas that depend on the base's weights from `adapter`, and return them."""
    dropped = [(name, delta) for name, delta in adapter.deltas.items() if _needs_weights(delta)]
    for name, _ in dropped:
        del adapter.deltas[name]
    return [_unknown(ref, name, delta) for name, delta in dropped]


def _unknown(ref: str, name: str, delta: AdapterDelta) -> Skipped:
    return Skipped(ref, (name,), f"{_WHY[delta.kind]}, so its delta is unknown without the base's weights")


def _needs_weights(delta: AdapterDelta) -> bool:
    return delta.needs_weight or delta.kind in ("pissa", "olora")


_WHY = {
    "dora": "DoRA scales the whole weight",
    "replace": "modules_to_save holds the whole new value",
    "tokens": "trainable_token_indices holds whole new rows",
    "pissa": "PiSSA subtracted its start from the weight",
    "olora": "OLoRA subtracted its start from the weight",
    "untied": "it is a tied weight that must be untied",
}


def _of_models(models: Sequence[Model], base: Model, named: str | None, skipped: Sequence[Skipped]) -> Opened:
    """Every tensor in which some model differs from the base."""
    stored = base.checkpoint.tensors
    unties = {n: tied for m in models if m.adapter for n, tied in m.adapter.unties.items() if n not in stored}
    extra = [
        Skipped(m.ref, names, "the base has no such tensor")
        for m in models
        if (names := tuple(n for n in m.checkpoint.tensors if n not in stored))
    ]
    changed = (_difference(name, unties.get(name), models, base) for name in [*stored, *unties])
    subjects, left_out = _gathered([*skipped, *changed, *extra])
    headers = tuple(_header(m, label) for m, label in zip(models, labels_of([m.ref for m in models]), strict=True))
    warnings = [w for m in models for w in (*m.checkpoint.warnings, *(m.adapter.warnings if m.adapter else ()))]
    if named is None:
        warnings = [w for w in warnings if w.code != "ADAPTER_BASE"]
    weights = not isinstance(base.checkpoint, ShapesOnly)
    warnings += [_only_headers(named)] if named is not None and not weights else []
    return Opened(headers, named, weights, subjects, left_out, tuple(dict.fromkeys(warnings)))


def _difference(name: str, tied: str | None, models: Sequence[Model], base: Model) -> AuditedTensor | Skipped | None:
    """The tensor `name` in all models; None where none changes it.

    Args:
        name: a tensor of the base, or one that an adapter unties.
        tied: the base's tensor that `name` is tied to.
        models: the sources.
        base: the model that they change.
    """
    below = base.read(tied or name)
    reads = [_read(m, name, tied) for m in models]
    present = [r for r in reads if r is not None]
    changed = [r for r in present if r.delta or not r.same_weight(below)]
    if not changed:
        return None
    why = _unfit(below, reads, changed)
    return Skipped(changed[0].source, (name,), why) if why else AuditedTensor.of(name, below, present)


def _only_headers(base: str) -> Problem:
    what = "is not on this machine, and only its headers were read; metrics that need its weights are left out"
    return Problem("HEADERS_ONLY", base, what, "pass fetch_base=True to measure the rest")


def _read(model: Model, name: str, tied: str | None) -> Read | None:
    wanted = name if tied is None or model.has(name) else tied
    return model.read(wanted) if model.has(wanted) else None


def _unfit(below: Read, reads: Sequence[Read | None], changed: Sequence[Read]) -> str:
    """Why a tensor has no delta; empty when it has one."""
    if any(r is None for r in reads):
        return "not every source has it"
    if not all(DTYPES[r.dtype].mergeable for r in [below, *changed]):
        return f"its values are {below.dtype}, which cannot be subtracted"
    if len({r.shape for r in changed}) > 1 or any(not r.delta and r.shape != below.shape for r in changed):
        return f"its shapes differ: {', '.join(str(list(s)) for s in {below.shape, *(r.shape for r in changed)})}"
    return ""


# --- from a recipe ----------------------------------------------------------------------------------------------------


def _plan_of(source: Source, stack: ExitStack, fetch_base: bool, lazy_unpickle: bool) -> MergePlan:
    """The plan of a recipe; bases on the Hub are opened by their headers where all their deltas come from adapters."""
    inline = not isinstance(source, str) or "\n" in source or has_scheme(source)
    recipe = source if inline else Path(str(source))
    with ExitStack() as attempt:
        planned = attempt.enter_context(
            api.open_plan(recipe, stream_from_hub=not fetch_base, lazy_unpickle=lazy_unpickle)
        )
        if all(_only_adapters(tensor.inputs) for tensor in planned.tensors):
            stack.push(attempt.pop_all())
            return planned
    return stack.enter_context(api.open_plan(recipe, lazy_unpickle=lazy_unpickle))


def _only_adapters(inputs: Inputs) -> bool:
    """Whether the deltas of a tensor are known without its base, or its base is on this machine."""
    base = inputs.base
    if base is None or not any(read.checkpoint.far for read in inputs.reads):
        return True
    return all(read.same_weight(base) for read in inputs.sources)


def _of_plan(planned: MergePlan) -> Opened:
    """Every tensor that a recipe merges from deltas, with its rule."""
    base = planned.recipe.slices[0].base
    if base is None:
        what = f"{planned.recipe.merge_method} here has no base, so there are no deltas to audit"
        raise AuditError.of("NO_BASE", "", what, "give the recipe a base_model")
    unread = dict[Checkpoint, Checkpoint]()
    subjects, skipped = _gathered(_planned(tensor, planned.recipe.merge_method, unread) for tensor in planned.tensors)
    by_ref = {m.ref: m for m in planned.models}
    refs = list(dict.fromkeys(r.source for s in subjects for r in s.inputs.sources))
    headers = tuple(_header(by_ref[ref], label) for ref, label in zip(refs, labels_of(refs), strict=True))
    warnings = (*planned.warnings, *([_only_headers(str(base))] if unread else []))
    return Opened(headers, str(base), not unread, subjects, skipped, warnings, planned.recipe)


def _planned(
    tensor: PlannedTensor, method: str, unread: dict[Checkpoint, Checkpoint]
) -> AuditedTensor | Skipped | None:
    """A tensor of a plan; None where it is copied or no source changes it.

    Args:
        tensor: from the plan.
        method: the recipe's, for messages.
        unread: for each base on the Hub the checkpoint without weights in its place; filled as they are met.
    """
    base, sources = tensor.inputs.base, tensor.inputs.sources
    if tensor.method == COPY or not sources:
        return None
    if base is None or not tensor.inputs.deltas:
        return Skipped("", (tensor.name,), f"{method} merges whole values there, not deltas")
    if base.checkpoint.far:
        for read in tensor.inputs.reads:
            if read.delta and _needs_weights(read.delta):
                return _unknown(read.source, tensor.name, read.delta)
        base, sources = _unread(base, unread), tuple(_unread(read, unread) for read in sources)
    found = AuditedTensor.of(tensor.name, base, sources, None if tensor.rule.wants == "whole" else tensor.rule)
    return found if found.inputs.active else None


def _unread(read: Read, unread: dict[Checkpoint, Checkpoint]) -> Read:
    """The same read with zeros for the base's weights."""
    return replace(read, checkpoint=unread.setdefault(read.checkpoint, ShapesOnly((), read.checkpoint)))


# --- headers ----------------------------------------------------------------------------------------------------------


def _header(model: Model, label: str) -> Header:
    if model.adapter is None:
        kinds = {info.dtype for info in model.checkpoint.tensors.values()}
        return Header(model.ref, label, "checkpoint", {"dtype": "/".join(sorted(kinds))})
    config = model.adapter.config
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") not in ("LORA", "SHIRA"):
        rank = alpha = None
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank and alpha else None
    details = {
        "rank": rank, "alpha": alpha, "scale": scale, "target_modules": config.get("target_modules"),
        "peft_version": config.get("peft_version"), "base": config.get("base_model_name_or_path"),
        "header_digest": next((str(p["header"]) for p in model.adapter.fingerprint().values()), None),
        "trained": _trained(model.adapter.record),
    }  # fmt: skip
    return Header(model.ref, label, _kind(config), details)


def _kind(config: Mapping[str, Any]) -> str:
    """The kind of an adapter as `Header.kind` names it."""
    start = str(config.get("init_lora_weights", True)).lower()
    if start in ("pissa", "olora"):
        return start
    if (kind := str(config.get("peft_type", "LORA"))) != "LORA":
        return kind.lower()
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"


def _trained(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of `paft train` in short; None for an adapter of another trainer."""
    if not record:
        return None
    l1, delta = record.get("spec", {}).get("l1"), record["delta"]
    trained = {"objective": record.get("objective"), "norm": delta["norm"], "sparsity": delta.get("below_epsilon")}
    if not l1:
        return {**trained, "l1": None}
    strength = record.get("run", {}).get("l1_strength")
    return {**trained, "l1": {"mode": l1.get("mode"), "target": l1.get("target"), "strength": strength}}
