"""Every dispatch path against a loop over rows and experts: value, gradient, and two kinds of Hessian product."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads import SparseMoE
from tests.support.head_zoo import CLASSES, FEATURES, ROUTERS, head_with
from tests.support.reference_heads import gated_loop, sparse_loop

EAGER = ("all", "gathered", "ragged", "auto")
SERVES = {
    "noisy_top_k": EAGER,
    "normalized": EAGER,
    "switch": EAGER,
    "bias_balanced": EAGER,
    "expert_choice": ("all", "ragged", "auto"),
    "softmax": ("all", "auto"),
}
CASES = [(router, path) for router, paths in SERVES.items() for path in paths]


def hessian_vector_product(loss: Tensor, parameters: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    products = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    return list(torch.autograd.grad(products, parameters, materialize_grads=True))


def reference(head: SparseMoE, x: Tensor) -> Tensor:
    return gated_loop(head, x, head.router(x).gates)


def live(head: SparseMoE) -> list[Tensor]:
    return [p for name, p in head.named_parameters() if "noise" not in name]


@pytest.mark.parametrize(("router", "dispatch"), CASES)
@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_value_gradient_and_double_backward(router: str, dispatch: str, num_shared_experts: int) -> None:
    head = head_with(router, dispatch=dispatch, num_shared_experts=num_shared_experts)
    parameters = live(head)
    x, y = torch.randn(11, FEATURES).double(), torch.randint(CLASSES, (11,))
    vectors = [torch.randn_like(p) for p in parameters]

    logits, expected = head(x), reference(head, x)
    torch.testing.assert_close(logits, expected)
    got = torch.autograd.grad(F.cross_entropy(logits, y), parameters, materialize_grads=True)
    want = torch.autograd.grad(F.cross_entropy(expected, y), parameters, materialize_grads=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        hessian_vector_product(F.cross_entropy(head(x), y), parameters, vectors),
        hessian_vector_product(F.cross_entropy(reference(head, x), y), parameters, vectors),
    )


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dispatch", EAGER)
def test_top_k_equals_a_loop_that_shares_no_code_with_it(dispatch: str, k: int) -> None:
    head = head_with("noisy_top_k", k=k, dispatch=dispatch)
    x = torch.randn(11, FEATURES).double()
    torch.testing.assert_close(head(x), sparse_loop(head, x))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_grouped_equals_all_in_fp32_with_both_backward_passes(k: int) -> None:
    head = head_with("noisy_top_k", torch.float32, k=k)
    parameters = live(head)
    x, y = torch.randn(11, FEATURES), torch.randint(CLASSES, (11,))
    vectors = [torch.randn_like(p) for p in parameters]
    results = []
    for head.dispatch in ("grouped", "all"):
        logits = head(x)
        gradients = torch.autograd.grad(F.cross_entropy(logits, y), parameters, materialize_grads=True)
        results.append((logits, gradients, hessian_vector_product(F.cross_entropy(head(x), y), parameters, vectors)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["all", "gathered", "ragged"])
def test_gradients_over_many_rows_in_half_precision(dispatch: str) -> None:
    head = head_with("noisy_top_k", torch.bfloat16, dispatch=dispatch).train()
    head.router.noise = None
    exact = copy.deepcopy(head).double()
    x = torch.randn(2000, FEATURES).bfloat16()
    y = torch.randint(CLASSES, (2000,))
    F.cross_entropy(head(x).float(), y).backward()
    F.cross_entropy(exact(x.double()), y).backward()
    for name, parameter in head.experts.named_parameters():
        reference = exact.experts.get_parameter(name).grad
        error = (parameter.grad.double() - reference).norm() / reference.norm()
        assert error < 0.06, name


def test_grouped_serves_expert_choice_and_inference_mode() -> None:
    head = head_with("expert_choice", torch.float32, dispatch="grouped")
    x = torch.randn(11, FEATURES)
    with torch.inference_mode():
        torch.testing.assert_close(head(x), reference(head, x))


def test_grouped_takes_the_gradient_of_a_plain_sum() -> None:
    # the gradient is one number seen through strides of zero, which grouped_mm itself does not accept
    head = head_with("noisy_top_k", torch.float32, dispatch="grouped")
    head(torch.randn(6, FEATURES)).sum().backward()
    torch.testing.assert_close(head.experts.fc2.bias.grad.sum(), torch.tensor(18.0))


def test_grouped_takes_the_gradient_of_a_gradients_plain_sum() -> None:
    x = torch.randn(6, FEATURES)
    second = []
    head = head_with("noisy_top_k", torch.float32)
    weights = [head.experts.fc1.weight, head.experts.fc2.weight]
    for head.dispatch in ("grouped", "all"):
        first = torch.autograd.grad(head(x).square().sum(), weights, create_graph=True)
        second.append(torch.autograd.grad(sum(gradient.sum() for gradient in first), weights))
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "dispatch"), [case for case in CASES if case[1] != "auto"] + [("noisy_top_k", "auto")]
)
def test_forward_mode_over_reverse_equals_double_backward(router: str, dispatch: str) -> None:
    head = head_with(router, dispatch=dispatch)
    x, y = torch.randn(6, FEATURES).double(), torch.randint(CLASSES, (6,))
    parameters = {name: p.detach() for name, p in head.named_parameters() if "noise" not in name}
    vectors = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(head, values, (x,)), y)

    product = torch.func.jvp(torch.func.grad(loss), (parameters,), (vectors,))[1]
    expected = hessian_vector_product(F.cross_entropy(head(x), y), live(head), list(vectors.values()))
    torch.testing.assert_close(list(product.values()), expected)


@pytest.mark.parametrize("dispatch", EAGER)
@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_few_rows(dispatch: str, num_rows: int) -> None:
    head = head_with("noisy_top_k", dispatch=dispatch)
    x = torch.randn(num_rows, FEATURES).double()
    expected = sparse_loop(head, x) if num_rows else torch.zeros(0, CLASSES).double()
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows_grouped(num_rows: int) -> None:
    head = head_with("noisy_top_k", torch.float32, dispatch="grouped")
    x = torch.randn(num_rows, FEATURES)
    torch.testing.assert_close(head(x), head_with_same(head, "all")(x))


def head_with_same(head: SparseMoE, dispatch: str) -> SparseMoE:
    other = head_with("noisy_top_k", torch.float32, dispatch=dispatch)
    other.load_state_dict(head.state_dict())
    return other


def test_a_dropped_row_gets_the_shared_experts_alone() -> None:
    head = head_with("expert_choice", num_shared_experts=1)
    x = torch.randn(40, FEATURES).double()
    head.router.k = 0.1  # each expert takes one row of forty
    output = head(x, return_routing=True)
    dropped = output.routing.dropped
    assert dropped.sum() >= 36
    shared = gated_loop(head, x[dropped], torch.zeros(int(dropped.sum()), 4))
    torch.testing.assert_close(output.logits[dropped], shared)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_more_classes_than_hidden_units_on_the_path_of_all_experts(k: int) -> None:
    head = head_with("noisy_top_k", k=k, dispatch="all", expert_width=1)
    parameters = live(head)
    x, y = torch.randn(11, FEATURES).double(), torch.randint(CLASSES, (11,))
    torch.testing.assert_close(head(x), sparse_loop(head, x))
    vectors = [torch.randn_like(p) for p in parameters]
    torch.testing.assert_close(
        hessian_vector_product(F.cross_entropy(head(x), y), parameters, vectors),
        hessian_vector_product(F.cross_entropy(reference(head, x), y), parameters, vectors),
    )


@pytest.mark.parametrize("router", ["noisy_top_k", "expert_choice"])
def test_many_rows_without_a_gradient_give_the_same_numbers(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_with(router, dispatch="ragged")
    x = torch.randn(9, FEATURES).double()
    monkeypatch.setattr("moe_heads.dispatch.ragged._MANY_ROWS", 0)
    with torch.inference_mode():
        torch.testing.assert_close(head(x), reference(head, x))


@pytest.mark.parametrize("router", list(ROUTERS))
def test_half_precision_and_autocast_are_near_fp32(router: str) -> None:
    head = head_with(router, torch.float32)
    x = torch.randn(11, FEATURES)
    expected = head(x)
    for dispatch in (*SERVES[router], *(("grouped",) if router != "softmax" else ())):
        head.dispatch = dispatch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(x)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dispatch", ["all", "gathered", "ragged"])
def test_bf16_module(dispatch: str) -> None:
    head = head_with("noisy_top_k", torch.bfloat16, dispatch=dispatch)
    x = torch.randn(11, FEATURES).bfloat16()
    logits = head(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.double(), reference(head.double(), x.double()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dispatch", EAGER)
def test_float64_stays_so_under_autocast(dispatch: str) -> None:
    head = head_with("noisy_top_k", dispatch=dispatch)
    x = torch.randn(11, FEATURES).double()
    expected = head(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("dispatch", ["all", "gathered", "grouped", "ragged"])
@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_autocast_gives_its_dtype_for_any_number_of_rows(dispatch: str, num_rows: int) -> None:
    head = head_with("noisy_top_k", torch.float32, dispatch=dispatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(num_rows, FEATURES)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dispatch", "layer", "width"),
    [
        *((dispatch, layer, 16) for dispatch in ("all", "gathered", "grouped", "ragged") for layer in (0, 1)),
        ("all", 0, 1),  # more classes than hidden units
    ],
)
def test_an_expert_that_overflows_touches_only_the_rows_that_chose_it(dispatch: str, layer: int, width: int) -> None:
    head = head_with("noisy_top_k", torch.float32, dispatch=dispatch, expert_width=width)
    biases = head.experts.stacks()[1::2]
    with torch.no_grad():
        biases[layer][2] = torch.inf
    x = torch.randn(20, FEATURES)
    chose = (head.router(x).indices == 2).any(-1)
    assert 0 < chose.sum() < 20
    assert torch.equal(head(x).isfinite().all(-1), ~chose)


@pytest.mark.parametrize("dispatch", ["all", "gathered", "grouped", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_train(dispatch: str, dtype: torch.dtype) -> None:
    head = head_with("noisy_top_k", dtype, dispatch=dispatch).train()
    logits = head(torch.randn(9, FEATURES).to(dtype))
    logits.float().square().sum().backward()
    assert logits.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.experts.parameters())


def test_dropout_in_training_on_every_path() -> None:
    head = head_with("noisy_top_k", torch.float32, dropout=0.5, noisy=False, balance=None).train()
    x = torch.randn(6, FEATURES)
    for head.dispatch in ("all", "gathered", "grouped", "ragged"):
        assert not torch.equal(head(x), head(x))
