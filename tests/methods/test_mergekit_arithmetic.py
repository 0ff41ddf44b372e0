"""mergekit's own methods through our engine: its numbers bit for bit, other people's methods, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import State, save_checkpoint
from mergekit.merge_methods import registry
from mergekit.merge_methods.api import merge_tensors
from toys.mergekit import CONFIG, OURS, llama_family, llama_state, load_state, mergekit_merge

from paft_merge.cli import cli
from paft_merge.engine import api
from paft_merge.errors import MergeError, OutputError, PaftMergeError, RecipeError
from paft_merge.methods import METHODS, REQUIRED
from paft_merge.methods.mergekit_methods import WholeTensor, import_methods, method_of
from paft_merge.output.folder import digest_of

LATER = {"value": [0.9, 0.1], "filter": "mlp"}
PER_SOURCE = {
    "x": {"weight": 0.5, "density": 0.3},
    "y": {"weight": [0.7, 0.1], "density": [LATER, {"value": 0.5}]},
    "z": {"weight": -0.2},
}
PARITY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "linear": ("linear", "xyz", {}),
    "passthrough": ("passthrough", "x", {"parameters": {"scale": [0.5, 1.5]}}),
    "task_arithmetic": ("task_arithmetic", "bxyz", {"parameters": {"lambda": 0.8, "normalize": True}}),
    "ties": ("ties", "bxyz", {}),
    "ties with an int8 mask": ("ties", "bxyz", {"parameters": {"int8_mask": True, "normalize": False, "rescale": True}}),
    "ties in float32": ("ties", "bxyz", {"dtype": "float32", "out_dtype": "bfloat16"}),
    "ties to float16": ("ties", "bxyz", {"out_dtype": "float16"}),
    "breadcrumbs": ("breadcrumbs", "bxyz", {"parameters": {"gamma": 0.05}}),
    "breadcrumbs_ties": ("breadcrumbs_ties", "bxyz", {}),
    "slerp": ("slerp", "bx", {"parameters": {"t": [{"value": [0.1, 0.9], "filter": "self_attn"}, {"value": 0.4}]}}),
    "nuslerp": ("nuslerp", "xy", {"parameters": {"nuslerp_flatten": False}}),
    "nuslerp around a base": ("nuslerp", "bxy", {}),
    "multislerp": ("multislerp", "bxy", {}),
    "karcher": ("karcher", "xyz", {"parameters": {"tol": "1e-10"}}),
    "karcher with a base": ("karcher", "bxy", {}),
    "model_stock": ("model_stock", "bxyz", {"parameters": {"filter_wise": True}}),
    "nearswap": ("nearswap", "bx", {"parameters": {"t": 1e-3}}),
    "ram": ("ram", "bxyz", {}),
    "ramplus_tl": ("ramplus_tl", "bxyz", {"parameters": {"r": 0.5}}),
    "sce": ("sce", "bxyz", {"parameters": {"select_topk": 0.4}}),
    "arcee_fusion": ("arcee_fusion", "bx", {}),
}  # fmt: skip


def recipe_of(family: dict[str, Path], name: str, letters: str, more: dict[str, Any]) -> dict[str, Any]:
    known = {p.name for p in METHODS[name].parameters if p.scope == "source"} if name in METHODS else set()
    made = {"merge_method": name, **more}
    made["models"] = [
        {"model": str(family[letter]), "parameters": {k: v for k, v in PER_SOURCE[letter].items() if k in known}}
        for letter in letters.removeprefix("b")
    ]
    return made | ({"base_model": str(family["base"])} if letters.startswith("b") else {})


def merged(recipe: dict[str, Any], out: Path, **options: Any) -> State:
    return load_state(api.merge(recipe, out, warn=lambda _: None, **options).path)


@pytest.mark.parametrize("case", PARITY)
def test_mergekit_arithmetic_is_mergekit_s_bit_for_bit(case: str, tmp_path: Path) -> None:
    name, letters, more = PARITY[case]
    recipe = recipe_of(llama_family(tmp_path, torch.bfloat16, shards=2), name, letters, more)
    theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = merged({**recipe, "arithmetic": "mergekit"}, tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


def test_mergekit_arithmetic_promotes_inputs_of_different_types(tmp_path: Path) -> None:
    family = llama_family(tmp_path, torch.bfloat16)
    save_checkpoint(tmp_path / "y", {n: t.float() for n, t in load_state(tmp_path / "y").items()}, config=CONFIG)
    recipe = recipe_of(family, "ties", "bxy", {})
    theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = merged({**recipe, "arithmetic": "mergekit"}, tmp_path / "ours")
    assert {t.dtype for t in theirs.values()} == {torch.float32}
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_float32_arithmetic_is_another_and_a_better_one(tmp_path: Path) -> None:
    recipe = recipe_of(llama_family(tmp_path, torch.bfloat16), "task_arithmetic", "bxyz", {"out_dtype": "float32"})
    exact = mergekit_merge({**recipe, "dtype": "float64", "out_dtype": "float64"}, tmp_path / "exact")
    errors = []
    for i, arithmetic in enumerate(("float32", "mergekit")):
        result = merged({**recipe, "arithmetic": arithmetic}, tmp_path / str(i))
        errors.append(sum((result[n].double() - t).abs().sum().item() for n, t in exact.items()))
    assert errors[0] < 1e-3 * errors[1]


def test_arcee_fusion_runs_on_float32_tensors(tmp_path: Path) -> None:
    family = llama_family(tmp_path, torch.bfloat16)
    ours = merged(recipe_of(family, "arcee_fusion", "bx", {}), tmp_path / "ours")
    base, x = load_state(family["base"]), load_state(family["x"])
    for name, tensor in ours.items():
        theirs = merge_tensors([base[name].float(), x[name].float()], "arcee_fusion", base_index=0)
        assert torch.equal(tensor, theirs.to(torch.bfloat16)), name


def test_what_is_written_is_tallied_and_digested_like_any_other_merge(tmp_path: Path) -> None:
    recipe = recipe_of(llama_family(tmp_path), "ties", "bxy", {})
    written = []
    for i, arithmetic in enumerate(("float32", "mergekit")):
        with api.open_plan({**recipe, "arithmetic": arithmetic}) as planned:
            slots = {slot.name: slot for shard in planned.shards for slot in shard.slots}
        merged({**recipe, "arithmetic": arithmetic}, tmp_path / str(i))
        tensors = json.loads((tmp_path / str(i) / "merge_manifest.json").read_text())["tensors"]
        for name, entry in tensors.items():
            assert entry["digest"] == digest_of(tmp_path / str(i), slots[name], entry["block_bytes"])
        written.append({name: [s["zeros"] for s in entry["sources"]] for name, entry in tensors.items()})
    assert written[0] == written[1]


# --- other people's methods --------------------------------------------------------------------------------------------

NOISY = '''
"""A method that somebody wrote for mergekit."""
import torch
from typing import Annotated, Literal, Optional
from pydantic import Field
from mergekit.merge_methods import BasePolicy, InputContract, PerNonBase, TensorGroup, merge_method, register

@merge_method(name="noisy", pretty_name="Noisy", reference_url="https://example.org/noisy",
              contract=InputContract(base=BasePolicy.REQUIRED, max_non_base=2))
def noisy(group: TensorGroup, weight: PerNonBase[float], scale: Annotated[float, Field(gt=0)] = 1.0,
          how: Literal["plain", "odd"] = "plain", cut: Optional[float] = None) -> torch.Tensor:
    assert all(entry.tensor.dtype == torch.float32 for entry in group.entries)
    total = sum(weight[e.id] * (e.tensor - group.base.tensor) for e in group.non_base)
    if group.metadata.name.startswith("lm_head") and how == "odd":
        raise ArithmeticError("odd")
    return group.base.tensor + scale * total * torch.rand(total.shape)

register(noisy)
'''


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder that registers a method."""
    (tmp_path / "noisy_methods.py").write_text(NOISY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    yield "noisy_methods"
    __import__("sys").modules.pop("noisy_methods", None)
    registry._METHODS.pop("noisy", None)


def test_a_method_that_somebody_registered_runs_and_is_seeded(noisy: str, tmp_path: Path) -> None:
    family = llama_family(tmp_path, torch.bfloat16)
    recipe = {
        "merge_method": "noisy", "base_model": str(family["base"]), "parameters": {"weight": 0.5, "scale": [1.0, 2.0]},
        "models": [{"model": str(family["x"])}, {"model": str(family["y"])}],
    }  # fmt: skip
    one = merged(recipe, tmp_path / "1", imports=[noisy], threads=1)
    same = merged(recipe, tmp_path / "2", imports=[noisy], threads=4)
    other = merged({**recipe, "seed": 1}, tmp_path / "3", imports=[noisy])
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)
    head = one["lm_head.weight"]
    assert (head.dtype, head.shape) == (torch.bfloat16, (CONFIG["vocab_size"], CONFIG["hidden_size"]))


