"""Recipes made of recipes: a document that another one merges is computed while it is read, and never written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.merge import WEIGHT_SPACE, Ref, bits_equal, files_of, manifest_of, on, paft, recipe, recipe_for, tensors_of

from paft_merge import merge
from paft_merge.engine.api import open_plan
from paft_merge.errors import PaftMergeError

Family = Callable[..., dict[str, Path]]


def written(path: Path, *documents: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return path


def one_by_one(out: Path, final: dict[str, Any], *named: dict[str, Any]) -> Path:
    """The same merge in stages, each a folder on disk."""
    for document in named:
        plain = {key: value for key, value in document.items() if key != "name"}
        merge(json.loads(_replaced(plain, out, named)), out / document["name"])
    return merge(json.loads(_replaced(final, out, named)), out / "final").path


def _replaced(document: dict[str, Any], out: Path, named: tuple[dict[str, Any], ...]) -> str:
    text = json.dumps(document)
    for one in named:
        text = text.replace(f'"{one["name"]}', f'"{out / one["name"]}')
    return text


@pytest.mark.parametrize("inner", [m for m in WEIGHT_SPACE if m != "arcee_fusion"])
def test_in_float32_one_pass_gives_the_bits_of_a_merge_in_stages(inner: str, family: Family, tmp_path: Path) -> None:
    f = family()
    middle = {**recipe_for(inner, f["base"], f["x"], f["y"], dtype="float32"), "name": "middle"}
    final = recipe("slerp", f["y"], "middle", parameters={"t": 0.3}, dtype="float32")
    made = tensors_of(merge(written(tmp_path / "r.yaml", middle, final), tmp_path / "out"))
    staged = tensors_of(one_by_one(tmp_path / "stages", final, middle))
    assert made.keys() == staged.keys()
    assert [name for name in made if not bits_equal(made[name], staged[name])] == []


@pytest.mark.parametrize("inner", ["linear", "ties", "karcher", "arcee_fusion"])
@pytest.mark.parametrize("outer", ["linear", "ties", "sce", "arcee_fusion", "model_stock", "nuslerp"])
def test_an_intermediate_is_a_base_or_a_source_of_any_method(
    inner: str, outer: str, family: Family, tmp_path: Path
) -> None:
    f = family()
    middle = {**recipe_for(inner, f["base"], f["x"], f["y"]), "name": "middle"}
    for at, final in enumerate([
        recipe_for(outer, "middle", f["x"], f["y"]), recipe_for(outer, f["base"], "middle", f["y"]),
    ]):  # fmt: skip
        made = tensors_of(merge(written(tmp_path / "r.yaml", middle, final), tmp_path / f"out{at}"))
        staged = tensors_of(one_by_one(tmp_path / f"stages{at}", final, middle))
        assert [name for name in made if not bits_equal(made[name], staged[name])] == []


def test_chains_diamonds_and_adapters_on_an_intermediate(family: Family, tmp_path: Path) -> None:
    f = family()
    documents = [
        {**recipe("linear", None, (f["x"], {"weight": 0.5}), (f["y"], {"weight": 0.5})), "name": "first"},
        {**recipe("ties", f["base"], ("first", {"weight": 0.8, "density": 0.5})), "name": "second"},
        {**recipe("task_arithmetic", "first", (on("first", f["sft"]), {"weight": 1.0})), "name": "third"},
    ]
    final = recipe("linear", None, ("second", {"weight": 0.3}), ("third", {"weight": 0.7}))
    # What uses comes before what is used, too.
    made = tensors_of(merge(written(tmp_path / "r.yaml", final, *documents[::-1]), tmp_path / "out"))
    staged = tensors_of(one_by_one(tmp_path / "stages", final, *documents))
    assert [name for name in made if not bits_equal(made[name], staged[name])] == []


def test_nothing_is_rounded_on_the_way_unless_mergekit_s_arithmetic_is_asked_for(
    family: Family, tmp_path: Path
) -> None:
    import torch

    f = family(dtype=torch.bfloat16)
    middle = {**recipe("linear", None, (f["x"], {"weight": 0.5}), (f["y"], {"weight": 0.5})), "name": "middle"}
    final = recipe("task_arithmetic", f["base"], ("middle", {"weight": 0.9}))
    path = written(tmp_path / "r.yaml", middle, final)
    made = tensors_of(merge(path, tmp_path / "out"))
    base, x, y = (tensors_of(f[name]) for name in ("base", "x", "y"))
    name = "model.layers.0.mlp.up_proj.weight"
    half = (x[name].float() + y[name].float()) / 2
    exact = (base[name].float() + 0.9 * (half - base[name].float())).bfloat16()
    assert made[name].dtype == torch.bfloat16
    assert (made[name] != exact).float().mean() < 0.001
    rounded = {**final, "arithmetic": "mergekit"}
    middle["rounding"] = "stochastic"
    made = tensors_of(merge(written(tmp_path / "m.yaml", middle, rounded), tmp_path / "mergekit"))
    staged = tensors_of(one_by_one(tmp_path / "stages", rounded, middle))
    assert all(bits_equal(made[name], staged[name]) for name in made)


def test_threads_blocks_and_a_limit_of_memory_change_no_bit(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = family()
    middle = {**recipe_for("ties", f["base"], f["x"], f["y"]), "name": "middle"}
    final = recipe(
        "ties", f["base"], ("middle", {"weight": 0.8, "density": 0.5}), (f["x"], {"weight": 1, "density": 0.5})
    )
    path = written(tmp_path / "r.yaml", middle, final)
    merge(path, tmp_path / "one", threads=1)
    merge(path, tmp_path / "many", threads=7)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "many")
    monkeypatch.setattr("paft_merge.compute.blocks.TILE", 100)
    merge(path, tmp_path / "small")
    assert one["model.safetensors"] == files_of(tmp_path / "small")["model.safetensors"]
    with open_plan(path) as plan:
        smallest = max(t.block_bytes for t in plan.tensors)
    with pytest.raises(PaftMergeError, match="one block and its inputs take"):
        merge(path, tmp_path / "none", memory=smallest - 1)


def test_a_ranking_over_the_whole_intermediate(family: Family, tmp_path: Path) -> None:
    f = family()
    given = {"weight": 0.7, "density": 0.3}
    middle = {
        **recipe("ties", f["base"], (f["x"], given), (f["y"], given), parameters={"trim_scope": "global"}),
        "name": "middle",
    }
    final = recipe("linear", None, ("middle", {"weight": 0.5}), (f["x"], {"weight": 0.5}))
    made = tensors_of(merge(written(tmp_path / "r.yaml", middle, final), tmp_path / "out"))
    staged = tensors_of(one_by_one(tmp_path / "stages", final, middle))
    assert all(bits_equal(made[name], staged[name]) for name in made)


def test_the_manifest_holds_every_document_and_side_files_are_those_of_the_base_beneath(
    family: Family, tmp_path: Path
) -> None:
    f = family()
    (f["base"] / "tokenizer.json").write_text("{}")
    middle = {**recipe_for("ties", f["base"], f["x"], f["y"], dtype="bfloat16"), "name": "middle"}
    out = merge(
        written(tmp_path / "r.yaml", middle, recipe("slerp", "middle", f["x"], parameters={"t": 0.3})), tmp_path / "out"
    )
    assert {"tokenizer.json", "config.json"} <= files_of(out).keys()
    card = (out / "README.md").read_text()
    text = card.split("```yaml\n")[1].split("```")[0]
    assert [d["merge_method"] for d in yaml.safe_load_all(text)] == ["ties", "slerp"]
    held = manifest_of(out)["inputs"]["middle"]["checkpoint"]["files"]
    assert held["recipe"]["merge_method"] == "ties"
    assert set(held["inputs"]) == {str(f["base"]), str(f["x"]), str(f["y"])}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype.__str__() for t in tensors_of(out).values()} == {"torch.bfloat16"}


def test_several_results_get_a_folder_each_and_one_can_be_chosen(family: Family, tmp_path: Path) -> None:
    f = family()
    one, two = ({**recipe("linear", None, (f[n], {"weight": 1.0})), "name": n} for n in "xy")
    path = written(tmp_path / "r.yaml", one, two)
    assert paft("merge", path, tmp_path / "both", "--quiet").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["x", "y"]
    assert paft("merge", path, tmp_path / "only", "--output-name", "y", "--quiet").exit_code == 0
    assert all(bits_equal(t, tensors_of(f["y"])[n]) for n, t in tensors_of(tmp_path / "only").items())
    said = paft("merge", path, "--dry-run")
    assert said.exit_code == 1
    assert "the file has several results: x, y; choose one with --output-name x" in said.output
    assert (
        "z: is not a document of this file; the file names x, y"
        in paft("merge", path, "--dry-run", "--output-name", "z").output
    )


def refusals(path: Path, *documents: dict[str, Any]) -> list[str]:
    with pytest.raises(PaftMergeError) as caught, open_plan(written(path, *documents)):
        pass
    return [f"{p.where.removeprefix(str(path))}: {p.what}" for p in caught.value.problems]


def test_documents_that_do_not_fit_together_are_refused_all_at_once(family: Family, tmp_path: Path) -> None:
    f, path = family(), tmp_path / "r.yaml"

    def named(name: str | None, *sources: Ref) -> dict[str, Any]:
        made = recipe("linear", None, *((s, {"weight": 1.0}) for s in sources))
        return made if name is None else {"name": name, **made}

    assert refusals(path, named("a", "b"), named("b", "a"), named(None, "a")) == [":1: name: uses itself: a -> b -> a"]
    assert refusals(path, named("a", "a"), named(None, "a")) == [":1: name: uses itself: a -> a"]
    twice = refusals(path, named("a", f["x"]), named("a", f["y"]), named(None, "a"), named(None, f["x"]))
    assert [t.split(": ", 2)[-1] for t in twice] == [
        "the name a is already on line 1", twice[1].split(": ", 2)[-1],
    ]  # fmt: skip
    assert "a second document without a name; the first is on line" in twice[1]
    assert "midle is not a document of this file and not a folder" in refusals(
        path, named("middle", f["x"]), named(None, "midle", f["y"])
    )[0]  # fmt: skip


def test_plans_and_explanations_say_what_is_merged_on_the_way(family: Family, tmp_path: Path) -> None:
    f = family()
    middle = {**recipe_for("ties", f["base"], f["x"], f["y"]), "name": "middle"}
    path = written(tmp_path / "r.yaml", middle, recipe("slerp", "middle", f["x"], parameters={"t": 0.3}))
    assert "middle (gives names, order, files, config and tokenizer) (merged on the fly)" in " ".join(
        paft("merge", path, "--dry-run").output.split()
    )
    told = paft("explain", path, "--tensor", "lm_head.weight").output
    assert "base middle merged on the fly" in " ".join(told.split())
    told = paft("explain", path, "--tensor", "lm_head.weight", "--output-name", "middle").output
    assert f"{path}:" in told


def test_a_document_that_nothing_is_made_of_is_told(family: Family, tmp_path: Path) -> None:
    f = family()
    spare = {"name": "spare", **recipe("linear", None, (f["x"], {"weight": 1.0}))}
    path = written(tmp_path / "r.yaml", spare, recipe("linear", None, (f["y"], {"weight": 1.0})))
    with open_plan(path) as plan:
        assert [(w.code, w.what) for w in plan.warnings] == [("UNUSED", "no result uses spare, so it is not merged")]


def test_a_merge_of_files_of_tensors(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    made = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(8, 4, generator=made), "net.0.w": torch.randn(5, generator=made)}
    (tmp_path / "in").mkdir()
    states = {n: {k: v + 0.1 * torch.randn(v.shape, generator=made) for k, v in base.items()} for n in "bxy"}
    for name, state in states.items():
        save_file(state, tmp_path / "in" / f"{name}.safetensors")
        torch.save(state, tmp_path / "in" / f"{name}.pt")
    (tmp_path / "in" / "notes.json").write_text("{}")
    b, x, y = tmp_path / "in" / "b.safetensors", tmp_path / "in" / "x.safetensors", tmp_path / "in" / "y.pt"
    path = written(tmp_path / "r.yaml", recipe("task_arithmetic", b, (x, {"weight": 0.5}), (y, {"weight": 0.25})))
    refused = paft("merge", path, tmp_path / "out")
    assert "error[PICKLE_REFUSED]" in refused.output
    assert paft("merge", path, tmp_path / "out", "--lazy-unpickle", "--quiet").exit_code == 0
    assert set(files_of(tmp_path / "out")) == {"b.safetensors", "merge_manifest.json", "README.md"}
    for name, tensor in tensors_of(tmp_path / "out").items():
        s = {n: state[name] for n, state in states.items()}
        torch.testing.assert_close(tensor, s["b"] + 0.5 * (s["x"] - s["b"]) + 0.25 * (s["y"] - s["b"]))


def test_files_that_do_not_hold_the_same_tensors_are_merged_as_mergekit_pytorch_merges_them(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from toys.mergekit import raw_merge

    made = torch.Generator().manual_seed(0)
    names = {"b": "acdf", "x": "abcf", "y": "abdf"}  # f is in all of them
    states = {n: {k: torch.randn(4, 3, generator=made) for k in held} for n, held in names.items()}
    files = {n: tmp_path / f"{n}.safetensors" for n in names}
    for name, state in states.items():
        save_file(state, files[name])
    plain = recipe("linear", None, *((files[n], {"weight": w}) for n, w in (("b", 0.5), ("x", 0.3), ("y", 0.7))))
    path = written(tmp_path / "linear.yaml", plain)
    refused = paft("merge", path, tmp_path / "out")
    assert "lacks 'b', which" not in refused.output
    assert "lacks 'd', which" in refused.output
    for flag, held in (("-i", "af"), ("-u", "abcdf")):
        said = paft("merge", path, tmp_path / flag, flag, "--quiet")
        assert said.exit_code == 0, said.output
        assert "tensors are not in every file ('c', 'd' and 1 more)" in said.output
        ours, theirs = tensors_of(tmp_path / flag), raw_merge(plain, tmp_path / f"theirs{flag}", flag)
        assert set(ours) == set(theirs) == set(held)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name])
    based = recipe("task_arithmetic", files["b"], *((files[n], {"weight": 0.5}) for n in "xy"))
    path = written(tmp_path / "based.yaml", based)
    made_of_some = paft("merge", path, tmp_path / "some", "--tensor-union", "--quiet")
    assert "lacks 'b', which" in made_of_some.output
    assert (
        "and task_arithmetic needs the base's; leave such tensors out with --tensor-intersection" in made_of_some.output
    )
    del states["x"]["b"], states["y"]["b"]
    states["b"]["e"] = torch.randn(2, 2, generator=made)  # which no source has
    for name, state in states.items():
        save_file(state, files[name])
    assert paft("merge", path, tmp_path / "some", "--tensor-union", "--quiet").exit_code == 0
    ours = tensors_of(tmp_path / "some")
    assert set(ours) == set("acdef")
    assert bits_equal(ours["e"], states["b"]["e"])
    torch.testing.assert_close(ours["c"], (states["b"]["c"] + states["x"]["c"]) / 2)
    assert paft("reproduce", tmp_path / "some").exit_code == 0


def test_models_have_to_hold_the_same_tensors(family: Family, tmp_path: Path) -> None:
    f = family()
    path = written(tmp_path / "r.yaml", recipe("linear", None, (f["x"], {"weight": 1.0}), (f["y"], {"weight": 1.0})))
    assert "the union of tensors is for single files" in paft("merge", path, "--dry-run", "-u").output


def test_an_interrupted_merge_goes_on_and_ends_in_the_same_bytes(family: Family, tmp_path: Path) -> None:
    f = family()
    middle = {**recipe_for("ties", f["base"], f["x"], f["y"]), "name": "middle"}
    path = written(tmp_path / "r.yaml", middle, recipe("slerp", "middle", f["x"], parameters={"t": 0.3}))

    def stop(done: Any) -> None:
        if done.tensors == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(path, tmp_path / "out", progress=stop)
    merge(path, tmp_path / "whole")
    resumed: list[int] = []
    merge(path, tmp_path / "out", resume=True, progress=lambda done: resumed.append(done.tensors))
    assert resumed[0] >= 4
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    # Another document beneath is another merge.
    with pytest.raises(KeyboardInterrupt):
        merge(path, tmp_path / "other", progress=stop)
    middle["models"][0]["parameters"]["weight"] = 0.9
    written(path, middle, recipe("slerp", "middle", f["x"], parameters={"t": 0.3}))
    with pytest.raises(PaftMergeError, match=r"was started with another inputs \(middle\)"):
        merge(path, tmp_path / "other", resume=True)


def test_a_fault_in_what_is_merged_on_the_way_is_told_with_its_name(family: Family, tmp_path: Path) -> None:
    import torch
    from conftest import save_checkpoint

    f = family()
    state = tensors_of(f["y"])
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    bad = save_checkpoint(tmp_path / "bad", state)
    middle = {**recipe("linear", None, (f["x"], {"weight": 0.5}), (bad, {"weight": 0.5})), "name": "middle"}
    path = written(
        tmp_path / "r.yaml", middle, recipe("linear", None, ("middle", {"weight": 0.5}), (f["x"], {"weight": 0.5}))
    )
    with pytest.raises(
        PaftMergeError, match=r"middle: model\.layers\.1\.mlp\.up_proj\.weight: 1 of 1,152 elements are NaN"
    ):
        merge(path, tmp_path / "out")
    narrow = {n: t for n, t in tensors_of(f["x"]).items() if n != "lm_head.weight"}
    middle["models"][1]["model"] = str(save_checkpoint(tmp_path / "narrow", narrow))
    with (
        pytest.raises(PaftMergeError, match=r"narrow: lacks 'lm_head\.weight'"),
        open_plan(written(path, middle, recipe("linear", None, ("middle", {"weight": 1.0})))),
    ):
        pass
