"""Faults of a manifest, in the words that a recipe's faults have."""

from __future__ import annotations

from time import process_time
from typing import Any

import pytest

from paft_merge.output.manifest_schema import fault_of

TENSOR = {"method": "ties", "dtype": "BF16", "shape": [2], "digest": "x", "block_bytes": 4}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"tensors": None}, "tensors: must be a mapping, got nothing"),
        ({"recipe": {}}, "recipe.merge_method: missing"),
        ({"options": {"allow_crimes": "yes"}}, "options.allow_crimes: must be true or false, got 'yes'"),
        ({"seed": "7", "donor": 3}, "seed: must be a whole number, got '7' and 1 more"),
        ({"tensors": {"a.b": {**TENSOR, "block_bytes": 0}}}, 'tensors["a.b"].block_bytes: must be above 0, got 0'),
        ({"options": {"tensor_names": "both"}}, "options.tensor_names: must be one of intersection, union, got 'both'"),
    ],
)
def test_a_fault_is_one_plain_sentence(changes: dict[str, Any], fault: str) -> None:
    manifest = {"recipe": {"merge_method": "ties"}, "tensors": {"a": TENSOR}}
    assert fault_of({**manifest, **changes}) == fault


def test_a_manifest_of_many_faults_is_checked_in_seconds() -> None:
    start = process_time()
    fault = fault_of({"recipe": {"merge_method": "ties"}, "tensors": {str(i): {} for i in range(20_000)}})
    assert fault == "tensors.0.method: missing and 99999 more"
    assert process_time() - start < 20
