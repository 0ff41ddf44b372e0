"""The language, its faults, and the one shape that a planner gets."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from toys.merge import WEIGHT_SPACE

from paft_merge.errors import RecipeError
from paft_merge.methods import METHODS, REQUIRED, Method, Parameter
from paft_merge.recipe import (
    Located,
    ModelRef,
    Recipe,
    kind_of,
    layer_t,
    load_documents,
    load_recipe,
    load_yaml,
    resolve,
    resolve_all,
)

TIES = """\
merge_method: ties
base_model: org/base
models:
  - model: org/one
    parameters: {weight: 0.5, density: 0.2}
  - model: org/two
    parameters: {weight: 1e-1}
parameters: {density: 0.3}
"""


def faults(text: str | dict[str, Any], **options: Any) -> list[str]:
    """Every problem of a refused recipe, less the file's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(text, **options)
    shown = [f"{problem.code} {problem}".replace("<text>:", "") for problem in caught.value.problems]
    assert all("\n" not in line for line in shown)
    return shown


FEW = {name: METHODS[name] for name in ("ties", "linear", "slerp", "l1_ties")}
"""Few methods, so that a message which lists them stays what it is."""


def golden(file: str) -> list[Any]:
    """The blocks of a file: a recipe that begins with its title, `----`, and what is told about it."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    cases = []
    for block in text.split("====\n"):
        recipe, expected = block.split("----\n")
        cases.append(pytest.param(recipe, expected.splitlines(), id=recipe.splitlines()[0].lstrip("# ")))
    return cases


def values(recipe: Recipe, source: int, name: str = "w", t: float = 0.0) -> dict[str, Any]:
    found = resolve_all(recipe.slices[0].sources[source].levels, recipe.method, "source", name, t)
    return {key: one.value for key, one in found.items()}


def shared(recipe: Recipe, name: str = "w", t: float = 0.0, output: int = 0) -> dict[str, Any]:
    found = resolve_all(recipe.slices[output].levels, recipe.method, "shared", name, t)
    return {key: one.value for key, one in found.items()}


class TestLoading:
    def test_a_recipe_comes_from_a_file_text_data_or_a_part_of_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"
        file.write_text(TIES, encoding="utf-8")
        whole = load_yaml("merge:\n" + "".join(f"  {line}\n" for line in TIES.splitlines()))
        sources: list[Any] = [file, str(file), TIES, load_yaml(TIES).data, whole.sub("merge")]
        recipes = [load_recipe(source) for source in sources]
        assert all(recipe.language == recipes[0].language for recipe in recipes)
        assert recipes[0].text == TIES
        assert str(recipes[-1].slices[0].sources[1].spot) == "<text>:7: merge.models[1]"

    def test_importing_it_imports_neither_torch_nor_mergekit(self) -> None:
        heavy = ("torch", "mergekit", "transformers", "numpy")
        code = f"import sys, paft_merge.recipe; print([m for m in {heavy} if m in sys.modules])"
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        assert ran.stdout.strip() == "[]"

    def test_every_key_of_the_language_is_read(self) -> None:
        recipe = load_recipe(
            """
            merge_method: linear
            name: mine
            base_model: {model: {path: p@q, revision: r}, lora: l@s, override_architecture: A}
            slices:
              - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: ["1", 3.0], parameters: {weight: 2}}]
                base_model: a
                parameters: {normalize: false}
            parameters: {weight: 1}
            dtype: torch.float32
            out_dtype: bfloat16
            tokenizer:
              source: union
              tokens:
                <|a|>: {source: a, force: yes}
                b: {source: {kind: zero}}
                c: {source: {kind: model_token, model: b@x, token_id: 3}}
                d: {source: {kind: model_token, model: {model: b}, token: t}}
              pad_to_multiple_of: 8
            chat_template: chatml
            rounding: stochastic
            seed: 7
            arithmetic: mergekit
            """
        )
        assert (recipe.name, recipe.dtype, recipe.out_dtype) == ("mine", "float32", "bfloat16")
        assert (recipe.rounding, recipe.seed, recipe.arithmetic) == ("stochastic", 7, "mergekit")
        assert recipe.chat_template == "chatml"
        assert recipe.base_model == ModelRef("p@q", "r", "l", "s", "A")
        tokenizer = recipe.tokenizer
        assert tokenizer is not None
        assert (tokenizer.source, tokenizer.pad_to_multiple_of) == ("union", 8)
        assert {key: entry.force for key, entry in tokenizer.tokens.items()} == {
            "<|a|>": True,
            "b": False,
            "c": False,
            "d": False,
        }
        assert tokenizer.tokens["<|a|>"].source == ModelRef("a")
        assert tokenizer.tokens["c"].source.model == ModelRef("b", "x")
        assert [source.layers for source in recipe.slices[0].sources] == [(0, 2), (1, 3)]
        assert recipe.warnings == ()

    def test_our_keys_have_defaults(self) -> None:
        recipe = load_recipe(TIES)
        assert (recipe.rounding, recipe.seed, recipe.arithmetic, recipe.name) == ("nearest", 0, "float32", None)
        assert (recipe.dtype, recipe.out_dtype, recipe.tokenizer, recipe.chat_template) == (None, None, None, None)

    @pytest.mark.parametrize(
        ("line", "source"),
        [
            ("tokenizer: {}", "union"),
            ("tokenizer_source: base", "base"),
            ("tokenizer_source: model:org/x", ModelRef("org/x")),
        ],
    )
    def test_both_forms_of_the_tokenizer_are_one(self, line: str, source: Any) -> None:
        tokenizer = load_recipe(TIES + line).tokenizer
        assert tokenizer is not None
        assert tokenizer.source == source

    def test_nothing_of_a_recipe_can_be_changed(self) -> None:
        recipe = load_recipe(TIES + "tokenizer: {tokens: {a: {source: b}}}")
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.warnings = ()  # type: ignore[misc]
        with pytest.raises(ValueError, match="frozen"):
            recipe.language.seed = 1  # type: ignore[misc]
        for mapping in (recipe.language.parameters, recipe.tokenizer.tokens):  # type: ignore[union-attr]
            with pytest.raises(TypeError):
                mapping["x"] = 1  # type: ignore[index]

    def test_models_are_told_once_the_base_first_then_in_order(self) -> None:
        recipe = load_recipe(TIES)
        assert [str(ref) for ref in recipe.references] == ["org/base", "org/one", "org/two"]

    def test_documents_of_one_file_load_one_by_one(self) -> None:
        first, second = load_documents(f"name: one\n{TIES}---\n{TIES.replace('org/one', 'one')}")
        assert load_recipe(first).name == "one"
        assert load_recipe(second).slices[0].sources[0].ref == ModelRef("one")

    @pytest.mark.parametrize("method", ["tsv", "iso_c"])
    def test_a_method_of_the_core_space_is_refused_outside_it(self, method: str) -> None:
        with pytest.raises(RecipeError, match=r"merges adapters in their core space.*add space: core") as refusal:
            load_recipe({"merge_method": method, "base_model": "m0", "models": [{"model": "m0+a"}]})
        assert len(refusal.value.problems) == 1

    @pytest.mark.parametrize("method", WEIGHT_SPACE)
    def test_every_method_loads_with_its_required_parameters(self, method: str) -> None:
        given = {p.name: 0.5 for p in METHODS[method].parameters if p.default is REQUIRED}
        count = METHODS[method].min_sources + (METHODS[method].base != "ignored")
        recipe = load_recipe(
            {
                "merge_method": method,
                "base_model": "m0",
                "models": [{"model": f"m{i}"} for i in range(count)],
                "parameters": given,
            }
        )
        assert recipe.method is METHODS[method]
        assert recipe.warnings == ()

    def test_numbers_with_exponents_stay_text_where_text_is_meant(self) -> None:
        recipe = load_recipe(TIES.replace("org/one", "{model: {path: 1e5, revision: 12e4}}") + "name: 1e-4\n")
        assert recipe.slices[0].sources[0].ref == ModelRef("1e5", "12e4")
        assert recipe.name == "1e-4"
        assert load_recipe(TIES.replace("org/one", "1e5")).slices[0].sources[0].ref == ModelRef("1e5")
        filtered = load_recipe(TIES.replace("{density: 0.3}", "{density: {value: 0.3, filter: 1e5}}"))
        assert [values(filtered, 1, name)["density"] for name in ("x1e5x", "x")] == [0.3, 1.0]

    def test_a_resolved_recipe_is_plain_data_with_our_defaults(self) -> None:
        assert load_recipe(TIES).resolved() == {
            "merge_method": "ties",
            "base_model": "org/base",
            "models": [
                {"model": "org/one", "parameters": {"weight": 0.5, "density": 0.2}},
                {"model": "org/two", "parameters": {"weight": 0.1}},
            ],
            "parameters": {"density": 0.3},
            "rounding": "nearest",
            "seed": 0,
            "arithmetic": "float32",
        }


class TestReferences:
    @pytest.mark.parametrize(
        ("text", "ref"),
        [
            ("org/x", ModelRef("org/x")),
            ("org/x@main", ModelRef("org/x", "main")),
            ("org/x+lora", ModelRef("org/x", None, "lora")),
            ("org/x@v1+org/l@v2", ModelRef("org/x", "v1", "org/l", "v2")),
            ("model:org/x", ModelRef("org/x")),
            ("C:\\My Models\\a", ModelRef("C:\\My Models\\a")),
        ],
    )
    def test_the_string_form(self, text: str, ref: ModelRef) -> None:
        assert ModelRef.parse(text) == ref
        assert str(ref) == text.removeprefix("model:")

    @pytest.mark.parametrize(
        ("form", "ref"),
        [
            ({"model": "a@r"}, ModelRef("a", "r")),
            ({"model": {"path": "a+b@c"}, "lora": {"path": "l", "revision": "r"}}, ModelRef("a+b@c", None, "l", "r")),
            ({"model": "a", "lora": None, "override_architecture": "X"}, ModelRef("a", override_architecture="X")),
            ({"model": "a", "label": "sft"}, ModelRef("a", label="sft")),
        ],
    )
    def test_the_object_form(self, form: Any, ref: ModelRef) -> None:
        assert ModelRef.parse(form) == ref

    def test_a_reference_is_hashable_and_spelling_makes_its_identity(self) -> None:
        assert (
            len({ModelRef.parse("a"), ModelRef.parse({"model": "a"}), ModelRef.parse("./a"), ModelRef.parse("a@main")})
            == 3
        )

    def test_a_label_tells_no_models_apart_and_is_what_drops_go_by(self) -> None:
        plain, labelled = ModelRef.parse("a+l"), ModelRef.parse({"model": "a", "lora": "l", "label": "sft"})
        assert len({plain, labelled}) == 1
        assert (plain.stream, labelled.stream) == ("a+l", "sft")
        assert ModelRef.parse(labelled.written()).stream == "sft"
        assert ModelRef.parse(labelled).stream == "sft"
        assert str(labelled) == "a+l"

    @pytest.mark.parametrize(("one", "other"), [("x", "x"), ("x", None)])
    def test_two_sources_with_one_label_are_refused(self, one: str, other: str | None) -> None:
        second = {"model": "y", "label": other} if other else "x"
        models = [{"model": {"model": "z", "label": one}}, {"model": second}]
        with pytest.raises(
            RecipeError, match=r"models\[1\]: .* has the label x of z, so both would drop the same entries"
        ):
            load_recipe(
                {"merge_method": "dare_linear", "base_model": "b", "parameters": {"weight": 1}, "models": models}
            )

    def test_the_base_of_a_reference_is_without_its_adapter(self) -> None:
        assert ModelRef.parse("a@r+l@s").base == ModelRef("a", "r")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("a + b", "blanks around '+' in 'a + b'; write BASE+ADAPTER"),
            ("a@b@c", "more than one '@' in 'a@b@c'; write {path: ..., revision: ...}"),
            ("", "a model reference with an empty path or revision; write PATH or PATH@REVISION"),
            ("a@", "a model reference with an empty path or revision; write PATH or PATH@REVISION"),
            ("a+", "a model reference with an empty path or revision; write PATH or PATH@REVISION"),
            (3, "must name a model, got 3; write PATH or PATH@REVISION"),
            (None, "must name a model, got nothing; write PATH or PATH@REVISION"),
            ({"path": "a"}, "a model reference needs the key model; write {model: {path: ..., revision: ...}}"),
            ({"model": "a", "lorra": "b"}, "lorra: unknown key; did you mean 'lora'?"),
        ],
    )
    def test_what_names_no_model_is_refused(self, value: Any, message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            ModelRef.parse(value)
        assert str(caught.value) == message

    @given(
        st.builds(
            ModelRef,
            st.text("ab/@+:. ", min_size=1),
            st.none() | st.text("a@+", min_size=1),
            st.none() | st.text("l@+", min_size=1),
            st.none(),
            st.none() | st.just("X"),
            st.none() | st.text("a@+", min_size=1),
        )
    )
    @example(ModelRef("model:a"))
    @example(ModelRef(" ", None, "l"))
    def test_what_is_written_parses_back(self, ref: ModelRef) -> None:
        for again in (ModelRef.parse(ref.written()), ModelRef.parse(ref)):
            assert again == ref
            assert again.label == ref.label


class TestShape:
    def test_models_are_one_slice_over_all_layers_with_the_base_added_last(self) -> None:
        recipe = load_recipe(TIES)
        (module,) = recipe.modules
        (output,) = module.slices
        assert module.name is None
        assert output.base == ModelRef("org/base")
        assert [(str(s.ref), s.layers, s.implicit) for s in output.sources] == [
            ("org/one", None, False), ("org/two", None, False), ("org/base", None, True),
        ]  # fmt: skip
        assert [level.kind for level in output.sources[0].levels] == ["source", "recipe"]
        assert [level.kind for level in output.sources[2].levels] == ["recipe"]
        assert [str(s.spot) for s in output.sources] == [
            "<text>:4: models[0]", "<text>:6: models[1]", "<text>:2: base_model",
        ]  # fmt: skip

    def test_a_listed_base_is_not_added_again(self) -> None:
        recipe = load_recipe(
            TIES + "" + "  # nothing\n" if False else TIES.replace("models:\n", "models:\n  - model: org/base\n")
        )
        assert [(str(s.ref), s.implicit) for s in recipe.slices[0].sources] == [
            ("org/base", False), ("org/one", False), ("org/two", False),
        ]  # fmt: skip

    def test_slices_keep_their_order_ranges_bases_and_levels(self) -> None:
        recipe = load_recipe(
            """
            merge_method: slerp
            base_model: a
            slices:
              - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
                parameters: {t: 0.25}
              - sources: [{model: b, layer_range: [2, 6]}, {model: a, layer_range: [3, 7]}]
                base_model: b
            parameters: {t: 0.75}
            """
        )
        (module,) = recipe.modules
        assert [(str(o.base), [(str(s.ref), s.layers) for s in o.sources]) for o in module.slices] == [
            ("a", [("a", (0, 4)), ("b", (0, 4))]), ("b", [("b", (2, 6)), ("a", (3, 7))]),
        ]  # fmt: skip
        assert [shared(recipe, output=i)["t"] for i in (0, 1)] == [0.25, 0.75]

    def test_modules_have_names_and_a_level_between_slice_and_recipe(self) -> None:
        recipe = load_recipe(
            """
            merge_method: linear
            base_model: a
            modules:
              text:
                slices:
                  - sources: [{model: a, layer_range: [0, 4], parameters: {weight: 1}}, {model: b, layer_range: [0, 4]}]
                    parameters: {weight: 2}
                parameters: {weight: 3, normalize: false}
              vision:
                models: [{model: a}, {model: b, parameters: {weight: 5}}]
            parameters: {weight: 4}
            """
        )
        text, vision = recipe.modules
        assert (text.name, vision.name) == ("text", "vision")
        assert [level.kind for level in text.slices[0].sources[0].levels] == ["source", "slice", "module", "recipe"]
        assert [level.kind for level in text.slices[0].levels] == ["slice", "module", "recipe"]
        assert [values(recipe, i)["weight"] for i in (0, 1)] == [1.0, 2.0]
        assert [s.layers for s in vision.slices[0].sources] == [None, None]
        weights = [
            resolve_all(s.levels, recipe.method, "source", "w")["weight"].value for s in vision.slices[0].sources
        ]
        assert weights == [4.0, 5.0]

    def test_a_base_that_a_module_does_not_list_is_added_to_its_models(self) -> None:
        recipe = load_recipe(
            {
                "merge_method": "ties",
                "base_model": "a",
                "modules": {"text": {"models": [{"model": "b"}]}},
                "parameters": {"weight": 1},
            }
        )
        assert [(str(s.ref), s.implicit) for s in recipe.slices[0].sources] == [("b", False), ("a", True)]


class TestSettings:
    def test_the_most_specific_level_wins_and_says_so(self) -> None:
        recipe = load_recipe(TIES)
        one, two, _ = recipe.slices[0].sources
        first = resolve_all(one.levels, recipe.method, "source", "w")["density"]
        second = resolve_all(two.levels, recipe.method, "source", "w")["density"]
        assert (first.value, str(first.origin)) == (0.2, "source: <text>:5: models[0].parameters.density")
        assert (second.value, str(second.origin)) == (0.3, "recipe: <text>:8: parameters.density")
        normalize = resolve_all(recipe.slices[0].levels, recipe.method, "shared", "w")["normalize"]
        assert (normalize.value, str(normalize.origin), normalize.origin.level) == ("weights", "default", "default")

    def test_the_origin_is_the_line_of_the_condition_in_force(self) -> None:
        conditional = load_recipe(
            TIES.replace("{density: 0.3}", "\n  density:\n    - filter: mlp\n      value: 0.5\n    - value: [0.1, 0.9]")
        )
        levels = conditional.slices[0].sources[1].levels
        mlp = resolve_all(levels, conditional.method, "source", "layers.0.mlp.up", 0.5)["density"]
        other = resolve_all(levels, conditional.method, "source", "layers.0.attn.q", 0.5)["density"]
        assert (mlp.value, str(mlp.origin)) == (0.5, "recipe: <text>:10: parameters.density[0]")
        assert (other.value, str(other.origin)) == (0.5, "recipe: <text>:12: parameters.density[1]")
        assert resolve_all(levels, conditional.method, "source", "attn", 0.25)["density"].value == pytest.approx(0.3)

    @pytest.mark.parametrize(
        ("setting", "name", "t", "value"),
        [
            ("[0, 1]", "w", 0.5, 0.5),
            ("[0, 0.5, 1]", "w", 0.25, 0.25),
            ("[0.25]", "w", 1.0, 0.25),
            ("[0, 1]", "w", 1.0, 1.0),
            ("'1e-1'", "w", 0.0, 0.1),
            ("{value: 0.5, filter: mlp}", "x.mlp.y", 0.0, 0.5),
            ("{value: 0.5, filter: mlp}", "x.attn.y", 0.0, 1.0),
            ("{value: 0.5, filter: '*'}", "x.attn.y", 0.0, 0.5),
            ("{value: 0.5}", "", 0.0, 0.5),
            ("[{value: 0.5, filter: mlp}, {value: [0, 1]}]", "attn", 0.75, 0.75),
            ("[]", "w", 0.0, 1.0),
            ("[{value: []}, {value: 0.5}]", "w", 0.0, 1.0),
        ],
    )
    def test_gradients_filters_and_empty_settings(self, setting: str, name: str, t: float, value: float) -> None:
        recipe = load_recipe(TIES.replace(", density: 0.2", "").replace("{density: 0.3}", f"{{density: {setting}}}"))
        assert values(recipe, 0, name, t)["density"] == pytest.approx(value)

    def test_what_a_condition_leaves_out_falls_through_to_the_next_level(self) -> None:
        recipe = load_recipe(TIES.replace("density: 0.2", "density: {value: 0.9, filter: mlp}"))
        assert [values(recipe, 0, name)["density"] for name in ("mlp", "attn")] == [0.9, 0.3]

    def test_bools_and_words_step_and_do_not_interpolate(self) -> None:
        stepping = load_recipe(TIES.replace("{density: 0.3}", "{rescale: [no, yes], elect: [weighted, count, none]}"))
        assert [shared(stepping, t=t)["rescale"] for t in (0.0, 0.99, 1.0)] == ["none", "none", "l1"]
        assert [shared(stepping, t=t)["elect"] for t in (0.0, 0.5, 0.99, 1.0)] == ["weighted", "count", "count", "none"]

    @pytest.mark.parametrize(
        ("written", "value"),
        [
            ("true", "weights"),
            ("1.0", "weights"),
            ("off", "none"),
            ("'false'", "none"),
            ("count", "count"),
            ("[0, 1]", "none"),
        ],
    )
    def test_a_flag_of_mergekit_is_a_word_here(self, written: str, value: str) -> None:
        assert shared(load_recipe(TIES.replace("{density: 0.3}", f"{{normalize: {written}}}")))["normalize"] == value

    def test_the_place_of_a_layer_on_a_gradient(self) -> None:
        assert [layer_t(i, 5) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert layer_t(0, 1) == 1.0

    def test_a_required_parameter_that_filters_leave_out_is_missing_for_that_tensor(self) -> None:
        recipe = load_recipe(TIES.replace("weight: 0.5", "weight: {value: 1, filter: mlp}"))
        source = recipe.slices[0].sources[0]
        assert values(recipe, 0, "mlp")["weight"] == 1.0
        with pytest.raises(RecipeError) as caught:
            resolve_all(source.levels, recipe.method, "source", "attn.q", model=source.ref)
        assert str(caught.value) == (
            "<text>:5: models[0].parameters: Missing required parameter weight for org/one.attn.q; "
            "no filter of <text>:5: models[0].parameters.weight matches; add a last `- value: ...` without a filter"
        )

    def test_a_required_parameter_that_nothing_gives_is_missing(self) -> None:
        with pytest.raises(RecipeError) as caught:
            resolve((), Parameter("t", float, "shared", REQUIRED, ""), "w")
        assert (
            str(caught.value)
            == "Missing required parameter t for w; write it under parameters, of this model or at the top"
        )

    def test_an_interpolated_whole_number_must_be_whole(self) -> None:
        method = Method("m", "M", "", (Parameter("steps", int, "shared", 1, ""),), "ignored", rule=None)  # type: ignore[arg-type]
        recipe = load_recipe(
            "merge_method: m\nmodels: [{model: a}]\nparameters: {steps: [1, 2]}", methods={"m": method}
        )
        assert [shared(recipe, t=t)["steps"] for t in (0.0, 1.0)] == [1, 2]
        with pytest.raises(RecipeError) as caught:
            shared(recipe, t=0.5)
        assert str(caught.value) == (
            "<text>:3: parameters.steps: must be a whole number, and the gradient gives 1.5 here; "
            "write one value, or conditions with filters"
        )


L1 = """\
merge_method: l1_ties
base_model: b
models:
  - model: x
    parameters: {}
  - model: y
