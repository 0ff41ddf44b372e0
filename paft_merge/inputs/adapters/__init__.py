"""An adapter's folder as float32 deltas of a base's tensors, exactly as PEFT's `merge_and_unload` would add them.

`read_settings` checks adapter_config.json, `sort_keys` sorts the tensors by name, `Binding` finds the base's tensor for
each (with the model's class from transformers only where names do not suffice), and `untie` handles tied embeddings.
The result is one `AdapterDelta` per tensor. Everything that has no exact delta is refused. `peft_types` lists the
supported types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from paft_merge.errors import AdapterError, CheckpointError, Problem, Problems, reading
from paft_merge.inputs.adapter_places import CONFIG, MLX_FILE, PEFT_FILES, hint
from paft_merge.inputs.adapters.binding import OTHER_BASE, Binding, DeltaBuilder
from paft_merge.inputs.adapters.config import Settings
from paft_merge.inputs.adapters.deltas import AdapterDelta
from paft_merge.inputs.adapters.keys import SHARED, Keys
from paft_merge.inputs.adapters.peft_types import read_settings, sort_keys, type_of
from paft_merge.inputs.adapters.sparse_delta import NAME as SPARSE_NAME
from paft_merge.inputs.adapters.sparse_delta import unties_of
from paft_merge.inputs.adapters.tied_weights import may_be_tied, untie
from paft_merge.inputs.checkpoint import Checkpoint, FarFile
from paft_merge.inputs.equivalent_names import Unwrapped
from paft_merge.inputs.safetensors_header import join_first, read_text, truncate

__all__ = ["Adapter", "AdapterDelta", "open_weights"]

_WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_CONVERT = (
    "read it, without running its code, with lazy_unpickle=True, or convert it where you trust it: import torch, safetensors.torch; "
    "state = torch.load('adapter_model.bin', weights_only=True); "
    "safetensors.torch.save_file({k: v.clone().contiguous() for k, v in state.items()}, 'adapter_model.safetensors')"
)
_RECORD = "paft_train.json"


class Adapter:
    """One adapter, bound to one base; a context manager.

    Its factors are read on first use, and again after `AdapterDelta.release`.

    Attributes:
        folder: the adapter's folder.
        config: `adapter_config.json`.
        file: the file with the factors.
        deltas: by the base's tensor names, plus those of `unties` that are not stored; in the order of the base.
        unties: tensors that were tied to another one, get a different delta, and must be written separately: each with
            the checkpoint tensor that holds its old value (its own name if it was stored). If there are any, the
            output's config.json must have `tie_word_embeddings: false` wherever it has true, and at the top.
        vocab_size: rows of the embeddings if the adapter resizes the vocabulary, else None. The output's config.json
            must have it too.
        record: content of `paft_train.json`, which `paft train` writes; empty for adapters of other trainers.
        warnings: oddities that do not prevent a merge.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], file: Checkpoint) -> None:
        self.folder, self.config, self.file = folder, config, file
        self.deltas: dict[str, AdapterDelta] = {}
        self.unties: dict[str, str] = {}
        self.vocab_size: int | None = None
        self.record: Mapping[str, Any] = {}
        self.warnings: list[Problem] = []

    @classmethod
    def open(
        cls, folder: Path, base: Checkpoint, far: Mapping[str, FarFile] | None = None, *, unpickle: bool = False
    ) -> Adapter:
        """Open an adapter that PEFT saved, and bind every tensor of it to `base`.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`.
            base: the checkpoint that the adapter is added to. It must stay open while the deltas are used, since
                PiSSA, OLoRA and DoRA on columns read whole tensors of it on first use.
            far: as for `Checkpoint.open`.
            unpickle: read `adapter_model.bin` where the safetensors file is missing, without running its code.

        Raises:
            AdapterError: with all faults. ADAPTER_CONFIG, ADAPTER_UNSUPPORTED, ADAPTER_SHAPE, ADAPTER_TARGET (not in
                the base), ADAPTER_UNUSED (it would be left out), NONFINITE (in tensors that are read here; `compute`
                checks the factors), DTYPE_UNSUPPORTED, PICKLE_REFUSED, and the faults of a safetensors file.
        """
        folder, problems = Path(folder), Problems()
        held = any((folder / name).is_file() or name in (far or ()) for name in (*PEFT_FILES, MLX_FILE))
        if below := "" if held else hint(folder):
            what = "holds no adapter at its top; there is one in a folder below it"
            raise AdapterError.of("ADAPTER_CONFIG", folder, what, below)
        if not held and not (folder / CONFIG).exists():
            what = f"is not an adapter: it has neither {CONFIG} nor {_WEIGHTS}"
            raise AdapterError.of("ADAPTER_CONFIG", folder, what, "give the folder that PEFT's save_pretrained wrote")
        settings: list[Settings] = []
        with problems.catching():
            settings.append(read_settings(folder))
        with problems.catching(), ExitStack() as on_failure:
            file = on_failure.enter_context(open_weights(folder, far, unpickle=unpickle))
            if settings:
                adapter = cls(folder, settings[0].raw, file)
                adapter._bind(settings[0], base)
                on_failure.pop_all()
                return adapter
        problems.raise_as(AdapterError)
        raise AssertionError("unreachable: an adapter that does not open has a fault")

    @property
    def parts(self) -> tuple[Adapter, ...]:
        """The adapters that it consists of (see `stack`): itself."""
        return (self,)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the adapter's file; deltas that replace whole tensors cannot be used any more."""
        self.file.close()

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """Size, mtime_ns and header digest of the file with the factors, as `Checkpoint.fingerprint`."""
        return self.file.fingerprint()

    def check_unchanged(self) -> None:
        """Compare the file with its state when it was opened.

        Raises:
            CheckpointError: INPUT_CHANGED.
        """
        self.file.check_unchanged()

    def _bind(self, settings: Settings, base: Checkpoint) -> None:
        keys, binding, problems = self._bound_to(base, settings)
        if binding.absent:
            keys, binding, problems = self._without_wrappers(base, settings) or (keys, binding, problems)
        if not problems.found:
            with problems.catching():
                self._untie(settings, binding)
            with problems.catching():
                self.vocab_size = _new_vocabulary(binding, self.folder)
        if problems.found:
            raise AdapterError(truncate(_grouped(problems.found, settings), self.folder))
        order = {name: at for at, name in enumerate(binding.base.tensors)}
        builders = sorted(binding.builders.items(), key=lambda item: order.get(item[0], len(order)))
        self.deltas = {name: builder.build(binding.base) for name, builder in builders}
        if binding.base is not base:
            self._rename(binding.base)
        self.record, faults = _read_record(self.folder)
        self.warnings = [*_other_base(settings, base, self.folder), *_untrained(settings, keys, self.folder), *faults]

    def _bound_to(self, base: Checkpoint, settings: Settings) -> tuple[Keys, Binding, Problems]:
        """The adapter's tensors, bound to those of a checkpoint, and the faults."""
        problems = Problems()
        keys = sort_keys(self.file.tensors, self.folder, problems, settings.peft_type)
        binding = Binding(settings, keys, self.file, base, problems)
        binding.bind(type_of(settings).bind_module)
        return keys, binding, problems

    def _without_wrappers(self, base: Checkpoint, settings: Settings) -> tuple[Keys, Binding, Problems] | None:
        """As `_bound_to`, for the names of the base without those of wrappers; None if it lacks what the adapter changes."""
        tried = [self._bound_to(form, settings) for form in Unwrapped.forms(base) if form is not base]
        fitting = [bound for bound in tried if not bound[1].absent]

        def as_named(bound: tuple[Keys, Binding, Problems]) -> int:
            """Modules that the adapter calls as this form does; transformers also finds some under other prefixes."""
            keys, binding, _ = bound
            return sum(f"{path}.weight" in binding.base.tensors for path, _ in keys.modules)

        return max(fitting, key=as_named, default=None)

    def _rename(self, form: Checkpoint) -> None:
        """Give the deltas the names in the base's files, where they were bound to its names without wrappers."""

        def stored(name: str) -> str:
            return form.stored_names(name)[0]

        for delta in self.deltas.values():
            delta.stored_as = stored(delta.stored_as) if delta.stored_as else None
        self.deltas = {stored(name): delta for name, delta in self.deltas.items()}
        self.unties = {stored(name): stored(held) for name, held in self.unties.items()}

    def _untie(self, settings: Settings, binding: Binding) -> None:
        base = binding.base
        if settings.peft_type == SPARSE_NAME:  # it has a delta for every tensor that changes
            self.unties = unties_of(settings)
            if absent := sorted(self.unties.keys() - binding.builders.keys()):
                what = f"unties {join_first(absent)} and has no delta for it"
                raise AdapterError.of("ADAPTER_CONFIG", self.folder / CONFIG, what, "write the delta again")
            return
        if not may_be_tied(base.config, binding.builders.values()):
            return
        architecture = binding.architecture.get()
        if architecture is not None:
            self.unties = untie(binding.builders, architecture, settings, self.folder)
        elif base.config:
            what = "changes embeddings that may be tied to others, and transformers does not know the architecture"
            fix = "set tie_word_embeddings in the base's config.json, if nothing is tied"
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self.folder, what, fix)


