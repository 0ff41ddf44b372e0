"""KnOTS: methods on the right factors of deltas that share their left singular vectors (Stoica et al. 2025, arXiv:2410.19735).

One singular value decomposition [D_1 ... D_n] = U S [V_1 ... V_n] aligns the sources: D_i = U (S V_i). The method merges the
S V_i `[K, I]`, as the authors' code does (the paper writes V_i); then U times the result has rank K <= sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paft_merge.lowrank.core_space import NULL, Space, cores
from paft_merge.lowrank.factors import Pair


def knots_of(pairs: Sequence[Pair]) -> Space:
    """The deltas `pairs` as coordinates S V_i, from their factors: U is the core space's basis times the vectors of the cores.

    Singular values up to 1e-13 of the largest are left out. The authors leave out those up to 1e-5, however small the largest is.
    """
    left, coordinates, right = cores(pairs)
    if left.shape[1]:
        u, s, _ = np.linalg.svd(np.concatenate(coordinates, axis=1), full_matrices=False)
        u = u[:, s > NULL * s[0]]
        left, coordinates = left @ u, [u.T @ one for one in coordinates]
    return Space(left, [one @ right for one in coordinates], None)
