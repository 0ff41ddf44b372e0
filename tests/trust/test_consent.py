"""A recipe is data: checks run none of its code, and a run asks before it runs code that does not lie beside the recipe."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import near, random_state, save_checkpoint
from toys import run as toy
from toys.merge import recipe as toy_recipe

from paft_merge.cli import cli
from paft_merge.engine.api import merge
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import EvaluateError, MergeError, RecipeError, TrainError
from paft_merge.evaluating import check_evaluate, evaluate
from paft_merge.evaluating.schema import read_evaluate
from paft_merge.pipeline import plan, run
from paft_merge.recipe import trust
from paft_merge.recipe.yaml_source import Located
from paft_merge.training import train
from paft_merge.training.rewards import check_function

CODE = """
from pathlib import Path
Path(__file__).with_suffix(".ran").write_text("")

def words(completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a base, in a folder of its own, which is not the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(trust, "_NAMED", set())
    recipe = toy.make_world(tmp_path / "recipe", compare=None)
    (recipe.parent / "reward.py").write_text(CODE)
    (tmp_path / "elsewhere" / "other.py").write_text(CODE)
    (tmp_path / "elsewhere" / "package").mkdir()
    (tmp_path / "elsewhere" / "package" / "__init__.py").write_text(CODE)
    (tmp_path / "elsewhere" / "package" / "inner.py").write_text(CODE)
    return recipe


def changed(recipe: Path, **sections: object) -> Path:
    """The recipe with other sections."""
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **sections}))
    return recipe


def only_reward(function: str) -> dict[str, object]:
    metric = {"kind": "reward", "data": "test.jsonl", "function": function, "max_new_tokens": 1}
    return {"metrics": {"words": metric}}


def ran(recipe: Path) -> list[str]:
    return [path.name for path in recipe.parent.parent.rglob("*.ran")]


def test_a_dry_run_runs_no_reward_function(world: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["run", "--dry-run", str(world), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert not ran(world)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("../elsewhere/other.py:words", "other.py"), ("other.py:words", "other.py"), ("package:words", "__init__.py"),
        ("package.inner:words", "inner.py"), ("json:loads", "json"), ("link.py:words", "other.py"),
    ],
)  # fmt: skip
def test_code_that_does_not_lie_beside_the_recipe_needs_the_flag(
    world: Path, tmp_path: Path, name: str, where: str
) -> None:
    (world.parent / "link.py").symlink_to(tmp_path / "elsewhere" / "other.py")
    changed(world, adapters=None, merge=None, audit=None, evaluate=only_reward(name))
    world.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(world.read_text()).items() if v is not None}))
    with pytest.raises(
        RecipeError, match="which does not lie beside the recipe; read it, then pass trust_code=True"
    ) as e:
        plan(world, tmp_path / "out")
    assert [problem.code for problem in e.value.problems] == ["TRUST"]
    plan(world, tmp_path / "out", trust_code=True)
    assert not ran(world)
    refused = CliRunner().invoke(cli, ["run", str(world), str(tmp_path / "out")])
    assert refused.exit_code == 1
    assert "pass --trust-code" in refused.output
    assert not ran(world)


def test_a_function_beside_the_recipe_is_named_before_it_runs(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed(world, evaluate=only_reward("reward.py:words"))
    world.write_text(
        yaml.safe_dump({k: v for k, v in yaml.safe_load(world.read_text()).items() if k in ("base_model", "evaluate")})
    )
    with caplog.at_level(logging.WARNING):
        run(world, tmp_path / "out", planned=lambda _: caplog.clear())
    assert caplog.messages[0] == f"runs reward.py:words ({world.parent / 'reward.py'})"
    assert sum("runs reward.py" in message for message in caplog.messages) == 1
    assert ran(world) == ["reward.ran"]


def test_a_check_finds_the_function_without_running_the_file(world: Path) -> None:
    folder = world.parent
    check_function("reward.py:words", folder)
    with pytest.raises(TrainError, match="has no function 'wordz'; did you mean 'words'"):
        check_function("reward.py:wordz", folder)
    (folder / "broken.py").write_text("def words(:\n")
    with pytest.raises(TrainError, match="cannot be imported: SyntaxError"):
        check_function("broken.py:words", folder)
    with pytest.raises(TrainError, match="cannot be imported: FileNotFoundError"):
        check_function("none.py:words", folder)
    (folder / "nested.py").write_text("try:\n    from x import words\nexcept ImportError:\n    words = other = None\n")
    check_function("nested.py:other", folder)
    (folder / "star.py").write_text("from x import *\n")
    check_function("star.py:anything", folder)
    (folder / "deep.py").write_text("(" * 5000)
    with pytest.raises(TrainError, match="cannot be imported"):
        check_function("deep.py:words", folder)
    assert not ran(world)


REMOTE = {
    "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"},
    "model_type": "x",
    "architectures": ["X"],
}


