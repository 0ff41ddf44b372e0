"""The content of an adapter's folder, from its configuration and its file headers: which dialect, which modules.

Nothing is refused here that a reader could have an opinion about: `traits` names it, `rules` says what readers do with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.errors import AdapterError, Problem, Problems
from paft_merge.inputs.adapter_places import CONFIG, MLX_FILE, PEFT_FILES, hint
from paft_merge.inputs.adapters import Adapter, open_weights
from paft_merge.inputs.adapters.config import Settings, read_config
from paft_merge.inputs.adapters.keys import Keys, Saved
from paft_merge.inputs.adapters.mlx import NAME as MLX_TYPE
from paft_merge.inputs.adapters.mlx import is_mlx
from paft_merge.inputs.adapters.peft_types import read_settings, sort_keys
from paft_merge.inputs.adapters.rows import Rows
from paft_merge.inputs.checkpoint import Checkpoint

PEFT, MLX, KOHYA = "peft", "mlx", "kohya"

KOHYA_NAME = re.compile(
    r"(?P<module>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|lora_mid\.weight|alpha|dora_scale)"
)
_FUSED = re.compile(r"(^|\.)experts$")
_SAMPLES = 8
_UNFIT = ("ADAPTER_TARGET", "ADAPTER_SHAPE")
_FAULTS = ("ADAPTER_UNSUPPORTED",)
"""Problems of a configuration that a reader may not mind; any other is an error in the file."""


@dataclass(frozen=True)
class Pair:
    """The factors of one module of LoRA.

    Attributes:
        path: the module in the model, without prefixes of PEFT.
        depth: number of PEFT wrappers around it; above 0 for the inner of two targeted parameters.
        parts: tensor names by part: `A` and `B`, or `embedding_A` and `embedding_B`; `magnitude_vector`, `B.bias`.
        rank: rows of A; 0 if that is missing.
        scale: factor of the product B A.
        is_fused: whether they are the factors of all experts of a layer, in one tensor.
    """

    path: str
    depth: int
    parts: Mapping[str, str]
    rank: int
    scale: float
    is_fused: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors in the file."""
        return tuple(self.parts.values())

    @property
    def is_embedding(self) -> bool:
        """Whether they are the factors of an embedding, which PEFT stores transposed."""
        return "embedding_A" in self.parts or "embedding_B" in self.parts

    @property
    def is_whole(self) -> bool:
        """Whether both factors are there."""
        return {"A", "B"} <= self.parts.keys() or {"embedding_A", "embedding_B"} <= self.parts.keys()


@dataclass(frozen=True)
class Held:
    """An adapter by its headers.

    Attributes:
        place: its folder, or its file.
        dialect: `peft`, `mlx` or `kohya`.
        config: `adapter_config.json`; empty if there is none.
        settings: the fields that the arithmetic needs; None for an adapter that is not LoRA.
        file: the open file of its tensors.
        keys: its tensor names, sorted.
        faults: fields of the configuration that have no exact delta.
        base: the base, if it is known.
        unfit: how the adapter does not fit the base.
    """

    place: Path
    dialect: str
    config: Mapping[str, Any]
    settings: Settings | None
    file: Checkpoint
    keys: Keys
    faults: tuple[Problem, ...] = ()
    base: Checkpoint | None = None
    unfit: tuple[Problem, ...] = field(default=())

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The modules of LoRA, in the order of the file; empty for other types."""
        wanted = "LORA" if self.dialect == PEFT else MLX_TYPE
        found = (module for module in self.keys.modules.values() if module.peft_type == wanted)
        return tuple(self._pair(module.path, module.depth, module.parts) for module in found)

    def _pair(self, path: str, depth: int, parts: Mapping[str, str]) -> Pair:
        is_fused = bool(depth or _FUSED.search(path))
        a = parts.get("A") or parts.get("embedding_A")
        shape = self.file.tensors[a].shape if a else ()
        rank = shape[-2 if len(shape) == 3 else -1] if self.dialect == MLX and shape else shape[0] if shape else 0
        scale = 0.0
        if self.settings is not None and rank:
            of_config = is_fused or self.dialect == MLX
            scale = self.settings.scale(path, self.settings.rank_of(path) if of_config else rank)
        return Pair(path, depth, parts, rank, scale, is_fused)

    def multiplies(self, pair: Pair) -> bool:
        """Whether the factors of a module of PEFT have shapes that can be multiplied; false for half of a pair."""
        if not pair.is_whole:
            return False
        names = ("embedding_A", "embedding_B") if pair.is_embedding else ("A", "B")
        a, b = (self.file.tensors[pair.parts[name]].shape for name in names)
        return len(a) == len(b) >= 2 and a[0] == b[1] > 0

    def has_own_rank(self, pair: Pair) -> bool:
        """Whether the factors of a module have the rank that the configuration gives it; for experts, a multiple."""
        if self.settings is None or not pair.rank:
            return True
        rank = self.settings.rank_of(pair.path)
        return pair.rank % rank == 0 if pair.is_fused else pair.rank == rank

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Names that are neither factors, nor whole tensors, nor trained rows of embeddings."""
        known = {name for pair in self.pairs for name in pair.names}
        known |= {one.key for one in self.keys.saved} | {*self.keys.tokens.values()}
        return tuple(name for name in self.file.tensors if name not in known)


