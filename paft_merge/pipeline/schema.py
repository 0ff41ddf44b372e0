"""A recipe of a run as frozen models: `adapters:`, `merge:`, `audit:`, `verify:`, `evaluate:`, `compare:`, `export:`, `push:`, `seeds:`, `tune:`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from paft_merge.compute.magnitudes import EPSILON
from paft_merge.engine.options import parse_size
from paft_merge.errors import Problems, RecipeError
from paft_merge.evaluating.schema import EvaluateSpec, read_evaluate
from paft_merge.exporting import Target
from paft_merge.pipeline.overrides import overridden
from paft_merge.pipeline.sweeps import Weights, check_sweep
from paft_merge.recipe.sections import Section, as_list, beside_recipe, read_section, refuse_merge_recipe
from paft_merge.recipe.yaml_source import Located, did_you_mean, load_yaml, show
from paft_merge.training.schema import AdapterSpec, is_existing, read_adapters

Stage = Literal["train", "audit", "merge", "verify", "evaluate", "export", "push"]
STAGES: tuple[Stage, ...] = ("train", "audit", "merge", "verify", "evaluate", "export", "push")

Arms = Literal["base", "individual", "sequential", "sequential_reversed", "parallel", "mixed", "polish"]
_ARMS: tuple[Arms, ...] = ("base", "individual", "sequential", "parallel")
"""The default arms."""

PAPER_METHODS = ("slerp", "ties", "dare_ties", "task_arithmetic", "linear")
"""The five methods of PAFT's tables."""
OUR_METHODS = ("l1_ties", "sign_election")


class ExistingAdapter(Section):
    """An entry of `adapters:` that exists already: it is audited, merged and compared, but not trained."""

    path: str
    """Folder, or name of a Hub repository."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""


class AuditSpec(Section):
    """The section `audit:`."""

    epsilon: Annotated[float, Field(gt=0)] = EPSILON
    """An entry is sparse when |delta| is below this."""
    require: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    """Requirements that must hold before anything is merged, as for `paft audit --require`."""
    html: bool = True
    """Also write the report with figures, `audit.html`."""


class VerifySpec(Section):
    """The section `verify:`, of the merged model."""

    data: str | None = None
    """Prompts: rows, or a text file. Default: samples of the base, and runs of random tokens."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Number of prompts."""
    new_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens of each greedy continuation."""
    tensors_only: bool = False
    """Compare stored tensors and files, and run no model."""
    memory: str | None = None
    """Memory for a model (`"8GB"`); a larger one is read layer by layer."""
    require: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    """Requirements that must hold before anything is evaluated or pushed, as for `paft verify --require`."""

    @field_validator("memory")
    @classmethod
    def _size(cls, given: str | None) -> str | None:
        if given is not None:
            parse_size(given)
        return given


def _no_value_twice(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"has a value twice: {show(values)}")
    return values


def _ratio(value: Any) -> Any:
    numbers = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    if not numbers or any(
        isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n < math.inf for n in numbers
    ):
        what = "must be a number of at least 0, a list of such numbers, or one for each adapter by name"
        raise ValueError(f"{what}; got {show(value)}")
    return _no_value_twice(value) if isinstance(value, list) else value


def _one_or_more(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Points = Annotated[list[Positive], Field(min_length=1), AfterValidator(_no_value_twice)]
Shares = Annotated[
    list[OpenShare],
    BeforeValidator(_one_or_more, json_schema_input_type=OpenShare | list[OpenShare]),
    Field(min_length=1),
    AfterValidator(_no_value_twice),
]


class SequentialSpec(Section):
    """The section `compare: {sequential: ...}`: values of the last training that are tried one by one."""

    beta: Points | None = None
    """Its strength of the reference (of ORPO, the weight of the odds ratio)."""
    steps: Shares | None = None
    """Shares of its steps."""
    shrink: Annotated[list[OpenShare], Field(min_length=1), AfterValidator(_no_value_twice)] | None = None
    """Factors of its delta, without training: the model moves towards the one that it was trained on."""


class MixedSpec(Section):
    """The section `compare: {mixed: ...}`: one adapter that is trained on the objectives of all."""

    ratio: Annotated[float | dict[str, float] | list[float], BeforeValidator(_ratio)] | None = None
    """Steps of the second adapter per step of the first, or steps by adapter; several numbers are tried one by one.
    Default: each as many steps as alone. The sum of all steps is always that of the adapters alone."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of the TRL config that hold for all objectives; `max_steps` is the sum of all steps."""
    lora: dict[str, Any] | None = None
    """The LoRA, if the adapters do not have the same."""


