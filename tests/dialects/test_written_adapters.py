"""The adapters that a merge and `paft resize` write are read by every program; what we convert loads in the programs themselves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import save_adapter, save_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file
from toys import adapters, readers
from toys.merge import on, recipe
from toys.served import base_state

from paft_merge import merge
from paft_merge.cli import cli
from paft_merge.dialects.checking import check
from paft_merge.dialects.conversion import convert

Trained = dict[str, tuple[Path, Path, dict[str, torch.Tensor]]]


def reads_all(folder: Path, tmp_path: Path) -> None:
    """Every program reads it: four as it is, mlx-lm and LyCORIS after a conversion that changes nothing."""
    assert {v.reader: v.outcome for v in check(folder)} == {"mlx": "refuses", **dict.fromkeys(("vllm", "sglang", "llamacpp", "peft"), "loads")}  # fmt: skip
    deltas = [read(folder) for read in readers.READERS.values()]
    assert deltas[0]
    for other in deltas[1:]:
        assert all(torch.equal(other[name], delta) for name, delta in deltas[0].items())
    for to in ("mlx", "kohya"):
        assert [n.what for n in convert(folder, tmp_path / to, to) if "other files" not in n.what] == []  # type: ignore[arg-type]


def test_a_merge_to_an_adapter_is_read_by_all(tmp_path: Path) -> None:
    state = base_state()
    base = save_checkpoint(tmp_path / "base", state)
    for name, rank in (("a", 3), ("b", 5)):
        save_adapter(tmp_path / name, state, rank, rank)
    asked = recipe(
        "ties", base, *((on(base, tmp_path / name), {"weight": 0.5}) for name in "ab"), parameters={"density": 0.5}
    )
    merge({**asked, "output": {"kind": "adapter", "rank": 8}}, tmp_path / "out")
    reads_all(tmp_path / "out", tmp_path)


def test_a_resized_adapter_is_read_by_all(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", base_state(), 1, rank=8)
    fields = json.loads((adapter / "adapter_config.json").read_text()) | {
        "use_rslora": True,
        "target_modules": ".*(q|v)_proj",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    assert not all(verdict.passes for verdict in check(adapter, ["sglang", "llamacpp"]))
    done = CliRunner().invoke(cli, ["resize", str(adapter), str(tmp_path / "out"), "--rank", "4"])
    assert done.exit_code == 0, done.output
    reads_all(tmp_path / "out", tmp_path)


# --- the programs themselves ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Bases, adapters by PEFT, and what PEFT merges of them."""
    q = ["q_proj", "v_proj"]
    patterns: dict[str, Any] = {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 5}}
    configs = {
        "patterns": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=r".*\.[qv]_proj", **patterns),
        "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=q),
        "embeddings": LoraConfig(r=4, lora_alpha=8, target_modules=[*q, "embed_tokens", "lm_head"]),
    }
    found = {}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base, adapter = adapters.train(adapters.llama(), folder, config)
        found[name] = base, adapter, adapters.merged_by_peft(adapters.llama, base, adapter, folder / "merged")
    return found


@pytest.mark.parametrize("made", ["patterns", "embeddings"])
def test_peft_loads_the_portable_form(made: str, trained: Trained, tmp_path: Path) -> None:
    base, adapter, merged = trained[made]
    convert(adapter, tmp_path / "out", "vllm")
    ours = adapters.merged_by_peft(adapters.llama, base, tmp_path / "out", tmp_path / "merged")
    assert max(float((ours[name] - merged[name]).abs().max()) for name in merged) < 1e-6


@pytest.mark.parametrize("made", ["patterns", "dora", "embeddings"])
def test_mlx_loads_what_is_converted(made: str, trained: Trained, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    base, adapter, merged = trained[made]
    convert(adapter, tmp_path / "out", "mlx")
    fields = json.loads((base / "config.json").read_text())
    model = Model(ModelArgs.from_dict({**fields, "rope_theta": 10000.0}))
    model.load_weights(list(mx.load(str(base / "model.safetensors")).items()))
    model = load_adapters(model, str(tmp_path / "out"))
    model.update_modules(tree_unflatten([(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]))
    ours = {name: torch.tensor(value.tolist()) for name, value in tree_flatten(model.parameters())}
    assert ours.keys() == merged.keys()
    assert max(float((ours[name] - merged[name]).abs().max()) for name in merged) < 1e-6


@pytest.mark.parametrize("made", ["patterns", "dora"])
def test_lycoris_loads_what_is_converted(made: str, trained: Trained, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    base, adapter, merged = trained[made]
    convert(adapter, tmp_path / "out", "kohya")
    model = type(adapters.llama()).from_pretrained(base, dtype=torch.float32)  # type: ignore[attr-defined]
    file = tmp_path / "out" / "lora.safetensors"
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model, weights_sd=load_file(file))
    network.merge_to(1.0)
    ours = {name.replace(".org_module.", "."): value for name, value in model.state_dict().items()}
    assert max(float((ours[name] - merged[name]).abs().max()) for name in merged) < 1e-6
