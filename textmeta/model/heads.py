"""Heads: from features to logits, as pure functions over T tasks at once, and the table :data:`HEADS`.

Shapes: T tasks, n examples (padded to the largest task, label -1), C classes (padded to the most ways), d features.
``scalars`` are the learned numbers of the head: ``temperature``, one or (T,), and those of its row in the table.
``row_weights`` say how much each row of the support set weighs in its class, positive numbers; None is 1 for each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from textmeta.model.readout import READOUT_STARTS, leave_one_out_readout, readout_weights
from textmeta.model.ridge import dual_ridge

__all__ = [
    "HEADS",
    "Head",
    "class_mask",
    "class_weights",
    "cosine_logits",
    "cross_entropy_per_task",
    "leave_one_out_logits",
    "leave_one_out_readout_logits",
    "leave_one_out_ridge_logits",
    "linear_logits",
    "membership",
    "name_weights",
    "ridge_weights",
]


@dataclass(frozen=True)
class Head:
    """A row of :data:`HEADS`: how support features become a classifier.

    Args:
        weights: (features, labels, offset, scalars, row_weights) → (T, C, d), a weight vector a class.
        logits: (features, weights, scalars, mask) → (T, n, C), -inf for classes that only pad.
        support_logits: (features, labels, offset, scalars, mask, row_weights) → (T, n, C) logits of each support row by
            the weights that the others give, and (T, n) bool, whether it can count: one alone in its class cannot.
        starts: positive numbers of its own that it learns, before they are learned.
    """

    weights: Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor], Tensor | None], Tensor]
    logits: Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor], Tensor]
    support_logits: Callable[
        [Tensor, Tensor, Tensor, Mapping[str, Tensor], Tensor, Tensor | None], tuple[Tensor, Tensor]
    ]
    starts: Mapping[str, float] = field(default_factory=dict)


def membership(labels: Tensor, ways: int) -> Tensor:
    """Return (T, n, C) int64, 1 where an example is in a class; a padded example (label -1) is in none."""
    return one_hot(labels.clamp(min=0), ways) * (labels >= 0)[..., None]


def class_mask(ways: Tensor) -> Tensor:
    """Return (T, C) bool, whether a task has that class, from its number of ways (T,)."""
    return torch.arange(int(ways.max()), device=ways.device) < ways[:, None]


def name_weights(is_name: Tensor | None, scalars: Mapping[str, Tensor]) -> Tensor | None:
    """Return the (T, n) row weights of a support set with names: 1 for an example, the learned κ for a class's name.

    So a prototype is p_c ∝ Σ_{i∈c} f_i + κ ℓ_c, with ℓ_c the feature of the name, as if it were κ examples.

    Args:
        is_name: (T, n) bool; None where no task has names.
        scalars: with the name weight κ.
    """
    return None if is_name is None else torch.where(is_name, scalars["name_weight"], 1.0)


def class_sums(features: Tensor, labels: Tensor, ways: int, row_weights: Tensor | None = None) -> Tensor:
    """Return (T, C, d), the weighted sum of each class's features (T, n, d)."""
    return torch.einsum("tnd,tnc->tcd", _weighted(features, row_weights), membership(labels, ways).to(features.dtype))


