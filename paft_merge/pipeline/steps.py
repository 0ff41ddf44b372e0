"""The steps of a run, each with the fingerprint of everything that its result depends on. Nothing is executed here.

train      an adapter (and, for `sequential`, the skill model that the next adapter is trained on)
audit      the adapters of a seed
merge      one model
verify     the merged model of a seed
evaluate   one metric of one arm, or the answers that an `agreement` compares with
export     the merged model, in one format
push       the merged model
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from paft_merge.compute.magnitudes import EPSILON
from paft_merge.errors import RecipeError
from paft_merge.evaluating import HARNESS
from paft_merge.evaluating.agreement import source_parts
from paft_merge.evaluating.data_rows import is_file
from paft_merge.evaluating.schema import Measurement
from paft_merge.exporting import Target
from paft_merge.hub import ResolvedRepo, resolve
from paft_merge.hub.run_checkpoints import expand
from paft_merge.pipeline.adapter_sections import files_of, mixed_section, placed, section_of
from paft_merge.pipeline.arms import (
    Arm,
    Variant,
    arms_wanted,
    chains,
    merge_before_polish,
    merged_together,
    merges_of,
    polished,
    variants_of,
    writes_adapter,
)
from paft_merge.pipeline.fingerprints import Prints, key_of
from paft_merge.pipeline.named_models import names_adapter, reference_to, references, resolved_merge
from paft_merge.pipeline.schema import STAGES, CompareSpec, PolishSpec, RunRecipe, SequentialSpec, Stage
from paft_merge.recipe import Located
from paft_merge.recipe.sections import beside_recipe, former_keys
from paft_merge.recipe.trust import file_of
from paft_merge.training.schema import AdapterSpec

SPARSITY = "sparsity"
"""The column that every arm but the base has."""


@dataclass(frozen=True)
class Train:
    """Train an adapter on a base."""

    adapter: str
    section: Mapping[str, Any]
    base: str
    folder: Path
    """The parent of the adapter's folder."""
    named: tuple[str, ...]
    """The adapters of the recipe whose sections it uses."""


@dataclass(frozen=True)
class Merge:
    """Merge one model."""

    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Audit:
    """Audit adapters together."""

    sources: tuple[str, ...]
    base: str
    names: tuple[str, ...]
    """What the recipe calls the sources."""


@dataclass(frozen=True)
class Evaluate:
    """Evaluate one metric (or all of lm-eval's tasks) of one arm."""

    arm: Arm
    metric: str
    answers: tuple[Path, ...] = ()
    """Of an `agreement`: the answers of its sources."""


@dataclass(frozen=True)
class Answer:
    """Answer the prompts of an `agreement` with one of its sources."""

    arm: Arm
    """The source; it is not an arm of the table."""
    metric: str


@dataclass(frozen=True)
class Verify:
    """Compare the merged model with what its recipe means."""

    folder: Path
    data: Path | None


@dataclass(frozen=True)
class Export:
    """Write a folder in the format of another program."""

    folder: Path
    to: Target


@dataclass(frozen=True)
class Push:
    """Push a folder to the Hub."""

    folder: Path


Job = Train | Merge | Audit | Verify | Evaluate | Answer | Export | Push


@dataclass(frozen=True)
class Step:
    """A unit of work, executed once."""

    name: str
    stage: Stage
    key: str
    """Fingerprint of everything that the result depends on."""
    job: Job
    out: Path | None
    needs: tuple[str, ...] = ()


