"""docs/cli.md lists the commands and options that there are."""

from __future__ import annotations

import click
import docs_cli
import pytest

from paft_merge.cli import cli


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    assert docs_cli.page() == docs_cli.PAGE.read_text(encoding="utf-8"), "run python tools/docs_cli.py"


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_and_option_is_on_the_page(name: str) -> None:
    section = docs_cli.PAGE.read_text(encoding="utf-8").partition(f"## `paft {name}`")[2].partition("\n## ")[0]
    options = [p for p in cli.commands[name].params if isinstance(p, click.Option) and not p.hidden]
    assert [option.opts for option in options if max(option.opts, key=len) not in section] == []
