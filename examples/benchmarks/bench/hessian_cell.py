"""Measurements of one network with one head: cost of products, our analysis, trace budget of the peers, and peers."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.hessian_oracle import density_distance, oracle
from bench.hessian_peers import PEERS, pyhessian_equal, unit_products
from bench.hessian_problem import Problem, Row, cpu_seconds, interleaved_cpu_seconds
from bench.hessian_report import asides, extrapolated, scale_of, verdicts
from bench.peak_memory import with_peak_resident
from bench.trace_budget import trace_budget
from moe_heads.analysis import analysis_mode, sharpness
from moe_heads.analysis.sharpness.hessian import HessianOperator, top_eigenvectors

__all__ = ["SECTIONS", "Cell"]

SECTIONS = ("costs", "oracle", "ours", "budget", *PEERS, "equal")

Measurement = Callable[[], Row]

# Maximum number of test vectors for the traces of the peers.
_MOST_VECTORS = 48


class Cell:
    """Measurements of one network with one head.

    Args:
        problem: The Hessian.
        cell: Receives the results by section.
        peers: Names of the available peers.
        graph_memory: Bytes that our operator may keep; None for its default.
        reference: Lanczos steps and probes of the reference in float64.
        write: Called after every measurement.
    """

    def __init__(
        self,
        problem: Problem,
        cell: Row,
        peers: list[str],
        graph_memory: int | None,
        reference: tuple[int, int],
        write: Callable[[], None],
    ) -> None:
        self.problem, self.cell, self.peers, self.graph_memory = problem, cell, peers, graph_memory
        self.reference, self.write = reference, write

    def measure(self, sections: Sequence[str], rounds: int) -> None:
        """Run the sections; full analyses run ``rounds`` times, in random order after the first round."""
        self.cell["net"] = self._facts()
        if "costs" in sections:
            self.cell["costs"] = self._costs(rounds)
            self.write()
        if "oracle" in sections:
            self.cell["oracle"] = oracle(self.problem, *self.reference)
            self.write()
        candidates = self._candidates(sections)
        if "ours" in candidates:
            self.cell.pop("ours", None)
        runs: dict[str, list[Row]] = {name: [] for name in candidates}
        for number in range(rounds):
            names = list(candidates)
            if number:
                random.Random(number).shuffle(names)
            for name in names:
                gradient = cpu_seconds(self.problem.gradient)
                run, peak = with_peak_resident(candidates[name])
                runs[name].append(run | {"gradient_cpu_s": gradient, "peak_bytes": run.get("peak_bytes", peak)})
                self.cell[name] = self._with_errors(_median(runs[name]))
                self.write()
                print(f"{name} {self.cell[name]['cpu_s']:.1f} s", end="  ", flush=True)
                if name == "ours" and number == 0 and "budget" in sections:
                    self.cell["budget"] = self._budget()
        if "budget" in sections and "ours" not in sections:
            self.cell["budget"] = self._budget()
        if "equal" in sections and "pyhessian" in self.peers:
            gradient = cpu_seconds(self.problem.gradient)
            self.cell["equal"] = pyhessian_equal(self.problem, self._known()) | {"gradient_cpu_s": gradient}
        if "ours" in self.cell:
            self.cell["extrapolated"] = extrapolated(self.cell, self.problem.trace_tolerance)
        self.cell |= {"verdicts": verdicts(self.cell), "asides": asides(self.cell)}
        self.write()

    def _candidates(self, sections: Sequence[str]) -> dict[str, Measurement]:
        chosen: dict[str, Measurement] = {"ours": self._ours} if "ours" in sections else {}
        for name, peer in PEERS.items():
            if name in sections and name in self.peers:
                chosen[name] = lambda peer=peer: peer(self.problem, self._known())  # type: ignore[misc]
        return chosen

    def _facts(self) -> Row:
        with torch.no_grad():
            logits = [(self.problem.model(x), y) for x, y in self.problem.batches]
        accuracy = statistics.mean(float((z.argmax(1) == y).float().mean()) for z, y in logits)
        loss = statistics.mean(float(self.problem.criterion(z, y)) for z, y in logits)
        return {"num_parameters": self.problem.num_parameters, "loss": loss, "accuracy": accuracy}

    def _with_errors(self, row: Row) -> Row:
        """Compare with the reference: relative errors, and the distance of the density over the largest eigenvalue."""
        density, exact = row.pop("density_grid", None), self.cell.get("oracle")
        if exact is None:
            return row
        if len(row.get("eigenvalues", ())) == self.problem.num_eigenvalues:
            pairs = zip(sorted(row["eigenvalues"], reverse=True), exact["eigenvalues"], strict=True)
            row["eigenvalues_off"] = max(abs(found / right - 1) for found, right in pairs)
        if "trace" in row:
            row["trace_off"] = row["trace"] / exact["trace"] - 1
        if density is not None:
            row["density_distance"] = density_distance(exact, *density)
        return row

    def _known(self) -> Row:
        """Return our results, which the peers use and are compared with.

        Raises:
            SystemExit: If they were not measured yet.
        """
        if "ours" not in self.cell or "budget" not in self.cell:
            raise SystemExit("--only: expected the sections ours and budget in the file of --out. Run these first.")
        ours: Row = self.cell["ours"]
        return ours | {"trace_vectors": self.cell["budget"]["trace_vectors"]}

    def _operator(self, problem: Problem) -> HessianOperator:
        return HessianOperator(problem.model, problem.loss, problem.batches, graph_memory=self.graph_memory)

    def _costs(self, rounds: int) -> Row:
        """Measure one product of each candidate, in units of a plain gradient of the same round."""
        own = self.problem.apart()
        vector = torch.randn(own.num_parameters, generator=torch.Generator().manual_seed(own.seed))
        with analysis_mode(own.model, own.seed):
            operator = self._operator(own)
            calls, errors = unit_products(self.problem, self.peers)
            candidates: dict[str, Callable[[], object]] = {
                "gradient": self.problem.gradient,
                "ours": partial(operator.matvec, vector),
                **calls,
            }
            times = interleaved_cpu_seconds(candidates, max(rounds, 3))
            exact = self.problem.product(vector)
            difference = float((operator.matvec(vector) - exact).norm() / exact.norm())
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        found: Row = {"cpu_s": times, "median_cpu_s": medians, "our_mode": operator.mode, "errors": errors}
        ratios = {
            name: statistics.median(s / g for s, g in zip(seconds, times["gradient"], strict=True))
            for name, seconds in times.items()
        }
        found |= {"gradients": ratios, "our_difference_from_double_backward": difference}
        unused = [p for p in self.problem.model.parameters() if not p.requires_grad]
        if unused:
            found["errors_with_unused_parameters"] = self._with_unused_parameters()
        return found

    def _with_unused_parameters(self) -> dict[str, str]:
        """Return the errors of candidates when parameters without an effect on the loss are trainable."""
        own = self.problem.apart()
        own.model.requires_grad_(True)
        return unit_products(own, self.peers)[1]

    def _ours(self) -> Row:
        """Measure our full analysis, the same without density, and the top eigenvectors alone."""
        own = self.problem.apart()
        start = time.process_time()
        result, peak = with_peak_resident(
            lambda: sharpness(
                own.model,
                own.loss,
                own.batches,
                num_eigenvalues=own.num_eigenvalues,
                tolerance=own.tolerance,
                trace_tolerance=own.trace_tolerance,
                graph_memory=self.graph_memory,
                keep_eigenvectors=True,
                seed=own.seed,
            )
        )
        row: Row = {"cpu_s": time.process_time() - start, "peak_bytes": peak}
        row |= {"products": result.num_products, "num_probes": result.num_probes}
        start = time.process_time()
        top_eigenvectors(own.model, own.loss, own.batches, num_eigenvectors=own.num_eigenvalues, seed=own.seed)
        row["top_cpu_s"] = time.process_time() - start
        start = time.process_time()
        without = sharpness(
            own.model,
            own.loss,
            own.batches,
            trace_tolerance=own.trace_tolerance,
            density=False,
            graph_memory=self.graph_memory,
            seed=own.seed,
        )
        row |= {"without_density_cpu_s": time.process_time() - start, "without_density_products": without.num_products}
        row |= {"top_products": without.num_steps, "num_steps": without.num_steps}
        assert result.eigenvectors is not None and result.density is not None
        row |= {
            "lanczos_steps": result.num_steps,
            "eigenvalues": list(result.eigenvalues),
            "reported_residuals": list(result.residuals),
            "residuals": self.problem.residuals(list(result.eigenvalues), list(result.eigenvectors)),
            "trace": result.trace,
            "trace_stderr": result.trace_stderr,
            "frobenius_norm": result.frobenius_norm,
            "graph_mode": result.graph_mode,
            "density_grid": (result.density.grid, result.density.values),
        }
        return row

    def _budget(self) -> Row:
        """Find the number of test vectors for the peers' traces, without counting its cost.

        Their standard error is to be the tolerance, and in a second count that which our trace reached.
        """
        own, ours = self.problem.apart(), self.cell["ours"]
        requested = own.trace_tolerance * scale_of(ours)
        reached = min(requested, ours["trace_stderr"])
        with analysis_mode(own.model, own.seed):
            operator = self._operator(own)
            budget = trace_budget(operator.matvec, own.num_parameters, requested, seed=own.seed)
            fewest = budget.count
            while budget.estimate()[1] > reached and budget.count < _MOST_VECTORS:
                budget.add()
        trace, stderr = budget.estimate()
        return {
            "trace_vectors_as_requested": fewest,
            "trace_vectors": budget.count,
            "reached": stderr <= reached,
            "xtrace": trace,
            "xtrace_stderr": stderr,
            "hutchinson": budget.hutchinson,
        }


def _median(runs: list[Row]) -> Row:
    """Return the first run with the medians of the times over all runs, and all times."""
    row = dict(runs[0])
    for key in [key for key in row if key.endswith("cpu_s")]:
        row[key] = statistics.median(run[key] for run in runs)
    return row | {"cpu_s_rounds": [run["cpu_s"] for run in runs]}
