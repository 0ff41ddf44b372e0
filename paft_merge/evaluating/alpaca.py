"""Greedy answers in the format that AlpacaEval judges: a list of instruction, output and generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from paft_merge.errors import EvaluateError
from paft_merge.evaluating.data_rows import read_rows
from paft_merge.evaluating.light import Advance, generate
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.evaluating.vllm_loading import load_for
from paft_merge.output.report_files import check_file, write_file
from paft_merge.training.engine_schema import Engine


def read_instructions(path: Path) -> list[dict[str, Any]]:
    """Read rows with an `instruction`, from AlpacaEval's `alpaca_eval.json` or any file for `read_rows`.

    Raises:
        EvaluateError: EVAL_DATA.
    """
    rows = read_rows(path)
    if not all(row.get("instruction") for row in rows):
        what = "has rows without an instruction"
        raise EvaluateError.of("EVAL_DATA", path, what, 'write a list of {"instruction": ...}')
    return rows


def write_alpaca(
    model: str,
    instructions: Path,
    out: Path,
    spec: EvaluateSpec,
    *,
    engine: Engine = "transformers",
    name: str | None = None,
    max_new_tokens: int = 512,
    advance: Advance = lambda done, rows: None,
    trust_code: bool = False,
) -> int:
    """Answer instructions and write `out` for `alpaca_eval --model_outputs out`; returns the number of answers.

    Args:
        model: As for `evaluate`.
        instructions: A file for `read_instructions`.
        out: JSON file to write.
        spec: Batch size, device and dtype.
        engine: What generates the answers.
        name: The model's name in AlpacaEval's table; the last part of its path by default.
        max_new_tokens: Longest answer, in tokens.
        advance: Called after every batch.
        trust_code: As for `evaluate`.
    """
    check_file(out)
    rows = read_instructions(instructions)
    with closing(load_for(engine, model, spec, trust_code=trust_code)) as subject:
        chat = bool(subject.tokenizer.chat_template)
        texts = [str(row["instruction"]) for row in rows]
        prompts: Sequence[Any] = [[{"role": "user", "content": text}] for text in texts] if chat else texts
        outputs = generate(subject, prompts, max_new_tokens, spec.batch_size, advance=advance)
    written = [
        {
            "dataset": row.get("dataset", instructions.stem),
            "instruction": row["instruction"],
            "output": output.strip(),
            "generator": name or Path(model).name,
            "datasplit": "eval",
        }
        for row, output in zip(rows, outputs, strict=True)
    ]
    write_file(out, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return len(written)
