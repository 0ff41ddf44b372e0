"""A merge that writes an adapter has what every merge has: dry runs, resume, reproduction, workers, stores, cards, other merges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import save_checkpoint
from toys.merge import files_of, manifest_of, on, paft, python, recipe, tensors_of, write_recipe

from paft_merge import merge, reproduce
from paft_merge.errors import MergeError, PaftMergeError, RecipeError
from paft_merge.hub.merged_folders import verify_at

Family = Callable[..., dict[str, Path]]


def asked(f: dict[str, Path], method: str = "ties", **output: Any) -> dict[str, Any]:
    """Both adapters of a family, merged to one."""
    sources = [on(f["base"], f["sft"]), on(f["base"], f["dpo"])]
    parameters = {"weight": 0.5, **({"density": 0.5} if method == "ties" else {})}
    return recipe(method, f["base"], *sources, parameters=parameters, output={"kind": "adapter", **output})


def test_a_merge_killed_at_any_step_is_resumed_to_the_same_bytes(family: Family, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "r.yaml", asked(family(), rank=4))
    (tmp_path / "killed").mkdir()
    code = "import sys; from toys import kill_merges; kill_merges.main(*sys.argv[1:])"
    run = python(code, file, tmp_path / "killed", "new", "13")  # every step takes longer, and shows no more
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["steps"] > 30
    assert not found["faults"]


def test_it_is_reproduced_audited_and_a_source_again(family: Family, tmp_path: Path) -> None:
    f = family()
    made = merge(asked(f, rank=4), tmp_path / "out")
    assert reproduce(made.path).identical
    assert paft("audit", made.path).exit_code == 0
    ours = merge(recipe("task_arithmetic", f["base"], (on(f["base"], made.path), {"weight": 1.0})), tmp_path / "whole")
    dense = merge({k: v for k, v in asked(f).items() if k != "output"}, tmp_path / "dense")
    norm = sum(float((t.double() - s.double()).square().sum()) for t, s in _pairs(ours.path, dense.path)) ** 0.5
    assert norm == pytest.approx(made.manifest["adapter"]["error"], rel=1e-3)
    file = made.path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert [p.code for p in verify_at(made.path).problems] == ["MANIFEST"]


def _pairs(one: Path, other: Path) -> Any:
    return zip(tensors_of(one).values(), tensors_of(other).values(), strict=True)


def test_workers_and_stores_get_the_same_adapter(family: Family, tmp_path: Path) -> None:
    f = family()
    made = merge(asked(f, rank=4), tmp_path / "out")
    merge(asked(f, rank=4), tmp_path / "worker", worker="0/2")
    merge(asked(f, rank=4), f"memory://{tmp_path.name}/out")
    assert verify_at(f"memory://{tmp_path.name}/out").ok
    one, other = files_of(made.path), files_of(tmp_path / "worker")
    assert {name: content for name, content in one.items() if content != other.get(name)} == {}
    with pytest.raises(PaftMergeError, match="several workers do not share"):
        merge(asked(f, rank="auto", energy=0.9), tmp_path / "auto", worker="0/2")


@pytest.mark.parametrize(
    ("method", "space", "output"),
    [
        ("task_arithmetic", "weight", {"rank": 3}),
        ("ties", "weight", {"rank": 3}),
        ("ties", "core", {"rank": 3}),
        ("task_arithmetic", "ctm", {"rank": 3}),
        ("ties", "knots", {"rank": "auto", "energy": 0.7}),
    ],
)
def test_a_dry_run_predicts_the_error_where_it_follows_from_factors(
    method: str, space: str, output: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    f = family()
    one = {**asked(f, method, **output), "space": space}
    measured = (method, space) == ("ties", "weight")
    planned = json.loads(paft("merge", write_recipe(tmp_path / "r.yaml", one), "--dry-run", "--json").stdout)
    made = merge(one, tmp_path / "out").manifest["adapter"]
    assert planned["adapter"] == (None if measured else made)
    adapters = sum((f[name] / "adapter_model.safetensors").stat().st_size for name in ("sft", "dpo"))
    assert planned["bytes_read"] == adapters  # and nothing of the base
    size = (tmp_path / "out/adapter_model.safetensors").stat().st_size
    if output["rank"] != "auto":
        assert planned["files"] == {"adapter_model.safetensors": size}
    shown = paft("merge", tmp_path / "r.yaml", "--dry-run").stdout
    exact = made["relative_error"] < 1e-5
    error = "exact but for rounding" if exact else f"with a relative error of {made['relative_error']:.3g}"
    assert (f"adapter of rank {made['rank']} on 6 modules, {error}" in shown) != measured
    assert ("adapter of rank 3 on 6 modules; the merge measures its error" in shown) == measured


def test_the_command_and_the_card_name_the_error(family: Family, tmp_path: Path) -> None:
    f = family()
    result = paft("merge", write_recipe(tmp_path / "r.yaml", asked(f, rank=2)), tmp_path / "out")
    error = json.loads((tmp_path / "out/merge_manifest.json").read_text())["adapter"]["relative_error"]
    assert f"LoRA of rank 2 on 6 modules, relative error of {error:.3g}" in result.output
    card = (tmp_path / "out/README.md").read_text()
    assert (
        f"A LoRA of rank 2 on 6 modules of `{f['base']}`. It holds the merged delta D with a relative error of {error:.3g}"
        in card
    )
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    refused = paft("merge", tmp_path / "r.yaml", tmp_path / "other", "--max-error", "0.01")
    assert refused.exit_code == 1
    assert "more than --max-error 0.01" in refused.output


def test_an_exact_adapter_says_so_and_records_norms_as_a_checkpoint_does(family: Family, tmp_path: Path) -> None:
    f = family()
    result = paft("merge", write_recipe(tmp_path / "r.yaml", asked(f, "task_arithmetic")), tmp_path / "out")
    assert "LoRA of rank 6 on 6 modules, exact but for rounding" in result.output
    card = (tmp_path / "out/README.md").read_text()
    assert "holds the merged delta D exactly, but for rounding" in card
    dense = merge({k: v for k, v in asked(f, "task_arithmetic").items() if k != "output"}, tmp_path / "dense")
    ours, theirs = (manifest_of(place)["totals"] for place in (tmp_path / "out", dense))
    assert [row.keys() for row in ours] == [{"source", "entries", "l2", "weighted_l2"}] * 2
    for one, other in zip(ours, theirs, strict=True):
        assert {**one, "l2": 0, "weighted_l2": 0} == {**{key: other[key] for key in one}, "l2": 0, "weighted_l2": 0}
        assert [one["l2"], one["weighted_l2"]] == pytest.approx([other["l2"], other["weighted_l2"]], rel=1e-5)
        assert f"| `{Path(one['source']).name}` | {one['l2']:.4g} | {one['weighted_l2']:.4g} |" in card
    entries = manifest_of(tmp_path / "out")["tensors"]
    (entry,) = (one for name, one in entries.items() if name.endswith("layers.0.mlp.up_proj.lora_B.weight"))
    measured = manifest_of(dense)["tensors"]["model.layers.0.mlp.up_proj.weight"]["sources"]
    for one, other in zip(entry["sources"], measured, strict=True):
        assert one == {"l2": one["l2"], **{key: other[key] for key in ("source", "delta", "parameters")}}
        assert one["l2"] == pytest.approx(other["l2"], rel=1e-5)


@pytest.mark.parametrize("output", [{}, {"rank": 2}, {"rank": "auto", "energy": 0.9}])
def test_deltas_that_cancel_are_refused(output: dict[str, Any], family: Family, tmp_path: Path) -> None:
    f = family()
    shutil.copytree(f["sft"], tmp_path / "copy")
    models = [(on(f["base"], f["sft"]), {"weight": 1.0}), (on(f["base"], tmp_path / "copy"), {"weight": -1.0})]
    one = recipe("task_arithmetic", f["base"], *models, output={"kind": "adapter", **output})
    with pytest.raises(MergeError, match=r"every merged delta is zero: the sources .* cancel each other"):
        merge(one, tmp_path / "out")


def test_factors_that_a_type_rounds_to_zero_are_refused_and_ranks_above_vllm_s_named(
    family: Family, tmp_path: Path
) -> None:
    f = family()
    one = {**asked(f, "task_arithmetic", rank=600), "out_dtype": "float16"}
    made = merge(one, tmp_path / "wide")
    assert "the adapter has rank 600, and vLLM reads ranks of at most 512; write rank: 512" in str(made.warnings[0])
    one["parameters"] = {"weight": 1e-20}
    with pytest.raises(MergeError, match="factors are zero in the type that stores them; write out_dtype: float32"):
        merge(one, tmp_path / "out")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "slices": ({"models": None, "slices": [{"sources": [{"model": "BASE", "layer_range": [0, 1]}, {"model": "BASE+SFT", "layer_range": [0, 1]}]}]}, "the recipe has slices, and an adapter keeps the layers of one base"),
    "a base with an adapter": ({"base_model": "BASE+SFT", "models": [{"model": "BASE+DPO"}]}, r"has an adapter itself, and an adapter is of one checkpoint; write base_model: "),
    "a sum that scales the base": ({"merge_method": "linear", "base_model": None, "parameters": {"weight": 0.7, "normalize": False}}, r"linear multiplies the base by 1\.4; write merge_method: task_arithmetic, or weights that add up to 1"),
    "trained norms and embeddings": ({"models": [{"model": "X"}]}, "(?s)embed_tokens.*it is an embedding that changes as a whole; write portable: false.*input_layernorm.*it is a bias or a norm"),
    "the sum of no ranks": ({"models": [{"model": "Y"}], "output": {"kind": "adapter", "portable": False}}, "rank: sum adds up the ranks of adapters, and the delta of .*y is not a low-rank product; write a number"),
    "checkpoints without a base": ({"merge_method": "linear", "base_model": None, "models": [{"model": "X"}, {"model": "Y"}]}, "several checkpoints, and none is named as the base; write base_model"),
    "mergekit's arithmetic": ({"arithmetic": "mergekit"}, "remove arithmetic: mergekit"),
    "stochastic rounding": ({"rounding": "stochastic"}, "remove rounding: stochastic"),
    "float64": ({"out_dtype": "float64"}, "write out_dtype: float32"),
    "no delta": ({"parameters": {"weight": 0.0}}, "the merged delta is zero"),
    "no module": ({"output": {"kind": "adapter", "exclude": ["*"]}}, "include and exclude leave no module"),
    "an energy that is a word": ({"output": {"kind": "adapter", "rank": "auto", "energy": True}}, "output.energy: must be a number, got true"),
    "a space": ({"output": {"kind": "adapter", "space": "core"}}, "output: space is a key of the recipe, not of output; write space beside merge_method"),
    "a rank of a checkpoint": ({"output": {"rank": 3}}, "output: rank is a key of kind: adapter"),
    "a rank of zero": ({"output": {"kind": "adapter", "rank": 0}}, "output.rank: must be a whole number above 0, sum or auto, got 0"),
    "auto without energy": ({"output": {"kind": "adapter", "rank": "auto"}}, "output: rank: auto needs energy"),
    "energy without auto": ({"output": {"kind": "adapter", "rank": 3, "energy": 0.9}}, "output: energy is a key of rank: auto"),
    "a word": ({"output": "adapter"}, "output: must be a mapping; write output: {kind: adapter}"),
    "a typo": ({"output": {"kind": "adaptor"}}, "output.kind: must be one of checkpoint, adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_cannot_be_is_refused_with_the_way_out(case: str, family: Family, tmp_path: Path) -> None:
    f = family()
    changes, message = REFUSED[case]
    text = json.dumps({k: v for k, v in {**asked(f, "task_arithmetic"), **changes}.items() if v is not None})
    for name, word in (("base", "BASE"), ("sft", "SFT"), ("dpo", "DPO"), ("x", "X"), ("y", "Y")):
        text = text.replace(f'"{word}', f'"{f[name]}').replace(f"+{word}", f"+{f[name]}")
    with pytest.raises(RecipeError, match=message):
        merge(json.loads(text), tmp_path / "out")


def test_a_document_that_another_one_merges_is_a_checkpoint(family: Family, tmp_path: Path) -> None:
    f = family()
    inner = {**asked(f, rank=3), "name": "inner"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump_all([inner, recipe("linear", None, ("inner", {"weight": 1.0}))]))
    with pytest.raises(PaftMergeError, match="inner is merged by another document, and its output is not a checkpoint"):
        merge(tmp_path / "r.yaml", tmp_path / "out")


def test_a_frozen_layer_of_a_fine_tune_is_no_obstacle(family: Family, tmp_path: Path) -> None:
    f = family()
    state, moved = tensors_of(f["base"]), tensors_of(f["x"])
    tuned = save_checkpoint(tmp_path / "tuned", {n: moved[n] if "q_proj" in n else t for n, t in state.items()})
    one = recipe("task_arithmetic", f["base"], (tuned, {"weight": 1.0}), output={"kind": "adapter", "rank": 24})
    made = tensors_of(merge(one, tmp_path / "out"))
    (name,) = (n for n in made if "layers.0.self_attn.q_proj.lora_B" in n)
    delta = made[name].double() @ made[name.replace("_B", "_A")].double()
    wanted = (
        moved["model.layers.0.self_attn.q_proj.weight"].double()
        - state["model.layers.0.self_attn.q_proj.weight"].double()
    )
    assert float((delta - wanted).norm() / wanted.norm()) < 1e-5


def test_an_embedding_that_stays_tied_to_the_head_is_refused(tmp_path: Path) -> None:
    from toys.adapters import llama, save

    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "base")
    model.model.embed_tokens.weight.data += 0.1
    save(model, tmp_path / "tuned")
    output = {"kind": "adapter", "rank": 2, "portable": False}
    one = recipe("task_arithmetic", tmp_path / "base", (tmp_path / "tuned", {"weight": 1.0}), output=output)
    with pytest.raises(
        RecipeError, match=r"embed_tokens.*: the output head is tied to it, and an adapter would change the"
    ):
        merge(one, tmp_path / "out")


def test_blocks_hold_whole_rows_of_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file
    from toys.adapters import Convolutions, save

    save(Convolutions(), tmp_path / "base")
    (tmp_path / "tuned").mkdir()
    state = load_file(tmp_path / "base/model.safetensors")
    state["conv2.weight"] = state["conv2.weight"] * 1.5
    save_file(state, tmp_path / "tuned/model.safetensors")
    for tile in (1 << 21, 100):
        monkeypatch.setattr("paft_merge.compute.blocks.TILE", tile)
        output = {"kind": "adapter", "rank": 6, "portable": False}
        one = recipe("task_arithmetic", tmp_path / "base", (tmp_path / "tuned", {"weight": 1.0}), output=output)
        made = tensors_of(merge(one, tmp_path / str(tile)))
        left, right = (made[f"base_model.model.conv2.lora_{part}.weight"].double() for part in "BA")
        wanted = state["conv2.weight"].double() / 3
        assert float((left.reshape(6, 6) @ right.reshape(6, -1) - wanted.reshape(6, -1)).norm()) < 1e-5 * float(
            wanted.norm()
        )