@dataclass
class Planner:
    """Makes the steps of a run, each after those that it needs."""

    recipe: RunRecipe
    run: Path
    prints: Prints = field(default_factory=Prints)
    steps: dict[str, Step] = field(default_factory=dict)
    arms: list[Arm] = field(default_factory=list)

    @classmethod
    def plan(cls, recipe: RunRecipe, run: Path) -> Planner:
        """All steps and arms of a recipe in a run folder."""
        planner = cls(recipe, run.resolve())
        for seed in recipe.seeds:
            planner._train(seed)
            planner._audit(seed)
            planner._arms(seed)
            planner._verify(seed)
        planner._export()
        planner._push()
        return planner

    @property
    def ordered(self) -> tuple[Step, ...]:
        """All steps, in the order of the stages."""
        return tuple(sorted(self.steps.values(), key=lambda step: STAGES.index(step.stage)))

    def place(self, seed: int | None) -> Path:
        """The folder of a seed; the run folder if the recipe names no seeds."""
        return self.run if seed is None else self.run / f"seed-{seed}"

    @cached_property
    def existing(self) -> dict[str, ResolvedRepo]:
        """The existing adapters by name: their folders, and the weights that are only on the Hub.

        Raises:
            HubError: one is neither here nor on the Hub.
        """
        named = self.recipe.existing.items()
        return {name: resolve(spec.path, spec.revision, kind="adapter") for name, spec in named}

    def adapter(self, seed: int | None, variant: Variant) -> Path:
        """The folder of an adapter on the base; of one that `polish` trains further after the merge, in a folder of that arm."""
        found = self.existing.get(variant.adapter)
        place = self.place(seed) if variant.end == 1 else self.place(seed) / "polish"
        return found.folder if found else place / "adapters" / variant.name

    def lora(self, seed: int | None, variant: Variant) -> dict[str, str]:
        """An adapter as a merge recipe refers to it: a repository by its commit, else a folder."""
        found = self.existing.get(variant.adapter)
        if found and found.repo_id and found.commit:
            return {"path": found.repo_id, "revision": found.commit}
        return {"path": str(self.adapter(seed, variant))}

    @cached_property
    def _existing_prints(self) -> dict[str, str]:
        """Digests of the existing adapters, by folder and by repository."""
        found: dict[str, str] = {}
        for repo in self.existing.values():
            digest = f"hub:{repo.repo_id}@{repo.commit}" if repo.commit else self.prints.of_adapter(repo.folder)
            found |= {str(repo.folder): digest, str(repo.repo_id): digest}
        return found

    def _outside(self, places: Iterable[str]) -> list[str]:
        """Digests of the models that no step of the run makes."""
        prints = self._existing_prints
        return [prints.get(p) or self.prints.of(p) for p in places if p in prints or not self._is_ours(p)]

    def _is_ours(self, place: str) -> bool:
        return Path(place).is_relative_to(self.run)

    @cached_property
    def base_print(self) -> str:
        """Digest of the base."""
        return self.prints.of(self.recipe.base)

    def _add(
        self,
        stage: Stage,
        seed: int | None,
        name: str,
        job: Job,
        out: Path | None,
        needs: tuple[str, ...],
        **parts: Any,
    ) -> str:
        full = f"{stage}/{name}" if seed is None else f"{stage}/seed-{seed}/{name}"
        if full not in self.steps:
            below = [self.steps[need].key for need in needs]
            self.steps[full] = Step(full, stage, key_of(stage=stage, needs=below, **parts), job, out, needs)
        return full

    # --- training ---------------------------------------------------------------------------------------------------

    def _train(self, seed: int | None) -> None:
        for variant in variants_of(self.recipe):
            if variant.adapter in self.recipe.existing:
                continue
            self._adapter(seed, variant, self.place(seed) / "adapters", self.recipe.base, ())

    def _adapter(self, seed: int | None, variant: Variant, folder: Path, base: str, needs: tuple[str, ...]) -> str:
        section = section_of(self.recipe, variant, seed)
        return self._training(seed, variant.name, section, folder, base, needs, (variant.adapter,))

    def _training(
        self, seed: int | None, adapter: str, section: Mapping[str, Any], folder: Path, base: str, needs: tuple[str, ...],
        named: tuple[str, ...],
    ) -> str:  # fmt: skip
        """Add the step that trains an adapter into a folder; `named`: the adapters of the recipe whose sections it uses."""
        job = Train(adapter, placed(section, self.recipe.folder), base, folder, named)
        name = folder.relative_to(self.place(seed)).as_posix().removeprefix("adapters").strip("/")
        parts = {one: files_of(self.recipe.adapters[one], self.recipe.folder) for one in named}
        files = {f"{one}/{key}" if len(named) > 1 else key: file for one in named for key, file in parts[one].items()}
        return self._add(
            "train", seed, f"{name}/{adapter}".strip("/"), job, folder / adapter, needs,
            section=former_keys(AdapterSpec, section), base=None if needs else self.base_print,
            files=self.prints.all_of(files),
        )  # fmt: skip

    def trained(self, seed: int | None, variant: Variant) -> tuple[str, ...]:
        """The step that trains a variant from the base; none for an adapter that exists."""
        if variant.adapter in self.recipe.existing:
            return ()
        if variant.end < 1:
            folder = self.adapter(seed, variant).parent
            return (self._adapter(seed, variant, folder, self.recipe.base, ()),)
        return (f"train/{variant.name}" if seed is None else f"train/seed-{seed}/{variant.name}",)

    def sequential(self, seed: int | None, chain: Sequence[Variant]) -> tuple[Path, Path, tuple[str, ...]]:
        """Add the steps that train each adapter of a chain on the merged model of those before it.

        Returns:
            The folder of the last such model, the folder of the last adapter, and the names of the steps that make both.
        """
        folder, base, made = self.place(seed), self.recipe.base, tuple[str, ...]()
        for before, variant in pairwise(chain):
            lora = {"path": str(folder / before.name)} if made else self.lora(seed, before)
            folder /= f"after-{before.name}"
            written = self._with_adapter(base, lora)
            out_dtype = written.get("out_dtype")
            first = {"base": self.base_print, **self._of_existing(before)} if not made else {}
            laid = self._add(
                "train", seed, (folder / "base").relative_to(self.place(seed)).as_posix(), Merge(written), folder / "base",
                made or self.trained(seed, before), out_dtype=out_dtype, **first,
            )  # fmt: skip
            base = str(folder / "base")
            made = (laid, self._adapter(seed, variant, folder, base, (laid,)))
        return folder / "base", folder / chain[-1].name, made

    def _with_adapter(self, base: str, lora: Mapping[str, str], weight: float = 1.0) -> dict[str, Any]:
        """The merge recipe of a model with an adapter."""
        out_dtype = (self.recipe.merge.data if self.recipe.merge else {}).get("out_dtype")
        return {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [{"model": reference_to(base, lora), "parameters": {"weight": weight}}],
            **({"out_dtype": out_dtype} if out_dtype else {}),
        }

    def shrunk(self, seed: int | None, chain: Sequence[Variant], factor: float, out: Path) -> tuple[str, ...]:
        """Add the steps of the model of a chain with its last delta scaled; returns the step that merges it."""
        model, adapter, needs = self.sequential(seed, chain)
        written = self._with_adapter(str(model), {"path": str(adapter)}, factor)
        return (
            self._add(
                "merge", seed, out.name, Merge(written), out, needs, shrink=factor, out_dtype=written.get("out_dtype")
            ),
        )

    def mixed(
        self, seed: int | None, name: str, variants: Sequence[Variant], ratio: float | Mapping[str, float] | None
    ) -> tuple[Path, tuple[str, ...]]:
        """Add the step that trains one adapter on the objectives of several; returns its folder and the step's name."""
        section, folder = mixed_section(self.recipe, variants, seed, ratio), self.place(seed) / "mixed"
        step = self._training(seed, name, section, folder, self.recipe.base, (), tuple(v.adapter for v in variants))
        return folder / name, (step,)

    def polish(
        self, seed: int | None, name: str, variants: Sequence[Variant], last: str, share: float, written: Mapping[str, Any]
    ) -> tuple[Path, Path, tuple[str, ...]]:  # fmt: skip
        """Add the steps that merge adapters, and then train the last share of one adapter's steps on the merged model.

        Args:
            seed: the run's seed.
            name: of the folder.
            variants: the adapters that are merged.
            last: the adapter that is trained after the merge; before the merge it has the other steps.
            share: of its steps.
            written: the merge recipe, with adapters by name.

        Returns:
            The folder of the merged model, the folder of the adapter on it, and the names of the steps that make both.
        """
        folder, cut = self.place(seed) / "polish" / name, 1 - share
        before = [replace(variant, end=cut) if variant.adapter == last else variant for variant in variants]
        (rest,) = (replace(variant, begin=cut) for variant in variants if variant.adapter == last)
        model = {key: value for key, value in written.items() if key != "output"}  # an adapter is trained on a model
        laid = self.merged(seed, f"polish/{name}/base", folder / "base", model, before, stage="train")
        step = self._adapter(seed, rest, folder, str(folder / "base"), (laid,))
        return folder / "base", folder / rest.name, (laid, step)

    # --- everything after -------------------------------------------------------------------------------------------

    def _audit(self, seed: int | None) -> None:
        spec = self.recipe.audit
        if spec is None:
            return
        variants = variants_of(self.recipe)
        sources = tuple(str(self.adapter(seed, variant)) for variant in variants)
        job = Audit(sources, self.recipe.base, tuple(variant.name for variant in variants))
        self._add(
            "audit", seed, "adapters", job, self.place(seed) / "audit",
            tuple(need for variant in variants for need in self.trained(seed, variant)),
            section=spec.model_dump(), base=self.base_print, **self._of_existing(*variants),
        )  # fmt: skip

    def _of_existing(self, *variants: Variant) -> dict[str, Any]:
        """What existing adapters add to a fingerprint; nothing where there are none."""
        found = {v.adapter: str(self.existing[v.adapter].folder) for v in variants if v.adapter in self.existing}
        return {"existing": {name: self._existing_prints[place] for name, place in found.items()}} if found else {}

    def merged(
        self, seed: int | None, name: str, out: Path, written: Mapping[str, Any], variants: Sequence[Variant],
        stage: Stage = "merge",
    ) -> str:  # fmt: skip
        """Add the step that merges one model.

        Args:
            seed: the run's seed.
            name: of the step.
            out: the model's folder.
            written: the merge recipe, with adapters by name.
            variants: the variants that some of those names mean; the others mean the adapters as in the recipe.
            stage: the step's.

        Returns:
            The name of the step.
        """
        given = {variant.adapter for variant in variants}
        variants = [*variants, *(Variant(other) for other in self.recipe.names if other not in given)]
        paths = {v.adapter: self.lora(seed, v) for v in variants}
        resolved = expand(Located(resolved_merge(written, paths, self.recipe, seed)))[0].data
        others = self._outside(dict.fromkeys(references(resolved)))
        named = [variant for variant in variants if names_adapter(written, variant.adapter)]
        needs = tuple(need for variant in named for need in self.trained(seed, variant))
        return self._add(
            stage, seed, name, Merge(resolved), out, needs, written=written, models=sorted(others),
            base=self.base_print, drawn=resolved.get("seed", 0),
        )  # fmt: skip

    def _arms(self, seed: int | None) -> None:
        for arm in arms_of(self, seed):
            same = [known for known in self.arms if known.slug == arm.slug and known.seed == arm.seed]
            if any(known.parts == arm.parts for known in same):
                continue
            if same:
                what = f"the arms {same[0].name!r} and {arm.name!r} would have one folder, {arm.slug}"
                raise RecipeError.of("COMPARE", self.recipe.where("adapters"), what, "rename the adapter")
            self.arms.append(arm)
            self._measure(arm)

    def _measure(self, arm: Arm) -> None:
        spec = self.recipe.evaluate
        if spec is None:
            return
        place = self.place(arm.seed) / "evaluations" / arm.slug
        general = spec.model_dump(exclude={"metrics", "suite", "tasks"})
        for name, measurement in spec.metrics.items():
            files: dict[str, Path] = {"data": beside_recipe(measurement.data, self.recipe.folder)}
            section = measurement.model_dump()
            for key in ("samples", "sources"):
                if section[key] is None:
                    del section[key]  # fingerprints of before this key hold
            asked = [self._answers(arm, source, name, general) for source in measurement.sources or ()]
            job = Evaluate(arm, name, tuple(path for _, path in asked))
            code = file_of(measurement.function, self.recipe.folder) if measurement.function else None
            self._add(
                "evaluate", arm.seed, f"{arm.slug}/{name}", job, place / f"{name}.json",
                (*arm.needs, *(step for step, _ in asked)), section=former_keys(Measurement, section), general=general,
                model=self._print_of(arm), files=self.prints.all_of(files | ({"code": code} if code else {})),
            )  # fmt: skip
        if spec.needs_lm_eval:
            tasks = {task: beside_recipe(task, self.recipe.folder) for task in spec.tasks if is_file(task)}
            self._add(
                "evaluate", arm.seed, f"{arm.slug}/{HARNESS}", Evaluate(arm, HARNESS), place / f"{HARNESS}.json", arm.needs,
                suite=spec.suite, tasks=spec.tasks, general=general, model=self._print_of(arm),
                files=self.prints.all_of(tasks),
            )  # fmt: skip
        if arm.group != "base":
            epsilon = self.recipe.audit.epsilon if self.recipe.audit else EPSILON
            self._add(
                "evaluate", arm.seed, f"{arm.slug}/{SPARSITY}", Evaluate(arm, SPARSITY), place / f"{SPARSITY}.json",
                arm.needs, epsilon=epsilon, model=self._print_of(arm),
            )  # fmt: skip

    def _answers(self, arm: Arm, source: str, metric: str, general: Mapping[str, Any]) -> tuple[str, Path]:
        """Add the step that answers the prompts of an `agreement` with one source; returns the step and its file.

        An arm that is the same for every seed is compared with the sources of the first one.
        """
        recipe = self.recipe
        seed = recipe.seeds[0] if arm.seed is None else arm.seed
        parts = {"base": (recipe.base,)}.get(source) or source_parts(source, recipe.folder)
        model = Arm(source, "source", None, parts)
        slug = source if source == "base" else f"{model.slug}-{key_of(parts=parts)[:8]}"
        if source in recipe.names:
            variant, own = Variant(source), None if source in recipe.existing else seed
            base = str(Path(recipe.base))
            model = Arm(source, "source", own, (base, str(self.adapter(seed, variant))), self.trained(seed, variant))
            slug = source
        assert recipe.evaluate is not None
        of, out = (
            recipe.evaluate.metrics[metric],
            self.place(model.seed) / "evaluations" / "answers" / slug / f"{metric}.json",
        )
        step = self._add(
            "evaluate", model.seed, f"answers/{slug}/{metric}", Answer(model, metric), out, model.needs,
            section=of.model_dump(include={"prompt", "max_new_tokens", "max_rows"}), general=general,
            model=self._print_of(model), files=self.prints.all_of({"data": beside_recipe(of.data, recipe.folder)}),
        )  # fmt: skip
        return step, out

    def _print_of(self, arm: Arm) -> dict[str, Any]:
        """What the arm's model depends on besides the steps that it needs."""
        ours = [p for p in arm.parts if self._is_ours(p) and p not in self._existing_prints]
        return {"outside": self._outside(arm.parts), "inside": [Path(part).name for part in ours]}

    def _verify(self, seed: int | None) -> None:
        spec = self.recipe.verify
        if spec is None:
            return
        merged, folder = self._merged(seed)
        data = beside_recipe(spec.data, self.recipe.folder) if spec.data else None
        self._add(
            "verify", seed, "merged", Verify(folder, data), self.place(seed) / "verify.json", (merged,),
            section=spec.model_dump(exclude={"data", "memory"}), files=self.prints.all_of({"data": data} if data else {}),
        )  # fmt: skip

    def _push(self) -> None:
        spec = self.recipe.push
        if spec is None:
            return
        seed = self.recipe.seeds[0]
        merged, folder = self._merged(seed)
        checks = tuple(s.name for s in self.steps.values() if isinstance(s.job, Verify) and s.job.folder == folder)
        self._add("push", None, spec.repo_id, Push(folder), None, (merged, *checks), section=spec.model_dump())

    def _merged(self, seed: int | None) -> tuple[str, Path]:
        """The step that makes the merged model of a seed, and its folder."""
        folder = self.place(seed) / "merged"
        return next(s.name for s in self.steps.values() if s.stage == "merge" and s.out == folder), folder

    def _export(self) -> None:
        if (spec := self.recipe.export) is None:
            return
        merged, folder = self._merged(self.recipe.seeds[0])
        for to in spec.to:
            out = self.run / "export" / to
            self._add("export", None, to, Export(folder, to), out, (merged,), to=to, quantize=spec.quantize)


