from typing import Any

import numpy as np
import pytest

from moe_heads.callbacks.functional.common.counts import is_count


@pytest.mark.parametrize(
    ("value", "expected"), [(2, True), (np.int64(3), True), (1, False), (2.0, False), (True, False)]
)
def test_what_is_a_count(value: Any, expected: bool) -> None:
    assert is_count(value, 2) == expected
    assert not is_count("2", 0) and not is_count(None, 0) and not is_count(False, 0)
