"""Machine code of the kernels, kept on disk as object files, so that a merge starts without importing numba.

numba compiles a kernel when it is first called. Importing numba and loading its own cache takes a second, as long as the merge
of a small model; loading the same code as an object file takes a millisecond. The name of an object file is a digest of the kernels'
sources, the versions of numba and llvmlite, and the processor; the file begins with a digest of itself.

A wheel has object files for the levels of x86-64 that usual processors have (see `processors`), so that a first merge compiles
nothing. They are machine code without calls into numba: the versions that made them need not be installed.

Where object files cannot be made or loaded (another llvmlite, a call that LLVM adds), numba compiles and caches the kernel
itself: the same bits from a slower start. One warning is logged.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

import numpy as np
import xxhash

from paft_merge.compute import magnitudes, splitmix64
from paft_merge.compute.kernels import elf, processors
from paft_merge.errors import MergeError, PaftMergeError

T = TypeVar("T")

log = logging.getLogger(__name__)

_PACKAGE = "paft_merge.compute.kernels"
_SCALARS = {
    "bool": (ctypes.c_int64, (bool,)),
    "int": (ctypes.c_int64, (int, np.int64)),
    "float": (ctypes.c_double, (float,)),
    "uint32": (ctypes.c_uint32, (np.uint32,)),
    "uint64": (ctypes.c_uint64, (np.uint64,)),
}
_LIBC_CALLS = {"memset", "memcpy", "memmove"}
"""Symbols that an object file may call. Those of numba's runtime, such as allocation, exist only where numba is imported."""

_BITS = np.dtype(np.uint16), np.dtype(np.uint32)

_STALE_SECONDS = 7 * 86400
"""Age after which another version of an object file is deleted when its kernel is compiled; a younger one may serve another environment."""

_LOCK = Lock()


_KERNELS: list[Compiled] = []
_SECONDS_EACH = 0.6
"""About how long numba takes to compile a kernel."""


LIMIT_SECONDS = 300.0
"""Longest time for one kernel."""

_FIX = "run again when the processor is less busy, or compile before with `python -m paft_merge.compute.kernels`"


def _fulfil(done: Future[T], make: Callable[[Compiled], T], kernel: Compiled) -> None:
    """Compile a kernel for whoever waits for `done`."""
    try:
        done.set_result(make(kernel))
    except BaseException as error:  # raised again by whoever waits
        done.set_exception(error)


class _Compiler:
    """The time that this process spends compiling, and its announcement."""

    def __init__(self) -> None:
        self.spent, self.since, self.announced, self.is_stuck = 0.0, 0.0, False, False

    def run(self, kernel: Compiled, make: Callable[[Compiled], T]) -> T:
        """Compile a kernel in a thread of its own, for a limited time; announce the first compilation, and measure each.

        Raises:
            MergeError: COMPILE, the limit is over. The thread ends with the process, as nothing can stop LLVM.
        """
        self.since = time.monotonic()
        if not self.announced:
            self.announced, missing = True, sum(kernel.is_missing for kernel in _KERNELS)
            text = "compiling up to %d kernels for this processor (once; about %.0f s)"
            log.info(text, missing, max(1.0, missing * _SECONDS_EACH))
        done: Future[T] = Future()
        Thread(target=_fulfil, args=(done, make, kernel), daemon=True).start()
        try:
            return done.result(0 if self.is_stuck else LIMIT_SECONDS)
        except TimeoutError:
            self.is_stuck = True
            what = f"was not compiled within {LIMIT_SECONDS / 60:.0f} minutes"
            raise MergeError.of("COMPILE", f"kernel {kernel.name}", what, _FIX) from None
        finally:
            self.spent, self.since = self.spent + time.monotonic() - self.since, 0.0


_COMPILER = _Compiler()


def compile_seconds() -> float:
    """Seconds that this process has spent compiling kernels, until now."""
    since = _COMPILER.since
    return _COMPILER.spent + (time.monotonic() - since if since else 0.0)


