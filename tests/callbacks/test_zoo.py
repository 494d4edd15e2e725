"""All four analyses on a collection of typical modules: no state changes, and results are plausible."""

import math
import random
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from moe_heads.analysis import ExpertUtilizationResult, InferenceTimingResult, SharpnessResult
from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks.loss_landscape import Landscape
from tests.support.hessians import cross_entropy, dense_hessian
from tests.support.lightning_models import trainer
from tests.support.sources import ROOT
from tests.support.zoo import BATCH_SIZE, CARRIES_A_STATE, NUM_SAMPLES, ZOO
from tests.support.zoo_table import ANALYSES, Entry, zoo_page

PAGE = ROOT / "docs" / "zoo.md"
OUTCOMES: dict[str, dict[str, str]] = {}
SEED, NUM_EIGENVALUES, TOLERANCE, TIMED_SIZES = 0, 2, 1e-3, (1, 4)
# losses of the modules that are small enough for a dense Hessian
DENSE: dict[str, Callable[[Any, Any], Tensor]] = {
    "boring": lambda model, batch: F.mse_loss(model(batch), torch.ones(len(batch), 2)),
    "float64": cross_entropy,
}
# twelve steps are quick, and the eigenvalues need not converge here
TOO_FEW_STEPS = "The eigenvalues did not converge in 12 steps|12 steps could not exclude a missing larger eigenvalue"
# depends on the processor
AT_THE_END_OF_FLOAT32 = {"lightning_transformer": "λ2 did not converge: float32 does not resolve"}
OF_AN_ANALYSIS = rf"({'|'.join(ANALYSES)})/"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # tensors this small are faster on one thread
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Witness(Callback):
    """Records everything that an analysis could change; the analyses stand between two witnesses."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
        own = {"_parameters", "_buffers", "_modules"}
        state = {
            "tensors": tensors,
            "grads": {name: tensor.grad for name, tensor in tensors.items() if tensor.is_leaf},
            "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
            # flags, hooks, states of metrics and whatever else a module keeps
            "attributes": {
                name: {key: value for key, value in vars(child).items() if key not in own}
                for name, child in pl_module.named_modules()
            },
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "trainer": (trainer.state.stage, trainer.state.fn, trainer.state.status),
            "torch": settings_of_torch(),
        }
        self.seen = {}
        record(self.seen, "", state, set())
        # the same objects, so that optimizers and views stay attached
        self.seen["identities"] = tuple(map(id, [*tensors.values(), *state["grads"].values()]))


def settings_of_torch() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def record(seen: dict[str, Any], path: str, value: Any, inside: set[int]) -> None:
    """What a value holds, by its path: tensors and arrays as bytes, objects with state of their own by identity."""
    if isinstance(value, Tensor):
        seen[path] = (value.dtype, value.shape, bits(value))
    elif isinstance(value, np.ndarray):
        seen[path] = (value.dtype, value.shape, value.tobytes())
    elif isinstance(value, weakref.ref):
        seen[path] = id(value())
    elif isinstance(value, (Trainer, nn.Module, type)) or callable(value):
        seen[path] = id(value)
    elif id(value) in inside:
        seen[path] = "cycle"
    elif isinstance(value, (Mapping, Sequence, Set)) and not isinstance(value, (str, bytes)):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        seen[path] = (type(value), len(value))
        for key, part in parts:
            record(seen, f"{path}/{key}", part, inside | {id(value)})
    elif hasattr(value, "__dict__"):
        record(seen, path, vars(value), inside | {id(value)})
    else:
        seen[path] = value


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


CHANGES: dict[str, Callable[[Any], object]] = {
    "bit of a weight": lambda module: module.net[0].weight.data.view(torch.uint8)[0, 0].bitwise_xor_(1),
    "gradient": lambda module: module.net[0].bias.grad.neg_(),
    "buffer": lambda module: module.net[1].running_var.add_(1e-6),
    "metric": lambda module: module.accuracy.tp.add_(1),
    "optimizer": lambda module: module.optimizers().state[module.net[0].weight]["momentum_buffer"].zero_(),
    "training flag": lambda module: module.net[3].train(not module.net[3].training),
    "requires_grad": lambda module: module.net.requires_grad_(False),
    "hook": lambda module: module.net[0].register_forward_hook(lambda *_: None),
    "identity": lambda module: setattr(module.net[0], "bias", nn.Parameter(module.net[0].bias.data)),
    "attribute": lambda module: module.kept["hidden"][1].sub_(1),
    "generator of Python": lambda module: random.random(),
    "generator of NumPy": lambda module: np.random.rand(),
    "generator of torch": lambda module: torch.rand(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_witness_detects_every_change(change: Callable[[Any], object]) -> None:
    class Changing(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            change(pl_module)

    entry = next(entry for entry in ZOO if entry.name == "float64")
    module, witnesses = entry.build(), [Witness() for _ in range(3)]
    module.kept = {"hidden": (None, torch.zeros(2))}
    fit(entry, module, [*witnesses[:2], Changing(), witnesses[2]])
    first, second, third = (witness.seen for witness in witnesses)
    assert first == second
    assert second != third


def analyses(entry: Entry) -> dict[str, FitEndAnalysis]:
    common: dict[str, Any] = {"splits": ["train"] if entry.val is None else ["train", "val"], "seed": SEED}
    sampled = common | {"num_samples": NUM_SAMPLES, "batch_size": BATCH_SIZE}
    losses = sampled | {"loss_fn": entry.loss_fn}
    plane_splits = ["train"] if entry.plane else []
    found = (
        SharpnessCallback(NUM_EIGENVALUES, TOLERANCE, max_steps=12, max_probes=16, **losses),
        LossLandscapeCallback(line_points=5, plane_points=3, plane_splits=plane_splits, **losses),
        ExpertUtilizationCallback(forward_fn=entry.forward_fn, **sampled),
        InferenceTimingCallback(
            batch_sizes=TIMED_SIZES, num_runs=3, warmup_runs=1, forward_fn=entry.forward_fn, **common
        ),
    )
    return {analysis.name: analysis for analysis in found}


def fit(entry: Entry, module: LightningModule, callbacks: list[Callback]) -> tuple[Trainer, list[str]]:
    """The trainer after fit, and what the analyses warned of."""
    run = trainer(*entry.callbacks(), *callbacks, **{"limit_val_batches": 1} | entry.trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=OF_AN_ANALYSIS)
        run.fit(module, entry.train(), entry.val and entry.val())
    return run, [str(warning.message) for warning in caught]


def own_loss(entry: Entry, module: LightningModule, run: Trainer, split: Split) -> float:
    """The module's own loss over the split, by nothing but the module."""
    vars(module)["log"] = lambda *args, **kwargs: None
    evaluate = entry.loss_fn or (lambda module, batch: module.training_step(batch, 0))
    batches = map(run.precision_plugin.convert_input, loader_of(entry, split))
    with torch.no_grad():
        module.eval()
        losses = []
        for index, batch in enumerate(batches):
            torch.manual_seed(SEED + index)  # as the Hessian's loss, whose slice the landscape is
            losses.append(evaluate(module, batch))
    del vars(module)["log"]
    return float(sum(loss["loss"] if isinstance(loss, dict) else loss for loss in losses)) / len(losses)


