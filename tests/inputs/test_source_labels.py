"""Short names of models and adapters."""

from __future__ import annotations

import pytest

from paft_merge.inputs.source_labels import label_of, labels_of

CACHE = "/home/me/.cache/huggingface/hub/models--me--sft/snapshots/0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("refs", "labels"),
    [
        (["a/base+x/sft", "a/base+x/dpo"], ["sft", "dpo"]),
        (["models/base+runs/seed-1/sft", "models/base+runs/seed-2/sft", "me/dpo"], ["seed-1/sft", "seed-2/sft", "dpo"]),
        (["a/base", "a/base+x/sft/", "a/base+x/sft+y/dpo"], ["base", "sft", "sft+dpo"]),
        (["me/m@v1", "me/m@v2"], ["me/m@v1", "me/m@v2"]),
        (["same", "same"], ["same", "same"]),
        (["sft", "me/sft"], ["sft", "me/sft"]),
        ([f"a/base+{CACHE}", "a/base+you/sft"], ["me/sft", "you/sft"]),
        ([f"{CACHE}/checkpoint-5", f"{CACHE}/checkpoint-10"], ["checkpoint-5", "checkpoint-10"]),
        (["/"], ["/"]),
        ([], []),
    ],
)
def test_labels_are_the_shortest_that_differ(refs: list[str], labels: list[str]) -> None:
    assert labels_of(refs) == labels


def test_a_snapshot_has_the_name_of_its_repository() -> None:
    assert label_of(CACHE) == "sft"
    assert label_of(CACHE.replace("--me--sft", "--gpt2")) == "gpt2"
