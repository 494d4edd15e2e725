"""Padded tokens: the padded call equals the unpadded one, for all heads, routers, dispatch paths and modes."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import Dense, Head, MoELayer, Router, Routing, SoftMoE, SparseMoE
from moe_heads.routers import ExpertChoiceRouter
from tests.moe_heads.dispatch.test_paths import CASES
from tests.support.head_zoo import CLASSES, EXPERTS, FEATURES, ROUTERS, head_with

LENGTHS = (6, 1, 3, 4)
BALANCE = {"importance": 0.3, "z": 0.2, "kl": 0.1}


def soft(**options: object) -> SoftMoE:
    sizes = {"num_experts": EXPERTS, "expert_width": 5, "dropout": 0.0, "balance": BALANCE}
    return SoftMoE(FEATURES, CLASSES, **sizes, **options).double().eval()


def with_balance(name: str, **options: object) -> SparseMoE:
    head = head_with(name, **options)
    router: Any = head.router
    router.balance = {term: c for term, c in (BALANCE | {"switch": 0.5}).items() if term in router.balance_terms}
    return head


HEADS: dict[str, Callable[[], Head]] = {
    "dense": lambda: Dense(FEATURES, CLASSES, width=5, dropout=0.0).double().eval(),
    "soft": soft,
    "soft_two_slots": lambda: soft(slots_per_expert=2),
    **{name: partial(with_balance, name) for name in ROUTERS},
    "shared": lambda: with_balance("switch", num_shared_experts=2),
    "choice_of_much": lambda: head_with("expert_choice", router=ExpertChoiceRouter(FEATURES, EXPERTS, k=3.7)),
}


def padded(padding: float = 1e3) -> tuple[list[Tensor], Tensor, Tensor]:
    """Samples (1, T, D) of several lengths, the same in one batch (B, 7, D), and its mask."""
    samples = [torch.randn(1, length, FEATURES).double() for length in LENGTHS]
    x = padding * torch.randn(len(LENGTHS), 7, FEATURES).double()
    mask = torch.zeros(len(LENGTHS), 7, dtype=torch.bool)
    for row, (sample, length) in enumerate(zip(samples, LENGTHS, strict=True)):
        # real tokens at any place, not only in front
        places = torch.randperm(7)[:length].sort().values
        x[row, places], mask[row, places] = sample[0], True
    return samples, x, mask


@pytest.mark.parametrize("name", list(HEADS))
def test_the_padded_logits_are_those_of_the_samples_alone(name: str) -> None:
    head = HEADS[name]()
    samples, x, mask = padded()
    expected = torch.cat([head(sample) for sample in samples])
    torch.testing.assert_close(head(x, mask=mask), expected)
    assert not torch.allclose(head(x), expected)


@pytest.mark.parametrize(("router", "dispatch"), CASES)
def test_every_dispatch_path_takes_a_mask(router: str, dispatch: str) -> None:
    head = head_with(router, dispatch=dispatch, num_shared_experts=1)
    samples, x, mask = padded()
    torch.testing.assert_close(head(x, mask=mask), torch.cat([head(sample) for sample in samples]))


@pytest.mark.parametrize("name", [name for name in HEADS if name != "dense"])
def test_balance_loss_and_statistics_are_those_of_the_real_tokens(name: str) -> None:
    head = HEADS[name]()
    samples, x, mask = padded()
    output = head(x, return_routing=True, mask=mask)
    routings = [head(sample, return_routing=True).routing for sample in samples]
    stats = routings[0].stats()
    for routing in routings[1:]:
        stats = stats + routing.stats()
    found = output.routing.stats()
    for field in vars(stats):
        torch.testing.assert_close(getattr(found, field), getattr(stats, field), msg=field)
    assert int(found.num_rows) == sum(LENGTHS)
    if "choice" not in name:
        # rows choose alone: the real tokens without their samples are routed alike
        torch.testing.assert_close(output.aux_loss, head.router(x[mask]).aux_loss)
        torch.testing.assert_close(found.counts, head.router(x[mask]).stats().counts)
    assert output.routing.dropped.sum() == stats.num_dropped


@pytest.mark.parametrize("name", list(HEADS))
def test_gradients_of_parameters_and_tokens_are_those_of_the_samples(name: str) -> None:
    head = HEADS[name]()
    samples, x, mask = padded()
    y = torch.randint(CLASSES, (len(LENGTHS),))
    x.requires_grad_(True)
    parameters = list(head.parameters())
    loss = F.cross_entropy(head(x, mask=mask), y)
    got = torch.autograd.grad(loss, [x, *parameters], materialize_grads=True)
    logits = torch.cat([head(sample) for sample in samples])
    want = torch.autograd.grad(F.cross_entropy(logits, y), parameters, materialize_grads=True)
    torch.testing.assert_close(list(got[1:]), list(want))
    assert not got[0][~mask].any()


@pytest.mark.parametrize("padding", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", list(HEADS))
def test_nan_in_the_padding_reaches_nothing(name: str, padding: float) -> None:
    head = HEADS[name]().train()
    _, x, mask = padded(padding)
    output = head(x, return_routing=True, mask=mask)
    assert output.logits.isfinite().all() and output.aux_loss.isfinite()
    (output.logits.sum() + output.aux_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    if output.routing is not None:
        assert output.routing.stats().num_nonfinite == 0


@pytest.mark.parametrize("name", list(HEADS))
def test_a_nan_token_is_an_error_of_its_sample_alone(name: str) -> None:
    head = HEADS[name]()
    _, x, mask = padded()
    x[1, mask[1]] = float("nan")
    output = head(x, return_routing=True, mask=mask)
    assert output.logits.isnan().any(-1).tolist() == [False, True, False, False]
    if output.routing is not None:
        assert output.routing.stats().num_nonfinite == 1


@pytest.mark.parametrize("name", list(HEADS))
def test_a_sample_without_a_real_token_has_logits_of_zero_without_a_gradient(name: str) -> None:
    head = HEADS[name]()
    _, x, mask = padded()
    mask[2] = False
    x.requires_grad_(True)
    output = head(x, return_routing=True, mask=mask)
    assert output.logits[2].tolist() == [0.0] * CLASSES
    assert output.logits[[0, 1, 3]].abs().min() > 0
    assert not torch.autograd.grad(output.logits.sum(), x)[0][2].any()
    nothing = head(x, return_routing=True, mask=torch.zeros_like(mask))
    assert not nothing.logits.any() and nothing.aux_loss.isfinite()


@pytest.mark.parametrize("name", list(HEADS))
def test_pooled_features_take_a_mask_of_samples(name: str) -> None:
    head = HEADS[name]()
    x, mask = torch.randn(9, FEATURES).double(), torch.rand(9) < 0.6
    output = head(x, return_routing=True, mask=mask)
    expected = head(x[mask], return_routing=True)
    torch.testing.assert_close(output.logits[mask], expected.logits)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert not output.logits[~mask].any()


@pytest.mark.parametrize("name", list(HEADS))
def test_a_mask_of_real_tokens_only_changes_nothing(name: str) -> None:
    head = HEADS[name]()
    x = torch.randn(3, 5, FEATURES).double()
    torch.testing.assert_close(head(x, mask=torch.ones(3, 5, dtype=torch.bool)), head(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "soft", "shared"])
def test_the_mean_over_many_tokens_stays_in_the_range_of_half_precision(name: str, dtype: torch.dtype) -> None:
    head = HEADS[name]()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(4)
    x = 3 * torch.randn(2, 900, FEATURES).double()
    mask = torch.ones(2, 900, dtype=torch.bool)
    mask[1, 300:] = False
    expected = head(x, mask=mask)
    found = head.to(dtype)(x.to(dtype), mask=mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


def test_a_dense_head_with_large_logits_does_not_overflow() -> None:
    head = Dense(2, 1, width=1).half().eval()
    with torch.no_grad():
        head.layers[3].bias.fill_(300)
    x = torch.zeros(1, 256, 2, dtype=torch.float16)
    torch.testing.assert_close(head(x, mask=torch.ones(1, 256, dtype=torch.bool)), head(x))


@pytest.mark.parametrize("k", [0.05, 1, 1.1, 1.2, 3.7])
def test_padded_samples_take_as_many_rows_as_their_tokens_alone(k: float) -> None:
    router = ExpertChoiceRouter(FEATURES, EXPERTS, k=k)
    for length in range(1, 30):
        x, mask = torch.randn(1, 30, FEATURES), torch.arange(30).unsqueeze(0) < length
        padded_counts = router(x[0], 30, mask=mask[0]).stats().counts
        assert torch.equal(padded_counts, router(x[0, :length], length).stats().counts)


@pytest.mark.parametrize("name", ["dense", "soft", "noisy_top_k", "shared", "bias_balanced", "expert_choice"])
def test_export_with_a_mask(name: str) -> None:
    head = HEADS[name]()
    _, x, mask = padded()
    program = torch.export.export(head, (x,), {"mask": mask})
    _, other, other_mask = padded()
    torch.testing.assert_close(program.module()(other, mask=other_mask), head(other, mask=other_mask))


@pytest.mark.parametrize("name", ["soft", "noisy_top_k", "expert_choice"])
def test_compile_with_a_mask_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    head = HEADS[name]()
    _, x, mask = padded()
    compiled = torch.compile(copy.deepcopy(head), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=mask), head(x, mask=mask))


@pytest.mark.parametrize("router", list(ROUTERS))
def test_layers_keep_the_tokens_and_zero_the_padding(router: str) -> None:
    given = {} if router == "noisy_top_k" else {"router": ROUTERS[router]()}
    layer = MoELayer(FEATURES, num_experts=EXPERTS, expert_width=5, **given).double().eval()
    samples, x, mask = padded()
    output = layer(x, return_routing=True, mask=mask)
    for row, sample in enumerate(samples):
        torch.testing.assert_close(output.output[row, mask[row]], layer(sample)[0])
    assert not output.output[~mask].any()
    assert int(output.routing.stats().num_rows) == sum(LENGTHS)


def test_the_bias_of_a_balanced_router_does_not_count_padding() -> None:
    router = head_with("bias_balanced").router.train()
    _, x, mask = padded()
    router(x.flatten(0, 1), 7, mask=mask.flatten())
    assert int(router.pending_counts.sum()) == 2 * sum(LENGTHS)


class NoMask(Router):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.k = 4, 1
        self.gate = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor, rows_per_sample: int = 1) -> Routing:
        probs = self.gate(x).softmax(-1)
        return Routing(probs.log(), probs, probs.topk(1).indices, probs.topk(1).values, rows_per_sample=rows_per_sample)


def test_a_router_without_a_mask_is_named() -> None:
    head = SparseMoE(FEATURES, CLASSES, num_experts=4, router=NoMask())
    x = torch.randn(2, 3, FEATURES)
    assert head(x).shape == (2, CLASSES)
    with pytest.raises(ValueError, match="mask: expected a router whose forward takes a mask, got NoMask"):
        head(x, mask=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4, dtype=torch.bool), r"mask: expected bool of shape \(2, 3\), .* got torch.bool of shape"),
        (torch.ones(2, dtype=torch.bool), r"mask: expected bool of shape \(2, 3\), .* of shape \(2,\)"),
        (torch.ones(2, 3), r"mask: expected bool of shape \(2, 3\), True for real tokens, got torch.float32"),
        (torch.ones(2, 3, dtype=torch.int64), "mask: expected bool .* got torch.int64"),
        ([[True] * 3] * 2, "mask: expected bool of shape"),
        (torch.ones(2, 3, dtype=torch.bool, device="meta"), "mask: expected the device of x, cpu, got meta"),
    ],
)
@pytest.mark.parametrize("name", ["dense", "soft", "shared"])
def test_bad_masks_are_refused(name: str, mask: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HEADS[name]()(torch.randn(2, 3, FEATURES).double(), mask=mask)
