"""The command line: its flags, what it prints and where, its exit codes, and how quickly it answers."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from toys.merge import HERE, files_of, manifest_of, on, paft, paft_process, python, recipe, tensors_of, write_recipe

import paft_merge
from paft_merge.cli import Size, cli
from paft_merge.cli.terminal import line
from paft_merge.engine.options import MergeOptions
from paft_merge.errors import PaftMergeError, Problem
from paft_merge.methods import METHODS

README = Path(HERE) / "README.md"

MERGE_FLAGS = {
    "--dry-run", "--json", "--device", "--threads", "--memory", "--resume", "--overwrite", "--force", "--trust-remote-code",
    "--write-model-card", "--quiet", "--workers", "--read-gbps", "--write-gbps", "--gflops", "--stream-from-hub", "--strict", "--out-shard-size", "--lazy-unpickle", "--follow-links", "--allow-crimes", "--allow-nonfinite",
    "--tensor-intersection", "--tensor-union", "--import", "--output-name", "--unsafe-truncate-embeddings",
    "--worker", "--distributed", "--finalize", "--lease-seconds", "--scratch", "--engine", "--ray-address", "--max-error",
}  # fmt: skip
"""Frozen: flags say where, how loud, or what is let pass. Only --unsafe-truncate-embeddings changes merged numbers."""


def commands(group: click.Command = cli, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command by its words."""
    found = {path: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*path, name))
    return found


@pytest.fixture
def asked(family: Callable[..., dict[str, Path]], tmp_path: Path) -> Path:
    """A recipe with a gradient and a filter, of a fine-tune and an adapter."""
    paths = family(torch.bfloat16)
    weight = [{"filter": "q_proj", "value": [0, 1]}, {"value": 0.5}]
    sources = [(paths["x"], {"weight": weight, "density": 0.5}), (on(paths["base"], paths["sft"]), {"weight": 1})]
    return write_recipe(tmp_path / "r.yaml", recipe("ties", paths["base"], *sources, seed=3))


# --- what there is --------------------------------------------------------------------------------------------------------


def test_the_flags_of_merge_are_frozen() -> None:
    options = (p for p in cli.commands["merge"].params if isinstance(p, click.Option) and not p.hidden)
    assert {max(option.opts, key=len) for option in options} == MERGE_FLAGS


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_and_every_option_has_help(path: tuple[str, ...]) -> None:
    command = commands()[path]
    assert command.help
    assert command.help.strip().endswith((".", ":"))
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    result = paft(*path, "--help")
    assert result.exit_code == 0
    assert paft(*path, "-h").output == result.output


@pytest.mark.parametrize("path", [path for path in commands() if path], ids=" ".join)
def test_every_command_is_in_the_readme(path: tuple[str, ...]) -> None:
    assert f"paft {' '.join(path)}" in README.read_text()


def test_every_command_that_the_readme_names_exists() -> None:
    named = {tuple(words.split()) for words in re.findall(r"`paft ((?:[a-z]+ ?)+)", README.read_text())}
    known = {path[:1] for path in commands() if path}
    assert {words[:1] for words in named if words} <= known


def test_help_answers_without_torch() -> None:
    code = """if True:
        import sys, time
        start = time.perf_counter()
        from paft_merge.cli import cli
        try:
            cli(["--help"])
        except SystemExit as done:
            assert done.code == 0
        heavy = {"torch", "numpy", "numba", "transformers", "peft", "mergekit", "rich", "pydantic", "asyncio"} & sys.modules.keys()
        print(heavy or "light", time.process_time(), file=sys.stderr)
    """
    run = python(code)
    assert "Usage:" in run.stdout
    light, seconds = run.stderr.split()
    assert light == "light"
    assert float(seconds) < 0.5


def test_a_merge_of_checkpoints_an_audit_and_the_list_of_methods_do_without_torch(asked: Path, tmp_path: Path) -> None:
    data = json.loads(asked.read_text())
    adapter = data["models"].pop()["model"]
    code = """if True:
        import sys
        from paft_merge.cli import cli
        for arguments in (["methods"], ["merge", *sys.argv[1:3], "--quiet"], ["audit", sys.argv[3]]):
            try:
                cli(arguments)
            except SystemExit as done:
                assert done.code == 0, done.code
        assert "torch" not in sys.modules
    """
    run = python(code, write_recipe(tmp_path / "plain.yaml", data), tmp_path / "out", adapter)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "config.json").exists()
    assert "sparsity" in run.stdout


