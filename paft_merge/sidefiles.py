"""What stands beside the merged weights: config, tokenizer and processor files, the manifest and the model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge import kernels
from paft_merge.output import Finished
from paft_merge.plan import COPY, MergePlan, PlannedTensor

MANIFEST = "merge_manifest.json"
FORMAT = "paft_merge.manifest/1"

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COPIED = (
    "*.index.json", "adapter_config.json", "trainer_state.json", "training_args*", "all_results.json", "*_results.json",
    "config.json", MANIFEST, "requirements*.txt", "paft_train.json",
)  # fmt: skip
_CODE = "*.py"


def side_files(plan: MergePlan, finished: Mapping[str, Finished], *, trust_remote_code: bool = False, card: bool = True) -> dict[str, bytes | Path]:
    """Everything but the shards and their index: name in the output to content, or to the file to copy.

    Args:
        plan: the merge.
        finished: every tensor as it was written.
        trust_remote_code: copy the donor's Python files too, which transformers would run when told to.
        card: write a model card (README.md).
    """
    folder = plan.donor.checkpoint.folder
    copied = (*_COPIED, _CODE) if trust_remote_code else _COPIED
    files: dict[str, bytes | Path] = {
        f.name: f
        for f in sorted(folder.iterdir())
        if f.is_file() and any(fnmatch(f.name, p) for p in copied) and not any(fnmatch(f.name, p) for p in _NOT_COPIED)
    }
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        files |= {f"{templates.name}/{f.name}": f for f in sorted(templates.glob("*.jinja"))}
    if plan.donor.checkpoint.config:
        files["config.json"] = _json({**plan.donor.checkpoint.config, **plan.config})
    files[MANIFEST] = _json(manifest(plan, finished))
    if card:
        files["README.md"] = model_card(plan, finished).encode()
    return files


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def versions() -> dict[str, str]:
    """Versions of what computes a merge's bits."""
    found = {"python": platform.python_version()}
    for name in ("paft-merge", "torch", "numpy", "numba", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def identity(plan: MergePlan) -> dict[str, Any]:
    """What makes a merge this merge: a resumed one must have the same."""
    return {
        "recipe": plan.recipe.resolved(),
        "inputs": {m.ref: _fingerprint(m.checkpoint.fingerprint(), m.adapter) for m in plan.models},
        "versions": versions(),
        "files": {s.file: s.size for s in plan.shards},
    }


def _fingerprint(checkpoint: Any, adapter: Any) -> dict[str, Any]:
    return {"checkpoint": checkpoint, **({"adapter": adapter.fingerprint()} if adapter else {})}


def manifest(plan: MergePlan, finished: Mapping[str, Finished]) -> dict[str, Any]:
    """`merge_manifest.json`: how these bytes came to be, and what was measured on the way.

    Per tensor: `method`, `digest` (XXH3-128 over the XXH3-128 of each `block_bytes`), the parameters, and per source the
    counts and norms of its delta: `zeros`, entries `below_` four thresholds, `kept` by trimming or dropping, `elected`;
    `l1`, `l2`, and the shares of `l2` squared that were kept and elected.
    """
    return {
        "format": FORMAT,
        "complete": True,
        "recipe": plan.recipe.resolved(),
        "seed": plan.recipe.seed,
        "arithmetic": plan.recipe.arithmetic,
        "rounding": plan.recipe.rounding,
        "donor": plan.donor.ref,
        **{k: v for k, v in identity(plan).items() if k in ("inputs", "versions")},
        "totals": totals(plan, finished),
        "tensors": {t.name: _tensor_entry(t, finished[t.name]) for t in plan.tensors},
    }


def _tensor_entry(tensor: PlannedTensor, finished: Finished) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "method": tensor.method, "dtype": tensor.dtype, "shape": list(tensor.shape),
        "digest": finished.digest, "block_bytes": tensor.tile_bytes,
    }  # fmt: skip
    if tensor.method == COPY:
        return entry | {"from": tensor.inputs.reads[0].source}
    sources = []
    for i, read in enumerate(tensor.inputs.sources):
        row = finished.active.index(i) if i in finished.active else None
        measured = {} if row is None else measured_row(finished.counts[row], finished.sums[row])
        sources.append({"source": read.source, "delta": "none" if row is None else read.patch.kind if read.patch else "checkpoint", **measured})
    for source, parameters in zip(sources, tensor.parameters.get("sources", ()), strict=False):
        source["parameters"] = parameters
    return entry | {"parameters": {k: v for k, v in tensor.parameters.items() if k != "sources"}, "sources": sources}


