"""What training recipes do with any model: averages of weights, quantization, and groups of parameters."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from moe_heads import Dense, Head, SoftMoE, SparseMoE
from moe_heads.routers import BiasBalancedRouter
from tests.support.head_zoo import ROUTERS, head_with

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor"
)

HEADS: dict[str, Callable[[], Head]] = {
    "dense": lambda: Dense(16, 3),
    "soft": lambda: SoftMoE(16, 3),
    "sparse": lambda: SparseMoE(16, 3),
    **{name: partial(head_with, name, torch.float32) for name in ROUTERS},
}


def balanced() -> SparseMoE:
    return SparseMoE(16, 3, num_experts=8, dropout=0.0, router=BiasBalancedRouter(16, 8, k=1, update_rate=0.01))


def train(head: Head, steps: int, after_step: Callable[[], object]) -> None:
    x = torch.randn(512, 16) * 0.3 + 1
    y = x[:, :3].argmax(-1)
    optimizer = torch.optim.SGD(head.parameters(), 0.05)
    for _ in range(steps):
        rows = torch.randint(512, (32,))
        optimizer.zero_grad()
        F.cross_entropy(head(x[rows]), y[rows]).backward()
        optimizer.step()
        after_step()


@pytest.mark.parametrize("name", ["torch", "torch, equal", "timm v2", "timm v3"])
def test_averages_of_a_model_average_the_bias(name: str) -> None:
    decay, head = 0.9, balanced()
    average = {
        "torch": lambda: AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True),
        "torch, equal": lambda: AveragedModel(head, use_buffers=True),
        "timm v2": lambda: ModelEmaV2(head, decay=decay),
        "timm v3": lambda: ModelEmaV3(head, decay=decay),
    }[name]()
    mean: list[torch.Tensor] = [head.router.bias_steps.clone()]

    def update() -> None:
        average.update(head) if hasattr(average, "update") else average.update_parameters(head)
        now = head.router.bias_steps
        mean.append(now.clone())

    train(head, 60, update)
    found = average.module.router.bias_steps
    if name == "torch, equal":
        expected = torch.stack(mean[1:]).mean(0)
    else:
        expected = mean[1] if name == "torch" else mean[0]
        for now in mean[2 if name == "torch" else 1 :]:
            expected = decay * expected + (1 - decay) * now
    assert head.router.bias_steps.abs().max() > 5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, found.round())
    average.module.eval()(torch.randn(4, 16))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_the_steps_of_the_bias_survive_a_cast(cast: str) -> None:
    router = BiasBalancedRouter(4, 3)
    router.bias_steps.copy_(torch.tensor([2049.0, -4099.0, 3.0]))
    getattr(nn.Sequential(router), cast)()
    assert router.bias_steps.dtype == torch.float32
    assert router.bias_steps.tolist() == [2049, -4099, 3]
    assert router.gate.weight.dtype == getattr(torch, {"half": "float16"}.get(cast, cast))


def test_buffers_that_a_wrapper_casts_are_whole_again_in_the_next_training_pass() -> None:
    router = BiasBalancedRouter(4, 3)
    router._buffers["bias_steps"] = torch.tensor([3.0, -5.0, 2.0], dtype=torch.bfloat16)
    router.train()(torch.randn(600, 4))
    assert router.bias_steps.dtype == router.pending_counts.dtype == torch.float32
    assert int(router.pending_counts.sum()) == 1200


@pytest.mark.parametrize("name", list(HEADS))
def test_dynamic_quantization_changes_no_choice(name: str) -> None:
    head = HEADS[name]().eval()
    x = torch.randn(40, head.in_features)
    expected = head(x, return_routing=True)
    quantized = quantize_dynamic(copy.deepcopy(head), {nn.Linear}, dtype=torch.qint8)
    output = quantized(x, return_routing=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0.05, atol=0.05)
    if name != "dense":
        assert torch.equal(output.routing.logits, expected.routing.logits)


def test_a_quantized_gate_runs() -> None:
    head = HEADS["soft"]().eval()
    x = torch.randn(40, 16)
    expected = head(x)
    head.router.gate = quantize_dynamic(nn.Sequential(nn.Linear(16, 8)), {nn.Linear})[0]
    assert head(x).shape == expected.shape


@pytest.mark.parametrize("name", list(HEADS))
def test_weight_decay_of_timm_spares_every_bias_and_takes_every_weight(name: str) -> None:
    head = HEADS[name]()
    without, decayed = param_groups_weight_decay(head, 0.05)
    assert (without["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    biases = {id(p) for n, p in head.named_parameters() if n.endswith("bias")}
    assert {id(p) for p in without["params"]} == biases
    assert len(decayed["params"]) == len(list(head.parameters())) - len(biases)


@pytest.mark.parametrize("name", list(HEADS))
def test_every_bias_has_one_dimension_so_that_muon_leaves_it_to_another_optimizer(name: str) -> None:
    head = HEADS[name]()
    assert {p.dim() for n, p in head.named_parameters() if n.endswith("bias")} == {1}
    matrices = [p for p in head.parameters() if p.dim() == 2]
    torch.optim.Muon(matrices)
    assert all(n.endswith("weight") for n, p in head.named_parameters() if p.dim() == 2)
