"""Benchmark of the sharpness analysis at small size: measurements, merged results and invalid options."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.benchmark_scripts import benchmark_script

Main = Callable[[Sequence[str]], dict[str, Any]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    """The script's main function; ours and PyHessian take part, the other libraries are hidden."""
    for name in ("curvlinops", "hessian_eigenthings", "landscaper"):
        monkeypatch.setitem(sys.modules, name, None)
    with benchmark_script("sharpness", monkeypatch) as script:
        yield script.main


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Options for a few random images of 8x8 pixels, and their folder."""
    for index in range(24):
        folder = tmp_path / "images" / "train" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    sizes = ["--samples", "8", "--batch", "4", "--steps", "3", "--rounds", "1", "--train-images", "20"]
    files = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out.json")]
    return [*files, "--weights", str(tmp_path / "weights.pt"), *sizes]


@pytest.mark.slow
def test_pieces_add_up_to_a_report_with_verdicts(
    main: Main, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments, "--only", *(f"resnet8/sparse/{part}" for part in ("costs", "oracle", "ours", "budget"))])
    main([*arguments, "--only", "resnet8/sparse/pyhessian"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    cell = report["cells"]["resnet8/sparse"]
    assert report["machine"]["threads"] >= 1
    assert set(report["versions"]) == {"pyhessian"}
    assert max(cell["ours"]["residuals"]) <= 1e-3
    assert cell["ours"]["top_products"] <= cell["ours"]["products"]
    assert cell["ours"]["eigenvalues_off"] < 1e-4 and cell["ours"]["density_distance"] < 0.1
    assert abs(cell["ours"]["trace_off"]) < 0.3
    assert cell["costs"]["our_difference_from_double_backward"] < 1e-4
    assert cell["costs"]["gradients"].keys() == {"gradient", "ours", "pyhessian", "pyhessian_one_batch"}
    assert "pyhessian" in cell["costs"]["errors_with_unused_parameters"]
    assert "removed" in cell["pyhessian"]["density_error"]
    assert cell["pyhessian"]["products"] == cell["pyhessian"]["eigen_products"] + cell["pyhessian"]["trace_products"]
    assert cell["extrapolated"]["basis"].startswith("extrapolated")
    by_name = {verdict["what"]: verdict for verdict in cell["verdicts"]}
    assert by_name["products for all"]["value"] == cell["ours"]["products"]
    assert by_name["CPU time of PyHessian at equal accuracy, times ours"]["extrapolated"]
    assert "curvlinops is not available" in printed
    assert "products for all" in printed


def test_a_peer_alone_needs_our_results(main: Main, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="expected the sections ours and budget"):
        main([*arguments, "--only", "resnet8/dense/pyhessian"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--only", "resnet9"], "--only: expected a network of resnet8, resnet18, vit, gpt2, got 'resnet9'"),
        (["--only", "resnet8/dense/magic"], "--only: expected a section of costs, oracle, ours"),
        (["--samples", "10"], "--samples: expected a multiple of 4 up to 20, got 10"),
        (["--images", "nowhere"], "expected images in train/<class> folders, got none in nowhere"),
    ],
)
def test_bad_input_raises_an_error(
    changes: list[str], message: str, main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, *changes])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_results_of_other_options_are_not_mixed(
    main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments, "--only", "resnet8/dense/costs"])
    with pytest.raises(SystemExit):
        main([*arguments, "--only", "resnet8/dense/costs", "--seed", "1"])
    assert "--out: expected a file with options" in capsys.readouterr().err


def test_the_distance_of_densities(main: Main) -> None:
    from bench.hessian_oracle import density_distance

    reference = {"nodes": [0.0, 2.0], "weights": [0.75, 0.25], "eigenvalues": [2.0]}
    grid = torch.tensor([0.0, 1.0, 2.0])
    assert density_distance(reference, grid, torch.tensor([3.0, 0.0, 1.0])) == pytest.approx(0, abs=1e-12)
    # a quarter of the mass moves by one, over the largest eigenvalue
    assert density_distance(reference, grid, torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(0.125)


def test_the_reference_agrees_with_a_dense_matrix(main: Main) -> None:
    from bench.hessian_oracle import oracle
    from bench.hessian_problem import Problem

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    problem = Problem(model, [(x[:8], y[:8]), (x[8:], y[8:])])
    wide = Problem(model.double(), [(a.double(), b) for a, b in problem.batches])
    matrix = torch.stack([wide.product(row) for row in torch.eye(wide.num_parameters, dtype=torch.float64)])
    found = oracle(problem, steps=40, probes=8)
    assert found["eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(matrix).flip(0)[:5].tolist(), rel=1e-6)
    assert abs(found["trace"] - float(matrix.trace())) <= 5 * found["trace_stderr"] + 1e-6
    assert sum(found["weights"]) == pytest.approx(1)


def test_the_budget_agrees_with_the_exact_trace(main: Main) -> None:
    from bench.trace_budget import hutchinson_samples_needed, trace_budget

    root = torch.randn(60, 60, dtype=torch.float64) * torch.logspace(0, -2, 60, dtype=torch.float64)
    matrix = (root.T @ root).float()
    exact = float(matrix.trace())
    budget = trace_budget(matrix.mv, 60, 0.01 * exact, seed=0)
    estimate, stderr = budget.estimate()
    assert stderr <= 0.01 * exact
    assert abs(estimate - exact) < 5 * stderr
    needed = hutchinson_samples_needed(budget.hutchinson, 0.01 * exact)
    assert needed > 4 * budget.count


def test_power_iteration_is_run_on_until_it_is_accurate(main: Main) -> None:
    from bench.hessian_peers import pyhessian_equal
    from bench.hessian_problem import Problem

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3))
    x, y = torch.randn(16, 6) * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.2]), torch.randint(3, (16,))
    problem = Problem(model, [(x[:8], y[:8]), (x[8:], y[8:])], num_eigenvalues=2)
    matrix = torch.stack([problem.product(row) for row in torch.eye(problem.num_parameters)])
    known = {"eigenvalues": torch.linalg.eigvalsh(matrix).flip(0)[:2].tolist()}
    row = pyhessian_equal(problem, known)
    assert row["reached"]
    assert row["missed"] == 0
    assert max(row["residuals"]) <= 1e-3
    assert row["products"] > 4
