"""Odd files and folders in the place of every file that a command takes: one line, soon, and little memory."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import near, save_adapter
from toys import vocabulary as words
from toys.merge import on
from toys.merge import recipe as merge_recipe
from toys.mergekit import CONFIG, llama_state

from paft_merge.auditing import audit
from paft_merge.cli import cli
from paft_merge.engine.api import merge

SECONDS = 10
"""Processor time that a command may use."""
WAIT = 20
"""Seconds after which a command that waits for the other end of a FIFO gets one."""
MEGABYTES = 300
"""Memory that a command may use for a file that it refuses."""

INPUTS = {
    "run recipe": "run ? out", "run recipe --dry-run": "run --dry-run ? out", "tune recipe": "tune ? out",
    "train recipe": "train ? out", "train recipe --dry-run": "train --dry-run ?", "merge recipe": "merge ? out",
    "merge recipe --dry-run": "merge --dry-run ?", "explain recipe": "explain ?", "dequantize model": "dequantize ? out", "evaluate recipe": "evaluate base --recipe ?",
    "evaluate exact_match": "evaluate base --exact-match ?", "evaluate preference": "evaluate base --preference ?",
    "evaluate perplexity": "evaluate base --perplexity ?", "evaluate reward": "evaluate base --reward ? words.py:words",
    "evaluate reward function": "evaluate base --reward test.jsonl ?:words", "evaluate tasks": "evaluate base --task ?",
    "evaluate instructions": "evaluate base --alpaca-eval made.json --instructions ?",
    "evaluate model": "evaluate ? --perplexity text.txt", "evaluate model adapter": "evaluate base+? --perplexity text.txt",
    "audit sources": "audit ? --base base", "audit sources recipe": "audit ?", "audit base": "audit sft --base ?",
    "export model": "export ? made --to gguf", "export base": "export sft made --to gguf-lora --base ?", "export llama_cpp": "export base made --to gguf --llama-cpp ?",
    "diff a": "diff ? base", "diff b": "diff base ?", "check adapter": "check ?", "check base": "check sft --base ?",
    "verify out": "verify ? --tensors-only", "verify recipe": "verify merged --tensors-only --recipe ?",
    "verify data": "verify merged --data ?",
    "convert adapter": "convert ? out --to peft", "convert base": "convert sft out --to vllm --base ?",
    "init base": "init --base ?", "init data": "init --base base --data ?", "init adapters": "init --adapter ? --adapter sft",
    "evaluate self_consistency": "evaluate base --self-consistency ?",
    "evaluate agreement": "evaluate base --agreement ? base", "evaluate agreement model": "evaluate base --agreement test.jsonl ?",
    "study name": "study ? --out out --smoke", "study data": "study precision --out out --smoke --data ?",
    "resize adapter": "resize ? out --rank 1",
    "extract finetune": "extract ? out --base base --rank 1", "extract base": "extract base out --base ? --rank 1",
    "push folder": "push ? me/model", "card folder": "card ?", "reproduce place": "reproduce ?", "pull reference": "pull ?",
}  # fmt: skip
"""A command for every parameter that names a file or folder to read, which is `?`."""

OUTPUTS = {
    "run folder": "run run.yaml ?", "tune folder": "tune run.yaml ?", "train out": "train run.yaml ?",
    "init out": "init --base base ?", "evaluate out": "evaluate base --perplexity text.txt --out ?",
    "evaluate alpaca_eval": "evaluate base --instructions rows.json --alpaca-eval ?", "merge out": "merge recipe.yaml ?",
    "dequantize out": "dequantize quantised ?",
    "merge mergekit_out_path": "merge recipe.yaml --out-path ?", "audit csv": "audit sft --base base --csv ?",
    "audit html": "audit sft --base base --html ?", "audit png_dir": "audit sft --base base --png-dir ?",
    "audit plots": "audit sft --base base --plots ?", "reproduce out": "reproduce merged ?",
    "convert out": "convert sft ? --to vllm", "export out": "export quantised ? --to gguf",
    "schema out": "schema merge --out ?", "verify file": "verify merged --tensors-only --require kl<1 --out ?",
    "study out": "study frozen-lake --smoke --seeds 1 --set target_steps=1 --set steps=[1] --out ?",
    "merge scratch": "merge recipe.yaml out --scratch ?", "bench folder": "bench --dir ? --size 9MB --seconds 0.01",
    "resize out": "resize sft ? --rank 1", "extract out": "extract base+sft ? --base base --rank 1",
    "extract picture": "extract base+sft --base base --curve --plot ?",
}  # fmt: skip
"""The same for files and folders to write."""

NO_FILES = {
    "run overrides", "tune overrides", "study overrides", "evaluate overrides", "evaluate device", "merge device", "merge worker", "merge imports",
    "merge output_name", "explain pattern", "explain imports", "explain output_name", "audit method", "audit parameters",
    "audit require", "check readers", "train adapters", "train devices", "push repo_id", "push branch", "push message", "push tags",
    "reproduce imports", "verify require", "verify device", "verify imports", "methods name", "methods imports", "merge mergekit_transformers_cache",
    "merge mergekit_lora_merge_cache", "merge mergekit_lora_merge_dtype", "merge mergekit_write_threads",
    "extract include", "extract exclude", "resize include", "resize exclude", "merge mergekit_intermediate_dir", "merge mergekit_random_seed", "merge ray_address", "run ray_address", "tune ray_address",
    "dequantize ray_address", "diff only", "export quantize", "schema imports",
    "doctor folder",  # it reports a faulty folder with exit code 3
}  # fmt: skip
"""Parameters of text that name no file."""


def test_every_parameter_that_may_name_a_file_is_tried() -> None:
    texts = (click.types.StringParamType, click.Path, click.File, click.Tuple)
    found = {
        f"{name} {parameter.name}"
        for name, command in cli.commands.items()
        for parameter in command.params
        if isinstance(parameter.type, texts) or type(parameter.type).__module__ != "click.types"
        if not getattr(parameter, "is_flag", False) and type(parameter.type).__name__ not in ("Size", "Rate")
    }
    tried = {" ".join(key.split()[:2]) for key in (*INPUTS, *OUTPUTS)}
    assert found == tried | NO_FILES


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def _bytes(content: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        place.write_bytes(content)
        return place

    return make


def _fifo(place: Path) -> Path:
    os.mkfifo(place)
    return place


def _link_out(place: Path) -> Path:
    """A link to a file outside the folder; a command may write through it, as every program does."""
    outside = place.parent.parent / "outside"
    outside.write_text("host\n")
    return _link(str(outside))(place)


def _link(target: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        place.symlink_to(target)
        return place

    return make


def _socket(place: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(place))  # the length of an address is limited
    return place


def _folder(place: Path) -> Path:
    place.mkdir()
    return place


BEYOND = 4_000_000_001
"""More bytes than any file but rows may have; rows of so many zeros are one line that is too long."""


def _large(place: Path) -> Path:
    with place.open("wb") as file:
        file.truncate(BEYOND)
    return place


def _unreadable(place: Path) -> Path:
    place.write_text("{}")
    place.chmod(0)
    return place


def _named(name: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        named = place.with_name(name + place.suffix)
        named.write_text("- 1\n")
        return named

    return make


KINDS: dict[str, Callable[[Path], Path]] = {
    "FIFO": _fifo, "device": _link("/dev/zero"), "socket": _socket, "folder": _folder, "unreadable": _unreadable, "large": _large,
    "aliases": _bytes(BOMB.encode()), "deep YAML": _bytes(b"- " * 3000 + b"\n"), "deep JSON": _bytes(b"[" * 100_000),
    "deep objects": _bytes(b'{"a":' * 50_000), "NUL": _bytes(b"a: \0\n" * 9), "UTF-16": _bytes("a: \u00e9\n".encode("utf-16")),
    "Latin-1": _bytes("a: \u00e9\n".encode("latin-1")), "empty": _bytes(b""), "circle": lambda place: _link(place.name)(place),
    "dangling": _link("nowhere"), "link out": _link_out, "control": _named("a\nb\x1b]0;t\x07\u202ec"), "below a file": lambda place: _bytes(b"")(place) / f"x{place.suffix}",
    "long": lambda place: place.with_name("x" * 300 + place.suffix), "long path": lambda place: place / "/".join([*("y" * 100 for _ in range(50)), place.name]), "missing": lambda place: place, "-": lambda _: Path("-"),
}  # fmt: skip


CONTENTS = {"large", "aliases", "deep YAML", "deep JSON", "deep objects", "NUL", "UTF-16", "Latin-1"}
"""Kinds that differ from each other only for the reader of the file."""

WITHOUT_CONTENTS = {
    *OUTPUTS, "run recipe --dry-run", "tune recipe", "train recipe --dry-run", "merge recipe --dry-run", "explain recipe",
}  # fmt: skip
"""Uses that write the file, or read it as another one does."""


class TooLong(BaseException):
    """Raised in a command that does not end; nothing catches it."""


@contextmanager
def bounded(fifo: Path, kind: str) -> Iterator[None]:
    """Limit the processor time of a block, and end its waiting for the other end of a FIFO."""

    def stop(number: int, frame: object) -> None:
        raise TooLong(f"busy after {SECONDS} s")

    waits = f"sleep {WAIT}; while :; do : <> {fifo}; sleep 1; done"
    other_end = subprocess.Popen(["sh", "-c", waits], start_new_session=True) if kind == "FIFO" else None
    began = time.monotonic()
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        if other_end is not None:
            os.killpg(other_end.pid, signal.SIGKILL)
            other_end.wait()
            assert time.monotonic() - began < WAIT, "the command waits for a FIFO"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, a merge, a recipe of each kind, and data; the working directory of every command."""
    top = tmp_path_factory.mktemp("odd")
    base = llama_state(300)
    for name, state in (("base", base), ("x", near(base, 1))):
        words.save_checkpoint(top / name, state, config={**CONFIG, "vocab_size": 300})
        words.save_tokenizer(top / name, "base", template="{% for m in messages %}{{ m.content }}{% endfor %}")
    save_adapter(top / "sft", base, 3)
    codes = {"w.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.ones(1, 1)}
    words.save_checkpoint(top / "quantised", codes, config={"quantization_config": {"quant_method": "fp8"}})
    asked = merge_recipe("linear", None, ("base", {"weight": 0.5}), ("x", {"weight": 0.5}))
    (top / "recipe.yaml").write_text(yaml.safe_dump(asked))
    union = merge_recipe("linear", "base", ("x", {"weight": 0.5}), (on("base", "sft"), {"weight": 0.5}))
    (top / "union.yaml").write_text(yaml.safe_dump({**union, "tokenizer_source": "union", "chat_template": "auto"}))
    with pytest.MonkeyPatch.context() as here:
        here.chdir(top)
        merge(asked, top / "merged", warn=lambda _: None)
        audit(top / "sft", base=top / "base")  # compiles the kernels, which takes longer than a command may
    adapter = {"objective": "sft", "data": "rows.json", "lora": {"r": 2}}
    (top / "run.yaml").write_text(yaml.safe_dump({"base_model": "base", "adapters": {"sft": adapter}}))
    (top / "text.txt").write_text("the quick brown fox\n")
    (top / "rows.json").write_text('[{"text": "a", "instruction": "a"}]')
    (top / "test.jsonl").write_text('{"prompt": "a"}\n')
    (top / "words.py").write_text("def words(completions, **columns): return [1.0]\n")
    return top


SUFFIXES = {
    "reward function": ".py", "tasks": ".yaml", "exact_match": ".jsonl", "preference": ".jsonl", "self_consistency": ".jsonl", "agreement": ".jsonl", "study name": ".yaml", "reward": ".jsonl", "instructions": ".json", "data": ".jsonl",
}  # fmt: skip

DATA = {
    "evaluate exact_match", "evaluate preference", "evaluate perplexity", "evaluate reward", "evaluate reward function",
    "evaluate instructions", "evaluate self_consistency", "evaluate agreement", "init data",
}  # fmt: skip

FINE = {
    ("init data", "folder"),
    ("init data", "control"),
    ("init data", "-"),
    ("init base", "-"),
    *(("pull reference", kind) for kind in KINDS),
}


@contextmanager
def as_its_owner() -> Iterator[None]:
    """Within the block, the permissions of files count for root too: this thread gives up its capabilities (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )  # version 3: two of effective, permitted, inheritable

    def ask(call: Any) -> None:
        if call(header, data):
            raise OSError(ctypes.get_errno(), "capabilities")

    ask(libc.capget)
    held = data[0], data[3]
    data[0] = data[3] = 0
    ask(libc.capset)
    try:
        yield
    finally:
        data[0], data[3] = held
        ask(libc.capset)


def outcome(command: str, place: Path, kind: str, allowed: tuple[int, ...]) -> str:
    """Describe the first rule that the answer of a command to an odd file breaks; empty if it keeps all."""
    arguments = [word.replace("?", str(place)) for word in command.split()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with bounded(place, kind):
        done = CliRunner().invoke(cli, arguments)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        error = done.exception
        return f"{type(error).__name__}: {str(error)[:200]}"
    lines = [line for line in done.output.split("\n") if line]
    wrong = [line for line in lines if not line.isprintable()]
    if done.exit_code not in allowed:
        return f"exit code {done.exit_code}: {done.output[-300:]}"
    if done.exit_code and not 1 <= sum(line.startswith(("error[", "Error: ")) for line in lines) <= 3:
        return f"{len(lines)} lines: {done.output[-600:]!r}"
    if wrong:
        return f"control characters: {wrong[0]!r}"
    return f"{grown} MB" if grown > MEGABYTES else ""


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        *(
            (use, kind) for use in INPUTS for kind in KINDS if (use, kind) != ("evaluate tasks", "-")
        ),  # a name of a task
        *((use, kind) for use in OUTPUTS for kind in KINDS if kind not in CONTENTS),
    ],
)
def test_an_odd_file_is_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = {**INPUTS, **OUTPUTS}[use]
    suffix = next((suffix for part, suffix in SUFFIXES.items() if part in use), "")
    place = KINDS[kind](tmp_path / f"odd{suffix}")
    monkeypatch.chdir(world)
    if use == "bench folder":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "rates"))
    with as_its_owner() if kind == "unreadable" and os.geteuid() == 0 else nullcontext():
        assert kind != "unreadable" or not os.access(place, os.R_OK, effective_ids=True)
        assert not outcome(command, place, kind, (0, 1, 2) if use in OUTPUTS or (use, kind) in FINE else (1, 2))


PARTS = {
    "base": (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
        "model.safetensors", "model.safetensors.index.json", "modules.json", "README.md", "NOTICE.txt",
    ),
    "sft": ("adapter_config.json", "adapter_model.safetensors", "paft_train.json", "tokenizer_config.json", "chat_template.jinja", "README.md"),
    "merged": ("merge_manifest.json", "README.md", "evaluation.json", "results_1.json", "config.json", "model.safetensors"),
    "started": ("run.json", "lock"),
}  # fmt: skip
"""Files of a base, an adapter, a finished merge and the folder of a run."""

READERS = {
    "base": (
        "merge union.yaml out", "evaluate base --perplexity text.txt", "push base me/model", "init --base base --data rows.json",
        "audit x --base base", "train run.yaml --dry-run",
    ),
    "sft": ("merge union.yaml out", "evaluate base+sft --perplexity text.txt", "push sft me/model", "init --adapter sft --adapter sft", "audit sft", "check sft", "convert sft out --to peft"),
    "merged": ("card merged", "push merged me/model", "audit merged", "reproduce merged", "merge recipe.yaml merged --resume"),
    "started": ("run run.yaml started --dry-run",),
}  # fmt: skip
"""Commands that read such a folder."""

CONTENT_KINDS = ("FIFO", "circle", "folder", "large", "deep JSON", "Latin-1", "empty")
"""A device is refused by the check that refuses a FIFO, and a file of NUL by the parser that refuses an empty one."""


@pytest.fixture(scope="module")
def changed_world(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world; a test that changes a file of it puts the file back."""
    copy = shutil.copytree(world, tmp_path_factory.mktemp("changed"), dirs_exist_ok=True)
    (copy / "started").mkdir()
    return copy


@pytest.mark.parametrize("kind", CONTENT_KINDS)
@pytest.mark.parametrize(("folder", "command"), [(f, c) for f, commands in READERS.items() for c in commands])
def test_an_odd_file_in_a_folder_is_one_line_or_left_out(
    changed_world: Path, monkeypatch: pytest.MonkeyPatch, folder: str, command: str, kind: str
) -> None:
    monkeypatch.chdir(changed_world)
    wrong = {}
    for name in PARTS[folder]:
        place, kept = changed_world / folder / name, changed_world / "kept"
        if there := place.exists():
            place.rename(kept)
        KINDS[kind](place)
        if found := outcome(command, place, kind, (0, 1, 2) if command.startswith("init") else (0, 1)):
            wrong[name] = found
        shutil.rmtree(place) if kind == "folder" else place.unlink(missing_ok=True)
        if there:
            kept.rename(place)
        for made in ("out", "out.part"):
            shutil.rmtree(changed_world / made, ignore_errors=True)
    assert wrong == {}
