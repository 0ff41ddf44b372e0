"""The fields of `merge_manifest.json` that commands read; a manifest may come from anyone, so each field is checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paft_merge.recipe.sections import problems_of
from paft_merge.recipe.yaml_source import dotted

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Number = int | float | None


class _Checked(BaseModel):
    """A mapping whose further fields are not read, or are statistics that their readers check."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Output(_Checked):
    kind: str = "checkpoint"


class _Recipe(_Checked):
    merge_method: str
    output: _Output | None = None
    name: str | None = None


class _Card(_Checked):
    license: str | list[str] | None = None
    license_name: str | list[str] | None = None
    license_link: str | list[str] | None = None
    datasets: str | list[str] = []
    language: str | list[str] = []


class _Origin(_Checked):
    path: str
    revision: str | None = None
    kind: str
    repo_id: str | None = None
    commit: str | None = None
    card: _Card = _Card()


class _Options(_Checked):
    """Options of `MergeOptions.recorded`; `reproduce` refuses a further one by name."""

    device: str = "cpu"
    imports: list[str] = []
    out_shard_bytes: Annotated[int, Field(gt=0)] | None = None
    lazy_unpickle: bool = False
    allow_crimes: bool = False
    allow_nonfinite: bool = False
    trust_remote_code: bool = False
    tensor_names: Literal["intersection", "union"] | None = None
    unsafe_truncate_embeddings: bool = False


class _Delta(_Checked):
    source: str
    l2: Number = None
    kept: Number = None
    elected: Number = None
    kept_energy: Number = None
    elected_energy: Number = None


class _Total(_Delta):
    entries: Count
    below: Number = Field(None, alias="below_1e-05")
    weights: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None


class _Tensor(_Checked):
    method: str
    dtype: str
    shape: Annotated[list[Count], Field(max_length=64)]
    digest: str
    block_bytes: Annotated[int, Field(gt=0, le=1 << 40)]
    parameters: dict[str, Any] = {}
    sources: list[_Delta] = []
    pairs: list[dict[str, Any]] = []


class _Adapter(_Checked):
    modules: Count
    rank: Count
    norm: float
    error: float
    relative_error: float
    largest: dict[str, float]
    outside: float | None = None


class _Codes(_Checked):
    updated: Count
    unmoved_share: float
    relative_error: float


class _Manifest(_Checked):
    complete: bool = True
    recipe: _Recipe
    recipe_text: str | None = None
    documents: list[_Recipe] = []
    options: _Options = _Options()
    sources: list[_Origin] = []
    seed: int | None = None
    donor: str = ""
    inputs: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    adapter: _Adapter | None = None
    quantization: _Codes | None = None
    totals: list[_Total] = []
    pairs: list[dict[str, Any]] = []
    warnings: list[str] = []
    tensors: dict[str, _Tensor]
    files: dict[str, str] = {}


def fault_of(document: Any) -> str:
    """The first field of a manifest that cannot be right, and the number of others; empty if there is none."""
    try:
        _Manifest.model_validate(document)
    except ValidationError as error:
        first, *others = problems_of(error, _Manifest, document, dotted)
        return f"{first.where}: {first.what}{f' and {len(others)} more' if others else ''}"
    return ""
