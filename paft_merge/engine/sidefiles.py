"""The output files beside the weights: config, tokenizer and processor files, the manifest and the model card."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from paft_merge.compute import kernels
from paft_merge.engine import imbalance
from paft_merge.engine.coded_weights import Loss, loss_of_codes
from paft_merge.engine.factors import loss_of
from paft_merge.engine.intermediate import Intermediate
from paft_merge.engine.options import MergeOptions
from paft_merge.errors import Problem
from paft_merge.hub import snapshot_of, split_repository
from paft_merge.inputs.adapter_places import CONFIG as ADAPTER_CONFIG
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.equivalent_names import NamedLike
from paft_merge.output.card import about, licence, model_card
from paft_merge.output.folder import Finished
from paft_merge.output.manifest import FORMAT, MANIFEST
from paft_merge.output.versions import version_of
from paft_merge.plan import COPY, MergePlan, Model, PlannedTensor
from paft_merge.plan.vocabulary import is_tokenizer_file
from paft_merge.stats.record import MOST_PAIRED, Totals, pair_row_of, row_of

_SAID = ("DORA", "LEFT_OUT")
"""Codes of the warnings of a plan that the manifest and the card repeat."""

TIMES = ("mtime_ns", "ctime_ns")
"""Fields of fingerprints that a copy of a file changes."""


def model_files(plan: MergePlan, options: MergeOptions) -> dict[str, bytes | Path]:
    """Return config, tokenizer and the other files with which the weights of a merge are loaded, as `side_files` does.

    Args:
        plan: the merge.
        options: `trust_remote_code` copies the Python files of the config source.
    """
    if plan.recipe.output.kind != "checkpoint":
        return {ADAPTER_CONFIG: _json(plan.config)}
    files: dict[str, bytes | Path] = {**plan.side_files.copied}
    if options.trust_remote_code:
        files |= plan.side_files.code
    tokenizer = plan.vocabulary.files if plan.vocabulary else plan.config_source.checkpoint.tokenizer_files
    if tokenizer is not None:
        files = {name: file for name, file in files.items() if not is_tokenizer_file(name)} | {**tokenizer}
    generation = files.get("generation_config.json")
    if plan.vocabulary and isinstance(generation, Path):
        files["generation_config.json"] = plan.vocabulary.in_generation_config(generation.read_bytes())
    if plan.config_source.checkpoint.config and not plan.config_source.checkpoint.file:
        files["config.json"] = _json({**plan.config_source.checkpoint.config, **plan.config})
    return files


def side_files(plan: MergePlan, finished: Mapping[str, Finished], options: MergeOptions) -> dict[str, bytes | Path]:
    """Return every output file but the shards and their index: name to content, or to the file to copy.

    Args:
        plan: the merge.
        finished: every tensor as it was written.
        options: as for `model_files`; `write_model_card` adds README.md, and the manifest records some (see
            `MergeOptions.recorded`).
    """
    files = model_files(plan, options)
    document, entries = manifest(plan, finished, options.recorded())
    if plan.side_files.left_out:
        document["left_out"] = list(plan.side_files.left_out)
    document["files"] = {name: _digest_of(content) for name, content in sorted(files.items())}
    files[MANIFEST] = _json(document, {"tensors": entries})
    if options.write_model_card:
        files["README.md"] = model_card(document).encode()
    return files


def _digest_of(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return xxhash.xxh3_128_hexdigest(content)
    digest = xxhash.xxh3_128()
    with content.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def origins(plan: MergePlan) -> list[dict[str, Any]]:
    """Return the origin of every model and adapter: `path` and `revision` as written, the commit of a Hub repository,
    and the licence and data that its card states."""
    found: dict[tuple[str, str | None, str], dict[str, Any]] = {}

    def add(path: str, revision: str | None, kind: str, folder: Path, *, donor: bool = False) -> None:
        named = None if Path(path).expanduser().exists() else split_repository(path)
        place = snapshot_of(folder) if named else None
        hub = {"repo_id": named[0], "commit": place[1]} if named and place else {}
        hub |= {"folder": named[1]} if named and named[1] else {}
        entry = {"path": path, "revision": revision, "kind": kind, **hub, **({"donor": True} if donor else {})}
        found.setdefault((path, revision, kind), entry | ({"card": said} if (said := about(folder)) else {}))

    def walk(plan: MergePlan, top: bool) -> None:
        refs = {str(ref): ref for ref in plan.recipe.references}
        for model in plan.models:
            ref = refs[model.ref]
            if isinstance(model.checkpoint, Intermediate):
                walk(model.checkpoint.plan, top=False)
            else:
                add(ref.path, ref.revision, "model", model.checkpoint.folder, donor=top and model is plan.config_source)
            for (path, revision), adapter in zip(
                ref.adapters, model.adapter.parts if model.adapter else (), strict=True
            ):
                add(path, revision, "adapter", adapter.folder)

    walk(plan, top=True)
    return list(found.values())


def documents(plan: MergePlan) -> list[dict[str, Any]]:
    """Return the other documents of the recipe file that the merge uses, each after those it uses itself."""
    found: dict[str, dict[str, Any]] = {}
    for model in plan.models:
        if isinstance(model.checkpoint, Intermediate):
            inner = model.checkpoint.plan
            found |= {str(one.get("name")): one for one in documents(inner)}
            found[str(inner.recipe.name)] = inner.recipe.resolved()
    return list(found.values())


def code_notice(plan: MergePlan, *, trust_remote_code: bool) -> list[Problem]:
    """Return a warning if Python code was copied, or if the output's config names code that was not copied."""
    checkpoint = plan.config_source.checkpoint
    files = sorted(plan.side_files.code)
    if not files or not (trust_remote_code or "auto_map" in checkpoint.config):
        return []
    if trust_remote_code:
        return [
            Problem("REMOTE_CODE", plan.config_source.ref, f"its {', '.join(files)} are copied, not run", "read them")
        ]
    what = f"its config.json names Python code, and {', '.join(files)} are not copied"
    return [
        Problem(
            "REMOTE_CODE", plan.config_source.ref, what, "pass trust_remote_code=True to copy them; they are never run"
        )
    ]


