"""What tasks are compared by: a vector of each class, and what the support set said of views and names."""

from dataclasses import dataclass

import numpy as np

from textmeta.data.labels import Label
from textmeta.meta.learner import LearnedTask

__all__ = ["TaskEmbedding", "task_embedding"]


@dataclass(frozen=True, eq=False)
class TaskEmbedding:
    """What a support set says before any inner step."""

    classes: np.ndarray  # (C, d) float32, of length 1: mean of a class's texts in the last view, or its name where none
    labels: tuple[Label, ...]  # of the classes
    view_nll: np.ndarray  # (V,) how hard the classes are to tell in each view: NLL of left-out examples, in nats
    name_evidence: float  # how much better than chance the names tell the examples, in nats; 0 without names
    shots: float  # examples a class, on average


def task_embedding(task: LearnedTask, labels: tuple[Label, ...]) -> TaskEmbedding:
    """Return the embedding of a single learned task, T = 1, by the labels of its classes."""
    return TaskEmbedding(
        classes=task.class_vectors[0].float().cpu().numpy(),
        labels=labels,
        view_nll=task.view_nll[0].float().cpu().numpy(),
        name_evidence=float(task.name_evidence[0]),
        shots=float(task.shots[0].expm1()),
    )
