"""Half-precision weights in float32 for a while: tied, restored, and only where memory allows it if they are frozen."""

import pytest
import torch
from torch import nn

from moe_heads.analysis._shared import float32_weights as module
from moe_heads.analysis._shared.float32_weights import Float32Copy, float32_weights
from tests.support.untouched import untouched


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.ints = nn.Buffer(torch.arange(3))


def test_the_copies_are_tied_and_the_own_tensors_come_back() -> None:
    model = Tied().bfloat16()
    own = dict(model.named_parameters())
    model.first.weight.grad = torch.ones(3, 3, dtype=torch.bfloat16)
    with untouched(model):
        with float32_weights(model):
            assert model.first.weight is model.second.weight and model.first.weight is not own["first.weight"]
            assert {p.dtype for p in model.parameters()} == {torch.float32} == {model.norm.running_mean.dtype}
            assert model.ints.dtype == torch.int64
            assert torch.equal(model.first.weight, own["first.weight"].float())
            model.first.weight.data.zero_()
        with pytest.raises(KeyError), float32_weights(model):
            raise KeyError
    assert all(p is own[name] for name, p in model.named_parameters())


def test_which_weights_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2).bfloat16().requires_grad_(False), nn.Linear(2, 1))
    copy = Float32Copy(model)
    assert (copy.name, copy.num_bytes, copy.is_used) == ("0.weight", 24, True)
    monkeypatch.setattr(module, "memory_budget", lambda *arguments, **options: 23)
    copy = Float32Copy(model)
    assert not copy.is_used and "run under autocast, as in training" in copy.message()
    model[0].requires_grad_()
    assert Float32Copy(model).is_used and "a copy in float32 is analyzed" in Float32Copy(model).message()
    assert not Float32Copy(model.float()).is_used and not Float32Copy(model).message()
