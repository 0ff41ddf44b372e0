"""One adapter's section of a PAFT recipe as frozen models: what to train, on what, how sparse. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from paft_merge.errors import Problem, RecipeError

Objective = Literal["sft", "dpo", "orpo", "ift", "on_policy", "best_of_n", "rwr", "rloo", "grpo"]
OBJECTIVES: tuple[Objective, ...] = ("sft", "dpo", "orpo", "ift", "on_policy", "best_of_n", "rwr", "rloo", "grpo")
SAMPLING: tuple[Objective, ...] = ("on_policy", "best_of_n", "rwr")
"""Objectives that generate, score and then train on what was generated, round by round."""

OURS = {
    "output_dir": "the adapter's folder is given by --out",
    "resume_from_checkpoint": "use --resume",
    "push_to_hub": "use the recipe's push: section",
    "model_init_kwargs": "use base: {...} of the adapter",
    "remove_unused_columns": "the trainers choose their columns",
    "logging_nan_inf_filter": "a non-finite loss always stops a run",
    "chat_template_path": "use chat_template: of the adapter",
}
"""Fields of the TRL configs that `training:` may not set, and what to use instead."""


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    return value


Positive = Annotated[float, Field(gt=0), AfterValidator(_finite)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Density = Annotated[float, Field(gt=0, le=1)]


class DataSpec(Section):
    """Where rows come from: a Hub data set, a local .json/.jsonl/.parquet/.csv file, or a folder of either kind."""

    path: str
    """Hub name, file, or folder (also one written by `Dataset.save_to_disk`)."""
    name: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split, in the notation of `datasets` (`train_sft[:1000]`)."""
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, old name to new name."""
    columns: list[str] | None = None
    """Columns to keep, after renaming; all by default."""
    fraction: Positive | None = None
    """Share of this set in a mixture, for all sets or none; none is repeated, so the scarcest one bounds the total."""
    take: Annotated[int, Field(ge=1)] | None = None
    """Keep the first so many rows."""


class LoraSpec(Section):
    """The adapter's shape. Any other field of `peft.LoraConfig` goes under `extra`."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    lora_alpha: Positive = 16
    """The delta is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    """Module names, a regular expression, or `all-linear` (every linear layer but the head)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of `peft.LoraConfig`, checked against it."""


class L1Spec(Section):
    """How the update is made sparse while it is trained."""

    strength: Positive = 1e-4
    """Weight of the *sum* of absolute values (PAFT: 1e-4 to 1e-3). With `target`, where the controller starts."""
    on: Literal["product", "factors"] | None = None
    """What is penalised: the delta `scale * B @ A` (`product`, PAFT's text; default) or A and B themselves."""
    mode: Literal["penalty", "prox"] = "penalty"
    """`penalty` adds to the gradient; `prox` shrinks the factors after each optimizer step and gives exact zeros."""
    warmup: Annotated[float, Field(ge=0)] | None = None
    """Ramp of the strength: optimizer steps if >= 1, else a share of the run. Default: 0 for penalty, 0.1 for prox."""
    cap: Positive = 10.0
    """`prox` only: largest threshold, in units of the learning rate."""
    target: OpenShare | None = None
    """Sparsity to be reached (share of |delta| < 1e-5, mean over matrices); the strength is then controlled."""

    @model_validator(mode="before")
    @classmethod
    def _spelt_on(cls, given: Any) -> Any:
        """YAML 1.1 readers turn the key `on` into true."""
        return (
            {("on" if key is True else key): value for key, value in given.items()}
            if isinstance(given, dict)
            else given
        )

    @property
    def penalises(self) -> Literal["product", "factors"]:
        """What the strength acts on, default resolved."""
        return self.on or ("factors" if self.mode == "prox" else "product")

    @model_validator(mode="after")
    def _possible(self) -> L1Spec:
        if self.mode == "prox" and self.on == "product":
            raise ValueError(
                "the proximal step works on factors: the product has no cheap proximal operator; "
                "use on: factors, or mode: penalty"
            )
        return self


class TrimSpec(Section):
    """Magnitude pruning of the finished delta: the baseline that every sparse training has to beat."""

    density: Density
    """Share of entries kept, per matrix."""


class OrpoSpec(Section):
    """ORPO (arXiv:2403.07691)."""

    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the odds-ratio term (lambda in the paper)."""
    nll: Literal["full", "response"] = "full"
    """Tokens the likelihood term counts: prompt and response (official code, TRL) or response only (LLaMA-Factory)."""


class IftSpec(Section):
    """Intuitive Fine-Tuning (arXiv:2405.11870), as its authors' code computes it."""

    lam: Share = Field(default=0.2, alias="lambda")
    """Share of the greedy prediction in the residual embedding."""
    gamma: Share = 0.95
    """Discount of the future losses in a token's weight."""
    detach_weights: bool = False
    """Hold the weights constant in the gradient: safer (no token is pushed down), but not what the authors ran."""


class RewardSpec(Section):
    """What scores a completion. Exactly one of the three."""

    function: str | None = None
    """`module:function`, called as TRL does: `f(prompts=, completions=, **columns) -> list[float]`."""
    model: str | None = None
    """Folder or Hub name of a sequence-classification reward model (one logit)."""
    rule: Literal["length", "short", "match", "contains"] | None = None
    """`length`/`short`: more/fewer words; `match`: equals the row's `answer`; `contains`: contains it."""
    weight: float = 1.0
    """Weight when several rewards are summed."""

    @model_validator(mode="after")
    def _one(self) -> RewardSpec:
        if sum(x is not None for x in (self.function, self.model, self.rule)) != 1:
            raise ValueError("give exactly one of function, model, rule")
        return self


class SamplingSpec(Section):
    """Rounds of generate, score, pair and train, with the knobs of arXiv:2404.14367."""

    rounds: Annotated[int, Field(ge=1)] = 4
    samples_per_round: Annotated[int, Field(ge=1)] = 64
    """Prompts per round (B): fewer per round is more on-policy for the same total."""
    completions: Annotated[int, Field(ge=2)] = 4
    """Completions per prompt (n)."""
    inner_passes: Annotated[int, Field(ge=1)] = 1
    """Passes over a round's samples (T)."""
    mixing_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of offline pairs (from `data`, which then needs chosen and rejected) in what a round trains on."""
    reference: Literal["base", "previous"] = "base"
    """Reference of the preference loss: the base, or the policy at the start of the round."""
    pairing: Literal["best_worst", "threshold"] = "best_worst"
    """One pair per prompt (best against worst), or every pair whose rewards differ by more than `threshold`."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """A pair is kept only if its rewards differ by more than this."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Prompts generated at once."""
    rwr_temperature: Positive = 1.0
    """`rwr` only: softmax temperature of the reward weights."""
    seed: int = 0


class QuantizationSpec(Section):
    """A base in 4 or 8 bits (bitsandbytes); adapters stay float32."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: str = "bfloat16"

    @model_validator(mode="after")
    def _one(self) -> QuantizationSpec:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("set exactly one of load_in_4bit and load_in_8bit")
        return self


class BaseSpec(Section):
    """How the base is loaded; its name is the recipe's `base_model`."""

    dtype: str = "auto"
    """torch dtype of the frozen weights (`bfloat16`), or `auto`: as stored."""
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: QuantizationSpec | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping | str | DataSpec) else value


