"""`quantization: keep`: merged weights are written as codes with scales, and other tensors are copied."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_state, save_checkpoint
from safetensors.torch import load_file
from toys.quantized import CONFIG, Q, State, asked, coded, four_bit_layer, golden_layer, gptq_layer, lora, mxfp4_experts

from paft_merge import merge, open_plan, reproduce
from paft_merge.compute import blocks
from paft_merge.errors import PaftMergeError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import dequantized

STEM = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    stored, values = coded(random_state(0, torch.bfloat16))
    folder = tmp_path_factory.mktemp("kept") / "base"
    return save_checkpoint(folder, stored, config={"quantization_config": CONFIG}), values


@pytest.fixture(scope="module")
def adapter(base: tuple[Path, State]) -> tuple[Path, State]:
    return lora(base[0].parent / "adapter", base[1], 1)


def stored_in(folder: Path) -> State:
    found = load_file(folder / "model.safetensors")
    return {name: tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for name, tensor in found.items()}


def values_in(folder: Path, name: str) -> torch.Tensor:
    with dequantized(Checkpoint.open(folder)) as checkpoint:
        return checkpoint.tensor(name)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_manifest.json").read_text())
    return found


def test_merged_weights_are_codes_and_the_other_tensors_are_copied(
    base: tuple[Path, State], adapter: tuple[Path, State], tmp_path: Path
) -> None:
    (folder, values), (source, deltas) = base, adapter
    noted: list[str] = []
    merge(
        asked(folder, f"{folder}+{source}", quantization="keep"),
        tmp_path / "out",
        warn=lambda p: noted.extend(map(str, p)),
    )
    got, was = stored_in(tmp_path / "out"), stored_in(folder)
    assert list(got) == list(was)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == CONFIG
    touched = {name for weight in deltas for name in (weight, f"{weight}_scale_inv")}
    assert {name for name in was if not torch.equal(got[name], was[name])} == touched
    updated = unmoved = update = error = 0.0
    for name, delta in deltas.items():
        wanted, written = values[name] + 0.5 * delta, values_in(tmp_path / "out", name)
        assert (written - wanted).norm() < 0.05 * (0.5 * delta).norm()
        moves = wanted != values[name]
        updated, unmoved = updated + moves.sum().item(), unmoved + (moves & (written == values[name])).sum().item()
        update += (wanted - values[name]).square().sum().item()
        error += (written - wanted).square().sum().item()
    found = record(tmp_path / "out")["quantization"]
    assert (found["updated"], found["unmoved"]) == (updated, unmoved)
    assert found["relative_error"] == pytest.approx((error / update) ** 0.5, rel=1e-4)
    assert f"{unmoved / updated:.1%} of these did not move" in (tmp_path / "out" / "README.md").read_text()
    said = next(text for text in noted if f"{unmoved / updated:.1%} of the entries" in text)
    assert "write rounding: stochastic" in said


def test_workers_a_resumed_merge_and_a_reproduction_write_the_same_codes(
    base: tuple[Path, State], adapter: tuple[Path, State], tmp_path: Path
) -> None:
    (folder, _), (source, _) = base, adapter
    recipe = asked(folder, f"{folder}+{source}", quantization="keep", rounding="stochastic")
    small = {"out_shard_bytes": 1200}
    noted: list[str] = []
    merge(recipe, tmp_path / "whole", threads=1, warn=lambda p: noted.extend(map(str, p)), **small)
    assert not any("write rounding: stochastic" in text for text in noted)
    merge(recipe, tmp_path / "shared", worker="1/2", **small)
    merge(recipe, tmp_path / "shared", worker="0/2", **small)

    def stop(done: Any) -> None:
        if done.tensors == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "again", progress=stop, **small)
    merge(recipe, tmp_path / "again", resume=True, threads=2, **small)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) > 2
    for name in files:
        assert len({(tmp_path / out / name).read_bytes() for out in ("whole", "shared", "again")}) == 1
    losses = [record(tmp_path / out)["quantization"] for out in ("whole", "shared", "again")]
    assert losses[0] == losses[1] == losses[2]
    assert reproduce(tmp_path / "whole").identical


def test_kept_scales_are_the_bytes_of_the_base(
    base: tuple[Path, State], adapter: tuple[Path, State], tmp_path: Path
) -> None:
    (folder, _), (source, deltas) = base, adapter
    merge(asked(folder, f"{folder}+{source}", quantization="keep", scales="keep"), tmp_path / "out")
    got, was = stored_in(tmp_path / "out"), stored_in(folder)
    assert {name for name in was if not torch.equal(got[name], was[name])} == set(deltas)


def test_layers_that_the_config_names_by_number_keep_their_numbers(tmp_path: Path) -> None:
    plain = random_state(0, torch.bfloat16)
    stored = {name: tensor for name, tensor in coded(plain)[0].items() if "layers.1" not in name}
    stored |= {name: tensor for name, tensor in plain.items() if "layers.1" in name}
    for excluded, layers in ((["model.layers.1", "lm_head"], [0, 1]), (["lm_head"], [1, 0])):
        config = {"num_hidden_layers": 3, "quantization_config": {**CONFIG, "modules_to_not_convert": excluded}}
        base = str(save_checkpoint(tmp_path / str(layers[0]), stored, config=config))
        asked = [[{"sources": [{"model": base, "layer_range": [n, n + 1]}]} for n in some] for some in (layers, [1, 0])]
        recipe = {"merge_method": "passthrough", "quantization": "keep"}
        merge({**recipe, "slices": asked[0]}, tmp_path / f"{layers[0]}-out")
        with Checkpoint.open(tmp_path / f"{layers[0]}-out") as made:
            assert made.tensors[f"model.layers.{layers.index(1)}.self_attn.q_proj.weight"].dtype == "BF16"
        if len(excluded) > 1:
            said = "names 'model.layers.0.*, 'model.layers.1.* by number"
            with pytest.raises(PaftMergeError, match=said), open_plan({**recipe, "slices": asked[1]}):
                pass


def gpt_oss_like() -> tuple[State, State, dict[str, Any]]:
    """Experts as gpt-oss has them, beside a plain layer."""
    made, name = torch.Generator().manual_seed(1), "model.layers.0.mlp.experts"
    plain = {"model.norm.weight": torch.ones(8), f"{Q}.weight": torch.randn(8, 8, generator=made).bfloat16()}
    experts = {f"{name}.gate_up_proj": torch.zeros(2, 64, 6), f"{name}.down_proj": torch.zeros(2, 96, 8)}
    return mxfp4_experts({**plain, **experts})


def test_mxfp4_experts_are_written_and_plain_layers_leave_their_bytes(tmp_path: Path) -> None:
    stored, values, config = gpt_oss_like()
    folder = save_checkpoint(tmp_path / "base", stored, config={"quantization_config": config})
    plain, up = f"{Q}.weight", "model.layers.0.mlp.experts.gate_up_proj"
    again = dict(stored)
    again[f"{up}_blocks"] = stored[f"{up}_blocks"].flip(0)
    again[plain] = (values[plain] + 1).to(values[plain].dtype)
    tuned = save_checkpoint(tmp_path / "tuned", again, config={"quantization_config": config})
    merge(asked(folder, tuned, quantization="keep"), tmp_path / "out")
    got, was = stored_in(tmp_path / "out"), stored_in(folder)
    assert got.keys() == was.keys()
    down = "model.layers.0.mlp.experts.down_proj"
    assert all(torch.equal(got[f"{down}_{part}"], was[f"{down}_{part}"]) for part in ("blocks", "scales"))
    assert torch.equal(
        got[plain], (values[plain].float() + 0.5 * (again[plain].float() - values[plain].float())).bfloat16()
    )
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    written = convert_moe_packed_tensors(got[f"{up}_blocks"], got[f"{up}_scales"], dtype=torch.float32)
    wanted = (values_in(folder, up) + values_in(tmp_path / "tuned", up)) / 2
    assert torch.equal(written, values_in(tmp_path / "out", up))
    assert (written - wanted).norm() < 0.15 * wanted.norm()


def test_what_cannot_be_written_as_codes_is_refused_by_name(
    base: tuple[Path, State], adapter: tuple[Path, State], tmp_path: Path
) -> None:
    plain, tuned = (save_checkpoint(tmp_path / str(seed), random_state(seed)) for seed in (0, 1))
    with (
        pytest.raises(PaftMergeError, match="keep needs a quantised model"),
        open_plan(asked(plain, tuned, quantization="keep")),
    ):
        pass
    (folder, _), (source, _) = base, adapter
    with pytest.raises(PaftMergeError, match="cannot hold NaN"):
        merge(asked(folder, f"{folder}+{source}", quantization="keep"), tmp_path / "out", allow_nonfinite=True)
    for more, said in (
        ({"scales": "keep"}, "scales is a key of quantization: keep"),
        ({"quantization": "keep", "output": {"kind": "adapter"}}, "the output is of kind adapter"),
        ({"quantization": "keep", "arithmetic": "mergekit", "dtype": "bfloat16"}, "writes plain weights"),
    ):
        with pytest.raises(PaftMergeError, match=said), open_plan(asked(folder, f"{folder}+{source}", **more)):
            pass


LAYERS = {
    **{kind: partial(golden_layer, kind) for kind in ("int4_group", "int4_group_zeros", "int8_channel_zeros", "nvfp4")},
    "gptq": partial(gptq_layer, STEM, 4, ordered=True),
    "awq": partial(gptq_layer, STEM, 4, ordered=False, awq=True),
    "nf4": partial(four_bit_layer, STEM, "nf4", (24, 40), nested=True),
}
SAME = ("weight_shape", "weight_global_scale", "g_idx", "quant_map", "nested_absmax", "bitsandbytes__nf4")
"""The ends of the names of tensors that stay as they are."""


@pytest.mark.parametrize("kind", LAYERS)
def test_each_format_is_written_and_what_belongs_to_no_code_is_copied(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, config, values = LAYERS[kind]()
    weight = next(part for part in codes if part.endswith(("weight_packed", "qweight", ".weight")))
    changed = {**codes, weight: codes[weight].flip(0)}
    base, other = (
        save_checkpoint(
            tmp_path / str(at),
            {**held, f"{Q}.weight": torch.full((4, 4), float(at))},
            config={"quantization_config": config},
        )
        for at, held in enumerate((codes, changed))
    )
    (base / "quant_config.json").write_text("{}")
    wanted = (values + values_in(other, f"{STEM}.weight")) / 2
    for rounding in ("nearest", "stochastic"):
        recipe, out = asked(base, other, quantization="keep", rounding=rounding), tmp_path / rounding
        merge(recipe, out)
        got, was = stored_in(out), stored_in(base)
        assert list(got) == list(was)
        assert all(torch.equal(got[part], was[part]) for part in was if part.endswith(SAME))
        written = values_in(out, f"{STEM}.weight")
        assert (written - wanted).norm() < 0.2 * wanted.norm()
        lost = ((written - wanted).norm() / (wanted - values).norm()).item()
        assert record(out)["quantization"]["relative_error"] == pytest.approx(lost, rel=1e-3)
        with monkeypatch.context() as patched:
            patched.setattr(blocks, "TILE", 1 << 8)
            merge(recipe, tmp_path / "blocks", threads=2, overwrite=True)
        again = stored_in(tmp_path / "blocks")
        assert all(torch.equal(again[part], got[part]) for part in got)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(base)}], "quantization": "keep"}
    merge(recipe, tmp_path / "copy")
    got = stored_in(tmp_path / "copy")
    assert all(torch.equal(got[part], tensor) for part, tensor in stored_in(base).items())
    assert got.keys() == stored_in(base).keys()
    assert (tmp_path / "copy" / "quant_config.json").exists()
