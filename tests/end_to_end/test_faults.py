"""Bad input, from one end to the other: what the command line says, that it says all of it, and that nothing is written.

The faults of single files are proven where they are found (test_headers, test_checkpoint, test_adapters_refused,
test_recipe, ...); here each kind is met in a merge, through `paft merge`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from safetensors.torch import save_file
from toys.merge import (
    WEIGHT_SPACE,
    State,
    files_of,
    manifest_of,
    on,
    paft,
    paft_process,
    python,
    recipe,
    recipe_for,
    same,
    tensors_of,
    write_recipe,
)

from paft_merge import merge
from paft_merge.methods import METHODS

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
WEIGHT = {"weight": 1.0}

Models = dict[str, Path]


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """A base, a fine-tune and an adapter, all sound."""
    base = random_state(0)
    return {
        "base": save_checkpoint(tmp_path / "base", base),
        "x": save_checkpoint(tmp_path / "x", near(base, 1)),
        "sft": save_adapter(tmp_path / "sft", base, 3),
    }


def sound(models: Models, **extra: Any) -> dict[str, Any]:
    adapted = on(models["base"], models["sft"])
    return recipe("task_arithmetic", models["base"], (models["x"], WEIGHT), (adapted, WEIGHT), **extra)


def rewritten(folder: Path, change: Callable[[State], object], **config: Any) -> None:
    """Save a checkpoint again with a change in its tensors."""
    state = tensors_of(folder)
    change(state)
    save_checkpoint(folder, state, config=config)


def with_value(name: str, at: int, value: float) -> Callable[[State], object]:
    def change(state: State) -> None:
        state[name].view(-1)[at] = value

    return change


def replaced(**tensors: torch.Tensor) -> Callable[[State], object]:
    names = {"up": UP, "norm": NORM, "embed": "model.embed_tokens.weight", "extra": "model.extra.weight"}
    return lambda state: state.update({names[key]: tensor for key, tensor in tensors.items()})


def adapter_config(models: Models, **fields: Any) -> None:
    file = models["sft"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def adapter_factors(models: Models, change: Callable[[State], object]) -> None:
    state = tensors_of(models["sft"])
    change(state)
    save_file(state, models["sft"] / "adapter_model.safetensors")


def file_of(models: Models) -> Path:
    return models["x"] / "model.safetensors"


def indexed(models: Models, shard: str) -> None:
    """Make the fine-tune one of shards, whose index names `shard`."""
    file_of(models).rename(models["x"] / "a.safetensors")
    (models["x"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))


def both(models: Models, change: Callable[[int], Callable[[State], object]], **config: Sequence[Any]) -> None:
    """Rewrite the base and the fine-tune, each with its own change and its own value in the config."""
    for i, name in enumerate(("base", "x")):
        rewritten(models[name], change(i), **{key: values[i] for key, values in config.items()})


def quantised(i: int) -> Callable[[State], object]:
    weight = torch.full((48, 24), 1.0 + i).to(torch.float8_e4m3fn)
    return lambda state: state.update({UP: weight, f"{UP}_scale_inv": torch.ones(1)})


def unchanged(_: int) -> Callable[[State], object]:
    return lambda state: None


def factor(letter: str, module: str = UP.removesuffix(".weight")) -> str:
    return f"base_model.model.{module}.lora_{letter}.weight"


def ropes(*thetas: float) -> list[dict[str, Any]]:
    return [{"rope_parameters": {"rope_theta": theta}} for theta in thetas]


def misplaced(models: Models) -> dict[str, Any]:
    return recipe("ties", models["base"], (models["x"], {"weight": 1, "lambda": 2}))


def ties_of(models: Models, **parameters: Any) -> dict[str, Any]:
    return recipe("ties", models["base"], (models["x"], parameters))


# The row of the fault matrix, what is done to the models (or the recipe instead), the code, what the line says.
FAULTS: dict[str, tuple[Callable[[Models], object], str, str]] = {
    "1 a file of seven bytes": (
        lambda m: file_of(m).write_bytes(b"1234567"),
        "SHARD_TRUNCATED",
        "x/model.safetensors: is 7 bytes",
    ),
    "5 a file that was cut": (
        lambda m: file_of(m).write_bytes(file_of(m).read_bytes()[:-50]),
        "SHARD_TRUNCATED",
        "download it again",
    ),
    "12 a type that nobody knows": (
        lambda m: file_of(m).write_bytes(file_of(m).read_bytes().replace(b'"F32"', b'"F31"', 1)),
        "DTYPE_UNSUPPORTED",
        "F31",
    ),
    "13 whole numbers in a source": (
        lambda m: rewritten(m["x"], replaced(norm=torch.ones(24, dtype=torch.int8))),
        "DTYPE_UNSUPPORTED",
        "is I8 and differs from that of .*base, which is F32",
    ),
    "13 whole numbers that differ": (
        lambda m: both(m, lambda i: replaced(norm=torch.full((24,), i))),
        "DTYPE_UNSUPPORTED",
        "is I64 and differs",
    ),
    "13 a quantised base": (lambda m: both(m, quantised), "DTYPE_UNSUPPORTED", "quantised"),
    "16 a Git LFS pointer": (
        lambda m: file_of(m).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "LFS_POINTER",
        "run `git lfs pull`",
    ),
    "17 a page of HTML": (lambda m: file_of(m).write_text("<!DOCTYPE html><html>"), "NOT_SAFETENSORS", "is a web page"),
    "18 an index that leaves its folder": (
        lambda m: indexed(m, "../base/model.safetensors"),
        "INDEX_PATH",
        "not a plain file name",
    ),
    "22 a shard that is missing": (
        lambda m: indexed(m, "b.safetensors"),
        "SHARD_MISSING",
        "b.safetensors: no such file",
    ),
    "31 pickles alone": (
        lambda m: file_of(m).rename(m["x"] / "pytorch_model.bin"),
        "PICKLE_REFUSED",
        "--lazy-unpickle",
    ),
    "34 an adapter without its config": (
        lambda m: (m["sft"] / "adapter_config.json").unlink(),
        "ADAPTER_CONFIG",
        "adapter_config.json",
    ),
    "34 an adapter config that is no JSON": (
        lambda m: (m["sft"] / "adapter_config.json").write_text("{"),
        "ADAPTER_CONFIG",
        "adapter_config.json",
    ),
    "34 an adapter of a kind without a delta": (
        lambda m: adapter_config(m, peft_type="XLORA"),
        "ADAPTER_UNSUPPORTED",
        "XLORA",
    ),
    "34 an adapter field without a delta": (
        lambda m: adapter_config(m, layer_replication=[[0, 1]]),
        "ADAPTER_UNSUPPORTED",
        "layer_replication",
    ),
    "35 lora_A without lora_B": (
        lambda m: adapter_factors(m, lambda s: s.pop(factor("B"))),
        "ADAPTER_SHAPE",
        "model.layers.0.mlp.up_proj",
    ),
    "35 factors of other shapes": (
        lambda m: adapter_factors(m, lambda s: s.update({factor("A"): torch.ones(4, 7)})),
        "ADAPTER_SHAPE",
        "7",
    ),
    "35 a rank of zero": (lambda m: adapter_config(m, r=0), "ADAPTER_", "r"),
    "35 an alpha that is no number": (lambda m: adapter_config(m, lora_alpha=float("nan")), "ADAPTER_", "lora_alpha"),
    "36 an adapter of modules that the base lacks": (
        lambda m: adapter_factors(m, lambda s: s.update({factor(ab, "layers.77.q"): torch.ones(4, 4) for ab in "AB"})),
        "ADAPTER_TARGET",
        "layers.77",
    ),
    "37 an adapter of another base": (
        lambda m: save_adapter(m["sft"], random_state(0, width=32), 1),
        "ADAPTER_SHAPE",
        "32",
    ),
    "38 a tensor too many": (
        lambda m: rewritten(m["x"], replaced(extra=torch.ones(2))),
        "KEYS_EXTRA",
        "has 'model.extra.weight', which",
    ),
    "39 a tensor too few": (
        lambda m: rewritten(m["x"], lambda s: s.pop(UP)),
        "KEYS_MISSING",
        f"lacks '{UP}', which",
    ),
    "40 a tensor of another shape": (
        lambda m: rewritten(m["x"], replaced(up=torch.ones(3, 4))),
        "SHAPE_MISMATCH",
        f"{UP}: is [3, 4], and .*base has [48, 24]",
    ),
    "41 another vocabulary": (
        lambda m: rewritten(m["x"], replaced(embed=torch.ones(48, 24))),
        "SHAPE_MISMATCH",
        "[48, 24], and .*base has [40, 24]; the vocabularies differ",
    ),
    "42 tied in one and not in the other": (
        lambda m: rewritten(m["x"], lambda s: s.pop("lm_head.weight"), tie_word_embeddings=True),
        "CONFIG_MISMATCH",
        "tie_word_embeddings (True against False)",
    ),
    "43 another number of heads": (
        lambda m: both(m, unchanged, num_attention_heads=[4, 8]),
        "CONFIG_MISMATCH",
        "num_attention_heads (8 against 4)",
    ),
    "43 another rotation": (
        lambda m: both(m, unchanged, text_config=ropes(1e4, 5e5)),
        "CONFIG_MISMATCH",
        "rope_theta (500000.0 against 10000.0)",
    ),
    "45 NaN in a source": (
        lambda m: rewritten(m["x"], with_value(UP, 17, np.nan)),
        "NONFINITE",
        f"x: {UP}: 1 of 1,152 elements are NaN or infinite, the first at flat index 17",
    ),
    "45 NaN in an adapter": (
        lambda m: adapter_factors(m, with_value(factor("A"), 5, np.nan)),
        "NONFINITE",
        "sft.*up_proj",
    ),
    "46 infinity in the base": (
        lambda m: rewritten(m["base"], with_value(NORM, 3, -np.inf)),
        "NONFINITE",
        f"base: {NORM}: 1 of 24 elements",
    ),
    "48 weights that add up to nothing": (
        lambda m: recipe("linear", None, (m["base"], {"weight": 1}), (m["x"], {"weight": -1})),
        "PARAM_RANGE",
        "add up to zero",
    ),
    "50 a method that nobody knows": (
        lambda m: sound(m) | {"merge_method": "tees"},
        "RECIPE",
        "r.yaml:2: merge_method: unknown merge method 'tees'; did you mean 'ties'",
    ),
    "50 a parameter that is missing": (lambda m: ties_of(m), "RECIPE", "Missing required parameter weight"),
    "50 a density beyond one": (lambda m: ties_of(m, weight=1, density=2), "RECIPE", "density.*got 2"),
    "50 a weight that is text": (lambda m: ties_of(m, weight="much"), "RECIPE", "must be a number"),
    "50 a shared parameter under a source": (misplaced, "MISPLACED", "move it to the recipe's parameters"),
    "50 no models": (lambda m: recipe("ties", m["base"]), "RECIPE", "models is empty"),
    "50 one model twice": (
        lambda m: recipe("ties", m["base"], (m["x"], WEIGHT), (m["x"], WEIGHT)),
        "RECIPE",
        "already listed at models[0]",
    ),
    "62 a model that is nowhere": (
        lambda m: recipe("ties", m["base"], ("./nowhere", WEIGHT)),
        "NOT_FOUND",
        "./nowhere: not a local folder",
    ),
    "62 a model of the Hub, offline": (
        lambda m: recipe("ties", m["base"], ("some/model", WEIGHT)),
        "HUB_OFFLINE",
        "some/model: not a local folder, not in the Hub's cache, and the Hub cannot be reached",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line_with_its_code_its_place_and_its_cure(case: str, models: Models, tmp_path: Path) -> None:
    spoil, code, text = FAULTS[case]
    spoilt = spoil(models)
    file = write_recipe(tmp_path / "r.yaml", spoilt if isinstance(spoilt, dict) else sound(models))
    before = files_of(tmp_path)
    result = paft("merge", file, tmp_path / "out", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning[")]
    said = re.escape(text).replace(r"\.\*", ".*")
    assert any(re.match(rf"error\[{code}\w*\]: .*{said}", line) for line in lines), result.stderr
    assert all(re.match(r"error\[[A-Z_]+\]: .*", line) for line in lines)
    if code == "NONFINITE":  # which no header shows: what was finished is kept
        assert not (tmp_path / "out").exists()
    else:
        assert files_of(tmp_path) == before


def test_all_faults_of_all_inputs_are_told_at_once(models: Models, tmp_path: Path) -> None:
    rewritten(
        models["x"],
        lambda s: (s.pop(NORM), s.update({UP: torch.ones(3, 4), "model.more.weight": torch.ones(1)})),
        model_type="odd",
    )
    rewritten(models["base"], replaced(norm=torch.ones(24)), model_type="llama")
    other = save_checkpoint(tmp_path / "other", near(random_state(0, width=32), 1))
    asked = sound(models)
    asked["models"].append({"model": str(other), "parameters": WEIGHT})
    (tmp_path / "out").write_text("a file")
    result = paft("merge", write_recipe(tmp_path / "r.yaml", asked), tmp_path / "out")
    found = re.findall(r"^error\[(\w+)\]", result.stderr, re.MULTILINE)
    assert {"CONFIG_MISMATCH", "KEYS_MISSING", "KEYS_EXTRA", "SHAPE_MISMATCH", "OUTPUT"} == set(found)
    assert found.count("SHAPE_MISMATCH") > 2
    assert len(found) == len(set(result.stderr.splitlines()))


def test_faults_of_many_files_are_told_at_once(models: Models, tmp_path: Path) -> None:
    (models["x"] / "model.safetensors").write_bytes(b"")
    adapter_config(models, peft_type="XLORA")
    asked = sound(models)
    asked["models"].append({"model": "./nowhere", "parameters": WEIGHT})
    result = paft("merge", write_recipe(tmp_path / "r.yaml", asked), tmp_path / "out")
    assert re.findall(r"^error\[(\w+)\]", result.stderr, re.MULTILINE) == [
        "SHARD_TRUNCATED",
        "ADAPTER_UNSUPPORTED",
        "NOT_FOUND",
    ]


def test_hundreds_of_faults_do_not_flood_the_screen(tmp_path: Path) -> None:
    state = random_state(0, layers=40)
    base = save_checkpoint(tmp_path / "base", state)
    odd = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(i + 1, 24) for i in range(40)}
    other = save_checkpoint(tmp_path / "other", state | odd)
    result = paft("merge", write_recipe(tmp_path / "r.yaml", recipe("ties", base, (other, WEIGHT))), tmp_path / "out")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 21
    assert "more faults" in result.stderr.splitlines()[-1]


def test_faults_of_yaml_name_line_and_column(models: Models, tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij"))
    for text, said in [
        ("merge_method: [ties", "r.yaml:1"),
        ("merge_method: !!python/object/apply:os.system ['true']", "r.yaml:1"),
        ("merge_method: ties\nmerge_method: linear\n", "r.yaml:2"),
        ("[" * 5000, "r.yaml:1"),
        (bomb, "r.yaml"),
        ("just words", "r.yaml"),
    ]:
        (tmp_path / "r.yaml").write_text(text)
        result = paft("merge", tmp_path / "r.yaml", tmp_path / "out")
        assert result.exit_code == 1
        assert all(line.startswith("error[RECIPE]: ") for line in result.stderr.splitlines()), result.stderr
        assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_exponent_without_a_point_is_a_number(models: Models, tmp_path: Path) -> None:
    text = write_recipe(tmp_path / "r.json", ties_of(models, weight="W")).read_text()
    text = text.replace('"W"', "1e-4").replace('"ties"', "task_arithmetic")
    (tmp_path / "r.yaml").write_text(text)
    result = paft("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    base, x = tensors_of(models["base"])[UP], tensors_of(models["x"])[UP]
    torch.testing.assert_close(tensors_of(tmp_path / "out")[UP], base + 1e-4 * (x - base))


def test_a_key_that_is_misspelt_is_a_warning_and_with_strict_an_error(models: Models, tmp_path: Path) -> None:
    asked = recipe("ties", models["base"], (models["x"], {"weight": 1, "densty": 0.2}), chat_templat="auto")
    file = write_recipe(tmp_path / "r.yaml", asked)
    result = paft("merge", file, tmp_path / "out")
    assert result.exit_code == 0
    assert re.findall(r"^warning\[UNKNOWN_KEY\]: .*did you mean '(\w+)'", result.stderr, re.MULTILINE) == [
        "density",
        "chat_template",
    ]
    result = paft("merge", file, tmp_path / "strict", "--strict")
    assert result.exit_code == 1
    assert result.stderr.count("error[UNKNOWN_KEY]") == 2
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["merge", "plan"])
def test_a_key_that_is_misspelt_is_told_of_beside_a_source_that_is_missing(
    dry: list[str], models: Models, tmp_path: Path
) -> None:
    asked = recipe("ties", models["base"], (tmp_path / "gone", {"weight": 1, "densty": 0.2}))
    result = paft("merge", write_recipe(tmp_path / "r.yaml", asked), tmp_path / "out", *dry)
    assert result.exit_code == 1
    assert len(re.findall(r"^warning\[UNKNOWN_KEY\]: .*did you mean 'density'", result.stderr, re.MULTILINE)) == 1
    assert re.findall(r"^error\[(\w+)\]: .*gone", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "extra",
    [{"tokenizer_source": "union"}, {"chat_template": "chatml"}, {"tokenizer": {"source": "base"}}],
    ids=lambda extra: next(iter(extra)),
)
def test_a_tokenizer_is_asked_of_models_that_have_none(extra: dict[str, Any], models: Models, tmp_path: Path) -> None:
    result = paft("merge", write_recipe(tmp_path / "r.yaml", sound(models, **extra)), tmp_path / "out")
    assert result.exit_code == 1
    assert f"{models['base']}" in result.stderr
    assert "has no tokenizer" in result.stderr
    assert not (tmp_path / "out").exists()


def test_crimes_are_merged_when_allowed(models: Models, tmp_path: Path) -> None:
    rewritten(models["x"], lambda s: 0, model_type="odd")
    file = write_recipe(tmp_path / "r.yaml", sound(models))
    assert paft("merge", file, tmp_path / "out").exit_code == 1
    assert paft("merge", file, tmp_path / "out", "--allow-crimes").exit_code == 0


# --- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)
def test_nonfinite_values_pass_when_allowed_and_are_recorded(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {name: tensor.to(dtype) for name, tensor in random_state(0).items()}
    x = near(base, 1)
    base["copied"] = torch.tensor([1, np.nan, np.inf]).to(dtype)
    x["copied"] = base["copied"].clone()
    x[UP].view(-1)[[5, 7]] = torch.tensor([np.nan, -np.inf]).to(dtype)
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", x)
    file = write_recipe(tmp_path / "r.yaml", recipe("task_arithmetic", a, (b, {"weight": 1.0})))
    assert "error[NONFINITE]" in paft("merge", file, tmp_path / "out").stderr
    result = paft("merge", file, tmp_path / "out", "--allow-nonfinite")
    assert result.exit_code == 0, result.stderr
    written, record = tensors_of(tmp_path / "out"), manifest_of(tmp_path / "out")
    assert not torch.isfinite(written[UP].view(-1)[[5, 7]]).any()
    assert torch.isfinite(written[NORM]).all()
    assert record["allow_nonfinite"] is True
    assert {n: e["nonfinite"] for n, e in record["tensors"].items() if "nonfinite" in e} == {UP: 2, "copied": 2}
    assert record["tensors"][UP]["sources"][0]["l2"] is None
    json.loads((tmp_path / "out" / "merge_manifest.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("method", ["ties", "l1_ties", "dare_ties", "slerp", "sign_election", "linear"])
def test_many_values_that_are_not_finite_are_one_error(method: str, share: float, tmp_path: Path) -> None:
    base = {"w": torch.randn(900, 700)}
    bad = base["w"] + 0.01
    bad.view(-1)[: int(share * bad.numel())] = np.nan
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", {"w": bad})
    given = {} if method == "slerp" else {"weight": 1.0, **({"density": 0.5} if method != "linear" else {})}
    asked = recipe(
        method, None if method == "linear" else a, (b, given), parameters={"t": 0.5} if method == "slerp" else {}
    )
    result = paft("merge", write_recipe(tmp_path / "r.yaml", asked), tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert re.fullmatch(
        r"error\[NONFINITE\]: .*b: w: [\d,]+ of 630,000 elements are NaN or infinite, the first at flat index 0; .*\n",
        result.stderr,
    )


def test_what_is_too_large_for_float16_is_counted_and_bfloat16_advised(tmp_path: Path) -> None:
    base = {"w": torch.full((30,), 40_000.0).half()}
    x = {"w": torch.cat([torch.full((7,), 60_000.0), torch.full((23,), 41_000.0)]).half()}
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", x)
    asked = recipe("task_arithmetic", a, (b, {"weight": 2.0}))
    result = paft("merge", write_recipe(tmp_path / "r.yaml", asked), tmp_path / "out")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error\[OVERFLOW\]: w: 7 merged values .*float16; write out_dtype: bfloat16 or float32\n", result.stderr
    )
    assert (
        paft("merge", write_recipe(tmp_path / "r.yaml", asked | {"out_dtype": "bfloat16"}), tmp_path / "out").exit_code
        == 0
    )


def test_deltas_of_nothing_and_numbers_at_their_ends_are_defined(tmp_path: Path) -> None:
    """Row 48: no NaN comes out of finite input."""
    base = random_state(0)
    zero, opposite = {n: torch.zeros_like(t) for n, t in base.items()}, {n: -t for n, t in base.items()}
    paths = {
        n: save_checkpoint(tmp_path / n, s)
        for n, s in (("base", base), ("same", dict(base)), ("zero", zero), ("opposite", opposite), ("x", near(base, 1)))
    }
    given, equal = {"weight": 1.0, "density": 0.0}, [(paths["same"], {"weight": 1.0})]
    unchanged = [
        *(recipe(method, paths["base"], *equal) for method in ("ties", "dare_linear", "task_arithmetic", "l1_ties")),
        *(recipe(method, paths["base"], (paths["x"], given)) for method in ("ties", "dare_ties", "dare_linear")),
    ]
    pairs = [("base", "zero"), ("zero", "base"), ("base", "opposite"), ("base", "same")]
    against = [(paths["x"], {"weight": 1.0}), (paths["same"], {"weight": -1.0})]
    cases = [
        *unchanged,
        *(recipe("slerp", paths[one], paths[other], parameters={"t": 0.5}) for one, other in pairs),
        recipe("ties", paths["base"], *against),
        recipe("task_arithmetic", paths["base"], *against, parameters={"normalize": True}),
    ]
    for i, case in enumerate(cases):
        written = tensors_of(merge(case, tmp_path / f"out{i}"))
        assert all(torch.isfinite(tensor).all() for tensor in written.values()), case
    for i in range(len(unchanged)):
        assert same(tensors_of(tmp_path / f"out{i}"), base), cases[i]


def test_too_little_memory_for_one_block_names_the_tensor_and_the_bytes(models: Models, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "r.yaml", sound(models))
    result = paft("merge", file, tmp_path / "out", "--memory", "1k")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error\[MEMORY\]: model\S+: one block .* take [\d,]+ bytes, more than --memory 1000; allow at least [\d,]+ bytes\n",
        result.stderr,
    )
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_larger_than_the_memory_is_merged_in_blocks(tmp_path: Path) -> None:
    base = {"w": torch.randn(16384, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()}
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", near(base, 1))
    file = write_recipe(tmp_path / "r.yaml", recipe("ties", a, (b, {"weight": 1, "density": 0.5})))
    code = """if True:
        import resource, sys
        from toys.merge import paft
        assert paft("merge", sys.argv[1], sys.argv[2] + "0", "--dry-run").exit_code == 0
        import paft_merge.engine.streaming
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = paft("merge", sys.argv[1], sys.argv[2], "--memory", "64M")
        assert result.exit_code == 0, result.output
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    run = python(code, file, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 150, "MiB beyond what importing takes: kernels, blocks and page cache"


# --- tokenizers, code, the network ---------------------------------------------------------------------------------------


def test_tokenizers_that_differ_are_a_warning_with_what_differs(models: Models, tmp_path: Path) -> None:
    def vocabulary(*tokens: str, added: str = "<s>") -> str:
        added_tokens = [{"id": len(tokens), "content": added}]
        return json.dumps(
            {"model": {"vocab": {token: i for i, token in enumerate(tokens)}}, "added_tokens": added_tokens}
        )

    (models["base"] / "tokenizer.json").write_text(vocabulary("a", "b", "c", "d"))
    (models["x"] / "tokenizer.json").write_text(vocabulary("a", "c", "b", "e", "f"))
    file = write_recipe(tmp_path / "r.yaml", sound(models))
    result = paft("merge", file, tmp_path / "out")
    assert result.exit_code == 0
    warning = next(line for line in result.stderr.splitlines() if line.startswith("warning[TOKENIZER]"))
    assert warning.startswith(
        f"warning[TOKENIZER]: {models['x']}: its tokenizer.json differs from that of {models['base']}"
    )
    assert "(2 tokens more, 1 fewer, 3 with another id)" in warning
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models["base"] / "tokenizer.json").read_bytes()
    (models["x"] / "tokenizer.json").write_text("not JSON")
    assert "its tokenizer.json differs from that of" in paft("merge", file, tmp_path / "odd").stderr
    (models["x"] / "tokenizer.json").write_bytes((models["base"] / "tokenizer.json").read_bytes())
    assert "TOKENIZER" not in paft("merge", file, tmp_path / "same").stderr


