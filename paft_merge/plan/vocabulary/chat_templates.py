"""The chat template of the output: chosen, checked by parsing it, and put among the tokenizer's files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paft_merge.methods.mergekit_methods import chat_template
from paft_merge.plan.vocabulary.tokenizers import TokenizerFiles
from paft_merge.recipe import CHAT_TEMPLATES

TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_CONFIG = "tokenizer_config.json"


class ChatTemplateError(Exception):
    """No template: `what` is wrong, and the `fix`."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def choose_template(written: str, tokenizers: Sequence[TokenizerFiles | None]) -> str | None:
    """The text of the template that a recipe asks for; None when `auto` finds none.

    Args:
        written: `auto`, one of `CHAT_TEMPLATES`, or a template.
        tokenizers: of all models, in the recipe's order: the first of equally common templates is taken.

    Raises:
        ChatTemplateError: it is no Jinja template.
    """
    if written == "auto":
        found = [text.strip() for files in tokenizers if files and (text := template_of(files)) and text.strip()]
        return Counter(found).most_common(1)[0][0] if found else None
    if written in CHAT_TEMPLATES:
        return chat_template(written)
    check_template(written)
    return written


def template_of(files: TokenizerFiles) -> str | None:
    """The chat template of a tokenizer, as transformers finds it; the one called `default` of several."""
    if TEMPLATE in files:
        return _bytes(files[TEMPLATE]).decode("utf-8")
    for name in (_CONFIG, _OLD_TEMPLATE):
        found = _json(files[name]).get("chat_template") if name in files else None
        if isinstance(found, list):
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        if isinstance(found, Mapping):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def check_template(text: str) -> None:
    """Parse and compile a template as transformers would; nothing is run.

    Raises:
        ChatTemplateError: with the line inside the template.
    """
    try:
        _ENVIRONMENT.compile(text)
    except TemplateSyntaxError as error:
        what = f"line {error.lineno} of the template is no Jinja: {error.message}"
        raise ChatTemplateError(what, f"mend it, or use auto, {', '.join(CHAT_TEMPLATES)}") from error
    except TemplateError as error:
        raise ChatTemplateError(f"the template is no Jinja: {error}", "mend it") from error


def with_template(files: TokenizerFiles, text: str) -> dict[str, bytes | Path]:
    """A tokenizer's files with `text` as their only default template, where transformers looks first."""
    made = {name: content for name, content in files.items() if name != _OLD_TEMPLATE} | {TEMPLATE: text.encode()}
    if _CONFIG in made:
        config = json.loads(_bytes(made[_CONFIG]))
        if config.pop("chat_template", None) is not None:
            made[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return made


class _Generation(Extension):
    """`{% generation %}`, which marks for transformers what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)


def _bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _json(content: bytes | Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, of which the loading of a tokenizer tells."""
    try:
        found = json.loads(_bytes(content))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
