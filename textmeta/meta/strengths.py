"""LoRA's strength: a factor on B, of which each task takes the one that its support set speaks for."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from textmeta.meta.adapted import AdaptedParameters, support_log_likelihood
from textmeta.meta.tasks import TaskBatch
from textmeta.model.encoder import Encoder

__all__ = ["at_best_strength", "best_strengths", "scaled_factors"]


def scaled_factors(factors: Mapping[str, Tensor], strength: float | Tensor) -> dict[str, Tensor]:
    """Return LoRA factors with B times a strength, one for all tasks or (T,)."""
    scale = strength.view(-1, 1, 1) if isinstance(strength, Tensor) else strength
    return {name: value * scale if ".lora_B." in name else value for name, value in factors.items()}


def best_strengths(start: AdaptedParameters, features: Iterable[Tensor], support: TaskBatch, prior: Tensor) -> Tensor:
    """Return (T,) the number of each task's strength, from the support features (T, n, d) at each of S strengths.

    It is the one with the largest sum of its log prior (S,) and the log-likelihood of the support set.
    """
    likelihoods = torch.stack([support_log_likelihood(start, own, support) for own in features])
    return (likelihoods + prior[:, None]).argmax(0)


def at_best_strength(
    encoder: Encoder, start: AdaptedParameters, support: TaskBatch, strengths: tuple[float, ...], prior: Tensor
) -> AdaptedParameters:
    """Return the start with LoRA at the strength that each task's support set speaks for."""
    tried = [replace(start, factors=scaled_factors(start.factors, s)) for s in strengths]
    features = [support.pad(encoder.features(support.texts, one.factors, support.row_task)) for one in tried]
    best = best_strengths(start, features, support, prior)
    first = int(best[0])
    if (best == first).all():  # as in fit: the factors stay those of all tasks
        return tried[first].with_features(features[first])
    of_tasks = torch.stack(features).gather(0, best.view(1, -1, 1, 1).expand(1, *features[0].shape))[0]
    chosen = torch.tensor(strengths, device=best.device)[best]
    return replace(start, factors=scaled_factors(start.factors, chosen), support_features=of_tasks)
