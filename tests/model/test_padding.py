import itertools

import numpy as np
import pytest

from textmeta.model.padding import length_buckets


def cost(buckets: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(bucket) * max(lengths[row] for row in bucket) + overhead for bucket in buckets)


def best_cost(lengths: list[int], overhead: int) -> int:
    """Try every way to cut the sorted lengths."""
    ordered, best = sorted(lengths), None
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        total, start = 0, 0
        for end in range(1, len(ordered) + 1):
            if end == len(ordered) or cuts[end - 1]:
                total += (end - start) * ordered[end - 1] + overhead
                start = end
        best = total if best is None else min(best, total)
    assert best is not None
    return best


@pytest.mark.parametrize("overhead", [0, 3, 10, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_buckets_are_a_partition_of_least_cost(seed: int, overhead: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 20, size=9).tolist()
    buckets = length_buckets(lengths, overhead, max_rows=100)
    assert sorted(itertools.chain(*buckets)) == list(range(len(lengths)))
    assert cost(buckets, lengths, overhead) == best_cost(lengths, overhead)


def test_large_buckets_are_cut() -> None:
    buckets = length_buckets([5] * 25, overhead=10, max_rows=10)
    assert [len(bucket) for bucket in buckets] == [10, 10, 5]


def test_nothing_makes_no_bucket() -> None:
    assert length_buckets([], overhead=1, max_rows=2) == []