def with_remote_code(base: Path) -> Path:
    """Give a base a config and a tokenizer that name Python files of its folder."""
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (base / name).write_text(CODE + "class XConfig: pass\nclass X: pass\nclass T: pass\n")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **REMOTE}))
    tokenizer = base / "tokenizer_config.json"
    found = json.loads(tokenizer.read_text())
    tokenizer.write_text(
        json.dumps({**found, "tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}})
    )
    return base


@pytest.mark.parametrize("trusted", [False, True])
def test_no_check_runs_code_of_the_base_and_none_asks(
    world: Path, tmp_path: Path, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_remote_code(world.parent / "base")
    adapters = yaml.safe_load(world.read_text())["adapters"]
    sft = {**adapters["sft"], "base": {"trust_remote_code": True}} if trusted else adapters["sft"]
    changed(world, adapters={"sft": sft}, merge=None, evaluate=None, audit=None)
    world.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(world.read_text()).items() if v}))
    with pytest.raises(RecipeError, match=r"base\.trust_remote_code: runs the Python code" if trusted else "base"):
        plan(world, tmp_path / "out")
    if trusted:
        plan(world, tmp_path / "out", trust_code=True)
        with pytest.raises(TrainError, match="runs the Python code of the base's folder"):
            train(world, tmp_path / "trained")
    with pytest.raises(EvaluateError, match=r"needs the Python code of its folder, .* pass trust_code=True"):
        evaluate(world.parent / "base", only_reward("reward.py:words"), folder=world.parent)
    assert not [name for name in ran(world) if name != "reward.ran"]


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"base": {"attn_implementation": "someone/kernel"}}, "runs the code of the Hub repository someone/kernel"),
        ({"lora": {"r": 2, "extra": {"megatron_core": "evil"}}}, "imports a module that the recipe names"),
        ({"objective": "rloo", "reward": {"function": "os:system"}}, "runs Python code"),
    ],
)
def test_every_way_of_a_section_to_run_code_is_refused_before_training(
    tmp_path: Path, section: dict[str, object], what: str
) -> None:
    recipe = {"base_model": "none", "adapters": {"x": {"objective": "sft", "data": "none", **section}}}
    with pytest.raises(TrainError, match=what):
        train(recipe, tmp_path / "out")


def test_a_task_file_is_code_and_is_not_run_by_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "helper.py").write_text(CODE)
        (folder / "task.yaml").write_text(
            "task: our_task\ndataset_path: json\ndoc_to_text: '{{text}}'\nprocess_docs: !function helper.words\n"
        )
    monkeypatch.chdir(mine)
    check_evaluate(read_evaluate(Located.of({"tasks": ["task.yaml"]})), mine)
    spec = read_evaluate(Located.of({"tasks": [str(theirs / "task.yaml")]}))
    with pytest.raises(EvaluateError, match=r"task.yaml.*runs Python code.*trust_code=True"):
        check_evaluate(spec, mine)
    check_evaluate(spec, mine, trust_code=True)
    assert not list(tmp_path.rglob("*.ran"))


@pytest.mark.parametrize("name", ["trust_remote_code", "lazy_unpickle"])
def test_a_manifest_switches_no_trust_on(tmp_path: Path, name: str) -> None:
    base = random_state(0)
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", near(base, 1))
    out = tmp_path / "out"
    merge(toy_recipe("linear", None, (tmp_path / "base", {"weight": 1.0}), (tmp_path / "tuned", {"weight": 1.0})), out)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    manifest["options"][name] = True
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    flag = f"--{name.replace('_', '-')}"
    refused = CliRunner().invoke(cli, ["reproduce", str(out)])
    assert refused.exit_code == 1
    assert f"then pass {flag}" in refused.output
    given = CliRunner().invoke(cli, ["reproduce", str(out), flag])
    assert "REPRODUCE_TRUST" not in given.output
    with pytest.raises(MergeError, match=f"{name}=True, which a manifest cannot switch on"):
        reproduce(out)


@pytest.mark.parametrize("name", ["vllm_server_base_url", "vllm_server_host"])
def test_a_server_of_the_recipe_takes_part_in_no_training_without_the_flag(tmp_path: Path, name: str) -> None:
    section = {"objective": "rloo", "data": "none", "reward": {"rule": "length"}, "training": {name: "evil.example"}}
    with pytest.raises(TrainError, match=rf"training\.{name}: lets a server .* trust_code=True"):
        train({"base_model": "none", "adapters": {"x": section}}, tmp_path / "out")


def test_the_trainer_trusts_no_code_of_models(tmp_path: Path) -> None:
    section = {"objective": "sft", "data": "none", "training": {"trust_remote_code": True}}
    with pytest.raises(
        RecipeError, match=r"trust_remote_code cannot be set here; use base: \{trust_remote_code: true\}"
    ):
        train({"base_model": "none", "adapters": {"x": section}}, tmp_path / "out")


def test_a_file_of_accelerate_lies_beside_the_recipe_or_needs_the_flag(world: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "cluster.yaml").write_text("main_process_ip: evil.example\n")
    section = {**yaml.safe_load(world.read_text())["adapters"]["sft"], "accelerate_config": "cluster.yaml"}
    changed(world, adapters={"sft": section})
    with pytest.raises(
        TrainError, match=r"starts processes, on machines .* of cluster\.yaml, which does not lie beside"
    ):
        train(world, tmp_path / "out")


def test_processes_of_a_training_import_no_module_of_the_working_directory_nor_python_files_beside_data(
    world: Path, tmp_path: Path
) -> None:
    for name in ("accelerate", "torch", "transformers", "numpy"):
        (tmp_path / "elsewhere" / f"{name}.py").write_text(CODE)
    data = world.parent / "rows"
    data.mkdir()
    (world.parent / "sft.jsonl").rename(data / "train.jsonl")
    for folder in (data, world.parent, world.parent / "base"):
        for name in ("rows.py", "dataset.py", "sitecustomize.py", "usercustomize.py", "tokenization_x.py"):
            (folder / name).write_text(CODE)
        (folder / "x-1.0.dist-info").mkdir()
        (folder / "x-1.0.dist-info" / "entry_points.txt").write_text("[mergekit]\nx = dataset:words\n")
    sft = {**yaml.safe_load(world.read_text())["adapters"]["sft"], "data": "rows"}
    world.write_text(yaml.safe_dump({"base_model": "base", "adapters": {"sft": sft}}))
    train(world, tmp_path / "out", devices="cpu:1")
    assert not ran(world)
