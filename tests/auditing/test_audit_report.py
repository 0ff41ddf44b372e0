"""What an audit prints and writes: JSON, CSV, the page, the pictures, the advice, and the gate."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import random_state, save_adapter, save_checkpoint
from safetensors.torch import load_file, save_file

from paft_merge import merge
from paft_merge.auditing import Audit, audit
from paft_merge.auditing.report.figures import Chart, Heat, Line, exponent, figures_of, share_limits
from paft_merge.auditing.report.gate import METRICS, Requirement
from paft_merge.auditing.report.html import percent
from paft_merge.auditing.report.png import write_png
from paft_merge.auditing.report.svg import DARK, LIGHT, draw, standalone, stylesheet, ticks
from paft_merge.auditing.results import SCHEMA
from paft_merge.cli import cli
from paft_merge.errors import AuditError

DOCS = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("audit")
    state = random_state(0, torch.bfloat16)
    return {
        "base": save_checkpoint(folder / "base", state),
        "sft": save_adapter(folder / "sft", state, 3),
        "dpo": save_adapter(folder / "dpo", state, 4, rank=2, size=2e-3),
    }


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> Audit:
    return audit(folders["sft"], folders["dpo"], base=folders["base"])


def test_json_is_strict_versioned_and_documented(found: Audit) -> None:
    document = json.loads(found.dumps(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert document["schema"] == SCHEMA
    assert SCHEMA in DOCS
    source, pair = document["sources"][0], document["pairs"][0]
    parts = [
        document, source, source["header"], source["all"], source["all"]["factors"], source["tensors"][0],
        source["tensors"][0]["spectrum"], pair, pair["all"], pair["tensors"][0], document["preview"],
        next(iter(document["preview"]["all"].values())), document["advice"][0],
    ]  # fmt: skip
    assert {key for part in parts for key in part if f"`{key}`" not in DOCS} == set()


def test_every_key_that_the_documentation_names_is_in_the_json(found: Audit) -> None:
    table = DOCS.split("## The JSON")[1].split("`paft audit OUT --json`")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", table)) - {
        "good",
        "note",
        "warn",
        "objective",
        "mode",
        "target",
        "strength",
        "dtype",
    }
    named -= {"why", "names"}  # of what was left out; here nothing was
    text = found.dumps()
    assert {name for name in named if f'"{name}":' not in text and name not in ("norm", "l1")} == set()


def test_what_the_documentation_says_of_a_manifest_is_in_one(
    found: Audit, folders: dict[str, Path], tmp_path: Path
) -> None:
    models = [{"model": f"{folders['base']}+{folders[name]}", "parameters": {"weight": 1.0}} for name in ("sft", "dpo")]
    out = merge({"merge_method": "ties", "base_model": str(folders["base"]), "models": models}, tmp_path / "out")
    manifest = json.loads((out / "merge_manifest.json").read_text())
    table = DOCS.split("## What a merge measures by itself")[1]
    columns = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    named = {name for column in columns for name in re.findall(r"`(\w[\w-]*)`", column)}
    assert {"zeros", "hoyer", "weighted_l2", "kept", "warnings"} <= named
    assert named <= {*manifest, *manifest["totals"][0]}
    for row in manifest["totals"]:
        label = Path(row["source"].split("+")[1]).name
        measure = found.source(label).total.measure
        assert row["hoyer"] == pytest.approx(measure.hoyer, rel=1e-5)
        assert row["weighted_l2"] == row["l2"] == pytest.approx(measure.norm, rel=1e-6)
        assert (row["zeros"], row["below_1e-05"]) == (measure.zeros, measure.below[1e-5])


def test_every_metric_of_the_gate_and_every_page_of_the_advice_is_documented(found: Audit) -> None:
    assert {name for name in METRICS if f"`{name}" not in DOCS} == set()
    anchors = set(re.findall(r'<a id="([\w-]+)">', DOCS))
    source = (Path(__file__).parents[2] / "paft_merge" / "auditing" / "report" / "advice.py").read_text()
    named = set(re.findall(r', "([\w-]+)"\)$', source, flags=re.M))
    assert {"zero", "scale", "preview"} <= named <= anchors
    assert {f"paft-{anchor}" for anchor in named} <= Page(found.to_html()).ids
    assert all(a.page.split("#")[1] in anchors for a in found.advice)


def test_csv_has_a_row_for_every_group_of_every_source_and_pair(found: Audit) -> None:
    from paft_merge.auditing.report.csv_file import csv_text

    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert len(rows) == 3 * (1 + 3 + 2 + 6)
    row = next(r for r in rows if (r["source"], r["scope"], r["key"]) == ("sft", "layer", "1"))
    assert float(row["sparsity_1e-05"]) == found.source("sft").layers[1].measure.sparsity(1e-5)
    assert float(row["elected_energy"]) > 0
    pair = next(r for r in rows if r["other"] == "dpo" and r["scope"] == "all")
    assert float(pair["cosine"]) == found.pairs[0].total.cosine


class Page(HTMLParser):
    """Notes every element and where it points."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.folded = 0
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "style")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        self.folded += tag == "details" and ("open", None) not in attrs
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self.folded -= tag == "details" and self.folded > 0

    def handle_data(self, data: str) -> None:
        self.shown += [data] if not self.folded and data.strip() else []


