"""What a merge is predicted to cost, against what merges read and write; and the rates of `paft bench`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.merge import WEIGHT_SPACE, on, paft, paft_process, recipe, recipe_for, write_recipe

from paft_merge import merge, open_plan
from paft_merge.engine import machine
from paft_merge.engine.balancing import spreading_size
from paft_merge.engine.machine import REFERENCE, Machine, Rates
from paft_merge.engine.options import parse_size, size_text
from paft_merge.engine.prediction import Prediction, Work, _at_a_time, costs, predict, predicted_peak, seconds, work_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "paft_merge" / "machine.json"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose matrices have several tiles, so that bytes of entries outweigh everything else that is read."""
    folder = tmp_path_factory.mktemp("large")
    base = random_state(0, torch.bfloat16, layers=1, width=2048)
    return {
        "base": save_checkpoint(folder / "base", base),
        "x": save_checkpoint(folder / "x", near(base, 1)),
        "y": save_checkpoint(folder / "y", near(base, 2)),
        "sft": save_adapter(folder / "sft", base, 3, rank=8),
        "dpo": save_adapter(folder / "dpo", base, 4, rank=16),
    }


def asked(method: str, paths: dict[str, Path], kind: str, weight: float | str = 0.5, **extra: Any) -> dict[str, Any]:
    names = ("x", "y") if kind == "checkpoints" else ("sft", "dpo")
    sources = [paths[n] if kind == "checkpoints" else on(paths["base"], paths[n]) for n in names]
    own: dict[str, Any] = {"density": 0.5} if "ties" in method and method != "l1_ties" else {}
    if method == "slerp":
        return recipe("slerp", sources[0], sources[1], parameters={"t": 0.3})
    return recipe(
        method,
        None if method == "linear" else paths["base"],
        *[(s, {"weight": weight, **own}) for s in sources],
        **extra,
    )


def bytes_read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


CASES = [
    *[(method, kind, {}) for method in ("linear", "ties", "dare_ties", "slerp", "l1_ties") for kind in ("checkpoints", "adapters")],
    ("ties", "checkpoints", {"parameters": {"trim_scope": "global"}}),
    ("ties", "adapters", {"parameters": {"trim_scope": "global"}}),
    ("ties", "adapters", {"out_dtype": "float16"}),
    ("ties", "checkpoints", {"weight": "equal_norm"}),
    ("ties", "checkpoints", {"weight": "equal_norm", "parameters": {"weight_scope": "tensor"}}),
    ("ties", "adapters", {"weight": "equal_norm"}),
    ("ties", "adapters", {"output": {"kind": "adapter", "rank": 8}}),
    ("ties", "adapters", {"output": {"kind": "adapter", "rank": 8}, "space": "core"}),
]  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does")
@pytest.mark.parametrize(("method", "kind", "extra"), CASES)
def test_predicted_bytes_are_those_that_a_merge_reads_and_writes(
    method: str, kind: str, extra: dict[str, Any], large: dict[str, Path], tmp_path: Path
) -> None:
    data = asked(method, large, kind, **extra)
    with open_plan(data) as plan:
        found = predict(plan, workers=1, threads=2, rates=REFERENCE).workers[0]
    merge(data, tmp_path / "first", threads=2)  # reads modules and kernels too
    before = bytes_read_so_far()
    merge(data, tmp_path / "out", threads=2)
    read = bytes_read_so_far() - before
    rel = 0.04 if method == "linear" or kind == "checkpoints" else 0.1
    mapped = len(Path("/proc/self/maps").read_bytes())  # threadpoolctl reads it
    few = 150_000 + mapped if "output" in extra else 0  # headers, and samples for fingerprints
    assert found.bytes_read == pytest.approx(read, rel=rel, abs=few)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert found.bytes_written == pytest.approx(sum(sizes), abs=5000 * len(sizes))


