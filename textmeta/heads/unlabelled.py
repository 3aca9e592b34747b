"""Unlabelled texts of the same source: soft labels that the classifier gives them, weighed by how sure it is."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from textmeta.heads.common import Examples
from textmeta.heads.ridge import weighted_ridge

ROUNDS = 3


def soft_labelled_ridge(
    weights: Tensor,
    views: Tensor,
    unlabelled: Tensor,
    there: Tensor,
    examples: Examples,
    mixture: Tensor,
    penalty: Tensor,
    share: Tensor,
    scale: Tensor,
    by_name: Tensor,
) -> Tensor:
    """Return the ridge's weights (T, V, d, C) after three rounds of soft labels for the unlabelled texts.

    In each round the classifier of the last one gives probabilities p and confidence c = 1 - H(p) / log C; then the
    ridge is fitted to all texts: unlabelled ones with targets p - 1/C and weights ρ c, labelled ones with one-hot - 1/C
    and weights as before, where there are two classes of them.

    Weights are 0 at first, where no text is labelled. Centred views are (T, n, V, d) of labelled and (T, r, V, d) of
    unlabelled texts, of which ``there`` (T, r) is 0 for padding; the mixture is (T, V), λ the penalty (), ρ the share
    (T,). Logits are the scale (T,) times the scores by weights, and what names add, (T, r, C).
    """
    classes = examples.classes.to(views)
    chance = classes / classes.sum(1, keepdim=True)
    labelled = examples.member - chance[:, None] * (examples.weights > 0).to(views)[..., None]
    both = torch.cat([views, unlabelled], 1)
    several = (examples.present.sum(1, keepdim=True) >= 2).to(views)  # one class alone is nothing to regress on
    some = there.any(1)[:, None, None, None]  # a task without unlabelled texts keeps what it has
    for _ in range(ROUNDS):
        logits = scale[:, None, None] * torch.einsum("trvd,tvdc->trc", unlabelled, weights) + by_name
        probabilities, confidence = soft_labels(logits, examples.classes)
        targets = torch.cat([labelled, there[..., None] * (probabilities - chance[:, None])], 1)
        row_weights = torch.cat([several * examples.row_weights, there * share[:, None] * confidence], 1)
        weights = torch.where(some, weighted_ridge(both, mixture, targets, row_weights, penalty), weights)
    return weights


def soft_labels(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities p (T, r, C) and confidence 1 - H(p) / log C (T, r), from 0 to 1, of logits (T, r, C)."""
    logs = log_softmax(logits.masked_fill(~classes[:, None], -torch.inf), -1).masked_fill(~classes[:, None], 0.0)
    probabilities = logs.exp() * classes[:, None].to(logs)
    entropy = -(probabilities * logs).sum(-1)
    # of one class there is no doubt, and log 1 is 0
    return probabilities, (1 - entropy / classes.sum(1).clamp(min=2).to(logs).log()[:, None]).clamp(min=0)


def unlabelled_weight(coefficients: Tensor, shots: Tensor, examples: Examples, number: Tensor) -> Tensor:
    """Return (T,) ρ, with log ρ = r₀ + r₁ log(1 + k) + r₂ log(1 + r / (n + C)), for r (T,) unlabelled texts."""
    crowd = (number / (examples.total + examples.classes.to(number).sum(1))).log1p()
    return (coefficients @ torch.stack([torch.ones_like(shots), shots, crowd.to(shots)])).exp()
