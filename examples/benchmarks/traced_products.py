"""Whether tracing the Hessian-vector products pays: the whole sharpness analysis against a kept first-order graph.

Five networks with random weights on random data, fp32, one CPU thread, a fresh process for each. Both ways fold batch
norm alike. Set-up is the time until the first product can be computed: of the first one in the process, as a user
meets it after training (imports included), and of later ones. Products are timed in interleaved pairs. The whole
analysis is the set-up and as many products as a default run takes (47 on a ResNet-8). CPU time of the process.

    python examples/benchmarks/traced_products.py --out traced_products.json
    python examples/benchmarks/traced_products.py --only gru --pairs 15
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from bench.timing import machine
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import Dense
from moe_heads.callbacks.functional import analysis_mode
from moe_heads.callbacks.functional.curvature import HessianOperator
from moe_heads.lightning_modules import CifarResNet, ResNet18Cifar

Batch = tuple[Tensor, Tensor]
Mode = Literal["kept", "linearized"]
MODES: tuple[Mode, Mode] = ("kept", "linearized")

PRODUCTS = 47
"""Products of a default run on the ResNet-8 of the sharpness benchmark."""

NEEDED = 0.2
"""Share of the whole analysis that the trace has to save, on three networks, to be worth its code."""


@dataclass(frozen=True)
class Case:
    """A network with its data.

    Attributes:
        build: Makes the network and one batch of a given size.
        samples: Samples of the Hessian.
        batch: Samples of a batch.
        pairs: Interleaved pairs of products.
        setups: Set-ups of each way, the first one counted on its own.
    """

    build: Callable[[int], tuple[nn.Module, Batch]]
    samples: int
    batch: int
    pairs: int
    setups: int


class _Gru(nn.Module):
    """A GRU over a sequence of vectors; its last state is classified."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(features, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(x)[0][:, -1])
        return logits


class _NextToken(nn.Module):
    """A small GPT-2; logits by token, classes in the second dimension.

    The causal mask is given: transformers looks at values of the batch to make its own, which nothing can trace.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": length, "vocab_size": 256}
        config = GPT2Config(**sizes, use_cache=False, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
        self.gpt = GPT2LMHeadModel(config)
        mask = torch.full((1, 1, length, length), -1e9).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = self.mask.expand(len(tokens), -1, -1, -1)
        logits: Tensor = self.gpt(input_ids=tokens, attention_mask=mask).logits
        return logits.transpose(1, 2)


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return VisionTransformer(**sizes, num_classes=10)


def _classified(model: nn.Module, *shape: int) -> tuple[nn.Module, Batch]:
    return model, (torch.randn(*shape), torch.randint(10, shape[:1]))


def _gpt2(samples: int) -> tuple[nn.Module, Batch]:
    return _NextToken(64), (torch.randint(256, (samples, 64)), torch.randint(256, (samples, 64)))


CASES: Mapping[str, Case] = {
    "resnet8": Case(lambda n: _classified(nn.Sequential(CifarResNet(8), Dense(64, 10)), n, 3, 32, 32), 128, 32, 11, 4),
    "resnet18": Case(lambda n: _classified(nn.Sequential(ResNet18Cifar(), Dense(512, 10)), n, 3, 32, 32), 32, 16, 5, 2),
    "vit": Case(lambda n: _classified(_vit(), n, 3, 32, 32), 128, 32, 9, 3),
    "gpt2": Case(_gpt2, 64, 16, 9, 3),
    "gru": Case(lambda n: _classified(_Gru(16, 64), n, 80, 16), 256, 64, 9, 3),
}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def measure(name: str, pairs: int | None) -> dict[str, Any]:
    """Set-up, products and whole analysis of one network by both ways."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name]
    model, data = case.build(case.samples)
    batches = list(zip(*(part.split(case.batch) for part in data), strict=True))
    num_parameters = sum(p.numel() for p in model.parameters())
    with analysis_mode(model):
        _first_gradient(model, batches)  # what every training has paid for already
        setups: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        for number in range(case.setups):
            for mode in MODES if number % 2 == 0 else MODES[::-1]:
                gc.collect()
                seconds, operator = _timed(lambda mode=mode: HessianOperator(model, loss_fn, batches, mode=mode))
                setups[mode].append(seconds)
                operator.release()
        operators = {mode: HessianOperator(model, loss_fn, batches, mode=mode) for mode in MODES}
        taken = {mode: operators[mode].mode for mode in MODES}
        vector = torch.randn(num_parameters)
        times: dict[str, list[float]] = {"gradient": [], **{mode: [] for mode in MODES}}
        products: dict[Mode, Tensor] = {}
        for number in range(-1, pairs or case.pairs):  # the first pair is to warm up
            spent = {"gradient": _timed(lambda: _gradient(model, batches))[0]}
            for mode in MODES if number % 2 == 0 else MODES[::-1]:
                spent[mode], products[mode] = _timed(lambda mode=mode: operators[mode].matvec(vector))
            if number >= 0:
                for what, seconds in spent.items():
                    times[what].append(seconds)
    difference = float((products["kept"] - products["linearized"]).norm() / products["kept"].norm())
    return {
        "parameters": num_parameters,
        "samples": case.samples,
        "batch": case.batch,
        "mode_taken": taken,
        "reason": operators["linearized"].reason,
        "folded": operators["kept"].num_folded,
        "difference": difference,
        "setups": setups,
        "products": times,
        **_summary(setups, times),
    }