def test_the_page_is_whole_and_needs_nothing_beside_it(found: Audit) -> None:
    text = found.to_html()
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & parsed.tags
    assert parsed.links
    assert {link.removeprefix("#") for link in parsed.links} <= parsed.ids
    assert "url(" not in text
    assert "@import" not in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).lower()
    for title in (
        "Sparsity by layer",
        "Sparsity by module",
        "Magnitudes",
        "Energy held",
        "Spectrum",
        "Sign conflict of sft and dpo",
        "What ties would keep",
        "bfloat16 erases",
    ):
        assert title in text


def test_names_from_files_cannot_write_into_the_page(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "<video>sft&\"'\x1b]0;{{ audit }}", random_state(0), 3)
    factors = load_file(folder / "adapter_model.safetensors")
    hostile = {n.replace("up_proj", "<script>alert(1)</script>"): t for n, t in factors.items()}
    save_file(hostile, folder / "adapter_model.safetensors")
    found = audit(folder)
    for text in (found.to_html(), found._repr_html_(), *map(standalone, figures_of(found))):
        assert not {"script", "video"} & Page(text).tags
        assert "\x1b" not in text
        assert "{{" in text or "<svg xmlns" in text
    assert "&lt;video&gt;sft&amp;" in found.to_html()
    assert "\x1b" not in str(found) + repr(found)
    for figure in figures_of(found):
        ElementTree.fromstring(standalone(figure))


def test_every_figure_is_sound_svg(found: Audit) -> None:
    drawn = figures_of(found)
    assert len({f.name for f in drawn}) == len(drawn) >= 9
    for figure in drawn:
        root = ElementTree.fromstring(draw(figure))
        assert root.tag == "svg"
        numbers = [float(v) for e in root.iter() for k in ("x", "y", "cx", "cy", "x1", "y1") if (v := e.get(k))]
        assert numbers
        assert min(numbers) >= -1
        assert max(numbers) <= 900


def test_shares_that_are_close_together_fill_their_axis_which_shows_its_part_of_the_whole() -> None:
    chart = Chart(
        "c", "", "", "layer", "share", (Line("a", (0.0, 1.0), (0.02, 0.03), 0),), percent_y=True, share_y=True
    )
    (curve,) = (e for e in ElementTree.fromstring(draw(chart)).iter("polyline"))
    first, last = (float(point.split(",")[1]) for point in curve.get("points", "").split())
    assert first - last > 60
    assert "the axis shows 1.0% to 4.0% of 0 to 100 %" in draw(chart)
    whole = replace(chart, lines=(Line("a", (0.0, 1.0), (0.0, 1.0), 0),))
    assert "of 0 to 100 %" not in draw(whole)


