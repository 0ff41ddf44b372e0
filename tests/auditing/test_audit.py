"""What an audit measures is what the definitions say, on every kind of delta, however it is walked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from toys.adapters import llama, train
from toys.audit import dense_by_definition, plain_metrics, plain_pair
from toys.merge import paft

import paft_merge
from paft_merge.auditing import Audit, Group, audit
from paft_merge.compute import blocks, kernels
from paft_merge.compute.blocks import Block, KeepThreshold
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.kernels.block_source import FULL
from paft_merge.errors import AuditError, PaftMergeError
from paft_merge.methods.rules.thresholds import Trim, trim_survivals
from paft_merge.stats.metrics import Measure

EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 0.02, 0.2)
LAYERS = ["q_proj", "up_proj"]

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": [*LAYERS, "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


def assert_as_defined(measure: Measure, plain: dict[str, Any]) -> None:
    n = measure.entries
    for epsilon, share in plain["sparsity"].items():
        assert measure.sparsity(epsilon) == pytest.approx(share, abs=1.5 / n)
    assert measure.zero_share == pytest.approx(plain["zeros"], abs=1e-12)
    for name in ("hoyer", "participation", "norm", "largest"):
        assert getattr(measure, name) == pytest.approx(plain[name], rel=1e-5)
    for name in ("relative_rms", "relative_max", "top_energy", "density_for"):
        for at, value in plain[name].items():
            assert getattr(measure, name)(at) == pytest.approx(value, abs=2e-3 + 2 / n), (name, at)
    if "bf16_sparsity" in plain:
        assert measure.bf16_sparsity == pytest.approx(plain["bf16_sparsity"], abs=1.5 / n)
        assert measure.relative_norm == pytest.approx(plain["relative_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_metric_is_its_definition_for_adapters_that_peft_wrote(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **ADAPTERS[kind]})
    base, adapter = train(llama(), tmp_path, config)
    dense = dense_by_definition(base, adapter)
    weights = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}

    (source,) = audit(adapter, base=base, epsilons=EPSILONS).sources

    assert {t.name for t in source.tensors} == dense.keys()
    for tensor in source.tensors:
        assert_as_defined(tensor.measure, plain_metrics(dense[tensor.name], weights[tensor.name], EPSILONS))
    every = [np.concatenate([held[t.name].ravel() for t in source.tensors]) for held in (dense, weights)]
    assert_as_defined(source.total.measure, plain_metrics(*every, EPSILONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_metric_is_its_definition_for_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    before = random_state(0, dtype)
    after = {**near(before, 1, 2e-5), "model.norm.weight": before["model.norm.weight"]}
    base, tuned = save_checkpoint(tmp_path / "base", before), save_checkpoint(tmp_path / "tuned", after)

    (source,) = audit(tuned, base=base, epsilons=EPSILONS).sources

    assert len(source.tensors) == len(before)
    for tensor in source.tensors:
        if tensor.name == "model.norm.weight":
            assert tensor.measure.sparsity(1e-6) == tensor.measure.bf16_sparsity == 1.0
            continue
        weight = before[tensor.name].double().numpy()
        delta = (after[tensor.name].float() - before[tensor.name].float()).double().numpy()
        if np.any(delta):
            assert_as_defined(tensor.measure, plain_metrics(delta, weight, EPSILONS))


def test_groups_are_all_their_entries_and_pafts_measure_is_the_mean_over_layers(tmp_path: Path) -> None:
    state = random_state(0)
    folder, base = save_adapter(tmp_path / "sft", state, 3, size=3e-3), save_checkpoint(tmp_path / "base", state)
    (source,) = audit(folder, base=base).sources

    assert list(source.layers) == [0, 1, 2]
    assert set(source.modules) == {"q_proj", "up_proj"}
    for group in [*source.layers.values(), *source.modules.values()]:
        counted = sum(t.measure.below[1e-5] for t in group.tensors)
        assert group.measure.sparsity(1e-5) == counted / sum(t.measure.entries for t in group.tensors)
    assert source.paft_sparsity(1e-5) == pytest.approx(
        np.mean([g.measure.sparsity(1e-5) for g in source.layers.values()])
    )


@pytest.mark.parametrize("kind", ["lora", "rslora", "embeddings"])
def test_singular_values_and_ranks_from_the_core_are_those_of_a_full_svd(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **ADAPTERS[kind]})
    base, adapter = train(llama(), tmp_path, config)
    dense = dense_by_definition(base, adapter)

    for tensor in audit(adapter, base=base).sources[0].tensors:
        values = np.linalg.svd(dense[tensor.name], compute_uv=False)[:4]
        assert tensor.spectrum is not None
        assert tensor.spectrum.values == pytest.approx(values, rel=1e-5)
        shares = values / values.sum()
        assert tensor.spectrum.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
        assert tensor.spectrum.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)


def test_rows_and_components_that_l1_has_emptied_are_counted(tmp_path: Path) -> None:
    state = random_state(0)
    folder = save_adapter(tmp_path / "sparse", state, 3)
    factors = load_file(folder / "adapter_model.safetensors")
    for name, factor in factors.items():
        if "lora_B" in name:
            factor[:5] = 0
            factor[:, 1] = 0
    save_file(factors, folder / "adapter_model.safetensors")

    (source,) = audit(folder).sources

    counts = source.total.factors
    assert counts is not None
    assert (counts.zero_rows, counts.zero_components, counts.components) == (6 * 5, 6 * 1, 6 * 4)
    assert all(t.measure.zeros >= 5 * t.shape[1] for t in source.tensors)
    assert {len([v for v in t.spectrum.values if v > 1e-9]) for t in source.tensors if t.spectrum} == {3}


def test_pairs_are_their_definitions(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "base", state)
    one, other = save_adapter(tmp_path / "sft", state, 3), save_adapter(tmp_path / "dpo", state, 4, rank=2, size=5e-3)
    tuned = save_checkpoint(tmp_path / "tuned", near(state, 5, 1e-4))
    held = [
        by_file(one),
        by_file(other),
        {n: (t.float() - state[n].float()).double().numpy() for n, t in load_file(tuned / "model.safetensors").items()},
    ]
    at = {"sft": held[0], "dpo": held[1], "tuned": held[2]}

    found = audit(one, other, tuned, base=base, epsilon=1e-4, density=0.3)

    assert [(p.left, p.right) for p in found.pairs] == [("sft", "dpo"), ("sft", "tuned"), ("dpo", "tuned")]
    for pair in found.pairs:
        for tensor in pair.tensors:
            if tensor.name not in at[pair.left] or tensor.name not in at[pair.right]:
                assert tensor.measure.both == 0
                continue
            plain = plain_pair(at[pair.left][tensor.name], at[pair.right][tensor.name], 1e-4, 0.3)
            measure = tensor.measure
            for name in ("cosine", "conflict", "conflict_above", "conflict_weighted", "overlap", "overlap_chance"):
                assert getattr(measure, name) == pytest.approx(plain[name], abs=2e-3), name
            assert measure.conflict_energy[0] == pytest.approx(plain["conflict_energy_left"], abs=2e-3)
        both = [
            np.concatenate([(at[label].get(n, np.zeros(state[n].shape))).ravel() for n in state])
            for label in (pair.left, pair.right)
        ]
        assert pair.total.cosine == pytest.approx(
            both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1]), abs=1e-6
        )


def test_the_overlap_of_subspaces_is_that_of_the_singular_vectors(tmp_path: Path) -> None:
    state = random_state(0)
    one, other = save_adapter(tmp_path / "sft", state, 3), save_adapter(tmp_path / "dpo", state, 4, rank=2)
    dense = by_file(one), by_file(other)

    for tensor in audit(one, other).pairs[0].tensors:
        (u1, _, v1), (u2, _, v2) = (np.linalg.svd(d[tensor.name]) for d in dense)
        left = np.square(u1[:, :4].T @ u2[:, :2]).sum() / 2
        right = np.square(v1[:4] @ v2[:2].T).sum() / 2
        assert tensor.subspace == pytest.approx((left, right), abs=1e-6)


def by_file(folder: Path) -> dict[str, Any]:
    """The deltas of a plain adapter, from its file alone."""
    from conftest import dense_deltas

    names = {
        n.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
        for n in load_file(folder / "adapter_model.safetensors")
    }
    return {n: d.numpy() for n, d in dense_deltas(folder, dict.fromkeys(names, torch.empty(0))).items()}


def numbers(found: Audit) -> list[Any]:
    """All counts of an audit, and all sums with the digits that every order of addition has."""
    counts: list[Any] = []
    for source in found.sources:
        for t in source.tensors:
            m = t.measure
            counts += [
                m.zeros,
                tuple(m.below.values()),
                m.largest,
                m.erased,
                tuple(m.histogram.count),
                f"{m.l1:.7e} {m.square:.10e} {m.fourth:.10e}",
            ]
    for pair in found.pairs:
        counts += [
            (t.measure.both, t.measure.conflicts, t.measure.above, t.measure.kept_both, t.measure.kept_either)
            for t in pair.tensors
        ]
    assert found.preview is not None
    counts += [
        (s.kept, s.elected, f"{s.elected_square:.7e}") for t in found.preview.tensors for s in t.sources.values()
    ]
    return counts


def test_numbers_do_not_depend_on_blocks_threads_or_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(0, torch.bfloat16, width=64)
    base = save_checkpoint(tmp_path / "base", state)
    sources = save_adapter(tmp_path / "sft", state, 3), save_checkpoint(tmp_path / "tuned", near(state, 1))
    expected = numbers(audit(*sources, base=base))
    assert numbers(audit(*sources, base=base, threads=1)) == expected
    for tile in (1 << 10, 1 << 12):
        monkeypatch.setattr(blocks, "TILE", tile)
        assert numbers(audit(*sources, base=base)) == expected
        assert numbers(audit(*sources, base=base, held_bytes=0)) == expected


def test_an_adapter_alone_gives_the_numbers_it_gives_with_its_base(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[*LAYERS, "embed_tokens"], use_rslora=True)
    base, adapter = train(llama(), tmp_path, config)
    with_base, alone = audit(adapter, base=base), audit(adapter)

    assert alone.base is None
    assert {t.name for t in alone.sources[0].tensors} == {t.name for t in with_base.sources[0].tensors}
    for one in alone.sources[0].tensors:
        other = next(t for t in with_base.sources[0].tensors if t.name == one.name)
        assert (one.shape, one.measure.below, one.measure.largest, one.spectrum) == (
            other.shape,
            other.measure.below,
            other.measure.largest,
            other.spectrum,
        )
        assert one.measure.bf16_sparsity is None
        assert one.measure.relative_norm is None
    assert any("base=..." in a.text for a in alone.advice)


def test_pickled_sources_are_read_on_request(tmp_path: Path) -> None:
    """With their base in pickles too, alone, and a whole model; each as its safetensors."""
    base, adapter = train(llama(), tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    state = load_file(base / "model.safetensors")
    whole = save_checkpoint(tmp_path / "whole", near(state, 1))
    pairs = {base: ("model.safetensors", "pytorch_model.bin"), whole: ("model.safetensors", "pytorch_model.bin")}
    pairs[adapter] = ("adapter_model.safetensors", "adapter_model.bin")
    pickled = {folder: Path(shutil.copytree(folder, tmp_path / f"{folder.name}-bin")) for folder in pairs}
    for folder, (name, other) in pairs.items():
        torch.save(load_file(folder / name), pickled[folder] / other)
        (pickled[folder] / name).unlink()
    for source, on in ((adapter, None), (adapter, base), (whole, base)):
        wanted = audit(source, base=on)
        with pytest.raises(PaftMergeError, match="without running its code, with lazy_unpickle=True"):
            audit(pickled[source], base=on)
        found = audit(pickled[source], base=on and pickled[on], lazy_unpickle=True)
        assert found.sources[0].total.measure.norm == wanted.sources[0].total.measure.norm > 0
    refused = paft("audit", pickled[adapter], "--quiet")
    assert (refused.exit_code, "--lazy-unpickle" in refused.output) == (1, True)
    assert paft("audit", pickled[adapter], "--quiet", "--lazy-unpickle").exit_code == 0


def test_what_needs_the_weights_is_left_out_and_named_without_a_base(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, modules_to_save=["lm_head"])
    _, adapter = train(llama(), tmp_path, config)
    found = audit(adapter)

    assert {t.module for t in found.sources[0].tensors} == set(LAYERS)
    assert [(s.names, "modules_to_save" in s.why) for s in found.skipped] == [(("lm_head.weight",), True)]
    assert "lm_head.weight" in found.to_html()


def test_dora_without_a_base_is_refused_with_the_way_out(tmp_path: Path) -> None:
    _, adapter = train(llama(), tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, use_dora=True))
    with pytest.raises(AuditError, match=r"DoRA.*base=\.\.\."):
        audit(adapter)


def test_a_whole_model_without_a_base_is_refused_with_the_way_out(family: Callable[..., dict[str, Path]]) -> None:
    with pytest.raises(AuditError, match=r"base=\.\.\."):
        audit(family()["x"])


def test_a_source_given_twice_is_refused(family: Callable[..., dict[str, Path]]) -> None:
    folder = family()["sft"]
    with pytest.raises(AuditError, match="twice"):
        audit(folder, folder)


def test_values_that_are_not_finite_are_an_error_that_names_the_tensor(family: Callable[..., dict[str, Path]]) -> None:
    made = family()
    state = load_file(made["x"] / "model.safetensors")
    state["model.norm.weight"][3] = torch.nan
    save_file(state, made["x"] / "model.safetensors")
    with pytest.raises(AuditError, match=r"model\.norm\.weight.*NaN"):
        audit(made["x"], base=made["base"])


def test_an_untrained_adapter_is_said_to_be_zero_and_divides_nothing_by_it(tmp_path: Path) -> None:
    state = random_state(0)
    base, other = save_checkpoint(tmp_path / "base", state), save_adapter(tmp_path / "dpo", state, 4)
    folder = save_adapter(tmp_path / "sft", state, 3)
    factors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t * 0 if "lora_B" in n else t for n, t in factors.items()}, folder / "adapter_model.safetensors")

    for found in (audit(folder), audit(folder, other, base=base)):
        measure = found.sources[0].total.measure
        assert (measure.zero_share, measure.sparsity(1e-6)) == (1.0, 1.0)
        assert np.isnan(measure.hoyer)
        assert found.to_json()["sources"][0]["all"]["hoyer"] is None
        assert "zero everywhere" in found.advice[0].text
        assert "zero everywhere" in str(found)
        assert found.dumps()
        assert found.to_html()


@pytest.mark.parametrize("size", [1e-12, 1e-21])
def test_a_delta_far_below_bfloat16_is_all_erased_and_still_measured(size: float, tmp_path: Path) -> None:
    state = random_state(0, torch.bfloat16)
    base, folder = save_checkpoint(tmp_path / "base", state), save_adapter(tmp_path / "sft", state, 3, size=size)
    measure = audit(folder, base=base).sources[0].total.measure

    assert measure.bf16_sparsity == 1.0
    assert measure.sparsity(1e-6) == 1.0
    assert 0 < measure.norm < 1e-12


def test_the_front_door_is_a_function_and_the_package_stays_light() -> None:
    assert paft_merge.audit is audit
    assert "audit" in paft_merge.__all__


def test_a_group_of_tensors_needs_no_source(tmp_path: Path) -> None:
    (source,) = audit(save_adapter(tmp_path / "sft", random_state(0), 3)).sources
    assert Group("some", source.tensors[:2]).measure.entries == sum(t.measure.entries for t in source.tensors[:2])


@pytest.mark.parametrize("density", [0.001, 0.2, 700.5 / 3000, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["gaussian", "lattice", "half zero", "zero", "all equal"])
def test_thresholds_from_the_histogram_are_those_of_the_search(kind: str, density: float) -> None:
    made = np.random.default_rng(1)
    values = made.standard_normal((2, 3000)).astype(np.float32)
    values *= {
        "gaussian": 1.0,
        "lattice": 1.0,
        "half zero": made.random((2, 3000)) < 0.5,
        "zero": 0.0,
        "all equal": 1.0,
    }[kind]
    if kind in ("lattice", "all equal"):
        values = np.round(values * 2) if kind == "lattice" else np.sign(values)
    held = values.astype(np.float32).view(np.uint32)
    each = InMemory(held, 700)
    counts, lows = np.zeros((2, 1 << 15), np.int64), np.zeros((2, 1 << 15), np.int64)
    kernels.histogram(held[0], held, False, FULL, counts, lows, kernels.lines(2))

    trims = [Trim("density", density)] * 2
    found = trim_survivals(trims, 3000, each, CpuOps(), full=(counts, lows))

    expected = trim_survivals(trims, 3000, each, CpuOps())
    for row, ours, theirs in zip(np.abs(values), found, expected, strict=True):
        kept = [survivors(row, s) for s in (ours, theirs)]
        assert np.array_equal(*kept)


def survivors(size: Any, survival: KeepThreshold) -> Any:
    bits, at = size.astype(np.float32).view(np.uint32), np.arange(size.size)
    return np.flatnonzero(((bits > survival.low) | ((bits == survival.low) & (at < survival.low_cut))) & (bits > 0))


class InMemory:
    """Walks an array in tiles as a `BlockWalk` does."""

    def __init__(self, held: Any, step: int) -> None:
        self.held, self.starts, self.step = held, list(range(0, held.shape[1], step)), step

    @property
    def tiles(self) -> int:
        return len(self.starts)

    def __call__(self, work: Any, *, sample: bool = False, tiles: Any = None) -> list[Any]:
        starts = self.starts if tiles is None else [self.starts[i] for i in tiles]
        step = max(1, self.step // 16) if sample else self.step
        return [
            work(Block(s, self.held[0, :0], np.ascontiguousarray(self.held[:, s : s + step]), False)) for s in starts
        ]
