"""Every method of mergekit by every form of its language, type and kind of storage, against mergekit's own run.

float32: the same numbers. bfloat16: ours are those of float64, rounded once, which mergekit's own arithmetic is further
from. The masks of random methods are injected: ours are taken from merges of one source each, and mergekit merges those.
How a model is stored changes no bit of ours, and none of mergekit's: so it runs once for all four kinds of storage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, dense_deltas, near, save_adapter, save_checkpoint
from toys.merge import bits_equal, on, tensors_of
from toys.mergekit import CONFIG, LAYERS, OURS, llama_state, mergekit_merge

import paft_merge
from paft_merge.engine.api import open_plan
from paft_merge.methods import METHODS
from paft_merge.methods.rules.thresholds import kept_count
from paft_merge.plan import PlannedTensor

NAMES = [name for name in METHODS if name not in OURS]
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
FORMS = ("gradients", "filters", "slices", "modules", "adapters")
STORAGE = list(itertools.product((1, 2), (False, True)))
"""Files, and whether the head is tied to the embedding."""
HEAD = "lm_head.weight"

PLAIN = {
    "weight": 0.5, "density": 0.6, "gamma": 0.05, "t": 0.3, "select_topk": 0.5, "scale": 1.5, "lambda": 0.8, "max_iter": 20,
    "tol": 1e-6, "r": 0.5, "alpha": 0.8,
}  # fmt: skip
GRADIENTS = {"weight": [0.2, 0.9], "density": [0.7, 0.4], "t": [0.1, 0.8], "scale": [0.5, 1.5], "lambda": [0.6, 1.2]}
Folders = dict[str, Path]


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A thousand small merges: threads cost more than they bring, and none has to outlive a power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folders]:
    """A base, two fine-tunes and two adapters of it, and what the adapters make of the base in float64; by storage."""
    made: dict[tuple[Any, ...], Folders] = {}

    def family(dtype: torch.dtype, shards: int, tied: bool) -> Folders:
        key = dtype, shards, tied
        if key not in made:
            folder, base = tmp_path_factory.mktemp("family"), llama_state(0, dtype)
            states = {"base": base, "x": near(base, 1), "y": near(base, 2, 2e-3)}
            adapters = {name: save_adapter(folder / name, base, seed) for seed, name in ((3, "sft"), (4, "dpo"))}
            for name, place in adapters.items():
                deltas = dense_deltas(place, base)
                states[f"base_{name}"] = {n: t.double() + deltas.get(n, 0) for n, t in base.items()}
            config = {**CONFIG, "tie_word_embeddings": tied}
            if tied:
                states = {n: {k: t for k, t in s.items() if k != HEAD} for n, s in states.items()}
            made[key] = adapters | {n: save_checkpoint(folder / n, s, shards, config) for n, s in states.items()}
        return made[key]

    return family


# --- recipes ----------------------------------------------------------------------------------------------------------


def setting(method: str, name: str, form: str, source: int) -> Any:
    """What a recipe of this form gives a parameter."""
    plain = PLAIN[name]
    if name == "t" and method == "nearswap":
        plain, ramp = 5e-4, [1e-4, 2e-3]
    else:
        ramp = GRADIENTS.get(name, plain)
    if name == "weight":
        plain = plain - 0.2 * source
    if name not in GRADIENTS or form in ("slices", "modules", "adapters"):
        return plain
    if form == "gradients":
        return ramp if source == 0 else ramp[::-1]
    return [{"filter": "mlp", "value": plain}, {"filter": "layers.1.", "value": ramp}, {"value": ramp[0]}]


def recipe_of(method: str, form: str, places: Mapping[str, Any], count: int | None = None) -> dict[str, Any]:
    """A recipe for `method` in one of the `FORMS`.

    Args:
        places: references of `base` and the sources, in order.
        count: take only the source of this number.
    """
    law = METHODS[method]
    based = law.base == "required" or (law.base == "optional" and form in ("gradients", "modules"))
    sources = [ref for name, ref in places.items() if name != "base"][: law.max_sources or 2]
    numbers = list(range(len(sources))) if count is None else [count]
    own = {p.name for p in law.parameters if p.scope == "source" and p.name in PLAIN}
    shared = {p.name for p in law.parameters if p.scope == "shared" and p.name in PLAIN}
    given = [{n: setting(method, n, form, i) for n in own} for i in numbers]
    common = {n: setting(method, n, form, 0) for n in shared}
    base = str(places["base"])
    data: dict[str, Any] = {"merge_method": method} | ({"base_model": base} if based else {})
    if form == "slices":
        slices = []
        for at in range(LAYERS):  # the sources' layers in another order than the base's
            entries: list[dict[str, Any]] = [{"model": base, "layer_range": [at, at + 1]}] if based else []
            for i, parameters in zip(numbers, given, strict=True):
                layer = (at + i + 1) % LAYERS
                entries.append({"model": sources[i], "layer_range": [layer, layer + 1], "parameters": parameters})
            slices.append({"sources": entries, "parameters": common})
        return data | {"slices": slices}
    models = [{"model": sources[i], "parameters": p} for i, p in zip(numbers, given, strict=True)]
    if form == "modules":
        return data | {"modules": {"default": {"models": models, "parameters": common}}}
    return data | {"models": models, "parameters": common}


def places_of(family: Folders, form: str, *, baked: bool = False) -> dict[str, Any]:
    """The base and the sources of a form; adapters as such, or `baked` as what they make of the base."""
    if form != "adapters":
        return {name: str(family[name]) for name in ("base", "x", "y")}
    names = ("sft", "dpo")
    made = {n: str(family[f"base_{n}"]) if baked else on(family["base"], family[n]) for n in names}
    return {"base": str(family["base"])} | made


def labelled(places: Mapping[str, Any]) -> dict[str, Any]:
    """The sources with a name, which is what random numbers are drawn by, so that folders do not matter."""
    found = {"base": places["base"]}
    for name, ref in places.items():
        model, _, lora = ref.partition("+")
        if name != "base":
            found[name] = {"model": {"path": model}, "label": name} | ({"lora": {"path": lora}} if lora else {})
    return found


def ours(recipe: Mapping[str, Any], out: Path, **more: Any) -> State:
    made = paft_merge.merge({**recipe, **more}, out, threads=1, write_model_card=False, warn=lambda _: None)
    return tensors_of(made)


def from_every_storage(
    families: Callable[..., Folders], method: str, form: str, dtype: torch.dtype, out: Path, **more: Any
) -> State:
    """Our merge of one recipe from each kind of storage: all are the same bits, but that tied models have no head."""
    runs = []
    for shards, tied in STORAGE:
        places = places_of(families(dtype, shards, tied), form)
        recipe = recipe_of(method, form, labelled(places) if method in RANDOM else places)
        runs.append(ours(recipe, out / f"{shards}{tied}", **more))
        assert (HEAD in runs[-1]) != tied
        assert runs[0].keys() - {HEAD} == runs[-1].keys() - {HEAD}
        assert all(bits_equal(tensor, runs[0][name]) for name, tensor in runs[-1].items())
    return runs[0]


def thinned(method: str, form: str, family: Folders, out: Path) -> dict[str, Any]:
    """Where each source of a random method is after our drop, in float32: merged alone, with weight one."""
    places = labelled(places_of(family, form))
    made = {"base": places["base"]}
    for i, name in enumerate(n for n in places if n != "base"):
        alone = recipe_of(method, form, places, count=i)
        for entry in alone.get("models", alone.get("modules", {}).get("default", {}).get("models", ())):
            entry["parameters"]["weight"] = 1.0
        for one in alone.get("slices", ()):
            one["sources"][-1]["parameters"]["weight"] = 1.0
        plain = {"normalize": False, "lambda": 1.0}
        for holder in (alone, *alone.get("slices", ()), *alone.get("modules", {}).values()):
            if "parameters" in holder:
                holder["parameters"] |= plain
        ours(alone, out / name, out_dtype="float32")
        made[name] = str(out / name)
    return made


def dense(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without its densities; layers are already where a slice put them."""
    for holder in (recipe, *recipe.get("slices", ()), *recipe.get("modules", {}).values()):
        for entry in (*holder.get("models", ()), *holder.get("sources", ())):
            entry["parameters"] = {k: v for k, v in entry.get("parameters", {}).items() if k != "density"}
            if "layer_range" in entry and entry["model"] != recipe.get("base_model"):
                entry["layer_range"] = recipe["slices"][recipe["slices"].index(holder)]["sources"][0]["layer_range"]
    return recipe


