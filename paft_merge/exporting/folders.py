"""`export`: a model's folder, or an adapter's, as a folder of another format; it gets its name when its files are checked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paft_merge.dialects import checking
from paft_merge.dialects.places import base_at
from paft_merge.errors import OutputError, PaftMergeError, Problem, Problems
from paft_merge.exporting import converters, gguf_files
from paft_merge.exporting.gguf_tokens import check_tokens
from paft_merge.exporting.older_configs import readable
from paft_merge.hub import resolve
from paft_merge.inputs.adapter_places import CONFIG, base_of
from paft_merge.inputs.adapters import open_weights
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import settings_of
from paft_merge.inputs.safetensors_header import join_first, read_text
from paft_merge.output.placing import LOCK, check_place, held, part_of, put_in_place, remove_entries
from paft_merge.plan.vocabulary.tokenizers import files_in, is_tokenizer
from paft_merge.plan.vocabulary.trained_tokenizers import TrainedTokenizer

Target = Literal["gguf", "ollama", "gguf-lora", "mlx"]
TARGETS: tuple[Target, ...] = ("gguf", "ollama", "gguf-lora", "mlx")

_BY_CONVERTER = ("f32", "f16", "bf16", "q8_0")
"""Types that llama.cpp's converter writes itself."""
_BITS = {"q2": 2, "q3": 3, "q4": 4, "q5": 5, "q6": 6, "q8": 8}
"""Types of MLX, and their bits."""
_UNREAD = ("bitsandbytes", "awq")
"""Quantised formats that llama.cpp's converter does not read."""


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        out: the folder.
        files: names of its files.
        warnings: what could not be checked, or has to be looked at.
    """

    out: Path
    files: tuple[str, ...]
    warnings: tuple[Problem, ...]


@dataclass(frozen=True)
class _Job:
    """One export.

    Attributes:
        model: the folder of the model or adapter.
        quantize: as for `export`, in lower case.
        base: the folder with the base's config, for an adapter.
        llama_cpp: as for `export`.
    """

    model: Path
    quantize: str | None
    base: Path | None
    llama_cpp: Path | None

    @property
    def name(self) -> str:
        """The name of the GGUF file: of letters, digits and `._-`, since llama.cpp fills in braces and Ollama reads quotes."""
        stem = re.sub(r"[^\w.-]", "_", self.model.resolve().name).lstrip("-") or "model"
        return f"{stem}{f'-{self.quantize.upper()}' if self.quantize else ''}.gguf"


def export(
    model: Path | str,
    out: Path | str | None = None,
    *,
    to: Target,
    quantize: str | None = None,
    base: str | None = None,
    llama_cpp: Path | None = None,
    trust_code: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a model or an adapter in the format of another program, with the converter of that program.

    Args:
        model: the folder of a model; for `gguf-lora` that of an adapter.
        out: the folder to write; by default the name of `model` with `-gguf` and the like.
        to: `gguf` (llama.cpp), `ollama` (GGUF and a Modelfile), `gguf-lora`, `mlx`.
        quantize: a type of llama.cpp (`q4_k_m`), or `q4` and the like for `mlx`; by default values keep their 16 bits.
        base: for `gguf-lora`, the base that the adapter was trained on; by default the one that it names.
        llama_cpp: a checkout of llama.cpp; by default that of LLAMA_CPP_DIR, else its programs on the path.
        trust_code: convert a model with Python files of its own, which a converter may run.
        overwrite: replace a model in `out`.

    Raises:
        OutputError: EXPORT_TOOL, a converter is missing; EXPORT, it cannot convert this, or it failed; EXPORT_CHECK, its file
            lacks a part of the model; OUTPUT, DISK, BUSY.
    """
    folder = Path(model)
    target = Path(out) if out is not None else folder.resolve().with_name(f"{folder.resolve().name}-{to}")
    kind = quantize.lower() if quantize else None
    _check_kind(folder, to)
    _check_type(to, kind)
    _refuse_code(folder, trust_code)
    job = _Job(folder, kind, _base_folder(folder, base) if to == "gguf-lora" else None, llama_cpp)
    write = {"gguf": _prepared_gguf, "ollama": _prepared_ollama, "gguf-lora": _prepared_lora, "mlx": _prepared_mlx}[to](
        job
    )
    problems, needed = Problems(), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    check_place(target, [folder], needed, overwrite=overwrite, problems=problems)
    problems.raise_as(OutputError)
    with _unfinished(target.resolve()) as part:
        warnings = write(part)
        put_in_place(part, target.resolve(), overwrite=overwrite)
    return Exported(target, tuple(sorted(file.name for file in target.iterdir())), tuple(warnings))


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """The work folder beside `out`, empty; removed if the block fails."""
    part = part_of(out)
    with held(part, out):
        try:
            remove_entries(part, keep=[LOCK])
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def check_tools(to: Target, quantize: str | None, llama_cpp: Path | None = None) -> None:
    """Check that the target has a type, and that its programs are on this machine; the arguments are those of `export`.

    Raises:
        OutputError: OPTION, EXPORT_TOOL.
    """
    kind = quantize.lower() if quantize else None
    _check_type(to, kind)
    _programs(to, kind, llama_cpp)


