"""Several processes share one analysis: equal results, decisions on rank zero, and errors on all ranks."""

import atexit
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import call, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import (
    LossLandscapeResult,
    direction_sweep,
    expert_utilization,
    loss_landscape,
    random_direction,
    sharpness,
)
from moe_heads.analysis._shared import ranks as ranks_module
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import RankError, Ranks
from tests.support.processes import NUM_RANKS, run_on_ranks


def model_and_data() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), SparseMoE(8, 3, num_experts=4, expert_width=4)).double()
    x = torch.randn(31, 5, dtype=torch.float64)
    y = torch.randint(3, (31,))
    return model, list(zip(x.split([17, 13, 1]), y.split([17, 13, 1]), strict=True))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def analyze(ranks: Ranks) -> dict[str, dict[str, float]]:
    """All analyses that share; rank 0 has more of each batch, and the whole of the last, a single sample."""
    model, data = model_and_data()
    here = slice(None) if ranks.size == 1 else [slice(0, 9), slice(9, None)][ranks.rank]
    mine = [(x[here], y[here]) for x, y in data if len(x[here])]
    directions = {"direction1": random_direction(model), "direction2": random_direction(model, 1), "num_points": 3}
    with tempfile.TemporaryDirectory() as folder:  # that of rank zero counts

        def landscape() -> LossLandscapeResult:
            file = Path(folder, "points.npz")
            return loss_landscape(
                model, cross_entropy, mine, ranks=ranks, check_curvatures=True, resume=file, **directions
            )

        first, again = landscape(), landscape()
        assert torch.equal(first.losses, again.losses)
    results = {
        "sharpness": sharpness(model, cross_entropy, mine, num_eigenvalues=3, ranks=ranks),
        "landscape": again,
        "sweep": direction_sweep(model, cross_entropy, mine, num_directions=3, num_points=3, ranks=ranks),
        "utilization": expert_utilization(model, mine, ranks=ranks),
    }
    return {name: result.metrics() for name, result in results.items()}


def raised_by(function: Callable[[], Any]) -> str:
    try:
        function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures(ranks: Ranks) -> dict[str, str]:
    """What each rank raises when the other one fails, in every kind of shared work."""
    zeros = torch.zeros(2)

    def fail_on(rank: int, error: BaseException) -> None:
        if ranks.rank == rank:
            raise error

    def synchronized(rank: int, error: BaseException) -> None:
        with ranks.synchronized():
            fail_on(rank, error)

    def evaluate_on(rank: int, error: BaseException) -> Callable[[Tensor], Tensor]:
        def evaluate(x: Tensor) -> Tensor:
            if float(x[0]) == 3:
                fail_on(rank, error)
            return x

        return evaluate

    def algorithm(total: Callable[[Tensor], Tensor]) -> float:
        return sum(float(total(torch.full((2,), float(step))).sum()) for step in range(5))

    def broken_lead(total: Callable[[Tensor], Tensor]) -> float:
        total(zeros)
        raise ValueError("no result")

    def interrupted(x: Tensor) -> Tensor:
        if ranks.rank == 1 and float(x[0]) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return x

    def out_of_time(total: Callable[[Tensor], Tensor]) -> float:
        progress = Progress(max_time=1e-9)
        total(zeros)
        progress.tick()
        return 0.0

    def in_time(total: Callable[[Tensor], Tensor]) -> str:
        try:
            return str(algorithm(total))
        except TimeUp:
            return "what there was"

    oops = ZeroDivisionError("oops")
    return {
        "together, 0": raised_by(lambda: synchronized(0, oops)),
        "together, 1": raised_by(lambda: synchronized(1, oops)),
        "together, Ctrl-C": raised_by(lambda: synchronized(1, KeyboardInterrupt())),
        "led, 0": raised_by(lambda: ranks.run_with_sums(evaluate_on(0, oops), algorithm, zeros, zeros)),
        "led, 1": raised_by(lambda: ranks.run_with_sums(evaluate_on(1, oops), algorithm, zeros, zeros)),
        "led, leader": raised_by(lambda: ranks.run_with_sums(lambda x: x, broken_lead, zeros, zeros)),
        "led, Ctrl-C": raised_by(lambda: ranks.run_with_sums(interrupted, algorithm, zeros, zeros)),
        "led, time": raised_by(lambda: ranks.run_with_sums(lambda x: x, out_of_time, zeros, zeros)),
        "led, time in a part of the sum": str(
            ranks.run_with_sums(evaluate_on(0, TimeUp("over")), in_time, zeros, zeros)
        ),
        "first": raised_by(lambda: ranks.run_on_rank_zero(lambda: 1 / 0)),
        "unpicklable": raised_by(lambda: ranks.run_on_rank_zero(lambda: lambda: 0)),
        "Ctrl-C while waiting": raised_by(lambda: interrupted_while_waiting(ranks)),
        "fine": str(ranks.run_with_sums(lambda x: x, algorithm, zeros, zeros)),
    }