def seconds_to_compile() -> float:
    """About how long kernels will be compiled here, if none was compiled before; else 0."""
    return len(_KERNELS) * _SECONDS_EACH if all(kernel.is_missing for kernel in _KERNELS) else 0.0


def compiled_kernels() -> tuple[int, int]:
    """The number of kernels whose machine code is on disk, and of all that were defined, without compiling any."""
    return sum(not kernel.is_missing for kernel in _KERNELS), len(_KERNELS)


def packaged_kernels() -> int:
    """The number of kernels whose machine code came with the package, for this processor."""
    return sum(kernel.is_packaged for kernel in _KERNELS)


class Compiled:
    """A kernel that is called with contiguous arrays and numbers, and compiled at its first call.

    Args:
        place: module and name of the kernel, as "merging.blend".
        takes: the types of its arguments, separated by spaces. `f4.2` is a float32 array of two dimensions; likewise `f8`, `i4`,
            `i8`, `u1`, `u4` and `u8`. `bool`, `int`, `float`, `uint32` and `uint64` are numbers. `bits.1` are the bits of a block,
            uint16 or uint32, with one machine code for both: the kernel gets two arrays, one of each type, and one is empty.
    """

    def __init__(self, place: str, takes: str) -> None:
        self.module, self.name = place.split(".")
        self.takes = [_Argument.of(word) for word in takes.split()]
        self._function: Callable[..., int] | None = None
        self._entry = 0
        _KERNELS.append(self)
        self.__doc__ = f"`{place}`, compiled."

    def __call__(self, *arguments: Any) -> int:
        """Call the kernel without holding the interpreter lock.

        Returns:
            The kernel's integer result; 0 where it returns nothing.

        Raises:
            ValueError: an array is not contiguous.
            TypeError: an argument has another type.
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
        """Address of the machine code: a C function of each array's address and lengths."""
        if not self._entry:
            self.prepare()
        return self._entry

    def prepare(self) -> None:
        """Load the machine code, or compile it.

        Raises:
            numba.core.errors.NumbaError: numba cannot compile the kernel.
            MergeError: COMPILE, it takes longer than the limit.
        """
        with _LOCK:
            if self._entry:
                return
            try:
                entry = self._from_object_file()
            except PaftMergeError:
                raise
            except Exception as error:  # llvmlite has no stable interface, and numba can still compile
                if not _FALLEN_BACK:
                    from importlib.metadata import version

                    text = "object files of kernels cannot be used with llvmlite %s (%s: %s); numba's cache is used instead"
                    log.warning(text, version("llvmlite"), type(error).__name__, error)
                    _FALLEN_BACK.append(self)
                entry = _COMPILER.run(self, _compile_cached)
            types = [kind for taken in self.takes for kind in taken.types]
            self._function, self._entry = ctypes.CFUNCTYPE(ctypes.c_int64, *types)(entry), entry

    @property
    def is_missing(self) -> bool:
        """Whether the kernel must be compiled, because no folder has its object file."""
        return not self._entry and not any(place.is_file() for place in self._places())

    @property
    def is_packaged(self) -> bool:
        """Whether its object file for this processor came with the package."""
        first = next(self._places())
        return first.parent == PACKAGED and first.is_file()

    def ship(self, folder: Path) -> None:
        """Compile the kernel for the level that `NUMBA_CPU_NAME` names into a folder, unless it has the object file."""
        place = folder / self._file(os.environ["NUMBA_CPU_NAME"])
        if _read(iter([place])) is None:
            made = _compile(self)
            place.write_bytes(xxhash.xxh3_128_digest(made) + made)

    def _file(self, level: str | None) -> str:
        """Name of the object file for a level of x86-64, or for this machine and the installed versions."""
        takes = " ".join(taken.word for taken in self.takes)
        signature = xxhash.xxh3_64_hexdigest(f"{self.module} {takes}".encode())
        return f"{self.name}-{signature}-{xxhash.xxh3_64_hexdigest(_environment(level).encode())}.o"

    def _places(self) -> Iterator[Path]:
        """Where its object file may be, best first."""
        if level := processors.level():
            yield PACKAGED / self._file(level)
        for folder in folders():
            yield folder / self._file(None)

    def _from_object_file(self) -> int:
        code = _read(self._places())
        if code is None:
            code = _COMPILER.run(self, _compile)
            _write(self._file(None), code)
        symbol, _, machine = code.partition(b"\0")
        return _load(symbol.decode(), machine)


