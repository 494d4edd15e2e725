import numpy as np
import torch

from moe_heads.analysis.weight_matching.units import FIXED, TracedTensors, UnitTable, is_fixed


def test_a_merge_is_transitive() -> None:
    table = UnitTable()
    first, second, third = (table.fresh(3) for _ in range(3))
    table.merge(first, second)
    table.merge(second[::-1], third)
    assert np.array_equal(table.find(third), table.find(first[::-1]))
    assert len(set(table.find(first).tolist())) == 3


def test_fixed_absorbs_whatever_is_merged_with_it() -> None:
    table = UnitTable()
    first, second = table.fresh(2), table.fresh(2)
    table.merge(second, first)
    table.fix(first[:1])
    assert table.find(second).tolist() == [FIXED, *first[1:]]
    assert not is_fixed(table.find(second))


def test_data_have_fixed_axes() -> None:
    traced = TracedTensors(UnitTable())
    x = torch.zeros(2, 3)
    assert all(map(is_fixed, traced.of(x))) and [len(axis) for axis in traced.of(x)] == [2, 3]
    traced.put(x, [traced.table.fresh(2), traced.table.fresh(3)])
    traced.fix(x)
    assert all(is_fixed(traced.table.find(axis)) for axis in traced.of(x))
