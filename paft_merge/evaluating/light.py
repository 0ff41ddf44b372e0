"""Light evaluations: exact match, preference pairs, a reward of answers, perplexity, self-consistency, agreement.

B = rows of a batch, T = tokens, V = vocabulary. Every kind gives one number per row, so that two models can be compared row
by row. The score is their mean (`perplexity`: exp of the mean over tokens).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

from paft_merge.errors import DOCS, EvaluateError
from paft_merge.evaluating.agreement import agrees, consistency
from paft_merge.evaluating.data_rows import read_lines, rows_for
from paft_merge.evaluating.loading import EvaluatedModel
from paft_merge.evaluating.schema import SAMPLES, Measurement
from paft_merge.inputs.adapters.patterns import PatternError
from paft_merge.recipe.sections import beside_recipe
from paft_merge.training.base_model import without_row
from paft_merge.training.child_process import in_child, match_in_time
from paft_merge.training.generation import complete, padded
from paft_merge.training.rendering import attempted, within_limits
from paft_merge.training.rewards import load_function, text_of, total
from paft_merge.training.row_files import Row
from paft_merge.training.row_parts import roles_of

log = logging.getLogger(__name__)

_MOST_SECONDS = 60.0
"""Time that `extract` may take for the answers of one evaluation."""


@dataclass(frozen=True)
class Score:
    """One evaluation: its value, standard error and rows."""

    value: float
    stderr: float | None
    rows: tuple[float, ...] = field(repr=False)
    """Values by row, in the order of the file; empty for lm-eval."""
    outputs: tuple[str, ...] = field(default=(), repr=False)
    """The generated texts by row, if any; of `self_consistency` all samples of the first row, then of the second."""
    warning: str = ""
    """What makes the value doubtful."""
    tokens: tuple[int, ...] = field(default=(), repr=False)
    """`perplexity`: predicted tokens by row, which weight the rows' mean losses."""
    engine: str = field(default="", repr=False)
    """What generated `outputs`, if not transformers."""

    def to_json(self) -> dict[str, Any]:
        """Return the score as JSON values; `tokens`, `warning` and `engine` only if there are any."""
        found = {"value": self.value, "stderr": self.stderr, "rows": list(self.rows), "outputs": list(self.outputs)}
        return {
            **found, **({"tokens": list(self.tokens)} if self.tokens else {}),
            **({"warning": self.warning} if self.warning else {}),
            **({"engine": self.engine} if self.engine else {}),
        }  # fmt: skip


Advance = Callable[[int, int], None]
"""Called with the number of rows that are done and the number of all rows."""


def measure(
    subject: EvaluatedModel,
    of: Measurement,
    folder: Path,
    batch_size: int,
    seed: int = 0,
    advance: Advance = lambda done, rows: None,
    sources: Sequence[Sequence[str]] = (),
) -> Score:
    """Run one light evaluation.

    Args:
        subject: The model.
        of: What to measure.
        folder: Folder where relative paths start.
        batch_size: Rows per forward pass.
        seed: Seed of sampled answers.
        advance: Called after every batch.
        sources: `agreement`: `answers_of` each source.

    Raises:
        EvaluateError: EVAL_DATA, LENGTH. TrainError: REWARD, NONFINITE, from the function that scores.
    """
    found = _measured(subject, of, folder, batch_size, seed, advance, sources)
    return replace(found, engine="vllm") if subject.vllm is not None else found


