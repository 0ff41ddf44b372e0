"""The language means here what it means in mergekit 0.1.5: each of its rules against its own code.

Where we refuse what mergekit accepts, `tests/recipe_faults.txt` says so; this file is about everything else.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from paft_merge.errors import RecipeError
from paft_merge.methods import METHODS, REQUIRED, Method, Parameter
from paft_merge.recipe import Located, ModelRef, Recipe, layer_t, load_recipe, resolve
from paft_merge.recipe.diagnostics import Report
from paft_merge.recipe.resolution import Level, read_setting

pytest.importorskip("mergekit")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what mergekit imports
    from mergekit import merge_methods
    from mergekit.common import ModelReference, dtype_from_name
    from mergekit.config import ConfigReader, MergeConfiguration, ParameterSetting, evaluate_setting
    from mergekit.merge_methods.base import BasePolicy, ParameterScope, ParameterSpec
    from mergekit.parameter_resolver import resolve_parameters
    from mergekit.plan import MergePlanner

LAYERS = 4

NAMES = st.sampled_from(
    ["", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.10.self_attn.q"]
)
PLACES = st.floats(0, 1) | st.sampled_from([i / n for n in (1, 2, 3, 7) for i in range(n + 1)])

WORDS = st.sampled_from(["true", "no", "1", "0.5", "1e-3", "2.0", "a", "", "12"])
SCALARS = st.booleans() | st.integers(-3, 20) | st.floats(-10, 10) | st.sampled_from([0.0, 1.0, 2.0]) | WORDS
GRADIENTS = SCALARS | st.lists(SCALARS, max_size=5)
FILTERS = st.none() | st.sampled_from(["*", "mlp", "layers.1", "layers.1.", "", "model", "x"])
CONDITIONS = st.fixed_dictionaries({"value": GRADIENTS}, optional={"filter": FILTERS})
SETTINGS = GRADIENTS | CONDITIONS | st.lists(CONDITIONS, max_size=4)
ODD = st.recursive(
    SCALARS | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["value", "filter", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def theirs_reads(raw: Any) -> bool:
    try:
        TypeAdapter(ParameterSetting).validate_python(raw)
    except ValidationError:
        return False
    return True


def ours_reads(raw: Any) -> Level | None:
    report = Report(Located.of({"p": raw}))
    setting = read_setting(report, ("p",), raw)
    return None if report.errors else Level("recipe", {"p": setting}, setting.spot)


@settings(deadline=None)
@given(SETTINGS | ODD)
@example([{"value": 1}, 0.5])
@example([[1]])
@example({"value": None})
@example({"filter": "x"})
def test_the_same_settings_can_be_read(raw: Any) -> None:
    assert (ours_reads(raw) is not None) == theirs_reads(raw)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([bool, int, float, str]), SETTINGS, NAMES, PLACES)
@example(int, [1, 4], "w", 1 / 3)
@example(int, [1, 4], "w", 0.5)
@example(bool, [0, 1.0, "yes"], "w", 0.5)
@example(str, ["a", "b"], "w", 0.999)
@example(float, [{"value": 1, "filter": "mlp"}, {"value": ["1e-3", 1]}], "q", 0.25)
def test_a_setting_has_the_same_value(kind: type, raw: Any, name: str, t: float) -> None:
    spec = ParameterSpec("p", kind, ParameterScope.SHARED)
    try:
        setting = TypeAdapter(ParameterSetting).validate_python(raw)
        theirs = evaluate_setting(name, setting, t, validate=spec.validate)
    except ValidationError:
        theirs = ValidationError
    level = ours_reads(raw)
    assert level is not None
    try:
        ours = resolve([level], Parameter("p", kind, "shared", None, ""), name, t).value
    except RecipeError:
        ours = ValidationError
    assert (type(ours), ours) == (type(theirs), theirs)


@settings(deadline=None)
@given(st.text("ab/@+.: -", max_size=12))
@example("org/x@main+org/l@v2")
def test_a_model_reference_is_read_alike(text: str) -> None:
    parts = text.split("+")  # several adapters are ours alone, and so is the refusal of blanks around '+'
    assume(len(parts) < 3 and (len(parts) == 1 or all(part == part.strip() for part in parts)))
    try:
        theirs = ModelReference.parse(text)
    except RuntimeError:
        theirs = None
    places = [theirs.model, theirs.lora] if theirs else []
    if theirs is None or any(place and "" in (place.path, place.revision) for place in places):
        with pytest.raises(RecipeError):
            ModelRef.parse(text)
        return
    ours = ModelRef.parse(text)
    lora = (theirs.lora.path, theirs.lora.revision) if theirs.lora else (None, None)
    assert (ours.path, ours.revision, ours.lora, ours.lora_revision) == (
        theirs.model.path,
        theirs.model.revision,
        *lora,
    )
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("name", ["bfloat16", "torch.float16", "float32", "float64", "torch.float64", None])
def test_dtypes_are_called_alike(name: str | None) -> None:
    recipe = load_recipe(
        {"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": 1}, "dtype": name}
    )
    assert str(dtype_from_name(name)).removeprefix("torch.") == str(recipe.dtype)


def table() -> dict[str, Method]:
    """mergekit's own methods, as far as a recipe's checks need them."""
    bases = {BasePolicy.REQUIRED: "required", BasePolicy.OPTIONAL: "optional", BasePolicy.IGNORED: "ignored"}
    made = {}
    for spec in (method.spec for method in merge_methods.registered_methods()):
        name = spec.name
        base = bases[spec.contract.base]
        parameters = tuple(
            Parameter(
                p.name, p.value_type if p.value_type in (bool, int, float, str) else float,
                "shared" if p.scope == ParameterScope.SHARED else "source", REQUIRED if p.required else p.default, "",
            )
            for p in spec.parameters
        )  # fmt: skip
        least, most = spec.contract.min_non_base, spec.contract.max_non_base
        if least is None and most is None:
            counted = base == "required"
            least, most = spec.contract.min_inputs - counted, spec.contract.max_inputs
            most = None if most is None else most - counted
        made[name] = Method(name, name, "", parameters, base, lambda *_: None, least or 0, most)  # type: ignore[arg-type]
    return made


THEIRS = table()

NUMBERS = st.floats(0, 1) | st.integers(0, 1) | st.sampled_from(["1e-3", "0.5"])
NUMERIC = NUMBERS | st.lists(NUMBERS, max_size=3)
NUMERIC_CONDITIONS = st.fixed_dictionaries(
    {"value": NUMERIC}, optional={"filter": st.sampled_from(["*", "mlp", "layers.1."])}
)
NUMERIC_SETTINGS = NUMERIC | NUMERIC_CONDITIONS | st.lists(NUMERIC_CONDITIONS, min_size=1, max_size=3)
FLAGS = st.booleans() | st.sampled_from([0, 1.0]) | st.lists(st.booleans(), max_size=3)
OF_SOURCE = {"weight": NUMERIC_SETTINGS, "density": NUMERIC_SETTINGS}
OF_ALL = OF_SOURCE | {"normalize": FLAGS, "lambda": NUMERIC_SETTINGS}
MODELS = ["base", "x", "org/y@v1", "base+lora"]


def levels(names: dict[str, Any]) -> st.SearchStrategy[dict[str, Any] | None]:
    return st.none() | st.fixed_dictionaries({}, optional=names)


@st.composite
def source_lists(draw: st.DrawFn, ranged: bool) -> list[dict[str, Any]]:
    refs = draw(st.lists(st.sampled_from(MODELS[1:]), min_size=1, max_size=3, unique=True))
    if ranged or draw(st.booleans()):
        refs = draw(st.permutations([*refs, MODELS[0]]))
    more = {"layer_range": [0, LAYERS]} if ranged else {}
    return [{"model": ref, **more, "parameters": draw(levels(OF_SOURCE))} for ref in refs]


@st.composite
def slice_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    found = []
    for _ in range(draw(st.integers(1, 2))):
        found.append({"sources": draw(source_lists(ranged=True)), "parameters": draw(levels(OF_ALL))})
    return sorted(found, key=lambda one: -len(one["sources"]))


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    top: dict[str, Any] = {
        "merge_method": draw(st.sampled_from(["ties", "linear", "task_arithmetic"])),
        "base_model": "base",
        "parameters": draw(levels(OF_ALL)),
    }
    form = draw(st.sampled_from(["models", "slices", "modules"]))
    if form == "models":
        return top | {"models": draw(source_lists(ranged=False))}
    if form == "slices":
        return top | {"slices": draw(slice_lists())}
    either = st.sampled_from(["models", "slices"])
    modules: dict[str, Any] = {}
    for name in ("text", "vision"):
        inner = draw(either)
        value = draw(source_lists(ranged=False)) if inner == "models" else draw(slice_lists())
        modules[name] = {inner: value, "parameters": draw(levels(OF_ALL))}
    return top | {"modules": modules}


class Plan:
    """mergekit's planner up to its normal form, with models that have `LAYERS` layers and need no files."""

    def __init__(self, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ModelReference, "config", lambda self, trust_remote_code=False: None)
        self.config = MergeConfiguration.model_validate(raw)
        names = list(raw["modules"]) if raw.get("modules") else ["default"]
        arch = SimpleNamespace(architecture=SimpleNamespace(num_layers=lambda config: LAYERS))
        planner = SimpleNamespace(
            config=self.config,
            arch_info=SimpleNamespace(modules=dict.fromkeys(names, arch)),
            options=SimpleNamespace(trust_remote_code=False),
            _method=merge_methods.get(self.config.merge_method),
        )
        MergePlanner.normalize_config(planner)  # type: ignore[arg-type]

    def values(self, name: str, t: float) -> list[Any]:
        """Per output slice: the shared parameters, and those of every source in order."""
        spec = merge_methods.get(self.config.merge_method).spec
        found: list[Any] = []
        for module in self.config.modules.values():
            for output in module.slices:
                reader = ConfigReader(config=self.config, t=t, slice_out=output, module=module)
                shared, each = resolve_parameters(
                    spec, tensor_name=name, inputs={source.model: name for source in output.sources},
                    sources=reader.parameter_sources, base_model=reader.base_model, t=t,
                )  # fmt: skip
                found.append((shared, [(str(ref), values) for ref, values in each.items()]))
        return found


