"""Write the generated tables of the documentation: the keys of a recipe (docs/recipe.md) and the methods (docs/methods.md).

python tools/docs_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from paft_merge.methods import METHODS, REQUIRED, Parameter
from paft_merge.recipe import schema

DOCS = Path(__file__).parent.parent / "docs"

PLACES = {
    "": schema.Language,
    "models[].": schema.ModelEntry,
    "slices[].": schema.SliceEntry,
    "slices[].sources[].": schema.SourceEntry,
    "modules.NAME.": schema.ModuleEntry,
    "tokenizer.": schema.TokenizerEntry,
    "tokenizer.tokens.TOKEN.": schema.TokenEntry,
    "output.": schema.OutputEntry,
}
"""The mappings of a recipe, by path, and the model that defines the keys of each."""

OURS = {
    "rounding", "seed", "arithmetic", "router", "quantization", "scales", "models[].last", "slices[].sources[].last", "output",
    "space", *(f"output.{name}" for name in schema.OutputEntry.model_fields),
}  # fmt: skip
"""Keys that mergekit does not have."""

KEYS = {
    "merge_method": "a method of [the table](methods.md), or one that a module registers with mergekit (`--import`)",
    "models": "whole models to merge; `base_model` is one of them, listed or not",
    "slices": "layers of the output, slice by slice: repeated, overlapping or reordered. See [Slices](#slices)",
    "modules": "parts of a composite model, each with `models` or `slices`: `text_decoder`, `vision_tower`, `multi_modal_projector`, `encoder`, `decoder`, `shared`, `default`, or a prefix of tensor names. A part that is not listed is not written, as in mergekit; you get a warning",
    "base_model": "the checkpoint to merge into. The output takes its config, tokenizer and other files from it. Without this key the first model is used (mergekit picks one at random)",
    "parameters": "parameters for all sources. A more specific place wins: source, then slice, then module, then recipe",
    "dtype": "dtype of the output; with `arithmetic: mergekit` also of the arithmetic",
    "out_dtype": "dtype of the output. Without `dtype` and `out_dtype` the output has the base's dtype",
    "tokenizer_source": "vocabulary of the output: `union`, `base` or a model. See [Tokenizers](tokenizers.md)",
    "tokenizer": "the same as a mapping with more options",
    "chat_template": "`auto`, `alpaca`, `chatml`, `exaone`, `llama3`, `mistral`, or a Jinja template",
    "name": "name of this document in a file with several. See [Several documents](#several-documents-in-a-file)",
    "rounding": "`nearest` (default) or `stochastic`. See [Numerics](numerics.md)",
    "seed": "seed of random drops and of stochastic rounding (default 0)",
    "arithmetic": "`float32` (default), or `mergekit` for mergekit's results bit for bit",
    "router": "routers of mixtures of experts: `base`, `average`, or `merge` (default, as other tensors). See [Routers](#routers)",
    "quantization": "`keep`: the output is quantised as the base is. Without this key it has plain weights. See [`quantization: keep`](#quantization-keep)",
    "scales": "of `quantization: keep`: `refit` (default) or `keep`",
    "output": "what is written: a checkpoint (default), or the merged delta as an adapter or a sparse delta. See [Adapters as output](adapters-out.md)",
    "space": "where the method works: on deltas (`weight`, default), or in a common space of the adapters: `core`, `knots` or `ctm`. See [Spaces of adapters](methods.md#spaces-of-adapters)",
    "models[].model": "`PATH[@REVISION][+ADAPTER[@REVISION]]`; a mapping `{model, lora, override_architecture, label}`; the name of a document; or one `.safetensors` file (`.pt` with `--lazy-unpickle`). Random drops depend on `label`, or without it on the reference as written",
    "models[].last": "with `RUN/checkpoint-*` in `model`: only the last so many. See [The checkpoints of a run](#the-checkpoints-of-a-run)",
    "models[].parameters": "parameters of this source: a value, a gradient (a list, interpolated over the layers), or a list of conditions `{filter, value}`. A filter is a part of a tensor's name",
    "slices[].sources": "one entry per model, all with the same number of layers. If the method has a base, list the base too",
    "slices[].base_model": "base of this slice, instead of the recipe's",
    "slices[].parameters": "parameters of this slice. A gradient starts again in each slice",
    "slices[].sources[].model": "as `models[].model`. An adapter applies to the layers that `layer_range` selects",
    "slices[].sources[].last": "as `models[].last`",
    "slices[].sources[].layer_range": "`[first, end]`, counted from 0; `end` is not included",
    "slices[].sources[].parameters": "parameters of this source. Filters match the source's tensor names",
    "modules.NAME.models": "whole modules to merge",
    "modules.NAME.slices": "layers of this module",
    "modules.NAME.parameters": "parameters of this module",
    "tokenizer.source": "as `tokenizer_source` (default `union`)",
    "tokenizer.tokens": "where the embeddings of single tokens come from",
    "tokenizer.pad_to_multiple_of": "round the number of embedding rows up to a multiple of this",
    "tokenizer.tokens.TOKEN.source": "a model, `{kind: zero}`, or `{kind: model_token, model, token}` (or `token_id`)",
    "tokenizer.tokens.TOKEN.force": "use this source for every model, also for models that have the token",
    "output.kind": "`checkpoint` (default); `adapter`: a LoRA of the base; or `delta`: the entries of the merged delta that are not zero, a [sparse delta](adapters-out.md#sparse-deltas)",
    "output.rank": "rank of the adapter: a number; `sum` (default), the sum of the sources' ranks; or `auto`, the least rank that keeps `energy`",
    "output.energy": "share of the squared norm of each delta that `rank: auto` keeps, such as 0.99",
    "output.format": "of `kind: delta`: `sparse` (default), which paft_merge reads, or `shira`, which PEFT loads",
    "output.max_rank": "limit of the ranks that `rank: auto` finds",
    "output.portable": "`true` (default): only what vLLM, SGLang, llama.cpp and PEFT all read; `false`: also what only PEFT reads",
    "output.include": "names of the modules that get factors, or ends of names after a dot, such as `q_proj` or `layers.1?.*`; without it all. The delta of other modules is left out",
    "output.exclude": "names of modules whose delta is left out",
    "output.unfit": "deltas that the adapter cannot hold, such as those of norms: `refuse` (default) or `leave_out`, with a warning",
}  # fmt: skip
"""What each key of a recipe means."""


def keys() -> list[str]:
    """Every key of the language, with its path."""
    return [place + name for place, model in PLACES.items() for name in model.model_fields]


def language_table() -> str:
    """A table with one row per key; raises KeyError for a key that `KEYS` does not describe."""
    rows = ["| key | meaning |", "|---|---|"]
    return "\n".join(rows + [f"| `{key}`{' (ours)' if key in OURS else ''} | {KEYS[key]} |" for key in keys()])


def methods_table() -> str:
    """A table of METHODS: name, title, paper, and parameters with their defaults."""
    rows = ["| method | title | paper | parameters (default) |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        parameters = ", ".join(f"`{p.name}`{_default(p)}" for p in method.parameters)
        rows.append(f"| `{name}` | {method.title} | {method.paper} | {parameters} |")
    return "\n".join(rows)


def _default(parameter: Parameter) -> str:
    value = parameter.default
    if value is REQUIRED:
        return " (required)"
    if value is None:
        return ""
    return f" ({str(value).lower() if isinstance(value, bool) else format(value, 'g') if isinstance(value, float) else value})"


TABLES = {"recipe.md": ("language", language_table), "methods.md": ("methods", methods_table)}
"""The generated table of each page: its name in the page's marks, and the function that makes it."""


def with_table(page: str) -> str:
    """The text of a page of docs/ with its table generated again."""
    name, table = TABLES[page]
    begin, end = f"<!-- {name}: generated by tools/docs_tables.py -->", f"<!-- end of {name} -->"
    text = (DOCS / page).read_text()
    assert begin in text, f"{page} has no mark {begin}"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table()}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(with_table(page))
