"""Machine code of the fused loops, kept on disk: a merge that finds it there starts without a compiler.

numba compiles a loop for the types it is first called with. Importing numba and loading what it has kept itself takes a second,
which is as long as a merge of a small model; the same code as a plain object file, through LLVM alone, takes milliseconds.
An object file belongs to the sources of the loops, the versions of numba and LLVM, and the processor, all of which its
name is made from; it begins with a digest of itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import xxhash

_ROOM = "paft_merge.loops"
_SCALARS = {"?": ctypes.c_int64, "q": ctypes.c_int64, "d": ctypes.c_double, "I": ctypes.c_uint32, "Q": ctypes.c_uint64}
_OF_SCALAR = {bool: "?", int: "q", float: "d", np.int64: "q", np.float64: "d", np.uint32: "I", np.uint64: "Q"}
_OF_LIBC = {"memset", "memcpy", "memmove"}
"""What the code of a loop may call: nothing that only a process with numba has, as memory of its own would need."""

_BITS = "*"
"""What stands for the type of bits, in the type of an argument."""

_AGE = 7 * 86400
"""Seconds after which an object file is removed when its loop is compiled again: until then another environment may want it."""

_LOCK = Lock()


class Compiled:
    """A loop of this room, called with contiguous arrays and numbers; compiled when it is first called with their types.

    Args:
        place: its module and name in this room, as "kernels.blend".
        bits: which of its arguments are bits of a block: uint16 or uint32, the same machine code for either. The loop sees
            two arrays of them, one of each type, of which one is empty.
    """

    def __init__(self, place: str, bits: tuple[int, ...] = ()) -> None:
        self.module, self.name = place.split(".")
        self._bits = frozenset(bits)
        self._made: dict[tuple[str, ...], Callable[..., int]] = {}
        self._entries: dict[tuple[str, ...], int] = {}
        self.__doc__ = f"`{place}`, compiled."

    def __call__(self, *arguments: Any) -> int:
        """Call the loop; no lock of Python's is held meanwhile.

        Returns:
            What the loop returns, an integer; 0 where it returns nothing.

        Raises:
            ValueError: an array is not contiguous.
            TypeError: an argument is neither an array nor a number.
        """
        kinds = self._kinds(arguments)
        run = self._made.get(kinds)
        if run is None:
            with _LOCK:
                run = self._made[kinds] = self._made.get(kinds) or self._prepare(kinds)
        return run(*arguments)

    def entry(self, *arguments: Any) -> int:
        """The address of the loop's machine code for such arguments: a C function of each array's address and lengths."""
        kinds = self._kinds(arguments)
        if kinds not in self._entries:
            with _LOCK:
                self._prepare(kinds)
        return self._entries[kinds]

    def _kinds(self, arguments: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(_kind(argument, i in self._bits) for i, argument in enumerate(arguments))

    def _prepare(self, kinds: tuple[str, ...]) -> Callable[..., int]:
        of_loop = xxhash.xxh3_64_hexdigest("|".join((self.module, *kinds)).encode())
        name = f"{self.name}-{of_loop}-{xxhash.xxh3_64_hexdigest(_environment().encode())}.o"
        code = _read(name)
        if code is None:
            code = _compile(self.module, self.name, kinds)
            _write(name, code)
        symbol, _, machine = code.partition(b"\0")
        self._entries[kinds] = _address(symbol.decode(), machine)
        return _callable(self._entries[kinds], kinds)


def _kind(argument: Any, bits: bool) -> str:
    """The type of an argument: of an array its dtype's character, or `bits`', and its dimensions."""
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise ValueError("the arrays of a compiled loop are contiguous")
        if bits and argument.dtype not in (np.uint16, np.uint32):
            raise TypeError(f"the bits of a block are uint16 or uint32, not {argument.dtype}")
        return f"{_BITS if bits else argument.dtype.char}{argument.ndim}"
    kind = _OF_SCALAR.get(type(argument))
    if kind is None:
        raise TypeError(f"a compiled loop takes arrays and numbers, not a {type(argument).__name__}")
    return kind


def _callable(entry: int, kinds: tuple[str, ...]) -> Callable[..., int]:
    """The loop at an address, called with arrays and numbers."""
    types: list[Any] = []
    for kind in kinds:
        if kind in _SCALARS:
            types.append(_SCALARS[kind])
        else:
            twice = kind[0] == _BITS
            types += [ctypes.c_void_p] * (1 + twice) + [ctypes.c_int64] * (int(kind[1:]) + twice)
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *types)(entry)

    def run(*arguments: Any) -> int:
        flat: list[Any] = []
        for argument, kind in zip(arguments, kinds, strict=True):
            if not isinstance(argument, np.ndarray):
                flat.append(argument)
                continue
            address = argument.__array_interface__["data"][0]
            if kind[0] == _BITS:
                *rows, entries = argument.shape
                half = argument.itemsize == 2
                flat += [address, address, *rows, entries * half, entries * (not half)]
            else:
                flat += [address, *argument.shape]
        return int(function(*flat))

    return run


def _compile(module: str, name: str, kinds: tuple[str, ...]) -> bytes:
    """Compile a loop by numba: the name of its entry, a zero byte and its object file.

    The entry takes, for an array, its address and its lengths.
    """
    from llvmlite import binding
    from numba import carray, cfunc, types

    loop = getattr(import_module(f"{_ROOM}.{module}"), name)
    scalars = {"?": types.int64, "q": types.int64, "d": types.float64, "I": types.uint32, "Q": types.uint64}
    taken, given, signature = [], [], []
    for i, kind in enumerate(kinds):
        if kind in scalars:
            taken.append(f"a{i}")
            given.append(f"a{i} != 0" if kind == "?" else f"a{i}")
            signature.append(scalars[kind])
            continue
        lengths = [f"a{i}_{k}" for k in range(int(kind[1:]))]
        if kind[0] == _BITS:
            rows = "".join(f"{length}, " for length in lengths[:-1])
            taken += [f"a{i}h", f"a{i}w", *lengths[:-1], f"a{i}_h", f"a{i}_w"]
            given.append(f"(carray(a{i}h, ({rows}a{i}_h,)), carray(a{i}w, ({rows}a{i}_w,)))")
            pointers = types.CPointer(types.uint16), types.CPointer(types.uint32)
            signature += [*pointers, *[types.int64] * (len(lengths) + 1)]
            continue
        taken += [f"a{i}", *lengths]
        given.append(f"carray(a{i}, ({''.join(f'{length}, ' for length in lengths)}))")
        signature += [types.CPointer(getattr(types, np.dtype(kind[0]).name)), *[types.int64] * len(lengths)]
    returns = "return int64(result)" if _returns(loop) else "return 0"
    source = f"def {name}({', '.join(taken)}):\n    result = loop({', '.join(given)})\n    {returns}\n"
    scope = {"loop": loop, "carray": carray, "int64": np.int64}
    exec(source, scope)  # the only way to a function of as many arguments; nothing of it comes from outside
    made = cfunc(types.int64(*signature))(scope[name])
    # numba's entry can raise, and its arrays can be let go of; these never do, which LLVM sees once all of it is private.
    parsed, machine = binding.parse_assembly(made.inspect_llvm()), _machine()
    for function in parsed.functions:
        if not function.is_declaration and function.name != made.native_name:
            function.linkage = "internal"
    tuning = binding.PipelineTuningOptions(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False  # done
    builder = binding.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    calls = {f.name for f in parsed.functions if f.is_declaration and not f.name.startswith("llvm.")}
    assert calls <= _OF_LIBC, f"{module}.{name} calls {', '.join(sorted(calls - _OF_LIBC))}"
    return bytes(made.native_name.encode() + b"\0" + machine.emit_object(parsed))


def _returns(loop: Any) -> bool:
    return loop.py_func.__annotations__.get("return") not in (None, "None")


def _machine() -> Any:
    """LLVM's description of this processor."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)


