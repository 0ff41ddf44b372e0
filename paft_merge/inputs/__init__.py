"""Checkpoints and adapters, read as blocks of float32 values or deltas."""
