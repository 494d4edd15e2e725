import time

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Dense, SoftMoE
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.inference_timing import inference_timing
from tests.support.hand_routers import HandHead
from tests.support.untouched import untouched


class Slow(nn.Module):
    """Sleeps a while for each sample."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x))
        return x


class Pair(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


QUICK = {"num_runs": 3, "warmup_runs": 0}


def test_known_latencies_are_found_for_the_whole_and_its_parts() -> None:
    model = Pair(Slow(0.004), Slow(0.001))
    timing = inference_timing(model, torch.zeros(2, 3), batch_sizes=(1, 5), num_runs=5, warmup_runs=1)
    rows = {(row.module, row.batch_size): row for row in timing.rows}
    assert list(rows) == [(m, b) for b in (1, 5) for m in ("model", "backbone", "head")]
    # sleeping takes at least as long as asked; how much longer, the machine decides
    for (module, size), row in rows.items():
        least = size * {"model": 5.0, "backbone": 4.0, "head": 1.0}[module]
        assert least <= row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.samples_per_s == pytest.approx(1000 * size / row.mean_ms)
        assert row.num_runs == 5
        assert row.mode == "eager"
    assert rows["head", 5].p50_ms < rows["backbone", 5].p50_ms


def test_percentiles_keep_the_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [float(t) for t in (*range(1, 100), 5000)]
    clock = iter([instant for t in times for instant in (0, int(t * 1e6))])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    (row,) = inference_timing(nn.Identity(), torch.zeros(1), batch_sizes=[4], num_runs=100, warmup_runs=0).rows
    assert row.p50_ms == pytest.approx(50.5)
    assert row.p90_ms == pytest.approx(90.1)
    assert row.p99_ms == pytest.approx(99 + 0.01 * (5000 - 99))
    assert row.mean_ms == pytest.approx(sum(times) / 100)
    assert row.std_ms == pytest.approx(torch.tensor(times).std().item(), rel=1e-5)
    assert row.samples_per_s == pytest.approx(4 * 100 / sum(times) * 1000)


def test_modules_run_on_the_inputs_they_had_in_evaluation_and_inference_mode() -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            seen.append((x.clone(), scale.clone(), self.training, torch.is_inference_mode_enabled()))
            return x * scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Watching()

        def forward(self, x: Tensor) -> Tensor:
            hidden = x + 1
            out = self.part(hidden, scale=torch.tensor(2.0))
            hidden.zero_()  # work in place after the call must not reach the captured input
            return out

    inference_timing(Model(), torch.arange(3.0), batch_sizes=[5], modules=["part"], **QUICK)
    assert len(seen) == 1 + 2 * 3
    for x, scale, training, inference in seen:
        assert x.tolist() == [1, 2, 3, 1, 2]
        assert scale.item() == 2
        assert not training
        assert inference


def test_the_warm_up_is_run_but_not_timed() -> None:
    model, calls = Slow(0.0), []
    model.register_forward_hook(lambda *_: calls.append(1))
    timing = inference_timing(model, torch.zeros(1), batch_sizes=[1], num_runs=4, warmup_runs=3)
    assert timing.rows[0].num_runs == 4
    assert timing.warmup_runs == 3
    assert len(calls) == 1 + 7  # one to capture the inputs of modules


def test_modules_take_turns_in_an_order_that_the_seed_decides() -> None:
    def order(seed: int) -> list[int]:
        turns: list[int] = []
        model = nn.Sequential(*(nn.Identity() for _ in range(3)))
        for index, module in enumerate(model):
            module.register_forward_hook(lambda *_, index=index: turns.append(index))
        inference_timing(
            model, torch.zeros(1), batch_sizes=[1], modules=["0", "1", "2"], num_runs=10, warmup_runs=0, seed=seed
        )
        return turns

    first = order(1)
    assert first == order(1) != order(2)
    # every round runs each module once alone and once in the whole; the capture before runs each once
    assert sorted(first) == sorted([0, 1, 2] * 21)
    assert len({tuple(first[i : i + 6]) for i in range(3, 63, 6)}) > 1


def test_default_modules_are_backbone_head_and_owners_of_a_router() -> None:
    def modules(model: nn.Module, x: Tensor) -> list[str]:
        return [row.module for row in inference_timing(model, x, batch_sizes=[2], **QUICK).rows]

    assert modules(Pair(nn.Linear(3, 4), Dense(4, 2)), torch.randn(1, 3)) == ["model", "backbone", "head"]
    body = nn.Sequential(nn.Linear(3, 4), SoftMoE(4, 2, num_experts=2, expert_width=2))
    assert modules(body, torch.randn(1, 3)) == ["model", "1"]
    assert modules(HandHead(3), torch.randn(1, 3)) == ["model"]
    wrapper = nn.Sequential()
    wrapper.add_module("model", HandHead(3))
    assert modules(wrapper, torch.randn(1, 3)) == ["model", "model.model"]
    idle = Pair(nn.Linear(3, 4), Dense(4, 2))
    idle.auxiliary = HandHead(4)
    assert modules(idle, torch.randn(1, 3)) == ["model", "backbone", "head"]


def test_only_what_counts_the_samples_is_repeated() -> None:
    shapes = []

    def forward(model: nn.Module, batch: dict) -> None:
        shapes.append({key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)})

    batch = {"x": torch.zeros(3, 2), "y": torch.zeros(3), "vocabulary": torch.zeros(7), "scale": torch.ones(()), "n": 1}
    inference_timing(nn.Identity(), batch, batch_sizes=[4], forward_fn=forward, **QUICK)
    assert shapes[0] == {"x": (4, 2), "y": (4,), "vocabulary": (7,), "scale": ()}


def test_environment_is_that_of_the_caller() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        environment = inference_timing(nn.Linear(2, 2), torch.zeros(1, 2), batch_sizes=[1], **QUICK).environment
    assert (environment.device_type, environment.dtype, environment.autocast) == ("cpu", "float32", "bfloat16")
    assert environment.num_threads == torch.get_num_threads()
    assert environment.torch_version == torch.__version__


def test_the_model_is_untouched_also_after_an_error() -> None:
    model = Pair(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)), Dense(4, 2))
    good, too_wide = torch.randn(2, 3), torch.randn(2, 9)
    with untouched(model):
        inference_timing(model, good, batch_sizes=[2], **QUICK)
    with untouched(model), pytest.raises(RuntimeError, match="shapes"):
        inference_timing(model, too_wide, batch_sizes=[2], **QUICK)


def test_progress_counts_rounds() -> None:
    steps: list[tuple[int, int]] = []
    inference_timing(
        nn.Identity(),
        torch.zeros(1),
        batch_sizes=[1, 2],
        num_runs=2,
        warmup_runs=1,
        monitor=Monitor(show=lambda *step: steps.append(step[:2])),
    )
    assert steps == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": []}, r"batch_sizes: expected a list of different whole numbers from 1 on; got \[\]"),
        ({"batch_sizes": [0]}, r"batch_sizes: .* got \[0\]"),
        ({"batch_sizes": [2, 2]}, r"batch_sizes: .* got \[2, 2\]"),
        ({"num_runs": 0}, "num_runs: expected at least 1; got 0"),
        ({"warmup_runs": -1}, "warmup_runs: expected at least 0; got -1"),
        ({"example_batch": torch.zeros(0, 3)}, "example_batch: expected at least one sample; got none"),
        ({"modules": ["neck"]}, r"modules: expected names of modules, such as 'backbone'; got \['neck'\]"),
        ({"modules": ["spare"]}, r"modules: expected modules that run in the forward pass; \['spare'\] do not"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    model = Pair(nn.Linear(3, 3), nn.Linear(3, 3))
    model.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=message):
        inference_timing(model, **({"example_batch": torch.zeros(2, 3)} | options))
