"""Continuation from a file of points, and the errors for other files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import Progress, loss_landscape, random_direction
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from tests.support.untouched import untouched

pytestmark = pytest.mark.usefixtures("without_mean_check")


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 4), torch.randint(3, (12,))


def counted(limit: int = 10**9, scale: float = 1.0) -> tuple[Any, list[int]]:
    calls: list[int] = []

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return scale * cross_entropy(m, b)

    return loss, calls


def test_an_interrupted_scan_continues(tmp_path: Path) -> None:
    model, data, file = network().eval(), batch(), tmp_path / "deep" / "plane.npz"
    options: dict[str, Any] = {
        "direction1": random_direction(model),
        "direction2": random_direction(model, 1),
        "num_points": 5,
    }
    expected = loss_landscape(model, cross_entropy, [data], **options)
    cut, _ = counted(limit=12)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        loss_landscape(model, cut, [data], resume=file, **options)
    rest, calls = counted()
    found = loss_landscape(model, rest, [data], resume=file, **options)
    assert len(calls) == 26 - 10  # ten points besides the center, which is always measured, with a graph and without
    assert torch.equal(found.losses, expected.losses)
    again, calls = counted()
    assert torch.equal(loss_landscape(model, again, [data], resume=file, **options).losses, expected.losses)
    assert len(calls) == 2
    # a finer grid takes over what it shares
    finer, calls = counted()
    loss_landscape(model, finer, [data], resume=file, **(options | {"num_points": 9}))
    assert len(calls) == 81 - 25 + 2
    assert not list(file.parent.glob("*.partial"))


def test_a_file_of_other_points_raises(tmp_path: Path) -> None:
    model, data, file = network().eval(), batch(), tmp_path / "line.npz"
    direction = random_direction(model)

    def line(m: nn.Module = model, b: Any = data, loss: Any = cross_entropy, **options: Any) -> LossLandscapeResult:
        return loss_landscape(m, loss, [b], **({"direction1": direction, "num_points": 3, "resume": file} | options))

    counting, _ = counted()
    line()
    with pytest.raises(
        ValueError, match=r"resume: expected points of the same weights, got a file of different weights, .*line\.npz\."
    ):
        line(network())
    with pytest.raises(ValueError, match="resume: expected points of the same samples"):
        line(b=batch())
    with pytest.raises(ValueError, match="resume: expected points of the same directions"):
        line(direction1=2 * direction)
    with pytest.raises(ValueError, match="resume: expected points of the same options"):
        line(seed=1)
    with pytest.raises(ValueError, match="resume: expected points of the same accuracy_fn"):
        line(accuracy_fn=cross_entropy)
    with pytest.raises(ValueError, match="resume: expected points of the same loss_fn"):
        line(loss=counting)


def test_functions_of_the_same_code_are_compared_at_the_center(tmp_path: Path) -> None:
    model, data, file = network().eval(), batch(), tmp_path / "line.npz"
    options: dict[str, Any] = {"direction1": random_direction(model), "num_points": 3, "resume": file}
    plain, twice = counted()[0], counted(scale=2.0)[0]
    loss_landscape(model, plain, [data], accuracy_fn=plain, **options)
    with pytest.raises(ValueError, match=r"resume: expected the same loss_fn, .* at the center, got .* in the file"):
        loss_landscape(model, twice, [data], accuracy_fn=plain, **options)
    with pytest.raises(
        ValueError, match=r"resume: expected the same accuracy_fn, .* at the center, got .* in the file"
    ):
        loss_landscape(model, plain, [data], accuracy_fn=twice, **options)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        lambda file: file.write_text("nothing of the kind"),
        lambda file: file.write_bytes(b""),
        lambda file: np.savez(file, other=np.ones(2)),
        lambda file: np.savez(file, **dict(np.load(file)) | {"values": np.ones((3, 2))}),
        lambda file: np.save(file.with_suffix(".npy"), np.ones(2)) or file.with_suffix(".npy").replace(file),
    ],
)
def test_a_damaged_file_raises(damage: Any, tmp_path: Path) -> None:
    model, file = network().eval(), tmp_path / "line.npz"
    options: dict[str, Any] = {"direction1": random_direction(model), "num_points": 3, "resume": file}
    data = batch()
    loss_landscape(model, cross_entropy, [data], **options)
    damage(file)
    message = (
        r"resume: expected a file that loss_landscape wrote, got .*line\.npz: .*\. Pass another file or delete it\."
    )
    with pytest.raises(ValueError, match=message):
        loss_landscape(model, cross_entropy, [data], **options)


def test_a_partial_result_is_in_the_file(tmp_path: Path) -> None:
    model, file = network().eval(), tmp_path / "line.npz"
    seen = []

    def show(done: int, total: int | None, quantities: Any) -> None:
        seen.append(done)
        if done == 4:
            progress._deadline = 0.0

    progress = Progress(max_time=100, show=show)
    options: dict[str, Any] = {"direction1": random_direction(model), "resume": file}
    data = batch()
    found = loss_landscape(model, counted()[0], [data], progress=progress, **options)
    assert found.partial and found.num_unmeasured == 21 - 4
    assert math.isinf(found.radius(1e9)) and found.num_nonfinite == 0
    rest, calls = counted()
    assert loss_landscape(model, rest, [data], **options).num_unmeasured == 0
    assert len(calls) == 2 + 21 - 4


def test_far_points_are_measured_again_to_validate_reused_outputs(tmp_path: Path) -> None:
    """A file of points does not replace the validation of reused outputs in this process."""
    model, data = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), batch()
    options: dict[str, Any] = {"direction1": random_direction(model, params=["2"]), "params": ["2"], "num_points": 9}
    options |= {"fixed_routing": False}
    expected = loss_landscape(model, cross_entropy, [data], **options)
    file = tmp_path / "line.npz"
    cut, _ = counted(limit=2 + 2 * 2 + 2 + 1)  # the center, both ends twice, a third proof, and one point
    with untouched(model), pytest.raises(KeyboardInterrupt):
        loss_landscape(model, cut, [data], resume=file, **options)
    with np.load(file) as stored:
        places = stored["places"].flatten().tolist()
    assert len(places) == 5 and {-0.5, 0.0, 0.5} < set(places)
    rest, calls = counted()
    found = loss_landscape(model, rest, [data], resume=file, **options)
    assert torch.equal(found.losses, expected.losses)
    assert found.reused == ("0",)
    assert len(calls) == 2 + 2 * 2 + 2 + 3  # the same again, and what was missing: 4, of which one is a proof
    again, calls = counted()
    assert torch.equal(loss_landscape(model, again, [data], resume=file, **options).losses, expected.losses)
    assert len(calls) == 2


def test_a_wrong_reuse_is_found_when_the_scan_continues(tmp_path: Path) -> None:
    """The body reads weights of the head, so reused outputs of the body would be wrong."""

    class Peeking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + head[0].weight.sum()

    head: list[nn.Linear] = [nn.Linear(6, 3)]
    model, data, file = nn.Sequential(Peeking(4, 6), head[0]), batch(), tmp_path / "line.npz"
    options: dict[str, Any] = {"direction1": random_direction(model, params=["1"]), "params": ["1"], "num_points": 9}
    expected = loss_landscape(model, cross_entropy, [data], **options)
    cut, _ = counted(limit=8)
    with pytest.raises(KeyboardInterrupt):
        loss_landscape(model, cut, [data], resume=file, **options)
    found = loss_landscape(model, counted()[0], [data], resume=file, **options)
    assert torch.equal(found.losses, expected.losses)
    assert found.reused == () and found.not_reused
