"""The recipes that come with the package."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import paft_merge
from paft_merge.errors import OutputError, RunError
from paft_merge.output.report_files import write_file
from paft_merge.pipeline.recipe_schemas import with_schema

_QUICKSTART = "quickstart"


def shipped_folders() -> Sequence[Path]:
    """The folders that may have recipes: of the source tree, and of a package installed by pip, also with `--target` or `--user`."""
    tree = Path(paft_merge.__file__).parents[1]
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    roots = (tree, *(Path(sysconfig.get_path("data", scheme)) for scheme in schemes))
    return (tree / "recipes", *(root / "share" / "paft-merge" for root in roots))


def copy_quickstart(out: Path) -> Path | None:
    """Write the quickstart's recipe to a new file, and its base and data to the folder `quickstart` beside it.

    Returns:
        The file of the schema beside it; None where another program's file has its name.

    Raises:
        OutputError: EXISTS, something is there; OUTPUT, it cannot be written.
        RunError: QUICKSTART, the package was installed without it.
    """
    folder = out.parent / _QUICKSTART
    for place in (out, folder):
        if place.exists():
            raise OutputError.of("EXISTS", place, "exists", "name a file in another folder, or remove it")
    source = next((one for one in shipped_folders() if (one / f"{_QUICKSTART}.yaml").is_file()), None)
    if source is None:
        what, fix = "is not part of this installation", "install the wheel of paft-merge by pip, or use the source tree"
        raise RunError.of("QUICKSTART", "the quickstart", what, fix)
    text = (source / f"{_QUICKSTART}.yaml").read_text(encoding="utf-8").replace(f"recipes/{_QUICKSTART}.yaml", out.name)
    text, schema = with_schema(text, out)
    try:
        shutil.copytree(source / _QUICKSTART, folder, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise OutputError.of(
            "OUTPUT", folder, f"cannot be written ({error.strerror or error})", "name another folder"
        ) from error
    write_file(out, text)
    return schema
