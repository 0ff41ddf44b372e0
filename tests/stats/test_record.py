"""What a merge notes of its deltas is what an audit measures of them: exactly where it takes all entries, closely where it samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.merge import files_of, manifest_of

from paft_merge.auditing import Audit, audit
from paft_merge.auditing.from_manifest import recorded
from paft_merge.cli import cli
from paft_merge.compute import blocks
from paft_merge.compute.blocks import Block
from paft_merge.engine.api import merge
from paft_merge.stats import sample
from paft_merge.stats.pairs import PairMeasure
from paft_merge.stats.record import note
from paft_merge.stats.sample import Sample, stride_of
from paft_merge.stats.spectrum import Factored

Family = dict[str, Path]


@pytest.fixture
def sources(tmp_path: Path) -> Family:
    """A base, two adapters and a fine-tune, whose largest tensors have 256 x 128 entries."""
    state = random_state(0, torch.bfloat16, width=128)
    return {
        "base": save_checkpoint(tmp_path / "base", state),
        "sft": save_adapter(tmp_path / "sft", state, 3, size=3e-3),
        "dpo": save_adapter(tmp_path / "dpo", state, 4, rank=2, size=1e-3),
        "tuned": save_checkpoint(tmp_path / "tuned", near(state, 5, 1e-4)),
    }


def recipe(made: Family, method: str = "ties") -> dict[str, Any]:
    refs = [f"{made['base']}+{made['sft']}", f"{made['base']}+{made['dpo']}", str(made["tuned"])]
    given = {"weight": 0.5, "density": 0.3}
    return {"merge_method": method, "base_model": str(made["base"]), "models": [{"model": r, "parameters": given} for r in refs]}  # fmt: skip


def both(made: Family, out: Path) -> tuple[Audit, Audit]:
    """What a merge recorded, and what an audit of its sources says."""
    found = recorded(manifest_of(merge(recipe(made), out)))
    assert found is not None
    return found, audit(made["sft"], made["dpo"], made["tuned"], base=made["base"], preview={"method": "ties", "density": 0.3})  # fmt: skip


def bits(values: Any) -> Any:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def test_small_tensors_are_sampled_whole_so_that_a_merge_records_what_an_audit_measures(
    sources: Family, tmp_path: Path
) -> None:
    ours, theirs = both(sources, tmp_path / "out")

    assert ours.sampled == 1.0
    assert theirs.sampled is None
    for one, other in zip(ours.sources, theirs.sources, strict=True):
        assert (one.label, one.header.kind) == (other.label, other.header.kind)
        for a, b in zip(one.tensors, other.tensors, strict=True):
            assert (a.name, a.layer, a.module, a.kind, a.shape) == (b.name, b.layer, b.module, b.kind, b.shape)
            assert (a.measure.zeros, a.measure.below, a.measure.erased) == (b.measure.zeros, b.measure.below, b.measure.erased)  # fmt: skip
            for name in ("l1", "norm", "largest", "hoyer", "participation", "relative_norm"):
                assert getattr(a.measure, name) == pytest.approx(getattr(b.measure, name), rel=1e-6), name
            for share in (0.01, 0.05, 0.1, 0.2, 0.5):
                assert a.measure.top_energy(share) == pytest.approx(b.measure.top_energy(share), abs=0.02)
            assert (a.spectrum is None, a.factors) == (b.spectrum is None, b.factors)
            if a.spectrum and b.spectrum:
                assert a.spectrum.values == pytest.approx(b.spectrum.values, rel=2e-5)
        assert one.total.measure.top_energy(0.2) == pytest.approx(other.total.measure.top_energy(0.2), abs=0.005)
    for left, right in zip(ours.pairs, theirs.pairs, strict=True):
        assert (left.left, left.right) == (right.left, right.right)
        for x, y in zip(left.tensors, right.tensors, strict=True):
            for name in ("both", "conflicts", "above", "above_conflicts"):
                assert getattr(x.measure, name) == getattr(y.measure, name)
            for name in ("cosine", "conflict_weighted", "size_ratio"):
                assert getattr(x.measure, name) == pytest.approx(getattr(y.measure, name), rel=1e-5, abs=1e-8, nan_ok=True)  # fmt: skip
            assert x.subspace == (pytest.approx(y.subspace, rel=1e-4) if y.subspace else None)
    assert ours.preview is not None
    assert theirs.preview is not None
    for label in ("sft", "dpo", "tuned"):
        one, other = ours.preview.of(label), theirs.preview.of(label)
        assert (one.kept, one.elected) == (other.kept, other.elected)
        assert one.elected_energy == pytest.approx(other.elected_energy, rel=1e-6)


def test_large_tensors_are_sampled_closely(sources: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "WHOLE", 1 << 12)
    ours, theirs = both(sources, tmp_path / "out")

    assert ours.sampled is not None
    assert 0.1 < ours.sampled < 0.3
    for one, other in zip(ours.sources, theirs.sources, strict=True):
        a, b = one.total.measure, other.total.measure
        assert (a.zeros, a.below, a.largest) == (b.zeros, b.below, b.largest)
        assert a.hoyer == pytest.approx(b.hoyer, rel=1e-6)
        assert a.bf16_sparsity == pytest.approx(b.bf16_sparsity, abs=0.01)
        assert a.participation == pytest.approx(b.participation, rel=0.15)
        assert a.top_energy(0.2) == pytest.approx(b.top_energy(0.2), abs=0.02)
        assert a.relative_norm == pytest.approx(b.relative_norm, rel=0.02)
    for left, right in zip(ours.pairs, theirs.pairs, strict=True):
        x, y = left.total, right.total
        assert x.conflict == pytest.approx(y.conflict, abs=0.01)
        assert x.conflict_weighted == pytest.approx(y.conflict_weighted, abs=0.01)
        # The largest are those above a bin's edge, where every entry of a fine-tune's lattice lies in few bins.
        assert x.overlap / x.overlap_chance == pytest.approx(y.overlap / y.overlap_chance, abs=0.1)
    assert ours.pairs[0].total.cosine == pytest.approx(theirs.pairs[0].total.cosine, rel=1e-5)  # from the factors


def test_totals_say_what_the_tensors_say_together(sources: Family, tmp_path: Path) -> None:
    manifest = manifest_of(merge(recipe(sources), tmp_path / "out"))
    found = recorded(manifest)
    assert found is not None
    for row, source in zip(manifest["totals"], found.sources, strict=True):
        measure = source.total.measure
        for name in ("bf16_sparsity", "participation", "relative_norm", "hoyer"):
            assert row[name] == pytest.approx(getattr(measure, name), rel=1e-5), name
        assert row["top_energy"]["0.2"] == pytest.approx(measure.top_energy(0.2), rel=1e-5)
        assert sum(row["magnitudes"]["share"]) == pytest.approx(1 - measure.zero_share, abs=1e-3)
        assert row["sampled"] == measure.entries
    for row, pair in zip(manifest["pairs"], found.pairs, strict=True):
        for name in ("cosine", "conflict", "overlap", "size_ratio"):
            assert row[name] == pytest.approx(getattr(pair.total, name), rel=1e-5), name


@pytest.mark.parametrize("method", ["ties", "l1_ties", "dare_ties", "task_arithmetic", "model_stock", "breadcrumbs"])
def test_threads_and_memory_change_nothing_in_a_manifest(method: str, sources: Family, tmp_path: Path) -> None:
    asked = recipe(sources, method)
    if method in ("l1_ties", "model_stock"):
        asked["models"] = [{"model": m["model"], "parameters": {"weight": 0.5} if method == "l1_ties" else {}} for m in asked["models"]]  # fmt: skip
    first = files_of(merge(asked, tmp_path / "one", threads=1))["merge_manifest.json"]
    assert files_of(merge(asked, tmp_path / "two", threads=3))["merge_manifest.json"] == first
    assert json.loads(first)["tensors"]["model.layers.0.self_attn.q_proj.weight"]["sampled"]


def test_a_sample_does_not_depend_on_blocks_and_is_spread_over_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "WHOLE", 1 << 10)
    values = np.arange(1 << 16, dtype=np.float32)
    taken = []
    for step in (1 << 16, 1000, 64, 12_345):
        one = Sample(values.size)
        for start in reversed(range(0, values.size, step)):
            part = bits(values[start : start + step])
            one.take(Block(start, part, np.stack([part]), subtract=False))
        taken.append(np.stack([one.row(0), one.row(-1)]).view(np.float32))
    assert all(np.array_equal(rows, taken[0]) for rows in taken)
    rows = taken[0]
    assert rows.shape == (2, values.size // one.stride)
    assert np.array_equal(rows[0], rows[1])
    assert len(np.unique(rows[0])) == rows.shape[1]
    phases = np.unique(rows[0] // sample.RUN % one.stride)
    assert len(phases) > 10  # of 16 runs: not the same columns of every row
    assert [stride_of(n) for n in (0, 1, 2_047, 2_048, 1 << 16, 1 << 30)] == [1, 1, 1, 2, 64, 256]


def test_a_sample_of_stored_values_holds_their_deltas() -> None:
    base, values = np.float32([1, 2, 3]), np.float32([1.5, 2, -3])
    one = Sample(3)
    stored = [(bits(v) >> 16).astype(np.uint16) for v in (base, values)]
    one.take(Block(0, stored[0], stored[1][None], subtract=True))
    assert [one.row(i).view(np.float32).tolist() for i in (0, -1)] == [[0.5, 0, -6], [1, 2, 3]]


@pytest.mark.parametrize(("dtype", "digits"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_factors_tell_what_their_product_does(dtype: type[Any], digits: float) -> None:
    made = np.random.default_rng(0)
    pairs = [(made.normal(size=(130, r)).astype(np.float32), made.normal(size=(r, 70)).astype(np.float32)) for r in (5, 66)]  # fmt: skip
    dense = [b.astype(float) @ a.astype(float) for b, a in pairs]
    one, other = (Factored.of(b, a, dtype) for b, a in pairs)
    for held, delta in zip((one, other), dense, strict=True):
        values = np.linalg.svd(delta, compute_uv=False)[: len(held.spectrum.values)]
        assert held.spectrum.values == pytest.approx(values, abs=digits * 10 * values[0])
    (u1, _, v1), (u2, _, v2) = (np.linalg.svd(d) for d in dense)
    dot, (left, right) = one.relate(other)
    assert dot == pytest.approx((dense[0] * dense[1]).sum(), rel=100 * digits)
    assert left == pytest.approx(np.square(u1[:, :5].T @ u2[:, :66]).sum() / 5, abs=1e-4)
    assert right == pytest.approx(np.square(v1[:5] @ v2[:66].T).sum() / 5, abs=1e-4)


def test_a_delta_of_zero_and_one_that_is_not_finite_are_noted_as_that() -> None:
    one = Sample(4)
    one.take(Block(0, bits(np.ones(4)), np.zeros((1, 4), np.uint32), subtract=False))
    b, a = np.zeros((2, 1), np.float32), np.ones((1, 2), np.float32)
    (row,) = note(one, [0.0], [(b, a)])["sources"]
    assert (row["erased"], row["square"], row["singular_values"]) == (4, 0.0, [0.0])
    assert row["factors"]["zero_components"] == 1
    assert note(one, [np.inf], [None]) == {}


def test_a_pair_turned_round_is_the_other_way_round() -> None:
    pair = PairMeasure(4, 3, 2, 1, 1, 0.5, 4.0, 9.0, 1.0, 0.5, 0.1, 0.2)
    assert pair.turned.conflict_energy == pair.conflict_energy[::-1]
    assert pair.turned.turned == pair
    assert replace(pair.turned, left_square=4.0).left_square == 4.0


def test_a_finished_merge_shows_what_it_measured_everywhere(sources: Family, tmp_path: Path) -> None:
    out = merge(recipe(sources), tmp_path / "out")
    html, table = tmp_path / "r.html", tmp_path / "r.csv"
    shown = CliRunner().invoke(cli, ["audit", str(out), "--html", str(html), "--csv", str(table), "--require", "kept <= 0.31"])  # fmt: skip
    assert shown.exit_code == 0, shown.output
    for text in ("against each other", "what ties kept", "estimated from", "all as the merge wrote"):
        assert text in " ".join(shown.stdout.split()), text
    assert "estimated from 100.0% of the entries" in html.read_text()
    assert len(table.read_text().splitlines()) > 30
    failed = CliRunner().invoke(cli, ["audit", str(out), "--require", "conflict_weighted [layer=*] < 0.1", "--json"])
    assert failed.exit_code == 3
    assert "error[REQUIRED]: sft and dpo: layer 0" in failed.stderr
    assert json.loads(failed.stdout)["audit"]["sampled"] == 1.0


def test_a_merge_of_values_says_that_there_is_nothing_to_show(family: Callable[..., Family], tmp_path: Path) -> None:
    made = family()
    models = [{"model": str(made[name]), "parameters": {"weight": 1}} for name in ("x", "y")]
    out = merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert recorded(manifest_of(out)) is None
    assert CliRunner().invoke(cli, ["audit", str(out)]).exit_code == 0
    refused = CliRunner().invoke(cli, ["audit", str(out), "--require", "norm > 0"])
    assert refused.exit_code == 1
    assert "--base" in refused.stderr


def test_tiles_are_large_enough_for_a_sample() -> None:
    assert blocks.TILE % (sample.RUN * sample.MOST) == 0