def our_values(recipe: Recipe, name: str, t: float) -> list[Any]:
    found: list[Any] = []
    for output in recipe.slices:
        each = []
        for source in output.sources:
            is_base = recipe.method.base != "ignored" and source.ref == output.base
            own = {} if is_base else _all(recipe, source.levels, "source", name, t)
            each.append((str(source.ref), own))
        found.append((_all(recipe, output.levels, "shared", name, t), each))
    return found


def _all(recipe: Recipe, where: Any, scope: str, name: str, t: float) -> dict[str, Any]:
    return {p.name: resolve(where, p, name, t).value for p in recipe.method.parameters if p.scope == scope}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipes(), NAMES, PLACES)
def test_every_form_resolves_to_the_same_parameters(
    monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any], name: str, t: float
) -> None:
    theirs = values_or_missing(lambda: Plan(raw, monkeypatch).values(name, t))
    assert values_or_missing(lambda: our_values(load_recipe(raw, methods=THEIRS), name, t)) == theirs


def values_or_missing(compute: Callable[[], list[Any]]) -> list[Any] | str:
    """What is computed, or `missing`: which of several parameters is told first, and when, may differ. An empty list is none."""
    try:
        return compute()
    except (RuntimeError, RecipeError) as error:
        if "Missing required parameter" not in str(error) and "is an empty list" not in str(error):
            raise
        return "missing"


