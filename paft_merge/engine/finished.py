"""Whether a folder already holds the finished merge that `resume` asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paft_merge.engine.options import MergeOptions
from paft_merge.engine.sidefiles import identity, without_times
from paft_merge.errors import PaftMergeError, Problems
from paft_merge.hub.merged_folders import manifest_at, verify_at
from paft_merge.inputs.weight_files import is_unfinished
from paft_merge.output.manifest import is_merged
from paft_merge.plan import MergePlan


def is_finished(plan: MergePlan, out: Path | str, options: MergeOptions, problems: Problems) -> bool:
    """Whether `out` holds the finished merge of this plan, with every byte as it was written.

    Args:
        plan: the merge.
        out: its output folder.
        options: `resume` asks for this, and workers do, who do not read the bytes; else the answer is False.
        problems: receives OUTPUT if `out` holds another finished merge and `overwrite` is off.
    """
    if not options.keeps_finished or not is_merged(out) or (isinstance(out, Path) and is_unfinished(out)):
        return False
    try:
        different = list(_differences(manifest_at(out), plan, options))
        changed = verify_at(out).problems if options.resume and not different else ()
    except PaftMergeError:
        return False
    if not options.overwrite and (different or changed):
        what = (
            f"holds a finished merge with another {', '.join(different)}"
            if different
            else "was changed since its merge"
        )
        problems.add("OUTPUT", out, what, "choose another folder, or pass overwrite=True to merge again")
    return not (different or changed)


def _differences(manifest: Mapping[str, Any], plan: MergePlan, options: MergeOptions) -> Iterator[str]:
    """Names of what differs from the finished merge, as in an error of a stale resume."""
    now = without_times(identity(plan, options.device))
    for key in ("recipe", "inputs", "versions"):
        was = manifest.get(key)
        if was != now[key] and isinstance(was, Mapping):
            yield f"{key} ({', '.join([part for part in {**was, **now[key]} if was.get(part) != now[key].get(part)][:3])})"
        elif was != now[key]:
            yield key
    recorded = manifest.get("options")
    if not isinstance(recorded, Mapping) or str(recorded.get("device")).split(":")[0] != now["device"]:
        yield "device"
    made = manifest.get("tensors", {})
    if plan.recipe.output.kind == "delta":  # its tensors are known after a pass over the inputs
        made = {entry.get("delta_of") for entry in made.values()}
        different = not made <= {tensor.merged.name for tensor in plan.tensors}
    else:
        different = made.keys() != {tensor.name for tensor in plan.tensors}
    if different:
        yield "list of tensors"
