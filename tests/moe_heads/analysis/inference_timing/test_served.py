"""Programs that are served: timed on the batches of the model, and compared with its outputs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from moe_heads import Dense, SparseMoE
from moe_heads.analysis import InferenceTimingResult, inference_timing


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Dense(8, 3)).eval()


def exported(model: nn.Module, x: Tensor, *, is_dynamic: bool = True) -> ExportedProgram:
    return export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1)},) if is_dynamic else None)


def timed(model: nn.Module, batch: Any, served: Any, **options: Any) -> InferenceTimingResult:
    options = {"batch_sizes": [1, 4], "num_runs": 6, "modules": [], "seconds_per_size": 0.05} | options
    return inference_timing(model, batch, served=served, **options)


def test_an_exported_program_computes_the_same() -> None:
    model, x = network(), torch.randn(4, 6)
    result = timed(model, x, {"exported": exported(model, x), "twice": lambda x: 2 * model(x)})
    rows = [(row.module, row.batch_size, row.mode) for row in result.rows]
    assert rows == [
        (name, size, mode)
        for size in (1, 4)
        for name, mode in (("model", "eager"), ("exported", "served"), ("twice", "served"))
    ]
    same, twice = result.served
    assert same.kind == "exported program" and same.difference < 1e-6
    assert twice.difference == pytest.approx(1, rel=1e-6) and "another function" in str(twice)
    assert set(same.speedups) == {1, 4} and all(low <= ratio <= high for ratio, low, high in same.speedups.values())
    assert "exported/batch4/served/p50_ms" in result.metrics()
    assert str(same) in result.summary() and '"served"' in result.to_json()


def test_a_program_of_one_batch_size_is_left_out_at_the_others() -> None:
    model, x = network(), torch.randn(4, 6)
    result = timed(model, x, {"static": exported(model, x, is_dynamic=False)})
    assert [row.batch_size for row in result.rows if row.module == "static"] == [4]
    (skipped,) = result.skipped
    assert (skipped.batch_size, skipped.mode, skipped.module) == (1, "served", "static")


def test_a_session_of_onnx_runtime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = network(), torch.randn(4, 6)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: Dim("batch", min=1)},))
    (report,) = timed(model, (x, torch.zeros(4)), {"onnx": runtime.InferenceSession(path)}).served
    assert report.kind == "ONNX Runtime session" and report.difference < 1e-5 and set(report.speedups) == {1, 4}


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = SparseMoE(6, 3, num_experts=4, expert_width=4, dispatch="all")

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(x) * scale[:, None]


class Session:
    """The interface of an ONNX Runtime session."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": name}) for name in ("scale", "x")]

    def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
        return [self.model(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()]


def test_batches_by_name() -> None:
    model = ByName().eval()
    batch = {"x": torch.randn(4, 6), "scale": torch.rand(4), "label": torch.zeros(4)}
    served = {"session": Session(model), "callable": lambda x, scale: model(x, scale), "module": model}
    result = timed(model, batch, served)
    assert [program.difference for program in result.served] == [0, 0, 0]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"], batch["scale"])

    result = timed(model, batch, served, forward_fn=forward)
    assert [program.difference for program in result.served] == [0, 0, 0]


def test_outputs_of_another_shape_differ_without_bound() -> None:
    model, x = network(), torch.randn(4, 6)
    (report,) = timed(model, x, {"wrong": lambda x: x}).served
    assert report.difference == math.inf and "another function" in str(report)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_differ_without_bound(wrong: float) -> None:
    model, x = network(), torch.randn(4, 6)
    (report,) = timed(model, x, {"broken": lambda x: model(x).masked_fill(torch.arange(3) == 1, wrong)}).served
    assert report.difference == math.inf


def test_a_module_in_training_mode() -> None:
    with pytest.raises(ValueError, match=r"served\['other'\]: expected a module in evaluation mode"):
        timed(network(), torch.randn(4, 6), {"other": network().train()})


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ([torch.relu], "served: expected programs by name"),
        ({"model": torch.relu}, "served: expected names other than 'model', got 'model'"),
        ({"": torch.relu}, "served: expected names, got ''"),
        ({"onnx": "model.onnx"}, r"served\['onnx'\]: expected an exported program.*got str. Load it"),
    ],
)
def test_wrong_programs(served: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timed(network(), torch.randn(4, 6), served)


def test_a_name_of_a_part_is_taken() -> None:
    with pytest.raises(ValueError, match="served: expected names other than 'model', '0'"):
        timed(network(), torch.randn(4, 6), {"0": torch.relu}, modules=["0"])