def test_the_version_is_told() -> None:
    from importlib.metadata import version

    assert paft("--version").output == f"paft, version {version('paft-merge')}\n"


# --- the plan --------------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_plan_and_writes_nothing(asked: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    result = paft("merge", asked, tmp_path / "out", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    for said in (
        "ties of 3 models",
        str(tmp_path / "x"),
        "float32, rounded once",
        "seed 3",
        "1 x lora",
        "weight=[0.5, 1]",
    ):
        assert said in re.sub(r"\s+", " ", result.stdout), result.stdout
    assert re.search(r"reads [\d.]+ kB, writes [\d.]+ kB in 1 file; [\d.]+ \wB are free", result.stdout)
    assert files_of(tmp_path) == before


def test_a_dry_run_as_json_is_the_whole_plan(asked: Path, tmp_path: Path) -> None:
    result = paft("merge", asked, tmp_path / "out", "--dry-run", "--json")
    planned = json.loads(result.stdout)
    paft("merge", asked, tmp_path / "out", "--quiet")
    entries = {entry["name"]: entry for entry in planned["tensors"]}
    base = tensors_of(tmp_path / "base")
    assert entries.keys() == base.keys()
    weights = [
        entries[f"model.layers.{i}.self_attn.q_proj.weight"]["parameters"]["sources"][0]["weight"] for i in range(3)
    ]
    assert weights == [0.0, 0.5, 1.0]
    up = entries["model.layers.0.mlp.up_proj.weight"]
    assert (up["method"], up["dtype"], up["shape"], up["base"]) == ("ties", "BF16", [48, 24], str(tmp_path / "base"))
    assert up["sources"] == [str(tmp_path / "x"), on(tmp_path / "base", tmp_path / "sft")]
    assert up["adapters"] == {on(tmp_path / "base", tmp_path / "sft"): "lora"}
    assert up["parameters"]["lambda"] == 1.0
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert planned["files"] == sizes
    assert planned["bytes_written"] == sum(sizes.values())
    inputs = [
        tmp_path / "sft" / "adapter_model.safetensors",
        *(tmp_path / n / "model.safetensors" for n in ("base", "x")),
    ]
    assert planned["bytes_read"] == pytest.approx(sum(file.stat().st_size for file in inputs), rel=0.2)
    assert planned["bytes_free"] > 0
    assert planned["arithmetic"] == "float32"
    assert planned["recipe"] == manifest_of(tmp_path / "out")["recipe"]


def test_a_dry_run_reads_no_tensor(asked: Path, tmp_path: Path) -> None:
    expected = paft("merge", asked, "--dry-run", "--json").stdout
    for name in ("base", "x"):
        file = tmp_path / name / "model.safetensors"
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        size = file.stat().st_size
        os.truncate(file, start)
        os.truncate(file, size)  # the header, and zeros
    now = json.loads(paft("merge", asked, "--dry-run", "--json").stdout)
    assert now | {"bytes_free": 0} == json.loads(expected) | {"bytes_free": 0}


