"""Sharpness of the paper's ResNet-18, with PyHessian next to it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu.piece import Report, Settings

__all__ = ["curvature"]

Batches = list[tuple[Tensor, Tensor]]


def curvature(settings: Settings, result: Report, save: Callable[[], None]) -> bool:
    """Train for some steps on random images, then compare eigenvalue, trace and seconds of both, interleaved.

    A quick run takes a smaller network.
    """
    from moe_heads.lightning_modules import CifarResNet, ResNet18Cifar

    torch.manual_seed(0)
    device, num_samples = settings.device, 8 if settings.quick else 512
    backbone = CifarResNet(8) if settings.quick else ResNet18Cifar()
    model = nn.Sequential(backbone, nn.Linear(backbone.num_features, 10)).to(device)
    x, y = torch.randn(num_samples, 3, 32, 32, device=device), torch.randint(10, (num_samples,), device=device)
    batches = list(zip(x.split(128), y.split(128), strict=True))
    _train(model, batches, 2 if settings.quick else 100)
    candidates: dict[str, Callable[[], Report]] = {"moe_heads": lambda: _ours(model.eval(), batches, settings)}
    try:
        import pyhessian  # type: ignore[import-not-found, unused-ignore]  # noqa: F401

        candidates["pyhessian"] = lambda: _pyhessian(model.eval(), (x, y))
    except ImportError as error:
        result["pyhessian"] = {"skipped": str(error)}
    for _ in range(1 if settings.quick else 3):
        for name, run in candidates.items():
            if not settings.seconds_left:
                return False
            start = time.perf_counter()
            found = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rounds = result.setdefault(name, {"rounds": []})["rounds"]
            rounds.append(found | {"seconds": round(time.perf_counter() - start, 3)})
            result[name]["median_seconds"] = statistics.median(each["seconds"] for each in rounds)
            save()
    return True


def _train(model: nn.Module, batches: Batches, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def _ours(model: nn.Module, batches: Batches, settings: Settings) -> Report:
    from moe_heads.analysis import Progress, sharpness

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    quick: dict[str, Any] = {"max_probes": 8, "max_steps": 8} if settings.quick else {}
    options: dict[str, Any] = {"num_eigenvalues": 1, "density": False, **quick}
    found = sharpness(model, loss_fn, batches, progress=Progress(max_time=max(settings.seconds_left, 1)), **options)
    return {
        "lambda_max": found.lambda_max,
        "trace": found.trace,
        "trace_stderr": found.trace_stderr,
        "num_products": found.num_products,
        "converged": found.converged,
        "partial": found.partial,
    }


def _pyhessian(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Report:
    from pyhessian import hessian  # type: ignore[import-not-found, unused-ignore]

    computed = hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=batch[0].is_cuda)
    eigenvalues, _ = computed.eigenvalues(top_n=1)
    traces = computed.trace()
    return {"lambda_max": float(eigenvalues[0]), "trace": statistics.fmean(map(float, traces))}