def test_code_that_a_model_brings_is_never_run_and_copied_only_when_asked(models: Models, tmp_path: Path) -> None:
    sentinel = tmp_path / "it_ran"
    for name in ("base", "x"):
        rewritten(
            models[name],
            lambda s: 0,
            auto_map={"AutoModelForCausalLM": "modeling_odd.OddModel"},
            architectures=["OddModel"],
        )
        for file in ("modeling_odd.py", "configuration_odd.py", "__init__.py", "sitecustomize.py"):
            (models[name] / file).write_text(f"open({str(sentinel)!r}, 'w')")
    recipe_file = write_recipe(tmp_path / "r.yaml", sound(models))
    plain = paft("merge", recipe_file, tmp_path / "out")
    assert plain.exit_code == 0
    assert "warning[REMOTE_CODE]" in plain.stderr
    assert "modeling_odd.py" in plain.stderr
    assert not list((tmp_path / "out").glob("*.py"))
    trusted = paft("merge", recipe_file, tmp_path / "trusted", "--trust-remote-code")
    assert {f.name for f in (tmp_path / "trusted").glob("*.py")} == {
        "modeling_odd.py",
        "configuration_odd.py",
        "__init__.py",
        "sitecustomize.py",
    }
    assert "are copied, not run" in trusted.stderr
    assert not sentinel.exists()


