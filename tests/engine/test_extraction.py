"""`extract`: the best low-rank approximation of a fine-tune's difference from its base, loaded by PEFT."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.adapters import error, gpt2, llama, merged_by_peft, merged_by_us, save
from toys.merge import paft

from paft_merge.auditing.rank_costs import rank_curve
from paft_merge.engine.extraction import extract, output_of, recipe_of
from paft_merge.errors import MergeError, PaftMergeError, RecipeError

Models = tuple[Path, Path]


def tuned(folder: Path, make: Callable[[], Any], rank: int = 16, vectors: bool = True) -> Models:
    """A base, and a fine-tune whose changes of matrices have a rank and falling singular values."""
    torch.manual_seed(0)
    model = make()
    save(model, folder / "base")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            fall = 0.7 ** torch.arange(rank)
            parameter.data += 0.01 * (torch.randn(len(parameter), rank) * fall) @ torch.randn(rank, parameter.shape[1])
        elif vectors:
            parameter.data += 0.001 * torch.randn_like(parameter)
    save(model, folder / "tuned")
    return folder / "tuned", folder / "base"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return tuned(tmp_path_factory.mktemp("models"), llama)


def deltas(models: Models) -> dict[str, Any]:
    """What the fine-tune adds, in float64."""
    tuned, base = (load_file(folder / "model.safetensors") for folder in models)
    return {name: (tuned[name].double() - base[name].double()).numpy() for name in base}


def test_the_error_is_the_smallest_possible_one(models: Models, tmp_path: Path) -> None:
    made = extract(*models, tmp_path / "out", rank=4)
    whole, start = deltas(models), load_file(models[1] / "model.safetensors")
    held = {n: (t.double() - start[n].double()).numpy() for n, t in merged_by_us(models[1], made.merge.path).items()}  # type: ignore[arg-type]
    inside = [n for n, d in whole.items() if d.ndim == 2 and "embed" not in n]
    lost = math.sqrt(sum(float(np.square(whole[n] - held[n]).sum()) for n in inside))
    best = math.sqrt(sum(float(np.square(np.linalg.svd(whole[n], compute_uv=False)[4:]).sum()) for n in inside))
    norm = math.sqrt(sum(float(np.square(whole[n]).sum()) for n in inside))
    assert best <= lost <= 1.01 * best
    assert made.error == pytest.approx(lost / norm, rel=1e-3)
    assert set(made.left_out) == whole.keys() - set(inside)
    assert made.left_out["model.norm.weight"] == pytest.approx(np.linalg.norm(whole["model.norm.weight"]), rel=1e-5)
    others = sum(float(np.square(d).sum()) for n, d in whole.items() if n not in inside)
    assert made.left_out_share == pytest.approx(others / (others + norm**2), rel=1e-5)


@pytest.mark.parametrize(("make", "tied"), [(llama, set()), (gpt2, {"transformer.wte.weight"})])
def test_peft_loads_the_whole_fine_tune_where_the_rank_suffices(make: Any, tied: set[str], tmp_path: Path) -> None:
    models = tuned(tmp_path, make, rank=5)
    made = extract(*models, tmp_path / "out", rank=5, portable=False)
    merged = merged_by_peft(make, models[1], tmp_path / "out", tmp_path / "merged")
    assert made.left_out.keys() == tied  # PEFT would change the embedding, and leave the head that is tied to it
    wanted = load_file(models[0] / "model.safetensors")
    assert error({n: merged[n] for n in merged.keys() - tied}, {n: wanted[n] for n in wanted.keys() - tied}) < 1e-5


def test_energy_limits_and_names(models: Models, tmp_path: Path) -> None:
    made = extract(
        *models, tmp_path / "out", energy=0.95, max_rank=7, include=["layers.*"], exclude=["mlp.*", "k_proj"]
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    whole = deltas(models)
    needed = [
        1 + int(np.searchsorted(np.cumsum(s**2), 0.95 * np.sum(s**2)))
        for n, d in whole.items()
        if n.split(".")[-2] in config["target_modules"]
        for s in [np.linalg.svd(d, compute_uv=False)]
    ]
    assert config["r"] == min(7, max(needed))
    assert made.error < math.sqrt(0.06)
    assert "model.layers.0.mlp.up_proj.weight" in made.left_out


def test_the_curve_is_the_error_of_each_extraction(models: Models, tmp_path: Path) -> None:
    curve = rank_curve(recipe_of(*models, **output_of(16, None, None, (), (), True)), 16)
    assert list(curve.ranks) == [1, 2, 4, 8, 16]
    for rank in (2, 8):
        made = extract(*models, tmp_path / str(rank), rank=rank)
        assert curve.error(rank) == pytest.approx(made.error, rel=0.01)
        size = sum(t.numel() for t in load_file(tmp_path / str(rank) / "adapter_model.safetensors").values())
        assert curve.parameters(rank) == size
    need = curve.needed(0.95)
    made = extract(*models, tmp_path / "energy", energy=0.95)
    assert need.largest == made.to_json()["rank"]
    assert curve.needed(1.0).largest is None or curve.error(16) < 1e-5


def test_the_command(models: Models, tmp_path: Path) -> None:
    run = paft("extract", models[0], tmp_path / "out", "--base", models[1], "--rank", "4", "--dtype", "bfloat16")
    assert run.exit_code == 0, run.output
    assert run.stdout == f"{tmp_path / 'out'}\n"
    assert "LoRA of rank 4 on 15 modules, relative error of 0.1" in run.stderr
    assert "left out: 6 deltas with" in run.stderr
    run = paft("extract", models[0], "--base", models[1], "--curve", "--max-rank", "5", "--plot", tmp_path / "c.svg")
    assert run.exit_code == 0, run.output
    assert [line.split()[0] for line in run.stdout.splitlines()[1:5]] == ["1", "2", "4", "5"]
    assert "--energy 0.99 needs more than rank 5" in run.stdout
    assert "all modules" in (tmp_path / "c.svg").read_text()
    run = paft("extract", models[0], tmp_path / "more", "--base", models[1], "--curve")
    assert (run.exit_code, "--curve writes no adapter: leave out OUT" in run.output) == (2, True)
    for wrong in ([], ["--rank", "4", "--energy", "0.9"], ["--rank", "4", "--plot", "x.svg"], ["--rank", "0"]):
        assert paft("extract", models[0], tmp_path / "more", "--base", models[1], *wrong).exit_code == 2
    assert not (tmp_path / "more").exists()


def test_what_cannot_be_extracted_is_refused(models: Models, tmp_path: Path) -> None:
    same = Path(shutil.copytree(models[1], tmp_path / "same"))
    with pytest.raises(MergeError, match="the sources do not differ from the base"):
        extract(same, models[1], tmp_path / "out", rank=4)
    with pytest.raises(RecipeError, match="the fine-tune and the base are both"):
        extract(models[1], models[1], tmp_path / "out", rank=4)
    save(llama(hidden_size=32), tmp_path / "wide")
    with pytest.raises(PaftMergeError):
        extract(tmp_path / "wide", models[1], tmp_path / "out", rank=4)
    with pytest.raises(RecipeError, match="include: no module matches 'qproj'"):
        extract(*models, tmp_path / "out", rank=4, include=["qproj"])
    with pytest.raises(MergeError, match=r"more than max_error=0\.01"):
        extract(*models, tmp_path / "out", rank=1, max_error=0.01)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_and_a_larger_vocabulary_are_left_out(tmp_path: Path) -> None:
    models = tuned(tmp_path, lambda: llama(tie_word_embeddings=True))
    assert "model.embed_tokens.weight" in extract(*models, tmp_path / "tied", rank=4).left_out
    state = load_file(models[0] / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(
        {**state, name: torch.cat([state[name], state[name][:3]])}, models[0] / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((models[0] / "config.json").read_text())
    (models[0] / "config.json").write_text(json.dumps({**config, "vocab_size": 43}))
    with pytest.raises(PaftMergeError, match="the vocabularies differ"):
        extract(*models, tmp_path / "grown", rank=4)
    made = extract(*models, tmp_path / "grown", rank=4, unsafe_truncate_embeddings=True)
    assert name in made.left_out