@contextmanager
def open_held(place: Path, *, unpickle: bool = False) -> Iterator[Held]:
    """Open an adapter, for its headers, until the end of the block.

    Args:
        place: a folder, or a `.safetensors` file with names of kohya's scripts.
        unpickle: read `adapter_model.bin` where there is no safetensors file, without running its code.

    Raises:
        AdapterError: ADAPTER_CONFIG (not an adapter, or its configuration is malformed), PICKLE_REFUSED.
        CheckpointError: the faults of a safetensors file.
    """
    with ExitStack() as stack:
        yield _open(Path(place), stack, unpickle)


def is_copy(held: Held, saved: Saved, base: Checkpoint, *, sampled: bool) -> bool:
    """Whether a weight that PEFT saved beside factors has the values of the base's tensor.

    Args:
        held: the adapter.
        saved: the weight.
        base: the base.
        sampled: compare a few blocks of rows only.
    """
    if saved.names[0] not in base.tensors:
        return False
    ours, theirs = Rows.of(held.file, saved.key), Rows.of(base, saved.names[0])
    if not sampled:
        return ours.same(theirs)
    blocks = ours.blocks()
    chosen = blocks[:: max(1, len(blocks) // _SAMPLES)]
    return ours.shape == theirs.shape and all(np.array_equal(ours.read(*at), theirs.read(*at)) for at in chosen)


def unfit(held: Held, base: Checkpoint, unpickle: bool) -> tuple[Problem, ...]:
    """How a LoRA does not fit a base: modules that the base does not have, and other shapes."""
    if held.settings is None or held.faults:
        return ()
    with ExitStack() as stack:
        try:
            stack.enter_context(Adapter.open(held.place, base, unpickle=unpickle))
        except AdapterError as error:
            return tuple(problem for problem in error.problems if problem.code in _UNFIT)
    return ()


def _open(place: Path, stack: ExitStack, unpickle: bool) -> Held:
    if place.is_file() or not _is_adapter(place):
        return _open_kohya(place, stack)
    raw = read_config(place / CONFIG)
    if is_mlx(raw, place):
        settings = read_settings(place)
        file = stack.enter_context(open_weights(place))
        return Held(place, MLX, raw, settings, file, sort_keys(file.tensors, place, Problems(), MLX_TYPE))
    faults, settings_of_lora = _settings(place, raw)
    file = stack.enter_context(open_weights(place, unpickle=unpickle))
    kind = _kind(raw)
    keys, problems = Keys(), Problems()
    with problems.catching():
        keys = sort_keys(file.tensors, place, problems, kind)
    problems.found = [problem for problem in problems.found if problem.code != "ADAPTER_UNUSED"]
    problems.raise_as(AdapterError)
    return Held(place, PEFT, raw, settings_of_lora, file, keys, faults)


def _is_adapter(folder: Path) -> bool:
    names = (CONFIG, MLX_FILE, *PEFT_FILES)
    return any((folder / name).exists() or (folder / name).is_symlink() for name in names)


def _settings(place: Path, raw: dict[str, Any]) -> tuple[tuple[Problem, ...], Settings | None]:
    """The fields without an exact delta, and the settings of a LoRA."""
    faults: tuple[Problem, ...] = ()
    try:
        settings: Settings | None = read_settings(place)
    except AdapterError as error:
        wrong = [problem for problem in error.problems if problem.code not in _FAULTS]
        if wrong:
            raise AdapterError(wrong) from None
        faults, settings = error.problems, Settings(raw)
    return faults, settings if _kind(raw) == "LORA" else None


def _kind(raw: Mapping[str, Any]) -> str:
    """The PEFT type; trainers of 2023 left it out of LoRA's configuration."""
    return str(raw.get("peft_type") or "LORA")


def _open_kohya(place: Path, stack: ExitStack) -> Held:
    if not any(path.suffix == ".safetensors" for path in (place.iterdir() if place.is_dir() else [place])):
        what = f"is not an adapter: it has neither {CONFIG} nor {PEFT_FILES[0]}"
        fix = hint(place) or "give the folder that PEFT's save_pretrained wrote"
        raise AdapterError.of("ADAPTER_CONFIG", place, what, fix)
    file = stack.enter_context(Checkpoint.open(place))
    if not any(KOHYA_NAME.fullmatch(name) for name in file.tensors):
        what = f"is not an adapter: there is no {CONFIG}, and its tensors have no names of kohya's scripts"
        raise AdapterError.of("ADAPTER_CONFIG", place, what, "give the folder that PEFT's save_pretrained wrote")
    return Held(place, KOHYA, {}, None, file, Keys())