def wide_notice(plan: MergePlan) -> list[Problem]:
    """Return a warning if tensors have too many sources for the statistics of pairs."""
    wide = max((len(tensor.inputs.sources) for tensor in plan.tensors), default=0)
    if wide <= MOST_PAIRED:
        return []
    what = f"a tensor has {wide} sources; the manifest has statistics of pairs for up to {MOST_PAIRED}"
    return [Problem("PAIRS", "", what, "paft audit measures every pair of the sources that it is given")]


def licence_notice(plan: MergePlan) -> list[Problem]:
    """Return a warning if the sources state different licences."""
    return licence({"sources": origins(plan)})[1]


def _json(data: Mapping[str, Any], written: Mapping[str, Mapping[str, bytes]] | None = None) -> bytes:
    """Return a JSON file; `written`: mappings in place of fields of `data`, whose values are JSON already."""
    texts = list[bytes]()
    for key, value in data.items():
        texts += [b",\n  " if texts else b"{\n  ", _ENCODED(key).encode(), b": "]
        rows = written.get(key) if written else None
        for at, (name, row) in enumerate(rows.items() if rows else ()):
            texts += [b",\n    " if at else b"{\n    ", _ENCODED(name).encode(), b": ", row]
        texts.append(b"\n  }" if rows else _lines(value, "  ").encode())
    return b"".join([*texts, b"\n}\n" if texts else b"{}\n"])


_ENCODED = json.JSONEncoder(ensure_ascii=False).encode


def _lines(data: Any, pad: str = "") -> str:
    """Return JSON with a line for each entry; a list of numbers takes one line."""
    inner = f"{pad}  "
    if isinstance(data, dict):
        marks, entries = "{}", [f"{_ENCODED(key)}: {_lines(value, inner)}" for key, value in data.items()]
    elif isinstance(data, list | tuple) and not {*map(type, data)} <= {int, float}:
        marks, entries = "[]", [_lines(entry, inner) for entry in data]
    else:
        return _ENCODED(data)
    joined = f",\n{inner}".join(entries)
    return f"{marks[0]}\n{inner}{joined}\n{pad}{marks[1]}" if entries else marks


def versions(plan: MergePlan) -> dict[str, str]:
    """Return the versions of the packages that compute the bits of a merge."""
    found = {"python": platform.python_version()}
    borrowed = any(tensor.rule.wants == "whole" for tensor in plan.tensors)
    renamed = any(isinstance(model.checkpoint, NamedLike) for model in plan.models)
    others = [*(["mergekit"] if borrowed else []), *(["transformers"] if renamed else [])]
    for name in ("paft-merge", "torch", "numpy", "numba", "safetensors", *others):
        found[name] = version_of(name)
    return found


def identity(plan: MergePlan, device: str) -> dict[str, Any]:
    """Return everything that determines the bits of a merge; a resumed merge must have the same identity.

    `device`: as for `devices.ops_for`.
    """
    return {
        "device": device.split(":")[0],
        "recipe": plan.recipe.resolved(),
        "inputs": {m.ref: _fingerprint(m) for m in plan.models},
        "versions": versions(plan),
        "files": {s.file: s.size for s in plan.shards},
        **({"vocabulary": plan.vocabulary.digest()} if plan.vocabulary else {}),
    }