def measured_row(counts: Any, sums: Any) -> dict[str, Any]:
    """One row of a tally as the manifest writes it; {} when nothing was measured (values, not deltas)."""
    if not sums[0] and not counts[0]:
        return {}
    row = {name: int(value) for name, value in zip(kernels.COUNTS, counts, strict=True) if name != "max_bits"}
    largest = float(np.uint32(counts[-1]).view(np.float32))
    l1, square, kept, elected = (float(s) for s in sums)
    shares = {"kept_energy": kept / square if square else 0.0, "elected_energy": elected / square if square else 0.0}
    return {**row, "max": largest, "l1": l1, "l2": square**0.5, **shares}


def totals(plan: MergePlan, finished: Mapping[str, Finished]) -> list[dict[str, Any]]:
    """The measured rows of every source added up over all tensors that it changes."""
    names = dict.fromkeys(r.source for t in plan.tensors for r in t.inputs.sources)
    found = []
    for name in names:
        counts, sums, entries = np.zeros(len(kernels.COUNTS), np.int64), np.zeros(len(kernels.SUMS)), 0
        for tensor in plan.tensors:
            done = finished[tensor.name]
            for row, i in enumerate(done.active):
                if tensor.inputs.sources[i].source == name:
                    largest = max(counts[-1], done.counts[row][-1])
                    counts, sums, entries = counts + done.counts[row], sums + done.sums[row], entries + tensor.numel
                    counts[-1] = largest
        found.append({"source": name, "entries": entries, **measured_row(counts, sums)})
    return found


def model_card(plan: MergePlan, finished: Mapping[str, Finished]) -> str:
    """README.md with the metadata that mergekit writes, the recipe, and what was measured."""
    import yaml

    bases = list(dict.fromkeys(m.ref.split("+")[0] for m in plan.models))
    hub = [b for b in bases if not Path(b).exists()]
    data = {"base_model": hub, "library_name": "transformers", "tags": ["mergekit", "merge", "paft"]}
    if not hub:
        del data["base_model"]
    lines = ["---", yaml.safe_dump(data, sort_keys=False).strip(), "---", "", "# Merged model", ""]
    lines += [f"Made by [paft_merge](https://pypi.org/project/paft-merge/) with the method `{plan.recipe.merge_method}`.", ""]
    lines += ["## Sources", "", *(f"- `{m.ref}`" + (" (base)" if m is plan.donor else "") for m in plan.models), ""]
    rows = [t for t in totals(plan, finished) if t.get("l2")]
    if rows:
        lines += ["## What was merged", "", "| source | delta entries | below 1e-5 | kept | elected | L2 norm |", "|---|---|---|---|---|---|"]
        lines += [
            f"| `{r['source']}` | {r['entries']:,} | {_share(r, 'below_1e-05')} | {_share(r, 'kept')} | {_share(r, 'elected')} | {r['l2']:.4g} |"
            for r in rows
        ]
        lines.append("")
    lines += ["## Recipe", "", "```yaml", plan.recipe.text.strip(), "```", "", f"`{MANIFEST}` holds every tensor's parameters, counts and digest.", ""]
    return "\n".join(lines)


def _share(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key] / row['entries']:.1%}" if row["entries"] else "-"
