"""Choice of the dispatch path, and error messages of unsupported paths."""

import pytest
import torch

from moe_heads import SparseMoE
from moe_heads.dispatch import choice, grouped
from tests.support.head_zoo import FEATURES, head_with


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the paths that ran, in their order."""
    names: list[str] = []

    def recording(name: str) -> object:
        original = choice._PATHS[name]

        def run(*arguments: object) -> torch.Tensor:
            names.append(name)
            return original(*arguments)

        return run

    monkeypatch.setattr(choice, "_PATHS", {name: recording(name) for name in choice._PATHS})
    return names


needs_grouped_graphs = pytest.mark.skipif(
    grouped._COMPILES_BF16_ONLY, reason="torch < 2.14 has no grouped product of fp32 in graphs"
)


def large_head() -> SparseMoE:
    return SparseMoE(64, 3, num_experts=8, expert_width=512, dropout=0.0).eval()


def test_auto_runs_every_expert_where_that_is_cheaper_than_sorting(taken: list[str]) -> None:
    SparseMoE(16, 3, num_experts=8, expert_width=8).eval()(torch.randn(32, 16))
    SparseMoE(64, 3, num_experts=2, expert_width=512, k=2)(torch.randn(1, 64))
    assert taken == ["all", "all"]


@torch.inference_mode()
def test_auto_runs_the_experts_that_are_hit_for_one_row_and_for_many(taken: list[str]) -> None:
    head = large_head()
    head(torch.randn(1, 64))
    head(torch.randn(1024, 64))
    head(torch.randn(128, 64))
    head.double()(torch.randn(128, 64).double())
    assert taken == ["ragged", "ragged", "grouped", "ragged"]


@torch.inference_mode()
def test_auto_launches_no_expert_alone_where_all_together_are_one_small_product(taken: list[str]) -> None:
    head = SparseMoE(512, 10, num_experts=8, expert_width=64).eval()
    for num_rows in (2, 8, 16):
        head(torch.randn(num_rows, 512))
    assert taken == ["all", "all", "all"]


@torch.inference_mode()
def test_auto_loops_over_few_of_many_experts_and_over_most_of_them_inside_one_product(taken: list[str]) -> None:
    head = SparseMoE(512, 10, num_experts=128, expert_width=64).eval()
    head(torch.randn(4, 512))
    head(torch.randn(128, 512))
    assert taken == ["ragged", "grouped"]


@pytest.mark.parametrize("num_rows", [0, 1])
def test_auto_counts_all_experts_in_training_whose_gradients_are_written(num_rows: int, taken: list[str]) -> None:
    head = SparseMoE(64, 3, num_experts=64, expert_width=16).eval()
    head(torch.randn(num_rows, 64))
    assert taken == ["all"]


@torch.inference_mode()
def test_auto_does_not_cast_the_weights_of_experts_without_rows(taken: list[str]) -> None:
    head = large_head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(torch.randn(128, 64))
    head.bfloat16()(torch.randn(128, 64).bfloat16())
    assert taken == ["ragged", "ragged"]


def test_auto_takes_a_path_with_forward_mode_derivatives_when_they_are_asked_for(taken: list[str]) -> None:
    head = large_head()
    x = torch.randn(128, 64)
    torch.func.jvp(head, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        head(torch.autograd.forward_ad.make_dual(x, x))
    assert taken == ["ragged", "ragged"]


def test_auto_asks_for_no_value_inside_vmap_but_may_in_other_transforms(taken: list[str]) -> None:
    head = large_head()
    x = torch.randn(2, 512, 64)
    torch.testing.assert_close(torch.vmap(head)(x), torch.stack([head(rows) for rows in x]))
    torch.func.grad(lambda rows: head(rows).sum())(x[0])
    torch.vmap(torch.func.grad(lambda rows: head(rows).sum()))(x)
    assert taken == ["all", "grouped", "grouped", "ragged", "all"]


@pytest.mark.parametrize(
    ("num_rows", "expected", "in_float64"),
    [
        (1, "gathered", "gathered"),
        (16, "gathered", "all"),
        pytest.param(64, "grouped", "all", marks=needs_grouped_graphs),
        pytest.param(500, "grouped", "all", marks=needs_grouped_graphs),
    ],
)
def test_auto_in_a_compiled_graph(num_rows: int, expected: str, in_float64: str, taken: list[str]) -> None:
    for dtype, path in ((torch.float32, expected), (torch.float64, in_float64)):
        torch.compiler.reset()
        torch.compile(large_head().to(dtype), backend="eager", dynamic=False)(torch.randn(num_rows, 64, dtype=dtype))
        assert taken[-1] == path


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(32, "gathered"), pytest.param(256, "grouped", marks=needs_grouped_graphs)]
)
def test_auto_in_a_compiled_graph_reads_the_weights_of_few_of_many_experts(
    num_rows: int, expected: str, taken: list[str]
) -> None:
    torch.compiler.reset()
    head = SparseMoE(512, 10, num_experts=128, expert_width=64).eval()
    torch.compile(head, backend="eager", dynamic=False)(torch.randn(num_rows, 512))
    assert taken[-1] == expected


def test_no_grouped_product_in_graphs_of_a_torch_that_compiles_it_in_bf16_only(
    taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_COMPILES_BF16_ONLY", True)
    torch.compiler.reset()
    head, x = large_head(), torch.randn(500, 64)
    torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))
    assert taken == ["gathered", "grouped"]
    head.dispatch = "grouped"
    with pytest.raises(Exception, match=r"'grouped': expected bf16 in a .* graph .*, got torch.float32. Use .*'all'"):
        torch.compile(head, backend="eager", fullgraph=True)(x)


def test_auto_reads_no_values_where_there_are_none_or_where_they_would_be_recorded(taken: list[str]) -> None:
    head = large_head()
    head.to("meta")(torch.randn(512, 64, device="meta"))
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        large_head()(mode.from_tensor(torch.randn(512, 64)))
    head = large_head()
    x = torch.randn(512, 64)
    graph = torch.fx.experimental.proxy_tensor.make_fx(head)(x)
    assert set(taken) == {"all"}
    other = torch.randn(512, 64)
    torch.testing.assert_close(graph(other), head(other))


@pytest.mark.parametrize("num_rows", [5, 128, 512])
@pytest.mark.parametrize("dispatch", ["auto", "all", "gathered", "grouped", "ragged"])
def test_every_path_under_the_transforms_it_serves(num_rows: int, dispatch: str) -> None:
    head = SparseMoE(8, 3, num_experts=8, expert_width=512, dropout=0.0, dispatch=dispatch).eval()
    x = torch.randn(num_rows, 8)
    expected = torch.autograd.grad(head(x.requires_grad_()).square().sum(), x)[0]
    x = x.detach()

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return head(rows).square().sum()

    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    if dispatch == "grouped":
        with pytest.raises(ValueError, match=r"'grouped': expected no transform of torch.func, got one."):
            torch.func.grad(loss)(x)
        return
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, **tolerance)
    torch.testing.assert_close(torch.func.vjp(loss, x)[1](torch.tensor(1.0))[0], expected, **tolerance)
    if dispatch in {"auto", "all", "gathered"}:
        each = torch.vmap(torch.func.grad(loss))(x.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(each, expected, **tolerance)
        torch.testing.assert_close(torch.func.jacrev(head)(x[:2]), torch.func.jacfwd(head)(x[:2]), **tolerance)
    else:
        with pytest.raises(ValueError, match=f"dispatch='{dispatch}': expected .* Use dispatch='all'"):
            torch.vmap(torch.func.grad(loss))(x.unsqueeze(1))


def test_auto_is_static_for_a_router_that_mixes_all(taken: list[str]) -> None:
    head_with("softmax")(torch.randn(64, FEATURES).double())
    assert taken == ["all"]


@pytest.mark.parametrize(
    ("router", "dtype", "dispatch", "message"),
    [
        ("softmax", torch.float32, "ragged", r"'ragged': expected a sparse router, .* Use dispatch='all'"),
        ("expert_choice", torch.float32, "gathered", r"'gathered': .* experts that choose .* Use dispatch='ragged'"),
        ("switch", torch.float64, "grouped", r"'grouped': expected fp32, bf16 or fp16, got torch.float64. Use"),
    ],
)
def test_a_path_that_cannot_serve_names_one_that_can(
    router: str, dtype: torch.dtype, dispatch: str, message: str
) -> None:
    head = head_with(router, dtype, dispatch=dispatch)
    with pytest.raises(ValueError, match=message):
        head(torch.randn(5, FEATURES, dtype=dtype))


@pytest.mark.parametrize("dispatch", ["auto", "all", "gathered", "grouped", "ragged"])
def test_rows_of_another_dtype_than_the_experts_are_refused_on_every_path(dispatch: str) -> None:
    head = head_with("switch", torch.bfloat16, dispatch=dispatch)
    with pytest.raises(ValueError, match=r"x: expected torch.bfloat16, the dtype of the experts, got torch.float32"):
        head(torch.randn(5, FEATURES))


def test_ragged_refuses_what_has_no_values() -> None:
    head = head_with("switch", torch.float32, dispatch="ragged").to("meta")
    with pytest.raises(ValueError, match="'ragged': expected eager mode"):
        head(torch.randn(5, FEATURES, device="meta"))


def test_grouped_names_the_sizes_it_needs() -> None:
    head = SparseMoE(7, 3, num_experts=4, expert_width=8, dispatch="grouped").eval()
    with pytest.raises(ValueError, match=r"multiples of 4 in torch.float32, got 7 and 8. Use dispatch='ragged'"):
        head(torch.randn(5, 7))


def test_grouped_refuses_forward_mode_before_it_could_be_wrong() -> None:
    head = head_with("switch", torch.float32, dispatch="grouped")
    x = torch.randn(5, FEATURES)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(ValueError, match=r"'grouped': expected no forward-mode derivative"):
            head(dual)


def test_ragged_refuses_vmap_and_export() -> None:
    head = head_with("switch", torch.float32, dispatch="ragged")
    x = torch.randn(2, 5, FEATURES)
    with pytest.raises(ValueError, match=r"'ragged': expected eager mode, .* Use dispatch='all'"):
        torch.vmap(head)(x)
    with pytest.raises(Exception, match=r"'ragged': expected eager mode, .* Use dispatch='all'"):
        torch.export.export(head, (x[0],))