def _named(value: Any) -> Any:
    return [{"path": item} if isinstance(item, str) else item for item in _as_list(value)] if value else value


DataList = Annotated[list[DataSpec], BeforeValidator(_named), Field(min_length=1)]


class AdapterSpec(Section):
    """One adapter of `adapters:`; see the README for an example of each objective."""

    objective: Objective
    data: DataList
    """Training rows; a list is a mixture."""
    eval_data: DataList | None = None
    lora: LoraSpec = LoraSpec()
    l1: L1Spec | None = None
    trim: TrimSpec | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    """Any field of the objective's TRL config, checked against it."""
    orpo: OrpoSpec = OrpoSpec()
    ift: IftSpec = IftSpec()
    sampling: SamplingSpec = SamplingSpec()
    reward: Annotated[list[RewardSpec], BeforeValidator(_as_list)] = Field(default_factory=list)
    """What scores completions (`on_policy`, `best_of_n`, `rwr`, `rloo`, `grpo`); several are summed."""
    base: BaseSpec = BaseSpec()
    chat_template: str | None = None
    """A jinja file, or a model whose tokenizer's template is taken; the base's own by default."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Preference data: cut longer prompts from the left (TRL dropped `max_prompt_length`)."""
    processes: Annotated[int, Field(ge=1)] = 1
    """GPUs, or processes on the CPU, that this adapter trains on (through accelerate)."""
    accelerate_config: str | None = None
    """A file for `accelerate launch --config_file` (FSDP and the like)."""

    @model_validator(mode="after")
    def _coherent(self) -> AdapterSpec:
        given = self.model_fields_set
        wrong = {"orpo": ("orpo",), "ift": ("ift",), "sampling": SAMPLING, "reward": (*SAMPLING, "rloo", "grpo")}
        for section, objectives in wrong.items():
            if section in given and self.objective not in objectives:
                raise ValueError(f"`{section}` has no meaning for objective {self.objective}; remove it")
        if self.objective in wrong["reward"] and not self.reward:
            raise ValueError(
                f"objective {self.objective} needs `reward`; e.g. reward: {{function: my_rewards:helpful}}"
            )
        if self.trim and self.lora.bias != "none":
            raise ValueError("`trim` writes a sparse adapter (SHiRA), which has no biases; use lora: {bias: none}")
        for key in sorted(OURS.keys() & self.training.keys()):
            raise ValueError(f"training.{key} cannot be set here; {OURS[key]}")
        return self


