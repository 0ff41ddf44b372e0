"""`paft doctor` finds what would go wrong; `paft completion` completes in a real shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from toys.merge import paft, python

from paft_merge.cli import cli
from paft_merge.compute.kernels import object_cache
from paft_merge.engine import doctor
from paft_merge.errors import Problem
from paft_merge.hub.settings import local_state, size_of

SHELLS = ("bash", "zsh", "fish")


def examine(folder: Path, code: int = 0) -> dict[str, Any]:
    done = paft("doctor", "--dir", folder, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def places(problems: list[dict[str, str]]) -> set[str]:
    return {one["where"] for one in problems}


def test_it_names_versions_rates_and_places(tmp_path: Path) -> None:
    found = examine(tmp_path / "not" / "there")
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["out"]["folder"] == str(tmp_path)
    assert abs(found["out"]["free_bytes"] / shutil.disk_usage(tmp_path).free - 1) < 0.2
    assert 0 <= found["kernels"]["compiled"] <= found["kernels"]["all"] > 20
    assert found["rates"].keys() > {"read_gbps", "gflops", "origin", "measured"}
    assert {"train", "ray", "s3"} <= found["extras"].keys()
    shown = paft("doctor", "--dir", tmp_path)
    for text in ("torch", "kernels", "rates", "Hub", "nothing found that would fail"):
        assert text in shown.output


def test_it_answers_at_once_without_torch_and_shows_no_token(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from paft_merge.cli import cli
        try:
            cli(["doctor", "--json"])
        except SystemExit:
            heavy = {"torch", "numba", "transformers", "peft", "mergekit"} & sys.modules.keys()
            print(heavy or "light", time.process_time(), file=sys.stderr)
    """
    done = python(code, HF_TOKEN="hf_verysecret", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    light, seconds = done.stderr.split()[-2:]
    assert light == "light"
    assert float(seconds) < 0.7
    assert "verysecret" not in done.stdout + done.stderr
    hub = json.loads(done.stdout)["hub"]
    assert (hub["token"], hub["cache"], hub["offline"]) == (True, str(tmp_path / "hub"), True)


@pytest.mark.parametrize("token", ["x", None])
def test_whether_there_is_a_token_is_a_fact(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert local_state().token is bool(token)


@pytest.mark.parametrize(
    ("name", "version"), [("safetensors", "0.1.0"), ("trl", "0.9"), ("llvmlite", "0.99"), ("rich", None)]
)
def test_a_wrong_version_is_an_error(
    name: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda one: version if one == name else real(one))
    found = examine(tmp_path, code=3)
    (error,) = found["errors"]
    assert (error["code"], error["where"]) == ("VERSION", name)
    assert f"pip install '{name}" in error["fix"]


def test_an_extra_that_is_not_installed_is_a_fact_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda one: None if one in ("ray", "s3fs") else real(one))
    extras = examine(tmp_path)["extras"]
    assert (extras["ray"], extras["s3"], extras["tune"]) == (["ray"], ["s3fs"], [])


def test_another_python_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert "python" in places(examine(tmp_path, code=3)["errors"])


def test_no_space_and_no_memory_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor, "_free_memory", lambda: 5_000_000)
    found = examine(tmp_path, code=3)
    assert {one["code"] for one in found["errors"]} == {"DISK_FULL", "MEMORY"}
    assert "error[DISK_FULL]" in paft("doctor", "--dir", tmp_path).stderr


def test_a_place_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(object_cache, "compiled_kernels", lambda: (0, 40))  # other tests of this process loaded some
    found = examine(tmp_path / "file" / "out", code=3)
    assert [one["code"] for one in found["errors"]] == ["OUTPUT"]
    assert "no folder for compiled kernels can be written" in next(
        one["what"] for one in found["warnings"] if one["code"] == "KERNELS"
    )


def test_a_broken_measurement_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "paft_merge").mkdir()
    (tmp_path / "paft_merge" / "machine.json").write_text("{}")
    assert "BENCH" in {one["code"] for one in examine(tmp_path)["warnings"]}


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("NVIDIA H200, 143771, 143000, 570.1", [{"name": "NVIDIA H200", "memory_mib": 143771, "free_mib": 143000, "driver": "570.1"}]),
        ("GPU, odd, [N/A], [N/A], 1", [{"name": "GPU, odd", "memory_mib": None, "free_mib": None, "driver": "1"}]),
        ("No devices were found", []),
    ],
)  # fmt: skip
def test_gpus_are_those_of_the_driver(
    listed: str, expected: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{listed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._gpus() == expected
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._gpus() == []


def test_the_size_of_the_cache_counts_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_bytes(b"1234")
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "x")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert size_of(tmp_path) == 4
    assert size_of(tmp_path / "none") == 0


def test_the_examination_has_problems_as_data() -> None:
    found = doctor.Examination({"a": 1}, (Problem("A", "b", "c", "d"),), ())
    assert found.to_json() == {"a": 1, "errors": [{"code": "A", "where": "b", "what": "c", "fix": "d"}], "warnings": []}


class TestCompletion:
    @pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
    def test_bash_completes_commands_options_and_values(self, tmp_path: Path) -> None:
        root = Path(__file__).parents[2]
        program = tmp_path / "paft"
        lines = "import sys", f"sys.path.insert(0, {str(root)!r})", "from paft_merge.cli import cli", "cli()"
        program.write_text("\n".join([f"#!{sys.executable}", *lines]))
        program.chmod(0o755)
        typed = [["au"], ["merge", "--dry"], ["schema", "m"], ["methods", "breadcrumbs_"], ["study", "froz"]]
        script = f'PATH="{tmp_path}:$PATH"\neval "$(paft completion bash)"\n'
        for words in typed:
            script += f"COMP_WORDS=(paft {' '.join(words)}); COMP_CWORD={len(words)}; COMPREPLY=(); _paft_completion paft; echo ${{COMPREPLY[@]}}\n"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["audit", "--dry-run", "merge", "breadcrumbs_ties", "frozen-lake"]

    @pytest.mark.parametrize("typed", ["merge rec", "audit a", "init --adapter a", "merge -p --clone a", "study my-st"])
    def test_texts_that_may_be_files_are_completed_as_files(self, typed: str) -> None:
        words = {
            "COMP_WORDS": f"paft {typed}",
            "COMP_CWORD": str(len(typed.split())),
            "_PAFT_COMPLETE": "bash_complete",
        }
        done = CliRunner().invoke(cli, [], prog_name="paft", env=words)
        assert done.stdout.startswith("file,")

    @pytest.mark.parametrize("shell", SHELLS)
    def test_each_shell_has_a_script_for_paft(self, shell: str) -> None:
        done = paft("completion", shell)
        assert f"_PAFT_COMPLETE={shell}_complete" in done.stdout
        program = shutil.which(shell)
        if program:
            assert subprocess.run([program, "-n"], input=done.stdout, text=True).returncode == 0

    def test_another_shell_is_refused(self) -> None:
        assert paft("completion", "tcsh").exit_code == 2
