"""Print the oldest allowed version of every dependency in pyproject.toml as constraints for pip.

    python tools/oldest.py > oldest.txt
    PAFT_CONSTRAINTS=oldest.txt PAFT_CHECKS=tests tools/test

Tools of the extra `dev` keep their versions of constraints.txt; indirect dependencies are left to pip.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def oldest() -> list[str]:
    """`name==version` for each direct dependency, in the order of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    extras = project["optional-dependencies"]
    lines = []
    for requirement in (
        *project["dependencies"],
        *(r for name, rows in extras.items() if name not in ("dev", "all") for r in rows),
    ):
        name, lower = re.findall(r"^([\w-]+)(?:>=([\w.]+))?", requirement)[0]
        lines.append(f"{name}=={lower or pinned[name]}")
    tools = [re.split(r"[\[><=]", requirement)[0] for requirement in extras["dev"]]
    return lines + [f"{name}=={pinned[name]}" for name in tools if name in pinned]


if __name__ == "__main__":
    print("\n".join(oldest()))
