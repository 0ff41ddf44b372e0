"""Access tokens and private keys in text: their forms, and the refusal of a recipe that holds one.

A recipe is copied into manifests, model cards and records of runs, so that a token in it would be published with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Final, NamedTuple

from paft_merge.errors import Problem

LONGEST: Final = 600
"""At most this many characters of a secret decide that it is one."""

_OWN = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"
_FREE = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt]))"
"""What may not be before a secret: a letter, unless it is that of an escape; before a short prefix no `_` or `-` either."""
_IS = r"[\\\"'\]]{0,4}\s{0,4}[=:,]\s{0,4}[\\\"']{0,4}"

_KINDS: Final = {
    "hub": ("a Hugging Face token", rf"{_OWN}(?:hf_(?:oauth_|jwt_)?|api_org_)(?P<hub>[A-Za-z0-9]{{30,200}})"),
    "github": ("a GitHub token", rf"{_OWN}(?:gh[opsur]_|github_pat_)(?P<github>\w{{22,200}})"),
    "gitlab": ("a GitLab token", rf"{_OWN}glpat-(?P<gitlab>[\w-]{{20,100}})"),
    "anthropic": ("an Anthropic key", rf"{_FREE}sk-ant-(?P<anthropic>[\w-]{{20,200}})"),
    "openai": ("an OpenAI key", rf"{_FREE}sk-(?P<openai>(?=[\w-]{{0,120}}[A-Za-z0-9]{{20}})[\w-]{{20,250}})"),
    "aws": ("an AWS key", rf"{_FREE}A[KS]IA(?P<aws>[A-Z0-9]{{16}})(?![A-Za-z0-9])"),
    "aws_secret": (
        "an AWS secret key",
        rf"(?i:aws_?secret_?(?:access_?)?key){_IS}(?P<aws_secret>[A-Za-z0-9/+]{{40}})",
    ),
    "slack": ("a Slack token", rf"{_OWN}xox[a-z]-(?P<slack>[A-Za-z0-9-]{{10,200}})"),
    "google": ("a Google API key", rf"{_FREE}AIza(?P<google>[\w-]{{35}})"),
    "wandb": ("a W&B key", rf"(?i:wandb_api_key){_IS}(?P<wandb>[0-9a-f]{{40}})"),
    "bearer": (
        "a bearer token",
        rf"(?i:authorization){_IS}(?i:bearer)\s+(?P<bearer>(?=\S{{0,60}}\d|\S{{24}})[A-Za-z0-9._~+/=-]{{12,400}})",
    ),
    "url": (
        "a password in a URL",
        r"://[^\s/:@\"'<>]{1,100}:(?P<url>(?!hf_|gh[opsur]_|github_|glpat-)[^\s/:@\"'<>${}()*%]{8,200})@\w",
    ),
    "pem": (
        "a private key",
        r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----(?:\\[nr]|[\s\"',+\\]){0,80}"
        r"(?P<pem>(?:Proc-Type|DEK-Info|Version|Comment)?[A-Za-z0-9+/=:]{16,200}|(?:Proc-Type|Version): )",
    ),
}
"""By group: the name for messages, and the pattern; the group is the part that is random in a real secret."""

_PATTERN = re.compile("|".join(pattern for kind, (_, pattern) in _KINDS.items() if kind != "url"))
_URL = re.compile(_KINDS["url"][1])
_BEFORE = 80
"""A secret begins at most this many characters before its hint."""
_HINTS = (
    *("hf_", "api_org_", "ghp_", "gho_", "ghs_", "ghu_", "ghr_", "github_pat_", "glpat-", "sk-", "AKIA", "ASIA", "xox"),
    *("AIza", "PRIVATE KEY", "earer", "EARER", "ecret", "ECRET", "andb_api", "ANDB_API"),
)
"""Texts of which every secret has one; most files have few."""
_WORDS = re.compile(r"example|placeholder|redacted|passw|dummy|changeme|your[_-]?(?:api|token|key|secret|access|own|hf)|(?:token|key)[_-]?here", re.I)  # fmt: skip
_KEYS = ("hub_token", "hf_token", "push_to_hub_token", "use_auth_token", "api_key", "wandb_api_key", "openai_api_key")
"""Keys of recipes and of trainers whose values are secrets, whatever they look like."""


class Secret(NamedTuple):
    """A secret in a text: its kind for messages, and its first and last character; never its value."""

    kind: str
    start: int
    stop: int


def find_secrets(text: str, start: int = 0, own: str = "") -> Iterator[Secret]:
    """Find what looks like a secret; placeholders (`hf_xxxx`, `sk-your-key-here`) are passed over.

    Args:
        text: the text.
        start: where the search starts; characters before it are looked at.
        own: a secret that is found in any form, such as this login's token.
    """
    at = text.find(own, start) if own else -1
    while at >= 0:
        yield Secret("this login's Hugging Face token", at, at + len(own))
        at = text.find(own, at + len(own))
    tokens = (_PATTERN.finditer(text, first, last) for first, last in _parts_with_hints(text, start))
    for match in chain(_URL.finditer(text, start), *tokens):
        group = str(match.lastgroup)
        if not is_placeholder(match[group]) and not (own and own in match[0]):
            yield Secret(_KINDS[group][0], match.start(), match.end())


def _parts_with_hints(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The parts of a text around hints, in order and without overlap; matching all of a long text would take minutes."""
    hints = (match.start() for hint in _HINTS for match in re.finditer(re.escape(hint), text))
    first = last = start
    for at in sorted(hints):
        if at - _BEFORE > last:
            yield first, last
            first = at - _BEFORE
        last = max(last, at + LONGEST)
    yield first, last


def is_placeholder(body: str) -> bool:
    """Whether the random part of a secret is not random: one letter repeated, or words such as `your-token-here`."""
    letters = Counter(c for c in body.lower() if c.isalnum())
    return not letters or max(letters.values()) * 2 >= letters.total() or _WORDS.search(body) is not None


def secrets_in_data(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Find secrets in plain data: the key path of each, and its kind."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            named = str(key).lower().replace("-", "_") in _KEYS
            if named and isinstance(value, str | int) and value and value is not True:
                yield (*path, str(key)), "a secret"
            else:
                yield from secrets_in_data(value, (*path, str(key)))
    elif isinstance(data, list | tuple):
        for at, value in enumerate(data):
            yield from secrets_in_data(value, (*path, at))
    elif isinstance(data, str):
        yield from ((path, found.kind) for found in list(find_secrets(data))[:1])


def refusal(where: object, kind: str) -> Problem:
    """The problem of a recipe that holds a secret; it does not show the secret."""
    fix = "take it out, log in with `hf auth login` or set HF_TOKEN, and revoke it if others could read it"
    return Problem("SECRET", str(where), f"holds what looks like {kind}, and recipes are copied into records", fix)
