"""Copies to and from a device, with buffers that are used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from paft_merge.compute.staging import Staging


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


def test_what_was_copied_does_not_change_with_the_buffers(device: torch.device) -> None:
    staging, memory = Staging(device), np.empty((3, 70_001), np.float32)
    sent = []
    for i in range(5):
        memory[:] = i
        sent.append(staging.to_device(memory[:, : 70_001 - i].copy()))
        memory[:] = -1
    for i, tensor in enumerate(sent):
        assert tensor.device.type == device.type
        assert tensor.shape == (3, 70_001 - i)
        assert (tensor == i).all()


def test_several_results_come_together_and_two_copies_are_valid(device: torch.device) -> None:
    staging = Staging(device)
    given = [
        torch.arange(n, device=device).to(kind)
        for n, kind in ((5, torch.int16), (0, torch.float32), (9, torch.float64))
    ]
    found = staging.to_host(*given, given[0].sum())
    again = staging.to_host(given[2] + 1)
    for tensor, array in zip(given, found, strict=False):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
    assert found[3] == 10
    np.testing.assert_array_equal(again[0], np.arange(9) + 1)


def test_threads_have_buffers_of_their_own(device: torch.device) -> None:
    staging, size = Staging(device), 300_000

    def twice(i: int) -> bool:
        values = np.full(size, i, np.int32)
        doubled = staging.to_device(values) * 2
        values[:] = -1
        return bool((staging.to_host(doubled)[0] == 2 * i).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(twice, range(200)))
