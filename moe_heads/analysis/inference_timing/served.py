"""Programs that are served instead of the model: exported ones, ONNX Runtime sessions, and other callables."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from moe_heads.analysis._shared.batches import Batch, ForwardFn, call_model, leaves_of
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis.inference_timing.calls import MODEL, Call
from moe_heads.analysis.inference_timing.draws import DrawnRounds
from moe_heads.analysis.inference_timing.measure import first_line
from moe_heads.analysis.inference_timing.rows import Skipped
from moe_heads.analysis.inference_timing.speedup import realized_ratio

__all__ = ["ServedPrograms", "ServedReport", "check_served"]


# Relative difference of outputs above which reduced precision is no explanation.
_ANOTHER = 0.1


@dataclass(frozen=True)
class ServedReport:
    """A program with what it computes.

    Attributes:
        name: Name of its rows.
        kind: Kind of program.
        difference: Largest relative difference of its outputs from those of the model, over all batches that ran.
        speedups: Time of the model divided by that of the program, with the ends of the 95 % sampling interval, by
            batch size.
    """

    name: str
    kind: str
    difference: float
    speedups: Mapping[int, tuple[float, float, float]]

    def __str__(self) -> str:
        times = [
            f"{ratio:.3g} ({low:.3g} to {high:.3g}) at batch size {size}"
            for size, (ratio, low, high) in self.speedups.items()
        ]
        speed = f"speedup over the model {', '.join(times)}; " if times else ""
        other = ": this is another function" if self.difference > _ANOTHER else ""
        return f"{self.name} ({self.kind}): {speed}outputs differ by {self.difference:.2g}{other}"


class ServedPrograms:
    """Programs to time next to the model, on the same batches.

    Args:
        programs: The programs by name; see `check_served`.
        forward_fn: ``forward_fn(program, batch)``, which runs modules and exported programs, and with a function of the
            user all but sessions.
    """

    def __init__(self, programs: Mapping[str, Any], forward_fn: ForwardFn) -> None:
        self._runners: dict[str, tuple[str, Callable[[Batch], Callable[[], object]]]] = {}
        for name, program in programs.items():
            if isinstance(program, (ExportedProgram, nn.Module)):
                is_exported = isinstance(program, ExportedProgram)
                module = program.module() if isinstance(program, ExportedProgram) else program
                kind = "exported program" if is_exported else "module"
                self._runners[name] = kind, partial(_of_module, module, forward_fn)
            elif _is_session(program):
                self._runners[name] = "ONNX Runtime session", partial(_of_session, program)
            else:
                run_of = (
                    partial(_of_callable, program)
                    if forward_fn is call_model
                    else partial(_of_module, program, forward_fn)
                )
                self._runners[name] = type(program).__name__, run_of
        self._differences: dict[str, float] = {}
        self._speedups: dict[str, dict[int, tuple[float, float, float]]] = {}

    def calls(self, size: int, forwards: Sequence[Call]) -> tuple[dict[str, list[Call]], list[Skipped]]:
        """Return the calls of each program on each draw of a batch size, and those that fail at it.

        Args:
            size: Samples of a batch.
            forwards: The forward pass of the model on each draw.
        """
        calls: dict[str, list[Call]] = {}
        skipped: list[Skipped] = []
        references = [_reference(forward) for forward in forwards] if self._runners else []
        for name, (_, run_of) in self._runners.items():
            try:
                calls[name] = [self._checked(name, run_of, *reference) for reference in references]
            except Exception as error:  # of any kind: a program may be made for other shapes
                if is_out_of_memory(error):
                    raise
                skipped.append(Skipped(size, "served", name, first_line(error)))
        return calls, skipped

    def compare(self, size: int, model: DrawnRounds, times: Mapping[str, DrawnRounds], seed: int) -> None:
        """Add the speedups over the model at a batch size.

        Args:
            size: Samples of a batch.
            model: Times of the model.
            times: Times of the programs by name.
            seed: Seed of the bootstrap.
        """
        for name, program in times.items():
            self._speedups.setdefault(name, {})[size] = realized_ratio(model, program, seed)

    def reports(self) -> tuple[ServedReport, ...]:
        """Return the programs that ran."""
        return tuple(
            ServedReport(name, self._runners[name][0], difference, self._speedups.get(name, {}))
            for name, difference in self._differences.items()
        )

    def _checked(
        self, name: str, run_of: Callable[[Batch], Callable[[], object]], batch: Batch, expected: Sequence[Tensor]
    ) -> Call:
        """Return the call of a program, and compare its output with that of the model."""
        run = run_of(own_copy(batch))
        difference = _difference(_values(run()), expected)
        self._differences[name] = max(self._differences.get(name, 0.0), difference)
        return Call(run)


def check_served(served: Any, rows: Sequence[str] = ()) -> None:
    """Check the programs of the option ``served``.

    Args:
        served: Programs by name: `torch.export.ExportedProgram`, modules, ONNX Runtime sessions, and other callables
            such as those of AOTInductor; None for none.
        rows: Names of other rows.

    Raises:
        ValueError: If it is no mapping of names to programs, or a name is that of another row.
    """
    if served is None:
        return
    if not isinstance(served, Mapping):
        raise ValueError(f"served: expected programs by name, such as {{'exported': program}}, got {served!r}.")
    for name, program in served.items():
        if not isinstance(name, str) or not name or name in {MODEL, *rows}:
            taken = f" other than {', '.join(map(repr, (MODEL, *rows)))}" if name in {MODEL, *rows} else ""
            raise ValueError(f"served: expected names{taken}, got {name!r}. Choose another name.")
        if isinstance(program, nn.Module) and any(module.training for module in program.modules()):
            raise ValueError(
                f"served[{name!r}]: expected a module in evaluation mode, got one in training mode. Call its eval()."
            )
        if not (callable(program) or isinstance(program, ExportedProgram) or _is_session(program)):
            raise ValueError(
                f"served[{name!r}]: expected an exported program, an ONNX Runtime session, a module or another"
                f" callable, got {type(program).__name__}. Load it from its file first."
            )


def _is_session(program: Any) -> bool:
    """Return whether a program is an ONNX Runtime session, without an import of that library."""
    return hasattr(program, "get_inputs") and hasattr(program, "run")


def _of_module(module: nn.Module, forward_fn: ForwardFn, batch: Batch) -> Callable[[], object]:
    return partial(forward_fn, module, batch)


def _of_callable(program: Callable[..., object], batch: Batch) -> Callable[[], object]:
    if isinstance(batch, Mapping):
        return partial(program, **batch)
    return partial(program, batch[0] if isinstance(batch, (tuple, list)) else batch)


def _of_session(session: Any, batch: Batch) -> Callable[[], object]:
    """Return a run of a session on arrays that share the memory of the batch on the CPU."""
    names = [each.name for each in session.get_inputs()]
    if isinstance(batch, Mapping):
        tensors = {name: batch[name] for name in names if name in batch}
    else:
        leaves = [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
        tensors = dict(zip(names, leaves, strict=False))
    feeds = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    return partial(session.run, None, feeds)


def _reference(forward: Call) -> tuple[Batch, Sequence[Tensor]]:
    """Return the batch of a forward pass, and the outputs of the model."""
    (((_, batch), _),) = forward.arguments
    expected = _values(forward())
    forward.restore_inputs()
    return batch, expected


def _values(output: Any) -> list[Tensor]:
    """Return the tensors of an output, also of arrays, in float64 on the CPU."""
    tensors = [leaf if isinstance(leaf, Tensor) else _as_tensor(leaf) for leaf in leaves_of(output)]
    return [tensor.detach().to("cpu", torch.float64) for tensor in tensors if tensor is not None]


def _as_tensor(leaf: Any) -> Tensor | None:
    return torch.from_numpy(leaf) if type(leaf).__module__ == "numpy" and hasattr(leaf, "__array_interface__") else None


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the norm of the difference of the first outputs over that of the model's; inf for other shapes and nan."""
    if not found or not expected or found[0].shape != expected[0].shape:
        return math.inf
    size = float(expected[0].norm())
    difference = float((found[0] - expected[0]).norm()) / size if size else float(found[0].norm())
    # nan would be lost among the differences of other batches
    return math.inf if math.isnan(difference) else difference
