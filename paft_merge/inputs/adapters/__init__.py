"""A LoRA (or SHiRA) folder as float32 deltas of a base's tensors, exactly as PEFT's `merge_and_unload` would add them.

The main path: `read_settings` judges adapter_config.json, `sort_keys` takes the tensor names apart, `Binder` finds the
tensor of the base that each belongs to (asking transformers for the architecture only where names do not suffice),
`untie` looks after tied embeddings, and what is left is one `AdapterDelta` per tensor. Whatever has no exact delta is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from paft_merge.errors import AdapterError, CheckpointError, Problem, Problems
from paft_merge.inputs.adapters.binding import Binder, Draft
from paft_merge.inputs.adapters.config import Settings, read_settings
from paft_merge.inputs.adapters.deltas import AdapterDelta
from paft_merge.inputs.adapters.keys import Keys, sort_keys
from paft_merge.inputs.adapters.tied_weights import may_be_tied, untie
from paft_merge.inputs.checkpoint import Checkpoint, FarFile
from paft_merge.inputs.safetensors_header import read_text, truncate

__all__ = ["Adapter", "AdapterDelta"]

_WEIGHTS = "adapter_model.safetensors"
_RECORD = "paft_train.json"


class Adapter:
    """One adapter, bound to one base. Its factors are read when they are first needed, and again after `AdapterDelta.release`.

    Attributes:
        folder: where it lies.
        config: `adapter_config.json`.
        deltas: by the base's tensor names, plus those of `unties` that are not stored; in the order of the base.
        unties: tensors that were tied to another one, are adapted unlike it, and must be written by themselves: each
            with the checkpoint tensor that holds its old value (its own name if it was stored all along). When not
            empty, the output's config.json must say `tie_word_embeddings: false`, at the top and wherever it says true.
        vocab_size: rows of the embeddings when the adapter resizes the vocabulary, else None. The output's config.json
            must say so too.
        record: what `paft train` wrote beside it (`paft_train.json`); empty when another trainer made it.
        warnings: what is odd but does not stop a merge.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], file: Checkpoint) -> None:
        self.folder, self.config = folder, config
        self.deltas: dict[str, AdapterDelta] = {}
        self.unties: dict[str, str] = {}
        self.vocab_size: int | None = None
        self.record: Mapping[str, Any] = {}
        self.warnings: list[Problem] = []
        self._file = file

    @classmethod
    def open(cls, folder: Path, base: Checkpoint, far: Mapping[str, FarFile] | None = None) -> Adapter:
        """Open an adapter as PEFT saves it, and bind every tensor of it to `base`.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`.
            base: what the adapter is added to; must stay open as long as the deltas are used, since PiSSA, OLoRA and
                DoRA on columns look at whole tensors of it when they are first asked.
            far: as for `Checkpoint.open`.

        Raises:
            AdapterError: every fault at once. ADAPTER_CONFIG, ADAPTER_UNSUPPORTED, ADAPTER_SHAPE, ADAPTER_TARGET (it is
                not in the base), ADAPTER_UNUSED (it would be left out), NONFINITE (in what is read now; in factors when
                a delta first needs them), DTYPE_UNSUPPORTED, PICKLE_REFUSED, and the faults of a safetensors file.
        """
        folder, problems = Path(folder), Problems()
        settings: list[Settings] = []
        with problems.catching():
            settings.append(read_settings(folder))
        with problems.catching(), ExitStack() as on_failure:
            file = on_failure.enter_context(_open_weights(folder, far))
            if settings:
                adapter = cls(folder, settings[0].raw, file)
                adapter._bind(settings[0], base)
                on_failure.pop_all()
                return adapter
        problems.raise_as(AdapterError)
        raise AssertionError("unreachable: whatever keeps an adapter from opening is a fault")

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the adapter's file; deltas that replace whole tensors cannot be used any more."""
        self._file.close()

    @property
    def file(self) -> Checkpoint:
        """The file with the factors."""
        return self._file

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """Size, mtime_ns and header digest of the file with the factors, as `Checkpoint.fingerprint`."""
        return self._file.fingerprint()

    def check_unchanged(self) -> None:
        """Compare the file with what it was at opening.

        Raises:
            CheckpointError: INPUT_CHANGED.
        """
        self._file.check_unchanged()

    def _bind(self, settings: Settings, base: Checkpoint) -> None:
        problems = Problems()
        keys = sort_keys(self._file.tensors, self.folder, problems)
        binder = Binder(settings, keys, self._file, base, problems)
        binder.bind()
        if not self._file.tensors:
            problems.add("ADAPTER_SHAPE", self.folder / _WEIGHTS, "holds no tensors")
        if not problems.found:
            with problems.catching():
                self._untie(settings, base, binder)
            with problems.catching():
                self.vocab_size = _new_vocabulary(base, binder, self.folder)
        if problems.found:
            raise AdapterError(truncate(problems.found, self.folder))
        order = {name: at for at, name in enumerate(base.tensors)}
        drafts = sorted(binder.drafts.items(), key=lambda item: order.get(item[0], len(order)))
        self.deltas = {name: draft.finish(base) for name, draft in drafts}
        self.warnings = [*_other_base(settings, base, self.folder), *_untrained(settings, keys, self.folder)]
        self.record, faults = _record(self.folder)
        self.warnings += faults

    def _untie(self, settings: Settings, base: Checkpoint, binder: Binder) -> None:
        if not may_be_tied(base.config, binder.drafts.values()):
            return
        architecture = binder.architecture.get()
        if architecture is not None:
            self.unties = untie(binder.drafts, architecture, settings, self.folder)
        elif base.config:
            what = (
                "adapts the vocabulary, and transformers does not know this architecture, which says what is tied to it"
            )
            fix = "set tie_word_embeddings in the base's config.json, if nothing is"
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self.folder, what, fix)


