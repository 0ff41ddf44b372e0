"""YAML text as plain data with line numbers, for error messages.

The rules are those of PyYAML's safe loader (YAML 1.1: `yes` is a bool, `<<` merges), so that a file means the same as in
mergekit, with these exceptions: `1e-4` is a number, a key is always text (`on:` is not `True:`), a date is text, a
duplicate key is an error, and nesting and aliases are limited.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml

from paft_merge.errors import CheckpointError, Problem, RecipeError
from paft_merge.recipe.secrets import find_secrets, refusal, secrets_in_data

KeyPath: TypeAlias = tuple[str | int, ...]
"""The keys and indices of a value in nested data: `("models", 0, "parameters")`."""

MAX_BYTES = 4 << 20
MAX_DEPTH = 64
MAX_ALIASED = 100_000
"""Limits of a recipe: bytes of text, levels of nesting, and values that aliases expand to."""

_NO_FILE = "<text>"
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """A place in a recipe; `str()` is `file:line: models[0].weight`, without the parts that are unknown."""

    file: str
    line: int | None
    path: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path) if part)


@dataclass(frozen=True)
class Located:
    """Plain data (dict, list, str, bool, int, float, None) and its lines."""

    data: Any
    file: str = ""
    """The path as the user wrote it; empty for data from Python."""
    text: str = field(default="", repr=False)
    """The file's text; empty for a part of a file."""
    prefix: KeyPath = ()
    """The key path of `data` in its document."""
    warnings: tuple[Problem, ...] = ()
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False)
    spellings: Mapping[KeyPath, str] = field(default_factory=dict, repr=False)
    """The text of values that are numbers here and text in YAML 1.1 (`1e5`), for keys that take text."""

    @classmethod
    def of(cls, data: Any) -> Located:
        """Copy data from Python.

        Raises:
            RecipeError: a key is not text, the data is nested too deeply, or it holds a secret.
        """
        plain = _plain(data, (), 0)
        refuse_secrets(plain)
        return cls(plain)

    def line(self, steps: KeyPath = ()) -> int | None:
        """The line (from 1) of the key or item at `steps`, or of the innermost one around it; None without a file."""
        path = self.prefix + steps
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)

    def spot(self, steps: KeyPath = ()) -> SourceLocation:
        """The location of `steps`, for a message."""
        return SourceLocation(self.file, self.line(steps), dotted(self.prefix + steps))

    def spelling(self, steps: KeyPath) -> str | None:
        """The text of the number at `steps` if mergekit would read it as text."""
        return self.spellings.get(self.prefix + steps)

    def sub(self, *steps: str | int) -> Located:
        """The part at `steps`, with its lines."""
        data = self.data
        for step in steps:
            data = data[step]
        return replace(self, data=data, prefix=self.prefix + steps, text="")


def load_yaml(source: Path | str) -> Located:
    """Read the single document of a file (`Path`, or a str that is not a YAML mapping) or of YAML text.

    Raises:
        RecipeError: the file cannot be read, is not YAML (with line and column), or holds several documents.
    """
    documents = load_documents(source)
    if len(documents) > 1:
        line = documents[1].line()
        raise RecipeError.of(
            "RECIPE",
            SourceLocation(documents[1].file, line, ""),
            "a second document begins here",
            "keep one recipe in a file",
        )
    return documents[0]


def load_documents(source: Path | str, named: str | None = None) -> tuple[Located, ...]:
    """Read every non-empty document of a file; an empty file is one empty document.

    `named`: the URL of a file that is given as text.

    Raises:
        RecipeError: as for `load_yaml`; SECRET, a value or a comment is an access token.
    """
    text, file = (str(source), named) if named else _text_of(source)
    documents = tuple(_documents(text, file))
    _refuse_secrets_in(text, file, documents)
    if len(documents) > 1:
        # No document gets its own text, because a comment between two of them may belong to either.
        return tuple(replace(document, text="") for document in documents)
    return documents or (Located(None, file, text, lines={(): 1}),)