def _programs(to: Target, quantize: str | None, llama_cpp: Path | None) -> tuple[list[str], list[str]]:
    """The commands of a target's converter and, if it needs one, quantiser."""
    if to == "mlx":
        return converters.mlx_convert(), []
    if to == "gguf-lora":
        return converters.script(converters.CONVERT_LORA, llama_cpp), []
    convert = converters.script(converters.CONVERT, llama_cpp)
    direct = quantize is None or quantize in _BY_CONVERTER
    return convert, [] if direct else converters.script(converters.QUANTIZE, llama_cpp)


# --- checks before ----------------------------------------------------------------------------------------------------


def _check_kind(folder: Path, to: Target) -> None:
    """Refuse a folder that the target is not for."""
    is_adapter = (folder / CONFIG).is_file() and not (folder / "config.json").is_file()
    if not folder.is_dir():
        raise OutputError.of("EXPORT", folder, "is not a folder", "give the folder of a model, or `paft pull` it first")
    if is_adapter and to != "gguf-lora":
        fix = f"paft convert {folder} OUT --to mlx" if to == "mlx" else "--to gguf-lora, or merge it into a model first"
        raise OutputError.of("EXPORT", folder, f"is an adapter, and {to} is a format of whole models", fix)
    if not is_adapter and to == "gguf-lora":
        raise OutputError.of("EXPORT", folder, "is not an adapter", "--to gguf")


def _check_type(to: Target, quantize: str | None) -> None:
    """Refuse a type that a target does not have."""
    if quantize is None:
        return
    if to == "mlx" and quantize not in _BITS:
        raise OutputError.of("OPTION", "--quantize", f"{quantize} is not a type of MLX", f"give {', '.join(_BITS)}")
    if to == "gguf-lora" and quantize not in _BY_CONVERTER:
        what = f"{quantize} is not a type of factors in GGUF"
        raise OutputError.of("OPTION", "--quantize", what, f"give {', '.join(_BY_CONVERTER)}")
    if not quantize.replace("_", "").isalnum():
        raise OutputError.of(
            "OPTION", "--quantize", f"{quantize!r} is not a type of llama.cpp", "give one such as q4_k_m"
        )


