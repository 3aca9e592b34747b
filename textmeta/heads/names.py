"""Class names: how near a text is to what a class is called, and how much that counts, by what the examples say."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from textmeta.heads.common import Examples, mean_over_classes

MOST_EXAMPLES = 25.0  # more examples than these make evidence no surer


def name_scores(texts: Tensor, names: Tensor, view_weights: Tensor) -> Tensor:
    """Return (T, n, C) s: the cosine of each text's and each name's centred views, Σ_v w_v z_v · name_v.

    Texts are (T, n, V, d), names (T, C, V, d), and the weights (V,) positive, their sum 1.
    """
    return (texts * view_weights[:, None]).flatten(2) @ names.flatten(2).mT


def name_evidence(logits: Tensor, examples: Examples) -> Tensor:
    """Return (T,) E = log C - NLL of the examples by their logits (T, n, C) under the names alone; 0 at zero shots.

    Above 0 names tell the examples. They are not made of these, so this is honest at any number of shots.
    """
    logs = log_softmax(logits.masked_fill(~examples.classes[:, None], -torch.inf), -1)
    nll = mean_over_classes(-logs.gather(-1, examples.member.argmax(-1)[..., None])[..., 0], examples)
    return torch.where(examples.total > 0, examples.classes.sum(1).to(nll).log() - nll, 0.0)


def name_gate(coefficients: Tensor, evidence: Tensor, examples: Examples) -> Tensor:
    """Return (T,) g = exp(b₀ + b₁ E √min(n, 25) + b₂ log k), how much names count beside examples, if there are any."""
    number = torch.where(examples.total > 0, examples.total, 1.0)
    shots = torch.where(examples.total > 0, examples.total / examples.number, 1.0)
    inputs = [torch.ones_like(evidence), evidence * number.clamp(max=MOST_EXAMPLES).sqrt(), shots.log()]
    return (coefficients @ torch.stack(inputs)).exp()
