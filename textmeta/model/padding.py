"""Grouping rows of different lengths so that little work goes into padding."""

import math
from collections.abc import Sequence

__all__ = ["length_buckets"]


def length_buckets(
    lengths: Sequence[int], overhead: int, max_rows: int, max_tokens: float = math.inf
) -> list[list[int]]:
    """Split rows into buckets, each padded to its longest row, at the least total cost.

    The cost of a bucket is ``rows x longest + overhead``; the split of the sorted lengths is the best there is (dynamic
    programming over the distinct lengths), before buckets with too many rows or tokens are cut.

    Args:
        lengths: tokens of each row.
        overhead: what one more forward costs, in tokens.
        max_rows: most rows in a bucket; larger ones are cut.
        max_tokens: most tokens in a bucket of more than one row, with padding; larger ones are cut.

    Returns:
        Lists of row numbers; every row is in exactly one.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    # position in `order` after the last row of each distinct length
    ends = [i + 1 for i in range(len(order)) if i + 1 == len(order) or lengths[order[i]] != lengths[order[i + 1]]]
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}  # rows covered -> (cost, start of the last bucket)
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((cost + (end - start) * longest + overhead, start) for start, (cost, _) in best.items())
    buckets: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        rows = order[start:end]
        cut: list[list[int]] = [[]]
        for row in rows:
            if len(cut[-1]) == max_rows or (cut[-1] and (len(cut[-1]) + 1) * lengths[row] > max_tokens):
                cut.append([])
            cut[-1].append(row)
        buckets = cut + buckets
        end = start
    return buckets
