"""Adapters of foreign routers cannot end a training."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from moe_heads import Routing, collect_routing
from moe_heads.callbacks import ExpertUtilizationCallback
from tests.support.lightning_models import trainer


class Block(nn.Module):
    """Someone's layer of experts, with a linear gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return (weights.unsqueeze(-1) * every.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 8))).sum(1)


class Checkpointed(pl.LightningModule):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, 8), Block(), nn.Linear(8, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def adapter(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Routing:
    assert not torch.is_grad_enabled()
    return Routing.from_probs(logits.softmax(-1), logits.topk(2).indices)


def fit(adapter: Callable[..., Any], use_reentrant: bool = False) -> tuple[ExpertUtilizationCallback, list[str]]:
    x = torch.randn(96, 8)
    callback = ExpertUtilizationCallback(
        adapters={"block.gate": adapter}, splits=["train"], num_permutations=0, warn=False
    )
    run = trainer(callback, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Checkpointed(use_reentrant), DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), 32))
    assert run.global_step == 3
    return callback, [str(w.message) for w in caught if str(w.message).startswith("expert_utilization")]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_documented_adapter_works_under_gradient_checkpointing(use_reentrant: bool) -> None:
    callback, texts = fit(adapter, use_reentrant)
    assert texts == []
    assert int(callback.history["block"][0].counts.sum()) == 2 * 96
    assert callback.results["train"].heads["block"].num_rows == 96


def test_backward_may_come_after_the_collection() -> None:
    model = Checkpointed(use_reentrant=False)
    with collect_routing(model, {"block.gate": adapter}) as routing:
        loss = model(torch.randn(6, 8)).square().mean()
    loss.backward()
    assert not routing.routings["block"][0].weights.requires_grad


def test_an_adapter_that_fails_is_reported_once_and_the_training_goes_on() -> None:
    calls = []

    def failing(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Routing:
        calls.append(1)
        raise KeyError("no such entry")

    callback, texts = fit(failing)
    (in_training, at_the_end) = texts
    assert "router 'block' cannot be read, so it is left out from now on: KeyError" in in_training
    assert "no such entry" in at_the_end
    assert callback.history == {}
    assert len(calls) == 2  # once in the training, once in the analysis


def test_outside_of_a_callback_the_error_is_raised() -> None:
    def failing(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Routing:
        raise KeyError("no such entry")

    model = Checkpointed(use_reentrant=False)
    with pytest.raises(KeyError, match="no such entry"), collect_routing(model, {"block.gate": failing}):
        model(torch.randn(6, 8))


@pytest.mark.parametrize(
    "returned",
    [
        lambda logits: Routing.from_probs(torch.rand(len(logits), 2 + len(logits) % 3)),
        lambda logits: Routing(
            logits=logits,
            probs=logits.softmax(-1),
            indices=torch.full((len(logits), 2), 7),
            weights=torch.ones(len(logits), 2),
        ),
        lambda logits: Routing(
            logits=logits,
            probs=logits.softmax(-1),
            indices=logits.topk(2).indices,
            weights=torch.ones(len(logits), 2),
            mask=torch.ones(3, dtype=torch.bool),
        ),
    ],
)
def test_what_an_adapter_returned_cannot_be_counted(returned: Callable[[Tensor], Routing]) -> None:
    def odd(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Routing:
        return returned(logits)

    callback = ExpertUtilizationCallback(
        adapters={"block.gate": odd}, splits=["train"], num_permutations=0, warn=False, stages=["test"]
    )
    data = TensorDataset(x := torch.randn(98, 8), x[:, :3].argmax(-1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=2).fit(Checkpointed(False), DataLoader(data, batch_size=33))
    messages = [str(w.message) for w in caught if "expert_utilization" in str(w.message)]
    assert len([text for text in messages if "router 'block' cannot be read" in text]) == 1
