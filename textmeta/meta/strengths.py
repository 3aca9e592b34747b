"""Where a task starts: at the strength of LoRA, a factor on B, and the temperature that its support set speaks for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from textmeta.meta.adapted import AdaptedParameters, informed, support_log_likelihood
from textmeta.meta.tasks import TaskBatch
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import EVIDENCE_SLOPES, STRENGTH_PRIOR

__all__ = ["at_best_strength", "best_start", "scaled_factors"]


def scaled_factors(factors: Mapping[str, Tensor], strength: float | Tensor) -> dict[str, Tensor]:
    """Return LoRA factors with B times a strength, one for all tasks or (T,)."""
    scale = strength.view(-1, 1, 1) if isinstance(strength, Tensor) else strength
    return {name: value * scale if ".lora_B." in name else value for name, value in factors.items()}


def best_start(
    start: AdaptedParameters, features: Sequence[Tensor], support: TaskBatch, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, AdaptedParameters]:
    """Return (T,) the number of each task's strength, and the start with its support features and temperature.

    Each strength has the temperature that its evidence speaks for (:func:`~textmeta.meta.adapted.informed`). A task
    takes the one with the largest sum of its log prior and the log-likelihood of the support set.

    Args:
        start: of T tasks. Its factors are returned as they are.
        features: support features (T, n, d) at each of S strengths.
        support: support sets of T tasks.
        parameters: with the prior (S,).
    """
    tried = [informed(start, own, support, parameters[EVIDENCE_SLOPES]) for own in features]
    likelihoods = torch.stack([support_log_likelihood(s, f, support) for s, f in zip(tried, features, strict=True)])
    best = (likelihoods + parameters[STRENGTH_PRIOR][:, None]).argmax(0)
    tasks = torch.arange(len(best), device=best.device)
    temperatures = torch.stack([one.scalars["temperature"] for one in tried])[best, tasks]
    chosen = replace(start, scalars={**start.scalars, "temperature": temperatures})
    return best, chosen.with_features(torch.stack(tuple(features))[best, tasks])


def at_best_strength(
    encoder: Encoder,
    start: AdaptedParameters,
    support: TaskBatch,
    strengths: tuple[float, ...],
    parameters: Mapping[str, Tensor],
) -> AdaptedParameters:
    """Return the start with LoRA at the strength, and the temperature, that each task's support set speaks for."""
    tried = [scaled_factors(start.factors, strength) for strength in strengths]
    features = [support.pad(encoder.features(support.texts, factors, support.row_task)) for factors in tried]
    best, chosen = best_start(start, features, support, parameters)
    first = int(best[0])
    if (best == first).all():  # as in fit: the factors stay those of all tasks
        return replace(chosen, factors=tried[first])
    return replace(chosen, factors=scaled_factors(start.factors, torch.tensor(strengths, device=best.device)[best]))