def arms_of(planner: Planner, seed: int | None) -> Iterator[Arm]:
    """Yield the arms of one seed in the order of the table; adds the training and merging steps that they need."""
    recipe, place = planner.recipe, planner.place(seed)
    arms = arms_wanted(recipe)
    base = str(Path(recipe.base))
    if "base" in arms or not (recipe.names or recipe.merge):
        yield Arm("base", "base", None, (recipe.base,))
    if "individual" in arms or not (recipe.compare or recipe.merge):
        for variant in variants_of(recipe):
            parts = (base, str(planner.adapter(seed, variant)))
            own = None if variant.adapter in recipe.existing else seed
            yield Arm(_label(variant, recipe), "individual", own, parts, planner.trained(seed, variant))
    yield from _trained_arms(planner, seed, arms)
    together = merged_together(recipe)
    for key, variants in together.items():
        for merge in merges_of(recipe):
            label = _suffixed(f"parallel {merge.name}", key, together)
            frontier = _suffixed(f"parallel {merge.frontier}", key, together) if merge.frontier else ""
            slug = Arm(label, "", seed, ()).slug
            step = planner.merged(seed, slug, place / "arms" / slug, merge.written, variants)
            made = _written_parts(place / "arms" / slug, merge.written, recipe)
            yield Arm(label, "parallel", seed, made, (step,), frontier, merge.point)
    if recipe.merge is not None:
        every = [Variant(name) for name in recipe.names]
        step = planner.merged(seed, "merged", place / "merged", recipe.merge.data, every)
        yield Arm("merged", "merge", seed, _written_parts(place / "merged", recipe.merge.data, recipe), (step,))


