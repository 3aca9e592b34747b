"""Meta-learning algorithms: each a function of one signature, and a row in :data:`ALGORITHMS`.

A function takes the encoder, the parameters, some episodes and the inner loop's settings, and returns the gradient
(or pseudo-gradient) of the parameters, summed over the episodes. A new algorithm is one function and one row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.meta.adaptation import InnerLoopSettings, adapt, query_logits, task_weights
from textmeta.meta.tasks import query_batch, support_and_query_batch, support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import cross_entropy_per_task
from textmeta.model.initialisation import LORA, Parameters

__all__ = ["ALGORITHMS", "Algorithm", "MetaGradient", "fomaml", "protonet", "reptile"]


@dataclass(frozen=True)
class MetaGradient:
    """What an algorithm returns for T episodes.

    Args:
        gradient: of every parameter by name, summed over the episodes.
        loss: (T,) query loss of each.
        accuracy: (T,) query accuracy of each.
    """

    gradient: Parameters
    loss: Tensor
    accuracy: Tensor


AlgorithmFunction = Callable[[Encoder, Parameters, Sequence[Episode], InnerLoopSettings], MetaGradient]


def protonet(
    encoder: Encoder, parameters: Parameters, episodes: Sequence[Episode], inner: InnerLoopSettings
) -> MetaGradient:
    """Gradient of the query loss of prototypes, without inner steps: ∇_θ Σ_i L_i^query(θ).

    Source: Snell et al. (2017), "Prototypical Networks for Few-shot Learning", here with a cosine and LoRA.
    """
    return _query_gradient(encoder, parameters, episodes, replace(inner, steps=0))


def fomaml(
    encoder: Encoder, parameters: Parameters, episodes: Sequence[Episode], inner: InnerLoopSettings
) -> MetaGradient:
    """Gradient of the query loss after the inner steps, these taken as constants.

    ∇_θ Σ_i L_i^query(θ - Σ_j α_j stopgrad(ĝ_j)): the start and the step sizes α get gradients, ĝ gets none.

    Source: Finn et al. (2017), "Model-Agnostic Meta-Learning", section 5.2, first-order approximation.
    """
    return _query_gradient(encoder, parameters, episodes, inner)


def reptile(
    encoder: Encoder, parameters: Parameters, episodes: Sequence[Episode], inner: InnerLoopSettings
) -> MetaGradient:
    """Pseudo-gradient Σ_i (θ - θ_i), with θ_i the LoRA factors adapted to support and query together.

    A plain step of size ε against its mean is Reptile's update θ ← θ + ε mean_i(θ_i - θ). Step sizes and temperature
    get no gradient. The loss reported is that of the queries before the adaptation that then sees them.

    Source: Nichol et al. (2018), "On First-Order Meta-Learning Algorithms", batched version of Algorithm 1.
    """
    with torch.no_grad():
        loss, accuracy = _query_loss(encoder, parameters, episodes, replace(inner, steps=0))
        adapted = adapt(encoder, parameters, support_and_query_batch(encoder, episodes), inner)
        gradient = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for name, factor in adapted.factors.items():
            if factor.ndim == 3:  # adapted, task by task
                gradient[LORA + name] = (parameters[LORA + name] - factor).sum(0)
    return MetaGradient(gradient, loss, accuracy)


def _query_loss(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
) -> tuple[Tensor, Tensor]:
    """Adapt to the support sets; return loss and accuracy of each query set, (T,) both."""
    support, query = support_batch(encoder, episodes), query_batch(encoder, episodes)
    adapted = adapt(encoder, parameters, support, inner)
    logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
    counts = query.labels >= 0
    correct = (logits.argmax(-1) == query.labels) & counts
    return cross_entropy_per_task(logits, query.labels, counts), correct.sum(1) / counts.sum(1)


def _query_gradient(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
) -> MetaGradient:
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    loss, accuracy = _query_loss(encoder, leaves, episodes, inner)
    found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    gradient = {
        name: torch.zeros_like(value) if part is None else part
        for (name, value), part in zip(leaves.items(), found, strict=True)
    }
    return MetaGradient(gradient, loss.detach(), accuracy)


@dataclass(frozen=True)
class Algorithm:
    """A row of :data:`ALGORITHMS`.

    Args:
        gradient: the function.
        optimiser: what the outer loop does with the gradient: Adam, or plain SGD.
        learning_rate: of the outer loop, unless the settings say otherwise; for SGD Reptile's ε.
        inner: from the inner loop's settings as given, those that the algorithm learns for.
    """

    gradient: AlgorithmFunction
    optimiser: Literal["adam", "sgd"]
    learning_rate: float
    inner: Callable[[InnerLoopSettings], InnerLoopSettings]


ALGORITHMS: dict[str, Algorithm] = {
    "protonet": Algorithm(protonet, "adam", 1e-3, lambda inner: replace(inner, steps=0)),
    "fomaml": Algorithm(fomaml, "adam", 1e-3, lambda inner: inner),
    # B starts at 0, where A has no gradient: adapted or not, A is learned only by moving along with B
    "reptile": Algorithm(reptile, "sgd", 0.1, lambda inner: replace(inner, adapt=("lora_A", "lora_B", "offset"))),
}
