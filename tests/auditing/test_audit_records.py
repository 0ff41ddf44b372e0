"""What an audit makes of the record of a training, of sizes far apart, of fused experts, and of a narrow terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import random_state, save_adapter, save_checkpoint
from peft import LoraConfig
from toys.adapters import gpt_oss, train

from paft_merge.auditing import audit, opening
from paft_merge.cli import cli
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "sft", random_state(0), 3)


def write_record(adapter: Path, l1: dict[str, Any] | None = None, norm: float | None = None) -> None:
    delta = {"norm": norm or audit(adapter).sources[0].total.measure.norm, "matrices": [], "below_epsilon": 0.02}
    record = {
        "format": 1,
        "objective": "sft",
        "delta": delta,
        "spec": {"l1": l1},
        "run": {"l1_strength": l1 and l1["strength"]},
    }
    (adapter / "paft_train.json").write_text(json.dumps(record))


def dense_line(adapter: Path) -> str:
    return next(a.text for a in audit(adapter).advice if "is dense" in a.text)


def test_advice_for_a_dense_delta_follows_from_how_it_was_trained(adapter: Path) -> None:
    assert "train with l1: {target: 0.9}, which finds the l1.strength, at a price in skill" in dense_line(adapter)
    write_record(adapter)
    assert "it was trained without; add l1: {target: 0.9}" in dense_line(adapter)
    write_record(adapter, {"mode": "penalty", "target": None, "strength": 1e-4})
    text = dense_line(adapter)
    sparsity = audit(adapter).sources[0].paft_sparsity(1e-5)
    more = 1e-4 * ((0.9 / 0.1) / (sparsity / (1 - sparsity))) ** (1 / 1.3)
    assert more > 1e-3
    assert f"it was trained with l1.strength 0.0001; train with about {more:.2g}, or l1: {{target: 0.9}}" in text


def test_a_record_of_another_adapter_is_told(adapter: Path) -> None:
    write_record(adapter)
    found = audit(adapter)
    assert found.warnings == ()
    assert found.sources[0].header.details["trained"]["objective"] == "sft"
    write_record(adapter, norm=17.0)
    (warning,) = audit(adapter).warnings
    assert warning.code == "TRAIN_RECORD"
    assert "the delta's norm is 17" in warning.what


def test_sizes_far_apart_are_told_with_both_norms_and_can_be_required(adapter: Path, tmp_path: Path) -> None:
    small = save_adapter(tmp_path / "dpo", random_state(0), 4, size=2e-3)
    found = audit(adapter, small)
    norms = [source.total.measure.norm for source in found.sources]
    (advice,) = (a for a in found.advice if a.metric == "size_ratio")
    assert advice.value == pytest.approx(norms[0] / norms[1])
    assert f"norms {norms[0]:.3g} and {norms[1]:.3g}" in advice.text
    assert "for an election give dpo more weight, at most" in advice.text
    assert found.check("size_ratio <= 100") == []
    assert len(found.check("size_ratio <= 5")) == 1
    near = save_adapter(tmp_path / "near", random_state(0), 5, size=8e-3)
    assert not [a for a in audit(adapter, near).advice if a.metric == "size_ratio"]


def test_an_adapter_of_the_hub_is_audited_without_its_base(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "big/base"}))
    asked = list[str]()

    def fetch(path: str, revision: str | None = None, **_: Any) -> Path:
        asked.append(path)
        return {"me/sft": adapter}[path]

    monkeypatch.setattr(opening, "_folder", fetch)
    (source,) = audit("me/sft").sources
    assert asked == ["me/sft"]
    assert source.header.details["base"] == "big/base"
    assert source.total.measure.bf16_sparsity is None


def test_fused_experts_are_measured_and_their_missing_spectrum_is_said(tmp_path: Path) -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=experts)
    base, adapter = train(gpt_oss(), tmp_path, config)
    found = audit(adapter, base=base)
    fused = [t for t in found.sources[0].tensors if t.kind == "experts"]
    assert len(fused) == 4
    assert all(t.spectrum is None and t.factors is None for t in fused)
    (skipped,) = found.skipped
    assert set(skipped.names) == {t.name for t in fused}
    assert "each expert is a separate product" in skipped.why
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        for tensor in fused:
            delta = opened.deltas[tensor.name]
            dense = torch.empty(int(np.prod(delta.shape)) // delta.row_size, delta.row_size)
            delta.compute(0, len(dense), None, dense.numpy())
            assert tensor.measure.norm == pytest.approx(float(dense.double().norm()), rel=1e-6)


def test_every_page_that_advice_and_messages_point_to_is_there(adapter: Path) -> None:
    for name in ("docs/audit.md", "docs/training.md"):
        text = (ROOT / name).read_text()
        for page, anchor in [
            part.split(")")[0].split("#") for part in text.split("](")[1:] if ".md#" in part.split(")")[0]
        ]:
            assert f'<a id="{anchor}">' in (ROOT / "docs" / page).read_text(), (name, page, anchor)
    assert '<a id="scale">' in (ROOT / "docs" / "audit.md").read_text()


@pytest.mark.parametrize("sources", [2, 3])
def test_tables_fit_eighty_columns_and_lose_nothing(sources: int, tmp_path: Path) -> None:
    state = random_state(0, torch.bfloat16)
    base = save_checkpoint(tmp_path / "base", state)
    names = ["mistral-7b-sft-lora-l1-target-090", "mistral-7b-dpo-ultrafeedback-binarized", "code"][:sources]
    folders = [str(save_adapter(tmp_path / name, state, 3 + i)) for i, name in enumerate(names)]
    shown = CliRunner().invoke(cli, ["audit", *folders, "--base", str(base)], env={**os.environ, "COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    for word in ("stable", "rank", "weighted", "subspaces", "effective rank", "chance"):
        assert word in shown.stdout
    found = audit(*folders, base=base)
    for source in found.sources:
        for group in source.modules.values():
            row = next(
                line for line in lines if line.split()[:1] == [group.key] and f"{group.stable_rank:.3g}"[:3] in line
            )
            assert len(row.split()) == 7
    assert sum(line.count("norm over that of the weights") for line in lines) == (1 if sources == 2 else 2)
