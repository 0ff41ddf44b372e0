"""The rules behind the merge methods: what each measures of a tensor, and how it combines a block."""
