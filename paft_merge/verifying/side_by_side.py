"""Run the finished model, the recipe's, the base and the adapter that is not merged on the same tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paft_merge.compute.devices import torch_device
from paft_merge.errors import EvaluateError, PaftMergeError
from paft_merge.evaluating.loading import adapted
from paft_merge.inputs.adapter_places import CONFIG
from paft_merge.inputs.adapters.binding import vocabulary_of
from paft_merge.inputs.adapters.config import read_config
from paft_merge.inputs.adapters.sparse_delta import NAME as SPARSE
from paft_merge.inputs.architecture import Architecture
from paft_merge.inputs.checkpoint import DTYPES
from paft_merge.inputs.models import Model
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.plan.vocabulary.tokenizers import files_in, tokenizer_files
from paft_merge.plan.vocabulary.trained_tokenizers import TrainedTokenizer
from paft_merge.verifying.behaviour import HELD_BYTES, Answers, Rows, answers_of, difference
from paft_merge.verifying.loaded_models import class_of, load_whole, release, saying, stream
from paft_merge.verifying.meaning import Meaning
from paft_merge.verifying.prompts import continued, of_data, of_tokens, sampled
from paft_merge.verifying.report import Behaviour

NEW_TOKENS = 16
BATCH = 16


def free_memory() -> int:
    """Half of the memory that is free, in bytes."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return 4 << 30


