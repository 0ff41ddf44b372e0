"""The vocabulary of a merge: tokenizers joined and chosen, embeddings gathered row by row, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, save_adapter
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from toys.merge import files_of, manifest_of, on, python, recipe, same, tensors_of
from toys.mergekit import mergekit_merge
from toys.vocabulary import TEXT, ids_of, save_llama, save_tokenizer, vocabulary_family
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import paft_merge
from paft_merge.engine.api import open_plan
from paft_merge.engine.sidefiles import identity
from paft_merge.errors import PaftMergeError, Problem

Family = dict[str, Path]
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return vocabulary_family(tmp_path_factory.mktemp("models"))


def raw(models: Family, method: str = "task_arithmetic", **extra: Any) -> dict[str, Any]:
    """A recipe of all three models."""
    sources = [(models["x"], {"weight": 0.7}), (models["y"], {"weight": 0.4})]
    base = models["base"]
    if method == "linear":
        sources.append((base, {"weight": 0.5}))
        return recipe("linear", None, *sources, **extra)
    if method == "slerp":
        return recipe("slerp", base, models["x"], parameters={"t": 0.4}, **extra)
    return recipe(method, base, *sources, **extra)


def merged(data: Mapping[str, Any] | Path, out: Path, **options: Any) -> tuple[State, list[Problem]]:
    told: list[Problem] = []
    paft_merge.merge(data, out, warn=told.extend, **options)
    return tensors_of(out), told


def assert_equal_by_token(ours: Path, theirs: Path, rtol: float = 1e-6) -> None:
    """The same tokens with the same rows, whatever their ids; and everything else equal."""
    mine, other = tensors_of(ours), tensors_of(theirs)
    ids, their_ids = ids_of(ours), ids_of(theirs)
    assert ids.keys() == their_ids.keys()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        wanted = other[name]
        if name in EMBEDDINGS:
            assert tensor.shape == wanted.shape
            order = torch.arange(len(tensor))
            order[list(ids.values())] = torch.tensor([their_ids[token] for token in ids])
            wanted = wanted[order]
        torch.testing.assert_close(tensor, wanted, rtol=rtol, atol=1e-7)


TOKENS = {
    "<|im_start|>": {"source": {"kind": "zero"}},
    "<|im_end|>": {"source": "x", "force": True},
    "<tool>": {"source": {"kind": "model_token", "model": "x", "token": "<|im_start|>"}},
    "<new>": {"source": {"kind": "model_token", "model": "y", "token_id": 5}},
    "<none>": {"source": {"kind": "zero"}},
    "<pad>": {"source": {"kind": "model_token", "model": "base", "token": "</s>"}, "force": True},
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "union": {"tokenizer_source": "union"},
    "base": {"tokenizer_source": "base"},
    "a model": {"tokenizer_source": "x"},
    "nothing said": {"tokenizer": {"pad_to_multiple_of": 1}},
    "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
    "tokens": {"tokenizer": {"source": "union", "tokens": TOKENS}},
    "tokens of a model, padded": {"tokenizer": {"source": "x", "tokens": TOKENS, "pad_to_multiple_of": 16}},
}


def placed(value: Any, models: Family) -> Any:
    """A recipe's part with the folders of the models that it names; `source: base` of a tokenizer is a word."""
    if isinstance(value, dict):
        return {k: v if (k, v) == ("source", "base") else placed(v, models) for k, v in value.items()}
    return str(models[value]) if isinstance(value, str) and value in models else value


def with_models(case: str, models: Family) -> dict[str, Any]:
    """A case's keys."""
    return TOKENIZERS[case] if case == "base" else placed(TOKENIZERS[case], models)  # type: ignore[no-any-return]


