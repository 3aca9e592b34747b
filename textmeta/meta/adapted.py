"""What the task learner made of an initialisation, and how it scores support sets and queries."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textmeta.meta.tasks import TaskBatch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import Head, class_mask, cross_entropy_per_task
from textmeta.model.neighbours import leave_one_out_neighbours

__all__ = [
    "AdaptedParameters",
    "evidence",
    "informed",
    "left_out",
    "left_out_by_neighbours",
    "left_out_logits",
    "query_logits",
    "support_features",
    "support_log_likelihood",
    "task_weights",
]

EVIDENCE_SHOTS = 10.0  # so many examples that have company say half of what can be said


@dataclass(frozen=True)
class AdaptedParameters:
    """What the task learner made of the initialisation, for T tasks.

    Args:
        factors: every LoRA factor by name; a task's own (T, out, in), shared ones (out, in).
        offset: (T, C, d), the head's.
        scalars: the head's temperature, for all tasks or (T,), name weight, and ridge if it has one.
        head: the head that they are for.
        support_features: (T, n, d), where no factor was adapted and they are known already.
    """

    factors: dict[str, Tensor]
    offset: Tensor
    scalars: dict[str, Tensor]
    head: Head
    support_features: Tensor | None = None

    def with_features(self, features: Tensor) -> "AdaptedParameters":
        """Return the same, knowing the features (T, n, d) of the support set."""
        return replace(self, support_features=features)


def support_log_likelihood(adapted: AdaptedParameters, features: Tensor, support: TaskBatch) -> Tensor:
    """Return (T,) the sum of log-likelihoods of a task's examples, each scored by the others, by features (T, n, d)."""
    logits, counts = left_out_logits(adapted, features, support)
    return -cross_entropy_per_task(logits, support.labels, counts) * counts.sum(1)


def evidence(logits: Tensor, labels: Tensor, counts: Tensor, ways: Tensor) -> Tensor:
    """Return (T, 2), how well support sets predict themselves: r and r · a.

    With n examples that count, r = n / (n + 10), and a is their accuracy, on a scale from chance (0) to all right (1).

    Args:
        logits: (T, n, C), of each row by the others.
        labels: (T, n).
        counts: (T, n) bool, the examples that have company.
        ways: (T,).
    """
    number = counts.sum(1).to(logits.dtype)
    right = ((logits.argmax(-1) == labels) & counts).sum(1)
    chance = 1 / ways.to(logits.dtype)
    above = (right / number.clamp(min=1) - chance) / (1 - chance)
    share = number / (number + EVIDENCE_SHOTS)
    return torch.stack([share, share * above], dim=1)


def informed(adapted: AdaptedParameters, features: Tensor, support: TaskBatch, slopes: Tensor) -> AdaptedParameters:
    """Return the same with these support features (T, n, d), and the temperature that their evidence speaks for.

    log t grows by s · evidence (:func:`evidence`): a task that cannot be told apart gets probabilities that say so. The
    slopes s (2,) are set by calibration alone (:mod:`textmeta.meta.calibration`).
    """
    logits, counts = left_out_logits(adapted, features, support)
    found = evidence(logits, support.labels, counts, support.ways)
    temperature = adapted.scalars["temperature"] * (found @ slopes.detach().to(found.dtype)).exp()
    return replace(adapted, scalars={**adapted.scalars, "temperature": temperature}, support_features=features)


def left_out_logits(adapted: AdaptedParameters, features: Tensor, support: TaskBatch) -> tuple[Tensor, Tensor]:
    """Return logits (T, n, C) of each support row by the others, by features (T, n, d), and which count (T, n)."""
    return left_out(adapted, features, support, adapted.offset, adapted.scalars)


def left_out(
    adapted: AdaptedParameters, features: Tensor, support: TaskBatch, offset: Tensor, scalars: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return leave-one-out logits (T, n, C) of support rows, and (T, n) bool: the examples that have company."""
    weights, mask = support.row_weights(scalars), class_mask(support.ways)
    logits, counts = adapted.head.support_logits(features, support.labels, offset, scalars, mask, weights)
    return logits, _of_examples(counts, support)


def left_out_by_neighbours(
    features: Tensor, support: TaskBatch, scalars: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the same, each row told by its neighbours among the others instead of by a head."""
    weights, mask = support.row_weights(scalars), class_mask(support.ways)
    logits, counts = leave_one_out_neighbours(features, support.labels, mask, weights)
    return logits, _of_examples(counts, support)


def _of_examples(counts: Tensor, support: TaskBatch) -> Tensor:
    """Return which rows count (T, n) without those that are names."""
    return counts if support.is_name is None else counts & ~support.is_name


def support_features(encoder: Encoder, adapted: AdaptedParameters, support: TaskBatch) -> Tensor:
    """Return the adapted features (T, n, d) of the support sets; made, where they are not known."""
    if adapted.support_features is not None:
        return adapted.support_features
    return support.pad(encoder.features(support.texts, adapted.factors, support.row_task))


def task_weights(encoder: Encoder, adapted: AdaptedParameters, support: TaskBatch) -> Tensor:
    """Return the weights of each task's head, (T, C, d), from the adapted features of its support set."""
    features = support_features(encoder, adapted, support)
    weights = support.row_weights(adapted.scalars)
    return adapted.head.weights(features, support.labels, adapted.offset, adapted.scalars, weights)


def query_logits(encoder: Encoder, adapted: AdaptedParameters, weights: Tensor, query: TaskBatch) -> Tensor:
    """Return (T, n, C) logits of the query examples, -inf for classes that a task does not have."""
    features = query.pad(encoder.features(query.texts, adapted.factors, query.row_task))
    return adapted.head.logits(features, weights, adapted.scalars, class_mask(query.ways))
