"""Mutants of every kind of file: whatever a file holds, a command gives one error of ours or a result, in bounded time."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import near, save_adapter
from toys import vocabulary as words
from toys.merge import recipe as merge_recipe
from toys.mergekit import CONFIG, llama_state

from paft_merge.auditing import audit, verify
from paft_merge.auditing.from_manifest import recorded
from paft_merge.engine.api import merge, open_plan
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import PaftMergeError, TrainError
from paft_merge.output.card import write_card
from paft_merge.output.manifest import read_manifest
from paft_merge.pipeline.schema import load_run
from paft_merge.pipeline.state import State
from paft_merge.training.run_folder import RunFolder

SECONDS = 5
ROUNDS = 14

WEIRD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\x1b]0;t\x07", "\ud800", "a" * 5000, [], [1], {}, {"a": 1},
    [[]], ["../../etc/passwd"], [None], "(([a-z_.0-9])+)+!", "a{99999999999999999999}", "2024-13-45", "\u202egnp.exe",
)  # fmt: skip
BROKEN = (
    b"",
    b"\x00",
    b"[" * 5000,
    b'{"a":' * 3000,
    b"\xff\xfe\x00",
    b"null",
    b"[1]",
    b'"x"',
    b"{",
    b"\xef\xbb\xbf{}",
    b"1e999",
    b"0" * 4400,
)


@contextmanager
def bounded() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def places(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The key paths of plain data."""
    yield way
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield from places(value, (*way, key))


def replaced(data: Any, way: tuple[Any, ...], value: Any, chance: random.Random) -> Any:
    """The data with one value replaced, removed, or renamed."""
    if not way:
        return value
    data = data.copy()
    if len(way) > 1:
        data[way[0]] = replaced(data[way[0]], way[1:], value, chance)
    elif isinstance(data, dict) and chance.random() < 0.3:
        kept = data.pop(way[0])
        if chance.random() < 0.5:
            data[str(value)[:50]] = kept
    else:
        data[way[0]] = value
    return data


