"""Routers of transformers: counts, weights and margins against loops over the tokens."""

import math
import re
from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_heads import collect_routing
from moe_heads.routing import RoutingStats
from moe_heads.routing.recognition.registry import REGISTRY
from tests.support.language_models import NAMES, language_model, tokens
from tests.support.tiny_experts import SEPARATE, input_ids, routers_of, run

MUST_REACH = ("Mixtral", "Olmoe", "Qwen3Moe", "DeepseekV3", "GptOss", "Glm4Moe", "Llama4", "SwitchTransformers")


class SeenByExperts:
    """What the experts of each layer were given: an observation that does not use the routers."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list[tuple[nn.Module, tuple[Any, ...]]]] = defaultdict(list)
        for path, module in model.named_modules():
            if path.endswith(".experts") and ".shared" not in path:
                owner = path.rpartition(".")[0]
                module.register_forward_pre_hook(lambda m, args, name=owner: self.calls[name].append((m, args)))

    def count(self, name: str) -> tuple[list[int], list[float]]:
        """Count tokens and add weights by expert, one choice at a time."""
        counts: dict[int, int] = defaultdict(int)
        sums: dict[int, float] = defaultdict(float)
        for _, (_, indices, weights) in self.calls[name]:
            for row, row_weights in zip(indices.tolist(), weights.tolist(), strict=True):
                for expert, weight in zip(row, row_weights, strict=True):
                    if isinstance(expert, list):  # one-hot, with zeros for a token beyond the capacity
                        for number, is_chosen in enumerate(expert):
                            counts[number] += is_chosen
                            sums[number] += is_chosen * weight
                    else:
                        counts[expert] += 1
                        sums[expert] += weight
        num_experts = max(counts) + 1
        return [counts[e] for e in range(num_experts)], [sums[e] for e in range(num_experts)]


def assert_as_counted(stats: RoutingStats, counts: list[int], sums: list[float]) -> None:
    padded = counts + [0] * (len(stats.counts) - len(counts))
    assert stats.counts.tolist() == padded
    torch.testing.assert_close(stats.gate_sum[: len(sums)].tolist(), sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("Llama4", "JetMoe", "Phimoe")])
def test_counts_equal_what_the_experts_were_given(name: str) -> None:
    model = language_model(name)
    seen = SeenByExperts(model)
    with collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model))
        model(**tokens(model, 2, 7))
    assert set(collection.stats) == set(seen.calls) and len(seen.calls) >= 2
    assert not collection.unrecognized and not collection.errors and not collection.misfits
    for layer, stats in collection.stats.items():
        assert_as_counted(stats, *seen.count(layer))
        assert stats.entropy.isfinite() and 0 < stats.entropy < math.log(len(stats.counts))
        # a negative or unknown margin would say that the choices were not those of the highest scores
        assert (stats.margin >= 0) and all((r.margin >= 0).all() for r in collection.routings[layer])


def test_llama4_runs_every_expert_and_weighs_all_but_one_with_zero() -> None:
    model = language_model("Llama4")
    inputs: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "Llama4TextExperts":
            module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].view(m.num_experts, -1, 32)))
    with collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model))
    for scaled, stats in zip(inputs, collection.stats.values(), strict=True):
        assert stats.counts.tolist() == [int((expert != 0).any(-1).sum()) for expert in scaled]
        assert stats.margin > 0 and not collection.unrecognized


def test_phimoe_whose_margin_is_not_known() -> None:
    """Its second expert is drawn by other scores than the first: counts and weights only."""
    model = language_model("Phimoe")
    seen = SeenByExperts(model)
    with collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model))
    for layer, stats in collection.stats.items():
        assert_as_counted(stats, *seen.count(layer))
        assert stats.entropy.isnan() and stats.margin.isnan()


def test_jetmoe_whose_choices_are_sorted_by_expert() -> None:
    model = language_model("JetMoe")
    with collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model))
    for name, routings in collection.routings.items():
        (routing,) = routings
        gates = routing.logits.softmax(-1).topk(2)
        assert torch.equal(routing.indices.sort(-1).values, gates.indices.sort(-1).values), name
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(30))
    # attention and feed-forward layers have experts
    assert len(collection.routings) == 4


def test_switch_drops_what_exceeds_the_capacity() -> None:
    model = language_model("SwitchTransformers")
    with collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model, 3, 10))
    stats = collection.stats["encoder.block.0.layer.1.mlp"]
    assert int(stats.num_rows) == 30 and int(stats.num_dropped) == 30 - int(stats.counts.sum()) > 0
    assert stats.num_dropped == stats.num_dropped_choices
    # the capacity is that of one sample
    assert int(stats.counts.max()) <= 3 * 3


@pytest.mark.parametrize("name", MUST_REACH)
def test_repeated_passes_of_checkpointing_count_once_and_train(name: str) -> None:
    model = language_model(name).train()
    batch = tokens(model)
    with collect_routing(model) as plain:
        torch.manual_seed(1)
        expected = model(**batch).loss
    gradients = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    with collect_routing(model) as collection:
        torch.manual_seed(1)
        loss = checkpoint(
            lambda ids, labels: model(input_ids=ids, labels=labels).loss, *batch.values(), use_reentrant=False
        )
        loss.backward()
    for layer, stats in plain.stats.items():
        assert torch.equal(collection.stats[layer].counts, stats.counts)
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_under_autocast(name: str) -> None:
    model = language_model(name)
    seen = SeenByExperts(model)
    with torch.autocast("cpu", torch.bfloat16), collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model, 8, 32))
    for layer, stats in collection.stats.items():
        assert stats.counts.tolist() == seen.count(layer)[0] and stats.margin >= -0.01


def test_a_half_precision_model() -> None:
    model = language_model("Mixtral").bfloat16()
    seen = SeenByExperts(model)
    with collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model, 8, 32))
    for layer, stats in collection.stats.items():
        assert stats.counts.tolist() == seen.count(layer)[0] and stats.margin >= 0


def test_nllb_drops_what_exceeds_the_capacity() -> None:
    torch.manual_seed(0)
    model = SEPARATE["nllb"]()
    gates: dict[str, Tensor] = {}
    for path, router in routers_of(model).items():
        router.moe_eval_capacity_token_fraction = 0.2  # a capacity of 4 of 20 tokens
        name = path.rpartition(".")[0]
        router.register_forward_hook(lambda m, args, output, name=name: gates.__setitem__(name, output[1]))
    with collect_routing(model) as collection, torch.no_grad():
        run(model, input_ids())
    assert set(collection.stats) == set(gates) and not collection.errors and not collection.misfits
    for layer, stats in collection.stats.items():
        counts = [sum(float(row[expert]) > 0 for row in gates[layer]) for expert in range(4)]
        assert stats.counts.tolist() == counts and int(stats.num_dropped_choices) == 2 * 20 - sum(counts) > 0
        assert stats.entropy.isfinite() and stats.margin >= 0


def test_an_entry_that_no_longer_fits() -> None:
    """A new version that chooses by other scores, or returns another form: no wrong number."""
    model = language_model("Mixtral")
    router_class: Any = type(model.model.layers[0].mlp.gate)

    class MixtralTopKRouter(router_class):  # type: ignore[misc] # the name is that of the entry
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
            logits, weights, indices = super().forward(hidden_states)
            # the router compares with the order of the experts reversed
            return logits.flip(-1), weights, indices

    model.model.layers[0].mlp.gate.__class__ = MixtralTopKRouter
    seen = SeenByExperts(model)
    with collect_routing(model) as collection, torch.no_grad():
        model(**tokens(model))
    stats = collection.stats["model.layers.0.mlp"]
    assert stats.counts.tolist() == seen.count("model.layers.0.mlp")[0]
    assert stats.margin.isnan() and collection.stats["model.layers.1.mlp"].margin > 0

    class Shorter(router_class):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
            _, weights, indices = super().forward(hidden_states)
            return weights, indices[:, 0]

    gate = model.model.layers[1].mlp.gate
    gate.__class__ = Shorter
    with collect_routing(model) as collection, torch.no_grad():
        gate(torch.randn(6, 32))
    assert "(6, 2) float32, (6,) int64" in str(collection.errors["model.layers.1.mlp"])
    assert "MixtralTopKRouter" not in str(collection.errors) and "Shorter" in str(collection.errors)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="it is that of transformers 5.23")
def test_every_class_in_the_registry_exists() -> None:
    """A class that was renamed would be read by its shapes alone from then on."""
    source = re.compile(r"^class (\w+)\(", re.MULTILINE)
    models = transformers.__path__[0] + "/models"
    from pathlib import Path

    known = {name for file in Path(models).glob("*/modeling_*.py") for name in source.findall(file.read_text("utf8"))}
    assert {name for package, name in REGISTRY if package == "transformers"} <= known
