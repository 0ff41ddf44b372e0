"""Builds one layer of a base with an adapter on it, in memory, and lets PEFT merge it. Imports torch and PEFT."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from paft_merge.errors import AdapterError, reading
from paft_merge.inputs.adapters.binding import Binding
from paft_merge.inputs.adapters.deltas import Lazy
from paft_merge.inputs.adapters.keys import SHARED
from paft_merge.inputs.adapters.rows import Array, Rows
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.safetensors_header import join_first

_ADAPTER = "default"
_ONE_AT_A_TIME = threading.RLock()
"""PEFT draws initial values from torch's global generator, which threads share."""


class LayerMerger:
    """Computes the changes of the layers of one adapter.

    Args:
        binding: the adapter and its base.
        prefix: start of the names of the type's tensors.
        scope: as in `by_peft`.
    """

    def __init__(self, binding: Binding, prefix: str, scope: str) -> None:
        self._binding, self._prefix, self._scope = binding, prefix, scope
        self._whole = Lazy(self._build_whole)
        self._targets = Lazy(self._find_targets)

    @property
    def targets(self) -> list[str]:
        """All adapted layers, in the order of the model."""
        return self._targets.get()

    def changes(self, path: str, names: Collection[str]) -> dict[str, Array]:
        """Compute the deltas of the parameters `names` of the layer at `path`.

        Raises:
            AdapterError: ADAPTER_SHAPE if PEFT refuses it, or if it changes other parameters of the layer; NONFINITE.
        """
        with _quiet(), self._blame(path):
            old = {name: self._value(path, name) for name, _ in self._module(path).named_parameters(recurse=False)}
            model = self._whole.get() if self._scope == "shapes" else self._build(path, old)
            layer = model.get_submodule(f"base_model.model.{path}")
            inner = layer.get_base_layer()
            if hasattr(layer, "frod_U"):  # PEFT made it from the projection of one layer, before that of all was loaded
                layer.frod_U[_ADAPTER], _ = layer._calculate_frod_u_and_lambda(*_frod_inputs(layer))
            if self._scope == "shapes":
                _fill(inner, old)
            layer.merge()
            new = {name: p.data for name, p in layer.get_base_layer().named_parameters(recurse=False)}
            deltas = {name: (new[name] - old[name]).numpy() for name in old}
            if self._scope == "shapes":
                layer.merged_adapters.clear()
                _fill(inner, {name: _nothing(value.shape) for name, value in old.items()})
        if others := [name for name, delta in deltas.items() if name not in names and delta.any()]:
            raise self._binding.wrong(path, f"also changes {join_first(others)}, which this type should not change")
        for name, delta in deltas.items():
            if not np.isfinite(delta).all():
                raise self._binding.wrong(f"{path}.{name}", "has a delta with NaN or infinite values", "NONFINITE")
        return deltas

    def check(self, path: str) -> None:
        """Compare the names and shapes of the adapter's tensors with those that PEFT makes for the layer.

        Raises:
            AdapterError: as `changes`.
        """
        with _quiet(), self._blame(path):
            if self._scope == "shapes":
                self._whole.get()
                return
            shapes = {name: p.shape for name, p in self._module(path).named_parameters(recurse=False)}
            try:
                self._build(path, {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()})
            except NotImplementedError as error:
                if "meta tensor" not in str(error):  # else it needs the values of the weight: `changes` checks it
                    raise

    def _build(self, path: str, values: Mapping[str, torch.Tensor]) -> Any:
        """A PEFT model of the layer at `path` with these weights, and of the layers whose number or order counts."""
        modules: dict[str, nn.Module] = {path: self._module(path)}
        _fill(modules[path], values)
        if self._scope == "numbers":
            modules = {other: modules.get(other) or nn.Linear(1, 1) for other in self.targets}
        return self._adapted(modules, [path])

    def _build_whole(self) -> Any:
        """A PEFT model of all adapted layers, whose weights take no memory."""
        modules = {path: self._module(path) for path in self.targets}
        for module in modules.values():
            _fill(module, {name: _nothing(p.shape) for name, p in module.named_parameters(recurse=False)})
        return self._adapted(modules, self.targets)

    def _adapted(self, modules: Mapping[str, nn.Module], loaded: list[str]) -> Any:
        """A PEFT model of `modules`, with the adapter's tensors of the paths `loaded` and the shared ones."""
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict

        raw = {k: v for k, v in self._binding.settings.raw.items() if k not in ("auto_mapping", "task_type")}
        config = PeftConfig.from_peft_type(**copy.deepcopy(raw))
        config.target_modules, config.inference_mode = list(modules), True
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            if getattr(config, field, None) is not None:
                setattr(config, field, None)
        if hasattr(config, "bias"):
            config.bias = "none"
        model = PeftModel(_tree(modules), config, _ADAPTER)
        tensors = {key: value for path in (SHARED, *loaded) for key, value in self._tensors(path).items()}
        result = set_peft_model_state_dict(model, tensors, _ADAPTER)
        unused = [key for key in result.unexpected_keys if key.startswith("base_model.model.")]
        if unused:
            raise ValueError(f"does not use its tensors {', '.join(map(repr, unused))}")
        held = model.state_dict(keep_vars=True)
        given = {id(tensor) for key, tensor in held.items() if key not in result.missing_keys}
        starts = tuple(f"base_model.model.{path}.{self._prefix}" for path in loaded)
        missing = [key for key in result.missing_keys if key.startswith(starts) and id(held[key]) not in given]
        if missing:
            raise ValueError(f"needs tensors that the adapter does not have: {', '.join(map(repr, missing))}")
        return model.eval()  # VB-LoRA refuses to be trained further

    def _tensors(self, path: str) -> dict[str, torch.Tensor]:
        """The adapter's tensors of one module, as PEFT names them; floats as float32."""
        module = self._binding.keys.modules.get((path, 0))
        keys = module.parts.values() if module else ()
        return {key if key.startswith(f"{SHARED}.") else f"{SHARED}.model.{key}": self._tensor(key) for key in keys}

    def _tensor(self, key: str) -> torch.Tensor:
        file = self._binding.file
        if DTYPES[file.tensors[key].dtype].mergeable:
            return torch.from_numpy(self._binding.values(key))
        return file.tensor(key)

    def _value(self, path: str, name: str) -> torch.Tensor:
        """A parameter of the base, as float32."""
        found = self._binding.find(f"{path}.{name}")
        if found is None or len(found.pieces) > 1:
            raise ValueError(f"needs {path}.{name}, which is not a tensor of the base")
        return torch.from_numpy(Rows.of(self._binding.base, found.value_in).load().reshape(found.shape))

    def _module(self, path: str) -> nn.Module:
        """A copy of the layer without weights: of the model's class, else a linear layer."""
        architecture = self._binding.architecture.get()
        known: nn.Module | None = architecture.module(path) if architecture else None
        if known is not None:
            return copy.deepcopy(known)
        found, bias = self._binding.find(f"{path}.weight"), self._binding.find(f"{path}.bias") is not None
        shape = found.shape if found else ()
        if len(shape) == 2 and not bias:  # one with a bias may be a Conv1D, whose weight is transposed
            return nn.Linear(shape[1], shape[0], bias=False, device="meta")
        kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        if len(shape) in kinds:
            convolution: nn.Module = kinds[len(shape)](shape[1], shape[0], shape[2:], bias=bias, device="meta")
            return convolution
        raise ValueError("its class is unknown, as transformers does not know the base's architecture")

    def _find_targets(self) -> list[str]:
        """All adapted layers: those that have tensors; else, or if their order counts, from the model's class."""
        paths = [path for path, _ in self._binding.keys.modules if path != SHARED]
        if self._scope == "shapes" and paths:
            return paths
        from peft import PeftConfig
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        architecture = self._binding.architecture.get()
        if architecture is None:
            what = "numbers the layers of the model, and transformers does not know the base's architecture"
            raise AdapterError.of("ADAPTER_UNSUPPORTED", self._binding.file.folder, what)
        with reading(self._binding.file.folder, "ADAPTER_CONFIG", AdapterError):
            config = PeftConfig.from_peft_type(**copy.deepcopy(dict(self._binding.settings.raw)))
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        return [
            name
            for name, module in architecture.modules()
            if name and tuner._check_target_module_exists(config, name) and getattr(module, "weight", None) is not None
        ]

    @contextmanager
    def _blame(self, path: str) -> Iterator[None]:
        """Raise errors of PEFT as AdapterErrors that name the layer."""
        try:
            yield
        except AdapterError:
            raise
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise self._binding.wrong(path, f"cannot be merged by PEFT: {text[:300]}") from error


def _tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module that has `modules` at their paths."""
    root = nn.Module()
    for path, module in modules.items():
        *around, last = path.split(".")
        parent = root
        for name in around:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, module)
    return root


def _fill(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set the parameters of a module."""
    for name, value in values.items():
        value = value.clone() if value.device.type == "cpu" and value.is_contiguous() else value
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _frod_inputs(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """V, and the weight as `[out, in]`."""
    weight = layer.get_base_layer().weight
    return layer.frod_V[_ADAPTER], weight.T if layer.fan_in_fan_out else weight


def _nothing(shape: torch.Size) -> torch.Tensor:
    """Zeros of `shape` in the memory of one."""
    return torch.zeros(()).expand(shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """One thread at a time, no warnings, no gradients, and torch's generator is left as it was."""
    with (
        _ONE_AT_A_TIME,
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield
