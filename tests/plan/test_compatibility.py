"""Models that do not match are refused with what differs and why, one line for each kind of difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near, random_state, save_checkpoint
from safetensors.torch import save_file
from toys.merge import recipe

from paft_merge import open_plan
from paft_merge.errors import PaftMergeError, Problem


def asked(base: Path, source: Path) -> dict[str, Any]:
    return recipe("task_arithmetic", base, (source, {"weight": 0.5}))


def refusal(base: Path, source: Path) -> list[Problem]:
    with pytest.raises(PaftMergeError) as caught, open_plan(asked(base, source)):
        pass
    return list(caught.value.problems)


def test_tensors_that_differ_in_the_same_way_are_one_line(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "base", state)
    wide = {name: torch.ones(7, 24) if name.endswith("up_proj.weight") else tensor for name, tensor in state.items()}
    (problem,) = refusal(base, save_checkpoint(tmp_path / "x", wide))
    assert problem.code == "SHAPE_MISMATCH"
    assert "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight and 1 more" in problem.where
    assert problem.what == f"are [7, 24], and {base} has [48, 24]"


def test_the_layout_of_mlx_is_named_as_the_reason(tmp_path: Path) -> None:
    """MLX stores convolutions channels last and stacks experts; its files say `format: mlx`."""
    state = {"conv.weight": torch.randn(4, 3, 2, 2)}
    base = save_checkpoint(tmp_path / "base", state)
    x = save_checkpoint(tmp_path / "x", state)
    save_file({"conv.weight": torch.randn(4, 2, 2, 3)}, x / "model.safetensors", {"format": "mlx"})
    (problem,) = refusal(base, x)
    assert (problem.code, "written by MLX" in str(problem)) == ("SHAPE_MISMATCH", True)
    save_file({"switch.weight": torch.randn(4, 3, 2, 2)}, x / "model.safetensors", {"format": "mlx"})
    assert ["written by MLX" in str(one) for one in refusal(base, x)] == [True, True]
    save_file({"conv.weight": torch.randn(4, 2, 2, 3)}, x / "model.safetensors", {"format": "pt"})
    assert ["MLX" in str(one) for one in refusal(base, x)] == [False]


GEMMA = {"model_type": "gemma", "vocab_size": 40}
LLAMA = {"model_type": "llama", "vocab_size": 40}


@pytest.mark.parametrize(
    ("config", "ties"),
    [
        (LLAMA | {"tie_word_embeddings": True}, True),
        (LLAMA | {"tie_word_embeddings": False}, False),
        (LLAMA, False),
        (GEMMA, True),
        (GEMMA | {"tie_word_embeddings": False}, False),
        ({"model_type": "llava", "text_config": LLAMA | {"tie_word_embeddings": True}}, True),
    ],
    ids=str,
)
def test_copies_of_tied_embeddings_that_differ_are_a_warning(
    config: dict[str, Any], ties: bool, tmp_path: Path
) -> None:
    state = random_state(0)
    base, x = save_checkpoint(tmp_path / "base", state), save_checkpoint(tmp_path / "x", near(state, 1))
    for folder in (base, x):
        (folder / "config.json").write_text(json.dumps(config))
    with open_plan(asked(base, x)) as plan:
        found = [one for one in plan.warnings if one.code == "TIED_DIFFERS"]
    assert [one.where for one in found] == ([str(base), str(x)] if ties else [])
    assert all("stores 'lm_head.weight', which differs from 'model.embed_tokens.weight'" in str(one) for one in found)


def test_equal_copies_of_tied_embeddings_are_no_warning(tmp_path: Path) -> None:
    state = random_state(0)
    state |= {"vision.in_proj_weight": torch.ones(40, 24), "model.layers.1.gate.weight": torch.ones(40, 24)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    x = near(state, 1)
    x["lm_head.weight"] = x["model.embed_tokens.weight"].clone()
    config = LLAMA | {"tie_word_embeddings": True}
    folders = [save_checkpoint(tmp_path / name, held, config=config) for name, held in (("base", state), ("x", x))]
    with open_plan(asked(*folders)) as plan:
        assert [one for one in plan.warnings if one.code == "TIED_DIFFERS"] == []
