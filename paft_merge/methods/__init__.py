"""The merge methods, and METHODS, the table of them.

Each method is also a function on plain tensors (`ties(deltas, ...)`) that runs the code of a merge on one tensor.

| module | contents |
|---|---|
| parameters | parameters and methods as recipes see them |
| weighted_sums | linear, passthrough, task arithmetic |
| ties_family | trim, elect a sign, merge what agrees |
| pruning | drop entries by size, rank or chance, and add up |
| spherical | directions and lengths |
| singular_vectors | singular vectors of adapters in their core space |
| elementwise | entry by entry: nearness, overlap, variance, magnitude, competition |
| mergekit_methods | mergekit's methods without a streaming form |
| in_memory | run a method on tensors in memory |
| rules | the computation of each method, block by block |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from paft_merge.methods import (
    elementwise,
    mergekit_methods,
    pruning,
    singular_vectors,
    spherical,
    ties_family,
    weighted_sums,
)
from paft_merge.methods.elementwise import magmax, nearswap, pcb, ram, ramplus_tl, sce
from paft_merge.methods.mergekit_methods import arcee_fusion
from paft_merge.methods.parameters import REQUIRED, Method, Parameter
from paft_merge.methods.pruning import breadcrumbs, breadcrumbs_ties, dare_linear, dare_ties, della, della_linear
from paft_merge.methods.singular_vectors import iso_c, tsv
from paft_merge.methods.spherical import geometric_median, karcher, model_stock, multislerp, nuslerp, slerp
from paft_merge.methods.ties_family import l1_ties, sign_election, ties
from paft_merge.methods.weighted_sums import linear, passthrough, task_arithmetic

__all__ = [
    "METHODS",
    "REQUIRED",
    "Method",
    "Parameter",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "geometric_median",
    "iso_c",
    "karcher",
    "l1_ties",
    "linear",
    "magmax",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "pcb",
    "ram",
    "ramplus_tl",
    "sce",
    "sign_election",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv",
]

METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for module in (weighted_sums, ties_family, pruning, spherical, elementwise, singular_vectors, mergekit_methods)
    for method in module.TABLE
}
"""Every method by its recipe name."""
