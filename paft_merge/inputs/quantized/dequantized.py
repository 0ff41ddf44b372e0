"""A quantised checkpoint seen as its weights: float32 values, dequantised when they are read."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.compute.kernels.block_source import BlockSource
from paft_merge.compute.scratch import SCRATCH
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.quantized.code_intervals import high_end, low_end
from paft_merge.inputs.quantized.weights import Parts, QuantizedWeight, Values
from paft_merge.inputs.safetensors_header import ByteBuffer, as_bytes


class Dequantized(Checkpoint):
    """A checkpoint in which each quantised weight has its own name and shape; codes and scales do not appear.

    Args:
        inner: the checkpoint as it is stored.
        weights: the quantised weights.
        hidden: the stored tensors that do not appear.
    """

    def __init__(self, inner: Checkpoint, weights: Iterable[QuantizedWeight], hidden: Collection[str]) -> None:
        super().__init__(inner.folder, (), without_quantization(inner.config), {})
        self.files, self.file, self.listing = inner.files, inner.file, inner.listing
        self.warnings = inner.warnings
        self._inner, self._weights = inner, {weight.name: weight for weight in weights}
        self._hidden = frozenset(hidden)
        self._parts = Parts(inner)
        at = {weight.parts[0]: weight for weight in self._weights.values()}
        self.tensors = {}
        for name, info in inner.tensors.items():
            if (weight := at.get(name)) is not None:
                self.tensors[weight.name] = self._info(weight, info)
            elif name not in hidden:
                self.tensors[name] = info

    def _info(self, weight: QuantizedWeight, info: TensorInfo) -> TensorInfo:
        return replace(info, name=weight.name, dtype="F32", shape=weight.shape, nbytes=4 * prod(weight.shape))

    @property
    def inner(self) -> Checkpoint:
        """The checkpoint as it is stored."""
        return self._inner

    @property
    def weights(self) -> Mapping[str, QuantizedWeight]:
        """The quantised weights by name."""
        return self._weights

    @property
    def parts(self) -> Parts:
        """The stored tensors."""
        return self._parts

    @property
    def hidden(self) -> frozenset[str]:
        """Names of the stored tensors that do not appear: codes, scales, and scales of activations."""
        return self._hidden

    @cached_property
    def beside(self) -> Mapping[str, list[str]]:
        """By the module of a quantised weight, the hidden tensors in the module that are not its parts, sorted."""
        parts = {part for weight in self._weights.values() for part in weight.parts}
        found: dict[str, list[str]] = {name.removesuffix(".weight"): [] for name in self._weights}
        for name in sorted(self._hidden - parts):
            for at in (at for at, letter in enumerate(name) if letter == "."):
                if name[:at] in found:
                    found[name[:at]].append(name)
        return found

    def close(self) -> None:
        self._inner.close()

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        if (weight := self._weights.get(name)) is None:
            self._inner.read_into(name, start, buffer)
            return
        view, width = as_bytes(buffer), weight.shape[-1]
        self._info_within(name, start, len(view))
        first, stop = start // (4 * width), -(-(start + len(view)) // (4 * width))
        if start == first * 4 * width and len(view) == (stop - first) * 4 * width:
            out = np.frombuffer(view, np.float32)
            if out.flags.aligned:
                weight.decode(self._parts, first, stop, out.reshape(-1, width))
                return
        held = SCRATCH.array("dequantized", (stop - first, width), np.float32)
        weight.decode(self._parts, first, stop, held)
        view[:] = as_bytes(held.reshape(-1))[start - first * 4 * width :][: len(view)]

    def intervals(self, name: str, start: int, stop: int) -> tuple[Values, Values]:
        """Return the least and the greatest value that is rounded to the code of each entry, with its scale as it is.

        Args:
            name: a quantised weight.
            start, stop: flat indices of its entries.

        Returns:
            Two arrays `[stop - start]`, which belong to this thread until its next call; NaN for codes without a value.
        """
        weight, ends = self._weights[name], list[Values]()
        width = weight.shape[-1]
        first, last = start // width, -(-stop // width)
        for of in (low_end, high_end):
            held: Values = SCRATCH.array(of.__name__, (last - first, width), np.float32)
            with np.errstate(invalid="ignore"):
                weight.decode(self._parts, first, last, held, of)
            ends.append(held.reshape(-1)[start - first * width :][: stop - start])
        return ends[0], ends[1]

    def add_to(self, feed: BlockSource, name: str, start: int, row: int) -> bool:
        weight = self._weights.get(name)
        return weight.add_to(feed, self._parts, start, row) if weight else self._inner.add_to(feed, name, start, row)

    def location(self, name: str, start: int, nbytes: int) -> tuple[int, int] | None:
        return None if name in self._weights else self._inner.location(name, start, nbytes)

    @property
    def identity(self) -> Hashable:
        return self._inner.identity

    @property
    def folders(self) -> list[Path]:
        return self._inner.folders

    def stored_format(self, name: str) -> str:
        weight = self._weights.get(name)
        return weight.format if weight else ""

    def written_dtype(self, name: str) -> str:
        return "BF16" if name in self._weights else self._inner.written_dtype(name)

    def bytes_read(self, name: str) -> int:
        weight = self._weights.get(name)
        return sum(self._inner.bytes_read(part) for part in (weight.parts if weight else (name,)))

    def working_bytes(self, name: str) -> int:
        weight = self._weights.get(name)
        return weight.working_bytes if weight else 0

    def release(self, name: str) -> None:
        if (weight := self._weights.get(name)) is not None:
            self._parts.release(weight)

    def sample(self) -> str:
        return self._inner.sample()

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        return self._inner.fingerprint()

    @property
    def far(self) -> dict[str, int]:
        return self._inner.far

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what says that the weights are quantised, at the top and in nested configs."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return {
        k: without_quantization(v) if k.endswith("_config") and isinstance(v, Mapping) else v for k, v in kept.items()
    }