class PolishSpec(Section):
    """The section `compare: {polish: ...}`: the last part of one adapter's training happens after the merge."""

    trained: str = Field(default="preference", alias="with")
    """`preference`, `skill`, or the name of an adapter."""
    share: Shares = Field(default_factory=lambda: [0.2])
    """Share of the adapter's steps that is trained after the merge, and not before it; several are tried one by one."""
    merge: str | dict[str, Any] | None = None
    """A method or a merge recipe, as under `methods`; default: that of `merge:` if it has all
    adapters, else `task_arithmetic`."""

    @field_validator("merge")
    @classmethod
    def _one_merge(cls, given: Any) -> Any:
        if isinstance(given, dict) and "merge_method" not in given:
            raise ValueError("a merge recipe needs merge_method")
        if isinstance(given, dict) and "sweep" in given:
            raise ValueError("one merge comes before the polish; sweep the share instead")
        return given


class CompareSpec(Section):
    """The section `compare:`: more arms of the table."""

    arms: Annotated[list[Arms], BeforeValidator(as_list)] = Field(default_factory=lambda: list[Arms](_ARMS))
    """`base`; `individual`: every adapter alone; `sequential`: the preference adapter trained on the merged skill model;
    `sequential_reversed`: the skill adapter trained on the merged preference model; `parallel`: both trained from the base,
    then merged by each of `methods`; `mixed`: one adapter trained on both objectives; `polish`: merged, then trained
    further on one objective."""
    order: Annotated[list[str], Field(min_length=2), AfterValidator(_no_value_twice)] | None = None
    """The adapters of all arms, in the order of `sequential`; by default the skill and the preference adapter."""
    sequential: SequentialSpec | None = None
    """Values of the arm `sequential` that are tried one by one."""
    mixed: MixedSpec | None = None
    """Settings of the arm `mixed`."""
    polish: PolishSpec | None = None
    """Settings of the arm `polish`."""
    skill: str | None = None
    """The adapter that is trained first in `sequential`; the first one with objective sft or ift by default."""
    preference: str | None = None
    """The adapter that is trained second in `sequential`; by default the first one with another objective."""
    sft: Annotated[list[Literal["dense", "l1"]], BeforeValidator(as_list)] | None = None
    """Variants of the skill adapter: sparse as in the recipe (`l1`), and without (`dense`); all by default."""
    methods: Annotated[list[str | dict[str, Any]], BeforeValidator(as_list)] = Field(
        default_factory=lambda: list[str | dict[str, Any]]((*PAPER_METHODS, *OUR_METHODS))
    )
    """Names of methods, or whole merge recipes (`models` is optional; `name` is the name in the table). `sweep: {weight:
    [...], density: [...]}` makes an arm of every combination of values: together they are the method's frontier."""
    weights: Weights | None = None
    """The weights of the preference adapter to sweep in every method that has weights and sets none itself; or a grid of
    weights by adapter."""
    frontier: list[str] | None = None
    """The evaluations of the plot: its two axes and, optionally, the shade of its points. By default the first three of
    `evaluate: {metrics: ...}`, if there is a sweep."""

    @field_validator("methods")
    @classmethod
    def _named(cls, given: list[Any]) -> list[Any]:
        for one in given:
            if isinstance(one, dict) and "merge_method" not in one:
                raise ValueError("a merge recipe needs merge_method")
            if isinstance(one, dict) and "sweep" in one:
                check_sweep(one["sweep"])
        return given

    @field_validator("weights")
    @classmethod
    def _differing(cls, given: Any) -> Any:
        if given is not None:
            check_sweep({"weight": given})
        return given

    @field_validator("frontier")
    @classmethod
    def _two_axes(cls, given: list[str] | None) -> list[str] | None:
        if given is not None and len(given) not in (2, 3):
            raise ValueError(f"a plot has two evaluations as axes and, optionally, one as the shade; got {len(given)}")
        if given and len(set(given)) < len(given):
            raise ValueError("the evaluations of a plot must differ")
        return given


