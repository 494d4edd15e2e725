"""Follow the sharpness of a small GPT along an epoch, and measure the time that it takes.

python examples/track_sharpness.py --rounds 3 --figure track_sharpness.png --out track_sharpness.json

Trains the same model without and with the callbacks, ten steps of each in turn: the critical sharpness every 10 steps
on a quarter of the batch, the largest eigenvalue of the Hessian every 50 steps on 8 sequences. The text is the
documentation of Python's own modules, byte by byte. A round takes some three minutes on one free core.
"""

import argparse
import ast
import itertools
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moe_heads.analysis._shared.environment import environment_of
from moe_heads.analysis.critical_sharpness.figures import plot_steps
from moe_heads.callbacks import CriticalSharpnessCallback, SharpnessCallback, TrainingMonitor

NUM_BYTES = 256

_STEPS_IN_TURN = 10

# Folders of the standard library that are not documentation of it.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


class Block(nn.Module):
    """A transformer block with causal attention."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D) for x of the same shape."""
        parts = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        output: Tensor = x + self.dropout(self.mlp(self.norm_2(x)))
        return output


class GPT(nn.Module):
    """A GPT over bytes."""

    def __init__(
        self, context: int, width: int, *, num_layers: int = 4, num_heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(NUM_BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads, dropout) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, T, 256) of the next byte."""
        places = torch.arange(ids.shape[1], device=ids.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(ids) + self.places(places))))
        return logits


def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the cross-entropy of the next byte."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def documentation() -> Iterator[str]:
    """Yield the docstrings of the modules of Python's standard library, in the order of their files."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts))
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def sequences(context: int, limit: int | None) -> Tensor:
    """Return the text in pieces, (N, context + 1), or the first ones of them."""
    text = torch.frombuffer(bytearray("\n".join(documentation()).encode()), dtype=torch.uint8).long()
    count = len(text) // (context + 1)
    return text[: count * (context + 1)].view(count, -1)[:limit]


class Training:
    """One epoch of training, with the callbacks or without, that can be interrupted after any step.

    Args:
        data: The sequences.
        options: Options of the script.
        is_tracked: Whether to use the callbacks.

    Attributes:
        num_steps: Number of steps of the epoch.
        seconds: Seconds of all steps so far, and CPU seconds.
    """

    def __init__(self, data: Tensor, options: argparse.Namespace, *, is_tracked: bool) -> None:
        torch.manual_seed(0)
        self.model = GPT(data.shape[1] - 1, options.width, dropout=options.dropout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr)
        rows: Any = data
        loader: DataLoader[Tensor] = DataLoader(rows, options.batch_size, shuffle=True, drop_last=True)
        self.num_steps, self.seconds = len(loader), {"wall": 0.0, "cpu": 0.0}
        self.critical = CriticalSharpnessCallback(options.critical_every, fraction=options.fraction, on_error="raise")
        self.sharpness = SharpnessCallback(
            num_eigenvalues=1,
            tolerance=options.tolerance,
            trace=False,
            density=False,
            splits=["train"],
            num_samples=options.num_samples,
            batch_size=options.num_samples,
            every_n_train_steps=options.sharpness_every,
            on_error="raise",
        )
        self.monitor = TrainingMonitor([self.critical, self.sharpness], loss_fn=loss_fn) if is_tracked else None
        if self.monitor is not None:
            self.monitor.start(self.model, self.optimizer, train=loader)
        self._batches = iter(loader)
        self._random_state = torch.get_rng_state()

    def advance(self, num_steps: int) -> None:
        """Take some steps."""
        torch.set_rng_state(self._random_state)
        began, cpu = time.perf_counter(), time.process_time()
        for batch in itertools.islice(self._batches, num_steps):
            self.optimizer.zero_grad()
            loss_fn(self.model, batch).backward()
            self.optimizer.step()
            if self.monitor is not None:
                self.monitor.step(self.model, batch)
        self.seconds["wall"] += time.perf_counter() - began
        self.seconds["cpu"] += time.process_time() - cpu
        self._random_state = torch.get_rng_state()


def compared(data: Tensor, options: argparse.Namespace) -> tuple[Training, Training]:
    """Train without and with the callbacks, some steps of each in turn, so that both meet the same load."""
    both = tuple(Training(data, options, is_tracked=is_tracked) for is_tracked in (False, True))
    for begin in range(0, both[0].num_steps, _STEPS_IN_TURN):
        for training in both if begin // _STEPS_IN_TURN % 2 == 0 else reversed(both):
            training.advance(_STEPS_IN_TURN)
    pairs = zip(both[0].model.parameters(), both[1].model.parameters(), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise RuntimeError("the callbacks changed the training")
    return both[0], both[1]


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Train with and without the callbacks, print the overhead, and write the figure and the report."""
    options = _options(args)
    torch.set_num_threads(options.threads)
    data = sequences(options.context, options.sequences)
    Training(data, options, is_tracked=False).advance(2)  # warm up
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append(compared(data, options))
        print(f"round {number}: {_described(rounds[-1:])}", flush=True)
    tracked = rounds[-1][1]
    assert tracked.monitor is not None
    tracked.monitor.end(tracked.model)
    report: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "machine": asdict(environment_of(tracked.model)),
        "num_parameters": sum(parameter.numel() for parameter in tracked.model.parameters()),
        "num_steps": tracked.num_steps,
        "seconds": [{"without": without.seconds, "with": tracked.seconds} for without, tracked in rounds],
        "overhead": {clock: _overhead(rounds, clock) for clock in ("wall", "cpu")},
        "seconds_a_point": {
            name: list(callback.costs.seconds.values())
            for name, callback in (("critical", tracked.critical), ("sharpness", tracked.sharpness))
        },
        "critical_sharpness": tracked.critical.tracked_steps["train"],
        "sharpness": tracked.sharpness.tracked_steps["train"],
    }
    print(f"median: {_described(rounds)}")
    if options.figure is not None:
        plot_steps(report["sharpness"], report["critical_sharpness"]).savefig(options.figure, dpi=100)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _overhead(rounds: Sequence[tuple[Training, Training]], clock: str) -> float:
    """Return the additional time with the callbacks, the median over the rounds."""
    return statistics.median(tracked.seconds[clock] / without.seconds[clock] - 1 for without, tracked in rounds)


def _described(rounds: Sequence[tuple[Training, Training]]) -> str:
    return f"{_overhead(rounds, 'wall'):.1%} more time, {_overhead(rounds, 'cpu'):.1%} more CPU time"


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--critical-every", type=int, default=10)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--sharpness-every", type=int, default=50)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(args)


if __name__ == "__main__":
    main()
