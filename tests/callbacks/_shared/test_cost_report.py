"""Cost of the points of a series, as metrics and text."""

from moe_heads.callbacks._shared.cost_report import cost_lines, cost_metrics


def test_mean_and_range() -> None:
    costs = {"products": [12.0, 18.0], "seconds": [0.5, 1.0], "passes": []}
    metrics = cost_metrics(costs, 0.03)
    assert metrics["products_mean"] == 15 and metrics["seconds_max"] == 1 and metrics["products_min"] == 12
    assert not [name for name in metrics if "passes" in name] and metrics["overhead"] == 0.03
    assert cost_lines(costs, 0.03, every=50, max_overhead=None) == [
        "- 2 points, one every 50 steps",
        "- 15 products a point (12 to 18)",
        "- 0.75 seconds a point (0.5 to 1)",
        "- 3 % more time than the training without the points",
    ]
    lines = cost_lines(costs, 0.03, every=None, max_overhead=0.05)
    assert "chosen by the clock" in lines[0] and lines[-1].endswith("allowed are 5 %")
