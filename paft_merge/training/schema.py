"""The section `adapters:` of a recipe as frozen models. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from paft_merge.errors import Problems, RecipeError
from paft_merge.recipe.sections import Section, as_list, exactly_one, former_keys, read_section, suggestion
from paft_merge.recipe.yaml_source import Located, refuse_secrets
from paft_merge.training.engine_schema import EngineSpec, check_temperature

Objective = Literal["sft", "dpo", "orpo", "ift", "on_policy", "best_of_n", "rwr", "rloo", "grpo", "mixed"]
SAMPLING: tuple[Objective, ...] = ("on_policy", "best_of_n", "rwr")
"""Objectives that generate, score and train on generated text, round by round."""
MIXABLE: tuple[Objective, ...] = ("sft", "ift", "dpo", "orpo")
"""Objectives of fixed rows, which can be parts of a mixed adapter."""

OURS = {
    "output_dir": "the adapter is written to OUT/NAME",
    "resume_from_checkpoint": "use resume=True",
    "push_to_hub": "use the section push: of the recipe",
    "model_init_kwargs": "use base: {...} of the adapter",
    "remove_unused_columns": "the trainers choose their columns",
    "logging_nan_inf_filter": "a non-finite loss always stops a run",
    "chat_template_path": "use chat_template: of the adapter",
    "trust_remote_code": "use base: {trust_remote_code: true} of the adapter",
}
"""Fields of the TRL configs that `training:` may not set, and their replacements."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    return value


