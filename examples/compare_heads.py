"""Train classifier heads of equal capacity, analyse them, and report: the study of arXiv 2601.15021 in one command.

    python examples/compare_heads.py                                       # digits, minutes on two cores
    python examples/compare_heads.py --preset cpu                          # CIFAR-10 on two cores, some hours
    python examples/compare_heads.py --preset paper --accelerator gpu      # the protocol of the paper
    python examples/compare_heads.py --data imagefolder:PATH --backbone resnet8 --epochs 10

Each run writes `<out>/<head>/seed<k>/`; the study writes `report.md`, `report.html` and `results.json` beside them.
Interrupted, it loses an epoch at most and goes on with `--resume`. Several processes, one for each device, may work on
one folder.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from study import report, results, run
from study.build import build_data, build_model, check_accelerator, describe_data
from study.options import Options, parse
from study.storage import claimed
from study.tables import main_table
from study.training import TimeIsUp

_FAILED, _REFUSED, _TIME_IS_UP = 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study.

    Returns:
        0; 1 when a run could not be finished, 2 when it was asked for something impossible, 3 when its time was up.
    """
    started = time.monotonic()
    _quiet_lightning()
    try:
        options = parse(arguments)
        results.finished(options, options.config())  # what the folder forbids is told before the images are read
        data = build_data(options)
        description = describe_data(options, data)
        config = options.config() | {"test_sha256": description["test_sha256"]}
        done = results.finished(options, config)
        check_accelerator(options)
        for head in options.heads:
            build_model(options, head, data)  # a head that cannot be had is told before the first one trains
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        return _tell(error, _REFUSED)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    deadline = started + 60 * (options.max_minutes or float("inf"))
    report.write_columns(options)
    status = 0
    try:
        _run_all(options, data, config, done, deadline)
    except TimeIsUp as reached:
        print(f"compare_heads.py: time is up, {reached}; carry on with --resume", file=sys.stderr)
        status = _TIME_IS_UP
    except (RuntimeError, OSError) as error:
        status = _tell(error, _FAILED)
    if done and status != _FAILED:
        _finish(options, description, done, time.monotonic() - started)
    return status


def _run_all(
    options: Options, data: Any, config: dict[str, Any], done: dict[tuple[str, int], results.Run], deadline: float
) -> None:
    """Do what is not done, seed by seed, so that what there is can be compared at any time."""
    runs = [(head, seed) for seed in range(options.seeds) for head in options.heads]
    has_begun = False
    for number, (head, seed) in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {head}, seed {seed}"
        if (head, seed) in done:
            print(f"{label}: finished before", flush=True)
            continue
        folder = options.run_dir(head, seed)
        with claimed(folder) as is_mine:
            if not is_mine:
                print(f"{label}: another process works on it", flush=True)
                continue
            if (folder / "result.json").exists():  # finished by another process since this one began
                done[head, seed] = results.load(folder, config)
                continue
            if has_begun and time.monotonic() > deadline:
                raise TimeIsUp(f"{len(done)} of {len(runs)} runs are finished")
            print(f"{label}: training and analysing ...", flush=True)
            has_begun = True
            results.begin(folder, config)
            done[head, seed] = run.run(options, head, seed, data, config, deadline, show_progress=sys.stderr.isatty())
        print(f"{label}: {_headline(done[head, seed])}", flush=True)


def _finish(options: Options, data: dict[str, Any], done: dict[tuple[str, int], results.Run], seconds: float) -> None:
    runs = [done[key] for key in sorted(done, key=lambda key: (key[1], options.heads.index(key[0])))]
    path = report.write(options, data, runs)
    print(f"\n{main_table(runs, options.heads)}\n\n{len(runs)} runs, {seconds:.0f} s. Report: {path}")
    print(f"Browse the results: tensorboard --logdir {options.out}")


def _headline(result: results.Run) -> str:
    metrics = result["metrics"]
    sharpness = metrics.get("sharpness/train/lambda_max", float("nan"))
    accuracy = metrics["test/accuracy"]
    return f"test accuracy {accuracy:.2%}, λmax on training data {sharpness:.3g}, {result['seconds']:.0f} s"


def _tell(error: Exception, status: int) -> int:
    print(f"compare_heads.py: error: {error}", file=sys.stderr)
    return status


def _quiet_lightning() -> None:
    """Leave out Lightning's advice on hardware and worker processes: this script has chosen both."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


if __name__ == "__main__":
    sys.exit(main())