_FALLEN_BACK: list[Compiled] = []
"""The first kernel without an object file; its warning is the only one."""


@dataclass(frozen=True)
class _Argument:
    """The type of one argument of a kernel."""

    word: str
    dtypes: tuple[Any, ...]
    """The dtypes that an array may have; empty for a number."""
    ndim: int

    @classmethod
    def of(cls, word: str) -> _Argument:
        if word in _SCALARS:
            return cls(word, (), 0)
        name, ndim = word.split(".")
        return cls(word, _BITS if name == "bits" else (np.dtype(name),), int(ndim))

    @property
    def bits(self) -> bool:
        return self.dtypes == _BITS

    @property
    def types(self) -> list[Any]:
        """Its C types: an array's address and lengths; for bits, the address twice and the last length of each type."""
        if not self.dtypes:
            return [_SCALARS[self.word][0]]
        return [ctypes.c_void_p] * (1 + self.bits) + [ctypes.c_int64] * (self.ndim + self.bits)

    def put(self, argument: Any, flat: list[Any]) -> None:
        """Append the C values of `argument` to `flat`."""
        if not self.dtypes:
            if not isinstance(argument, _SCALARS[self.word][1]):
                raise TypeError(f"this kernel takes a number ({self.word}) and not a {type(argument).__name__}")
            flat.append(argument)
            return
        if not isinstance(argument, np.ndarray) or argument.dtype not in self.dtypes or argument.ndim != self.ndim:
            got = (
                f"{argument.dtype}, {argument.ndim}-d" if isinstance(argument, np.ndarray) else type(argument).__name__
            )
            raise TypeError(f"this kernel takes an array ({self.word}) and not {got}")
        if not argument.flags.c_contiguous:
            raise ValueError("the arrays of a kernel must be contiguous; use np.ascontiguousarray")
        address = argument.__array_interface__["data"][0]
        if self.bits:
            *rows, entries = argument.shape
            half = argument.itemsize == 2
            flat += [address, address, *rows, entries * half, entries * (not half)]
        else:
            flat += [address, *argument.shape]


def _c_function(kernel: Compiled, *, cache: bool) -> Any:
    """Compile a kernel by numba, behind a C function that takes each array's address and lengths (see `_Argument.types`)."""
    from numba import carray, cfunc, types

    module = import_module(f"{_PACKAGE}.{kernel.module}")
    loop = getattr(module, kernel.name)
    scalars = {"bool": types.int64, "int": types.int64, "float": types.float64}
    parameters, given, signature = [], [], []
    for i, one in enumerate(kernel.takes):
        if not one.dtypes:
            parameters.append(f"a{i}")
            given.append(f"a{i} != 0" if one.word == "bool" else f"a{i}")
            signature.append(scalars.get(one.word) or getattr(types, one.word))
            continue
        lengths = [f"a{i}_{k}" for k in range(one.ndim - 1)]
        rows, addresses = "".join(f"{length}, " for length in lengths), [f"a{i}_{dtype}" for dtype in one.dtypes]
        arrays = [f"carray({address}, ({rows}n{address},))" for address in addresses]
        given.append(f"({', '.join(arrays)})" if one.bits else arrays[0])
        parameters += [*addresses, *lengths, *(f"n{address}" for address in addresses)]
        signature += [types.CPointer(getattr(types, dtype.name)) for dtype in one.dtypes]
        signature += [types.int64] * (len(lengths) + len(addresses))
    returns = "0" if loop.py_func.__annotations__.get("return") in (None, "None") else "int64(result)"
    # numba's cache notices changes of one file only, so the name of the function holds a digest of all sources.
    name = f"{kernel.name}_{_sources()}" if cache else kernel.name
    source = f"def {name}({', '.join(parameters)}):\n    result = loop({', '.join(given)})\n    return {returns}\n"
    scope = {"loop": loop, "carray": carray, "int64": np.int64, "__name__": module.__name__}
    exec(compile(source, str(module.__file__), "exec"), scope)  # a function of as many arguments; no text from outside
    return cfunc(types.int64(*signature), cache=cache)(scope[name])


