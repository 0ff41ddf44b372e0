"""Factors of the experts of a layer: from one tensor for all of them to one pair each, and back, without a change of a value.

E = experts, R = rank, O = output features, I = input features. PEFT stores A `[E * R, I]`, expert by expert, and B
`[O, R * E]`, the expert varying fastest; per-expert factors are A `[R, I]` and B `[O, R]` of each tensor in the base's files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from paft_merge.dialects.held import Held
from paft_merge.dialects.matrices import Bits, Matrix, joined, stacked, zeros
from paft_merge.dialects.modules import Factors, Lora, refuse
from paft_merge.errors import AdapterError, Problem, Problems
from paft_merge.inputs.adapters.binding import Binding
from paft_merge.inputs.adapters.deltas import Lazy
from paft_merge.inputs.adapters.lora_experts import find_targeted, is_grouped, is_in_out
from paft_merge.inputs.adapters.lora_factors import Factors as Stored
from paft_merge.inputs.architecture import Architecture, Piece, StoredParameter
from paft_merge.inputs.checkpoint import Checkpoint

_EXPERT = re.compile(r".+\.experts\.\d+\..+")


def split(lora: Lora, held: Held, base: Checkpoint | None) -> Lora:
    """Give every expert its own factors, named as the base's files name its weights.

    Fused experts stay as they are if the base's files also hold them in one tensor, or if the base is not known; their
    factor B is put into PEFT's order.

    Args:
        lora: the adapter.
        held: the same adapter, from PEFT.
        base: its base.

    Raises:
        AdapterError: the base does not have the parameters, or their layout is not known.
    """
    if held.settings is None or all(module.kind != "experts" for module in lora.modules):
        return lora
    binding = Binding(held.settings, held.keys, held.file, base or held.file, Problems())
    modules = list[Factors]()
    for module in lora.modules:
        if module.kind == "experts" and is_grouped(binding, module.path, module.count, module.rank):
            module = replace(module, b=_rank_major(module.b, module.count))
        modules += _split(module, binding) if module.kind == "experts" and base is not None else [module]
    made = replace(lora, modules=tuple(modules))
    count = sum(module.kind != "experts" for module in modules) - sum(m.kind != "experts" for m in lora.modules)
    return made.noting(f"fused experts were split into {count:,} modules") if count else made


def _split(module: Factors, binding: Binding) -> list[Factors]:
    own = binding.keys.modules[module.path, module.depth]
    found = find_targeted(binding, own)
    if found is None:
        raise binding.wrong(module.path, "is not in the base", "ADAPTER_TARGET")
    name, parameter, transposed = found
    stored = Stored(binding.rows(own.parts["A"]), binding.rows(own.parts["B"]))
    count, rows, _ = parameter.shape
    turned = is_in_out(binding, name, parameter.shape, stored, transposed) and not transposed
    module = replace(module, parameter=name.rpartition(".")[2])
    if len(parameter.pieces) == 1 and not turned:
        return [module]
    if transposed:
        what = "is stored [in, out], and the base's files hold its experts one by one"
        raise binding.wrong(name, what, "ADAPTER_UNSUPPORTED")
    a, b = _experts(module, count, len(parameter.pieces))
    if turned:  # PEFT before 0.19.1: (B A)^T is the delta, so that the factors change places
        a, b = [one.transposed for one in b], [one.transposed for one in a]
    if len(parameter.pieces) == 1:
        whole = stacked(b, 2).reshaped(rows, module.rank * count)
        return [replace(module, a=joined(a), b=whole)]
    return [_of_piece(module, piece, *divmod(piece.first, rows), a, b) for piece in parameter.pieces]


def _of_piece(
    module: Factors, piece: Piece, expert: int, first: int, a: Sequence[Matrix], b: Sequence[Matrix]
) -> Factors:
    path = piece.name.removesuffix(".weight")
    return Factors(path, a[expert], b[expert].cut(0, first, first + piece.count), module.scale, rank=module.rank)


def _experts(module: Factors, count: int, uses: int) -> tuple[list[Matrix], list[Matrix]]:
    """A `[R, I]` and B `[O, R]` of each expert; the whole tensors are read once while all are used one after the other."""
    a, b, rank = module.a, module.b, module.rank
    whole_a, whole_b = (Lazy(matrix.read, users=uses) for matrix in (a, b))

    def part(whole: Lazy[Bits], take: Callable[[Bits], Bits]) -> Bits:
        made = np.ascontiguousarray(take(whole.get()))
        whole.release()
        return made

    def of_a(e: int) -> Callable[[], Bits]:
        return lambda: part(whole_a, lambda bits: bits[e * rank : (e + 1) * rank])

    def of_b(e: int) -> Callable[[], Bits]:
        return lambda: part(whole_b, lambda bits: bits.reshape(len(bits), rank, count)[:, :, e])

    return (
        [Matrix(a.dtype, (rank, a.shape[1]), of_a(e)) for e in range(count)],
        [Matrix(b.dtype, (b.shape[0], rank), of_b(e)) for e in range(count)],
    )


def _rank_major(b: Matrix, count: int) -> Matrix:
    """B in PEFT's order, from the order of old Unsloth, expert by expert."""
    rows, columns = b.shape
    return b.made(b.shape, lambda bits: bits.reshape(rows, count, -1).transpose(0, 2, 1).reshape(rows, columns))


# --- back -------------------------------------------------------------------------------------------------------------


