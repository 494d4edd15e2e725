import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.function import sharpness
from tests.support.hand_routers import HandModel
from tests.support.hessians import classification, cross_entropy, dense_hessian, small_cnn, small_mlp

Batch = tuple[Tensor, Tensor]


def test_whole_spectrum_of_a_small_network() -> None:
    model, batch = small_mlp(), classification(20, 5)
    values, vectors = torch.linalg.eigh(dense_hessian(model, cross_entropy, batch))
    result = sharpness(model, cross_entropy, [batch], keep_eigenvectors=True, max_steps=57)
    np.testing.assert_allclose(result.eigenvalues, values.flip(0)[:5], rtol=1e-5)
    assert max(result.residuals) <= 1e-3 and result.converged
    assert abs(result.trace - float(values.sum())) < 5 * result.trace_stderr + 1e-9
    assert result.frobenius_norm == pytest.approx(float(values.norm()), rel=0.05)
    assert result.lambda_min == pytest.approx(float(values[0]), rel=1e-3)
    assert result.eigenvectors is not None and result.eigenvectors.shape == (5, 57)
    assert abs(float(result.eigenvectors[0] @ vectors[:, -1])) == pytest.approx(1, abs=1e-6)
    assert result.parameter_names == ("0.weight", "0.bias", "2.weight", "2.bias")
    # one more for the spread over the samples
    assert result.num_products == result.num_steps + result.num_probes + 1
    assert (result.num_samples, result.num_parameters) == (20, 57)


def test_blocks_hold_the_shares_of_the_eigenvectors() -> None:
    model, batch = small_mlp(), classification(20, 5)
    top = torch.linalg.eigh(dense_hessian(model, cross_entropy, batch))[1].flip(1)[:, 0].square()
    result = sharpness(model, cross_entropy, [batch], tolerance=1e-8)
    assert list(result.blocks) == ["0", "2"]
    assert result.blocks["0"].shares[0] == pytest.approx(float(top[:36].sum()), abs=1e-6)
    np.testing.assert_allclose(np.sum([block.shares for block in result.blocks.values()], axis=0), np.ones(5))
    assert [block.num_parameters for block in result.blocks.values()] == [36, 21] and not result.experts
    named = sharpness(model, cross_entropy, [batch], tolerance=1e-8, blocks={"first bias": ["0.bias"], "none": []})
    assert named.blocks["first bias"].shares[0] == pytest.approx(float(top[30:36].sum()), abs=1e-6)
    assert named.blocks["none"].shares == (0.0,) * 5 and named.blocks["none"].trace == 0


def test_traces_and_largest_eigenvalues_of_blocks() -> None:
    model, batch = small_mlp(), classification(20, 5)
    exact = dense_hessian(model, cross_entropy, batch)
    result = sharpness(model, cross_entropy, [batch], block_eigenvalues=True, density=False)
    for name, place in {"0": slice(0, 36), "2": slice(36, 57)}.items():
        block, inside = result.blocks[name], exact[place, place]
        assert abs(block.trace - float(inside.trace())) <= 4 * block.trace_stderr
        assert block.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(inside)[-1]), rel=1e-5)
        assert block.lambda_max_residual is not None and block.lambda_max_residual <= 1e-3
        assert block.lambda_max <= result.eigenvalues[0]
    assert sum(block.trace for block in result.blocks.values()) == pytest.approx(result.trace, rel=1e-9)


