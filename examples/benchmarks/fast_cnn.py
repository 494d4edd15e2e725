"""Ablation of FastCNN and of the preset `cpu`: validation accuracy and speed without each choice.

Each variant is the preset `cpu` of compare_heads.py with one choice reverted (ablation), trained for fewer epochs with
the dense head, once for each seed. `--jobs` trains several seeds of a variant at a time, which is faster than one seed
on all threads. Speeds are then measured on a loaded machine.

    python examples/benchmarks/fast_cnn.py --images FOLDER --epochs 3 --seeds 2 --jobs 2 --out fast_cnn.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench.fitting import fit
from bench.timing import machine
from lightning import pytorch as pl
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from study.build import build_data, build_model
from study.options import Options
from study.presets import PRESETS

from moe_heads.checks import check_at_least_one
from moe_heads.lightning_modules import FastCNN, MoEClassifier

Change = Callable[[MoEClassifier], None]


def _layers(model: MoEClassifier) -> nn.Sequential:
    assert isinstance(model.backbone, FastCNN)
    return model.backbone.layers


def _replaced(model: MoEClassifier, kind: type[nn.Module], other: Callable[[], nn.Module]) -> None:
    layers = _layers(model)
    for index, layer in enumerate(layers):
        if isinstance(layer, kind):
            layers[index] = other()


def _random_start(model: MoEClassifier) -> None:
    for layer in _layers(model):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _trained_first_layer(model: MoEClassifier) -> None:
    model.backbone.first.requires_grad_(True)


def _long_memory(model: MoEClassifier) -> None:
    for layer in _layers(model):
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1


# name: options that differ from the preset, and a change of the model
VARIANTS: Mapping[str, tuple[dict[str, Any], Change | None]] = {
    "preset": ({}, None),
    "first layer not whitened": ({"whiten": False}, None),
    "first layer whitened, then trained": ({}, _trained_first_layer),
    "convolutions start at random": ({}, _random_start),
    "mean over the pixels": ({}, lambda m: _replaced(m, nn.AdaptiveMaxPool2d, lambda: nn.AdaptiveAvgPool2d(1))),
    "GELU": ({}, lambda m: _replaced(m, nn.ReLU, nn.GELU)),
    "batch norm with momentum 0.1": ({}, _long_memory),
    "cosine by epoch": ({"schedule": "cosine"}, None),
    "no label smoothing": ({"label_smoothing": 0.0}, None),
    "momentum without Nesterov": ({"nesterov": False}, None),
    "black border": ({"crop_border": "black"}, None),
    "crops by up to 4 pixels": ({"crop_padding": 4}, None),
    "no augmentation": ({"augment": False}, None),
    "batches of 512": ({"batch_size": 512, "learning_rate": 2 * PRESETS["cpu"].learning_rate}, None),
    "channels first": ({"channels_last": False}, None),
    "fp32": ({"precision": "32-true"}, None),
}


def train(base: Options, variant: str, seed: int) -> dict[str, float]:
    """Train a variant; return its final validation accuracy and its images per second, including all overhead."""
    differences, change = VARIANTS[variant]
    options = replace(base, **differences)
    pl.seed_everything(seed, verbose=False)
    data = build_data(options)
    model = build_model(options, "dense", data)
    if change is not None:
        change(model)
    started = time.perf_counter()
    trainer = fit(options, model, data)
    seconds = time.perf_counter() - started
    num_images = options.epochs * len(data.train_dataloader().dataset)  # type: ignore[arg-type]
    return {"accuracy": float(trainer.callback_metrics["val/accuracy"]), "images_per_s": num_images / seconds}


def train_all(
    base: Options, variants: Sequence[str], seeds: int, jobs: int, threads: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Train each variant once for each seed, with ``jobs`` seeds of a variant at the same time.

    Yields:
        Variant, seed and result.
    """
    groups = [range(first, min(first + jobs, seeds)) for first in range(0, seeds, jobs)]
    if jobs == 1:
        yield from ((variant, seed, train(base, variant, seed)) for (seed,) in groups for variant in variants)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for group in groups:
            for variant in variants:
                # no more tasks than run at once: tasks waiting in the pool would still run after an error or Ctrl-C
                results = pool.map(train, repeat(base), repeat(variant), group)
                yield from ((variant, seed, result) for seed, result in zip(group, results, strict=True))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train all variants, print the results and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, each on its share of the threads")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--limit-train", type=int, default=None, help="number of training images to use")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write, updated after each variant")
    given = parser.parse_args(arguments)
    check_at_least_one(**{"--epochs": given.epochs, "--seeds": given.seeds, "--jobs": given.jobs})
    if given.out is not None and not given.out.parent.is_dir():
        raise ValueError(f"--out: expected a file in an existing folder, got {given.out}.")
    protocol = replace(PRESETS["cpu"], data=f"imagefolder:{given.images}", epochs=given.epochs)
    base = Options(preset="cpu", out=Path("runs"), limit_train=given.limit_train, **vars(protocol))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in given.only}
    threads = max(1, torch.get_num_threads() // given.jobs)
    how = {"epochs": given.epochs, "jobs": given.jobs, "threads_per_job": threads}
    report: dict[str, Any] = {"machine": machine(), **how, "variants": {}}
    for name, seed, result in train_all(base, given.only, given.seeds, given.jobs, threads):
        results[name].append(result)
        report["variants"][name] = row = _row(results[name])
        print(f"{name}, seed {seed}: {row['accuracy']:.2%}, {row['images_per_s']:.0f} images/s", flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _row(results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    accuracies = [result["accuracy"] for result in results]
    speed = statistics.median(result["images_per_s"] for result in results)
    return {"accuracy": statistics.mean(accuracies), "accuracies": accuracies, "images_per_s": speed}


if __name__ == "__main__":
    main()
