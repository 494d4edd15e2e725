"""Callback: spectrum, trace and density of the Hessian at the end of fit."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from typing_extensions import Unpack, override

from moe_heads.callbacks.fit_end import FitEndAnalysis
from moe_heads.callbacks.functional import SharpnessResult, sharpness
from moe_heads.callbacks.functional.common.parameters import trainable_parameters
from moe_heads.callbacks.functional.sharpness import check_sharpness_options
from moe_heads.callbacks.inputs import AnalysisInputs
from moe_heads.callbacks.options import AnalysisOptions, OverRanks
from moe_heads.callbacks.reporting import Report
from moe_heads.callbacks.trainer_access import Split

__all__ = ["SharpnessCallback"]


class SharpnessCallback(FitEndAnalysis):
    """Largest Hessian eigenvalues with residuals, trace with standard error, and spectral density, at the end of fit.

    Works on any Trainer without an argument; `functional.sharpness` says what is computed and how. Logged at the end of
    fit, below ``sharpness/<split>/``:

    ========================  ==============================================================================
    lambda_max, lambda_2, …   largest eigenvalues, in units of the loss over squared parameter
    lambda_min                smallest eigenvalue
    residual_max              largest relative residual of the eigenvalues above
    trace, trace_stderr       trace and its standard error
    frobenius_norm            estimate of the Frobenius norm
    num_products              Hessian-vector products that were spent
    num_samples, converged    samples of the draw; 1 when every tolerance was met
    spectrum                  figure: log density with the eigenvalues marked (TensorBoard)
    summary                   table with residuals and standard errors (TensorBoard)
    partial                   1 when max_time, an error or Ctrl-C ended it early; else absent
    ========================  ==============================================================================

    Args:
        num_eigenvalues: Number of largest eigenvalues; as many as there are where the model has fewer parameters.
        tolerance: Largest relative residual of an eigenvalue.
        trace_tolerance: Standard error of the trace over the larger of its size and the Frobenius norm.
        max_steps: Most Lanczos steps.
        max_probes: Most random probes for the trace.
        blocks: Names of parameters by block; by default one block a child of the module.
        options: What all analyses share: splits, num_samples, batch_size, seed, loss_fn, stages, every_n_epochs,
            weights, max_time, on_error, name; see `AnalysisOptions`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from moe_heads.callbacks import SharpnessCallback
        >>> trainer = Trainer(callbacks=[SharpnessCallback(num_samples=500)], logger=False, accelerator="cpu",
        ...                   enable_progress_bar=False, enable_model_summary=False)
    """

    name = "sharpness"
    over_ranks: ClassVar[OverRanks] = "share"
    results: dict[Split, SharpnessResult]

    def __init__(
        self,
        num_eigenvalues: int = 5,
        tolerance: float = 1e-3,
        trace_tolerance: float = 0.05,
        max_steps: int = 200,
        max_probes: int = 100,
        blocks: Mapping[str, Sequence[str]] | None = None,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        check_sharpness_options(num_eigenvalues, tolerance, trace_tolerance, max_steps, max_probes)
        super().__init__(**options)
        self.num_eigenvalues, self.blocks = num_eigenvalues, blocks
        self.tolerance, self.trace_tolerance = tolerance, trace_tolerance
        self.max_steps, self.max_probes = max_steps, max_probes

    @override
    def compute(self, inputs: AnalysisInputs) -> SharpnessResult:
        assert inputs.loss_fn is not None
        num_parameters = sum(p.numel() for p in trainable_parameters(inputs.model).values())
        return sharpness(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            num_eigenvalues=min(self.num_eigenvalues, num_parameters),
            tolerance=self.tolerance,
            trace_tolerance=self.trace_tolerance,
            max_steps=self.max_steps,
            max_probes=self.max_probes,
            blocks=self.blocks,
            keep_eigenvectors=True,
            seed=self.seed,
            monitor=inputs.monitor,
            ranks=inputs.ranks,
        )

    @override
    def report(self, result: SharpnessResult) -> Report:
        return Report(result.metrics(), {"summary": result.summary()}, {"spectrum": result.plot()[0]})
