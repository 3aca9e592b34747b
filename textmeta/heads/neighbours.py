"""The loss of the inner loop: how well each support text is told by the texts beside it."""

import torch
from torch import Tensor

from textmeta.heads.common import Examples


def with_company(examples: Examples) -> Examples:
    """Return the examples that others of their class can tell; none where fewer than two classes have two."""
    rows = examples.member * (examples.weights > 0).to(examples.member.dtype)[..., None]
    several = torch.einsum("tnc,tc->tn", rows, rows.sum(1)) >= 2
    told = examples.weighted(several.to(examples.weights.dtype))
    return told.weighted((told.present.sum(1, keepdim=True) >= 2).to(told.weights.dtype))


def neighbourhood_loss(
    views: Tensor, examples: Examples, told: Examples, view_weights: Tensor, scale: Tensor
) -> Tensor:
    """Return (T,) the loss of neighbourhood components; log C₁ where neighbours tell nothing.

    Each text is told by the softmax over the others' cosines, Σ_v w_v u_v · u_v times the scale (). Classes weigh alike
    in the vote and in the mean. All examples vote; those that are told (:func:`with_company`) have company, without any
    of them the loss is 0. Views (T, n, V, d) are of length 1, not centred, and their weights (V,) positive, their sum
    1.

    Source: Goldberger et al. (2005), "Neighbourhood Components Analysis", eq. 2 and 3, with cosines.
    """
    if not views.shape[1]:
        return views.sum((1, 2, 3))  # 0
    cosines = torch.einsum("tnvd,v,tmvd->tnm", views, view_weights, views)
    others = examples.weights[:, None] * (1 - torch.eye(views.shape[1], dtype=views.dtype, device=views.device))
    near = ((cosines - 1) * scale).masked_fill(others == 0, -torch.inf)
    # relative to the nearest, so that a large scale does not make all votes 0
    nearest = near.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(near.dtype).min)
    votes = others * (near - nearest).exp()
    weights = others @ examples.member  # (T, n, C): how much the others of each class count
    means = (votes @ examples.member) / torch.where(weights > 0, weights, 1.0)
    log_means = means.clamp(min=torch.finfo(means.dtype).tiny).log().masked_fill(weights == 0, -torch.inf)
    counts = told.weights > 0
    log_means = torch.where(counts[..., None], log_means, 0.0)
    likelihood = (examples.member * torch.where(examples.member > 0, log_means, 0.0)).sum(-1) - log_means.logsumexp(-1)
    total = torch.where(told.total > 0, told.total, 1.0)[:, None]
    return -(told.balanced / total * torch.where(counts, likelihood, 0.0)).sum(1)
