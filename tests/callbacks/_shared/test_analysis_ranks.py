"""One split on two ranks with errors, time limits, interrupts or different data on one of them: no rank hangs."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_heads.analysis import Ranks
from moe_heads.callbacks import AnalysisInputs, FitEndAnalysis, LossLandscapeCallback, Report, SharpnessCallback
from moe_heads.callbacks._shared.plain_context import PlainContext
from tests.support.no_second_derivative import OnceDifferentiableSine, RoughGradient
from tests.support.processes import NUM_RANKS, run_on_ranks

pytestmark = pytest.mark.timeout(200)


class SharedSite(PlainContext):
    """A plain call in which all ranks work together."""

    def ranks(self, name: str) -> Ranks:
        return Ranks(dist.group.WORLD if dist.is_initialized() else None, name)

    def loader(self, split: Any, fallbacks: Any) -> Any:
        return super().loader(split, fallbacks) if self._loaders else None

    def progress(self, description: str) -> Any:
        return nullcontext(lambda done, total, quantities: None)


class Value(FitEndAnalysis):
    """Computes a function of its inputs."""

    name = "value"

    def __init__(self, compute: Callable[[AnalysisInputs], Any], **options: Any) -> None:
        super().__init__(loss_fn=loss, **options)
        self._function = compute

    def compute(self, inputs: AnalysisInputs) -> Any:
        return self._function(inputs)

    def report(self, result: Any) -> Report:
        if result == "no report":
            raise ValueError("no report")
        return Report({"value": float(result)} if isinstance(result, (int, float)) else {})


class OnRankZero(Value):
    over_ranks = "rank_zero"


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def model_and_data() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, [(torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(3)]


def outcome(analysis: FitEndAnalysis, data: list[Any] | None = None, **options: Any) -> Any:
    """What one rank finds: the result, and the error if there was one."""
    model, plain = model_and_data()
    given = {"train": plain if data is None else data} if data != [] else {}
    error = "fine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            analysis.analyze_split(SharedSite(given, None), model, "train", "last")
        except BaseException as raised:
            error = type(raised).__name__
    result = analysis.results.get("train")
    return error, getattr(result, "metrics", lambda: result)()


def raising(rank: int, error: BaseException, mine: int, after: int = 3) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that fails on one rank after some calls."""
    calls = [0]

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        if mine == rank and calls[0] > after:
            raise error
        return loss(model, batch)

    return failing


def random_loss(model: nn.Module, batch: Any) -> Tensor:
    return loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))


def interrupt_soon(mine: bool) -> None:
    if mine:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()


def cases(rank: int) -> dict[str, Any]:
    one_sample = [(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))]
    with_text = [(x, y, ["text"] * len(y)) for x, y in model_and_data()[1]][:1]
    found: dict[str, Any] = {}

    def landscape(**options: Any) -> LossLandscapeCallback:
        return LossLandscapeCallback(splits=["train"], line_points=3, plane_points=3, **options)

    def slow(model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.05)
        return loss(model, batch)

    def part_of_the_time(inputs: AnalysisInputs) -> float:
        time.sleep(0.3 if rank == 0 else 0)
        inputs.progress.tick()
        return 1.0

    def sleepy(inputs: AnalysisInputs) -> float:
        interrupt_soon(rank == 1)
        time.sleep(0.6 if rank == 0 else 0)
        return 2.0

    found["landscape, no time for a line"] = outcome(landscape(loss_fn=slow, max_time=0.4))
    found["landscape, KeyError on one"] = outcome(landscape(loss_fn=raising(1, KeyError("x"), rank)))
    found["landscape, no second derivative"] = outcome(landscape(loss_fn=hard))
    found["once differentiable"] = outcome(SharpnessCallback(loss_fn=once, num_eigenvalues=1, density=False))
    found["one sample"] = outcome(SharpnessCallback(loss_fn=loss, num_eigenvalues=1), one_sample)
    failing = raising(1, RuntimeError("x"), rank, after=3)
    found["one sample, one fails"] = outcome(SharpnessCallback(loss_fn=failing), one_sample)
    found["cannot be cut"] = outcome(SharpnessCallback(loss_fn=loss, num_eigenvalues=1), with_text)
    found["random loss"] = outcome(SharpnessCallback(loss_fn=random_loss, num_eigenvalues=1))
    same = Value(part_of_the_time, max_time=0.2)
    found["clocks differ"] = outcome(same), outcome(Value(lambda inputs: 5.0))
    found["no pickle"] = outcome(OnRankZero(lambda inputs: lambda: 0))
    unpicklable = [(*batch, lambda: 0) for batch in model_and_data()[1]]
    found["no pickle in a batch"] = outcome(Value(lambda inputs: 1.0), unpicklable)
    found["no data on one"] = outcome(Value(lambda inputs: 3.0), None if rank == 0 else [])
    found["no data on zero"] = outcome(Value(lambda inputs: 3.0), [] if rank == 0 else None)
    interrupt_soon(rank == 1)
    found["Ctrl-C on one that waits"] = outcome(OnRankZero(lambda inputs: time.sleep(0.6) or 1.0))
    found["Ctrl-C on one that works"] = outcome(Value(sleepy))
    found["no report"] = outcome(Value(lambda inputs: "no report" if rank == 0 else 1.0))
    found["healthy"] = outcome(SharpnessCallback(loss_fn=loss, num_eigenvalues=1))
    return found


