"""`paft init`: a commented recipe to start from, for a base, data and hardware, or for adapters that exist."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.auditing.opening import open_sources
from paft_merge.engine.imbalance import FOLD
from paft_merge.errors import DOCS, OutputError, PaftMergeError, Problems, RecipeError
from paft_merge.hub import is_repository
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.output.report_files import write_file
from paft_merge.pipeline.recipe_schemas import with_schema
from paft_merge.training.row_files import SUFFIXES as ROW_SUFFIXES
from paft_merge.training.row_files import read_rows, suffix_of
from paft_merge.training.row_forms import Kind, columns_of, form_of
from paft_merge.training.row_parts import RowError

LARGE_BYTES = 6 << 30
"""Weights above this are loaded in 4 bits on a single GPU."""

SUFFIXES = (*ROW_SUFFIXES, ".parquet", ".txt")
"""Data with such a name is a file, not a Hub data set."""

_DATA = {
    "sft": "my-sft.jsonl # rows with messages, or prompt and completion; or a Hub data set",
    "dpo": "my-pairs.jsonl # rows with prompt, chosen, rejected; or a Hub data set",
}
_KINDS: dict[str, Kind] = {"sft": "text", "dpo": "preference"}
_YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


def check_given(base: str, sft: str | None = None, dpo: str | None = None, adapters: Sequence[str] = ()) -> None:
    """Check what `paft init` is given, as far as local files show it.

    Raises:
        RecipeError: BASE, DATA, ADAPTER: everything that is missing or does not fit, together.
    """
    problems = Problems()
    if Path(base).is_dir():
        if not (Path(base) / "config.json").is_file():
            problems.add("BASE", base, "has no config.json", "name a model folder")
    elif not is_repository(base):
        problems.add("BASE", base, "not a local folder and not a valid Hub repository name", "check the path")
    for objective, data in (("sft", sft), ("dpo", dpo)):
        row = first_row(data, problems) if data else None
        wrong = _misfit(row, objective) if row is not None else None
        if row is not None and wrong is not None:
            swapped = sft and dpo and _misfit(row, "dpo" if objective == "sft" else "sft") is None
            fix = "give the SFT data first, then the preference data" if swapped else wrong.fix
            problems.add("DATA", data, f"{objective}: {wrong.what}", fix)
    for adapter in adapters:
        if Path(adapter).exists() and not (Path(adapter) / "adapter_config.json").is_file():
            problems.add("ADAPTER", adapter, "has no adapter_config.json", "name the folder of a PEFT adapter")
        elif not Path(adapter).exists() and not is_repository(adapter):
            problems.add("ADAPTER", adapter, "not a local folder and not a valid Hub repository name", "check the path")
    problems.raise_as(RecipeError)


def _misfit(row: Mapping[str, Any], objective: str) -> RowError | None:
    """Why rows with these columns cannot be used; None when they can."""
    try:
        form_of(columns_of([dict(row)]), _KINDS[objective], chat=True)
    except RowError as error:
        return error
    return None


def first_row(data: str, problems: Problems) -> dict[str, Any] | None:
    """The first row of a local JSON or CSV file; None where it cannot be read here, as of a Hub data set."""
    path = Path(data)
    if not path.exists():
        if suffix_of(path) in SUFFIXES:
            problems.add("DATA", data, "there is no such file", "check the path")
        elif not is_repository(data):
            problems.add("DATA", data, "not a local file and not a valid name on the Hub", "check the path")
        return None
    if not (path.is_file() or path.is_dir()):
        problems.add("DATA", data, "is not a regular file", "check the path")
    if not path.is_file() or suffix_of(path) not in ROW_SUFFIXES:
        return None
    rows: list[dict[str, Any]] = []
    with problems.catching():
        rows.append(next(row for _, row in read_rows(path)))
    return rows[0] if rows else None


def needs_template(base: str, sft: str | None, dpo: str | None) -> bool:
    """Whether the rows are chats and the base is a local folder without a chat template."""
    rows = [first_row(data, Problems()) or {} for data in (sft, dpo) if data]
    chats = any(isinstance(row.get(key), list) for row in rows for key in ("messages", "conversations", "chosen"))
    folder = Path(base)
    if not chats or not folder.is_dir() or list(folder.glob("chat_template.*")):
        return False
    config = folder / "tokenizer_config.json"
    return not config.is_file() or '"chat_template"' not in read_text(config, "CONFIG_INVALID")


def beside(path: str, out: Path | None) -> str:
    """A local path as it is written into the recipe `out`: relative to the recipe's folder. Other names stay."""
    if out is None or not Path(path).exists() or Path(path).is_absolute():
        return path
    return Path(os.path.relpath(path, out.parent)).as_posix()


