import math

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from moe_heads import Dense, SoftMoE, SparseMoE, collect_routing
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.expert_utilization.function import expert_utilization
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization
from moe_heads.analysis.expert_utilization.result import ExpertUtilizationResult
from tests.support.hand_routers import HandHead, HandModel
from tests.support.head_zoo import FEATURES, ROUTERS, head_with
from tests.support.untouched import untouched

SHARP = 50.0


def chosen(experts: list[int], num_experts: int) -> Tensor:
    """Logits that choose the given experts with a gate of 1."""
    return SHARP * nn.functional.one_hot(torch.tensor(experts), num_experts).float()


def only_head(result: ExpertUtilizationResult) -> HeadUtilization:
    assert list(result.heads) == ["head"]
    return result.heads["head"]


@pytest.mark.parametrize("k", [None, 1])
def test_perfect_specialists(k: int | None) -> None:
    labels = torch.arange(4).repeat(5)
    result = expert_utilization(HandModel(4, k), [(chosen(labels.tolist(), 4), labels)])
    head = only_head(result)
    assert head.mutual_information == pytest.approx(math.log(4))
    assert head.class_map is not None
    torch.testing.assert_close(head.class_map, torch.eye(4, dtype=torch.float64))
    assert head.load.tolist() == [0.25] * 4
    assert head.entropy == pytest.approx(0, abs=1e-9)
    assert head.entropy_of_mean == pytest.approx(math.log(4))
    assert head.effective_experts == pytest.approx(4)
    assert (head.load_cv, head.max_violation, head.dead_experts) == (0, 0, ())
    assert head.soft is (k is None)
    assert result.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("k", [None, 1])
def test_one_expert_for_all(k: int | None) -> None:
    labels = torch.arange(4).repeat(5)
    head = only_head(expert_utilization(HandModel(4, k), [(chosen([2] * 20, 4), labels)]))
    assert head.load.tolist() == [0, 0, 1, 0]
    assert head.dead_experts == (0, 1, 3)
    assert head.mutual_information == pytest.approx(0, abs=1e-12)
    assert head.effective_experts == pytest.approx(1)
    assert head.load_cv == pytest.approx(math.sqrt(3))
    assert head.max_violation == 3


def test_uniform_soft_gate_has_no_dead_expert_though_one_takes_the_load() -> None:
    head = only_head(expert_utilization(HandModel(4), [torch.zeros(10, 4)]))
    assert head.importance.tolist() == [0.25] * 4
    assert head.load.tolist() == [1, 0, 0, 0]
    assert head.dead_experts == ()
    assert head.entropy == pytest.approx(math.log(4))
    assert head.effective_experts == pytest.approx(4)
    assert head.class_map is None
    assert head.mutual_information is None


def test_a_dead_expert_and_the_threshold() -> None:
    experts = [0] * 300 + [1] * 299 + [2]
    batch = chosen(experts, 4)
    assert only_head(expert_utilization(HandModel(4, 1), [batch])).dead_experts == (2, 3)
    assert only_head(expert_utilization(HandModel(4, 1), [batch], dead_below=0.0)).dead_experts == (3,)


def test_gates_of_the_chosen_pair() -> None:
    """Logits (log 3, 0, -10): top 2 of 3 with the gates 3/4 and 1/4."""
    x = torch.tensor([[math.log(3), 0.0, -10.0]]).repeat(4, 1)
    head = only_head(expert_utilization(HandModel(3, 2), [(x, torch.tensor([0, 0, 2, 2]))]))
    torch.testing.assert_close(head.load, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(head.importance, torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))
    assert head.class_map is not None
    assert head.class_map[0].tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert head.class_map[1].isnan().all()


def test_switch_gates_below_one_still_make_rows_that_sum_to_one() -> None:
    head = only_head(expert_utilization(HandModel(3, 1), [(torch.randn(60, 3), torch.randint(2, (60,)))]))
    assert head.class_map is not None
    torch.testing.assert_close(head.class_map.sum(1), torch.ones(2, dtype=torch.float64))