def _refuse_code(folder: Path, trust_code: bool) -> None:
    """Refuse a model with Python files, which the libraries of a converter may import."""
    code = sorted(file.name for file in folder.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and '"auto_map"' in read_text(folder / name, "CONFIG_INVALID"):
            code.append(f"auto_map in {name}")
    if code and not trust_code:
        what = f"has Python code ({join_first(code)}), which a converter may run"
        raise OutputError.of("TRUST", folder, what, "read it, then pass trust_code=True")


def _opened(folder: Path) -> tuple[Set[int], dict[str, object]]:
    """The numbers of entries that a converted model may have, and the config.

    Raises:
        CheckpointError: its files are incomplete.
        OutputError: EXPORT, a converter cannot read it.
    """
    with Checkpoint.open(folder) as checkpoint:
        config, sizes = checkpoint.config, {name: info.numel for name, info in checkpoint.tensors.items()}
    copied = sizes.get("lm_head.weight", 0) if config.get("tie_word_embeddings") and len(sizes) > 1 else 0
    entries = {total := sum(sizes.values()), total - copied}  # mlx-lm leaves out a copy of the embeddings
    if not config.get("architectures"):
        fix = "save it with transformers, or add architectures to config.json"
        raise OutputError.of("EXPORT", folder, "has no architectures in config.json, by which converters choose", fix)
    method = str(settings_of(config).get("quant_method") or "")
    if method in _UNREAD:
        what = f"is quantised ({method}), which the converter does not read"
        raise OutputError.of("EXPORT", folder, what, f"paft dequantize {folder} OUT")
    if not is_tokenizer(files_in(folder)):
        raise OutputError.of("EXPORT", folder, "has no tokenizer, which the converter writes too", "copy the base's")
    ids, rows = TrainedTokenizer(files_in(folder)).ids, config.get("vocab_size")
    if (
        isinstance(rows, int)
        and (last := max(ids, key=ids.__getitem__, default=None)) is not None
        and ids[last] >= rows
    ):
        what = f"has the token {last} with the id {ids[last]:,}, and vocab_size is {rows:,}: the embeddings have no row for it"
        raise OutputError.of(
            "EXPORT", folder, what, "copy the tokenizer that fits the weights, or resize the embeddings"
        )
    return entries, config


def _base_folder(folder: Path, base: str | None) -> Path:
    """The folder with config and tokenizer of an adapter's base."""
    name = base or base_of(folder, "")
    if not name:
        raise OutputError.of("EXPORT", folder, "names no base, whose config the converter reads", "give --base BASE")
    return resolve(name, kind="side").folder if not Path(name).exists() else Path(name)


# --- writers ----------------------------------------------------------------------------------------------------------

_Write = Callable[[Path], list[Problem]]
"""Writes and checks the files in the work folder; returns warnings."""


def _prepared_gguf(job: _Job) -> _Write:
    """Find the programs, and check the model; return the writer."""
    convert, quantize = _programs("gguf", job.quantize, job.llama_cpp)
    direct = not quantize
    entries, config = _opened(job.model)
    layers = config.get("num_hidden_layers")

    def write(part: Path) -> list[Problem]:
        first = part / (job.name if direct else "unquantised.gguf")
        kind = job.quantize if direct and job.quantize else "auto"
        command = [*convert, str(job.model.resolve()), "--outfile", str(first), "--outtype", kind]
        converters.run(command, converters.CONVERT)
        template = TrainedTokenizer(files_in(job.model)).template
        expected = gguf_files.Expected(entries, layers if isinstance(layers, int) else None, template)
        if not direct:
            gguf_files.check(first, expected)
            converters.run(
                [*quantize, str(first), str(part / job.name), str(job.quantize).upper()], converters.QUANTIZE
            )
            first.unlink()
        return [*gguf_files.check(part / job.name, expected), *check_tokens(part / job.name, job.model, job.llama_cpp)]

    return write


def _prepared_ollama(job: _Job) -> _Write:
    from paft_merge.exporting.ollama import modelfile

    write_gguf = _prepared_gguf(job)

    def write(part: Path) -> list[Problem]:
        warnings = write_gguf(part)
        text, more = modelfile(job.model, job.name)
        (part / "Modelfile").write_text(text, encoding="utf-8")
        return [*warnings, *more]

    return write


def _prepared_lora(job: _Job) -> _Write:
    convert, _ = _programs("gguf-lora", job.quantize, job.llama_cpp)
    is_whole = job.base is not None and any(job.base.glob("*.safetensors"))
    with base_at(str(job.base)) if is_whole else nullcontext() as base:
        (verdict,) = checking.check(job.model, ["llamacpp"], base)
    if not verdict.passes:
        bad = [finding for finding in verdict.findings if finding.outcome in ("silent", "refuses")]
        raise OutputError([Problem("EXPORT", str(job.model), f"llama.cpp {one.what}", one.fix) for one in bad])
    with open_weights(job.model) as file:
        modules = sum(name.endswith((".lora_A.weight", ".lora_embedding_A")) for name in file.tensors)

    def write(part: Path) -> list[Problem]:
        command = [*convert, str(job.model.resolve()), "--base", str(job.base), "--outfile", str(part / job.name)]
        converters.run([*command, "--outtype", job.quantize or "f32"], converters.CONVERT_LORA)
        return gguf_files.check_adapter(part / job.name, modules)

    return write


def _prepared_mlx(job: _Job) -> _Write:
    convert, _ = _programs("mlx", job.quantize, job.llama_cpp)
    entries, _ = _opened(job.model)

    def write(part: Path) -> list[Problem]:
        made = part / "made"
        bits = ["-q", "--q-bits", str(_BITS[job.quantize])] if job.quantize else []
        with readable(job.model, part) as source:
            converters.run([*convert, "--hf-path", str(source), "--mlx-path", str(made), *bits], "mlx_lm.convert")
        try:
            with Checkpoint.open(made) as checkpoint:
                found = sum(info.numel for info in checkpoint.tensors.values())
        except PaftMergeError as error:
            raise OutputError.of("EXPORT_CHECK", "mlx", f"the converter's folder cannot be read: {error}") from error
        if not job.quantize and found not in entries:
            what = f"has {found:,} entries in its tensors, and the model has {max(entries):,}"
            raise OutputError.of("EXPORT_CHECK", "mlx", what, "update mlx-lm, and run it again")
        for file in made.iterdir():
            file.rename(part / file.name)
        made.rmdir()
        return []

    return write
