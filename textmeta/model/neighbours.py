"""Neighbourhood components: how well each row of a support set is told by the rows beside it, whatever the head.

A loss on them draws a row to those of its class that are near, not to all: classes of several clusters may stay so.
"""

import torch
from torch import Tensor

__all__ = ["NEIGHBOUR_TEMPERATURE", "leave_one_out_neighbours"]

NEIGHBOUR_TEMPERATURE = 10.0  # a row of cosine 0.1 less weighs 1 / e


def leave_one_out_neighbours(
    features: Tensor, labels: Tensor, mask: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits (T, n, C) of each support row by all others, and (T, n) bool: whether its class has others.

    Row i has log Σ_j w_j exp(t f_i·f_j) / Σ_j w_j for class c, over its rows j ≠ i, with t = 10; -inf for a class
    without rows.

    Source: Goldberger et al. (2005), "Neighbourhood Components Analysis", eq. 2 and 3; here with cosines, every class
    weighing the same however many rows it has.

    Args:
        features: (T, n, d), of length 1.
        labels: (T, n), -1 for padding.
        mask: (T, C), False for classes that only pad.
        row_weights: (T, n); None is 1 for each row.
    """
    member = torch.nn.functional.one_hot(labels.clamp(min=0), mask.shape[1]) * (labels >= 0)[..., None]
    weights = member.to(features.dtype)
    if row_weights is not None:
        weights = weights * row_weights.to(features.dtype)[..., None]
    others = 1 - torch.eye(labels.shape[1], dtype=features.dtype, device=features.device)
    cosines = features @ features.transpose(1, 2)
    near = others * ((cosines - 1) * NEIGHBOUR_TEMPERATURE).exp()  # no larger than 1
    of_class = others @ weights  # (T, n, C)
    has_others = of_class > 0
    means = (near @ weights) / torch.where(has_others, of_class, 1.0)
    logits = NEIGHBOUR_TEMPERATURE + torch.where(has_others, means, 1.0).log()
    counts = (has_others & member.bool()).any(-1)
    there = mask & member.any(1)
    return logits.masked_fill(~there[:, None], -torch.inf), counts
