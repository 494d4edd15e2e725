"""Fingerprints of tensors."""

import torch

from moe_heads.analysis._shared.digest import digest_of, digest_of_rows


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
