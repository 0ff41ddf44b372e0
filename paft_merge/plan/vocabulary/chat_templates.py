"""The chat template of the output: chosen, parsed as a check, and added to the tokenizer's files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paft_merge.errors import cause_of
from paft_merge.methods.mergekit_methods import chat_template
from paft_merge.plan.vocabulary.tokenizers import TokenizerFiles
from paft_merge.plan.vocabulary.trained_tokenizers import TEMPLATE, TrainedTokenizer, content_of
from paft_merge.recipe import CHAT_TEMPLATES
from paft_merge.recipe.diagnostics import UnlocatedError

_OLD_TEMPLATE = "chat_template.json"
_CONFIG = "tokenizer_config.json"


class ChatTemplateError(UnlocatedError):
    """An invalid template."""


def choose_template(written: str, tokenizers: Sequence[TrainedTokenizer | None]) -> str | None:
    """The text of a recipe's template; None when `auto` finds none.

    Args:
        written: `auto`, one of `CHAT_TEMPLATES`, or a template.
        tokenizers: in the recipe's order. `auto` takes the most common template, of ties the first.

    Raises:
        ChatTemplateError: `written` is not a Jinja template.
    """
    if written == "auto":
        found = [one.template.strip() for one in tokenizers if one and one.template]
        return Counter(found).most_common(1)[0][0] if found else None
    if written in CHAT_TEMPLATES:
        return chat_template(written)
    check_template(written)
    return written


def check_template(text: str) -> None:
    """Parse a template as transformers would. It is not compiled, because compiling computes its constants.

    Raises:
        ChatTemplateError: a syntax error, with its line in the template; a filter or test that jinja2 does not have.
    """
    try:
        for node in _ENVIRONMENT.parse(text).find_all((nodes.Filter, nodes.Test)):
            known = _ENVIRONMENT.filters if isinstance(node, nodes.Filter) else _ENVIRONMENT.tests
            if node.name not in known:
                raise TemplateSyntaxError(f"No {type(node).__name__.lower()} named {node.name!r}", node.lineno)
    except TemplateSyntaxError as error:
        what = f"line {error.lineno} of the template is not valid Jinja: {error.message}"
        raise ChatTemplateError(what, f"fix it, or use auto, {', '.join(CHAT_TEMPLATES)}") from error
    except (TemplateError, ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        raise ChatTemplateError(f"the template is not valid Jinja: {cause_of(error)}", "fix it") from error


def render(text: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> str | None:
    """The prompt that a template makes of a conversation, in a sandbox; None if it refuses it. Call it in a child process.

    Args:
        text: the template.
        messages: each with `role` and `content`.
        special: the special tokens by name (`bos_token`).
    """
    try:
        return _ENVIRONMENT.from_string(text).render(messages=messages, add_generation_prompt=True, **special)
    except Exception:  # a template raises anything, also through `raise_exception`, which is not defined here
        return None


def with_template(files: TokenizerFiles, text: str) -> dict[str, bytes | Path]:
    """A tokenizer's files with `text` as the only default template, in the file that transformers reads first."""
    made = {name: content for name, content in files.items() if name != _OLD_TEMPLATE} | {TEMPLATE: text.encode()}
    if _CONFIG in made:
        config = json.loads(content_of(made[_CONFIG]))
        if config.pop("chat_template", None) is not None:
            made[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return made


class _Generation(Extension):
    """`{% generation %}`, by which transformers finds the assistant's tokens."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
