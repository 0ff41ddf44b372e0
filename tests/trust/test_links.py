"""Links of a stranger's folder do not lead a push to files outside of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from paft_merge.errors import HubError
from paft_merge.hub import prepare_upload


def test_a_push_follows_no_link_out_of_the_folder(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    base = family()["base"]
    (tmp_path / "private.txt").write_text("private")
    (base / "inside.txt").symlink_to("config.json")
    assert "inside.txt" in prepare_upload(base).files
    (base / "NOTICE.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(HubError, match=r"NOTICE\.txt: is a link to .*private\.txt, outside the folder; copy the file"):
        prepare_upload(base)
