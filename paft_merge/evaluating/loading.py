"""Load the model that is evaluated: a folder or Hub name, or a base with adapters that are not written as a model.

merged                 a model
base+adapter           a base and an adapter
base+sft+dpo           an adapter on another, each with its own scale
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from paft_merge.errors import CheckpointError, EvaluateError, PaftMergeError, Problems, first_line
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.hub import fetch
from paft_merge.inputs.adapter_places import CONFIG, base_of
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.config import read_config
from paft_merge.inputs.adapters.patterns import PatternError
from paft_merge.inputs.adapters.peft_types import check_sizes
from paft_merge.inputs.adapters.sparse_delta import NAME as SPARSE
from paft_merge.inputs.adapters.stack import AdapterStack
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.model_config import read_model_config, refuse_odd_files
from paft_merge.inputs.models import Model
from paft_merge.inputs.quantized.recognition import quantised
from paft_merge.training.base_model import without_row
from paft_merge.training.child_process import match_in_time
from paft_merge.training.engine_schema import Engine

if TYPE_CHECKING:
    from paft_merge.evaluating.joint_decoding import Decoder
    from paft_merge.training.vllm_engine import VllmModel

T = TypeVar("T")

MOST_TOKENS = 4096
"""Longest context in tokens unless `max_length` is given."""


@dataclass
class EvaluatedModel:
    """A model in memory."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    max_length: int
    vllm: VllmModel | None = None
    """What generates answers instead of `model`, which is then None."""
    prepared: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What depends on the tokenizer and the data alone, such as token ids."""
    decoder: Decoder | None = field(default=None, repr=False)
    """What generates answers instead of transformers' loop, for models that are evaluated one after another."""

    @property
    def engine(self) -> Engine:
        """What generates answers."""
        return "transformers" if self.vllm is None else "vllm"

    def close(self) -> None:
        """Free the memory of the model."""
        if self.vllm is not None:
            self.vllm.close()
        self.model = None
        torch.cuda.empty_cache()

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `prepared` has for a key; made at the first call."""
        if key not in self.prepared:
            self.prepared[key] = make()
        found: T = self.prepared[key]
        return found


def parts_of(model: Path | str | Sequence[str]) -> tuple[str, ...]:
    """Split `base+adapter` into its parts; an existing folder whose name contains a plus is one part."""
    if not isinstance(model, Path | str):
        return tuple(model)
    return (str(model),) if Path(model).exists() else tuple(str(model).split("+"))


def load_subject(
    model: Path | str | Sequence[str], spec: EvaluateSpec, *, trust_code: bool = False, template: str | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> EvaluatedModel:  # fmt: skip
    """Load a model, or a base with adapters. The tokenizer is that of the last adapter that has one, else the base's.

    Args:
        model: a model, or a base and its adapters.
        spec: device, dtype and length.
        trust_code: let the Python code of a model's folder run.
        template: the chat template of a tokenizer that has none.
        weights: the tensors of the checkpoint by name, for a folder without files of weights.

    Raises:
        EvaluateError: MODEL, when a part cannot be loaded. HubError: when a part cannot be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, folder, adapters = base_and_adapters(model)
    device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = spec.dtype if spec.dtype != "auto" or device.type != "cpu" else "float32"
    with errors_of_loading(name):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_code)
        sparse = [place for place in adapters if _is_sparse(fetch(place))]
        if sparse:
            if sparse != adapters[: len(sparse)]:
                what = "a sparse delta follows an adapter, and here it is added to the files of the base"
                raise EvaluateError.of("MODEL", name, what, "write the sparse delta first, or merge both")
            weights, adapters = _with_deltas(folder, [fetch(place) for place in sparse]), adapters[len(sparse) :]
        if weights is None:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_code)
        else:
            loaded = _with_weights(folder, weights, dtype, trust_code)
        for place in adapters:
            adapter = fetch(place)
            loaded, tokenizer = adapted(loaded, adapter), trained_tokenizer(adapter, tokenizer)
    loaded = loaded.eval().to(device)
    complete_tokenizer(tokenizer, template, name)
    if without_row([tokenizer.pad_token_id], loaded) and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # what is padded is masked
    return EvaluatedModel(name, loaded, tokenizer, device, longest(loaded.config, spec))


def base_and_adapters(model: Path | str | Sequence[str]) -> tuple[str, Path, list[str]]:
    """The name of a model, the folder of its base, and its adapters.

    Raises:
        EvaluateError: MODEL, when the base is a file or an adapter. HubError: when it cannot be fetched.
    """
    base, *adapters = parts_of(model)
    name = "+".join((base, *adapters))
    folder = fetch(base)
    if not folder.is_dir():
        raise EvaluateError.of("MODEL", name, "is a file", "name the folder of the model")
    if not adapters and (folder / "adapter_config.json").is_file():
        what = "is an adapter, and an adapter is evaluated on its base"
        raise EvaluateError.of("MODEL", name, what, f"write {base_of(folder)}+{name}")
    refuse_odd_files(folder)
    read_model_config(folder)
    return name, folder, adapters