REAL = {
    "weight and density on the base": """
        models:
          - model: base
            parameters: {weight: 1.0, density: 1}
          - {model: x, parameters: {weight: 0.5, density: 0.5}}
        merge_method: ties
        base_model: base
        parameters: {normalize: 1.0, int8_mask: true}
        dtype: float16
    """,
    "modules default slices": """
        merge_method: slerp
        base_model: a
        modules:
          default:
            slices:
              - sources: [{model: a, layer_range: [0, 32]}, {model: b, layer_range: [0, 32]}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        tokenizer: {}
    """,
    "gradients of many points": """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1]}}
          - {model: b}
        parameters: {weight: 1}
    """,
    "a tolerance with an exponent": """
        merge_method: karcher
        models: [{model: a}, {model: b}]
        parameters: {max_iter: 100, tol: 1e-10}
    """,
    "a name, an adapter twice, spaces, an ignored parameter": """
        name: final
        merge_method: model_stock
        base_model: C:\\My Models\\base+C:\\My Models\\lora
        models:
          - {model: C:\\My Models\\base+C:\\My Models\\lora}
          - {model: b}
          - {model: c, weight: 1, parameters: {weight: 0.5}}
        parameters: {filter_wise: no, select_topk: 0.5}
        dype: bfloat16
    """,
    "a revision under a source, a legacy tokenizer": """
        merge_method: nuslerp
        models: [{model: a, revision: main, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
        tokenizer_source: model:org/x
    """,
    "a frankenmerge": """
        slices:
          - sources: [{model: a, layer_range: [0, 24]}]
          - sources: [{model: a, layer_range: [8, 32]}]
        merge_method: passthrough
        dtype: bfloat16
        residual_weight: 0.1
    """,
    "a tokenizer with tokens": """
        merge_method: linear
        base_model: a
        models: [{model: a}, {model: {model: {path: b, revision: r}, lora: {path: l}}}]
        parameters: {weight: 1.0}
        tokenizer:
          source: union
          tokens: {"<|im_start|>": {source: a, force: true}, x: {source: {kind: zero}},
                   y: {source: {kind: model_token, model: a, token_id: 5}}}
          pad_to_multiple_of: 64
        chat_template: chatml
    """,
    "yaml anchors": """
        x-defaults: &p {weight: 0.5, density: 0.3}
        merge_method: dare_ties
        base_model: base
        models: [{model: a, parameters: *p}, {model: b, parameters: {<<: *p, weight: 0.7}}]
    """,
}


