"""`unsafe_truncate_embeddings`: rows by position, to the smallest vocabulary of the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from safetensors.torch import load_file
from toys.merge import manifest_of

from paft_merge import merge, open_plan
from paft_merge.errors import PaftMergeError

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def larger(folder: Path, seed: int, more: int) -> Path:
    state = near(random_state(0), seed)
    for name in (HEAD, EMBED):
        state[name] = torch.cat([state[name], torch.full((more, 24), 9.0)])
    return save_checkpoint(folder, state, config={"vocab_size": 40 + more})


def asked(base: Path, *sources: object) -> dict[str, Any]:
    models = [{"model": str(source), "parameters": {"weight": 0.5}} for source in sources]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (2, 5)])
def test_embeddings_end_after_the_smallest_vocabulary(tmp_path: Path, sizes: tuple[int, int]) -> None:
    base, x = larger(tmp_path / "base", 1, sizes[0]), larger(tmp_path / "x", 2, sizes[1])
    with pytest.raises(PaftMergeError, match="the vocabularies differ"):
        merge(asked(base, x), tmp_path / "out")
    done = merge(asked(base, x), tmp_path / "out", unsafe_truncate_embeddings=True)
    rows = 40 + min(sizes)
    before, after = load_file(base / "model.safetensors"), load_file(x / "model.safetensors")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in out.items():
        old, new = (t[name][:rows].double() if name in (HEAD, EMBED) else t[name].double() for t in (before, after))
        assert float((tensor.double() - (old + 0.5 * (new - old))).abs().max()) < 1e-6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    assert manifest_of(done)["options"]["unsafe_truncate_embeddings"] is True


def test_each_model_that_is_cut_is_a_warning(tmp_path: Path) -> None:
    base, x, y = larger(tmp_path / "base", 1, 0), larger(tmp_path / "x", 2, 3), larger(tmp_path / "y", 3, 0)
    with open_plan(asked(base, x, y), unsafe_truncate_embeddings=True) as plan:
        cut = [one for one in plan.warnings if one.code == "TRUNCATED"]
    assert [(one.where, "2 tensors are cut from 43 to 40 rows" in one.what) for one in cut] == [(str(x), True)]


def test_an_adapter_on_a_model_that_is_cut_keeps_its_layers(tmp_path: Path) -> None:
    base, x = larger(tmp_path / "base", 1, 0), larger(tmp_path / "x", 2, 3)
    adapter = save_adapter(tmp_path / "ad", random_state(0), 5)
    merge(asked(base, f"{x}+{adapter}"), tmp_path / "out", unsafe_truncate_embeddings=True)
    assert load_file(tmp_path / "out" / "model.safetensors")[EMBED].shape == (40, 24)
