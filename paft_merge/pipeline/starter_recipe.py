"""`paft init`: a commented recipe to begin with, for a base, data and hardware."""

from __future__ import annotations

from pathlib import Path

from paft_merge.errors import OutputError

LARGE_BYTES = 6 << 30
"""Weights above this are loaded in 4 bits where there is one GPU."""

_DATA = {
    "sft": "my-sft.jsonl # rows with messages, or prompt and completion; or a Hub data set",
    "dpo": "my-preferences.jsonl # rows with prompt, chosen, rejected; or a Hub data set",
}


def starter(base: str, sft: str | None = None, dpo: str | None = None, gpus: int = 0) -> str:
    """The text of a recipe for `paft run`.

    Args:
        base: A folder or Hub name.
        sft: File or Hub data set of the skill; a placeholder by default.
        dpo: The same of the preference.
        gpus: 0 for a CPU.
    """
    small = _weight_bytes(base) < LARGE_BYTES
    quantized = gpus == 1 and not small
    dtype = "float32" if gpus == 0 else "bfloat16"
    how = f"{{dtype: {dtype}{', quantization: {load_in_4bit: true}' if quantized else ''}}}"
    batch, steps = (4, 2) if gpus else (8, 1)
    each = max(1, gpus // 2)
    spread = f"\n    processes: {each} # GPUs; the other adapter has the rest" if gpus > 2 else ""
    place = {0: "a CPU", 1: "one GPU"}.get(gpus, f"{gpus} GPUs, on which both adapters train at the same time")
    return f"""\
# A PAFT run (arXiv:2406.17923) on {place}: a sparse SFT adapter and a DPO adapter, trained in parallel from one base, then merged.
#
#   paft run --dry-run THIS_FILE runs/first     # checks everything and shows the steps
#   paft run THIS_FILE runs/first               # can be stopped; the same command goes on
#
# Every key is explained in docs/run.md.

base_model: {_quoted(base)}

adapters:
  sft:
    objective: sft
    data: {_quoted(sft) if sft else _DATA["sft"]}
    base: {how}{spread}
    lora: {{r: 16, lora_alpha: 16, lora_dropout: 0.05}}
    l1: {{strength: 1.0e-4}} # PAFT's sparsity; 1.0e-3 is its stronger value
    training: # any field of TRL's SFTConfig
      learning_rate: 2.0e-4
      num_train_epochs: 1
      per_device_train_batch_size: {batch}
      gradient_accumulation_steps: {steps}
      max_length: 2048
      lr_scheduler_type: cosine
      warmup_steps: 0.1 # a share of the run
      gradient_checkpointing: {"true" if gpus else "false"}

  dpo:
    objective: dpo
    data: {_quoted(dpo) if dpo else _DATA["dpo"]}
    base: {how}{spread}
    lora: {{r: 16, lora_alpha: 16, lora_dropout: 0.05}}
    training: # any field of TRL's DPOConfig
      learning_rate: 5.0e-6
      beta: 0.01
      num_train_epochs: 1
      per_device_train_batch_size: {batch}
      gradient_accumulation_steps: {steps * 2}
      max_length: 1024
      lr_scheduler_type: cosine
      warmup_steps: 0.1
      gradient_checkpointing: {"true" if gpus else "false"}

audit:
  epsilon: 1.0e-5
  # require: ["sparsity(1e-5) [source=sft] >= 0.5"] # stops before the merge unless it holds

merge: # mergekit's language; sft and dpo are the adapters above
  merge_method: l1_ties
  models:
    - {{model: sft, parameters: {{weight: 1.0}}}}
    - {{model: dpo, parameters: {{weight: 1.0}}}}
  parameters: {{trim: {{l1_mass: 0.95}}}}
  out_dtype: {"float32" if gpus == 0 else "bfloat16"}

# evaluate:
#   suite: open-llm-v1 # six tasks of lm-eval; pip install 'paft-merge[eval]'
#   metrics: # or light ones, which need no package
#     skill: {{kind: exact_match, data: my-test.jsonl}} # rows with prompt and answer
#     pairs: {{kind: preference, data: my-pairs.jsonl}} # rows with prompt, chosen, rejected

# compare: # against each adapter alone, one after the other, and the paper's five methods; needs evaluate
#   arms: [base, individual, sequential, parallel]

# push: {{repo_id: me/my-model, private: true}}
"""


def write_starter(out: Path, text: str) -> None:
    """Write a starter recipe where nothing is yet.

    Raises:
        OutputError: EXISTS, something is there; OUTPUT, it cannot be written.
    """
    if out.exists():
        raise OutputError.of("EXISTS", out, "is there already", "name another file, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        what = error.strerror or str(error)
        raise OutputError.of("OUTPUT", out, what, "choose a place that can be written") from error


def _weight_bytes(base: str) -> int:
    """Size of a base's weights; a base that is not here is taken to be large."""
    files = list(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    return sum(file.stat().st_size for file in files) if files else LARGE_BYTES


def _quoted(text: str) -> str:
    """Text as YAML reads it back."""
    plain = text and all(c.isalnum() or c in "/._-" for c in text) and text[0].isalnum()
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
