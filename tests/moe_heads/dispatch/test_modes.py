"""Compiled, exported and transformed heads equal the eager one."""

import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.dispatch import grouped
from tests.support.head_zoo import FEATURES, ROUTERS, head_with

PATHS_IN_GRAPHS = ["all", "gathered", *([] if grouped._COMPILES_BF16_ONLY else ["grouped"])]


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    torch.compiler.reset()


def heads() -> dict[str, nn.Module]:
    return {
        "dense": Dense(FEATURES, 3, width=8).eval(),
        "soft": SoftMoE(FEATURES, 3, num_experts=4, expert_width=8, slots_per_expert=2).eval(),
        "shared": head_with("noisy_top_k", torch.float32, num_shared_experts=2),
        **{router: head_with(router, torch.float32) for router in ROUTERS},
    }


@pytest.mark.parametrize("name", list(heads()))
@pytest.mark.parametrize("shape", [(4, FEATURES), (100, FEATURES), (3, 5, FEATURES)])
def test_compiles_without_a_graph_break(name: str, shape: tuple[int, ...]) -> None:
    head = heads()[name]
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    x = torch.randn(shape)
    torch.testing.assert_close(compiled(x), head(x))


def test_one_compiled_head_serves_any_batch_size() -> None:
    head = SparseMoE(64, 10, num_experts=8, expert_width=64, dropout=0.0).eval()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    for num_rows in (4, 5, 1, 33, 64, 500, 501):
        x = torch.randn(num_rows, 64)
        torch.testing.assert_close(compiled(x), head(x))


@pytest.mark.parametrize("dispatch", PATHS_IN_GRAPHS)
def test_compiled_training_step_equals_the_eager_one(dispatch: str) -> None:
    head = head_with("noisy_top_k", torch.float32, dispatch=dispatch)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, FEATURES)
    gradients = []
    for module in (compiled, head):
        output = module(x, return_routing=True)
        (output.logits.sum() + output.aux_loss).backward()
        gradients.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
        head.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_rows", [1, 50])
def test_ragged_runs_beside_a_compiled_graph_and_says_why_it_is_not_part_of_it(num_rows: int) -> None:
    head = head_with("noisy_top_k", torch.float32, dispatch="ragged")
    x = torch.randn(num_rows, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(head, backend="eager")(x), head(x))
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"dispatch='ragged' reads the segment lengths. Use dispatch='auto'"):
        torch.compile(head, backend="eager", fullgraph=True)(x)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 8, 200])
@pytest.mark.parametrize("autocast", [False, True])
def test_inductor_equals_eager(num_rows: int, autocast: bool) -> None:
    head = SparseMoE(64, 10, num_experts=8, expert_width=512).eval()
    compiled = torch.compile(head, fullgraph=True)
    x = torch.randn(num_rows, 64)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tolerance = 0.02 if autocast else 1e-5
        torch.testing.assert_close(compiled(x), head(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in heads() if name != "expert_choice"])
@pytest.mark.parametrize("num_tokens", [None, 3])
def test_export_and_onnx_with_dynamic_sizes(name: str, num_tokens: int | None, tmp_path: Path) -> None:
    head = heads()[name]
    example = torch.randn(5, FEATURES) if num_tokens is None else torch.randn(5, num_tokens, FEATURES)
    sizes = {axis: torch.export.Dim(f"size{axis}") for axis in range(example.dim() - 1)}
    x = torch.randn(33, FEATURES) if num_tokens is None else torch.randn(7, 4, FEATURES)
    program = torch.export.export(head, (example,), dynamic_shapes={"x": sizes})
    torch.testing.assert_close(program.module()(x), head(x))
    torch.testing.assert_close(run_onnx(head, example, sizes, x, tmp_path), head(x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load of torch 2.12
@pytest.mark.parametrize("dispatch", PATHS_IN_GRAPHS)
def test_every_static_path_is_exported_with_a_dynamic_batch_and_read_back(dispatch: str, tmp_path: Path) -> None:
    head = head_with("noisy_top_k", torch.float32, dispatch=dispatch)
    example = (torch.randn(5, FEATURES),)
    program = torch.export.export(head, example, dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.export.save(program, tmp_path / "head.pt2")
    x = torch.randn(33, FEATURES)
    torch.testing.assert_close(torch.export.load(tmp_path / "head.pt2").module()(x), head(x))


@pytest.mark.filterwarnings("ignore")  # of the tracer, which is deprecated
def test_a_traced_head_serves_other_batches_or_is_refused() -> None:
    head = head_with("noisy_top_k", torch.float32)
    x = torch.randn(40, FEATURES)
    torch.testing.assert_close(torch.jit.trace(head, (x[:5],))(x), head(x))
    with pytest.raises(ValueError, match="dynamic_shapes: expected a fixed number of rows that compete"):
        torch.jit.trace(head_with("expert_choice", torch.float32), (x,))


def test_expert_choice_is_exported_where_the_competing_rows_are_fixed(tmp_path: Path) -> None:
    head = head_with("expert_choice", torch.float32)
    batch = {0: torch.export.Dim("batch")}
    with pytest.raises(Exception, match="dynamic_shapes: expected a fixed number of rows that compete"):
        torch.export.export(head, (torch.randn(5, FEATURES),), dynamic_shapes={"x": batch})
    example, x = torch.randn(5, 6, FEATURES), torch.randn(9, 6, FEATURES)
    program = torch.export.export(head, (example,), dynamic_shapes={"x": batch})
    torch.testing.assert_close(program.module()(x), head(x))
    torch.testing.assert_close(run_onnx(head, example, batch, x, tmp_path), head(x))


def run_onnx(
    head: nn.Module, example: torch.Tensor, sizes: dict[int, object], x: torch.Tensor, folder: Path
) -> torch.Tensor:
    path = folder / "head.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx uses what torch itself calls deprecated
        torch.onnx.export(head, (example,), path, dynamo=True, dynamic_shapes={"x": sizes}, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.parametrize("name", list(heads()))
def test_per_sample_gradients_by_vmap(name: str) -> None:
    head = heads()[name]
    parameters = {key: p.detach() for key, p in head.named_parameters()}
    x, y = torch.randn(5, FEATURES), torch.randint(3, (5,))

    def loss(values: dict[str, torch.Tensor], row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(head, values, (row.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    one_by_one = [torch.func.grad(loss)(parameters, row, label) for row, label in zip(x, y, strict=True)]
    for key, gradients in each.items():
        torch.testing.assert_close(gradients, torch.stack([gradient[key] for gradient in one_by_one]))


def test_jacobian_in_forward_mode_equals_the_one_in_reverse_mode() -> None:
    head = head_with("noisy_top_k")
    x = torch.randn(3, FEATURES).double()
    torch.testing.assert_close(torch.func.jacfwd(head)(x), torch.func.jacrev(head)(x))
