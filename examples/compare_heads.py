"""Train classifier heads of equal capacity, analyse them, and report: the study of arXiv 2601.15021 in one command.

    python examples/compare_heads.py                                      # digits, minutes on two cores
    python examples/compare_heads.py --data cifar10 --accelerator gpu      # the settings of the paper
    python examples/compare_heads.py --data imagefolder:PATH --backbone resnet8 --epochs 10

Each run writes `runs/<data>/<head>/seed<k>/`; the study writes `report.md` and `results.json` beside them.
"""

import logging
import shutil
import sys
import time
import warnings
from collections.abc import Sequence

import torch
from study import report, results, run
from study.options import Options, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; 2 when it was asked for something impossible, 1 when a run could not be finished."""
    _quiet_lightning()
    try:
        options = parse(arguments)
        done = results.finished(options)
        data = run.build_data(options)
        run.check_accelerator(options)
        for head in options.heads:
            run.build_model(options, head, data)  # a head that cannot be had is told before the first one trains
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"compare_heads.py: error: {error}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report.write_columns(options)
    runs = [(head, seed) for seed in range(options.seeds) for head in options.heads]
    started = time.perf_counter()
    for number, (head, seed) in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {head}, seed {seed}"
        if (head, seed) in done:
            print(f"{label}: finished before", flush=True)
            continue
        print(f"{label}: training and analysing ...", flush=True)
        # what an interrupted run left behind would show up as a second curve
        shutil.rmtree(options.run_dir(head, seed), ignore_errors=True)
        try:
            done[head, seed] = run.run(options, head, seed, data, show_progress=sys.stderr.isatty())
        except RuntimeError as error:
            print(f"compare_heads.py: error: {error}", file=sys.stderr)
            return 1
        print(f"{label}: {_headline(done[head, seed])}", flush=True)
    _finish(options, [done[key] for key in runs], time.perf_counter() - started)
    return 0


def _finish(options: Options, finished: report.Results, seconds: float) -> None:
    path = report.write(options, finished)
    print(f"\n{report.table(options, finished)}\n\n{len(finished)} runs, {seconds:.0f} s. Report: {path}")
    print(f"Browse the results: tensorboard --logdir {options.out}")


def _headline(result: dict[str, object]) -> str:
    metrics = result["metrics"]
    assert isinstance(metrics, dict)
    sharpness = metrics.get("sharpness/train/lambda_max", float("nan"))
    accuracy = metrics["test/accuracy"]
    return f"test accuracy {accuracy:.2%}, λmax on training data {sharpness:.3g}, {result['seconds']:.0f} s"


def _quiet_lightning() -> None:
    """Leave out Lightning's advice on hardware and worker processes: this script has chosen both."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


if __name__ == "__main__":
    sys.exit(main())
