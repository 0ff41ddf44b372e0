"""Two adapters, compared by their files and, where these differ, by the deltas that they add to a base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from paft_merge.auditing.opening import open_sources
from paft_merge.dialects.places import adapter_at
from paft_merge.differences import side_file_changes
from paft_merge.differences.kinds import Change, ModelDiff, TensorDifference
from paft_merge.differences.tensor_walk import TensorWalk
from paft_merge.errors import AuditError, CheckpointError, Problem
from paft_merge.inputs.adapters import open_weights
from paft_merge.inputs.adapters.peft_types import read_settings
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.plan.vocabulary.tokenizers import files_in


def compare_adapters(refs: tuple[str, str], walk: TensorWalk, *, unpickle: bool) -> ModelDiff:
    """Compare the adapters that two references name.

    Args:
        refs: A and B.
        walk: compares tensors.
        unpickle: as for `diff`.

    Raises:
        AdapterError, CheckpointError: one cannot be opened.
    """
    folders = [adapter_at(ref, unpickle=unpickle) for ref in refs]
    with ExitStack() as stack:
        files = [stack.enter_context(open_weights(folder, unpickle=unpickle)) for folder in folders]
        sides = [{name: Read(ref, file, name) for name in file.tensors} for ref, file in zip(refs, files, strict=True)]
        tensors = walk.compare(*sides, required=False)
    if not tensors:
        fix = "give a pattern of names as the files have them, such as '*q_proj*'"
        raise CheckpointError.of("EMPTY", walk.only, "matches no tensor of either adapter", fix)
    changes, warnings, deltas = list(_changes(folders)), list[Problem](), None
    differs = any(not one.harmless for one in tensors) or any(
        c.counts for c in changes if c.file == side_file_changes.ADAPTER
    )
    if differs and folders[0].resolve() != folders[1].resolve():
        try:
            deltas = _deltas(refs, walk, unpickle=unpickle)
            if all(one.harmless for one in deltas):
                changes = [c._replace(counts=False) if c.file == side_file_changes.ADAPTER else c for c in changes]
        except AuditError as error:
            what = f"the deltas are not compared, only the files: {error.problems[0].what}"
            warnings.append(Problem("DELTAS", error.problems[0].where, what, "compare BASE+A with BASE+B"))
    return ModelDiff(refs, True, tensors, deltas, tuple(changes), tuple(warnings))


def _deltas(refs: tuple[str, str], walk: TensorWalk, *, unpickle: bool) -> tuple[TensorDifference, ...]:
    """Compare what the adapters add to every tensor of a base, which is not read.

    Raises:
        AuditError: a delta depends on the weights of the base.
    """
    with open_sources(refs, None, lazy_unpickle=unpickle) as opened:
        if opened.skipped:
            raise AuditError.of("NO_BASE", opened.skipped[0].source, opened.skipped[0].why)
        sides: tuple[dict[str, Read], dict[str, Read]] = ({}, {})
        for subject in opened.subjects:
            for side, read in zip(sides, subject.inputs.sources, strict=True):
                if read.delta:
                    side[subject.name] = read
        return walk.compare(*sides, rescalable=True, required=False)


def _changes(folders: list[Path]) -> Iterator[Change]:
    one, other = (read_settings(folder).raw for folder in folders)
    yield from side_file_changes.of_adapter_configs(one, other)
    yield from side_file_changes.of_tokenizers(files_in(folders[0]), files_in(folders[1]))