@pytest.mark.parametrize("text", REAL.values(), ids=REAL)
def test_recipes_as_people_write_them_are_accepted_by_both(text: str) -> None:
    MergeConfiguration.model_validate(yaml.safe_load(text))
    assert load_recipe(text, methods=THEIRS).slices


@pytest.mark.parametrize("seed", range(3))
def test_models_come_in_the_recipe_s_order_and_are_mergekit_s_set(seed: int) -> None:
    refs = [f"m{(seed * 7 + i * 5) % 11}" for i in range(6)]
    raw = {"merge_method": "linear", "base_model": refs[3], "models": [{"model": ref} for ref in refs]}
    ours = load_recipe(raw | {"parameters": {"weight": 1}}).references
    assert [str(ref) for ref in ours] == [refs[3], *refs[:3], *refs[4:]]
    assert {str(ref) for ref in MergeConfiguration.model_validate(raw).referenced_models()} == {
        str(ref) for ref in ours
    }


CONTRACTS = list(itertools.product(sorted(THEIRS), [None, "listed", "unlisted"], range(4), ["models", "slices"]))


def test_every_method_takes_the_same_numbers_of_models_and_the_same_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, base, count, form in CONTRACTS:
        refs = [f"m{i}" for i in range(count)] + (["base"] if base == "listed" else [])
        if not refs:
            continue
        sources = [{"model": ref, **({"layer_range": [0, LAYERS]} if form == "slices" else {})} for ref in refs]
        given = {p.name: 0.5 for p in THEIRS[method].parameters if p.default is REQUIRED}
        raw: dict[str, Any] = {"merge_method": method, "parameters": given}
        raw |= {"models": sources} if form == "models" else {"slices": [{"sources": sources}]}
        raw |= {"base_model": "base"} if base else {}
        try:
            Plan(raw, monkeypatch)
            theirs = True
        except ValueError:
            theirs = False
        try:
            load_recipe(raw, methods=THEIRS)
            ours = True
        except RecipeError:
            ours = False
        assert ours == theirs, (method, base, count, form)


@pytest.mark.parametrize("name", sorted(set(METHODS) & set(THEIRS)))
def test_our_table_has_mergekit_s_parameters_defaults_scopes_and_bases(name: str) -> None:
    ours, theirs = METHODS[name], THEIRS[name]
    # mergekit merges a base with nothing, which we refuse: it is always a mistake.
    least = max(theirs.min_sources, 1)
    assert (ours.base, ours.min_sources, ours.max_sources) == (theirs.base, least, theirs.max_sources)
    for parameter in theirs.parameters:
        found = ours.parameter(parameter.name)
        assert found is not None, parameter.name
        default = found.flags[parameter.default] if found.flags else parameter.default
        assert (found.scope, found.default) == (parameter.scope, default)


def test_the_place_of_a_layer_is_mergekit_s() -> None:
    for count in range(1, 9):
        theirs = [index / (count - 1) if count > 1 else 1 for index in range(count)]  # plan.py:295
        assert [layer_t(index, count) for index in range(count)] == theirs
