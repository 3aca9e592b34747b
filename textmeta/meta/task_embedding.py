"""What tasks are compared by: a vector of each class, and what the support set said of views and names."""

from dataclasses import dataclass

import numpy as np

from textmeta.data.labels import Label
from textmeta.meta.learner import LearnedTask

__all__ = ["TaskEmbedding", "task_embedding"]


@dataclass(frozen=True, eq=False)
class TaskEmbedding:
    """What a support set says before any inner step.

    Args:
        classes: (C, d) float32, of length 1: the mean of each class's texts in the last view, not centred, and where a
            class has no example, of its name.
        labels: the C classes, in the order of the rows.
        view_nll: (V,) how hard the classes are to tell apart in each view: NLL of left-out examples, in nats.
        name_evidence: how much better than chance the names tell the examples, in nats; 0 without names.
        shots: examples a class, on average.
    """

    classes: np.ndarray
    labels: tuple[Label, ...]
    view_nll: np.ndarray
    name_evidence: float
    shots: float


def task_embedding(task: LearnedTask, labels: tuple[Label, ...]) -> TaskEmbedding:
    """Return the embedding of a single learned task, T = 1, by the labels of its classes."""
    return TaskEmbedding(
        classes=task.class_vectors[0].float().cpu().numpy(),
        labels=labels,
        view_nll=task.view_nll[0].float().cpu().numpy(),
        name_evidence=float(task.name_evidence[0]),
        shots=float(task.shots[0].expm1()),
    )