def loader_of(entry: Entry, split: Split) -> DataLoader[Any]:
    make = entry.train if split == "train" else entry.val
    assert make is not None
    return make()


def dense_eigenvalues(entry: Entry, module: LightningModule, split: Split) -> Tensor:
    """All eigenvalues of the Hessian, ascending, in float64."""
    double = entry.build().double().eval()
    double.load_state_dict(module.state_dict())
    batch = next(iter(DataLoader(loader_of(entry, split).dataset, NUM_SAMPLES)))
    batch = tree_map(lambda x: x.double() if x.is_floating_point() else x, batch)
    return torch.linalg.eigvalsh(dense_hessian(double, DENSE[entry.name], batch))


def check_sharpness(entry: Entry, module: LightningModule, run: Trainer, split: Split, result: SharpnessResult) -> None:
    assert all(map(math.isfinite, [*result.eigenvalues, *result.residuals, result.lambda_min, result.trace]))
    assert len(result.eigenvalues) == len(result.residuals) == NUM_EIGENVALUES
    assert result.eigenvalues == tuple(sorted(result.eigenvalues, reverse=True))
    assert result.eigenvalues[0] >= result.lambda_min
    assert result.trace_stderr >= 0 and math.isfinite(result.trace_stderr)
    assert result.certificate is not None and result.certificate.is_hessian
    is_accurate = all(residual <= TOLERANCE for residual in result.residuals)
    assert result.eigenvalues_converged == (is_accurate and result.certificate.is_complete)
    assert result.num_samples == NUM_SAMPLES
    assert run.callback_metrics[f"sharpness/{split}/lambda_max"] == pytest.approx(result.eigenvalues[0])
    if entry.name in DENSE:
        expected = dense_eigenvalues(entry, module, split)
        assert result.eigenvalues[0] == pytest.approx(expected[-1].item(), rel=1e-4)
        bound = max(0.01 * result.eigenvalues[0], result.lambda_min_residual * abs(result.lambda_min))
        assert result.lambda_min == pytest.approx(expected[0].item(), abs=bound)
        assert result.trace == pytest.approx(expected.sum().item(), abs=4 * result.trace_stderr)


