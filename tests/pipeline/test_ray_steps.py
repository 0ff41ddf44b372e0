"""Steps of a run as tasks: which wait for which, what they need, and machines that differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paft_merge.engine.ray_cluster import Needs
from paft_merge.errors import RunError
from paft_merge.pipeline import ray_steps
from paft_merge.pipeline.arms import Arm
from paft_merge.pipeline.ray_steps import Origin, Unit, units_of
from paft_merge.pipeline.state import LOCK, locked
from paft_merge.pipeline.steps import Audit, Evaluate, Merge, Push, Step, Train


def step(name: str, job: Any, *needs: str) -> Step:
    return Step(name, name.partition("/")[0], "key", job, None, needs)  # type: ignore[arg-type]


def evaluation(arm: str, metric: str, *needs: str) -> Step:
    return step(f"evaluate/{arm}/{metric}", Evaluate(Arm(arm, "", None, ()), metric), *needs)


SFT, DPO = (step(f"train/{name}", Train(name, {}, "base", Path(), (name,))) for name in ("sft", "dpo"))
AUDIT = step("audit/adapters", Audit((), "base", ()), SFT.name, DPO.name)
MERGED = step("merge/merged", Merge({}), SFT.name, DPO.name)
STEPS = [
    SFT, DPO, AUDIT, MERGED, evaluation("base", "skill"), evaluation("base", "text"),
    evaluation("merged", "skill", MERGED.name), step("push/me", Push(Path()), MERGED.name),
]  # fmt: skip


@pytest.mark.parametrize("gate", [False, True])
def test_units_wait_for_what_they_need(gate: bool) -> None:
    units = {unit.name: unit for unit in units_of(STEPS, gate=gate)}
    assert list(units) == [
        "train/sft",
        "train/dpo",
        "audit/adapters",
        "merge/merged",
        "evaluate/base",
        "evaluate/merged",
    ]
    assert [s.name for s in units["evaluate/base"].steps] == ["evaluate/base/skill", "evaluate/base/text"]
    trained, audited = {SFT.name, DPO.name}, {AUDIT.name} if gate else set[str]()
    assert units["train/sft"].after == units["train/dpo"].after == set()
    assert units["audit/adapters"].after == trained
    assert units["merge/merged"].after == units["evaluate/base"].after == trained | audited
    assert units["evaluate/merged"].after == trained | audited | {MERGED.name}


def test_steps_that_are_done_are_not_waited_for() -> None:
    (merged, _, last) = units_of([MERGED, *STEPS[4:]], gate=True)
    assert (merged.after, last.after) == (set(), {MERGED.name})


def test_resources_of_steps() -> None:
    share = Needs(8, 1)

    def needs(one: Step, of: Needs = share) -> Needs:
        return Unit(one.name, one.stage, (one,), frozenset()).needs(of)

    wide = replace(SFT, job=Train("sft", {"processes": 4}, "base", Path(), ("sft",)))
    assert needs(SFT) == needs(STEPS[4]) == share
    assert needs(AUDIT) == needs(MERGED) == Needs(8)
    assert needs(wide) == Needs(8, 4)
    assert needs(wide, Needs(8)) == Needs(8)


def test_a_machine_that_does_not_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_steps, "_SEEN_WITHIN", 0.1)
    with locked(tmp_path):
        origin = Origin.here(tmp_path)
        origin.check()
    (tmp_path / LOCK).write_text("process 1")
    with pytest.raises(RunError, match="does not see what the process that submits tasks has written there"):
        origin.check()
    with pytest.raises(RunError, match=rf"^{tmp_path}/none: machine "):
        replace(origin, folder=tmp_path / "none").check()


def test_a_machine_with_other_packages(tmp_path: Path) -> None:
    with locked(tmp_path):
        origin = Origin.here(tmp_path)
        other = {**origin.versions, "torch": "1.0"}
        with pytest.raises(
            RunError, match=r"machine \S+ has torch \S+, and the process that submits tasks 1\.0; install"
        ):
            replace(origin, versions=other).check()
