"""The spaces of adapters (Core Space, KnOTS, Compress then Merge) against plain float64 forms of the published formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from paft_merge.lowrank.core_space import Space, core_of
from paft_merge.lowrank.ctm import compressed_of
from paft_merge.lowrank.knots import knots_of
from paft_merge.methods import METHODS, iso_c, ties, tsv
from paft_merge.methods.rules.thresholds import kept_count

Matrix = NDArray[np.float64]
Pairs = list[tuple[Matrix, Matrix]]
Merge = Callable[[Sequence[Matrix]], Matrix]


def drawn(*ranks: int, shape: tuple[int, int] = (40, 56), seed: int = 0) -> Pairs:
    """Adapters with singular values of different sizes."""
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((shape[0], r)) * np.linspace(1, 3, r), rng.standard_normal((r, shape[1])) * (1 + i))
        for i, r in enumerate(ranks)
    ]


def deltas(pairs: Pairs) -> list[Matrix]:
    return [b @ a for b, a in pairs]


def merged(space: Space, merge: Merge) -> Matrix:
    """The merged delta, in float64."""
    made = space.left @ merge(space.coordinates)
    return made if space.right is None else made @ space.right


# --- the published formulas, in float64 ------------------------------------------------------------------------------


def summed(matrices: Sequence[Matrix]) -> Matrix:
    return np.sum(matrices, axis=0)  # type: ignore[no-any-return]


def ties_of(density: float) -> Merge:
    """Trim each, elect by the sum, mean of what agrees (the TIES paper, within one tensor)."""

    def merge(matrices: Sequence[Matrix]) -> Matrix:
        stack = np.stack(matrices)
        for one in stack:
            flat = np.abs(one).ravel()
            one[np.abs(one) < np.sort(flat)[flat.size - kept_count(flat.size, density)]] = 0.0
        agree = np.sign(stack) == np.sign(stack.sum(0))
        return np.where(agree, stack, 0.0).sum(0) / np.maximum(agree.sum(0), 1)  # type: ignore[no-any-return]

    return merge


def iso_of(matrices: Sequence[Matrix]) -> Matrix:
    u, s, vt = np.linalg.svd(summed(matrices), full_matrices=False)
    return s.mean() * u @ vt  # type: ignore[no-any-return]


def tsv_of(matrices: Sequence[Matrix]) -> Matrix:
    each = min(matrices[0].shape) // len(matrices)
    parts = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    u = np.hstack([u[:, :each] for u, _, _ in parts])
    v = np.vstack([vt[:each] for _, _, vt in parts])
    pu, _, qu = np.linalg.svd(u, full_matrices=False)
    pv, _, qv = np.linalg.svd(v, full_matrices=False)
    return pu @ qu @ np.diag(np.concatenate([s[:each] for _, s, _ in parts])) @ pv @ qv  # type: ignore[no-any-return]


def published_core(pairs: Pairs, merge: Merge) -> Matrix:
    """`U_B merge(U_B^T B_i A_i V_A) V_A^T` with bases from the singular value decompositions of the stacks."""
    u = np.linalg.svd(np.hstack([b for b, _ in pairs]), full_matrices=False)[0]
    vt = np.linalg.svd(np.vstack([a for _, a in pairs]), full_matrices=False)[2]
    return u @ merge([u.T @ b @ a @ vt.T for b, a in pairs]) @ vt


def published_knots(pairs: Pairs, merge: Merge) -> Matrix:
    """`U merge(S V_i)` of the dense decomposition `[D_1 ... D_n] = U S [V_1 ... V_n]`."""
    u, s, vt = np.linalg.svd(np.hstack(deltas(pairs)), full_matrices=False)
    u, s, vt = u[:, s > 1e-5], s[s > 1e-5], vt[s > 1e-5]
    return u @ merge(np.split(s[:, None] * vt, len(pairs), axis=1))


def published_ctm(pairs: Pairs, rank: int, merge: Merge) -> Matrix:
    """Two-mode Tucker decomposition of the dense deltas, each divided by its norm, by alternating decompositions."""
    scaled = [d / np.linalg.norm(d) for d in deltas(pairs)]
    v = np.linalg.svd(np.vstack(scaled), full_matrices=False)[2][:rank].T
    u, errors = np.zeros((0, 0)), [2.0, 1.0]
    while abs(errors[-2] - errors[-1]) >= 1e-6:
        u = np.linalg.svd(np.hstack([d @ v for d in scaled]), full_matrices=False)[0][:, :rank]
        v = np.linalg.svd(np.hstack([d.T @ u for d in scaled]), full_matrices=False)[0][:, :rank]
        kept = sum(np.linalg.norm(u.T @ d @ v) ** 2 for d in scaled)
        errors.append(float(np.sqrt((len(scaled) - kept) / len(scaled))))
    return u @ merge([u.T @ d @ v for d in deltas(pairs)]) @ v.T


# --- the spaces ------------------------------------------------------------------------------------------------------

SPACES: dict[str, tuple[Callable[[Pairs], Space], Callable[[Pairs, Merge], Matrix]]] = {
    "core": (core_of, published_core),
    "knots": (knots_of, published_knots),
    "ctm": (lambda pairs: compressed_of(pairs, 5), lambda pairs, merge: published_ctm(pairs, 5, merge)),
}


@pytest.mark.parametrize("merge", [summed, ties_of(0.3), iso_of, tsv_of], ids=["sum", "ties", "iso_c", "tsv"])
@pytest.mark.parametrize("space", SPACES)
def test_a_merge_in_a_space_is_that_of_the_published_formula(space: str, merge: Merge) -> None:
    ours, theirs = SPACES[space]
    pairs = drawn(4, 4, 4)
    np.testing.assert_allclose(merged(ours(pairs), merge), theirs(pairs, merge), rtol=0, atol=1e-8)


@pytest.mark.parametrize("space", [core_of, knots_of, lambda pairs: compressed_of(pairs, 99)])
@pytest.mark.parametrize(
    "pairs",
    [drawn(3, 5), drawn(4), drawn(6, 2, 1), drawn(3, 3, shape=(4, 50)), drawn(3, 3, shape=(50, 4)), drawn(2) * 2],
    ids=["ranks", "one", "three", "flat", "tall", "equal"],
)
def test_coordinates_give_every_delta_back(space: Callable[[Pairs], Space], pairs: Pairs) -> None:
    found = space(pairs)
    assert found.left.shape[1] <= min(sum(b.shape[1] for b, _ in pairs), pairs[0][0].shape[0])
    for i, delta in enumerate(deltas(pairs)):
        np.testing.assert_allclose(merged(found, lambda all_, i=i: all_[i]), delta, rtol=0, atol=1e-10)


def test_what_the_factors_do_not_span_is_left_out() -> None:
    (b, a), other = drawn(3, 4)
    zero = np.zeros_like(b)
    spaces = {
        "equal": core_of([(b, a), (b, a)]),
        "shared A": core_of([(b, a), (other[0][:, :3], a)]),
        "untrained": core_of([(b, a), (zero, other[1][:3])]),
        "nothing": core_of([(zero, a)]),
    }
    assert {name: one.coordinates[0].shape for name, one in spaces.items()} == {
        "equal": (3, 3), "shared A": (6, 3), "untrained": (3, 3), "nothing": (0, 0),
    }  # fmt: skip
    assert not spaces["untrained"].coordinates[1].any()
    for name in (knots_of, lambda pairs: compressed_of(pairs, 2)):
        assert not merged(name([(zero, a), (zero, a)]), summed).any()


def test_a_product_of_zeros_has_no_say_in_the_compressed_space() -> None:
    pairs = drawn(3, 3)
    zeros = (pairs[0][0], np.zeros_like(pairs[0][1]))
    with_zeros = merged(compressed_of([*pairs, zeros], 3), summed)
    np.testing.assert_allclose(with_zeros, merged(compressed_of(pairs, 3), summed), atol=1e-12)


def test_the_compressed_space_counts_every_source_alike() -> None:
    """A source a thousand times smaller keeps its share of the subspace, unlike in a truncation of the sum."""
    (b, a), (c, d) = drawn(2, 2)
    small = (b * 1e-3, a)

    def share(space: Space) -> float:
        return float(np.linalg.norm(merged(space, lambda all_: all_[0])) / np.linalg.norm(b @ a * 1e-3))

    assert share(compressed_of([small, (c, d)], 2)) > 0.3
    cut = np.linalg.svd(small[0] @ small[1] + c @ d)[0][:, :2]
    assert np.linalg.norm(cut.T @ b @ a) / np.linalg.norm(b @ a) < 0.3


def test_directions_under_the_authors_threshold_are_kept() -> None:
    """Deltas of 1e-9 have singular values under the 1e-5 that the authors of KnOTS cut at."""
    pairs = [(b * 1e-9, a) for b, a in drawn(3, 3)]
    assert not published_knots(pairs, summed).any()
    np.testing.assert_allclose(merged(knots_of(pairs), summed), sum(deltas(pairs)), rtol=0, atol=1e-19)


@pytest.mark.parametrize("space", SPACES)
def test_factors_of_merged_coordinates_are_the_best_of_their_rank(space: str) -> None:
    found = SPACES[space][0](drawn(4, 4, 4))
    whole, coordinates = merged(found, summed), summed(found.coordinates)
    values = np.linalg.svd(whole, compute_uv=False)
    for rank, energy, kept in ((None, None, found.left.shape[1]), (3, None, 3), (None, 0.8, None)):
        low = found.truncated(coordinates, rank, energy)
        kept = low.left.shape[1] if kept is None else kept
        assert low.left.shape == (40, kept)
        assert low.right.shape == (kept, 56)
        assert low.norm == pytest.approx(np.linalg.norm(whole), rel=1e-6)
        assert low.error == pytest.approx(np.linalg.norm(values[kept:]), rel=1e-5, abs=1e-6 * low.norm)
        assert np.linalg.norm(whole - low.left @ low.right) == pytest.approx(low.error, rel=1e-4, abs=1e-6 * low.norm)
    nothing = core_of([(np.zeros((4, 2)), np.zeros((2, 5)))])
    assert nothing.truncated(summed(nothing.coordinates), None).left.shape == (4, 0)


# --- the methods -----------------------------------------------------------------------------------------------------


def in_memory(method: Callable[..., torch.Tensor], **keywords: Any) -> Merge:
    return lambda matrices: method([torch.from_numpy(m) for m in matrices], **keywords).double().numpy()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (in_memory(ties, weight=1.0, density=0.3, elect="unweighted", normalize="count"), ties_of(0.3)),
        (in_memory(tsv), tsv_of),
        (in_memory(iso_c), iso_of),
    ],
    ids=["ties", "tsv", "iso_c"],
)
def test_the_methods_in_the_core_space_give_the_published_numbers(ours: Merge, theirs: Merge) -> None:
    pairs = drawn(4, 4, 4, seed=3)
    expected = published_core(pairs, theirs)
    found = merged(core_of(pairs), ours)
    assert np.linalg.norm(found - expected) < 2e-6 * np.linalg.norm(expected)


def test_weights_scale_the_singular_values_and_the_sum() -> None:
    a, b = (torch.from_numpy(m) for m in deltas(drawn(2, 2, shape=(4, 4))))
    torch.testing.assert_close(tsv([a, b], [1.0, 0.0]), a.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tsv([a, b], [-2.0, 0.0], lambda_=0.5), -a.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(iso_c([a, b], [0.5, 2.0]), iso_c([0.5 * a, 2 * b]), rtol=1e-5, atol=1e-5)


def test_deltas_of_different_ranks_keep_all_vectors_that_have_room() -> None:
    """The authors' equal split of 6 would cut the first delta to 3 and draw two arbitrary vectors for the second."""
    rng = np.random.default_rng(1)
    q, p = (np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(2))
    parts = [q[:, :5] @ np.diag([5.0, 4, 3, 2, 1]) @ p[:, :5].T, 2 * np.outer(q[:, 5], p[:, 5])]
    merged = tsv([torch.from_numpy(m) for m in parts]).numpy()
    np.testing.assert_allclose(merged, sum(parts), atol=1e-5)  # orthogonal already, and all of it is kept


def test_iso_c_leaves_out_directions_that_cancel() -> None:
    rng = np.random.default_rng(2)
    q, p = (np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(2))
    shared, one, two = (np.outer(q[:, i], p[:, i]) for i in range(3))
    merged = iso_c([torch.from_numpy(4 * one + shared), torch.from_numpy(2 * two - shared)]).numpy()
    np.testing.assert_allclose(merged, 3 * (one + two), atol=1e-5)
    assert not iso_c([torch.from_numpy(one), torch.from_numpy(-one)]).any()


def test_methods_of_singular_vectors_are_marked() -> None:
    assert {name for name, method in METHODS.items() if method.core_only} == {"tsv", "iso_c"}
