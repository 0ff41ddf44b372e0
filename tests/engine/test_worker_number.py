"""`WorkerNumber`: text, and the variables of launchers."""

from __future__ import annotations

import pytest

from paft_merge.engine.worker_number import WorkerNumber


def numbers(**environment: str) -> tuple[int, int]:
    found = WorkerNumber.from_environment(environment)
    return found.index, found.count


def test_text() -> None:
    assert WorkerNumber.parse(" 3/4 ") == WorkerNumber(3, 4)
    assert str(WorkerNumber.parse("0/1")) == "worker 0 of 1"


@pytest.mark.parametrize("text", ["", "3", "1/0", "-1/4", "1/2/3", "a/b", "1.0/2", "٣/٤", "0/0"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a worker"):
        WorkerNumber.parse(text)


def test_counting_from_one_is_explained() -> None:
    with pytest.raises(ValueError, match="'4/4' is not a worker; they are counted from 0: write 0/4 to 3/4"):
        WorkerNumber.parse("4/4")


def test_torchrun() -> None:
    found = WorkerNumber.from_environment(
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    )  # fmt: skip
    assert found == WorkerNumber(5, 8, 1, 4)


def test_slurm() -> None:
    assert numbers(SLURM_PROCID="3", SLURM_NTASKS="4") == (3, 4)
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}
    assert numbers(SLURM_ARRAY_TASK_ID="1", **array) == (0, 4)
    assert numbers(SLURM_ARRAY_TASK_ID="4", SLURM_PROCID="0", SLURM_NTASKS="1", **array) == (3, 4)
    assert numbers(SLURM_ARRAY_TASK_ID="4", SLURM_PROCID="1", SLURM_NTASKS="2", **array) == (7, 8)
    assert numbers(SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="3") == (2, 3)
    tasks = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert WorkerNumber.from_environment(tasks) == WorkerNumber(3, 4, 1)


def test_an_array_of_slurm_with_steps_or_gaps() -> None:
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "6", "SLURM_ARRAY_TASK_STEP": "2"}
    assert numbers(SLURM_ARRAY_TASK_ID="4", SLURM_ARRAY_TASK_COUNT="4", **array) == (2, 4)
    gaps = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert numbers(SLURM_ARRAY_TASK_ID="7", **gaps) == (6, 7)


def array(task: int, low: int, high: int, **tasks: str) -> WorkerNumber:
    limits = {"SLURM_ARRAY_TASK_MIN": str(low), "SLURM_ARRAY_TASK_MAX": str(high)}
    return WorkerNumber.from_environment({"SLURM_ARRAY_TASK_ID": str(task), **limits, "SLURM_PROCID": "0", **tasks})


def test_a_job_of_an_array_that_is_submitted_alone_keeps_its_name() -> None:
    # Slurm gives `sbatch --array=3` an array of one job, so that every such job is worker 0 of 1.
    again = array(3, 3, 3)
    assert (again.index, again.count, str(again)) == (0, 1, "worker 0 of 1 (task 3 of an array)")
    assert again.name == array(3, 0, 3).name
    assert len({again.name, array(2, 2, 2).name, array(0, 0, 3).name, WorkerNumber(0, 1).name}) == 3
    both = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert array(3, 3, 3, **both).name == array(3, 0, 3, **both).name != again.name


def test_a_script_of_sbatch_without_tasks_runs_once() -> None:
    assert numbers(SLURM_PROCID="0") == (0, 1)


def test_kubernetes() -> None:
    assert numbers(JOB_COMPLETION_INDEX="0", JOB_COMPLETIONS="3") == (0, 3)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "RANK and WORLD_SIZE.*SLURM_PROCID.*SLURM_ARRAY_TASK_ID.*JOB_COMPLETION_INDEX"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not; set it to the number of workers, or pass worker='0/N'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero', and must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "LOCAL_RANK is set and LOCAL_WORLD_SIZE is not"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is set and SLURM_NTASKS is not"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "SLURM_PROCID is 4 and SLURM_NTASKS is 4"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_ID is set and SLURM_ARRAY_TASK_COUNT is not"),
        (
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3"},
            "SLURM_ARRAY_TASK_ID is 9, and SLURM_ARRAY_TASK_MIN and _MAX are 0 and 3",
        ),
        ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX is set and JOB_COMPLETIONS is not"),
    ],
)
def test_missing_and_contradictory_variables_are_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WorkerNumber.from_environment(environment)
