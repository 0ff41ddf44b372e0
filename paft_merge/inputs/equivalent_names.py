"""Two spellings of one model: a checkpoint under the tensor names of another.

The loader of transformers maps the names in both checkpoints to the parameters of the model (see `architecture`). A
tensor of the template is then, in the other checkpoint, a tensor of the same or of another name, a tied tensor, or
elements of one or several tensors (experts that are fused in one of them). Buffers that the model derives itself are
read from the template. transformers is imported only if the names differ by more than layer numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.architecture import Architecture, Layout
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint, TensorInfo
from paft_merge.inputs.dtypes import widen
from paft_merge.inputs.safetensors_header import ByteBuffer, as_bytes, join_first, quote, without_wrappers

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_LAYER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*?)(\d+)\.(.*)$")
_MASKED = -1e4
"""A mask is filled with this value, or with a lower one."""


@dataclass(frozen=True)
class Part:
    """Bytes `[start, start + nbytes)` of tensor `name` of a checkpoint."""

    checkpoint: Checkpoint
    name: str
    start: int
    nbytes: int

    @classmethod
    def whole(cls, checkpoint: Checkpoint, name: str) -> Part:
        """All bytes of one tensor."""
        return cls(checkpoint, name, 0, checkpoint.tensors[name].nbytes)


class NamedLike(Checkpoint):
    """A checkpoint whose tensors have the names of another checkpoint, the template.

    Args:
        inner: the checkpoint that is read.
        template: the checkpoint whose names it gets.
        parts: by the template's name of a tensor the parts that hold its bytes, in order.
        warnings: as in `Checkpoint`.
    """

    def __init__(
        self,
        inner: Checkpoint,
        template: Checkpoint,
        parts: Mapping[str, tuple[Part, ...]],
        warnings: Sequence[Problem] = (),
    ) -> None:
        super().__init__(inner.folder, (), inner.config, {})
        self.files, self.file, self.tokenizer_files = inner.files, inner.file, inner.tokenizer_files
        self.listing = inner.listing
        self.named_like, self.warnings = template, (*inner.warnings, *warnings)
        self._inner, self._parts = inner, parts
        self.tensors = {name: self._info(name) for name in parts}

    def _info(self, name: str) -> TensorInfo:
        parts = self._parts[name]
        first, held = parts[0], sum(part.nbytes for part in parts)
        stored = first.checkpoint.tensors[first.name]
        shape = stored.shape if self._is_whole(name) else self._template.tensors[name].shape
        return TensorInfo(name, stored.dtype, shape, stored.file, stored.offset + first.start, held)

    @property
    def inner(self) -> Checkpoint:
        """The checkpoint that is read."""
        return self._inner

    @property
    def _template(self) -> Checkpoint:
        assert self.named_like is not None
        return self.named_like

    def _is_whole(self, name: str) -> bool:
        """Whether a tensor is one stored tensor under another name."""
        first, *others = self._parts[name]
        return not others and first.nbytes == first.checkpoint.tensors[first.name].nbytes

    def close(self) -> None:
        self._inner.close()

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        view = as_bytes(buffer)
        self._info_within(name, start, len(view))
        stop, first = start + len(view), 0
        for part in self._parts[name]:
            a, b = max(start, first), min(stop, first + part.nbytes)
            if a < b:
                part.checkpoint.read_into(part.name, part.start + a - first, view[a - start : b - start])
            first += part.nbytes

    def location(self, name: str, start: int, nbytes: int) -> tuple[int, int] | None:
        self._info_within(name, start, nbytes)
        for part in self._parts[name]:
            if 0 <= start <= part.nbytes - nbytes:
                return part.checkpoint.location(part.name, part.start + start, nbytes)
            start -= part.nbytes
        return None

    @property
    def identity(self) -> Hashable:
        return self._inner.identity

    @property
    def folders(self) -> list[Path]:
        return self._inner.folders

    def stored_at(self, name: str) -> Hashable:
        first = self._parts[name][0]
        return first.checkpoint.stored_at(first.name) if self._is_whole(name) else (self.identity, "", name)

    def stored_names(self, name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.name for part in self._parts[name])) if name in self._parts else (name,)

    def is_derived(self, name: str) -> bool:
        return name in self._parts and self._parts[name][0].checkpoint is self.named_like

    def stored_format(self, name: str) -> str:
        first = self._parts[name][0]
        return first.checkpoint.stored_format(first.name)

    def written_dtype(self, name: str) -> str:
        first = self._parts[name][0]
        return first.checkpoint.written_dtype(first.name)

    def bytes_read(self, name: str) -> int:
        held = ((part, part.checkpoint.tensors[part.name].nbytes or 1) for part in self._parts[name])
        return sum(part.checkpoint.bytes_read(part.name) * part.nbytes // nbytes for part, nbytes in held)

    def working_bytes(self, name: str) -> int:
        return max(part.checkpoint.working_bytes(part.name) for part in self._parts[name])

    def release(self, name: str) -> None:
        for part in self._parts[name]:
            part.checkpoint.release(part.name)

    def sample(self) -> str:
        return self._inner.sample()

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        return self._inner.fingerprint()

    @property
    def far(self) -> dict[str, int]:
        return self._inner.far

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()

    def described(self) -> dict[str, Any]:
        """The tensors whose names differ, for the manifest: its names by ours, and those read from the template."""
        names = {name: self.stored_names(name) for name in self._parts if not self.is_derived(name)}
        renamed = {name: held[0] if len(held) == 1 else list(held) for name, held in names.items() if held != (name,)}
        copied = [name for name in self._parts if self.is_derived(name)]
        return {"tensors": renamed, **({"derived": copied} if copied else {})}


class Unwrapped(NamedLike):
    """A checkpoint under names without the prefixes of wrappers, which are not a part of the model."""

    _prefix = ""
    """What the stored names begin with, and these names do not."""

    @classmethod
    def forms(cls, checkpoint: Checkpoint) -> list[Checkpoint]:
        """`checkpoint` without wrappers inside its names, then without one segment more that begins all names, and so on.

        DataParallel, DeepSpeed, PEFT, Lightning and attributes of any training program put such segments there.
        """
        stored = {without_wrappers(name): name for name in checkpoint.tensors}
        if len(stored) < len(checkpoint.tensors):
            return [checkpoint]
        found = list[Checkpoint]()
        while True:
            unwrapped = cls(checkpoint, checkpoint, {n: (Part.whole(checkpoint, held),) for n, held in stored.items()})
            unwrapped._prefix = next((held.removesuffix(n) for n, held in stored.items() if held.endswith(n)), "")
            found.append(checkpoint if stored.keys() == checkpoint.tensors.keys() else unwrapped)
            first, dot, _ = next(iter(stored), "").partition(".")
            if not dot or first.isdigit() or not all(name.startswith(first + dot) for name in stored):
                return found
            stored = {name.removeprefix(first + dot): held for name, held in stored.items()}

    def stored_names(self, name: str) -> tuple[str, ...]:
        return super().stored_names(name) if name in self.tensors else (self._prefix + name,)


class Names:
    """The tensor names of a template, which other checkpoints of the same model get.

    Args:
        template: the checkpoint whose names the others get.
        ref: how messages call it.
    """

    def __init__(self, template: Checkpoint, ref: str) -> None:
        self.template, self.ref = template, ref
        self._known: dict[int, tuple[Checkpoint, Checkpoint]] = {}

    @cached_property
    def _patterns(self) -> set[str]:
        return _without_numbers(self.template.tensors)

    @cached_property
    def _forms(self) -> list[Checkpoint]:
        return Unwrapped.forms(self.template)

    @cached_property
    def _architecture(self) -> Architecture | None:
        return _first_known(self._forms, Architecture.of) if self.template.config else None

    def of(self, other: Checkpoint, ref: str) -> Checkpoint:
        """Return `other` under the template's names; itself if they agree, or if transformers cannot map them.

        Tensors that only `other` has keep their names, and tensors that only the template has are missing, so that a
        comparison of names finds both.

        Args:
            other: a checkpoint.
            ref: how messages call it.

        Raises:
            CheckpointError: KEYS_CONVERTED, a tensor is stored in a form from which it cannot be read in pieces;
                TIED_DIFFERS, a tied tensor that only `other` stores has a value of its own.
        """
        if id(other) not in self._known:
            self._known[id(other)] = other, self._under_our_names(other, ref)
        return self._known[id(other)][1]

    def _under_our_names(self, other: Checkpoint, ref: str) -> Checkpoint:
        if other is self.template or other.computed or _without_numbers(other.tensors) == self._patterns:
            return other
        forms = Unwrapped.forms(other)
        parts: Mapping[str, tuple[Part, ...]]
        warnings: Sequence[Problem] = ()
        pairs = [(self._forms[0], theirs) for theirs in forms] + [(ours, forms[0]) for ours in self._forms[1:]]
        equal = ((a, b) for a, b in pairs if _without_numbers(a.tensors) == _without_numbers(b.tensors))
        if alike := next(equal, None):
            ours, theirs = alike
            parts = {name: (Part.whole(theirs, name),) for name in theirs.tensors}
        else:
            if (
                not other.config
                or (known := self._architecture) is None
                or (like := _first_known(forms, known.like)) is None
            ):
                return other
            ours = known.base
            found = _Match(known, like, ours, like.base, self.ref, ref)
            found.problems.raise_as(CheckpointError)
            parts, warnings = found.parts, found.warnings
        named = {ours.stored_names(name)[0]: tuple(map(_as_stored, some)) for name, some in parts.items()}
        return NamedLike(other, self.template, named, warnings)


def _first_known(
    forms: Sequence[Checkpoint], build: Callable[[Checkpoint], Architecture | None]
) -> Architecture | None:
    """The architecture of the first form of a checkpoint of which it knows a tensor; None if there is none."""
    for form in forms:
        if (found := build(form)) is None or found.layouts:
            return found
    return None


def _as_stored(part: Part) -> Part:
    """A part by the name in its file."""
    if not isinstance(part.checkpoint, Unwrapped):
        return part
    return replace(part, checkpoint=part.checkpoint.inner, name=part.checkpoint.stored_names(part.name)[0])


class _Match:
    """The search for the parts of `other` that hold the tensors of `template`."""

    def __init__(
        self, ours: Architecture, theirs: Architecture, template: Checkpoint, other: Checkpoint, owner: str, where: str
    ) -> None:
        self._ours, self._theirs, self._template, self._other = ours, theirs, template, other
        self._owner, self._where = owner, where
        self.problems, self.warnings = Problems(), list[Problem]()
        found: dict[str, tuple[Part, ...]] = {}
        self._found, self._failed = found, set[str]()
        self._parameters()
        self._buffers()
        self._others()
        order = {name: i for i, name in enumerate(template.tensors)}
        self.parts = {name: found[name] for name in sorted(found, key=lambda name: order.get(name, len(order)))}

    def _parameters(self) -> None:
        """Find what both checkpoints store, perhaps as a tied tensor, whole or in pieces."""
        pieces: dict[str, list[tuple[int, tuple[Part, ...]]]] = defaultdict(list)
        converted: dict[str, list[str]] = defaultdict(list)
        for known, layout in self._ours.layouts.items():
            held = self._holding(known)
            if held is None:
                continue
            if _lengths(layout) == _lengths(held):
                for pattern, names in layout.origin.items():
                    for name, stored in zip(names, held.origin[pattern], strict=True):
                        self._found[name] = (Part.whole(self._other, stored),)
            elif layout.stretches is None or held.stretches is None:
                converted[(layout if layout.stretches is None else held).how].append(known)
                self._failed |= {name for names in held.origin.values() for name in names}
            else:
                for stretch in layout.stretches:
                    parts = self._between(held, stretch.first, stretch.first + stretch.count)
                    pieces[stretch.name].append((stretch.start, parts))
        for how, listed in converted.items():
            what = f"stores {join_first(listed)} in another form than {self._owner} ({how})"
            fix = "load one of them and save it again with the transformers that saved the other"
            self.problems.add("KEYS_CONVERTED", self._where, what, fix)
        self._join(pieces)

    def _holding(self, known: str) -> Layout | None:
        """How the other checkpoint stores a parameter, or one that is tied to it."""
        layouts = self._theirs.layouts
        return next((layouts[one] for one in (known, *self._theirs.twins(known)) if one in layouts), None)

    def _between(self, held: Layout, first: int, stop: int) -> tuple[Part, ...]:
        """The parts of the other checkpoint that hold elements `[first, stop)` of a parameter."""
        found = []
        for stretch in held.stretches or ():
            a, b = max(first, stretch.first), min(stop, stretch.first + stretch.count)
            if a < b:
                bits = DTYPES[self._other.tensors[stretch.name].dtype].bits
                start = (stretch.start + a - stretch.first) * bits // 8
                found.append(Part(self._other, stretch.name, start, (b - a) * bits // 8))
        return tuple(found)

    def _join(self, pieces: Mapping[str, Sequence[tuple[int, tuple[Part, ...]]]]) -> None:
        """Put the pieces of each tensor in order; note those of two dtypes, or that have another size."""
        mixed, sizes = [], []
        for name, held in pieces.items():
            parts = tuple(part for _, some in sorted(held, key=lambda piece: piece[0]) for part in some)
            kinds = {self._other.tensors[part.name].dtype for part in parts}
            if len(kinds) > 1:
                mixed.append(name)
            elif sum(part.nbytes for part in parts) * 8 != self._template.tensors[name].numel * _bits(kinds):
                sizes.append(name)
            else:
                self._found[name] = parts
                continue
            self._failed |= {part.name for part in parts}
        if mixed:
            what = f"stores the parts of {join_first(mixed)} in several dtypes"
            self.problems.add("KEYS_CONVERTED", self._where, what, "convert it to one dtype")
        if sizes:
            what = f"has another size of {join_first(sizes)} than {self._owner}"
            self.problems.add("SHAPE_MISMATCH", self._where, what, "merge models of one architecture and size")

    def _buffers(self) -> None:
        """Take what the model derives from the template, and pair what the class does not know by its name."""
        ours, theirs = self._ours, self._theirs
        prefix = ours.prefix
        same = {known.removeprefix(prefix): name for name, known in theirs.unmatched.items()}
        ignored, copied = ours.not_loaded(ours.unmatched.values()), []
        for name, known in ours.unmatched.items():
            stored = same.get(known.removeprefix(prefix))
            derived = known in ignored or _is_mask(self._template, name)
            weight = _is_weight(self._template.tensors[name])
            if stored is not None and (weight or not derived):
                self._found[name] = (Part.whole(self._other, stored),)
            elif derived or (
                weight and "/" not in name and self._is_complete
            ):  # not of a module of sentence-transformers
                self._found[name] = (Part.whole(self._template, name),)
                copied += [name] if weight else []
        for known in ours.not_needed(known for known in ours.layouts if known not in theirs.layouts):
            for name in (name for names in ours.layouts[known].origin.values() for name in names):
                if ours.is_constant(known) or _is_default(self._template, name):
                    self._found.setdefault(name, (Part.whole(self._template, name),))
        if copied:
            what = f"lacks {join_first(copied)}, which transformers does not load and {self._owner} has"
            self.warnings.append(Problem("NOT_LOADED", self._where, what, f"the output gets those of {self._owner}"))

    @cached_property
    def _is_complete(self) -> bool:
        """Whether the other checkpoint has all that the class that the template's config names loads from the template."""
        ours = self._ours
        missing = [known for known in ours.layouts if self._holding(known) is None]
        return ours.is_named and bool(ours.layouts) and not {*missing} - ours.not_needed(missing)

    def _others(self) -> None:
        """Leave out what the template need not have, and keep everything else."""
        theirs = self._theirs
        used = {part.name for parts in self._found.values() for part in parts if part.checkpoint is self._other}
        left = [name for name in self._other.tensors if name not in used and name not in self._failed]
        ignored = theirs.not_loaded(theirs.unmatched.values())
        lost = [
            name for name in left if theirs.unmatched.get(name) in ignored and _is_weight(self._other.tensors[name])
        ]
        known_as = {
            name: known for known, layout in theirs.layouts.items() for n in layout.origin.values() for name in n
        }
        unequal = dict[str, str]()
        for name in left:
            known = known_as.get(name)
            if theirs.unmatched.get(name) in ignored or self._is_derived(name, known):
                continue
            twins = [twin for twin in self._stored_twins(name, known) if twin in used]
            if not twins:
                self._found[self._in_our_spelling(name, known) or name] = (Part.whole(self._other, name),)
            elif not self._other.same_bytes(name, self._other, twins[0], sampled=bool(self._other.far)):
                unequal[name] = twins[0]
        if lost:
            what = f"has {join_first(lost)}, which transformers does not load and {self._owner} lacks"
            self.warnings.append(Problem("NOT_LOADED", self._where, what, "the output lacks them too"))
        for name, twin in unequal.items():
            what = f"stores {quote(name)}, which differs from {quote(twin)} although its config ties the two"
            fix = (
                f"{self._owner} stores only one of them: write tie_word_embeddings: false in both and store both there"
            )
            self.problems.add("TIED_DIFFERS", self._where, what, fix)

    def _is_derived(self, name: str, known: str | None) -> bool:
        """Whether the model derives the value of a tensor that the template does not store."""
        if known is None:
            return _is_mask(self._other, name)
        ours = self._ours
        return known in ours.not_needed([known]) and (ours.is_constant(known) or _is_default(self._other, name))

    def _stored_twins(self, name: str, known: str | None) -> Iterator[str]:
        """The other checkpoint's tensors that have the value of its tensor `name`, as its own class ties them."""
        classes: list[tuple[Architecture, str | None]] = [(self._theirs, known)]
        if known is None and self._own is not None:
            of_own = {
                n: k for k, layout in self._own.layouts.items() for names in layout.origin.values() for n in names
            }
            classes.append((self._own, of_own.get(name)))
        for architecture, parameter in classes:
            for twin in architecture.twins(parameter) if parameter is not None else ():
                if twin in architecture.layouts:
                    yield from (n for names in architecture.layouts[twin].origin.values() for n in names)

    @cached_property
    def _own(self) -> Architecture | None:
        return Architecture.of(self._other)

    def _in_our_spelling(self, name: str, known: str | None) -> str | None:
        """The name of a tensor of a layer that the template does not have, made from that of a layer that it has."""
        place = _LAYER.match(known or "")
        if place is None:
            return None
        stack, number, tail = place.groups()
        pattern = re.compile(rf"{re.escape(stack)}\d+\.{re.escape(tail)}")
        layout = self._theirs.layouts[known or ""]
        for other, ours in self._ours.layouts.items():
            if pattern.fullmatch(other) and _lengths(ours) == _lengths(layout):
                pairs = (
                    (a, b) for p, names in ours.origin.items() for a, b in zip(names, layout.origin[p], strict=True)
                )
                alike = _LAYER.match(next(a for a, b in pairs if b == name))
                return f"{alike[1]}{number}.{alike[3]}" if alike else None
        return None


