"""Balance losses of a routing against formulas in terms of the rows and the weights of the gate."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads import Routing
from moe_heads.routers import BiasBalancedRouter, LinearRouter, NoisyTopKRouter, SoftmaxRouter, SwitchRouter

EXPERTS, ROWS = 5, 12


def squared_cv(sums: list[float]) -> float:
    mean = sum(sums) / len(sums)
    return sum((value - mean) ** 2 for value in sums) / len(sums) / mean**2


def by_hand(term: str, router: LinearRouter, routing: Routing, x: Tensor) -> float:
    """The loss from the clean logits x·W + b, the noise that was drawn, and the experts that were chosen."""
    z = (x @ router.gate.weight.T + router.gate.bias).double()
    deciding = z if routing.noisy_logits is None else routing.noisy_logits.double()
    k = EXPERTS if routing.indices is None else routing.indices.shape[1]
    probs, gates, chosen = [], [], []
    for n in range(ROWS):
        total = sum(math.exp(value) for value in deciding[n].tolist())
        probs.append([math.exp(value) / total for value in deciding[n].tolist()])
        order = [0] * EXPERTS
        picked = range(EXPERTS) if routing.indices is None else routing.indices[n].tolist()
        for expert in picked:
            order[expert] = 1
        if isinstance(router, BiasBalancedRouter):
            scores = [1 / (1 + math.exp(-value)) for value in z[n].tolist()]
            norm = sum(scores[e] for e in picked)
        elif k == 1 or routing.indices is None:
            scores, norm = probs[n], 1.0
        else:
            scores = [math.exp(value) for value in deciding[n].tolist()]
            norm = sum(scores[e] for e in picked)
        gates.append([scores[e] / norm * order[e] for e in range(EXPERTS)])
        chosen.append(order)

    def columns(rows: list[list[float]]) -> list[float]:
        return [sum(row[e] for row in rows) for e in range(EXPERTS)]

    mean_probs = [value / ROWS for value in columns(probs)]
    if term == "importance":
        return squared_cv(columns(gates))
    if term == "switch":
        shares = [count / (k * ROWS) for count in columns(chosen)]
        return EXPERTS * sum(f * p for f, p in zip(shares, mean_probs, strict=True))
    if term == "z":
        return sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in z.tolist()) / ROWS
    if term == "kl":
        return sum(p * math.log(p * EXPERTS) for p in mean_probs)
    assert term == "load"
    if routing.noise_std is None:
        return squared_cv(columns(chosen))
    chances = []
    for n in range(ROWS):
        row = []
        for e in range(EXPERTS):
            others = sorted((deciding[n, o].item() for o in range(EXPERTS) if o != e), reverse=True)
            distance = (z[n, e].item() - others[k - 1]) / routing.noise_std[n, e].item()
            row.append(0.5 * (1 + math.erf(distance / math.sqrt(2))))
        chances.append(row)
    return squared_cv(columns(chances))


ROUTERS = {
    "noisy_top_2": lambda: NoisyTopKRouter(6, EXPERTS, k=2),
    "noisy_top_1": lambda: NoisyTopKRouter(6, EXPERTS, k=1),
    "switch": lambda: SwitchRouter(6, EXPERTS, jitter=0.3),
    "bias_balanced": lambda: BiasBalancedRouter(6, EXPERTS, k=2),
    "softmax": lambda: SoftmaxRouter(6, EXPERTS),
}
CASES = [(name, term) for name, build in ROUTERS.items() for term in build().balance_terms]


@pytest.mark.parametrize(("name", "term"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_each_balance_term_of_each_router(name: str, term: str, training: bool) -> None:
    router = ROUTERS[name]().double().train(training)
    router.balance = {term: 0.7}
    if isinstance(router, NoisyTopKRouter):
        torch.nn.init.normal_(router.noise.weight, std=0.3)
    x = torch.randn(ROWS, 6).double()
    routing = router(x)
    if training and name in {"noisy_top_2", "noisy_top_1", "switch"}:
        assert not torch.equal(routing.noisy_logits, routing.logits)
    torch.testing.assert_close(routing.aux_loss.item(), 0.7 * by_hand(term, router, routing, x))


def test_the_noise_learns_from_the_task_and_from_the_load() -> None:
    router = NoisyTopKRouter(6, EXPERTS, k=2, balance={"load": 1.0}).train()
    x = torch.randn(ROWS, 6)
    for loss in (lambda r: r.aux_loss, lambda r: F.relu(r.gates).square().sum()):
        router.zero_grad()
        loss(router(x)).backward()
        assert router.noise.weight.grad.abs().max() > 1e-6


def test_training_passes_sum_their_balance_losses_over_the_ranks_and_others_do_not() -> None:
    for build in ROUTERS.values():
        router = build()
        assert router.train()(torch.randn(3, 6)).sync
        assert not router.eval()(torch.randn(3, 6)).sync


def test_choices_without_weights_and_unknown_balance_terms_are_refused() -> None:
    logits = torch.randn(3, 4)
    with pytest.raises(
        ValueError, match="weights: expected the mixing weights of the choices in indices or rows, got None"
    ):
        Routing(logits=logits, probs=logits.softmax(-1), indices=logits.topk(2).indices)
    routing = Routing(logits=logits, probs=logits.softmax(-1), balance={"foo": 1.0})
    with pytest.raises(ValueError, match=r"balance: expected one of 'importance', .*, got 'foo'"):
        _ = routing.aux_loss


def test_gradient_of_a_margin_flows_to_the_scores() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5]], requires_grad=True)
    indices = logits.topk(1).indices
    routing = Routing(logits=logits, probs=logits.softmax(-1), indices=indices, weights=torch.ones(1, 1))
    (gradient,) = torch.autograd.grad(routing.margin.sum(), logits)
    assert gradient.tolist() == [[1.0, 0.0, -1.0]]


def test_the_margin_is_that_of_the_scores_that_were_compared() -> None:
    logits, bias = torch.randn(200, 8), 0.3 * torch.randn(8)
    probs = logits.sigmoid()
    chosen = (probs + bias).topk(2, dim=-1).indices
    routing = Routing.from_probs(probs, chosen, scores=probs + bias)
    others = (probs + bias).scatter(-1, chosen, -torch.inf).amax(-1)
    torch.testing.assert_close(routing.margin, (probs + bias).gather(-1, chosen).amin(-1) - others)
    assert (routing.margin >= 0).all()
    # by the probabilities alone, the choices are not the highest ones: no margin is better than a negative one
    unknown = Routing.from_probs(probs, chosen)
    assert unknown.margin.isnan().all() and unknown.stats().entropy.isfinite()
    assert Routing.from_probs(probs, chosen, scores=probs - bias).margin.isnan().all()
    tokens = Routing.from_probs(probs.view(4, 50, 8), chosen.view(4, 50, 2), scores=(probs + bias).view(4, 50, 8))
    assert torch.equal(tokens.margin, routing.margin) and tokens.rows_per_sample == 50
    with pytest.raises(ValueError, match=r"scores: expected the shape of probs, \(200, 8\), got \(200, 1\)"):
        Routing.from_probs(probs, chosen, scores=probs[:, :1])
