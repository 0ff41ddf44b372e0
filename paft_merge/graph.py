"""Several recipes in one file, run as one: a model that a recipe names is merged while it is read, and never written.

A document with a `name:` may be a source of the others. To them it is a checkpoint whose tensors are computed: block by
block, in float32, without a rounding in between. What its method has to know of a whole tensor is measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import xxhash

from paft_merge.blocks import Block, CpuOps, sample_end
from paft_merge.bridge import WholeTensor
from paft_merge.casting import cast, stored_bytes
from paft_merge.checkpoint import DTYPES, Checkpoint, CheckpointFile, TensorInfo
from paft_merge.errors import Problem, Problems, RecipeError
from paft_merge.headers import ByteBuffer, as_bytes
from paft_merge.methods import METHODS, Method
from paft_merge.plan import COPY, MergePlan, PlannedTensor
from paft_merge.reading import RAW
from paft_merge.recipe import Located, Recipe, did_you_mean, dump_yaml, load_documents, load_recipe
from paft_merge.rules import Combine, Consensus, Walk
from paft_merge.scratch import SCRATCH

T = TypeVar("T")


# --- the documents of a file ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Documents:
    """The recipes of one file and which of them are made from which."""

    recipes: tuple[Recipe, ...]

    @cached_property
    def named(self) -> dict[str, Recipe]:
        """The recipes that others may use."""
        return {recipe.name: recipe for recipe in self.recipes if recipe.name} if len(self.recipes) > 1 else {}

    def used_by(self, recipe: Recipe) -> list[str]:
        """The other documents that a recipe merges."""
        return [name for name in dict.fromkeys(ref.path for ref in recipe.references) if name in self.named]

    @property
    def finals(self) -> list[Recipe]:
        """What is written: the recipe without a name, else every one that no other uses."""
        used = {name for recipe in self.recipes for name in self.used_by(recipe)}
        unnamed = [recipe for recipe in self.recipes if not recipe.name]
        return unnamed or [recipe for recipe in self.recipes if recipe.name not in used]

    def unused(self, finals: Sequence[Recipe]) -> list[Problem]:
        """A warning for every document that no result is made of."""
        needed = {one.name for final in finals for one in self.beneath(final)}
        left = [recipe for recipe in self.recipes if recipe.name not in needed]
        fix = "write it with --output-name, or remove it"
        return [
            Problem("UNUSED", str(r.located.spot(("name",))), f"nothing is made of {r.name}, so it is not merged", fix)
            for r in left
        ]

    def only(self, name: str | None) -> Recipe:
        """The recipe to write: the one called `name`, or the only one of `finals`.

        Raises:
            RecipeError: there is none of that name, or several that no other uses.
        """
        names = [recipe.name for recipe in self.recipes if recipe.name]
        if name is None:
            if len(self.finals) > 1:
                what = f"the file has several results: {', '.join(r.name or '' for r in self.finals)}"
                raise RecipeError.of("DOCUMENTS", "", what, "choose one with --output-name")
            return self._with_text(self.finals[0])
        found = next((recipe for recipe in self.recipes if recipe.name == name), None)
        if found is None:
            fix = did_you_mean(name, names) or f"the file names {', '.join(names) or 'none'}"
            raise RecipeError.of("DOCUMENTS", name, "is no document of this file", fix)
        return self._with_text(found)

    def _with_text(self, recipe: Recipe) -> Recipe:
        """The recipe with the text of all documents that it is made of, for those who read how it was made."""
        made_of = self.beneath(recipe)
        if len(made_of) == 1:
            return recipe
        text = "---\n".join(dump_yaml(one.resolved()) for one in made_of)
        return replace(recipe, located=replace(recipe.located, text=text))

    def beneath(self, recipe: Recipe) -> list[Recipe]:
        """The documents that a recipe is made of, each after those that it is made of itself, and the recipe last."""
        found: dict[str, Recipe] = {}
        for name in self.used_by(recipe):
            found |= {one.name or "": one for one in self.beneath(self.named[name])}
        return [*found.values(), recipe]


def load_recipes(
    source: Path | str | Mapping[str, Any] | Located | Recipe, *, strict: bool = False,
    methods: Mapping[str, Method] = METHODS,
) -> Documents:  # fmt: skip
    """Read every document of a file.

    Args:
        source, strict, methods: as for `load_recipe`.

    Raises:
        RecipeError: faults of all documents; two without a name or with the same; documents that need each other.
    """
    if isinstance(source, Recipe):
        return Documents((source,))
    if not isinstance(source, Path | str):
        return Documents((load_recipe(source, strict=strict, methods=methods),))
    located, problems, recipes = load_documents(source), Problems(), list[Recipe]()
    if len(located) == 1:
        return Documents((load_recipe(source, strict=strict, methods=methods),))
    for document in located:
        with problems.catching():
            recipes.append(load_recipe(document, strict=strict, methods=methods))
    _check_names(located, problems)
    documents = Documents(tuple(recipes))
    if not problems.found:
        _check_circles(documents, problems)
        _check_uses(documents, problems)
    problems.raise_as(RecipeError)
    return documents


def _check_names(located: Sequence[Located], problems: Problems) -> None:
    """At most one document without a name, and no name twice."""
    seen: dict[str, Located] = {}
    for document in located:
        name = document.data.get("name") if isinstance(document.data, Mapping) else None
        where = document.spot(("name",) if name else ())
        if not isinstance(name, str | None):
            continue
        if name in seen or (not name and "" in seen):
            first = seen[name or ""].spot(("name",) if name else ())
            what = (
                f"the name {name} is already on line {first.line}"
                if name
                else f"a second document without a name; the first is on line {first.line}"
            )
            problems.add("DOCUMENTS", where, what, "give every document but the result a name of its own")
        seen.setdefault(name or "", document)
        if name and ("/" in name or "@" in name or "+" in name or name in (".", "..")):
            problems.add("DOCUMENTS", where, f"{name!r} cannot be the name of a document", "use a plain word")


def _check_circles(documents: Documents, problems: Problems) -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            circle = " -> ".join((*way[way.index(name) :], name))
            where = documents.named[name].located.spot(("name",))
            problems.add("DOCUMENTS", where, f"needs itself: {circle}", "a document can use only what does not use it")
        elif name not in done:
            for other in documents.used_by(documents.named[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in documents.named:
        visit(name, ())


def _check_uses(documents: Documents, problems: Problems) -> None:
    """Names that are no document's, by their look."""
    for recipe in documents.recipes:
        for ref in recipe.references:
            if ref.path not in documents.named and "/" not in ref.path and not Path(ref.path).expanduser().exists():
                near = did_you_mean(ref.path, documents.named)
                if near:
                    where = recipe.located.spot()
                    problems.add("DOCUMENTS", where, f"{ref.path} is no document of this file and no folder here", near)
            if ref.path in documents.named and ref.revision:
                what = f"{ref.path} is a document of this file, which has no revision {ref.revision}"
                problems.add("DOCUMENTS", recipe.located.spot(), what, f"write {ref.path}")


