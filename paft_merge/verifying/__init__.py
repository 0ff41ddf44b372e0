"""`paft verify`: a finished model beside what its recipe means, the base and one adapter that is not merged.

| module | contents |
|---|---|
| meaning | the recipe's tensors in float32, computed when they are read |
| evidence | the stored tensors beside them |
| likeness | where the values of a wrong tensor come from |
| accompanying | config, tokenizer and chat template |
| findings | the differences in words |
| prompts | the tokens at which models are compared |
| loaded_models | models to run, whole or layer by layer |
| behaviour | logits, continuations and hidden states |
| verification | all of it, in order |
| report | the result and the gate |
"""

from paft_merge.verifying.report import METRICS, Behaviour, Verification, read_requirement
from paft_merge.verifying.verification import VerifyProgress, verify

__all__ = ["METRICS", "Behaviour", "Verification", "VerifyProgress", "read_requirement", "verify"]