@pytest.mark.parametrize(
    ("values", "limits"),
    [([0.02, 0.03], (0.01, 0.04)), ([0.0, 0.9], (0.0, 1.0)), ([0.97, 0.99], (0.96, 1.0)), ([0.5, 0.5], (0.49, 0.51)), ([0.0], (0.0, 0.01))],
)  # fmt: skip
def test_an_axis_of_shares_follows_the_data_inside_0_to_1(values: list[float], limits: tuple[float, float]) -> None:
    assert share_limits(values) == pytest.approx(limits)


@pytest.mark.parametrize("layers", [2, 32, 126, 1000])
def test_layers_below_a_heat_map_do_not_run_into_each_other(layers: int) -> None:
    columns = tuple(map(str, range(layers)))
    heat = Heat("h", "", "", ("q_proj",), columns, ((0.5,) * layers,), "share", 0.0, 1.0)
    root = ElementTree.fromstring(draw(heat))
    ticks = [
        (float(e.get("x", "")), e.text or "")
        for e in root.iter("text")
        if (e.text or "").isdigit() and e.get("class") == "tick"
    ]
    assert len(ticks) > 1
    for (x, text), (after, other) in pairwise(ticks):
        assert after - x > 6 * (len(text) + len(other)) / 2


def test_heat_maps_begin_at_the_colour_of_the_paper_light_and_dark(found: Audit) -> None:
    def bright(colour: str) -> int:
        return sum(bytes.fromhex(colour.removeprefix("#")))

    page = found.to_html()
    light, dark = page.split("@media screen and (prefers-color-scheme:dark)")
    for text, palette in ((light, LIGHT), (dark, DARK)):
        assert stylesheet(palette) in text
        colours = dict(re.findall(r"\.((?:share|around_half)\d+)\{fill:(#\w{6})\}", stylesheet(palette)))
        shares = [bright(colours[f"share{i}"]) for i in range(25)]
        assert shares == sorted(shares, reverse=palette is LIGHT)
        paper = bright(palette.named["paper"])
        assert abs(paper - shares[0]) < 100
        assert abs(paper - bright(colours["around_half12"])) < 100


@pytest.mark.parametrize(
    ("name", "width"),
    [("\x1b\x07" * 3, 7 * 24), ("n" * 30, 7.92 * 30), ("MODEL", 10.8 * 5), ("\u65e5\u672c\u8a9e", 12.5 * 3)],
)
def test_a_legend_has_room_for_escaped_and_wide_characters(name: str, width: float) -> None:
    """Widths of letters in DejaVu Sans at 12.5 px; the mark of an entry begins 26 px before its text."""
    lines = tuple(Line(name, (0.0, 1.0), (0.0, 1.0), i) for i, name in enumerate((name, "dpo")))
    root = ElementTree.fromstring(draw(Chart("c", "", "", "x", "y", lines)))
    first, second = (e for e in root.iter("text") if e.get("class") == "legend")
    assert float(second.get("x", "")) - 26 - float(first.get("x", "")) > width + 10


def test_a_legend_of_long_names_lies_above_the_plot_and_inside_the_picture() -> None:
    names = ["a-very-long-name-of-a-run-" * 4 + str(i) for i in range(5)]
    chart = Chart("c", "", "", "x", "y", tuple(Line(n, (0.0, 1.0), (0.0, 1.0), i) for i, n in enumerate(names)))
    root = ElementTree.fromstring(draw(chart))
    entries = [e for e in root.iter("text") if e.get("class") == "legend"]
    top = min(float(p.split(",")[1]) for e in root.iter("polyline") for p in e.get("points", "").split())
    assert len(entries) == 5
    assert all(float(e.get("y", "")) < top for e in entries)
    assert all(float(e.get("x", "")) + 7 * len(e.text or "") <= 560 for e in entries)


def test_a_long_name_leaves_its_path_a_column(found: Audit) -> None:
    page = found.to_html()
    assert "grid-template-columns:fit-content(40%) minmax(0,1fr)" in page
    assert re.search(r"\.paft dt\{[^}]*overflow-wrap:anywhere", page)