LAYERS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def test_blocks_and_experts_of_a_sparse_head() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), SparseMoE(6, 3, num_experts=3, expert_width=4, k=1)).double()
    batch = classification(30, 5)
    exact = dense_hessian(copy.deepcopy(model).eval(), cross_entropy, batch).diag()
    result = sharpness(model, cross_entropy, [batch], max_steps=200)
    assert list(result.blocks) == ["backbone", "router", "experts", "shared experts"]
    assert list(result.experts) == ["expert 0", "expert 1", "expert 2"]
    named = dict(model.named_parameters())
    ends = np.cumsum([p.numel() for p in named.values()])
    places = {name: exact[end - p.numel() : end] for (name, p), end in zip(named.items(), ends, strict=True)}
    for expert in range(3):
        parts = [places[f"2.experts.{kind}"].view(3, -1)[expert] for kind in LAYERS]
        found = result.experts[f"expert {expert}"]
        assert found.num_parameters == sum(map(len, parts)) == 6 * 4 + 4 + 4 * 3 + 3
        assert found.trace == pytest.approx(float(torch.cat(parts).sum()), abs=4 * found.trace_stderr + 1e-9)
    experts = sum(found.trace for found in result.experts.values())
    assert experts == pytest.approx(result.blocks["experts"].trace, rel=1e-6, abs=1e-9)
    shares = np.sum([found.shares for found in result.experts.values()], axis=0)
    np.testing.assert_allclose(shares, result.blocks["experts"].shares, atol=1e-9)


def test_a_block_may_have_the_name_of_an_expert() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), SparseMoE(6, 3, num_experts=2, expert_width=4)).double()
    batch = classification(30, 5)
    result = sharpness(model, cross_entropy, [batch], blocks={"expert 0": ["0"]}, density=False)
    other = sharpness(model, cross_entropy, [batch], blocks={"body": ["0"]}, density=False)
    assert result.blocks["expert 0"] == other.blocks["body"]
    assert result.experts["expert 0"] == other.experts["expert 0"]


def test_parameters_beside_the_stacked_ones_belong_to_no_expert() -> None:
    model = SparseMoE(5, 3, num_experts=4, expert_width=4).double()
    model.experts.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.float64)))
    model.experts.register_parameter("table", nn.Parameter(torch.ones(3, 16, dtype=torch.float64)))
    result = sharpness(model, cross_entropy, [classification(20, 5)], density=False)
    assert {found.num_parameters for found in result.experts.values()} == {5 * 4 + 4 + 4 * 3 + 3}


def test_an_expert_that_no_sample_reaches_has_no_curvature() -> None:
    head = SparseMoE(20, 3, num_experts=3, expert_width=8, k=1, num_shared_experts=0).double()
    head.router.gate.bias.data[1] = -100.0
    model = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), head).double()
    result = sharpness(model, cross_entropy, [classification(40, 5)], max_steps=60)
    assert result.trace_stderr > 0
    assert result.experts["expert 1"].trace == 0 and result.experts["expert 1"].trace_stderr < 1e-15
    assert result.experts["expert 0"].trace > 0


