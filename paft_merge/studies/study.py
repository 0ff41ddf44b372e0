"""A study's definition: a YAML file with its parameters, tables, claims and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from paft_merge.errors import RunError
from paft_merge.pipeline.overrides import overridden
from paft_merge.pipeline.shipped_recipes import shipped_folders
from paft_merge.recipe.sections import Section, read_section, refused, suggestion
from paft_merge.recipe.yaml_source import Located, load_yaml

Tables: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""The numbers of one seed: by table, row and metric."""

MODULES = {
    "frozen-lake": "frozen_lake",
    "on-policy": "bandit",
    "precision": "precision",
    "on-policy-lm": "on_policy_lm",
    "paft-small": "paft_small",
    "paft-small-l1": "paft_small",
}
"""The module of each study. It has `Parameters`, `run_seed` and, where settings are chosen before, `tune`."""

Cell: TypeAlias = tuple[str, str]
"""A table and a row of it."""


class Metric(Section):
    """A number of each row."""

    title: str
    better: Literal["higher", "lower", "neither"]
    digits: int = 3
    """Digits after the decimal point."""
    percent: bool = False


class Claim(Section):
    """A statement about a metric: the sum over `plus` less the sum over `minus` is on the better side of zero.

    One cell on each side compares two rows; two on each side compare a gain with another gain.
    """

    says: str
    metric: str
    plus: Annotated[list[Cell], Field(min_length=1)]
    minus: Annotated[list[Cell], Field(min_length=1)]
    each: list[str] = Field(default_factory=lambda: [""])
    """The claim is tested for each of these, which replaces `{each}` in the cells."""
    note: str = ""
    """A sentence about the claim."""

    def cells(self, side: Literal["plus", "minus"], each: str) -> list[Cell]:
        """The cells of one side, for one of `each`."""
        found: list[Cell] = getattr(self, side)
        return [(table.replace("{each}", each), row.replace("{each}", each)) for table, row in found]


class TableSpec(Section):
    """A table of the page: some rows of one table of results, or of several side by side."""

    title: str
    tables: Annotated[list[str], Field(min_length=1)]
    rows: list[str] = Field(default_factory=list)
    """Names of rows, by default all; `labels` may replace them on the page."""
    metrics: Annotated[list[str], Field(min_length=1)]


class PlotSpec(Section):
    """A picture with one panel for each table: a metric along `x`, or an interval for each row without it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    title: str
    tables: Annotated[list[str], Field(min_length=1)]
    metric: str
    lines: Annotated[list[str], Field(min_length=1)]
    row: str = "{line}"
    """The row of a line at an `x`, for example `{line}, step {x}`."""
    x: list[float] = Field(default_factory=list)
    x_label: str = ""
    log_x: bool = False
    log_y: bool = False

    def row_at(self, line: str, x: float) -> str:
        """The row of a line at an `x`."""
        return self.row.replace("{line}", line).replace("{x}", f"{x:g}")

    def cells(self) -> list[Cell]:
        """Every row that is drawn."""
        rows = [self.row_at(line, x) for line in self.lines for x in self.x] or self.lines
        return [(table, row) for table in self.tables for row in rows]


class FrontierSpec(Section):
    """A picture of models by two metrics; the points of a line are joined, and a third metric is the shade."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    title: str
    table: str
    x: str
    y: str
    shade: str = ""
    lines: Annotated[dict[str, dict[str, str]], Field(min_length=1)]
    """By the name of each line, the rows that are its points, by the label of the point."""


class Definition(Section):
    """A study."""

    study: str
    title: str
    claim_of: str
    """The paper, and where in it."""
    seeds: Annotated[int, Field(ge=1)]
    parameters: dict[str, Any] = Field(default_factory=dict)
    smoke: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the smoke form that differ."""
    smoke_seeds: Annotated[int, Field(ge=1)] = 1
    metrics: dict[str, Metric]
    labels: dict[str, str] = Field(default_factory=dict)
    """Names of rows on the page, by their names in the results."""
    tables: list[TableSpec]
    plots: list[PlotSpec] = Field(default_factory=list)
    frontiers: list[FrontierSpec] = Field(default_factory=list)
    """A study of runs has a frontier already if its recipe has `compare: {frontier: [...]}`."""
    claims: list[Claim]

    @model_validator(mode="after")
    def _known_metrics(self) -> Definition:
        used = [one.metric for one in self.claims] + [one.metric for one in self.plots]
        used += [name for one in self.tables for name in one.metrics]
        used += [name for one in self.frontiers for name in (one.x, one.y, one.shade) if name]
        if unknown := [name for name in used if name not in self.metrics]:
            raise refused(f"there is no metric {unknown[0]!r}", suggestion(unknown[0], self.metrics))
        return self


@dataclass(frozen=True)
class Study:
    """A definition with its module and the parameters of one form."""

    definition: Definition
    module: Any
    parameters: Any
    seeds: int
    smoke: bool

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.definition.study

    def expected(self) -> Mapping[str, Any]:
        """The parameters as plain data, which results must agree on to be put together."""
        found: dict[str, Any] = self.parameters.model_dump(mode="json", by_alias=True)
        return found


def folders() -> Sequence[Path]:
    """The folders of definitions: of the source tree, and of an installed package."""
    return [folder / "studies" for folder in shipped_folders()]


def known_studies() -> list[str]:
    """The names of the definitions that are there."""
    return sorted({path.stem for folder in folders() for path in folder.glob("*.yaml")})


def load_study(name: str, *, smoke: bool = False, seeds: int | None = None, overrides: Sequence[str] = ()) -> Study:
    """Read a definition.

    Args:
        name: A name of `known_studies`, or the path of a file.
        smoke: Use the smoke form.
        seeds: Number of seeds, by default that of the form.
        overrides: `key=value`, changes of the parameters.

    Raises:
        RunError: STUDY, there is no such study. RecipeError: the definition has a fault.
    """
    paths = [Path(name)] if name.endswith((".yaml", ".yml")) else [folder / f"{name}.yaml" for folder in folders()]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        fix = suggestion(name, known_studies()) or "give the path of a study's YAML file"
        raise RunError.of("STUDY", name, "there is no such study", fix)
    located = load_yaml(path)
    if not isinstance(located.data, dict) or "study" not in located.data:
        what, fix = "is not the definition of a study", f"begin with study: NAME, one of {', '.join(MODULES)}"
        raise RunError.of("STUDY", path, what, fix)
    definition = read_section(Definition, located)
    if definition.study not in MODULES:
        where = located.spot(("study",))
        raise RunError.of(
            "STUDY", where, f"there is no study {definition.study!r}", suggestion(definition.study, MODULES)
        )
    module = import_module(f"paft_merge.studies.{MODULES[definition.study]}")
    special, count = (definition.smoke, definition.smoke_seeds) if smoke else ({}, definition.seeds)
    usual = module.Parameters().model_dump(mode="json", by_alias=True)  # an override may change a part of a default
    given = overridden(Located({**usual, **definition.parameters, **special}, str(path)), overrides)
    parameters = read_section(module.Parameters, given)
    return Study(definition, module, parameters, seeds or count, smoke)
