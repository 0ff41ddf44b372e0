"""`paft verify`: a right merge passes, and every planted fault is found and named."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from toys.adapters import Tensors, llama, save, train
from toys.merge import on, paft, recipe, write_recipe
from toys.vocabulary import save_tokenizer

from paft_merge.engine.api import merge
from paft_merge.errors import AuditError
from paft_merge.verifying import Behaviour, Verification, evidence, verification, verify
from paft_merge.verifying.findings import Finding

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*"
)  # PEFT reads a name that transformers renamed
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer and a template, an adapter, and both merged in float32 and in bfloat16."""
    top = tmp_path_factory.mktemp("world")
    rows = save_tokenizer(top / "tokenizer", "base", template=TEMPLATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, adapter = train(llama(vocab_size=rows), top, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for file in (top / "tokenizer").iterdir():
        shutil.copy(file, base / file.name)
    wanted = recipe("task_arithmetic", base, (on(base, adapter), {"weight": 1.0}))
    merge({**wanted, "out_dtype": "float32"}, top / "float32", write_model_card=False)
    merge({**wanted, "out_dtype": "bfloat16"}, top / "bfloat16", write_model_card=False)
    merge({**wanted, "output": {"kind": "adapter", "rank": 4}}, top / "lora", write_model_card=False)
    return top


def damaged(world: Path, to: Path, change: Callable[[Tensors], Tensors], of: str = "float32") -> Path:
    """A copy of a merged model with other tensors."""
    shutil.copytree(world / of, to)
    save_file(change(load_file(to / "model.safetensors")), to / "model.safetensors", {"format": "pt"})
    return to


def tensors_only(place: Path, **more: Any) -> Verification:
    return verify(place, tensors_only=True, **more)


def test_a_right_merge_in_float32_is_exact_and_answers_as_peft_does(world: Path) -> None:
    found = verify(world / "float32", rows=6, new_tokens=3, require=["kl < 1e-6"])
    assert found.ok
    assert found.exact
    assert not found.findings
    assert not found.skipped
    assert found.verdict == "is the model of its recipe, bit for bit"
    same, peft, base = (found.behaviours[name] for name in ("recipe", "adapter", "base"))
    assert same.largest == 0
    assert not same.parted
    assert set(same.drift) == {0.0}
    assert same.top1 == 1
    assert peft.kl is not None
    assert peft.kl < 1e-6
    assert peft.largest < 1e-5
    assert not peft.parted
    assert base.kl is not None
    assert base.kl > 1e-6
    assert base.drift[-1] > 1e-2
    assert base.continued == 6
    assert found.failures(["kl < 1e-6", "top1 == 1", "kl [source=adapter] < 1e-6"]) == []
    (failed,) = found.failures(["drift [source=base] < 1e-6"])
    assert failed.code == "REQUIRED"
    assert "drift is" in failed.what


def test_read_layer_by_layer_the_result_is_the_same(world: Path) -> None:
    whole = verify(world / "bfloat16", rows=4, new_tokens=2, memory="1G")
    parts = verify(world / "bfloat16", rows=4, new_tokens=2, memory="1k")
    assert "not" not in whole.verdict
    assert "up to one rounding" in parts.verdict
    assert parts.behaviours["recipe"].how == parts.behaviours["base"].how == "layer by layer"
    assert "memory" in parts.skipped["adapter"]
    for one in (whole, parts):
        kl = one.behaviours["recipe"].kl
        assert kl is not None
        assert 0 < kl < 1e-3
        assert one.behaviours["recipe"].breaks_at is None


def test_a_merged_adapter_is_verified_on_its_base(world: Path) -> None:
    found = verify(world / "lora", rows=2, new_tokens=2)
    assert found.ok, found.findings
    assert found.relative_error < 1e-6
    assert found.behaviours["recipe"].largest < 1e-4


Q, UP, NORM, EMBED = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.embed_tokens.weight",
)
LAYER = "model.layers.{}.{}"


def _swapped(state: Tensors) -> Tensors:
    def other(name: str) -> str:
        return (
            name.replace("layers.0.", "layers.X.").replace("layers.1.", "layers.0.").replace("layers.X.", "layers.1.")
        )

    return {name: state[other(name)].clone() for name in state}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {
    "a tensor rounded before": (lambda s: s | {Q: s[Q].bfloat16().float()}, "dtype", "was rounded to bfloat16 before it was stored as float32"),
    "swapped layers": (_swapped, "moved", "holds the values of model.layers.1."),
    "swapped layers of 16 bits": (lambda s: {n: t.bfloat16().float() for n, t in _swapped(s).items()}, "moved", "holds the values of model.layers.1."),
    "rounded to 8 bits": (lambda s: s | {Q: s[Q].to(torch.float8_e4m3fn).float()}, "dtype", "was rounded to float8_e4m3fn"),
    "other values of 16 bits": (lambda s: s | {Q: torch.randn_like(s[Q]).bfloat16().float()}, "value", "relative error"),
    "values beyond the squares of float32": (lambda s: s | {Q: 1e30 * torch.randn_like(s[Q])}, "value", "relative error of"),
    "one element": (lambda s: s | {Q: s[Q].index_fill(0, torch.tensor([0]), 9)}, "value", "in 16 of 256 elements"),
    "negated": (lambda s: s | {NORM: -s[NORM]}, "factor", "is -1 times the recipe's"),
    "a norm of one element": (lambda s: s | {NORM: s[NORM][:1]}, "shape", "merge again"),
    "names of a wrapper": (lambda s: {f"_orig_mod.{n}": t for n, t in s.items()}, "key", "a name that transformers does not load"),
    "names of PEFT": (lambda s: {f"base_model.model.{n}": t for n, t in s.items()}, "key", "it looks for lm_head.weight"),
    "a norm lost": (lambda s: s | {NORM: torch.ones_like(s[NORM])}, "constant", "every element is 1"),
    "a norm missing": (lambda s: {n: t for n, t in s.items() if n != NORM}, "missing", NORM),
    "a wrong key": (lambda s: {n.replace("layers.1.self_attn.q_proj", "layers.1.attn.q_proj"): t for n, t in s.items()}, "key", "is stored as model.layers.1.attn.q_proj.weight"),
    "rows shifted": (lambda s: s | {EMBED: s[EMBED].roll(1, 0)}, "rows", "its rows are shifted by 1"),
    "rows in another order": (lambda s: s | {EMBED: s[EMBED][torch.randperm(len(s[EMBED]), generator=torch.Generator().manual_seed(0))]}, "rows", "another order"),
    "columns in another order": (lambda s: s | {UP: s[UP][:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]}, "rows", "columns in another order"),
    "two rows exchanged": (lambda s: s | {EMBED: s[EMBED][[0, 2, 1, *range(3, len(s[EMBED]))]]}, "rows", "2 of its 277 rows are in another order"),
    "a vector in another order": (lambda s: s | {NORM: s[NORM].roll(3)}, "rows", "the recipe's values in another order"),
    "another layout": (lambda s: s | {UP: s[UP].T.contiguous()}, "shape", "it is transposed; merge again"),
    "transposed": (lambda s: s | {Q: s[Q].T.contiguous()}, "rows", "it is transposed"),
    "vocabulary resized": (lambda s: s | {EMBED: torch.cat([s[EMBED], s[EMBED][:3]])}, "shape", "its vocabulary was resized"),
    "NaN": (lambda s: s | {Q: s[Q].clone().fill_(float("nan"))}, "nonfinite", "NaN"),
    "noise": (lambda s: s | {Q: torch.randn_like(s[Q])}, "value", "relative error"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(world: Path, tmp_path: Path, fault: str) -> None:
    change, kind, words = FAULTS[fault]
    found = tensors_only(damaged(world, tmp_path / "out", change))
    assert not found.ok
    assert kind in found.verdict
    assert any(one.kind == kind and words in str(one) for one in found.findings if one.fault), found.findings


def _of_base(world: Path, make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    base = load_file(world / "base" / "model.safetensors")
    changed = ("q_proj.weight", "up_proj.weight")  # the modules of the adapter
    return lambda state: {
        n: make(base[n].float(), t.float()).to(t.dtype) if n.endswith(changed) else t for n, t in state.items()
    }


@pytest.mark.parametrize("of", ["float32", "bfloat16"])
def test_a_doubled_scale_is_named_with_its_factor(world: Path, tmp_path: Path, of: str) -> None:
    found = tensors_only(damaged(world, tmp_path / "out", _of_base(world, lambda b, t: b + 2 * (t - b)), of))
    (one,) = [f for f in found.findings if f.fault]
    assert one.kind == "scale"
    assert one.what.startswith("has 2 times the recipe's update")
    assert one.count == 4


def test_a_merge_that_was_not_made_is_named(world: Path, tmp_path: Path) -> None:
    found = tensors_only(damaged(world, tmp_path / "out", _of_base(world, lambda b, _: b)))
    (one,) = found.findings
    assert one.kind == "unmerged"
    assert one.count == 4
    assert found.lost == pytest.approx(1)


def test_a_layer_of_the_base_is_named_after_it_was_rounded(world: Path, tmp_path: Path) -> None:
    found = tensors_only(damaged(world, tmp_path / "out", _of_base(world, lambda b, _: b), "bfloat16"))
    assert [one.kind for one in found.findings] == ["unmerged"]


def test_names_that_the_class_renames_and_copies_of_tied_weights_are_no_fault(world: Path, tmp_path: Path) -> None:
    plain = damaged(world, tmp_path / "plain", lambda s: {n.removeprefix("model."): t for n, t in s.items()})
    assert tensors_only(plain).exact
    copied = tensors_only(damaged(world, tmp_path / "copied", lambda s: s | {"head.weight": s[EMBED].clone()}))
    assert copied.ok
    assert "is a copy of model.embed_tokens.weight" in copied.findings[0].what


def test_answers_that_the_tensors_do_not_explain_are_a_fault(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "not_loaded", lambda *_: ())
    out = damaged(world, tmp_path / "out", lambda s: {f"module.{n}": t for n, t in s.items()})
    found = verify(out, rows=2, new_tokens=1)
    assert [one.kind for one in found.findings] == ["answers"]
    assert "answers" in found.verdict


@pytest.mark.parametrize(("rank", "dtype"), [(1, "float32"), (4, "bfloat16")])
def test_an_adapter_is_its_recipe_up_to_its_rank_and_type(world: Path, tmp_path: Path, rank: int, dtype: str) -> None:
    wanted = recipe("task_arithmetic", world / "base", (on(world / "base", world / "adapter"), {"weight": 1.0}))
    merge({**wanted, "out_dtype": dtype, "output": {"kind": "adapter", "rank": rank}}, tmp_path / "out")
    found = tensors_only(tmp_path / "out")
    assert found.ok, found.findings
    assert not found.exact
    assert [one.kind for one in found.findings] == (["rank"] if rank == 1 else [])
    assert ("up to the rank" in found.verdict) == (rank == 1)
    config = tmp_path / "out" / "adapter_config.json"
    _edit(config, lambda c: c.update(lora_alpha=2 * c["lora_alpha"]))
    assert ("value" if rank == 1 else "scale") in tensors_only(tmp_path / "out").verdict


def test_rounding_twice_in_bfloat16_is_named(world: Path, tmp_path: Path) -> None:
    once = load_file(world / "float32" / "model.safetensors")
    coarse = once[Q] * (1 + 2**-8)  # at most one step more than rounding leaves
    found = tensors_only(damaged(world, tmp_path / "out", lambda s: s | {Q: coarse.bfloat16()}, "bfloat16"))
    (one,) = [f for f in found.findings if f.fault]
    assert one.kind == "twice"
    assert one.where == Q
    assert "more than once" in one.what


def test_bfloat16_of_an_update_below_its_steps_says_how_much_is_lost(tmp_path: Path) -> None:
    state = {n: t.bfloat16() for n, t in llama().state_dict().items()}
    save(llama(), tmp_path / "base")
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    made = torch.Generator().manual_seed(0)
    moved = {n: t.float() + 1e-5 * torch.randn(t.shape, generator=made) for n, t in state.items()}
    save_file(moved, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    wanted = recipe("task_arithmetic", tmp_path / "base", (tmp_path / "tuned", {"weight": 1.0}))
    merge({**wanted, "out_dtype": "bfloat16"}, tmp_path / "narrow", write_model_card=False)
    rounded = tensors_only(tmp_path / "narrow")
    assert rounded.ok
    assert any(f.kind == "lost" and "of the update" in f.what for f in rounded.findings)
    assert rounded.lost > 0.5
    assert "loses" in rounded.verdict
    merge({**wanted, "out_dtype": "float32"}, tmp_path / "wide", write_model_card=False)
    assert tensors_only(tmp_path / "wide").exact
    held = {n: t.bfloat16() for n, t in load_file(tmp_path / "wide" / "model.safetensors").items()}
    save_file(held, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
    cast = tensors_only(tmp_path / "wide")
    assert not cast.ok
    assert any(
        f.kind == "dtype" and "is stored as bfloat16, and the recipe writes float32" in f.what for f in cast.findings
    )


def _edit(file: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def _shift(data: Any) -> None:
    data["model"]["vocab"] = {
        token: (at + 1) % len(data["model"]["vocab"]) for token, at in data["model"]["vocab"].items()
    }


FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "template dropped": (lambda out: (out / "chat_template.jinja").unlink(), "template", "is only in the recipe"),
    "template changed": (lambda out: (out / "chat_template.jinja").write_text("{{ messages }}"), "template", "differs from line 1 on"),
    "vocabulary shifted": (lambda out: _edit(out / "tokenizer.json", _shift), "vocabulary", "another id in OUT"),
    "config changed": (lambda out: _edit(out / "config.json", lambda c: c.update(rms_norm_eps=1e-2)), "config", "rms_norm_eps"),
    "config missing": (lambda out: (out / "config.json").unlink(), "config", "is only in the recipe"),
    "codes that are not there": (lambda out: _edit(out / "config.json", lambda c: c.update(quantization_config={"bits": 4})), "config", "quantization_config is only in OUT"),
    "generation": (lambda out: (out / "generation_config.json").write_text('{"eos_token_id": 7}'), "config", "eos_token_id"),
    "begin of text": (lambda out: _edit(out / "tokenizer_config.json", lambda c: c.update(add_bos_token=True)), "tokenizer", "add_bos_token is only in OUT"),
    "code of a stranger": (lambda out: (out / "modeling_x.py").write_text("raise SystemExit"), "file", "modeling_x.py: is only in OUT"),
    "tokenizer missing": (lambda out: (out / "tokenizer.json").unlink(), "vocabulary", "only the recipe has 277 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_of_the_files_is_named(world: Path, tmp_path: Path, fault: str) -> None:
    change, kind, words = FILES[fault]
    shutil.copytree(world / "float32", tmp_path / "out")
    change(tmp_path / "out")
    found = tensors_only(tmp_path / "out")
    assert any(one.kind == kind and words in str(one) for one in found.findings), found.findings


def test_the_report_has_no_number_that_is_not_one() -> None:
    odd = evidence.StoredTensor("x", "F32", (1,), "F32", error=1.0, worst=1.0, steps=math.inf)
    found = Verification("out", (odd,), (), {}, {}).to_json()
    assert json.loads(json.dumps(found, allow_nan=False))["farthest"][0]["relative_error"] is None


def test_the_recipe_of_the_readme_is_verified(world: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    text = readme[readme.index("# recipe.yaml") :].partition("```")[0]
    for name, place in {
        "mistralai/Mistral-7B-v0.1": "base",
        "me/sft-adapter": "adapter",
        "me/dpo-adapter": "lora",
    }.items():
        text = text.replace(name, str(world / place))
    (tmp_path / "recipe.yaml").write_text(text)
    assert paft("merge", tmp_path / "recipe.yaml", tmp_path / "merged", "--quiet").exit_code == 0
    found = verify(tmp_path / "merged", rows=2, new_tokens=1, require=["kl < 1e-3"])
    assert found.ok, found.findings
    assert not found.failures(["kl < 1e-3"])


def test_a_model_of_another_tool_is_verified_by_its_recipe_and_on_given_prompts(world: Path, tmp_path: Path) -> None:
    (tmp_path / "my merge").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(world / "bfloat16" / name, tmp_path / "my merge" / name)
    wanted = recipe("task_arithmetic", world / "base", (on(world / "base", world / "adapter"), {"weight": 1.0}))
    file = write_recipe(tmp_path / "a recipe.json", {**wanted, "out_dtype": "bfloat16"})
    rows = tmp_path / "the prompts.jsonl"
    rows.write_text(
        '{"messages": [{"role": "user", "content": "the quick fox"}, {"role": "assistant", "content": "ok"}]}\n'
    )
    refused = paft("verify", tmp_path / "my merge", "--tensors-only")
    assert refused.exit_code == 1
    assert "pass the recipe that it was merged by, as --recipe recipe.yaml" in refused.output
    (tmp_path / "lines.txt").write_text("the quick brown fox\n\nreads rows\n")
    given = ("verify", tmp_path / "my merge", "--recipe", file, "--new-tokens", "1", "--quiet", "--json", "--data")
    for data in (rows, tmp_path / "lines.txt"):
        done = paft(*given, data)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["prompts"] == "the prompts given"
        assert found["behaviour"]["recipe"]["kl"] < 1e-3
    other = write_recipe(
        tmp_path / "other.json", {**wanted, "models": [{**wanted["models"][0], "parameters": {"weight": 0.5}}]}
    )
    wrong = paft("verify", tmp_path / "my merge", "--recipe", other, "--tensors-only")
    assert wrong.exit_code == 3
    assert "has 2 times the recipe's update" in wrong.output


def test_settings_that_change_nothing_are_no_fault(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "float32", tmp_path / "out")
    _edit(tmp_path / "out" / "config.json", lambda c: c.update(attention_dropout=0.5, mlp_bias=False, use_cache=False))
    (tmp_path / "out" / "verify.json").write_text("{}")
    assert tensors_only(tmp_path / "out").exact


def test_the_command_prints_a_row_for_each_model_and_its_gate_decides_the_exit_code(
    world: Path, tmp_path: Path
) -> None:
    done = paft(
        "verify", world / "bfloat16", "--rows", "2", "--new-tokens", "2", "--out", tmp_path / "v.json", "--quiet"
    )
    assert done.exit_code == 0, done.output
    assert "up to one rounding" in done.output
    assert "the recipe in float32" in done.output
    assert "PEFT, not merged" in done.output
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["ok"]
    assert report["behaviour"]["recipe"]["kl"] < 1e-3
    assert report["tensors"] == 21
    failed = paft("verify", world / "bfloat16", "--tensors-only", "--require", "relative_error < 1e-9", "--quiet")
    assert failed.exit_code == 3
    assert "REQUIRED" in failed.output
    unread = paft("verify", world / "bfloat16", "--require", "kll < 1")
    assert unread.exit_code == 2
    assert "did you mean 'kl'" in unread.output
    unmeasured = paft("verify", world / "bfloat16", "--tensors-only", "--require", "top1 > 0.9")
    assert unmeasured.exit_code == 2
    assert "require one of relative_error, update_lost, faults" in unmeasured.output
    given = ("--rows", "1", "--new-tokens", "0", "--require", "parted == 0", "--json", "--out", tmp_path / "u.json")
    unmeasured = paft("verify", world / "bfloat16", "--quiet", *given)
    assert unmeasured.exit_code == 2
    assert "there is no parted" in unmeasured.stderr
    assert json.loads(unmeasured.stdout) == json.loads((tmp_path / "u.json").read_text()), "the result is not lost"
    for device in ("tpu", "cuda:99"):
        refused = paft("verify", world / "bfloat16", "--device", device)
        assert refused.exit_code == 1
        assert f"error[DEVICE]: {device}" in refused.output
    with pytest.raises(AuditError, match=r'write for example "kl < 0\.001"'):
        verify(world / "bfloat16", require=["kl"])
    wrong = damaged(world, tmp_path / "out", lambda s: s | {NORM: torch.ones_like(s[NORM])})
    assert paft("verify", wrong, "--tensors-only").exit_code == 3


def test_a_narrow_terminal_has_a_sentence_for_each_model(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    done = paft("verify", world / "float32", "--rows", "1", "--new-tokens", "1", "--quiet").output
    assert "the recipe in float32: KL mean 0, KL p99 0, top-1 100.0%" in done
    assert "…" not in done


def test_a_notebook_shows_the_verdict_the_findings_and_a_row_for_each_model() -> None:
    answers = Behaviour("recipe", 9, 1e-3, None, 2e-3, 0.875, 0.5, 0.1, 4, {2: 0}, (0.01, 0.25))
    lost = Finding("missing", "<b>.weight", "is missing", "merge again")
    found = Verification("<i>out", (), (lost,), {"recipe": answers}, {"base": "<u>too large"})
    assert repr(found) == "Verification('<i>out', 'is not the model of its recipe: missing', 0 tensors, 1 findings)"
    html = found._repr_html_()
    assert "&lt;i&gt;out is not the model of its recipe: missing" in html
    assert "&lt;b&gt;.weight: is missing; merge again" in html
    row = "<td>the recipe in float32</td><td>0.001</td><td></td><td>87.5%</td><td>0.5</td><td>1 of 4 differ, first at token 1</td><td>0.25</td>"
    assert row in html
    assert "not compared with the base: &lt;u&gt;too large" in html
    bare = Verification("out", (), (), {}, {})._repr_html_()
    assert bare == "<p>out is the model of its recipe, bit for bit</p>"
