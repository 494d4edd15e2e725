"""Analyses that follow one training together."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from moe_heads.analysis._shared.batches import Batch
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.loop_context import LoopContext
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis

__all__ = ["AnalysisGroup"]


class AnalysisGroup:
    """Analyses that follow one training together: each event goes to all of them, in their order.

    Args:
        analyses: The callbacks of this package, or one of them.
        best: End of the message for ``weights="best"``, which only a Lightning Trainer offers.

    Attributes:
        analyses: The analyses.

    Raises:
        ValueError: If there is no analysis, one is not of this package, two have the same name, or one asks for the
            best weights.
    """

    def __init__(self, analyses: Sequence[TrainingAnalysis] | TrainingAnalysis, best: str) -> None:
        self.analyses = _checked(analyses, best)

    def begin(self, context: LoopContext, model: nn.Module, kept: Mapping[str, Any] | None = None) -> None:
        """Begin a training, before its first batch.

        Args:
            context: Context of the training.
            model: The model.
            kept: State that `state_dict` returned in an earlier training that this one continues.

        Raises:
            ValueError: If an option of an analysis does not fit the model.
            MisconfigurationException: If an analysis needs a loss and there is none.
        """
        try:
            self._begin(context, model, kept)
        except BaseException:
            self.close()
            raise

    def _begin(self, context: LoopContext, model: nn.Module, kept: Mapping[str, Any] | None) -> None:
        for analysis in self.analyses:
            analysis.is_left_out = False  # of an earlier training
            analysis.check_early(model)
            analysis.check_loss(context, model)
            analysis.begin_run(context, model)
        if kept:
            context.step, context.epoch = kept["step"], kept["epoch"]
            for analysis in self.analyses:
                if of_analysis := kept["analyses"].get(analysis.name):
                    analysis.restore(of_analysis)
        for analysis in self.analyses:
            analysis.begin_fit(context, model)
        for analysis in self.analyses:
            analysis.begin_training(context)

    def begin_batch(self, context: ExecutionContext) -> None:
        """Begin a training batch that is not known yet."""
        for analysis in self.analyses:
            analysis.begin_batch(context, None)

    def before_step(self, context: ExecutionContext, optimizer: Optimizer) -> None:
        """Note the gradients and the learning rate of an optimizer step."""
        for analysis in self.analyses:
            analysis.before_step(context, optimizer)

    def end_batch(self, context: ExecutionContext, model: nn.Module, batch: Batch) -> None:
        """End a training batch, after its optimizer step if it has one."""
        for analysis in self.analyses:
            analysis.end_batch(context, model, batch)

    def end_epoch(self, context: LoopContext, model: nn.Module) -> None:
        """End a training epoch, and count it."""
        for analysis in self.analyses:
            analysis.end_epoch(context, model)
        context.epoch += 1

    def end(self, context: ExecutionContext, model: nn.Module) -> dict[str, dict[Split, Any]]:
        """End the training, analyze the trained model, and return the results by name and split."""
        for analysis in self.analyses:
            analysis.end_training(context)
        for analysis in self.analyses:
            if analysis.stages is None or "fit" in analysis.stages:
                analysis.end_fit(context, model)
        return {analysis.name: analysis.results for analysis in self.analyses}

    def close(self) -> None:
        """Remove all hooks, also after an error of the loop."""
        for analysis in self.analyses:
            analysis.close()

    def state_dict(self, context: ExecutionContext) -> dict[str, Any]:
        """Return the state that a resumed training needs, as tensors and plain data."""
        kept = {analysis.name: analysis.kept_in_checkpoints() for analysis in self.analyses}
        return {"step": context.step, "epoch": context.epoch, "analyses": kept}


def _checked(analyses: Sequence[TrainingAnalysis] | TrainingAnalysis, best: str) -> tuple[TrainingAnalysis, ...]:
    listed = tuple(analyses) if isinstance(analyses, (list, tuple)) else (analyses,)
    wrong = [type(each).__name__ for each in listed if not isinstance(each, TrainingAnalysis)]
    if wrong or not listed:
        got = wrong[0] if wrong else "none"
        raise ValueError(f"analyses: expected callbacks such as SharpnessCallback(), got {got}.")
    found: list[TrainingAnalysis] = [each for each in listed if isinstance(each, TrainingAnalysis)]
    names = [each.name for each in found]
    for each in found:
        if names.count(each.name) > 1:
            raise ValueError(
                f"analyses: expected one analysis for each name, got two with the name {each.name!r}. Give one of them"
                f" another name: {type(each).__name__}(..., name='{each.name}_2')."
            )
        if each.weights == "best":
            raise ValueError(f"{type(each).__name__}(weights='best'): expected weights='last' {best}")
    return tuple(found)
