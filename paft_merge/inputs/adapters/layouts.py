"""Whether the weight of a linear layer is stored `[out, in]`, or `[in, out]` as HF's `Conv1D` stores it."""

from __future__ import annotations

from collections.abc import Callable

from paft_merge.inputs.adapters.binding import Binding, DeltaBuilder


def is_transposed(
    binding: Binding, path: str, builder: DeltaBuilder, fits: Callable[[int, int], bool], unfit: str
) -> bool:
    """Whether a matrix is stored `[in, out]`, as HF's `Conv1D` does: by shape, else by bias, else by the class.

    PEFT decides by the class of the layer and overrules `fan_in_fan_out` of the file, so that field is not used here
    either.

    Args:
        binding: the adapter and its base.
        path: the layer.
        builder: of the layer's weight.
        fits: whether the adapter fits this number of output and input features.
        unfit: the message if it fits neither way.
    """
    shape = builder.shape
    has_bias = builder.name.removesuffix("weight") + "bias" in binding.base.tensors  # Conv1D always has one
    plain, flipped = fits(*shape), has_bias and fits(*shape[::-1])
    if not plain and not flipped:
        raise binding.unlike_base(path, f"{unfit} the base's {shape}")
    if not (plain and flipped):
        return flipped
    architecture = binding.architecture.get()
    found = architecture.is_conv1d(path) if architecture else None
    if found is None and binding.settings.flag("fan_in_fan_out"):
        what = "is square, and may be stored transposed: transformers does not know the model's class, which decides it"
        raise binding.wrong(path, what, "ADAPTER_UNSUPPORTED")
    return bool(found)
