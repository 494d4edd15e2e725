"""Evaluation of the sharpness benchmark: extrapolations, comparison with the targets, and the table."""

from collections.abc import Iterator

from bench.hessian_problem import Row
from bench.trace_budget import hutchinson_samples_needed

__all__ = ["asides", "extrapolated", "scale_of", "table", "verdicts"]

# Description, key of the value, bound, and whether the bound is a lower one.
_BOUNDS = (
    ("largest true residual of our top 5", "residual", 1e-3, False),
    ("standard error of our trace, share of its scale", "stderr", 0.05, False),
    ("products for all", "products", 64, False),
    ("CPU time of PyHessian as shipped, times ours", "pyhessian", 1.0, True),
    ("CPU time of PyHessian at equal accuracy, times ours", "equal", 4.0, True),
    ("CPU time of curvlinops and scipy, same results, times ours", "curvlinops", 4.0, True),
    ("the same, with the trace as accurate as was requested", "curvlinops_requested", 4.0, True),
    ("CPU time of curvlinops and scipy, top 5 alone, times ours", "curvlinops_top", 4.0, True),
    ("CPU time of hessian-eigenthings, same results, times ours", "eigenthings", 1.0, True),
    ("CPU time of Landscaper as shipped, times ours", "landscaper", 1.0, True),
)

# Parts of a measurement that may fail.
_PARTS = ("setup", "eigen", "trace", "density")

# Errors against the reference, and their format.
_ERRORS = (("eigenvalues_off", ".1e"), ("trace_off", "+.1%"), ("density_distance", ".4f"))

_ROWS = ("ours", "pyhessian", "equal", "curvlinops", "eigenthings", "landscaper")


def scale_of(ours: Row) -> float:
    """Return the scale of the trace, to which its standard errors are relative."""
    return max(abs(float(ours["trace"])), float(ours["frobenius_norm"]))


def extrapolated(cell: Row, trace_tolerance: float) -> Row:
    """Extrapolate PyHessian's cost for our accuracy: its eigenvalues at equal accuracy, and enough trace samples.

    The number of samples follows from the variance of Hutchinson's samples, of PyHessian and of the budget's test
    vectors, which have the same distribution. If its eigenvalues were not run to equal accuracy, or did not reach it,
    their cost as shipped is a lower bound.
    """
    shipped, budget = cell.get("pyhessian", {}), cell.get("budget", {})
    if "trace_samples" not in shipped or "hutchinson" not in budget:
        return {}
    samples = [*shipped["trace_samples"], *budget["hutchinson"]]
    needed = hutchinson_samples_needed(samples, trace_tolerance * scale_of(cell["ours"]))
    eigen = cell["equal"] if cell.get("equal", {}).get("reached") else shipped
    per_product = shipped["trace_cpu_s"] / shipped["trace_products"]
    found: Row = {
        "basis": "extrapolated: variance of the samples times the measured CPU time of a product",
        "eigenvalues": "as shipped, less accurate: a lower bound" if eigen is shipped else "measured",
        "variance_from_samples": len(samples),
        "trace_products": needed,
        "trace_cpu_s": needed * per_product,
        "products": needed + eigen["eigen_products"],
        "cpu_s": needed * per_product + eigen["eigen_cpu_s"],
    }
    units = cell.get("costs", {}).get("gradients", {})
    if "pyhessian_one_batch" in units:  # PyHessian keeps the graph if all samples fit into one batch
        ratio = units["pyhessian_one_batch"] / units["pyhessian"]
        found["cpu_s_in_one_batch"] = ratio * found["cpu_s"]
        found["as_shipped_cpu_s_in_one_batch"] = ratio * shipped["cpu_s"]
    return found


def verdicts(cell: Row) -> list[Row]:
    """Return each target with its value, whether it is met, and whether the value is an extrapolation."""
    values = _values(cell)
    found: list[Row] = []
    for what, key, bound, at_least in _BOUNDS:
        if key not in values:
            continue
        value = values[key]
        row: Row = {"what": what, "value": value, "target": f"{'at least' if at_least else 'at most'} {bound:g}"}
        if isinstance(value, str):
            row["met"] = None
        else:
            row["met"] = bool(value >= bound if at_least else value <= bound)
        found.append(row | ({"extrapolated": True} if key == "equal" else {}))
    return found


def asides(cell: Row) -> dict[str, float]:
    """Return ratios of CPU time to ours without a target."""
    if "ours" not in cell:
        return {}
    ratios = {}
    ours, shipped = cell["ours"], cell.get("pyhessian", {})
    if shipped and not _failed(shipped):
        name = "PyHessian as shipped, times ours without a density"
        ratios[name] = (shipped["eigen_cpu_s"] + shipped["trace_cpu_s"]) / ours["without_density_cpu_s"]
    row = cell.get("curvlinops", {})
    if row and not _failed(row):
        seconds = row["eigen_cpu_s"] + row["trace_cpu_s"]
        ratios["curvlinops and scipy, times ours, both without a density"] = seconds / ours["without_density_cpu_s"]
    kinder = {}
    for peer in ("curvlinops", "eigenthings"):
        row = cell.get(peer, {})
        if row and not _failed(row):
            kinder[f"{peer} without its density, times ours with it"] = row["eigen_cpu_s"] + row["trace_cpu_s"]
    for key, what in (("as_shipped_cpu_s", "as shipped"), ("cpu_s", "at equal accuracy")):
        if f"{key}_in_one_batch" in cell.get("extrapolated", {}):
            name = f"PyHessian {what}, extrapolated to all samples in one batch whose graph it keeps, times ours"
            kinder[name] = cell["extrapolated"][f"{key}_in_one_batch"]
    ratios |= {name: seconds / ours["cpu_s"] for name, seconds in kinder.items()}
    return {f"CPU time of {name}": ratio for name, ratio in ratios.items()}


