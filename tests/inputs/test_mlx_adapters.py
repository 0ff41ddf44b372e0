"""Adapters of mlx-lm are read as mlx-lm fuses them; adapters elsewhere in a folder are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_state, save_adapter, save_checkpoint
from safetensors.torch import load_file, save_file

from paft_merge import merge
from paft_merge.errors import PaftMergeError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized.recognition import quantised

State = dict[str, torch.Tensor]
Q, UP, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens"
NUMBERS = {"rank": 4, "scale": 20.0, "dropout": 0.0}


def mlx(folder: Path, tensors: State, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    save_file(tensors, folder / "0000100_adapters.safetensors", metadata={"format": "mlx"})
    fields = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": NUMBERS,
        "model": "mlx-community/x",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


def factors(base: State, *stems: str) -> State:
    made = torch.Generator().manual_seed(5)
    found: State = {}
    for stem in stems:
        out, inner = base[f"{stem}.weight"].shape
        first, last = (out, inner) if stem == EMBED else (inner, out)
        found[f"{stem}.lora_a"] = torch.randn(first, 4, generator=made) * 0.1
        found[f"{stem}.lora_b"] = torch.randn(4, last, generator=made) * 0.1
    return found


def fused(base: State, adapter: State, scale: float) -> State:
    """As `mlx_lm.tuner` fuses LoRALinear, LoRAEmbedding and DoRALinear, in float64."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name in (name for name in adapter if name.endswith(".lora_a")):
        stem = name.removesuffix(".lora_a")
        a, b = adapter[name].double(), adapter[f"{stem}.lora_b"].double()
        weight = found[f"{stem}.weight"] + (scale * a @ b if stem == EMBED else (scale * b.T) @ a.T)
        if f"{stem}.m" in adapter:
            weight = (adapter[f"{stem}.m"].double() / torch.linalg.norm(weight, dim=1))[:, None] * weight
        found[f"{stem}.weight"] = weight
    return found


def merged(base: Path, adapter: Path, out: Path) -> State:
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
    merge({"merge_method": "task_arithmetic", "base_model": str(base), "models": models}, out)
    return load_file(out / "model.safetensors")


def check(ours: State, wanted: State) -> None:
    assert ours.keys() == wanted.keys()
    assert max(float((ours[name].double() - wanted[name]).abs().max()) for name in wanted) < 1e-6


def test_linear_layers_and_embeddings_equal_the_fusion_of_mlx(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "base", state)
    tensors = factors(state, Q, UP, EMBED)
    check(merged(base, mlx(tmp_path / "ad", tensors), tmp_path / "out"), fused(state, tensors, 20.0))


def test_dora(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "base", state)
    tensors = factors(state, Q, UP)
    tensors |= {f"{stem}.m": torch.linalg.norm(state[f"{stem}.weight"], dim=1) * 1.1 for stem in (Q, UP)}
    adapter = mlx(tmp_path / "ad", tensors, fine_tune_type="dora", lora_parameters=NUMBERS | {"scale": 2.5})
    check(merged(base, adapter, tmp_path / "out"), fused(state, tensors, 2.5))


def test_whole_weights_of_full_fine_tuning(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "base", state)
    tensors = {f"{Q}.weight": state[f"{Q}.weight"] + 1}
    adapter = mlx(tmp_path / "ad", tensors, fine_tune_type="full", lora_parameters=None)
    check(merged(base, adapter, tmp_path / "out"), {n: t.double() for n, t in (state | tensors).items()})


