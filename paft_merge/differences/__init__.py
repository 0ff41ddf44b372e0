"""`paft diff`: two checkpoints, adapters or merges compared tensor by tensor, from their files and a block at a time.

run          opens both models, and compares all tensors
tensor_pairs reads two tensors block by block; finds equal bits under other names
entries      compares the entries of two blocks
settings     compares configs, tokenizers and other files
of_adapters  compares adapters by their files, and by what they add to a base
kinds        what is returned
"""

from __future__ import annotations

from paft_merge.differences.kinds import HARMLESS, Change, Kind, ModelDiff, TensorDifference
from paft_merge.differences.run import diff

__all__ = ["HARMLESS", "Change", "Kind", "ModelDiff", "TensorDifference", "diff"]
