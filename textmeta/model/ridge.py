"""Ridge regression of many small tasks at once, in closed form."""

import torch
from torch import Tensor

__all__ = ["dual_ridge"]


def dual_ridge(features: Tensor, targets: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return G Y, (T, n, C), and the diagonal of G, (T, n), with G = (XXᵀ + λI)⁻¹.

    Inverts the smaller of XXᵀ + λI and XᵀX + λI: with fewer examples than features the former is faster and, being no
    difference of almost equal numbers, exact for a small λ too.
    """
    examples, width = features.shape[1:]
    size = min(examples, width)
    identity = torch.eye(size, dtype=features.dtype, device=features.device)
    if examples <= width:
        inverse = torch.linalg.inv(features @ features.transpose(1, 2) + ridge * identity)
        return inverse @ targets, inverse.diagonal(dim1=1, dim2=2)
    projected = features @ torch.linalg.inv(features.transpose(1, 2) @ features + ridge * identity)
    fitted = projected @ (features.transpose(1, 2) @ targets)
    return (targets - fitted) / ridge, (1 - (projected * features).sum(-1)) / ridge
