"""Fingerprints of tensors, values and functions."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from moe_heads.analysis._shared.digest import digest_of, digest_of_code, digest_of_rows


def test_equal_bits_have_equal_digests_and_others_have_others() -> None:
    x = torch.randn(3, 4)
    assert digest_of([x]) == digest_of([x.clone()])
    assert digest_of([x.t()]) == digest_of([x.t().contiguous()])
    different = [
        x + 1e-7,
        x.view(4, 3),
        x.double(),
        x.to(torch.bfloat16),
        x.sign().bool(),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.tensor(1),
        torch.eye(3).to_sparse(),
        torch.zeros(2),
        -torch.zeros(2),
    ]
    digests = [digest_of([tensor]) for tensor in (x, *different)]
    assert len(set(digests)) == len(digests)


def test_order_and_borders_count() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert digest_of([x, y]) != digest_of([y, x])
    assert digest_of([torch.zeros(4)]) != digest_of([x, x])
    assert digest_of([torch.nn.Parameter(x)]) == digest_of([x])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # of torch 2.12
def test_sparse_tensors_and_other_values_count() -> None:
    indices, values = torch.arange(2000).unsqueeze(0), torch.ones(2000)
    one, other = (
        torch.sparse_coo_tensor(indices, v, check_invariants=True)
        for v in (values, values.index_fill(0, torch.tensor(999), 2.0))
    )
    assert digest_of([one]) == digest_of([one.clone()])
    assert digest_of([one]) != digest_of([other])
    assert digest_of(["a", 1, None]) == digest_of(["a", 1, None])
    assert digest_of(["a"]) != digest_of(["b"])
    packed = [torch.nn.utils.rnn.pack_sequence([torch.full((2,), value)]) for value in (1.0, 2.0)]
    assert digest_of(packed[:1]) != digest_of(packed[1:])
    unpicklable = [lambda: 0]
    assert digest_of(unpicklable) != digest_of(unpicklable)


def test_rows_are_the_same_however_they_are_cut() -> None:
    rows = torch.arange(12.0).view(6, 2)
    whole = digest_of_rows([rows])
    assert digest_of_rows(rows.split(4)) == whole
    others = [rows[:5], rows.flip(0), rows.double(), rows.view(12, 1), rows.view(3, 4)]
    assert len({whole, *(digest_of_rows([other]) for other in others)}) == 6


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
    one, other = (digest_of_code(known["f"]) for known in functions)
    assert one == other
    program = "from moe_heads.analysis._shared.digest import digest_of_code\n"
    program += "def f(x):\n    return x in {'a', 'b', 'c'}\nprint(digest_of_code(f).hex())"
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == one.hex()


def test_other_code_is_another() -> None:
    functions: list[Any] = [abs, lambda x: x, lambda x: 2 * x, lambda x: 3 * x, lambda x: [y + 1 for y in x], None]
    functions += [lambda x: [y + 2 for y in x], Called(), Called().method]
    assert len({digest_of_code(function) for function in functions}) == len(functions)
    assert digest_of_code(Called()) == digest_of_code(Called())
    assert digest_of_code(partial(functions[1])) == digest_of_code(functions[1])


def test_what_a_wrapper_closes_over_counts_where_it_is_a_function() -> None:
    assert digest_of_code(wrapped(lambda x: x)) != digest_of_code(wrapped(lambda x: x + 1))
    assert digest_of_code(wrapped(Called().method)) != digest_of_code(wrapped(lambda x: x))
    assert digest_of_code(wrapped(abs, 1.0)) == digest_of_code(wrapped(abs, 2.0))


def test_a_function_may_close_over_itself() -> None:
    def count(n: int) -> int:
        return count(n - 1) if n else 0

    assert digest_of_code(count) == digest_of_code(count)