Where = Callable[[tuple[str | int, ...]], str]
"""Turns a path in the recipe into what a message starts with: `recipe.yaml:7: adapters.sft.l1`."""


def dotted(path: tuple[str | int, ...]) -> str:
    """Spell a path as it is written in messages: `adapters.sft.data[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def read_adapter(section: Any, name: str = "adapter", where: Where = dotted) -> AdapterSpec:
    """Read one adapter's mapping; raises `RecipeError` with every fault of it."""
    try:
        return AdapterSpec.model_validate(section)
    except ValidationError as error:
        raise RecipeError(_problems(error, ("adapters", name), where)) from None


def read_adapters(recipe: Mapping[str, Any], where: Where = dotted) -> dict[str, AdapterSpec]:
    """Read all of a recipe's `adapters:`; raises `RecipeError` with the faults of all of them at once."""
    sections = recipe.get("adapters")
    if not isinstance(sections, Mapping) or not sections:
        raise RecipeError.of("ADAPTERS", where(("adapters",)), "no adapters to train", "add adapters: {sft: {...}}")
    specs: dict[str, AdapterSpec] = {}
    problems: list[Problem] = []
    for name, section in sections.items():
        try:
            specs[str(name)] = read_adapter(section, str(name), where)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return specs


def _problems(error: ValidationError, prefix: tuple[str, ...], where: Where) -> list[Problem]:
    found = []
    for fault in error.errors(include_url=False, include_context=False):
        path = tuple(part for part in fault["loc"] if part not in ("str", "list[str]", "int"))
        if fault["type"] == "extra_forbidden":
            known = _fields_at(path[:-1])
            found.append(Problem("KEY", where((*prefix, *path)), "unknown key", did_you_mean(str(path[-1]), known)))
        else:
            what = fault["msg"].removeprefix("Value error, ")
            given = fault.get("input")
            shown = f", got {given!r}" if isinstance(given, str | int | float) and "got" not in what else ""
            found.append(Problem("VALUE", where((*prefix, *path)), what + shown))
    return found


def _fields_at(path: tuple[str | int, ...]) -> list[str]:
    """Names that are known at `path` below an adapter."""
    model: type[BaseModel] = AdapterSpec
    sections: dict[str, type[BaseModel]] = {
        "data": DataSpec, "eval_data": DataSpec, "lora": LoraSpec, "l1": L1Spec, "trim": TrimSpec, "orpo": OrpoSpec,
        "ift": IftSpec, "sampling": SamplingSpec, "reward": RewardSpec, "base": BaseSpec,
        "quantization": QuantizationSpec,
    }  # fmt: skip
    for part in path:
        model = sections.get(part, model) if isinstance(part, str) else model
    return [field.alias or name for name, field in model.model_fields.items()]


def did_you_mean(word: str, known: list[str]) -> str:
    """A hint for a misspelt key: the nearest known one, or all of them when few."""
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if len(known) <= 24 else ""