def mutants(raw: bytes, kind: str, chance: random.Random) -> Iterator[bytes]:
    """Files like `raw`: other values in JSON or YAML, else other bytes."""
    yield from (BROKEN[chance.randrange(len(BROKEN))] for _ in range(3))
    head, body = raw[:8], raw[8:]
    if kind == "safetensors":
        size = int.from_bytes(head, "little")
        document, tail = json.loads(body[:size]), body[size:]
    elif kind in ("json", "yaml"):
        document = json.loads(raw) if kind == "json" else yaml.safe_load(raw)
    for _ in range(ROUNDS):
        if kind in ("text", "bytes") or chance.random() < 0.2:
            cut = bytearray(raw)
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(len(cut) + 1)
                cut[at : at + chance.choice((0, 1, 7))] = chance.choice(
                    (
                        b"\x1b",
                        b"\x00",
                        b"{{",
                        b"%}",
                        b"---\n",
                        b"\xff",
                        b"[" * 3000,
                        b"9" * 5000,
                        b": &a [*a]\n",
                        b"{% for x in range(9) %}",
                    )
                )
            yield bytes(cut)
            continue
        ways = [way for way in places(document) if way]
        depth = min(chance.choice((1, 1, 2, 2, 3, 9)), max(map(len, ways)))
        way = chance.choice([way for way in ways if len(way) <= depth])
        made = replaced(document, way, chance.choice(WEIRD), chance)
        if kind == "yaml":
            yield yaml.safe_dump(json.loads(json.dumps(made, default=str))).encode("utf-8", "surrogatepass")
        else:
            text = json.dumps(made).encode()
            yield len(text).to_bytes(8, "little") + text + tail if kind == "safetensors" else text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and a fine-tune with tokenizers, an adapter, a merge, and the recipe and state of a run."""
    top = tmp_path_factory.mktemp("fuzz")
    base = llama_state(300)
    for name, state in (("base", base), ("x", near(base, 1))):
        words.save_checkpoint(top / name, state, config={**CONFIG, "vocab_size": 300})
        words.save_tokenizer(top / name, "base", template="{% for m in messages %}{{ m.content }}{% endfor %}")
        (top / name / "README.md").write_text(
            "---\nlicense: apache-2.0\ndatasets: [a/b]\nlanguage: en\n---\n# A model\n"
        )
        (top / name / "generation_config.json").write_text('{"eos_token_id": 1, "do_sample": true}')
    save_adapter(top / "sft", base, 3)
    config = json.loads((top / "sft" / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.q_proj": 8}, "modules_to_save": None}
    (top / "sft" / "adapter_config.json").write_text(json.dumps(config))
    record = {
        "format": 1, "objective": "sft", "spec": {"l1": {"strength": 0.1}}, "run": {"l1_strength": 0.1},
        "delta": {"norm": 1.0, "below_epsilon": 0.5, "matrices": [{"entries": 8}]},
    }  # fmt: skip
    (top / "sft" / "paft_train.json").write_text(json.dumps(record))
    asked = merge_recipe(
        "ties", top / "base", (top / "x", {"weight": 0.5, "density": 0.5}), (f"{top / 'base'}+{top / 'sft'}", {"weight": 1.0, "density": 0.5})
    )  # fmt: skip
    (top / "plain.yaml").write_text(yaml.safe_dump(asked))
    (top / "recipe.yaml").write_text(yaml.safe_dump({**asked, "tokenizer_source": "union", "chat_template": "auto"}))
    merge(asked, top / "out", warn=lambda _: None)
    run = {
        "base_model": "base", "adapters": {"sft": "sft", "new": {"objective": "sft", "data": "d.jsonl", "lora": {"r": 2}}},
        "merge": {"merge_method": "ties", "models": [{"model": "sft", "parameters": {"density": 0.5}}]},
        "evaluate": {"metrics": {"m": {"kind": "perplexity", "data": "d.txt"}}}, "seeds": [0, 1],
    }  # fmt: skip
    (top / "run.yaml").write_text(yaml.safe_dump(run))
    steps = {
        "merge/merged": {
            "stage": "merge",
            "key": "k",
            "state": "done",
            "seconds": 1.0,
            "result": {},
            "outputs": {"a": 1},
        }
    }
    (top / "run.json").write_text(json.dumps({"format": 1, "versions": {}, "steps": steps}))
    (top / "x" / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "a.Transformer"}]))
    checkpoint = top / "k.part" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    shutil.copy(top / "sft" / "adapter_model.safetensors", checkpoint)
    state = {
        "global_step": 1,
        "log_history": [{"loss": 1.0, "step": 1}],
        "save_steps": 1,
        "stateful_callbacks": {"Watch": {"args": {}}},
    }
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": {}}, checkpoint / name)
    (top / "k.part" / "paft_run.json").write_text(
        json.dumps({"base": "base", "spec": {"objective": "sft", "lora": {"r": 2}}})
    )
    return {"top": top}


def checkpoints_checked(top: Path) -> None:
    list(RunFolder(top / "k").faults())


def training_opened(top: Path) -> None:
    plan = {"base": "base", "spec": {"objective": "sft", "lora": {"r": 2}}}
    RunFolder(top / "k").open(plan, resume=True)


def finished_checked(top: Path) -> None:
    with suppress(TrainError):  # of other settings, or an incomplete record
        RunFolder(top / "sft").check_finished({"base": "base", "spec": {}})


def planned(top: Path) -> None:
    with open_plan(top / "recipe.yaml", warn=lambda _: None):
        pass


def merged(top: Path) -> None:
    out = top / "made"
    try:
        merge(top / "plain.yaml", out, warn=lambda _: None)
    finally:
        for place in (out, top / "made.part"):
            shutil.rmtree(place, ignore_errors=True)


def audited(top: Path) -> None:
    audit(str(top / "sft"), base=str(top / "base"), preview=None)


def reproduced(top: Path) -> None:
    reproduce(top / "out", warn=lambda _: None)


def carded(top: Path) -> None:
    write_card(top / "out", overwrite=True)


def inspected(top: Path) -> None:
    read_manifest(top / "out" / "merge_manifest.json")
    done = verify(top / "out")
    done.to_json()
    if found := recorded(done.manifest):
        found.dumps()
        found.to_html()
    carded(top)


def run_read(top: Path) -> None:
    load_run(top / "run.yaml")


def state_read(top: Path) -> None:
    class Step:
        name, key, out, stage = "merge/merged", "k", top / "out", "merge"

    state = State.read(top)
    state.why(Step())  # type: ignore[arg-type]


TARGETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "base/config.json": ("json", planned),
    "x/config.json": ("json", merged),
    "base/tokenizer.json": ("bytes", planned),
    "x/tokenizer_config.json": ("json", planned),
    "x/chat_template.jinja": ("text", planned),
    "base/generation_config.json": ("json", merged),
    "base/README.md": ("text", merged),
    "base/model.safetensors": ("safetensors", planned),
    "sft/adapter_config.json": ("json", planned),
    "sft/adapter_model.safetensors": ("safetensors", planned),
    "sft/paft_train.json": ("json", audited),
    "sft/paft_train.json again": ("json", finished_checked),
    "k.part/paft_run.json": ("json", training_opened),
    "k.part/checkpoints/checkpoint-1/trainer_state.json": ("json", checkpoints_checked),
    "k.part/checkpoints/checkpoint-1/optimizer.pt": ("bytes", checkpoints_checked),
    "k.part/checkpoints/checkpoint-1/adapter_model.safetensors": ("safetensors", checkpoints_checked),
    "x/modules.json": ("json", planned),
    "recipe.yaml": ("yaml", planned),
    "run.yaml": ("yaml", run_read),
    "run.json": ("json", state_read),
    "out/merge_manifest.json": ("json", inspected),
    "out/merge_manifest.json again": ("json", reproduced),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_mutant_is_refused_in_one_line_or_read(world: dict[str, Path], target: str) -> None:
    kind, operation = TARGETS[target]
    file = world["top"] / target.removesuffix(" again")
    operation(world["top"])
    original, chance, failures = file.read_bytes(), random.Random(target), list[str]()
    try:
        for number, raw in enumerate(mutants(original, kind, chance)):
            file.write_bytes(raw)
            try:
                with bounded():
                    operation(world["top"])
            except PaftMergeError as error:
                if not str(error).replace("\n", "").isprintable():
                    failures.append(f"{number}: control characters in {str(error)!r}")
            except (Exception, AssertionError) as error:
                failures.append(f"{number}: {raw[:300]!r}: {type(error).__name__}: {str(error)[:300]}\n{_at(error)}")
    finally:
        file.write_bytes(original)
    assert not failures, "\n".join(failures)


def _at(error: BaseException) -> str:
    """The innermost lines of ours in a traceback."""
    lines, step = [], error.__traceback__
    while step is not None:
        if "paft_merge" in step.tb_frame.f_code.co_filename:
            lines.append(f"{step.tb_frame.f_code.co_filename.rpartition('paft_merge/')[2]}:{step.tb_lineno}")
        step = step.tb_next
    return "   at " + " < ".join(lines[::-1][:6])
