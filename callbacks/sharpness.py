"""Callback for eigenvalues, trace and spectral density of the Hessian at the end of fit."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from moe_heads.analysis import SharpnessResult, sharpness
from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.digest import digest_of
from moe_heads.analysis._shared.shards import is_sharded
from moe_heads.analysis.loss_landscape.routing_response import has_sparse_router
from moe_heads.analysis.sharpness.hessian import subspace_overlap
from moe_heads.analysis.sharpness.hessian.both_ends import Which
from moe_heads.analysis.sharpness.hessian.output_loss import OutputLossFn, OutputsFn
from moe_heads.analysis.sharpness.hessian.parameters import selected_parameters
from moe_heads.analysis.sharpness.hessian.products import Matrix
from moe_heads.analysis.sharpness.model_outputs import output_loss_of
from moe_heads.analysis.sharpness.options import check_sharpness_options
from moe_heads.analysis.sharpness.pyhessian import pyhessian_sharpness
from moe_heads.analysis.sharpness.result import Engine
from moe_heads.callbacks._intermittent_checks import IntermittentChecks
from moe_heads.callbacks._preconditioned import PreconditionedAnalysis
from moe_heads.callbacks._shared.evaluation import loss_of
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions, OverRanks
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._sharpness_options import (
    check_are_in,
    check_differentiable,
    check_engine,
    check_memory,
    check_params,
)
from moe_heads.callbacks._sharpness_points import expected_gradients, report_of_steps
from moe_heads.callbacks._stability import stability_threshold
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.checks import check_at_least, check_flags

__all__ = ["SharpnessCallback"]

# Rounds of probes for the trace of ``every_n_epochs``, whatever standard error they reach.
_TRACKING_PROBES = 16


class SharpnessCallback(FitEndAnalysis):
    r"""Largest Hessian eigenvalues with residuals, trace with standard error, and spectral density, at the end of fit.

    Works with any Trainer without an argument. `moe_heads.analysis.sharpness` documents the quantities and methods.
    Logged at the end of fit, below ``sharpness/<split>/``:

    =============================  =================================================================================
    lambda_max, lambda_2, …        largest eigenvalues, in units of the loss over squared parameter
    lambda_min                     smallest eigenvalue, if its relative residual is at most 10 %
    residual_max                   largest relative residual of the largest eigenvalues
    trace, trace_stderr            trace and its standard error
    frobenius_norm                 estimate of the Frobenius norm
    trace_<block>, …               trace of the block of parameters (backbone, router, experts, …), and
                                   trace_stderr_<block>
    share_<block>                  fraction of the first eigenvector's squared norm in the block
    lambda_max_<block>             largest eigenvalue of the block (``block_eigenvalues``)
    overlap_<split>                overlap of the top eigenvectors with those of a split analyzed earlier
    stability_threshold            :math:`2/\eta`, above which the steps of SGD are unstable (split "train")
    preconditioned_lambda_max, …   largest eigenvalue in the metric of Adam, AdamW or RMSprop, its residual and
                                   ``preconditioned_threshold`` (``preconditioned``)
    routing_flips_<s>, …           fraction of samples routed to different experts at the step s along the first
                                   eigenvector; losses and curvatures with free and fixed routing (sparse heads)
    perturbation_average, …        increase of the loss under adaptive perturbations (``perturbation``)
    center_loss                    mean loss over the samples
    lambda_max_sampling_stderr,    standard errors from the choice of samples, estimated from the spread over batches
    trace_sampling_stderr
    rounding, trace_rounding       change of the eigenvalues and of the trace by rounding, measured in float64
    asymmetry                      antisymmetric part of the products over their norm
    derivative_error,              relative difference of the gradient from a finite difference of the loss, and of a
    curvature_error                product from one of the gradient
    step_error                     relative difference of products with two steps (sharded models)
    cut_dependence                 relative change of the loss when batches are halved
    num_products                   number of Hessian-vector products
    num_samples, converged         number of samples; 1 if every tolerance was met, with eigenvalues_converged and
                                   trace_converged
    spectrum                       figure: log density with its error and the eigenvalues marked (TensorBoard)
    blocks                         figure: traces by block and expert, shares of the eigenvectors (TensorBoard)
    tracking                       figure: lambda_max over the epochs with the threshold (``every_n_epochs``)
    summary                        tables with residuals and standard errors (TensorBoard)
    partial                        1 if max_time, an error or Ctrl-C ended the analysis early; else absent
    =============================  =================================================================================

    ``converged`` is a certificate, see docs/certificate.md. With ``every_n_epochs`` and ``every_n_train_steps``, each
    analysis starts from the eigenvectors of the previous one, skips the density, and uses at most 16 rounds of probes
    for the trace. At the end of a training with ``every_n_train_steps`` or ``max_overhead``, the cost of the points is
    logged below ``sharpness/step/``: ``products_mean``, ``products_min``, ``products_max``, the same of ``seconds``,
    and ``overhead``, the seconds of all points over those of the training without them. The figure ``tracking`` shows
    lambda_max against the threshold, and the loss.

    Args:
        num_eigenvalues: Number of eigenvalues, limited to the number of parameters.
        which: "largest" for the algebraically largest eigenvalues, or "magnitude" for those of largest magnitude. The
            second are logged as lambda_magnitude_1, lambda_magnitude_2, … in place of lambda_2, …
        tolerance: Largest relative residual of an eigenvalue.
        trace_tolerance: Standard error of the trace, relative to the larger of its absolute value and the Frobenius
            norm.
        max_steps: Maximum number of Lanczos steps.
        max_probes: Maximum number of rounds of random probes. A single batch needs 16 before its standard error is
            trusted.
        density: Whether to compute the spectral density. Without it, a trained network takes a third of the products.
        params: Names of parameters or modules to restrict the Hessian to, such as ``["head"]``; by default all that
            require a gradient. The layers before them are computed once.
        blocks: Names of parameters or modules by block; by default backbone, router and experts of a model with a
            router of this package, else one block for each child of the module.
        block_eigenvalues: Whether to compute the largest eigenvalue of each block; about twenty products each.
        routing_steps: Lengths of the steps along the first eigenvector at which routing is compared, in both
            directions, for models with a sparse router. 0.5 is the range of the slice in arXiv 2601.15021. Empty for
            none.
        perturbation: Whether to compute the adaptive and SAM-type sharpness of
            `moe_heads.analysis.perturbation_sharpness`, which are invariant to rescaled layers. About forty gradients.
        preconditioned: Whether to compute the largest eigenvalue in the metric of the optimizer, Adam, AdamW or
            RMSprop, which decides whether its steps are stable; see `moe_heads.analysis.preconditioned_sharpness`.
        graph_memory: Bytes that may be kept between products. The default is 4 GiB on a CPU, limited to half of the
            free memory, and half of the free memory on a GPU. 0 rebuilds the graph in every product.
        basis_memory: Bytes for the vectors of the Krylov space. The default is 2.5 GiB on a CPU and a quarter of the
            free memory on a GPU, or the size of ``num_eigenvalues`` + 3 vectors if that is more. Kept eigenvectors take
            another ``num_eigenvalues`` vectors.
        matrix: "hessian", the default, or "gauss_newton" for the Gauss-Newton matrix. The keys then begin with
            ``gauss_newton/<split>/``, unless ``name`` is given, so that both matrices can be analyzed in one run. No
            stability threshold is logged.
        outputs_fn: ``outputs_fn(pl_module, batch) -> outputs`` for the Gauss-Newton matrix. By default the module's
            ``analysis_outputs(batch)``, or the logits of a Hugging Face model.
        output_loss: ``output_loss(outputs, batch) -> scalar``, the loss of these outputs. By default the module's
            ``analysis_output_loss(outputs, batch)``, or the loss function of a Hugging Face model.
        engine: "lanczos", the default, or "pyhessian" for the procedure of arXiv 2601.15021: PyHessian with its own
            settings, with its failures caught and reported. It computes eigenvalues and the trace. Its density calls a
            function that torch has removed.
        trace: Whether to compute the trace and the traces of the blocks. Without it no random probe is spent, and
            ``converged`` covers the eigenvalues alone.
        check_every_n_points: Number of points of ``every_n_train_steps`` or ``max_overhead`` from one comparison with
            float64 and with finite differences to the next. On few samples it costs as much as ten products. The
            certificate of the points between states where the last one was made. The first point and the end of fit
            have it.
        options: Options of all analyses: splits, num_samples, batch_size, seed, loss_fn, stages, every_n_epochs,
            weights, max_time, on_error, name; see `AnalysisOptions`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from moe_heads.callbacks import SharpnessCallback
        >>> trainer = Trainer(callbacks=[SharpnessCallback(num_samples=500)], logger=False, accelerator="cpu",
        ...                   enable_progress_bar=False, enable_model_summary=False)
    """

    name = "sharpness"
    over_ranks: OverRanks = "share"
    default_batch_size: ClassVar[int] = 50
    results: dict[Split, SharpnessResult]

    def __init__(
        self,
        num_eigenvalues: int = 5,
        tolerance: float = 1e-3,
        trace_tolerance: float = 0.05,
        max_steps: int = 200,
        max_probes: int = 100,
        density: bool = True,
        params: Sequence[str] | None = None,
        blocks: Mapping[str, Sequence[str]] | None = None,
        block_eigenvalues: bool = False,
        routing_steps: Sequence[float] = (0.01, 0.1, 0.5),
        perturbation: bool = False,
        preconditioned: bool = False,
        graph_memory: int | None = None,
        basis_memory: int | None = None,
        which: Which = "largest",
        matrix: Matrix = "hessian",
        outputs_fn: OutputsFn | None = None,
        output_loss: OutputLossFn | None = None,
        engine: Engine = "lanczos",
        trace: bool = True,
        check_every_n_points: int = 10,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        own: dict[str, Any] = {
            "num_eigenvalues": num_eigenvalues,
            "which": which,
            "tolerance": tolerance,
            "trace_tolerance": trace_tolerance,
            "max_steps": max_steps,
            "max_probes": max_probes,
            "density": density,
            "blocks": blocks,
            "block_eigenvalues": block_eigenvalues,
            "routing_steps": routing_steps,
            "perturbation": perturbation,
            "graph_memory": graph_memory,
            "basis_memory": basis_memory,
            "matrix": matrix,
            "outputs_fn": outputs_fn,
            "output_loss": output_loss,
            "trace": trace,
        }
        check_sharpness_options(**own)
        check_flags(preconditioned=preconditioned)
        check_at_least(1, check_every_n_points=check_every_n_points)
        own["check_every_n_points"] = check_every_n_points
        own["preconditioned"] = preconditioned
        check_params(params)
        if preconditioned and matrix == "gauss_newton":
            raise ValueError(
                "preconditioned: expected False with matrix='gauss_newton', got True: the threshold of an optimizer is"
                " one of the Hessian. Add a callback with matrix='hessian' for it."
            )
        check_engine(engine, own, inspect.signature(SharpnessCallback).parameters)
        super().__init__(**options)
        if matrix == "gauss_newton" and options.get("name") is None:
            self.name = matrix
        self.matrix, self.outputs_fn, self.output_loss = matrix, outputs_fn, output_loss
        self.graph_memory, self.basis_memory = graph_memory, basis_memory
        self.num_eigenvalues, self.which, self.density, self.trace = num_eigenvalues, which, density, trace
        self.params, self.blocks, self.block_eigenvalues = params, blocks, block_eigenvalues
        self.tolerance, self.trace_tolerance = tolerance, trace_tolerance
        self.max_steps, self.max_probes = max_steps, max_probes
        self.routing_steps, self.perturbation, self.engine = tuple(routing_steps), perturbation, engine
        if engine == "pyhessian":
            self.over_ranks = "rank_zero"
        analysis = PreconditionedAnalysis(type(self).__name__, tolerance, max_steps, self.seed)
        self._preconditioned = analysis if preconditioned else None
        self._threshold: float | None = None
        self._threshold_before: float | None = None
        self._starts: dict[Split, Tensor] = {}
        self._weights: dict[Split, bytes] = {}
        self._checks = IntermittentChecks(check_every_n_points)

    @override
    def before_step(self, context: ExecutionContext, optimizer: Optimizer) -> None:
        # the threshold of this step: at the end of an epoch, a scheduler has already changed the learning rate
        self._threshold = stability_threshold(context.optimizers)
        if self._preconditioned is not None:
            self._preconditioned.before_step(context.optimizers)

    @override
    def check_model(self, context: ExecutionContext, model: nn.Module) -> None:
        # not earlier: the setup() and configure_model() of a LightningModule may build layers
        check_are_in(model, self.params, self.blocks)
        if self._preconditioned is not None and self.runs_in_fit:
            self._preconditioned.begin(context.optimizers)
        if self.matrix == "gauss_newton" and self.runs_in_fit and not is_sharded(model):
            loss_fn = self.loss_fn or context.loss_fn or loss_of(model, None)
            output_loss_of(model, loss_fn, self.outputs_fn, self.output_loss)
        if self.basis_memory is not None or (self.runs_in_fit and self.engine == "lanczos"):
            check_memory(type(self).__name__, model, self.params, self.basis_memory, self.num_eigenvalues)
        if self.runs_in_fit:  # the Trainer has already converted the parameters to its precision
            check_differentiable(type(self).__name__, model, self.params)

    @override
    def begin_fit(self, context: ExecutionContext, model: nn.Module) -> None:
        super().begin_fit(context, model)
        # a fit that is resumed from a checkpoint may take no further step
        self._threshold, self._threshold_before = self._threshold_before, None
        self._starts, self._weights = {}, {}
        self._checks.forget()

    @override
    def close(self) -> None:
        self._threshold_before = None
        super().close()

    @override
    def kept_in_checkpoints(self) -> dict[str, Any]:
        own = {} if self._threshold is None else {"stability_threshold": self._threshold}
        return super().kept_in_checkpoints() | own

    @override
    def restore(self, kept: dict[str, Any]) -> None:
        super().restore(kept)
        self._threshold_before = kept.get("stability_threshold")

    @override
    def is_enough(self, result: SharpnessResult) -> bool:
        if self.is_tracking:
            return self.is_step_point or not self._checks.are_left_out_of(result)
        return (result.density is not None or not self.density) and not self._checks.are_left_out_of(result)

    @override
    def compute(self, inputs: AnalysisInputs) -> SharpnessResult:
        weights = digest_of(inputs.model.parameters())
        result = self._with_context(inputs, self._sharpness(inputs), weights)
        if self._preconditioned is not None:
            names = selected_parameters(inputs.model, self.params)
            found = self._preconditioned.compute(inputs, names, is_tracking=self.is_tracking)
            result = replace(result, preconditioned=found)
        self._weights[inputs.split] = weights
        self._checks.note(inputs.split, inputs.context.step, result)
        if result.eigenvectors is not None:
            self._starts[inputs.split] = result.eigenvectors.sum(0)
        return result

    @override
    def report(self, result: SharpnessResult) -> Report:
        if self.is_step_point:  # drawing takes longer than the products of a small model
            return Report(result.metrics(), {"summary": result.summary()})
        figures = {"spectrum": result.plot()[0], "blocks": result.plot_blocks(), "tracking": result.plot_history()}
        there = {name: figure for name, figure in figures.items() if figure is not None}
        return Report(result.metrics(), {"summary": result.summary()}, there)

    def _sharpness(self, inputs: AnalysisInputs) -> SharpnessResult:
        selected = selected_parameters(inputs.model, self.params, allows_shards=True)
        num_parameters = sum(p.numel() for p in selected.values())
        shared: dict[str, Any] = {
            "params": self.params,
            "num_eigenvalues": min(self.num_eigenvalues, num_parameters),
            "density": self.density and not self.is_tracking,
            "seed": self.seed,
            "progress": inputs.progress,
        }
        if self.engine == "pyhessian":
            return pyhessian_sharpness(inputs.model, inputs.loss_fn, inputs.batches, **shared)
        start = self._starts.get(inputs.split) if self.is_tracking else None
        return sharpness(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            which=self.which,
            matrix=self.matrix,
            outputs_fn=self.outputs_fn,
            output_loss=self.output_loss,
            tolerance=self.tolerance,
            trace_tolerance=self.trace_tolerance,
            max_steps=self.max_steps,
            max_probes=min(self.max_probes, _TRACKING_PROBES) if self.is_tracking else self.max_probes,
            blocks=self.blocks,
            block_eigenvalues=self.block_eigenvalues,
            keep_eigenvectors=True,
            routing_steps=() if self._skips_routing(inputs) else self.routing_steps,
            perturbation=self.perturbation and not self.is_tracking,
            trace=self.trace and not (self.is_step_point and self.num_reductions),
            skip_double_check=self._checks.reason(inputs.split) if self.is_step_point else "",
            graph_memory=self.graph_memory,
            basis_memory=self.basis_memory,
            start=start if start is not None and len(start) == num_parameters else None,
            ranks=inputs.ranks,
            **shared,
        )

    @override
    def end_training(self, context: ExecutionContext) -> None:
        super().end_training(context)
        if not self.tracked_steps:
            return
        found = report_of_steps(
            self.tracked_steps,
            self.costs.seconds,
            self.overhead(context),
            every=self.every_n_train_steps,
            max_overhead=self.max_overhead,
        )
        context.log(f"{self.name}/step", found)

    @override
    def steps_of_a_point(self, batch: Batch) -> float:
        num_probes = _TRACKING_PROBES if self.trace else 0
        return expected_gradients(self.num_eigenvalues, num_probes) * self.batches_of_a_point(batch)

    @override
    def described_point(self, level: int) -> str:
        return super().described_point(level) + (", without the trace" if self.trace else "")

    @override
    def unsupported_if_sharded(self) -> str:
        if self.engine == "pyhessian":
            return "engine='pyhessian' differentiates with torch.autograd.grad, which knows no sharded parameters"
        if self._preconditioned is not None:
            return "preconditioned=True needs whole parameters. Pass preconditioned=False"
        if self.matrix == "gauss_newton":
            return "the Gauss-Newton matrix needs whole parameters"
        if self.perturbation and self.params is None:
            return "perturbation=True needs whole parameters. Pass perturbation=False"
        return ""

    def _skips_routing(self, inputs: AnalysisInputs) -> bool:
        """Return whether the routing along the first eigenvector is not compared, with a warning."""
        if self.params is not None or not is_sharded(inputs.model):
            return False
        if self.routing_steps and has_sparse_router(inputs.model):
            inputs.progress.warn(
                "routing_steps: the routing along the first eigenvector is not compared, because the model is sharded."
                " Pass routing_steps=()."
            )
        return True

    def _with_context(self, inputs: AnalysisInputs, result: SharpnessResult, weights: bytes) -> SharpnessResult:
        """Add overlaps with other splits, the stability threshold and earlier epochs, which need no further product."""
        overlaps: dict[str, float] = {
            split: subspace_overlap(other.eigenvectors, result.eigenvectors)
            for split, other in self.results.items()
            if split != inputs.split
            and self._weights.get(split) == weights
            and other.eigenvectors is not None
            and result.eigenvectors is not None
            and other.eigenvectors.shape == result.eigenvectors.shape
        }
        is_trained_on = inputs.context.is_training_run and inputs.split == "train"
        threshold = self._threshold if is_trained_on and self.matrix == "hessian" else None
        tracked = {} if self.is_tracking else self.tracked.get(inputs.split, {})
        history = {
            epoch: (metrics["lambda_max"], metrics.get("stability_threshold"))
            for epoch, metrics in tracked.items()
            if "lambda_max" in metrics
        }
        return replace(result, overlaps=overlaps, stability_threshold=threshold, history=history)
