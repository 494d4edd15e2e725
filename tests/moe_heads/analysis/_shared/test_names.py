"""Checks of lists of names."""

from typing import Any

import numpy as np
import pytest

from moe_heads.analysis._shared.names import are_names, check_names


def test_collections_of_strings_are_names() -> None:
    collections: tuple[Any, ...] = ([], ("cat", "dog"), np.array(["cat"]).tolist(), {"cat": 0})
    for names in collections:
        assert are_names(names)
        check_names(class_names=names)
    check_names(class_names=None)


@pytest.mark.parametrize("names", ["cat", [1, 2], 3, iter(["cat"])])
def test_other_values_are_not(names: object) -> None:
    assert not are_names(names)
    with pytest.raises(ValueError, match="class_names: expected a list of names, got "):
        check_names(class_names=names)
