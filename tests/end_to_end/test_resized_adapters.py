"""Adapters that resized the vocabulary of their base, each in its own way, in one merge without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from toys.adapters import Tensors, llama, merged_by_us, train
from toys.merge import on, recipe, tensors_of

from paft_merge import merge
from paft_merge.errors import PaftMergeError

ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Path]]:
    """The base, with 40 rows, and an adapter that holds embeddings of some number of rows; each made once."""
    known: dict[int, tuple[Path, Path]] = {}

    def make(rows: int) -> tuple[Path, Path]:
        if rows not in known:
            config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
            known[rows] = train(llama(), tmp_path_factory.mktemp("resized"), config, rows)
        return known[rows]

    return make


def padded(tensors: Tensors, like: Tensors, rows: int) -> Tensors:
    """Values with the embeddings of `like` past their last row, and zeros past its last row."""
    made = dict(tensors)
    for name in ENDS:
        made[name] = torch.zeros(rows, 16)
        for held in (like[name], tensors[name]):
            made[name][: len(held)] = held
    return made


@pytest.mark.parametrize(
    ("first", "second", "rows"), [(44, 40, 44), (44, 37, 44), (37, 40, 40), (37, 38, 40), (40, 43, 43)]
)
def test_rows_that_an_adapter_lacks_do_not_change(
    first: int, second: int, rows: int, trained: Callable[[int], tuple[Path, Path]], tmp_path: Path
) -> None:
    base = trained(first)[0]
    weights, adapters = {trained(first)[1]: 0.5, trained(second)[1]: 0.25}, (trained(first)[1], trained(second)[1])
    sources = [(on(base, adapter), {"weight": weight}) for adapter, weight in weights.items()]
    merge(recipe("task_arithmetic", base, *sources), tmp_path / "out")
    zero = padded(tensors_of(base), tensors_of(base), rows)
    one, two = (padded(merged_by_us(base, adapter), zero, rows) for adapter in adapters)
    for name, value in tensors_of(tmp_path / "out").items():
        wanted = zero[name] + 0.5 * (one[name] - zero[name]) + 0.25 * (two[name] - zero[name])
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)


def test_two_adapters_that_add_unequal_numbers_of_tokens_are_refused(
    trained: Callable[[int], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = trained(44)
    sources = [(on(base, one), {"weight": 0.5}) for one in (adapter, trained(42)[1])]
    with pytest.raises(PaftMergeError) as caught:
        merge(recipe("task_arithmetic", base, *sources), tmp_path / "out")
    assert {problem.code for problem in caught.value.problems} == {"SHAPE_MISMATCH"}
    assert "44 rows" in str(caught.value)
    assert "tokenizer_source: union" in str(caught.value)
