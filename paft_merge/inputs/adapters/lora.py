"""Binds LoRA modules: linear layers, `Conv1D`, convolutions, embeddings, with DoRA, trained biases and PiSSA or OLoRA.

Shapes: A `[r, in]`, B `[out, r]` as PEFT stores them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paft_merge.inputs.adapters.binding import About, Binding, DeltaBuilder, PeftType
from paft_merge.inputs.adapters.deltas import Lazy, Pair
from paft_merge.inputs.adapters.keys import Module, TensorNames
from paft_merge.inputs.adapters.layouts import is_transposed
from paft_merge.inputs.adapters.lora_config import check_config
from paft_merge.inputs.adapters.lora_experts import bind_parameter, targeted_name
from paft_merge.inputs.adapters.lora_factors import (
    Factors,
    check_rank,
    concatenated,
    olora_offset,
    pissa_offset,
    unequal,
)
from paft_merge.inputs.adapters.rows import Rows
from paft_merge.inputs.architecture import StoredParameter


def _bind(binding: Binding, module: Module) -> None:
    is_embedding = "embedding_A" in module.parts or "embedding_B" in module.parts
    names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    for part, other in (names, names[::-1]):
        if other not in module.parts:
            what = f"has lora_{part} without lora_{other}" if part in module.parts else "has no factors"
            raise binding.wrong(module.path, what)
    a, b = (binding.rows(module.parts[name]) for name in names)
    factors = Factors(a, b, *_block_counts(binding, module.path))
    if is_embedding:
        bind_embedding(binding, module, factors)
    elif not bind_parameter(binding, module, factors):
        bind_layer(binding, module, factors)


def bind_embedding(binding: Binding, module: Module, factors: Factors) -> None:
    """Bind `[vocab, dim]`: the transpose of s B A. (A model that scales its embeddings scales their output.)"""
    path, parameter = module.path, binding.require(module.path, f"{module.path}.weight")
    if parameter is None:
        return
    builder = binding.builder(parameter)
    if factors.product_shape is None or factors.product_shape[::-1] != builder.shape:
        raise unequal(binding, path, factors, builder.shape)
    _refuse_decomposition(binding, path)
    check_rank(binding, path, factors.rank)
    scale = binding.settings.scale(path, factors.rank)
    builder.rank, builder.module, builder.layer = factors.rank, path, "embedding"
    _add(binding, builder, module, lambda: factors.oriented(scale, transposed=True), columns=True)


def bind_layer(binding: Binding, module: Module, factors: Factors) -> None:
    """Bind a linear layer, a `Conv1D`, a convolution, or the projections of an `nn.MultiheadAttention`."""
    path = module.path
    parameter = binding.require(path, f"{path}.weight", f"{path}.in_proj_weight")
    if parameter is None:
        return
    builder, name = binding.builder(parameter), targeted_name(binding, path)
    check_rank(binding, name, factors.rank)
    scale = binding.settings.scale(name, factors.rank)
    builder.rank = factors.rank
    if name == path and not module.attention:
        builder.module, builder.layer = path, "convolution" if len(builder.shape) > 2 else "linear"
    if len(builder.shape) > 2:
        _check_convolution(binding, path, factors, builder.shape)
        _refuse_decomposition(binding, path)
        _add(binding, builder, module, lambda: factors.oriented(scale, transposed=False), columns=False)
        return
    transposed = _is_transposed(binding, path, factors, builder)
    builder.layer = "conv1d" if transposed and builder.layer else builder.layer
    if module.attention and binding.find(f"{path.rpartition('.')[0]}.in_proj_weight"):
        scale *= 2  # PEFT adds the delta of this out_proj twice, in training and in merging
    decomposition = binding.settings.decomposition if builder.new is None else ""
    builder.kind = decomposition or "lora"
    builder.rank *= 2 if decomposition else 1  # see `_without_start`

    def make() -> Pair:
        pair = factors.oriented(scale, transposed)
        return _without_start(binding, parameter, factors, pair, scale, transposed) if decomposition else pair

    _add(binding, builder, module, make, columns=transposed)


def _without_start(
    binding: Binding, parameter: StoredParameter, factors: Factors, pair: Pair, scale: float, transposed: bool
) -> Pair:
    """The factors, minus what the start of training subtracted from the base."""
    weight = Rows.of(binding.base, parameter.value_in).load()
    if binding.settings.decomposition == "pissa":
        return concatenated([pair, pissa_offset(weight, factors.rank, transposed)])
    return concatenated([pair, olora_offset(weight, factors.rank, scale)])


def _add(binding: Binding, builder: DeltaBuilder, module: Module, make: Callable[[], Pair], columns: bool) -> None:
    """Add the factors, the magnitude and the bias of a module to their builders."""
    path, parts, settings = module.path, module.parts, binding.settings
    if builder.low is not None:
        raise binding.wrong(path, "has two pairs of factors for one tensor", "ADAPTER_CONFIG")
    builder.low, builder.columns = Lazy(make), columns
    dora, bias = settings.flag("use_dora"), settings.flag("lora_bias")
    for part, wanted, field in (("magnitude_vector", dora, "use_dora"), ("B.bias", bias, "lora_bias")):
        if (part in parts) != wanted:
            what = f"{'has no' if wanted else 'has a'} lora_{part}, but {field} is {str(wanted).lower()}"
            raise binding.wrong(path, what, "ADAPTER_SHAPE" if wanted else "ADAPTER_UNUSED")
    if dora:
        builder.magnitude = binding.values(parts["magnitude_vector"]).flatten()
        if len(builder.magnitude) != (builder.row_size if columns else builder.shape[0]):
            raise binding.wrong(path, f"has {len(builder.magnitude)} magnitudes for a weight of {builder.shape}")
    if bias:
        _add_bias(binding, module, builder.name)


def _add_bias(binding: Binding, module: Module, weight: str) -> None:
    """Add s * (the bias of lora_B) to the layer's bias, as a product of rank 1."""
    path, parameter, values = module.path, _bias_of(binding, weight), binding.values(module.parts["B.bias"])
    if parameter is None:
        raise binding.wrong(path, "has a lora_B.bias, and the layer has no bias to add it to", "ADAPTER_TARGET")
    if values.shape != parameter.shape:
        raise binding.wrong(path, f"has a lora_B.bias of {tuple(values.shape)}, the base has {parameter.shape}")
    scale = binding.settings.scale(path, binding.settings.rank_of(path))
    builder = binding.builder(parameter)
    builder.kind, builder.rank = "bias", 1
    builder.low = Lazy(lambda: (values[:, None] * np.float32(scale), np.ones((1, 1), np.float32)))