_ENGINES: list[Any] = []
"""Owners of the code that was loaded, which lives as long as the process."""


def _address(symbol: str, machine: bytes) -> int:
    from llvmlite import binding

    target = _machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(machine))
    engine.finalize_object()
    _ENGINES.append(engine)
    return int(engine.get_function_address(symbol))


_ENVIRONMENT: list[str] = []


def _environment() -> str:
    """All that a loop's machine code depends on, but for the types of its arguments."""
    if not _ENVIRONMENT:
        from llvmlite import binding

        sources = xxhash.xxh3_128()
        for path in sorted(Path(__file__).parent.glob("*.py")):
            sources.update(path.read_bytes())
        processor = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), sys.platform
        _ENVIRONMENT.append("|".join((sources.hexdigest(), version("numba"), version("llvmlite"), *processor)))
    return _ENVIRONMENT[0]


def _folders() -> list[Path]:
    """Where object files may lie: where `NUMBA_CACHE_DIR` says, beside the sources, or in the user's cache."""
    if own := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(own)]
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Where nobody has a home, the tilde is left as it is.
    return [Path(__file__).parent / "__pycache__", *([Path(users, "paft_merge")] if os.path.isabs(users) else [])]


def _read(name: str) -> bytes | None:
    """An object file that is whole; None where there is none."""
    for folder in _folders():
        try:
            held = (folder / name).read_bytes()
        except OSError:
            continue
        if xxhash.xxh3_128_digest(held[16:]) == held[:16]:
            return held[16:]
    return None


def _write(name: str, code: bytes) -> None:
    """Keep an object file in the first folder that lets us, and not what it was long ago; where none does, the next process compiles again."""
    for folder in _folders():
        part = folder / f"{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(xxhash.xxh3_128_digest(code) + code)
            part.replace(folder / name)
            for old in folder.glob(f"{name.rpartition('-')[0]}-*.o"):
                if time.time() - old.stat().st_mtime > _AGE:
                    old.unlink()
        except OSError:
            continue
        return
