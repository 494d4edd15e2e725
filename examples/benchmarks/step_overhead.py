"""Overhead of the callbacks in a training step in which no analysis is due.

Calls the hooks of a batch, with callbacks whose next point (``every_n_train_steps``) is far away, and compares their
CPU time with that of a training step of a small network. `ExpertUtilizationCallback`, which records every batch, has a
benchmark of its own, utilization.py.

    python examples/benchmarks/step_overhead.py --out step_overhead.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine, time_interleaved
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moe_heads.callbacks import (
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
    TrainingMonitor,
)

_FAR = 10**9


class Network(LightningModule):
    """Perceptron on 64 features, smaller than what people train."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 10)."""
        logits: Tensor = self.layers(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, data = Network(), TensorDataset(torch.randn(64, 64), torch.randint(10, (64,)))
    batch = data[:]
    analyses: list[FitEndAnalysis] = [
        SharpnessCallback(every_n_train_steps=_FAR, stages=["validate"]),
        LossLandscapeCallback(every_n_train_steps=_FAR, stages=["validate"]),
        InferenceTimingCallback(every_n_train_steps=_FAR, stages=["validate"]),
    ]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[*analyses], enable_checkpointing=False, **quiet)
    trainer.fit(network, DataLoader(data, 64))
    optimizer = network.configure_optimizers()
    monitor = TrainingMonitor(analyses)

    def hooks_of_trainer() -> None:
        for analysis in analyses:
            analysis.on_train_batch_start(trainer, network, batch, 0)
            analysis.on_before_backward(trainer, network, batch[0])
            analysis.on_before_optimizer_step(trainer, network, optimizer)
            analysis.on_train_batch_end(trainer, network, None, batch, 0)

    def training_step() -> None:
        optimizer.zero_grad()
        network.training_step(batch, 0).backward()
        optimizer.step()

    monitor.start(network)
    times = time_interleaved(
        {
            "training_step": training_step,
            "hooks_of_trainer": hooks_of_trainer,
            "step_of_monitor": lambda: monitor.step(network, batch),
        },
        rounds=options.rounds,
        loaded=True,
    )
    monitor.close()
    microseconds = {name: 1e3 * time for name, time in times.items()}
    share = {name: times[name] / times["training_step"] for name in ("hooks_of_trainer", "step_of_monitor")}
    report = {"machine": machine(), "microseconds": microseconds, "share_of_a_step": share}
    for name, time in microseconds.items():
        print(f"{name:17} {time:8.1f} µs")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
