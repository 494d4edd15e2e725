"""Critical sharpness of compiled models, in half precision, and of models in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.callbacks import CriticalSharpnessCallback, TrainingMonitor
from tests.support.lightning_models import assert_same, snapshot, trainer

SCRIPT = """
import json, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.callbacks.test_critical_sharpness_modes import fit
for kind in ("DDP", "FSDP2"):
    points = fit(kind)
    Path(f"{kind}{torch.distributed.get_rank()}.json").write_text(json.dumps(points))
"""


class Net(LightningModule):
    """Has no batch statistics, so the loss of a batch is the mean of those of its halves."""

    def __init__(self, kind: str = "alone") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.kind = kind
        self.double()

    def configure_model(self) -> None:
        if self.kind == "FSDP2":
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.body, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0].double()), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


def data(batch_size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.randn(32, 5, generator=generator), torch.randint(3, (32,), generator=generator))
    return DataLoader(samples, batch_size=batch_size)


def fit(kind: str) -> dict[int, Any]:
    """Train with all samples in each step, in one process or in two."""
    callback = CriticalSharpnessCallback(every_n_train_steps=1, on_error="raise")
    strategies: dict[str, Strategy] = {
        "DDP": DDPStrategy(process_group_backend="gloo"),
        "FSDP2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    }
    number = 1 if kind == "alone" else 2
    options: dict[str, Any] = {} if kind == "alone" else {"strategy": strategies[kind], "devices": 2}
    trainer(callback, max_epochs=4, **options).fit(Net(kind), data(32 // number))
    return dict(callback.tracked_steps["train"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    alone = fit("alone")
    for kind in ("DDP", "FSDP2"):
        for rank in range(2):
            found = {
                int(step): point for step, point in json.loads((tmp_path / f"{kind}{rank}.json").read_text()).items()
            }
            assert found.keys() == alone.keys()
            for step, point in alone.items():
                assert found[step] == pytest.approx(point, rel=1e-6), (kind, rank, step)


@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile", "torch.compile"])
def test_a_compiled_model(in_place: bool) -> None:
    def compiled(*callbacks: Any) -> tuple[LightningModule, Trainer]:
        own, run = Net(), trainer(*callbacks, max_epochs=4)
        if in_place:
            own.compile(backend="eager")
        run.fit(own if in_place else torch.compile(own, backend="eager"), data(32))
        return own, run

    callback = CriticalSharpnessCallback(every_n_train_steps=1, on_error="raise")
    graphs = []
    with_it, without = (), ()
    for callbacks in ((callback,), ()):
        torch._dynamo.reset()
        counters["stats"].clear()
        with_it, without = compiled(*callbacks)[0], with_it
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert_same(snapshot(without), snapshot(with_it))
    for step, point in fit("alone").items():
        assert callback.tracked_steps["train"][step] == pytest.approx(point, rel=1e-6)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return F.cross_entropy(model(batch[0]), batch[1])


def test_the_steps_of_a_gradient_scaler() -> None:
    """Scaled gradients are unscaled before the step, and a skipped step is no point."""

    def trained(*callbacks: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        batch = torch.randn(32, 5), torch.randint(3, (32,))
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.5), torch.amp.GradScaler("cpu", init_scale=2.0**30)
        monitor = TrainingMonitor(callbacks, loss_fn=loss_fn) if callbacks else None
        if monitor:
            monitor.start(model, optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale(loss_fn(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            if monitor:
                monitor.step(model, batch)
        return model, monitor

    callback = CriticalSharpnessCallback(every_n_train_steps=1, on_error="raise")
    model, monitor = trained(callback)
    assert_same(dict(trained()[0].state_dict()), dict(model.state_dict()))
    points = callback.tracked_steps["train"]
    assert 0 < len(points) == monitor.num_steps < 20
    known = [point for point in points.values() if "lambda_c" in point]
    assert len(known) >= len(points) / 2
    assert all(point["relative_error"] < 0.2 for point in known)
