import pytest

from moe_heads.commands.comparison import Row
from moe_heads.commands.comparison_page import _cells


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (417.393, 12.3, "417 ± 12"),
        (40.56512, 0.00071, "40.56512 ± 0.00071"),
        (0.5, None, "0.5"),
        (None, None, "–"),
        (2.0, 0.0, "2 ± 0"),
        (155.21, 7.42, "155.2 ± 7.4"),
    ],
)
def test_a_value_has_as_many_digits_as_its_error(value: float | None, error: float | None, text: str) -> None:
    assert _cells(Row("x", (value,), (error,), (), False)) == [text]
