"""Blocks of tensors and the operations on them: compiled kernels, torch operations, devices, scratch memory."""
