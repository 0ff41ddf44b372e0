"""An audit in one walk counts what it counts in three, and both count what the definitions say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Semaphore
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from conftest import dense_deltas, near, random_state, save_adapter, save_checkpoint
from toys.merge import on, recipe, tensors_of

from paft_merge.auditing import Audit, audit, run, tensor_survey
from paft_merge.compute import blocks, kernels
from paft_merge.compute.kernels import block_source
from paft_merge.methods.rules.one_pass import OnePass

Sources = dict[str, Path]

KINDS: dict[str, tuple[str, ...]] = {
    "adapters": ("sft", "dpo"),
    "high rank": ("high", "dpo"),
    "checkpoints": ("tuned", "other"),
    "three of them": ("sft", "tuned", "dpo"),
    "a copy": ("sft", "same"),
    "nearly all zero": ("sparse", "sft"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Sources whose largest tensors have 192 x 96 entries, which take several blocks of 2048."""
    place = tmp_path_factory.mktemp("sources")
    state = random_state(0, torch.bfloat16, layers=2, width=96)
    sparse = {name: tensor.clone() for name, tensor in state.items()}
    sparse["model.layers.1.mlp.up_proj.weight"][3, :5] += 1
    return {
        "base": save_checkpoint(place / "base", state),
        "sft": save_adapter(place / "sft", state, 3, size=3e-3),
        "same": save_adapter(place / "same", state, 3, size=3e-3),
        "dpo": save_adapter(place / "dpo", state, 4, rank=2, size=1e-3),
        "high": save_adapter(place / "high", state, 6, rank=40, size=1e-3),
        "tuned": save_checkpoint(place / "tuned", near(state, 5, 1e-4)),
        "other": save_checkpoint(place / "other", near(state, 7, 1e-3)),
        "sparse": save_checkpoint(place / "sparse", sparse),
    }


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", 1 << 11)


def in_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor_survey, "_guesses", lambda *_: (None, None))


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Counts are equal, and floats to the rounding of float32 sums in another order."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for at, value in enumerate(ours):
            assert_same(value, theirs[at], f"{where}[{at}]")
    elif isinstance(ours, float):
        assert ours == (
            pytest.approx(theirs, rel=2e-6) if "energy" in where or "preview" in where or "advice" in where else theirs
        ), where
    elif "advice" not in where:
        assert ours == theirs, where


@pytest.mark.parametrize("preview", ["ties", None, {"method": "ties", "density": 0.35, "weight": "1.0,0.7,0.4"}])
@pytest.mark.parametrize("kind", KINDS)
def test_one_walk_gives_the_numbers_of_three(
    kind: str, preview: Any, made: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = KINDS[kind]
    if isinstance(preview, dict):
        preview = {**preview, "weight": [1.0, 0.7, 0.4][: len(names)]}
    found = audit(*(made[name] for name in names), base=made["base"], preview=preview, threads=2)
    in_turn(monkeypatch)
    expected = audit(*(made[name] for name in names), base=made["base"], preview=preview, threads=2)
    assert_same(found.to_json(), expected.to_json())


def test_large_tensors_are_measured_in_one_walk_and_their_deltas_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_state(0, torch.bfloat16, layers=1, width=384)
    base, one, other = (
        save_checkpoint(tmp_path / "base", state),
        save_adapter(tmp_path / "one", state, 3),
        save_adapter(tmp_path / "other", state, 4, rank=40),
    )
    for tile, most in ((1 << 21, kernels.MOST), (1 << 21, 1 << 16), (1 << 15, kernels.MOST)):
        monkeypatch.setattr(blocks, "TILE", tile)
        monkeypatch.setattr(kernels, "MOST", most)  # blocks with more entries empty their histogram on the way
        for preview in ("ties", None, {"method": "ties", "density": 0.3}):
            with monkeypatch.context() as patch:
                in_turn(patch)
                expected = audit(one, other, base=base, preview=preview)
            with monkeypatch.context() as patch:
                patch.setattr(tensor_survey, "_second", refused)
                patch.setattr(tensor_survey.HeldDeltas, "_store", refused)
                assert_same(audit(one, other, base=base, preview=preview).to_json(), expected.to_json())
                assert audit(one).sources


def test_three_sources_of_very_different_sizes_are_previewed_in_one_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "TILE", 1 << 21)
    state = random_state(0, torch.bfloat16, layers=1, width=384)
    base = save_checkpoint(tmp_path / "base", state)
    sizes = (1e-3, 3e-3, 1e-20)  # float32 does not hold the squares of the smallest
    sources = [save_adapter(tmp_path / f"source{i}", state, i, size=size) for i, size in enumerate(sizes)]
    second, further = tensor_survey._second, list[str]()
    found = {}
    for way in ("one walk", "in turn"):
        with monkeypatch.context() as patch:
            if way == "in turn":
                in_turn(patch)
            patch.setattr(tensor_survey, "_second", lambda *of: further.append(way) or second(*of))  # noqa: B023
            found[way] = audit(*sources, base=base)
    assert_same(found["one walk"].to_json(), found["in turn"].to_json())
    assert further.count("one walk") < further.count("in turn")