def run_beside(
    where: str, folder: Path, finished: Model, is_adapter: bool, meaning: Meaning, *, data: Sequence[Any] | None, rows: int, new_tokens: int | None,
    device: str | None, memory: int | None, trust_code: bool, progress: Callable[[str], None],
) -> tuple[dict[str, Behaviour], dict[str, str], str]:  # fmt: skip
    """Compare how the finished model answers with the recipe's, with the base's, and with that of an adapter that is not merged.

    Args:
        where, folder, finished, is_adapter: the finished model.
        meaning: the recipe.
        data: prompts, as `read_prompts` returns them.
        rows, new_tokens, device, memory, trust_code: as for `verify`.
        progress: called with each stage.

    Returns:
        The behaviours by name, why others are missing, and where the tokens come from.
    """
    try:
        bench = _Bench.of(where, folder, finished, is_adapter, meaning, device, memory, trust_code)
    except EvaluateError as error:
        problem = error.problems[0]
        return {}, {"recipe": f"{problem.what}; {problem.fix}" if problem.code == "TRUST" else problem.what}, ""
    behaviours, skipped = dict[str, Behaviour](), dict[str, str]()
    try:
        progress("prompts")
        prompts, source = bench.prompts(data, rows, bench.longest - (NEW_TOKENS if new_tokens is None else new_tokens))
        progress("the finished model")
        model, how = bench.finished_model()
        count = new_tokens if new_tokens is not None else 0 if how == "layer by layer" else NEW_TOKENS
        if not count:
            skipped["continuations"] = (
                "none: a model that does not fit in memory is read once for each token; new_tokens=16 asks for them"
            )
        texts = prompts
        if count and bench.continues(model):
            with saying(where, "be run"):
                texts = continued(model, prompts, count, BATCH, bench.device)
        tokens = Rows.of(texts, [len(prompt) for prompt in prompts])
        places = tokens.places(max(1, HELD_BYTES // (4 * bench.width)))
        ours = bench.answers(model, how, tokens, places)
        release(model)
    except EvaluateError as error:
        if error.problems[0].code in ("EVAL_DATA", "TEMPLATE"):
            raise
        return {}, {"recipe": str(error.problems[0])}, ""
    for name, load in (("recipe", bench.recipe_model), ("base", bench.base_model), ("adapter", bench.adapter_model)):
        progress({"recipe": "the recipe in float32", "base": "the base", "adapter": "PEFT's adapter"}[name])
        try:
            if name != "recipe":
                bench.check_tokens(tokens)
            made, how = load()
            behaviours[name] = Behaviour.of(
                name, difference(ours, bench.answers(made, how, tokens, places), tokens), how
            )
            release(made)
        except PaftMergeError as error:
            skipped[name] = str(error.problems[0].what)
    return behaviours, skipped, source


@dataclass
class _Bench:
    """Loads the models that are compared, one at a time."""

    where: str
    folder: Path
    finished: Model
    is_adapter: bool
    meaning: Meaning
    device: torch.device
    memory: int
    trust_code: bool
    kind: Any
    architecture: Architecture | None
    config: Mapping[str, Any]

    @classmethod
    def of(
        cls, where: str, folder: Path, finished: Model, is_adapter: bool, meaning: Meaning, device: str | None, memory: int | None,
        trust_code: bool,
    ) -> _Bench:  # fmt: skip
        """Find the class of the models."""
        architecture = Architecture.of(meaning.model.checkpoint)
        kind = class_of(meaning.folder, architecture, trust_code=trust_code)
        place = torch_device(device)
        return cls(
            where, folder, finished, is_adapter, meaning, place, memory or free_memory(), trust_code, kind, architecture,
            meaning.model.checkpoint.config,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Numbers of an answer at one token: the vocabulary."""
        return int(getattr(self._text_config, "vocab_size", None) or vocabulary_of(self.config) or 1 << 17)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The arguments of the class that runs."""
        return signature(self.kind.forward).parameters if hasattr(self.kind, "forward") else {}

    @property
    def _text_config(self) -> Any:
        return self.architecture.modules()[0][1].config.get_text_config() if self.architecture else None

    # --- tokens -----------------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Most tokens that the model reads."""
        return int(getattr(self._text_config, "max_position_embeddings", None) or 1 << 20)

    def prompts(self, data: Sequence[Any] | None, rows: int, longest: int) -> tuple[list[list[int]], str]:
        """Token ids of the prompts, at most `longest` of each, and where they come from."""
        tokenizer = self._tokenizer()
        if data is not None:
            if tokenizer is None:
                raise EvaluateError.of("EVAL_DATA", self.where, "has no tokenizer, which data needs", "leave data out")
            given = of_data(data, tokenizer, self.where, longest)
            known = [ids for ids in given if max(ids) < self.width]
            if not known:
                what = f"the prompts have tokens that its vocabulary of {self.width:,} does not have"
                raise EvaluateError.of("MODEL", self.where, what, "leave data out")
            left = len(given) - len(known)
            more = f", without {left} that have tokens beyond its vocabulary of {self.width:,}" if left else ""
            return known, f"the prompts given{more}"
        special = tokenizer.all_special_ids if tokenizer is not None else []
        most = min(self.width, len(tokenizer) if tokenizer is not None else self.width)
        shared = not self._other_tokens
        most = min(most, vocabulary_of(self.meaning.base.checkpoint.config) or most) if shared else most
        runs = of_tokens(rows, most, special, longest, seed=0)
        if rows > 1 and shared and self._can_generate and not self._streams(self.meaning.base, 2):
            model, _ = self.base_model()
            with saying(self.meaning.base.ref, "be run"):
                own = sampled(model, runs[: rows // 2], 0, self.device)
            release(model)
            return [
                *own,
                *runs[rows // 2 :],
            ], f"{len(own)} samples of the base, {rows - len(own)} runs of random tokens"
        return runs, f"{rows} runs of random tokens"

    def check_tokens(self, rows: Rows) -> None:
        """Raise EvaluateError if the base would read the tokens as another text, or cannot read them."""
        if moved := self._other_tokens:
            what = f"its tokenizer gives other ids to {moved:,} tokens, so it would answer to other texts"
            raise EvaluateError.of("MODEL", self.where, what)
        size = vocabulary_of(self.meaning.base.checkpoint.config)
        if size is not None and int(rows.ids.max()) >= size:
            raise EvaluateError.of("MODEL", self.where, f"the texts have tokens beyond its vocabulary of {size:,}")

    @cached_property
    def _other_tokens(self) -> int:
        """Number of the base's tokens that have another id in the recipe's tokenizer."""
        if self.meaning.plan.vocabulary is None:
            return 0
        base, made = tokenizer_files(self.meaning.base) or {}, files_in(self.meaning.folder)
        ids = TrainedTokenizer(made).ids
        return sum(ids.get(token) != number for token, number in TrainedTokenizer(base).ids.items())

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        for folder in (self.folder, self.meaning.folder):
            if any(
                (folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
            ):
                with saying(folder):
                    return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_code)
        return None

    @property
    def _can_generate(self) -> bool:
        model = self.architecture.modules()[0][1] if self.architecture else None
        return model is None or (self.continues(model))

    @staticmethod
    def continues(model: Any) -> bool:
        """Whether a model writes text: it has logits of next tokens."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        both = getattr(inner.config, "is_encoder_decoder", False)
        return bool(inner.can_generate()) and not both

    # --- models -----------------------------------------------------------------------------------------------------------

    def finished_model(self) -> tuple[nn.Module, str]:
        """The finished model, as a user loads it."""
        if not self.is_adapter:
            if not self._streams(self.finished, 0):
                return self._as_stored(self.finished, self.folder)
            return self._stream(self.finished, self.folder, _dtype_of(self.finished))
        sparse = read_config(self.folder / CONFIG).get("peft_type") == SPARSE
        if sparse or self._streams(self.meaning.base, 0):
            return self._of(self.finished, self.meaning.folder, _dtype_of(self.finished))
        base, how = self.base_model()
        return self._with_adapter(base, self.folder), how

    def _as_stored(self, model: Model, folder: Path) -> tuple[nn.Module, str]:
        """A whole model as transformers loads it from its folder; codes that it cannot load here as their values."""
        try:
            return load_whole(folder, self.kind, "auto", self.device, trust_code=self.trust_code), "whole"
        except EvaluateError:
            if not isinstance(model.checkpoint, Dequantized):
                raise
        made, how = self._of(model, folder, torch.bfloat16)
        return made, f"{how}, its codes as values, because transformers cannot load them here"

    def recipe_model(self) -> tuple[nn.Module, str]:
        """The recipe's model in float32."""
        return self._of(self.meaning.model, self.meaning.folder, torch.float32)

    def base_model(self) -> tuple[nn.Module, str]:
        """The base in its own type."""
        base = self.meaning.base
        if not self._streams(base, 0) and _is_local(base):
            return self._as_stored(base, base.checkpoint.folder)
        return self._of(base, base.checkpoint.folder, _dtype_of(base))

    def adapter_model(self) -> tuple[nn.Module, str]:
        """The base in float32 with the one adapter of the recipe, by PEFT, not merged."""
        found = self.meaning.adapter
        if found is None:
            raise EvaluateError.of("MODEL", self.where, "the recipe is not one adapter with weight 1 on its base")
        base, adapter = found
        if self._streams(base, 4):
            raise EvaluateError.of(
                "MODEL", self.where, "the base in float32 does not fit in the memory that it may take"
            )
        made, how = self._of(base, base.checkpoint.folder, torch.float32)
        return self._with_adapter(made, adapter), how

    def _with_adapter(self, base: nn.Module, adapter: Path) -> nn.Module:
        with saying(adapter):
            model: nn.Module = adapted(base, adapter).eval()
        return model.to(self.device)

    def _of(self, model: Model, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, str]:
        """A model from its tensors: whole where it fits into memory."""
        if self._streams(model, dtype.itemsize):
            return self._stream(model, folder, dtype)
        weights = {}
        for name in model.checkpoint.tensors:
            read = model.read(name)
            floating = DTYPES[read.dtype].mergeable
            weights[name] = read.tensor(baked=False).to(dtype) if floating else read.tensor(baked=True)
            read.checkpoint.release(read.name)
        return load_whole(folder, self.kind, dtype, self.device, trust_code=self.trust_code, weights=weights), "whole"

    def _stream(self, model: Model, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, str]:
        architecture = Architecture.of(model.checkpoint)
        if architecture is None:
            raise EvaluateError.of(
                "MODEL", self.where, "does not fit in memory, and only classes of transformers are read layer by layer"
            )
        return stream(model, folder, architecture, dtype, self.device), "layer by layer"

    def _streams(self, model: Model, width: int) -> bool:
        """Whether a model does not fit into memory, with `width` bytes an element; 0: as it is stored."""
        infos = model.checkpoint.tensors.values()
        return sum(math.prod(one.shape) * width if width else one.nbytes for one in infos) > self.memory

    def answers(self, model: nn.Module, how: str, rows: Rows, places: torch.Tensor) -> Answers:
        """What a model computes; one that is read layer by layer is read once."""
        batch = len(rows.lengths) if how == "layer by layer" else BATCH
        try:
            with saying(self.where, "be run"):
                return answers_of(model, rows, places, batch, self.device)
        except EvaluateError as error:
            also = [name for name in ("pixel_values", "input_features", "input_values") if name in self.inputs]
            if also and "NoneType" in error.problems[0].what:
                what = f"reads {also[0]} beside tokens, so only its tensors are compared"
                raise EvaluateError.of("MODEL", self.where, what, "verify it where it is used") from error
            raise


def _is_local(model: Model) -> bool:
    """Whether transformers can load a model from its folder: its files are there, under the names of its class."""
    made, folder = model.checkpoint, model.checkpoint.folder
    here = (folder / "config.json", *(folder / one.name for one in made.files))
    return not made.computed and made.named_like is None and all(path.is_file() for path in here)


def _dtype_of(model: Model) -> torch.dtype:
    """The type in which transformers loads a model: that of its config, else that of most elements; bfloat16 for codes."""
    sizes: dict[str, int] = {}
    for name, info in model.checkpoint.tensors.items():
        dtype = str(DTYPES[model.checkpoint.written_dtype(name)].torch)
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(info.shape)
    config = model.checkpoint.config
    named = config.get("dtype") or config.get("torch_dtype") or max(sizes, key=lambda one: sizes[one])
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2:
        return found
    return torch.bfloat16
