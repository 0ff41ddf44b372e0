"""The tokens that llama.cpp makes of a text from a GGUF file, beside those of the model's tokenizer.

llama.cpp reads a tokenizer in its own way: it merges pieces by the order of ids where the model has a list of merges, and splits
words by the name of a known tokenizer. Where a tokenizer does not fit, the file loads, and the model reads other tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from paft_merge.errors import OutputError, Problem
from paft_merge.exporting.converters import TOKENIZE, run, script

_TEXT = (
    'Once upon a time, there was 1 (one) girl: "I\'ve seen 31415 things!"\n\n\tdef f(x):\n        return  x != 3.5\n'
    "¿Qué? Größe, naïve. Привет, мир; 我想在家 😀  end"
)


def check_tokens(path: Path, model: Path, llama_cpp: Path | None) -> list[Problem]:
    """Compare the tokens of a text, and return a warning if they differ; nothing where llama-tokenize is not installed.

    Args:
        path: the GGUF file.
        model: the folder of the model. Without a `tokenizer.json` there, only the loading is checked.
        llama_cpp: as for `script`.

    Raises:
        OutputError: EXPORT_CHECK, llama.cpp cannot load the file.
    """
    from tokenizers import Tokenizer

    try:
        command = script(TOKENIZE, llama_cpp)
    except OutputError:
        return []
    text = path.with_name("text.txt")
    text.write_text(_TEXT, encoding="utf-8")
    try:
        said = run([*command, "-m", str(path), "-f", str(text), "--ids", "--no-bos", "--no-escape"], TOKENIZE)
        theirs = json.loads(next(line for line in reversed(said) if re.fullmatch(r"\[[\d, ]*\]", line)))
    except OutputError as error:
        (problem,) = error.problems
        if "load" in problem.what:
            raise OutputError.of(
                "EXPORT_CHECK", path.name, f"llama.cpp cannot load it: {problem.what}", problem.fix
            ) from error
        return [replace(problem, code="EXPORT_CHECK", what=f"could not compare tokens: it {problem.what}")]
    except StopIteration:
        return [Problem("EXPORT_CHECK", TOKENIZE, "could not compare tokens: it printed no ids", "update llama.cpp")]
    finally:
        text.unlink()
    file = model / "tokenizer.json"
    if not file.is_file():
        return []
    ours = Tokenizer.from_file(str(file)).encode(_TEXT, add_special_tokens=False).ids
    if ours == theirs:
        return []
    at = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), min(len(ours), len(theirs))
    )
    what = f"llama.cpp makes other tokens of a test text than tokenizer.json, from number {at} on: {theirs[at : at + 3]}, not {ours[at : at + 3]}"
    return [
        Problem(
            "EXPORT_CHECK",
            path.name,
            what,
            "llama.cpp does not support this tokenizer: the model would read other text",
        )
    ]