def interrupted_while_waiting(ranks: Ranks) -> int:
    """Ctrl-C reaches rank one alone, while it waits for rank zero."""
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    if ranks.rank == 1:
        timer.start()
    return ranks.run_on_rank_zero(lambda: time.sleep(0.6) or 0)


def on_rank(rank: int) -> dict[str, Any]:
    with patch.object(atexit, "register") as registered:
        ranks = Ranks(dist.group.WORLD, "test")
        Ranks(dist.group.WORLD, "another analysis")
    ranks_module._SECONDS_BEFORE_WARNING = 0.2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broadcast = ranks.run_on_rank_zero(lambda: time.sleep(0.6) or {"from": rank})
    warned = [str(warning.message) for warning in caught]
    ranks_module._SECONDS_BEFORE_WARNING = 60.0
    return {
        "analyses": analyze(ranks),
        "failures": failures(ranks),
        "first": broadcast,
        "warned": warned,
        "waits_at_exit": registered.call_args_list == [call(time.sleep, 0.1)],
        "sum": ranks.sum(rank + 1),
        "gather": ranks.gather(f"rank {rank}"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(on_rank, tmp_path_factory.mktemp("ranks"), leaves_traces=True)


@pytest.mark.parametrize("analysis", ["sharpness", "landscape", "sweep", "utilization"])
def test_two_ranks_find_what_one_finds(found: list[dict[str, Any]], analysis: str) -> None:
    expected = analyze(Ranks())[analysis]
    for rank in range(NUM_RANKS):
        assert found[rank]["analyses"][analysis] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "zero", "one"),
    [
        ("together, 0", "ZeroDivisionError: oops", "RankError: rank 0: ZeroDivisionError: oops"),
        ("together, 1", "RankError: rank 1: ZeroDivisionError: oops", "ZeroDivisionError: oops"),
        ("together, Ctrl-C", "KeyboardInterrupt: ", "KeyboardInterrupt: "),
        ("led, 0", "ZeroDivisionError: oops", "RankError: rank 0: ZeroDivisionError: oops"),
        ("led, 1", "RankError: rank 1: ZeroDivisionError: oops", "ZeroDivisionError: oops"),
        ("led, leader", "ValueError: no result", "RankError: rank 0: ValueError: no result"),
        ("led, Ctrl-C", "KeyboardInterrupt: ", "KeyboardInterrupt: "),
        (
            "led, time",
            "TimeUp: max_time = 1e-09 s was over before there was a result",
            "TimeUp: max_time = 1e-09 s was over before there was a result",
        ),
        # rank zero has a result for when the time is over, wherever that is noticed
        ("led, time in a part of the sum", "what there was", "what there was"),
        ("first", "ZeroDivisionError: division by zero", "RankError: rank 0: ZeroDivisionError: division by zero"),
        ("unpicklable", "AttributeError: Can't", "RankError: rank 0: AttributeError: Can't"),
        ("Ctrl-C while waiting", "KeyboardInterrupt: ", "KeyboardInterrupt: "),
        ("fine", "40.0", "40.0"),
    ],
)
def test_an_error_on_one_rank_reaches_the_others(found: list[dict[str, Any]], case: str, zero: str, one: str) -> None:
    said = [rank["failures"][case] for rank in found]
    if case == "unpicklable":
        said = [message.partition(" pickle")[0].partition(" get")[0] for message in said]
    assert said == [zero, one]


def test_what_rank_zero_finds_everybody_gets(found: list[dict[str, Any]]) -> None:
    assert [rank["first"] for rank in found] == [{"from": 0}] * 2
    assert [rank["sum"] for rank in found] == [3, 3]
    assert [rank["gather"] for rank in found] == [["rank 0", "rank 1"]] * 2


def test_a_waiting_rank_issues_a_warning(found: list[dict[str, Any]]) -> None:
    assert found[0]["warned"] == []
    (message,) = found[1]["warned"]
    assert message.startswith("test: rank 1 of 2 has been waiting for the other ranks for 0 s.")
    assert "30 minutes" in message


def test_one_process_alone_needs_no_group() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_rank_zero) == (0, 1, True)
    assert ranks.run_on_rank_zero(lambda: 7) == 7
    assert ranks.sum(3) == 3
    assert ranks.gather("a") == ["a"]
    assert (
        ranks.run_with_sums(lambda x: 2 * x, lambda total: float(total(torch.ones(1))), torch.ones(1), torch.ones(1))
        == 2
    )
    with pytest.raises(ZeroDivisionError), ranks.synchronized():
        raise ZeroDivisionError
    with pytest.raises(TimeUp):
        ranks.run_on_rank_zero(lambda: Progress(max_time=1e-9).tick())
    assert issubclass(RankError, RuntimeError)


def test_the_process_waits_for_gloo_at_its_end_and_once(found: list[dict[str, Any]]) -> None:
    """It aborted in about one of six processes; a process alone has nothing to wait for."""
    assert all(rank["waits_at_exit"] for rank in found)
    with patch.object(atexit, "register") as registered:
        Ranks()
    registered.assert_not_called()
