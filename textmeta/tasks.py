"""Tasks as things to compare: how alike two are, and which of those trained on a new one is most like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from textmeta.data.corpus import Corpus
from textmeta.data.labels import Label, readable_name
from textmeta.data.texts import plain
from textmeta.errors import AdapterError, DataError, SettingsError
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import TaskBatch
from textmeta.model.encoder import Encoder
from textmeta.model.task_encoder import class_vectors, task_embedding

__all__ = ["ClassMatch", "KnownTask", "KnownTasks", "TaskEmbedding", "embed_task", "index_tasks", "similarity"]


@dataclass(frozen=True, eq=False)
class TaskEmbedding:
    """What the task encoder makes of a support set.

    Args:
        vector: (e,) float32, the task embedding, of length 1.
        classes: (C, d) float32, a vector of each class, of length 1, from the frozen features alone.
        labels: the C classes, in the order of the rows.
    """

    vector: np.ndarray
    classes: np.ndarray
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class ClassMatch:
    """A class and the known class that it was paired with.

    Args:
        label: of the new task.
        known: name of the class of the corpus.
        cosine: of their vectors.
    """

    label: Label
    known: str
    cosine: float


@dataclass(frozen=True)
class KnownTask:
    """The task of one training corpus that is most like a new one.

    Args:
        corpus: its name.
        similarity: of the two tasks, at most 1 (:func:`similarity`).
        matches: the new task's classes and theirs, the most alike first; where the corpus has fewer, some are missing.
    """

    corpus: str
    similarity: float
    matches: tuple[ClassMatch, ...]

    def __str__(self) -> str:
        """Say it in a line; names are whoever's made the adapter."""
        pairs = ", ".join(f"{plain(match.label)} ~ {plain(match.known)}" for match in self.matches[:3])
        return f"{plain(self.corpus)} ({self.similarity:.2f}): {pairs}{', …' if len(self.matches) > 3 else ''}"


@dataclass(frozen=True, eq=False)
class KnownTasks:
    """An index of what an adapter was trained on: a vector of every training class, no text.

    Any task that training may have drawn is some of the classes of one corpus, so this is an index of all of them.

    Args:
        classes: corpus → names of its classes.
        vectors: corpus → (classes, d) float32, their vectors, of length 1.
    """

    classes: Mapping[str, tuple[str, ...]]
    vectors: Mapping[str, np.ndarray]

    def nearest(self, task: TaskEmbedding, count: int = 3) -> list[KnownTask]:
        """Return, for each corpus, its task that is most like the one given; at most ``count``, the nearest first.

        Args:
            task: of the same encoder.
            count: how many corpora.
        """
        found = []
        for corpus, names in self.classes.items():
            rows, columns, cosines = _assignment(task.classes, self.vectors[corpus])
            order = np.argsort(-cosines, kind="stable")
            matches = tuple(ClassMatch(task.labels[rows[i]], names[columns[i]], float(cosines[i])) for i in order)
            found.append(KnownTask(corpus, float(cosines.sum()) / len(task.classes), matches))
        return sorted(found, key=lambda known: -known.similarity)[:count]


def checked_index(known: KnownTasks | None, inner: InnerLoopSettings) -> KnownTasks:
    """Return the index of an adapter's training tasks.

    Raises:
        AdapterError: saying what to do, if it has none, or no task encoder.
    """
    if inner.conditioning is None:
        raise AdapterError(
            "this adapter has no task encoder, so tasks cannot be compared: use one that was meta-trained with "
            "inner.conditioning"
        )
    if known is None:
        raise AdapterError(
            "this adapter has no index of the tasks that it was trained on: train with index_rows over 0, or give "
            "known_tasks, made by textmeta.tasks.index_tasks from corpora of your own"
        )
    return known


def similarity(one: TaskEmbedding, two: TaskEmbedding) -> float:
    """Return how alike two tasks are: 1 for the same classes, about 0 for tasks that have nothing in common.

    Each class of one is paired with a class of the other, no class twice, so that the sum of the cosines of their
    vectors is largest (the assignment problem; Kuhn, 1955); the sum is divided by the larger number of classes.

    Args:
        one: a task.
        two: another, of the same encoder; it may have another number of classes.

    Raises:
        DataError: if their vectors differ in size.
    """
    cosines = _assignment(one.classes, two.classes)[2]
    return float(cosines.sum()) / max(len(one.classes), len(two.classes))


def embed_task(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    support: TaskBatch,
    labels: Sequence[Label],
) -> TaskEmbedding | None:
    """Return the embedding of a single task; None, where there is no task encoder.

    Args:
        encoder: makes frozen features.
        parameters: the initialisation, with the task encoder's weights.
        inner: whose conditioning says which task encoder.
        support: the support set of one task.
        labels: its classes, in the order of their numbers; a task encoder that can see names sees them.

    Raises:
        AdapterError: if the embedding is not finite.
    """
    if inner.conditioning is None:
        return None
    features = support.pad(encoder.frozen_features(support.texts.texts, remember=False))
    task = (features, support.class_labels, support.ways)
    names = None
    if inner.conditioning.task_encoder.label_names:
        names = encoder.frozen_features([readable_name(str(label)) for label in labels], remember=False)[None]
    with torch.no_grad():
        vector = task_embedding(parameters, inner.conditioning.task_encoder, *task, names)[0]
        classes = class_vectors(*task)[0]
    if not (vector.isfinite().all() and classes.isfinite().all()):
        raise AdapterError("the task encoder makes numbers that are not finite of this task: its weights are too large")
    return TaskEmbedding(vector.float().cpu().numpy(), classes.float().cpu().numpy(), tuple(labels))


def index_tasks(
    encoder: Encoder,
    corpora: Sequence[Corpus],
    *,
    rows: int = 20,
    label_names: bool = False,
    seed: int = 0,
) -> KnownTasks:
    """Return the index of all tasks that the classes of some corpora make up.

    Args:
        encoder: makes frozen features.
        corpora: restricted to the classes that were trained on.
        rows: texts of each class that its vector is made from, drawn at random.
        label_names: whether the name of each class goes into its vector, too: of use where names say what classes are.
        seed: of the draw.

    Raises:
        SettingsError: if rows is not positive.
    """
    if rows < 1:
        raise SettingsError(f"an index needs at least 1 text of a class, given rows {rows}")
    classes, vectors = {}, {}
    for number, corpus in enumerate(corpora):
        rng = np.random.default_rng((seed, number))
        found = []
        for index in range(len(corpus.class_names)):
            chosen = rng.permutation(corpus.rows_of(index))[:rows]
            features = encoder.frozen_features([corpus.texts[row] for row in chosen], remember=False)[None]
            labels = torch.zeros(1, len(chosen), dtype=torch.long, device=encoder.device)
            names = None
            if label_names:
                names = encoder.frozen_features([readable_name(corpus.class_names[index])], remember=False)[None]
            one = class_vectors(features, labels, torch.tensor([1], device=encoder.device), names)
            found.append(one[0, 0].float().cpu().numpy())
        name = corpus.name
        while name in classes:  # two parts of one dataset may share its name
            name += "'"
        classes[name], vectors[name] = corpus.class_names, np.stack(found)
    return KnownTasks(classes, vectors)


def _assignment(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of one, rows of the other, and the cosines of the best pairs."""
    if one.shape[1] != two.shape[1]:
        raise DataError(f"class vectors have {one.shape[1]} and {two.shape[1]} numbers: they are of different encoders")
    cosines = one @ two.T
    rows, columns = linear_sum_assignment(-cosines)
    return rows, columns, cosines[rows, columns]