def _fingerprint(model: Model) -> dict[str, Any]:
    """Return sizes, times, digests of headers and configs, and a digest of sampled data."""
    found = {"checkpoint": _fingerprint_of(model.checkpoint, model.checkpoint.config)}
    parts = [_fingerprint_of(part.file, part.config) for part in model.adapter.parts] if model.adapter else []
    if parts:
        found["adapter"] = parts[0] if len(parts) == 1 else {str(at): part for at, part in enumerate(parts)}
    return found


def _fingerprint_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    digest = xxhash.xxh3_128_hexdigest(json.dumps(config, sort_keys=True).encode())
    found: dict[str, Any] = {"files": checkpoint.fingerprint(), "config": digest}
    found["ctime_ns"] = {file.name: file.ctime_ns for file in checkpoint.files}
    if not checkpoint.far:  # an etag identifies all bytes, and a sample would take a request for each tensor
        found["sample"] = checkpoint.sample()
    return found


def without_times(found: Any) -> Any:
    """Return fingerprints without file times, so that a copy of a file has the same."""
    if isinstance(found, Mapping):
        return {key: without_times(value) for key, value in found.items() if key not in TIMES}
    return found


def manifest(
    plan: MergePlan, finished: Mapping[str, Finished], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return `merge_manifest.json` without its `tensors`, and the JSON of each of these: how the output was made, and statistics.

    Per tensor: `method`, `digest` (XXH3-128 over the XXH3-128 of each `block_bytes`), the parameters, and per source the
    counts and norms of its delta: `zeros`, entries `below_` four thresholds, `kept` by trimming or dropping, `elected`;
    `max`, `l1`, `l2`, `hoyer`, and the shares of `l2` squared that were kept and elected; null if not finite.
    `totals` has the same for every source over all tensors, and `weighted_l2`, the norm of weight * delta; `weights`, the
    smallest and the largest weight, where they were measured (`weight: equal_norm`); `warnings` are about the totals. `sources` are the origins of all models, `options` the options beside the recipe, `documents`
    the other recipes of its file, `files` the XXH3-128 of the other output files, `names` the names of tensors in the
    files of a model that spells them otherwise. docs/audit.md lists the statistics
    that only an audit has. Pairs of sources are measured in tensors of at most `MOST_PAIRED` sources.
    """
    measured, entries = totals(plan, finished), dict[str, bytes]()
    summed = Totals(row["source"] for row in measured)
    for tensor in plan.tensors:
        entry = _tensor_entry(tensor.weighed(finished[tensor.name].weights), finished[tensor.name])
        summed.add(entry)
        entries[tensor.name] = _lines(entry, "    ").encode()
    noted, pairs = summed.result()
    said = [problem for problem in plan.warnings if problem.code in _SAID]
    document = {
        "format": FORMAT,
        "complete": True,
        "recipe": plan.recipe.resolved(),
        "recipe_text": plan.recipe.text,
        **({"documents": used} if (used := documents(plan)) else {}),
        "options": dict(options),
        "sources": origins(plan),
        **({"names": names} if (names := _names(plan)) else {}),
        "seed": plan.recipe.seed,
        "arithmetic": plan.recipe.arithmetic,
        "rounding": plan.recipe.rounding,
        "allow_nonfinite": plan.allow_nonfinite,
        "donor": plan.config_source.ref,
        "inputs": without_times({m.ref: _fingerprint(m) for m in plan.models}),
        "versions": versions(plan),
        **({"vocabulary": plan.vocabulary.facts} if plan.vocabulary and plan.vocabulary.facts else {}),
        **({"adapter": loss.to_json()} if (loss := loss_of(plan, finished)) else {}),
        **({"quantization": coded.to_json()} if (coded := loss_of_codes(plan, finished)) else {}),
        "totals": [{**row, **noted.get(row["source"], {})} for row in measured],
        "pairs": pairs,
        "warnings": [str(problem) for problem in [*imbalance.measured(measured, plan), *said]],
        "tensors": {},
    }
    return document, entries


def _names(plan: MergePlan) -> dict[str, Any]:
    """Return by model how its files name the tensors, where that differs from the output's names."""
    return {m.ref: m.checkpoint.described() for m in plan.models if isinstance(m.checkpoint, NamedLike)}


def _tensor_entry(tensor: PlannedTensor, finished: Finished) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "method": tensor.method, "dtype": tensor.dtype, "shape": list(tensor.shape),
        "digest": finished.digest, "block_bytes": tensor.tile_bytes,
    }  # fmt: skip
    if finished.nonfinite:
        entry["nonfinite"] = finished.nonfinite
    if tensor.method == COPY:
        given = {"parameters": dict(tensor.parameters)} if tensor.parameters else {}
        return entry | {"from": tensor.inputs.reads[0].source} | given
    sources, noted = [], json.loads(finished.noted)
    if tensor.merged is not tensor:
        of = "weight" if tensor.coded else "delta"
        entry |= {f"{of}_of": tensor.merged.name, f"{of}_shape": list(tensor.merged.shape)}
    if tensor.factor:
        entry |= {"module": tensor.factor.module}
        if made := noted.pop("factors", None):
            entry |= {"factors": made}
        if tensor.factor.part == "A":
            return entry
    if (tensor.sparse and tensor.sparse.part in ("mask", "indices")) or (tensor.coded and tensor.coded.place):
        return entry
    if loss := noted.pop("quantization", None):
        entry |= {"quantization": Loss(*loss).to_json()}
    for i, read in enumerate(tensor.inputs.sources):
        row = finished.active.index(i) if i in finished.active else None
        measured = {} if row is None else measured_row(finished.counts[row], finished.sums[row], tensor.merged.numel)
        if row is not None and noted:
            measured = row_of(measured, noted["sources"][row], tensor.merged.numel, noted["sampled"])
        kind = "none" if row is None else read.delta.kind if read.delta else "checkpoint"
        sources.append({"source": read.source, "delta": kind, **measured})
    for source, parameters in zip(sources, tensor.parameters.get("sources", ()), strict=False):
        source["parameters"] = parameters
    entry |= {"parameters": {k: v for k, v in tensor.parameters.items() if k != "sources"}, "sources": sources}
    if noted:
        at = [([finished.active[i] for i in pair["of"]], pair) for pair in noted["pairs"]]
        pairs = [pair_row_of(pair, sources, places, tensor.merged.numel, noted["sampled"]) for places, pair in at]
        entry |= {"sampled": noted["sampled"], "pairs": pairs}
    return entry


