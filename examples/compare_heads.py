"""Train classifier heads of equal capacity, analyze them, and report: the study of arXiv 2601.15021 in one command.

    python examples/compare_heads.py                                       # digits, minutes on two cores
    python examples/compare_heads.py --preset cpu                          # CIFAR-10 on two cores, some hours
    python examples/compare_heads.py --preset paper --accelerator gpu      # the protocol of the paper
    python examples/compare_heads.py --data imagefolder:PATH --backbone resnet8 --epochs 10

Each run writes `<out>/<head>/seed<k>/`. The study writes `report.md`, `report.html` and `results.json` to `<out>`. An
interruption loses at most one epoch or analysis, and `--resume` continues. Several processes, one for each device, may
work on one folder.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from study import analyses, report, results, run
from study.build import build_data, build_model, check_accelerator, describe_data
from study.options import Options, parse
from study.storage import claimed, locked
from study.tables import main_table
from study.training import TimeIsUp

from moe_heads.lightning_modules import ImageDataModule

_FAILED, _INVALID, _UNFINISHED, _INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study.

    Returns:
        0 if every run is finished, 1 if one failed, 2 for invalid options, 3 if time was up or other processes have
        unfinished runs, 130 after Ctrl-C.
    """
    started = time.monotonic()
    _quiet_lightning()
    try:
        options = parse(arguments)
        results.check_new(options)
        results.finished(options.out, options.config())  # raises errors of the folder before the images are read
        data = build_data(options)
        description = describe_data(options, data)
        config = options.config() | {"data_sha256": description["sha256"]}
        results.finished(options.out, config)
        check_accelerator(options)
        for head in options.heads:
            build_model(options, head, data)  # raises errors of any head before the first one trains
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        return _report_error(error, _INVALID)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    deadline = started + 60 * (options.max_minutes or float("inf"))
    try:
        with locked(options.out):
            report.write_columns(options)
        status = _run_all(options, data, config, deadline)
        with locked(options.out):
            _finish(options, description, config, time.monotonic() - started)
    except (ValueError, OSError) as error:
        return _report_error(error, _FAILED)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into the latter
        print("compare_heads.py: interrupted. Finished parts are kept. Continue with --resume.", file=sys.stderr)
        return _INTERRUPTED
    return status


def _run_all(options: Options, data: ImageDataModule, config: dict[str, Any], deadline: float) -> int:
    """Run all unfinished heads seed by seed, so that finished heads can be compared at any time.

    A failed run, for example one that diverged, does not stop the others.

    Returns:
        Exit status.
    """
    runs = [(head, seed) for seed in range(options.seeds) for head in options.heads]
    status, has_begun = 0, False
    for number, (head, seed) in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {head}, seed {seed}"
        folder = options.run_dir(head, seed)
        with claimed(folder) as is_claimed:
            if not is_claimed:
                print(f"{label}: another process is working on it", flush=True)
                status = status or _UNFINISHED
                continue
            if (folder / "result.json").exists():
                print(f"{label}: already finished", flush=True)
                analyses.remove_saved(folder)  # the earlier process may have ended just before this step
                continue
            if has_begun and time.monotonic() > deadline:
                return status or _time_is_up(label, "not started")
            print(f"{label}: training and analyzing ...", flush=True)
            has_begun = True
            results.check_begun(folder, config)
            results.begin(folder, config)
            try:
                result = run.run(options, head, seed, data, config, deadline, show_progress=sys.stderr.isatty())
            except TimeIsUp as reached:
                return status or _time_is_up(label, str(reached))
            except (RuntimeError, ValueError) as error:
                status = _report_error(error, _FAILED, f"{label}: ")
                continue
        print(f"{label}: {_headline(result)}", flush=True)
    return status


def _finish(options: Options, data: dict[str, Any], config: dict[str, Any], seconds: float) -> None:
    """Write the report on all runs in the folder, including those of other processes."""
    runs = [*results.finished(options.out, config).values()]
    if runs:
        path = report.write(options, data, runs)
        count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
        print(f"\n{main_table(runs)}\n\n{count} finished. This process took {seconds:.0f} s. Report: {path}")
        print(f"Browse the results: tensorboard --logdir {options.out}")


def _headline(result: results.Run) -> str:
    metrics = result["metrics"]
    sharpness = metrics.get("sharpness/train/lambda_max", float("nan"))
    times = f"{result['training_seconds']:.0f} s of training, {result['analysis_seconds']:.0f} s of analyses"
    return f"test accuracy {metrics['plain/test/accuracy']:.2%}, λmax on training data {sharpness:.3g}, {times}"


def _time_is_up(label: str, reached: str) -> int:
    print(f"compare_heads.py: time is up ({label}: {reached}). Continue with --resume.", file=sys.stderr)
    return _UNFINISHED


def _report_error(error: Exception, status: int, label: str = "") -> int:
    print(f"compare_heads.py: error: {label}{error}", file=sys.stderr)
    return status


def _quiet_lightning() -> None:
    """Silence Lightning's advice on hardware and worker processes, which this script chooses itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # analyses finished by an earlier process are not among the callbacks
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")


if __name__ == "__main__":
    sys.exit(main())