@contextmanager
def errors_of_loading(name: str) -> Iterator[None]:
    """Convert every exception of transformers and PEFT to EvaluateError TRUST or MODEL."""
    try:
        yield
    except PaftMergeError:
        raise
    except Exception as error:  # transformers and PEFT raise anything on unknown files
        if "trust_remote_code" in str(error):
            what = "needs the Python code of its folder, which is not run unless you allow it"
            raise EvaluateError.of("TRUST", name, what, "read it, then pass trust_code=True") from error
        what = f"cannot be loaded: {first_line(error)}"
        raise EvaluateError.of("MODEL", name, what, "give a causal language model, or BASE+ADAPTER") from error


def complete_tokenizer(tokenizer: Any, template: str | None, name: str) -> None:
    """Give a tokenizer a pad token, and the chat template if it has none.

    Raises:
        EvaluateError: MODEL, when it has neither a pad nor an eos token.
    """
    tokenizer.chat_template = tokenizer.chat_template or template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        what = "its tokenizer has neither a pad nor an eos token"
        raise EvaluateError.of("MODEL", name, what, "use a tokenizer that has one")


def longest(config: Any, spec: EvaluateSpec) -> int:
    """The longest context in tokens of a model with this config."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    return spec.max_length or min(int(most), MOST_TOKENS)


def _is_sparse(adapter: Path) -> bool:
    """Whether a folder holds a sparse delta, which PEFT does not load; it is added to the base's tensors."""
    return read_config(adapter / CONFIG).get("peft_type") == SPARSE


def _with_deltas(folder: Path, deltas: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The tensors of a base with sparse deltas, as a merged checkpoint holds them."""
    with ExitStack() as opened:
        base = opened.enter_context(Checkpoint.open(folder))
        if found := quantised(base):
            raise CheckpointError([found.problem(folder, "a sparse delta is added to its plain weights")])
        adapter = AdapterStack.of([opened.enter_context(Adapter.open(place, base)) for place in deltas])
        if adapter.unties:
            what = f"unties {', '.join(adapter.unties)}, for which the base's config.json has to change"
            raise EvaluateError.of("MODEL", deltas[-1], what, "merge it into a checkpoint first")
        model = Model(str(folder), base, adapter)
        return {name: model.read(name).tensor(baked=True) for name in base.tensors}


def _with_weights(folder: Path, weights: Mapping[str, torch.Tensor], dtype: str, trust_code: bool) -> Any:
    """Load the model of a folder with these tensors, which transformers renames and ties as those of a file."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_code)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_code))
    model = kind.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def trained_tokenizer(adapter: Path, before: Any) -> Any:
    """The tokenizer or the chat template in an adapter's folder; `before` if it has neither, or more tokens."""
    from transformers import AutoTokenizer

    template = adapter / "chat_template.jinja"
    if (adapter / "tokenizer_config.json").is_file() and (adapter / "tokenizer.json").is_file():
        own = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
        return own if len(own) <= len(before) else before
    if template.is_file():
        before.chat_template = template.read_text(encoding="utf-8")
    return before


def adapted(model: Any, adapter: Path) -> Any:
    """Put an adapter on a model; an adapter that is already on it is first added to the weights."""
    from peft import PeftConfig, PeftModel

    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    refuse_odd_files(adapter)
    problems = Problems()
    check_sizes(adapter / CONFIG, read_config(adapter / CONFIG), problems)
    problems.raise_as(EvaluateError)
    config: Any = PeftConfig.from_pretrained(str(adapter))
    config.megatron_config = config.megatron_core = None  # the name of a module that PEFT would import
    try:
        _check_patterns(config, [name for name, _ in model.named_modules()])
    except PatternError as error:
        raise EvaluateError.of("ADAPTER_CONFIG", adapter / CONFIG, f"a pattern {error}") from error
    return PeftModel.from_pretrained(model, str(adapter), config=config)


def _check_patterns(config: Any, modules: list[str]) -> None:
    """Match the patterns of an adapter's config as PEFT will, so that one that takes too long is refused.

    Raises:
        PatternError: a pattern is malformed, or all take too long.
    """
    patterns = []
    for name, given in vars(config).items():
        if name in ("target_modules", "exclude_modules"):
            patterns += [given] if isinstance(given, str) else []
        elif name == "modules_to_save" or name.endswith("_pattern"):
            form = r"(?:^|.*?\.){}\.(\d+)\..*" if name == "layers_pattern" else r"(.*\.)?({})(\..*)?"
            patterns += [form.format(key) for key in ([given] if isinstance(given, str) else given or ())]
    match_in_time(patterns, modules, "fullmatch")