def wide(method: str) -> dict[str, str]:
    """The types in which mergekit's answer is the exact one. Of arcee_fusion we run mergekit's own function in float32."""
    dtype = "float32" if method == "arcee_fusion" else "float64"
    return {"dtype": dtype, "out_dtype": dtype}


# --- float32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", sorted(set(NAMES) - RANDOM))
def test_in_float32_the_numbers_are_mergekit_s(
    families: Callable[..., Folders], tmp_path: Path, method: str, form: str
) -> None:
    # Of adapters, what they make of the base in float64: mergekit would round that to float32 first.
    recipe = recipe_of(method, form, places_of(families(torch.float32, 1, False), form, baked=True))
    wanted = mergekit_merge(recipe | (wide(method) if form == "adapters" else {}), tmp_path / "theirs")
    found = from_every_storage(families, method, form, torch.float32, tmp_path / "ours")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, wanted[name].float(), rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", sorted(RANDOM))
def test_with_our_masks_random_methods_are_mergekit_s(
    families: Callable[..., Folders], tmp_path: Path, method: str, form: str, dtype: torch.dtype
) -> None:
    family = families(dtype, 1, False)
    masked = thinned(method, form, family, tmp_path / "masked")
    theirs = dense(recipe_of(method, form, masked)) | wide(method)
    wanted = mergekit_merge(theirs, tmp_path / "theirs")
    found = from_every_storage(families, method, form, dtype, tmp_path / "ours", out_dtype="float32")
    assert found.keys() == wanted.keys()
    base = tensors_of(family["base"])
    moved = torch.cat([(found[n] != t.float()).flatten() for n, t in base.items()])
    assert 0.5 < moved.double().mean() < 0.95  # of two sources that keep 0.4 to 0.7
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name].float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["gradients", "slices"])
def test_mergekit_merges_tied_and_sharded_models_as_it_does_others(
    families: Callable[..., Folders], tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    """What lets the matrix compare every kind of storage with one run of mergekit."""
    runs = []
    for shards, tied in STORAGE:
        recipe = recipe_of("ties", form, places_of(families(dtype, shards, tied), form))
        runs.append(mergekit_merge(recipe, tmp_path / f"{shards}{tied}"))
    for run, (_, tied) in zip(runs, STORAGE, strict=True):
        assert (HEAD not in run) == tied
        assert all(bits_equal(tensor, runs[0][name]) for name, tensor in run.items())


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def cuts(method: str, count: int, own: Mapping[str, Any]) -> list[int]:
    """The ranks of magnitude between which a method divides what it keeps from what it drops."""
    density = own.get("density", 1.0)
    if method not in ("ties", "breadcrumbs", "breadcrumbs_ties") or density >= 1:
        return []
    if method == "ties":
        return [kept_count(count, density)]
    kept, above = int(density * count), int(own["gamma"] * count)
    above = count - max(0, count - kept - above) - kept
    return [above, above + kept]


def undecided(tensor: PlannedTensor) -> torch.Tensor:
    """The entries that equal one at a threshold: which of those a method keeps is nobody's rule in mergekit."""
    base, sources = tensor.inputs.whole(baked=False)
    found = torch.zeros(tensor.shape, dtype=torch.bool)
    if base is None or "sources" not in tensor.parameters:
        return found
    deltas = [source.double() - base.double() for source in sources]
    ranked = [
        (d.abs(), cuts(tensor.method, d.numel(), own))
        for d, own in zip(deltas, tensor.parameters["sources"], strict=True)
    ]
    if tensor.method == "sce":
        spread = torch.stack(deltas).var(0, unbiased=False)
        ranked = [(spread, [int(tensor.parameters["select_topk"] * int((spread != 0).sum()))])]
    for sizes, ranks in ranked:
        order = sizes.flatten().sort(descending=True).values
        for rank in (rank for rank in ranks if 0 < rank < len(order) and order[rank - 1] <= order[rank] * (1 + 1e-12)):
            found |= (sizes - order[rank]).abs() <= order[rank] * 1e-12
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", sorted(set(NAMES) - RANDOM))
def test_from_bfloat16_ours_is_float64_rounded_once_and_mergekit_s_is_further_from_it(
    families: Callable[..., Folders], tmp_path: Path, method: str, form: str
) -> None:
    family = families(torch.bfloat16, 1, False)
    baked = places_of(family, form, baked=True)
    narrow = {"dtype": "bfloat16", "out_dtype": "bfloat16"}
    exact = mergekit_merge({**recipe_of(method, form, baked), **wide(method)}, tmp_path / "exact")
    theirs = mergekit_merge({**recipe_of(method, form, baked), **narrow}, tmp_path / "theirs")
    found = from_every_storage(families, method, form, torch.bfloat16, tmp_path / "ours")
    with open_plan(recipe_of(method, form, places_of(family, form))) as planned:
        sure = {t.name: ~undecided(t) for t in planned.tensors}
    assert found.keys() == exact.keys()
    whole = {
        n: torch.cat([state[k][sure[k]].double() for k in found]) for n, state in (("ours", found), ("theirs", theirs))
    }
    wanted = torch.cat([exact[k][sure[k]] for k in found])
    assert len(wanted) > 0.75 * sum(t.numel() for t in found.values())
    apart = {who: (result - wanted).abs() for who, result in whole.items()}
    # The weights of SCE are of all that is selected, so those of equals that mergekit selects move all the others a little.
    assert (whole["ours"] != wanted.to(torch.bfloat16).double()).double().mean() < (0.02 if method == "sce" else 1e-3)
    assert apart["ours"].mean() <= apart["theirs"].mean() * (1 + 1e-9)


def test_the_matrix_has_every_method() -> None:
    from mergekit.merge_methods import registered_methods

    theirs = {m.spec.name for m in registered_methods() if m.spec.name not in OURS}
    assert theirs == set(NAMES)
    assert len(theirs) == 20
