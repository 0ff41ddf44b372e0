"""`paft check` says of each reader what a program written after its source does with the same folder."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import save_checkpoint
from safetensors.torch import save_file
from toys import readers
from toys.served import MADE, PREFIX, Q, State, V, base_state, draw, plain, same, wanted, write

from paft_merge.cli import cli
from paft_merge.dialects.checking import check
from paft_merge.dialects.rules import READERS, SOURCES, WORST
from paft_merge.dialects.traits import JOINED_BY_PEFT, TRAITS
from paft_merge.engine.api import open_plan
from paft_merge.inputs.checkpoint import Checkpoint


@pytest.mark.parametrize("made", MADE)
def test_a_program_does_what_the_rules_say(made: str, tmp_path: Path) -> None:
    folder = MADE[made](tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    trained = bool(config.get("modules_to_save") or config.get("use_dora") or "half" in made)
    for verdict in check(folder, list(readers.READERS)):
        try:
            deltas = readers.READERS[verdict.reader](folder)
        except readers.RefusedError:
            assert not verdict.passes, verdict
            continue
        is_right = same(deltas, wanted(folder)) and not trained
        assert verdict.passes == is_right, (verdict, sorted(deltas))
        assert is_right or verdict.outcome == "silent", verdict


def test_every_trait_has_a_rule_and_every_rule_a_source() -> None:
    rules = [rule for _, rows in READERS.values() for rule in rows]
    assert {rule.trait for rule in rules} == TRAITS.keys()
    assert {rule.source for rule in rules} == SOURCES.keys()
    for name, (_, rows) in READERS.items():
        assert len({rule.trait for rule in rows}) == len(rows), name


def test_the_page_has_the_rules() -> None:
    import docs_serving

    assert docs_serving.page() == docs_serving.PAGE.read_text(), "run python tools/docs_serving.py"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["check", *map(str, arguments)])


@pytest.mark.parametrize(
    ("made", "programs", "code"),
    [("plain", "vllm,sglang,llamacpp,peft", 0), ("plain", "mlx", 3), ("rsLoRA", "vllm,peft", 0), ("rsLoRA", "sglang", 3), ("DoRA", "vllm", 3), ("plain", "all", 3)],
)  # fmt: skip
def test_the_exit_code_is_that_of_a_gate(made: str, programs: str, code: int, tmp_path: Path) -> None:
    folder = MADE[made](tmp_path / "adapter")
    assert run(folder, "--for", programs).exit_code == code
    assert run(folder).exit_code == 0


def test_the_worst_comes_first_and_json_has_all(tmp_path: Path) -> None:
    folder = MADE["rsLoRA"](tmp_path / "adapter")
    found = json.loads(run(folder, "--json").stdout)
    assert [one["outcome"] for one in found["readers"]] == ["silent", "silent", "refuses", "loads", "loads"]
    assert {one["reader"] for one in found["readers"]} == READERS.keys()
    finding = next(one for one in found["readers"] if one["reader"] == "sglang")["findings"][0]
    assert finding["names"] == [Q, V]
    assert "0.5 times" in finding["what"]  # alpha / r is 2, alpha / sqrt(r) is 4
    assert "40835" in finding["source"]
    assert list(WORST) == ["silent", "refuses", "option", "loads"]


def test_the_table_fits_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run(MADE["norms of layers"](tmp_path / "adapter")).stdout
    assert max(map(len, out.splitlines())) <= 80
    assert out.splitlines()[1].startswith("sglang")
    assert "model.layers.0.input_layernorm.weight" in out
    assert "base_model.model." not in out


@pytest.mark.parametrize(
    ("rank", "outcome", "said"),
    [
        (16, "loads", ""),
        (17, "option", "--max-lora-rank 32"),
        (257, "option", "--max-lora-rank 320"),
        (513, "refuses", "up to 512"),
    ],
)
def test_vllm_needs_an_option_above_rank_16(rank: int, outcome: str, said: str, tmp_path: Path) -> None:
    (verdict,) = check(write(tmp_path / "a", plain(rank=rank), r=rank), ["vllm"])
    assert verdict.outcome == outcome
    assert any(said in finding.what for finding in verdict.findings)


def test_a_rank_pattern_counts_for_the_option(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a", plain(Q) | plain(V, rank=40), rank_pattern={"v_proj": 40}, alpha_pattern={"v_proj": 80}
    )
    (verdict,) = check(folder, ["vllm"])
    assert (verdict.outcome, "--max-lora-rank 64" in verdict.findings[0].what) == ("option", True)


@pytest.mark.parametrize(
    ("field", "value", "silent"),
    [
        ("init_lora_weights", "pissa", {"vllm", "sglang", "llamacpp"}),
        ("alora_invocation_tokens", [1, 2], {"vllm", "sglang"}),
        ("use_qalora", True, {"vllm", "sglang", "llamacpp"}),
        ("brand_new_field", 3, {"vllm", "sglang", "llamacpp"}),
        ("layer_replication", [[0, 2], [1, 3]], {"vllm", "sglang"}),
    ],
)
def test_fields_that_a_program_does_not_read(field: str, value: object, silent: set[str], tmp_path: Path) -> None:
    verdicts = check(write(tmp_path / "a", plain(), **{field: value}))
    assert {verdict.reader for verdict in verdicts if verdict.outcome == "silent"} == silent


def test_the_base_decides_about_copies_and_fused_experts(tmp_path: Path) -> None:
    state = base_state()
    copy = f"{PREFIX}model.embed_tokens.base_layer.weight"
    folder = write(tmp_path / "a", plain() | {copy: state["model.embed_tokens.weight"]})
    fused = MADE["fused experts"](tmp_path / "fused")
    with Checkpoint.open(save_checkpoint(tmp_path / "base", state)) as base:
        assert [v.outcome for v in check(folder, ["vllm"])] == ["silent"]
        assert [v.outcome for v in check(folder, ["vllm"], base)] == ["loads"]
        save_file({**plain(), copy: state["model.embed_tokens.weight"] + 1}, folder / "adapter_model.safetensors")
        assert [v.outcome for v in check(folder, ["vllm"], base)] == ["silent"]
        assert [v.outcome for v in check(fused, ["vllm"], base)] == ["silent"]
    experts = {"model.layers.0.mlp.experts.gate_up_proj": draw(2, 24, 24)}
    with Checkpoint.open(save_checkpoint(tmp_path / "moe", {**state, **experts})) as base:
        assert "fused experts unlike the base" not in {
            f.trait for v in check(fused, ["vllm"], base) for f in v.findings
        }


@pytest.mark.parametrize(("kind", "outcome"), [("qwen2_moe", "silent"), ("qwen3_moe", "loads")])
def test_peft_does_not_join_the_experts_of_every_model(kind: str, outcome: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 1, "vocab_size": 8}
    config = AutoConfig.for_model(kind, num_experts=2, num_experts_per_tok=1, decoder_sparse_step=1, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    path = f"{PREFIX}model.layers.0.mlp.experts.{{}}.down_proj"
    halves = (("A", (4, 4)), ("B", (8, 4)))
    state = {f"{path.format(n)}.lora_{half}.weight": draw(*shape) for n in (0, 1) for half, shape in halves}
    folder = write(tmp_path / "a", state, target_modules=["down_proj"])
    with Checkpoint.open(tmp_path / "base") as base:
        (verdict,) = check(folder, ["peft"], base)
    silent = outcome == "silent"
    assert verdict.outcome == outcome
    assert [f.trait for f in verdict.findings] == ["experts not joined"] * silent
    one = {"model": f"{tmp_path / 'base'}+{folder}", "parameters": {"weight": 0.5}}
    asked = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": [one]}
    with open_plan({**asked, "output": {"kind": "adapter"}}) as plan:
        assert [w.code for w in plan.warnings if w.code == "EXPERTS"] == ["EXPERTS"] * silent


def test_the_models_whose_experts_peft_joins_are_those_of_the_installed_peft() -> None:
    if (version("peft"), version("transformers")) != ("0.21.2", "5.23.0"):
        pytest.skip("the list is of other versions")
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    patterns, joined = conversion._MODEL_TO_CONVERSION_PATTERN, conversion._MOE_TARGET_MODULE_MAPPING
    assert {kind for kind, pattern in patterns.items() if pattern in joined and kind == kind.lower()} == JOINED_BY_PEFT


def test_another_base_is_refused_with_its_reason(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", base_state(16))
    done = run(MADE["plain"](tmp_path / "a"), "--base", base, "--for", "vllm")
    assert done.exit_code == 3
    assert "cannot load it on this base" in done.stdout
    assert "2 of its tensors do not fit" in done.stdout


def test_names_and_files_that_are_odd(tmp_path: Path) -> None:
    evil = f"{PREFIX}model.\x1b[2Jlayers.0.q_proj.lora_C.weight"
    out = run(write(tmp_path / "a", plain() | {evil: draw(2)})).stdout
    assert "\x1b" not in out
    assert "[2Jlayers" in out
    for name, error in {"gone": "HUB", "empty": "ADAPTER_CONFIG", "file.txt": "ADAPTER_CONFIG"}.items():
        place = tmp_path / name
        if name == "empty":
            place.mkdir()
        elif name != "gone":
            place.write_text("text")
        done = run(place)
        assert done.exit_code == 1
        assert f"error[{error}" in done.output.replace("NOT_FOUND", "HUB")
    for config in ("{", "[]", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "r": -1, "lora_alpha": 1}'):
        folder = write(tmp_path / "bad", plain())
        (folder / "adapter_config.json").write_text(config)
        assert "error[ADAPTER_CONFIG]" in run(folder).output


def test_other_types_and_dialects(tmp_path: Path) -> None:
    vera = write(tmp_path / "vera", {f"{PREFIX}{Q}.vera_lambda_b": draw(4)}, peft_type="VERA")
    assert [v.outcome for v in check(vera, ["vllm", "sglang", "llamacpp", "mlx"])] == ["refuses"] * 4
    assert [v.outcome for v in check(vera, ["peft"])] == ["loads"]
    prompt = write(tmp_path / "prompt", {"prompt_embeddings": draw(4)}, peft_type="PROMPT_TUNING")
    assert [v.outcome for v in check(prompt, ["vllm", "peft"])] == ["refuses", "loads"]
    kohya = tmp_path / "one.safetensors"
    save_file({"lora_te_q_proj.lora_up.weight": draw(4, 2), "lora_te_q_proj.lora_down.weight": draw(2, 4)}, kohya)
    assert {v.outcome for v in check(kohya)} == {"refuses"}
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    numbers = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    (mlx / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": numbers})
    )
    save_file({f"{Q}.lora_a": draw(24, 4), f"{Q}.lora_b": draw(4, 24)}, mlx / "adapters.safetensors")
    assert {v.reader: v.outcome for v in check(mlx)} == dict.fromkeys(READERS, "refuses") | {"mlx": "loads"}
    save_file({f"{Q}.lora_a": draw(24, 3), f"{Q}.lora_b": draw(3, 24)}, mlx / "adapters.safetensors")
    assert [v.outcome for v in check(mlx, ["mlx"])] == ["refuses"]


LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("tensors", "config", "outcomes"),
    [
        (plain("model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.vision_tower.encoder.layers.0.self_attn.v_proj"), {}, "option silent refuses"),
        (plain(f"{LAYER}.mlp.experts.0.up_proj", f"{LAYER}.mlp.experts.0.gate_proj", f"{LAYER}.mlp.experts.1.up_proj"), {}, "loads loads refuses"),
        ({n: t[..., None, None] for n, t in plain().items()}, {}, "refuses refuses refuses"),
        (plain() | {f"{PREFIX}{Q}.lora_B.bias": draw(24)}, {"lora_bias": True}, "refuses silent refuses"),
        (plain() | {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": draw(1, 24)}, {"trainable_token_indices": {"embed_tokens": [1]}}, "refuses silent refuses"),
        (plain() | {f"{PREFIX}{Q}.lora_velora_x": draw(2)}, {}, "refuses refuses refuses"),
        ({f"{PREFIX}{Q}.lora_Z.weight": draw(2)}, {}, "silent silent silent"),
        ({n: t[None] for n, t in plain().items()}, {}, "refuses refuses refuses"),
        ({n: t[0, 0] for n, t in plain().items()}, {}, "refuses refuses refuses"),
        (plain(), {"rank_pattern": {"q_proj": 9}}, "silent silent silent"),
        (plain(), {"target_modules": "all-linear"}, "loads option loads"),
        (plain(f"{LAYER}.mlp.experts"), {"target_parameters": ["experts.down_proj"]}, "silent silent refuses"),
    ],
)  # fmt: skip
def test_further_traits(tensors: State, config: dict[str, object], outcomes: str, tmp_path: Path) -> None:
    verdicts = {v.reader: v.outcome for v in check(write(tmp_path / "a", tensors, **config))}
    assert " ".join(verdicts[reader] for reader in ("vllm", "sglang", "llamacpp")) == outcomes


def test_a_base_with_tied_embeddings_or_a_small_vocabulary(tmp_path: Path) -> None:
    state = {**base_state(), "model.embed_tokens.weight": draw(32, 24)}
    head = write(tmp_path / "head", plain("lm_head"), target_modules=["lm_head"])
    factors = {"lora_embedding_A": draw(2, 32), "lora_embedding_B": draw(24, 2)}
    named = {f"base_model.model.model.embed_tokens.{part}": one for part, one in factors.items()}
    rows = write(tmp_path / "rows", named, target_modules=["embed_tokens"])
    tokens = MADE["plain"](tmp_path / "tokens")
    (tokens / "added_tokens.json").write_text('{"<a>": 31, "<b>": 32}')
    for tied, vocabulary, outcomes in ((True, 33, "refuses loads"), (False, 32, "loads refuses")):
        fields = {"tie_word_embeddings": tied, "vocab_size": vocabulary}
        extra = {} if tied else {"lm_head.weight": draw(24, 24)}
        with Checkpoint.open(save_checkpoint(tmp_path / f"base {tied}", state | extra, config=fields)) as base:
            found = [*check(head, ["llamacpp"], base), *check(tokens, ["sglang"], base)]
            traits = {one.trait for one in check(rows, ["llamacpp"], base)[0].findings}
            assert ("tied embeddings" in traits) is tied
        assert " ".join(verdict.outcome for verdict in found) == outcomes, found
    assert [v.outcome for v in check(tokens, ["sglang"])] == ["refuses"]
    assert [f.names for v in check(tokens, ["sglang"]) for f in v.findings if f.trait == "added tokens"] == [
        ("<a>", "<b>")
    ]