Positive = Annotated[float, Field(gt=0), AfterValidator(_finite)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Density = Annotated[float, Field(gt=0, le=1)]


class DataSpec(Section):
    """A data set: on the Hub, a local .json/.jsonl/.parquet/.csv file, or a folder."""

    path: str
    """Hub name, file, or folder (also one written by `Dataset.save_to_disk`)."""
    name: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split, in the notation of `datasets` (`train_sft[:1000]`)."""
    data_dir: str | None = None
    """Folder of the data set's repository that has the files."""
    data_files: str | list[str] | None = None
    """Files of the data set's repository or folder."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, old name to new name."""
    columns: list[str] | None = None
    """Columns to keep, after renaming; all by default."""
    fraction: Positive | None = None
    """Share of this set in a mixture; give it for all sets or none. Rows are not repeated, so the smallest set limits all."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows from the start."""

    RENAMED: ClassVar[Mapping[Any, str]] = {"take": "max_rows"}


class LoraSpec(Section):
    """The LoRA. Other fields of `peft.LoraConfig` go under `extra`."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    lora_alpha: Positive = 16
    """The delta is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the inputs of the factors that is dropped in training."""
    target_modules: str | list[str] = "all-linear"
    """Module names, a regular expression, or `all-linear` (every linear layer but the head)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained: none, all, or those of layers with a LoRA."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole, such as `lm_head`."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of `peft.LoraConfig`, checked against it."""


class L1Spec(Section):
    """The L1 term that makes the update sparse during training."""

    strength: Positive = 1e-4
    """Weight of the *sum* of absolute values (PAFT: 1e-4 to 1e-3). With `target`, the initial strength."""
    penalize: Literal["product", "factors"] | None = None
    """The penalised matrix: the delta `scale * B @ A` (`product`, as in PAFT; default) or A and B (`factors`)."""
    mode: Literal["penalty", "prox"] = "penalty"
    """`penalty` adds to the gradient; `prox` shrinks the factors after each optimizer step and gives exact zeros."""
    warmup: Annotated[float, Field(ge=0)] | None = None
    """Ramp of the strength: optimizer steps if >= 1, else a share of the run. Default: 0 for penalty, 0.1 for prox."""
    cap: Positive = 10.0
    """`prox` only: largest threshold, in units of the learning rate."""
    target: OpenShare | None = None
    """Sparsity to reach (share of |delta| < 1e-5, mean over matrices); the strength is then adjusted automatically."""

    RENAMED: ClassVar[Mapping[Any, str]] = {"on": "penalize", True: "penalize"}  # YAML 1.1 reads `on` as true

    @property
    def penalized(self) -> Literal["product", "factors"]:
        """`penalize` with its default resolved: `factors` for `prox`, else `product`."""
        return self.penalize or ("factors" if self.mode == "prox" else "product")

    @model_validator(mode="after")
    def _possible(self) -> L1Spec:
        if self.mode == "prox" and self.penalize == "product":
            raise ValueError(
                "the proximal step works on factors: the product has no cheap proximal operator; "
                "use penalize: factors, or mode: penalty"
            )
        return self


class TrimSpec(Section):
    """Magnitude pruning of the trained delta, the baseline of sparse training."""

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
    """Use the weights without gradient: no token's probability is lowered, but this is not the authors' method."""


class RewardSpec(Section):
    """A reward of completions: exactly one of `function`, `model` and `rule`."""

    model_config = ConfigDict(json_schema_extra=exactly_one("function", "model", "rule"))

    function: str | None = None
    """`rewards.py:f` (a file beside the recipe) or `package.module:f`, called as TRL calls reward functions:
    `f(prompts=, completions=, **columns) -> list[float]`."""
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


class SamplingSpec(EngineSpec):
    """Rounds of generate, score, pair and train, with the parameters of arXiv:2404.14367."""

    rounds: Annotated[int, Field(ge=1)] = 4
    """Rounds of generating and training."""
    samples_per_round: Annotated[int, Field(ge=1)] = 64
    """Prompts per round (B)."""
    completions: Annotated[int, Field(ge=2)] = 4
    """Completions per prompt (n)."""
    inner_passes: Annotated[int, Field(ge=1)] = 1
    """Passes over a round's samples (T)."""
    mixing_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of offline pairs (from `data`, which then needs chosen and rejected) in the rows of a round."""
    reference: Literal["base", "previous"] = "base"
    """Reference of the preference loss: the base, or the policy at the start of the round."""
    pairing: Literal["best_worst", "threshold"] = "best_worst"
    """One pair per prompt (best against worst), or every pair whose rewards differ by more than `threshold`."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """A pair is kept only if its rewards differ by more than this."""
    temperature: Positive = 1.0
    """Temperature of the completions."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability from which tokens are sampled."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest completion, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Prompts generated at once."""
    rwr_temperature: Positive = 1.0
    """`rwr` only: softmax temperature of the reward weights."""
    seed: int = 0
    """Seed of the prompts and completions."""

    @model_validator(mode="after")
    def _sampled_by_vllm(self) -> SamplingSpec:
        if self.engine == "vllm":
            check_temperature(self.temperature)
        return self


class QuantizationSpec(Section):
    """A base in 4 or 8 bits (bitsandbytes); adapters stay float32."""

    load_in_4bit: bool = False
    """Load the weights in 4 bits."""
    load_in_8bit: bool = False
    """Load the weights in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales, too."""
    bnb_4bit_compute_dtype: str = "bfloat16"
    """torch dtype of the products."""

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
    """transformers' name of the attention, such as `sdpa`."""
    revision: str | None = None
    """Commit, tag or branch of a Hub repository."""
    trust_remote_code: bool = False
    """Run the model's own code from its repository; needs `--trust-code`."""
    quantization: QuantizationSpec | None = None
    """Load the base in 4 or 8 bits."""


def _named(value: Any) -> Any:
    return [{"path": item} if isinstance(item, str) else item for item in as_list(value)] if value else value


DataList = Annotated[
    list[DataSpec],
    BeforeValidator(
        _named,
        json_schema_input_type=str | DataSpec | Annotated[list[str | DataSpec], Field(min_length=1)],
    ),
    Field(min_length=1),
]


def _mixed_or_own(schema: dict[str, Any]) -> None:
    """The rule of the JSON Schema of an adapter that a mixed one has parts, and every other one data."""
    schema["required"].remove("data")
    own = ("data", "eval_data", "l1", "max_prompt_tokens")
    schema["if"] = {"properties": {"objective": {"const": "mixed"}}}
    schema["then"] = {"required": ["parts"], "properties": dict.fromkeys(own, False)}
    schema["else"] = {"required": ["data"], "properties": {"parts": False, "ratio": False}}


class AdapterSpec(Section):
    """One adapter of `adapters:`. docs/training.md has an example of each objective."""

    model_config = ConfigDict(json_schema_extra=_mixed_or_own)

    objective: Objective
    """The objective: `sft`; `dpo`, `orpo` (preference pairs); `ift`; `on_policy`, `best_of_n`, `rwr`, `rloo`, `grpo`
    (generated text and a reward); or `mixed`, several of the others in one adapter."""
    data: DataList
    """Training rows; a list is a mixture."""
    eval_data: DataList | None = None
    """Rows on which the loss is measured during training."""
    lora: LoraSpec = LoraSpec()
    """The LoRA that is trained."""
    l1: L1Spec | None = None
    """Sparse training."""
    trim: TrimSpec | None = None
    """Magnitude pruning after training."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Any field of the objective's TRL config, checked against it."""
    orpo: OrpoSpec = OrpoSpec()
    """Parameters of objective `orpo`."""
    ift: IftSpec = IftSpec()
    """Parameters of objective `ift`."""
    sampling: SamplingSpec = SamplingSpec()
    """Rounds of objectives `on_policy`, `best_of_n` and `rwr`."""
    reward: Annotated[list[RewardSpec], BeforeValidator(as_list)] = Field(default_factory=list)
    """Rewards of completions (`on_policy`, `best_of_n`, `rwr`, `rloo`, `grpo`); several are summed."""
    base: BaseSpec = BaseSpec()
    """How the base is loaded."""
    chat_template: str | None = None
    """A name (`chatml`, as in `merge:`), a Jinja file, or a model whose template is used. Default: the base's own."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Preference data: cut longer prompts from the left (TRL dropped `max_prompt_length`)."""
    processes: Annotated[int, Field(ge=1)] = 1
    """GPUs, or CPU processes, that train this adapter (through accelerate)."""
    accelerate_config: str | None = None
    """A file for `accelerate launch --config_file` (FSDP and the like)."""
    parts: Annotated[
        dict[str, AdapterSpec] | None,
        WithJsonSchema({"type": ["array", "null"], "items": {"type": "string"}, "minItems": 2, "uniqueItems": True}),
    ] = None
    """`mixed` only: the sections of the adapters whose objectives are trained together, by name. A recipe lists the names."""
    ratio: Annotated[
        dict[str, Annotated[float, Field(ge=0), AfterValidator(_finite)]] | None,
        WithJsonSchema(
            {
                "type": ["number", "object", "null"],
                "minimum": 0,
                "additionalProperties": {"type": "number", "minimum": 0},
            }
        ),
    ] = None
    """`mixed` only: the relative number of optimizer steps of each part, or for two parts one number: steps of the second
    per step of the first. Default: each part has as many steps as alone."""

    @model_validator(mode="before")
    @classmethod
    def _of_parts(cls, given: Any) -> Any:
        return _filled(given) if isinstance(given, Mapping) and given.get("objective") == "mixed" else given

    @model_validator(mode="after")
    def _coherent(self) -> AdapterSpec:
        given = self.model_fields_set
        if self.objective == "mixed":
            _check_parts(self)
        elif mixed := {"parts", "ratio"} & given:
            raise ValueError(f"`{min(mixed)}` has no effect for objective {self.objective}; remove it")
        wrong = {"orpo": ("orpo",), "ift": ("ift",), "sampling": SAMPLING, "reward": (*SAMPLING, "rloo", "grpo")}
        for section, objectives in wrong.items():
            if section in given and self.objective not in objectives:
                raise ValueError(f"`{section}` has no effect for objective {self.objective}; remove it")
        if self.objective in wrong["reward"] and not self.reward:
            example = 'reward: {function: "rewards.py:helpful"}'
            raise ValueError(f"objective {self.objective} needs `reward`; e.g. {example}")
        if self.trim and self.lora.bias != "none":
            raise ValueError("`trim` writes a sparse adapter (SHiRA), which has no biases; use lora: {bias: none}")
        for key in sorted(OURS.keys() & self.training.keys()):
            raise ValueError(f"training.{key} cannot be set here; {OURS[key]}")
        return self


WITHOUT_EVALUATION = {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
"""Fields of the TRL config of a training that does not evaluate."""

_OF_PARTS = ("lora", "base", "l1", "trim", "chat_template", "processes")
"""Keys that a mixed adapter takes from the first part that has them."""


def _filled(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """A mixed adapter's section with the data and the settings of its parts, and `ratio` as a mapping."""
    for key in ("data", "eval_data", "l1", "max_prompt_tokens"):
        if key in given:
            raise ValueError(f"`{key}` of a mixed adapter is that of its parts; remove it")
    parts = given.get("parts")
    if not isinstance(parts, Mapping) or len(parts) < 2:
        raise ValueError("objective mixed needs `parts`, the names of two or more adapters; e.g. parts: [sft, dpo]")
    own = [
        one.model_dump(exclude_unset=True, by_alias=True) if isinstance(one, AdapterSpec) else one
        for one in parts.values()
    ]
    sections = [one for one in own if isinstance(one, Mapping)]
    filled: dict[Any, Any] = {**given, "data": [one for part in sections for one in as_list(part.get("data") or [])]}
    for key in _OF_PARTS:
        found = [part[key] for part in sections if part.get(key) is not None]
        if found and key not in given:
            filled[key] = found[0]
            if key in ("lora", "base") and any(part.get(key) != found[0] for part in sections):
                raise ValueError(
                    f"`{key}` differs between the parts {', '.join(parts)}; write the mixed adapter's {key}:"
                )
            if key == "l1" and len(found) > 1:
                raise ValueError("only one part of a mixed adapter can have `l1`")
    ratio = given.get("ratio")
    if isinstance(ratio, int | float) and not isinstance(ratio, bool):
        if not ratio >= 0:
            raise ValueError(f"`ratio` must be a number of at least 0, or one for each part by name; got {ratio}")
        if len(parts) > 2:
            example = ", ".join(f"{name}: 1" for name in parts)
            raise ValueError(f"one `ratio` is for two parts, and there are {len(parts)}; write ratio: {{{example}}}")
        first, second = parts
        filled["ratio"] = {first: 0, second: 1} if ratio == math.inf else {first: 1, second: ratio}
    return filled


def _check_parts(spec: AdapterSpec) -> None:
    """Raise ValueError for parts that cannot be trained together, and for a wrong ratio."""
    parts, ratio = spec.parts or {}, spec.ratio
    for name, part in parts.items():
        if part.objective not in MIXABLE:
            why = (
                "it has parts itself"
                if part.objective == "mixed"
                else f"{part.objective} generates the text it is trained on"
            )
            raise ValueError(f"{name} cannot be a part of a mixed adapter: {why}")
        if part.accelerate_config:
            raise ValueError(
                f"{name} cannot be a part of a mixed adapter: it has an accelerate_config, and mixed uses DDP"
            )
    if spec.accelerate_config:
        raise ValueError("a mixed adapter uses DDP; use processes: instead of accelerate_config")
    if ratio is not None and (set(ratio) != set(parts) or not sum(ratio.values())):
        raise ValueError(f"`ratio` needs a number for each of the parts {', '.join(parts)}, at least one above 0")


def trained_parts(spec: AdapterSpec) -> dict[str, AdapterSpec]:
    """The parts of a mixed adapter that have steps, by name, with its LoRA, base and `training` (but for the total of steps)."""
    shared = {key: value for key, value in spec.training.items() if key != "max_steps"} | WITHOUT_EVALUATION
    ours = {"lora": spec.lora, "base": spec.base, "processes": spec.processes, "trim": None, "eval_data": None}
    return {
        name: part.model_copy(update={**ours, "training": {**part.training, **shared}})
        for name, part in (spec.parts or {}).items()
        if spec.ratio is None or spec.ratio[name] > 0
    }


def settings_of(spec: AdapterSpec, base: str) -> dict[str, Any]:
    """The settings that two runs of an adapter must share: the name of its base, and its section with the former keys."""
    section = spec.model_dump(mode="json", by_alias=True, exclude={"processes", "accelerate_config"})
    return {"base": base, "spec": former_keys(AdapterSpec, section)}


def read_adapter(section: Any, name: str = "adapter") -> AdapterSpec:
    """Read one adapter's section; raises `RecipeError` with every fault."""
    located = section if isinstance(section, Located) else Located(section, prefix=("adapters", name))
    refuse_secrets(located.data)
    return read_section(AdapterSpec, located)


def is_existing(section: Any) -> bool:
    """Whether an entry of `adapters:` names an adapter that exists, as a path or `{path: ...}`; it is not trained."""
    return isinstance(section, str) or (isinstance(section, Mapping) and "path" in section)


def read_adapters(recipe: Located | Mapping[str, Any]) -> dict[str, AdapterSpec]:
    """Read the entries of a recipe's `adapters:` that are trained; raises `RecipeError` with the faults of all of them."""
    located = recipe if isinstance(recipe, Located) else Located(recipe)
    refuse_secrets(located.data)
    sections = located.data.get("adapters")
    if not isinstance(sections, Mapping) or not sections:
        where = located.spot(("adapters",))
        raise RecipeError.of("ADAPTERS", where, "no adapters to train", "add adapters: {sft: {...}}")
    specs, problems = dict[str, AdapterSpec](), Problems()
    mixed = [name for name, section in sections.items() if _is_mixed(section)]
    for name in (*(name for name in sections if name not in mixed), *mixed):
        if is_existing(sections[name]):
            continue
        with problems.catching():
            own = located.sub("adapters", name)
            if name in mixed and problems.found:
                continue  # a part may be one that has problems
            specs[str(name)] = read_adapter(_with_parts(own, sections, specs) if name in mixed else own, str(name))
    problems.raise_as(RecipeError)
    return {str(name): specs[str(name)] for name in sections if str(name) in specs}


def _is_mixed(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("objective") == "mixed"


def _with_parts(located: Located, sections: Mapping[Any, Any], specs: Mapping[str, AdapterSpec]) -> Located:
    """A mixed adapter's section with the sections of the adapters that its `parts` name.

    Raises:
        RecipeError: ADAPTERS, a name that is not an adapter that the recipe trains, or that is there twice.
    """
    names = located.data.get("parts")
    if not isinstance(names, list):
        return located
    problems, where = Problems(), located.spot(("parts",))
    for at, name in enumerate(names):
        if name in sections and is_existing(sections[name]):
            problems.add("ADAPTERS", where, f"{name} exists already, and a part is trained", "name a section")
        elif not isinstance(name, str) or name not in sections:
            problems.add("ADAPTERS", where, f"no adapter {name!r}", suggestion(name, specs))
        elif _is_mixed(sections[name]):
            problems.add("ADAPTERS", where, f"{name} has parts itself", "name those")
        elif name in names[:at]:
            problems.add("ADAPTERS", where, f"{name} is there twice", "use ratio: to weight a part")
    problems.raise_as(RecipeError)
    return replace(located, data={**located.data, "parts": {name: specs[name] for name in names}})
