"""The factors A and B of one LoRA module, as float32 pairs in the layout of the stored weight.

Shapes: A `[r, in]`, B `[out, r]` as PEFT stores them; a pair is `left`, `right` as in `deltas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters.binding import Binding
from paft_merge.inputs.adapters.deltas import Pair
from paft_merge.inputs.adapters.rows import Array, Rows


@dataclass(frozen=True)
class Factors:
    """A and B of one module in the adapter's file.

    Attributes:
        a: lora_A.
        b: lora_B.
        a_blocks: number of diagonal blocks that BD-LoRA stores of A (arXiv:2510.23346); 1 without it.
        b_blocks: the same of B.
    """

    a: Rows
    b: Rows
    a_blocks: int = 1
    b_blocks: int = 1

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of lora_A, with its blocks on a diagonal."""
        return _block_diagonal_shape(self.a.shape, self.a_blocks)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of lora_B, with its blocks on a diagonal."""
        return _block_diagonal_shape(self.b.shape, self.b_blocks)

    @property
    def rank(self) -> int:
        """Rows of A; 0 if it has no dimensions."""
        return self.a_shape[0] if self.a_shape else 0

    @property
    def product_shape(self) -> tuple[int, int] | None:
        """`(out, in)` of B A; None if they cannot be multiplied."""
        a, b = self.a_shape, self.b_shape
        return (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else None

    def load(self) -> Pair:
        """Read A `[r, in]` and B `[out, r]` as float32; for a convolution `[r, in * kernel]` and `[out, r]`."""
        return _block_diagonal(self.a.load(), self.a_blocks), _block_diagonal(self.b.load(), self.b_blocks)

    def oriented(self, scale: float, transposed: bool) -> Pair:
        """`left`, `right` with contiguous rows, for a tensor that stores scale * B A or its transpose."""
        a, b = self.load()
        scaled = np.float32(scale)
        return (np.ascontiguousarray(a.T) * scaled, np.ascontiguousarray(b.T)) if transposed else (b * scaled, a)

    def stacked(self, count: int, scale: float, grouped: bool, in_out: bool) -> Pair:
        """The factors of `count` experts: `left [experts, rows, r]`, `right [experts, r, columns]`, contiguous.

        Args:
            count: the number of experts.
            scale: is multiplied into `left`.
            grouped: lora_B is packed expert by expert; in PEFT's layout the expert index varies fastest.
            in_out: the tensor is `[experts, in, out]`.
        """
        a, b = self.load()
        a = a.reshape(count, -1, a.shape[1])
        grouped_b = b.reshape(len(b), count, -1).transpose(1, 0, 2)
        b = grouped_b if grouped else b.reshape(len(b), -1, count).transpose(2, 0, 1)
        left, right = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if in_out else (b, a)
        return np.ascontiguousarray(left) * np.float32(scale), np.ascontiguousarray(right)


def check_rank(binding: Binding, path: str, rank: int) -> None:
    """Refuse factors of another rank than the configuration gives.

    Raises:
        AdapterError: ADAPTER_SHAPE.
    """
    if rank != (stated := binding.settings.rank_of(path)):
        raise binding.wrong(path, f"has factors of rank {rank}, but adapter_config.json gives it rank {stated}")


def unequal(binding: Binding, path: str, factors: Factors, shape: tuple[int, ...]) -> AdapterError:
    """An ADAPTER_SHAPE error for factors whose product is not of the base's `shape`, ready to raise."""
    what = f"has lora_A {factors.a_shape} and lora_B {factors.b_shape}, which do not make the base's {shape}"
    return binding.unlike_base(path, what)


def pissa_offset(weight: Array, rank: int, transposed: bool) -> Pair:
    """Minus the `rank` largest components, which PiSSA subtracted from the base (Meng et al. 2024, arXiv:2404.02948).

    Args:
        weight: `[O, I]` float32, the whole stored tensor.
        rank: at most min(O, I).
        transposed: the layer is an HF `Conv1D`, which stores `[in, out]`. This affects only the rounding.
    """
    import torch

    whole = torch.from_numpy(weight)
    u, s, vh = torch.linalg.svd(whole.T if transposed else whole, full_matrices=False)
    left, right = (u[:, :rank] * -s[:rank]).numpy(), vh[:rank].numpy()
    pair = (right.T, left.T) if transposed else (left, right)
    return np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1])


def olora_offset(weight: Array, rank: int, scale: float) -> Pair:
    """Minus `scale` times the first `rank` components of QR, which OLoRA subtracted (Buyukakyuz 2024, arXiv:2406.01775).

    As in PEFT, the QR is that of the stored weight, also for HF `Conv1D`.
    """
    import torch

    q, r = torch.linalg.qr(torch.from_numpy(weight))
    return (q[:, :rank] * -scale).numpy(), r[:rank].contiguous().numpy()


def concatenated(pairs: Sequence[Pair]) -> Pair:
    """One pair whose product is the sum of the products of `pairs`."""
    return np.concatenate([left for left, _ in pairs], axis=1), np.concatenate([right for _, right in pairs])


def _block_diagonal_shape(shape: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    """Shape of the block-diagonal matrix whose blocks a tensor of `shape` holds; `()` if it cannot hold them."""
    if blocks == 1:
        return shape
    return (shape[0], shape[1] * blocks) if len(shape) == 2 and shape[0] % blocks == 0 else ()


def _block_diagonal(factor: Array, blocks: int) -> Array:
    """The block-diagonal matrix whose blocks `factor` holds, one after the other along its rows."""
    if blocks == 1:
        return factor
    rows, columns = len(factor) // blocks, factor.shape[1]
    diagonal = np.zeros((len(factor), columns * blocks), np.float32)
    for i in range(blocks):
        diagonal[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = factor[i * rows : (i + 1) * rows]
    return diagonal
