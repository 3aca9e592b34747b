"""Ridge regression on a mixture of views, in closed form, dual or primal, whichever is smaller."""

import torch
from torch import Tensor

from textmeta.heads.common import Examples, float64, root


def ridge(views: Tensor, mixture: Tensor, examples: Examples, penalty: Tensor) -> Tensor:
    """Return (T, V, d, C) weights W: a text's score for class c is Σ_v z_v · W_vc; 0 for a class without examples.

    The regression of one-hot labels - 1/C₁ with the kernel Σ_v w_v Z_v Z_vᵀ, every class weighing alike, or as much as
    is said of it. Views z (T, n, V, d) are centred, the mixture w is (T, V), the penalty λ > 0.
    """
    return weighted_ridge(views, mixture, examples.targets, examples.row_weights, penalty)


def weighted_ridge(views: Tensor, mixture: Tensor, targets: Tensor, weights: Tensor, penalty: Tensor) -> Tensor:
    """Return (T, V, d, C) as :func:`ridge` does, for any targets (T, n, C) and weights (T, n) ≥ 0."""
    tasks, n, v, d = views.shape
    shares = mixture.clamp(min=1e-12).sqrt()
    design = (views * shares[:, None, :, None]).reshape(tasks, n, v * d)
    if n <= v * d:
        kernel = design @ design.transpose(1, 2)
        solved = design.transpose(1, 2) @ dual_coefficients(kernel, targets, weights, penalty).to(design)
    else:
        solved = primal_weights(design, targets, weights, penalty).to(design)
    return solved.view(tasks, v, d, -1) * shares[:, :, None, None]


def dual_coefficients(kernel: Tensor, targets: Tensor, weights: Tensor, penalty: Tensor) -> Tensor:
    """Return α (…, n, C) = Ω^½ (Ω^½ K Ω^½ + λI)⁻¹ Ω^½ Y in float64, so that weights of 0 are allowed.

    K is the kernel (…, n, n), Y the targets (…, n, C), Ω the diagonal of the weights (…, n) ≥ 0, λ the penalty > 0.
    """
    kernel, targets, weights, penalty = float64(kernel, targets, weights, penalty)
    roots = root(weights)
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    factor = torch.linalg.cholesky(roots[..., :, None] * kernel * roots[..., None, :] + penalty * identity)
    return roots[..., None] * torch.cholesky_solve(roots[..., None] * targets, factor)


def primal_weights(design: Tensor, targets: Tensor, weights: Tensor, penalty: Tensor) -> Tensor:
    """Return (…, D, C) = (XᵀΩX + λI)⁻¹ XᵀΩY in float64, from X (…, n, D); the other arguments as for the dual."""
    design, targets, weights, penalty = float64(design, targets, weights, penalty)
    weighted = (weights[..., None] * design).transpose(-1, -2)
    system = weighted @ design + penalty * torch.eye(design.shape[-1], dtype=design.dtype, device=design.device)
    return torch.cholesky_solve(weighted @ targets, torch.linalg.cholesky(system))
