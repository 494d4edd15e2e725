"""What the study can be asked for, checked before anything is built."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEADS = ("dense", "soft", "sparse", "hard")


@dataclass(frozen=True)
class Recipe:
    """Training settings of a kind of data, where the command line does not say otherwise."""

    backbone: str
    epochs: int
    seeds: int
    batch_size: int
    learning_rate: float
    analysis_samples: int
    plane_points: int
    threads: int | None


# The digits are for minutes on two cores: fewer samples, and one thread, because tensors of 8x8 images gain little from
# a second one and lose much where another program wants the core. CIFAR-10 has the settings of arXiv 2601.15021.
RECIPES = {
    "digits": Recipe("digits_cnn", 15, 2, 64, 0.1, analysis_samples=250, plane_points=11, threads=1),
    "cifar10": Recipe("resnet18", 50, 3, 128, 0.1, analysis_samples=1000, plane_points=15, threads=None),
    "imagefolder": Recipe("resnet8", 15, 2, 128, 0.1, analysis_samples=1000, plane_points=15, threads=None),
}


@dataclass(frozen=True)
class Options:
    """The study's options; see `parse` for their meaning."""

    data: str
    backbone: str
    heads: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    learning_rate: float
    head_width: int | None
    limit_train: int | None
    image_size: int | None
    analysis_samples: int
    plane_points: int
    threads: int | None
    accelerator: str
    out: Path
    resume: bool

    def __post_init__(self) -> None:
        kind, _, path = self.data.partition(":")
        if kind not in RECIPES or (kind == "imagefolder") != bool(path):
            raise ValueError(f"--data: expected digits, cifar10 or imagefolder:PATH; got {self.data!r}")
        if path and not Path(path).is_dir():
            raise ValueError(f"--data: expected a folder with train/<class>/ and test/<class>/; there is no {path!r}")
        unknown = sorted(set(self.heads) - set(HEADS))
        if unknown:
            raise ValueError(f"--heads: expected some of {', '.join(HEADS)}; got {', '.join(unknown)}")
        for name in (
            "seeds",
            "epochs",
            "batch_size",
            "analysis_samples",
            "head_width",
            "limit_train",
            "image_size",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected an integer of at least 1; got {value}")
        if self.learning_rate <= 0:
            raise ValueError(f"--learning-rate: expected a number above 0; got {self.learning_rate}")
        if not 3 <= self.plane_points <= 256:
            raise ValueError(f"--plane-points: expected 3 to 256; got {self.plane_points}")
        for head in self.heads:
            _check_writable(self.run_dir(head, seed=0))

    def config(self) -> dict[str, Any]:
        """What a finished run must agree with for ``--resume`` to take it."""
        unshared = ("heads", "seeds", "out", "resume", "accelerator", "threads")
        return {name: value for name, value in asdict(self).items() if name not in unshared}

    def run_dir(self, head: str, seed: int) -> Path:
        """Folder of one run."""
        return self.out / head / f"seed{seed}"


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="compare_heads.py",
        description="Train classifier heads of equal capacity and analyse them: accuracy, expert utilisation,"
        " sharpness, loss landscape, inference timing. Browse the results with TensorBoard.",
    )
    parser.add_argument("--data", default="digits", help="digits (comes with scikit-learn), cifar10, imagefolder:PATH")
    parser.add_argument("--backbone", help="digits_cnn, resnet8, resnet20, resnet18, torchvision:NAME or timm:NAME")
    parser.add_argument(
        "--heads", nargs="+", default=list(HEADS[:3]), metavar="HEAD", help=f"some of {', '.join(HEADS)}"
    )
    parser.add_argument("--seeds", type=int, help="number of seeds: 0, 1, …")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--head-width", type=int, help="hidden units of the dense head, which sets the capacity of all")
    parser.add_argument("--limit-train", type=int, help="train on that many images")
    parser.add_argument("--image-size", type=int, help="side to which the images of an imagefolder are resized")
    parser.add_argument("--analysis-samples", type=int, help="samples of each split for the analyses")
    parser.add_argument("--plane-points", type=int, help="points a side of the 2-D landscape")
    parser.add_argument(
        "--threads", type=int, help="threads of torch on the CPU; 1 for the digits, else torch's choice"
    )
    parser.add_argument("--accelerator", default="auto", help="what Lightning trains on: auto, cpu, gpu")
    parser.add_argument("--out", type=Path, help="folder of the study; default runs/<data>")
    parser.add_argument("--resume", action="store_true", help="keep finished runs of the folder, do the others")
    given = vars(parser.parse_args(arguments))
    kind = given["data"].partition(":")[0]
    recipe = asdict(RECIPES.get(kind, RECIPES["digits"]))
    chosen = {name: recipe.get(name) if value is None else value for name, value in given.items()}
    chosen["heads"] = tuple(dict.fromkeys(chosen["heads"]))
    chosen["out"] = chosen["out"] or Path("runs") / kind
    return Options(**chosen)


def _check_writable(out: Path) -> None:
    """Refuse a folder that cannot be made or written, without making it."""
    nearest = out
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out: expected a folder that can be written; {str(nearest)!r} is not one")
