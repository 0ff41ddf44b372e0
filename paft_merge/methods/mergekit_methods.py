"""mergekit's methods on whole tensors: methods without a streaming rule, methods that plugins registered, and parity.

This module does not depend on recipes or files. Only it, `inputs.torch_pickle` (mergekit's lazy reader of .bin files) and
`mergekit_plugin` (our methods in mergekit's registry) use mergekit, which is imported at first use.
"""

from __future__ import annotations

import sys
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from paft_merge.errors import MergeError, Problems, RecipeError
from paft_merge.methods.parameters import REQUIRED, Method, Parameter, Shared, Sources

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_one_at_a_time = Lock()  # mergekit's random methods draw from torch's one generator, and a whole tensor is large

_answers: dict[tuple[str | None, ...], str] = {}  # of `WholeTensor.result_dtype`, which is asked for every tensor


@dataclass(frozen=True)
class WholeTensor:
    """The rule of a tensor that is merged in one piece: one call of a method in mergekit's registry."""

    method: str
    shared: Shared
    sources: Sources
    """Parameters of each source that is not the base."""
    key: int
    """Stream of torch's random numbers."""
    dtype: str | None
    """torch's name of the dtype that inputs are cast to for the arithmetic; None: the dtype that torch promotes them to."""
    out_dtype: str | None = None
    """dtype of the result; None: the method's own."""
    baked: bool = False
    """Adapters are first rounded into their checkpoint's dtype, as in mergekit; else they stay float32."""

    wants: ClassVar[Literal["whole"]] = "whole"
    keeps_equals: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _spec(self.method)

    def merge(self, base: Tensor | None, sources: Sequence[Tensor], name: str) -> Tensor:
        """Merge one tensor.

        Args:
            base: `[*shape]`, or None if the method has no base.
            sources: each `[*shape]`; not modified.
            name: the tensor's name, for messages and for methods that depend on it.

        Returns:
            `[*shape]` of `out_dtype`, else of the method's own dtype. The same bits in every run with one thread in torch.

        Raises:
            MergeError: MERGEKIT, the method refused or failed.
        """
        import torch
        from mergekit.merge_methods.api import merge_tensors

        tensors = [*([] if base is None else [base]), *sources]
        if not tensors[0].numel():
            return tensors[0].to(_torch_dtype(self.out_dtype or self.dtype) or tensors[0].dtype, copy=True)
        places = ["base", *range(len(sources))] if base is not None else list(range(len(sources)))
        with _one_at_a_time, torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.key >> 1)
            try:
                return merge_tensors(  # type: ignore[no-any-return]
                    tensors, self.method, parameters=self._parameters(), ids=places, base_index=0 if base is not None else None,
                    name=name, dtype=_torch_dtype(self.dtype), out_dtype=_torch_dtype(self.out_dtype),
                )  # fmt: skip
            except Exception as error:  # a registered method may raise anything
                what = f"{self.method} of mergekit failed: {type(error).__name__}: {error}"
                raise MergeError.of("MERGEKIT", name, what) from error

    def result_dtype(self, dtypes: Sequence[str]) -> str:
        """torch's name of the result's dtype for inputs of the dtypes `dtypes`, the base first if there is one.

        A method of mergekit may choose it: arcee_fusion makes float32 of bfloat16. So a merge of tiny tensors finds out.

        Raises:
            MergeError: MERGEKIT, the method does not accept such inputs.
        """
        import torch

        asked = self.method, self.dtype, self.out_dtype, *dtypes
        if asked not in _answers:
            made = torch.Generator().manual_seed(0)
            tensors = [torch.randn(4, 4, generator=made).to(getattr(torch, dtype)) for dtype in dtypes]
            base = tensors.pop(0) if len(tensors) > len(self.sources) else None
            _answers[asked] = str(self.merge(base, tensors, "a tensor of 4 x 4").dtype).removeprefix("torch.")
        return _answers[asked]

    def bytes_per_element(self) -> int:
        """Estimated working memory: inputs as stored and as cast, deltas, masks, a sort, the result."""
        width = 8 if self.dtype == "float64" else 4
        return width * (6 * (len(self.sources) + 1) + 8)

    def _parameters(self) -> dict[str, Any]:
        """The parameters in mergekit's form: one mapping a name for parameters of sources."""
        spec = _spec(self.method)
        given: dict[str, Any] = {p.name: self.shared[p.name] for p in spec.shared_parameters if p.name in self.shared}
        for parameter in spec.input_parameters:
            given[parameter.name] = {i: source[parameter.name] for i, source in enumerate(self.sources)}
        return given