def test_pickles_are_never_run(models: Models, tmp_path: Path) -> None:
    """Row 32: a pickle that would make a file, under every name that a folder of a model or an adapter may have."""
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "it_ran"), "w")

    evil = pickle.dumps({"w": Evil()})
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (models["base"] / name).write_bytes(evil)
        (models["sft"] / name).write_bytes(evil)
    file = write_recipe(tmp_path / "r.yaml", sound(models))
    assert paft("merge", file, tmp_path / "out").exit_code == 0
    (models["sft"] / "adapter_model.safetensors").rename(models["sft"] / "adapter_model.bin")
    (models["sft"] / "adapter_model.bin").write_bytes(evil)
    (models["x"] / "model.safetensors").unlink()
    torch.save({"w": torch.ones(1)}, models["x"] / "pytorch_model.bin")
    result = paft("merge", file, tmp_path / "no")
    assert re.findall(r"^error\[(\w+)\]", result.stderr, re.MULTILINE) == ["PICKLE_REFUSED"] * 2
    (models["x"] / "pytorch_model.bin").write_bytes(evil)
    assert "PICKLE_" in paft("merge", file, tmp_path / "no", "--lazy-unpickle").stderr
    assert not (tmp_path / "it_ran").exists()


def test_no_host_is_asked_for_local_models(tmp_path: Path) -> None:
    """Row 67, with an adapter of an architecture that transformers is asked about, and no offline switch set.

    urllib3 makes a socket when it is imported, to see whether the machine has IPv6, and connects it to nothing.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    adapter = save_adapter(tmp_path / "sft", base, 1)
    factors = tensors_of(adapter)
    factors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 32)
    factors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.ones(16, 4)
    save_file(factors, adapter / "adapter_model.safetensors")
    file = write_recipe(
        tmp_path / "r.yaml", recipe("ties", tmp_path / "base", (on(tmp_path / "base", adapter), WEIGHT))
    )
    guard = """if True:
        import os, socket, sys
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.pop(name, None)
        def closed(event, arguments):
            if event.startswith("socket.") and event not in ("socket.gethostname", "socket.__new__", "socket.bind"):
                print("a socket:", event, arguments[1:], file=sys.stderr)
                os._exit(3)
        sys.addaudithook(closed)
    """
    run = paft_process("merge", file, tmp_path / "out", "--quiet", before=guard)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    opened = paft_process("--version", before=guard + "    socket.create_connection(('127.0.0.1', 9))\n")
    assert opened.returncode == 3


def test_every_fault_of_a_real_process_is_a_line_and_not_a_traceback(models: Models, tmp_path: Path) -> None:
    rewritten(models["x"], lambda s: s.pop(NORM))
    run = paft_process("merge", write_recipe(tmp_path / "r.yaml", sound(models)), tmp_path / "out")
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(r"error\[KEYS_MISSING\]: .*; .*\n", run.stderr)


def test_names_cannot_drive_a_terminal(tmp_path: Path) -> None:
    evil = "w\x1b]0;owned\x07\n[red]../../x"
    base = {evil: torch.ones(3), "w": torch.ones(2)}
    a, b = (
        save_checkpoint(tmp_path / "a", base),
        save_checkpoint(tmp_path / "b", {evil: torch.ones(4), "w": torch.ones(2)}),
    )
    result = paft(
        "merge", write_recipe(tmp_path / "r.yaml", recipe("linear", None, (a, WEIGHT), (b, WEIGHT))), tmp_path / "out"
    )
    assert result.exit_code == 1
    assert "SHAPE_MISMATCH" in result.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stderr)
    adapter = save_adapter(tmp_path / "sft", random_state(0), 1)
    c = save_checkpoint(tmp_path / "c", {**random_state(0), **base})
    file = write_recipe(tmp_path / "ok.yaml", recipe("ties", c, (on(c, adapter), WEIGHT)))
    assert paft("merge", file, tmp_path / "out").exit_code == 0
    assert torch.equal(tensors_of(tmp_path / "out")[evil], torch.ones(3))
    assert [f.name for f in tmp_path.parent.glob("x*")] == []


def test_every_method_refuses_missing_tensors(tmp_path: Path) -> None:
    base = random_state(0)
    short = near(base, 1)
    del short[NORM]
    paths = [save_checkpoint(tmp_path / n, s) for n, s in (("base", base), ("short", short), ("x", near(base, 2)))]
    for name in WEIGHT_SPACE:
        if METHODS[name].base != "required" and METHODS[name].max_sources == 1:
            continue  # it has one source, which is the donor
        file = write_recipe(tmp_path / "r.yaml", recipe_for(name, paths[0], *paths[1:]))
        result = paft("merge", file, tmp_path / "out")
        assert result.exit_code == 1, name
        assert re.search(r"error\[KEYS_(MISSING|EXTRA)\]", result.stderr), name


def test_models_that_are_not_found_have_the_line_of_the_recipe(models: Models, tmp_path: Path) -> None:
    asked = recipe("ties", models["base"], ("./nowhere", WEIGHT), ("some/model", WEIGHT))
    file = write_recipe(tmp_path / "r.yaml", asked)
    lines = {
        text: at
        for at, line in enumerate(file.read_text().splitlines(), 1)
        for text in ("nowhere", "some/")
        if text in line
    }
    result = paft("merge", file, tmp_path / "out", "--quiet")
    shown = sorted(result.stderr.splitlines())
    assert len(shown) == 2
    for text, line in zip(("some/", "nowhere"), shown, strict=True):
        found = re.match(rf"error\[[A-Z_]+\]: {re.escape(str(file))}:(\d+): \S*{text}", line)
        assert found, line
        assert lines[text] - int(found[1]) in (0, 1), "the line of the entry, or of its model"


def test_an_adapter_of_another_base_is_one_line_that_names_its_base(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "base", state)
    wide = {name: tensor.repeat(*([2] * tensor.dim())) for name, tensor in state.items()}
    adapter = save_adapter(tmp_path / "sft", wide, 3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/wide-model"}))
    file = write_recipe(tmp_path / "r.yaml", recipe("ties", base, (f"{base}+{adapter}", WEIGHT)))
    result = paft("merge", file, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error[ADAPTER_SHAPE]: ")
    assert re.search(r"\d+ of its tensors do not fit the base, such as .*'me/wide-model'", line)
