"""Rewards of completions: a Python function, a reward model or a rule, all with TRL's signature of reward functions."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paft_merge.errors import PaftMergeError, Problems, TrainError, first_line
from paft_merge.inputs.model_config import refuse_odd_files
from paft_merge.recipe.sections import beside_recipe
from paft_merge.recipe.trust import announce, file_of, functions_in, needs_trust
from paft_merge.recipe.yaml_source import did_you_mean
from paft_merge.training.base_model import check_tokenizer
from paft_merge.training.schema import RewardSpec

Reward = Callable[..., list[float]]
"""`f(prompts=[...], completions=[...], **columns of the rows) -> one number per completion`."""


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string or a list of chat turns."""
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)


def _length(completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(len(text_of(c).split())) for c in completions]


def _short(completions: Sequence[Any], **_: Any) -> list[float]:
    return [-float(len(text_of(c).split())) for c in completions]


def _match(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    return [float(text_of(c).strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]


def _contains(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    return [float(a in text_of(c)) for c, a in zip(completions, answer, strict=True)]


RULES: dict[str, Reward] = {"length": _length, "short": _short, "match": _match, "contains": _contains}


_FORM = "write rewards.py:function (a file beside the recipe) or package.module:function"


def check_function(name: str, folder: Path = Path(), *, trust_code: bool = False) -> None:
    """Check the function that a recipe names without running its code: the file exists, parses and defines it.

    Raises:
        TrainError: REWARD; TRUST, the file does not lie beside the recipe and `trust_code` is false.
    """
    problems, file, function = Problems(), file_of(name, folder), name.rpartition(":")[2]
    if not trust_code and (problem := needs_trust(name, file, folder)):
        problems.found.append(problem)
    try:
        if file is None:
            raise ModuleNotFoundError(f"No module named {name.rpartition(':')[0]!r}")
        known = functions_in(file) if file.suffix == ".py" else None
    except (OSError, ImportError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TrainError.of("REWARD", name, f"cannot be imported: {type(error).__name__}: {error}", _FORM) from error
    if known is not None and function not in known:
        what = f"{file} has no function {function!r}"
        problems.add("REWARD", name, what, did_you_mean(function, known) or "name a function")
    problems.raise_as(TrainError)


def load_function(name: str, folder: Path = Path()) -> Reward:
    """Load the function that a recipe calls `rewards.py:f` (a file beside the recipe) or `package.module:f`.

    This runs the code, and logs its name first; `check_function` is the check that the user allows it.

    Modules are found on `sys.path` and in the working directory.

    Raises:
        TrainError: REWARD, with the reason.
    """
    source, _, function = name.rpartition(":")
    file = beside_recipe(source, folder) if source.endswith(".py") else None
    announce(name, file_of(name, folder))
    try:
        module = _run_file(file) if file else _import(source)
    except Exception as error:  # the module's own code may raise anything
        what = f"cannot be imported: {type(error).__name__}: {error}"
        raise TrainError.of("REWARD", name, what, _FORM) from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value)]
        what = f"{file or source} has no function {function!r}"
        raise TrainError.of("REWARD", name, what, did_you_mean(function, functions) or "name a function")
    return found  # type: ignore[no-any-return]


def _import(name: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _run_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"paft_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_reward(name: str) -> Reward:
    """A reward that is the first logit of a sequence-classification model for prompt and completion.

    Raises:
        TrainError: REWARD, when the model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    refuse_odd_files(Path(name))
    try:
        check_tokenizer(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, trust_remote_code=False)
    except PaftMergeError:
        raise
    except Exception as error:  # transformers raises anything on unknown files
        what = f"the reward model cannot be loaded: {first_line(error)}"
        raise TrainError.of("REWARD", name, what, "give a sequence-classification model") from error
    model = model.eval()
    if torch.cuda.is_available():
        model = model.to("cuda")

    @torch.no_grad()
    def score(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        texts = [_joined(p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
        scores = []
        for one in texts:  # one at a time: a reward must not depend on the padding of its batch
            ids = tokenizer(one, return_tensors="pt", truncation=True).to(model.device)
            scores.append(float(model(**ids).logits[0, 0]))
        return scores

    score.__name__ = Path(name).name
    return score


def _joined(prompt: Any, completion: Any, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt + text_of(completion)
    turns = [*prompt, *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}])]
    joined: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return joined


def reward_functions(specs: Sequence[RewardSpec], folder: Path = Path()) -> list[Reward]:
    """Load the functions of the section `reward:`, multiplied by their weights; `folder` is the recipe's."""
    return [_weighted(_resolve(spec, folder), spec.weight) for spec in specs]


def _resolve(spec: RewardSpec, folder: Path) -> Reward:
    if spec.function:
        return load_function(spec.function, folder)
    return model_reward(spec.model) if spec.model else RULES[str(spec.rule)]


def _weighted(reward: Reward, weight: float) -> Reward:
    def scored(**given: Any) -> list[float]:
        return [weight * float(score) for score in reward(**given)]

    scored.__name__ = getattr(reward, "__name__", "reward").lstrip("_")
    return scored


def total(functions: Sequence[Reward], **given: Any) -> list[float]:
    """Sum the scores of several rewards.

    Args:
        functions: The rewards.
        given: `prompts`, `completions` and the columns of the rows.

    Raises:
        TrainError: REWARD, for a wrong signature or number of scores; NONFINITE, for a score that is not finite.
    """
    count = len(given["completions"])
    sums = [0.0] * count
    for function in functions:
        try:
            scores = list(function(**given))
        except TypeError as error:
            fix = "accept prompts=, completions= and the columns of the rows"
            raise TrainError.of("REWARD", function.__name__, f"cannot be called: {error}", fix) from error
        if len(scores) != count:
            what = f"returned {len(scores)} score{'s' * (len(scores) != 1)} for {count} completions"
            raise TrainError.of("REWARD", function.__name__, what, "return one number per completion")
        if not all(math.isfinite(score) for score in scores):
            what = "returned a score that is not finite"
            raise TrainError.of("NONFINITE", function.__name__, what, "return finite numbers")
        sums = [s + score for s, score in zip(sums, scores, strict=True)]
    return sums