def test_a_dry_run_tells_what_a_merge_would_refuse(asked: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    result = paft("merge", asked, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert f"warning[OUTPUT]: {tmp_path}/out: is a file" in result.stderr
    bad = write_recipe(tmp_path / "bad.yaml", {**json.loads(asked.read_text()), "merge_method": "tees"})
    assert paft("merge", bad, "--dry-run").exit_code == 1


def test_a_dry_run_of_many_kinds_of_tensors_is_short(asked: Path, tmp_path: Path) -> None:
    data = json.loads(asked.read_text())
    names = list(tensors_of(tmp_path / "base"))
    weight = [{"filter": name, "value": i + 1.5} for i, name in enumerate(names)] * 2
    data["models"][0]["parameters"]["weight"] = [*weight, {"value": 1}]
    shown = paft("merge", write_recipe(tmp_path / "many.yaml", data), "--dry-run").stdout
    assert "weight=[1.5, 1]" in re.sub(r"\s+", " ", shown)


def test_brackets_in_names_are_shown(asked: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "[bold]base[1]")
    data = asked.read_text().replace("/base", "/[bold]base[1]")
    asked.write_text(data)
    assert "[bold]base[1]" in paft("merge", asked, "--dry-run").stdout


# --- running ---------------------------------------------------------------------------------------------------------------


def test_exit_codes_are_0_for_done_1_for_a_fault_and_2_for_usage(asked: Path, tmp_path: Path) -> None:
    assert paft("merge", asked, tmp_path / "out").exit_code == 0
    assert paft("merge", asked, tmp_path / "out").exit_code == 1
    for usage in (
        [],
        [asked],
        [asked, tmp_path / "b", "--threads", "0"],
        [asked, tmp_path / "b", "--memory", "lots"],
        [asked, "b", "--no"],
    ):
        result = paft("merge", *usage)
        assert result.exit_code == 2, usage
        assert "Usage:" in result.stderr
    assert paft("mrege").exit_code == 2


def test_a_merge_prints_its_folder_on_stdout_and_with_quiet_nothing(asked: Path, tmp_path: Path) -> None:
    loud, quiet = paft("merge", asked, tmp_path / "loud"), paft("merge", asked, tmp_path / "quiet", "--quiet")
    assert loud.stdout == f"{tmp_path}/loud\n"
    assert loud.stderr == f"{tmp_path}/loud is done: see its README.md and merge_manifest.json\n"
    assert quiet.output == ""


def test_flags_reach_the_merge(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def merge(recipe: Path, out: Path, options: MergeOptions, **overrides: Any) -> None:
        given.update(overrides, recipe=recipe, out=out, options=options)

    monkeypatch.setattr("paft_merge.engine.api.merge", merge)
    flags = "--device cuda:1 --threads 3 --memory 2.5GB --resume --overwrite --trust-remote-code --no-write-model-card --strict "
    flags += "--out-shard-size 800M --lazy-unpickle --allow-crimes --allow-nonfinite --stream-from-hub --tensor-union "
    flags += "--unsafe-truncate-embeddings --output-name name --import module --worker 1/4 --lease-seconds 9 --quiet"
    assert paft("merge", asked, tmp_path / "out", *flags.split()).exit_code == 0
    assert (given["recipe"], given["out"]) == (asked, tmp_path / "out")
    assert callable(given["progress"])
    assert callable(given["options"].warn)
    assert given["options"] == MergeOptions(
        device="cuda:1",
        threads=3,
        memory=2_500_000_000,
        out_shard_bytes=800_000_000,
        write_model_card=False,
        resume=True,
        overwrite=True,
        trust_remote_code=True,
        strict=True,
        lazy_unpickle=True,
        allow_crimes=True,
        allow_nonfinite=True,
        stream_from_hub=True,
        tensor_names="union",
        unsafe_truncate_embeddings=True,
        output_name="name",
        worker="1/4",
        lease_seconds=9,
        imports=("module",),
        warn=given["options"].warn,
    )


def test_every_option_of_a_merge_has_a_flag() -> None:
    named = {parameter.name for parameter in cli.commands["merge"].params}
    assert {field.name for field in fields(MergeOptions)} - named == {"progress", "warn"}


def test_messages_name_options_as_flags(asked: Path, tmp_path: Path) -> None:
    assert paft("merge", asked, tmp_path / "out").exit_code == 0
    again = paft("merge", asked, tmp_path / "out")
    assert "pass --overwrite to replace it" in again.stderr
    with pytest.raises(PaftMergeError, match="pass overwrite=True to replace it"):
        paft_merge.merge(asked, tmp_path / "out")
    spelt = {
        "pass allow_crimes=True, or": "pass --allow-crimes, or",
        "than memory=500": "than --memory 500",
        "pass imports=['one']": "pass --import one",
        "choose one with output_name='x'": "choose one with --output-name x",
        "with tensor_names='intersection'": "with --tensor-intersection",
        "threads=all": "threads=all",
        "my_threads=3": "my_threads=3",
    }
    for text, expected in spelt.items():
        assert line("error", Problem("X", "", text)) == f"error[X]: {expected}"


def test_no_message_of_a_merge_names_a_flag() -> None:
    """Python users read the messages too; the command line translates options."""
    flags = {name for option in cli.commands["merge"].params for name in option.opts if name.startswith("--")}
    for path in (Path(HERE) / "paft_merge").rglob("*.py"):
        if path.parent.name in {"cli", "training", "pipeline"} or path.name == "mergekit_plugin.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "`paft" not in node.value:
                assert not flags & {word.strip(",.:;") for word in node.value.split()}, f"{path.name}: {node.value}"


SIZES = {
    "1": 1, "1500": 1500, "2k": 2000, "1.5M": 1_500_000, "800MB": 800_000_000, "5GB": 5 * 10**9, "5B": 5 * 10**9,
    "0.1tb": 10**11, " 3 g ": 3 * 10**9,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_decimal_with_mergekits_spelling(text: str) -> None:
    assert Size().convert(text, None, None) == SIZES[text]


@pytest.mark.parametrize("text", ["", "lots", "-5M", "0", "nan", "inf", "1e999G", "5X", "GB", "0.1"])
def test_text_that_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        Size().convert(text, None, None)


def test_a_bar_shows_tensors_speed_and_the_time_left_on_a_terminal(asked: Path, tmp_path: Path) -> None:
    code = "import sys; from paft_merge.cli import cli; cli(['merge', *sys.argv[1:]])"
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": HERE, "COLUMNS": "120", "TERM": "xterm"}
    command = [sys.executable, "-c", code, asked, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as running:
        os.close(theirs)
        shown = read_all(ours)
        assert running.stdout is not None
        assert running.stdout.read() == f"{tmp_path}/out\n".encode()
    assert running.returncode == 0
    assert "12/12 tensors" in shown
    assert re.search(r"100%", shown)
    assert re.search(r"[\d.]+ [kMG]?B/s|\? ", shown)
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown)
    assert "is done" in shown


def read_all(terminal: int) -> str:
    """What a program writes to its terminal until it ends."""
    parts = []
    while select.select([terminal], [], [], 120)[0]:
        try:
            parts.append(os.read(terminal, 65536))
        except OSError:  # the other side is closed
            break
    os.close(terminal)
    return b"".join(parts).decode()


def test_a_bug_keeps_its_traceback(asked: Path, tmp_path: Path) -> None:
    before = "from paft_merge.engine import streaming\nstreaming._in_order = None"
    run = paft_process("merge", asked, tmp_path / "out", before=before)
    assert run.returncode == 1
    assert "Traceback" in run.stderr


def test_a_package_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = paft("pull", "me/model")
    assert done.exit_code == 1
    assert re.fullmatch(
        r"error\[MISSING\]: huggingface_hub: cannot be imported: .*; install paft-merge again, .*\n", done.stderr
    )


# --- methods ---------------------------------------------------------------------------------------------------------------


def test_methods_are_listed_with_their_papers_and_parameters() -> None:
    shown = paft("methods")
    assert shown.exit_code == 0
    text = re.sub(r"\s+", "", shown.output)
    for name, method in METHODS.items():
        assert name in text
        assert re.sub(r"\s+", "", method.paper)[:12] in text, name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_with_defaults_and_meanings(name: str) -> None:
    shown = paft("methods", name)
    assert shown.exit_code == 0
    text = re.sub(r"\s+", "", shown.output)
    for parameter in METHODS[name].parameters:
        assert parameter.name in text
        assert all(choice in text for choice in parameter.choices)


def test_a_method_that_is_none_is_a_fault_with_a_hint() -> None:
    result = paft("methods", "tees")
    assert result.exit_code == 1
    assert result.stderr.startswith("error[RECIPE]: tees: ")


def test_help_and_a_refused_recipe_import_no_framework(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: none/at/all}]\n"
    )
    code = f"""if True:
        import sys
        from click.testing import CliRunner
        from paft_merge.cli import cli
        heavy = {{"torch", "transformers", "mergekit"}}
        for args in (["--help"], ["merge", "--help"], ["merge", r"{tmp_path / "bad.yaml"}", r"{tmp_path / "out"}"]):
            done = CliRunner().invoke(cli, args)
            assert ("error[" in done.output) == (done.exit_code == 1) == (len(args) == 3), done.output
            assert not heavy & sys.modules.keys(), (args, heavy & sys.modules.keys())
    """
    run = python(code)
    assert run.returncode == 0, run.stderr
