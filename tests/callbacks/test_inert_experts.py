"""The callback finds an expert that receives rows and whose output is zero."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from moe_heads import SparseMoE
from moe_heads.callbacks import ExpertUtilizationCallback
from tests.support.lightning_models import PlainModule, loader, trainer


class Broken(PlainModule):
    """Its expert 1 is zero in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SparseMoE(8, 3, num_experts=4, expert_width=4)

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.head.experts.fc2.weight[1] = 0
            self.head.experts.fc2.bias_by_expert[1] = 0


@pytest.mark.parametrize("inert_below", [0.03, 0.9])
def test_one_warning_and_the_numbers_of_each_epoch_and_of_the_end(inert_below: float) -> None:
    callback = ExpertUtilizationCallback(splits=["train"], num_permutations=0, inert_below=inert_below)
    run = trainer(callback, max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Broken(), loader(), loader(seed=1))
    texts = [str(w.message) for w in caught if "experts inert" in str(w.message)]
    assert "epoch 0, head 'head': " in texts[0] and " 1 (0.0%)" in texts[0]
    assert sum(" 1 (0.0%)" in text for text in texts) == 1
    metrics = run.callback_metrics
    assert metrics["expert_utilization/epoch/head/weight_norm_min"] == 0
    assert metrics["expert_utilization/train/head/output_norm_min"] == 0
    head = callback.results["train"].heads["head"]
    assert 1 in head.inert_experts
    assert (head.inert_experts == (1,)) is (inert_below < 0.5)
    assert metrics["expert_utilization/train/head/num_inert_experts"] == len(head.inert_experts)
    assert metrics["expert_utilization/epoch/head/num_inert_experts"] >= 1


def test_warnings_can_be_switched_off_and_the_bound_is_checked() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "expert_utilization: epoch")
        trainer(ExpertUtilizationCallback(splits=["train"], warn=False), max_epochs=1).fit(Broken(), loader())
    with pytest.raises(ValueError, match="inert_below: expected"):
        ExpertUtilizationCallback(inert_below=-1.0)


def test_a_dense_model_has_no_such_numbers() -> None:
    class Dense(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

    run = trainer(ExpertUtilizationCallback(splits=["train"]), max_epochs=1)
    run.fit(Dense(), loader())
    assert not any("inert" in key for key in run.callback_metrics)
