"""What is audited, opened: the sources, the base if there is one, and every tensor that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from paft_merge.auditing.header_only_base import Known, ShapesOnly, known_of, natural, weights_of
from paft_merge.compute.blocks import Block, tile_bounds
from paft_merge.engine import api
from paft_merge.errors import AuditError, Problem, Problems
from paft_merge.hub import HF, Remote, ResolvedRepo, download, fetch, resolve
from paft_merge.inputs.adapters import Adapter, AdapterDelta
from paft_merge.inputs.adapters.peft_types import read_settings
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.tensor_inputs import Inputs, Read
from paft_merge.methods.rules.rule import Rule
from paft_merge.plan import COPY, MergePlan, Model
from paft_merge.recipe import ModelRef, Recipe

Source = Path | str | Mapping[str, Any] | Recipe

_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


@dataclass(frozen=True)
class AuditedTensor:
    """One tensor to audit."""

    name: str
    inputs: Inputs
    rule: Rule | None = None
    """The rule of a recipe for this tensor."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return max((r.shape for r in self.inputs.reads), key=math.prod)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def row(self) -> int:
        """Elements of a row, of which blocks hold whole ones."""
        return self.inputs.row(self.shape, self.rule.row(self.shape) if self.rule else 1)

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        return tile_bounds(self.numel, self.row)

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Read elements `[start, stop)`; see `Inputs.block`."""
        return self.inputs.block(start, stop, all_sources=all_sources)

    def release(self) -> None:
        """Let go of the adapters' factors, which are read when they are first needed."""
        self.inputs.release()


@dataclass(frozen=True)
class Header:
    """What a source is, from its own files."""

    source: str
    label: str
    """Short and unique among the sources of an audit."""
    kind: str
    """`lora`, `rslora`, `dora`, `pissa`, `olora`, `shira`, or `checkpoint`."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Of an adapter: rank, alpha, scale, dtype of the factors, PEFT version, the base it names, digest of its header."""


