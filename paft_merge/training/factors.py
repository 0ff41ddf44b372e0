"""Low-rank factors of the matrices that a LoRA adapter updates, and blocks of their products.

O = out features, I = in features, R = rank. The delta of one matrix is `scale * B_OR @ A_RI`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paft_merge.errors import TrainError

CHUNK_BYTES, DEVICE_CHUNK_BYTES = 1 << 19, 1 << 26
"""Bytes of delta that are computed at a time, on a CPU (fits the cache of a core) and on a GPU (keeps it busy)."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapted matrix: its low-rank factors and their scale."""

    name: str
    """Dotted name of the adapted module in the base model."""
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    weight: Tensor | None = None
    """The frozen weight; None where it is quantised."""
    linear: bool = True
    """Whether the module is an `nn.Linear`."""

    @property
    def numel(self) -> int:
        """Number of entries of the delta."""
        return self.b_OR.shape[0] * self.a_RI.shape[1]


def adapted(model: nn.Module, adapter: str = "default") -> tuple[Factors, ...]:
    """List the matrices that LoRA `adapter` updates, in the model's order.

    Raises:
        TrainError: TARGET, when an update is not `scale * B @ A` (DoRA, fused parameters) or nothing is adapted.
    """
    found = [_factors(name, module, adapter) for name, module in model.named_modules() if _holds(module, adapter)]
    if not found:
        raise TrainError.of("TARGET", adapter, "the adapter changes no module", "check lora.target_modules")
    return tuple(found)


def _holds(module: nn.Module, adapter: str) -> bool:
    factors = ("lora_A", "lora_embedding_A")
    return any(adapter in getattr(module, kind, ()) for kind in factors) and adapter in getattr(module, "scaling", ())


def _factors(name: str, module: Any, adapter: str) -> Factors:
    name = name.removeprefix("base_model.model.")
    if adapter in getattr(module, "lora_magnitude_vector", {}):
        what = "the L1 penalty does not support DoRA, whose update is not a low-rank product"
        raise TrainError.of("TARGET", name, what, "set use_dora: false")
    if adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    else:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    if hasattr(module, "parameter_name"):
        raise TrainError.of("TARGET", name, "fused expert parameters are not supported", "use target_modules")
    layer = module.get_base_layer()
    weight = getattr(layer, "weight", None)
    plain = weight is not None and weight.is_floating_point() and type(weight).__name__ != "Params4bit"
    scale, linear = float(module.scaling[adapter]), isinstance(layer, nn.Linear)
    return Factors(name, a.flatten(1), b.flatten(1), scale, weight if plain else None, linear)


def owner(factor: Tensor) -> Tensor:
    """The parameter of which a factor is a flattened view."""
    return factor._base if factor._base is not None else factor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded (FSDP 2) parameter; other tensors are returned unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rows_per_chunk(a_RI: Tensor, chunk_bytes: int | None = None) -> int:
    """Number of float32 rows of a delta that fit in `chunk_bytes` (default: by device); at least one."""
    size = chunk_bytes or (CHUNK_BYTES if a_RI.device.type == "cpu" else DEVICE_CHUNK_BYTES)
    return max(1, size // (4 * a_RI.shape[1]))


def chunks(f: Factors, chunk_bytes: int | None = None) -> Iterator[Tensor]:
    """Yield float32 row blocks of `scale * B @ A`, in order."""
    a, b = whole(f.a_RI).detach().float(), whole(f.b_OR).detach().float()
    step = rows_per_chunk(a, chunk_bytes)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, b.shape[0], step):
            yield (b[start : start + step] @ a).mul_(f.scale)


def frobenius(f: Factors) -> float:
    """Norm of the delta from R x R Gram matrices, in float64: sqrt(tr(B^T B A A^T)) * |scale|."""
    a, b = whole(f.a_RI).detach().double(), whole(f.b_OR).detach().double()
    return abs(f.scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
