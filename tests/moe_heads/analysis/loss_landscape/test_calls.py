import torch
from torch import nn

from moe_heads import SparseMoE
from moe_heads.analysis._shared.forwards import intercepted
from moe_heads.analysis.loss_landscape.calls import Call, largest_below


def test_a_call_knows_its_inputs_to_the_bit() -> None:
    x = torch.tensor([1.0, 2.0])
    call = Call((x,), {"scale": 2}, x * 2)
    assert call.has_inputs((x,), {"scale": 2})
    assert call.has_inputs((x.clone(),), {"scale": 2})
    for args, kwargs in (
        ((x + 1e-7,), {"scale": 2}),
        ((x.double(),), {"scale": 2}),
        ((x,), {"scale": 2.0}),
        ((x,), {"factor": 2}),
        ((x,), {}),
        ((x, x), {"scale": 2}),
        ((None,), {"scale": 2}),
    ):
        assert not call.has_inputs(args, kwargs)


def test_a_call_whose_tensors_were_changed_cannot_be_replayed() -> None:
    x = torch.ones(2)
    for changed in (0, 1):
        tensors = [x.clone(), x.clone()]
        call = Call((tensors[0],), {}, tensors[1])
        assert call.is_replayable
        tensors[changed].add_(1)
        assert not call.is_replayable


def test_what_has_a_graph_or_is_no_tensor_is_not_replayed() -> None:
    x = torch.ones(2)
    assert not Call((x,), {}, x.clone().requires_grad_()).is_replayable
    assert not Call((x,), {}, object()).is_replayable
    with torch.inference_mode():
        assert not Call((x,), {}, torch.ones(2)).is_replayable


def test_interception_ends_also_after_an_error_and_keeps_what_was_there() -> None:
    plain, patched = nn.Linear(1, 1), nn.Linear(1, 1)
    own = patched.forward = lambda x: x + 5
    seen = []
    try:
        with intercepted([plain, patched], lambda module, forward, args, kwargs: seen.append(module) or forward(*args)):
            assert patched(torch.ones(1)).item() == 6
            plain(torch.ones(1))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert seen == [patched, plain]
    assert patched.forward is own
    assert "forward" not in vars(plain)


def test_the_largest_modules_without_router_weights_or_listeners() -> None:
    head = SparseMoE(4, 2, num_experts=2, expert_width=3)
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    watched = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    watched[1].register_forward_hook(lambda *args: None)
    model = nn.Sequential(body, nn.ReLU(), watched, head)
    found = list(largest_below(model, lambda module: True))
    assert found[:3] == [body, watched[0], watched[1]]
    assert all(head.router not in (module, *module.modules()) for module in found)