def _written_parts(out: Path, written: Mapping[str, Any], recipe: RunRecipe) -> tuple[str, ...]:
    """The parts of the model that a merge into `out` makes: the folder, or the base and the adapter in it."""
    if not writes_adapter(written):
        return (str(out),)
    base = written.get("base_model", recipe.base)
    return (str(Path(base)) if isinstance(base, str) else recipe.base, str(out))


def _trained_arms(planner: Planner, seed: int | None, arms: Sequence[str]) -> Iterator[Arm]:
    """Yield the arms whose adapters are trained after each other, together, or after a merge."""
    recipe, compare, found = planner.recipe, planner.recipe.compare or CompareSpec(), chains(planner.recipe)
    place = planner.place(seed)

    def label(name: str, key: str, **point: float) -> str:
        values = " ".join(f"{axis}={value:.12g}" for axis, value in point.items())
        return _suffixed(f"{name} {values}".strip(), key, found)

    def in_sequence(name: str, key: str, chain: Sequence[Variant], frontier: str = "", **point: float) -> Arm:
        model, adapter, needs = planner.sequential(seed, chain)
        return Arm(label(name, key, **point), "sequential", seed, (str(model), str(adapter)), needs, frontier, point)

    for key, chain in found.items():
        if "sequential" in arms:
            spec = compare.sequential or SequentialSpec()
            frontier = _suffixed("sequential", key, found) if compare.sequential else ""
            yield in_sequence("sequential", key, chain, frontier)
            for beta in spec.beta or ():
                yield in_sequence("sequential", key, [*chain[:-1], replace(chain[-1], beta=beta)], frontier, beta=beta)
            for steps in spec.steps or ():
                yield in_sequence(
                    "sequential", key, [*chain[:-1], replace(chain[-1], end=steps)], frontier, steps=steps
                )
            for factor in spec.shrink or ():
                name = label("sequential", key, shrink=factor)
                out = place / "arms" / Arm(name, "", seed, ()).slug
                needs = planner.shrunk(seed, chain, factor, out)
                yield Arm(name, "sequential", seed, (str(out),), needs, frontier, {"shrink": factor})
    for key, chain in found.items():
        if "sequential_reversed" in arms:
            yield in_sequence("sequential reversed", key, chain[::-1])
    for key, chain in found.items():
        ratio = compare.mixed.ratio if compare.mixed else None
        for one in (ratio if isinstance(ratio, list) else [ratio]) if "mixed" in arms else ():
            point = {"ratio": float(one)} if isinstance(ratio, list) and isinstance(one, int | float) else {}
            name = label("mixed", key, **point)
            folder, needs = planner.mixed(seed, Arm(name, "", seed, ()).slug, chain, one)
            frontier = _suffixed("mixed", key, found) if point else ""
            yield Arm(name, "mixed", seed, (str(Path(recipe.base)), str(folder)), needs, frontier, point)
    for key, chain in found.items():
        polish, last = compare.polish or PolishSpec(), polished(recipe)
        for share in polish.share if "polish" in arms and last else ():
            point = {"share": share} if len(polish.share) > 1 else {}
            name = label("polish", key, **point)
            slug = Arm(name, "", seed, ()).slug
            model, adapter, needs = planner.polish(
                seed, slug, chain, str(last), share, merge_before_polish(recipe).written
            )
            frontier = _suffixed("polish", key, found) if point else ""
            yield Arm(name, "polish", seed, (str(model), str(adapter)), needs, frontier, point)


def _label(variant: Variant, recipe: RunRecipe) -> str:
    if variant.dense:
        return f"{variant.adapter} (dense)"
    return f"{variant.adapter} (l1)" if Variant(variant.adapter, True) in variants_of(recipe) else variant.name


def _suffixed(name: str, key: str, chosen: Mapping[str, Any]) -> str:
    """`parallel ties (l1)`; without the parentheses where there is only one kind."""
    return f"{name} ({key})" if len(chosen) > 1 else name
