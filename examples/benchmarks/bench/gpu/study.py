"""One run of the study for each head, with the protocol for a GPU."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu.piece import Report, Settings

__all__ = ["study"]

_SCRIPT = Path(__file__).parents[3] / "compare_heads.py"
_HEADS = ("dense", "soft", "sparse")
# The imports alone take a part of this.
_FEWEST_SECONDS = 30
_QUICK = {"backbone": "resnet8", "epochs": 1, "batch-size": 8, "analysis-samples": 8, "plane-points": 3}


def study(settings: Settings, result: Report, save: Callable[[], None]) -> bool:
    """Run `compare_heads.py --preset gpu` with one seed. It stops in time, and a further call continues.

    A quick run trains a smaller network on a few random images.

    Raises:
        ImportError: If a package or the images are missing.
    """
    if settings.images is None and not settings.quick:
        raise ImportError("the images are missing: pass IMAGES=FOLDER with train/<class>/ and test/<class>/")
    if settings.seconds_left < _FEWEST_SECONDS:
        return False
    with tempfile.TemporaryDirectory() as temporary:
        images = settings.images or _random_images(Path(temporary))
        out = settings.out / "study"
        command = [sys.executable, str(_SCRIPT), "--preset", "gpu", "--data", f"imagefolder:{images}", "--resume"]
        command += ["--accelerator", "gpu" if settings.device.type == "cuda" else "cpu", "--heads", *_HEADS]
        command += ["--out", str(out), "--seeds", "1", "--max-minutes", str(settings.seconds_left / 60 * 0.8)]
        command += [f"--{name}={value}" for name, value in _QUICK.items()] if settings.quick else []
        try:
            # a part that has begun when the time is up still ends
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=settings.seconds_left)
        except subprocess.TimeoutExpired:
            result["tail"] = "the time was over"
            return False
    result["returncode"], result["tail"] = done.returncode, (done.stdout + done.stderr)[-2000:]
    if "ModuleNotFoundError" in done.stderr:
        raise ImportError(done.stderr.strip().splitlines()[-1])
    for head in _HEADS:
        path = out / head / "seed0" / "result.json"
        if path.exists():
            run = json.loads(path.read_text())
            result[head] = {name: run[name] for name in ("metrics", "training_seconds", "analysis_seconds")}
    save()
    return done.returncode == 0


def _random_images(folder: Path) -> Path:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(12):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return folder