def test_a_guess_that_misses_is_followed_by_three_walks(made: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = audit(made["sft"], made["dpo"], base=made["base"])
    monkeypatch.setattr(OnePass, "thresholds", lambda *_: None)
    assert_same(audit(made["sft"], made["dpo"], base=made["base"]).to_json(), expected.to_json())


@pytest.mark.parametrize("together", [0, 20_000])
def test_many_undecided_entries_are_merged_a_few_blocks_at_a_time(
    together: int, made: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = audit(made["sft"], made["dpo"], base=made["base"])
    monkeypatch.setattr(tensor_survey, "_TOGETHER", together)
    assert_same(audit(made["sft"], made["dpo"], base=made["base"]).to_json(), expected.to_json())


def test_blocks_larger_than_a_histogram_are_measured_in_parts(made: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", 1 << 14)
    expected = audit(made["sft"], made["tuned"], base=made["base"])
    monkeypatch.setattr(kernels, "MOST", 1 << 12)
    monkeypatch.setattr(block_source, "PIECE", 1)  # a histogram is emptied between the pieces of a block
    monkeypatch.setattr(block_source, "_LEAST", 1)
    assert_same(audit(made["sft"], made["tuned"], base=made["base"]).to_json(), expected.to_json())


@pytest.mark.parametrize("names", [("sft", "dpo"), ("tuned", "sft"), ("sft", "dpo", "tuned")])
def test_pairs_and_the_preview_are_their_definitions(names: Sequence[str], made: Sources) -> None:
    found = audit(*(made[name] for name in names), base=made["base"])
    base, name = tensors_of(made["base"]), "model.layers.1.mlp.up_proj.weight"
    deltas = [delta_of(made[one], base, name) for one in names]
    kept = [largest(d, 0.2) for d in deltas]
    for pair in found.pairs:
        a, b = (list(names).index(one) for one in (pair.left, pair.right))
        measure = next(t for t in pair.tensors if t.name == name).measure
        left, right = deltas[a], deltas[b]
        differ = (np.sign(left) != np.sign(right)) & (left != 0) & (right != 0)
        assert (measure.both, measure.conflicts) == (int(((left != 0) & (right != 0)).sum()), int(differ.sum()))
        assert measure.kept_both == int((kept[a] & kept[b]).sum())
        assert measure.kept_either == int((kept[a] | kept[b]).sum())
    assert found.preview is not None
    tensor = next(t for t in found.preview.tensors if t.name == name)
    votes = sum(np.where(k, d, 0.0) for k, d in zip(kept, deltas, strict=True))
    sign = np.where(np.asarray(votes) >= 0, 1, -1)
    for one, mask, delta in zip(names, kept, deltas, strict=True):
        agrees = mask & (np.sign(delta) == sign)
        survived = tensor.sources[one]
        assert (survived.kept, survived.elected) == (int(mask.sum()), int(agrees.sum()))
        assert survived.kept_energy == pytest.approx(float((delta[mask] ** 2).sum() / (delta**2).sum()), rel=1e-5)
    total = sum(np.where(k & (np.sign(d) == sign), d, 0.0) for k, d in zip(kept, deltas, strict=True))
    count = sum((k & (np.sign(d) == sign)).astype(int) for k, d in zip(kept, deltas, strict=True))
    merged = np.asarray(total) / np.maximum(np.asarray(count), 1)
    assert tensor.merged_square == pytest.approx(float((merged**2).sum()), rel=1e-5)


def delta_of(folder: Path, base: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """One tensor's delta, float64 from float32 values."""
    if (folder / "adapter_config.json").exists():
        return dense_deltas(folder, base)[name].float().double().numpy().ravel()
    return (tensors_of(folder)[name].float() - base[name].float()).double().numpy().ravel()


def largest(delta: np.ndarray, density: float) -> np.ndarray:
    """The `int(density * n)` largest entries; ties keep the lowest index."""
    order = np.argsort(-np.abs(delta), kind="stable")
    mask = np.zeros(delta.size, bool)
    mask[order[: int(density * delta.size)]] = True
    return mask


def refused(*_: object) -> None:
    raise AssertionError("the tensor was read three times")


def test_a_recipe_is_previewed_in_one_walk(made: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made["base"]
    given = {"weight": 0.5, "density": 0.4}
    asked = recipe(
        "ties", base, (on(base, made["sft"]), given), (on(base, made["dpo"]), {"weight": 1.0, "density": 0.2})
    )
    found: list[Audit] = [audit(asked)]
    in_turn(monkeypatch)
    assert_same(found[0].to_json(), audit(asked).to_json())


def test_tensors_are_measured_side_by_side(made: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the first two surveys waits for the other one."""
    first, both, measured = Semaphore(2), Barrier(2), run.survey

    def survey(*given: Any) -> Any:
        if first.acquire(blocking=False):
            both.wait(timeout=30)
        return measured(*given)

    monkeypatch.setattr(run, "survey", survey)
    assert audit(made["sft"], made["dpo"], base=made["base"], threads=1).pairs


def test_one_tensor_at_a_time_stores_its_deltas(made: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, preview = (made["sft"], made["dpo"]), {"method": "dare_ties", "density": 0.5}
    expected = audit(*sources, base=made["base"], preview=preview, held_bytes=0)
    storing, second = Semaphore(1), tensor_survey._second

    def alone(*given: Any) -> Any:
        assert storing.acquire(blocking=False)
        try:
            sleep(0.002)
            return second(*given)
        finally:
            storing.release()

    monkeypatch.setattr(tensor_survey, "_second", alone)
    assert_same(audit(*sources, base=made["base"], preview=preview, threads=4).to_json(), expected.to_json())


@pytest.mark.parametrize(("stacked", "needed"), [("sft", False), ("pissa", True), ("pissa+sft", True)])
def test_torch_is_loaded_and_has_one_core_where_it_decomposes_weights(
    made: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacked: str, needed: bool
) -> None:
    config = json.loads((made["sft"] / "adapter_config.json").read_text())
    (tmp_path / "pissa").mkdir()
    (tmp_path / "pissa" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    (tmp_path / "pissa" / "adapter_model.safetensors").hardlink_to(made["sft"] / "adapter_model.safetensors")
    before, seen, pools = torch.get_num_threads(), list[tuple[bool, int]](), run.working_pools

    @contextmanager
    def watched(threads: int | None, *, torch_too: bool) -> Iterator[Any]:
        with pools(threads, torch_too=torch_too) as found:
            seen.append((torch_too, torch.get_num_threads()))
            yield found

    monkeypatch.setattr(run, "working_pools", watched)
    torch.set_num_threads(2)
    try:
        folders = [(tmp_path if name == "pissa" else made["sft"].parent) / name for name in stacked.split("+")]
        audit("+".join(map(str, (made["base"], *folders))))
        assert (seen, torch.get_num_threads()) == ([(needed, 1)], 2)
    finally:
        torch.set_num_threads(before)