@dataclass(frozen=True)
class Skipped:
    """Something that was not audited, and why."""

    source: str
    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Opened:
    """The open inputs of an audit."""

    headers: tuple[Header, ...]
    base: str | None
    """None when only what adapters' own files tell is known."""
    weights: bool
    """The base's weights can be read; else nothing that needs them is measured."""
    subjects: tuple[AuditedTensor, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[Problem, ...]
    recipe: Recipe | None = None


@contextmanager
def open_sources(sources: Sequence[Source], base: Path | str | None, *, fetch_base: bool = False) -> Iterator[Opened]:
    """Open what is to be audited.

    Args:
        sources: adapters, checkpoints, `base+adapter` references, or one recipe (a file, text with a newline, a mapping).
        base: what they change; not with a recipe, which names it.
        fetch_base: fetch the weights of a base that is on the Hub only. Without it headers are all that is read of the base of
            adapters; that of whole models is fetched in any case, as their deltas are the difference from it.

    Raises:
        AuditError: NO_BASE, EMPTY (there is nothing to audit), RECIPE.
        PaftMergeError: what opening them shows to be wrong.
    """
    recipes = [s for s in sources if _is_recipe(s)]
    if recipes:
        if len(sources) > 1 or base is not None:
            raise AuditError.of("RECIPE", "", "a recipe names its sources and its base itself", "give the recipe alone")
        inline = not isinstance(recipes[0], str) or "\n" in recipes[0] or recipes[0].startswith(HF)
        recipe = recipes[0] if inline else Path(str(recipes[0]))
        with ExitStack() as stack:
            planned = stack.enter_context(api.open_plan(recipe, stream_from_hub=not fetch_base))
            if not all(_only_adapters(tensor.inputs) for tensor in planned.tensors):
                stack.close()
                planned = stack.enter_context(api.open_plan(recipe))
            yield _not_empty(_of_plan(planned))
        return
    with ExitStack() as stack:
        yield _not_empty(_of_references([_reference(s) for s in sources], base, stack, fetch_base))


def layer_of(name: str) -> int | None:
    """The layer of a tensor: the first numbered segment of its name; None outside of layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def module_of(name: str) -> str:
    """The kind of module of a tensor: the last word of its name, without `weight`; the same in every layer and expert."""
    parts = [p for p in name.removesuffix(".weight").split(".") if not p.isdigit()]
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def _is_recipe(source: Source) -> bool:
    if isinstance(source, (Recipe, Mapping)):
        return True
    return "\n" in str(source) or str(source).startswith(HF) or str(source).endswith((".yaml", ".yml"))


def _reference(source: Source) -> ModelRef:
    assert isinstance(source, (str, Path))
    return ModelRef(str(source)) if Path(source).exists() else ModelRef.parse(str(source))


def _not_empty(opened: Opened) -> Opened:
    if not opened.subjects:
        why = "; ".join(dict.fromkeys(s.why for s in opened.skipped)) or "no tensor differs from the base"
        where = ", ".join(h.source for h in opened.headers)
        raise AuditError.of(
            "EMPTY", where, f"there is nothing to audit: {why}", "pass --base" if opened.base is None else ""
        )
    return opened


# --- from references --------------------------------------------------------------------------------------------------


def _of_references(refs: Sequence[ModelRef], base: Path | str | None, stack: ExitStack, fetch_base: bool) -> Opened:
    folders, problems = list[Path](), Problems()
    for ref in {r for r in refs if refs.count(r) > 1}:
        problems.add("TWICE", ref, "is given twice", "give each source once")
    for ref in refs:
        with problems.catching():
            folders.append(fetch(ref.lora, ref.lora_revision) if ref.lora else fetch(ref.path, ref.revision))
    problems.raise_as(AuditError)
    adapters = [
        bool(ref.lora) or (folder / "adapter_config.json").is_file() for ref, folder in zip(refs, folders, strict=True)
    ]
    named = base if base is not None else next((str(ref.base) for ref in refs if ref.lora), None)
    if named is None:
        for ref, is_adapter in zip(refs, adapters, strict=True):
            if not is_adapter:
                what = "is a whole model, and its delta is the difference from what it was fine-tuned from"
                problems.add("NO_BASE", ref, what, "pass that model as --base")
        problems.raise_as(AuditError)
        return _without_base([str(r) for r in refs], folders, stack)
    model = ModelRef.parse(str(named)) if not Path(named).exists() else ModelRef(str(named))
    bases = _Bases(stack, folders if all(adapters) and not fetch_base else None)
    checkpoint, models, skipped = bases.open(model), list[Model](), list[Skipped]()
    for ref, folder, is_adapter in zip(refs, folders, adapters, strict=True):
        with problems.catching():
            own = bases.open(ref) if ref.lora else checkpoint
            opened = _open_model(ref, folder, is_adapter, own, stack)
            if opened.adapter and isinstance(own, ShapesOnly):
                skipped += _drop_what_needs_weights(str(ref), opened.adapter, "--fetch-base")
            models.append(opened)
    problems.raise_as(AuditError)
    return _of_models(models, Model(str(named), checkpoint), str(named), skipped)


def _open_model(ref: ModelRef, folder: Path, is_adapter: bool, base: Checkpoint, stack: ExitStack) -> Model:
    if not is_adapter:
        return Model(str(ref), stack.enter_context(Checkpoint.open(folder)))
    return Model(str(ref), base, stack.enter_context(Adapter.open(folder, base)))


class _Bases:
    """The checkpoints beneath, each opened once; of those on the Hub only the headers where that is enough."""

    def __init__(self, stack: ExitStack, adapters: Sequence[Path] | None) -> None:
        """`adapters`: their folders, when there is nothing else to audit; None to fetch what is missing."""
        self._stack, self._adapters, self._opened = stack, adapters, dict[Path, Checkpoint]()

    def open(self, ref: ModelRef) -> Checkpoint:
        found = resolve(ref.path, ref.revision)
        key = found.folder.resolve()
        if key not in self._opened:
            far = self._adapters is not None and not any(file.name.endswith(".bin") for file in found.missing)
            self._opened[key] = self._headers(found) if far and found.missing else self._whole(found)
        return self._opened[key]

    def _whole(self, found: ResolvedRepo) -> Checkpoint:
        return self._stack.enter_context(Checkpoint.open(download([found])[0]))

    def _headers(self, found: ResolvedRepo) -> Checkpoint:
        with Remote.open([found]) as remote, Checkpoint.open(found.folder, far=remote.files(found)) as checkpoint:
            held = [
                (known_of(f), self._stack.enter_context(Checkpoint.open(weights_of(f)))) for f in self._adapters or ()
            ]
            return ShapesOnly(held, checkpoint)


def _without_base(refs: Sequence[str], folders: Sequence[Path], stack: ExitStack) -> Opened:
    """Adapters by themselves, on a base of which only their own files tell."""
    known, shapes, problems = list[tuple[Known, Checkpoint]](), dict[str, tuple[int, ...]](), Problems()
    for ref, folder in zip(refs, folders, strict=True):
        with problems.catching():
            one = _known(ref, folder)
            known.append((one, stack.enter_context(Checkpoint.open(weights_of(folder)))))
            for name, shape in one.shapes.items():
                if shapes.setdefault(name, shape) != shape:
                    what = f"{name} is {shape}, and another adapter has {shapes[name]} there"
                    problems.add("ADAPTER_SHAPE", ref, what, "audit adapters of one base together")
    problems.raise_as(AuditError)
    base, models, skipped = ShapesOnly(known), list[Model](), list[Skipped]()
    for ref, folder in zip(refs, folders, strict=True):
        with problems.catching():
            adapter = stack.enter_context(Adapter.open(folder, base))
            skipped += _drop_what_needs_weights(ref, adapter, "--base")
            models.append(Model(ref, base, adapter))
    problems.raise_as(AuditError)
    opened = _of_models(models, Model("", base), None, skipped)
    copies = [
        Problem(
            "NO_BASE", ref, f"carries its own copy of {name}, which is taken to be the base's", "pass --base to be sure"
        )
        for ref, (one, _) in zip(refs, known, strict=True)
        for name in one.copies
    ]
    return replace(opened, warnings=(*opened.warnings, *copies))


def _known(ref: str, folder: Path) -> Known:
    settings = read_settings(folder)
    if settings.names("target_parameters"):
        what = "targets fused parameters, and which they are only the base's architecture tells"
        raise AuditError.of("NO_BASE", ref, what, "pass --base")
    listed = settings.raw.get("trainable_token_indices") or []
    rows = [i for one in (listed.values() if isinstance(listed, dict) else [listed]) for i in one]
    return known_of(folder, rows, settings.rank)


def _drop_what_needs_weights(ref: str, adapter: Adapter, option: str) -> list[Skipped]:
    """Remove the deltas that depend on the weights, with a warning."""
    groups: dict[str, list[str]] = {}
    for name, delta in list(adapter.deltas.items()):
        if _needs_weights(delta):
            del adapter.deltas[name]
            groups.setdefault(delta.kind, []).append(name)
    return [
        Skipped(ref, tuple(names), f"{_WHY[kind]}, and without {option} its delta is unknown")
        for kind, names in groups.items()
    ]


def _needs_weights(delta: AdapterDelta) -> bool:
    return delta.needs_weight or delta.kind in ("pissa", "olora")


_WHY = {
    "dora": "DoRA scales the whole weight",
    "replace": "modules_to_save holds the whole new value",
    "tokens": "trainable_token_indices holds whole new rows",
    "pissa": "PiSSA took its start out of the weight",
    "olora": "OLoRA took its start out of the weight",
    "untied": "it is a tied weight that must be parted",
}


def _of_models(models: Sequence[Model], base: Model, named: str | None, skipped: Sequence[Skipped]) -> Opened:
    """Every tensor that some model has otherwise than the base."""
    unties = {
        n: under
        for m in models
        if m.adapter
        for n, under in m.adapter.unties.items()
        if n not in base.checkpoint.tensors
    }
    subjects, left_out = list[AuditedTensor](), list(skipped)
    for name in [*base.checkpoint.tensors, *unties]:
        under = unties.get(name)
        reads = [_read(m, name, under) for m in models]
        beneath = base.read(under or name)
        present = [r for r in reads if r is not None]
        changed = [r for r in present if r.delta or not r.same_weight(beneath)]
        if not changed:
            continue
        why = _unfit(beneath, reads, changed)
        if why:
            left_out.append(Skipped(changed[0].source, (name,), why))
        else:
            subjects.append(AuditedTensor(name, Inputs(beneath, tuple(present), "deltas", subtract=False)))
    for m in models:
        extra = [n for n in m.checkpoint.tensors if n not in base.checkpoint.tensors]
        if extra:
            left_out.append(Skipped(m.ref, tuple(extra), "the base has no such tensor"))
    headers = tuple(_header(m, label) for m, label in zip(models, labels_of([m.ref for m in models]), strict=True))
    warnings = [
        w for m in models if m.adapter for w in m.adapter.warnings if named is not None or w.code != "ADAPTER_BASE"
    ]
    ordered = sorted(subjects, key=lambda s: natural(s.name))
    weights = not isinstance(base.checkpoint, ShapesOnly)
    warnings += [_only_headers(named)] if named is not None and not weights else []
    return Opened(headers, named, weights, tuple(ordered), tuple(left_out), tuple(warnings))


def _only_headers(base: str) -> Problem:
    what = "is on the Hub only, and its headers are all that was read; what needs its weights is left out"
    return Problem("HEADERS_ONLY", base, what, "pass --fetch-base to fetch them")


def _read(model: Model, name: str, under: str | None) -> Read | None:
    wanted = name if under is None or model.has(name) else under
    return model.read(wanted) if model.has(wanted) else None


def _unfit(beneath: Read, reads: Sequence[Read | None], changed: Sequence[Read]) -> str:
    """Why a tensor has no delta; empty when it has."""
    if any(r is None for r in reads):
        return "not every source has it"
    if not all(DTYPES[r.dtype].mergeable for r in [beneath, *changed]):
        return f"its values are {beneath.dtype}, from which there is no difference to take"
    if len({r.shape for r in changed}) > 1 or any(not r.delta and r.shape != beneath.shape for r in changed):
        return f"its shapes differ: {', '.join(str(list(s)) for s in {beneath.shape, *(r.shape for r in changed)})}"
    return ""


# --- from a recipe ----------------------------------------------------------------------------------------------------


def _only_adapters(inputs: Inputs) -> bool:
    """Whether what a tensor's sources add to their base is known without it, or its base is here."""
    base = inputs.base
    if base is None or not any(read.checkpoint.far for read in inputs.reads):
        return True
    return all(read.same_weight(base) for read in inputs.sources)


def _of_plan(planned: MergePlan) -> Opened:
    """What a recipe merges, tensor by tensor with its rule."""
    base_ref = planned.recipe.slices[0].base
    if base_ref is None:
        what = f"{planned.recipe.merge_method} here has no base, so there are no deltas to audit"
        raise AuditError.of("NO_BASE", "", what, "give the recipe a base_model")
    subjects, left_out, unread = list[AuditedTensor](), list[str](), dict[Checkpoint, Checkpoint]()
    skipped = list[Skipped]()
    for tensor in planned.tensors:
        if tensor.method == COPY or not tensor.inputs.sources:
            continue
        if tensor.inputs.base is None or not tensor.inputs.deltas:
            left_out.append(tensor.name)
            continue
        inputs = Inputs(tensor.inputs.base, tensor.inputs.sources, "deltas", subtract=False)
        if tensor.inputs.base.checkpoint.far:
            needing = [(r.source, r.delta.kind) for r in inputs.reads if r.delta and _needs_weights(r.delta)]
            if needing:
                source, kind = needing[0]
                why = f"{_WHY[kind]}, and without --fetch-base its delta is unknown"
                skipped.append(Skipped(source, (tensor.name,), why))
                continue
            inputs = _unread(inputs, unread)
        if inputs.active:
            rule = None if tensor.rule.wants == "whole" else tensor.rule
            subjects.append(AuditedTensor(tensor.name, inputs, rule))
    by_ref = {m.ref: m for m in planned.models}
    refs = list(dict.fromkeys(r.source for s in subjects for r in s.inputs.sources))
    why = f"{planned.recipe.merge_method} merges whole values there, not deltas"
    skipped += [Skipped("", tuple(left_out), why)] if left_out else []
    warnings = [*planned.warnings, *([_only_headers(str(base_ref))] if unread else [])]
    headers = tuple(_header(by_ref[ref], label) for ref, label in zip(refs, labels_of(refs), strict=True))
    ordered = tuple(sorted(subjects, key=lambda s: natural(s.name)))
    return Opened(headers, str(base_ref), not unread, ordered, tuple(skipped), tuple(warnings), planned.recipe)


def _unread(inputs: Inputs, unread: dict[Checkpoint, Checkpoint]) -> Inputs:
    """The same tensor with zeros for the base's weights; the base's substitutes are kept in `unread`."""

    def beneath(read: Read) -> Read:
        held = unread.setdefault(read.checkpoint, ShapesOnly((), read.checkpoint))
        return replace(read, checkpoint=held)

    assert inputs.base is not None
    return replace(inputs, base=beneath(inputs.base), sources=tuple(map(beneath, inputs.sources)))


# --- headers ----------------------------------------------------------------------------------------------------------


def labels_of(refs: Sequence[str]) -> list[str]:
    """The last part of each reference where that tells them apart, else the whole."""
    short = [ref.split("+")[-1].split("@")[0].rstrip("/").split("/")[-1] or ref for ref in refs]
    return [name if short.count(name) == 1 else ref for name, ref in zip(short, refs, strict=True)]


def _header(model: Model, label: str) -> Header:
    if model.adapter is None:
        kinds = {info.dtype for info in model.checkpoint.tensors.values()}
        return Header(model.ref, label, "checkpoint", {"dtype": "/".join(sorted(kinds))})
    config = model.adapter.config
    start = str(config.get("init_lora_weights", True)).lower()
    kind = (
        "shira"
        if config.get("peft_type") == "SHIRA"
        else "dora"
        if config.get("use_dora")
        else "rslora"
        if config.get("use_rslora")
        else "lora"
    )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank and alpha else None
    prints = model.adapter.fingerprint()
    details = {
        "rank": rank, "alpha": alpha, "scale": scale, "target_modules": config.get("target_modules"),
        "peft_version": config.get("peft_version"), "base": config.get("base_model_name_or_path"),
        "header_digest": next((str(p["header"]) for p in prints.values()), None),
        "trained": _trained(model.adapter.record),
    }  # fmt: skip
    return Header(model.ref, label, start if start in ("pissa", "olora") else kind, details)


def _trained(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `paft train` left beside an adapter, in short; None where another trainer made it."""
    if not record:
        return None
    l1, delta = record.get("spec", {}).get("l1"), record["delta"]
    trained = {"objective": record.get("objective"), "norm": delta["norm"], "sparsity": delta.get("below_epsilon")}
    if not l1:
        return {**trained, "l1": None}
    strength = record.get("run", {}).get("l1_strength")
    return {**trained, "l1": {"mode": l1.get("mode"), "target": l1.get("target"), "strength": strength}}
