"""Meta-learning algorithms: each a function of one signature, and a row in :data:`ALGORITHMS`.

A function takes the encoder, the parameters, some episodes, the inner loop's settings and a plan for the gradient, and
returns the gradient (or pseudo-gradient) of the parameters, summed over the episodes. A new algorithm is one function
and one row.

θ are the parameters, θ_j what the inner steps θ_{j+1} = θ_j - α_j ĝ_j make of them on a support set, ĝ the (normalised)
gradient of the support loss, J the number of steps, L_i^query the query loss of episode i.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.meta.adaptation import AdaptedParameters, adapt, adaptation_path, query_logits, task_weights
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.meta.tasks import TaskBatch, query_batch, support_and_query_batch, support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import cross_entropy_per_task
from textmeta.model.initialisation import Parameters

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "MetaGradient",
    "anil",
    "episode_chunks",
    "fomaml",
    "maml",
    "meta_sgd",
    "protonet",
    "reptile",
]


@dataclass(frozen=True)
class MetaGradient:
    """What an algorithm returns for T episodes.

    Args:
        gradient: of every parameter by name, summed over the episodes.
        loss: (T,) query loss of each, after the last inner step.
        accuracy: (T,) query accuracy of each.
    """

    gradient: Parameters
    loss: Tensor
    accuracy: Tensor


AlgorithmFunction = Callable[
    [Encoder, Parameters, Sequence[Episode], InnerLoopSettings, MetaGradientSettings], MetaGradient
]


def protonet(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    plan: MetaGradientSettings,
) -> MetaGradient:
    """Gradient of the query loss of prototypes, without inner steps: ∇_θ Σ_i L_i^query(θ).

    Source: Snell et al. (2017), "Prototypical Networks for Few-shot Learning", here with a cosine and LoRA.
    """
    return _query_gradient(encoder, parameters, episodes, replace(inner, steps=0), plan)


def fomaml(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    plan: MetaGradientSettings,
) -> MetaGradient:
    """Gradient of the query loss after the inner steps, these taken as constants.

    ∇_θ Σ_i L_i^query(θ - Σ_j α_j stopgrad(ĝ_j)): the start and the step sizes α get gradients, ĝ gets none.

    Source: Finn et al. (2017), "Model-Agnostic Meta-Learning", section 5.2, first-order approximation.
    """
    return _query_gradient(encoder, parameters, episodes, inner, replace(plan, second_order_steps=0))


def maml(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    plan: MetaGradientSettings,
) -> MetaGradient:
    """Exact gradient of the query loss after the inner steps, through the inner gradients.

    ∇_θ Σ_i L_i^query(θ - Σ_j α_j ĝ_j(θ_j, θ)): with ĝ's own derivatives, its normalisation's included.

    Source: Finn et al. (2017), "Model-Agnostic Meta-Learning", algorithm 1.
    """
    return _query_gradient(encoder, parameters, episodes, inner, plan)


def meta_sgd(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    plan: MetaGradientSettings,
) -> MetaGradient:
    """MAML's gradient, with a learned step size for each tensor p and step: θ_{j+1}^p = θ_j^p - α_j^p ĝ_j^p.

    The inner settings of its row give each tensor its own step sizes. They are learned as logarithms, so they stay
    positive; the paper has one for each entry, of either sign.

    Source: Li et al. (2017), "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", eq. 3.
    """
    return _query_gradient(encoder, parameters, episodes, inner, plan)


def anil(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    plan: MetaGradientSettings,
) -> MetaGradient:
    """MAML's exact gradient where the inner steps change the head's offset δ alone.

    ∇_θ Σ_i L_i^query(θ, δ_J(θ)) with δ_{j+1} = δ_j - α_j ĝ_j(δ_j, θ). The features of a support set are the same in all
    steps, so they are computed once.

    Source: Raghu et al. (2020), "Rapid Learning or Feature Reuse?", section 4.
    """
    return _query_gradient(encoder, parameters, episodes, replace(inner, adapt=("offset",)), plan)


@torch.enable_grad()
def reptile(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    plan: MetaGradientSettings,
) -> MetaGradient:
    """Pseudo-gradient Σ_i (θ - θ_i), with θ_i the LoRA factors adapted to support and query together.

    A plain step of size ε against its mean is Reptile's update θ ← θ + ε mean_i(θ_i - θ). What a conditioned start
    θ(τ_i) is made of gets the gradient of ⟨θ(τ_i), stopgrad(θ(τ_i) - θ_i)⟩. Step sizes and the head's scalars get none.
    The loss reported is that of the queries before the adaptation that then sees them.

    Source: Nichol et al. (2018), "On First-Order Meta-Learning Algorithms", batched version of algorithm 1.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    losses, accuracies = [], []
    for chunk in episode_chunks(episodes, plan.texts_at_once):
        support, query = support_batch(encoder, chunk), query_batch(encoder, chunk)
        both = support_and_query_batch(encoder, chunk)
        with torch.no_grad():
            start = adapt(encoder, parameters, support, replace(inner, steps=0))
            loss, accuracy = _query_loss(encoder, start, support, query)
            adapted = adapt(encoder, parameters, both, inner)
        # ⟨θ, θ - θ_i⟩ has the gradient θ - θ_i; where θ is made of other parameters, they get theirs through it
        starts = adapt(encoder, leaves, both, replace(inner, steps=0)).factors
        moved = [name for name, factor in adapted.factors.items() if factor.ndim == 3]  # adapted, task by task
        if moved:
            parts = [(starts[n] * (starts[n].detach() - adapted.factors[n])).sum() for n in moved]
            _add_gradient(total, torch.stack(parts).sum(), leaves)
        losses.append(loss)
        accuracies.append(accuracy)
    return MetaGradient(total, torch.cat(losses), torch.cat(accuracies))