# --- a model that is merged while it is read --------------------------------------------------------------------------


class Intermediate(Checkpoint):
    """The result of a plan as a checkpoint whose tensors are computed when they are read.

    Attributes:
        name: what the recipe calls it.
        plan: how it is made.
    """

    computed = True

    def __init__(self, name: str, plan: MergePlan, *, rounded: bool) -> None:
        """`rounded`: values have the type the document would be written in, as if it had been; else they are float32."""
        super().__init__(plan.donor.checkpoint.folder, (), {**plan.donor.checkpoint.config, **plan.config}, {})
        self.name, self.plan = name, plan
        self.tokenizer_files = plan.vocabulary.files if plan.vocabulary else plan.donor.checkpoint.tokenizer_files
        self._planned = {tensor.name: tensor for tensor in plan.tensors}
        self.files = tuple(CheckpointFile(shard.file, shard.size, 0, {}, "") for shard in plan.shards)
        self.tensors = {
            slot.name: self._info(slot.name, shard.file, rounded) for shard in plan.shards for slot in shard.slots
        }
        self._ready: dict[str, _Ready] = {}
        self._locks = {name: Lock() for name in self.tensors}
        self._fixing, self._fixed = Lock(), dict[str, PlannedTensor]()

    def _info(self, name: str, file: str, rounded: bool) -> TensorInfo:
        planned = self._planned[name]
        dtype = planned.dtype if rounded or planned.method == COPY or planned.dtype == "F64" else "F32"
        return TensorInfo(name, dtype, planned.shape, file, 0, planned.numel * DTYPES[dtype].bits // 8)

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        """Compute what `Checkpoint.read_into` would read; whole blocks, of which the wanted part is kept.

        Raises:
            PaftMergeError: as the merge of the document would.
        """
        planned, view = self._planned[name], as_bytes(buffer)
        if planned.method == COPY:
            read = planned.inputs.reads[0]
            read.checkpoint.read_into(read.name, start, view)
            return
        ready, width = self._prepared(name), DTYPES[self.tensors[name].dtype].bits // 8
        stop = start + len(view)
        for first, last in ready.bounds:
            a, b = max(first * width, start), min(last * width, stop)
            if a < b:
                with SCRATCH.nested():
                    made = ready.compute(first, last, self.tensors[name].dtype)
                    view[a - start : b - start] = as_bytes(made)[a - first * width : b - first * width]

    def _prepared(self, name: str) -> _Ready:
        """The tensor with all that is to be known before its blocks are computed; measured by the first who asks."""
        with self._locks[name]:
            if name not in self._ready:
                planned = self._with_thresholds(self._planned[name])
                with SCRATCH.nested():
                    self._ready[name] = _Ready.of(planned)
            return self._ready[name]

    def _with_thresholds(self, planned: PlannedTensor) -> PlannedTensor:
        """With `trim_scope: global`, the thresholds over all tensors of the document."""
        if not isinstance(planned.rule, Consensus) or planned.rule.trim_scope != "global":
            return planned
        with self._fixing, SCRATCH.nested():
            if not self._fixed:
                ranked = [
                    t for t in self.plan.tensors if isinstance(t.rule, Consensus) and t.rule.trim_scope == "global"
                ]
                found = planned.rule.over_the_model(sum(t.numel for t in ranked), _Blocks(ranked, every=True), CpuOps())
                for one in ranked:
                    assert isinstance(one.rule, Consensus)
                    self._fixed[one.name] = replace(one, rule=replace(one.rule, fixed=found.fixed))
        return self._fixed[planned.name]

    def hint_soon(self, name: str) -> None:
        """Pass the hint on to what the tensor is made of."""
        for read in self._planned[name].inputs.reads:
            read.checkpoint.hint_soon(read.name)

    def close(self) -> None:
        """Close every file that it is made of."""
        self._ready.clear()
        self.plan.close()

    def check_unchanged(self) -> None:
        """See `MergePlan.check_inputs_unchanged`."""
        self.plan.check_inputs_unchanged()

    def fingerprint(self) -> dict[str, Any]:
        """The document, and the fingerprints of all that it is made of."""
        files = {model.ref: model.checkpoint.fingerprint() for model in self.plan.models}
        adapters = {model.ref: model.adapter.fingerprint() for model in self.plan.models if model.adapter}
        vocabulary = {"vocabulary": self.plan.vocabulary.digest()} if self.plan.vocabulary else {}
        return {"recipe": self.plan.recipe.resolved(), "inputs": files, "adapters": adapters, **vocabulary}

    def sample(self) -> str:
        """XXH3-128 of the samples of all that it is made of."""
        return xxhash.xxh3_128_hexdigest("".join(model.checkpoint.sample() for model in self.plan.models).encode())

    @property
    def place(self) -> tuple[str, int]:
        return self.name, id(self.plan)

    @property
    def folders(self) -> list[Path]:
        own = [folder for model in self.plan.models for folder in model.checkpoint.folders]
        return own + [model.adapter.folder for model in self.plan.models if model.adapter]

    def written_dtype(self, name: str) -> str:
        return self._planned[name].dtype

    def bytes_behind(self, name: str) -> int:
        return sum(read.checkpoint.bytes_behind(read.name) for read in self._planned[name].inputs.reads)

    def working_bytes(self, name: str) -> int:
        return self._planned[name].block_bytes

    def release(self, name: str) -> None:
        with self._locks[name]:
            self._ready.pop(name, None)
            self._planned[name].release()


@dataclass(frozen=True)
class _Ready:
    """One tensor, measured: its blocks can be computed from any thread."""

    tensor: PlannedTensor
    combine: Combine | None
    whole: Any = None
    """The merged tensor, where the method cannot do with less."""

    @classmethod
    def of(cls, tensor: PlannedTensor) -> _Ready:
        if isinstance(tensor.rule, WholeTensor):
            base, sources = tensor.inputs.whole(baked=tensor.rule.baked)
            return cls(tensor, None, tensor.rule.merge(base, sources, tensor.name).reshape(-1))
        walk = Walk(tensor.numel, _Blocks([tensor]), CpuOps(), tensor.inputs.active, tensor.shape)
        return cls(tensor, tensor.rule.prepare(walk, tensor.inputs.deltas))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return self.tensor.bounds

    def compute(self, start: int, stop: int, dtype: str) -> Any:
        """Elements `[start, stop)`, one of `bounds`, as bytes of `dtype`; valid until this thread's next block."""
        key = self.tensor.rounding_key if dtype == self.tensor.dtype else 0
        if self.combine is None:
            return stored_bytes(self.whole[start:stop], dtype, key, start)
        block = self.tensor.inputs.block(start, stop)
        out = SCRATCH.array("out", stop - start, RAW.get(dtype, np.uint32))
        self.combine(block, out, key)
        return out if dtype in RAW else cast(out.view(np.float32), dtype, key, start)


@dataclass(frozen=True)
class _Blocks:
    """Walks the blocks of tensors one after the other, in this thread (see `blocks.Each`)."""

    tensors: Sequence[PlannedTensor]
    every: bool = False
    """One row a source in each block, zeros for those that have no delta."""

    @property
    def tiles(self) -> int:
        return sum(len(tensor.bounds) for tensor in self.tensors)

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        found = []
        for tensor in self.tensors:
            bounds = tensor.bounds if tiles is None else [tensor.bounds[i] for i in tiles]
            for start, stop in bounds:
                end = sample_end(start, stop, tensor.row) if sample else stop
                found.append(work(tensor.inputs.block(start, end, all_sources=self.every)))
        return found