PAIRS = [("task_arithmetic", case) for case in TOKENIZERS]
PAIRS += [("linear", "tokens"), ("ties", "tokens"), ("slerp", "padded"), ("linear", "padded"), ("slerp", "union")]


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_every_source_of_a_vocabulary_is_mergekit_s(models: Family, tmp_path: Path, method: str, case: str) -> None:
    chosen = {k: v for k, v in models.items() if k != "y"} if method == "slerp" else models
    data = raw(models, method, **with_models(case, chosen))
    if method == "linear":
        data["base_model"] = str(models["base"])  # mergekit takes any of them without
    data["models"] = [m for m in data["models"] if m["model"] in map(str, chosen.values())]
    mergekit_merge(data, tmp_path / "theirs")
    merged(data, tmp_path / "ours")
    assert_equal_by_token(tmp_path / "ours", tmp_path / "theirs", rtol=1e-5 if method == "slerp" else 1e-6)


def test_without_a_base_a_row_of_several_is_their_mean(models: Family, tmp_path: Path) -> None:
    """mergekit draws its tokenizer by lot here; the rows of tokens do not depend on it."""
    data = raw(models, "linear", tokenizer_source="union")
    mergekit_merge(data, tmp_path / "theirs")
    state, _ = merged(data, tmp_path / "ours")
    assert_equal_by_token(tmp_path / "ours", tmp_path / "theirs")
    ids, own = ids_of(tmp_path / "ours"), {name: ids_of(folder) for name, folder in models.items()}
    token = next(t for t in ids if t in own["x"] and t in own["y"] and t not in own["base"])
    rows = {n: tensors_of(models[n])["lm_head.weight"][own[n][token]] for n in "xy"}
    want = (0.7 * rows["x"] + 0.4 * rows["y"] + 0.5 * (rows["x"] + rows["y"]) / 2) / 1.6
    torch.testing.assert_close(state["lm_head.weight"][ids[token]], want, rtol=1e-6, atol=1e-8)