def episode_chunks(episodes: Sequence[Episode], texts_at_once: int) -> Iterator[list[Episode]]:
    """Yield successive episodes that together have at most so many texts; a larger one alone."""
    chunk: list[Episode] = []
    texts = 0
    for episode in episodes:
        size = len(episode.support_texts) + len(episode.query_texts) + len(episode.label_names or ())
        if chunk and texts + size > texts_at_once:
            yield chunk
            chunk, texts = [], 0
        chunk.append(episode)
        texts += size
    if chunk:
        yield chunk


def _query_loss(
    encoder: Encoder, adapted: AdaptedParameters, support: TaskBatch, query: TaskBatch
) -> tuple[Tensor, Tensor]:
    """Return loss and accuracy of each query set, (T,) both."""
    logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
    counts = query.labels >= 0
    correct = (logits.argmax(-1) == query.labels) & counts
    return cross_entropy_per_task(logits, query.labels, counts), correct.sum(1) / counts.sum(1)


def _add_gradient(total: Parameters, objective: Tensor, leaves: Parameters) -> None:
    """Add the gradient of an objective, where it has one, in place."""
    found = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    for name, part in zip(leaves, found, strict=True):
        if part is not None:
            total[name] += part


@torch.enable_grad()
def _query_gradient(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    plan: MetaGradientSettings,
) -> MetaGradient:
    """Differentiate the query loss after the inner steps, chunk by chunk."""
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    losses, accuracies = [], []
    wanted = inner.steps if plan.second_order_steps is None else plan.second_order_steps
    second_order_steps = min(wanted, inner.steps)
    for chunk in episode_chunks(episodes, plan.texts_at_once):
        support, query = support_batch(encoder, chunk), query_batch(encoder, chunk)
        *_, adapted = adaptation_path(
            encoder,
            leaves,
            support,
            inner,
            second_order_steps=second_order_steps,
            checkpointed=plan.saves_memory(support.texts.count, second_order_steps),
        )
        loss, accuracy = _query_loss(encoder, adapted, support, query)
        _add_gradient(total, loss.sum(), leaves)
        losses.append(loss.detach())
        accuracies.append(accuracy)
    return MetaGradient(total, torch.cat(losses), torch.cat(accuracies))


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
    "anil": Algorithm(anil, "adam", 1e-3, lambda inner: replace(inner, adapt=("offset",))),
    "fomaml": Algorithm(fomaml, "adam", 1e-3, lambda inner: inner),
    "maml": Algorithm(maml, "adam", 1e-3, lambda inner: inner),
    "meta_sgd": Algorithm(meta_sgd, "adam", 1e-3, lambda inner: replace(inner, step_sizes="tensor")),
    # B starts at 0, where A has no gradient: adapted or not, A is learned only by moving along with B
    "reptile": Algorithm(reptile, "sgd", 0.1, lambda inner: replace(inner, adapt=("lora_A", "lora_B", "offset"))),
}
