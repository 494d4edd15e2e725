"""Fingerprints of functions."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from moe_heads.analysis._shared.function_identity import code_of


def wrapped(function: Callable[..., Any], factor: float = 1.0) -> Callable[..., Any]:
    return lambda x: factor * function(x)


class Called:
    def __call__(self, x: float) -> float:
        return x

    def method(self, x: float) -> float:
        return x + 1


def test_the_same_code_is_the_same_wherever_it_is_written() -> None:
    functions: list[dict[str, Any]] = [{}, {}]
    exec("def f(x):\n    return x in {'a', 'b', 'c'}", functions[0])
    exec("\n\n# a comment\ndef f(x):\n    return x in {'a', 'b', 'c'}", functions[1])
    one, other = (code_of(known["f"]) for known in functions)
    assert one == other
    program = "from moe_heads.analysis._shared.function_identity import code_of\n"
    program += "def f(x):\n    return x in {'a', 'b', 'c'}\nprint(code_of(f).hex())"
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == one.hex()


def test_other_code_is_another() -> None:
    functions = [abs, lambda x: x, lambda x: 2 * x, lambda x: 3 * x, lambda x: [y + 1 for y in x], None]
    functions += [lambda x: [y + 2 for y in x], Called(), Called().method]
    assert len({code_of(function) for function in functions}) == len(functions)
    assert code_of(Called()) == code_of(Called())
    assert code_of(partial(functions[1])) == code_of(functions[1])


def test_what_a_wrapper_closes_over_counts_where_it_is_a_function() -> None:
    assert code_of(wrapped(lambda x: x)) != code_of(wrapped(lambda x: x + 1))
    assert code_of(wrapped(Called().method)) != code_of(wrapped(lambda x: x))
    assert code_of(wrapped(abs, 1.0)) == code_of(wrapped(abs, 2.0))


def test_a_function_may_close_over_itself() -> None:
    def count(n: int) -> int:
        return count(n - 1) if n else 0

    assert code_of(count) == code_of(count)
