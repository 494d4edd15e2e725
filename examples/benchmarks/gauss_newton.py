"""Cost of a product with the Gauss-Newton matrix and with the Hessian, in gradients, and the error against float64.

CPU time on one thread, interleaved. ``--peers`` names a folder with curvlinops (see ``bench/hessian_peers.py``).

    python examples/benchmarks/gauss_newton.py --peers FOLDER --out gauss_newton.json
"""

import argparse
import copy
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine, time_interleaved
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from moe_heads.analysis import analysis_mode
from moe_heads.analysis.sharpness.hessian import HessianOperator, OutputLoss
from moe_heads.lightning_modules import CifarResNet

Batch = tuple[Tensor, Tensor]

_VOCABULARY = 256


class NextToken(nn.Module):
    """GPT-2 with one row of logits for each token that has a next one."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "vocab_size": _VOCABULARY,
            "n_positions": 128,
            "n_embd": width,
            "n_layer": layers,
            "n_head": 4,
        }
        config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, (N·(T - 1), vocabulary)."""
        logits: Tensor = self.model(input_ids=tokens).logits[:, :-1]
        return logits.reshape(-1, _VOCABULARY)


def cases(is_small: bool) -> dict[str, tuple[nn.Module, Batch]]:
    """Return networks with random weights and data, by name."""
    count, width = (4, 8) if is_small else (64, 64)
    tokens = torch.randint(0, _VOCABULARY, (count // 4, 8 if is_small else 64))
    labels = torch.randint(0, 10, (count,))
    mlp = nn.Sequential(nn.Linear(784, 8 * width), nn.ReLU(), nn.Linear(8 * width, 8 * width), nn.ReLU())
    mlp.append(nn.Linear(8 * width, 10))
    found: dict[str, tuple[nn.Module, Batch]] = {
        "MLP": (mlp, (torch.randn(count, 784), labels)),
        "GPT-2": (NextToken(width, 1 if is_small else 3), (tokens, tokens[:, 1:].reshape(-1))),
    }
    if not is_small:
        backbone = CifarResNet(8)
        net = nn.Sequential(backbone, nn.Linear(backbone.num_features, 10))
        found["ResNet-8"] = (net, (torch.randn(16, 3, 32, 32), labels[:16]))
    return found


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits."""
    logits: Tensor = model(batch[0])
    return logits


def loss_of(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(outputs, batch[1])


def products(model: nn.Module, batch: Batch, peers: Path | None) -> dict[str, Callable[[], Any]]:
    """Return a gradient and products with a fixed random vector, by name."""
    loss, params = OutputLoss(outputs_of, loss_of), [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"batch_size_fn": lambda batch: len(batch[0])}
    hessian = HessianOperator(model, loss, [batch], **options)
    gauss_newton = HessianOperator(model, loss, [batch], matrix="gauss_newton", **options)
    vector = torch.randn(hessian.num_parameters, generator=torch.Generator().manual_seed(0)).to(hessian.dtype)
    calls: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(loss(model, batch), params),
        "Hessian": lambda: hessian.matvec(vector),
        "Gauss-Newton": lambda: gauss_newton.matvec(vector),
    }
    if peers is not None:
        sys.path.append(str(peers))
        library = importlib.import_module("curvlinops")
        # its weight of a batch is the number of rows of the input over num_data
        own = library.GGNLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            params,
            [batch],
            check_deterministic=False,
            num_data=len(batch[0]),
        )
        calls["curvlinops"] = lambda: own @ vector
    return calls


def measured(model: nn.Module, batch: Batch, peers: Path | None, rounds: int) -> dict[str, Any]:
    """Return the costs of one network in gradients, and the relative errors of the Gauss-Newton products."""
    with analysis_mode(model):
        calls = products(model, batch, peers)
        times = time_interleaved(calls, rounds, loaded=True)
        found = {name: calls[name]().double() for name in ("Gauss-Newton", "curvlinops") if name in calls}
    wide = copy.deepcopy(model).double()
    x = batch[0].double() if batch[0].is_floating_point() else batch[0]
    with analysis_mode(wide):
        exact = products(wide, (x, batch[1]), None)["Gauss-Newton"]()
    errors = {name: float((product - exact).norm() / exact.norm()) for name, product in found.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": times,
        "gradients": {name: time / times["gradient"] for name, time in times.items() if name != "gradient"},
        "relative_error": errors,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print the costs and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=None, help="folder with curvlinops")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="small networks, for tests of this script")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(), "cases": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own forward-mode formulas use torch.jit
        for name, (model, batch) in cases(options.small).items():
            found = report["cases"][name] = measured(model.eval(), batch, options.peers, options.rounds)
            costs = ", ".join(f"{kind} {cost:.2f}" for kind, cost in found["gradients"].items())
            print(f"{name} ({found['parameters']:,} parameters), gradients a product: {costs}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