def _measured(
    subject: EvaluatedModel, of: Measurement, folder: Path, batch_size: int, seed: int, advance: Advance,
    sources: Sequence[Sequence[str]],
) -> Score:  # fmt: skip
    path = beside_recipe(of.data, folder)
    if of.kind == "perplexity":
        lines = subject.kept(("lines", of, folder), lambda: read_lines(path, of.max_rows))
        return _perplexity(subject, lines, of.unit, batch_size, advance)
    rows = _rows(subject, of, folder)
    if of.kind == "preference":
        ids, starts = subject.kept(("pairs", of, folder), lambda: _pairs(subject, rows, of))
        return _preference(subject, ids, starts, of, batch_size, advance)
    prompts, ended = [row["prompt"] for row in rows], list[bool]()
    ids = subject.kept(("prompts", of, folder), lambda: token_ids(subject, [(prompt, True) for prompt in prompts]))
    count = (of.samples or SAMPLES) if of.kind == "self_consistency" else 1
    made = _answers(subject, ids, of.max_new_tokens, batch_size, of.temperature, seed, advance, ended, count)
    warning = _unended(of, ended)
    outputs = [text for texts in made for text in texts]
    if of.kind == "self_consistency":
        found = _extracted(outputs, of.extract)
        return replace(
            _mean([consistency(found[at : at + count]) for at in range(0, len(found), count)], outputs), warning=warning
        )
    if of.kind == "agreement":
        key = ("sources", of, tuple(map(tuple, sources)))
        theirs = subject.kept(key, lambda: [*zip(*(_extracted(texts, of.extract) for texts in sources), strict=True)])
        pairs = zip(_extracted(outputs, of.extract), theirs, strict=True)
        if not any(map(consistency, theirs)):
            warning = _warned(f"{of.data}: no source has an answer to any prompt, so no answer can agree")
        return replace(_mean([float(agrees(*pair)) for pair in pairs], outputs), warning=warning)
    if of.kind == "exact_match":
        right = [row["completion"].strip() for row in rows]
        answers = _extracted(outputs, of.extract)
        matches = [float(answer.strip() == r) for answer, r in zip(answers, right, strict=True)]
        return replace(_mean(matches, outputs), warning=warning)
    assert of.function is not None
    columns = {
        key: [row.get(key) for row in rows] for key in rows[0] if key not in ("prompts", "completions", "prompt")
    }
    values = total([load_function(of.function, folder)], prompts=prompts, completions=outputs, **columns)
    return replace(_mean(values, outputs), warning=warning)


def answers_of(
    subject: EvaluatedModel, of: Measurement, folder: Path, batch_size: int, advance: Advance = lambda done, rows: None
) -> list[str]:
    """The greedy answers of a source of `agreement`, in the order of the rows; the arguments are those of `measure`."""
    prompts = [row["prompt"] for row in _rows(subject, of, folder)]
    return generate(subject, prompts, of.max_new_tokens, batch_size, advance=advance)


def _rows(subject: EvaluatedModel, of: Measurement, folder: Path) -> list[Row]:
    path, chat = beside_recipe(of.data, folder), bool(subject.tokenizer.chat_template)
    return subject.kept(("rows", of, folder), lambda: rows_for(of, path, chat=chat))


def _unended(of: Measurement, ended: Sequence[bool]) -> str:
    """A warning when no answer ended before `max_new_tokens`, or an empty text."""
    if any(ended) or not ended:
        return ""
    return _warned(
        f"{of.data}: none of the {len(ended)} answers ended within {of.max_new_tokens} tokens, so each is cut: the model "
        f"may never have learned its end token (see {DOCS}/training.md), or max_new_tokens is too low"
    )


def _warned(text: str) -> str:
    log.warning("%s", text)
    return text


def token_ids(subject: EvaluatedModel, asked: Sequence[tuple[Any, bool]]) -> list[list[int]]:
    """Token ids of texts and of conversations.

    Conversations are rendered in a child process, because the model's chat template may run forever or fill the memory.

    Args:
        subject: The model.
        asked: A text or turns, and whether the model answers next.

    Raises:
        EvaluateError: TEMPLATE, when the chat template is missing or refuses a conversation, or takes too long or too much
            memory.
    """
    tokenizer, chats = subject.tokenizer, [(turns, next_) for turns, next_ in asked if not isinstance(turns, str)]
    if chats and not tokenizer.chat_template:
        what = "the rows are conversations, but the tokenizer has no chat template"
        raise EvaluateError.of("TEMPLATE", subject.name, what, "give text, or a model with a chat template")
    texts = list[str]()

    def render() -> Iterator[tuple[str | None, str]]:
        for turns, answer_next in chats:
            apply: Callable[[], str] = partial(
                tokenizer.apply_chat_template, turns, tokenize=False, add_generation_prompt=answer_next
            )
            yield attempted(apply, turns, str.__len__)

    def place() -> str:
        return f"a row with the roles {roles_of(chats[len(texts)][0])}"

    with within_limits(EvaluateError, subject.name, place, "give a model whose chat template you trust"):
        for text, why in in_child(render) if chats else ():
            if text is None:
                what = f"the chat template refuses a row: {why}"
                raise EvaluateError.of("TEMPLATE", subject.name, what, "correct or remove such rows")
            texts.append(text)
    rendered, found = iter(texts), list[list[int]]()
    for turns, _ in asked:
        chat = not isinstance(turns, str)  # a template writes the special tokens itself
        found.append(list(tokenizer(next(rendered) if chat else turns, add_special_tokens=not chat)["input_ids"]))
    return found