def hard(model: nn.Module, batch: Any) -> Tensor:
    return RoughGradient.apply(loss(model, batch))


def once(model: nn.Module, batch: Any) -> Tensor:
    return OnceDifferentiableSine.apply(loss(model, batch))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("case", "errors"),
    [
        ("landscape, no time for a line", ["TimeUp", "TimeUp"]),
        ("landscape, KeyError on one", ["RankError", "KeyError"]),
        ("landscape, no second derivative", ["StepsDisagreeError", "StepsDisagreeError"]),
        ("once differentiable", ["fine", "fine"]),
        ("one sample", ["fine", "fine"]),
        ("one sample, one fails", ["fine", "fine"]),  # rank zero alone computes
        ("cannot be cut", ["fine", "fine"]),
        ("random loss", ["fine", "fine"]),
        ("no pickle", ["AttributeError", "RankError"]),
        ("no pickle in a batch", ["AttributeError", "RankError"]),
        ("no data on one", ["fine", "fine"]),
        ("no data on zero", ["fine", "fine"]),
        ("Ctrl-C on one that waits", ["KeyboardInterrupt", "KeyboardInterrupt"]),
        ("Ctrl-C on one that works", ["KeyboardInterrupt", "KeyboardInterrupt"]),
        ("no report", ["ValueError", "RankError"]),
        ("healthy", ["fine", "fine"]),
    ],
)
def test_both_ranks_end_in_the_same_way(found: list[dict[str, Any]], case: str, errors: list[str]) -> None:
    assert [rank[case][0] for rank in found] == errors


def test_clocks_that_differ_end_the_work_of_both(found: list[dict[str, Any]]) -> None:
    assert [rank["clocks differ"] for rank in found] == [(("TimeUp", None), ("fine", 5.0))] * NUM_RANKS


@pytest.mark.parametrize("case", ["one sample", "cannot be cut", "random loss", "healthy"])
def test_the_result_is_that_of_one_process(found: list[dict[str, Any]], case: str) -> None:
    data = model_and_data()[1]
    samples = {
        "one sample": [(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))],
        "cannot be cut": [(*data[0], ["text"] * 8)],
    }
    loss_fn = random_loss if case == "random loss" else loss
    _, expected = outcome(SharpnessCallback(loss_fn=loss_fn, num_eigenvalues=1), samples.get(case))
    for rank in found:
        # rounding, which is the processor's, decides at which step a space of 51 dimensions is exhausted: once in the
        # iteration, and once in the check that nothing is missing
        assert rank[case][1]["num_products"] == pytest.approx(expected["num_products"], abs=2)
        assert rank[case][1] | {"num_products": 0} == pytest.approx(expected | {"num_products": 0}, rel=1e-6, abs=1e-12)
