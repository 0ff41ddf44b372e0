"""`paft export`: a model or adapter in the format of llama.cpp, Ollama or MLX, written by the converters of those projects.

folders    checks the model, runs the converter, checks its file, and renames the folder
converters finds the converters on this machine, and runs them
ollama     the Modelfile of Ollama, with the chat template where it is certain
gguf_files checks a GGUF file
gguf_tokens compares the tokens that llama.cpp makes with those of the model's tokenizer
older_configs the config as MLX reads it
"""

from __future__ import annotations

from paft_merge.exporting.folders import TARGETS, Exported, Target, check_tools, export

__all__ = ["TARGETS", "Exported", "Target", "check_tools", "export"]
