"""A training step that does not add the balance loss gets one warning that names the head."""

import warnings

import pytest
import torch
from lightning import pytorch as pl
from torch.utils.data import DataLoader, TensorDataset

from moe_heads import Head, SoftMoE, SparseMoE, collect_routing
from moe_heads.analysis.expert_utilization.training import TrainingRouters
from moe_heads.callbacks import ExpertUtilizationCallback
from tests.support.lightning_models import trainer

NUM_FEATURES = 8


@pytest.fixture(autouse=True)
def _warn_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_heads.routing.loss_watch._MANY_PASSES", 30)


class Classifier(pl.LightningModule):
    def __init__(self, head: Head, adds_loss: bool) -> None:
        super().__init__()
        self.head, self.adds_loss = head, adds_loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        with collect_routing(self) as routing:
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        return loss + routing.aux_loss if self.adds_loss else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def warnings_of(head: Head, adds_loss: bool, **options: object) -> list[str]:
    x = torch.randn(640, NUM_FEATURES) * 0.3 + 1
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), 20)
    callback = ExpertUtilizationCallback(splits=["train"], num_permutations=0, **options)
    run = trainer(callback, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Classifier(head, adds_loss), data)
    return [str(warning.message) for warning in caught if "balance loss" in str(warning.message)]


@pytest.mark.parametrize(
    "head",
    [
        SparseMoE(NUM_FEATURES, 3, num_experts=4, expert_width=4),
        SoftMoE(NUM_FEATURES, 3, num_experts=4, expert_width=4),
    ],
)
def test_one_warning_after_the_first_epoch_names_the_head(head: Head) -> None:
    found = [text for text in warnings_of(head, adds_loss=False) if "got no gradient" in text]
    (text,) = found  # 64 passes, without a second warning by the router
    assert "expert_utilization: epoch 0, head 'head': the balance loss got no gradient in 32 training passes" in text
    assert "return_routing=True" in text


def test_a_collapse_without_the_loss_is_not_blamed_on_its_coefficient() -> None:
    head = SparseMoE(
        NUM_FEATURES, 3, num_experts=8, k=1, num_shared_experts=0, normalize=False, balance={"switch": 0.1}
    )
    with torch.no_grad():
        head.router.gate.bias[0] = 30.0
    texts = warnings_of(head, adds_loss=False)
    collapse = [text for text in texts if "collapses to" in text]
    assert len(collapse) == 1
    assert "Add the balance loss of the router to the training loss" in collapse[0]
    assert "balance={" not in collapse[0]


def test_no_warning_where_the_loss_is_added() -> None:
    assert warnings_of(SparseMoE(NUM_FEATURES, 3, num_experts=4, expert_width=4), adds_loss=True) == []
    assert warnings_of(SparseMoE(NUM_FEATURES, 3, num_experts=4, balance=None), adds_loss=False) == []


def test_warn_false_is_silent_during_the_fit_only() -> None:
    head = SparseMoE(NUM_FEATURES, 3, num_experts=4, expert_width=4)
    assert warnings_of(head, adds_loss=False, warn=False) == []


def test_a_router_warns_by_itself_after_a_fit_that_ended_early() -> None:
    head = SparseMoE(NUM_FEATURES, 3, num_experts=4, expert_width=4)
    with collect_routing(head) as collection:
        routers = TrainingRouters(head, collection, None, 0.01, 0.25)
    assert not head.router.loss_watch.warns
    routers.close()
    with pytest.warns(UserWarning, match="NoisyTopKRouter of 8 features and 4 experts: the balance loss"):
        for _ in range(30):
            head(torch.randn(2, NUM_FEATURES)).sum().backward()