def _summary(setups: Mapping[Mode, Sequence[float]], times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians, and the share that the trace saves: of a product, and of the whole analysis."""
    gradient = statistics.median(times["gradient"])
    product = {mode: statistics.median(times[mode]) for mode in MODES}
    ratios = [after / before for before, after in zip(times["kept"], times["linearized"], strict=True)]
    first = {mode: setups[mode][0] + PRODUCTS * product[mode] for mode in MODES}
    later = {mode: statistics.median(setups[mode][1:]) + PRODUCTS * product[mode] for mode in MODES}
    return {
        "gradient_s": gradient,
        "product_s": product,
        "product_in_gradients": {mode: product[mode] / gradient for mode in MODES},
        "setup_first_s": {mode: setups[mode][0] for mode in MODES},
        "setup_later_s": {mode: statistics.median(setups[mode][1:]) for mode in MODES},
        "whole_s": first,
        "saved_of_a_product": 1 - statistics.median(ratios),
        "saved_of_the_whole": 1 - first["linearized"] / first["kept"],
        "saved_of_a_later_whole": 1 - later["linearized"] / later["kept"],
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    value = call()
    return time.process_time() - start, value


def _gradient(model: nn.Module, batches: Sequence[Batch]) -> None:
    for batch in batches:
        torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))


def _first_gradient(model: nn.Module, batches: Sequence[Batch]) -> None:
    for _ in range(2):
        _gradient(model, batches[:1])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure each network in a process of its own, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*CASES], choices=[*CASES], metavar="NETWORK")
    parser.add_argument("--pairs", type=int, default=None, help="interleaved pairs of products; by default by network")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write, also after each network")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("torch", "timm", "transformers")}
    report: dict[str, Any] = {"machine": machine(), "versions": versions, "products": PRODUCTS, "networks": {}}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in options.only:
            row = report["networks"][name] = pool.submit(measure, name, options.pairs).result()
            print(_line(name, row), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    saving = [name for name, row in report["networks"].items() if row["saved_of_the_whole"] >= NEEDED]
    print(f"saves {NEEDED:.0%} of the whole analysis on {len(saving)} of {len(report['networks'])}: {saving}")
    return report


def _line(name: str, row: Mapping[str, Any]) -> str:
    gradients, whole = row["product_in_gradients"], row["whole_s"]
    return (
        f"{name}: gradients a product {gradients['kept']:.2f} kept, {gradients['linearized']:.2f} traced; set-up "
        f"{row['setup_first_s']['kept']:.1f} and {row['setup_first_s']['linearized']:.1f} s; whole "
        f"{whole['kept']:.1f} and {whole['linearized']:.1f} s, {row['saved_of_the_whole']:+.0%} saved "
        f"({row['saved_of_a_product']:+.0%} of a product); mode {row['mode_taken']['linearized']} {row['reason']}"
    )


if __name__ == "__main__":
    main()
