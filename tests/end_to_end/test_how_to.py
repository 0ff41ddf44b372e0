"""The pages of docs/how-to: their recipes, commands and Python run in order, on a model of two layers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from make_tiny import UPDATE_RMS, make_adapter, make_base
from safetensors.torch import load_file, save_file
from toys.run import write_rows
from toys.train import THEIR_WARNINGS

from paft_merge.cli import cli
from paft_merge.pipeline.schema import RunLanguage
from paft_merge.recipe.schema import Language

pytestmark = THEIR_WARNINGS

PAGES = sorted((Path(__file__).parents[2] / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)

NOT_RUN = {
    r"paft (push|export)": "needs the Hub or another program",
    r"paft reproduce me/merged": "needs the Hub",
    r"paft run (?!--dry-run)": "trains; tests/pipeline has runs",
    r"paft bench": "measures for half a minute",
    r".* --(distributed|engine ray)": "needs a scheduler; tests/end_to_end/test_workers.py has it",
    r"torchrun|#|set ": "another program",
}
"""Commands that this test does not run, each with the reason."""

KEYS = {*Language.model_fields, *RunLanguage.model_fields}
"""The keys of a recipe, of which some blocks show a part."""

GATES = re.compile(r" --require | --for |^paft (doctor|diff)")
"""Commands that may exit with 3: random adapters are not sparse."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and data that the pages name."""
    folder = tmp_path_factory.mktemp("world")
    base = folder / "meta-llama" / "Llama-3.2-1B"
    model = make_base(base)
    for name in UPDATE_RMS:
        make_adapter(model, folder / "me" / name, UPDATE_RMS[name])
        (folder / "me" / f"{name}-70b").symlink_to(folder / "me" / name)
    (folder / "meta-llama" / "Llama-3.1-70B").symlink_to(base)
    (folder / "me" / "finetune").mkdir()
    for path in base.iterdir():
        (folder / "me" / "finetune" / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    changed = {name: weight * (1.01 if "norm" not in name else 1.0) for name, weight in weights.items()}
    save_file(changed, folder / "me" / "finetune" / "model.safetensors", {"format": "pt"})
    write_rows(folder / "my-sft.jsonl", [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(4)])
    write_rows(
        folder / "my-pairs.jsonl", [{"prompt": f"say {i}", "chosen": f" {i}", "rejected": " no"} for i in range(4)]
    )
    write_rows(folder / "my-test.jsonl", [{"prompt": f"say {i}", "answer": f" {i}"} for i in range(4)])
    (folder / "my-text.txt").write_text("a line\nanother line\n")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(
    page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    blocks = [
        (kind, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
        for indent, kind, text in BLOCK.findall(page.read_text())
    ]
    for _, text in (block for block in blocks if block[0] == "yaml"):
        part = yaml.safe_load(text)
        if name := re.match(r"# ([\w.-]+\.ya?ml)\n", text):
            Path(name[1]).write_text(text)
        elif not text.startswith("# .github/"):
            assert part.keys() <= KEYS
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, page.name, "exec"), {})
        for line in text.splitlines() if kind == "sh" else []:
            if not any(re.match(pattern, line) for pattern in NOT_RUN):
                done = CliRunner().invoke(cli, shlex.split(line)[1:])
                assert done.exit_code == 0 or (done.exit_code == 3 and GATES.search(line)), f"{line}\n{done.output}"


def test_every_page_is_in_the_index() -> None:
    index = (PAGES[0].parent / "index.md").read_text()
    assert {page.name for page in PAGES} == {*re.findall(r"\]\(([\w-]+\.md)\)", index), "index.md"}
    assert len(PAGES) == 11
