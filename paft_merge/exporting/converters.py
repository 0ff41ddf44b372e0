"""The converters of llama.cpp and MLX: found where the person at the keyboard has them, and run in a process of their own.

A recipe cannot name a program: only an option, the environment and the path of the person who runs the command do.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from paft_merge.errors import OutputError, escape

log = logging.getLogger(__name__)

FOLDER = "LLAMA_CPP_DIR"
"""Environment variable that names a checkout of llama.cpp."""
CONVERT, CONVERT_LORA, QUANTIZE = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "llama-quantize"
TOKENIZE = "llama-tokenize"
_PLACES = ("", "build/bin", "bin")
"""Folders of a checkout that hold scripts and programs."""
_CHECKOUT = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp, pip install 'gguf>=0.19', and give --llama-cpp DIR"
)
_HOW = {
    CONVERT: _CHECKOUT,
    CONVERT_LORA: _CHECKOUT,
    QUANTIZE: "build it in the checkout: cmake -B build && cmake --build build --target llama-quantize; or choose f16, bf16, f32 or q8_0, which need no build",
}  # fmt: skip
_CAUSES = (
    (r"pre-tokenizer was not recognized", "llama.cpp knows a BPE tokenizer by the ids of a test text, and not this one: update llama.cpp, or merge with `tokenizer_source: base` to keep the base's"),
    (r"No module named '(\w+)'", r"install it for the Python that runs paft: pip install \1"),
    (r"Model \S+ is not supported|Model type \S+ not supported", "update the converter; it may not have this architecture yet"),
    (r"unrecognized arguments|invalid choice", "it is of a version with other options: update it"),
    (r"invalid ftype", "give a type that `llama-quantize --help` lists"),
    (r"No space left on device|write error", "free some space, or choose a folder on another disk"),
)  # fmt: skip
"""Patterns in the last line of a converter that failed, and how to fix it."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def script(name: str, llama_cpp: Path | None) -> list[str]:
    """The command of a program of llama.cpp: a script with this Python, or an executable file.

    Args:
        name: its file name.
        llama_cpp: the checkout; by default that of `LLAMA_CPP_DIR`, else the program on the path.

    Raises:
        OutputError: EXPORT_TOOL, it is not there.
    """
    given = llama_cpp or (Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None)
    if given is not None:
        found = next((given / place / name for place in _PLACES if (given / place / name).is_file()), None)
        where = f"in {given} ({'--llama-cpp' if llama_cpp else FOLDER})"
    else:
        on_path = shutil.which(name) or shutil.which(name.removesuffix(".py"))
        found, where = Path(on_path) if on_path else None, "on the path"
    if found is None:
        raise OutputError.of("EXPORT_TOOL", name, f"of llama.cpp is not {where}", _HOW.get(name, _CHECKOUT))
    if found.suffix == ".py":
        return [sys.executable, str(found.resolve())]
    if not os.access(found, os.X_OK):
        raise OutputError.of("EXPORT_TOOL", found, "is not a program that may be run", f"chmod +x {found}")
    return [str(found.resolve())]


def mlx_convert() -> list[str]:
    """The command of mlx-lm's converter.

    Raises:
        OutputError: EXPORT_TOOL, mlx-lm is not installed.
    """
    if find_spec("mlx_lm"):
        return [sys.executable, "-m", "mlx_lm", "convert"]
    if found := shutil.which("mlx_lm.convert"):
        return [found]
    raise OutputError.of(
        "EXPORT_TOOL",
        "mlx_lm.convert",
        "is not installed",
        "pip install mlx-lm, on Linux 'mlx-lm[cpu]' (0.30 or newer)",
    )


def run(command: Sequence[str], what: str) -> list[str]:
    """Run a converter to its end, and return its last lines; when this process is interrupted, it and its children are killed.

    Args:
        command: the program and its arguments.
        what: a name for messages.

    Raises:
        OutputError: EXPORT, it failed; with the last line that it wrote.
    """
    log.info("%s: %s", what, " ".join(command))
    with tempfile.TemporaryFile() as written:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:  # a program of another machine, an interpreter that is missing
            raise OutputError.of("EXPORT", what, f"cannot be started: {error}", "build it on this machine") from error
        try:
            code = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        size = written.seek(0, os.SEEK_END)
        written.seek(max(0, size - (1 << 16)))
        text = _COLOUR.sub("", written.read().decode("utf-8", "replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        log.info("%s: %s", what, escape(line))
    if code:
        said = lines[-1][:300] if lines else "it wrote nothing"
        causes = ((re.search(pattern, said), fix) for pattern, fix in _CAUSES)
        fix = next((found.expand(fix) for found, fix in causes if found), "see all that it wrote with `paft -v`")
        how = f"ended with {code}" if code > 0 else f"was killed by signal {-code}"
        raise OutputError.of("EXPORT", what, f"{how}: {said}", fix)
    return lines