def test_the_title_of_a_picture_lies_inside_it() -> None:
    heat = Heat("h", "of " + "\u202e" * 20 + " and W" * 9, "", ("q",), ("0",), ((0.5,),), "share", 0.0, 1.0)
    root = ElementTree.fromstring(standalone(heat))
    titles = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text") if e.get("class") == "title"]
    assert len("".join(titles)) > 6 * 20, "escaped"
    assert max(map(len, titles)) <= 54 < 560 / 10  # the width of a bold letter


def test_headings_of_the_numbers_abridge_long_names(tmp_path: Path) -> None:
    found = audit(save_adapter(tmp_path / ("long" * 50), random_state(0), 3))
    summaries = re.findall(r"</svg>([^<]*) by (?:layer|kind of module)</summary>", found.to_html())
    assert {len(text) for text in summaries} == {44}


def test_signs_of_several_pairs_that_differ_by_chance_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    third = save_adapter(tmp_path / "third", random_state(0, torch.bfloat16), 5)
    found = audit(folders["sft"], folders["dpo"], third, base=folders["base"])
    (line,) = (a for a in found.advice if "which is chance" in a.text)
    assert line.text.startswith("The signs of 3 of the 3 pairs differ on ")
    assert audit_values(found, f"conflict_weighted == {line.value!r}")


def test_thresholds_have_one_form_everywhere(found: Audit) -> None:
    assert [exponent(v) for v in (1e-6, 1e-5, 1e-4, 2.5e-3, 0.02, 0.5)] == [
        "1e-6",
        "1e-5",
        "1e-4",
        "2.5e-3",
        "0.02",
        "0.5",
    ]
    text = found.to_html()
    assert "1e-05" not in text
    assert "<th>1e-6</th><th>1e-5</th><th>1e-4</th><th>1e-3</th>" in text


def test_a_notebook_shows_answer_and_advice_and_folds_the_rest(found: Audit) -> None:
    parsed = Page(found._repr_html_())
    shown = " ".join(parsed.shown)
    assert "look here" in shown
    assert "of the energy survives ties" in shown
    assert "Spectrum" not in shown
    assert "by chance" not in shown
    assert parsed.links == []
    assert "Spectrum" in " ".join(Page(found.to_html()).shown)


def test_print_shows_a_few_lines_with_numbers_and_repr_one(found: Audit) -> None:
    assert repr(found) == "<Audit of sft, dpo: 12 tensors>"
    lines = str(found).splitlines()
    assert lines[0] == "audit of 2 sources on base"
    sparsity = percent(found.source("sft").paft_sparsity(1e-5))
    assert lines[1].startswith(f"  sft: lora, 6 tensors, {sparsity} below 1e-5, norm ")
    assert f"cosine {found.pairs[0].total.cosine:.3g}" in lines[3]
    assert len(lines) < 12
    for part in (found.sources[0], found.sources[0].total, found.pairs[0], found.preview, found.sources[0].tensors[0]):
        assert len(repr(part)) < 250, "without the numbers of every tensor"


