"""Times of the heads by number of experts, units, batch size, precision and dispatch path."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from bench.gpu.piece import Report, Settings
from bench.mask_loop import MaskLoop
from bench.peers import behind_router
from moe_heads import NOISY_TOP_K, SoftMoE, SparseMoE, capacity, match_capacity
from moe_heads.dispatch import Dispatch

__all__ = ["heads"]

_FEATURES, _CLASSES = 512, 10
_SIZES, _BATCHES = ((8, 64), (8, 512), (32, 512), (128, 64)), (1, 32, 256, 4096)
_PATHS: tuple[Dispatch, ...] = ("auto", "all", "grouped", "ragged")
# The cells of a quick run.
_QUICK = 1


def heads(settings: Settings, result: Report, save: Callable[[], None]) -> bool:
    """Time all candidates of each cell; ``excess_of_auto`` is how much longer "auto" takes than the fastest path."""
    rows: list[Report] = result.setdefault("rows", [])
    cells = list(_cells())[: _QUICK if settings.quick else None]
    for number, (experts, width, dtype, batch) in enumerate(cells):
        if number < len(rows):
            continue
        if not settings.seconds_left:
            return False
        row: Report = {
            "num_experts": experts,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
        }
        x = torch.randn(batch, _FEATURES, device=settings.device, dtype=dtype)
        for name, module in _candidates(experts, width).items():
            try:
                row[f"{name}_ms"] = _median_ms(module.to(settings.device, dtype).eval(), x, quick=settings.quick)
            except (ValueError, RuntimeError) as error:  # the candidate does not serve this device or dtype
                row[f"{name}_ms"], row[f"{name}_error"] = None, str(error).splitlines()[0][:200]
        found = [row[f"{path}_ms"] for path in _PATHS[1:] if row[f"{path}_ms"] is not None]
        row["excess_of_auto"] = round(row["auto_ms"] / min(found) - 1, 4)
        rows.append(row)
        save()
    excesses = [row["excess_of_auto"] for row in rows]
    result["largest_excess_of_auto"] = max(excesses)
    result["share_of_auto_within_10_percent"] = sum(excess <= 0.1 for excess in excesses) / len(excesses)
    return True


def _cells() -> Iterator[tuple[int, int, torch.dtype, int]]:
    for experts, width in _SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            for batch in _BATCHES:
                yield experts, width, dtype, batch


def _candidates(num_experts: int, width: int) -> dict[str, nn.Module]:
    sparse = SparseMoE(_FEATURES, _CLASSES, num_experts, width, k=2, **NOISY_TOP_K)
    total = capacity(sparse).total
    found: dict[str, nn.Module] = {
        "dense": match_capacity("dense", _FEATURES, _CLASSES, total=total),
        "soft": SoftMoE(_FEATURES, _CLASSES, num_experts, width),
    }
    for path in _PATHS:
        found[path] = copy.deepcopy(sparse)
        found[path].dispatch = path  # type: ignore[assignment]
    found["mask_loop"] = MaskLoop(sparse)
    if (peer := _transformers(sparse)) is not None:
        found["transformers_grouped_mm"] = peer
    return found


class _Behind(nn.Module):
    """The experts of a head, computed by another library, after our router."""

    def __init__(self, head: SparseMoE, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.head, self.theirs = copy.deepcopy(head), forward
        self.call: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.call = self.call or behind_router(self.head, self.theirs)  # after the weights have been moved
        return self.call(x)


def _transformers(head: SparseMoE) -> nn.Module | None:
    try:
        from transformers.integrations.moe import grouped_mm_experts_forward
    except ImportError:
        return None
    return _Behind(head, grouped_mm_experts_forward)


def _median_ms(module: nn.Module, x: Tensor, *, quick: bool) -> float:
    timer = Timer("module(x)", globals={"module": module, "x": x})
    with torch.inference_mode():
        module(x)
        return round(1e3 * timer.blocked_autorange(min_run_time=0.01 if quick else 0.1).median, 5)
