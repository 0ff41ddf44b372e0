"""Merges: from a recipe, or from tensors in memory, to a model folder, and their reproduction."""
