"""Loads object files for Linux on x86-64. LLVM can do this too, but importing it takes twenty times as long as loading all kernels here.

The layout and the relocations are those of the System V ABI, AMD64 supplement, chapter 4. Only what the compiler emits for kernels
is read: code, constants, and calls into the C library; anything else is a ValueError.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import NamedTuple

_HEADER = struct.Struct("<4sBB10xHH4xQQQ4xHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QIIq")
_SYMBOLS, _RELOCATIONS, _NO_BITS = 2, 4, 8
_WRITABLE, _ALLOCATED = 1, 2
_UNWINDING = 0x70000001
"""Tables for exceptions and debuggers; no kernel raises."""
_KINDS = {1: ("<Q", False), 2: ("<i", True), 4: ("<i", True), 24: ("<q", True)}
"""Relocations: R_X86_64_64, PC32, PLT32 and PC64; the format of the value, and whether the place is subtracted."""
_JUMP = b"\xff\x25\x00\x00\x00\x00"
"""`jmp *0(%rip)`: to the address that follows. Functions of the C library may be further away than 2 GB."""


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry: int


def load(machine: bytes, symbol: str) -> tuple[int, object]:
    """Load an object file.

    Args:
        machine: the file.
        symbol: name of a function in it.

    Returns:
        The address of the function, and what owns its memory.

    Raises:
        ValueError: the file is not of x86-64, or has something that the compiler makes for no kernel.
        OSError: the system makes no memory executable.
    """
    magic, width, order, kind, processor, _, _, start, *_, count, _ = _HEADER.unpack_from(machine)
    if (magic, width, order, kind, processor) != (b"\x7fELF", 2, 1, 1, 62):
        raise ValueError("not an object file of x86-64")
    sections = [_Section(*_SECTION.unpack_from(machine, start + i * _SECTION.size)) for i in range(count)]
    table = next(section for section in sections if section.kind == _SYMBOLS)
    names = sections[table.link].offset
    symbols = list(_SYMBOL.iter_unpack(machine[table.offset : table.offset + table.size]))

    def name_of(at: int) -> str:
        return machine[names + at : machine.index(b"\0", names + at)].decode()

    places, size = dict[int, int](), 0
    for i, one in enumerate(sections):
        if one.flags & _ALLOCATED and one.kind != _UNWINDING and one.size:
            if one.flags & _WRITABLE or one.kind == _NO_BITS:
                raise ValueError("the object file has variables")
            places[i] = size = -(-size // one.alignment) * one.alignment
            size += one.size
    outside = {i: name_of(at) for i, (at, _, _, section, _, _) in enumerate(symbols) if i and at and section == 0}
    stubs = {i: size + 16 * k for k, i in enumerate(outside)}
    memory = mmap.mmap(-1, size + 16 * len(stubs), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library = ctypes.CDLL(None, use_errno=True)
    for i, at in places.items():
        memory[at : at + sections[i].size] = machine[sections[i].offset : sections[i].offset + sections[i].size]
    for i, at in stubs.items():
        target = ctypes.cast(getattr(library, outside[i]), ctypes.c_void_p).value
        memory[at : at + 14] = _JUMP + struct.pack("<Q", target)

    def address_of(i: int) -> int:
        _, _, _, section, value, _ = symbols[i]
        if i in stubs:
            return base + stubs[i]
        if section not in places:
            raise ValueError(f"{name_of(symbols[i][0])} is in section {section}")
        return int(base + places[section] + value)

    for one in sections:
        if one.kind == _RELOCATIONS and one.info in places:
            for at, kind, i, addend in _RELOCATION.iter_unpack(machine[one.offset : one.offset + one.size]):
                if kind not in _KINDS:
                    raise ValueError(f"a relocation of kind {kind}")
                form, relative = _KINDS[kind]
                place = places[one.info] + at
                struct.pack_into(form, memory, place, address_of(i) + addend - relative * (base + place))
    if library.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(len(memory)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "memory cannot be made executable")
    entry = next(i for i, one in enumerate(symbols) if name_of(one[0]) == symbol)
    return address_of(entry), memory