def text_at(text: str, key: str) -> str:
    """The text of a key at the top of a YAML mapping, whose other tags are not resolved; empty if there is none.

    Raises:
        yaml.YAMLError, RecursionError: it is not YAML.
    """
    node = yaml.compose(text, Loader=_Loader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    values = (value.value for name, value in pairs if name.value == key and isinstance(value, yaml.ScalarNode))
    return str(next(values, ""))


def refuse_secrets(data: Any) -> None:
    """Raise RecipeError SECRET if plain data holds an access token, which records would publish."""
    if found := [refusal(dotted(path), kind) for path, kind in secrets_in_data(data)]:
        raise RecipeError(found)


def _refuse_secrets_in(text: str, file: str, documents: Sequence[Located]) -> None:
    """Refuse secrets in the values and the comments of a file: its text is copied into records."""
    found = {str(d.spot(path)): kind for d in documents for path, kind in secrets_in_data(d.data)}
    lines = {d.line(path) for d in documents for path, _ in secrets_in_data(d.data)}
    for secret in find_secrets(text):
        line = text.count("\n", 0, secret.start) + 1
        if line not in lines:
            found.setdefault(f"{file}:{line}", secret.kind)
    if found:
        raise RecipeError([refusal(where, kind) for where, kind in found.items()])


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `load_yaml` and mergekit read back as equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def dotted(steps: Sequence[str | int]) -> str:
    """`("models", 0, "model")` as `models[0].model`; a key with other characters than letters, digits, `_` and `-` is quoted."""
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w-]+", step):
            text += f".{step}" if text else step
        else:
            text += f'["{step}"]'
    return text


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`did you mean 'density'?`, or empty text if no known word is similar."""
    near = difflib.get_close_matches(str(word), sorted(known), n=1)
    return f"did you mean '{near[0]}'?" if near else ""


def show(value: object) -> str:
    """A value for a message: at most 60 characters, and containers only by their kind."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text_of(source: Path | str) -> tuple[str, str]:
    """The text, and the name of its file."""
    if isinstance(source, str) and ("\n" in source or ": " in source or source[:1] in "{["):
        return source, _NO_FILE
    from paft_merge.inputs.safetensors_header import read_bytes  # imports NumPy, which a recipe does without

    path = Path(source)
    try:
        raw = _piped(path) or read_bytes(path, "RECIPE", MAX_BYTES)
    except CheckpointError as error:
        (found,) = error.problems
        fix = found.fix if found.code == "LFS_POINTER" else "name an existing YAML file"
        raise RecipeError.of("RECIPE", path, found.what, fix) from error
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig"), str(path)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError.of("RECIPE", f"{path}:{line}", "not UTF-8 text", "is this a recipe?") from error


def _piped(path: Path) -> bytes:
    """The recipe in a pipe of the shell: standard input, or `/dev/fd/63` of `<(...)`; empty for any other file."""
    if not path.is_relative_to("/dev") or not path.is_fifo():
        return b""
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise RecipeError.of("RECIPE", path, f"is longer than {MAX_BYTES:,} bytes", "is this a recipe?")
    return raw


def _documents(text: str, file: str) -> Iterator[Located]:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        _refuse_character(error, text, file)
    try:
        while loader.check_node():
            loader.aliased.clear()
            node = loader.get_node()
            builder = _Builder(loader, file)
            data = builder.build(node, ()) if node else None
            if data is not None:
                yield Located(data, file, text, (), tuple(builder.warnings), builder.lines, builder.spellings)
    except yaml.reader.ReaderError as error:
        _refuse_character(error, text, file)
    except yaml.MarkedYAMLError as error:
        _refuse_syntax(error, file)
    finally:
        loader.dispose()


def _refuse_character(error: yaml.reader.ReaderError, text: str, file: str) -> NoReturn:
    line = text.count("\n", 0, error.position) + 1
    raise RecipeError.of(
        "RECIPE", f"{file}:{line}", "a control character is not allowed", "is this a recipe?"
    ) from error


_FIXES = {
    "found character '\\t'": "indent with spaces",
    "cannot start any token": "quote the text",
    "quoted scalar": "close the quote",
    "duplicate anchor": "give every anchor its own name",
    "expected '<document start>'": "check the brackets and the indentation",
    "mapping values are not allowed": "quote text that contains ': ', and check the indentation",
    "while scanning an alias": "quote a '*' that is meant as text",
    "while scanning an anchor": "quote a '&' that is meant as text",
    "while parsing a block": "check the indentation",
    "could not find expected ':'": "check the indentation, and the ':' after the key",
    "found undefined alias": "define it with '&' above, or quote the '*'",
    "while parsing a flow": "check the brackets and commas",
}


def _refuse_syntax(error: yaml.MarkedYAMLError, file: str) -> NoReturn:
    mark = error.problem_mark or error.context_mark
    where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
    what = " ".join(part for part in (error.context, error.problem) if part)
    fix = next((fix for words, fix in _FIXES.items() if words in what), "")
    kind = "" if isinstance(error, yaml.constructor.ConstructorError) else "not YAML: "
    raise RecipeError.of("RECIPE", where, kind + what.replace("\n", " "), fix or (error.note or "")) from error


def _refuse(node: Any, what: str, fix: str = "") -> NoReturn:
    """Reject a node or event as PyYAML rejects a syntax error, with line and column."""
    raise yaml.constructor.ConstructorError(None, None, what, node.start_mark, fix)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader of nodes, with limited nesting, numbers such as `1e-4`, and no dates."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.aliased: set[int] = set()
        """The ids of nodes that an alias refers to."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth >= MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            _refuse(event, f"nested deeper than {MAX_DEPTH} levels", "a recipe needs about ten")
        is_alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias:
            self.aliased.add(id(node))
        return node


_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != f"{_TAG}timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}float#exponent", _EXPONENT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes text such as `1e-4`."""


_Dumper.add_implicit_resolver(f"{_TAG}float#exponent", _EXPONENT, list("-+0123456789."))