def test_ids_of_a_union_are_the_base_s_then_the_models_in_the_recipe_s_order(models: Family, tmp_path: Path) -> None:
    merged(raw(models, tokenizer_source="union"), tmp_path / "out")
    ids, own = ids_of(tmp_path / "out"), {name: ids_of(folder) for name, folder in models.items()}
    want = sorted(own["base"], key=own["base"].__getitem__)
    for name in "xy":
        want += [token for token in sorted(own[name], key=own[name].__getitem__) if token not in want]
    assert ids == {token: i for i, token in enumerate(want)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(want)


def test_no_bit_depends_on_the_hash_seed(models: Family, tmp_path: Path) -> None:
    data = raw(models, tokenizer={"source": "union", "pad_to_multiple_of": 8}, chat_template="chatml")
    code = "import json, sys, paft_merge; paft_merge.merge(json.loads(sys.argv[1]), sys.argv[2])"
    merged(data, tmp_path / "here")  # whose seed is a random one
    for seed in ("1", "2"):
        run = python(code, json.dumps(data), tmp_path / seed, PYTHONHASHSEED=seed)
        assert run.returncode == 0, run.stderr
        assert files_of(tmp_path / seed) == files_of(tmp_path / "here")


def test_tokens_added_to_the_base_s_tokenizer_on_which_mergekit_crashes(models: Family, tmp_path: Path) -> None:
    data = raw(models, tokenizer=placed({"source": "base", "tokens": TOKENS, "pad_to_multiple_of": 16}, models))
    with pytest.raises(KeyError):
        mergekit_merge(data, tmp_path / "theirs")
    state, _ = merged(data, tmp_path / "ours")
    ids = ids_of(tmp_path / "ours")
    assert ids.keys() == ids_of(models["base"]).keys() | TOKENS.keys()
    assert len(state[EMBEDDINGS[0]]) == -(-len(ids) // 16) * 16
    assert not state[EMBEDDINGS[0]][ids["<none>"]].any()


@pytest.mark.parametrize("method", ["ties", "linear", "nuslerp"])
def test_blocks_and_threads_change_no_bit(
    models: Family, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = with_models("tokens", models)
    keys["tokenizer"]["pad_to_multiple_of"] = 32
    data = raw(models, method, **keys)
    whole, _ = merged(data, tmp_path / "whole", threads=1)
    for tile, threads in ((64, 1), (7 * 16, 3)):
        monkeypatch.setattr("paft_merge.compute.blocks.TILE", tile)
        state, _ = merged(data, tmp_path / f"{tile}", threads=threads)
        for name in EMBEDDINGS:
            close = torch.equal if method != "nuslerp" else torch.allclose  # whose sums are taken by tile
            assert close(state[name], whole[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_loads_and_its_tokenizer_round_trips(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    models = vocabulary_family(tmp_path, dtype, tied=tied, shards=2)
    merged(raw(models, tokenizer={"source": "union", "pad_to_multiple_of": 16}), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(encoded[0]) == TEXT
    assert {"<|im_start|>", "<|im_end|>", "<tool>"} <= set(tokenizer.convert_ids_to_tokens(encoded[0]))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == -(-len(tokenizer) // 16) * 16
    assert model(encoded).logits.isfinite().all()
    assert manifest_of(tmp_path / "out")["vocabulary"]["tokens"] == len(tokenizer)


def test_equal_vocabularies_are_merged_as_if_nothing_was_said(tmp_path: Path) -> None:
    from conftest import near
    from toys.mergekit import llama_state
    from toys.vocabulary import with_rows

    rows = save_tokenizer(tmp_path / "base", "base")
    base = with_rows(llama_state(0), rows, 1)
    save_llama(tmp_path / "base", base, rows)
    save_tokenizer(tmp_path / "x", "base")
    save_llama(tmp_path / "x", near(base, 2), rows)
    data = recipe("ties", tmp_path / "base", (tmp_path / "x", {"weight": 0.5, "density": 0.5}))
    plain, _ = merged(data, tmp_path / "plain")
    for source in ("union", "base", str(tmp_path / "x")):
        state, told = merged({**data, "tokenizer_source": source}, tmp_path / f"as {len(source)}")
        assert same(state, plain)
        assert not told
        files = files_of(tmp_path / f"as {len(source)}")
        assert files["tokenizer.json"] == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_a_merge_goes_on_only_with_the_tokenizers_that_it_began_with(tmp_path: Path) -> None:
    models, found = vocabulary_family(tmp_path, padding=1), []
    for added in (None, ["<pad>", "<|im_start|>", "<|im_end|>", "<more>"]):
        if added:
            save_tokenizer(models["x"], "x", added)
        with open_plan(raw(models, tokenizer_source=str(models["base"]))) as planned:
            found.append(identity(planned, "cpu"))
        with open_plan(raw(models, tokenizer_source="union")) as planned:
            found.append(identity(planned, "cpu"))
    assert found[0] == found[2]  # the base's vocabulary has no place for the new token
    assert found[1]["inputs"] == found[3]["inputs"]
    assert found[1]["vocabulary"] != found[3]["vocabulary"]


# --- adapters under a row map ----------------------------------------------------------------------------------------


def grown_adapter(folder: Path, base: Path, extra: int) -> Path:
    """An adapter that saved embeddings of `extra` rows more, with the tokenizer that it was trained with."""
    state = tensors_of(base)
    save_adapter(folder, state, 5)
    made = torch.Generator().manual_seed(7)
    factors = tensors_of(folder)
    for path, name in (("model.embed_tokens", EMBEDDINGS[0]), ("lm_head", EMBEDDINGS[1])):
        new = torch.randn(extra, state[name].shape[1], generator=made) * 0.02
        factors[f"base_model.model.{path}.weight"] = torch.cat([state[name] * 1.1, new])
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["embed_tokens", "lm_head"]}))
    save_tokenizer(folder, "base", ["<pad>", "<|im_start|>", "<think>"])
    return folder


def test_an_adapter_that_grew_the_vocabulary_merges_with_a_model_of_another(models: Family, tmp_path: Path) -> None:
    adapter = grown_adapter(tmp_path / "adapter", models["base"], 2)
    weights = {"weight": 0.5}
    data = recipe(
        "task_arithmetic", models["base"], (on(models["base"], adapter), weights), (models["x"], weights),
        tokenizer_source="union",
    )  # fmt: skip
    state, _ = merged(data, tmp_path / "out")
    ids, own = (
        ids_of(tmp_path / "out"),
        {"base": ids_of(models["base"]), "x": ids_of(models["x"]), "a": ids_of(adapter)},
    )
    assert ids.keys() == own["base"].keys() | own["x"].keys() | own["a"].keys()
    factors = tensors_of(adapter)
    for name in EMBEDDINGS:
        rows = {
            "base": tensors_of(models["base"])[name].double(),
            "x": tensors_of(models["x"])[name].double(),
            "a": factors[f"base_model.model.{name}"].double(),
        }
        for token, i in ids.items():
            has = {n: rows[n][vocabulary[token]] for n, vocabulary in own.items() if token in vocabulary}
            stand_in = has["base"] if "base" in has else sum(has.values()) / len(has)
            base, x, a = (has.get(n, stand_in) for n in ("base", "x", "a"))
            want = base + 0.5 * (a - base) + 0.5 * (x - base)
            torch.testing.assert_close(state[name][i].double(), want, rtol=1e-6, atol=1e-8, msg=f"{name} {token}")


def embedding_adapter(folder: Path, base: State, size: float) -> torch.Tensor:
    """Write a LoRA of rank 3 on the input embedding; its delta in float64."""
    save_adapter(folder, base, 5)
    made, rows, rank = torch.Generator().manual_seed(1), len(base[EMBEDDINGS[0]]), 3
    a, b = (torch.randn(shape, generator=made) * size for shape in ((rank, rows), (16, rank)))
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{stem}A": a, f"{stem}B": b}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": rank, "lora_alpha": rank, "target_modules": ["embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (b.double() @ a.double()).T


def test_a_low_rank_update_of_an_embedding_follows_its_rows(models: Family, tmp_path: Path) -> None:
    base = tensors_of(models["base"])
    delta = embedding_adapter(tmp_path / "adapter", base, 0.02)
    source = on(models["base"], tmp_path / "adapter")
    data = recipe(
        "task_arithmetic", models["base"], (source, {"weight": 1.0}), (models["y"], {"weight": 0.0}),
        tokenizer_source=str(models["y"]),
    )  # fmt: skip
    state, _ = merged(data, tmp_path / "out")
    ids, own = ids_of(tmp_path / "out"), ids_of(models["base"])
    common = [token for token in ids if token in own]
    assert len(common) < len(ids)
    got = state[EMBEDDINGS[0]][[ids[token] for token in common]].double()
    want = (base[EMBEDDINGS[0]].double() + delta)[[own[token] for token in common]]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_s_delta_is_as_exact_in_another_order(tmp_path: Path, dtype: torch.dtype) -> None:
    """It is never the difference of two rounded weights: of an update of 1e-7 little would be left."""
    models = vocabulary_family(tmp_path, dtype)
    base = tensors_of(models["base"])
    delta = embedding_adapter(tmp_path / "adapter", base, 2e-4)
    source = on(models["base"], tmp_path / "adapter")
    data = recipe(
        "task_arithmetic", models["base"], (source, {"weight": 1e6}), (models["y"], {"weight": 0.0}),
        tokenizer_source=str(models["y"]), out_dtype="float32",
    )  # fmt: skip
    state, _ = merged(data, tmp_path / "out")
    ids, own = ids_of(tmp_path / "out"), ids_of(models["base"])
    common = [token for token in ids if token in own]
    rows = [own[token] for token in common]
    got = state[EMBEDDINGS[0]][[ids[token] for token in common]].double() - base[EMBEDDINGS[0]][rows].double()
    torch.testing.assert_close(got, 1e6 * delta[rows], rtol=1e-5, atol=1e-7)


def test_a_head_that_an_adapter_parts_from_its_embedding_has_the_new_vocabulary_too(tmp_path: Path) -> None:
    models = vocabulary_family(tmp_path, tied=True)
    base, folder = tensors_of(models["base"]), save_adapter(tmp_path / "adapter", tensors_of(models["base"]), 5)
    head = base[EMBEDDINGS[0]] * 1.5
    save_file(
        {"base_model.model.lm_head.weight": head}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"modules_to_save": ["lm_head"], "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {"weight": 0.5}
    data = recipe(
        "task_arithmetic", models["base"], (on(models["base"], folder), weights), (models["x"], weights),
        tokenizer_source="union",
    )  # fmt: skip
    state, _ = merged(data, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ids, own = ids_of(tmp_path / "out"), {name: ids_of(models[name]) for name in ("base", "x")}
    rows = {name: tensors_of(models[name])[EMBEDDINGS[0]].double() for name in own}
    for token, i in ids.items():
        x = rows["x"][own["x"][token]] if token in own["x"] else rows["base"][own["base"][token]]
        was = rows["base"][own["base"][token]] if token in own["base"] else x
        trained = head[own["base"][token]].double() if token in own["base"] else x
        want = was + 0.5 * (trained - was) + 0.5 * (x - was)
        torch.testing.assert_close(state["lm_head.weight"][i].double(), want, rtol=1e-6, atol=1e-8, msg=token)
    assert len(state[EMBEDDINGS[0]]) == len(ids)


def test_mergekit_s_arithmetic_has_its_rows_too(models: Family, tmp_path: Path) -> None:
    data = raw(models, "ties", **with_models("padded", models))
    mergekit_merge(data, tmp_path / "theirs")
    merged({**data, "arithmetic": "mergekit"}, tmp_path / "ours")
    assert_equal_by_token(tmp_path / "ours", tmp_path / "theirs", rtol=1e-6)


def test_a_document_on_the_way_has_a_vocabulary_of_its_own(models: Family, tmp_path: Path) -> None:
    """As if it had been written, and merged from there; what nothing changes has its tokenizer too."""
    first = recipe("linear", models["base"], (models["base"], {"weight": 0.5}), (models["x"], {"weight": 0.5}))
    first |= {"tokenizer_source": "union", "chat_template": LITERAL}
    last = {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}, "chat_template": "auto"}
    for number, more in enumerate((last, {})):
        file, sources = tmp_path / f"{number}.yaml", [(models["y"], {"weight": 0.3})] if more else []

        def second(joined: Any, sources: Any = sources, more: Any = more) -> dict[str, Any]:
            return recipe("linear", joined, (joined, {"weight": 0.7}), *sources, **more)

        file.write_text("\n---\n".join(json.dumps(d) for d in ({"name": "joined", **first}, second("joined"))))
        state, _ = merged(file, tmp_path / f"at once {number}")
        merged(first, tmp_path / f"joined {number}")
        wanted, _ = merged(second(tmp_path / f"joined {number}"), tmp_path / f"in steps {number}")
        assert same(state, wanted)
        found, steps = (files_of(tmp_path / f"{how} {number}") for how in ("at once", "in steps"))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
            assert found[name] == steps[name], name


# --- what mergekit crashes on, or does without a word ----------------------------------------------------------------


def test_tokens_beyond_a_model_s_rows_are_left_out_and_told(models: Family, tmp_path: Path) -> None:
    count = save_tokenizer(tmp_path / "z", "x", ["<a>", "<b>", "<c>"])
    state = tensors_of(models["x"])
    rows = count - 2
    state = {n: t[:rows].clone() if n in EMBEDDINGS else t for n, t in state.items()}
    save_llama(tmp_path / "z", state, rows)
    as_source = recipe("task_arithmetic", models["base"], (tmp_path / "z", {"weight": 1.0}), tokenizer_source="union")
    merged(as_source, tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert "<a>" in ids
    assert not {"<b>", "<c>"} & ids.keys()
    as_base = recipe("task_arithmetic", tmp_path / "z", (models["base"], {"weight": 1.0}), tokenizer_source="base")
    _, told = merged(as_base, tmp_path / "cut")
    assert ids_of(tmp_path / "cut").keys() == ids_of(tmp_path / "z").keys() - {"<b>", "<c>"}
    assert any("2 of its tokens have no row" in str(p) for p in told)
    assert AutoTokenizer.from_pretrained(tmp_path / "cut").decode(
        AutoTokenizer.from_pretrained(tmp_path / "cut")(TEXT)["input_ids"]
    ) == TEXT  # fmt: skip


def test_a_special_token_beyond_the_rows_gets_one(models: Family, tmp_path: Path) -> None:
    """transformers adds a tokenizer's special tokens again whenever it loads it, so to leave one out would not last."""
    rows = save_tokenizer(tmp_path / "z", "x", [])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "z")
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(tmp_path / "z")
    state = {n: t[:rows].clone() if n in EMBEDDINGS else t for n, t in tensors_of(models["x"]).items()}
    save_llama(tmp_path / "z", state, rows)
    _, told = merged(
        recipe("linear", None, (tmp_path / "z", {"weight": 1.0}), tokenizer_source="base"), tmp_path / "out"
    )
    assert ids_of(tmp_path / "out")["<padding>"] == rows
    made = tensors_of(tmp_path / "out")[EMBEDDINGS[0]]
    assert torch.equal(made[:rows], state[EMBEDDINGS[0]])
    assert not made[rows:].any()
    assert any("become zeros: '<padding>'" in p.what for p in told)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_tokenizers_of_every_kind_are_cut_and_joined(models: Family, tmp_path: Path, kind: str) -> None:
    """mergekit refuses to cut any but BPE."""
    words = {"base": ["the", "quick", "brown", "fox", "lost"], "x": ["quick", "the", "dogs", "town"]}
    for name, rows in (("base", 6), ("x", 6)):
        pieces = ["<unk>", "<pad>", *words[name]]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        model = (
            tokenizer_models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
            if kind == "Unigram"
            else getattr(tokenizer_models, kind)(vocabulary, unk_token="<unk>")
        )
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>").save_pretrained(
            tmp_path / name
        )
        state = {n: t[:rows].clone() if n in EMBEDDINGS else t for n, t in tensors_of(models["x"]).items()}
        save_llama(tmp_path / name, state, rows)
    data = recipe("task_arithmetic", tmp_path / "base", (tmp_path / "x", {"weight": 1.0}), tokenizer_source="union")
    state, told = merged(data, tmp_path / "out")
    assert ids_of(tmp_path / "out") == {
        t: i for i, t in enumerate(["<unk>", "<pad>", "the", "quick", "brown", "fox", "dogs", "town"])
    }
    assert any("1 of its tokens have no row" in p.what and "'lost'" in p.what for p in told)
    rows = tensors_of(tmp_path / "x")[EMBEDDINGS[0]]
    torch.testing.assert_close(state[EMBEDDINGS[0]], rows[[0, 1, 3, 2, 4, 5, 4, 5]])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.convert_ids_to_tokens(loaded("the brown town", add_special_tokens=False)["input_ids"]) == [
        "the",
        "brown",
        "town",
    ]


def test_a_vocabulary_that_shrinks_is_told(tmp_path: Path) -> None:
    models = vocabulary_family(tmp_path, padding=9)
    rows = len(tensors_of(models["base"])[EMBEDDINGS[0]])
    data = raw(models, tokenizer_source="base")
    state, told = merged(data, tmp_path / "out")
    assert len(state[EMBEDDINGS[0]]) == rows - 9 == len(ids_of(models["base"]))
    (shrunk,) = [p for p in told if p.code == "VOCABULARY"]
    assert f"shrinks from {rows} to {rows - 9} rows" in shrunk.what
    assert shrunk.fix == "write pad_to_multiple_of: 16 to keep 288" if rows == 288 else shrunk.fix


def test_a_token_id_of_a_config_that_means_another_token_is_told(models: Family, tmp_path: Path) -> None:
    base = tmp_path / "base"
    rows = save_tokenizer(base, "base")
    number = ids_of(base)["<pad>"]
    save_llama(base, tensors_of(models["base"]), rows, pad_token_id=number)
    data = recipe("task_arithmetic", base, (models["x"], {"weight": 1.0}), tokenizer_source=str(models["x"]))
    _, told = merged(data, tmp_path / "out")
    now = {i: t for t, i in ids_of(models["x"]).items()}
    (moved,) = [p for p in told if "pad_token_id" in p.what]
    assert moved.what == f"pad_token_id is {number}, which was '<pad>' and is {now[number]!r} now"
    assert moved.fix == f"set it to {ids_of(models['x'])['<pad>']}"
    assert not [p for p in told if "eos_token_id" in p.what]


def test_a_token_that_nobody_has_is_zero_and_told(models: Family, tmp_path: Path) -> None:
    """Its tokenizer may be that of a model that is not merged."""
    data = recipe("task_arithmetic", models["base"], (models["x"], {"weight": 1.0}), tokenizer_source=str(models["y"]))
    state, told = merged(data, tmp_path / "out")
    assert not state[EMBEDDINGS[0]][ids_of(tmp_path / "out")["<tool>"]].any()
    assert any(p.code == "VOCABULARY" and "'<tool>'" in p.what and "become zeros" in p.what for p in told)


def test_a_row_that_may_or_may_not_be_a_token_s_is_refused_by_name(tmp_path: Path) -> None:
    models = vocabulary_family(tmp_path)
    for folder in models.values():
        state = tensors_of(folder)
        odd = {**state, "model.token_scale": torch.ones(len(state[EMBEDDINGS[0]]))}
        save_file(odd, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaftMergeError, match=r"'model.token_scale' of shape .* may or may not have one row per token"):
        merged(raw(models, tokenizer_source="union"), tmp_path / "out")


Change = Callable[[Family, Path], dict[str, Any]]


def _no_tokenizer(models: Family, tmp_path: Path) -> dict[str, Any]:
    state = tensors_of(models["y"])
    bare = save_llama(tmp_path / "bare", state, len(state[EMBEDDINGS[0]]))
    return recipe("linear", None, (models["x"], {"weight": 1}), (bare, {"weight": 1}), tokenizer_source="union")


def _only_sentencepiece(models: Family, tmp_path: Path) -> dict[str, Any]:
    data = _no_tokenizer(models, tmp_path)
    (tmp_path / "bare" / "tokenizer.model").write_bytes(b"no model")
    return data


def _gaps(models: Family, tmp_path: Path) -> dict[str, Any]:
    made = Tokenizer(tokenizer_models.WordLevel({"a": 0, "b": 10_000_000}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "gaps")
    return raw(models, tokenizer_source=str(tmp_path / "gaps"))


FAULTS: dict[str, tuple[Change, str]] = {
    "ids with a gap of millions": (_gaps, "the ids of its 2 tokens go up to 10,000,000"),
    "no tokenizer": (_no_tokenizer, r"bare: has no tokenizer; put its tokenizer files beside its weights"),
    "a broken sentencepiece model alone": (_only_sentencepiece, r"bare: its tokenizer cannot be loaded.*save it again"),
    "a tokenizer source that is nowhere": (
        lambda m, t: raw(m, tokenizer_source=str(t / "nowhere")), r"tokenizer_source: .*nowhere not a local folder"
    ),
    "a token of a model that is not merged": (
        lambda m, t: raw(m, tokenizer={"tokens": {"<n>": {"source": "/else"}}}),
        r'tokenizer.tokens\["<n>"\].source: /else is not a model of this merge; name one of',
    ),
    "a token that its model lacks": (
        lambda m, t: raw(m, tokenizer={"tokens": {"<|im_start|>": {"source": str(m["y"])}}}),
        r'tokens\["<\|im_start\|>"\].source: .*y has no token',
    ),
    "a token id out of range": (
        lambda m, t: raw(
            m, tokenizer={"tokens": {"<n>": {"source": {"kind": "model_token", "model": str(m["y"]), "token_id": 999}}}}
        ),
        r'tokens\["<n>"\].source: .*y has 275 rows and no row 999; give a token_id from 0 to 274',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_is_told_before_a_byte_is_written(models: Family, tmp_path: Path, case: str) -> None:
    make, message = FAULTS[case]
    with pytest.raises(PaftMergeError, match=message):
        merged(make(models, tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_faults_come_with_their_line_and_all_at_once(models: Family, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"""merge_method: linear
models:
  - {{model: {models["base"]}, parameters: {{weight: 1}}}}
  - {{model: {models["x"]}, parameters: {{weight: 1}}}}
tokenizer:
  tokens:
    <a>: {{source: /else}}
    <b>: {{source: {{kind: model_token, model: {models["x"]}, token: <nope>}}}}
chat_template: "{{{{ messages[0] }} and no end of it"
""")
    with pytest.raises(PaftMergeError) as caught:
        merged(file, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{file}:{n}" for n in (7, 8, 9)], lines


# --- chat templates --------------------------------------------------------------------------------------------------

LITERAL = "{% for m in messages %}[{{ m['role'] }}] {% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"


@pytest.fixture
def templated(models: Family, tmp_path: Path) -> Family:
    """Three models of which the last two have the same template."""
    found = {}
    for name, template in (("base", "{{ 'one template of several words' }}"), ("x", LITERAL), ("y", LITERAL + "\n")):
        rows = save_tokenizer(tmp_path / name, name, template=template)
        found[name] = save_llama(tmp_path / name, tensors_of(models[name]), rows)
    return found


@pytest.mark.parametrize("source", ["union", None])
def test_the_most_common_template_a_named_and_a_literal_one(
    templated: Family, tmp_path: Path, source: str | None
) -> None:
    turns = [{"role": "user", "content": "hello"}]
    data = raw(templated, tokenizer_source="union")
    if source is None:
        data = recipe("linear", None, (templated["base"], {"weight": 1.0}))
    wanted = {
        "auto": "[user] hello" if source else "one template of several words",
        LITERAL: "[user] hello",
        "chatml": "<|im_start|>user\nhello<|im_end|>\n",
    }
    for number, (written, text) in enumerate(wanted.items()):
        merged({**data, "chat_template": written}, tmp_path / f"out{number}")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"out{number}")
        assert tokenizer.apply_chat_template(turns, tokenize=False) == text
        assert "chat_template" not in json.loads((tmp_path / f"out{number}" / "tokenizer_config.json").read_text())


def test_of_equally_common_templates_the_first_in_the_recipe_is_taken(templated: Family, tmp_path: Path) -> None:
    data = recipe("task_arithmetic", templated["base"], (templated["x"], {"weight": 1.0}), tokenizer_source="union")
    merged({**data, "chat_template": "auto"}, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'one template of several words' }}"


def test_a_template_needs_a_tokenizer_and_must_be_jinja(models: Family, tmp_path: Path) -> None:
    bare = save_llama(tmp_path / "bare", tensors_of(models["x"]), 283)
    data = recipe("linear", None, (bare, {"weight": 1.0}))
    with pytest.raises(PaftMergeError, match=r"chat_template: .*bare has no tokenizer to write a chat template"):
        merged({**data, "chat_template": "chatml"}, tmp_path / "out")
    broken = "{% for m in messages %}{{ m }}\n{% endif %}"
    with pytest.raises(PaftMergeError, match="chat_template: line 2 of the template is not valid Jinja"):
        merged(raw(models, tokenizer_source="union", chat_template=broken), tmp_path / "out")
    with pytest.raises(PaftMergeError, match="not valid Jinja: No filter named 'nofilter'"):
        merged(raw(models, tokenizer_source="union", chat_template="{{ messages | nofilter }}"), tmp_path / "out")
    _, told = merged(raw(models, tokenizer_source="union", chat_template="auto"), tmp_path / "out")
    assert [p.what for p in told if p.code == "CHAT_TEMPLATE"] == ["no model has a chat template"]