def fuse(lora: Lora, base: Checkpoint) -> Lora:
    """Join the factors of experts whose layer has one parameter for all of them in the model of transformers.

    Raises:
        AdapterError: ADAPTER_SHAPE, the factors do not fit the base; ADAPTER_UNSUPPORTED, their types differ.
    """
    several = {f"{module.path}.weight": module for module in lora.modules if _EXPERT.fullmatch(module.path)}
    architecture = Architecture.of(base) if several else None
    if architecture is None:
        return lora
    layers = defaultdict[str, dict[str, Factors]](dict)
    for name, module in several.items():
        layers[(architecture.name_of(name) or "").rpartition(".")[0]][name] = module
    made = {path: _fused(path, held, architecture) for path, held in layers.items()}
    layer_of = {module.path: path for path, held in layers.items() for module in held.values() if made[path]}
    modules, notes, done = list[Factors](), lora.notes, set[str]()
    for module in lora.modules:
        path = layer_of.get(module.path)
        if path is None:
            modules.append(module)
        elif path not in done:
            done.add(path)
            modules += [one for one, _ in made[path]]
            notes += tuple(note for _, noted in made[path] for note in noted)
    fused = replace(lora, modules=tuple(modules), notes=notes)
    return fused.noting(f"the factors of {len(layer_of):,} modules of experts were joined") if layer_of else lora


def _fused(
    path: str, held: dict[str, Factors], architecture: Architecture
) -> list[tuple[Factors, tuple[Problem, ...]]]:
    """The factors of each parameter of one layer's experts, with notes; none if the model has no such parameters."""
    known = architecture.parameters_of(path)
    made, left = list[tuple[Factors, tuple[Problem, ...]]](), set(held)
    for name in known[0] if known else ():
        parameter = architecture.find(f"{path}.{name}")
        if parameter is None or len(parameter.pieces) == 1 or not left.intersection(p.name for p in parameter.pieces):
            continue
        left -= {piece.name for piece in parameter.pieces}
        made.append(_joined(path, name, parameter, held))
    if made and left:
        raise AdapterError.of(
            "ADAPTER_TARGET", path, f"has factors of {sorted(left)[0]!r}, which the base does not have"
        )
    return [(replace(module, depth=len(made) - 1 - i), notes) for i, (module, notes) in enumerate(made)]


def _joined(
    path: str, name: str, parameter: StoredParameter, held: dict[str, Factors]
) -> tuple[Factors, tuple[Problem, ...]]:
    count, rows, columns = parameter.shape
    experts = [list[tuple[Piece, Factors | None]]() for _ in range(count)]
    for piece in parameter.pieces:
        experts[piece.first // rows].append((piece, held.get(piece.name)))
    own = [module for pieces in experts for _, module in pieces if module is not None]
    refuse(
        path, [m.path for m in own if m.magnitude is not None], "cannot join experts with DoRA", "keep them as they are"
    )
    refuse(path, [m.path for m in own if m.a.dtype != own[0].a.dtype or m.b.dtype != own[0].b.dtype], "cannot join experts of several types", "save them in one type")  # fmt: skip
    for piece, module in (pair for pieces in experts for pair in pieces):
        if module is not None and (module.b.shape[0], module.a.shape[1]) != (piece.count, columns):
            what = (
                f"{module.path!r} makes {(module.b.shape[0], module.a.shape[1])}, the base has {(piece.count, columns)}"
            )
            raise AdapterError.of("ADAPTER_SHAPE", path, what)
    even = Lora(tuple(own)).with_one_scale()
    by_path = {module.path: module for module in even.modules}
    experts = [[(piece, by_path[m.path] if m is not None else None) for piece, m in pieces] for pieces in experts]
    shared = all(_share(pieces) for pieces in experts)
    parts = len(experts[0])
    ranks = [max((p[i][1].rank for p in experts if p[i][1] is not None), default=0) for i in range(parts)]  # type: ignore[union-attr]
    ranks = [max(ranks)] if shared else ranks
    made = [_expert(pieces, ranks, shared, columns, own[0]) for pieces in experts]
    rank = sum(ranks)
    a = joined([one for one, _ in made])
    b = stacked([one for _, one in made], 2).reshaped(rows, rank * count)
    return Factors(path, a, b, even.modules[0].scale, "experts", rank=rank, parameter=name), even.notes


def _share(pieces: Sequence[tuple[Piece, Factors | None]]) -> bool:
    """Whether the parts of one expert's weight have one factor A, as after `split`; parts without factors fit any."""
    found = [module for _, module in pieces if module is not None]
    return all(found[0].a.same(module.a) for module in found[1:])


def _expert(
    pieces: Sequence[tuple[Piece, Factors | None]], ranks: Sequence[int], shared: bool, columns: int, like: Factors
) -> tuple[Matrix, Matrix]:
    """A `[R, I]` and B `[O, R]` of one expert from those of the parts of its weight."""
    rank, lefts, rights, before = sum(ranks), list[Matrix](), list[Matrix](), 0
    for i, (piece, module) in enumerate(pieces):
        width = rank if shared else ranks[i]
        if module is None:
            lefts.append(zeros(like.b.dtype, (piece.count, rank)))
        else:
            b = module.b.padded(1, width)
            beside = [zeros(b.dtype, (piece.count, n)) for n in (before, rank - before - width)]
            lefts.append(b if shared else joined([beside[0], b, beside[1]], 1))
        if not shared or (module is not None and not rights):
            rights.append(module.a.padded(0, width) if module else zeros(like.a.dtype, (width, columns)))
        before += 0 if shared else width
    return joined(rights) if rights else zeros(like.a.dtype, (rank, columns)), joined(lefts)
