"""What lies beside the weights: folders that are copied, modules that are merged, trained weights that stop a merge."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, near, save_adapter, save_checkpoint
from safetensors.torch import load_file, save_file
from toys.merge import manifest_of, on, recipe, tensors_of
from toys.mergekit import CONFIG, llama_state
from transformers import BertConfig, BertModel

import paft_merge
from paft_merge.engine.api import open_plan
from paft_merge.errors import PaftMergeError, Problem
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.side_file_kinds import MOST_BYTES, kind_of
from paft_merge.output import placing


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "base", llama_state(0, torch.float32), 1, CONFIG)
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path) -> Path:
    return save_adapter(base.with_name("adapter"), tensors_of(base), 1)


def write(folder: Path, *names: str, content: bytes = b"{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def merged(out: Path, base: Path, *sources: str | Path, **options: Any) -> list[Problem]:
    told: list[Problem] = []
    data = recipe("task_arithmetic", base, *[(one, {"weight": 0.5}) for one in sources])
    paft_merge.merge(data, out, warn=told.extend, **options)
    return [problem for problem in told if problem.code in ("SIDE_FILES", "UNREAD_WEIGHTS", "REMOTE_CODE")]


# --- copied, or left out ----------------------------------------------------------------------------------------------


def test_files_that_are_copied_need_room_on_the_disk(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(base, "assets/voice.wav", content=bytes(100_000))
    with open_plan(recipe("linear", None, (base, {"weight": 0.5}))) as plan:
        weights = plan.bytes_written
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, weights + 50_000))
    with pytest.raises(PaftMergeError, match="bytes are needed") as caught:
        merged(tmp_path / "out", base, on(base, adapter))
    assert [problem.code for problem in caught.value.problems] == ["DISK"]


def test_folders_and_unknown_files_of_the_base_are_copied_as_they_are(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    copied = (
        "preprocessor_config.json", "tekken.json", "vocab.bpe", "tokenizer.model.v3", "special_tokens.dict", "qwen.tiktoken",
        "USE_POLICY.md", "LICENSE", "spk_dict.pt", "speaker_embeddings/v2/en_0.npy", "assets/voice.wav",
        "speech_tokenizer/config.json", "speech_tokenizer/model.safetensors", "language_model/5gram.bin",
        "additional_chat_templates/tool_use.jinja", "chat_templates/a.jinja", "vocab/en/words.txt",
    )  # fmt: skip
    ours = ("README.md", ".cache/x", ".gitattributes", "model.safetensors.index.json.bak")
    left = (
        "train.jsonl",
        "figures/loss.png",
        "modeling_x.py",
        "optimizer.pt",
        "checkpoint-5/trainer_state.json",
        "x.pkl",
    )
    write(base, *copied, *ours[:3], *left, content=b"x\0\xff")
    told = merged(tmp_path / "out", base, on(base, adapter))
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == b"x\0\xff", name
    assert not any((tmp_path / "out" / name).exists() for name in (*left, ".cache", ".gitattributes"))
    assert set(manifest_of(tmp_path / "out")["left_out"]) == {*left} - {"modeling_x.py"}
    assert {*copied} <= manifest_of(tmp_path / "out")["files"].keys()
    assert [p.what for p in told] == ["the merge does not copy 'train.jsonl'"]


def test_other_forms_of_the_weights_are_named_in_one_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    write(base, "onnx/model.onnx", "onnx/config.json", "original/params.json", "original/consolidated.00.pth", "m.gguf")
    write(base, "openvino/openvino_model.xml", "pytorch_model.bin", "consolidated.safetensors", "tf_model.h5")
    (told,) = merged(tmp_path / "out", base, on(base, adapter))
    assert "neither merges nor copies" in told.what
    for name in ("'m.gguf'", "'pytorch_model.bin'", "'consolidated.safetensors'", "'tf_model.h5'", "and 2 more"):
        assert name in told.what
    assert not (tmp_path / "out/onnx").exists()


def test_links_out_of_the_folder_fifos_and_large_files_are_not_copied(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    write(tmp_path, "secret.txt", "outside/a.json")
    write(base, "real.txt")
    (base / "secret.txt").symlink_to(tmp_path / "secret.txt")
    (base / "folder").symlink_to(tmp_path / "outside")
    (base / "zero.txt").symlink_to("/dev/zero")
    (base / "loop.txt").symlink_to("loop.txt")
    (base / "inner.txt").symlink_to("real.txt")
    os.mkfifo(base / "pipe.txt")
    with (base / "huge.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    (told,) = merged(tmp_path / "out", base, on(base, adapter))
    lost = {"folder", "huge.json", "loop.txt", "pipe.txt", "secret.txt", "zero.txt"}
    assert {*manifest_of(tmp_path / "out")["left_out"]} == lost
    assert "'huge.json'" in told.what
    assert (tmp_path / "out/inner.txt").read_text() == (tmp_path / "out/real.txt").read_text() == "{}"


def test_links_into_the_cache_of_the_hub_are_copied(base: Path, adapter: Path, tmp_path: Path) -> None:
    blob = tmp_path / "hub/models--me--x/blobs/0123"
    write(blob.parent, blob.name)
    (base / "processor_config.json").symlink_to(blob)
    assert merged(tmp_path / "out", base, on(base, adapter)) == []
    assert (tmp_path / "out/processor_config.json").read_text() == "{}"


def test_python_files_are_copied_on_request_only(base: Path, adapter: Path, tmp_path: Path) -> None:
    write(base, "modeling_x.py", "sub/more.py")
    merged(tmp_path / "no", base, on(base, adapter))
    (told,) = merged(tmp_path / "yes", base, on(base, adapter), trust_remote_code=True)
    assert (told.code, "modeling_x.py" in told.what) == ("REMOTE_CODE", True)
    assert [(tmp_path / o / "modeling_x.py").exists() for o in ("no", "yes")] == [False, True]


# --- trained weights that are not read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_trainables.bin", "non_lora_state_dict.bin", "mm_projector.bin", "value_head.safetensors",
        "pytorch_model.bin", "vision_tower/model.safetensors", "projector.pt", "embeddings.npz.pth",
    ],
)  # fmt: skip
def test_weights_beside_an_adapter_stop_the_merge(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    write(adapter, name)
    data = recipe("task_arithmetic", base, (on(base, adapter), {"weight": 1.0}))
    with pytest.raises(PaftMergeError) as caught, open_plan(data):
        pass
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("UNREAD_WEIGHTS", on(base, adapter))
    assert repr(name) in problem.what
    (told,) = merged(tmp_path / "out", base, on(base, adapter), allow_crimes=True)
    assert (told.code, repr(name) in told.what) == ("UNREAD_WEIGHTS", True)


def test_states_of_a_training_and_further_models_do_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    write(adapter, "optimizer.pt", "rng_state_0.pth", "training_args.bin", "scheduler.pt", "global_step3/x_states.pt")
    write(adapter, "checkpoint-3/adapter_model.safetensors", "reference/adapter_model.safetensors", "a.gguf")
    write(
        adapter, "reference/adapter_config.json", "merged/config.json", "merged/model.safetensors", "adapter_model.bin"
    )
    write(adapter, "0000100_adapters.safetensors", "pytorch_model_fsdp_0/__0_0.distcp", "runs/events.out.tfevents.1")
    assert merged(tmp_path / "out", base, on(base, adapter)) == []


def test_weights_that_the_base_has_too_are_copied_unless_a_source_has_others(base: Path, tmp_path: Path) -> None:
    write(base, "audio/model.safetensors", "audio/config.json", "spk_dict.pt", content=b"one")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert merged(tmp_path / "same", base, other) == []
    assert (tmp_path / "same/audio/model.safetensors").read_bytes() == b"one"
    write(other, "audio/model.safetensors", content=b"two")
    with pytest.raises(PaftMergeError, match=r"other: has trained weights .* 'audio/model.safetensors'"):
        merged(tmp_path / "differs", base, other)


def test_an_adapter_beside_a_full_model_stops_the_merge_unless_it_is_merged(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_checkpoint(other, near(tensors_of(base), 3), 1, CONFIG)
    save_adapter(other, tensors_of(base), 2)
    with pytest.raises(PaftMergeError, match=r"adapter_model\.safetensors.*write .*other\+.*other"):
        merged(tmp_path / "out", base, other)
    assert merged(tmp_path / "both", base, on(other, other)) == []


# --- sentence-transformers --------------------------------------------------------------------------------------------


def embedder(folder: Path, seed: int, file: str = "2_Dense/model.safetensors", mode: str = "cls") -> State:
    """A BERT with a pooling and a dense layer, as sentence-transformers saves it."""
    torch.manual_seed(seed)
    BertModel(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    ).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write(folder, "modules.json", content=json.dumps(modules).encode())
    write(folder, "1_Pooling/config.json", content=json.dumps({"pooling_mode": mode}).encode())
    write(folder, "2_Dense/config.json", content=json.dumps({"in_features": 16, "out_features": 4}).encode())
    dense = {"linear.weight": torch.randn(4, 16), "linear.bias": torch.randn(4)}
    save_file(dense, folder / file) if file.endswith("safetensors") else torch.save(dense, folder / file)
    return dense


@pytest.mark.parametrize("keys", [{}, {"out_shard_bytes": 4000}])
def test_a_dense_module_is_merged_like_any_other_weights(tmp_path: Path, keys: dict[str, Any]) -> None:
    a, b = (embedder(tmp_path / name, seed) for seed, name in enumerate("ab"))
    for name, folder in (("same", "a"), ("other", "b")):  # of the modules, the safetensors are read
        write(tmp_path / folder, "2_Dense/pytorch_model.bin", content=name.encode())
    (told,) = merged(tmp_path / "out", tmp_path / "a", tmp_path / "b", **keys)
    assert "neither merges nor copies '2_Dense/', other forms" in told.what
    dense = load_file(tmp_path / "out/2_Dense/model.safetensors")
    assert dense.keys() == a.keys()
    for name in dense:
        torch.testing.assert_close(dense[name], a[name] + 0.5 * (b[name] - a[name]), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out/1_Pooling/config.json").read_text()) == {"pooling_mode": "cls"}
    BertModel.from_pretrained(tmp_path / "out")
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.exists() == bool(keys)
    assert not keys or not any("Dense" in name for name in json.loads(index.read_text())["weight_map"])
    with Checkpoint.open(tmp_path / "out") as opened:  # the output is a source again
        assert opened.tensors["2_Dense/linear.weight"].shape == (4, 16)


def test_a_module_that_only_one_model_has_is_named(tmp_path: Path) -> None:
    embedder(tmp_path / "a", 0)
    embedder(tmp_path / "b", 1)
    shutil.rmtree(tmp_path / "b/2_Dense")
    with pytest.raises(PaftMergeError, match="lacks '2_Dense/linear"):
        merged(tmp_path / "out", tmp_path / "a", tmp_path / "b")


def test_a_pickled_module_is_read_on_request_and_written_as_safetensors(tmp_path: Path) -> None:
    a, b = (embedder(tmp_path / name, seed, "2_Dense/pytorch_model.bin") for seed, name in enumerate("ab"))
    with pytest.raises(PaftMergeError, match=r"2_Dense/pytorch_model\.bin: is a pickle"):
        merged(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    merged(tmp_path / "out", tmp_path / "a", tmp_path / "b", lazy_unpickle=True)
    dense = load_file(tmp_path / "out/2_Dense/model.safetensors")
    torch.testing.assert_close(dense["linear.bias"], (a["linear.bias"] + b["linear.bias"]) / 2, rtol=0, atol=1e-6)
    assert not (tmp_path / "out/2_Dense/pytorch_model.bin").exists()


def test_another_pooling_is_reported(tmp_path: Path) -> None:
    for seed, (name, mode) in enumerate((("a", "cls"), ("b", "mean"))):
        embedder(tmp_path / name, seed, mode=mode)
    (told,) = merged(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert "'1_Pooling/config.json'" in told.what


@pytest.mark.parametrize("text", ["{}", '[{"path": 3}]', "[1]", "[", '[{"path": "../x"}]', "3"])
def test_a_broken_list_of_modules_is_no_traceback(tmp_path: Path, text: str) -> None:
    embedder(tmp_path / "a", 0)
    (tmp_path / "a/modules.json").write_text(text)
    try:
        with Checkpoint.open(tmp_path / "a") as opened:
            assert not any("/" in name for name in opened.tensors)
    except PaftMergeError as error:
        assert error.problems[0].code == "CONFIG_INVALID"  # noqa: PT017


def test_kinds_of_files() -> None:
    wanted = {
        "tokenizer.model": "side", "model.fp16.safetensors": "same weights", "2_Dense/model.safetensors": "weights",
        "adapter_model.safetensors": "adapter", ".git/config": "hidden", "config.json": "written", "sub/config.json": "side",
        "requirements.txt": "training", "a.PNG": "picture", "run.sh": "code",
    }  # fmt: skip
    assert {name: kind_of(name) for name in wanted} == wanted
