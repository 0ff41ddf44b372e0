"""`verify`: read the manifest, compare the tensors and the files, then the behaviour."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paft_merge.auditing.walk import working_pools
from paft_merge.compute.cores import available_cores
from paft_merge.compute.devices import torch_device
from paft_merge.differences.tensor_pairs import equal_bits
from paft_merge.engine.options import MergeOptions, parse_size
from paft_merge.engine.reproduction import NOT_FOUND, manifest_of
from paft_merge.errors import AuditError, PaftMergeError
from paft_merge.hub import fetch
from paft_merge.inputs.adapter_places import CONFIG
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.binding import vocabulary_of
from paft_merge.inputs.adapters.stack import AdapterStack
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.equivalent_names import Names
from paft_merge.inputs.links import following_links
from paft_merge.inputs.models import Model
from paft_merge.inputs.quantized import dequantized
from paft_merge.inputs.safetensors_header import join_first
from paft_merge.output.folder import part_of
from paft_merge.output.manifest import MANIFEST, is_merged
from paft_merge.stores import is_url
from paft_merge.verifying.accompanying import compare_files
from paft_merge.verifying.evidence import StoredTensor, compare_stored
from paft_merge.verifying.findings import Finding, findings_of, is_far, missing_of, not_loaded
from paft_merge.verifying.likeness import ALIKE, correlation, explain, is_transposed, sample
from paft_merge.verifying.meaning import Meaning, open_meaning
from paft_merge.verifying.prompts import read_prompts
from paft_merge.verifying.report import Verification, read_requirement


@dataclass(frozen=True)
class VerifyProgress:
    """What a verification does now."""

    stage: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Subject:
    """The finished model."""

    where: str
    folder: Path
    model: Model
    is_adapter: bool


def verify(
    place: Path | str,
    *,
    recipe: Path | str | None = None,
    data: Path | None = None,
    rows: int = 64,
    new_tokens: int | None = None,
    tensors_only: bool = False,
    require: Sequence[str] = (),
    device: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    trust_code: bool = False,
    follow_links: bool = False,
    lazy_unpickle: bool = False,
    imports: Sequence[str] = (),
    progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> Verification:
    """Compare a finished merge with what its recipe means: the base and float32 deltas, merged and kept in float32.

    Args:
        place: a folder that `paft merge` wrote (a checkpoint, an adapter or a sparse delta), or a Hub name; with `recipe` that of any tool.
        recipe: the merge recipe. None: that of the model's manifest.
        data: prompts, as rows or as lines of text. None: half runs of random tokens, half samples of the base.
        rows: number of prompts.
        new_tokens: tokens of each greedy continuation; None: 16, and 0 of a model that is read layer by layer.
        tensors_only: run no model.
        require: requirements that are read before anything else; see `Verification.failures`.
        device: where models run; default: a GPU if there is one.
        memory: bytes of memory for a model, in bytes or as text; one that takes more is read layer by layer. None: half of what is free.
        threads: tensors compared at a time.
        trust_code: let the Python code of the model's folder run.
        follow_links, lazy_unpickle, imports: as for a merge.
        progress: called when a stage begins and while it goes on.

    Raises:
        AuditError: GATE, a requirement cannot be read or will not be measured; VERIFY, the model has no manifest or no meaning as a model.
        PaftMergeError: a source is missing or has changed; a file is broken.
    """
    for text in require:
        read_requirement(text, tensors_only=tensors_only)
    if not tensors_only:
        torch_device(device)
    prompts = read_prompts(data, rows) if data is not None else None
    limit = parse_size(memory) if isinstance(memory, str) else memory
    where = os.fspath(place)
    options = MergeOptions(
        imports=tuple(imports), lazy_unpickle=lazy_unpickle, follow_links=follow_links, trust_remote_code=trust_code
    )
    with ExitStack() as opened:
        opened.enter_context(following_links(follow_links))
        if (
            recipe is None
            and not is_url(where)
            and (part := part_of(Path(where).absolute())).is_dir()
            and not is_merged(where)
        ):
            raise AuditError.of(
                "VERIFY", where, f"its merge did not finish: {part} is there", "finish it with resume=True"
            )
        path, _, revision = (where, "", "") if is_url(where) or Path(where).exists() else where.partition("@")
        folder = fetch(path, revision or None)
        if not folder.is_dir():
            raise AuditError.of("VERIFY", where, "is not a folder", "give the folder of the model")
        if recipe is None and not is_merged(folder):
            if results := sorted(one.name for one in folder.iterdir() if is_merged(one)):
                what = f"holds several results: {join_first(results)}"
                raise AuditError.of("VERIFY", where, what, f"verify each, as {folder / results[0]}")
            what = "has no merge_manifest.json, which says what was merged"
            raise AuditError.of("VERIFY", where, what, "pass the recipe that it was merged by, as recipe='recipe.yaml'")
        manifest = None if recipe is not None else manifest_of(where)
        progress(VerifyProgress("the recipe"))
        with _explaining_sources(recipe is None):
            meaning = opened.enter_context(open_meaning(where, manifest, recipe, options))
        subject = opened.enter_context(_open_subject(where, folder, meaning, lazy_unpickle))
        count = threads or available_cores()
        with working_pools(1):  # one core for each of torch's products: threads compare tensors
            tensors, findings = _compare_tensors(subject, meaning, manifest, count, progress)
        findings += compare_files(
            folder, meaning.folder, adapter=subject.is_adapter, coded=any(one.code for one in tensors)
        )
        if tensors_only:
            return Verification(where, tuple(tensors), tuple(findings), {}, {"recipe": "only tensors were compared"})
        from paft_merge.verifying.side_by_side import run_beside

        behaviours, skipped, source = run_beside(
            subject.where, subject.folder, subject.model, subject.is_adapter, meaning,
            data=prompts, rows=rows, new_tokens=new_tokens, device=device, memory=limit, trust_code=trust_code,
            progress=lambda stage: progress(VerifyProgress(stage)),
        )  # fmt: skip
        exact = not any(one.fault or one.kind in ("rank", "codes") for one in findings)
        if exact and "recipe" in behaviours and behaviours["recipe"].is_far:
            what = f"differ from the recipe's by {behaviours['recipe'].relative:.0%}, although the tensors do not"
            findings.append(
                Finding("answers", where, f"its logits {what}", "see what transformers says when it loads it")
            )
        return Verification(where, tuple(tensors), tuple(findings), behaviours, skipped, source)


@contextmanager
def _explaining_sources(by_manifest: bool) -> Iterator[None]:
    """Say of a source of a manifest that is not where or what it was how to give another."""
    try:
        yield
    except PaftMergeError as error:
        fix = "or write a recipe with the sources of now, and pass recipe='recipe.yaml'"
        found = [
            replace(one, fix=f"{one.fix}, {fix}")
            if by_manifest and one.code in (*NOT_FOUND, "REPRODUCE_INPUT")
            else one
            for one in error.problems
        ]
        raise type(error)(found, error.warnings) from error


@contextmanager
def _open_subject(where: str, folder: Path, meaning: Meaning, unpickle: bool) -> Iterator[Subject]:
    """Open the finished model, under the recipe's tensor names."""
    with ExitStack() as opened:
        base = meaning.base.checkpoint
        if (folder / CONFIG).is_file():
            part = opened.enter_context(Adapter.open(folder, base, unpickle=unpickle))
            yield Subject(where, folder, Model(where, base, AdapterStack.of([part])), True)
            return
        checkpoint = dequantized(opened.enter_context(Checkpoint.open(folder, unpickle=unpickle)))
        if meaning.model.checkpoint.tensors.keys() - checkpoint.tensors.keys():
            try:
                named = Names(base, meaning.base.ref).of(checkpoint, where)
            except PaftMergeError:  # a damaged model: its names are compared as they are
                named = checkpoint
            if not meaning.model.checkpoint.tensors.keys() - named.tensors.keys():
                checkpoint = named
        yield Subject(where, folder, Model(where, checkpoint), False)