class ExportSpec(Section):
    """The section `export:`: formats of the merged model of the first seed. A recipe names no program."""

    to: Annotated[list[Target], BeforeValidator(_one_or_more), AfterValidator(_no_value_twice), Field(min_length=1)]
    """One format or several, as `paft export --to` names them."""
    quantize: str | None = None
    """A type of llama.cpp, or of MLX; None keeps 16 bits."""


class PushSpec(Section):
    """The section `push:`."""

    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """`user/name` on the Hub; created if necessary."""
    private: bool = True
    """Visibility of a new repository."""
    branch: str | None = None
    """Branch to commit to, created if necessary; default: main."""
    create_pr: bool = False
    """Open a pull request instead of committing."""
    message: str | None = None
    """Commit message."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the commit."""


class TuneSpec(Section):
    """The section `tune:`: the search space of `paft tune` and the metric that it maximises."""

    metric: str | Annotated[list[str], Field(min_length=1)]
    """An evaluation of `evaluate:`; or several, added: `skill + 0.1 * happy`. A list of them is several objectives."""
    space: Annotated[dict[str, Any], Field(min_length=1)]
    """Key paths of `merge:`, each with `[low, high]` (two numbers), `[low, high, log]`, or a list of choices:
    `parameters.trim.l1_mass: [0.5, 1.0]`; a gradient (`{range: [0.2, 1.5], layers: 4}`); or a mapping with one of these for
    each kind of module: `models[0].parameters.weight: {attention: [0.2, 1.5], mlp: [0.2, 1.5]}`."""
    trials: Annotated[int, Field(ge=1)] = 40
    """Number of trials, with the recipe as it is."""
    seed: int = 0
    """Seed of the sampler."""
    startup_trials: Annotated[int, Field(ge=1)] = 10
    """Random trials before the sampler (TPE) uses the results of earlier ones."""


class RunLanguage(Section):
    """A run recipe as written. `read_run` reads its sections one by one, so that all their problems are found together."""

    base_model: Annotated[str, Field(min_length=1)]
    """The model that the adapters are for: a folder or a Hub name."""
    adapters: dict[str, AdapterSpec | ExistingAdapter | str] | Literal[False] = False
    """The adapters by name: what to train, or the path of an adapter that exists."""
    merge: dict[str, Any] | Literal[False] = False
    """A merge recipe in which the names of `adapters` are models. Without `base_model` it has that of the run."""
    audit: AuditSpec | Literal[False] | None = False
    """How sparse the adapters must be before anything is merged."""
    verify: VerifySpec | Literal[False] | None = False
    """Whether the merged model is what its recipe means, before it is evaluated or pushed."""
    evaluate: EvaluateSpec | Literal[False] = False
    """The evaluations of the models."""
    compare: CompareSpec | Literal[False] | None = False
    """Compare the merge with other ways to combine the adapters, in a table."""
    export: ExportSpec | Literal[False] = False
    """The formats that the merged model is written in for other programs."""
    push: PushSpec | Literal[False] = False
    """The repository on the Hub that the merged model is pushed to."""
    seeds: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_no_value_twice)]
        | Literal[False]
        | None
    ) = None
    """Seeds with which everything is repeated; the table has means and intervals."""
    tune: TuneSpec | Literal[False] = False
    """What `paft tune` searches."""


