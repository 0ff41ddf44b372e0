"""Sources of rows: local files, folders, data sets of the Hub, and rows in memory; each row has a place for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError, first_line
from paft_merge.recipe.sections import not_found, suggestion
from paft_merge.training.loaded_sets import LOADERS, is_saved, load_set
from paft_merge.training.row_files import SUFFIXES, Number, Row, read_rows, suffix_of
from paft_merge.training.row_forms import kind_of_value
from paft_merge.training.schema import DataSpec
from paft_merge.training.train_options import need_extras

_BUILDERS = ("json", "csv", "parquet", "arrow")
"""Names of `load_dataset` that read the files in `data_files`."""

Placed = Iterator[tuple[str, Row]]


@dataclass
class Survey:
    """The columns of a source, from all of its rows."""

    rows: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    """What each column holds (see `row_forms.columns_of`)."""
    types: dict[str, set[type]] = field(default_factory=dict)
    """Python types of the values that are not null."""
    fractions: set[str] = field(default_factory=set)
    """Columns with a JSON number that is not an int64."""

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        for name, value in row.items():
            types = self.types.setdefault(name, set())
            if value is not None:
                types.add(type(value))
            if isinstance(value, Number) and (len(value) > 18 or set(value) & set(".eE")):
                self.fractions.add(name)
            kind = kind_of_value(value)
            if kind is None:
                self.columns.setdefault(name, "other")
            elif _ORDER[kind] >= _ORDER[self.columns.get(name, "other")]:
                self.columns[name] = kind


_ORDER = {"other": 0, "scalar": 1, "turns": 2, "text": 3}


@dataclass(frozen=True)
class Source:
    """One data set."""

    name: str
    """Its path or name, for messages."""
    read: Callable[[], Placed]
    """Read all rows from the start, each with its place."""
    selected: bool = False
    """The user listed the columns."""
    features: Any = None
    """`datasets.Features`, if known."""

    def survey(self) -> Survey:
        """Look at every row."""
        found = Survey()
        for _, row in self.read():
            found.add(row)
        return found


def source_of(spec: DataSpec, folder: Path) -> Source:
    """Open a data set of a recipe. Relative files are looked for under `folder` first.

    Raises:
        TrainError: DATA; MISSING, `datasets` is not installed.
    """
    files = _files(spec, folder)
    if files and all(suffix_of(path) in SUFFIXES for path in files):
        return _of_files(spec, files)
    need_extras()
    local = None if files else _beside(spec.path, folder)
    rows = load_set(spec, local, files)
    if local is not None and is_saved(local):
        rows = _of_split(rows, spec)
    return _of_dataset(rows, spec)


def in_memory(rows: Any, name: str) -> Source:
    """Rows that are given in Python: a `datasets.Dataset`, or any iterable of mappings."""
    if hasattr(rows, "column_names") and hasattr(rows, "select"):
        return Source(name, lambda: _rows_of(rows), features=rows.features)
    held = list(rows)
    if wrong := next((row for row in held if not isinstance(row, dict)), None):
        raise TrainError.of("DATA", name, f"a row is {type(wrong).__name__}, not a dict", "give dicts or a Dataset")
    return Source(name, lambda: ((f"row {i}", dict(row)) for i, row in enumerate(held, 1)))


# --- local files ---------------------------------------------------------------------------------------------------------


def _files(spec: DataSpec, folder: Path) -> list[Path]:
    """The local files of a data set; empty when `datasets` should look for them.

    Raises:
        TrainError: DATA, when a path is local and does not exist, or holds nothing.
    """
    patterns = [spec.data_files] if isinstance(spec.data_files, str) else spec.data_files or []
    if spec.path in _BUILDERS and not _beside(spec.path, folder) and patterns:
        return [path for pattern in patterns for path in _matching(pattern, (folder, Path()), spec)]
    local = _beside(spec.path, folder)
    if local is None and any(mark in spec.path for mark in "*?["):
        return _matching(spec.path, (folder, Path()), spec)
    if local is None:
        if _looks_local(spec.path):
            raise _missing(spec.path, folder)
        return []
    if not local.is_dir() and not local.is_file():
        raise TrainError.of("DATA", spec.path, "is not a regular file", "name a file or a folder of rows")
    if local.is_file():
        if suffix_of(local) not in (*SUFFIXES, *LOADERS):
            fix = f"use {', '.join(SUFFIXES)} (each also .gz) or .parquet"
            raise TrainError.of("DATA", spec.path, f"{local.suffix or 'no suffix'} is not a known format", fix)
        if not local.stat().st_size:
            raise TrainError.of("DATA", spec.path, "the file is empty", "write one row per line, or use another file")
        return [local]
    if patterns:
        return [path for pattern in patterns for path in _matching(pattern, (local,), spec)]
    return _of_folder(local, spec)


def _of_folder(local: Path, spec: DataSpec) -> list[Path]:
    """The files of a split in a folder without a data card, by the rules of `datasets`."""
    if spec.name or spec.data_dir or is_saved(local):
        return []
    card = local / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            if "configs:" in file.read(20_000):
                return []
    held = [path for path in local.rglob("*") if path.is_file() and not path.name.startswith(".")]
    rows = [path for path in held if suffix_of(path) in SUFFIXES and path.name != "dataset_infos.json"]
    if not rows or any(suffix_of(path) in LOADERS for path in held):
        return []
    from glob import escape

    from datasets.data_files import get_data_patterns, resolve_pattern

    literal = escape(str(local))  # `datasets` reads the folder's name as a pattern too
    try:
        splits = {str(split): names for split, names in get_data_patterns(literal).items()}
    except FileNotFoundError:
        return sorted(rows)
    split = spec.split.partition("[")[0].strip()
    if split not in splits:
        fix = f"it has {', '.join(splits)}"
        raise TrainError.of("DATA", spec.path, f"cannot be loaded: ValueError: Unknown split {split!r}", fix)
    found = set[Path]()
    for pattern in splits[split]:
        with suppress(FileNotFoundError):  # one of several spellings of the split's name
            found |= {Path(name) for name in resolve_pattern(pattern, literal)}
    return sorted(path for path in found if suffix_of(path) in SUFFIXES)


def _matching(pattern: str, roots: Sequence[Path], spec: DataSpec) -> list[Path]:
    """Files that a pattern names, in the first root that has any; a first part that exists is not a pattern (`st*r/*.csv`)."""
    import glob

    for root in roots:
        parts = Path(pattern).parts
        while parts and (root / parts[0]).exists():
            root, parts = root / parts[0], parts[1:]
        rest = str(Path(*parts)) if parts else ""
        found = sorted(root / name for name in glob.glob(rest, root_dir=root, recursive=True)) if rest else [root]
        if found:
            if odd := next((path for path in found if not path.is_file() and not path.is_dir()), None):
                raise TrainError.of("DATA", odd, "is not a regular file", "name a file or a folder of rows")
            files = [path for path in found if path.is_file()]
            wrong = [path for path in files if suffix_of(path) not in (*SUFFIXES, *LOADERS)]
            if wrong:
                fix = f"use {', '.join(SUFFIXES)} (each also .gz) or .parquet"
                raise TrainError.of("DATA", wrong[0], f"{wrong[0].suffix} is not a known format", fix)
            return files
    if pattern.startswith(("http://", "https://", "hf://", "s3://")):
        return []
    raise _missing(pattern, roots[0], spec.path)


def _beside(path: str, folder: Path) -> Path | None:
    return next((p for p in (folder / path, Path(path).expanduser()) if p.exists()), None)


def _looks_local(path: str) -> bool:
    known = (*SUFFIXES, *LOADERS, ".txt", ".gz", ".zip", ".xlsx")
    remote = path.startswith(("http://", "https://", "hf://", "s3://"))
    named = Path(path).suffix.lower() in known or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    return named and not remote


def _missing(path: str, folder: Path, owner: str = "") -> TrainError:
    what = f"no such file, {not_found(folder)}"
    where = f"{owner}: data_files: {path}" if owner and owner != path else path
    return TrainError.of("DATA", where, what, "check the path")


def _of_files(spec: DataSpec, files: Sequence[Path]) -> Source:
    """A source of .json, .jsonl, .csv and .tsv files, whose values stay as they are written."""
    counted: dict[str, int] = {}

    def raw() -> Placed:
        for path in files:
            for place, row in read_rows(path):
                yield (place if len(files) == 1 else f"{path.name} {place}"), row

    def read() -> Placed:
        spans = _spans(spec, lambda: counted.setdefault("rows", sum(1 for _ in raw())))
        for place, row in islice(raw() if spans is None else _sliced(raw, spans), spec.max_rows):
            yield place, _shaped(row, spec)

    if spec.rename or spec.columns:
        _check_columns(spec, _columns_of(raw()))
    return Source(spec.path, read, selected=bool(spec.columns))


def _columns_of(rows: Iterable[tuple[str, Row]]) -> list[str]:
    return list(dict.fromkeys(name for _, row in rows for name in row))


def _spans(spec: DataSpec, count: Callable[[], int]) -> list[tuple[int, int]] | None:
    """The rows of `split: name[...]`, in the notation of `datasets`; None is all rows."""
    if "[" not in spec.split and "+" not in spec.split:
        return None
    from datasets import ReadInstruction

    name = spec.split.partition("[")[0].strip()
    try:
        parts = ReadInstruction.from_spec(spec.split).to_absolute({name: count()})
    except (ValueError, AssertionError) as error:
        what = f"split {spec.split!r}: {first_line(error)}"
        raise TrainError.of("DATA", spec.path, what, "write for example train[:1000] or train[:10%]") from error
    return [(part.from_ or 0, part.to if part.to is not None else count()) for part in parts]


def _sliced(raw: Callable[[], Placed], spans: Sequence[tuple[int, int]]) -> Placed:
    for start, stop in spans:
        yield from islice(raw(), start, stop)


def _shaped(row: Row, spec: DataSpec) -> Row:
    """A row after `rename` and `columns`; a column that a rename replaces is dropped."""
    if spec.rename:
        moved = {new: row[old] for old, new in spec.rename.items() if old in row}
        row = {**{name: value for name, value in row.items() if name not in spec.rename}, **moved}
    return {name: row[name] for name in spec.columns if name in row} if spec.columns else row


def _check_columns(spec: DataSpec, columns: Sequence[str]) -> None:
    """Raise TrainError DATA unless `rename` and `columns` name columns that are there."""
    after = {spec.rename.get(name, name) for name in columns}
    missing = [name for name in spec.rename if name not in columns]
    missing += [name for name in spec.columns or () if name not in after and name not in spec.rename.values()]
    if missing:
        fix = "; ".join(suggestion(name, columns) for name in missing)
        raise TrainError.of("DATA", spec.path, f"no column {', '.join(map(repr, missing))}", fix)


# --- `datasets` ----------------------------------------------------------------------------------------------------------


def _of_split(held: Any, spec: DataSpec) -> Any:
    """The rows of a split in a folder that `save_to_disk` wrote."""
    if isinstance(held, dict):
        name = spec.split.partition("[")[0].strip()
        if name not in held:
            raise TrainError.of("DATA", spec.path, f"has no split {name!r}", f"it has {', '.join(held)}")
        held = held[name]
    spans = _spans(spec, lambda: len(held))
    return held if spans is None else held.select([i for start, stop in spans for i in range(start, stop)])


def _of_dataset(rows: Any, spec: DataSpec) -> Source:
    _check_columns(spec, rows.column_names)
    if spec.rename:
        clash = [new for new in spec.rename.values() if new in rows.column_names and new not in spec.rename]
        rows = rows.remove_columns(clash).rename_columns(spec.rename)
    if spec.columns:
        rows = rows.select_columns(spec.columns)
    if spec.max_rows:
        rows = rows.select(range(min(spec.max_rows, len(rows))))
    return Source(spec.path, lambda: _rows_of(rows), selected=bool(spec.columns), features=rows.features)


def _rows_of(rows: Any) -> Placed:
    """Rows of a Dataset, read in batches."""
    names, at = rows.column_names, 0
    for batch in rows.iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            at += 1
            yield f"row {at}", dict(zip(names, values, strict=True))