def _compare_tensors(
    subject: Subject, meaning: Meaning, manifest: Mapping[str, Any] | None, threads: int, progress: Callable[[VerifyProgress], None]
) -> tuple[list[StoredTensor], list[Finding]]:  # fmt: skip
    meant, stored = meaning.model.checkpoint.tensors, subject.model.checkpoint.tensors
    missing = [name for name in meant if not subject.model.has(name)]
    extra = [name for name in stored if name not in meant]
    same = [
        name for name in meant if subject.model.has(name) and _shape(meaning.model, name) == _shape(subject.model, name)
    ]
    wanted: Mapping[str, str] = {}
    if not subject.is_adapter and manifest is not None:
        wanted = {name: str(entry["dtype"]) for name, entry in manifest["tensors"].items()}
        if unknown := {*wanted.values()} - DTYPES.keys():
            what = f"is damaged: {join_first(sorted(unknown))} is not a type of tensors"
            raise AuditError.of("MANIFEST", subject.folder / MANIFEST, what, "restore the manifest")
    renamed: dict[str, str] = {}
    held = {name: sample(subject.model, name) for name in extra} if missing else {}
    for name in missing:
        fits = [one for one in held if _shape(subject.model, one) == _shape(meaning.model, name)]
        values = sample(meaning.model, name) if fits else None
        if values is not None and (
            other := next((one for one in fits if correlation(held[one], values) > ALIKE), None)
        ):
            renamed[name] = other
            del held[other]
    tensors = compare_stored(
        meaning,
        subject.model,
        same,
        wanted,
        threads,
        lambda done, total: progress(VerifyProgress("tensors", done, total)),
    )
    explain([tensor for tensor in tensors if is_far(tensor)], meaning, subject.model)
    kept = {n: subject.model.read(n) for n in stored if not subject.model.checkpoint.stored_format(n)}
    copies = dict(equal_bits({n: kept[n] for n in extra if n in kept}, {n: r for n, r in kept.items() if n in meant}))
    findings = [*missing_of(missing, extra, renamed, copies), *not_loaded(subject.model.checkpoint, same)]
    for name in (name for name in meant if subject.model.has(name) and name not in same):
        what = f"has the shape {list(_shape(subject.model, name))}, and the recipe's has {list(_shape(meaning.model, name))}"
        rows = vocabulary_of(meaning.model.checkpoint.config)
        resized = len(_shape(meaning.model, name)) == 2 and _shape(meaning.model, name)[0] == rows
        fix = "its vocabulary was resized: restore the recipe's, or write tokenizer in the recipe"
        if is_transposed(subject.model.read(name), meaning.model.read(name)):
            what, resized = f"{what}: it is transposed", False
        fix = fix if resized else "merge again"
        findings.append(Finding("shape", name, what, fix))
    return tensors, [*findings, *findings_of(tensors)]


def _shape(model: Model, name: str) -> tuple[int, ...]:
    return model.read(name).shape