def open_weights(folder: Path, far: Mapping[str, FarFile] | None = None, *, unpickle: bool = False) -> Checkpoint:
    """Open the file with an adapter's tensors; the arguments are those of `Adapter.open`."""
    if not (folder / _WEIGHTS).exists() and ((folder / MLX_FILE).exists() or MLX_FILE in (far or ())):
        return Checkpoint.open(folder / MLX_FILE, far=far)
    path, pickled = folder / _WEIGHTS, folder / _PICKLED
    if not path.exists() and not path.is_symlink() and _WEIGHTS not in (far or ()):
        if pickled.exists() and unpickle:
            return Checkpoint.open(pickled, unpickle=True)
        if pickled.exists():
            what = "is a pickle, which can run code when it is loaded"
            raise AdapterError.of("PICKLE_REFUSED", pickled, what, _CONVERT)
        fix = "give the folder that PEFT's save_pretrained wrote"
        raise AdapterError.of("ADAPTER_CONFIG", path, "no such file", fix)
    return Checkpoint.open(path, far=far)


def _new_vocabulary(binding: Binding, where: Path) -> int | None:
    """The number of rows that the adapter gives all embeddings; None if it resizes none."""
    base = binding.base
    rows = {name: one.shape[0] for name, one in binding.builders.items() if _is_resized(base, one)}
    if not rows:
        return None
    architecture = binding.architecture.get()
    for known in architecture.vocabulary() if architecture else ():
        found = architecture.find(known) if architecture else None
        if found and found.value_in in base.tensors and not (found.stored_as and found.name not in binding.builders):
            rows.setdefault(found.name, found.shape[0])
    if len(set(rows.values())) > 1:
        sizes = ", ".join(f"{name!r} {count:,}" for name, count in rows.items())
        what = f"resizes some embeddings and not others: {sizes} rows"
        raise AdapterError.of("ADAPTER_SHAPE", where, what, "save it with save_embedding_layers=True")
    return next(iter(rows.values()))