def test_pictures_are_written_as_png(found: Audit, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("resvg_py")
    written = write_png(found, tmp_path / "png")
    assert [p.stem for p in written] == [f.name for f in figures_of(found)]
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 2 * 576  # width


def test_pictures_without_resvg_are_an_error_with_the_way_out(
    found: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paft_merge.auditing.report.png.find_spec", lambda name: None)
    with pytest.raises(AuditError, match=r"paft-merge\[plots\]"):
        write_png(found, tmp_path / "png")


def test_advice_has_a_number_behind_each_line(found: Audit) -> None:
    texts = [a.text for a in found.advice]
    assert any("sft delta is dense" in t and "TIES at density 0.2 will drop" in t for t in texts)
    assert any("bfloat16" in t and "dpo" in t for t in texts)
    assert any("signs of sft and dpo differ" in t for t in texts)
    for advice in found.advice:
        if advice.metric in METRICS and not METRICS[advice.metric].argument:
            holds = audit_values(found, f"{advice.metric} == {advice.value!r}")
            assert holds, advice


def audit_values(found: Audit, requirement: str) -> bool:
    """Whether some group has exactly that value."""
    from paft_merge.auditing.report.gate import _values

    wanted = Requirement.parse(requirement)
    return any(value == wanted.bound for _, value in _values(found, wanted))


@pytest.mark.parametrize(
    "holds",
    [
        "sparsity(1e-5) >= 0", "sparsity(1e-3)[source=dpo, layer=*] > 90%", "paft_sparsity(1e-5) [source=sft] < 0.5", "cosine<0.5", "norm > 0",
        "effective_rank [module=q_proj] <= 4", "elected_energy[layer=0] > 10 %", "kept[tensor=model.layers.?.mlp.*] < 0.21", "overlap_excess < 3",
        "top_energy(0.2) > 0.5", "bf16_sparsity < 1", "zero_rows == 0",
    ],
)  # fmt: skip
def test_what_is_required_and_holds_passes(holds: str, found: Audit) -> None:
    assert found.check(holds) == []


@pytest.mark.parametrize(
    ("fails", "where"),
    [
        ("sparsity(1e-5) >= 0.99", ["sft", "dpo"]),
        ("sparsity(1e-5) [source=sft, layer=*] >= 0.99", ["sft: layer 0", "sft: layer 1", "sft: layer 2"]),
        ("hoyer [module=up_proj, layer=2, source=dpo] > 1", ["dpo: layer 2, module up_proj"]),
        ("conflict_weighted < 1%", ["sft and dpo"]),
        ("elected_energy > 1", ["sft", "dpo"]),
    ],
)
def test_what_is_required_and_fails_says_where_and_by_how_much(fails: str, where: list[str], found: Audit) -> None:
    problems = found.check("norm > 0", fails)
    assert [p.where for p in problems] == where
    assert all("is required" in p.what for p in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity >= 0.9", r'threshold in parentheses; write for example "sparsity\(1e-5\) >= 0.9"'),
        ("top_energy > 90%", r'share in parentheses; write for example "top_energy\(0.2\) > 90%"'),
        ("hoyer(3) > 1", "nothing in parentheses"),
        ("sparsty(1e-5) > 1", "no metric 'sparsty'; did you mean 'sparsity'"),
        ("xyz > 1", "no metric 'xyz'; metrics are sparsity, "),
        ("sparsity(1e-5) [depth=3] > 1", "not a scope"),
        ("sparsity(1e-5) > much", "not a number"),
        ("more of everything", "not a requirement"),
    ],
)
def test_a_requirement_that_cannot_be_read_is_an_error(text: str, message: str, found: Audit) -> None:
    with pytest.raises(AuditError, match=message):
        found.check(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sparsity(-1e-5) >= 0.9",
            "sparsity takes a threshold of at least 0, got -1e-05",
        ),  # it would hold for any delta
        ("top_energy(20) > 0.9", "top_energy takes a share of 0 to 1, got 20"),
        ("relative_rms(-1) >= 0", "of at least 0"),
        ("sparsity(nan) >= 0", "'nan' is not a number"),
        ("norm > inf", "'inf' is not a number"),
    ],
)
def test_a_requirement_outside_a_metric_s_range_is_refused(text: str, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        Requirement.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -1.0}, "epsilon: must be finite and at least 0, got -1"),
        ({"epsilons": [1e-3, float("nan")]}, "epsilons: must be finite"),
        ({"density": 2.0, "epsilon": float("inf")}, r"(?s)epsilon: .*density: must be above 0 and at most 1, got 2"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(AuditError, match=message):
        audit(folders["sft"], **options)
    shown = CliRunner().invoke(cli, ["audit", str(folders["sft"]), "--epsilon=nan"])
    assert (shown.exit_code, "error[OPTION]: epsilon: must be finite" in shown.stderr) == (2, True)


def test_a_requirement_that_matches_nothing_or_was_not_measured_is_an_error(
    found: Audit, folders: dict[str, Path]
) -> None:
    with pytest.raises(AuditError, match="matches nothing"):
        found.check("norm [module=v_proj] > 0")
    with pytest.raises(AuditError, match="0\\.123 was not counted"):
        found.check("sparsity(0.123) > 0")
    alone = audit(folders["sft"])
    with pytest.raises(AuditError, match=r"base=\.\.\."):
        alone.check("bf16_sparsity < 1")
    with pytest.raises(AuditError, match="preview"):
        alone.check("kept_energy > 0")
    with pytest.raises(AuditError, match="two sources"):
        alone.check("cosine > 0")


@pytest.mark.parametrize("option", ["--png-dir", "--plots"])
def test_the_command_prints_tables_and_writes_every_file(option: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("resvg_py")
    places = ["--html", str(tmp_path / "r.html"), "--csv", str(tmp_path / "r.csv"), option, str(tmp_path / "png")]
    sources = [str(folders["sft"]), str(folders["dpo"]), "--base", str(folders["base"])]
    shown = CliRunner().invoke(
        cli, ["audit", *sources, *places, "--require", "sparsity(2e-3) >= 0.1", "-p", "density=0.3"]
    )
    assert shown.exit_code == 0, shown.output
    assert "against each other" in shown.stdout
    assert "what ties (density=0.3) would keep" in shown.stdout
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.csv").read_text().startswith("source,other,scope,key")
    pictures = len(list((tmp_path / "png").glob("*.png")))
    assert pictures >= 9
    wrote = [str(tmp_path / "r.csv"), str(tmp_path / "r.html"), f"{pictures} pictures into {tmp_path / 'png'}"]
    assert shown.stderr.splitlines() == [f"wrote {what}" for what in wrote]


def test_the_command_speaks_of_its_options_and_labels(folders: dict[str, Path], tmp_path: Path) -> None:
    def paft(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, ["audit", *map(str, arguments)], env={**os.environ, "COLUMNS": "400"})

    refused = paft(folders["base"])
    assert (refused.exit_code, "pass that model as --base" in refused.stderr) == (1, True)
    shown = paft(folders["sft"], "--html", tmp_path / "r.html")
    assert "pass --base to measure it." in shown.stdout
    assert str(folders["sft"].parent) not in shown.stdout
    assert "base=" not in shown.stdout + (tmp_path / "r.html").read_text()
    assert "--html" not in shown.stdout
    assert "--html FILE writes" in paft(folders["sft"]).stdout
    mistyped = paft(folders["sft"], folders["dpo"], "-p", "densty=0.2")
    assert (mistyped.exit_code, "did you mean 'density'" in mistyped.stderr) == (2, True)
    method = paft(folders["sft"], folders["dpo"], "--method", "tie")
    assert (method.exit_code, "did you mean 'ties'" in method.stderr) == (2, True)
    assert "--plots" not in paft("--help").stdout


def test_the_command_prints_json_alone_and_a_failed_gate_is_exit_code_three(folders: dict[str, Path]) -> None:
    shown = CliRunner().invoke(cli, ["audit", str(folders["sft"]), "--json", "--require", "sparsity(7e-5) >= 0.9"])
    assert shown.exit_code == 3
    assert json.loads(shown.stdout)["sources"][0]["label"] == "sft"
    assert "error[REQUIRED]: sft: sparsity(7e-5) is" in shown.stderr


def test_the_command_refuses_a_gate_that_it_cannot_read_before_it_measures(folders: dict[str, Path]) -> None:
    shown = CliRunner().invoke(cli, ["audit", str(folders["sft"]), "--require", "nonsense"])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "error[GATE]" in shown.stderr


def test_shares_never_claim_to_be_whole_when_they_are_not() -> None:
    assert [percent(v) for v in (0.0, 1.0, 0.25, 0.99999, 1e-6, None, float("nan"))] == [
        "0.0%",
        "100.0%",
        "25.0%",
        "99.99%",
        "<0.1%",
        "–",
        "–",
    ]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, log=False) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0, 31, log=False, whole=True) == [0, 10, 20, 30]
    assert ticks(1e-6, 1e-3, log=True) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])
