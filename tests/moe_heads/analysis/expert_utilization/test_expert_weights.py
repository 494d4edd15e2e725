from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.nn.utils.parametrizations import weight_norm

from moe_heads import MoELayer, SoftMoE, SparseMoE
from moe_heads.analysis.expert_utilization.expert_weights import UnknownExpertsError, find_experts, num_experts_of
from tests.support.tiny_experts import FUSED, SEPARATE, GateAndList, routers_of


def stacked(*shapes: tuple[int, ...], **others: Tensor) -> nn.Module:
    module = nn.Module()
    for number, shape in enumerate(shapes):
        module.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape)))
    for name, value in others.items():
        module.register_parameter(name, nn.Parameter(value))
    return module


def block(**children: nn.Module) -> nn.Sequential:
    inner = nn.Module()
    inner.gate = nn.Linear(6, 4)
    for name, child in children.items():
        inner.add_module(name, child)
    return nn.Sequential(OrderedDict(block=inner))


def gate_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("block.gate")


@pytest.mark.parametrize(
    "head",
    [
        SparseMoE(16, 3, num_experts=2, expert_width=8, num_shared_experts=2, k=1),
        SoftMoE(16, 3, num_experts=2, expert_width=8),
        MoELayer(16, num_experts=2, expert_width=8, k=1),
    ],
)
def test_our_own_experts_without_the_shared_ones(head: SparseMoE | SoftMoE | MoELayer) -> None:
    found = find_experts(nn.Sequential(nn.Linear(16, 16), head), head.router, 2)
    assert found.module is head.experts
    assert found.matrices["fc1.weight"] is head.experts.fc1.weight
    assert found.matrices["fc2.weight"] is head.experts.fc2.weight
    assert len(found.matrices) == 2


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_of_transformers(name: str) -> None:
    model = FUSED[name]()
    for path, router in routers_of(model).items():
        num_experts = num_experts_of(router)
        assert num_experts == (8 if name == "deepseek_v3" else 4)
        found = find_experts(model, router, num_experts)
        assert found.module is model.get_submodule(path.rpartition(".")[0]).experts
        assert list(found.matrices) == ["gate_up_proj", "down_proj"]
        assert found.members == ()


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_experts_of_transformers(name: str) -> None:
    model = SEPARATE[name]()
    routers = routers_of(model)
    assert routers
    for path, router in routers.items():
        found = find_experts(model, router, 4)
        owner = model.get_submodule(path.rpartition(".")[0])
        assert found.members == tuple(owner.experts[f"expert_{number}"] for number in range(4))
        assert len(found.matrices) == 2


def test_list_of_experts_and_a_gate_inside_a_wrapper() -> None:
    inner = GateAndList()
    found = find_experts(inner, inner.gate, 4)
    assert found.members == tuple(inner.experts)
    assert list(found.matrices) == ["0.weight", "2.weight"]
    assert found.stack("0.weight", 1, 3).shape == (2, 8, 6)
    torch.testing.assert_close(found.stack("2.weight", 2, 3)[0], inner.experts[2][2].weight.detach())
    wrapped = block(experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(4)))
    gate = gate_of(wrapped)
    wrapped.get_submodule("block").gate = nn.Sequential(gate)
    assert len(find_experts(wrapped, gate, 4).members) == 4


def test_parameters_of_the_block_itself_and_of_a_child_of_the_experts() -> None:
    model = block()
    model.get_submodule("block").w1 = nn.Parameter(torch.randn(4, 3, 6))
    assert list(find_experts(model, gate_of(model), 4).matrices) == ["w1"]
    nested = nn.Module()
    nested.mlp = stacked((4, 3, 6), (4, 6, 3), bias=torch.randn(4, 6), scale=torch.randn(3))
    model = block(experts=nested, shared_experts=stacked((4, 3, 6)), attention=stacked((4, 2, 2)))
    assert list(find_experts(model, gate_of(model), 4).matrices) == ["mlp.w0", "mlp.w1"]


class Expert(nn.Linear):
    pass


def test_class_of_the_members_names_the_experts() -> None:
    model = block(ffns=nn.ModuleList(Expert(6, 6) for _ in range(4)), layers=nn.ModuleList([nn.Linear(6, 6)] * 4))
    assert len(find_experts(model, gate_of(model), 4).members) == 4


UNKNOWN = {
    "none": lambda: block(mlp=nn.Linear(6, 6)),
    "other number": lambda: block(experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(3))),
    "no name": lambda: block(layers=nn.ModuleList(nn.Linear(6, 6) for _ in range(4))),
    "only shared": lambda: block(shared_experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(4))),
    "two groups": lambda: block(experts_a=stacked((4, 3, 6)), experts_b=stacked((4, 3, 6))),
    "other shapes": lambda: block(experts=nn.ModuleList(nn.Linear(6, 5 + number // 3) for number in range(4))),
    "other classes": lambda: block(experts=nn.ModuleList([Expert(6, 6), *(nn.Linear(6, 6) for _ in range(3))])),
    "a matrix of all": lambda: block(experts=stacked((4, 3, 6), (12, 6))),
    "two lists": lambda: block(
        experts=nn.ModuleDict({name: nn.ModuleList(nn.Linear(6, 6) for _ in range(4)) for name in "ab"})
    ),
    "parametrized": lambda: block(experts=nn.ModuleList(weight_norm(nn.Linear(6, 6)) for _ in range(4))),
    "meta device": lambda: block(experts=stacked((4, 3, 6)).to("meta")),
    "8 bits": lambda: block(experts=stacked((4, 3, 6)).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_certain_is_unknown(case: str) -> None:
    model = UNKNOWN[case]()
    with pytest.raises(UnknownExpertsError):
        find_experts(model, gate_of(model), 4)


def test_a_router_alone_and_experts_of_another_layer_are_unknown() -> None:
    gate = nn.Linear(6, 4)
    with pytest.raises(UnknownExpertsError, match="no module of the model contains"):
        find_experts(gate, gate, 4)
    model = nn.Sequential(block(mlp=nn.Linear(6, 6)), block(experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(4))))
    with pytest.raises(UnknownExpertsError, match="found 0"):
        find_experts(model, model.get_submodule("0.block.gate"), 4)


def test_sharded_weights_are_unknown() -> None:
    model = block(experts=stacked((4, 3, 6)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        distribute_module(model, init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()
    with pytest.raises(UnknownExpertsError, match="w0 of the experts is sharded"):
        find_experts(model, gate_of(model), 4)


def test_number_of_experts_that_a_router_states() -> None:
    assert num_experts_of(nn.Linear(6, 5)) == 5
    assert num_experts_of(SparseMoE(16, 3, num_experts=4).router) == 4
    assert num_experts_of(nn.Identity()) is None
