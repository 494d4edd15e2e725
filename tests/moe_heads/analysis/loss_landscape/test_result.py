import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_heads.analysis import Trajectory, landscape_page
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult


def landscape(losses: Tensor, **fields: object) -> LossLandscapeResult:
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in losses.shape]
    given = {
        "alphas": axes[0],
        "betas": axes[1] if len(axes) > 1 else None,
        "losses": losses.double(),
        "accuracies": None,
        "routing_flips": None,
        "center_loss": 1.0,
        "center_accuracy": None,
        "num_samples": 8,
        "seed": 0,
    }
    return LossLandscapeResult(**(given | fields))


def bowl(size: int = 5) -> Tensor:
    side = torch.linspace(-1, 1, size)
    return 1 + side[:, None].square() + 3 * side.square()


def test_metrics_are_finite_and_absent_otherwise() -> None:
    losses = torch.tensor([math.inf, 2.0, 1.0, 3.0, math.nan])
    result = landscape(losses, accuracies=losses.clamp(0, 1).nan_to_num(), center_accuracy=0.5)
    assert result.metrics() == {
        "center_loss": 1.0,
        "num_nonfinite": 2.0,
        "loss_min": 1.0,
        "loss_mean": 2.0,
        "loss_max": 3.0,
        "curvature_1": pytest.approx((2 - 2 + 3) / 0.25),
        "radius_10": pytest.approx(0.025),  # towards 3 at 0.5
        "radius_50": pytest.approx(0.125),
        "radius_100": pytest.approx(0.25),
        "rise_half_reach": 2.0,
        "center_accuracy": 0.5,
        "accuracy_min": 0.0,
        "num_samples": 8.0,
    }
    nothing = landscape(torch.full((3,), math.nan)).metrics()
    assert nothing == {"center_loss": 1.0, "num_nonfinite": 3.0, "num_samples": 8.0}


def test_numbers_of_a_grid_on_one_side_of_the_center() -> None:
    """The loss at the center, 1, is measured by itself: the rise to 3 at 0.5 is within reach."""
    result = landscape(torch.tensor([3.0, 4.0, 5.0]), alphas=torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64))
    assert result.metrics()["radius_100"] == pytest.approx(0.25)
    assert "does not rise by" not in result.summary()
    assert result.reach == 0 and "rise_half_reach" not in result.metrics()
    # no point but the center within half the reach
    assert "rise_half_reach" not in landscape(torch.tensor([2.0, 1.0, 2.0])).metrics()


def test_a_rise_that_was_not_measured_is_not_reported() -> None:
    losses = torch.tensor([math.nan, math.nan, 1.0, 1.5, 2.0])
    assert math.isnan(landscape(losses, num_unmeasured=2, partial="cut").rise_within(0.5))
    assert math.isinf(landscape(losses).rise_within(0.5))


def test_accuracies_that_are_nan_do_not_count() -> None:
    losses, some = torch.ones(3), torch.tensor([math.nan, 0.5, 0.75], dtype=torch.float64)
    assert landscape(losses, accuracies=some, center_accuracy=0.5).metrics()["accuracy_min"] == 0.5
    none = landscape(losses, accuracies=some * math.nan, center_accuracy=0.5).metrics()
    assert none["center_accuracy"] == 0.5 and "accuracy_min" not in none


def test_curvatures_along_both_axes() -> None:
    assert landscape(bowl()).curvatures == pytest.approx((2, 6))


def test_no_curvature_without_a_center_on_the_grid() -> None:
    assert landscape(bowl(4)).curvatures == ()
    assert landscape(torch.ones(3), alphas=torch.tensor([0.0, 1.0, 2.0])).curvatures == ()
    assert landscape(torch.ones(3), alphas=torch.tensor([-1.0, 0.0, 2.0])).curvatures == ()


def test_scale_is_logarithmic_for_a_wide_range_of_positive_losses() -> None:
    assert landscape(torch.tensor([1.0, 99.0])).scale == "linear"
    assert landscape(torch.tensor([1.0, 101.0, math.inf])).scale == "log"
    assert landscape(torch.tensor([-1.0, 1.0, 1000.0])).scale == "linear"


def test_flips_in_metrics_and_summary() -> None:
    flips = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    result = landscape(torch.ones(3), routing_flips=flips)
    assert result.metrics()["flips_mean"] == 0.5
    assert result.metrics()["flips_max"] == 1.0
    assert "routed to different experts" in result.summary()
    assert "routed to different experts" not in landscape(torch.ones(3), routing_flips=0 * flips).summary()


def test_a_soft_head_is_not_said_to_jump() -> None:
    flips = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    soft, sparse = (landscape(torch.ones(3), routing_flips=flips, is_soft=is_soft) for is_soft in (True, False))
    assert "another expert has the largest gate" in soft.summary() and "does not jump" in soft.summary()
    assert "The loss of a sparse head jumps there" in sparse.summary()
    for result, words in ((soft, "another largest gate"), (sparse, "other experts chosen")):
        labels = [text.get_text() for text in result.plot()[1].get_legend().get_texts()]
        assert words in labels
        assert words in landscape_page({"line": result})