def test_two_heads_have_blocks_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 6)
            self.left, self.right = (SparseMoE(6, 3, num_experts=2, expert_width=4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.left(self.body(x)) + self.right(self.body(x))

    result = sharpness(Two().double(), cross_entropy, [classification(20, 5)], density=False)
    assert list(result.blocks) == [
        "backbone",
        *(f"{head} {part}" for head in ("left", "right") for part in ("router", "experts", "shared experts")),
    ]
    assert list(result.experts) == ["left expert 0", "left expert 1", "right expert 0", "right expert 1"]
    head = SparseMoE(5, 3, num_experts=2, num_shared_experts=1).double()
    alone = sharpness(head, cross_entropy, [classification(20, 5)])
    assert list(alone.blocks) == ["router", "experts", "shared experts"]


def test_some_parameters_only() -> None:
    model, batch = small_mlp(), classification(20, 5)
    exact = dense_hessian(model, cross_entropy, batch)[36:, 36:]
    result = sharpness(model, cross_entropy, [batch], params=["2"], keep_eigenvectors=True)
    assert result.parameter_names == ("2.weight", "2.bias") and result.num_parameters == 21
    np.testing.assert_allclose(result.eigenvalues, torch.linalg.eigvalsh(exact).flip(0)[:5], rtol=1e-5)
    assert list(result.blocks) == ["2"] and result.eigenvectors is not None and result.eigenvectors.shape == (5, 21)


def test_start_and_density_exclude_each_other() -> None:
    model, batch = small_mlp(), classification(20, 5)
    two: dict[str, Any] = {"density": False, "num_eigenvalues": 2}
    first = sharpness(model, cross_entropy, [batch], keep_eigenvectors=True, **two)
    assert first.eigenvectors is not None
    start = first.eigenvectors.sum(0)
    warm = sharpness(model, cross_entropy, [batch], start=start, **two)
    assert warm.num_steps < first.num_steps and warm.eigenvalues_converged
    np.testing.assert_allclose(warm.eigenvalues, first.eigenvalues, rtol=1e-5)
    with pytest.raises(ValueError, match="start: expected None with density=True"):
        sharpness(model, cross_entropy, [batch], start=start)


def test_dropout_and_batch_norm_are_in_evaluation_mode() -> None:
    model = nn.Sequential(small_cnn(), nn.Dropout(0.5)).train()
    batch = classification(40, 1, 8, 8, dtype=torch.float32)
    exact = dense_hessian(copy.deepcopy(model).eval().double(), cross_entropy, (batch[0].double(), batch[1]))
    result = sharpness(model, cross_entropy, [batch])
    expected = torch.linalg.eigvalsh(exact).flip(0)[:5]
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-4)
    assert abs(result.trace - float(exact.trace())) < 5 * result.trace_stderr


def test_batching_and_graph_mode_do_not_matter() -> None:
    model = small_mlp()
    x, y = classification(30, 5)
    batches = list(zip(x.split(13), y.split(13), strict=True))
    whole = sharpness(model, cross_entropy, [(x, y)])
    split = sharpness(model, cross_entropy, iter(batches), graph_memory=0)
    assert (whole.graph_mode, split.graph_mode) == ("kept", "rebuilt")
    np.testing.assert_allclose(split.eigenvalues, whole.eigenvalues, rtol=1e-9)
    # each batch has random vectors of its own
    assert abs(split.trace - whole.trace) < 4 * (split.trace_stderr + whole.trace_stderr) + 1e-12
    assert split.num_samples == 30
    kept = sharpness(model, cross_entropy, batches)
    assert kept.graph_mode == "kept" and split.trace == pytest.approx(kept.trace, rel=1e-9)


def test_frozen_parameters_are_left_out() -> None:
    model, batch = small_mlp(), classification(20, 5)
    exact = dense_hessian(model, cross_entropy, batch)[36:, 36:]
    model[0].requires_grad_(False)
    result = sharpness(model, cross_entropy, [batch])
    assert result.num_parameters == 21 and list(result.blocks) == ["2"]
    assert result.eigenvalues[0] == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-5)
    # 21 < 40 steps: the Krylov space holds all but the null space, and the trace is exact.
    assert result.trace == pytest.approx(float(exact.trace()), rel=1e-9) and result.trace_stderr < 1e-12


def test_seed_and_progress() -> None:
    model, batch = small_mlp(), classification(20, 5)
    seen: list[int] = []
    first = sharpness(
        model, cross_entropy, [batch], progress=Progress(show=lambda done, total, quantities: seen.append(done))
    )
    assert seen == list(range(1, first.num_products + 1))
    again, other = (sharpness(model, cross_entropy, [batch], seed=seed) for seed in (0, 1))
    # the last digits depend on the alignment of the memory on some processors
    assert first.metrics() == pytest.approx(again.metrics(), rel=1e-9, abs=1e-12, nan_ok=True)
    few: dict[str, Any] = {"num_eigenvalues": 1, "density": False}
    first, other = (sharpness(model, cross_entropy, [batch], seed=seed, **few) for seed in (0, 1))
    assert first.trace != pytest.approx(other.trace, rel=1e-6)
    assert (first.seed, other.seed) == (0, 1)


def test_without_density_it_takes_fewer_products() -> None:
    model, batch = small_mlp(), classification(20, 5)
    short = sharpness(model, cross_entropy, [batch], density=False)
    full = sharpness(model, cross_entropy, [batch])
    assert short.density is None and short.num_steps < full.num_steps > 40
    assert full.density is not None
    np.testing.assert_allclose(short.eigenvalues, full.eigenvalues, rtol=1e-5)


