"""Analyses of models sharded by FSDP2 over two processes, against the same models in one piece.

One start of the two processes serves all tests, because it takes most of their time.
"""

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import (
    Progress,
    direction_sweep,
    expert_utilization,
    filter_normalized,
    layer_normalized,
    loss_landscape,
    normalized_random_direction,
    perturbation_sharpness,
    random_direction,
    sharpness,
)
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.sharpness.hessian import HessianOperator, directional_curvatures, top_eigenvectors
from moe_heads.analysis.sharpness.pyhessian import pyhessian_sharpness
from tests.support.hessians import dense_hessian
from tests.support.processes import run_on_ranks
from tests.support.sharded_models import (
    SmallNet,
    SmoothNet,
    assert_same,
    batches_of,
    local_state,
    loss_fn,
    pair_of,
    share_of,
)

SIZES = (12, 9)
FAST: dict[str, Any] = {"num_eigenvalues": 1, "density": False, "max_probes": 8, "trace_tolerance": 1.0}


def message_of(function: Callable[[], Any]) -> str:
    try:
        return f"no error, but {function()}"
    except (ValueError, RuntimeError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def curvature(rank: int) -> dict[str, Any]:
    data = batches_of(SIZES)
    mine = share_of(data, rank)
    whole, sharded = pair_of(SmoothNet)
    optimizer = torch.optim.AdamW(sharded.parameters())
    loss_fn(sharded, mine[0]).backward()
    optimizer.step()
    whole.load_state_dict({name: p.full_tensor() for name, p in sharded.state_dict().items()})
    before = local_state(sharded)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(sum(p.numel() for p in whole.parameters()), generator=generator, dtype=torch.float64)
    dense = dense_hessian(whole, loss_fn, joined(data))
    found = {
        "form": directional_curvatures(sharded, loss_fn, mine, [direction]),
        "dense form": float(direction @ dense @ direction),
        "whole": sharpness(whole, loss_fn, data, **FAST),
        "sharded": sharpness(sharded, loss_fn, mine, **FAST),
        "head": sharpness(sharded, loss_fn, mine, params=["head"], **FAST),
        "whole head": sharpness(whole, loss_fn, data, params=["head"], **FAST),
        "vector": top_eigenvectors(sharded, loss_fn, mine, num_eigenvectors=1, params=["head"]),
        "whole vector": top_eigenvectors(whole, loss_fn, data, num_eigenvectors=1, params=["head"]),
    }
    assert_same(before, local_state(sharded))
    _, kinked = pair_of(lambda: SmoothNet(nn.ReLU), torch.float32)
    many = share_of(batches_of((400,), torch.float32), rank)
    before = local_state(kinked)
    found["relu"] = message_of(lambda: sharpness(kinked, loss_fn, many, **FAST).eigenvalues)
    assert_same(before, local_state(kinked))
    found["relu head"] = sharpness(kinked, loss_fn, many, params=["head"], **FAST).eigenvalues
    return found


def refusals(rank: int) -> dict[str, str]:
    """What would be a Hessian of zeros."""
    mine = share_of(batches_of(SIZES), rank)
    _, model = pair_of(SmoothNet)
    calls: dict[str, Callable[[], Any]] = {
        "operator": lambda: HessianOperator(model, loss_fn, mine),
        "operator of the head": lambda: HessianOperator(model, loss_fn, mine, ["head"]),
        "perturbation": lambda: perturbation_sharpness(model, loss_fn, mine),
        "pyhessian": lambda: pyhessian_sharpness(model, loss_fn, mine),
        "with perturbation": lambda: sharpness(model, loss_fn, mine, perturbation=True),
        "uneven": lambda: sharpness(model, loss_fn, mine[: 1 + rank]),
        "alone": lambda: sharpness(model, loss_fn, mine, ranks=Ranks()),
        "ablation": lambda: expert_utilization(pair_of(SmallNet)[1], mine, ablation=True),
    }
    found = {name: message_of(call) for name, call in calls.items()}
    loss = loss_fn(model, mine[0])  # from here on, the last unit shows plain parameters
    found["after a pass"] = message_of(lambda: HessianOperator(model, loss_fn, mine))
    parameters = list(model.parameters())
    zeros = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    found["autograd"] = str(all(not bool(gradient.full_tensor().any()) for gradient in zeros))
    return found


def landscapes(rank: int) -> dict[str, Any]:
    data = batches_of(SIZES)
    mine = share_of(data, rank)
    whole, sharded = pair_of(SmallNet)
    before = local_state(sharded)
    found: dict[str, Any] = {}
    for name, model, batches in (("whole", whole, data), ("sharded", sharded, mine)):
        first, second = (normalized_random_direction(model, seed) for seed in (0, 1))
        end = {key: 1.1 * value for key, value in whole.state_dict().items()}
        found[name] = {
            "directions": torch.stack([
                first,
                second,
                filter_normalized(model, random_direction(model), biases="normalized"),
                layer_normalized(model, random_direction(model)),
            ]),
            "plane": loss_landscape(
                model, loss_fn, batches, direction1=first, direction2=second, num_points=3, accuracy_fn=accuracy
            ),
            "line": loss_landscape(model, loss_fn, batches, direction1=end, num_points=3),
            "curved": loss_landscape(model, loss_fn, batches, direction1=first, num_points=3, check_curvatures=True),
            "head": loss_landscape(
                model,
                loss_fn,
                batches,
                direction1=normalized_random_direction(model, 0, params=["head"]),
                params=["head"],
                num_points=3,
                accuracy_fn=accuracy,
            ),
            "sweep": direction_sweep(model, loss_fn, batches, num_directions=2, num_points=3),
        }
    assert_same(before, local_state(sharded))
    return found


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).double().mean()


