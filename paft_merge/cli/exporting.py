"""`paft export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paft_merge.cli.terminal import json_option, print_json, say, sigterm_as_interrupt, trust_option, warn

if TYPE_CHECKING:
    from paft_merge.exporting import Target


@click.command(short_help="Write a model for llama.cpp, Ollama or MLX.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--to", required=True, type=click.Choice(["gguf", "ollama", "gguf-lora", "mlx"]), help="The format.")
@click.option("--quantize", metavar="TYPE", help="A type of llama.cpp, e.g. q4_k_m; for mlx q4, q8. Default: 16 bits.")
@click.option("--base", help="gguf-lora: the model that the adapter was trained on. Default: the one that it names.")
@click.option(
    "--llama-cpp", metavar="DIR", type=click.Path(path_type=Path),
    help="A checkout of llama.cpp. Default: LLAMA_CPP_DIR, else its programs on the path.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a model in OUT.")
@trust_option
@json_option("Print the files and the warnings as JSON.")
def export(
    model: Path, out: Path | None, to: Target, quantize: str | None, base: str | None, llama_cpp: Path | None,
    overwrite: bool, trust_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write MODEL, a merged model or an adapter, to the folder OUT with the converter of llama.cpp or mlx-lm.

    The model is checked before, and the written file afterwards. Default of OUT: MODEL-gguf and the like. See docs/export.md.
    """
    from paft_merge import exporting

    with sigterm_as_interrupt():
        done = exporting.export(
            model, out, to=to, quantize=quantize, base=base, llama_cpp=llama_cpp, trust_code=trust_code, overwrite=overwrite
        )  # fmt: skip
    warn(done.warnings)
    if as_json:
        warnings = [asdict(problem) for problem in done.warnings]
        print_json({"out": str(done.out), "files": list(done.files), "warnings": warnings})
        return
    for name in done.files:
        say(done.out / name, err=False)