def _open_weights(folder: Path, far: Mapping[str, FarFile] | None) -> Checkpoint:
    path = folder / _WEIGHTS
    if not path.exists() and not path.is_symlink() and _WEIGHTS not in (far or ()):
        if (folder / "adapter_model.bin").exists():
            fix = "load it where you trust it, and save it again with PEFT's save_pretrained"
            raise AdapterError.of(
                "PICKLE_REFUSED", folder / "adapter_model.bin", "is a pickle, which can run code", fix
            )
        raise AdapterError.of(
            "ADAPTER_CONFIG", path, "no such file", "give the folder that PEFT's save_pretrained wrote"
        )
    return Checkpoint.open(path, far=far)


def _new_vocabulary(base: Checkpoint, binder: Binder, where: Path) -> int | None:
    """The number of rows that the adapter gives the embeddings, if it is another one; all of them must agree."""
    rows = {name: draft.shape[0] for name, draft in binder.drafts.items() if _is_resized(base, draft)}
    if not rows:
        return None
    architecture = binder.architecture.get()
    for known in architecture.vocabulary() if architecture else ():
        place = architecture.place(known) if architecture else None
        if place and place.stored in base.tensors and not (place.beneath and place.sites[0].name not in binder.drafts):
            rows.setdefault(place.sites[0].name, place.shape[0])
    if len(set(rows.values())) > 1:
        sizes = ", ".join(f"{name!r} {count:,}" for name, count in rows.items())
        what = f"resizes some embeddings and not others: {sizes} rows"
        raise AdapterError.of("ADAPTER_SHAPE", where, what, "save it with save_embedding_layers=True")
    return next(iter(rows.values()))


def _is_resized(base: Checkpoint, draft: Draft) -> bool:
    return draft.shape != base.tensors[draft.beneath or draft.name].shape


def _other_base(settings: Settings, base: Checkpoint, where: Path) -> list[Problem]:
    """A warning when the adapter names another base; a name proves nothing, so it is no more than that."""
    named = str(settings.raw.get("base_model_name_or_path") or "")
    known = {_last_part(str(base.folder)), _last_part(str(base.config.get("_name_or_path") or ""))}
    if not named or _last_part(named) in known:
        return []
    what = f"says that it was trained on {named!r}; the base is {base.folder}"
    return [Problem("ADAPTER_BASE", str(where), what, "shapes agree; check that the weights do")]


def _record(folder: Path) -> tuple[Mapping[str, Any], list[Problem]]:
    """What `paft train` wrote beside the adapter; a warning when it cannot be read, since no merge depends on it."""
    path = folder / _RECORD
    if not path.is_file():
        return {}, []
    try:
        record = json.loads(read_text(path, "TRAIN_RECORD"))
    except (CheckpointError, ValueError) as error:
        return {}, [Problem("TRAIN_RECORD", str(path), f"cannot be read, and is left aside: {error}")]
    if not isinstance(record, dict) or record.get("format") != 1 or not _tells_size(record.get("delta")):
        return {}, [Problem("TRAIN_RECORD", str(path), "is no record that this version knows, and is left aside")]
    return record, []


def _tells_size(delta: Any) -> bool:
    """Has the part of a record about the delta its norm, and the entries of every matrix?"""
    matrices = delta.get("matrices") if isinstance(delta, dict) else None
    if not isinstance(matrices, list) or not isinstance(delta.get("norm"), int | float):
        return False
    return all(isinstance(one, dict) and isinstance(one.get("entries"), int) for one in matrices)


def _last_part(name: str) -> str:
    """The model's own name in a path, a Hub id, or a folder of the Hub's cache."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = next((part for part in parts if part.startswith("models--")), None)
    return (cached.split("--")[-1] if cached else parts[-1] if parts else "").lower()


def _untrained(settings: Settings, keys: Keys, where: Path) -> list[Problem]:
    """A warning for targets without factors: PEFT leaves those layers as they are, and so does a merge."""
    targets = settings.raw.get("target_modules")
    if not isinstance(targets, list):
        return []
    paths = [f".{path}" for path in (*(path for path, _ in keys.modules), *keys.sparse)]
    given = [str(target) for target in targets if target not in settings.names("modules_to_save")]
    unmet = [target for target in given if not any(path.endswith(f".{target}") for path in paths)]
    if not unmet or settings.names("target_parameters"):
        return []
    what = f"target_modules names {', '.join(map(repr, sorted(unmet)[:5]))}, for which there are no factors"
    return [Problem("ADAPTER_TARGET", str(where), what, "nothing is added there; was the adapter saved whole?")]
