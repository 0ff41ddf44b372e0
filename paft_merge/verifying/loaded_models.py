"""Models to run: loaded whole by transformers, or with weights that are read layer by layer while they run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paft_merge.errors import EvaluateError, PaftMergeError, first_line
from paft_merge.inputs.architecture import Architecture, Layout
from paft_merge.inputs.model_config import read_model_config, refuse_odd_files
from paft_merge.inputs.models import Model
from paft_merge.verifying.evidence import blocks_of


class LazyWeights(Mapping[str, torch.Tensor]):
    """The parameters of a model by name; each is read when it is asked for, and not kept."""

    def __init__(self, model: Model, architecture: Architecture, dtype: torch.dtype) -> None:
        self._model, self._architecture, self._dtype = model, architecture, dtype
        self._shapes = {name: tuple(p.shape) for name, p in architecture.modules()[0][1].state_dict().items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        layout = self._layout(name)
        made = torch.empty(math.prod(self._shapes[name]), dtype=self._dtype)
        for stretch in layout.stretches or ():
            read, end = self._model.read(stretch.name), stretch.start + stretch.count
            for start, stop, (values,) in blocks_of([read]):
                first, last = max(start, stretch.start), min(stop, end)
                if first < last:
                    place = stretch.first + first - stretch.start
                    made[place : place + last - first] = torch.from_numpy(values[first - start : last - start])
            read.checkpoint.release(read.name)
        return made.reshape(self._shapes[name])

    def stored(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter or buffer, by itself or by one that it is tied to."""
        return any(one in self._architecture.layouts for one in (name, *self._architecture.twins(name)))

    def _layout(self, name: str) -> Layout:
        layouts = self._architecture.layouts
        found = next((layouts[one] for one in (name, *self._architecture.twins(name)) if one in layouts), None)
        if found is None:
            raise EvaluateError.of("MODEL", self._model.ref, f"has no tensor for {name}, which its class needs")
        if found.stretches is None:
            what = f"transformers computes {name} from several tensors ({found.how}), which is done on the whole model"
            raise EvaluateError.of("MODEL", self._model.ref, what, "allow more memory")
        return found


def class_of(folder: Path, architecture: Architecture | None, *, trust_code: bool) -> Any:
    """The class that loads a model: transformers' own, or with `trust_code` the automatic one for the code in its folder.

    Raises:
        EvaluateError: TRUST, its code is needed and not trusted; MODEL, transformers has no class for it.
    """
    import transformers

    config = read_model_config(folder)
    if architecture is not None:
        kind = type(architecture.modules()[0][1])
        if "input_ids" not in signature(kind.forward).parameters:
            what = f"reads {kind.main_input_name} and not tokens alone, so only its tensors are compared"
            raise EvaluateError.of("MODEL", folder, what, "verify it where it is used")
        return kind
    if auto := config.get("auto_map"):
        if not trust_code:
            what = "needs the Python code of its folder, which is not run unless you allow it"
            raise EvaluateError.of("TRUST", folder, what, "read it, then pass trust_code=True")
        known = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
        return getattr(transformers, next((name for name in known if name in auto), "AutoModelForCausalLM"))
    what = "is not a model that transformers loads, so only its tensors are compared"
    raise EvaluateError.of("MODEL", folder, what, "verify it where it is used")


def load_whole(
    folder: Path, kind: Any, dtype: Any, device: torch.device, *, trust_code: bool, weights: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:  # fmt: skip
    """Load a model with transformers.

    Args:
        folder: its config, and without `weights` its tensors.
        kind: its class.
        dtype: of the weights; `auto`: as they are stored.
        device: where it runs.
        trust_code: let the Python code of the folder run.
        weights: its tensors by their names in a checkpoint, which transformers renames and ties as those of a file.

    Raises:
        EvaluateError: MODEL, with what transformers says.
    """
    from transformers import AutoConfig

    refuse_odd_files(folder)
    trusted = {"trust_remote_code": True} if trust_code else {}
    with saying(folder):
        if weights is None:
            model = kind.from_pretrained(folder, dtype=dtype, **trusted)
        else:
            config = AutoConfig.from_pretrained(folder, **trusted)
            vars(config).pop("quantization_config", None)  # the weights are values
            if kind.__name__.startswith("AutoModel"):
                with torch.device("meta"):
                    kind = type(kind.from_config(config, **trusted))
            model = kind.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)
        found: nn.Module = model.eval()
        return found if getattr(model, "quantization_method", None) else found.to(device)


def stream(
    model: Model, folder: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Make a model whose layers read their weights before they run, and drop them afterwards.

    Args:
        model: its tensors.
        folder: its config.
        architecture: the model's class, matched with those tensors.
        dtype: in which it computes.
        device: where it runs.

    Raises:
        EvaluateError: MODEL, its class cannot be run in that way.
    """
    from accelerate import cpu_offload, init_empty_weights
    from transformers import AutoConfig

    weights = LazyWeights(model, architecture, dtype)
    with saying(folder), init_empty_weights(include_buffers=False):
        kind: Any = type(architecture.modules()[0][1])
        made = kind._from_config(AutoConfig.from_pretrained(folder, local_files_only=True), dtype=dtype).eval()
    for name, buffer in made.named_buffers():
        if name in weights and weights.stored(name):
            buffer.copy_(weights[name])
    parts = sorted({type(layer).__name__ for layer in layers_of(made)})
    offloaded: nn.Module = cpu_offload(made, device, state_dict=weights, preload_module_classes=parts)
    return offloaded


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, in order: its outermost list of as many modules as its config says, else the longest one."""
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    inside = {name for name, _ in lists for other, _ in lists if name.startswith(f"{other}.")}
    outer: list[list[nn.Module]] = [list(module) for name, module in lists if name not in inside]
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    return max(outer, key=lambda one: (len(one) == count, len(one)), default=[])


def release(model: nn.Module) -> None:
    """Free the weights of a model now: modules refer to each other in circles, which Python frees much later."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


@contextmanager
def saying(where: object, cannot: str = "be loaded") -> Iterator[None]:
    """Turn what transformers raises into an `EvaluateError` that says what the model cannot do."""
    try:
        yield
    except PaftMergeError:
        raise
    except Exception as error:  # transformers and torch raise anything on unknown files
        why = first_line(error)
        why = "its tensors do not have the shapes of its config" if "ignore_mismatched_sizes" in why else why
        raise EvaluateError.of("MODEL", where, f"cannot {cannot}: {why}") from error