def as_mergekit(
    method: Method, sources: Sources, shared: Shared, key: int, dtype: str | None, out_dtype: str | None
) -> WholeTensor:
    """The rule with mergekit's arithmetic: inputs cast to `dtype`, adapters first rounded into their checkpoint.

    Args:
        method: a method of this package that mergekit has too.
        sources, shared: resolved parameters.
        key: stream of random numbers. The masks differ from those of mergekit-yaml, which draws them in another order.
        dtype, out_dtype: torch's names, or None.

    Raises:
        ValueError: mergekit does not have the method, or one of its options.
    """
    if method.name not in registry():
        raise ValueError(f"mergekit does not have {method.name}, so arithmetic: mergekit cannot be used for it")
    if word := next((s["weight"] for s in sources if isinstance(s.get("weight"), str)), None):
        raise ValueError(f"arithmetic: mergekit needs a number as weight, not {word}")
    spec = _spec(method.name)
    known = {p.name for p in spec.parameters}
    for parameter in method.parameters:
        values = [shared[parameter.name]] if parameter.scope == "shared" else [s[parameter.name] for s in sources]
        if parameter.name not in known and any(value != parameter.default for value in values):
            raise ValueError(
                f"mergekit's {method.name} does not have {parameter.name}, which arithmetic: mergekit needs"
            )
    flags = {p.name: p.flags for p in method.parameters if p.flags}
    plain = {
        name: _flag(value, flags[name], method.name, name) if name in flags else value for name, value in shared.items()
    }
    return WholeTensor(method.name, plain, tuple(sources), key, dtype, out_dtype, baked=True)


def _flag(value: str, flags: tuple[str, str], method: str, name: str) -> bool:
    if value not in flags:
        raise ValueError(f"mergekit's {method} does not have {name}: {value}; write true or false")
    return flags.index(value) == 1


def registry() -> dict[str, Any]:
    """mergekit's methods by name, including those that plugins registered."""
    return {method.spec.name: method for method in _mergekit().registered_methods()}


def chat_template(name: str) -> str:
    """The text of one of mergekit's chat templates."""
    return (files("mergekit._data.chat_templates") / f"{name}.jinja").read_text(encoding="utf-8")


def import_methods(modules: Iterable[str], known: Mapping[str, Method]) -> dict[str, Method]:
    """Import modules that register methods with mergekit.

    Args:
        modules: dotted names; the current folder is searched too.
        known: methods that are never replaced.

    Returns:
        `known`, and every registered method with another name.

    Raises:
        RecipeError: IMPORT, a module cannot be imported, or defines a method without registering it.
    """
    modules, problems = list(modules), Problems()
    if not modules:
        return dict(known)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    _mergekit()
    for name in modules:
        with problems.catching():
            _import(name)
    problems.raise_as(RecipeError)
    return {**known, **{name: method_of(name) for name in registry() if name not in known}}


def method_of(name: str) -> Method:
    """A method of mergekit's registry, for a recipe of this package.

    Raises:
        RecipeError: IMPORT, it has a parameter for every input including the base, which a recipe cannot give.
    """
    spec = _spec(name)
    contract = spec.contract
    base: Literal["required", "optional", "ignored"] = _BASES.get(contract.base.value, "ignored")
    if base != "ignored" and any(p.scope.value == "input" for p in spec.parameters):
        what = f"{name} has a base and a parameter for every input, the base too"
        raise RecipeError.of("IMPORT", name, what, "declare it PerNonBase, or use mergekit-yaml")
    counted = base == "required"
    least, most = contract.min_non_base, contract.max_non_base
    if least is None and most is None:
        least, most = (
            contract.min_inputs - counted,
            None if contract.max_inputs is None else contract.max_inputs - counted,
        )

    def rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> WholeTensor:
        return WholeTensor(name, shared, tuple(sources), keys[0], dtype="float32")

    return Method(
        name, spec.pretty_name or name, spec.reference_url or "registered with mergekit", tuple(map(_parameter, spec.parameters)),
        base, rule, max(least or 0, 1), most, streamed=False,
    )  # fmt: skip


_BASES: dict[str, Literal["required", "optional", "ignored"]] = {"required": "required", "optional": "optional"}


def _parameter(spec: Any) -> Parameter:
    kind, choices = _plain_type(spec.value_type)
    scope: Literal["source", "shared"] = "shared" if spec.scope.value == "shared" else "source"
    return Parameter(
        spec.name, kind, scope, REQUIRED if spec.required else spec.default, spec.description or "", choices
    )


def _plain_type(annotation: Any) -> tuple[type, tuple[str, ...]]:
    """The scalar type that a recipe writes for an annotation, and its choices; mergekit checks the rest."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _plain_type(arguments[0])
    if origin is Literal and all(isinstance(word, str) for word in arguments):
        return str, arguments
    inner = next((one for one in arguments if one is not type(None)), None)
    if inner is not None:  # Optional, Union
        return _plain_type(inner)
    return (annotation if annotation in (bool, int, float, str) else str), ()


def _import(name: str) -> None:
    try:
        module = import_module(name)
    except Exception as error:  # an imported module may raise anything
        what = f"cannot be imported: {type(error).__name__}: {error}"
        raise RecipeError.of(
            "IMPORT", name, what, "give a module that can be imported from the current folder, as package.module"
        ) from error
    kind = _mergekit().MergeMethod
    made = {value.spec.name for value in vars(module).values() if isinstance(value, kind)} - registry().keys()
    if made:
        what = f"defines {', '.join(sorted(made))} and does not register {'it' if len(made) == 1 else 'them'}"
        raise RecipeError.of("IMPORT", name, what, "call mergekit.merge_methods.register(method) in it")


def _spec(name: str) -> Any:
    try:
        return registry()[name].spec
    except KeyError:
        raise ValueError(f"mergekit has no method {name}") from None


@lru_cache(maxsize=1)
def _mergekit() -> Any:
    """mergekit's registry of methods. Its import takes seconds and emits warnings about its own imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit import merge_methods

    return merge_methods


def _torch_dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _arcee_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> WholeTensor:
    return WholeTensor("arcee_fusion", shared, tuple(sources), keys[0], dtype="float32")


ARCEE_FUSION = Method(
    "arcee_fusion", "Arcee Fusion", "arcee.ai", (), "required", _arcee_rule, max_sources=1, streamed=False
)


TABLE: Final = (ARCEE_FUSION,)


def arcee_fusion(base: torch.Tensor, other: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """The other tensor's value at its important entries, the base's elsewhere.

    The importance of an entry is |difference| times the KL divergence of the rows' softmaxes. Entries above the median plus
    1.5 times the interquartile range are important; both are taken over a random million entries if there are more.

    Args:
        base, other: `[*shape]`, any float dtype; not modified.
        seed: of that sample.

    Returns:
        `[*shape]` float32.

    Raises:
        ValueError: the shapes differ.
    """
    if base.shape != other.shape:
        raise ValueError(f"a merge needs tensors of one shape, got {[tuple(base.shape), tuple(other.shape)]}")
    return _arcee_rule([{}], {}, [seed]).merge(base, [other], "tensor")
