"""Arms that train: mixed, polish, sequences of adapters in both orders and with swept settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toys.run import Killed, make_world, outcome, sections
from toys.train import THEIR_WARNINGS

from paft_merge.errors import PaftMergeError
from paft_merge.pipeline import Planned, load_run, plan, run
from paft_merge.pipeline.arms import Variant
from paft_merge.pipeline.schema import CompareSpec
from paft_merge.pipeline.steps import Planner
from paft_merge.training.callbacks import Watch

pytestmark = THEIR_WARNINGS

EVALUATE = {"metrics": {"text": {"kind": "perplexity", "data": "text.txt", "unit": "line"}}}
COMPARE: dict[str, Any] = {
    "arms": ["sequential", "sequential_reversed", "mixed", "polish"],
    "sft": "l1",
    "order": ["sft", "dpo", "safety"],
    "sequential": {"beta": [0.5], "steps": [0.5], "shrink": [0.5]},
    "mixed": {"training": {"save_strategy": "steps", "save_steps": 1}},
    "polish": {"with": "safety", "share": 0.5},
}


FEWER = ("compare.sequential={shrink: [0.5]}",)
"""For runs: what is swept by a training is planned and not executed."""


def three() -> dict[str, Any]:
    """The adapters of the toy, and a third one."""
    adapters: dict[str, Any] = sections()["adapters"]
    return {**adapters, "safety": {**adapters["dpo"], "objective": "orpo"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder, adapters=three(), audit=None, evaluate=EVALUATE, compare=COMPARE)


@pytest.fixture(scope="module")
def planned(world: Path) -> Planned:
    """The steps of the recipe, none of them executed."""
    return plan(world, world.parent / "unused")


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    """A run that nothing interrupted."""
    run(world, world.parent / "run", overrides=FEWER)
    return world.parent / "run"


def record(folder: Path) -> dict[str, Any]:
    """What a training wrote about itself."""
    found: dict[str, Any] = json.loads((folder / "paft_train.json").read_text())
    return found


def test_the_arms_their_groups_and_their_frontier(planned: Planned) -> None:
    assert {arm.name: (arm.group, arm.frontier, dict(arm.point)) for arm in planned.planner.arms} == {
        "sequential": ("sequential", "sequential", {}),
        "sequential beta=0.5": ("sequential", "sequential", {"beta": 0.5}),
        "sequential steps=0.5": ("sequential", "sequential", {"steps": 0.5}),
        "sequential shrink=0.5": ("sequential", "sequential", {"shrink": 0.5}),
        "sequential reversed": ("sequential", "", {}),
        "mixed": ("mixed", "", {}),
        "polish": ("polish", "", {}),
        "merged": ("merge", "", {}),
    }


def test_each_adapter_of_a_chain_is_trained_on_those_before_it(planned: Planned) -> None:
    needs = {step.name: step.needs for step in planned.steps}
    assert needs["train/after-sft/base"] == ("train/sft",)
    assert needs["train/after-sft/after-dpo/base"] == ("train/after-sft/base", "train/after-sft/dpo")
    assert needs["train/after-sft/after-dpo/safety"] == ("train/after-sft/after-dpo/base",)
    assert needs["train/after-safety/after-dpo/sft"] == ("train/after-safety/after-dpo/base",)
    assert needs["train/polish/polish/base"] == ("train/sft", "train/dpo", "train/polish/adapters/safety-steps0-0.5")
    assert needs["train/mixed/mixed"] == ()


def test_a_run_trains_every_arm_once(world: Path, done: Path) -> None:
    assert run(world, done, overrides=FEWER).done == ()
    rows = json.loads((done / "table.json").read_text())["rows"]
    values = [row["cells"]["text"]["mean"] for row in rows]
    assert len(set(values)) == len(values) == 6, "no two arms are the same model"
    trained = json.loads((done / "run.json").read_text())["steps"]
    facts = {name: step["result"] for name, step in trained.items() if "tokens" in step["result"]}
    assert facts["train/mixed/mixed"]["steps"] == sum(
        facts[f"train/{name}"]["steps"] for name in ("sft", "dpo", "safety")
    )
    tokens = [facts[f"train/{name}"]["tokens"] for name in ("sft", "dpo", "safety", "mixed/mixed")]
    assert tokens[3] == sum(tokens[:3])
    assert all(step["seconds"] > 0 for step in facts.values())


def test_the_steps_of_a_polish_are_those_of_the_adapter(done: Path) -> None:
    before, after = done / "polish/adapters/safety-steps0-0.5", done / "polish/polish/safety-steps0.5-1"
    assert [record(one)["run"]["steps"] for one in (before, after)] == [1, 1]
    assert record(after)["base"]["name"] == str(done / "polish/polish/base")


def test_a_swept_beta_is_that_of_its_objective_and_swept_steps_are_a_share(planned: Planned) -> None:
    steps = planned.planner.steps
    jobs = [steps[f"train/after-sft/after-dpo/safety{of}"].job for of in ("", "-beta0.5", "-steps0-0.5")]
    plain, beta, fewer = (job.section for job in jobs)  # type: ignore[union-attr]
    assert beta == {**plain, "orpo": {"beta": 0.5}}
    assert fewer == {**plain, "training": {**plain["training"], "max_steps": 1}}


def test_a_shrunk_arm_is_the_model_before_it_with_a_part_of_the_delta(done: Path) -> None:
    chain = done / "after-sft/after-dpo"
    model, arm = (
        load_file(folder / "model.safetensors") for folder in (chain / "base", done / "arms/sequential-shrink-0.5")
    )
    adapter = load_file(chain / "safety/adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(arm[f"{name}.weight"], model[f"{name}.weight"] + 0.5 * 2 * (b @ a), atol=1e-7, rtol=1e-6)


def test_a_mixed_training_that_was_killed_resumes_to_the_same_table(
    world: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(done, tmp_path / "run"))
    shutil.rmtree(copied / "mixed")
    step = Watch.on_step_end

    def dying(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        step(self, args, state, *rest, **more)
        if state.global_step == 4:
            raise Killed

    monkeypatch.setattr(Watch, "on_step_end", dying)
    with pytest.raises(Killed):
        run(world, copied, overrides=FEWER)
    assert (copied / "mixed/mixed.part/checkpoints/checkpoint-3").is_dir()
    monkeypatch.undo()
    assert run(world, copied, overrides=FEWER).done == ("train/mixed/mixed",)
    assert outcome(copied) == outcome(done)


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_default_arms_stay_as_they_are() -> None:
    assert CompareSpec().arms == ["base", "individual", "sequential", "parallel"]


KEYS = {
    "train/sft": "e94a322dec33cda76c5df0a15249bb14",
    "train/sft-dense": "f837b29318d3432013f0390c098c5eac",
    "train/after-sft/base": "7955364c0c009f24289063b0be653722",
    "train/after-sft/dpo": "5ad6e81931536eebfe73d8a2314baba4",
    "merge/parallel-ties-l1": "bc0bc506980b6b1e6cce6c92cda31851",
    "evaluate/sequential-l1/skill": "ce9349f72edfee2b8a74962171f6c240",
}
"""Fingerprints of version 0.1.0: an old run folder is not trained again."""


def test_fingerprints_of_the_arms_that_were_there_before_do_not_change(tmp_path: Path) -> None:
    files = {"base/config.json": "{}", "sft.jsonl": '{"text": "a"}\n', "pairs.jsonl": "{}\n", "test.jsonl": "{}\n"}
    (tmp_path / "base").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    adapters = {
        "sft": {"objective": "sft", "data": "sft.jsonl", "l1": {"strength": 1e-4}, "training": {"max_steps": 4}},
        "dpo": {"objective": "dpo", "data": {"path": "pairs.jsonl", "max_rows": 3}},
    }
    recipe = {
        "base_model": "base", "adapters": adapters, "compare": {"methods": ["ties"]},
        "evaluate": {"metrics": {"skill": {"kind": "exact_match", "data": "test.jsonl"}}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    steps = Planner.plan(load_run(tmp_path / "recipe.yaml"), tmp_path / "run").steps
    assert {name: steps[name].key for name in KEYS} == KEYS


def test_variants_that_differ_have_different_folders() -> None:
    names = [
        Variant("a").name, Variant("a", True).name, Variant("a", end=0.5).name, Variant("a", begin=0.5).name,
        Variant("a", beta=0.1).name, Variant("a", beta=0.1000000001).name, Variant("a", True, 0.1, 0.9, 2.0).name,
    ]  # fmt: skip
    assert len(set(names)) == len(names)


def test_sweeps_of_mixed_and_polish_are_frontiers(world: Path, tmp_path: Path) -> None:
    sets = ["compare.arms=[mixed, polish]", "compare.order=[sft, dpo]", "compare.mixed={ratio: [0.5, 2]}",
            "compare.polish={with: skill, share: [0.25, 0.5], merge: ties}", "adapters.sft.training.max_steps=4"]  # fmt: skip
    recipe = yaml.safe_load(world.read_text())
    del recipe["compare"]["sequential"]
    beside = world.with_name("swept.yaml")
    beside.write_text(yaml.safe_dump(recipe, sort_keys=False))
    found = plan(beside, tmp_path / "run", overrides=sets).planner
    assert [(arm.name, arm.frontier, dict(arm.point)) for arm in found.arms[:-1]] == [
        ("mixed ratio=0.5", "mixed", {"ratio": 0.5}),
        ("mixed ratio=2", "mixed", {"ratio": 2.0}),
        ("polish share=0.25", "polish", {"share": 0.25}),
        ("polish share=0.5", "polish", {"share": 0.5}),
    ]
    steps = {name: step.job.section["training"] for name, step in found.steps.items() if hasattr(step.job, "section")}
    assert [steps[f"train/polish/adapters/sft-steps0-{end}"]["max_steps"] for end in (0.75, 0.5)] == [3, 2]
    assert steps["train/polish/polish-share-0.25/sft-steps0.75-1"]["max_steps"] == 1


def test_a_training_in_epochs_is_divided_by_epochs(world: Path, tmp_path: Path) -> None:
    sets = ["adapters.safety.training={num_train_epochs: 3, gradient_checkpointing: false}", "compare.polish.share=0.2"]
    found = plan(world, tmp_path / "run", overrides=sets).planner.steps
    jobs = [found[f"train/polish/{name}"].job for name in ("adapters/safety-steps0-0.8", "polish/safety-steps0.8-1")]
    assert [job.section["training"]["num_train_epochs"] for job in jobs] == [2.4, 0.6]  # type: ignore[union-attr]


REWARD = {"function": "reward.py:words"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare.order": ["sft", "dop"]}, r"compare\.order\[1\]: no adapter 'dop'; did you mean 'dpo'"),
        ({"compare.order": ["sft", "sft"]}, "has a value twice"),
        ({"compare.order": ["sft"]}, "order"),
        ({"compare.arms": ["polish", "sequential"]}, r"compare\.mixed: mixed is not among the arms; add mixed to arms"),
        ({"compare.polish.with": "base"}, "base is not among the merged adapters; these are sft, dpo, safety"),
        ({"compare.polish.share": 0.1}, "0.1 of 2 steps of safety is 0 steps; leave at least one step on each side"),
        ({"compare.polish.share": 1.5}, "must be below 1"),
        ({"compare.polish.merge": "tie"}, r"compare\.polish\.merge.*'tie'; did you mean 'ties'"),
        ({"compare.polish.merge": {"merge_method": "linear", "models": [{"model": "sft"}]}}, "the merge before the polish does not have dpo"),
        ({"compare.sequential.steps": [0.1]}, "0.1 of 2 steps of safety is 0 steps"),
        ({"compare.sequential.beta": [-1]}, "must be above 0"),
        ({"compare.sequential.beta": []}, "empty"),
        ({"compare.order": ["dpo", "sft"], "compare.polish.with": "dpo"}, r"sequential\.beta: sft \(sft\) has no beta"),
        ({"adapters.dpo.lora.r": 4}, "`lora` differs between the parts sft, dpo, safety"),
        ({"adapters.dpo.training.weight_decay": 0.5}, "training.weight_decay: sft has 0.0 and dpo has 0.5, but one optimizer"),
        ({"compare.mixed.ratio": 2}, "one `ratio` is for two parts, and there are 3"),
        ({"compare.mixed.ratio": {"sft": 1}}, "`ratio` needs a number for each of the parts sft, dpo, safety"),
        ({"compare.mixed.ratio": -1}, r"mixed\.ratio: must be a number of at least 0, a list of such numbers, or one for each adapter"),
        ({"compare.mixed.ratio": [1, 1.0]}, "has a value twice"),
        ({"compare.polish.merge": {"models": []}}, "a merge recipe needs merge_method"),
        ({"compare.polish.merge": {"merge_method": "ties", "sweep": {"weight": [1, 2]}}}, "sweep the share instead"),
        ({"compare.mixed.training": {"bta": 2}}, "does not have this field"),
        ({"adapters.dpo": "old"}, "mixed trains one adapter on the objectives of all, and dpo exists already; leave mixed out"),
        ({"adapters.sft": "old"}, "sequential_reversed trains the skill adapter on the merged preference model, and sft exists already"),
    ],
)  # fmt: skip
def test_arms_that_the_adapters_do_not_allow_are_refused_before_training(
    change: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    sets = [f"{key}={json.dumps(value)}" for key, value in change.items()]
    with pytest.raises(PaftMergeError, match=message):
        plan(world, tmp_path / "run", overrides=sets)


@pytest.mark.parametrize("name", ["mixed", "sequential-reversed", "polish"])
def test_an_adapter_is_not_taken_for_an_arm_of_its_name(name: str, world: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(world.read_text())
    recipe["compare"] |= {"arms": ["individual", *COMPARE["arms"]]}
    recipe["adapters"][name] = recipe["adapters"]["dpo"]
    beside = world.with_name("named.yaml")
    beside.write_text(yaml.safe_dump(recipe))
    with pytest.raises(PaftMergeError, match=f"would have one folder, {name}; rename the adapter"):
        plan(beside, tmp_path / "run")


@pytest.mark.parametrize("arm", ["mixed", "polish"])
def test_objectives_without_fixed_steps_are_refused(arm: str, world: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(world.read_text())
    recipe["compare"] = {"arms": [arm]}
    del recipe["adapters"]["safety"]
    recipe["adapters"]["dpo"] |= {"objective": "on_policy", "reward": REWARD}
    recipe["adapters"]["dpo"]["training"].pop("max_steps")
    beside = world.with_name(f"{arm}.yaml")
    beside.write_text(yaml.safe_dump(recipe))
    why = "on_policy generates the text" if arm == "mixed" else r"dpo is trained in rounds \(on_policy\)"
    with pytest.raises(PaftMergeError, match=why):
        plan(beside, tmp_path / "run")
