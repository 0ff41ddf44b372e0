"""The section `evaluate:` of a recipe as frozen models: what is measured of a model, on what. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from paft_merge.recipe.sections import Section, as_list, read_section
from paft_merge.recipe.yaml_source import Located

Kind = Literal["exact_match", "preference", "reward", "perplexity"]

LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""Metrics of which less is better; of every other, more."""


class Measurement(Section):
    """One light evaluation: a kind, its file, and what that kind needs."""

    kind: Kind
    """`exact_match`: greedy answers that equal the row's; `preference`: pairs whose chosen answer is the likelier;
    `reward`: the mean of a Python function of answers; `perplexity`: exp of the mean loss of a token."""
    data: str
    """A .jsonl file of rows (`perplexity`: a text file), beside the recipe or where the path says."""
    prompt: str = "prompt"
    """Column of the prompt: text, or a list of chat turns."""
    answer: str | None = None
    """`exact_match`: column of the right answer; `answer`, else `completion`, by default."""
    extract: str | None = None
    r"""`exact_match`: a regular expression whose first group is the answer in what was generated (`#### (-?\d+)`)."""
    function: str | None = None
    """`reward`: `rewards.py:f` (a file beside the recipe) or `package.module:f`, called as TRL calls reward functions:
    `f(prompts=, completions=, **columns) -> list[float]`."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """`reward`: sample answers at this temperature, with the section's seed; 0 for greedy ones."""
    normalize: bool = False
    """`preference`: compare the mean over tokens instead of the sum, so that length does not count."""
    unit: Literal["text", "line"] = "text"
    """`perplexity`: windows of the whole text, or every line separately."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows or lines from the start."""

    RENAMED: ClassVar[Mapping[Any, str]] = {"take": "max_rows", "by": "unit"}

    @model_validator(mode="after")
    def _coherent(self) -> Measurement:
        if (self.kind == "reward") != (self.function is not None):
            raise ValueError(
                "kind: reward needs `function`"
                if self.kind == "reward"
                else f"`function` means nothing for {self.kind}"
            )
        if self.temperature and self.kind != "reward":
            raise ValueError(f"`temperature` means nothing for {self.kind}")
        if self.kind != "exact_match":
            for key in ("answer", "extract"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` means nothing for {self.kind}")
        return self


class EvaluateSpec(Section):
    """The section `evaluate:`."""

    metrics: dict[str, Measurement] = Field(default_factory=dict)
    """Light evaluations by name; they need no further package."""
    suite: Literal["open-llm-v1"] | None = None
    """A fixed list of lm-eval tasks with their numbers of shots."""
    tasks: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    """lm-eval tasks: names, or YAML files of your own."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Of `tasks`; by default what each task says. A suite has its own."""
    limit: Annotated[float, Field(gt=0)] | None = None
    """lm-eval: the first so many rows of each task, or a share of them when below 1."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens that a model sees at once; by default what its config says, at most 4096."""
    dtype: str = "auto"
    """Type of the weights while evaluating; `auto` is float32 on a CPU and the stored one on a GPU."""
    device: str | None = None
    """`cuda`, `cpu`; by default a GPU where there is one."""
    seed: int = 0

    @property
    def needs_lm_eval(self) -> bool:
        """Whether the extra `[eval]` is needed."""
        return bool(self.suite or self.tasks)


def read_evaluate(located: Located) -> EvaluateSpec:
    """Read the section `evaluate:`.

    Raises:
        RecipeError: every fault of it, with its line.
    """
    return read_section(EvaluateSpec, located)
