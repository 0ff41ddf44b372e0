"""Commands in the comments of recipes and in the documentation exist, with the options and arguments that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from paft_merge.cli import cli

ROOT = Path(__file__).parents[2]


def command_lines() -> list[tuple[str, str]]:
    """Every line of a recipe's comments or of the documentation that starts with a command, and its file."""
    pages = (path for path in (ROOT / "docs").rglob("*.md") if path.name != "cli.md")  # is made from the commands
    files = [*(ROOT / "recipes").rglob("*.yaml"), *pages, ROOT / "AGENTS.md"]
    return [
        (path.name, re.split(r"\s{2,}|\s#|: ", line)[0])  # without the explanation behind it
        for path in sorted(files)
        for line in re.findall(
            r"^(?:.*# +| +)?((?:paft|python tools/\S+) .*)$", path.read_text().replace("\\\n", " "), re.MULTILINE
        )
    ]


def test_commands_of_the_recipes_and_of_the_documentation_are_found() -> None:
    names = {name for name, _ in command_lines()}
    assert names >= {
        "quickstart.yaml",
        "tiny_ties.yaml",
        "train-mistral-7b-zephyr.yaml",
        "training.md",
        "run.md",
        "publish.md",
    }


@pytest.mark.parametrize(("name", "text"), command_lines(), ids=lambda part: part.replace(" ", "_"))
def test_a_documented_command_parses(name: str, text: str) -> None:
    program, verb, *words = shlex.split(re.sub(r"[][]", "", text))
    if program == "python":
        assert (ROOT / verb).is_file()
        return
    if verb.startswith("-"):  # an option of `paft` itself
        verb, *words = words
    command = cli.commands[verb]
    context = click.Context(
        command, parent=click.Context(cli, **cli.context_settings)
    )  # with the help options of the group
    given, rest, _ = command.make_parser(context).parse_args(words)
    assert not rest, f"{name}: too many arguments: {rest}"
    for parameter in command.params:
        value = given.get(str(parameter.name))
        assert (value and isinstance(value, str | tuple)) or not parameter.required, f"{name}: lacks {parameter.name}"