def test_the_command_line_imports_methods_and_lists_them(noisy: str, tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    text = f"merge_method: noisy\nbase_model: {family['base']}\nmodels: [{{model: {family['x']}}}]\nparameters: {{weight: 1}}\n"
    (tmp_path / "noisy.yaml").write_text(text)
    run = CliRunner().invoke(cli, ["merge", "noisy.yaml", "out", "--import", noisy, "--quiet"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    listed = CliRunner().invoke(cli, ["methods", "noisy", "--import", noisy], env={"COLUMNS": "200"})
    assert "by mergekit, whole tensors" in listed.output
    assert "plain | odd" in listed.output


def test_a_spec_of_mergekit_becomes_a_method_of_ours(noisy: str) -> None:
    method = import_methods([noisy], METHODS)["noisy"]
    assert (method.base, method.min_sources, method.max_sources, method.streamed) == ("required", 1, 2, False)
    found = {p.name: (p.type, p.scope, p.default, p.choices) for p in method.parameters}
    assert found == {
        "weight": (float, "source", REQUIRED, ()),
        "scale": (float, "shared", 1.0, ()),
        "how": (str, "shared", "plain", ("plain", "odd")),
        "cut": (float, "shared", None, ()),
    }


@pytest.mark.parametrize("name", sorted(METHODS.keys() - OURS))
def test_our_table_says_what_mergekit_s_specs_say(name: str) -> None:
    ours, theirs = METHODS[name], method_of(name)
    assert (ours.base, ours.min_sources, ours.max_sources) == (theirs.base, theirs.min_sources, theirs.max_sources)
    for parameter in theirs.parameters:
        found = ours.parameter(parameter.name)
        assert found is not None
        default = found.flags.index(found.default) == 1 if found.flags else found.default
        kind = bool if found.flags else found.type
        assert (kind, found.scope, default) == (parameter.type, parameter.scope, parameter.default)


def test_ours_are_never_replaced(noisy: str) -> None:
    found = import_methods([noisy], METHODS)
    assert all(found[name] is method for name, method in METHODS.items())


def test_an_error_of_a_method_names_the_tensor(noisy: str, tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    recipe = {
        "merge_method": "noisy", "base_model": str(family["base"]), "parameters": {"weight": 0.5, "how": "odd"},
        "models": [{"model": str(family["x"])}],
    }  # fmt: skip
    with pytest.raises(MergeError, match=r"lm_head\.weight: noisy of mergekit failed: ArithmeticError: odd"):
        merged(recipe, tmp_path / "out", imports=[noisy])


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_modules_that_cannot_be_imported_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = NOISY.replace("register(noisy)", "").replace('"noisy"', '"forgotten"')
    (tmp_path / "forgetful_methods.py").write_text(forgetful)
    (tmp_path / "broken_methods.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError) as caught:
        import_methods(["no_such_module", "broken_methods", "forgetful_methods"], METHODS)
    first, second, third = (str(problem) for problem in caught.value.problems)
    assert first.startswith("no_such_module: cannot be imported: ModuleNotFoundError")
    assert second.startswith("broken_methods: cannot be imported: ZeroDivisionError")
    assert "defines forgotten and does not register it" in third


REFUSED = {
    "an option of ours": (
        {"merge_method": "ties", "parameters": {"elect": "count"}},
        "mergekit's ties does not have elect",
    ),
    "a word of ours": (
        {"merge_method": "ties", "parameters": {"normalize": "count"}},
        "mergekit's ties does not have normalize: count",
    ),
    "a method of ours": ({"merge_method": "l1_ties"}, "mergekit does not have l1_ties"),
    "stochastic rounding": ({"merge_method": "ties", "rounding": "stochastic"}, "has no stochastic rounding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mergekit_arithmetic_is_refused_for_what_mergekit_has_not(case: str, tmp_path: Path) -> None:
    more, message = REFUSED[case]
    family = llama_family(tmp_path)
    more = {**more, "parameters": {"weight": 1.0, **more.get("parameters", {})}}
    recipe = {
        "base_model": str(family["base"]),
        "models": [{"model": str(family["x"])}],
        "arithmetic": "mergekit",
        **more,
    }
    with pytest.raises(PaftMergeError, match=message) as caught:
        merged(recipe, tmp_path / "out")
    assert len(caught.value.problems) == 1  # and not one for every tensor


def test_memory_for_whole_tensors_is_asked_for_in_the_plan(tmp_path: Path) -> None:
    recipe = recipe_of(llama_family(tmp_path), "arcee_fusion", "bx", {})
    with api.open_plan(recipe) as planned:
        largest = max(planned.tensors, key=lambda t: t.numel)
        assert isinstance(largest.rule, WholeTensor)
        assert largest.block_bytes >= 5 * 4 * largest.numel
    with pytest.raises(OutputError, match="more than memory="):
        merged(recipe, tmp_path / "out", memory=largest.block_bytes - 1)


def test_nan_in_a_whole_tensor_is_found(tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    state = llama_state(5)
    state["model.norm.weight"][3] = float("nan")
    save_checkpoint(tmp_path / "x", state, config=CONFIG)
    with pytest.raises(MergeError, match=r"model\.norm\.weight"):
        merged(recipe_of(family, "arcee_fusion", "bx", {}), tmp_path / "out")