def starter(
    base: str,
    sft: str | None = None,
    dpo: str | None = None,
    gpus: int = 0,
    *,
    small: bool = False,
    template: bool = False,
) -> str:
    """The text of a recipe for `paft run` that trains two adapters.

    Args:
        base: Folder or Hub name, as it is written into the recipe.
        sft: File or Hub data set for SFT; a placeholder by default.
        dpo: The same for DPO.
        gpus: Number of GPUs; 0 for a CPU.
        small: The base's weights are below `LARGE_BYTES`.
        template: A chat template has to be named.
    """
    quantized = gpus == 1 and not small
    dtype = "float32" if gpus == 0 else "bfloat16"
    how = f"{{dtype: {dtype}{', quantization: {load_in_4bit: true}' if quantized else ''}}}"
    batch, steps = (4, 2) if gpus else (8, 1)
    each = max(1, gpus // 2)
    spread = f"\n    processes: {each} # GPUs; the other adapter has the rest" if gpus > 2 else ""
    place = {0: "a CPU", 1: "one GPU"}.get(gpus, f"{gpus} GPUs, on which both adapters train at the same time")
    named = (
        "\n    # chat_template: chat.jinja # REQUIRED: the rows are chats and the base has no template;"
        "\n    #   a Jinja file, or a model whose template is taken"
        if template
        else ""
    )
    chat = "\n  chat_template: auto # the template of the adapters, which the base lacks" if template else ""
    return f"""\
# A PAFT run (arXiv:2406.17923) on {place}: a sparse SFT adapter and a DPO adapter, trained in parallel from one base, then merged.
#
#   paft run --dry-run THIS_FILE runs/first     # checks everything and shows the steps
#   paft run THIS_FILE runs/first               # can be stopped; the same command resumes
#
# Every key is explained in {DOCS}/run.md.

base_model: {_quoted(base)}

adapters:
  sft:
    objective: sft
    data: {_quoted(sft) if sft else _DATA["sft"]}{named}
    base: {how}{spread}
    lora: {{r: 16, lora_alpha: 16, lora_dropout: 0.05}}
    l1: {{strength: 1.0e-4}} # PAFT's sparsity; 1.0e-3 is its stronger value
    training: # any field of TRL's SFTConfig
      learning_rate: 2.0e-4
      num_train_epochs: 1
      per_device_train_batch_size: {batch}
      gradient_accumulation_steps: {steps}
      max_length: 2048
      lr_scheduler_type: cosine
      warmup_steps: 0.1 # a share of the run
      gradient_checkpointing: {"true" if gpus else "false"}

  dpo:
    objective: dpo
    data: {_quoted(dpo) if dpo else _DATA["dpo"]}{named}
    base: {how}{spread}
    lora: {{r: 16, lora_alpha: 16, lora_dropout: 0.05}}
    training: # any field of TRL's DPOConfig
      learning_rate: 5.0e-5 # deltas grow with rate and steps: at 5.0e-6, as for a last stage of training, SFT drowns this one in a merge
      beta: 0.01
      num_train_epochs: 1
      per_device_train_batch_size: {batch}
      gradient_accumulation_steps: {steps}
      max_length: 1024
      lr_scheduler_type: cosine
      warmup_steps: 0.1
      gradient_checkpointing: {"true" if gpus else "false"}

audit:
  epsilon: 1.0e-5
  # require: ["sparsity(1e-5) [source=sft] >= 0.5"] # stops before the merge unless it holds

merge: # mergekit's language; sft and dpo are the adapters above
  merge_method: task_arithmetic # the sum of both deltas; {DOCS}/studies/paft-small.md compares it with the others
  models:
    - {{model: sft, parameters: {{weight: 1.0}}}}
    - {{model: dpo, parameters: {{weight: 1.0}}}} # less keeps more of the skill, more keeps more of the preference; paft tune searches. With far fewer
    #   steps than SFT the delta may be too small: the merge then warns (SCALE)
  out_dtype: {"float32" if gpus == 0 else "bfloat16"}{chat}

# evaluate:
#   suite: open-llm-v1 # six tasks of lm-eval; pip install 'paft-merge[eval]'
#   metrics: # or light ones, which need no package
#     skill: {{kind: exact_match, data: my-test.jsonl}} # rows with prompt and answer
#     pairs: {{kind: preference, data: my-held-out-pairs.jsonl}} # rows with prompt, chosen, rejected

# compare: # against each adapter alone, one after the other, and the paper's five methods; needs evaluate
#   arms: [base, individual, sequential, parallel] # also mixed (one adapter on both) and polish (trained after the merge)

# push: {{repo_id: me/my-model, private: true}}
"""


def starter_of_adapters(base: str, adapters: Sequence[str], data: Sequence[str] = (), out: Path | None = None) -> str:
    """The text of a recipe for `paft run` that compares ways of merging adapters that exist.

    Args:
        base: Folder or Hub name.
        adapters: Folders or Hub names, at least two.
        data: Local files to evaluate on: JSONL of prompt and answer, of chosen and rejected, or text.
        out: The recipe's file, to which local paths are made relative.
    """
    names = _names(adapters)
    listed = "\n".join(f"  {name}: {_quoted(beside(path, out))}" for name, path in zip(names, adapters, strict=True))
    rms, note = sizes_of(adapters), ""
    if rms and max(rms) > FOLD * min(rms):
        measured = ", ".join(f"{name} {size:.2g}" for name, size in zip(names, rms, strict=True))
        note = f" # the root mean squares of the deltas are {measured}: the largest decides the elections of ties; a sum keeps all of them"
    models = "\n".join(f"    - {{model: {name}, parameters: {{weight: 1.0}}}}" for name in names)
    metrics = "\n".join(
        f"    {_named(path)}: {{kind: {_kind(path)}, data: {_quoted(beside(path, out))}}}"
        for path in data or ("my-test.jsonl", "my-pairs.jsonl", "my-text.txt")
    )
    return f"""\
# Compare ways of merging adapters that exist. Nothing is trained.
#
#   paft run --dry-run THIS_FILE runs/first     # checks everything and shows the steps
#   paft run THIS_FILE runs/first               # can be stopped; the same command resumes
#
# Every key is explained in {DOCS}/run.md.

base_model: {_quoted(beside(base, out))}

adapters: # folders or Hub names
{listed}

audit: {{epsilon: 1.0e-5}}

merge: # the model in RUN_DIR/merged
  merge_method: task_arithmetic
  models:{note}
{models}

evaluate: # the columns of the table
  metrics: # exact_match: rows with prompt and answer; preference: rows with prompt, chosen, rejected; perplexity: text
{metrics}

compare: # the rows of the table: base, each adapter alone, and all of them merged by each method
  arms: [base, individual, parallel]
  # methods: [ties, linear, {{merge_method: ties, name: ties-0.2, parameters: {{density: 0.2}}}}]
"""


def sizes_of(adapters: Sequence[str]) -> list[float] | None:
    """The root mean square of each adapter's delta, from the low-rank factors in local files.

    None where these do not show it: adapters on the Hub, other types, and files that a dry run refuses.
    """
    if not all(Path(adapter).is_dir() for adapter in adapters):
        return None
    squares, entries = [0.0] * len(adapters), [0] * len(adapters)
    try:
        with open_sources(adapters, None) as opened:
            for subject in opened.subjects:
                for i in range(len(adapters)):
                    if factors := subject.inputs.factors(i):
                        b, a = (factor.astype(np.float64) for factor in factors)
                        squares[i] += float(((b.T @ b) * (a @ a.T)).sum())
                        entries[i] += subject.numel
                subject.release()
    except PaftMergeError:
        return None
    found = [math.sqrt(square / count) if count else 0.0 for square, count in zip(squares, entries, strict=True)]
    return found if all(math.isfinite(size) and size > 0 for size in found) else None


def _names(adapters: Sequence[str]) -> list[str]:
    """A name for each adapter: the last part of its path, made unique."""
    found: list[str] = []
    for path in adapters:
        name = _named(path)
        name = f"adapter-{name}" if name == "base" or name.startswith("after-") or name.endswith("-dense") else name
        found.append(f"{name}-{len(found) + 1}" if name in found else name)
    return found


def _named(path: str) -> str:
    """The last part of a path as a key."""
    last = Path(os.path.abspath(path)).name
    stem = last.rpartition(".")[0] if last.endswith(SUFFIXES) else last
    return re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "adapter"


def _kind(path: str) -> str:
    """The metric that fits a file."""
    row = first_row(path, Problems()) or {}
    if path.endswith(".txt"):
        return "perplexity"
    return "preference" if "chosen" in row or (not row and "pairs" in path) else "exact_match"


def write_starter(out: Path, text: str) -> Path | None:
    """Write a starter recipe to a new file, and the schema for editors beside it.

    Returns:
        The file of the schema; None where another program's file has its name.

    Raises:
        OutputError: EXISTS, something is there; OUTPUT, it cannot be written.
    """
    if out.exists():
        raise OutputError.of("EXISTS", out, "the file exists", "name another file, or remove it")
    text, schema = with_schema(text, out)
    write_file(out, text)
    return schema


def is_small(base: str) -> bool:
    """Whether a local base has less than `LARGE_BYTES` of weights; a base on the Hub is assumed to be large."""
    files = list(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    return bool(files) and sum(file.stat().st_size for file in files) < LARGE_BYTES


def _quoted(text: str) -> str:
    """Text as a YAML scalar that is read back as the same text."""
    plain = re.fullmatch(r"[A-Za-z][\w/.-]*", text, re.ASCII) and text.lower() not in _YAML_WORDS
    if plain:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
