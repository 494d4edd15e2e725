"""Models that are compiled: the label of each row, and the user's programs and counters, which stay as they are."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

from moe_heads import SparseMoE
from moe_heads.analysis import InferenceTimingResult, inference_timing
from moe_heads.analysis.inference_timing.compilation import compilation_of
from moe_heads.analysis.inference_timing.sweep import Sweep
from tests.support.untouched import untouched

QUICK = {"num_runs": 2, "warmup_runs": 0}


class Backend:
    """A backend of torch.compile without a compiler, which counts the graphs and the runs."""

    def __init__(self) -> None:
        self.num_graphs = self.num_runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.num_graphs += 1

        def run(*args: Tensor) -> object:
            self.num_runs += 1
            return graph.forward(*args)

        return run


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 4) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Broken(Net):
    """Calls a method and a function that torch.compile cannot trace to their end."""

    def forward(self, x: Tensor) -> Tensor:
        return ends_early(self.method(x))

    def method(self, x: Tensor) -> Tensor:
        hidden = self.backbone(x)
        torch._dynamo.graph_break()
        return self.head(hidden)


def ends_early(x: Tensor) -> Tensor:
    doubled = 2 * x
    torch._dynamo.graph_break()
    return doubled + 1


def in_place(model: nn.Module, backend: Backend) -> nn.Module:
    model.compile(backend=backend)
    return model


def wrapped(model: nn.Module, backend: Backend) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend=backend)
    return compiled


def forward_only(model: nn.Module, backend: Backend) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def modes_of(timing: InferenceTimingResult) -> dict[str, str]:
    return {row.module: row.mode for row in timing.rows}


def num_programs() -> list[int]:
    functions = (Net.forward, Broken.forward, Broken.method, ends_early)
    return [len(_debug_get_cache_entry_list(function.__code__)) for function in functions]


@pytest.fixture(autouse=True)
def _no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measurement of the device limits."""
    monkeypatch.setattr(Sweep, "_limits_of", lambda *_: None)


@pytest.mark.parametrize(("compiled", "kind"), [(in_place, Broken), (wrapped, Net), (forward_only, Net)])
def test_a_compiled_model_and_its_parts_are_timed_and_labelled_compiled(
    compiled: Callable[[nn.Module, Backend], nn.Module], kind: type[Net]
) -> None:
    torch._dynamo.reset()
    backend, x = Backend(), torch.randn(5, 8)
    model = compiled(kind().eval(), backend)
    with torch.inference_mode():
        expected = model(x)
    before, records = num_programs(), {name: dict(counts) for name, counts in counters.items()}
    graphs, runs = backend.num_graphs, backend.num_runs
    assert sum(before) > 0
    with untouched(model):
        timing = inference_timing(model, x, batch_sizes=[2, 3], modules=["head"], **QUICK)
    assert modes_of(timing) == {"model": "compiled", "head": "compiled"}
    # each of the rows has programs of its own, and runs them: at each size two rows, once to compile and twice
    assert backend.num_graphs >= graphs + 2 * 2
    assert backend.num_runs >= runs + 2 * 2 * 3
    assert "model/batch3/compiled/p50_ms" in timing.metrics()
    assert "| compiled |" in timing.summary()
    # the programs and the counters are those of before
    assert num_programs() == before
    assert {name: dict(counts) for name, counts in counters.items()} == records
    graphs = backend.num_graphs
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert backend.num_graphs == graphs


def test_the_copies_compute_what_the_model_does() -> None:
    for kind in (Net, Broken):
        model, x, backend = kind().eval(), torch.randn(5, 8), Backend()
        expected = model(x)
        model.compile(backend=backend)
        found = compilation_of(model, lambda model, batch: model(batch))
        assert torch.equal(found.model(x), expected)
        assert backend.num_runs == 0
        assert found.model.head.weight is model.head.weight
        assert {name: found.mode_of(name) for name in found.modules} == dict.fromkeys(found.modules, "compiled")
    assert compilation_of(Net(), lambda model, batch: model(batch)) is None


