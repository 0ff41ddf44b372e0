"""`diff`: two checkpoints, adapters or merges, compared tensor by tensor without loading either."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from paft_merge.compute.cores import available_cores
from paft_merge.differences import side_file_changes
from paft_merge.differences.kinds import Change, ModelDiff
from paft_merge.differences.of_adapters import compare_adapters
from paft_merge.differences.tensor_pairs import equal_bits
from paft_merge.differences.tensor_walk import OnProgress, TensorWalk
from paft_merge.engine.sources import Sources
from paft_merge.errors import CheckpointError, PaftMergeError, Problem
from paft_merge.inputs.adapter_places import CONFIG, MLX_FILE, PEFT_FILES, base_of
from paft_merge.inputs.equivalent_names import NamedLike
from paft_merge.inputs.links import following_links
from paft_merge.inputs.models import Model
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.plan.vocabulary.tokenizers import tokenizer_files
from paft_merge.recipe import ModelRef

_MOST_THREADS = 8
"""Blocks in memory at a time: 16 MB each."""
_NO_OWN_NAMES = ("KEYS_CONVERTED", "TIED_DIFFERS")
"""Codes of a checkpoint that cannot be read under the names of the other one."""


def diff(
    a: Path | str,
    b: Path | str,
    *,
    tolerance: float = 0.0,
    only: str = "*",
    lazy_unpickle: bool = False,
    follow_links: bool = False,
    threads: int | None = None,
    progress: OnProgress = lambda _: None,
) -> ModelDiff:
    """Compare two models, or two adapters.

    Args:
        a, b: a folder, a file of tensors, a name on the Hub, or BASE+ADAPTER. Weights on the Hub are read from there
            and not stored.
        tolerance: a tensor whose relative norm of the difference is at most this counts as the same.
        only: a pattern; compare the tensors whose name in A or in B matches.
        lazy_unpickle: read `.bin` files through a reader that runs no code of them.
        follow_links: follow links of a folder to files outside of it.
        threads: blocks compared at a time; at most 8, all cores by default.
        progress: called after every tensor.

    Raises:
        CheckpointError: DIFF_KINDS, one is an adapter and the other is a whole model; EMPTY, no tensor matches `only`.
        PaftMergeError: a model cannot be opened.
    """
    refs = (_place(a), _place(b))
    count = min(threads or available_cores(), _MOST_THREADS)
    with following_links(follow_links), ThreadPoolExecutor(count) as pool, ExitStack() as stack:
        kinds = [_is_adapter(ref) for ref in refs]
        if kinds[0] != kinds[1]:
            raise _unlike(refs, kinds)
        walk = TensorWalk(pool, tolerance, only, progress)
        if kinds[0]:
            return compare_adapters(refs, walk, unpickle=lazy_unpickle)
        models, warnings = stack.enter_context(_opened(refs, unpickle=lazy_unpickle))
        tensors = walk.compare(*(_reads(model) for model in models), derived=_derived(models))
        warnings += [w for model in models for w in model.checkpoint.warnings if w.code != "NOT_LOADED"]
        return ModelDiff(refs, False, tensors, None, tuple(_changes(models)), tuple(dict.fromkeys(warnings)))


def _place(ref: Path | str) -> str:
    """A reference; the folder of an adapter if its file is named."""
    path = Path(ref)
    if path.name in (*PEFT_FILES, MLX_FILE) and path.is_file() and (path.parent / CONFIG).is_file():
        return str(path.parent)
    return str(ref)


def _is_adapter(ref: str) -> bool:
    """Whether a reference is an adapter alone."""
    from paft_merge.hub import resolve

    named = _reference(ref)
    if named.lora:
        return False
    folder = resolve(named.path, named.revision, unpickle=True).folder
    held = [name for name in (CONFIG, *PEFT_FILES, MLX_FILE) if (folder / name).is_file()]
    return bool(held) and not any(folder.glob("*model*.index.json")) and not (folder / "model.safetensors").exists()


def _reference(name: str) -> ModelRef:
    return ModelRef(name) if Path(name).exists() else ModelRef.parse(name)


def _unlike(refs: tuple[str, str], is_adapter: list[bool]) -> CheckpointError:
    adapter, model = refs if is_adapter[0] else refs[::-1]
    what = f"is an adapter, and {model} is a whole model"
    base = base_of(Path(adapter))
    fix = f"compare the model that it makes, `{base}+{adapter}`, with {'it' if _reference(model).lora else model}"
    return CheckpointError.of("DIFF_KINDS", adapter, what, fix)


@contextmanager
def _opened(refs: tuple[str, str], *, unpickle: bool) -> Iterator[tuple[list[Model], list[Problem]]]:
    """Open two models, B under the tensor names of A where that is possible."""
    named = tuple(map(_reference, refs))
    refs_once = tuple(dict.fromkeys(named))
    with ExitStack() as stack:
        warnings = list[Problem]()
        try:
            found = stack.enter_context(Sources.find(refs_once, unpickle=unpickle, template=named[0]).opened())
        except PaftMergeError as error:
            if not all(problem.code in _NO_OWN_NAMES for problem in error.problems):
                raise
            warnings += [replace(problem, fix="its tensors are compared by their names") for problem in error.problems]
            found = stack.enter_context(Sources.find(refs_once, unpickle=unpickle).opened())
        yield [found[ref] for ref in named], warnings


def _reads(model: Model) -> dict[str, Read]:
    """Every tensor of a model by name, those that loaders pass over, and those of a quantised checkpoint for activations."""
    untied = model.adapter.unties if model.adapter else {}
    names = [name for name in model.checkpoint.tensors if not model.checkpoint.is_derived(name)]
    found = {name: model.read(name) for name in [*names, *untied]}
    stored = model.checkpoint
    inner = stored.inner if isinstance(stored, NamedLike) else stored
    if inner is not stored:
        used = {part for name in stored.tensors for part in stored.stored_names(name)}
        found |= {
            name: Read(model.ref, inner, name) for name in inner.tensors if name not in used and name not in found
        }
    if isinstance(inner, Dequantized):
        used = {part for weight in inner.weights.values() for part in weight.parts}
        found |= {name: Read(model.ref, inner.inner, name) for name in inner.hidden - used if name not in found}
    return found


def _derived(models: list[Model]) -> set[str]:
    """Tensors that only A or only B stores, and that the model computes: buffers, and copies of tied weights."""
    checkpoint = models[1].checkpoint
    found, reads = {name for name in checkpoint.tensors if checkpoint.is_derived(name)}, _reads(models[1])
    extra = {n: r for n, r in reads.items() if n not in checkpoint.tensors and isinstance(checkpoint, NamedLike)}
    copies = {name for name, _ in equal_bits(extra, {n: r for n, r in reads.items() if n not in extra and r.plain})}
    return copies | {n for n in {*found, *extra} if n.rpartition(".")[2] not in ("weight", "bias")}


def _changes(models: list[Model]) -> Iterator[Change]:
    """Differences of the files beside the tensors; none where A or B is a file of tensors."""
    a, b = (model.checkpoint for model in models)
    if a.file or b.file:
        return
    yield from side_file_changes.of_configs(a.config, b.config)
    yield from side_file_changes.of_generation(a.folder, b.folder)
    one, other = ((tokenizer_files(model) or {}) for model in models)
    yield from side_file_changes.of_tokenizers(one, other)
    yield from side_file_changes.of_other_files(a.folder, b.folder, (a.listing, b.listing))
