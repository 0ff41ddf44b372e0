"""Which device a process gets."""

from __future__ import annotations

import pytest
import torch

from paft_merge.compute import torch_ops
from paft_merge.compute.devices import ops_for
from paft_merge.errors import MergeError


@pytest.mark.parametrize(
    ("asked", "process", "given"),
    [
        ("cuda", None, "cuda"),
        ("cuda", 1, "cuda:1"),
        ("cuda", 3, "cuda:1"),  # more processes than GPUs, or each process sees its own GPU only
        ("cuda:0", 3, "cuda:0"),
    ],
)
def test_processes_get_the_visible_gpus_in_turn(
    asked: str, process: int | None, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch_ops, "TorchOps", lambda device: device)
    assert ops_for(asked, process) == torch.device(given)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MergeError, match="cuda:2: CUDA device not found"):
        ops_for("cuda:2", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MergeError, match="cuda: CUDA device not found"):
        ops_for("cuda", 5)