def _extracted(outputs: Sequence[str], extract: str | None) -> Sequence[str]:
    """The first group of `extract` in each output, empty where it does not match; without `extract` the outputs."""
    if extract is None:
        return outputs
    try:
        [found] = match_in_time([extract], outputs, "search", _MOST_SECONDS)
    except PatternError as error:
        raise EvaluateError.of("EXTRACT", extract, str(error)) from error
    return [(groups[1] if groups else None) or "" for groups in found]


def _mean(values: Sequence[float], outputs: Sequence[str] = ()) -> Score:
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return Score(mean, spread, tuple(values), tuple(outputs))


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from a seed without changing the caller's generators."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generate(
    subject: EvaluatedModel,
    prompts: Sequence[Any],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Advance = lambda done, rows: None,
) -> list[str]:
    """Generate an answer to every prompt, without the prompt and special tokens.

    Greedy answers depend on the prompt only; sampled answers also on the seed and the batch size (with vLLM on the seed and
    the number of the prompt).

    Args:
        subject: The model.
        prompts: Texts, or lists of chat turns.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts per batch.
        temperature: Sampling temperature; 0 is greedy decoding.
        seed: Seed of sampled answers.
        advance: Called after every batch.

    Raises:
        EvaluateError: LENGTH, when a prompt and its answer are longer than the model's context; TEMPLATE, when the chat
            template refuses a prompt.
    """
    ids = token_ids(subject, [(prompt, True) for prompt in prompts])
    return [text for (text,) in _answers(subject, ids, max_new_tokens, batch_size, temperature, seed, advance, [])]


