"""How alike two tasks are, and which training corpus a new task is nearest to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from textmeta.data.corpus import Corpus
from textmeta.data.labels import Label
from textmeta.errors import DataError
from textmeta.heads.pooling import pool, to_length_one
from textmeta.meta.adapter import ClassIndex
from textmeta.meta.learner import LearnedTask, TaskLearner


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


class ClassMatch(NamedTuple):
    """A class of a new task, by its label, and the known class of a corpus that it was paired with."""

    label: Label
    known: str
    cosine: float  # of their vectors


class KnownTask(NamedTuple):
    """The part of a training corpus that is most like a new task."""

    corpus: str  # its name
    similarity: float  # of the two tasks, at most 1
    matches: tuple[ClassMatch, ...]  # of their classes, the most alike first; fewer where the corpus has fewer


def similarity(one: TaskEmbedding, two: TaskEmbedding) -> float:
    """Return how alike two tasks are: 1 for the same classes, about 0 for tasks that have nothing in common.

    Each class of one task is paired with a class of the other, no class twice, so that the sum of the cosines of their
    vectors is largest. The sum is divided by the larger number of classes. Both are the ``task_embedding_`` of
    classifiers with the same adapter; DataError if they are of other encoders.

    Source: Kuhn (1955), "The Hungarian method for the assignment problem".
    """
    cosines = _best_pairs(one.classes, two.classes)[2]
    return float(cosines.sum()) / max(len(one.classes), len(two.classes))


def nearest_tasks(index: ClassIndex, embedding: TaskEmbedding, count: int = 3) -> list[KnownTask]:
    """Return of each corpus in an index the part most like a task, the nearest first, at most ``count``."""
    found = []
    for corpus, names in index.classes.items():
        rows, columns, cosines = _best_pairs(embedding.classes, index.vectors[corpus])
        order = np.argsort(-cosines, kind="stable")
        matches = tuple(ClassMatch(embedding.labels[rows[i]], names[columns[i]], float(cosines[i])) for i in order)
        found.append(KnownTask(corpus, float(cosines.sum()) / len(embedding.classes), matches))
    return sorted(found, key=lambda known: -known.similarity)[:count]


@torch.no_grad()
def index_corpora(learner: TaskLearner, corpora: Sequence[Corpus], rows: int = 20, seed: int = 0) -> ClassIndex:
    """Make the index of the classes that were trained on, by the adapter that new tasks will be learned by.

    It holds no text: of each class one vector, made from so many rows of it, drawn at random.
    """
    init = learner.adapter.initialisation
    classes, vectors = {}, {}
    for number, corpus in enumerate(corpora):
        rng = np.random.default_rng((seed, number))
        found = []
        for index in range(len(corpus.class_names)):
            texts = [corpus.texts[row] for row in rng.permutation(corpus.rows_of(index))[:rows]]
            views = pool(learner.reader.read(texts, init.lora), init.queries)  # (rows, V, d)
            found.append(to_length_one(views[:, -1].mean(0)).float().cpu().numpy())
        name = corpus.name
        while name in classes:  # two parts of one dataset may share its name
            name += "'"
        classes[name], vectors[name] = corpus.class_names, np.stack(found)
    return ClassIndex(classes, vectors)


def _best_pairs(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of one, the rows of the other, and the cosines of the best pairs of class vectors (C, d)."""
    if one.shape[1] != two.shape[1]:
        raise DataError(f"class vectors have {one.shape[1]} and {two.shape[1]} numbers: they are of different encoders")
    cosines = one @ two.T
    rows, columns = linear_sum_assignment(-cosines)
    return rows, columns, cosines[rows, columns]
