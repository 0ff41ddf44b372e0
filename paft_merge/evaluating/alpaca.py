"""Greedy answers in the format that AlpacaEval judges: a list of instruction, output and generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paft_merge.errors import EvaluateError
from paft_merge.evaluating.data_rows import read_rows
from paft_merge.evaluating.light import Advance, generate
from paft_merge.evaluating.loading import load_subject
from paft_merge.evaluating.schema import EvaluateSpec


def read_instructions(path: Path) -> list[dict[str, Any]]:
    """Read rows with an `instruction`: a JSON list like AlpacaEval's `alpaca_eval.json`, or a .jsonl file.

    Raises:
        EvaluateError: EVAL_DATA.
    """
    if path.suffix == ".jsonl":
        rows = read_rows(path)
    else:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluateError.of("EVAL_DATA", path, f"cannot be read: {error}", "give a JSON list") from error
    good = isinstance(rows, list) and bool(rows) and all(isinstance(r, dict) and r.get("instruction") for r in rows)
    if not good:
        what = "has rows without an instruction"
        raise EvaluateError.of("EVAL_DATA", path, what, 'write a list of {"instruction": ...}')
    return rows


def write_alpaca(
    model: str,
    instructions: Path,
    out: Path,
    spec: EvaluateSpec,
    *,
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
        name: The model's name in AlpacaEval's table; the last part of its path by default.
        max_new_tokens: Longest answer, in tokens.
        advance: Called after every batch.
        trust_code: As for `evaluate`.
    """
    rows = read_instructions(instructions)
    subject = load_subject(model, spec, trust_code=trust_code)
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
    out.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(written)
