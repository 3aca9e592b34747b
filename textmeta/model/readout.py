"""The readout head: prototypes whose length does not tell how many examples they are of, and a ridge regression beside.

W_c = P_c + β R_c. Shapes and names as in :mod:`textmeta.model.heads`.

P_c = m_c / ρ̂_c, with m_c the mean feature of a class and ρ̂_c an estimate of the length of the mean of *all* its texts.
The mean of k features of length 1 is too long by chance, by the more the smaller k is: of one example its length is 1,
whatever the class. So cosines to prototypes favour classes with many examples. The mean cosine of *different* examples
is an unbiased estimate of ρ_c²; that of few pairs is drawn to the task's, and the task's to a typical one.

R_c are the weights of a ridge regression of the labels on the features, every class weighing the same. It separates
classes that prototypes confuse, which pays from some five examples a class on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from textmeta.model.ridge import dual_ridge

__all__ = ["READOUT_STARTS", "leave_one_out_readout", "readout_weights"]

READOUT_STARTS = {"ridge": 0.5, "ridge_weight": 3.0}  # λ and β before they are learned
TASK_PAIRS, TASK_COSINE = 5.0, 0.5  # so many pairs of this cosine are added to those of the task
CLASS_PAIRS = 10.0  # so many pairs of the task's mean cosine are added to those of each class


@dataclass(frozen=True)
class _ClassMoments:
    """Of each class: its weighted sum, its weight, and the sum and the weight of its pairs of different rows."""

    sums: Tensor  # (T, C, d)
    counts: Tensor  # (T, C)
    pair_sums: Tensor  # (T, C)
    pair_counts: Tensor  # (T, C)


def readout_weights(
    features: Tensor,
    labels: Tensor,
    offset: Tensor,
    scalars: Mapping[str, Tensor],
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return (T, C, d), W_c = P_c + β R_c, plus the offset.

    Args:
        features: (T, n, d), of length 1, zeros for padding.
        labels: (T, n), -1 for padding.
        offset: (T, C, d).
        scalars: with the ridge λ and the ridge weight β.
        row_weights: (T, n); None is 1 for each row.
    """
    weights, member = _weights_and_membership(features, labels, offset.shape[1], row_weights)
    moments = _moments(features, member, weights)
    prototypes = _prototypes(moments, _task_cosine(moments))
    design, targets = _balanced(features, member, weights, moments.counts)
    coefficients, _ = dual_ridge(design, targets, scalars["ridge"])
    return prototypes + scalars["ridge_weight"] * coefficients.transpose(1, 2) @ design + offset


def leave_one_out_readout(
    features: Tensor,
    labels: Tensor,
    offset: Tensor,
    scalars: Mapping[str, Tensor],
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return products (T, n, C) of each row with the weights that the others give, and (T, n) bool, whether it counts.

    The ridge's are exact up to the weights of the classes, which are those with the row (the predicted residuals of
    Allen, 1974: y_i - (G Y)_i / G_ii). The task's mean cosine, too, is that with the row.
    """
    weights, member = _weights_and_membership(features, labels, offset.shape[1], row_weights)
    moments = _moments(features, member, weights)
    cosine = _task_cosine(moments)
    products = torch.einsum("tnd,tcd->tnc", features, _prototypes(moments, cosine))
    own = torch.einsum("tnc,tcd->tnd", member, moments.sums) - weights[..., None] * features
    own_products = (features * own).sum(-1)  # with the sum of the class's other rows
    counts = torch.einsum("tnc,tc->tn", member, moments.counts) - weights
    pair_sums = torch.einsum("tnc,tc->tn", member, moments.pair_sums) - 2 * weights * own_products
    pair_counts = torch.einsum("tnc,tc->tn", member, moments.pair_counts) - 2 * weights * counts
    has_company = (labels >= 0) & (torch.einsum("tnc,tc->tn", member, member.sum(1)) > 1)
    counts = torch.where(has_company, counts, 1.0)
    left_out = own_products / counts / _length(pair_sums, pair_counts, cosine)
    products = torch.where(member.bool(), left_out[..., None], products)

    design, targets = _balanced(features, member, weights, moments.counts)
    coefficients, diagonal = dual_ridge(design, targets, scalars["ridge"])
    scale = (targets * member).sum(-1)  # root of the row's weight in the regression, 0 for padding
    residuals = coefficients / diagonal[..., None]
    ridge = member - residuals / torch.where(scale > 0, scale, 1.0)[..., None]
    with_offset = torch.einsum("tnd,tcd->tnc", features, offset)
    return products + scalars["ridge_weight"] * ridge + with_offset, has_company


def _weights_and_membership(
    features: Tensor, labels: Tensor, ways: int, row_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return row weights (T, n), 0 for padding, and membership (T, n, C), both as numbers."""
    member = torch.nn.functional.one_hot(labels.clamp(min=0), ways).to(features.dtype) * (labels >= 0)[..., None]
    weights = member.sum(-1)
    return weights if row_weights is None else weights * row_weights.to(features.dtype), member


def _moments(features: Tensor, member: Tensor, weights: Tensor) -> _ClassMoments:
    weighted = member * weights[..., None]
    sums = torch.einsum("tnc,tnd->tcd", weighted, features)
    counts, squares = weighted.sum(1), (weighted * weights[..., None]).sum(1)
    return _ClassMoments(sums, counts, sums.square().sum(-1) - squares, counts.square() - squares)


def _task_cosine(moments: _ClassMoments) -> Tensor:
    """Return (T, 1), the mean cosine of different rows of one class."""
    sums, counts = moments.pair_sums.sum(1, keepdim=True), moments.pair_counts.sum(1, keepdim=True)
    return ((sums + TASK_PAIRS * TASK_COSINE) / (counts + TASK_PAIRS)).clamp(min=0.01)


def _length(pair_sums: Tensor, pair_counts: Tensor, cosine: Tensor) -> Tensor:
    """Return ρ̂, the estimated length of a class's mean, from its pairs and the task's mean cosine."""
    return ((pair_sums + CLASS_PAIRS * cosine) / (pair_counts + CLASS_PAIRS)).clamp(min=0.01).sqrt()


def _prototypes(moments: _ClassMoments, cosine: Tensor) -> Tensor:
    """Return P (T, C, d); 0 for classes that only pad."""
    lengths = _length(moments.pair_sums, moments.pair_counts, cosine)
    counts = torch.where(moments.counts > 0, moments.counts, 1.0)
    return moments.sums / (counts * lengths)[..., None]


def _balanced(features: Tensor, member: Tensor, weights: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (T, n, d) and one-hot targets (T, n, C) times the root of each row's weight.

    A row weighs its weight over that of its class, times the mean weight of a class: 1 in a balanced task.
    """
    classes = (counts > 0).sum(1, keepdim=True)
    mean = counts.sum(1, keepdim=True) / classes
    of_class = torch.where(counts > 0, counts, 1.0)
    shares = torch.einsum("tnc,tc->tn", member, mean / of_class) * weights
    # the root of 0, which padding has, has no derivative
    roots = torch.where(shares > 0, torch.where(shares > 0, shares, 1.0).sqrt(), 0.0)
    return roots[..., None] * features, roots[..., None] * member