def _answers(
    subject: EvaluatedModel,
    ids: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    seed: int,
    advance: Advance,
    ended: list[bool],
    count: int = 1,
) -> list[tuple[str, ...]]:
    """Generate `count` answers to every prompt, from token ids; the other arguments are those of `generate`.

    `ended` receives for each answer, in the order of generation, whether it ended with an end token.
    """
    ids = [row or _start(subject) for row in ids]
    longest = max(map(len, ids)) + max_new_tokens
    if longest > subject.max_length:
        what = f"the longest prompt and its answer take {longest} tokens, the model's limit is {subject.max_length}"
        raise EvaluateError.of("LENGTH", subject.name, what, "lower max_new_tokens, or raise max_length")
    if subject.vllm is not None:
        made = subject.vllm.complete(
            ids, max_new_tokens=max_new_tokens, temperature=temperature, completions=count, seed=seed, ended=ended
        )
        advance(len(ids), len(ids))
        return made
    _check_tokens(subject, ids)
    answers: list[tuple[str, ...]] = [()] * len(ids)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "completions": count}
    batches = _batches(ids, max(batch_size // count, 1), advance)
    model, tokenizer = subject.model, subject.tokenizer
    with _drawing(seed, subject.device):
        pairs: Iterable[tuple[list[int], list[tuple[str, ...]]]]
        if subject.decoder is None:
            pairs = ((rows, complete(model, tokenizer, [ids[i] for i in rows], ended=ended, **how)) for rows in batches)
        else:
            every = [*batches]
            asked = [[ids[i] for i in rows] for rows in every]
            pairs = zip(every, subject.decoder.complete(model, tokenizer, asked, ended=ended, **how), strict=True)
        for rows, found in pairs:
            for i, texts in zip(rows, found, strict=True):
                answers[i] = texts
    return answers


def _check_tokens(subject: EvaluatedModel, ids: Sequence[Sequence[int]]) -> None:
    """Raise EvaluateError TOKENS for tokens that the model does not know: its tokenizer is that of another model."""
    if missing := without_row({token for row in ids for token in row}, subject.model):
        shown = ", ".join(repr(subject.tokenizer.convert_ids_to_tokens(i)) for i in missing[:5])
        what = f"its embedding has no row for {len(missing)} of the data's tokens: {shown}"
        raise EvaluateError.of("TOKENS", subject.name, what, "use the model's own tokenizer")


def _start(subject: EvaluatedModel) -> list[int]:
    """What an answer to an empty prompt begins after: the token that begins a text, or else the one that ends it, as in lm-eval."""
    known = (subject.tokenizer.bos_token_id, subject.tokenizer.eos_token_id)
    if found := [token for token in known if token is not None][:1]:
        return found
    what = "a prompt is empty, and the tokenizer has no token that begins or ends a text"
    raise EvaluateError.of("EVAL_DATA", subject.name, what, "give a text")


def _batches(ids: Sequence[Sequence[int]], size: int, advance: Advance) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
        advance(min(start + size, len(order)), len(order))


@torch.inference_mode()
def _logps(
    subject: EvaluatedModel, ids: Sequence[list[int]], starts: Sequence[int], batch_size: int, advance: Advance
) -> list[tuple[float, int]]:
    """Summed log probability of the tokens from each row's start on, and the number of these tokens."""
    _check_tokens(subject, ids)
    found = [(0.0, 0)] * len(ids)
    for batch in _batches(ids, batch_size, advance):
        rows_BT, mask_BT = padded([ids[i] for i in batch], subject.tokenizer.pad_token_id, subject.device, left=False)
        logits_BTV = subject.model(input_ids=rows_BT, attention_mask=mask_BT).logits[:, :-1].float()
        logp_BT = log_softmax(logits_BTV, -1).gather(2, rows_BT[:, 1:, None])[..., 0]
        for at, i in enumerate(batch):
            first = max(starts[i], 1)
            found[i] = (float(logp_BT[at, first - 1 : len(ids[i]) - 1].sum()), len(ids[i]) - first)
    return found


def _preference(
    subject: EvaluatedModel, ids: Sequence[list[int]], starts: Sequence[int], of: Measurement, batch_size: int, advance: Advance
) -> Score:  # fmt: skip
    """Share of pairs whose chosen answer is more likely than the rejected one; a tie counts half."""
    sums = _logps(subject, ids, starts, batch_size, advance)
    scores = [logp / max(tokens, 1) if of.normalize else logp for logp, tokens in sums]
    wins = [
        1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in zip(scores[::2], scores[1::2], strict=True)
    ]
    return _mean(wins)


def _pairs(subject: EvaluatedModel, rows: Sequence[Row], of: Measurement) -> tuple[list[list[int]], list[int]]:
    """Token ids of each prompt with its chosen and with its rejected answer, and where each answer starts."""
    questions = token_ids(subject, [(row["prompt"], True) for row in rows])
    pairs = [_with_answer(subject, row["prompt"], row[key]) for row in rows for key in ("chosen", "rejected")]
    ids, starts = token_ids(subject, [(pair, False) for pair in pairs]), list[int]()
    for at, full in enumerate(ids):
        if len(full) > subject.max_length:
            what = f"a pair takes {len(full)} tokens, the model's limit is {subject.max_length}"
            raise EvaluateError.of("LENGTH", of.data, what, "remove such rows, or raise max_length")
        asked = questions[at // 2]
        starts.append(next((i for i, (a, b) in enumerate(zip(asked, full, strict=False)) if a != b), len(asked)))
    return ids, starts


def _with_answer(subject: EvaluatedModel, prompt: Any, answer: Any) -> Any:
    """A prompt and an answer with its end, as training has them: a text, or turns."""
    if isinstance(prompt, str):
        end, text = subject.tokenizer.eos_token or "", text_of(answer)
        return prompt + (text if end and text.endswith(end) else text + end)
    return [*prompt, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]


def _perplexity(subject: EvaluatedModel, lines: Sequence[str], unit: str, batch_size: int, advance: Advance) -> Score:
    """exp of the mean loss per token; `rows` are the mean losses of the windows (or lines), in nats."""
    windows = subject.kept(("windows", unit, tuple(lines)), lambda: _windows(subject, lines, unit))
    warning = ""
    if unit == "text" and len(lines) > 1 and len(windows) > 1:
        warning = _warned(
            f"the text is longer than the model's window and was cut into {len(windows)} windows of {subject.max_length} "
            "tokens; unit: line (--unit line) measures every line by itself"
        )
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise EvaluateError.of("EVAL_DATA", subject.name, "the text has no token to predict", "give a longer text")
    sums = _logps(subject, windows, [1] * len(windows), batch_size, advance)
    tokens = sum(count for _, count in sums)
    loss = -math.fsum(logp for logp, _ in sums) / tokens
    per_row = _mean([-logp / count for logp, count in sums])
    value = math.exp(min(loss, 700.0))
    spread = value * per_row.stderr if per_row.stderr is not None else None
    return Score(value, spread, per_row.rows, warning=warning, tokens=tuple(count for _, count in sums))


def _windows(subject: EvaluatedModel, lines: Sequence[str], unit: str) -> list[list[int]]:
    """Token ids of a text (or of every line) in pieces that fit the model, each after the token that begins a text."""
    tokenizer = subject.tokenizer
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    room, windows = subject.max_length - len(first), list[list[int]]()
    for text in lines if unit == "line" else ["\n".join(lines)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows += [[*first, *ids[at : at + room]] for at in range(0, len(ids), room)]
    return windows
