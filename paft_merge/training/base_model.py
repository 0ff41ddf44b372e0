"""Load the base model and its tokenizer, and restore a base after an adapter was trained on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from paft_merge.errors import PaftMergeError, TrainError, first_line
from paft_merge.inputs.model_config import OF_TOKENIZERS, read_model_config, refuse_odd_files, refuse_outside_files
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.methods.mergekit_methods import chat_template
from paft_merge.recipe import CHAT_TEMPLATES
from paft_merge.recipe.sections import beside_recipe
from paft_merge.recipe.yaml_source import MAX_BYTES, did_you_mean
from paft_merge.stores import has_scheme
from paft_merge.training.factors import whole
from paft_merge.training.schema import AdapterSpec, BaseSpec, QuantizationSpec


def load_base(name: str, spec: BaseSpec) -> Any:
    """Load a causal language model for frozen use.

    Raises:
        TrainError: BASE, when it cannot be loaded; MISSING, when quantization needs bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": spec.dtype,
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.attn_implementation:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization:
        options["quantization_config"] = _quantization(spec.quantization)
        options["device_map"] = _this_device()
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # transformers raises anything on unknown files
        what = f"cannot be loaded: {first_line(error)}"
        raise TrainError.of("BASE", name, what, "give a folder or a Hub name of a causal language model") from error


def _quantization(spec: QuantizationSpec) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainError.of(
            "MISSING", "base.quantization", "bitsandbytes is not installed", "pip install 'paft-merge[4bit]'"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**spec.model_dump())


def _this_device() -> dict[str, Any] | None:
    from accelerate import PartialState

    return {"": PartialState().device} if torch.cuda.is_available() else None


_NOWHERE = {"LocalEntryNotFoundError", "HFValidationError"}
"""Errors of huggingface_hub on what is neither in its cache nor can be fetched."""


def load_tokenizer(name: str, spec: AdapterSpec, folder: Path = Path(), *, trust_code: bool = True) -> Any:
    """Load the base's tokenizer with the adapter's `chat_template`.

    `trust_code`: run the base's Python code where the section has `trust_remote_code`; a check does not.

    Raises:
        TrainError: BASE, the folder does not exist and the Hub cannot be reached; TEMPLATE, the tokenizer or its template
            cannot be loaded.
    """
    from transformers import AutoTokenizer

    base = spec.base
    refuse_odd_files(Path(name))
    read_model_config(Path(name))
    tokenizer = None
    try:
        check_tokenizer(name, base.revision)
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=base.revision, trust_remote_code=base.trust_remote_code and trust_code
        )
        if spec.chat_template:
            tokenizer.chat_template = _template(spec.chat_template, folder)
    except PaftMergeError:
        raise
    except Exception as error:  # transformers raises anything on unknown files
        source = spec.chat_template if tokenizer and spec.chat_template else name
        if {type(one).__name__ for one in (error, error.__cause__)} & _NOWHERE and not Path(source).exists():
            near = did_you_mean(Path(source).name, [one.name for one in Path(source).parent.glob("*") if one.is_dir()])
            fix = near or "check the path, or pull it first where there is a network"
            fix = "copy it into a folder first" if has_scheme(source) else fix
            what = "neither a local folder nor a repository in the Hub's cache"
            raise TrainError.of("BASE" if source == name else "TEMPLATE", source, what, fix) from error
        what = f"the tokenizer or its template cannot be loaded: {first_line(error)}"
        raise TrainError.of("TEMPLATE", spec.chat_template or name, what, "check chat_template and the base") from error
    return tokenizer


def check_tokenizer(name: str, revision: str | None = None) -> None:
    """Refuse a tokenizer, in a folder or on the Hub, whose settings name files outside its folder.

    Raises:
        CheckpointError: CONFIG_INVALID. Errors of huggingface_hub.
    """
    from transformers.utils import cached_file

    for file in OF_TOKENIZERS:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            refuse_outside_files(Path(found).parent)


def without_row(tokens: Iterable[int | None], model: Any) -> list[int]:
    """The token ids for which a model's embedding has no row."""
    rows = model.get_input_embeddings().weight.shape[0]
    return sorted({token for token in tokens if token is not None and token >= rows})


def _template(source: str, folder: Path) -> str:
    """The text of a named template (as in `merge:`), of a Jinja file, or of a model's tokenizer."""
    if source in CHAT_TEMPLATES:
        return chat_template(source)
    if (path := beside_recipe(source, folder)).is_file():
        return read_text(path, "TEMPLATE", MAX_BYTES)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{source} is not a regular file")
    if source.endswith((".jinja", ".j2")):
        raise ValueError(f"there is no file {source}")
    from transformers import AutoTokenizer

    refuse_odd_files(path)
    check_tokenizer(source)
    template = AutoTokenizer.from_pretrained(source, trust_remote_code=False).chat_template
    if not isinstance(template, str):
        raise ValueError(f"{source} has no chat template")
    return template


@torch.no_grad()
def digest_of(model: nn.Module) -> str:
    """Digest of every parameter and buffer with its name (xxh3-128): equal only for bit-identical weights.

    Of a sharded model (FSDP 2) tensors are gathered one at a time, so every process must call this function.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = whole(tensor.detach())
        digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        flat = plain.contiguous().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), 1 << 26):
            digest.update(flat[start : start + (1 << 26)].cpu().numpy().tobytes())
    return digest.hexdigest()


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only its part of the weights (FSDP 2)."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


@contextmanager
def restoring_base(model: Any) -> Iterator[None]:
    """Restore a base after training, also after an error.

    Undoes the changes of PEFT (wrapped and frozen layers) and TRL (patched forward, dropout, token ids in configs,
    hooks on embeddings).
    """
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    dropouts = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    pad, generation_pad = model.config.get_text_config().pad_token_id, model.generation_config.pad_token_id
    cache, training = model.config.use_cache, model.training
    forward, hooks = model.__dict__.get("forward"), model.get_input_embeddings()._forward_hooks
    own = set(hooks)
    try:
        yield
    finally:
        _unwrap(model)
        if forward is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = forward
        model.disable_input_require_grads()
        for added in (
            set(hooks) - own
        ):  # it removes only the last one, and several parts of TRL and transformers add one
            del hooks[added]
        _no_checkpointing(model)
        for name, p in model.named_parameters():
            p.requires_grad_(frozen[name])
            p.grad = None
        for module, rate in dropouts:
            module.p = rate
        model.config.get_text_config().pad_token_id, model.generation_config.pad_token_id = pad, generation_pad
        model.config.use_cache = cache
        model.train(training)


def _no_checkpointing(model: Any) -> None:
    if model.supports_gradient_checkpointing:
        new = getattr(model, "activation_checkpointing_disable", None)  # the old name warns from transformers 5.2x on
        (new or model.gradient_checkpointing_disable)()


def _unwrap(model: nn.Module) -> None:
    """Replace every adapted layer by its original module."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            parent, _, leaf = name.rpartition(".")
            try:
                owner = model.get_submodule(parent)
            except AttributeError:  # part of a wrapper that is already replaced
                continue
            original = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            setattr(owner, leaf, original)
    if hasattr(model, "peft_config"):
        del model.peft_config
