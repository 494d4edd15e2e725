"""One run of the study: train, test, analyze, store; carried on where an earlier piece ended."""

import json
import math
from typing import Any, get_args

import torch
from lightning import pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from moe_heads import capacity
from moe_heads.lightning_modules import ImageDataModule, MoEClassifier, RandomStates
from moe_heads.lightning_modules.data import Split
from study.analyses import Keeper, analyses_of, folder_of, forget, found_in
from study.build import build_model, device_of, precision_of
from study.machine import describe_machine
from study.options import Options
from study.storage import replace
from study.training import LAST, Deadline, TimeIsUp, TrainingClock, checkpoints, read_weights


def run(
    options: Options,
    head: str,
    seed: int,
    data: ImageDataModule,
    config: dict[str, Any],
    deadline: float,
    show_progress: bool,
) -> dict[str, Any]:
    """Train and analyze one head with one seed; events, checkpoint and ``result.json`` go into the run's folder.

    Args:
        options: Of the study.
        head: Name of the head.
        seed: Of weights, order and augmentation.
        data: Data module with its images loaded.
        config: What the result says that it was made with.
        deadline: `time.monotonic` after which nothing new is begun.
        show_progress: Show bars.

    Returns:
        What is stored in ``result.json``.

    Raises:
        TimeIsUp: When the deadline is over before the run is; what is done is kept.
        RuntimeError: If an analysis could not be finished, or a file of an earlier piece is damaged.
    """
    folder = options.run_dir(head, seed)
    pl.seed_everything(seed, verbose=False)
    model = build_model(options, head, data)
    last = folder / "checkpoints" / LAST
    machine = describe_machine(device_of(options), precision_of(options))
    kept = folder_of(folder, machine)
    before = found_in(kept, read_weights(last)) if last.exists() else {}
    logger = TensorBoardLogger(options.out, name=head, version=folder.name, default_hp_metric=False)
    logger.log_hyperparams({"seed": seed, "data": options.data.partition(":")[0]})
    clock, gate = TrainingClock(), Deadline(deadline)
    figures = folder if seed == 0 else None
    analyses = analyses_of(options, kept)
    keepers = [Keeper(analysis, gate, kept, figures) for analysis in analyses if analysis.name not in before]
    analyzing = [callback for keeper in keepers for callback in (keeper.analysis, keeper)]
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        precision=precision_of(options),
        logger=logger,
        callbacks=[gate, *analyzing, clock, RandomStates(), checkpoints(last.parent)],
        enable_progress_bar=show_progress,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)
    except TimeIsUp:
        # more time would not help a piece whose analysis fails: it is told, not tried again and again
        if not any(keeper.has_failed for keeper in keepers):
            raise
    found = found_in(kept, model.state_dict())
    if missing := [analysis.name for analysis in analyses if analysis.name not in found]:
        raise RuntimeError(f"{folder}: not finished, for want of {', '.join(missing)}; start again with --resume")
    metrics = {name: value for analysis in found.values() for name, value in analysis["metrics"].items()}
    metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    model.to(trainer.strategy.root_device)  # the Trainer has taken it back to the CPU
    for split in get_args(Split):
        metrics |= _evaluated(model, data, split)
    logger.finalize("success")
    size = capacity(model.head)
    result = {
        "head": head,
        "seed": seed,
        "config": config,
        "capacity": {"total": size.total, "active": size.active, "backbone": _num_parameters(model.backbone)},
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "lines": {split: line for analysis in found.values() for split, line in analysis["lines"].items()},
        "loads": {split: load for analysis in found.values() for split, load in analysis["loads"].items()},
        "training_seconds": clock.seconds,
        "analysis_seconds": sum(analysis["seconds"] for analysis in found.values()),
        "machine": machine,
    }
    # written last: a run without it is not finished
    replace(folder / "result.json", json.dumps(result, indent=1))
    forget(folder)
    return result


@torch.no_grad()
def _evaluated(model: MoEClassifier, data: ImageDataModule, split: Split) -> dict[str, float]:
    """Loss and accuracy on a whole split as it is, in fp32: what a gap between splits is made of."""
    model.eval()
    losses, hits, count = 0.0, 0, 0
    for images, labels in DataLoader(data.analysis_dataset(split), batch_size=500):
        logits = model(images.to(model.device)).float()
        labels = labels.to(model.device)
        losses += float(F.cross_entropy(logits, labels, reduction="sum"))
        hits += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {f"plain/{split}/loss": losses / count, f"plain/{split}/accuracy": hits / count}


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