parameters: {weight: 1}
"""


class TestTrim:
    def test_trim_says_the_same_as_the_parameter_and_keeps_its_line(self) -> None:
        recipe = load_recipe(L1.replace("parameters: {}", "parameters:\n      trim:\n        density: [0.1, 0.2]"))
        found = resolve_all(recipe.slices[0].sources[0].levels, recipe.method, "source", "w", 1.0)
        assert (found["density"].value, str(found["density"].origin)) == (
            0.2, "source: <text>:7: models[0].parameters.trim.density",
        )  # fmt: skip
        assert (found["l1_mass"].value, found["epsilon"].value) == (0.95, None)

    def test_the_most_specific_way_to_trim_hides_the_others(self) -> None:
        text = L1.replace("parameters: {}", "parameters: {trim: {l1_mass: 0.8}}").replace(
            "{weight: 1}", "{weight: 1, trim: {epsilon: 1e-5}}"
        )
        recipe = load_recipe(text)
        ways = ("density", "l1_mass", "epsilon")
        assert [values(recipe, 0)[way] for way in ways] == [None, 0.8, None]
        assert [values(recipe, 1)[way] for way in ways] == [None, 0.95, 1e-5]

    def test_a_way_to_trim_that_its_filter_leaves_out_hides_nothing(self) -> None:
        text = L1.replace("parameters: {}", "parameters: {trim: {l1_mass: {value: 0.8, filter: mlp}}}")
        recipe = load_recipe(text.replace("{weight: 1}", "{weight: 1, trim: {epsilon: 1e-5}}"))
        assert [values(recipe, 0, name)["epsilon"] for name in ("mlp", "attn")] == [None, 1e-5]

    def test_ways_to_trim_may_share_a_level_when_they_never_meet(self) -> None:
        inner = "{density: {value: 0.2, filter: mlp}, l1_mass: {value: 0.8, filter: attn}}"
        recipe = load_recipe(L1.replace("parameters: {}", f"parameters: {inner}"))
        assert [values(recipe, 0, name)["density"] for name in ("mlp", "attn")] == [0.2, None]
        with pytest.raises(RecipeError) as caught:
            values(recipe, 0, "mlp.attn")
        assert str(caught.value) == (
            "<text>:5: models[0].parameters.density: density and models[0].parameters.l1_mass both apply to mlp.attn; "
            "keep one of density, l1_mass, epsilon at a level"
        )

    def test_epsilon_and_density_are_no_rivals_where_a_method_has_no_choice(self) -> None:
        parameters = (
            Parameter("density", float, "source", 1.0, ""), Parameter("epsilon", float, "source", 0.15, ""),
        )  # fmt: skip
        method = Method("della", "D", "", parameters, "ignored", rule=lambda *_: None)  # type: ignore[arg-type,return-value]
        text = "merge_method: della\nmodels: [{model: a}]\nparameters: {density: 0.5, epsilon: 0.1}"
        assert values(load_recipe(text, methods={"della": method}), 0) == {"density": 0.5, "epsilon": 0.1}


class TestRefusals:
    @pytest.mark.parametrize(("recipe", "expected"), golden("recipe_faults.txt"))
    def test_a_faulty_recipe_is_refused_with_every_fault_and_its_line(self, recipe: str, expected: list[str]) -> None:
        assert faults(recipe, methods=FEW) == expected

    @pytest.mark.parametrize("key", ["adapters: {sft: {}}", "merge: {}", "evaluate: {}\nbase_model: b"])
    def test_a_recipe_for_another_command_is_one_error_that_names_the_command(self, key: str) -> None:
        (line,) = faults(f"seeds: [0]\n{key}")
        assert line.startswith("RECIPE 1: this is a recipe for paft run, not a merge recipe; use paft run")

    def test_the_kind_of_a_recipe_is_known_by_its_keys(self) -> None:
        assert kind_of({"merge_methd": "ties", "models": []}) == "merge"
        assert kind_of({"base_model": "b", "adapters": {}}) == "run"
        assert kind_of({"models": [], "adapters": {}}) is kind_of({"base_model": "b"}) is kind_of([]) is None

    def test_an_empty_recipe_is_refused(self) -> None:
        assert faults("") == ["RECIPE 1: the recipe is empty; begin with merge_method: ..."]

    def test_faults_name_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "bad.yaml"
        file.write_text(TIES + "dtype: floaty\n", encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load_recipe(file)
        assert str(caught.value) == f"{file}:9: dtype: unknown dtype 'floaty'; did you mean 'float64'?"

    def test_faults_of_data_have_a_path_only(self) -> None:
        data = load_yaml(TIES).data | {"dtype": 3}
        assert faults(data) == ["RECIPE dtype: unknown dtype 3; use one of bfloat16, float16, float32, float64"]

    def test_an_unlisted_base_counts_where_a_method_takes_it_for_a_model(self) -> None:
        method = Method("passthrough", "P", "", (), "ignored", rule=None, max_sources=1)  # type: ignore[arg-type]
        text = "merge_method: passthrough\nbase_model: b\nmodels: [{model: x}]\n"
        assert faults(text, methods={"passthrough": method}) == [
            "RECIPE 3: models: passthrough takes exactly 1 source, got 2 "
            "with the base_model, which is not listed and counts as one"
        ]

    def test_a_number_too_large_for_its_type_is_refused(self) -> None:
        (found,) = faults(TIES.replace("1e-1", "1" + "0" * 400))
        assert found.startswith("RECIPE 7: models[1].parameters.weight: must be ")


class TestWarnings:
    @pytest.mark.parametrize(("recipe", "expected"), golden("recipe_warnings.txt"))
    def test_what_has_no_effect_is_told_with_its_line(self, recipe: str, expected: list[str]) -> None:
        found = load_recipe(recipe, methods=FEW).warnings
        assert [f"{problem.code} {problem}".replace("<text>:", "") for problem in found] == expected

    @pytest.mark.parametrize(("recipe", "expected"), golden("recipe_warnings.txt"))
    def test_strict_makes_every_warning_an_error(self, recipe: str, expected: list[str]) -> None:
        if expected:
            assert faults(recipe, methods=FEW, strict=True) == [
                line.replace(", so it is ignored", "") for line in expected
            ]
        else:
            load_recipe(recipe, methods=FEW, strict=True)


_KEYS = [
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "tokenizer", "tokenizer_source",
    "chat_template", "model", "lora", "path", "revision", "sources", "layer_range", "weight", "density", "trim",
    "l1_mass", "normalize", "value", "filter", "t", "tokens", "source", "kind", "seed", "rounding", "x",
]  # fmt: skip
_WORDS = [
    "a",
    "b",
    "a+b",
    "a@x",
    "ties",
    "linear",
    "l1_ties",
    "slerp",
    "zero",
    "model_token",
    "union",
    "none",
    "1e-3",
    "",
    "*",
]
_SCALARS = st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.sampled_from(_WORDS) | st.just(10**400)
_JUNK = st.recursive(
    _SCALARS, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), c, max_size=4), max_leaves=15
)
_NUMBER = st.floats(0, 1) | st.sampled_from([0, 1, "1e-1", "0.5"])
_VALUE = _NUMBER | st.lists(_NUMBER, max_size=3)
_CONDITION = st.fixed_dictionaries({"value": _VALUE}, optional={"filter": st.sampled_from(["n", "mlp", "*"])})
_PARAMETERS = st.dictionaries(
    st.sampled_from(["weight", "density", "bogus"]),
    _VALUE | _CONDITION | st.lists(_CONDITION, min_size=1, max_size=3),
    max_size=3,
)


def _entries(**more: Any) -> st.SearchStrategy[Any]:
    refs = st.lists(st.sampled_from(["a", "b@x", "c+l", "d@r+l@q"]), unique=True, min_size=1, max_size=3)
    one = st.lists(_PARAMETERS, min_size=3, max_size=3)
    return st.builds(
        lambda r, p: [{"model": m, "parameters": q, **more} for m, q in zip(r, p, strict=False)], refs, one
    )


_SLICES = st.lists(
    st.fixed_dictionaries({"sources": _entries(layer_range=[0, 2])}, optional={"parameters": _PARAMETERS}),
    min_size=1,
    max_size=2,
)
_MODULE = st.fixed_dictionaries({"slices": _SLICES}, optional={"parameters": _PARAMETERS}) | st.fixed_dictionaries(
    {"models": _entries()}
)
_FORM = st.one_of(
    st.fixed_dictionaries({"models": _entries()}),
    st.fixed_dictionaries({"slices": _SLICES}),
    st.fixed_dictionaries({"modules": st.dictionaries(st.sampled_from(["m", "n"]), _MODULE, min_size=1)}),
)
_TOP = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["linear", "ties", "l1_ties"]), "parameters": st.just({"weight": 1})},
    optional={
        "base_model": st.just("a"),
        "dtype": st.sampled_from(["torch.float16", "float32"]),
        "tokenizer": st.sampled_from(
            [{}, {"source": {"model": {"path": "q@+"}, "lora": "p"}, "tokens": {"<x>": {"source": "a"}}}]
        ),
        "zzz": _JUNK,
    },
)


class TestLaws:
    @given(st.builds(lambda top, form: top | form, _TOP, _FORM))
    def test_what_a_recipe_resolves_to_loads_as_the_same(self, data: dict[str, Any]) -> None:
        with contextlib.suppress(RecipeError):
            recipe = load_recipe(data)
            again = load_recipe(recipe.resolved())
            assert again.language == recipe.language
            assert load_recipe(recipe.text).language == recipe.language
            assert [len(s.sources) for s in again.slices] == [len(s.sources) for s in recipe.slices]

    @given(st.dictionaries(st.sampled_from(_KEYS), _JUNK, max_size=6), _TOP)
    def test_any_data_is_a_recipe_or_told_what_is_wrong(self, junk: dict[str, Any], top: dict[str, Any]) -> None:
        for data in (junk, top | junk):
            with contextlib.suppress(RecipeError):
                assert load_recipe(Located.of(data)).slices
