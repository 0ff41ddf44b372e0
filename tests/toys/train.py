"""A tiny Llama with a word tokenizer, and languages for it to learn: Markov chains over a few dozen words."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

THEIR_WARNINGS = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
"""TRL and PEFT call by their old names what transformers renamed; nothing of ours does."""

WORDS = 32
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(chat: bool = True, pad: bool = True):
    """Words w0..w31 and the marks that the template uses, split at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate([*marks, *(f"w{i}" for i in range(WORDS))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>" if pad else None
    )
    made.chat_template = TEMPLATE if chat else None
    return made


def chain(seed: int, sharp: float = 2.0) -> torch.Tensor:
    """Transition probabilities `[WORDS, WORDS]` of a random language."""
    return (sharp * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def sentences(table: torch.Tensor, count: int, length: int, seed: int) -> list[str]:
    """Samples of a language, words separated by blanks."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (count, 1), generator=generator)
    while words.shape[1] < length:
        words = torch.cat([words, torch.multinomial(table[words[:, -1]], 1, generator=generator)], 1)
    return [" ".join(f"w{w}" for w in row) for row in words.tolist()]


def tiny_llama(seed: int = 0, hidden: int = 64, layers: int = 2, vocabulary: int = WORDS + 6):
    """A random Llama of about 100,000 parameters, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@functools.lru_cache
def _pretrained_state(steps: int) -> dict[str, torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products lose by a second thread
    model, words = tiny_llama(), tokenizer()
    ids = torch.tensor(words(sentences(chain(0), 512, 24, 0))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (32,), generator=order)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.set_num_threads(before)
    return {k: v.clone() for k, v in model.state_dict().items()}


def pretrained(steps: int = 150):
    """A tiny Llama that knows language 0 (trained once per session)."""
    model = tiny_llama()
    model.load_state_dict(_pretrained_state(steps))
    return model.eval()


def saved(folder: Path, model=None) -> str:
    """Write a tiny base with its tokenizer; returns the folder as text."""
    (model or tiny_llama()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def dataset(rows: list[dict]):
    """Rows in memory as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list(rows)


def texts(language: int = 1, count: int = 64, length: int = 16, seed: int = 1):
    """Plain-text rows of a language."""
    return dataset([{"text": s} for s in sentences(chain(language), count, length, seed)])


def preferences(count: int = 32, seed: int = 2):
    """Prompts whose chosen answer is of language 1 and whose rejected one is of language 2."""
    starts = sentences(chain(0), count, 4, seed)
    good, bad = sentences(chain(1), count, 6, seed + 1), sentences(chain(2), count, 8, seed + 2)
    return dataset([{"prompt": p + " ", "chosen": g, "rejected": b} for p, g, b in zip(starts, good, bad, strict=True)])


FAST = {
    "gradient_checkpointing": False, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "logging_steps": 1,
    "save_strategy": "no", "dataloader_pin_memory": False,
}  # fmt: skip
"""`training:` for runs of seconds on a CPU."""