def table(name: str, cell: Row) -> Iterator[str]:
    """Format the results of a cell for the terminal.

    Yields:
        Lines of text.
    """
    facts = cell["net"]
    yield (
        f"\n{name}: {facts['num_parameters']:,} parameters, loss {facts['loss']:.3f}, accuracy {facts['accuracy']:.3f}"
    )
    if "costs" in cell:
        units = "  ".join(f"{key} {value:.2f}" for key, value in cell["costs"]["gradients"].items())
        yield f"one product, in gradients of {cell['costs']['median_cpu_s']['gradient']:.3f} s: {units}"
        for kind in ("errors", "errors_with_unused_parameters"):
            for peer, error in cell["costs"].get(kind, {}).items():
                yield f"  {kind.replace('_', ' ')}: {peer}: {error}"
    present = [key for key in _ROWS if key in cell]
    if present:
        names = f"{'MiB':>7}{'residual':>10}{'missed':>7}{'λ off':>10}{'trace off':>10}{'density':>10}  failed"
        yield f"{'':22}{'products':>9}{'CPU s':>10}{'gradients':>10}{names}"
    for key in present:
        yield _line(key, cell[key])
    if cell.get("extrapolated"):
        row = cell["extrapolated"]
        remark = f"trace extrapolated, eigenvalues {row['eigenvalues']}"
        yield f"{'PyHessian, equal':22}{row['products']:>9}{row['cpu_s']:>10.1f}  {remark}"
    if "budget" in cell:
        reached = "" if cell["budget"]["reached"] else ": not enough, their traces may be less accurate than ours"
        yield f"test vectors for the traces of curvlinops and eigenthings: {cell['budget']['trace_vectors']}{reached}"
    for row in cell.get("verdicts", []):
        value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.3g}"
        mark = {True: "met", False: "MISSED", None: "no comparison"}[row["met"]]
        yield f"  {mark:14}{row['what']}: {value} ({row['target']}{', extrapolated' if 'extrapolated' in row else ''})"
    for what, number in cell.get("asides", {}).items():
        yield f"  {'no target':14}{what}: {number:.3g}"


def _values(cell: Row) -> dict[str, float | str]:
    values: dict[str, float | str] = {}
    ours = cell.get("ours")
    if "costs" in cell:
        values["unit"] = cell["costs"]["gradients"]["ours"]
    if ours is None:
        return values
    values["residual"], values["stderr"] = max(ours["residuals"]), ours["trace_stderr"] / scale_of(ours)
    values["products"] = ours["products"]
    for peer in ("pyhessian", "curvlinops", "eigenthings", "landscaper"):
        if peer in cell:
            values[peer] = _failed(cell[peer]) or cell[peer]["cpu_s"] / ours["cpu_s"]
    if not _failed(cell.get("curvlinops", {"eigen_error": ""})):
        row = cell["curvlinops"]
        values["curvlinops_top"] = row["eigen_cpu_s"] / ours["top_cpu_s"]
        trace = row["trace_cpu_s"] / row["trace_products"] * 2 * cell["budget"]["trace_vectors_as_requested"]
        values["curvlinops_requested"] = (row["eigen_cpu_s"] + trace + row["density_cpu_s"]) / ours["cpu_s"]
    if cell.get("extrapolated"):
        values["equal"] = cell["extrapolated"]["cpu_s"] / ours["cpu_s"]
    return values


def _failed(row: Row) -> str:
    """Name the failed parts of the comparison; PyHessian's density always fails and does not count."""
    failed = [part for part in _PARTS if f"{part}_error" in row]
    return f"{', '.join(failed)} failed" if set(failed) - {"density"} else ""


def _line(key: str, row: Row) -> str:
    residual = f"{max(row['residuals']):.1e}" if "residuals" in row else "-"
    errors = [f"{row[name]:{kind}}" if name in row else "-" for name, kind in _ERRORS]
    failed = "; ".join(f"{part}: {row[f'{part}_error']}"[:90] for part in _PARTS if f"{part}_error" in row)
    gradients = row["cpu_s"] / row["gradient_cpu_s"]
    name = {"equal": "PyHessian, continued"}.get(key, key)
    costs = f"{row['products']:>9}{row['cpu_s']:>10.1f}{gradients:>10.0f}{row.get('peak_bytes', 0) / 2**20:>7.0f}"
    return f"{name:22}{costs}{residual:>10}{row.get('missed', '-'):>7}{''.join(f'{e:>10}' for e in errors)}  {failed}"
