"""Heads: from features to logits, as pure functions over T tasks at once.

Shapes: T tasks, n examples (padded to the largest task, label -1), C classes (padded to the most ways), d features.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

__all__ = [
    "class_mask",
    "class_weights",
    "cosine_logits",
    "cross_entropy_per_task",
    "leave_one_out_logits",
    "membership",
]


def membership(labels: Tensor, ways: int) -> Tensor:
    """Return (T, n, C) int64, 1 where an example is in a class; a padded example (label -1) is in none."""
    return one_hot(labels.clamp(min=0), ways) * (labels >= 0)[..., None]


def class_mask(ways: Tensor) -> Tensor:
    """Return (T, C) bool, whether a task has that class, from its number of ways (T,)."""
    return torch.arange(int(ways.max()), device=ways.device) < ways[:, None]


def class_sums(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Return (T, C, d), the sum of each class's features (T, n, d)."""
    return torch.einsum("tnd,tnc->tcd", features, membership(labels, ways).to(features.dtype))


def class_weights(features: Tensor, labels: Tensor, offset: Tensor) -> Tensor:
    """Return (T, C, d): each class's normalised prototype plus its offset.

    The prototype is the mean feature of the class (Snell et al., 2017); its norm does not matter to a cosine, so
    the sum does. The offset, adapted by the inner loop from 0, starts the head at the prototypes, as ProtoMAML
    (Triantafillou et al., 2020) does.

    Args:
        features: (T, n, d).
        labels: (T, n), -1 for padding.
        offset: (T, C, d).
    """
    return normalize(class_sums(features, labels, offset.shape[1]), dim=-1) + offset


def cosine_logits(features: Tensor, weights: Tensor, temperature: Tensor, mask: Tensor) -> Tensor:
    """Return (T, n, C) logits ``temperature · cos(f, W_c)``; classes that a task does not have get -inf.

    Args:
        features: (T, n, d), of length 1.
        weights: (T, C, d).
        temperature: scalar factor on the cosine.
        mask: (T, C), False for classes that only pad.
    """
    cosines = torch.einsum("tnd,tcd->tnc", features, normalize(weights, dim=-1))
    return (temperature * cosines).masked_fill(~mask[:, None], -torch.inf)


def leave_one_out_logits(
    features: Tensor, labels: Tensor, offset: Tensor, temperature: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Score support examples against prototypes that do not contain them.

    An example scored against a prototype of which it is part has a loss near zero, which teaches nothing. So its own
    class's prototype is taken without it; an example that is alone in its class has none, and is to be left out.

    Args:
        features: (T, n, d), of length 1.
        labels: (T, n), -1 for padding.
        offset: (T, C, d), added to the normalised prototypes.
        temperature: scalar factor on the cosine.
        mask: (T, C), False for classes that only pad.

    Returns:
        (T, n, C) logits, and (T, n) bool: whether the example counts.
    """
    member = membership(labels, offset.shape[1])
    sums = class_sums(features, labels, offset.shape[1])
    others = torch.einsum("tcd,tnc->tnd", sums, member.to(sums.dtype)) - features
    own_offset = torch.einsum("tcd,tnc->tnd", offset, member.to(offset.dtype))
    class_sizes = member.sum(1)
    counts = (class_sizes[:, None] * member).sum(-1) > 1
    # where nothing is left of a class the direction is undefined: a constant keeps its gradient finite
    others = torch.where(counts[..., None], others, torch.ones_like(others))
    own = temperature * torch.einsum("tnd,tnd->tn", features, normalize(normalize(others, dim=-1) + own_offset, dim=-1))
    logits = cosine_logits(features, normalize(sums, dim=-1) + offset, temperature, mask)
    return torch.where(member.bool(), own[..., None], logits), counts


def cross_entropy_per_task(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return (T,), each task's mean cross entropy over the examples that count; 0 for a task with none.

    Args:
        logits: (T, n, C).
        labels: (T, n), -1 for padding.
        counts: (T, n) bool.
    """
    losses = cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(labels)
    # where, not a product: a padded class can make the loss of an example that does not count infinite
    kept = torch.where(counts, losses, torch.zeros_like(losses))
    total: Tensor = kept.sum(1) / counts.sum(1).clamp(min=1)
    return total