_SECTIONS: Mapping[str, type[Section]] = {
    "audit": AuditSpec,
    "verify": VerifySpec,
    "compare": CompareSpec,
    "export": ExportSpec,
    "push": PushSpec,
    "tune": TuneSpec,
}
KEYS = tuple(RunLanguage.model_fields)


@dataclass(frozen=True)
class RunRecipe:
    """A recipe of a run as `load_run` reads it."""

    located: Located
    file: Path
    base: str
    """An absolute path, or the name of a Hub repository."""
    adapters: Mapping[str, AdapterSpec]
    """The adapters that the run trains."""
    existing: Mapping[str, ExistingAdapter]
    """The adapters that exist already; local paths are absolute."""
    merge: Located | None
    """mergekit's language; a name of `adapters` means the base with that adapter."""
    audit: AuditSpec | None
    verify: VerifySpec | None
    evaluate: EvaluateSpec | None
    compare: CompareSpec | None
    export: ExportSpec | None
    push: PushSpec | None
    tune: TuneSpec | None
    seeds: tuple[int | None, ...]

    @property
    def folder(self) -> Path:
        """The recipe's folder, where relative paths are looked for first."""
        return self.file.parent

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, trained and existing, in the recipe's order."""
        return tuple(map(str, self.located.data.get("adapters") or ()))

    def where(self, *steps: str | int) -> str:
        """File, line and path of a key, for a message."""
        return str(self.located.spot(steps))


def load_run(recipe: Path | str, overrides: Sequence[str] = ()) -> RunRecipe:
    """Read a run's recipe. The files and models that it names are checked by `preflight.check_run`.

    Args:
        recipe: the file.
        overrides: `key=value` with a dotted key, applied to the data before it is read.

    Raises:
        RecipeError: every problem, each with its line.
    """
    loaded, problems = read_run(recipe, overrides)
    problems.raise_as(RecipeError)
    assert loaded is not None
    return loaded


def read_run(recipe: Path | str, overrides: Sequence[str] = ()) -> tuple[RunRecipe | None, Problems]:
    """Read a run's recipe as far as possible; sections with problems are left out.

    Returns:
        The recipe (None if base, adapters or merge have problems), and the problems.

    Raises:
        RecipeError: it is not a YAML mapping, it is a recipe for `paft merge`, or an override has no place in it.
    """
    file, problems = Path(recipe), Problems()
    located = load_yaml(file)
    if not isinstance(located.data, dict):
        what = "the recipe is empty" if located.data is None else f"a recipe is a mapping, got {show(located.data)}"
        raise RecipeError.of("RECIPE", located.spot(), what, "begin with base_model: ...")
    refuse_merge_recipe(located)
    located = overridden(located, overrides)
    # `compare: false`, or --set compare=false, leaves a section out.
    data: dict[str, Any] = {key: value for key, value in located.data.items() if value is not False}
    located = replace(located, data=data)
    for key in data:
        if key not in KEYS:
            fix = did_you_mean(key, KEYS) or f"known: {', '.join(KEYS)}"
            problems.add("KEY", located.spot((key,)), "unknown key", fix)
    base = data.get("base_model")
    if not isinstance(base, str) or not base:
        problems.add("BASE", located.spot(("base_model",)), "no base_model", "name the base model")
    adapters: dict[str, AdapterSpec] = {}
    existing: dict[str, ExistingAdapter] = {}
    merge = located.sub("merge") if "merge" in data else None
    if merge is not None and not isinstance(merge.data, dict):
        problems.add(
            "RECIPE", merge.spot(), f"a merge recipe is a mapping, got {show(merge.data)}", "begin with merge_method"
        )
    if "adapters" in data:
        with problems.catching():
            existing = _existing(located, file.parent, problems)
            adapters = read_adapters(located)
            _check_names((*adapters, *existing), located, problems)
    sound = not problems.found
    found: dict[str, Any] = dict.fromkeys(_SECTIONS)
    for key, model in _SECTIONS.items():
        if key in data:
            with problems.catching():
                found[key] = read_section(model, located.sub(key))
    evaluate = None
    if "evaluate" in data:
        with problems.catching():
            evaluate = read_evaluate(located.sub("evaluate"))
            for name in evaluate.metrics:
                if not re.fullmatch(r"[^./\\][^/\\]{,99}", name) or not name.isprintable():
                    what = f"{name!r} cannot be the name of a metric: its results are in a file of that name"
                    fix = "write 1 to 100 characters, no slash, and no dot at the beginning"
                    problems.add("VALUE", located.spot(("evaluate", "metrics", name)), what, fix)
    seeds = _seeds(data.get("seeds"), located, problems)
    if not problems.found:
        _check_together(data, adapters, evaluate, found["tune"], located, problems)
    if not sound:
        return None, problems
    read = RunRecipe(
        located,
        file,
        find_path(str(base), file.parent),
        adapters,
        existing,
        merge,
        evaluate=evaluate,
        seeds=seeds,
        **found,
    )
    return read, problems


