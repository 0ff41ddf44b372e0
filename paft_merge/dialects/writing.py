"""Writes the files of a converted adapter; the folder gets its name when every file is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from paft_merge.compute import kernels
from paft_merge.dialects.matrices import Matrix
from paft_merge.errors import OutputError, Problems
from paft_merge.output.folder import Finished, Output
from paft_merge.output.placing import check_place
from paft_merge.output.shards import plan_shards

_COUNTS, _SUMS = np.empty((0, len(kernels.COUNTS)), np.int64), np.empty((0, len(kernels.SUMS)))


def write(
    out: Path,
    file: str,
    tensors: Mapping[str, Matrix],
    others: Mapping[str, bytes],
    *,
    inputs: Sequence[Path],
    metadata: Mapping[str, str],
    overwrite: bool,
) -> None:
    """Write a folder with one file of tensors, and other files.

    Args:
        out: the folder; must not exist, or be empty, unless `overwrite`.
        file: name of the file of tensors.
        tensors: by name; each is read when it is written.
        others: other files by name.
        inputs: folders that are read; `out` may not be one of them, be inside one, or contain one.
        metadata: `__metadata__` of the file.
        overwrite: replace an adapter or a model in `out`.

    Raises:
        OutputError: OUTPUT, DISK, BUSY.
    """
    problems = Problems()
    needed = sum(matrix.nbytes for matrix in tensors.values())
    check_place(out, inputs, needed, overwrite=overwrite, problems=problems)
    problems.raise_as(OutputError)
    shards = plan_shards({file: [(name, m.dtype, m.shape) for name, m in tensors.items()]}, {file: metadata})
    with Output.open(out, shards, {"adapter": file}, {}, resume=False) as output:
        for name, matrix in tensors.items():
            raw: Any = np.ascontiguousarray(matrix.read()).reshape(-1).view(np.uint8)
            output.write(name, 0, raw)
            digest = xxhash.xxh3_128(xxhash.xxh3_128_digest(raw)).hexdigest()
            output.finish_tensor(Finished(name, digest, [], _COUNTS, _SUMS))
        output.complete(others, overwrite=overwrite)