def _bias_of(binding: Binding, weight: str) -> StoredParameter | None:
    """The bias of the layer whose weight is the base's tensor `weight`."""
    name = weight.removesuffix("weight") + "bias"
    return binding.find(name) if name in binding.base.tensors else None


def _block_counts(binding: Binding, path: str) -> tuple[int, int]:
    """Number of blocks of lora_A and lora_B in BD-LoRA (arXiv:2510.23346); 1 without it."""
    blocks = binding.settings.raw.get("use_bdlora") or {}
    fields = ("target_modules_bd_a", "target_modules_bd_b")
    count = int(blocks.get("nblocks", 1))
    a, b = (count if any(p in path for p in blocks.get(field) or ()) else 1 for field in fields)
    return a, b


def _check_convolution(binding: Binding, path: str, factors: Factors, shape: tuple[int, ...]) -> None:
    """Check shapes: the base `[out, in, *kernel]`, A `[r, in, *kernel]`, B `[out, r, 1, ...]`."""
    a, b = factors.a_shape, factors.b_shape
    if len(a) != len(shape) or len(b) != len(shape) or b[0] != shape[0] or a[2:] != shape[2:]:
        raise unequal(binding, path, factors, shape)
    if a[0] != b[1] or a[1] != shape[1]:
        if b[1] and shape[1] and a[0] % b[1] == 0 and a[1] % shape[1] == 0 and a[1] > shape[1]:
            what = "is a grouped convolution, and the adapter mixes its groups, which no weight can represent"
            raise binding.wrong(path, what, "ADAPTER_UNSUPPORTED")
        raise unequal(binding, path, factors, shape)


def _is_transposed(binding: Binding, path: str, factors: Factors, builder: DeltaBuilder) -> bool:
    """Whether the weight is stored `[in, out]`; PEFT never transposes a weight that was targeted as a parameter."""
    product, targeted = factors.product_shape, targeted_name(binding, path) != path
    if product is None or (targeted and product != builder.shape):
        raise unequal(binding, path, factors, builder.shape)
    if targeted:
        return False
    unfit = f"has lora_A {factors.a_shape} and lora_B {factors.b_shape}, which do not make"
    return is_transposed(binding, path, builder, lambda *shape: product == shape, unfit)


def _refuse_decomposition(binding: Binding, path: str) -> None:
    if start := binding.settings.decomposition:
        what = f"is not a linear layer, and PEFT supports init_lora_weights: {start} for linear layers only"
        raise binding.wrong(path, what, "ADAPTER_UNSUPPORTED")


_PARTS = ("A", "B", "embedding_A", "embedding_B", "magnitude_vector")

_ABOUT = About(
    "LoRA (arXiv:2106.09685), rsLoRA, DoRA, PiSSA, OLoRA", "all, and fused experts", "here", "rows", "W + s · B A"
)

LORA = PeftType(TensorNames("lora_", _PARTS), check_config, _bind, _ABOUT)
