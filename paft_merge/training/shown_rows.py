"""Rows as they will be trained: TRL's own preparation with a stand-in for the base, decoded, with the labels marked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError
from paft_merge.training.arguments import training_arguments
from paft_merge.training.data import kind_of
from paft_merge.training.launch import chosen_adapters, prepare_all
from paft_merge.training.prepared_rows import prepare
from paft_merge.training.rendering import bounded_templates
from paft_merge.training.schema import AdapterSpec, trained_parts

_LOOKED_AT = 100
"""Rows of each source that are loaded at least, so that columns are known as in training."""

_PLAIN = {
    "use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False, "packing": False,
    "padding_free": False, "shuffle_dataset": False, "precompute_ref_log_probs": False, "deepspeed": None, "fsdp": None,
    "fsdp_config": None, "dataset_num_proc": None, "torch_compile": False, "tf32": None, "eval_strategy": "no",
    "load_best_model_at_end": False, "optim": "adamw_torch", "dataloader_pin_memory": False, "use_liger_kernel": False,
}  # fmt: skip
"""Fields of the TRL config that need hardware, change the order of rows or join rows."""


@dataclass(frozen=True)
class ShownRow:
    """One sequence of a row."""

    adapter: str
    place: str
    name: str
    """`text`, `chosen`, `rejected` or `prompt`."""
    tokens: int
    parts: tuple[tuple[str, bool], ...]
    """Texts of consecutive tokens, and whether they have a label."""


def check(
    recipe: Path, adapters: Sequence[str] | None = None, *, trust_code: bool = False
) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Check the recipe, templates and all rows; yields each adapter's name, the facts of its data and notes.

    Raises:
        TrainError, RecipeError: every problem.
    """
    specs, source, options = chosen_adapters(recipe, adapters, trust_code)
    for name, made in prepare_all(specs, source, Path("checkpoints"), options).items():
        yield name, made.rows.facts, made.rows.notes


def shown(
    recipe: Path, count: int, adapters: Sequence[str] | None = None, *, trust_code: bool = False
) -> Iterator[ShownRow]:
    """The first `count` rows of each adapter, as TRL prepares them.

    Raises:
        TrainError, RecipeError: what is wrong with the recipe, a template or these rows.
    """
    from dataclasses import replace

    specs, source, options = chosen_adapters(recipe, adapters, trust_code)
    parts = {name: trained_parts(spec) for name, spec in specs.items()}
    shown = {f"{name}.{part}": own for name in specs for part, own in parts[name].items()}
    for name, spec in ({name: spec for name, spec in specs.items() if not parts[name]} | shown).items():
        looked = max(count, _LOOKED_AT)
        few = spec.model_copy(
            update={"data": [one.model_copy(update={"max_rows": min(one.max_rows or looked, looked)}) for one in spec.data],
                    "eval_data": None,
                    "sampling": spec.sampling.model_copy(update={"engine": "transformers"})}
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, bounded_templates(name):
            made = prepare(source, few, Path(folder), replace(options, name=name))
            rows = made.rows.train.select(range(min(count, len(made.rows.train))))
            yield from _shown(name, few, rows, made.tokenizer, Path(folder))


def _shown(name: str, spec: AdapterSpec, rows: Any, tokenizer: Any, folder: Path) -> Iterator[ShownRow]:
    kind = kind_of(spec)
    if kind == "prompts":
        from paft_merge.training.generation import token_ids

        for at, prompt in enumerate(rows["prompt"], 1):
            ids = token_ids(tokenizer, prompt)
            yield ShownRow(name, f"row {at}", "prompt", len(ids), _parts(ids, [False] * len(ids), tokenizer))
        return
    trainer = _stand_in(name, spec, kind, rows, tokenizer, folder)
    for at, row in enumerate(trainer.train_dataset, 1):
        batch = trainer.data_collator([row])
        masks = batch["completion_mask"].bool() if kind == "preference" else batch["labels"] != -100
        present = batch["attention_mask"].bool() if "attention_mask" in batch else masks | True
        for i, what in enumerate(("chosen", "rejected") if kind == "preference" else ("text",)):
            ids, labelled = batch["input_ids"][i][present[i]].tolist(), masks[i][present[i]].tolist()
            yield ShownRow(name, f"row {at}", what, len(ids), _parts(ids, labelled, tokenizer))


def _stand_in(name: str, spec: AdapterSpec, kind: str, rows: Any, tokenizer: Any, folder: Path) -> Any:
    """A trainer of a model with a few hundred weights, for its preparation of the rows."""
    import dataclasses

    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOTrainer, SFTTrainer

    from paft_merge.training.trainers import CONFIGS

    known = {field.name for field in dataclasses.fields(CONFIGS[spec.objective]) if field.init}
    arguments = training_arguments(spec, folder, name, **{k: v for k, v in _PLAIN.items() if k in known})
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    lora = LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = type("Preparing", (DPOTrainer if kind == "preference" else SFTTrainer,), {"_send_telemetry": _nothing})
    try:
        return trainer(
            model=LlamaForCausalLM(config),
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
        )
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise TrainError.of("DATA", name, f"TRL cannot start: {str(error).strip()}", "") from error


def _nothing(self: Any) -> None:
    """Send nothing."""


def _parts(ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """The texts of runs of tokens that have a label, or have none."""
    found, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or labelled[end] != labelled[start]:
            before, after = (tokenizer.decode(ids[:at], skip_special_tokens=False) for at in (start, end))
            text = after[len(before) :] if after.startswith(before) else tokenizer.decode(ids[start:end])
            found.append((_visible(text), labelled[start]))
            start = end
    return tuple(found)


def _visible(text: str) -> str:
    """Text whose control characters cannot act on a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
