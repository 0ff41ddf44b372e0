"""YAML as plain data that knows its lines, and what a hostile or hasty file gets for an answer."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paft_merge.errors import RecipeError
from paft_merge.recipe import Located, did_you_mean, dotted, dump_yaml, load_documents, load_yaml, show


def refusal(source: Path | str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_yaml(source)
    (problem,) = caught.value.problems
    assert problem.code == "RECIPE"
    assert "\n" not in str(problem)
    return str(problem)


def data_of(text: str) -> Any:
    return load_yaml(text).data


def test_every_key_and_item_knows_its_line() -> None:
    located = load_yaml("# a comment\na: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n")
    ways = [("a",), ("b",), ("b", 0), ("b", 1), ("b", 1, "c"), ("b", 1, "d")]
    assert [located.line(way) for way in ways] == [2, 3, 4, 5, 5, 6]


def test_the_line_of_what_is_absent_is_that_of_what_is_around_it() -> None:
    located = load_yaml("a: 1\nb:\n  - x\n")
    assert (located.line(("b", 0, "nothing")), located.line(("b", 7)), located.line(("zzz",))) == (3, 2, 1)


def test_a_spot_reads_as_file_line_and_path(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("models:\n  - model: a\n", encoding="utf-8")
    assert str(load_yaml(file).spot(("models", 0, "model"))) == f"{file}:2: models[0].model"
    assert str(load_yaml(str(file)).spot()) == f"{file}:1"
    assert str(load_yaml("a: 1").spot(("a",))) == "<text>:1: a"


def test_data_made_in_python_has_paths_but_no_lines() -> None:
    located = Located.of({"a": [{"b": 1}]})
    assert located.line(("a",)) is None
    assert str(located.spot(("a", 0, "b"))) == "a[0].b"


def test_data_made_in_python_is_copied() -> None:
    data = {"a": [1], "folder": Path("x") / "y"}
    located = Located.of(data)
    data["a"].append(2)  # type: ignore[attr-defined]
    assert located.data == {"a": [1], "folder": str(Path("x") / "y")}


def test_a_part_of_a_file_still_knows_its_lines_and_its_path() -> None:
    part = load_yaml("adapters: {}\nmerge:\n  merge_method: ties\n").sub("merge")
    assert part.data == {"merge_method": "ties"}
    assert str(part.spot(("merge_method",))) == "<text>:3: merge.merge_method"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-1.5e3", -1500.0), (".5e2", 50.0), ("1_0e1", 100.0), ("+1e+2", 100.0),
        ("1.0e-10", 1e-10), ("! 1e-4", 1e-4), ("!!float 1e-4", 1e-4), ("1e", "1e"), ("e5", "e5"), ("1e-", "1e-"),
        ("v1e5", "v1e5"), ("'1e-4'", "1e-4"), ("!!str 1e-4", "1e-4"),
    ],
)  # fmt: skip
def test_a_number_with_an_exponent_is_a_float_with_or_without_a_point(text: str, value: Any) -> None:
    found = data_of(f"a: {text}\n")["a"]
    assert found == value
    assert type(found) is type(value)


def test_bools_are_those_of_yaml_1_1_as_in_mergekit() -> None:
    assert data_of("a: [yes, no, on, off, True, FALSE]\n") == {"a": [True, False, True, False, True, False]}


def test_a_key_is_always_its_text() -> None:
    assert list(data_of("on: 1\n12: 2\nnull: 3\n1e-4: 4\n")) == ["on", "12", "null", "1e-4"]


def test_a_date_is_text() -> None:
    assert data_of("revision: 2024-01-01\n") == {"revision": "2024-01-01"}


@pytest.mark.parametrize(("text", "value"), [("012", 10), ("1:30", 90), ("1:30.5", 90.5)])
def test_octal_and_base_60_numbers_are_read_as_mergekit_does_and_told(text: str, value: float) -> None:
    located = load_yaml(f"a: 1\nb: {text}\n")
    assert located.data["b"] == value
    (warning,) = located.warnings
    assert (warning.code, str(warning)) == (
        "NUMBER", f"<text>:2: b: {text} is {value} in YAML 1.1; write {value}, or quote it if it is text",
    )  # fmt: skip


def test_text_that_only_looks_odd_is_not_warned_of() -> None:
    assert load_yaml("a: [0, 10, 0x10, 'C:/x', org/x:1, 0.5, '012']\n").warnings == ()


def test_aliases_and_merge_keys_work_as_in_pyyaml() -> None:
    text = "x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 4}\nz: {<<: [*x, *y], c: 5}\nw: *x\nv: {<<: *y}\n"
    assert data_of(text) == yaml.safe_load(text)


def test_what_an_alias_stands_for_has_the_line_where_it_is_written() -> None:
    located = load_yaml("x: &x\n  a: 1\ny:\n  <<: *x\nz: *x\n")
    assert [located.line(("y", "a")), located.line(("z", "a")), located.line(("z",))] == [2, 2, 5]


_PLAIN = "a recipe holds plain data; remove the tag"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (
            "a: !!python/object/apply:os.system [ls]",
            "1:4",
            f"the tag !!python/object/apply:os.system is not allowed; {_PLAIN}",
        ),
        ("a: !!python/name:os.system ''", "1:4", f"the tag !!python/name:os.system is not allowed; {_PLAIN}"),
        ("a: !!binary aGk=", "1:4", f"the tag !!binary is not allowed; {_PLAIN}"),
        ("a: !!set {x}", "1:4", f"the tag !!set is not allowed; {_PLAIN}"),
        ("a: !mine x", "1:4", f"the tag !mine is not allowed; {_PLAIN}"),
        ("a: !!int abc", "1:4", "'abc' cannot be read as int; quote text, or write a plain number"),
        ("a: 1\nb:\n  a: 2\n  a: 3", "4:3", "the key 'a' is already on line 3; keep one of the two"),
        ("a: 1\nyes: 2\n'yes': 3", "3:1", "the key 'yes' is already on line 2; keep one of the two"),
        ("a: &x [*x]", "1:4", "an alias refers to a value that contains it; write the value out"),
        ("a: &x\n  <<: *x", "1:4", "an alias refers to a value that contains it; write the value out"),
        ("c: {<<: 3}", "1:9", "'<<' merges a mapping or a list of mappings; name one by its alias: '<<: *name'"),
        ("? [a]\n: 1", "1:3", "a key must be text; quote it"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused_with_its_line_and_column(text: str, place: str, message: str) -> None:
    assert refusal(text + "\n") == f"<text>:{place}: {message}"


@pytest.mark.parametrize(
    ("text", "place", "what", "fix"),
    [
        ("a:\n  b: 1\n\tc: 2", "3:1", "found character '\\t' that cannot start any token", "indent with spaces"),
        ("a: %x", "1:4", "found character '%' that cannot start any token", "quote the text"),
        (
            "a: b: c",
            "1:5",
            "mapping values are not allowed",
            "quote text that contains ': ', and check the indentation",
        ),
        ("a: *\nb: 1", "1:5", "expected alphabetic or numeric character", "quote a '*' that is meant as text"),
        ("a: *x", "1:4", "found undefined alias 'x'", "define it with '&' above, or quote the '*'"),
        ("a: &x 1\nb: &x 2", "2:4", "found duplicate anchor 'x'", "give every anchor its own name"),
        ("a: [1, 2\nb: 3", "2:2", "expected ',' or ']', but got ':'", "check the brackets and commas"),
        ("a: 'x", "2:1", "found unexpected end of stream", "close the quote"),
        ("a: 1\n- b", "2:1", "expected <block end>, but found '-'", "check the indentation"),
        ("{a: 1}}", "1:7", "expected '<document start>', but found '}'", "check the brackets and the indentation"),
    ],
)
def test_what_is_not_yaml_is_refused_with_a_way_to_mend_it(text: str, place: str, what: str, fix: str) -> None:
    message = refusal(text + "\n")
    assert message.startswith(f"<text>:{place}: not YAML: ")
    assert what in message
    assert message.endswith(f"; {fix}")


def test_a_control_character_is_refused_with_its_line() -> None:
    assert refusal("a: 1\nb: \x1b[31m\n") == "<text>:2: a control character is not allowed; is this a recipe?"


@pytest.mark.parametrize(
    "text", ["[" * 5000, "{a: " * 5000, "a: " + "[" * 70, "\n".join(" " * i + "a:" for i in range(3000))]
)
def test_deep_nesting_is_refused_and_does_not_exhaust_the_stack(text: str) -> None:
    assert "nested deeper than 64 levels; a recipe needs about ten" in refusal(text + "\n")


def test_nesting_through_aliases_is_bounded_too() -> None:
    text = "a: &a0 " + "[" * 30 + "]" * 30 + "\n"
    text += "".join(f"b{i}: &a{i} " + "[" * 30 + f"*a{i - 1}" + "]" * 30 + "\n" for i in range(1, 4))
    assert "nested deeper than 64 levels" in refusal(text)


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}"])
def test_an_alias_bomb_is_refused(link: str) -> None:
    first = "x0: &x0 " + ("{k: v}" if "<<" in link else "[v, v]") + "\n"
    bomb = first + "".join(f"x{i}: &x{i} {link.format(', '.join([f'*x{i - 1}'] * 10))}\n" for i in range(1, 12))
    assert "aliases expand to more than 100,000 values; write them out, or use fewer" in refusal(bomb)


def test_a_large_file_without_aliases_is_read() -> None:
    text = "a:\n" + "  - {value: 0.5, filter: x}\n" * 3_000
    assert len(data_of(text)["a"]) == 3_000


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a: 1\n\xff\xfe\x00")
    assert refusal(weights) == f"{weights}:2: not UTF-8 text; is this a recipe?"
    assert refusal(tmp_path) == f"{tmp_path}: is not a regular file; name an existing YAML file"
    assert refusal(str(tmp_path / "no.yaml")) == (f"{tmp_path / 'no.yaml'}: no such file; name an existing YAML file")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * ((4 << 20) + 1))
    assert refusal(large) == f"{large}: is 4,194,305 bytes long; at most 4,194,304 are read; name an existing YAML file"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        file = tmp_path / f"{encoding}.yaml"
        file.write_text("a: é\n", encoding=encoding)
        assert load_yaml(file).data == {"a": "é"}


def test_the_documents_of_a_stream_come_one_by_one_with_their_lines() -> None:
    text = "name: one\n---\n# only a comment\n---\nname: two\nx: 1\n...\n"
    first, second = load_documents(text)
    assert (first.data, second.data) == ({"name": "one"}, {"name": "two", "x": 1})
    assert second.line(("x",)) == 6
    assert refusal(text) == "<text>:5: a second document begins here; keep one recipe in a file"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n"])
def test_an_empty_stream_is_one_empty_document(text: str) -> None:
    (document,) = load_documents(text)
    assert document.data is None
    assert document.line() == 1


def test_the_text_of_a_file_is_kept_where_it_is_all_of_it() -> None:
    assert load_yaml("a: 1 # one\n").text == "a: 1 # one\n"
    assert [document.text for document in load_documents("a: 1\n---\nb: 2\n")] == ["", ""]
    assert load_yaml("a: {b: 1}\n").sub("a").text == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": {1: 2}}, "a: a key must be text, got 1; quote it"),
        ({None: 2}, "a key must be text, got nothing; quote it"),
    ],
)
def test_a_key_that_is_no_text_is_refused_in_data_made_in_python(data: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Located.of(data)
    assert str(caught.value) == message


def test_data_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RecipeError, match="nested deeper than 64 levels"):
        Located.of({"a": loop})


def test_a_path_is_written_with_dots_brackets_and_quotes() -> None:
    assert dotted(("models", 1, "parameters", "weight")) == "models[1].parameters.weight"
    assert dotted(("tokens", "<|im_end|>", "source")) == 'tokens["<|im_end|>"].source'
    assert dotted(()) == ""


def test_a_near_word_is_suggested_and_a_far_one_is_not() -> None:
    assert did_you_mean("densty", ["weight", "density"]) == "did you mean 'density'?"
    assert did_you_mean("zzz", ["weight", "density"]) == ""


def test_values_are_shown_in_yaml_s_words_and_shortened() -> None:
    assert [show(v) for v in (None, True, False, [1], {"a": 1}, 1.5, "x")] == [
        "nothing", "true", "false", "a list", "a mapping", "1.5", "'x'",
    ]  # fmt: skip
    assert len(show("x" * 1000)) == 60


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
_DATA = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@given(st.dictionaries(st.text(max_size=5), _DATA, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back_and_by_pyyaml_alike(data: dict[str, Any]) -> None:
    text = dump_yaml(data)
    assert load_yaml(text if "\n" in text else text + "\n").data == data
    assert yaml.safe_load(text) == data


@given(
    st.from_regex(r"[-+]?[0-9.:_eExXob]{1,8}|[a-zA-Z~.]{1,5}|'[^'\n]{0,4}'", fullmatch=True).filter(
        lambda s: s.isascii()
    )
)
def test_a_scalar_means_what_pyyaml_says_but_for_exponents(scalar: str) -> None:
    try:
        expected = yaml.safe_load(f"a: {scalar}\n")["a"]
    except (yaml.YAMLError, ValueError):
        return
    found = data_of(f"a: {scalar}\n")["a"]
    if isinstance(found, float) and isinstance(expected, str):
        assert found == float(expected.replace("_", ""))
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected
        assert type(found) is type(expected)


@given(st.text(alphabet="ab:-[]{}&*!<>|#'\"?,@ \n\t1.e%", max_size=40))
def test_any_text_is_data_or_a_clear_refusal(text: str) -> None:
    with contextlib.suppress(RecipeError):
        load_documents(text + "\n")
