"""Collect on a machine with a GPU what a machine without one cannot measure.

Needs torch and Lightning. A piece whose packages are missing is skipped, with the reason in its JSON. All pieces
together take at most ``--minutes``. Each has its own file, and a further call continues with what is not finished.

    make gpu                                 # on a GPU, nine minutes; writes examples/benchmarks/results/gpu/
    make gpu IMAGES=FOLDER                   # the study too, on the images of FOLDER/train and FOLDER/test
    make gpu DEVICE=cpu QUICK=1 OUT=FOLDER   # the same steps on a CPU, with the smallest sizes
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench.gpu.curvature import curvature
from bench.gpu.heads import heads
from bench.gpu.piece import Piece, Settings, is_finished, run_piece
from bench.gpu.section import section
from bench.gpu.study import study
from bench.gpu.timing import timing
from bench.gpu.unit_tests import unit_tests

# Each piece with its share of the time that is left when it begins. The study, which can continue, takes the rest.
PIECES: dict[str, tuple[Piece, float]] = {
    "heads": (heads, 0.3),
    "timing": (timing, 0.3),
    "curvature": (curvature, 0.25),
    "unit_tests": (unit_tests, 0.5),
    "study": (study, 1.0),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Run the pieces, and return the state of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files and of section.md")
    parser.add_argument("--device", default="cuda", help="cuda, the default, or cpu to try the steps")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes")
    parser.add_argument("--images", type=Path, default=None, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of all pieces")
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES), help="some pieces instead of all")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("CUDA is not available on this machine. Pass --device cpu --quick to try the steps on a CPU.")
    if options.images is not None and not (options.images / "train").is_dir():
        parser.error(f"--images: expected a folder with train/<class>/ and test/<class>/, got {options.images}.")
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    states = {}
    for name in options.only:
        piece, share = PIECES[name]
        now = time.monotonic()
        settings = Settings(
            torch.device(options.device), options.quick, options.images, options.out, now + share * max(end - now, 0)
        )
        if is_finished(options.out / f"{name}.json", settings):
            states[name] = "finished earlier"
        else:
            report = run_piece(name, piece, settings)
            states[name] = next((key for key in ("skipped", "error") if key in report), "")
            states[name] = states[name] or ("finished" if report["finished"] else "cut off, run again to continue")
            print(name, json.dumps(report, indent=1)[:2000], flush=True)
        (options.out / "section.md").write_text(section(options.out))
        print(f"{name}: {states[name]}", flush=True)
    return states


if __name__ == "__main__":
    main()