def _is_resized(base: Checkpoint, builder: DeltaBuilder) -> bool:
    return builder.shape != base.tensors[builder.stored_as or builder.name].shape


def _grouped(problems: Sequence[Problem], settings: Settings) -> list[Problem]:
    """The problems, with one in place of several tensors whose shapes are not the base's: they have one cause."""
    named = settings.raw.get("base_model_name_or_path")
    fix = f"{OTHER_BASE} its adapter_config.json names {str(named)!r}" if named else OTHER_BASE
    found = [problem if problem.fix != OTHER_BASE else replace(problem, fix=fix) for problem in problems]
    unlike = [problem for problem in found if problem.fix == fix and problem.code == "ADAPTER_SHAPE"]
    if len(unlike) < 2:
        return found
    sample = next((problem for problem in unlike if not problem.what.startswith("tensor ")), unlike[0])
    what = f"{len(unlike)} of its tensors do not fit the base, such as {sample.what}"
    return [*(problem for problem in found if problem not in unlike), replace(sample, what=what)]


def _other_base(settings: Settings, base: Checkpoint, where: Path) -> list[Problem]:
    """A warning if the adapter names another base; only a warning, since a name proves nothing."""
    named = str(settings.raw.get("base_model_name_or_path") or "")
    known = {_model_name(str(base.folder)), _model_name(str(base.config.get("_name_or_path") or ""))}
    if not named or _model_name(named) in known:
        return []
    what = f"says that it was trained on {named!r}; the base is {base.folder}"
    return [Problem("ADAPTER_BASE", str(where), what, "the shapes agree; check that the weights do")]


def _read_record(folder: Path) -> tuple[Mapping[str, Any], list[Problem]]:
    """The record of `paft train`; a warning if it cannot be read, since no merge depends on it."""
    path = folder / _RECORD
    if not path.is_file():
        return {}, []
    try:
        with reading(path, "TRAIN_RECORD", CheckpointError):
            record = json.loads(read_text(path, "TRAIN_RECORD"))
    except CheckpointError as error:
        return {}, [Problem("TRAIN_RECORD", str(path), f"is ignored: it {error.problems[0].what}")]
    if not isinstance(record, dict) or record.get("format") != 1 or not _is_readable(record):
        return {}, [Problem("TRAIN_RECORD", str(path), "is ignored, because this version does not know its format")]
    return record, []


def _is_readable(record: dict[str, Any]) -> bool:
    """Whether a record has sections, the norm of the delta, and the number of entries of every matrix."""
    spec, run, delta = record.get("spec", {}), record.get("run", {}), record.get("delta")
    if not (isinstance(spec, dict) and isinstance(run, dict) and isinstance(spec.get("l1"), dict | None)):
        return False
    matrices = delta.get("matrices") if isinstance(delta, dict) else None
    if not isinstance(delta, dict) or not isinstance(matrices, list) or not isinstance(delta.get("norm"), int | float):
        return False
    return all(isinstance(one, dict) and isinstance(one.get("entries"), int) for one in matrices)


def _model_name(name: str) -> str:
    """The model's name in a path, a Hub id, or a folder of the Hub's cache."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = next((part for part in parts if part.startswith("models--")), None)
    return (cached.split("--")[-1] if cached else parts[-1] if parts else "").lower()


def _untrained(settings: Settings, keys: Keys, where: Path) -> list[Problem]:
    """A warning for targets without factors: PEFT leaves those layers unchanged, and so does a merge."""
    targets = settings.raw.get("target_modules")
    if not isinstance(targets, list):
        return []
    paths = [f".{path}" for path, _ in keys.modules]
    given = [str(target) for target in targets if target not in settings.names("modules_to_save")]
    unmet = [target for target in given if not any(path.endswith(f".{target}") for path in paths)]
    if not unmet or settings.names("target_parameters") or keys.modules.keys() == {(SHARED, 0)}:
        return []
    what = f"target_modules names {join_first(sorted(unmet))}, for which there are no factors"
    return [Problem("ADAPTER_TARGET", str(where), what, "nothing is added there; is the saved adapter complete?")]
