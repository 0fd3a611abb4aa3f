"""Splits are disjoint, complete, stratified and the same everywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.data import subset
from cactus_ray.data.splits import hold_out, stratified


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 500), share=st.floats(0, 1), seed=st.integers(0, 5))
def test_hold_out_partitions(n: int, share: float, seed: int) -> None:
    kept, held = hold_out(n, int(share * n), seed)
    assert len(held) == int(share * n)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(n))
    assert np.array_equal(kept, np.sort(kept))


@settings(deadline=None, max_examples=30)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=300))
def test_stratified_takes_the_same_share_of_every_class(labels: list[int]) -> None:
    array = np.array(labels)
    test, selection, train = stratified(array, (0.2, 0.16))
    assert np.array_equal(np.sort(np.concatenate([test, selection, train])), np.arange(len(array)))
    for label in set(labels):
        n = int((array == label).sum())
        assert (array[test] == label).sum() == round(0.2 * n)
        assert (array[selection] == label).sum() == round(0.16 * n)


def test_subset_is_fixed_sorted_and_nested() -> None:
    small, large = subset(1000, 10), subset(1000, 100)
    assert torch.equal(small, subset(1000, 10))
    assert torch.equal(small, small.unique())
    assert small.dtype == torch.int64
    assert torch.isin(small, large).all()
    assert not torch.equal(small, subset(1000, 10, seed=1))


@pytest.mark.parametrize("count", [None, 7, 8])
def test_subset_of_all(count: int | None) -> None:
    assert subset(7, count).tolist() == list(range(7))
