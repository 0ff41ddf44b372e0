"""The storage types of safetensors, conversion to and from float32, and counts of NaN and infinity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.magnitudes import INFINITY
from paft_merge.compute.splitmix64 import numbers

if TYPE_CHECKING:
    from torch import Tensor


class Dtype(NamedTuple):
    """A storage type: safetensors' name, bits per element, torch's name if any, and whether a delta can be added."""

    name: str
    bits: int
    torch: str | None
    mergeable: bool


DTYPES: dict[str, Dtype] = {
    row.name: row
    for row in (
        Dtype("F64", 64, "float64", True),
        Dtype("F32", 32, "float32", True),
        Dtype("F16", 16, "float16", True),
        Dtype("BF16", 16, "bfloat16", True),
        Dtype("F8_E4M3", 8, "float8_e4m3fn", True),
        Dtype("F8_E5M2", 8, "float8_e5m2", True),
        Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", True),
        Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", True),
        Dtype("F8_E8M0", 8, "float8_e8m0fnu", False),
        Dtype("F6_E2M3", 6, None, False),
        Dtype("F6_E3M2", 6, None, False),
        Dtype("F4", 4, None, False),  # torch packs two into an element, so that shapes would differ
        Dtype("C64", 64, "complex64", False),
        Dtype("I64", 64, "int64", False),
        Dtype("I32", 32, "int32", False),
        Dtype("I16", 16, "int16", False),
        Dtype("I8", 8, "int8", False),
        Dtype("U64", 64, "uint64", False),
        Dtype("U32", 32, "uint32", False),
        Dtype("U16", 16, "uint16", False),
        Dtype("U8", 8, "uint8", False),
        Dtype("BOOL", 8, "bool", False),
    )
}
"""Every storage type of safetensors 0.8, by name."""

_NONFINITE: dict[str, tuple[Any, int, int]] = {
    "F64": (np.uint64, 0x7FF << 52, 0x7FF << 52),
    "F32": (np.uint32, INFINITY, INFINITY),
    "F16": (np.uint16, 0x7C00, 0x7C00),
    "BF16": (np.uint16, 0x7F80, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C, 0x7C),
    "F8_E4M3FNUZ": (np.uint8, 0xFF, 0x80),
    "F8_E5M2FNUZ": (np.uint8, 0xFF, 0x80),
}
"""An element is NaN or infinite if its bits under the mask equal the value: type, mask, value."""

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def widen(stored: NDArray[np.uint8], dtype: str, out: NDArray[np.float32]) -> None:
    """Convert stored elements to float32, exactly except for F64, which is rounded.

    Args:
        stored: `[bytes]`, whole elements.
        dtype: a mergeable storage type.
        out: `[E]`; overwritten.
    """
    if dtype == "BF16":
        np.left_shift(stored.view(np.uint16), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    elif dtype in _NUMPY:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, stored.view(_NUMPY[dtype]), casting="same_kind")
    else:
        import torch

        torch.from_numpy(out).copy_(torch.from_numpy(stored).view(getattr(torch, str(DTYPES[dtype].torch))))


def count_nonfinite(stored: NDArray[np.uint8], dtype: str) -> int:
    """Count the elements that are NaN or infinite; 0 for types that cannot be merged.

    Args:
        stored: `[bytes]`, whole elements.
        dtype: their storage type.
    """
    if dtype not in _NONFINITE:
        return 0
    kind, mask, value = _NONFINITE[dtype]
    return int(np.count_nonzero((stored.view(kind) & kind(mask)) == kind(value)))


def cast(values: NDArray[np.float32], dtype: str, key: int = 0, index: int = 0) -> NDArray[np.uint8]:
    """Round float32 into a storage type: to nearest even, or stochastically when `key` is not 0.

    Args:
        values: `[E]`.
        dtype: a mergeable storage type. Values out of its range become infinite, or NaN if it has no infinity.
        key: stream of stochastic rounding, of `splitmix64`.
        index: flat index of the first element in its tensor.

    Returns:
        `[bytes]`, fresh memory.
    """
    import torch

    kind = getattr(torch, str(DTYPES[dtype].torch))
    nearest = torch.from_numpy(values).to(kind)
    stored: NDArray[np.uint8] = nearest.view(torch.uint8).numpy()
    if not key or nearest.element_size() >= values.itemsize:
        return stored
    bits = stored.view({1: np.uint8, 2: np.uint16}[nearest.element_size()])
    wide = nearest.float().numpy()
    other = _other_side(bits, values, wide)
    with np.errstate(invalid="ignore", divide="ignore"):  # exact and infinite values stay as they are
        gap = torch.from_numpy(other).view(kind).float().numpy() - wide
        chance = (values - wide) / gap
    return np.where(uniform(key, index, len(values)) < chance, other, bits).view(np.uint8)


def stored_bytes(values: Tensor, dtype: str, key: int, index: int) -> NDArray[np.uint8]:
    """Bytes of a tensor in a storage type: unchanged if it has that type, else rounded from float32 by `cast`.

    Args:
        values: `[E]`, any float dtype.
        dtype, key, index: as for `cast`.
    """
    import torch

    if str(values.dtype) == f"torch.{DTYPES[dtype].torch}":
        return values.contiguous().view(torch.uint8).numpy()
    return cast(values.float().numpy(), dtype, key, index)


def _other_side(bits: Any, values: NDArray[np.float32], nearest: NDArray[np.float32]) -> Any:
    """The neighbour of each rounded value (as bits, sign and magnitude) on the other side of the unrounded value."""
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    magnitude = bits & ~sign
    magnitude = np.where(np.abs(values) > np.abs(nearest), magnitude + 1, magnitude - 1).astype(bits.dtype)
    # Zero has no sign: two of the types use the bits of negative zero for NaN.
    return np.where(np.signbit(values) & (magnitude != 0), magnitude | sign, magnitude)


def uniform(key: int, index: int, count: int) -> NDArray[np.float32]:
    """`count` numbers in [0, 1) of the stream `key` of `splitmix64`, in steps of 2**-24."""
    return (numbers(key, index, count) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
