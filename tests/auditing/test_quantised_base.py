"""`quantised_sparsity`: the share of a delta that the grid of a quantised base erases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import random_state, save_checkpoint
from toys.quantized import CONFIG, State, coded, lora

from paft_merge import audit, merge
from paft_merge.cli import cli
from paft_merge.errors import AuditError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import dequantized
from paft_merge.inputs.quantized.code_intervals import high_end, low_end, unmoved
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.inputs.quantized.grids import E2M1, FLOAT8_GRIDS
from paft_merge.inputs.quantized.rounding import Rounding
from paft_merge.inputs.quantized.weights import byte_values


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    stored, values = coded(random_state(0, torch.bfloat16))
    folder = tmp_path_factory.mktemp("coded") / "base"
    return save_checkpoint(folder, stored, config={"quantization_config": CONFIG}), values


@pytest.fixture(scope="module")
def adapter(base: tuple[Path, State]) -> tuple[Path, State]:
    return lora(base[0].parent / "small", base[1], 1, size=1e-3)


def test_the_share_is_that_of_the_encoder_with_the_scales_as_they_are(
    base: tuple[Path, State], adapter: tuple[Path, State]
) -> None:
    (source,) = audit(adapter[0], base=base[0]).sources
    erased = entries = 0
    with dequantized(Checkpoint.open(base[0])) as held:
        assert isinstance(held, Dequantized)
        for tensor in source.tensors:
            weight, values = held.weights[tensor.name], held.tensor(tensor.name)
            moved = (values + adapter[1][tensor.name]).numpy()
            decoded = weight.encode(held.parts, 0, moved, Rounding(refit=False))[1]
            same = int(np.count_nonzero(decoded == values.numpy()))
            assert tensor.measure.same_codes == same
            erased, entries = erased + same, entries + moved.size
    assert 0 < erased < entries
    assert source.total.measure.quantised_sparsity == erased / entries
    assert source.to_json()["tensors"][0]["quantised_sparsity"] == source.tensors[0].measure.quantised_sparsity


def test_tuned_models_in_float32_and_two_sources_have_the_same_share_as_their_adapters(
    base: tuple[Path, State], adapter: tuple[Path, State], tmp_path: Path
) -> None:
    merged = base[0].parent / "merged"
    asked = {"merge_method": "task_arithmetic", "base_model": str(base[0]), "out_dtype": "float32"}
    merge({**asked, "models": [{"model": f"{base[0]}+{adapter[0]}", "parameters": {"weight": 1.0}}]}, merged)
    large = lora(tmp_path / "large", base[1], 2, size=1.0)[0]
    found = {s.header.source: s.total.measure for s in audit(adapter[0], large, base=base[0]).sources}
    small, loud = found[str(adapter[0])].quantised_sparsity, found[str(large)].quantised_sparsity
    (tuned,) = audit(merged, base=base[0]).sources
    assert small is not None
    assert loud is not None
    assert loud < 0.2 < small
    of_model = {t.name: t.measure.same_codes for t in tuned.tensors}
    of_adapter = {t.name: t.measure.same_codes for t in audit(adapter[0], base=base[0]).sources[0].tensors}
    assert {name: of_model[name] for name in of_adapter} == of_adapter


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "E2M1"])
def test_intervals_end_where_the_encoder_takes_another_code(name: str) -> None:
    grid = E2M1 if name == "E2M1" else FLOAT8_GRIDS[name]
    table = grid.values if name == "E2M1" else byte_values(name)
    low, high = low_end(table), high_end(table)
    finite = np.isfinite(table)
    for ends, out in ((low, -np.inf), (high, np.inf)):
        ended = finite & np.isfinite(ends)
        next_ones = np.nextafter(ends[ended], np.float32(out))
        inside, beyond = (grid.values[grid.codes(values)] for values in (ends[ended], next_ones))
        assert np.array_equal(inside, table[ended])
        assert (beyond != table[ended]).all()
    assert low[table == table[finite].min()].tolist() == [-np.inf]
    assert np.isnan(low[~finite]).all()


def test_scales_of_zero_erase_everything_and_negative_ones_turn_the_interval() -> None:
    table = np.arange(-8, 8, dtype=np.float32)
    ends = np.float32([low_end(table)[9], high_end(table)[9]])
    assert ends.tolist() == [np.nextafter(np.float32(0.5), np.float32(1)), np.nextafter(np.float32(1.5), np.float32(0))]
    values = np.float32([-1.0, -0.4, -1.6, 1.0])
    assert [unmoved(values, *(np.repeat(end * scale, 4) for end in ends)) for scale in (-1, 0)] == [1, 4]


def test_every_report_has_it_for_a_quantised_base_alone(
    base: tuple[Path, State], adapter: tuple[Path, State], tmp_path: Path
) -> None:
    page, rows = tmp_path / "audit.html", tmp_path / "audit.csv"
    asked = ["audit", str(adapter[0]), "--base", str(base[0]), "--html", str(page), "--csv", str(rows)]
    shown = CliRunner().invoke(cli, [*asked, "--require", "quantised_sparsity [module=q_proj] > 0.99"])
    assert shown.exit_code == 3
    assert "quantised_sparsity is 0." in shown.stderr
    for text in (shown.stdout, page.read_text()):
        assert "erased by the base's codes" in text.replace("&#39;", "'")
    assert "quantised_sparsity" in rows.read_text().splitlines()[0]
    plain = save_checkpoint(tmp_path / "twin", {name: tensor.float() for name, tensor in base[1].items()})
    found = audit(adapter[0], base=plain)
    assert found.sources[0].total.measure.quantised_sparsity is None
    with pytest.raises(AuditError, match="it needs weights that the base stores quantised"):
        found.check("quantised_sparsity < 1")


def test_a_change_below_the_grid_is_a_warning(base: tuple[Path, State], tmp_path: Path) -> None:
    tiny = lora(tmp_path / "tiny", base[1], 1, size=1e-6)[0]
    found = audit(tiny, base=base[0])
    assert found.sources[0].total.measure.quantised_sparsity == pytest.approx(1, abs=0.01)
    page = "https://github.com/paft-merge/paft-merge/blob/main/docs/audit.md#quantised"
    assert [one.page for one in found.advice if one.metric == "quantised_sparsity"] == [page]
