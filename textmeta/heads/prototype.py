"""Prototypes: each class's mean centred view, as weights that a text's views are multiplied by."""

import torch
from torch import Tensor

from textmeta.heads.common import Examples
from textmeta.heads.pooling import LENGTH_EPSILON


def prototypes(views: Tensor, mixture: Tensor, examples: Examples) -> Tensor:
    """Return (T, V, d, C) weights by which a text's score for a class is Σ_v w_v cos(z_v, mean of the class's z_v).

    Views z (T, n, V, d) are centred, the mixture w is (T, V); 0 for a class without examples.

    Source: Snell et al. (2017), "Prototypical Networks for Few-shot Learning", here with a cosine a view.
    """
    sums = torch.einsum("tn,tnc,tnvd->tvdc", examples.weights, examples.member, views)
    return mixture[..., None, None] * sums * (sums.square().sum(2, keepdim=True) + LENGTH_EPSILON).rsqrt()