def _without_numbers(names: Iterable[str]) -> set[str]:
    return {_NUMBER.sub("#", name) for name in names}


def _lengths(layout: Layout) -> dict[str, int]:
    """What two layouts must share for their tensors to be pairs: the conversion, and the number of tensors."""
    return {pattern: len(names) for pattern, names in layout.origin.items()}


def _bits(kinds: Iterable[str]) -> int:
    return DTYPES[next(iter(kinds))].bits if kinds else 0


def _is_weight(info: TensorInfo) -> bool:
    """Whether a tensor that transformers does not load may have been trained (layers for multi-token prediction)."""
    leaf = info.name.rpartition(".")[2]
    return DTYPES[info.dtype].mergeable and (leaf == "weight" or (leaf == "bias" and len(info.shape) == 1))


def _is_mask(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor that the class does not have is a causal mask, or the value that masks are filled with."""
    info = checkpoint.tensors[name]
    if info.numel == 1:
        return DTYPES[info.dtype].mergeable and float(_values(checkpoint, name, 0, 1)[0]) <= _MASKED
    size = info.shape[-1] if info.shape else 0
    if info.shape != (1, 1, size, size) or size < 2:
        return False
    rows = [(row, _values(checkpoint, name, row * size, size)) for row in (0, size // 2, size - 1)]
    return all(bool((values == (np.arange(size) <= row)).all()) for row, values in rows)


def _is_default(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a buffer that a checkpoint may lack has the value that it then gets: zeros, or any count of steps."""
    info = checkpoint.tensors[name]
    return not DTYPES[info.dtype].mergeable or not _values(checkpoint, name, 0, info.numel).any()


def _values(checkpoint: Checkpoint, name: str, first: int, count: int) -> Any:
    """Some elements of a tensor as float32."""
    info = checkpoint.tensors[name]
    width = DTYPES[info.dtype].bits // 8
    held = np.empty(count * width, np.uint8)
    checkpoint.read_into(name, first * width, held)
    if not DTYPES[info.dtype].mergeable:
        return held.reshape(count, width)[:, 0].astype(np.float32)  # BOOL, or an integer below 256
    out = np.empty(count, np.float32)
    widen(held, info.dtype, out)
    return out
