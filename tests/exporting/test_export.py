"""`paft export` with stand-ins for the converters: what they are given, what is checked, and what is left when they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import save_adapter, save_checkpoint
from toys import converters as stand_ins
from toys.converters import HAS_GGUF, checkout
from toys.merge import HERE, paft

from paft_merge import exporting
from paft_merge.errors import OutputError
from paft_merge.exporting.converters import FOLDER

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="the package gguf is not installed")


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def model(folder: Path, template: str = CHATML, **config: Any) -> Path:
    import torch

    held = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, **config}
    state = {"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8), "model.norm.weight": torch.ones(8)}
    made = save_checkpoint(folder / "merged", state, config=held)
    vocab = {"<s>": 0, "</s>": 1, "<|im_end|>": 2}
    (made / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    (made / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (made / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 1], "temperature": 0.7, "do_sample": True})
    )
    if template:
        (made / "chat_template.jinja").write_text(template)
    return made


def asked(folder: Path) -> dict[str, str]:
    return json.loads((folder / "asked").read_text())  # type: ignore[no-any-return]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("asked", "llama", "merged", "adapter"))


def test_gguf_by_the_option_and_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkout(tmp_path / "llama")
    run = paft("export", model(tmp_path), "--to", "gguf", "--llama-cpp", place)
    assert run.exit_code == 0, run.output
    assert str(tmp_path / "merged-gguf" / "merged.gguf") in run.output
    assert asked(tmp_path)["outtype"] == "auto"
    monkeypatch.setenv(FOLDER, str(place))
    done = exporting.export(tmp_path / "merged", tmp_path / "out", to="gguf", quantize="q4_k_m")
    assert done.files == ("merged-Q4_K_M.gguf",)
    assert (tmp_path / "quantized").read_text().strip() == "Q4_K_M"
    exporting.export(tmp_path / "merged", tmp_path / "eight", to="gguf", quantize="Q8_0")
    assert asked(tmp_path)["outtype"] == "q8_0"


def test_a_missing_converter_is_refused_with_the_way_to_get_it(tmp_path: Path) -> None:
    run = paft("export", model(tmp_path), "--to", "gguf")
    assert run.exit_code == 1
    assert "error[EXPORT_TOOL]: convert_hf_to_gguf.py: of llama.cpp is not on the path; git clone" in run.output
    with pytest.raises(OutputError, match=r"is not in .*empty.*git clone"):
        exporting.export(tmp_path / "merged", to="gguf", llama_cpp=tmp_path / "empty")
    with pytest.raises(OutputError, match="pip install mlx-lm"):
        exporting.export(tmp_path / "merged", to="mlx")
    place = checkout(tmp_path / "llama")
    (place / "build" / "bin" / "llama-quantize").unlink()
    with pytest.raises(OutputError, match="cmake"):
        exporting.export(tmp_path / "merged", to="gguf", quantize="q4_k_m", llama_cpp=place)
    for mode, words in ((0o644, "may be run.*chmod"), (0o755, "cannot be started")):
        program = place / "build" / "bin" / "llama-quantize"
        program.write_bytes(b"\x7fELF of another machine")
        program.chmod(mode)
        with pytest.raises(OutputError, match=words):
            exporting.export(tmp_path / "merged", to="gguf", quantize="q4_k_m", llama_cpp=place)
    assert left(tmp_path) == []


FAILURES = {
    "fails": (stand_ins.FAILING, "ended with 3: Model LlamaForBirds is not supported"),
    "writes nothing": (stand_ins.NOTHING, "was not written"),
    "writes another format": (stand_ins.TEXT, "is not a GGUF file"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_converter_that_fails_leaves_nothing(tmp_path: Path, case: str) -> None:
    text, words = FAILURES[case]
    with pytest.raises(OutputError, match=words):
        exporting.export(model(tmp_path), to="gguf", llama_cpp=checkout(tmp_path / "llama", text))
    assert left(tmp_path) == []


@needs_gguf
def test_a_file_that_lacks_a_tensor_or_is_cut_is_refused(tmp_path: Path) -> None:
    lost, short = (checkout(tmp_path / "llama" / name, text) for name, text in (
        ("lost", stand_ins.LOSING), ("short", f"{stand_ins.CONVERT}\nwith open(given.outfile, 'r+b') as f: f.truncate(200)"),
    ))  # fmt: skip
    with pytest.raises(OutputError, match=r"entries in its tensors, and the model has 72"):
        exporting.export(model(tmp_path), to="gguf", llama_cpp=lost)
    with pytest.raises(OutputError, match="cannot be read"):
        exporting.export(tmp_path / "merged", to="gguf", llama_cpp=short)
    assert left(tmp_path) == []


@needs_gguf
def test_a_lost_layer_and_a_lost_template_are_found(tmp_path: Path) -> None:
    place = checkout(tmp_path / "llama", stand_ins.CONVERT.replace('config.get("num_hidden_layers", 1)', "1"))
    with pytest.raises(OutputError, match="has 1 layers, and the model has 2"):
        exporting.export(model(tmp_path, num_hidden_layers=2), to="gguf", llama_cpp=place)
    plain = checkout(tmp_path / "llama" / "plain", stand_ins.CONVERT.replace("chat_template.jinja", "no.jinja"))
    done = exporting.export(model(tmp_path / "new"), to="gguf", llama_cpp=plain)
    assert any("has no chat template" in problem.what for problem in done.warnings)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ModuleNotFoundError: No module named 'gguf'", "pip install gguf"),
        (
            "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()",
            "tokenizer_source: base",
        ),
        ("convert: error: unrecognized arguments: --outtype", "of a version with other options"),
        ("OSError: [Errno 28] No space left on device", "free some space"),
        (
            "\\033[31mERROR\\033[0m: no idea \\033]0;title\\007",
            r"ended with 1: ERROR: no idea \\x1b\]0;title\\x07; see all",
        ),
    ],
)
def test_the_last_line_of_a_converter_and_what_to_do(said: str, words: str) -> None:
    from paft_merge.exporting.converters import run

    with pytest.raises(OutputError, match=words):
        run(["sh", "-c", f"printf '%b\\n' \"{said}\"; exit 1"], "converter")


def test_an_interrupt_kills_the_converter_and_leaves_nothing(tmp_path: Path) -> None:
    place = checkout(tmp_path / "llama", stand_ins.SLOW)
    command = [
        sys.executable,
        "-m",
        "paft_merge",
        "export",
        str(model(tmp_path)),
        "--to",
        "gguf",
        "--llama-cpp",
        str(place),
    ]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": HERE})
    until = time.monotonic() + 60
    while not (tmp_path / "asked").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 130
    assert left(tmp_path) == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(place) not in running


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    place = checkout(tmp_path / "llama")
    exporting.export(model(tmp_path), to="gguf", llama_cpp=place)
    with pytest.raises(OutputError, match="exists and is not empty"):
        exporting.export(tmp_path / "merged", to="gguf", llama_cpp=place)
    exporting.export(tmp_path / "merged", to="gguf", llama_cpp=place, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"no weights of a model; choose another folder$"):
        exporting.export(tmp_path / "merged", tmp_path / "mine", to="gguf", llama_cpp=place, overwrite=True)
    assert left(tmp_path) == ["merged-gguf", "mine"]


def test_code_of_a_model_needs_trust(tmp_path: Path) -> None:
    place = checkout(tmp_path / "llama")
    made = model(tmp_path, auto_map={"AutoConfig": "someone/code--config.Config"})
    run = paft("export", made, "--to", "gguf", "--llama-cpp", place)
    assert run.exit_code == 1
    assert "error[TRUST]" in run.output
    assert "--trust-code" in run.output
    assert paft("export", made, "--to", "gguf", "--llama-cpp", place, "--trust-code").exit_code == 0


def test_models_that_no_converter_reads_are_refused_before(tmp_path: Path) -> None:
    place = checkout(tmp_path / "llama", stand_ins.FAILING)
    for made, words in (
        (model(tmp_path / "1", architectures=[]), "has no architectures"),
        (model(tmp_path / "2", quantization_config={"quant_method": "awq"}), r"quantised \(awq\).*paft dequantize"),
    ):
        with pytest.raises(OutputError, match=words):
            exporting.export(made, to="gguf", llama_cpp=place)
    bare = model(tmp_path / "3")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(OutputError, match="has no tokenizer"):
        exporting.export(bare, to="gguf", llama_cpp=place)


def test_a_token_without_a_row_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"token <\|im_end\|> with the id 2, and vocab_size is 2"):
        exporting.export(model(tmp_path, vocab_size=2), to="gguf", llama_cpp=checkout(tmp_path / "llama"))


@needs_gguf
@pytest.mark.parametrize("change", ["tensors.pop('lm_head.weight')", "pass"])
def test_a_stored_copy_of_a_tied_head_is_kept_or_left_out(tmp_path: Path, change: str) -> None:
    import torch

    text = stand_ins.CONVERT.replace("write(given.outfile", f"{change}\nwrite(given.outfile")
    made = model(tmp_path, tie_word_embeddings=True)
    rows = {name: torch.ones(4, 8) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_checkpoint(made, rows, config=json.loads((made / "config.json").read_text()))
    exporting.export(made, to="gguf", llama_cpp=checkout(tmp_path / "llama", text))


def test_odd_names_of_a_folder_are_not_those_of_the_file(tmp_path: Path) -> None:
    made = model(tmp_path).rename(tmp_path / "--o'd \"d{x}")
    done = exporting.export(made, tmp_path / "out", to="ollama", llama_cpp=checkout(tmp_path / "llama"))
    assert done.files == ("Modelfile", "o_d__d_x_.gguf")
    assert (done.out / "Modelfile").read_text().startswith("FROM ./o_d__d_x_.gguf\n")


# --- Ollama -----------------------------------------------------------------------------------------------------------


def modelfile(folder: Path, template: str) -> tuple[str, tuple[Any, ...]]:
    done = exporting.export(model(folder, template), to="ollama", llama_cpp=checkout(folder / "llama"))
    return (done.out / "Modelfile").read_text(), done.warnings


def test_a_modelfile_has_the_template_where_it_is_certain(tmp_path: Path) -> None:
    text, warnings = modelfile(tmp_path, CHATML)
    go = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    assert text.startswith(f'FROM ./merged.gguf\nTEMPLATE """{go}"""\n')
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\nPARAMETER temperature 0.7\n' in text
    assert not any(problem.code == "CHAT_TEMPLATE" for problem in warnings)


def test_a_system_message_of_the_template_is_kept(tmp_path: Path) -> None:
    default = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
    )
    assert 'SYSTEM """You are Qwen."""' in modelfile(tmp_path, "{{ bos_token }}" + default)[0]


@pytest.mark.parametrize(
    "template", [OTHER, "{{ raise_exception('no') }}", CHATML.replace("['content']", "['content'] | trim ~ ' '")]
)
def test_another_template_is_left_to_ollama_with_a_warning(tmp_path: Path, template: str) -> None:
    text, warnings = modelfile(tmp_path, template)
    assert "TEMPLATE" not in text
    assert any(problem.code == "CHAT_TEMPLATE" for problem in warnings)


# --- adapters and MLX -------------------------------------------------------------------------------------------------


def test_a_lora_is_checked_by_the_rules_and_written(tmp_path: Path) -> None:
    import torch

    base, place = model(tmp_path), checkout(tmp_path / "llama")
    adapter = save_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}, 0)
    run = paft("export", adapter, "--to", "gguf-lora", "--base", base, "--llama-cpp", place)
    assert run.exit_code == 0, run.output
    assert asked(tmp_path)["base"] == str(base)
    assert asked(tmp_path)["outtype"] == "f32"
    with pytest.raises(OutputError, match="names no base"):
        exporting.export(adapter, tmp_path / "two", to="gguf-lora", llama_cpp=place)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    with pytest.raises(OutputError, match=r"llama.cpp reads lora_alpha alone"):
        exporting.export(adapter, tmp_path / "two", to="gguf-lora", base=str(base), llama_cpp=place)


def test_a_lora_is_compared_with_its_base(tmp_path: Path) -> None:
    import torch

    base, place = model(tmp_path), checkout(tmp_path / "llama")
    adapter = save_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.v_proj.weight": torch.ones(8, 8)}, 0)
    with pytest.raises(OutputError, match=r"llama\.cpp cannot load it on this base.*v_proj"):
        exporting.export(adapter, to="gguf-lora", base=str(base), llama_cpp=place)


def test_adapters_and_models_are_not_mixed_up(tmp_path: Path) -> None:
    import torch

    adapter = save_adapter(tmp_path / "adapter", {"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8)}, 0)
    for to, words in (("gguf", "--to gguf-lora"), ("ollama", "--to gguf-lora"), ("mlx", "paft convert")):
        with pytest.raises(OutputError, match=words):
            exporting.export(adapter, to=to)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="is not an adapter"):
        exporting.export(model(tmp_path), to="gguf-lora")
    with pytest.raises(OutputError, match="is not a type of MLX"):
        exporting.export(tmp_path / "merged", to="mlx", quantize="q4_k_m")


def test_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama" / "mlx_lm.convert"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{stand_ins.MLX}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    done = exporting.export(model(tmp_path, rope_parameters=rope), to="mlx", quantize="q4")
    assert {"config.json", "model.safetensors"} <= {*done.files}
    config = json.loads((done.out / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]["factor"], config["rope_parameters"]) == (5e5, 8.0, rope)
    assert left(tmp_path) == ["merged-mlx"]


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, {}),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4}),
        ({"model_type": "unheard_of", "rope_parameters": None}, {}),
    ],
)  # fmt: skip
def test_a_config_has_the_older_names_too(config: dict[str, Any], added: dict[str, Any]) -> None:
    from paft_merge.exporting.older_configs import with_older_names

    assert with_older_names(config) == {**config, **added}
    assert with_older_names({"text_config": config})["text_config"] == {**config, **added}


TOKENIZE = """#!/bin/sh
echo '{said}'; exit {code}
"""


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("[1, 2, 3]", 0, "makes other tokens of a test text than tokenizer.json"),
        ("no ids", 0, "it printed no ids"),
        ("unknown argument: --ids", 1, "could not compare tokens"),
        ("error: could not load model from file", 1, "llama.cpp cannot load it"),
        (None, 0, ""),
    ],
)
def test_the_tokens_of_llama_cpp_are_compared(tmp_path: Path, said: str | None, code: int, words: str) -> None:
    from tokenizers import Tokenizer, models

    from paft_merge.exporting.gguf_tokens import _TEXT

    place, made = checkout(tmp_path / "llama"), model(tmp_path)
    ours = Tokenizer(models.BPE({one: i for i, one in enumerate(sorted({*_TEXT}))}, []))
    ours.save(str(made / "tokenizer.json"))
    program = place / "build" / "bin" / "llama-tokenize"
    ids = ours.encode(_TEXT, add_special_tokens=False).ids
    program.write_text(TOKENIZE.format(said=said or ids, code=code))
    program.chmod(0o755)
    if "cannot load" in words:
        with pytest.raises(OutputError, match=words):
            exporting.export(made, to="gguf", llama_cpp=place)
        return
    done = exporting.export(made, to="gguf", llama_cpp=place)
    assert done.files == ("merged.gguf",)
    found = [str(one) for one in done.warnings if "token" in one.what or "ids" in one.what]
    assert [words in one for one in found] == [True] * bool(words)
