"""Curvature of the loss along some of the parameters."""

from dataclasses import dataclass

__all__ = ["BlockCurvature"]


@dataclass(frozen=True)
class BlockCurvature:
    r"""Curvature of the loss along some of the parameters, the diagonal block :math:`H_{bb}`.

    Attributes:
        num_parameters: Order of the block.
        shares: Share (0 to 1) of the squared norm of each eigenvector of H that lies in the block.
        trace: Trace of the block; nan when it was not begun.
        trace_stderr: Its standard error.
        lambda_max: Largest eigenvalue of the block; None when not asked for. That of H is at least as large.
        lambda_max_residual: Its relative residual.
    """

    num_parameters: int
    shares: tuple[float, ...]
    trace: float
    trace_stderr: float
    lambda_max: float | None = None
    lambda_max_residual: float | None = None
