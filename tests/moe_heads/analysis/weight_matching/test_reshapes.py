import numpy as np
import pytest

from moe_heads.analysis.weight_matching.reshapes import reshaped

UNITS = np.arange(1, 4)


def zeros(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.int64)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ((zeros(2), UNITS, zeros(2), zeros(2)), (2, 12)),
        ((zeros(2), zeros(4), UNITS), (8, 3)),
        ((zeros(2), UNITS, zeros(1), zeros(1)), (2, 3)),
        ((UNITS,), (1, 3, 1)),
        ((zeros(2), zeros(2), UNITS, zeros(5)), (4, 15)),
    ],
)
def test_units_follow_the_reshape_of_their_tensor(axes: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> None:
    moving = next(place for place, axis in enumerate(axes) if axis.any())
    line = axes[moving].reshape([-1 if place == moving else 1 for place in range(len(axes))])
    grid = np.broadcast_to(line, [len(axis) for axis in axes])
    found = reshaped(axes, shape)
    assert found is not None and [len(axis) for axis in found] == list(shape)
    place = next(place for place, axis in enumerate(found) if axis.any())
    line = found[place].reshape([-1 if other == place else 1 for other in range(len(shape))])
    assert np.array_equal(np.broadcast_to(line, shape), grid.reshape(shape))
    back = reshaped(found, [len(axis) for axis in axes])
    assert back is not None and all(map(np.array_equal, back, axes))


def test_a_product_of_two_axes_with_units_is_unknown() -> None:
    assert reshaped((UNITS, UNITS), (9,)) is None


def test_a_split_through_units_is_unknown() -> None:
    assert reshaped((np.arange(1, 7),), (2, 3)) is None
