"""Cases of the oracle: from a seed, a network, its data and loss, and the options of the analysis."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.oracle_batches import CONTAINERS, CUTS, Container, Fields, batches_of
from tests.support.oracle_hessians import total_loss
from tests.support.oracle_losses import HABITS, LOSSES, loss_function
from tests.support.oracle_networks import NETWORKS, Network

__all__ = ["Case", "Problem"]

STATES = ("built", "fitted", "zero readout", "large", "small")


@dataclass(frozen=True)
class Problem:
    """What is given to the analysis, and the same in float64.

    Attributes:
        model: The model, in training mode.
        loss_fn: The loss.
        batches: The data.
        names: Names of the parameters that are analyzed.
        exact_model: The model in float64.
        exact_batches: The data in float64.
    """

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]
    names: list[str]
    exact_model: nn.Module
    exact_batches: list[Any]


@dataclass(frozen=True)
class Case:
    """One choice of everything.

    Attributes:
        seed: Seed of the numbers.
        network: The network.
        outputs: Its number of outputs.
        loss: Name in LOSSES.
        habit: Name in HABITS.
        container: The container of the batches.
        sizes: Samples by batch.
        dtype: Data type of the model and the data.
        state: One of STATES: what the parameters are like.
        part: Random number of the choice of parameters; None for all.
        options: Further options of `sharpness`.
    """

    seed: int
    network: Network
    outputs: int
    loss: str
    habit: str
    container: Container
    sizes: list[int]
    dtype: torch.dtype
    state: str
    part: int | None
    options: dict[str, Any]

    @classmethod
    def of_seed(cls, seed: int) -> "Case":
        """The case of a seed; all networks come in turn, everything else is drawn."""
        rng = random.Random(seed)
        network = NETWORKS[seed % len(NETWORKS)]
        outputs = rng.choice(network.outputs)
        losses = [name for name, loss in LOSSES.items() if loss.least_outputs <= outputs]
        if "badly scaled" in network.name:
            losses.remove("poisson")  # its exponential overflows
        if network.name == "zero last layer" and "cosine" in losses:
            losses.remove("cosine")  # the angle of nothing has no derivative
        loss, container = rng.choice(losses), rng.choice(CONTAINERS)
        habits = [name for name, habit in HABITS.items() if habit.fits(container)]
        (habit,) = rng.choices(habits, [HABITS[name].weight for name in habits])
        (state,) = rng.choices(STATES, [12, 3, 2, 2, 1])
        if "cosine" in loss or "cosine" in network.name:
            state = state.replace("zero readout", "built")  # the angle of nothing has no derivative
        (cut,) = rng.choices([*CUTS], [*CUTS.values()])
        return cls(
            seed=seed,
            network=network,
            outputs=outputs,
            loss=loss,
            habit=habit,
            container=container,
            sizes=cut(rng),
            dtype=rng.choice([torch.float32, torch.float64]),
            state=state,
            part=rng.randrange(2**30) if rng.random() < 0.3 else None,
            options=_options(rng),
        )

    def __str__(self) -> str:
        parts = "all parameters" if self.part is None else "a part"
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return (
            f"seed {self.seed}: {self.network.name} ({self.outputs} outputs, {self.state}, {parts}), {self.loss} "
            f"({self.habit}), {self.container.name}, {self.sizes}, {str(self.dtype).removeprefix('torch.')}, {options}"
        )

    def problem(self) -> Problem:
        """The model and its data; equal each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            num_samples, loss, habit = sum(self.sizes), LOSSES[self.loss], HABITS[self.habit]
            model = self.network.build(self.outputs).double()
            fields: Fields = {
                **self.network.inputs(num_samples),
                "y": loss.targets(num_samples, self.outputs),
                **({"w": torch.rand(num_samples, dtype=torch.float64) + 0.5} if habit.is_weighted else {}),
            }
            loss_fn = loss_function(loss, habit, self.container, fields)
            self._change(model, loss_fn, self.container.pack(fields))
            model = model.to(self.dtype).train()
            fields = {name: f.to(self.dtype) if f.is_floating_point() else f for name, f in fields.items()}
            exact = {name: f.double() if f.is_floating_point() else f for name, f in fields.items()}
            return Problem(
                model,
                loss_fn,
                batches_of(self.container, fields, self.sizes),
                self._names(model),
                copy.deepcopy(model).double().eval(),
                batches_of(self.container, exact, self.sizes),
            )

    def _change(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        """Bring the parameters into their state."""
        if self.state == "fitted":
            _fit(model.eval(), loss_fn, batch)
        elif self.state == "zero readout":
            layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
            for p in layers[-1].parameters() if layers else ():
                nn.init.zeros_(p)
        elif self.state in {"large", "small"}:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_({"large": 1.7, "small": 0.3}[self.state])

    def _names(self, model: nn.Module) -> list[str]:
        """All trainable parameters, or those of some modules and some single ones, at least twelve numbers."""
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        if self.part is None:
            return list(sizes)
        rng, chosen = random.Random(self.part), set[str]()
        # a part that no output depends on raises an error
        usable = [name for name in sizes if not name.startswith(("idle", "spare")) and ".noise." not in f".{name}"]
        while sum(sizes[name] for name in chosen) < min(12, sum(sizes[name] for name in usable)):
            name = rng.choice(usable)
            prefix = name.rpartition(".")[0]
            whole = [other for other in usable if prefix and other.startswith(f"{prefix}.")]
            chosen |= set(whole if whole and rng.random() < 0.5 else [name])
        return [name for name in sizes if name in chosen]


def _options(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_eigenvalues": rng.randint(1, 6),
        "density": rng.random() < 0.45,
        "tolerance": rng.choice([1e-3, 1e-2]),
        "seed": rng.randrange(1000),
    }
    rare = (
        ("keep_eigenvectors", True, 0.3),
        ("block_eigenvalues", True, 0.08),
        ("trace_tolerance", 0.02, 0.08),
        ("max_steps", 30, 0.08),
        ("graph_memory", 0, 0.05),
        ("basis_memory", 0, 0.1),
    )
    options.update({name: value for name, value, share in rare if rng.random() < share})
    return options


def _fit(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02, foreach=True)
    for _ in range(150):
        optimizer.zero_grad()
        total_loss(model, loss_fn, [batch], [1]).backward()
        optimizer.step()
    optimizer.zero_grad()