def snapshot(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [t.detach().clone() for t in tensors]


def failing(m: nn.Module, batch: Batch) -> Tensor:
    m.train()(batch[0])  # moves the running statistics
    torch.rand(1)
    np.random.rand()
    raise KeyError("mine")


@pytest.mark.parametrize("loss_fn", [cross_entropy, failing])
def test_leaves_no_trace_also_after_an_error(loss_fn: Callable[[nn.Module, Batch], Tensor]) -> None:
    model = small_cnn().train()
    batch = classification(20, 1, 8, 8, dtype=torch.float32)
    cross_entropy(model, batch).backward()
    model[0].eval()
    model[5].bias.requires_grad_(False)
    before, flags = snapshot(model), [m.training for m in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if loss_fn is failing:
        with pytest.raises(KeyError, match="mine"):
            sharpness(model, loss_fn, [batch])
    else:
        sharpness(model, loss_fn, [batch])
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model), before, strict=True))
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1] and np.array_equal(np.random.get_state()[1], generators[2])


def test_works_under_no_grad_and_inference_mode() -> None:
    model, batch = small_mlp(), classification(20, 5)
    expected = sharpness(model, cross_entropy, [batch]).eigenvalues
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert sharpness(model, cross_entropy, [batch]).eigenvalues == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_eigenvalues": 0}, "num_eigenvalues: expected an integer of at least 1, got 0"),
        ({"num_eigenvalues": 58}, "num_eigenvalues: expected 1 to 57, .*got 58"),
        ({"tolerance": 0.0}, "^tolerance: expected a finite number above 0, got 0.0"),
        ({"trace_tolerance": -1.0}, "trace_tolerance: expected a finite number above 0, got -1.0"),
        ({"seed": "0"}, "seed: expected an int from 0 to .* got '0'"),
        ({"density": 1}, "density: expected True or False, got 1"),
        ({"max_steps": 4}, "max_steps: expected at least num_eigenvalues = 5, got 4"),
        ({"max_probes": 2}, "max_probes: expected an integer of at least 8, got 2"),
        ({"params": ["fc"]}, "params: expected parameters .*got 'fc'"),
        ({"blocks": {"head": ["2", "2.bias"]}}, r"each parameter once in a block, got \['2.bias'\] twice in 'head'"),
        ({"blocks": {"head": ["2.weight", "fc"]}}, r"blocks: expected names .*'0.weight', got 'fc' in 'head'"),
    ],
)
def test_bad_options_are_refused_before_the_data_is_read(options: dict[str, object], message: str) -> None:
    def unread() -> Iterable[Batch]:
        raise AssertionError("the data was read")
        yield

    with pytest.raises(ValueError, match=message):
        sharpness(small_mlp(), cross_entropy, unread(), **options)


def test_bad_model_and_data() -> None:
    with pytest.raises(ValueError, match="model: expected at least one parameter that requires a gradient, got none"):
        sharpness(nn.Flatten(), cross_entropy, [classification(4, 5)])
    with pytest.raises(ValueError, match="batches"):
        sharpness(small_mlp(), cross_entropy, [])
    with pytest.raises(ValueError, match="loss_fn: expected a finite loss, got nan"):
        x, y = classification(4, 5)
        sharpness(small_mlp(), cross_entropy, [(x * float("nan"), y)])


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    model, batch = small_cnn(), classification(40, 1, 8, 8, dtype=torch.float32)
    expected = sharpness(model, cross_entropy, [batch])
    actual = sharpness(model.cuda(), cross_entropy, [batch], keep_eigenvectors=True)
    np.testing.assert_allclose(actual.eigenvalues, expected.eigenvalues, rtol=1e-3)
    assert actual.trace == pytest.approx(expected.trace, rel=1e-2)
    assert actual.eigenvectors is not None and actual.eigenvectors.device.type == "cpu"


def test_a_router_without_rechosen_leaves_out_the_routing_response_with_a_warning() -> None:
    model, x = HandModel(3, k=1).double(), torch.randn(12, 3, dtype=torch.float64)
    options: dict[str, Any] = {"num_eigenvalues": 1, "density": False, "routing_steps": [0.1]}
    with pytest.warns(UserWarning, match=r"routing_steps: .* does not define rechosen\(routing, reference\)"):
        result = sharpness(model, lambda m, b: m(b).square().mean(), [x], **options)
    assert result.routing is None and result.eigenvalues_converged and not result.partial