def find_path(name: str, folder: Path) -> str:
    """A model folder as an absolute path: beside the recipe, else in the working directory; any other name as written."""
    place = beside_recipe(name, folder)
    return str(place.resolve()) if place.is_dir() else name


def _existing(located: Located, folder: Path, problems: Problems) -> dict[str, ExistingAdapter]:
    """The entries of `adapters:` that are a path, or a mapping with `path`."""
    sections = located.data["adapters"]
    found = {}
    for name, section in sections.items() if isinstance(sections, Mapping) else ():
        if is_existing(section):
            with problems.catching():
                at = located.sub("adapters", name)
                at = replace(at, data={"path": section}) if isinstance(section, str) else at
                spec = read_section(ExistingAdapter, at)
                found[str(name)] = spec.model_copy(update={"path": find_path(spec.path, folder)})
    return found


def _check_names(adapters: Iterable[str], located: Located, problems: Problems) -> None:
    for name in adapters:
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
            fix = "letters, digits, '-', '_' and '.'"
            problems.add("ADAPTERS", located.spot(("adapters", name)), "not usable as the name of a folder", fix)
        elif name.endswith("-dense") or name.startswith("after-") or name == "base":
            fix = "choose another name"
            problems.add("ADAPTERS", located.spot(("adapters", name)), "a name that comparisons use", fix)


def _seeds(given: Any, located: Located, problems: Problems) -> tuple[int | None, ...]:
    if given is None:
        return (None,)
    good = isinstance(given, list) and given and all(type(seed) is int and seed >= 0 for seed in given)
    if not good or len(set(given)) < len(given):
        problems.add(
            "VALUE", located.spot(("seeds",)), f"must be different whole numbers, got {show(given)}", "e.g. [0, 1, 2]"
        )
        return (None,)
    return tuple(given)


def _check_together(
    data: Mapping[str, Any], adapters: Mapping[str, AdapterSpec], evaluate: EvaluateSpec | None, tune: TuneSpec | None,
    located: Located, problems: Problems,
) -> None:  # fmt: skip
    """Check that the sections that a section needs are there."""

    def need(key: str, other: str, why: str) -> None:
        if key in data and other not in data:
            problems.add("SECTION", located.spot((key,)), f"{key} needs {other}, {why}", f"add {other}:")

    need("verify", "merge", "which makes the model that is verified")
    need("export", "merge", "which makes the model that is exported")
    need("push", "merge", "which makes the model that is pushed")
    need("audit", "adapters", "which it audits")
    need("compare", "adapters", "which it compares")
    need("compare", "evaluate", "which makes the columns of the table")
    need("tune", "merge", "whose parameters it searches")
    need("tune", "evaluate", "whose metric it maximises")
    if not data.keys() & {"adapters", "merge", "evaluate"}:
        problems.add("SECTION", located.spot(), "nothing to do", "add adapters:, merge: or evaluate:")
    if evaluate is not None and not evaluate.metrics and not evaluate.needs_lm_eval:
        fix = "add metrics:, suite: or tasks:"
        problems.add("SECTION", located.spot(("evaluate",)), "names no evaluation", fix)
