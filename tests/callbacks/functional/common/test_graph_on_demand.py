import pytest
import torch

from moe_heads.callbacks.functional.common.graph_on_demand import GraphOnDemand


def test_records_a_graph_from_the_first_call_that_asks_for_one() -> None:
    weight = torch.ones(1, requires_grad=True)
    graph, recorded = GraphOnDemand(), []

    def plain() -> float:
        recorded.append((weight * 2).requires_grad)
        return 2.0

    def penalty() -> float:
        return float(torch.autograd.grad((weight**2).sum(), weight, create_graph=True)[0].detach())

    assert (graph(plain), graph(penalty), graph(plain)) == (2.0, 2.0, 2.0)
    assert recorded == [False, True]


def test_other_errors_pass() -> None:
    graph, calls = GraphOnDemand(), []

    def fails() -> None:
        calls.append(1)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        graph(fails)
    assert len(calls) == 1
