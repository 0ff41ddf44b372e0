"""The fields of TRL's configs, read from source, are those of the classes."""

from __future__ import annotations

import dataclasses

import pytest
from toys.merge import python

from paft_merge.training.schema import OURS
from paft_merge.training.trl_configs import BASE, CONFIG_OF, config_fields


def test_every_objective_has_the_config_of_its_trainer() -> None:
    from paft_merge.training.trainers import CONFIGS

    assert {objective: config.__name__ for objective, config in CONFIGS.items()} == CONFIG_OF


@pytest.mark.parametrize("name", sorted(set(CONFIG_OF.values())))
def test_the_fields_are_those_of_the_class(name: str) -> None:
    import trl

    real = {
        field.name: field for field in dataclasses.fields(getattr(trl, name)) if field.init and field.name not in OURS
    }
    found = config_fields(name)
    assert found.keys() == real.keys()
    assert config_fields(BASE).keys() < found.keys()
    for key, field in found.items():
        assert field.default in (None, real[key].default), key
        whole = " ".join(real[key].metadata.get("help", "").replace("%%", "%").split())
        assert field.text in ("", whole), key  # empty where the source has an expression
    assert found["learning_rate"].types == ("float",)
    assert found["max_steps"].default == -1


def test_an_unknown_config_has_no_fields() -> None:
    assert config_fields("NoSuchConfig") == {}


def test_trl_is_not_imported() -> None:
    code = "import sys; from paft_merge.training.trl_configs import *; print(len(config_fields(BASE)) > 80, 'trl' in sys.modules)"
    assert python(code).stdout.split() == ["True", "False"]
