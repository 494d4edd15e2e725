# %% [markdown]
# # Edge of stability of three optimizers
#
# A full-batch optimizer with learning rate η follows the loss only while the largest Hessian eigenvalue λmax stays
# below a threshold: 2/η for gradient descent. On many networks λmax rises during training until it reaches this
# threshold, and then hovers there ([Cohen et al. 2021](https://arxiv.org/abs/2103.00065)). For Adam, the eigenvalue
# of the preconditioned Hessian does the same at 38/η ([Cohen et al. 2022](https://arxiv.org/abs/2207.14484)).
#
# This notebook trains one small network with SGD, SGD with momentum, and Adam, and follows λmax and the critical
# sharpness λc over the steps. λc = 2/ηc, where ηc is the smallest learning rate at which the step would have raised
# the loss ([2601.16979](https://arxiv.org/abs/2601.16979)). It takes about a minute on one core.

# %%
# %matplotlib inline
import statistics
from collections.abc import Callable, Iterable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from moe_heads.analysis.critical_sharpness.figures import Series, plot_steps
from moe_heads.callbacks import CriticalSharpnessCallback, SharpnessCallback, TrainingMonitor

torch.set_num_threads(1)  # the network is too small for more

# %% [markdown]
# ## A training with both callbacks
#
# The callbacks attach to a Lightning `Trainer`, or to a loop of your own by a `TrainingMonitor`, as here. Every 25
# steps the sharpness callback computes λmax (one eigenvalue, neither trace nor density), starting from the previous
# eigenvector. `preconditioned=True` adds the eigenvalue in the metric of Adam.

# %%
DATA = torch.Generator().manual_seed(0)
BATCH = (torch.randn(256, 8, generator=DATA), torch.randn(256, generator=DATA))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error of a batch."""
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs)[:, 0], targets)


def train(optimizer_of: Callable[[Iterable[Tensor]], Optimizer], steps: int) -> tuple[Series, Series]:
    """Train with the full batch, and return the sharpness and the critical sharpness by step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = optimizer_of(model.parameters())
    sharpness = SharpnessCallback(
        every_n_train_steps=25,
        num_eigenvalues=1,
        trace=False,
        density=False,
        preconditioned=isinstance(optimizer, Adam),
        splits=("train",),
    )
    critical = CriticalSharpnessCallback(every_n_train_steps=25)
    monitor = TrainingMonitor([sharpness, critical], loss_fn=loss_fn)
    monitor.start(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, BATCH).backward()
        optimizer.step()
        monitor.step(model, BATCH)
    return sharpness.tracked_steps["train"], critical.tracked_steps["train"]


# %% [markdown]
# ## Gradient descent
#
# λmax rises until it reaches 2/η at about step 1000, and stays there. λc is a mean of the eigenvalues with the
# squared components of the gradient as weights. Before the edge it is a hundred times smaller. At the edge, the steps
# begin to oscillate along the first eigenvector, and soon λc hovers at the same threshold: every step nearly raises
# the loss.


# %%
def at_the_edge(points: Series, value: str, threshold: str, steps: int) -> str:
    """Return the median of a value over its threshold, in the last quarter of the training."""
    late = [point for step, point in points.items() if step > 3 * steps / 4 and value in point]
    ratios = [point[value] / point[threshold] for point in late]
    return f"{value} / {threshold}, median of the last {len(ratios)} points: {statistics.median(ratios):.3f}"


def follow(optimizer_of: Callable[[Iterable[Tensor]], Optimizer], steps: int) -> Figure:
    """Train, print how far the training is from its threshold, and draw it."""
    sharpness, critical = train(optimizer_of, steps)
    pairs = ("lambda_max", "stability_threshold"), ("preconditioned_lambda_max", "preconditioned_threshold")
    for value, threshold in pairs:
        if any(threshold in point for point in sharpness.values()):
            print(at_the_edge(sharpness, value, threshold, steps))
    print(at_the_edge(critical, "lambda_c", "threshold", steps))
    return plot_steps(sharpness, critical)


follow(lambda params: SGD(params, lr=0.05), steps=1600)

# %% [markdown]
# ## Momentum
#
# Momentum β raises the threshold of λmax to 2(1 + β)/η. The update is a mean of many gradients, in which oscillations
# cancel. So λc, which describes a single step, stays far below its own threshold 2/η, except at the steps where the
# loss jumps.

# %%
follow(lambda params: SGD(params, lr=0.06, momentum=0.5), steps=1000)

# %% [markdown]
# ## Adam
#
# Adam divides by the square root of its second moments, so the Hessian itself has no threshold. With D = √v̂ + ε, the
# largest eigenvalue of D^(-1/2) H D^(-1/2) has one: 2(1 + β₁)/((1 − β₁)η), which is 38/η for β₁ = 0.9. It is reached
# after 75 steps.

# %%
follow(lambda params: Adam(params, lr=0.005), steps=600)

# %% [markdown]
# ## Below the edge
#
# With a learning rate ten times smaller, 300 steps are not enough to reach the threshold. Such a training follows the
# gradient flow, and its sharpness depends on the network and the data, and no longer on the learning rate.

# %%
follow(lambda params: SGD(params, lr=0.005), steps=300)
