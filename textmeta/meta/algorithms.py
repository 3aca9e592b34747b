"""Meta-learning algorithms: each a function of one signature, and a row of :data:`ALGORITHMS`.

A function takes a task learner, some episodes, and the tensors that are learned (leaves of the learner's
initialisation); it returns the gradient of each, or a pseudo-gradient, summed over the episodes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from textmeta.data.episodes import Episode
from textmeta.encoder.lora import LORA_B
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import LORA, LearnerSettings
from textmeta.meta.learner import KEPT_TEXTS, QUERIES, TaskLearner


@dataclass(frozen=True)
class MetaGradient:
    """What an algorithm returns for T episodes."""

    gradient: dict[str, Tensor]  # of every learned tensor by name, summed over the episodes
    loss: Tensor  # (T,) cross entropy of each episode's queries, after the inner steps
    accuracy: Tensor  # (T,) share of them that are right


def query_losses(learner: TaskLearner, episodes: Sequence[Episode], second_order: bool) -> tuple[Tensor, Tensor]:
    """Learn the tasks of T episodes; return the mean cross entropy (T,) and the accuracy (T,) of their queries.

    Queries of no class do not count.
    """
    logits = learner.answer_episodes(episodes, second_order).logits
    given = [torch.as_tensor(e.query_labels) for e in episodes]
    labels = pad_sequence(given, batch_first=True, padding_value=-1).to(logits.device)  # -1: padding, or of no class
    counts = labels >= 0
    losses = cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(labels)
    number = counts.sum(1).clamp(min=1)
    loss = torch.where(counts, losses, 0.0).sum(1) / number
    return loss, ((logits.argmax(-1) == labels) & counts).sum(1) / number


def maml(learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor]) -> MetaGradient:
    """Exact gradient of the query loss after the inner steps, through their gradients.

    Source: Finn et al. (2017), "Model-Agnostic Meta-Learning", algorithm 1. With step sizes that are learned for each
    entry it is Meta-SGD: Li et al. (2017), "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning". Where the steps
    change the head's offset alone it is ANIL: Raghu et al. (2020), "Rapid Learning or Feature Reuse?".
    """
    return _gradient(learner, episodes, leaves, second_order=True)


def fomaml(learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor]) -> MetaGradient:
    """Gradient of the query loss after the inner steps, with their gradients taken as constants.

    Source: Finn et al. (2017), section 5.2, first-order approximation. Without steps, and with prototypes, it is
    ProtoNet: Snell et al. (2017), "Prototypical Networks for Few-shot Learning".
    """
    return _gradient(learner, episodes, leaves, second_order=False)


def reptile(learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor]) -> MetaGradient:
    """First-order gradient, but for what the steps adapt: that moves to where steps on support and queries end.

    The pseudo-gradient of the pooling queries is Σ (q₀ - q_J); of LoRA's factors, where adapted, likewise.

    Source: Nichol et al. (2018), "On First-Order Meta-Learning Algorithms", batched version of algorithm 1.
    """
    found = _gradient(learner, episodes, leaves, second_order=False)
    init, adapt = learner.adapter.initialisation, learner.adapter.learner.adapt
    both = [_with_queries_as_support(e) for e in episodes if len(e.support_texts)]
    with torch.no_grad():
        task = learner.learn(TaskBatch.of_episodes(both, init.queries.device)) if both else None
        ends = {} if task is None else {QUERIES: task.queries, **{LORA + n: v for n, v in task.factors.items()}}
        for name, start in leaves.items():
            # A is not adapted
            if (name == QUERIES and "pooling" in adapt) or (LORA_B in name and "lora" in adapt):
                end = ends.get(name, start)  # tasks that take no steps stay at the start
                found.gradient[name] = (start - end).sum(0) if end.ndim == 3 else torch.zeros_like(start)
    return found


def _with_queries_as_support(episode: Episode) -> Episode:
    inside = episode.query_labels >= 0
    queries = (text for text, kept in zip(episode.query_texts, inside, strict=True) if kept)
    return replace(
        episode,
        support_texts=(*episode.support_texts, *queries),
        support_labels=np.concatenate([episode.support_labels, episode.query_labels[inside]]),
        label_names=None,
        unlabelled_texts=(),
    )


def _gradient(
    learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor], second_order: bool
) -> MetaGradient:
    settings, texts = learner.adapter.learner, sum(len(e.support_texts) for e in episodes)
    if second_order and "lora" in settings.adapt and len(episodes) > 1 and texts * settings.steps > KEPT_TEXTS:
        # together, every step would be computed again in the backward pass
        half = len(episodes) // 2
        one, other = (_gradient(learner, part, leaves, second_order) for part in (episodes[:half], episodes[half:]))
        total = {name: one.gradient[name] + other.gradient[name] for name in leaves}
        return MetaGradient(total, torch.cat([one.loss, other.loss]), torch.cat([one.accuracy, other.accuracy]))
    loss, accuracy = query_losses(learner, episodes, second_order)
    # no leaf may have a part in these episodes: step sizes where a task takes no step
    found = (
        torch.autograd.grad(loss.sum(), list(leaves.values()), materialize_grads=True)
        if loss.requires_grad
        else map(torch.zeros_like, leaves.values())
    )
    return MetaGradient(dict(zip(leaves, found, strict=True)), loss.detach(), accuracy)


@dataclass(frozen=True)
class Algorithm:
    """A row of :data:`ALGORITHMS`."""

    gradient: Callable[[TaskLearner, Sequence[Episode], Mapping[str, Tensor]], MetaGradient]
    learner: Callable[[LearnerSettings], LearnerSettings]  # from the settings given, those that it learns for


ALGORITHMS: dict[str, Algorithm] = {
    "anil": Algorithm(maml, lambda s: replace(s, adapt="offset", head="prototype")),
    "fomaml": Algorithm(fomaml, lambda s: s),
    "maml": Algorithm(maml, lambda s: s),
    "meta_sgd": Algorithm(maml, lambda s: replace(s, entry_step_sizes=True)),
    "protonet": Algorithm(fomaml, lambda s: replace(s, adapt="none", head="prototype")),
    "reptile": Algorithm(reptile, lambda s: s),
}