def predicted(
    data: dict[str, Any], workers: int = 1, threads: int = 2, rates: Rates = REFERENCE, **options: Any
) -> Prediction:
    with open_plan(data, **options) as plan:
        return predict(plan, workers=workers, threads=threads, rates=rates)


def test_shares_add_up_to_the_whole(large: dict[str, Path]) -> None:
    data = asked("dare_ties", large, "adapters")
    one, many = predicted(data, out_shard_bytes="170KB"), predicted(data, 2, out_shard_bytes="170KB")
    assert max(worker.files for worker in many.workers) > 2
    for field in ("files", "bytes_read", "bytes_from_disk", "bytes_written"):
        parts = sum(getattr(worker, field) for worker in many.workers)
        assert parts == pytest.approx(getattr(one.workers[0], field), abs=3), field
    assert many.slowest.seconds < one.slowest.seconds
    assert many.slowest.seconds == max(worker.seconds for worker in many.workers)


def test_more_work_takes_longer(large: dict[str, Path]) -> None:
    def took(method: str, kind: str, **options: Any) -> float:
        return predicted(asked(method, large, kind), **options).workers[0].processor_seconds

    assert took("linear", "checkpoints") < took("dare_ties", "checkpoints") < took("l1_ties", "checkpoints")
    base = large["base"]
    ranks = [predicted(recipe("linear", None, (on(base, large[n]), {"weight": 1.0}))) for n in ("sft", "dpo")]
    assert ranks[0].workers[0].bytes_read < ranks[1].workers[0].bytes_read
    with open_plan(recipe("linear", None, (on(base, large["dpo"]), {"weight": 1.0}))) as plan:
        matrices = [t for t in plan.tensors if t.method == "linear"]
        assert work_of(plan).products == sum(2 * 16 * t.numel for t in matrices) > 0


def test_adapters_on_one_source_are_one_product_of_the_sum_of_their_ranks(
    family: Callable[..., dict[str, Path]],
) -> None:
    paths = family()
    both = on(on(paths["base"], paths["sft"]), paths["dpo"])
    with open_plan(recipe("linear", None, (both, {"weight": 1.0}))) as plan:
        adapted = sum(tensor.numel for tensor in plan.tensors if tensor.method == "linear")
        assert work_of(plan).products == 2 * (4 + 2) * adapted > 0


@pytest.mark.parametrize("rate", sorted(Rates.model_fields.keys() - {"memory_gb"}))
def test_slower_rates_and_fewer_threads_never_save_time(rate: str) -> None:
    work = Work(4e9, 2e9, 1e9, 1e9, 1e12, 3e9, 1.0)
    slower = REFERENCE.model_copy(update={rate: 0.01 * getattr(REFERENCE, rate)})
    for cached in (False, True):
        assert seconds(work, 4, slower, cached=cached) >= seconds(work, 4, REFERENCE, cached=cached)
        times = [seconds(work, threads, REFERENCE, cached=cached) for threads in (1, 2, 4, 64)]
        assert times == sorted(times, reverse=True)
    assert seconds(work, 4, slower) > seconds(work, 4, REFERENCE)


def test_walks_over_a_model_that_exceeds_the_page_cache_read_the_disk_again(large: dict[str, Path]) -> None:
    data = asked("ties", large, "checkpoints", parameters={"trim_scope": "global"})
    found = [predicted(data, rates=Rates(memory_gb=size)).workers[0] for size in (16, 0.01)]
    assert found[0].bytes_read == found[1].bytes_read
    assert found[1].bytes_from_disk == 3 * found[0].bytes_from_disk


def test_files_are_balanced_by_fixed_rates(large: dict[str, Path], own_cache: Path) -> None:
    data = asked("ties", large, "adapters")
    with open_plan(data, out_shard_bytes="9MB") as plan:
        before = costs(plan)
        assert min(before) > 0
        assert len(set(before)) > 1
        machine.store(known(loops=77.0))
        assert costs(plan) == before