def utilization(rank: int) -> dict[str, Any]:
    data = batches_of(SIZES)
    whole, sharded = pair_of(SmallNet)
    before = local_state(sharded)
    found = {"whole": expert_utilization(whole, data), "sharded": expert_utilization(sharded, share_of(data, rank))}
    assert_same(before, local_state(sharded))
    # the time of rank one alone is over
    limit = Progress(1e-9) if rank else Progress()
    found["in time"] = message_of(lambda: expert_utilization(sharded, share_of(data, rank), progress=limit))
    line = torch.zeros(sum(p.numel() for p in whole.parameters()))
    found["line in time"] = message_of(
        lambda: loss_landscape(sharded, loss_fn, share_of(data, rank), direction1=line + 1, progress=limit)
    )
    assert_same(before, local_state(sharded))
    return found


PARTS = {"curvature": curvature, "refusals": refusals, "landscapes": landscapes, "utilization": utilization}


def work(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        try:
            found[name] = part(rank)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = run_on_ranks(work, tmp_path_factory.mktemp("ranks"))
    for of_rank in found:
        failures = [result for result in of_rank.values() if isinstance(result, str)]
        assert not failures, failures[0]
    return found


def test_curvature_equals_the_dense_hessian(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["curvature"]
        assert found["form"][0] == pytest.approx(found["dense form"], rel=1e-7)
        sharded, whole = found["sharded"], found["whole"]
        assert sharded.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-7)
        assert sharded.center_loss == pytest.approx(whole.center_loss, rel=1e-12)
        assert sharded.num_samples == whole.num_samples == sum(SIZES)
        assert sharded.eigenvalues_converged
        assert 0 < sharded.certificate.step_error < 1e-6
        assert sharded.certificate.derivative_error < 1e-6
        assert "product with half the step" in sharded.summary()
        assert sharded.metrics()["step_error"] == sharded.certificate.step_error
        assert abs(sharded.trace - whole.trace) < 4 * (sharded.trace_stderr + whole.trace_stderr)


def test_the_head_is_gathered_for_exact_products(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["curvature"]
        head, whole = found["head"], found["whole head"]
        assert head.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-9)
        assert head.trace == pytest.approx(whole.trace, rel=1e-6)
        assert head.parameter_names == ("head.weight", "head.bias")
        assert head.eigenvalues_converged
        assert float((found["vector"] * found["whole vector"]).sum().abs()) == pytest.approx(1, rel=1e-5)
        assert len(found["relu head"]) == 1


def test_a_relu_network_is_refused_with_the_number_and_the_remedy(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        message = rank["curvature"]["relu"]
        assert message.startswith("StepsDisagreeError: model: expected products")
        number = float(message.split("differ by ")[1].split(" %")[0])
        assert 5 < number < 500
        assert "Analyze a checkpoint in one process" in message
        assert 'params=["head"]' in message


def test_no_function_returns_a_hessian_of_zeros(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["refusals"]
        # this is what torch does, and why the functions check
        assert found["autograd"] == "True"
        for name in ("operator", "operator of the head", "perturbation", "pyhessian", "after a pass"):
            assert found[name].startswith("ValueError: model: expected parameters that each process holds"), found[name]
        assert found["with perturbation"].startswith("ValueError: perturbation: expected False for a sharded model")
        assert found["ablation"].startswith("ValueError: ablation: expected False for a sharded model")
        assert "the same number of batches on each rank for a sharded model, got [1, 2]" in found["uneven"]
        assert found["alone"].startswith("ValueError: ranks: expected the 2 processes that hold the parameters, got 1")


def test_landscapes_equal_those_of_the_whole_model(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        whole, sharded = rank["landscapes"]["whole"], rank["landscapes"]["sharded"]
        assert torch.equal(whole["directions"], sharded["directions"])
        for name in ("plane", "line", "curved", "head"):
            one, other = whole[name], sharded[name]
            torch.testing.assert_close(one.losses, other.losses, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(one.losses_fixed_routing, other.losses_fixed_routing, rtol=1e-12, atol=1e-12)
            assert torch.equal(one.routing_flips, other.routing_flips)
            assert one.direction_norms == pytest.approx(other.direction_norms, rel=1e-12)
            if name in {"plane", "head"}:
                torch.testing.assert_close(one.accuracies, other.accuracies, rtol=1e-12, atol=0)
        assert bool(whole["plane"].routing_flips.any())
        assert sharded["curved"].checks[0].exact == pytest.approx(whole["curved"].checks[0].exact, rel=1e-7)
        torch.testing.assert_close(whole["sweep"].losses, sharded["sweep"].losses, rtol=1e-12, atol=1e-12)


def test_utilization_counts_the_samples_of_all_processes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        whole, sharded = rank["utilization"]["whole"], rank["utilization"]["sharded"]
        assert sharded.num_samples == whole.num_samples == sum(SIZES)
        assert torch.equal(whole.load["head"], sharded.load["head"])
        torch.testing.assert_close(whole.class_map["head"], sharded.class_map["head"])
        known, expected = sharded.metrics(), whole.metrics()
        assert {name for name in expected if name not in known} == {
            "head/weight_norm_min",
            "head/stable_rank_min",
            "head/output_norm_min",
            "head/num_inert_experts",
        }
        assert known == pytest.approx({name: expected[name] for name in known}, rel=1e-9)


def test_a_time_limit_ends_all_processes_together(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in ("in time", "line in time"):
            found = rank["utilization"][name]
            assert found.startswith("TimeUp: max_time")
