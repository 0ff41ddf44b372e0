"""Binds LoRA on parameters that PEFT targets by name (`target_parameters`), as fused experts are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from paft_merge.inputs.adapters.binding import Binding
from paft_merge.inputs.adapters.deltas import AdapterDelta, ExpertRows, Experts, Lazy
from paft_merge.inputs.adapters.keys import Module
from paft_merge.inputs.adapters.lora_factors import Factors, check_rank, unequal
from paft_merge.inputs.architecture import StoredParameter


class Targeted(NamedTuple):
    """A parameter that an adapter targets by its name: its name in the model, how it is stored, and whether `[in, out]`."""

    name: str
    parameter: StoredParameter
    transposed: bool


def bind_parameter(binding: Binding, module: Module, factors: Factors) -> bool:
    """Bind a module whose parameter was targeted by name; False if it is an ordinary layer."""
    targets, path = binding.settings.names("target_parameters"), module.path
    if not targets or (module.depth == 0 and _is_layer(binding, path)):
        return False
    found = find_targeted(binding, module)
    if found is not None:
        _bind_experts(binding, found, factors)
    return True


def find_targeted(binding: Binding, module: Module) -> Targeted | None:
    """The parameter that the factors of a module are for; None, and the binding notes it, if the base does not have it.

    Raises:
        AdapterError: ADAPTER_UNSUPPORTED (transformers does not know the architecture), ADAPTER_SHAPE.
    """
    targets, path = binding.settings.names("target_parameters"), module.path
    architecture = binding.architecture.get()
    if architecture is None:
        what = "was targeted by parameter name, and transformers does not know the architecture that resolves it"
        raise binding.wrong(path, what, "ADAPTER_UNSUPPORTED")
    known = architecture.parameters_of(path)
    if known is None:
        binding.absent.append(path)
        return None
    names = [name for name in known[0] if _is_targeted(f"{path}.{name}", targets)]
    depths = {depth for other, depth in binding.keys.modules if other == path}
    if depths != set(range(len(names))):
        what = f"has {len(depths)} pairs of factors for the targeted parameters {', '.join(names) or '(none)'}"
        raise binding.wrong(path, what)
    name = f"{path}.{names[len(names) - 1 - module.depth]}"  # PEFT wraps the first declared parameter innermost
    parameter = binding.require(name, name)
    return Targeted(name, parameter, known[1]) if parameter is not None else None


def targeted_name(binding: Binding, path: str) -> str:
    """The name of a layer in `rank_pattern` and `alpha_pattern`: its weight's, if that was targeted as a parameter."""
    name = f"{path}.weight"
    return name if _is_targeted(name, binding.settings.names("target_parameters")) else path


def _is_layer(binding: Binding, path: str) -> bool:
    """Whether the module has a `weight` that is not a targeted parameter of fused experts."""
    parameter = binding.find(f"{path}.weight")
    return parameter is not None and (len(parameter.shape) != 3 or targeted_name(binding, path) == path)


def _bind_experts(binding: Binding, target: Targeted, factors: Factors) -> None:
    """Bind `[experts, out, in]` (transposed: `[experts, in, out]`); A `[experts * r, in]`, B `[out, experts * r]`."""
    name, parameter, transposed = target
    shape = parameter.shape
    if len(shape) != 3 or factors.product_shape is None or factors.rank % shape[0]:
        raise unequal(binding, name, factors, shape)
    count, rows, columns = shape
    rank = factors.rank // count
    check_rank(binding, name, rank)
    scale, grouped = binding.settings.scale(name, rank), is_grouped(binding, name, count, rank)
    in_out = is_in_out(binding, name, shape, factors, transposed)
    stack = Lazy(lambda: factors.stacked(count, scale, grouped, in_out), users=len(parameter.pieces))
    for piece in parameter.pieces:
        builder = binding.builder(parameter, piece)
        if builder.low is not None or builder.make is not None or builder.new is not None:
            raise binding.wrong(name, "has two changes for one tensor", "ADAPTER_CONFIG")
        parts = [ExpertRows(stack, expert, 0, rows) for expert in range(count)]
        if len(parameter.pieces) > 1:
            expert, first = divmod(piece.first, rows)
            parts = [ExpertRows(stack, expert, first, piece.count)]

        def make(shape: tuple[int, ...] = builder.shape, parts: list[ExpertRows] = parts) -> AdapterDelta:
            return Experts(shape, parts, rank)

        builder.make, builder.row_size = make, columns


def is_in_out(binding: Binding, name: str, shape: tuple[int, ...], factors: Factors, transposed: bool) -> bool:
    """Whether the factors treat the parameter as `[experts, in, out]`, as PEFT before 0.19.1 always did."""
    product = factors.product_shape
    fits_in_out, fits_out_in = product == shape[:0:-1], product == shape[1:]
    if transposed and shape[0] == 1:
        what = "is one expert stored [in, out], which PEFT itself does not merge correctly"
        raise binding.wrong(name, what, "ADAPTER_UNSUPPORTED")
    if not (fits_in_out if transposed else fits_in_out or fits_out_in):
        raise unequal(binding, name, factors, shape)
    if transposed or not fits_out_in:
        return True
    if fits_in_out and not binding.settings.reads_experts_out_in:
        what = f"has square experts {shape}, whose orientation depends on the version of PEFT that trained them"
        fix = 'if it was 0.19.1 or later, set it in adapter_config.json: "peft_version": "0.19.1"'
        raise binding.wrong(name, what, "ADAPTER_UNSUPPORTED", fix)
    return False


def is_grouped(binding: Binding, name: str, count: int, rank: int) -> bool:
    """Whether lora_B is packed expert by expert, as in old Unsloth; in PEFT the expert index varies fastest."""
    packing = binding.settings.packing
    if packing == "unknown" and min(count, rank) > 1:
        what = "was trained with Unsloth, which changed its order of the experts on 2026-09-17"
        fix = 'set the order in adapter_config.json: "lora_B_layout": "rank_major" (since) or "grouped_by_expert" (before)'
        raise binding.wrong(name, what, "ADAPTER_UNSUPPORTED", fix)
    return packing == "grouped_by_expert"


def _is_targeted(name: str, targets: Iterable[str]) -> bool:
    """Whether one of `targets` is the end of a parameter's name, by whole segments."""
    return any(f".{name}".endswith(f".{target}") for target in targets)
