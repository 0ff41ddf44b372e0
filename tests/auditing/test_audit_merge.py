"""A preview says what the merge then measures, count by count; and a finished merge is held against its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import random_state, save_adapter, save_checkpoint
from safetensors import safe_open

import paft_merge
from paft_merge.auditing import Proposal, audit
from paft_merge.cli import cli
from paft_merge.errors import AuditError
from paft_merge.methods import METHODS as METHODS_OF_OURS
from paft_merge.output.manifest import verify

Family = Callable[..., dict[str, Path]]

METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "ties at the density of the overlap": {"density": 0.2},
    "ties by count": {"density": 0.2, "elect": "count", "normalize": "count", "rescale": "l2"},
    "ties by norms": {"density": 0.25, "weight": "equal_norm"},
    "ties by norms of tensors": {"density": 0.25, "weight": "inverse_norm", "weight_scope": "tensor"},
    "ties over the model": {"density": 0.25, "trim_scope": "global"},
    "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "l1_ties": {"l1_mass": 0.8, "elect": "weighted"},
    "l1_ties soft": {"epsilon": 1e-4, "shrink": "soft"},
    "sign_election": {},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "della": {"density": 0.5, "epsilon": 0.2},
    "magmax": {},
    "pcb": {"density": 0.3},
    "pcb by norms": {"density": 0.4, "weight": "equal_norm"},
}


def test_every_method_that_is_previewed_is_compared_with_its_merge() -> None:
    def previews(name: str) -> bool:
        needed = {p.name: 0.5 for p in METHODS_OF_OURS[name].parameters if p.name == "t"}
        try:
            return Proposal(name, needed).rule(["a", "b"], "x").selection_weights is not None
        except AuditError:  # mergekit merges it, and shows nothing
            return False

    assert {name for name in METHODS_OF_OURS if previews(name)} == {name.split()[0] for name in METHODS}


def recipe(made: dict[str, Path], method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    names = [f"{made['base']}+{made['sft']}", f"{made['base']}+{made['dpo']}", str(made["x"])]
    weights = [parameters.get("weight", 0.2 + 0.3 * i) for i in range(len(names))]
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip(names, weights, strict=True)]
    return {
        "merge_method": method.split()[0],
        "base_model": str(made["base"]),
        "models": models,
        "parameters": parameters,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_preview_of_a_recipe_counts_what_its_merge_then_counts(
    method: str, dtype: torch.dtype, family: Family, tmp_path: Path
) -> None:
    wanted = recipe(family(dtype), method, METHODS[method])
    preview = audit(wanted).preview
    assert preview is not None
    out = paft_merge.merge(wanted, tmp_path / "out")
    manifest = json.loads((out / "merge_manifest.json").read_text())

    labels = {f"{i}": label for i, label in enumerate(["sft", "dpo", "x"])}
    assert {t.name for t in preview.tensors} == {n for n, t in manifest["tensors"].items() if t["method"] != "copy"}
    for tensor in preview.tensors:
        rows = manifest["tensors"][tensor.name]["sources"]
        for i, row in enumerate(rows):
            if row["delta"] == "none":
                assert labels[str(i)] not in tensor.sources
                continue
            survived = tensor.sources[labels[str(i)]]
            assert (survived.kept, survived.elected) == (row["kept"], row["elected"])
            assert survived.kept_energy == pytest.approx(row["kept_energy"], rel=2e-6)
            assert survived.elected_energy == pytest.approx(row["elected_energy"], rel=2e-6)


def test_an_audit_counts_what_a_merge_writes_into_its_manifest(family: Family, tmp_path: Path) -> None:
    wanted = recipe(family(), "ties", {"density": 0.3})
    found = audit(wanted)
    manifest = json.loads((paft_merge.merge(wanted, tmp_path / "out") / "merge_manifest.json").read_text())
    for source, total in zip(found.sources, manifest["totals"], strict=True):
        measure = source.total.measure
        assert (measure.entries, measure.zeros, measure.largest) == (total["entries"], total["zeros"], total["max"])
        assert [measure.below[e] for e in (1e-6, 1e-5, 1e-4, 1e-3)] == [total[f"below_1e-0{k}"] for k in (6, 5, 4, 3)]
        assert measure.norm == pytest.approx(total["l2"], rel=2e-7)  # float32 squares in one, float64 in the other


def test_a_proposal_previews_as_the_recipe_that_says_the_same(family: Family) -> None:
    made = family()
    wanted = recipe(made, "ties", {"density": 0.3, "lambda": 0.5})
    by_recipe = audit(wanted).preview
    proposal = Proposal.parse("ties", ["density=0.3", "weight=0.2,0.5,0.8", "lambda=0.5"])
    by_proposal = audit(made["sft"], made["dpo"], made["x"], base=made["base"], preview=proposal).preview
    assert by_recipe is not None
    assert by_proposal is not None
    assert [t.sources for t in by_recipe.tensors] == [
        t.sources for t in sorted(by_proposal.tensors, key=lambda t: [x.name for x in by_recipe.tensors].index(t.name))
    ]
    assert by_recipe.norm_ratio == pytest.approx(by_proposal.norm_ratio)


def test_the_merged_norm_is_that_of_the_dense_merge(family: Family) -> None:
    made = family()
    found = audit(
        made["sft"], made["dpo"], base=made["base"], preview={"method": "ties", "density": 0.4, "weight": (0.6, 0.3)}
    ).preview
    assert found is not None
    from conftest import dense_deltas

    state = random_state(0)
    dense = [dense_deltas(made[name], state) for name in ("sft", "dpo")]
    for tensor in found.tensors:
        deltas = [d[tensor.name].float() for d in dense]
        merged = paft_merge.methods.ties(deltas, [0.6, 0.3], density=0.4)
        assert tensor.merged_square == pytest.approx(float(merged.double().square().sum()), rel=1e-4)
        assert tensor.sum_square == pytest.approx(
            float((0.6 * deltas[0] + 0.3 * deltas[1]).double().square().sum()), rel=1e-4
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["densty=0.2"], "densty"),
        (["density=2"], r"\[0, 1\]"),
        (["density=much"], "density: must be a number, got 'much'"),
        (["elect=loudest"], "weighted"),
    ],
)
def test_a_proposal_that_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(AuditError, match=message):
        Proposal.parse("ties", settings)


@pytest.mark.parametrize(
    ("preview", "message"),
    [
        ({"method": "tise"}, "tise: is not a method; did you mean 'ties'"),
        ({"densty": 0.3}, "ties has no parameter 'densty'; did you mean 'density'"),
        ({"density": 2, "elect": "coutn"}, r"(?s)\[0, 1\].*did you mean 'count'"),
        ({"density": (0.2, float("nan"))}, "density: must be finite"),
        ({"density": None}, "density: must be a number"),
        ({"elect_tie": ["zero", "positive"]}, "got a list"),
        ({"method": "l1_ties", "density": 0.3, "epsilon": 1e-3}, "density and epsilon are both given"),
        ("nearswap", "t must be given"),
    ],
)
def test_a_preview_from_python_is_checked_as_one_from_the_command_line(
    family: Family, preview: Any, message: str
) -> None:
    made = family()
    with pytest.raises(AuditError, match=message) as raised:
        audit(made["sft"], made["dpo"], preview=preview)
    assert {problem.code for problem in raised.value.problems} == {"PREVIEW"}


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_a_method_without_a_preview_says_so(family: Family, method: str) -> None:
    made = family()
    needed = {"t": 0.5} if method == "slerp" else {}
    found = audit(made["sft"], made["dpo"], base=made["base"], preview={"method": method, **needed})
    line = f"{method}: neither trims nor elects, so there is nothing to preview"
    assert found.preview is None
    assert [str(w).partition(";")[0] for w in found.warnings] == [line]
    assert line in found.to_html()
    assert line in found.dumps()
    assert not audit(made["sft"], base=made["base"], preview={"method": method, **needed}).warnings
    assert not audit(made["sft"], made["dpo"], base=made["base"]).warnings


def test_a_proposal_holds_values_of_the_parameters_types() -> None:
    assert Proposal("ties", {"density": "0.3", "normalize": True}).parameters == {
        "density": 0.3,
        "normalize": "weights",
    }
    assert Proposal.parse("ties", ["density=0.3,1"]).parameters == {"density": (0.3, 1.0)}
    assert Proposal().parameters == Proposal.parse("ties", []).parameters == {"density": 0.2, "weight": 1.0}
    assert Proposal("dare_ties").parameters == {}


def test_a_proposal_with_too_few_values_is_refused(family: Family) -> None:
    made = family()
    with pytest.raises(AuditError, match="3 values for 2 sources"):
        audit(made["sft"], made["dpo"], preview={"method": "ties", "density": (0.1, 0.2, 0.3)})


def test_a_recipe_without_a_base_has_no_deltas(family: Family) -> None:
    made = family()
    linear = {
        "merge_method": "linear",
        "models": [{"model": str(made[n]), "parameters": {"weight": 1}} for n in ("x", "y")],
    }
    with pytest.raises(AuditError, match="base"):
        audit(linear)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    state = random_state(0, torch.bfloat16)
    base, sft = save_checkpoint(tmp_path / "base", state, 2), save_adapter(tmp_path / "sft", state, 3)
    models = [{"model": f"{base}+{sft}", "parameters": {"weight": 1.0, "density": 0.5}}]
    return paft_merge.merge({"merge_method": "ties", "base_model": str(base), "models": models}, tmp_path / "out").path


def test_a_finished_merge_is_what_its_manifest_says(merged: Path) -> None:
    check = verify(merged)
    assert check.ok
    assert check.tensors == len(random_state(0))
    shown = CliRunner().invoke(cli, ["audit", str(merged)])
    assert shown.exit_code == 0, shown.output
    assert "all as the merge wrote them" in shown.output.replace("\n", " ")
    as_json = json.loads(CliRunner().invoke(cli, ["audit", str(merged), "--json"]).stdout)
    assert as_json["ok"]
    assert as_json["totals"][0]["kept"] > 0


def test_one_changed_byte_of_a_finished_merge_is_found_and_named(merged: Path) -> None:
    file = next(f for f in sorted(Path(merged).glob("*.safetensors")))
    with safe_open(file, "pt") as opened:
        assert len(list(opened.keys())) > 1
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))

    (problem,) = verify(merged).problems
    assert "its bytes differ from those that the merge wrote" in problem.what
    shown = CliRunner().invoke(cli, ["audit", str(merged)])
    assert shown.exit_code == 1
    assert problem.where.rsplit(" ", 1)[-1] in shown.stderr


def test_a_tensor_that_the_manifest_does_not_know_is_found(merged: Path) -> None:
    path = merged / "merge_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["tensors"]["model.norm.weight"]
    manifest["tensors"]["model.other.weight"] = next(iter(manifest["tensors"].values()))
    path.write_text(json.dumps(manifest))
    assert {p.where.rsplit(" ", 1)[-1] for p in verify(merged).problems} == {
        "model.norm.weight",
        "model.other.weight",
    }


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "other/1"}', '{"format": "paft_merge.manifest/1", "tensors": 3}']
)
def test_a_manifest_that_cannot_be_read_is_an_error(text: str, merged: Path) -> None:
    (merged / "merge_manifest.json").write_text(text)
    with pytest.raises(AuditError, match="merge_manifest"):
        verify(merged)
