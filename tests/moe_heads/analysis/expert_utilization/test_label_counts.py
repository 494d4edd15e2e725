"""Counts of labels, equal for every division of the batches among ranks."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_heads.analysis.expert_utilization.label_counts import LabelCounts
from moe_heads.analysis.expert_utilization.labels import BatchLabels, NoClasses

BATCHES = st.lists(st.one_of(st.none(), st.lists(st.integers(-3, 5), max_size=6)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(BATCHES, st.integers(0, 6))
def test_counts_of_all_batches_and_ranks(batches: list[list[int] | None], split: int) -> None:
    read = [BatchLabels(None if batch is None else torch.tensor(batch, dtype=torch.int64)) for batch in batches]
    sized = [(labels, 0 if labels.values is None else len(labels.values)) for labels in read]
    whole = LabelCounts.of(sized)
    ranks = LabelCounts.of(sized[:split]).merged([LabelCounts.of(sized[split:])])
    expected = Counter(label for batch in batches if batch is not None for label in batch)
    for counts in (whole, ranks):
        assert dict(zip(counts.values.tolist(), counts.counts.tolist(), strict=True)) == expected
        assert counts.num_unlabeled == sum(batch is None for batch in batches)
        assert counts.num_batches == len(batches)
        assert counts.per_sample


def test_labels_of_samples_and_of_tokens() -> None:
    of_samples, of_tokens = BatchLabels(torch.arange(4)), BatchLabels(torch.zeros(4, 2, dtype=torch.int64))
    assert LabelCounts.of([(of_samples, 4)]).per_sample
    assert LabelCounts.of([(of_samples, None)]).per_sample
    assert not LabelCounts.of([(of_samples, 3)]).per_sample
    assert not LabelCounts.of([(of_samples, 4), (of_tokens, 4)]).per_sample


def test_the_first_problem_is_kept() -> None:
    first, second = NoClasses("first"), NoClasses("second")
    assert LabelCounts.of([(BatchLabels(problem=p), 1) for p in (None, first, second)]).problem == first