class _Builder:
    """Converts the nodes of one document to plain data and records the line of each."""

    def __init__(self, loader: _Loader, file: str) -> None:
        self.loader, self.file = loader, file
        self.lines: dict[KeyPath, int] = {}
        self.spellings: dict[KeyPath, str] = {}
        self.warnings: list[Problem] = []
        self.open: set[int] = set()
        self.from_alias = 0

    def build(self, node: yaml.Node, steps: KeyPath, repeated: bool = False) -> Any:
        """The data of `node` at `steps`; `repeated`: an alias refers to it or to a node around it."""
        self.lines.setdefault(steps, node.start_mark.line + 1)
        repeated = repeated or id(node) in self.loader.aliased
        self.count(node, repeated)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, steps)
        if len(steps) > MAX_DEPTH:
            _refuse(node, f"nested deeper than {MAX_DEPTH} levels", "a recipe needs about ten")
        with self.inside(node):
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, steps, repeated)
            return self.items(node, steps, repeated)

    def count(self, node: yaml.Node, values: int) -> None:
        """Count values that come from aliases, so that a few lines cannot expand to billions."""
        self.from_alias += values
        if self.from_alias > MAX_ALIASED:
            _refuse(node, f"aliases expand to more than {MAX_ALIASED:,} values", "write them out, or use fewer")

    @contextmanager
    def inside(self, node: yaml.Node) -> Iterator[None]:
        """Reject a node that contains itself."""
        if id(node) in self.open:
            _refuse(node, "an alias refers to a value that contains it", "write the value out")
        self.open.add(id(node))
        yield
        self.open.remove(id(node))

    def items(self, node: yaml.Node, steps: KeyPath, repeated: bool) -> list[Any]:
        self.expect(node, "seq")
        return [self.build(item, (*steps, i), repeated) for i, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, steps: KeyPath, repeated: bool) -> dict[str, Any]:
        data = {}
        for key, (key_node, value) in self.pairs(node).items():
            self.lines[(*steps, key)] = key_node.start_mark.line + 1
            data[key] = self.build(value, (*steps, key), repeated)
        return data

    def pairs(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """A mapping's own pairs, and those that `<<` adds and its own pairs override."""
        self.expect(node, "map")
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value in node.value:
            if key_node.tag == f"{_TAG}merge":
                for pairs in reversed(self.merged(value)):
                    merged.update(pairs)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                _refuse(key_node, "a key must be text", "quote it")
            if key_node.value in own:
                first = own[key_node.value][0].start_mark.line + 1
                _refuse(key_node, f"the key '{key_node.value}' is already on line {first}", "keep one of the two")
            own[key_node.value] = key_node, value
        return merged | own

    def merged(self, node: yaml.Node) -> list[dict[str, tuple[yaml.Node, yaml.Node]]]:
        """The pairs that one `<<` merges; the earlier mapping of a list wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found = []
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                _refuse(source, "'<<' merges a mapping or a list of mappings", "name one by its alias: '<<: *name'")
            with self.inside(source):
                found.append(self.pairs(source))
            self.count(source, len(found[-1]))
        return found

    def scalar(self, node: yaml.ScalarNode, steps: KeyPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind == "float#exponent":
            self.spellings[steps] = node.value
            return float(node.value.replace("_", ""))
        if kind in ("str", "value", "merge"):
            return node.value
        make = {
            "null": self.loader.construct_yaml_null,
            "bool": self.loader.construct_yaml_bool,
            "int": self.loader.construct_yaml_int,
            "float": self.loader.construct_yaml_float,
        }.get(kind)
        if make is None:
            self.expect(node, "str")
        try:
            value = make(node) if make else None
        except (ValueError, KeyError, IndexError):
            _refuse(node, f"{show(node.value)} cannot be read as {kind}", "quote text, or write a plain number")
        self.warn_of_traps(node, steps, value)
        return value

    def warn_of_traps(self, node: yaml.ScalarNode, steps: KeyPath, value: Any) -> None:
        """Warn that `012` is 10 and `1:30` is 90 in YAML 1.1."""
        if re.fullmatch(r"[-+]?0[0-7_]+", node.value) or (":" in node.value and isinstance(value, int | float)):
            where = SourceLocation(self.file, node.start_mark.line + 1, dotted(steps))
            what = f"{node.value} is {value} in YAML 1.1"
            self.warnings.append(Problem("NUMBER", str(where), what, f"write {value}, or quote it if it is text"))

    def expect(self, node: yaml.Node, kind: str) -> None:
        """Reject `!!python/...` and every other tag that makes an object."""
        if node.tag != _TAG + kind:
            shown = node.tag.replace(_TAG, "!!")
            _refuse(node, f"the tag {shown} is not allowed", "a recipe holds plain data; remove the tag")


def _plain(data: Any, steps: KeyPath, depth: int) -> Any:
    """Copy containers as dict and list."""
    if depth > MAX_DEPTH:
        raise RecipeError.of("RECIPE", dotted(steps[:4]) + "...", f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise RecipeError.of("RECIPE", dotted(steps), f"a key must be text, got {show(key)}", "quote it")
        return {key: _plain(value, (*steps, key), depth + 1) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value, (*steps, i), depth + 1) for i, value in enumerate(data)]
    return str(data) if isinstance(data, Path) else data
