"""The constants of magnitudes and of SplitMix64, against their definitions."""

from __future__ import annotations

import numpy as np
import torch

from paft_merge.compute import kernels
from paft_merge.compute.exponentials import CENTRE, exponential
from paft_merge.compute.magnitudes import EPSILONS, INFINITY, MAGNITUDE
from paft_merge.compute.splitmix64 import numbers
from paft_merge.compute.torch_ops import TorchOps


def test_masks_are_those_of_float32() -> None:
    assert np.float32(np.inf).view(np.uint32) == INFINITY
    assert np.uint32(MAGNITUDE) & np.float32(-1.5).view(np.uint32) == np.float32(1.5).view(np.uint32)


def test_columns_of_a_tally_keep_their_names() -> None:
    assert kernels.COUNTS[1:5] == ("below_1e-06", "below_1e-05", "below_1e-04", "below_1e-03")
    assert EPSILONS == (1e-6, 1e-5, 1e-4, 1e-3)


def test_exponentials_are_exact_to_the_last_bits() -> None:
    values = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(exponential(values), np.exp(values - CENTRE), rtol=2e-15)


def test_numbers_are_those_of_the_published_generator() -> None:
    """The first numbers of seed 1234567, from the reference implementation (prng.di.unimi.it/splitmix64.c)."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert numbers(1234567, 0, 5).tolist() == expected
    assert numbers(1234567, 2, 3).tolist() == expected[2:]


def test_kernels_and_torch_draw_the_numbers_of_the_reference() -> None:
    """A random drop keeps an entry where the upper 32 bits of its number are below `keep`."""
    key, index, size, keep = 2**63 + 5, 77, 5000, 1 << 31
    expected = (numbers(key, index, size) >> np.uint64(32)) < keep
    sources, sums = np.ones((1, size), np.float32).view(np.uint32), np.empty((1, 2))
    for i in range(0, size, 1000):
        kernels.dropped_norms(
            np.empty(0, np.uint32), np.ascontiguousarray(sources[:, i : i + 1000]), False, np.empty(0, np.int64), index + i,
            np.array([keep], np.uint64), np.array([key], np.uint64), False, sums, kernels.lines(2), kernels.lines(2, of=np.float64),
        )  # fmt: skip
        assert sums[0, 1] == expected[i : i + 1000].sum()
    drawn = TorchOps(torch.device("cpu"))._hash(key, index, size).numpy().view(np.uint64)
    np.testing.assert_array_equal(drawn, numbers(key, index, size))
