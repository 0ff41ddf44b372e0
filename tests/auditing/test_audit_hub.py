"""An adapter is audited on the Hub without the weights of its base, which are fetched when they are asked for."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import near, random_state, save_adapter, save_checkpoint
from peft import LoraConfig
from toys.adapters import llama, train
from toys.hub import files_of, hub
from toys.hub_server import HubServer

from paft_merge.auditing import audit
from paft_merge.cli import cli
from paft_merge.errors import AuditError, PaftMergeError

__all__ = ["hub"]

RECIPE = """
merge_method: ties
base_model: me/base
models:
  - {model: me/base+me/sft, parameters: {weight: 1.0, density: 0.5}}
  - {model: me/base+me/dpo, parameters: {weight: 1.0, density: 0.5}}
"""


@pytest.fixture
def made(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """`me/base`, `me/tuned`, and adapters `me/sft`, `me/dpo`; a header's worth is what is asked for first."""
    state = random_state(0, torch.bfloat16, width=128)
    folders = {
        "base": save_checkpoint(tmp_path / "base", state),
        "tuned": save_checkpoint(tmp_path / "tuned", near(state, 1)),
        "sft": save_adapter(tmp_path / "sft", state, 3),
        "dpo": save_adapter(tmp_path / "dpo", state, 4, rank=2),
    }
    for name, folder in folders.items():
        hub.add(f"me/{name}", files_of(folder))
    monkeypatch.setattr("paft_merge.stores.windows._HEAD_BYTES", header_bytes(folders["base"]))
    return folders


def header_bytes(folder: Path) -> int:
    return 8 + int(struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0])


def fetched(hub: HubServer, repository: str) -> int:
    """Bytes of a repository's weights that were asked for."""
    (content,) = (c for name, c in hub.files(repository).items() if name.endswith(".safetensors"))
    total = 0
    for request in hub.requests:
        if request.method == "GET" and f"/cdn/{hashlib.sha256(content).hexdigest()}/" in request.path:
            first, last = request.range.removeprefix("bytes=").split("-") if request.range else ("0", "")
            total += (int(last) + 1 if last else len(content)) - int(first)
    return total


def test_of_a_base_on_the_hub_the_header_is_read_and_not_a_byte_of_its_weights(
    hub: HubServer, made: dict[str, Path]
) -> None:
    found = audit("me/sft", "me/dpo", base="me/base")

    assert 0 < fetched(hub, "me/base") <= header_bytes(made["base"])
    here = audit(made["sft"], made["dpo"], base=made["base"])
    assert [t.name for t in found.sources[0].tensors] == [t.name for t in here.sources[0].tensors]
    for one, other in zip(found.sources, here.sources, strict=True):
        a, b = one.total.measure, other.total.measure
        assert (a.below, a.square, a.largest) == (b.below, b.square, b.largest)
        assert (a.erased, a.relative_norm) == (None, None)
        assert b.erased is not None
    assert found.pairs[0].total == here.pairs[0].total
    assert (found.base, [w.code for w in found.warnings]) == ("me/base", ["HEADERS_ONLY"])
    assert any("fetch_base=True" in a.text for a in found.advice)


def test_headers_of_a_base_on_the_hub_still_say_what_does_not_fit(
    hub: HubServer, made: dict[str, Path], tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "other", random_state(0, torch.bfloat16, width=64), 3)
    with pytest.raises(PaftMergeError, match="64"):
        audit(other, base="me/base")
    assert 0 < fetched(hub, "me/base") <= header_bytes(made["base"])


def test_the_base_is_fetched_when_that_is_asked_for_and_used_when_it_is_here(
    hub: HubServer, made: dict[str, Path]
) -> None:
    measure = audit("me/sft", base="me/base", fetch_base=True).sources[0].total.measure
    assert measure.erased is not None
    assert fetched(hub, "me/base") >= (made["base"] / "model.safetensors").stat().st_size
    assert audit("me/sft", base="me/base").sources[0].total.measure.erased == measure.erased


def test_a_reference_of_base_and_adapter_reads_headers_too(hub: HubServer, made: dict[str, Path]) -> None:
    assert audit("me/base+me/sft").sources[0].total.measure.erased is None
    assert 0 < fetched(hub, "me/base") <= header_bytes(made["base"])


def test_a_recipe_of_adapters_reads_headers_of_its_base(hub: HubServer, made: dict[str, Path]) -> None:
    found = audit(RECIPE)
    assert 0 < fetched(hub, "me/base") <= header_bytes(made["base"])
    assert found.preview is not None
    assert found.preview.of("sft").kept_share == pytest.approx(0.5, abs=1e-3)
    assert [w.code for w in found.warnings if w.code == "HEADERS_ONLY"] == ["HEADERS_ONLY"]
    assert audit(RECIPE, fetch_base=True).sources[0].total.measure.erased is not None


def test_the_base_of_whole_models_is_fetched(hub: HubServer, made: dict[str, Path]) -> None:
    found = audit("me/tuned", "me/sft", base="me/base")
    assert found.sources[0].total.measure.erased is not None
    assert audit(RECIPE.replace("me/base+me/sft", "me/tuned")).sources[0].total.measure.erased is not None


def test_what_needs_the_weights_is_named(hub: HubServer, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    base, adapter = train(llama(), tmp_path, config)
    hub.add("me/llama", files_of(base))
    found = audit(adapter, base="me/llama")
    assert [(s.names, "without the base's weights" in s.why) for s in found.skipped] == [(("lm_head.weight",), True)]
    (tmp_path / "again").mkdir()
    _, dora = train(llama(), tmp_path / "again", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(AuditError, match="fetch_base=True"):
        audit(dora, base="me/llama")


def test_the_command_says_it_and_takes_the_option(hub: HubServer, made: dict[str, Path]) -> None:
    def paft(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["audit", "me/sft", "--base", "me/base", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    shown = paft()
    assert "only its headers were read" in shown
    assert "pass --fetch-base" in shown
    assert "fetch_base" not in shown
    assert "headers" not in paft("--fetch-base")
