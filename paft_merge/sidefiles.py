"""What stands beside the merged weights: config, tokenizer and processor files, the manifest and the model card."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from paft_merge import kernels
from paft_merge.bridge import WholeTensor
from paft_merge.checkpoint import Checkpoint
from paft_merge.errors import Problem
from paft_merge.hub import SIDE_FILES, is_repository
from paft_merge.output import Finished
from paft_merge.plan import COPY, MergePlan, Model, PlannedTensor

MANIFEST = "merge_manifest.json"
FORMAT = "paft_merge.manifest/1"

_NOT_COPIED = (
    "*.index.json", "adapter_config.json", "trainer_state.json", "training_args*", "all_results.json", "*_results.json",
    "config.json", MANIFEST, "requirements*.txt", "paft_train.json",
)  # fmt: skip
_CODE = "*.py"

_SAMPLE_BYTES = 4096


def side_files(
    plan: MergePlan, finished: Mapping[str, Finished], *, trust_remote_code: bool = False, card: bool = True
) -> dict[str, bytes | Path]:
    """Everything but the shards and their index: name in the output to content, or to the file to copy.

    Args:
        plan: the merge.
        finished: every tensor as it was written.
        trust_remote_code: copy the donor's Python files too, which transformers would run when told to.
        card: write a model card (README.md).
    """
    folder = plan.donor.checkpoint.folder
    copied = (*SIDE_FILES, _CODE) if trust_remote_code else SIDE_FILES
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


def code_notice(plan: MergePlan, *, trust_remote_code: bool) -> list[Problem]:
    """A warning when the donor brings Python code: it was copied, or the output's config names what is not there."""
    checkpoint = plan.donor.checkpoint
    files = sorted(f.name for f in checkpoint.folder.glob(_CODE))
    if not files or not (trust_remote_code or "auto_map" in checkpoint.config):
        return []
    if trust_remote_code:
        return [Problem("REMOTE_CODE", plan.donor.ref, f"its {', '.join(files)} are copied, and not run", "read them")]
    what = f"its config.json names code of its own, and {', '.join(files)} are not copied"
    return [Problem("REMOTE_CODE", plan.donor.ref, what, "pass --trust-remote-code to copy them; they are never run")]


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def versions(plan: MergePlan) -> dict[str, str]:
    """Versions of what computes a merge's bits."""
    found = {"python": platform.python_version()}
    borrowed = any(isinstance(tensor.rule, WholeTensor) for tensor in plan.tensors)
    for name in ("paft-merge", "torch", "numpy", "numba", "safetensors", *(["mergekit"] if borrowed else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def identity(plan: MergePlan, device: str) -> dict[str, Any]:
    """What makes a merge this merge: a resumed one must have the same. `device` as in `device.ops_for`."""
    return {
        "device": device.split(":")[0],
        "recipe": plan.recipe.resolved(),
        "inputs": {m.ref: _fingerprint(m) for m in plan.models},
        "versions": versions(plan),
        "files": {s.file: s.size for s in plan.shards},
    }


def _fingerprint(model: Model) -> dict[str, Any]:
    """What tells a model from others: sizes, times, digests of headers and configs, a sample of the data."""
    found = {"checkpoint": _fingerprint_of(model.checkpoint, model.checkpoint.config)}
    for name in model.adapter.fingerprint() if model.adapter else ():
        assert model.adapter is not None
        with Checkpoint.open(model.adapter.folder / name) as file:
            found["adapter"] = _fingerprint_of(file, model.adapter.config)
    return found


def _fingerprint_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    digest = xxhash.xxh3_128_hexdigest(json.dumps(config, sort_keys=True).encode())
    return {"files": checkpoint.fingerprint(), "config": digest, "sample": _sample(checkpoint)}


def _sample(checkpoint: Checkpoint) -> str:
    """XXH3-128 of the first 4 KiB of every tensor: headers of fine-tunes are equal, their first weights hardly ever are."""
    digest = xxhash.xxh3_128()
    for name, info in checkpoint.tensors.items():
        held = bytearray(min(info.nbytes, _SAMPLE_BYTES))
        checkpoint.read_into(name, 0, held)
        digest.update(held)
    return digest.hexdigest()


def _without_times(found: Any) -> Any:
    """Fingerprints as they are on any machine: a copy of a file has the same."""
    if isinstance(found, Mapping):
        return {key: _without_times(value) for key, value in found.items() if key != "mtime_ns"}
    return found


def manifest(plan: MergePlan, finished: Mapping[str, Finished]) -> dict[str, Any]:
    """`merge_manifest.json`: how these bytes came to be, and what was measured on the way.

    Per tensor: `method`, `digest` (XXH3-128 over the XXH3-128 of each `block_bytes`), the parameters, and per source the
    counts and norms of its delta: `zeros`, entries `below_` four thresholds, `kept` by trimming or dropping, `elected`;
    `max`, `l1`, `l2`, and the shares of `l2` squared that were kept and elected; null for what is not finite.
    """
    return {
        "format": FORMAT,
        "complete": True,
        "recipe": plan.recipe.resolved(),
        "seed": plan.recipe.seed,
        "arithmetic": plan.recipe.arithmetic,
        "rounding": plan.recipe.rounding,
        "allow_nonfinite": plan.allow_nonfinite,
        "donor": plan.donor.ref,
        "inputs": _without_times({m.ref: _fingerprint(m) for m in plan.models}),
        "versions": versions(plan),
        "totals": totals(plan, finished),
        "tensors": {t.name: _tensor_entry(t, finished[t.name]) for t in plan.tensors},
    }


def _tensor_entry(tensor: PlannedTensor, finished: Finished) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "method": tensor.method, "dtype": tensor.dtype, "shape": list(tensor.shape),
        "digest": finished.digest, "block_bytes": tensor.tile_bytes,
    }  # fmt: skip
    if finished.nonfinite:
        entry["nonfinite"] = finished.nonfinite
    if tensor.method == COPY:
        return entry | {"from": tensor.inputs.reads[0].source}
    sources = []
    for i, read in enumerate(tensor.inputs.sources):
        row = finished.active.index(i) if i in finished.active else None
        measured = {} if row is None else measured_row(finished.counts[row], finished.sums[row])
        kind = "none" if row is None else read.patch.kind if read.patch else "checkpoint"
        sources.append({"source": read.source, "delta": kind, **measured})
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
    measured = {"max": largest, "l1": l1, "l2": square**0.5, **shares}
    return {**row, **{key: value if math.isfinite(value) else None for key, value in measured.items()}}


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

    refs = [ref for m in plan.recipe.references for ref in (m.path, m.lora) if ref]
    hub = [ref for ref in dict.fromkeys(refs) if is_repository(ref) and not Path(ref).exists()]
    data: dict[str, Any] = {"base_model": hub} if hub else {}
    data |= {"library_name": "transformers", "tags": ["mergekit", "merge", "paft"]}
    metadata = yaml.safe_dump(data, sort_keys=False)
    made = "Made by [paft_merge](https://pypi.org/project/paft-merge/) with the method"
    lines = ["---", metadata.strip(), "---", "", "# Merged model", "", f"{made} `{plan.recipe.merge_method}`.", ""]
    lines += ["## Sources", "", *(f"- `{m.ref}`" + (" (base)" if m is plan.donor else "") for m in plan.models), ""]
    lines += [*_measured_table([row for row in totals(plan, finished) if row.get("l2")])]
    lines += ["## Recipe", "", "```yaml", plan.recipe.text.strip(), "```", ""]
    lines += [f"`{MANIFEST}` holds every tensor's parameters, counts and digest.", ""]
    return "\n".join(lines)


def _measured_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = ["| source | delta entries | below 1e-5 | kept | elected | L2 norm |", "|---|---|---|---|---|---|"]
    body = [
        f"| `{r['source']}` | {r['entries']:,} | {_share(r, 'below_1e-05')} | {_share(r, 'kept')} | {_share(r, 'elected')} "
        f"| {r['l2']:.4g} |"
        for r in rows
    ]
    return ["## What was merged", "", *head, *body, ""]


def _share(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key] / row['entries']:.1%}" if row["entries"] else "-"
