"""`output: {kind: delta}`: added to its base, the file gives the merged checkpoint; SHiRA, which PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, near, random_state, save_adapter, save_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file
from toys.adapters import error, llama, merged_by_peft, merged_by_us, train
from toys.merge import bits_equal, manifest_of, on, paft, recipe, recipe_for, tensors_of, write_recipe

from paft_merge import merge
from paft_merge.auditing.from_manifest import recorded
from paft_merge.compute import blocks
from paft_merge.engine import sparse_deltas
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import CheckpointError, MergeError, PaftMergeError, RecipeError
from paft_merge.inputs.checkpoint import Checkpoint

FILE = "adapter_model.safetensors"
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def as_delta(given: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {**given, "output": {"kind": "delta", **extra}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a bias, two fine-tunes of it and two adapters on it."""
    folder = tmp_path_factory.mktemp("models")
    state = random_state(0, torch.bfloat16, layers=2) | {"model.layers.0.mlp.up_proj.bias": torch.ones(48).bfloat16()}
    tuned = {f"tuned{i}": save_checkpoint(folder / f"tuned{i}", near(state, i)) for i in (1, 2)}
    base = save_checkpoint(folder / "base", state)
    adapters = {f"lora{i}": on(base, save_adapter(folder / f"lora{i}", state, i)) for i in (1, 2)}
    return {"base": base, **tuned, **adapters}  # type: ignore[dict-item]


def ties(made: dict[str, Path], kind: str = "tuned") -> dict[str, Any]:
    return recipe_for("ties", made["base"], made[f"{kind}1"], made[f"{kind}2"])


def folded(base: Path, delta: Path, out: Path) -> State:
    """The base with a delta added, as our reader adds it."""
    merge(recipe("linear", None, (on(base, delta), {"weight": 1.0})), out)
    return tensors_of(out)


@pytest.mark.parametrize("kind", ["tuned", "lora"])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs", "della_linear", "arcee_fusion"])
def test_a_delta_on_its_base_is_the_merged_checkpoint(
    method: str, kind: str, made: dict[str, Path], tmp_path: Path
) -> None:
    given = recipe_for(method, made["base"], made[f"{kind}1"], made[f"{kind}2"])
    merge(given, tmp_path / "checkpoint")
    merge(as_delta(given), tmp_path / "delta")
    after, wanted = folded(made["base"], tmp_path / "delta", tmp_path / "folded"), tensors_of(tmp_path / "checkpoint")
    assert [name for name in wanted if not bits_equal(after[name], wanted[name])] == []
    with Checkpoint.open(tmp_path / "delta" / FILE) as stored:
        kinds = [info.dtype for info in stored.tensors.values()]
    assert kinds == sorted(kinds)  # F32 before U8, so that every value is at a multiple of its size
    assert set(kinds) == {"F32", "U8"}


@pytest.mark.parametrize("method", ["task_arithmetic", "slerp"])
def test_sums_that_begin_with_the_base_differ_by_the_last_bit_of_a_few_entries(
    method: str, made: dict[str, Path], tmp_path: Path
) -> None:
    given = recipe_for(method, made["base"], made["tuned1"], made["tuned2"])
    merge(given, tmp_path / "checkpoint")
    merge(as_delta(given), tmp_path / "delta")
    after, wanted = folded(made["base"], tmp_path / "delta", tmp_path / "folded"), tensors_of(tmp_path / "checkpoint")
    steps = torch.cat(
        [(after[n].view(torch.int16).int() - wanted[n].view(torch.int16).int()).reshape(-1) for n in wanted]
    )
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() < 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_rounded_once_to_the_type_that_the_recipe_asks_for(
    dtype: str, made: dict[str, Path], tmp_path: Path
) -> None:
    given = as_delta(recipe("task_arithmetic", made["base"], (made["lora1"], {"weight": 0.5})))
    merge({**given, "out_dtype": "float32"}, tmp_path / "exact")
    merge({**given, "out_dtype": dtype}, tmp_path / "nearest")
    merge({**given, "out_dtype": dtype, "rounding": "stochastic"}, tmp_path / "stochastic")
    kind, name = getattr(torch, dtype), f"{Q}.delta"
    exact, nearest, drawn = (load_file(tmp_path / way / FILE)[name] for way in ("exact", "nearest", "stochastic"))
    assert torch.equal(nearest, exact.to(kind))
    up, down = (torch.nextafter(nearest, torch.tensor(end, dtype=kind)) for end in (torch.inf, -torch.inf))
    assert ((drawn == nearest) | (drawn == up) | (drawn == down)).all()
    assert 0.05 < (drawn != nearest).float().mean() < 0.5


