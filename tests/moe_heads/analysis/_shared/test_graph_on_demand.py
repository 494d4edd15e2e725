import math

import pytest
import torch

from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand


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


def without_gradients() -> float:
    """A loss of another value where no gradient is recorded."""
    return 2.0 if torch.is_grad_enabled() else 1.0


def test_records_a_graph_where_the_loss_is_another_one_without() -> None:
    graph = GraphOnDemand()
    assert graph(lambda: 3.0, compares=True) == 3.0
    assert graph(without_gradients) == 1.0  # not requested
    assert graph(without_gradients, compares=True) == 2.0
    assert graph(without_gradients) == 2.0


def test_the_comparison_draws_the_same_random_numbers() -> None:
    graph, recorded = GraphOnDemand(), []

    def draws() -> float:
        recorded.append(torch.is_grad_enabled())
        return float(torch.rand(()) + 1)

    torch.manual_seed(0)
    expected = float(torch.rand(()) + 1)
    torch.manual_seed(0)
    assert graph(draws, compares=True) == expected
    assert recorded == [True, False]


def test_a_loss_that_is_not_finite_without_a_graph_either_is_the_same() -> None:
    graph, recorded = GraphOnDemand(), []
    assert math.isnan(graph(lambda: recorded.append(torch.is_grad_enabled()) or math.nan, compares=True))
    assert recorded == [True, False]


def test_a_graph_that_does_not_fit_into_memory_is_not_compared() -> None:
    def large() -> float:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return 1.0

    graph = GraphOnDemand()
    assert graph(large, compares=True) == 1.0
    assert graph(large) == 1.0
