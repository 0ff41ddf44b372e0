"""`paft doctor` and `paft completion`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.terminal import console, json_option, plain, print_json, say, warn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paft_merge.engine.doctor import Examination


@click.command(short_help="Versions, caches, rates and space, and what would go wrong.")
@click.option(
    "--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path(),
    help="The folder in which a merge is to be written. Default: the working directory.",
)  # fmt: skip
@click.option("--all", "thorough", is_flag=True, help="Also import torch, and measure the size of the Hub's cache.")
@json_option("Print JSON instead of a table.")
@click.pass_context
def doctor(ctx: click.Context, folder: Path, thorough: bool, as_json: bool) -> None:
    """Show versions, compiled kernels, rates, memory, disk, GPUs and the Hub's settings, and what would go wrong here.

    A token of the Hub is reported as present or not; its value is never shown. Exits with 3 if something would fail.
    """
    from paft_merge.compute import kernels as kernels  # defines them
    from paft_merge.engine.doctor import examine

    found = examine(folder, thorough=thorough)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if found.errors:
        ctx.exit(3)


def _show(found: Examination) -> None:
    """Print a row for each topic, then the problems."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for topic, text in _rows(found.facts):
        table.add_row(topic, plain(text))
    console(highlight=False).print(table)
    warn(found.warnings)
    from paft_merge.cli.terminal import line

    for problem in found.errors:
        say(line("error", problem))
    if not found.errors:
        say("nothing found that would fail")


def _rows(facts: Any) -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join(f"{name} {version or 'missing'}" for name, version in facts["versions"].items())
    system, out, hub, rates = facts["system"], facts["out"], facts["hub"], facts["rates"]
    free = system["free_memory_bytes"]
    memory = "" if free is None else f", {free / 1e9:.1f} GB of memory free"
    yield "system", f"{system['platform']}, {system['cores']} cores{memory}"
    kernels = facts["kernels"]
    places = ", ".join(
        one["path"] + "" if one["writable"] else f"{one['path']} (read-only)" for one in kernels["folders"]
    )
    packaged = f" ({kernels['packaged']} came with the package)" if kernels["packaged"] else ""
    yield "kernels", f"{kernels['compiled']} of {kernels['all']} compiled{packaged}, in {places}"
    yield "output", f"{out['folder']}: {out['free_bytes'] / 1e9:.1f} GB free{'' if out['writable'] else ', read-only'}"
    yield "rates", f"reads {rates['read_gbps']:.3g} GB/s, writes {rates['write_gbps']:.3g} GB/s: {rates['origin']}"
    gpus = [f"{gpu['name']} ({gpu['memory_mib'] or '?'} MiB)" for gpu in facts["gpus"]]
    yield "GPUs", ", ".join(gpus) or "none"
    size = "" if hub["cache_bytes"] is None else f" ({hub['cache_bytes'] / 1e9:.1f} GB)"
    offline = ", offline (HF_HUB_OFFLINE)" if hub["offline"] else ""
    yield "Hub", f"{'a' if hub['token'] else 'no'} token, cache {hub['cache']}{size}, {hub['endpoint']}{offline}"
    extras = [
        name if not lacking else f"{name} lacks {', '.join(lacking)}" for name, lacking in facts["extras"].items()
    ]
    yield "extras", "; ".join(extras) or "unknown, as the package is not installed"
    if torch := facts["torch"]:
        yield "torch", f"{torch['version']}, CUDA {torch['cuda'] or 'none'}, {', '.join(torch['gpus']) or 'no GPU'}"


@click.command(short_help="The script with which a shell completes commands and options.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option("Print the script as JSON.")
def completion(shell: str, as_json: bool) -> None:
    """Print the script with which SHELL completes commands, options and their values.

    In ~/.bashrc write eval "$(paft completion bash)", in ~/.zshrc eval "$(paft completion zsh)"; for fish, redirect it to
    ~/.config/fish/completions/paft.fish.
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    group = click.get_current_context().find_root().command
    script = made(group, {}, "paft", "_PAFT_COMPLETE").source()
    print_json({"shell": shell, "script": script}) if as_json else click.echo(script)