def test_threads_and_blocks_change_no_bit(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = as_delta(recipe_for("dare_linear", made["base"], made["tuned1"], made["tuned2"]))
    merge(given, tmp_path / "one", threads=1)
    wanted = (tmp_path / "one" / FILE).read_bytes()
    monkeypatch.setattr(blocks, "TILE", 100)
    merge(given, tmp_path / "many", threads=3)
    assert (tmp_path / "many" / FILE).read_bytes() == wanted


@pytest.mark.parametrize("damage", [False, True])
def test_a_killed_merge_resumes_and_checks_what_is_there(
    damage: bool, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, done = as_delta(ties(made)), list[str]()
    merge(given, tmp_path / "whole")

    def stop(progress: Any) -> None:
        done.append(progress.name)
        if len(done) == len(manifest_deltas) + 4:  # the first pass counts every delta
            raise InterruptedError

    manifest_deltas = {entry["delta_of"] for entry in manifest_of(tmp_path / "whole")["tensors"].values()}
    with pytest.raises(InterruptedError):
        merge(given, tmp_path / "out", progress=stop, threads=1)
    if damage:
        file = tmp_path / "out.part" / FILE
        file.write_bytes(file.read_bytes()[:3000] + b"\1" + file.read_bytes()[3001:])
    packed, take = list[str](), sparse_deltas._Packer.take
    monkeypatch.setattr(
        sparse_deltas._Packer,
        "take",
        lambda self, tensor, *rest: (packed.append(tensor.merged.name), take(self, tensor, *rest)),
    )
    merge(given, tmp_path / "out", resume=True)
    assert len(packed) == len(manifest_deltas) - 4 + damage
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    again = merge(given, tmp_path / "out", resume=True)
    assert again.bytes_written == 0


def test_a_delta_is_reproduced_and_its_manifest_is_about_the_deltas(made: dict[str, Path], tmp_path: Path) -> None:
    merge(as_delta(ties(made)), tmp_path / "delta")
    merge(ties(made), tmp_path / "checkpoint")
    assert reproduce(tmp_path / "delta").identical
    entries = manifest_of(tmp_path / "delta")["tensors"]
    assert {"sources" in entry for name, entry in entries.items() if name.endswith(".mask")} == {False}
    of_delta, of_checkpoint = (recorded(manifest_of(tmp_path / way)) for way in ("delta", "checkpoint"))
    assert of_delta
    assert of_checkpoint
    for ours, theirs in zip(of_delta.sources, of_checkpoint.sources, strict=True):
        assert {t.name: (t.shape, t.measure.zeros) for t in ours.tensors} == {
            t.name: (t.shape, t.measure.zeros) for t in theirs.tensors
        }


def test_the_card_of_a_delta_says_how_it_is_used(made: dict[str, Path], tmp_path: Path) -> None:
    merge(as_delta(ties(made)), tmp_path / "delta")
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "library_name: paft_merge" in card
    assert f"`{made['base']}+FOLDER` is the merged model" in card


def test_a_delta_is_a_source_of_another_merge(made: dict[str, Path], tmp_path: Path) -> None:
    merge(as_delta(ties(made)), tmp_path / "delta")
    again = recipe("task_arithmetic", made["base"], (on(made["base"], tmp_path / "delta"), {"weight": 1.0}))
    merge(as_delta(again), tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "delta" / FILE).read_bytes()


def test_an_input_that_changes_between_the_passes_is_an_error(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = sparse_deltas._Counter.take
    monkeypatch.setattr(
        sparse_deltas._Counter,
        "take",
        lambda self, tensor, start, bits: take(self, tensor, start, bits * (bits % 7 > 0)),
    )
    with pytest.raises(CheckpointError, match="has other values than in the pass that counted them"):
        merge(as_delta(ties(made)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_predicts_the_largest_size(made: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", as_delta(ties(made)))
    text = paft("merge", path, tmp_path / "out", "--dry-run").output
    assert "writes at most" in text
    assert "every delta is merged twice" in text
    planned = json.loads(paft("merge", path, tmp_path / "out", "--dry-run", "--json").output)
    assert planned["bytes_written_at_most"]
    merge(path, tmp_path / "out")
    assert (tmp_path / "out" / FILE).stat().st_size < planned["bytes_written"]


REFUSED: dict[str, Callable[[dict[str, Path]], dict[str, Any]]] = {
    "the merged delta is zero": lambda m: as_delta(recipe("task_arithmetic", m["base"], (m["tuned1"], {"weight": 0.0}))),
    "the values of a delta cannot be float64": lambda m: as_delta(ties(m)) | {"out_dtype": "float64"},
    "none is named as the base": lambda m: as_delta(recipe("linear", None, m["tuned1"], m["tuned2"], parameters={"weight": 0.5})),
    "has slices": lambda m: as_delta({"merge_method": "passthrough", "slices": [{"sources": [{"model": str(m["base"]), "layer_range": [0, 1]}]}]}),
    "format is a key of kind: delta": lambda m: ties(m) | {"output": {"kind": "adapter", "format": "shira"}},
    "rank is a key of kind: adapter": lambda m: as_delta(ties(m), rank=4),
    "SHiRA changes the weights of linear layers alone": lambda m: as_delta(ties(m), format="shira"),
    "are too small|is too small": lambda m: as_delta(recipe("task_arithmetic", m["base"], (m["lora1"], {"weight": 1.0})), format="shira"),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_a_delta_is_refused_before_anything_is_written(
    message: str, made: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        merge(REFUSED[message](made), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_error_is_for_adapters(made: dict[str, Path], tmp_path: Path) -> None:
    for given in (as_delta(ties(made)), ties(made)):
        with pytest.raises(PaftMergeError, match="max_error is about the rank of an adapter"):
            merge(given, tmp_path / "out", max_error=0.1)


def test_the_base_of_a_delta_is_a_stored_checkpoint(made: dict[str, Path], tmp_path: Path) -> None:
    inner = {"name": "inner", **ties(made)}
    outer = as_delta(recipe("task_arithmetic", "inner", (made["tuned1"], {"weight": 1.0})))
    path = tmp_path / "recipe.yaml"
    path.write_text("\n---\n".join(map(json.dumps, (inner, outer))))
    with pytest.raises(RecipeError, match="the base inner is another document of the file"):
        merge(path, tmp_path / "out")


def test_deltas_are_finite(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PaftMergeError, match="without allow_nonfinite"):
        merge(as_delta(ties(made)), tmp_path / "out", allow_nonfinite=True)
    huge = recipe("task_arithmetic", made["base"], (made["tuned1"], {"weight": 1e8}), out_dtype="float16")
    with pytest.raises(MergeError, match="too large for float16"):
        merge(as_delta(huge), tmp_path / "out")


def test_a_head_that_the_merge_cuts_from_its_embedding_keeps_its_old_value(tmp_path: Path) -> None:
    base, adapter = train(
        llama(tie_word_embeddings=True), tmp_path, LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2)
    )
    weight = [{"filter": "lm_head", "value": 0.0}, {"value": 1.0}]
    given = recipe("task_arithmetic", base, (on(base, adapter), {"weight": weight}))
    merge(given, tmp_path / "checkpoint")
    merge(as_delta(given), tmp_path / "delta")
    after, wanted = folded(base, tmp_path / "delta", tmp_path / "folded"), tensors_of(tmp_path / "checkpoint")
    assert after.keys() == wanted.keys()
    assert error(after, wanted) < 1e-6
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_shira_is_loaded_by_peft_and_read_by_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = train(llama(), tmp_path, LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    given = recipe("dare_linear", base, (on(base, adapter), {"weight": 1.0, "density": 0.1}))
    merge(as_delta(given, format="shira"), tmp_path / "shira")
    merge(given, tmp_path / "checkpoint")
    wanted = tensors_of(tmp_path / "checkpoint")
    assert error(merged_by_us(base, tmp_path / "shira"), wanted) < 1e-7
    assert error(merged_by_peft(llama, base, tmp_path / "shira", tmp_path / "merged"), wanted) < 1e-7
    monkeypatch.setattr(blocks, "TILE", 50)
    merge(as_delta(given, format="shira"), tmp_path / "blocks")
    assert (tmp_path / "blocks" / FILE).read_bytes() == (tmp_path / "shira" / FILE).read_bytes()
    # A fine-tune whose other tensors are copies of the base's is a source, too.
    merge(
        as_delta(recipe("task_arithmetic", base, (tmp_path / "checkpoint", {"weight": 1.0})), format="shira"),
        tmp_path / "tuned",
    )
    assert error(merged_by_us(base, tmp_path / "tuned"), wanted) < 1e-6