@pytest.mark.parametrize("compiled", [in_place, wrapped])
def test_a_model_with_a_compiled_part_is_labelled_partly_compiled(
    compiled: Callable[[nn.Module, Backend], nn.Module],
) -> None:
    backend, model = Backend(), Net().eval()
    model.backbone = compiled(model.backbone, backend)
    timing = inference_timing(model, torch.randn(2, 8), batch_sizes=[2], **QUICK)
    assert modes_of(timing) == {"model": "partly_compiled", "backbone": "compiled", "head": "eager"}
    # one graph for the model and one for the backbone alone
    assert backend.num_graphs == 2
    assert timing.parts == ()
    assert "no split, because a compiled program fuses" in timing.summary()
    assert timing.plot()


TWICE = torch.compile(lambda x: 2 * x, backend=Backend())


class CallsFunctions(Net):
    def __init__(self, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        return TWICE(hidden) if self.function is None else self.function(hidden)


@pytest.mark.parametrize("is_global", [True, False])
def test_a_model_that_calls_a_compiled_function_is_partly_compiled(is_global: bool) -> None:
    def thrice(x: Tensor) -> Tensor:
        return 3 * x

    backend = Backend()
    model = CallsFunctions(None if is_global else torch.compile(thrice, backend=backend)).eval()
    function = TWICE if is_global else model.function
    code = function._torchdynamo_orig_callable.__code__
    timing = inference_timing(model, torch.randn(2, 8), batch_sizes=[1, 2], **QUICK)
    assert modes_of(timing) == {"model": "partly_compiled", "backbone": "eager", "head": "eager"}
    assert _debug_get_cache_entry_list(code) == []
    assert is_global or backend.num_graphs == 2


def test_a_compiled_forward_fn_compiles_the_model() -> None:
    backend = Backend()
    forward = torch.compile(lambda model, batch: model(batch), backend=backend)
    timing = inference_timing(Net(), torch.randn(2, 8), batch_sizes=[2], forward_fn=forward, **QUICK)
    assert set(modes_of(timing).values()) == {"compiled"}
    assert _debug_get_cache_entry_list(forward._torchdynamo_orig_callable.__code__) == []
    assert backend.num_graphs == 3


def test_names_may_have_those_of_the_wrapper() -> None:
    model = wrapped(Net(), Backend())
    timing = inference_timing(model, torch.randn(2, 8), batch_sizes=[2], modules=["_orig_mod.head"], **QUICK)
    assert modes_of(timing) == {"model": "compiled", "head": "compiled"}


def test_stages_and_other_modes_of_a_compiled_model_are_left_out_with_the_reason() -> None:
    head = SparseMoE(8, 4, num_experts=2, expert_width=4, dispatch="all")
    model = in_place(Net(head), Backend())
    timing = inference_timing(
        model, torch.randn(2, 8), batch_sizes=[2], modes=["eager", "compiled", "bf16"], num_draws=1, **QUICK
    )
    rows = [(row.module, row.mode) for row in timing.rows]
    assert rows == [(name, "compiled") for name in ("model", "backbone", "head", "head_dense")]
    assert [(gap.head, gap.mode) for gap in timing.gaps] == [("head", "compiled")]
    reasons = {(skip.mode, skip.module): skip.reason for skip in timing.skipped}
    assert reasons["compiled", "head.router"].startswith("runs inside a compiled program, and stages of a head")
    assert reasons["bf16", "model"] == (
        "is compiled in the given model. Pass the model without torch.compile for this mode"
    )


def test_a_compiler_that_fails_is_the_reason() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        raise RuntimeError("no C++ compiler")

    model = Net()
    model.backbone.compile(backend=backend)
    timing = inference_timing(model, torch.randn(2, 8), batch_sizes=[2], **QUICK)
    assert modes_of(timing) == {"head": "eager"}
    assert {skip.module for skip in timing.skipped if "no C++ compiler" in skip.reason} == {"model", "backbone"}


def test_the_mode_compiled_leaves_the_code_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=Backend()))
    model, x = Broken().eval(), torch.randn(2, 8)
    torch._dynamo.reset()
    timing = inference_timing(model, x, batch_sizes=[2], modules=[], modes=["compiled"], **QUICK)
    assert modes_of(timing) == {"model": "compiled"}
    assert num_programs()[1:3] == [0, 0]
