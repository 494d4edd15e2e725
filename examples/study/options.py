"""Command-line options of the study, checked before anything is built."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from moe_heads.checks import check_at_least, check_at_least_one, check_positive
from study.presets import HEADS, PRESET_OF, PRESETS, Protocol

_DATA = "digits, cifar10 or imagefolder:PATH"

# Options that are not part of a run: other runs, paths, and the machine, which the report states.
_UNSHARED = ("preset", "heads", "seeds", "out", "resume", "accelerator", "threads", "max_minutes", "data_name")


@dataclass(frozen=True, kw_only=True)
class Options(Protocol):
    """A protocol with its output folder, machine and limits; see `parse`."""

    preset: str
    out: Path
    head_width: int | None = None
    limit_train: int | None = None
    image_size: int | None = None
    accelerator: str = "auto"
    resume: bool = False
    max_minutes: float | None = None
    data_name: str | None = None

    def __post_init__(self) -> None:
        kind, _, path = self.data.partition(":")
        if kind not in PRESET_OF or (kind == "imagefolder") != bool(path):
            raise ValueError(f"--data: expected {_DATA}, got {self.data!r}.")
        if path and not Path(path).is_dir():
            raise ValueError(
                f"--data: expected a folder with train/<class>/ and test/<class>/, got {path!r}, which does not exist."
            )
        unknown = sorted(set(self.heads) - set(HEADS))
        if unknown:
            raise ValueError(f"--heads: expected some of {', '.join(HEADS)}, got {', '.join(unknown)}.")
        counts = ("seeds", "epochs", "batch_size", "analysis_samples", "head_width", "limit_train", "image_size")
        given = self._flagged(*counts, "threads")
        check_at_least_one(**{flag: value for flag, value in given.items() if value is not None})
        check_at_least(0, **self._flagged("crop_padding"))
        check_positive(**self._flagged("learning_rate"))
        if not 3 <= self.plane_points <= 256:
            raise ValueError(f"--plane-points: expected 3 to 256, got {self.plane_points}.")
        if self.max_minutes is not None:
            check_positive(**self._flagged("max_minutes"))
        for head in self.heads:
            _check_writable(self.run_dir(head, seed=0))

    def config(self) -> dict[str, Any]:
        """Return the options that all runs of a folder share, as JSON-like values."""
        config = {name: value for name, value in asdict(self).items() if name not in _UNSHARED}
        # the path of the images is not part of the data
        config["data"] = self.data.partition(":")[0]
        return config

    def run_dir(self, head: str, seed: int) -> Path:
        """Return the folder of one run."""
        return self.out / head / f"seed{seed}"

    def _flagged(self, *names: str) -> dict[str, Any]:
        return {_flag(name): getattr(self, name) for name in names}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line; options that are not given come from the preset."""
    given = vars(_parser().parse_args(arguments))
    by_preset = PRESETS[given["preset"] or "digits"].data
    kind = (given["data"] or by_preset).partition(":")[0]
    _check_data_options(kind, given)
    preset = given.pop("preset") or PRESET_OF.get(kind, "digits")
    chosen = asdict(PRESETS[preset]) | {name: value for name, value in given.items() if value is not None}
    chosen["heads"] = tuple(dict.fromkeys(chosen["heads"]))
    chosen["out"] = given["out"] or Path("runs") / preset
    return Options(preset=preset, **chosen)


def _check_data_options(kind: str, given: dict[str, Any]) -> None:
    """Raise an error for options that the data ignore."""
    unused = {"digits": ("crop_padding", "crop_border", "image_size"), "cifar10": ("image_size",)}.get(kind, ())
    for name in unused:
        if given[name] is not None:
            raise ValueError(f"{_flag(name)}: expected no value with --data {kind}, got {given[name]!r}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_heads.py",
        description="Train classifier heads of equal capacity and analyze them: accuracy, expert utilization,"
        " sharpness, loss landscape, inference timing. Browse the results with TensorBoard.",
    )
    add = parser.add_argument
    add("--preset", choices=[*PRESETS], help="protocol, by default that of the data; options below override it")
    add("--data", help=f"{_DATA}; by default that of the preset")
    add("--data-name", help="name of the data in the report")
    add("--backbone", help="digits_cnn, fast_cnn, resnet8, resnet20, resnet18, torchvision:NAME or timm:NAME")
    add("--heads", nargs="+", metavar="HEAD", help=f"some of {', '.join(HEADS)}")
    add("--seeds", type=int, help="number of seeds: 0, 1, …")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float)
    add("--schedule", choices=_choices("schedule"))
    add("--nesterov", action=argparse.BooleanOptionalAction)
    add("--weight-decay", type=float)
    add("--label-smoothing", type=float)
    add("--augment", action=argparse.BooleanOptionalAction, help="random crops and flips of the training images")
    add("--crop-padding", type=int, help="largest shift of a random crop in pixels; 0 for no crop")
    add("--crop-border", choices=_choices("crop_border"), help="padding of a crop beyond the image")
    add(
        "--precision",
        choices=_choices("precision"),
        help="precision of training; auto: bf16 if the device supports it",
    )
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory format of backbone and images")
    add("--whiten", action=argparse.BooleanOptionalAction, help="whiten the first layer of fast_cnn")
    add("--load-loss", choices=_choices("load_loss"), help="balance loss of the sparse heads")
    add("--engine", choices=_choices("engine"), help="engine of the sharpness analysis")
    add("--head-width", type=int, help="hidden units of the dense head, which sets the capacity of all heads")
    add("--limit-train", type=int, help="number of training images to use")
    add("--image-size", type=int, help="side length to which the images of an imagefolder are resized")
    add("--analysis-samples", type=int, help="samples of each split for the analyses")
    add("--plane-points", type=int, help="points on each side of the 2-D landscape")
    add("--threads", type=int, help="threads of torch on the CPU; by default 1 for the digits, else torch's default")
    add("--accelerator", help="Lightning's accelerator: auto, cpu, gpu")
    add("--out", type=Path, help="folder of the study; by default runs/<preset>")
    add("--resume", action="store_true", default=None, help="keep the finished runs of the folder and continue")
    add(
        "--max-minutes",
        type=float,
        help="start no epoch and no analysis after this time and exit with status 3; continue with the same command"
        " and --resume",
    )
    return parser


def _choices(name: str) -> tuple[str, ...]:
    return get_args(get_type_hints(Protocol)[name])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_writable(out: Path) -> None:
    """Raise an error if a folder cannot be created or written, without creating it."""
    nearest = out
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out: expected a writable folder, got {str(nearest)!r}.")