def _compile_cached(kernel: Compiled) -> int:
    """The address of a kernel that numba compiles and, where it finds a folder, caches."""
    try:
        made = _c_function(kernel, cache=True)
    except RuntimeError:  # no folder is writable
        made = _c_function(kernel, cache=False)
    _LOADED.append(made)
    return int(made.address)


def _compile(kernel: Compiled) -> bytes:
    """Compile a kernel: the name of its entry, a zero byte, and its object file."""
    from llvmlite import binding

    made = _c_function(kernel, cache=False)
    # numba's entry may raise and release arrays. The kernels never do, and LLVM removes that code when all else is private.
    parsed, machine = binding.parse_assembly(made.inspect_llvm()), _machine()
    for function in parsed.functions:
        if not function.is_declaration and function.name != made.native_name:
            function.linkage = "internal"
    tuning = binding.PipelineTuningOptions(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False  # numba has done these
    builder = binding.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    calls = {f.name for f in parsed.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if not calls <= _LIBC_CALLS:
        raise ValueError(f"{kernel.module}.{kernel.name} calls {', '.join(sorted(calls - _LIBC_CALLS))}")
    return bytes(made.native_name.encode() + b"\0" + machine.emit_object(parsed))


def _machine() -> Any:
    """LLVM's description of the processor to compile for."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    name, features = processors.processor()
    return target.create_target_machine(cpu=name, features=features, opt=3, jit=True)


_LOADED: list[Any] = []
"""Owners of loaded machine code, kept for the life of the process."""


def _load(symbol: str, machine: bytes) -> int:
    """Load an object file: the address of `symbol` in it."""
    try:
        entry, owner = elf.load(machine, symbol)
    except (ValueError, OSError):  # of another system or processor
        entry, owner = _load_by_llvm(symbol, machine)
    _LOADED.append(owner)
    return entry


def _load_by_llvm(symbol: str, machine: bytes) -> tuple[int, Any]:
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(machine))
    engine.finalize_object()
    return int(engine.get_function_address(symbol)), engine


@cache
def _sources() -> str:
    """Digest of the source files that the machine code of a kernel depends on."""
    digest = xxhash.xxh3_128()
    constants = (str(magnitudes.__file__), str(splitmix64.__file__))
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *map(Path, constants)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _environment(level: str | None) -> str:
    """Everything that the machine code of a kernel for a level, or for this machine, depends on, except the types of its arguments."""
    if level:
        return "|".join((_sources(), level, sys.platform))
    from importlib.metadata import version

    return "|".join((_sources(), version("numba"), version("llvmlite"), processors.identity(), sys.platform))


PACKAGED = Path(__file__).parent / "packaged"
"""The object files of a wheel."""


def folders() -> list[Path]:
    """Folders for object files: `NUMBA_CACHE_DIR` alone, or `__pycache__` beside the sources, then the user's cache."""
    if own := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(own)]
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # expanduser returns the tilde unchanged for a user without a home.
    return [Path(__file__).parent / "__pycache__", *([Path(users, "paft_merge")] if os.path.isabs(users) else [])]


def _read(places: Iterator[Path]) -> bytes | None:
    """The first object file with an intact digest; None where there is none."""
    for place in places:
        try:
            held = place.read_bytes()
        except OSError:
            continue
        if xxhash.xxh3_128_digest(held[16:]) == held[:16]:
            return held[16:]
    return None


def _write(name: str, code: bytes) -> None:
    """Write an object file to the first writable folder and delete stale versions. If none is writable, the next process compiles again."""
    for folder in folders():
        part = folder / f"{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(xxhash.xxh3_128_digest(code) + code)
            part.replace(folder / name)
            for old in folder.glob(f"{name.rpartition('-')[0]}-*.o"):
                if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                    old.unlink()
        except OSError:
            continue
        return
