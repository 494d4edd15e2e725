"""Norms of the outputs of experts in the analysis: which rows count, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_heads import Routing, SparseMoE, collect_routing
from moe_heads.analysis import expert_utilization
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.expert_outputs import MAX_ROWS, OutputNorms, OutputProbes
from tests.support.processes import run_on_ranks
from tests.support.tiny_experts import FUSED, GateAndList, input_ids, routers_of
from tests.support.untouched import untouched


def adapter(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Routing:
    return Routing.from_probs(logits.softmax(-1), logits.topk(1).indices)


def of_transformers(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> Routing:
    return Routing.from_probs(output[0].softmax(-1), output[2])


def relative(model: GateAndList, x: Tensor) -> Tensor:
    """Loop over experts and rows."""
    norms = torch.stack([torch.stack([module(row).norm() for row in x.split(1)]).mean() for module in model.experts])
    norms = norms.detach().double()
    return norms / norms.quantile(0.5)


def test_first_rows_of_the_data_over_all_batches() -> None:
    head, x = SparseMoE(16, 3, num_experts=4, expert_width=8), torch.randn(1500, 16)
    result = expert_utilization(head, [(part,) for part in x.split(700)])
    first = expert_utilization(head, [(x[:MAX_ROWS],)])
    for found in (result, first):
        assert found.heads["head"].output_norms is not None and found.heads["head"].left_out == ()
    torch.testing.assert_close(result.heads["head"].output_norms, first.heads["head"].output_norms)


def test_padded_tokens_do_not_count() -> None:
    head, x = SparseMoE(16, 3, num_experts=4, expert_width=8), torch.randn(10, 6, 16)
    mask = torch.arange(6) < torch.randint(1, 7, (10, 1))
    padded = x.masked_fill(~mask.unsqueeze(-1), 1e3)
    result = expert_utilization(head, [(padded, mask)], forward_fn=lambda model, batch: model(batch[0], mask=batch[1]))
    alone = expert_utilization(head, [(x[mask],)])
    torch.testing.assert_close(result.heads["head"].output_norms, alone.heads["head"].output_norms)


def test_foreign_router_with_its_list_of_experts() -> None:
    model, x = GateAndList(), torch.randn(50, 6)
    with untouched(model):
        (head,) = expert_utilization(model, [(x[:20],), (x[20:],)], adapters={"gate": adapter}).heads.values()
    assert head.left_out == () and head.output_norms is not None and head.weight_norms is not None
    torch.testing.assert_close(head.output_norms, relative(model, x), rtol=1e-5, atol=0)


def test_model_of_transformers_is_unchanged() -> None:
    model = FUSED["mixtral"]()
    adapters = dict.fromkeys(routers_of(model), of_transformers)
    batches = [{"input_ids": input_ids()}, {"input_ids": input_ids()}]
    with untouched(model):
        result = expert_utilization(model, batches, forward_fn=lambda m, b: m(**b), adapters=adapters)
    assert len(result.heads) == 2
    for head in result.heads.values():
        assert head.left_out == () and head.output_norms is not None
        assert head.inert_experts == ()


def test_unknown_experts_leave_the_other_numbers() -> None:
    gate = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    (head,) = expert_utilization(gate, [(torch.randn(20, 6),)], adapters={"1": adapter}).heads.values()
    assert head.output_norms is None and head.weight_norms is None and head.stable_ranks is None
    assert [text.partition(" (")[0] for text in head.left_out] == ["weight norms and stable ranks", "output norms"]
    assert not {"num_inert_experts", "output_norm_min", "weight_norm_min"} & set(head.metrics())


def test_number_of_experts_is_checked() -> None:
    def two_of_four(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Routing:
        return Routing.from_probs(logits[:, :2].softmax(-1))

    (head,) = expert_utilization(GateAndList(), [(torch.randn(20, 6),)], adapters={"gate": two_of_four}).heads.values()
    assert head.output_norms is None and "states 4 experts and chooses among 2" in head.left_out[1]


class Fragile(nn.Linear):
    """Works on few rows only."""

    error: type[Exception] = KeyError

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 30:
            raise self.error("too many rows")
        return super().forward(x)


@pytest.mark.parametrize("error", [KeyError, MemoryError])
def test_experts_that_fail_and_memory_that_runs_out(error: type[Exception]) -> None:
    model, x = GateAndList(), torch.randn(40, 6)
    model.experts = nn.ModuleList(Fragile(6, 6) for _ in range(4))
    for expert in model.experts:
        expert.error = error
    with torch.no_grad():
        assert model(x).shape == x.shape  # no expert has more than 30 of the rows
    (head,) = expert_utilization(model, [(x,)], adapters={"gate": adapter}).heads.values()
    assert head.num_rows == 40
    if error is KeyError:
        assert head.output_norms is None and "the experts failed: KeyError" in head.left_out[0]
    else:  # the batch was halved, and each row counted once
        assert head.output_norms is not None
        torch.testing.assert_close(head.output_norms, relative(model, x), rtol=1e-5, atol=0)


def test_a_compiled_model_and_a_router_that_did_not_run() -> None:
    model = GateAndList()
    probes = OutputProbes(model, {"gate": model.gate}, 8)
    with probes.listening({}):
        pass
    assert probes.norms({"gate": []}, {}) == {}
    with probes.listening({}), collect_routing(model, {"gate": adapter}) as routing:
        model(torch.randn(20, 6))
    assert probes.norms(routing.routings, {"gate": 8}) == {}


def test_sums() -> None:
    one, two = OutputNorms(torch.tensor([1.0, 2.0]), 1), OutputNorms(torch.tensor([3.0, 6.0]), 3)
    total = one + two
    assert total.means is not None and total.means.tolist() == [1, 2]
    assert (one + OutputNorms(None)).means is not None
    unknown = one + OutputNorms(None, reason="why") + two
    assert unknown.means is None and unknown.reason == "why"


def on_rank(rank: int) -> Tensor | None:
    torch.manual_seed(0)
    model, x = GateAndList(), torch.randn(40, 6)
    ranks = Ranks(dist.group.WORLD)
    result = expert_utilization(model, [(x[rank::2],)], adapters={"gate": adapter}, ranks=ranks)
    return next(iter(result.heads.values())).output_norms


@pytest.mark.slow
def test_ranks_share_the_rows(tmp_path: Path) -> None:
    found = run_on_ranks(on_rank, tmp_path)
    torch.manual_seed(0)
    model, x = GateAndList(), torch.randn(40, 6)
    for norms in found:
        torch.testing.assert_close(norms, relative(model, x), rtol=1e-5, atol=0)
