"""The Modelfile of Ollama for a GGUF file: parameters, and the chat template where it is certain.

Ollama does not run Jinja. It replaces the chat template of a GGUF file by one of its own in Go where the two texts differ by less
than 100 characters, and uses none otherwise (ollama/ollama: template/template.go, Named). A template of one of the forms below is
written in Go here, after the model's own template was rendered for test conversations and gave exactly that form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paft_merge.errors import Problem
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.plan.vocabulary.chat_templates import render
from paft_merge.plan.vocabulary.tokenizers import files_in
from paft_merge.plan.vocabulary.trained_tokenizers import TrainedTokenizer
from paft_merge.training.child_process import in_child

_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
    "min_p": "min_p",
}
"""Keys of generation_config.json, and Ollama's names."""


class _Form(NamedTuple):
    """What stands around every message; `{}` is its role."""

    before: str
    after: str

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation."""
        turns = [f"{self.before.format(m['role'])}{m['content']}{self.after}" for m in messages]
        return "".join([*turns, self.before.format("assistant")])

    @property
    def in_go(self) -> str:
        """The template for Ollama."""
        role = self.before.format("{{ .Role }}")
        return f"{{{{- range .Messages }}}}{role}{{{{ .Content }}}}{self.after}{{{{ end }}}}{self.before.format('assistant')}"


_FORMS = (
    _Form("<|im_start|>{}\n", "<|im_end|>\n"),
    _Form("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    _Form("<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>\n"),
)  # fmt: skip
_SYSTEM = [{"role": "system", "content": "Be brief."}]
_TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And\n3 + 3?"},
]


def modelfile(model: Path, file: str) -> tuple[str, list[Problem]]:
    """The text of a Modelfile, and warnings.

    Args:
        model: the folder of the model, for its tokenizer and generation_config.json.
        file: the name of the GGUF file beside the Modelfile.
    """
    tokenizer, settings = TrainedTokenizer(files_in(model)), _generation(model)
    lines, warnings = [f"FROM ./{file}"], list[Problem]()
    ends = settings.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    texts = {number: token for token, number in tokenizer.ids.items()}
    stops = dict.fromkeys([*(texts[i] for i in ids if i in texts), *filter(None, [tokenizer.special.get("eos_token")])])
    found = _found(tokenizer)
    if found is not None:
        form, system = found
        lines.append(f'TEMPLATE """{form.in_go}"""')
        lines += [f'SYSTEM """{system}"""'] if system and '"""' not in system else []
    elif tokenizer.template:
        what = (
            "has no TEMPLATE: the chat template has none of the forms that can be written in Ollama's language with "
            "certainty; Ollama takes one of its own if the two are almost equal, and none otherwise"
        )
        warnings.append(
            Problem("CHAT_TEMPLATE", "Modelfile", what, "see `ollama show --modelfile`, and write TEMPLATE")
        )
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in stops]
    for key, name in _PARAMETERS.items():
        if isinstance(value := settings.get(key), int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {name} {value}")
    return "\n".join(lines) + "\n", warnings


def _found(tokenizer: TrainedTokenizer) -> tuple[_Form, str] | None:
    """The form of a tokenizer's chat template, and the system message that it adds by itself; None if it has another form."""
    if not tokenizer.template:
        return None
    text, begin = tokenizer.template, tokenizer.special.get("bos_token", "")
    rendered = list(in_child(lambda: (render(text, m, tokenizer.special) for m in (_SYSTEM + _TURNS, _TURNS))))
    with_system, without = (one.removeprefix(begin) if one and begin else one for one in rendered)
    for form in _FORMS:
        if with_system != form.rendered(_SYSTEM + _TURNS) or without is None:
            continue
        plain = form.rendered(_TURNS)
        if without == plain:
            return form, ""
        start = form.before.format("system")
        if without.startswith(start) and without.endswith(f"{form.after}{plain}"):
            return form, without.removeprefix(start).removesuffix(f"{form.after}{plain}")
    return None


def _generation(model: Path) -> dict[str, Any]:
    path = model / "generation_config.json"
    try:
        found = json.loads(read_text(path, "CONFIG_INVALID")) if path.exists() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
