"""How the error of an adapter falls with its rank: every rank from one look at the deltas, as a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paft_merge.compute.cores import available_cores
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.engine.api import open_plan
from paft_merge.engine.factors import Factorization
from paft_merge.engine.options import MergeOptions
from paft_merge.errors import AuditError
from paft_merge.lowrank.factors import Matrix, rank_for
from paft_merge.output.report_files import check_file, write_file
from paft_merge.plan import PlannedTensor
from paft_merge.stats.spectrum import on_one_core

ENERGIES = (0.9, 0.95, 0.99)
_KINDS = 8
"""Lines of single kinds of modules in the plot."""


class Spectrum(NamedTuple):
    """The largest singular values of one delta."""

    norm: float
    """||D||_F."""
    singular: Matrix
    """Largest first, at most the largest rank that was asked for."""
    sides: int
    """Rows plus columns: parameters of an adapter for each unit of rank."""


class Needed(NamedTuple):
    """The ranks that keep a share of each delta's squared norm; None if some delta needs a larger rank than was measured."""

    energy: float
    largest: int | None
    mean: float | None


@dataclass(frozen=True)
class RankCurve:
    """The error of the best approximation at every rank up to `ranks[-1]`.

    Attributes:
        ranks: the ranks of the table.
        modules: the spectrum of each module's delta.
    """

    ranks: Sequence[int]
    modules: Mapping[str, Spectrum]

    def error(self, rank: int, modules: Sequence[str] | None = None) -> float:
        """||D - B A||_F of all modules, or of some, relative to ||D||_F; 0 for deltas of zero."""
        chosen = [self.modules[name] for name in (self.modules if modules is None else modules)]
        norm = math.fsum(one.norm**2 for one in chosen)
        kept = math.fsum(float(np.square(one.singular[:rank]).sum()) for one in chosen)
        return math.sqrt(max(0.0, 1 - kept / norm)) if norm else 0.0

    def parameters(self, rank: int) -> int:
        """Entries of the factors of an adapter with one rank for all modules."""
        return rank * sum(one.sides for one in self.modules.values())

    def needed(self, energy: float) -> Needed:
        """The ranks that keep `energy`."""
        ranks = [rank_for(one.singular, one.norm, energy) for one in self.modules.values()]
        for rank, one in zip(ranks, self.modules.values(), strict=True):
            if float(np.square(one.singular[:rank]).sum()) < energy * one.norm**2 * (1 - 1e-6):
                return Needed(energy, None, None)
        return Needed(energy, max(ranks, default=0), sum(ranks) / max(1, len(ranks)))

    def kinds(self) -> dict[str, list[str]]:
        """Names of modules by their last part, such as `q_proj`."""
        found = dict[str, list[str]]()
        for name in self.modules:
            found.setdefault(name.rpartition(".")[2], []).append(name)
        return found

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON."""
        return {
            "ranks": [
                {"rank": r, "relative_error": self.error(r), "parameters": self.parameters(r)} for r in self.ranks
            ],
            "energies": [self.needed(energy)._asdict() for energy in ENERGIES],
            "modules": {n: {"norm": s.norm, "singular": s.singular.tolist()} for n, s in self.modules.items()},
        }


def rank_curve(recipe: Mapping[str, Any], max_rank: int, options: MergeOptions | None = None) -> RankCurve:
    """Measure the spectra of all merged deltas of a recipe, as an adapter of rank `max_rank` would be made.

    Args:
        recipe: as for `merge`, with `output` of `kind: adapter`.
        max_rank: the largest rank of the curve.
        options: see `MergeOptions`.
    """
    asked = options or MergeOptions()
    output = {name: value for name, value in recipe["output"].items() if name not in ("energy", "max_rank")}
    threads = asked.threads or available_cores()
    with open_plan({**recipe, "output": {**output, "rank": max_rank}}, asked) as plan:
        if asked.warn and plan.warnings:
            asked.warn(plan.warnings)
        factors = [tensor for tensor in plan.tensors if tensor.factor and tensor.factor.part == "B"]
        with on_one_core(), ThreadPoolExecutor(threads) as blocks, ThreadPoolExecutor(threads) as tensors:
            made = Factorization(plan.recipe, blocks, CpuOps(), factors)

            def measured(tensor: PlannedTensor) -> tuple[str, Spectrum]:
                low = made.factors_of(tensor).low
                assert tensor.factor is not None
                sides = tensor.factor.experts * sum(tensor.factor.matrix)
                return tensor.factor.module, Spectrum(low.norm, low.singular[:max_rank].copy(), sides)

            found = dict(tensors.map(measured, factors))
    most = min(max_rank, max((len(one.singular) for one in found.values()), default=1))
    return RankCurve(sorted({*(2**i for i in range(most.bit_length())), max(1, most)}), found)


def check_plot(place: Path) -> None:
    """Raise AuditError if a plot cannot be drawn into a file of this name."""
    if find_spec("matplotlib") is None:
        raise AuditError.of(
            "MISSING", place, "matplotlib is not installed", "pip install 'paft-merge[plots]', or leave --plot out"
        )
    if place.suffix not in (".svg", ".png", ".pdf"):
        raise AuditError.of("OUTPUT", place, "is not an .svg, .png or .pdf", "write a file name like curve.svg")
    check_file(place)


def plot(curve: RankCurve, place: Path) -> None:
    """Draw relative error over rank: all modules, and the kinds of modules with the largest deltas."""
    check_plot(place)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "paft", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        panel = figure.subplots()
        ranks = range(1, curve.ranks[-1] + 1)
        weight = {kind: math.hypot(*(curve.modules[n].norm for n in names)) for kind, names in curve.kinds().items()}
        for kind, names in sorted(curve.kinds().items(), key=lambda item: -weight[item[0]])[:_KINDS]:
            panel.plot(ranks, [curve.error(r, names) for r in ranks], linewidth=1, alpha=0.8, label=kind)
        panel.plot(ranks, [curve.error(r) for r in ranks], color="black", linewidth=2, label="all modules")
        panel.set_xscale("log", base=2)
        panel.set_xticks(curve.ranks, [str(r) for r in curve.ranks])
        panel.set(xlabel="rank", ylabel="relative error of the deltas", ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", ncols=2)
        drawn = BytesIO()
        dates = {"Date": None, "Creator": None} if place.suffix == ".svg" else None
        figure.savefig(drawn, format=place.suffix[1:], metadata=dates)
    write_file(place, drawn.getvalue())
