"""A command whose standard streams are closed does its work, and never writes a message into a file of the output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import near, random_state, save_checkpoint
from toys.merge import files_of, recipe, write_recipe


@pytest.mark.parametrize("closed", [(2,), (1, 2), (0, 1, 2)], ids=str)
def test_a_merge_with_closed_streams_is_the_same(closed: tuple[int, ...], tmp_path: Path) -> None:
    state = random_state(0)
    base, other = save_checkpoint(tmp_path / "a", state), save_checkpoint(tmp_path / "b", near(state, 1))
    asked = recipe("ties", base, (other, {"weight": 1, "density": 0.5}))
    file = write_recipe(tmp_path / "r.yaml", {**asked, "densty": 1})  # a warning has to be written somewhere

    def merged(out: Path, fds: tuple[int, ...]) -> dict[str, bytes]:
        code = f"import os\nfor fd in {fds}: os.close(fd)\nos.execv({sys.executable!r}, {[sys.executable, '-m', 'paft_merge.cli', 'merge', str(file), str(out)]!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr
        return files_of(out)

    whole, blind = merged(tmp_path / "whole", ()), merged(tmp_path / "blind", closed)
    assert {n: b for n, b in blind.items() if n.endswith(".safetensors")} == {
        n: b for n, b in whole.items() if n.endswith(".safetensors")
    }
