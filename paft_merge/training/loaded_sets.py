"""Data sets that `datasets` reads (Parquet, Arrow, saved sets, the Hub), loaded in a child process with limits."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError, first_line
from paft_merge.training.child_process import LimitError, in_child
from paft_merge.training.row_files import MOST_BYTES, MOST_UNPACKED, SUFFIXES, most_unpacked, suffix_of
from paft_merge.training.schema import DataSpec

LOADERS = {".parquet": "parquet", ".arrow": "arrow"}
"""Suffixes of single files that `datasets` reads."""

MOST_MEMORY = 8 * 2**30
"""Memory that the loading process may take in addition to its parent's."""

MOST_SECONDS = 3600.0
"""Processor time of the loading process."""

MOST_COLUMNS = 10_000
"""Columns of a Parquet file, those inside structures too."""

_UNPACK = "unpack it and save it as .jsonl, if that is right, or check where it comes from"


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def load_set(spec: DataSpec, local: Path | None, files: Sequence[Path]) -> Any:
    """Load a split with `datasets`, whose cache then holds its rows unpacked.

    Args:
        spec: Names the split, and the data set of the Hub.
        local: The folder; None for the Hub.
        files: Local files of one kind, which are read in place of `local` and the Hub.

    Returns:
        A `datasets.Dataset` that decodes no images, sounds or videos. Of a folder that `save_to_disk` wrote, all of it: its
        Dataset or `DatasetDict`.

    Raises:
        TrainError: DATA, the set cannot be loaded, or loading it is beyond a limit.
    """
    if spec.path == "pandas" and not files and local is None:
        raise TrainError.of("DATA", spec.path, "reads pickles, which can run code", "save the rows as .parquet")
    for path in files:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise TrainError.of("DATA", path, f"has {size:,} bytes; at most {MOST_BYTES:,} are read", "split it")
    try:
        return next(in_child(lambda: [_loaded(spec, local, files)], None, MOST_MEMORY))
    except LimitError as error:
        raise TrainError.of("DATA", spec.path, f"cannot be loaded: loading it {error}", _UNPACK) from error


def _loaded(spec: DataSpec, local: Path | None, files: Sequence[Path]) -> Any:
    """`load_set` in the child."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetGenerationError

    pa.set_memory_pool(pa.system_memory_pool())  # the default pool may end the process where memory is refused
    resource.setrlimit(resource.RLIMIT_CPU, (int(MOST_SECONDS), resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        for path in files:
            if suffix_of(path) == ".parquet":
                _check_parquet(path)
        held = _read(spec, local, files)
        for rows in held.values() if isinstance(held, dict) else [held]:
            _decode_nothing(rows.info.features.values())
        return held
    except Exception as error:  # loaders raise errors of many types; all mean that the set cannot be read
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, TrainError | MemoryError):
            raise cause from None
        what = f"cannot be loaded: {type(cause).__name__}: {first_line(cause)}"
        fix = f"check data.path, name and split; a local file must exist and end in {', '.join(SUFFIXES)} or .parquet"
        raise TrainError.of("DATA", spec.path, what, fix) from None


def _read(spec: DataSpec, local: Path | None, files: Sequence[Path]) -> Any:
    import datasets

    if files:
        split = spec.split if spec.split.startswith("train") else "train"
        loader = LOADERS.get(suffix_of(files[0]), "json")
        return _prepared(spec.path, split, loader, data_files=[str(path) for path in files])
    if local is not None and is_saved(local):
        held = datasets.load_from_disk(str(local))
        for rows in held.values() if isinstance(held, dict) else [held]:
            sizes = {file["filename"]: Path(file["filename"]).stat().st_size for file in rows.cache_files}
            if rows.data.nbytes > sum(map(most_unpacked, sizes.values())):
                raise _too_much(spec.path)
            rows.data.validate(full=True)
        return held
    return _prepared(
        spec.path,
        spec.split,
        str(local or spec.path),
        spec.name,
        data_dir=spec.data_dir,
        data_files=spec.data_files,
        revision=spec.revision,
    )


def _prepared(where: str, split: str, *given: Any, **named: Any) -> Any:
    """`datasets.load_dataset` that checks what the files unpack to."""
    import datasets

    builder = datasets.load_dataset_builder(*given, **named)
    if tables := getattr(builder, "_generate_tables", None):
        builder._generate_tables = partial(_counted, where, tables)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _counted(where: str, tables: Any, *given: Any, **named: Any) -> Iterator[tuple[Any, Any]]:
    """The tables of a builder, checked; TrainError where they are larger than the files may unpack to."""
    sizes = {path: path.stat().st_size for path in _paths((given, named)) if path.is_file()}
    left = sum(map(most_unpacked, sizes.values())) or MOST_BYTES
    for key, table in tables(*given, **named):
        left -= table.nbytes + table.num_rows
        if left < 0:
            name = next(iter(sizes)) if len(sizes) == 1 else where
            raise _too_much(name)
        table.validate(full=True)
        yield key, table


def _too_much(where: object) -> TrainError:
    what = f"unpacks to more than {MOST_UNPACKED} times its size, or to more than {MOST_BYTES >> 30} GiB"
    return TrainError.of("DATA", where, what, _UNPACK)


def _paths(value: Any) -> Iterator[Path]:
    """The local files among the arguments of a builder; of `zip://inside.csv::/packed.zip` the last."""
    if isinstance(value, str | Path):
        yield Path(str(value).rpartition("::")[2])
    elif isinstance(value, Iterable):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _paths(one)


def _check_parquet(path: Path) -> None:
    """Raise TrainError DATA for a Parquet file that is too large by its own account."""
    from pyarrow.parquet import read_metadata  # type: ignore[import-untyped]

    held = read_metadata(path)
    if held.num_columns > MOST_COLUMNS:
        what = f"has {held.num_columns:,} columns; at most {MOST_COLUMNS:,} are read"
        raise TrainError.of("DATA", path, what, "remove the columns that are not used")
    size = sum(held.row_group(i).total_byte_size for i in range(held.num_row_groups)) + held.num_rows
    if size > most_unpacked(path.stat().st_size):
        raise _too_much(path)


def _decode_nothing(features: Iterable[Any]) -> None:
    """Let images, sounds and videos be values as they are stored: decoders open paths and URLs that rows name."""
    for feature in features:
        if isinstance(feature, dict):
            _decode_nothing(feature.values())
        elif hasattr(feature, "feature"):
            _decode_nothing([feature.feature])
        elif getattr(feature, "decode", False):
            feature.decode = False
