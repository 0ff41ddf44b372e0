"""The section `evaluate:` of a recipe as frozen models. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from paft_merge.recipe.sections import Section, as_list, read_section
from paft_merge.recipe.yaml_source import Located
from paft_merge.training.engine_schema import Engine, EngineSpec, check_temperature

Kind = Literal["exact_match", "preference", "reward", "perplexity", "self_consistency", "agreement"]

GENERATING: tuple[Kind, ...] = ("exact_match", "reward", "self_consistency", "agreement")
"""Kinds that compare generated answers."""

HARNESS = "lm-eval"
"""The name of all lm-eval tasks together, in `only` and `progress`."""

SPARSITY = "sparsity"
"""The column of a run's table with the share of entries that a model did not change."""

SAMPLES = 8
"""Answers to each prompt of `self_consistency`, unless the metric has `samples`."""

LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""Metrics whose lower values are better."""


class Measurement(Section):
    """One light evaluation: its kind, its data, and the parameters of that kind."""

    kind: Kind
    """`exact_match`: greedy answers that equal the row's; `preference`: pairs whose chosen answer is more likely;
    `reward`: the mean of a Python function of answers; `perplexity`: exp of the mean loss per token; `self_consistency`: the
    share of sampled answers to a prompt that equal the most frequent one; `agreement`: the share of prompts whose greedy
    answer is that of other models."""
    data: str
    """A .jsonl file of rows (`perplexity`: a text file), relative to the recipe or to the working directory."""
    prompt: str = "prompt"
    """Column of the prompt: text, or a list of chat turns."""
    answer: str | None = None
    """`exact_match`: column of the right answer; default: `answer`, else `completion`."""
    extract: str | None = None
    r"""`exact_match`, `self_consistency`, `agreement`: a regular expression whose first group is the answer in the output
    (`#### (-?\d+)`)."""
    function: str | None = None
    """`reward`: `rewards.py:f` (a file beside the recipe) or `package.module:f`, called as TRL calls reward functions:
    `f(prompts=, completions=, **columns) -> list[float]`."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """`reward`, `self_consistency`: sample answers at this temperature, with the section's seed. 0, the default of `reward`:
    greedy ones; `self_consistency` has 1.0 by default."""
    samples: Annotated[int, Field(ge=2)] | None = None
    """`self_consistency`: answers to each prompt; 8 by default."""
    sources: Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)] | None = Field(
        None, alias="with"
    )
    """`agreement`: the models whose answers count, each a name of `adapters:`, `base`, or a model as in `paft evaluate MODEL`.
    Of several, the most frequent answer counts; if several answers are equally frequent, each of them."""
    normalize: bool = False
    """`preference`: compare the mean over tokens instead of the sum, so that length has no influence."""
    unit: Literal["text", "line"] = "text"
    """`perplexity`: windows of the whole text, or every line separately."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows or lines from the start."""

    RENAMED: ClassVar[Mapping[Any, str]] = {"take": "max_rows", "by": "unit"}

    @model_validator(mode="before")
    @classmethod
    def _sampled(cls, given: Any) -> Any:
        sampled = isinstance(given, Mapping) and given.get("kind") == "self_consistency"
        return {"temperature": 1.0, **given} if sampled else given

    @model_validator(mode="after")
    def _coherent(self) -> Measurement:
        if (self.kind == "reward") != (self.function is not None):
            raise ValueError(
                "kind: reward needs `function`"
                if self.kind == "reward"
                else f"`function` has no effect for {self.kind}"
            )
        if (self.kind == "agreement") != (self.sources is not None):
            raise ValueError(
                "kind: agreement needs `with`, the models to agree with"
                if self.kind == "agreement"
                else f"`with` has no effect for {self.kind}"
            )
        if len(set(self.sources or ())) < len(self.sources or ()):
            raise ValueError("`with` names a model twice")
        sampled = self.kind == "self_consistency"
        if self.temperature and self.kind != "reward" and not sampled:
            raise ValueError(f"`temperature` has no effect for {self.kind}")
        if sampled and not self.temperature:
            raise ValueError("self_consistency needs a `temperature` above 0: greedy answers are all equal")
        if self.samples is not None and not sampled:
            raise ValueError(f"`samples` has no effect for {self.kind}")
        if self.answer is not None and self.kind != "exact_match":
            raise ValueError(f"`answer` has no effect for {self.kind}")
        if self.extract is not None and self.kind not in ("exact_match", "agreement") and not sampled:
            raise ValueError(f"`extract` has no effect for {self.kind}")
        return self


class EvaluateSpec(EngineSpec):
    """The section `evaluate:`."""

    metrics: dict[str, Measurement] = Field(default_factory=dict)
    """Light evaluations by name; they need no further packages."""
    suite: Literal["open-llm-v1"] | None = None
    """A fixed list of lm-eval tasks with their numbers of shots."""
    tasks: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    """lm-eval tasks: names, or your YAML files."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Number of shots of `tasks`; default: the task's. A suite defines its own."""
    limit: Annotated[float, Field(gt=0)] | None = None
    """lm-eval: number of rows per task, or a share of them if below 1."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows that the model reads at once."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Context length in tokens; default: from the model's config, at most 4096."""
    dtype: str = "auto"
    """dtype of the weights; `auto` is float32 on a CPU and the stored dtype on a GPU."""
    device: str | None = None
    """`cuda` or `cpu`; default: a GPU if there is one."""
    seed: int = 0
    """Seed of sampled answers."""

    @field_validator("metrics")
    @classmethod
    def _not_reserved(cls, given: dict[str, Measurement]) -> dict[str, Measurement]:
        for name, of in ((HARNESS, "all lm-eval tasks together"), (SPARSITY, "a column of a run's table")):
            if name in given:
                raise ValueError(f"{name!r} is the name of {of}; give the metric another one")
        return given

    @model_validator(mode="after")
    def _answered_by_vllm(self) -> EvaluateSpec:
        if self.engine != "vllm":
            return self
        asked = [of for of in self.metrics.values() if of.kind in GENERATING]
        if not asked:
            raise ValueError(
                f"`engine: vllm` has no effect: it generates answers for {', '.join(GENERATING)}, and no metric is one; "
                "perplexity, preference and lm-eval's tasks need logits, which transformers computes"
            )
        if self.device not in (None, "cuda"):
            raise ValueError(
                f"engine: vllm needs a GPU, and device is {self.device}; choose one by CUDA_VISIBLE_DEVICES"
            )
        for of in asked:
            check_temperature(of.temperature)
        return self

    def engine_of(self, name: str) -> Engine:
        """What evaluates a metric, or lm-eval's tasks: vLLM generates, and transformers computes logits."""
        generates = name in self.metrics and self.metrics[name].kind in GENERATING
        return self.engine if generates else "transformers"

    @property
    def needs_lm_eval(self) -> bool:
        """Whether the extra `[eval]` is needed."""
        return bool(self.suite or self.tasks)


def read_evaluate(located: Located) -> EvaluateSpec:
    """Read the section `evaluate:`.

    Raises:
        RecipeError: with every fault and its line.
    """
    return read_section(EvaluateSpec, located)