def test_one_document_that_another_uses_is_work_too(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family(torch.bfloat16)
    inner = recipe("ties", paths["base"], (paths["x"], {"weight": 1.0, "density": 0.5}), name="inner")
    outer = recipe("linear", None, ("inner", {"weight": 0.5}), (paths["y"], {"weight": 0.5}))
    path = tmp_path / "two.yaml"
    path.write_text(f"{json.dumps(inner)}\n---\n{json.dumps(outer)}")
    alone = recipe("linear", None, (paths["x"], {"weight": 0.5}), (paths["y"], {"weight": 0.5}))
    with open_plan(path) as both, open_plan(alone) as one:
        assert work_of(both).loops > work_of(one).loops
        assert work_of(both).read > 1.5 * work_of(one).read
        assert math.isfinite(predicted_peak(both, 2))


@pytest.mark.parametrize("name", WEIGHT_SPACE)
def test_every_method_has_a_cost(name: str, family: Callable[..., dict[str, Path]]) -> None:
    paths = family(torch.bfloat16, shards=2)
    costs = {}
    for sources in ("xy", "adapters"):
        names = [paths["x"], paths["y"]] if sources == "xy" else [on(paths["base"], paths[n]) for n in ("sft", "dpo")]
        with open_plan(recipe_for(name, paths["base"], *names)) as plan:
            found = predict(plan, workers=2, threads=2, rates=REFERENCE)
            costs[sources] = work_of(plan)
        assert found.slowest.seconds > 0.3
        assert min(worker.peak_bytes for worker in found.workers) > 40e6
    assert costs["xy"].read >= costs["xy"].written > 0
    assert min(cost.loops for cost in costs.values()) > 0


# --- workers and files -----------------------------------------------------------------------------------------------------


def test_workers_without_a_file_are_named_with_the_size_that_helps(large: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", asked("ties", large, "checkpoints"))
    shown = " ".join(paft("merge", path, "--dry-run", "--workers", "3").stdout.split())
    assert "workers 1..2 have nothing to do: the output has 1 file" in shown
    size = shown.split("--out-shard-size ")[1].split()[0]
    assert f"--out-shard-size {size} spreads the merge over 3 workers" in shown
    found = json.loads(paft("merge", path, "--dry-run", "--workers", "3", "--json", "--out-shard-size", size).stdout)
    assert found["prediction"]["idle"] == []
    assert len(found["files"]) >= 3
    shown = " ".join(paft("merge", path, "--dry-run", "--workers", "9").stdout.split())
    assert (
        "workers 1..8 have nothing to do: the output has 1 file its tensors do not spread over so many workers" in shown
    )
    assert "--out-shard-size" not in shown


def test_an_output_in_a_store_needs_scratch_for_two_files(large: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", asked("linear", large, "checkpoints"))
    options = "--dry-run", "--json", "--out-shard-size", "170KB"
    in_store = json.loads(paft("merge", path, "memory://bucket/merged", *options).stdout)
    sizes = sorted(in_store["files"].values())
    assert in_store["prediction"]["workers"][0]["scratch_bytes"] == sum(sizes[-2:]) < sum(sizes)
    here = json.loads(paft("merge", path, tmp_path / "out", *options).stdout)
    assert here["prediction"]["workers"][0]["scratch_bytes"] == 0


def test_tensors_that_do_not_spread_have_no_size(tmp_path: Path) -> None:
    state = {"a": torch.ones(1000, 10), "b": torch.ones(3), "c": torch.ones(3)}
    folder = save_checkpoint(tmp_path / "base", state)
    with open_plan(recipe("linear", None, (folder, {"weight": 2.0}))) as plan:
        assert spreading_size(plan, 5) is None
        assert spreading_size(plan, 2) is not None


@pytest.mark.parametrize("size", [1, 999, 1400, 130_000_000, 1_400_000_000, 99_000_000_000_000])
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize("flag", ["--read-gbps", "--write-gbps", "--gflops"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_rates_that_are_not_positive_are_refused(flag: str, value: str, tmp_path: Path) -> None:
    result = paft("merge", tmp_path / "r.yaml", "--dry-run", flag, value)
    assert result.exit_code == 2
    assert flag in result.stderr


@pytest.mark.parametrize(
    "more", [("--workers", "2"), ("--gflops", "50"), ("--workers", "2", "--worker", "0/2"), ("--workers", "0")]
)
def test_a_prediction_needs_a_dry_run(more: tuple[str, ...], tmp_path: Path) -> None:
    assert paft("merge", tmp_path / "r.yaml", tmp_path / "out", *more).exit_code == 2


@pytest.mark.parametrize("one", [("--worker", "0/2"), ("--finalize",)])
def test_a_prediction_is_of_all_workers(one: tuple[str, ...], tmp_path: Path) -> None:
    result = paft("merge", tmp_path / "r.yaml", tmp_path / "out", "--dry-run", "--workers", "2", *one)
    assert result.exit_code == 2
    assert "--workers predicts" in result.stderr


def test_kernels_that_must_be_compiled_are_announced(large: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", asked("linear", large, "checkpoints"))
    done = paft_process("merge", path, "--dry-run", NUMBA_CACHE_DIR=str(tmp_path / "kernels"))
    assert re.search(r"and up to [\d.]+ s here, once, to compile kernels", done.stdout), done.stderr
    merge(asked("linear", large, "checkpoints"), tmp_path / "out")
    assert "compile" not in paft("merge", path, "--dry-run").stdout


def test_less_memory_is_predicted_where_less_is_allowed(large: dict[str, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", asked("ties", large, "adapters"))

    def peak(*options: str) -> int:
        found = json.loads(paft("merge", path, "--dry-run", "--json", "--threads", "4", *options).stdout)["prediction"]
        return int(found["workers"][0]["peak_bytes"])

    assert peak("--memory", "150M") < peak()


# --- the rates of this machine ---------------------------------------------------------------------------------------------


def known(host: str = "node7", days: int = 3, **rates: float) -> Machine:
    measured = date.today() - timedelta(days=days)
    given = {**REFERENCE.model_dump(), **rates}
    return Machine(version="0.1.0", host=host, cores=4, measured=measured, folder="/data", rates=Rates(**given))


def test_stored_rates_are_used_and_named(large: dict[str, Path], tmp_path: Path, own_cache: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", asked("linear", large, "checkpoints"))
    by_default = paft("merge", path, "--dry-run").stdout
    assert "default rates; `paft bench` measures those of this machine" in " ".join(by_default.split())
    assert machine.store(known(read_gbps=0.001)) == own_cache
    slow = json.loads(paft("merge", path, "--dry-run", "--json").stdout)["prediction"]
    assert slow["seconds"] > 50 > slow["seconds_cached"]
    assert slow["rates_from"] == "measured by `paft bench` 3 days ago on node7, another machine (4 cores, /data)"
    given = json.loads(paft("merge", path, "--dry-run", "--json", "--read-gbps", "2").stdout)["prediction"]
    assert given["rates"]["read_gbps"] == 2
    assert given["rates_from"].startswith("read_gbps as given, else measured")
    assert given["seconds"] < 5


def fault(text: str) -> Callable[[Path], None]:
    return lambda path: void(path.write_text(text))


def void(_: object) -> None:
    pass


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = known().model_dump(mode="json")
        change(data)
        path.write_text(json.dumps(data))

    return write


BROKEN: dict[str, Callable[[Path], None]] = {
    "empty": fault(""),
    "torn": fault('{"version": "0.1'),
    "a list": fault("[]"),
    "deep": fault("[" * 60_000),
    "a huge number": fault("9" * 5000),
    "not text": lambda path: void(path.write_bytes(b"\xff\xfe\x00")),
    "a folder": lambda path: path.mkdir(),
    "zero": changed(lambda data: data["rates"].update(read_gbps=0)),
    "negative": changed(lambda data: data["rates"].update(gflops=-3)),
    "nan": changed(lambda data: data["rates"].update(write_gbps=math.nan)),
    "infinite": changed(lambda data: data["rates"].update(write_gbps=math.inf)),
    "text": changed(lambda data: data["rates"].update(loops="fast")),
    "a rate is missing": changed(lambda data: data["rates"].pop("gflops")),
    "no rates": changed(lambda data: data.pop("rates")),
    "another key": changed(lambda data: data.update(gpu=1)),
    "no date": changed(lambda data: data.update(measured="yesterday")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_measurement_is_a_warning_and_defaults(name: str, own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True)
    BROKEN[name](own_cache)
    found, warnings = machine.stored()
    assert found is None
    assert [warning.code for warning in warnings] == ["BENCH"]
    assert "\n" not in str(warnings[0])
    assert len(str(warnings[0])) < 400 + len(str(own_cache))
    assert "run `paft bench` again" in str(warnings[0])


def test_a_whole_measurement_comes_back(own_cache: Path) -> None:
    machine.store(known(gflops=123.4))
    assert machine.stored() == (known(gflops=123.4), [])


@pytest.mark.parametrize(("days", "said"), [(0, "today"), (1, "1 day ago"), (40, "40 days ago"), (-2, "on 20")])
def test_the_age_of_a_measurement_is_said(days: int, said: str) -> None:
    assert f"measured by `paft bench` {said}" in machine.described(known(days=days), date.today())


def test_bench_measures_and_stores(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "disk").mkdir()
    result = paft("bench", "--dir", tmp_path / "disk", "--size", "12MB", "--seconds", "0.05", "--json")
    assert result.exit_code == 0, result.output
    found = Machine.model_validate(json.loads(result.stdout))
    assert machine.stored() == (found, [])
    assert list((tmp_path / "disk").iterdir()) == []
    rates = found.rates
    assert 0.1 < rates.loops < 20
    assert 1 < rates.gflops < 2000
    assert 0.3 < rates.cached_gbps < 500
    assert found.folder == str(tmp_path / "disk")
    assert f"stored in {own_cache}" in result.stderr
    assert "GFLOP/s a core" in paft("bench", "--dir", tmp_path / "disk", "--size", "9MB", "--seconds", "0.01").stdout


def test_a_measurement_that_cannot_be_stored_is_shown_and_is_an_error(tmp_path: Path, own_cache: Path) -> None:
    own_cache.parent.parent.mkdir()
    own_cache.parent.write_text("a file")
    result = paft("bench", "--dir", tmp_path, "--size", "9MB", "--seconds", "0.01")
    assert result.exit_code == 1
    assert "GB/s" in result.stdout
    assert "error[SYSTEM]" in result.stderr


def test_bench_refuses_a_folder_without_room(tmp_path: Path, own_cache: Path) -> None:
    assert paft("bench", "--dir", tmp_path, "--size", "1MB").exit_code == 1
    assert paft("bench", "--dir", tmp_path / "none").exit_code == 2
    assert paft("bench", "--seconds", "nan").exit_code == 2
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([9, 1, 2, 1, 1, 9], 12), ([1, 9, 9, 1, 1, 1], 19), ([5, 5], 10), ([], 0), ([0] * 6, 0), ([1, 2, 3, 4], 9)],
)
def test_tensors_that_are_far_apart_are_not_in_memory_together(sizes: list[int], expected: int) -> None:
    """Three at a time among four: the large tensors of the first case are six apart."""
    assert _at_a_time(sizes, 3, 4) == expected


def test_an_adapter_as_output_is_predicted_with_the_libraries_that_it_imports(large: dict[str, Path]) -> None:
    given = asked("ties", large, "adapters")
    with (
        open_plan(given) as plan,
        open_plan({**given, "output": {"kind": "adapter", "rank": 4, "portable": False}}) as factors,
    ):
        assert predicted_peak(factors, 2) - predicted_peak(plan, 2) > 250e6
