"""The weights of a run, epoch by epoch, and the plane that holds most of them."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from moe_heads.analysis._shared.parameters import trainable_parameters
from moe_heads.analysis.loss_landscape.trajectory import NoPlaneError, TrajectoryPlane, trajectory_plane

__all__ = ["WeightTrail"]


class WeightTrail:
    """Parameters at moments of a run, by name, on the CPU.

    By name, since layers may be frozen, unfrozen, added and replaced on the way. One that has not moved since the
    moment before is not copied again.

    Args:
        params: Names of the parameters or modules that are meant; None for all.
    """

    def __init__(self, params: Sequence[str] | None) -> None:
        self._params = params
        self._states: dict[str, dict[str, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._states)

    def remember(self, label: str, model: nn.Module) -> None:
        """The weights of this moment; none of a model with lazy parameters."""
        if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
            return
        before: Mapping[str, Tensor] = next(reversed(self._states.values()), {})
        meant = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if self._is_meant(name)}
        self._states[label] = {
            name: _copy(p.detach(), before.get(name)) for name, p in model.named_parameters() if id(p) in meant
        }

    def plane(self, model: nn.Module, name: str) -> tuple[TrajectoryPlane, list[str]]:
        """The plane through a model of the parameters that require a gradient and were there all along.

        Args:
            model: The model.
            name: What a warning begins with, where others moved too.

        Returns:
            The plane, and the names of these parameters.

        Raises:
            NoPlaneError: If there are none, or the weights lie on a line.
        """
        states = list(self._states.values())
        named = trainable_parameters(model, self._params)
        common = [key for key, p in named.items() if all(_fits(state.get(key), p) for state in states)]
        if not common:
            raise NoPlaneError("no parameter that requires a gradient was there all along")
        here = dict(model.named_parameters())
        known = {key: None for state in states for key in state}
        moved = [key for key in known if key not in common and not _stayed(states, key, here.get(key))]
        if moved:
            rank_zero_warn(
                f"{name}: the trajectory leaves out {len(moved)} parameters that moved, such as {moved[0]!r}: they are"
                " frozen now, or were not there all along."
            )
        return trajectory_plane(model, states, params=common, labels=list(self._states)), common

    def _is_meant(self, name: str) -> bool:
        return self._params is None or any(name == entry or name.startswith(f"{entry}.") for entry in self._params)


def _copy(value: Tensor, before: Tensor | None) -> Tensor:
    here = value.cpu()
    if before is not None and before.dtype == here.dtype and torch.equal(before, here):
        return before
    return here.clone() if here.data_ptr() == value.data_ptr() else here


def _fits(state: Tensor | None, parameter: Tensor) -> bool:
    return state is not None and state.shape == parameter.shape


def _stayed(states: Sequence[Mapping[str, Tensor]], name: str, now: Tensor | None) -> bool:
    if now is None:
        return False
    return all(name in state and torch.equal(state[name], now.detach().cpu()) for state in states)
