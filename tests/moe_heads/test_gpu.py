"""Heads on a CUDA device: the same numbers as on the CPU, also in CUDA graphs, without host synchronization."""

import pytest
import torch

from moe_heads import SparseMoE
from tests.support.head_zoo import FEATURES, ROUTERS, head_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("dispatch", ["auto", "all", "ragged"])
def test_equals_the_cpu(router: str, dispatch: str) -> None:
    if router == "softmax" and dispatch == "ragged":
        pytest.skip("a router that mixes all experts has one path")
    head = head_with(router, dispatch=dispatch)
    x = torch.randn(50, FEATURES).double()
    expected = head(x)
    torch.testing.assert_close(head.cuda()(x.cuda()).cpu(), expected)


def large_head(dispatch: str) -> SparseMoE:
    return SparseMoE(64, 10, num_experts=8, expert_width=128, dropout=0.0, dispatch=dispatch).cuda().eval()


@pytest.mark.parametrize("dispatch", ["all", "gathered", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_paths_in_a_cuda_graph(dispatch: str, dtype: torch.dtype) -> None:
    head = large_head(dispatch).to(dtype)
    x = torch.randn(32, 64, device="cuda", dtype=dtype)
    with torch.inference_mode():
        for _ in range(3):
            head(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = head(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        head.dispatch = "all"
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(captured, head(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_neither_a_training_pass_nor_the_statistics_wait_for_the_host(router: str) -> None:
    head = head_with(router, torch.float32).cuda().train()
    x = torch.randn(50, FEATURES, device="cuda")
    head(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = head(x, return_routing=True)
        (output.logits.sum() + output.aux_loss).backward()
        output.routing.stats()
    finally:
        torch.cuda.set_sync_debug_mode("default")