def test_a_layer_that_stores_its_transpose(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "base"
    )
    state = load_file(tmp_path / "base" / "model.safetensors")
    stems = {"transformer.h.0.attn.c_attn": (16, 48), "transformer.h.0.attn.c_proj": (16, 16)}
    made = torch.Generator().manual_seed(1)
    tensors = {f"{s}.lora_a": torch.randn(i, 4, generator=made) * 0.1 for s, (i, _) in stems.items()}
    tensors |= {f"{s}.lora_b": torch.randn(4, o, generator=made) * 0.1 for s, (_, o) in stems.items()}
    ours = merged(tmp_path / "base", mlx(tmp_path / "ad", tensors), tmp_path / "out")
    for stem in stems:
        wanted = (
            state[f"{stem}.weight"].double()
            + 20 * tensors[f"{stem}.lora_a"].double() @ tensors[f"{stem}.lora_b"].double()
        )
        assert float((ours[f"{stem}.weight"].double() - wanted).abs().max()) < 1e-6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale: must be a number"),
    "no rank": ({"lora_parameters": {"scale": 2.0}}, "lora_parameters.rank: must be a whole number above 0"),
    "another rank": ({"lora_parameters": {"rank": 8, "scale": 2.0}}, "has factors of rank 4, but adapter_config.json gives it rank 8"),
    "alpha of old versions": ({"lora_parameters": NUMBERS | {"alpha": 16}}, "lora_parameters.alpha: versions of mlx-lm differ"),
    "another kind": ({"fine_tune_type": "ssd"}, "fine_tune_type: 'ssd' is not lora, dora or full"),
    "mlx-vlm": ({"lora_parameters": None, "fine_tune_type": None, "rank": 4, "alpha": 2}, "an adapter of MLX, and has no lora_parameters"),
    "magnitudes without dora": ({"fine_tune_type": "lora"}, "has a lora_magnitude_vector, but use_dora is false"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_sure_is_refused(case: str, tmp_path: Path) -> None:
    state = random_state(0)
    tensors = factors(state, Q) | ({f"{Q}.m": torch.ones(24)} if "magnitudes" in case else {})
    adapter = mlx(tmp_path / "ad", tensors, **REFUSED[case][0])
    with Checkpoint.open(save_checkpoint(tmp_path / "base", state)) as base, pytest.raises(PaftMergeError) as caught:
        Adapter.open(adapter, base)
    (problem,) = caught.value.problems
    assert REFUSED[case][1] in problem.what


def test_experts_are_refused(tmp_path: Path) -> None:
    state = random_state(0)
    tensors = {f"{Q}.lora_a": torch.ones(2, 4, 24), f"{Q}.lora_b": torch.ones(2, 24, 4)}
    with (
        Checkpoint.open(save_checkpoint(tmp_path / "base", state)) as base,
        pytest.raises(PaftMergeError, match="of experts"),
    ):
        Adapter.open(mlx(tmp_path / "ad", tensors), base)


def test_a_quantised_model_of_mlx_is_named(tmp_path: Path) -> None:
    state = random_state(0, torch.float16)
    state |= {
        f"{Q}.weight": torch.zeros(24, 3, dtype=torch.uint32),
        f"{Q}.scales": torch.ones(24, 1),
        f"{Q}.biases": torch.ones(24, 1),
    }
    folder = save_checkpoint(tmp_path / "m", state, config={"quantization": {"group_size": 64, "bits": 4}})
    with Checkpoint.open(folder) as checkpoint:
        assert quantised(checkpoint).how == "MLX, 4 bits"


# --- adapters that are elsewhere --------------------------------------------------------------------------------------


def refusal(base: Path, source: str, out: Path) -> list[str]:
    models = [{"model": source, "parameters": {"weight": 1.0}}]
    with pytest.raises(PaftMergeError) as caught:
        merge({"merge_method": "task_arithmetic", "base_model": str(base), "models": models}, out)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Path]:
    """A base, and the folder of a training run with two checkpoints of an adapter."""
    state = random_state(0)
    folder = tmp_path / "run"
    for step in (1000, 500):
        place = save_adapter(folder / f"checkpoint-{step}", state, step)
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/base"}))
        (place / "training_args.bin").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")
    return {"base": save_checkpoint(tmp_path / "base", state), "run": folder, "out": tmp_path / "out"}


@pytest.mark.parametrize("config_at_the_top", [False, True])
def test_an_adapter_in_a_checkpoint_folder_is_found_and_named(run: dict[str, Path], config_at_the_top: bool) -> None:
    if config_at_the_top:
        (run["run"] / "adapter_config.json").write_text("{}")
    (line,) = refusal(run["base"], f"{run['base']}+{run['run']}", run["out"])
    assert f"write {run['run']}/checkpoint-1000 (or an earlier one: checkpoint-500)" in line


def test_adapters_in_named_folders_are_not_called_earlier_ones(run: dict[str, Path]) -> None:
    for old, new in (("checkpoint-1000", "sft"), ("checkpoint-500", "dpo")):
        (run["run"] / old).rename(run["run"] / new)
    (line,) = refusal(run["base"], f"{run['base']}+{run['run']}", run["out"])
    assert f"write {run['run']}/sft (or another one: dpo)" in line


def test_a_folder_of_a_trainer_without_its_base_prints_what_to_write(run: dict[str, Path]) -> None:
    (line,) = refusal(run["base"], str(run["run"]), run["out"])
    assert f"write some/base+{run['run']}/checkpoint-1000" in line
    (line,) = refusal(run["base"], str(run["run"] / "checkpoint-500"), run["out"])
    assert f"write some/base+{run['run']}/checkpoint-500" in line


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapters.safetensors"])
def test_other_files_of_adapters_are_no_checkpoint_either(run: dict[str, Path], name: str) -> None:
    place = run["run"] / "checkpoint-500"
    (place / "adapter_model.safetensors").rename(place / name)
    (line,) = refusal(run["base"], str(place), run["out"])
    assert "holds an adapter and no checkpoint" in line
    assert f"write some/base+{place}" in line


@pytest.mark.parametrize("both", [False, True])
def test_factors_inside_a_checkpoint_are_named_once_for_each_model(
    run: dict[str, Path], tmp_path: Path, both: bool
) -> None:
    state = random_state(0)
    inside = {f"{Q}.lora_A.default.weight": torch.ones(4, 24), f"{Q}.lora_B.default.weight": torch.ones(24, 4)}
    one = save_checkpoint(tmp_path / "one", state | inside)
    base = save_checkpoint(tmp_path / "two", state | inside) if both else run["base"]
    lines = refusal(base, str(one), run["out"])
    assert len(lines) == 1 + both
    assert all("2 tensors of an adapter that was never merged" in line for line in lines)


def test_wrapped_weights_inside_a_checkpoint_are_named(run: dict[str, Path], tmp_path: Path) -> None:
    state = random_state(0)
    state[f"{Q}.base_layer.weight"] = state.pop(f"{Q}.weight")
    (line,) = refusal(run["base"], str(save_checkpoint(tmp_path / "one", state)), run["out"])
    assert "base_layer" in line
