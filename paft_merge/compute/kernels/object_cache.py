"""Machine code of the fused loops, kept on disk: a merge that finds it there starts without a compiler.

numba compiles a loop when it is first called. Importing numba and loading what it has kept itself takes a second,
which is as long as a merge of a small model; the same code as a plain object file, through LLVM alone, takes milliseconds.
An object file belongs to the sources of the loops, the versions of numba and LLVM, and the processor, all of which its
name is made from; it begins with a digest of itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import xxhash

_ROOM = "paft_merge.compute.kernels"
_SCALARS = {
    "bool": (ctypes.c_int64, (bool,)), "int": (ctypes.c_int64, (int, np.int64)), "float": (ctypes.c_double, (float,)),
    "uint32": (ctypes.c_uint32, (np.uint32,)), "uint64": (ctypes.c_uint64, (np.uint64,)),
}  # fmt: skip
_OF_LIBC = {"memset", "memcpy", "memmove"}
"""What the code of a loop may call: nothing that only a process with numba has, as memory of its own would need."""

_BITS = np.dtype(np.uint16), np.dtype(np.uint32)

_AGE = 7 * 86400
"""Seconds after which an object file is removed when its loop is compiled again: until then another environment may want it."""

_LOCK = Lock()


class Compiled:
    """A loop of this room, called with contiguous arrays and numbers; compiled when it is first called.

    Args:
        place: its module and name in this room, as "merging.blend".
        takes: its arguments, a word each: `f4.2` is an array of float32 with two dimensions, likewise `f8`, `i4`, `i8`, `u1`, `u4` and `u8`;
            `bool`, `int`, `float`, `uint32` and `uint64` are numbers. `bits.1` are bits of a block, uint16 or uint32, with the same
            machine code for either: the loop sees two arrays of them, one of each type, of which one is empty.
    """

    def __init__(self, place: str, takes: str) -> None:
        self.module, self.name = place.split(".")
        self.takes = [_Taken.of(word) for word in takes.split()]
        self._function: Callable[..., int] | None = None
        self._entry = 0
        self.__doc__ = f"`{place}`, compiled."

    def __call__(self, *arguments: Any) -> int:
        """Call the loop; no lock of Python's is held meanwhile.

        Returns:
            What the loop returns, an integer; 0 where it returns nothing.

        Raises:
            ValueError: an array is not contiguous.
            TypeError: an argument is not what the loop takes.
        """
        if self._function is None:
            self.prepare()
        assert self._function is not None
        flat: list[Any] = []
        for taken, argument in zip(self.takes, arguments, strict=True):
            taken.put(argument, flat)
        return int(self._function(*flat))

    @property
    def entry(self) -> int:
        """The address of the loop's machine code: a C function of each array's address and lengths."""
        if not self._entry:
            self.prepare()
        return self._entry

    def prepare(self) -> None:
        """Load the loop's machine code, or make it."""
        with _LOCK:
            if self._entry:
                return
            takes = " ".join(taken.word for taken in self.takes)
            of_loop = xxhash.xxh3_64_hexdigest(f"{self.module} {takes}".encode())
            name = f"{self.name}-{of_loop}-{xxhash.xxh3_64_hexdigest(_environment().encode())}.o"
            code = _read(name)
            if code is None:
                code = _compile(self.module, self.name, self.takes)
                _write(name, code)
            symbol, _, machine = code.partition(b"\0")
            entry = _address(symbol.decode(), machine)
            types = [kind for taken in self.takes for kind in taken.types]
            self._function, self._entry = ctypes.CFUNCTYPE(ctypes.c_int64, *types)(entry), entry


@dataclass(frozen=True)
class _Taken:
    """An argument of a loop."""

    word: str
    dtypes: tuple[Any, ...]
    """Of an array, those it may have; empty for a number."""
    ndim: int

    @classmethod
    def of(cls, word: str) -> _Taken:
        if word in _SCALARS:
            return cls(word, (), 0)
        name, ndim = word.split(".")
        return cls(word, _BITS if name == "bits" else (np.dtype(name),), int(ndim))

    @property
    def bits(self) -> bool:
        return self.dtypes == _BITS

    @property
    def types(self) -> list[Any]:
        """What it is to C: an array's address and lengths, of bits the address twice and the last length of each type."""
        if not self.dtypes:
            return [_SCALARS[self.word][0]]
        return [ctypes.c_void_p] * (1 + self.bits) + [ctypes.c_int64] * (self.ndim + self.bits)

    def put(self, argument: Any, flat: list[Any]) -> None:
        """Add it to what a C function is called with."""
        if not self.dtypes:
            if not isinstance(argument, _SCALARS[self.word][1]):
                raise TypeError(f"this loop takes a number ({self.word}) and not a {type(argument).__name__}")
            flat.append(argument)
            return
        if not isinstance(argument, np.ndarray) or argument.dtype not in self.dtypes or argument.ndim != self.ndim:
            what = (
                f"{argument.dtype}, {argument.ndim}-d" if isinstance(argument, np.ndarray) else type(argument).__name__
            )
            raise TypeError(f"this loop takes an array ({self.word}) and not {what}")
        if not argument.flags.c_contiguous:
            raise ValueError("the arrays of a compiled loop are contiguous")
        address = argument.__array_interface__["data"][0]
        if self.bits:
            *rows, entries = argument.shape
            half = argument.itemsize == 2
            flat += [address, address, *rows, entries * half, entries * (not half)]
        else:
            flat += [address, *argument.shape]


def _compile(module: str, name: str, takes: Sequence[_Taken]) -> bytes:
    """Compile a loop by numba: the name of its entry, a zero byte and its object file.

    The entry takes, for an array, its address and its lengths (see `_Taken.types`).
    """
    from llvmlite import binding
    from numba import carray, cfunc, types

    loop = getattr(import_module(f"{_ROOM}.{module}"), name)
    scalars = {
        "bool": types.int64,
        "int": types.int64,
        "float": types.float64,
        "uint32": types.uint32,
        "uint64": types.uint64,
    }
    taken, given, signature = [], [], []
    for i, one in enumerate(takes):
        if not one.dtypes:
            taken.append(f"a{i}")
            given.append(f"a{i} != 0" if one.word == "bool" else f"a{i}")
            signature.append(scalars[one.word])
            continue
        lengths = [f"a{i}_{k}" for k in range(one.ndim - 1)]
        rows, addresses = "".join(f"{length}, " for length in lengths), [f"a{i}_{dtype}" for dtype in one.dtypes]
        arrays = [f"carray({address}, ({rows}n{address},))" for address in addresses]
        given.append(f"({', '.join(arrays)})" if one.bits else arrays[0])
        taken += [*addresses, *lengths, *(f"n{address}" for address in addresses)]
        signature += [types.CPointer(getattr(types, dtype.name)) for dtype in one.dtypes]
        signature += [types.int64] * (len(lengths) + len(addresses))
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