def test_summary_is_a_table_that_tells_the_scale_and_what_is_blank() -> None:
    text = landscape(torch.tensor([[1.0, math.nan], [1000.0, 2.0]])).summary()
    assert text.startswith("| quantity | value |\n| --- | --- |\n| center loss | 1 |")
    assert "2 × 2 points. Losses are drawn on a log scale." in text
    assert "1 points have a loss of nan or inf" in text


def test_mesh_of_a_line() -> None:
    with pytest.raises(ValueError, match="mesh: expected a landscape on a plane"):
        landscape(torch.ones(3)).mesh()


@pytest.mark.parametrize(
    "losses",
    [
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1.0, math.nan, 1000.0]),
        torch.full((3,), math.nan),
        bowl(),
        torch.ones(3, 3),
        torch.full((3, 3), math.nan),
        torch.tensor([[1.0, math.inf], [1e4, 2.0]]),
        bowl(9) ** 8,
    ],
)
def test_figures_of_all_kinds_render_without_a_warning(losses: Tensor) -> None:
    flips = torch.zeros_like(losses, dtype=torch.float64)
    result = landscape(losses, routing_flips=flips)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of the parser that old versions of matplotlib call
        figure, ax = result.plot()
        figure.savefig("/dev/null", format="png")
    assert ax.get_xlabel().startswith("α")
    assert "loss 1 at the center (8 samples" in ax.get_title()


def test_maps_of_what_else_there_is() -> None:
    flips = torch.linspace(0, 1, 25, dtype=torch.float64).reshape(5, 5)
    fixed, accuracies = 0.5 * bowl().double(), torch.full((5, 5), 0.25, dtype=torch.float64)
    plane = landscape(
        bowl(), routing_flips=flips, losses_fixed_routing=fixed, accuracies=accuracies, center_accuracy=1.0
    )
    assert plane.maps == ("losses", "losses_fixed_routing", "routing_flips", "accuracies")
    drawn = {}
    for quantity in plane.maps:
        ax = plane.plot(quantity=quantity)[1]
        drawn[quantity] = ax.collections[0]
        torch.testing.assert_close(
            torch.from_numpy(drawn[quantity].get_array().reshape(5, 5).data), getattr(plane, quantity).T.double()
        )
    # one color is one loss, free or not
    assert drawn["losses"].get_clim() == drawn["losses_fixed_routing"].get_clim() == (0.5, 5.0)
    assert drawn["routing_flips"].get_clim() == (0, 1)
    assert landscape(bowl(), routing_flips=0 * flips, losses_fixed_routing=fixed).maps == ("losses",)
    with pytest.raises(ValueError, match="quantity: expected one of 'losses', got 'accuracies'"):
        landscape(bowl()).plot(quantity="accuracies")
    with pytest.raises(ValueError, match=r"quantity: expected one of .* got 'routing_flips'"):
        landscape(torch.ones(3), routing_flips=torch.ones(3)).plot(quantity="routing_flips")


@pytest.mark.parametrize("losses", [torch.tensor([1.0, 2.0, 3.0]), bowl()])
def test_a_figure_fills_a_card_and_its_legend_hides_nothing(losses: Tensor) -> None:
    figure, ax = landscape(losses, routing_flips=torch.ones_like(losses)).plot()
    figure.canvas.draw()
    assert tuple(figure.get_size_inches()) == (4.4, 2.3)
    legend, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.y0 >= frame.y1 - 1 and legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
    assert ax.title.get_window_extent().y0 >= legend.y1 - 2
    assert min(text.get_fontsize() for text in ax.get_xticklabels()) >= 7


def test_contour_lines_are_dark_where_the_colors_are_bright() -> None:
    ax = landscape(bowl(9)).plot()[1]
    colors = [tuple(color[:3]) for color in ax.collections[1].get_edgecolor()]
    assert colors[0] == (1, 1, 1) and colors[-1] == (0, 0, 0)


def test_plot_draws_the_losses_and_leaves_pyplot_alone() -> None:
    from matplotlib._pylab_helpers import Gcf
    from matplotlib.figure import Figure

    own = Figure().subplots()
    figure, ax = landscape(bowl()).plot(own)
    assert ax is own
    assert figure is own.figure
    assert not Gcf.figs
    # the picture's rows run along β
    drawn = ax.collections[0].get_array().reshape(5, 5)
    torch.testing.assert_close(torch.from_numpy(drawn.data), bowl().T.double())


def test_arrays_are_saved_with_their_numbers(tmp_path: Path) -> None:
    run = Trajectory(
        coordinates=torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64),
        residuals=torch.tensor([0.1, 0.0], dtype=torch.float64),
        distances=torch.tensor([0.7, 0.0], dtype=torch.float64),
        explained_variance=(0.9, 0.1),
        labels=("start", "end"),
    )
    plane = landscape(torch.eye(3) + 1, trajectory=run, routing_flips=torch.zeros(3, 3).double())
    plane.save(tmp_path / "plane.npz")
    with np.load(tmp_path / "plane.npz") as stored:
        assert np.array_equal(stored["losses"], plane.losses.numpy())
        assert np.array_equal(stored["trajectory_coordinates"], run.coordinates.numpy())
        assert stored["metric_loss_max"] == 2
        assert "accuracies" not in stored.files