def check_landscape(entry: Entry, module: LightningModule, run: Trainer, split: Split, result: Landscape) -> None:
    # a state that is carried on, or a random loss, depends on the order of the samples
    is_mixture = entry.warned.get("loss_landscape") is CARRIES_A_STATE
    tolerance = 0.1 if entry.name == "vae" else 1e-2 if is_mixture else 1e-5
    expected = pytest.approx(own_loss(entry, module, run, split), rel=tolerance)
    cuts = [result.line] if result.plane is None else [result.line, result.plane]
    assert len(cuts) == 1 + (entry.plane and split == "train")
    for cut in cuts:
        assert cut.center_loss == expected
        middle = cut.losses[tuple(size // 2 for size in cut.losses.shape)]
        assert float(middle) == expected
        assert cut.num_nonfinite == 0
    assert run.callback_metrics[f"loss_landscape/{split}/line_center_loss"] == expected


def check_utilization(
    entry: Entry, module: LightningModule, run: Trainer, split: Split, result: ExpertUtilizationResult
) -> None:
    assert set(result.heads) == ({"net.fc"} if entry.has_experts else set())
    for name, load in result.load.items():
        assert float(load.sum()) == pytest.approx(1)
        assert float(result.importance[name].sum()) == pytest.approx(1)


def check_timing(
    entry: Entry, module: LightningModule, run: Trainer, split: Split, result: InferenceTimingResult
) -> None:
    assert [row.batch_size for row in result.rows if row.module == "model"] == [*TIMED_SIZES]
    assert all(0 < row.p50_ms <= row.p90_ms <= row.p99_ms for row in result.rows)
    assert f"inference_timing/{split}/model/batch{TIMED_SIZES[0]}/p50_ms" in run.callback_metrics


CHECKS: dict[str, Callable[..., None]] = {
    "sharpness": check_sharpness,
    "loss_landscape": check_landscape,
    "expert_utilization": check_utilization,
    "inference_timing": check_timing,
}


# more than 5 s each
_LARGE = {"deeplab_resnet", "resnet", "timm_convnext", "timm_vit"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, marks=[pytest.mark.slow] if entry.name in _LARGE else []) for entry in ZOO],
    ids=[entry.name for entry in ZOO],
)
def test_zoo(entry: Entry) -> None:
    before, after, found = Witness(), Witness(), analyses(entry)
    module = entry.build()
    run, warned = fit(entry, module, [before, *found.values(), after])
    changed = sorted(path for path in before.seen.keys() | after.seen if before.seen.get(path) != after.seen.get(path))
    assert not changed
    for name, analysis in found.items():
        messages = [message for message in warned if message.startswith(f"{name}/")]
        accepted = "|".join(filter(None, [TOO_FEW_STEPS, AT_THE_END_OF_FLOAT32.get(entry.name)]))
        messages = [message for message in messages if not re.search(accepted, message)]
        expected = entry.unsupported.get(name) or entry.warned.get(name)
        assert len(messages) == (len(analysis.splits) if expected else 0), messages
        assert all(expected and re.search(expected.message, message) for message in messages), messages
        assert set(analysis.results) == (set() if name in entry.unsupported else set(analysis.splits))
        for split, result in analysis.results.items():
            CHECKS[name](entry, module, run, split, result)
    OUTCOMES[entry.name] = {name: outcome(entry, name) for name in found}


def outcome(entry: Entry, analysis: str) -> str:
    if analysis in entry.unsupported:
        return f"unsupported: {entry.unsupported[analysis].reason}"
    if analysis in entry.warned:
        return f"ok (warned: {entry.warned[analysis].reason})"
    return "ok (no experts)" if analysis == "expert_utilization" and not entry.has_experts else "ok"


def test_the_page_shows_these_outcomes() -> None:
    missing = [entry.name for entry in ZOO if entry.name not in OUTCOMES]
    if missing:
        pytest.skip(f"needs every module of the zoo to have run and passed; missing: {', '.join(missing)}")
    page = zoo_page(ZOO, OUTCOMES)
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        PAGE.write_text(page, encoding="utf-8")
        pytest.fail("docs/zoo.md was out of date and has been rewritten: look at the difference and commit it")
