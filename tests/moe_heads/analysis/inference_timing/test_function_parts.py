"""The parts of a model in a timing: heads, operations, the dense twin, and modules that cannot be timed."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Dense, SparseMoE
from moe_heads.analysis.inference_timing.function import inference_timing
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rows import TimingRow
from tests.support.untouched import untouched

SHORT = {"num_runs": 7, "warmup_runs": 1}


def sparse(dispatch: str = "ragged") -> SparseMoE:
    return SparseMoE(16, 4, num_experts=4, expert_width=8, dispatch=dispatch)


def rows_of(timing: InferenceTimingResult) -> dict[tuple[str, int], TimingRow]:
    return {(row.module, row.batch_size): row for row in timing.rows}


def test_fused_attention_and_recurrent_layers_are_counted_in_the_rows() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.LSTM(16, 8, batch_first=True))
    rows = rows_of(inference_timing(model, torch.randn(2, 5, 16), batch_sizes=[1, 3], modules=["0", "1"], **SHORT))
    encoder, lstm = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 5 * 5 * 16, 2 * 5 * 4 * 8 * (16 + 8)
    for size in (1, 3):
        assert rows["0", size].flops == size * encoder
        assert rows["1", size].flops == size * lstm
        assert rows["model", size].flops == size * (encoder + lstm)
        assert all(rows[name, size].flops_complete for name in ("model", "0", "1"))
        assert rows["model", size].peak_share > 0


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.fft.fft(x).real)


def test_what_cannot_be_counted_leaves_a_lower_bound_and_no_share_of_peak() -> None:
    model = nn.Sequential(Spectral(), nn.Linear(16, 16), sparse())
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[2], modules=["0", "1", "2"], **SHORT)
    rows = rows_of(timing)
    assert [rows[name, 2].flops_complete for name in ("model", "0", "1", "2")] == [False, False, True, True]
    assert rows["0", 2].flops == 2 * 2 * 16 * 16
    assert rows["model", 2].peak_share is rows["0", 2].peak_share is None
    assert rows["1", 2].peak_share > 0
    assert timing.uncounted["aten._fft_r2c"] == 1
    assert "≥ " in timing.summary()


class SpectralHead(SparseMoE):
    """A head whose products are not all known; its formula omits the transform."""

    def classify(self, x: Tensor, mask: Tensor | None) -> Any:
        return super().classify(torch.fft.fft(x).real, mask)


def test_of_operators_that_are_not_known_there_is_no_bound() -> None:
    model = nn.Sequential(SpectralHead(16, 4, num_experts=4, expert_width=8))
    (point,) = inference_timing(model, torch.randn(2, 16), batch_sizes=[2], **SHORT).gaps[0].points
    assert point.realized > 0
    assert point.bound is point.dense_bound is point.head_bound is None


class Gallery(nn.Module):
    """Encodes the same gallery whatever the batch, and compares all samples with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gallery = nn.Linear(16, 16), nn.Parameter(torch.randn(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.encoder(self.gallery).t()).sum() + (x @ x.t()).sum()


def test_flops_are_those_of_each_size_in_whatever_proportion() -> None:
    rows = rows_of(inference_timing(Gallery(), torch.randn(2, 16), batch_sizes=[1, 4, 8], **SHORT))
    for size in (1, 4, 8):
        assert rows["model", size].flops == 2 * 16 * (10 * 16 + 10 * size + size * size)


def test_operators_that_cannot_be_recorded_cost_only_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    class FailsUnderModes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise NotImplementedError("no rule for this mode")
            return self.inner(x)

        def __init__(self) -> None:
            super().__init__()
            self.inner = sparse()

    timing = inference_timing(FailsUnderModes(), torch.randn(2, 16), batch_sizes=[2], **SHORT)
    rows = rows_of(timing)
    assert rows["model", 2].flops is None
    assert rows["inner", 2].flops == sparse().flops(2).active
    assert timing.gaps[0].points[0].bound is None
    reason = "FLOPs: its operators cannot be recorded, NotImplementedError: no rule for this mode"
    assert [skip.reason for skip in timing.skipped] == [reason]


class Twice(nn.Module):
    """Calls backbone and head twice in a forward pass, the second time on half of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(16, 16), sparse()

    def forward(self, x: Tensor) -> Tensor:
        whole, half = (self.head(self.backbone(part)) for part in (x, x[: len(x) // 2]))
        return whole.sum() + half.sum()


def test_a_module_that_is_called_twice_is_timed_and_counted_twice() -> None:
    model, x, seen = Twice(), torch.randn(4, 16), []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with untouched(model):
        timing = inference_timing(model, x, batch_sizes=[4], modes=["eager", "bf16"], num_runs=7, warmup_runs=0)
    rows = {row.module: row for row in timing.rows if row.mode == "eager"}
    assert rows["backbone"].flops == 2 * (4 + 2) * 16 * 16
    head = sparse()
    assert rows["head"].flops == head.flops(4).active + head.flops(2).active
    assert rows["model"].flops == rows["backbone"].flops + rows["head"].flops
    # no run of the backbone is without its second call
    assert seen == [4, 2] * (len(seen) // 2)
    assert {part.name for part in timing.parts if part.whole == "head"} >= {"router", "experts"}
    (gap, _) = timing.gaps
    twin = rows["head_dense"]
    assert gap.points[0].theoretical == twin.flops / rows["head"].flops
    assert gap.points[0].realized == pytest.approx(twin.p50_ms / rows["head"].p50_ms)


@pytest.mark.parametrize("batch", [torch.randn(3, 16), {"x": torch.randn(3, 16)}])
def test_a_head_that_is_the_whole_model_has_parts_and_a_gap(batch: object) -> None:
    head = sparse()
    timing = inference_timing(head, batch, batch_sizes=[2], **SHORT)
    rows = rows_of(timing)
    assert [name for name, _ in rows] == ["model", "router", "dispatch", "combine", "model_dense"]
    assert rows["model", 2].flops == head.flops(2).active
    assert [part.name for part in timing.parts] == ["router", "dispatch", "combine", "experts"]
    (gap,) = timing.gaps
    assert gap.head == "model"
    assert gap.points[0].theoretical == rows["model_dense", 2].flops / rows["model", 2].flops
    assert gap.points[0].bound > 0


def test_a_function_that_fails_with_a_dense_head_costs_only_the_gap() -> None:
    timing = inference_timing(
        sparse(), torch.randn(3, 16), batch_sizes=[2], forward_fn=lambda head, x: (head(x), head.router(x)), **SHORT
    )
    assert [row.module for row in timing.rows] == ["model", "router", "dispatch", "combine"]
    assert timing.gaps == ()
    (skip,) = timing.skipped
    assert (skip.module, skip.reason) == ("model_dense", "AttributeError: 'Dense' object has no attribute 'router'")


def test_without_modules_a_head_is_timed_alone_and_counts_what_it_chooses() -> None:
    for model in (sparse("all"), nn.Sequential(nn.Identity(), sparse("all"))):
        timing = inference_timing(model, torch.randn(3, 16), batch_sizes=[2], modules=[], **SHORT)
        (row,) = timing.rows
        assert row.flops == sparse().flops(2).active
        assert timing.gaps == timing.parts == ()


def test_a_module_called_as_the_dense_twin_keeps_its_rows() -> None:
    model = nn.Sequential()
    model.add_module("head_dense", nn.Linear(16, 16))
    model.add_module("head", sparse())
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[2], modules=["head_dense", "head"], **SHORT)
    rows = rows_of(timing)
    assert rows["head_dense", 2].flops == 2 * 2 * 16 * 16
    assert rows["head_dense_", 2].flops > rows["head_dense", 2].flops
    assert timing.gaps[0].points[0].theoretical == rows["head_dense_", 2].flops / rows["head", 2].flops


def test_a_module_called_model_is_in_the_figures_with_its_head() -> None:
    inner, outer = nn.Sequential(), nn.Sequential()
    inner.add_module("head", sparse())
    outer.add_module("model", inner)
    timing = inference_timing(outer, torch.randn(2, 16), batch_sizes=[1, 2], modules=["model", "model.head"], **SHORT)
    labels = {line.get_label().split(",")[0] for line in timing.plot()[1].get_lines()}
    assert {"model", "model.model", "model.model.head"} <= labels
    assert "model.model.head.dispatch" not in labels


def test_without_eager_there_is_a_gap_and_the_missing_parts_are_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16), sparse())
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[1, 2], modes=["bf16"], **SHORT)
    (gap,) = timing.gaps
    assert (gap.mode, len(gap.points)) == ("bf16", 2)
    assert timing.plot_gap() is not None
    assert timing.parts == ()
    reasons = [skip.reason for skip in timing.skipped]
    assert reasons == ["no split and no roofline, because both require the mode eager"]


def test_the_json_holds_the_plan_and_what_was_left_out() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Dense(16, 4))
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[2, 1], modes=["cuda_graph", "eager"], **SHORT)
    found = json.loads(timing.to_json())
    plan = {key: found["plan"][key] for key in ("batch_sizes", "modes", "num_runs", "seconds_per_size", "max_seconds")}
    assert plan == {
        "batch_sizes": [2, 1],
        "modes": ["cuda_graph", "eager"],
        "num_runs": 7,
        "seconds_per_size": 0.8,
        "max_seconds": 50.0,
    }
    assert {skip["batch_size"] for skip in found["skipped"]} == {1, 2}
    assert all("needs a CUDA device" in skip["reason"] for skip in found["skipped"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_timed_as_a_whole_and_says_why() -> None:
    model = nn.Sequential()
    model.add_module("backbone", nn.Linear(16, 16))
    scripted = torch.jit.script(model)
    timing = inference_timing(scripted, torch.randn(2, 16), batch_sizes=[2], **SHORT)
    assert [(row.module, row.flops) for row in timing.rows] == [("model", 2 * 2 * 16 * 16)]
    (skip,) = timing.skipped
    assert (skip.module, skip.reason) == ("backbone", "compiled by TorchScript, which hides the inputs of its modules")
    with pytest.raises(
        ValueError, match=r"modules: expected modules that TorchScript did not compile, got \['backbone'\]"
    ):
        inference_timing(scripted, torch.randn(2, 16), modules=["backbone"])
