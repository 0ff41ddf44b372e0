"""The frame of types whose delta is a line of algebra on a linear layer; PEFT computes their other layers.

Shapes: a weight is `[out, in]`, or `[in, out]` in HF's `Conv1D`; the rows are those of the stored tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft_merge.errors import Problems
from paft_merge.inputs.adapters.binding import About, Binding, DeltaBuilder, PeftType
from paft_merge.inputs.adapters.config import INERT, check_kinds, check_numbers, check_patterns, refuse_unknown
from paft_merge.inputs.adapters.deltas import AdapterDelta
from paft_merge.inputs.adapters.keys import Module, TensorNames
from paft_merge.inputs.adapters.layouts import is_transposed
from paft_merge.inputs.adapters.merged_by_peft import by_peft
from paft_merge.inputs.adapters.rows import Rows


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        binding: the adapter and its base.
        path: the module in the trained model.
        parts: the adapter's tensors for it.
        builder: of the layer's weight.
    """

    binding: Binding
    path: str
    parts: Mapping[str, Rows]
    builder: DeltaBuilder

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored weight."""
        return self.builder.shape

    @property
    def row_size(self) -> int:
        """Elements per row of the stored weight."""
        return self.builder.row_size

    @property
    def raw(self) -> Mapping[str, Any]:
        """The adapter's configuration."""
        return self.binding.settings.raw

    def require(self, *parts: str) -> list[Rows]:
        """Return these tensors, which must be all that the adapter has for the layer."""
        if self.parts.keys() != set(parts):
            raise self.binding.wrong(
                self.path, f"has the tensors {', '.join(sorted(self.parts))}: {' and '.join(parts)} belong together"
            )
        return [self.parts[part] for part in parts]

    def is_transposed(self, out: int | None, inner: int | None) -> bool:
        """Whether the weight is stored `[in, out]`.

        Args:
            out: output features of the adapter; None if it does not say.
            inner: input features of the adapter; None if it does not say.
        """

        def fits(o: int, i: int) -> bool:
            return out in (o, None) and inner in (i, None)

        shapes = ", ".join(f"{part} {rows.shape}" for part, rows in self.parts.items())
        return is_transposed(self.binding, self.path, self.builder, fits, f"has {shapes}, which do not fit")

    def unfit(self) -> Exception:
        """An ADAPTER_SHAPE error for tensors that do not fit the layer, ready to raise."""
        shapes = ", ".join(f"{part} {rows.shape}" for part, rows in self.parts.items())
        return self.binding.unlike_base(self.path, f"has {shapes}, which do not fit the base's {self.shape}")


def native(
    peft_type: str,
    prefix: str,
    about: About,
    parts: tuple[str, ...],
    fields: Mapping[str, tuple[type, ...]],
    make: Callable[[Layer], Callable[[], AdapterDelta] | None],
    *,
    whole: tuple[str, ...] = (),
    real: tuple[str, ...] = (),
    bias: bool = False,
) -> PeftType:
    """A row of the table of types.

    Args:
        peft_type: as in adapter_config.json.
        prefix: start of the names of its tensors.
        about: for the documentation.
        parts: the parts of a module's tensors.
        fields: the known fields of its configuration that are not in `INERT`, each with its types; none: not checked.
        make: checks the tensors of a linear layer, and returns what makes its delta; None if PEFT must compute it.
        whole: fields that must be whole numbers above 0.
        real: fields that must be numbers other than 0.
        bias: whether PEFT also changes the bias of the layers that it computes.
    """
    others = by_peft(peft_type, prefix, about.method, bias=bias)

    def check_config(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
        refuse_unknown(path, raw, INERT | fields.keys(), peft_type, problems)
        check_kinds(path, raw, {name: kinds for name, kinds in fields.items() if kinds}, problems)
        check_numbers(path, raw, whole, real, problems)
        if fields.get("rank_pattern"):
            check_patterns(path, raw, problems)

    def bind_module(binding: Binding, module: Module) -> None:
        parameter = binding.require(module.path, f"{module.path}.weight")
        if parameter is None:
            return
        if len(parameter.pieces) > 1 or module.depth:
            raise binding.wrong(module.path, "is not a separate layer of the base", "ADAPTER_UNSUPPORTED")
        builder = binding.builder(parameter)
        builder.module = module.path
        held = {part: binding.rows(key) for part, key in module.parts.items()}
        found = make(Layer(binding, module.path, held, builder))
        if found is None:
            others.bind_module(binding, module)
        elif builder.make is not None:
            raise binding.wrong(module.path, "has two deltas for one tensor", "ADAPTER_CONFIG")
        else:
            builder.make = found

    return PeftType(TensorNames(prefix, parts), check_config, bind_module, about)
