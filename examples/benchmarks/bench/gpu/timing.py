"""Inference timing of the paper's ResNet-18 with each head."""

from collections.abc import Callable

import torch

from bench.gpu.piece import Report, Settings

__all__ = ["timing"]


def timing(settings: Settings, result: Report, save: Callable[[], None]) -> bool:
    """Time the model and its parts in every mode of the device, with its energy where NVML is there."""
    from moe_heads import NOISY_TOP_K, SparseMoE, capacity, match_capacity
    from moe_heads.analysis import Progress, inference_timing
    from moe_heads.analysis.inference_timing.calls import TimingMode
    from moe_heads.lightning_modules import MoEClassifier, ResNet18Cifar

    sparse = SparseMoE(512, 10, **NOISY_TOP_K)
    total = capacity(sparse).total
    heads = {
        "dense": match_capacity("dense", 512, 10, total=total),
        "soft": match_capacity("soft", 512, 10, total=total),
        "sparse": sparse,
    }
    modes: tuple[TimingMode, ...] = ("eager", "bf16", "channels_last")
    if settings.device.type == "cuda":
        modes = (*modes, "cuda_graph")
    for name, head in heads.items():
        if name in result:
            continue
        if settings.seconds_left < 5:
            return False
        share = settings.seconds_left / (len(heads) - len(result))
        model = MoEClassifier(ResNet18Cifar(), head).to(settings.device).eval()
        found = inference_timing(
            model,
            torch.randn(2 if settings.quick else 256, 3, 32, 32, device=settings.device),
            batch_sizes=[1] if settings.quick else [1, 32, 256, 1024],
            modes=modes[:1] if settings.quick else modes,
            num_runs=3 if settings.quick else 1000,
            seconds_per_size=0.1 if settings.quick else 1.0,
            max_seconds=share,
            progress=Progress(max_time=share),
        )
        result[name] = {"metrics": dict(found.metrics()), "summary": found.summary(), "partial": found.partial}
        save()
    return True