def test_mutual_information_equals_scikit_learns() -> None:
    model = nn.Sequential(nn.Linear(5, 8), SparseMoE(8, 3, num_experts=6, expert_width=4)).eval()
    x, labels = torch.randn(200, 5), torch.randint(3, (200,))
    result = expert_utilization(model, [(x, labels)])
    with collect_routing(model) as routing:
        model(x)
    chosen = routing.routings["1"][0].indices  # both choices of a row count
    expected = mutual_info_score(labels.repeat_interleave(2), chosen.flatten())
    assert result.mutual_information["1"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [SoftMoE, SparseMoE])
def test_statistics_of_real_heads_on_uneven_batches_and_doubled_data(kind: type[SoftMoE | SparseMoE]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), kind(8, 3, num_experts=4, expert_width=4))
    x, labels = torch.randn(50, 5), torch.randint(3, (50,))
    whole = expert_utilization(model, [(x, labels)]).heads["1"]
    uneven = list(zip(x.split([1, 20, 29]), labels.split([1, 20, 29]), strict=True))
    model.eval()
    with collect_routing(model) as routing:
        model(x)
    stats = routing.stats["1"]
    torch.testing.assert_close(whole.load, stats.load)
    torch.testing.assert_close(whole.importance, stats.importance, rtol=1e-6, atol=0)
    assert whole.entropy == pytest.approx(stats.entropy.item(), rel=1e-5)
    probs = routing.routings["1"][0].probs
    assert whole.entropy_of_mean == pytest.approx(torch.special.entr(probs.mean(0)).sum().item(), rel=1e-5)
    assert whole.class_map is not None
    gates = routing.routings["1"][0].gates
    expected = torch.stack([gates[labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(whole.class_map.float(), expected)
    for again in (uneven, [(x, labels)] * 2):
        other = expert_utilization(model, again).heads["1"]
        torch.testing.assert_close(other.load, whole.load)
        torch.testing.assert_close(other.importance, whole.importance)
        torch.testing.assert_close(other.class_map, whole.class_map)
        assert other.mutual_information == pytest.approx(whole.mutual_information)
        assert other.entropy == pytest.approx(whole.entropy)


def test_tokens_belong_to_the_class_of_their_sample() -> None:
    x = chosen([0, 0, 0, 1, 1, 1], 2).view(2, 3, 2)
    head = only_head(expert_utilization(HandModel(2, 1), [(x, torch.tensor([0, 1]))]))
    assert head.num_rows == 6
    assert head.class_map is not None
    torch.testing.assert_close(head.class_map, torch.eye(2, dtype=torch.float64))


def test_equal_tokens_know_no_more_than_one() -> None:
    x, labels = torch.randn(40, 3), torch.randint(2, (40,))
    one = only_head(expert_utilization(HandModel(3, 1), [(x, labels)]))
    five = only_head(expert_utilization(HandModel(3, 1), [(x.unsqueeze(1).expand(-1, 5, -1), labels)]))
    assert five.mutual_information == pytest.approx(one.mutual_information)
    assert one.mutual_information_stderr is not None and one.mutual_information_stderr > 0.01
    assert five.mutual_information_stderr == pytest.approx(one.mutual_information_stderr)
    assert five.mutual_information_corrected == pytest.approx(one.mutual_information_corrected)


def test_a_second_choice_is_a_choice() -> None:
    """Expert 0 is everybody's first choice, each of the others is the second one of a class."""
    labels = torch.arange(4).repeat(10)
    x = nn.functional.pad(2 * nn.functional.one_hot(labels, 4).float(), (1, 0), value=3.0)
    head = only_head(expert_utilization(HandModel(5, 2), [(x, labels)]))
    assert head.specialization.tolist() == pytest.approx([0.0, *[math.log(4)] * 4], abs=1e-12)
    assert head.mutual_information == pytest.approx(math.log(4) / 2)
    assert head.class_counts.sum(0).tolist() == (80 * head.load).tolist()


def test_rows_that_are_not_finite_count_in_nothing_else() -> None:
    x = chosen([0, 1, 1], 2)
    x[1] = torch.nan
    head = only_head(expert_utilization(HandModel(2, 1), [(x, torch.tensor([0, 0, 1]))]))
    assert (head.num_rows, head.num_nonfinite) == (2, 1)
    assert head.load.tolist() == [0.5, 0.5]
    assert head.entropy_of_mean == pytest.approx(math.log(2))
    assert head.mutual_information == pytest.approx(math.log(2))


def test_every_head_has_its_own_numbers() -> None:
    model = nn.ModuleDict({"a": HandHead(2, 1), "b": HandHead(2, 1)})

    def forward(m: nn.ModuleDict, batch: Tensor) -> None:
        m["a"](batch)
        m["b"](batch.flip(1))

    result = expert_utilization(model, [chosen([0, 0], 2)], forward_fn=forward)
    assert {name: load.tolist() for name, load in result.load.items()} == {"a": [1, 0], "b": [0, 1]}
    assert result.dead_experts == {"a": (1,), "b": (0,)}
    assert set(result.metrics()) >= {"a/entropy", "b/entropy"}


def test_a_model_without_a_router() -> None:
    result = expert_utilization(nn.Sequential(nn.Linear(3, 4), Dense(4, 2)), [torch.randn(2, 3)])
    assert result.heads == result.load == result.class_map == result.metrics() == {}
    assert result.num_samples == 2


def test_the_model_is_untouched_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), SparseMoE(4, 2, num_experts=3, expert_width=2))
    batch = torch.randn(6, 3), torch.randint(2, (6,))
    too_wide = torch.randn(6, 9), batch[1]
    with untouched(model):
        expert_utilization(model, [batch, batch])
    with untouched(model), pytest.raises(RuntimeError, match="shapes"):
        expert_utilization(model, [batch, too_wide])


def test_progress() -> None:
    steps: list[tuple[int, int]] = []
    expert_utilization(
        HandModel(2), [torch.randn(3, 2)] * 3, progress=Progress(show=lambda *step: steps.append(step[:2]))
    )
    assert steps == [(3, 9), (6, 9), (9, 9)]


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches: expected at least one batch"),
        (
            [torch.zeros(2, 2)],
            {"num_classes": 3, "class_names": ("cat", "dog")},
            "class_names: expected num_classes = 3 names, got 2",
        ),
        (
            [(torch.zeros(2, 2), torch.tensor([-100, -100]))],
            {"ablation": True},
            "ablation: expected data with labels for the accuracy, got none",
        ),
        (
            [torch.zeros(2, 3, 2)],
            {"ablation": True, "label_fn": lambda b: torch.zeros(2, 3).long()},
            "ablation: expected data with labels for the accuracy, got none. The labels are those of tokens or rows",
        ),
        (
            [(torch.zeros(2, 2), torch.zeros(2))],
            {"ablation": True},
            r"ablation: expected data with labels for the accuracy, got none. label_fn: expected integers, got \(2,\)",
        ),
        ([torch.zeros(2, 2)], {"label_fn": 3}, r"label_fn: expected a function label_fn\(batch\) -> labels, got 3"),
        ([torch.zeros(2, 2)], {"ignore_index": "255"}, "ignore_index: expected an integer, a list of integers or None"),
        (
            [torch.full((2, 2), torch.nan)],
            {},
            "model: expected finite router logits, got nan or infinity in all 2 rows of head 'head'",
        ),
        ([torch.zeros(2, 2)], {"dead_below": 0.5}, "starved_below: expected at least dead_below = 0.5, got 0.25"),
        ([torch.zeros(2, 2)], {"adapters": [print]}, "adapters: expected a mapping from classes or names"),
        ([torch.zeros(2, 2)], {"dead_below": 1.0}, r"dead_below: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input(batches: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_utilization(HandModel(2, 1), batches, **options)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_every_router_is_understood(router: str) -> None:
    model = nn.Sequential(head_with(router, torch.float32))
    x, labels = torch.randn(60, FEATURES), torch.randint(3, (60,))
    result = expert_utilization(model, [(x, labels)]).heads["0"]
    routing = model[0].router(x)
    counts = routing.selected.sum(0).double()
    torch.testing.assert_close(result.load, counts / counts.sum())
    assert result.soft == (router == "softmax")
    # a row that no expert took has no class to tell of
    assert result.mutual_information is not None
    assert result.mutual_information >= 0


def test_a_row_that_no_expert_took_counts_for_no_expert() -> None:
    head = head_with("expert_choice", torch.float32)
    head.router.k = 0.1
    x, labels = torch.randn(40, FEATURES), torch.zeros(40, dtype=torch.int64)
    result = expert_utilization(nn.Sequential(head), [(x, labels)], num_classes=2).heads["0"]
    assert result.mutual_information == 0
    torch.testing.assert_close(result.load, torch.full((4,), 0.25, dtype=torch.float64))


def test_what_a_row_mixes_and_what_the_data_use() -> None:
    """Half the rows mix experts 0 and 1 evenly, half 2 and 3: two experts a row, four over the data."""
    pair = torch.tensor([[0.0, 0.0, -SHARP, -SHARP]])
    x = torch.cat([pair.repeat(5, 1), pair.flip(1).repeat(5, 1)])
    for k in (None, 2):
        head = only_head(expert_utilization(HandModel(4, k), [x]))
        assert head.effective_experts == pytest.approx(4)
        assert head.effective_experts_per_row == pytest.approx(2)
        assert head.margin == pytest.approx(0 if k is None else SHARP)


def test_experts_that_are_chosen_together() -> None:
    """Six rows choose 0 and 1, two choose 1 and 2; no row chooses 3."""
    x = torch.cat([torch.tensor([[2.0, 2.0, 0, -1]]).repeat(6, 1), torch.tensor([[0.0, 2, 2, -1]]).repeat(2, 1)])
    head = only_head(expert_utilization(HandModel(4, 2), [x]))
    assert head.coactivation is not None
    assert head.coactivation[:3].tolist() == [[1, 1, 0, 0], [0.75, 1, 0.25, 0], [0, 1, 1, 0]]
    assert head.coactivation[3].isnan().all()
    for k in (None, 1):
        assert only_head(expert_utilization(HandModel(4, k), [x])).coactivation is None


def test_all_experts_together_are_no_pairs_and_have_no_margin() -> None:
    head = only_head(expert_utilization(HandModel(3, 3), [torch.randn(5, 3)]))
    assert head.coactivation is None
    assert math.isinf(head.margin)
    assert "margin" not in head.metrics()


def test_a_head_that_runs_twice_tells_no_more_of_independent_samples() -> None:
    def twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        model(batch[0])
        model(batch[0])

    batch = torch.randn(60, 3), torch.randint(2, (60,))
    one = only_head(expert_utilization(HandModel(3, 1), [batch]))
    two = only_head(expert_utilization(HandModel(3, 1), [batch], forward_fn=twice))
    assert two.num_rows == 120
    for name in ("", "_stderr", "_by_chance", "_p_value"):
        assert getattr(two, f"mutual_information{name}") == pytest.approx(getattr(one, f"mutual_information{name}"))


def test_starved_experts_and_percentiles() -> None:
    experts = [0] * 60 + [1] * 30 + [2] * 8 + [3] * 2
    head = only_head(expert_utilization(HandModel(4, 1), [chosen(experts, 4)], starved_below=0.35, dead_below=0.1))
    assert (head.dead_experts, head.starved_experts) == ((3,), (2,))
    metrics = head.metrics()
    assert metrics["relative_load_p50"] == pytest.approx(4 * 0.19)
    assert (metrics["num_dead_experts"], metrics["num_starved_experts"]) == (1, 1)


def test_percentiles_over_all_heads() -> None:
    model = nn.ModuleDict({"a": HandHead(2, 1), "b": HandHead(4, 1)})

    def forward(m: nn.ModuleDict, batch: Tensor) -> None:
        m["a"](batch[:, :2])
        m["b"](batch)

    result = expert_utilization(model, [chosen([0] * 8, 4)], forward_fn=forward)
    expected = torch.quantile(torch.tensor([2.0, 0, 4, 0, 0, 0]), torch.tensor([0.1, 0.5, 0.9])).tolist()
    metrics = result.metrics()
    assert [metrics[f"all_heads/relative_load_p{level}"] for level in (10, 50, 90)] == pytest.approx(expected)


def test_specializations_add_up_to_the_mutual_information() -> None:
    x, labels = torch.randn(200, 5), torch.randint(3, (200,))
    head = only_head(expert_utilization(HandModel(5, 1), [(x + 0.5 * labels.unsqueeze(1) * torch.eye(5)[0], labels)]))
    assert head.specialization is not None and head.class_counts is not None
    assert head.class_counts.sum() == 200
    assert float((head.specialization * head.load).sum()) == pytest.approx(head.mutual_information)
    labels = torch.arange(4).repeat(5)
    specialist = only_head(expert_utilization(HandModel(5, 1), [(chosen(labels.tolist(), 5), labels)]))
    assert specialist.specialization is not None
    assert specialist.specialization[:4].tolist() == pytest.approx([math.log(4)] * 4)
    assert specialist.specialization[4].isnan()


def test_chance_is_told_beside_the_mutual_information() -> None:
    x, labels = torch.randn(100, 5), torch.randint(3, (100,))
    head = only_head(expert_utilization(HandModel(5, 1), [(x, labels)], num_permutations=99))
    assert head.mutual_information_by_chance == pytest.approx(2 * 4 / 200, rel=0.5)  # (C - 1)(E - 1) / 2N
    assert head.mutual_information_p_value is not None and head.mutual_information_p_value > 0.01
    plain = only_head(expert_utilization(HandModel(5, 1), [(x, labels)], num_permutations=0))
    assert plain.mutual_information_by_chance is plain.mutual_information_p_value is None
    assert plain.mutual_information == head.mutual_information


def test_experts_in_another_order_say_the_same() -> None:
    x, labels, order = torch.randn(80, 4), torch.randint(3, (80,)), torch.tensor([2, 0, 3, 1])
    one, other = (only_head(expert_utilization(HandModel(4, 2), [(inputs, labels)])) for inputs in (x, x[:, order]))
    assert one.coactivation is not None and other.coactivation is not None and other.class_map is not None
    torch.testing.assert_close(other.load, one.load[order])
    torch.testing.assert_close(other.coactivation, one.coactivation[order][:, order])
    torch.testing.assert_close(other.class_map, one.class_map[:, order])
    torch.testing.assert_close(other.specialization, one.specialization[order])
    for name, value in one.metrics().items():
        if name != "mutual_information_by_chance" and name != "mutual_information_p_value":
            assert other.metrics()[name] == pytest.approx(value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starved_below": 1.0}, r"starved_below: expected a number in \[0, 1\), got 1.0"),
        ({"dead_below": "a"}, r"dead_below: expected a number in \[0, 1\), got 'a'"),
        ({"seed": None}, "seed: expected an int from 0 to .*, got None"),
        ({"class_names": "abc"}, "class_names: expected a list of names, got 'abc'"),
        ({"num_permutations": -1}, "num_permutations: expected an integer of at least 0, got -1"),
        ({"num_examples": 2.0}, "num_examples: expected an integer of at least 0, got 2.0"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_utilization(HandModel(2, 1), [torch.zeros(2, 2)], **options)