def class_weights(
    features: Tensor,
    labels: Tensor,
    offset: Tensor,
    scalars: Mapping[str, Tensor],
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return (T, C, d): each class's normalised prototype plus its offset.

    The prototype is the mean feature of the class (Snell et al., 2017); its norm does not matter to a cosine, so
    the sum does. The offset, adapted by the inner loop from 0, starts the head at the prototypes, as ProtoMAML
    (Triantafillou et al., 2020) does.

    Args:
        features: (T, n, d).
        labels: (T, n), -1 for padding.
        offset: (T, C, d).
        scalars: not used.
        row_weights: (T, n); None is 1 for each row.
    """
    return _directions(class_sums(features, labels, offset.shape[1], row_weights)) + offset


def cosine_logits(features: Tensor, weights: Tensor, scalars: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Return (T, n, C) logits ``temperature · cos(f, W_c)``; classes that a task does not have get -inf.

    Args:
        features: (T, n, d), of length 1.
        weights: (T, C, d).
        scalars: with the temperature, a factor on the cosine.
        mask: (T, C), False for classes that only pad.
    """
    cosines = torch.einsum("tnd,tcd->tnc", features, _directions(weights))
    return _warmed(cosines, scalars).masked_fill(~mask[:, None], -torch.inf)


def leave_one_out_logits(
    features: Tensor,
    labels: Tensor,
    offset: Tensor,
    scalars: Mapping[str, Tensor],
    mask: Tensor,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score support rows against prototypes that do not contain them.

    An example scored against a prototype of which it is part has a loss near zero, which teaches nothing. So its own
    class's prototype is taken without it; an example that is alone in its class has none, and is to be left out.

    Args:
        features: (T, n, d), of length 1.
        labels: (T, n), -1 for padding.
        offset: (T, C, d), added to the normalised prototypes.
        scalars: with the temperature, a factor on the cosine.
        mask: (T, C), False for classes that only pad.
        row_weights: (T, n); None is 1 for each row.

    Returns:
        (T, n, C) logits, and (T, n) bool: whether the row has others in its class, and so can count.
    """
    member = membership(labels, offset.shape[1])
    sums = class_sums(features, labels, offset.shape[1], row_weights)
    others = torch.einsum("tcd,tnc->tnd", sums, member.to(sums.dtype)) - _weighted(features, row_weights)
    own_offset = torch.einsum("tcd,tnc->tnd", offset, member.to(offset.dtype))
    counts = _has_company(member)
    others = torch.where(counts[..., None], others, torch.ones_like(others))
    own = torch.einsum("tnd,tnd->tn", features, _directions(_directions(others) + own_offset))
    logits = cosine_logits(features, _directions(sums) + offset, scalars, mask)
    return torch.where(member.bool(), _warmed(own, scalars)[..., None], logits), counts


def ridge_weights(
    features: Tensor,
    labels: Tensor,
    offset: Tensor,
    scalars: Mapping[str, Tensor],
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return (T, C, d): the ridge regression of one-hot labels on features, W = Yᵀ (XXᵀ + λI)⁻¹ X, plus the offset.

    Of weighted rows, X and Y are the features and targets times the root of each row's weight.

    Source: Bertinetto et al. (2019), "Meta-learning with differentiable closed-form solvers" (R2-D2), section 3.

    Args:
        features: (T, n, d), zeros for padding.
        labels: (T, n), -1 for padding.
        offset: (T, C, d).
        scalars: with the ridge λ.
        row_weights: (T, n); None is 1 for each row.
    """
    targets = membership(labels, offset.shape[1]).to(features.dtype)
    roots = None if row_weights is None else row_weights.sqrt()
    features, targets = _weighted(features, roots), _weighted(targets, roots)
    coefficients, _ = dual_ridge(features, targets, scalars["ridge"])
    return coefficients.transpose(1, 2) @ features + offset


def linear_logits(features: Tensor, weights: Tensor, scalars: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Return (T, n, C) logits ``temperature · f·W_c``; arguments as for :func:`cosine_logits`."""
    products = torch.einsum("tnd,tcd->tnc", features, weights)
    return _warmed(products, scalars).masked_fill(~mask[:, None], -torch.inf)


def leave_one_out_ridge_logits(
    features: Tensor,
    labels: Tensor,
    offset: Tensor,
    scalars: Mapping[str, Tensor],
    mask: Tensor,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score support rows by ridge regressions that have not seen them.

    With G = (XXᵀ + λI)⁻¹, the regression without example i predicts y_i - (G Y)_i / G_ii for it (the predicted
    residuals of Allen, 1974); of weighted rows this is √w_i times the prediction. Arguments and result as for
    :func:`leave_one_out_logits`.
    """
    member = membership(labels, offset.shape[1])
    targets = member.to(features.dtype)
    roots = None if row_weights is None else row_weights.sqrt()
    coefficients, diagonal = dual_ridge(_weighted(features, roots), _weighted(targets, roots), scalars["ridge"])
    residuals = coefficients / diagonal[..., None]
    left_out = targets - (residuals if roots is None else residuals / roots[..., None])
    products = left_out + torch.einsum("tnd,tcd->tnc", features, offset)
    logits = _warmed(products, scalars).masked_fill(~mask[:, None], -torch.inf)
    return logits, _has_company(member)


def leave_one_out_readout_logits(
    features: Tensor,
    labels: Tensor,
    offset: Tensor,
    scalars: Mapping[str, Tensor],
    mask: Tensor,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score support rows by readouts that have not seen them (:mod:`textmeta.model.readout`).

    Arguments and result as for :func:`leave_one_out_logits`.
    """
    products, counts = leave_one_out_readout(features, labels, offset, scalars, row_weights)
    return _warmed(products, scalars).masked_fill(~mask[:, None], -torch.inf), counts


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


def _directions(vectors: Tensor) -> Tensor:
    """Return vectors scaled to length 1; a zero vector, of a class that only pads, stays 0, with finite derivatives."""
    zero = (vectors == 0).all(-1, keepdim=True)
    return normalize(torch.where(zero, torch.ones_like(vectors), vectors), dim=-1).masked_fill(zero, 0.0)


def _warmed(values: Tensor, scalars: Mapping[str, Tensor]) -> Tensor:
    """Return values (T, …) times the temperature, one for all tasks or (T,)."""
    return scalars["temperature"].view(-1, *[1] * (values.ndim - 1)) * values


def _weighted(rows: Tensor, row_weights: Tensor | None) -> Tensor:
    """Return rows (T, n, …) times their weights (T, n); as they are, if there are none."""
    return rows if row_weights is None else row_weights.to(rows.dtype)[..., None] * rows


def _has_company(member: Tensor) -> Tensor:
    """Return (T, n) bool, whether another row is in the same class, from the membership (T, n, C)."""
    return (member.sum(1, keepdim=True) * member).sum(-1) > 1


HEADS: dict[str, Head] = {
    "prototype": Head(class_weights, cosine_logits, leave_one_out_logits),
    "ridge": Head(ridge_weights, linear_logits, leave_one_out_ridge_logits, {"ridge": 1.0}),
    "readout": Head(readout_weights, linear_logits, leave_one_out_readout_logits, READOUT_STARTS),
}