def measured_row(counts: Any, sums: Any, entries: int) -> dict[str, Any]:
    """Return one row of a tally over `entries` entries for the manifest; {} if there were no deltas to measure.

    Where the squared norm alone is known, from factors, the row has `l2` alone.
    """
    if not sums[0] and not counts[0]:
        return {"l2": float(sums[1]) ** 0.5} if sums[1] else {}
    row = {name: int(value) for name, value in zip(kernels.COUNTS, counts, strict=True) if name != "max_bits"}
    largest = float(np.uint32(counts[-1]).view(np.float32))
    l1, square, kept, elected = (float(s) for s in sums)
    shares = {"kept_energy": kept / square if square else 0.0, "elected_energy": elected / square if square else 0.0}
    l2, root = square**0.5, entries**0.5
    hoyer = (root - l1 / l2) / (root - 1) if l2 and entries > 1 else math.nan
    measured = {"max": largest, "l1": l1, "l2": l2, "hoyer": hoyer, **shares}
    return {**row, **{key: value if math.isfinite(value) else None for key, value in measured.items()}}


def totals(plan: MergePlan, finished: Mapping[str, Finished]) -> list[dict[str, Any]]:
    """Return the statistics of every source, added up over all tensors that it changes."""
    nothing = np.zeros(len(kernels.COUNTS), np.int64), np.zeros(len(kernels.SUMS)), 0, 0.0
    weights: dict[str, set[float]] = {}
    normed = set[str]()  # sources of which some deltas have no statistics but the norm
    held = {read.source: nothing for tensor in plan.tensors for read in tensor.inputs.sources}
    square = kernels.SUMS.index("square")
    for tensor in plan.tensors:
        done = finished[tensor.name]
        for i, counted, summed in zip(done.active, done.counts, done.sums, strict=True):
            name = tensor.inputs.sources[i].source
            if done.weights:
                weights.setdefault(name, set()).add(done.weights[i])
            if measured_row(counted, summed, tensor.merged.numel).keys() == {"l2"}:
                normed.add(name)
            counts, sums, entries, weighted = held[name]
            largest = max(counts[-1], counted[-1])
            counts = counts + counted
            counts[-1] = largest
            weighted += imbalance.weight_of(tensor.weighed(done.weights), i) ** 2 * float(summed[square])
            held[name] = counts, sums + summed, entries + tensor.merged.numel, weighted
    found = []
    for name, (counts, sums, entries, weighted) in held.items():
        row = measured_row(counts, sums, entries)
        row = {"l2": row["l2"]} if name in normed else row
        if row:
            row["weighted_l2"] = weighted**0.5 if math.isfinite(weighted) else None
            row |= {"weights": [min(weights[name]), max(weights[name])]} if name in weights else {}
        found.append({"source": name, "entries": entries, **row})
    return found
