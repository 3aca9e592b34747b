"""What the tests of learning are given: a learner with every tensor away from its start, and tasks of every kind."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tests.heads.reference import Task
from textmeta import Adapter, Corpus, Episode
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

LAYERS = (1, 3, 4)
CPU = torch.device("cpu")

# what each algorithm learns, with and without LoRA among the adapted parameters, where it has the choice
ROWS = {
    f"{name}-{settings.adapt}": (name, settings)
    for name, algorithm in ALGORITHMS.items()
    for adapt in ("pooling", "pooling+lora")
    for settings in [algorithm.learner(LearnerSettings(LAYERS, adapt, steps=2))]  # type: ignore[arg-type]
    if adapt == "pooling" or not settings.entry_step_sizes  # which pooling queries alone have
}


def make_learner(encoder: Encoder, settings: LearnerSettings, dtype: torch.dtype = torch.float64) -> TaskLearner:
    """A learner with every tensor away from its start."""
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, settings, seed=0)
    generator = torch.Generator().manual_seed(3)
    sizes = {"queries": 0.5, "centre": 0.05, "name_centre": 0.05}
    tensors = {}
    for name, value in start.tensors().items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (value + (0 if ".lora_A." in name else sizes.get(name, 0.1) * noise)).to(dtype)
    tensors["loss_log_scale"] -= 1.5  # so that the loss is not so large that steps do not see it
    tensors["lora_log_step_sizes"] += 1.0
    encoder.overhead = 4096  # a forward of texts this small costs as much as one of all of them
    reader = TokenStateReader(encoder, settings.layers)
    return TaskLearner(reader, Adapter.of(reader, settings, start.with_tensors(tensors)))


def with_values(learner: TaskLearner, tensors: Mapping[str, Tensor]) -> TaskLearner:
    """The same learner with other values of all tensors."""
    init = learner.adapter.initialisation.with_tensors(tensors)
    return TaskLearner(learner.reader, replace(learner.adapter, initialisation=init))


def leaves_of(learner: TaskLearner) -> tuple[TaskLearner, dict[str, Tensor]]:
    """The same learner on leaves that gradients can be taken in, and these."""
    tensors = learner.adapter.initialisation.tensors()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
    return with_values(learner, leaves), leaves


def texts_of(corpus: Corpus, label: int) -> list[str]:
    return [corpus.texts[row] for row in corpus.rows_of(label)]


def make_task(
    corpus: Corpus, sizes: Sequence[int], *, names: bool = False, unlabelled: int = 0, first: int = 0
) -> Task:
    """A task with so many examples of each class; its queries and unlabelled texts are the classes' last texts."""
    pools = [texts_of(corpus, first + c) for c in range(len(sizes))]
    texts = [text for pool, size in zip(pools, sizes, strict=True) for text in pool[:size]]
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    extra = [pools[i % len(pools)][-1 - i // len(pools)] for i in range(unlabelled)]
    queries = [pool[-6] for pool in pools] + [pools[0][-7]]
    own = [pool[-8] for pool in pools] if names else None
    return Task(texts, labels, len(sizes), own, tuple(extra), tuple(queries))


def crowd(corpus: Corpus, sizes: Sequence[int]) -> Task:
    """A task of more texts and classes than the corpus has, each of two of its texts; with names."""
    pools = [texts_of(corpus, c) for c in range(len(corpus.class_names))]

    def text(c: int, i: int) -> str:
        own, other = pools[c % len(pools)], pools[(c + c // len(pools) + 1) % len(pools)]
        return f"{own[i % 16]} {other[i // 16 % 16]}"

    texts = [text(c, i) for c, size in enumerate(sizes) for i in range(size)]
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    names = [text(c, 15) for c in range(len(sizes))]
    return Task(texts, labels, len(sizes), names, queries=tuple(text(c, 14) for c in range(3)))


def odd_tasks(corpus: Corpus) -> dict[str, Task]:
    identical = make_task(corpus, (3, 3))
    identical.texts = [identical.texts[0]] * 6
    misleading = make_task(corpus, (3, 3))
    # the nearest text is of the other class: the loss is larger than by chance
    misleading.texts = [*misleading.texts[:3], *misleading.texts[1:4]]
    return {
        "five by five": make_task(corpus, (5, 5, 5, 5, 5)),
        "one shot": make_task(corpus, (1, 1, 1, 1), first=2),
        "zero shot": make_task(corpus, (0, 0, 0), names=True),
        "name alone": make_task(corpus, (3, 0, 2), names=True),
        "unequal": make_task(corpus, (1, 2, 4, 6), first=4),
        "named": make_task(corpus, (2, 3), names=True, first=5),
        "unlabelled": make_task(corpus, (2, 2, 2), names=True, unlabelled=7),
        "unlabelled without names": make_task(corpus, (1, 3), unlabelled=5),
        "no label yet": make_task(corpus, (0, 0, 0), names=True, unlabelled=6),
        "one text": make_task(corpus, (1, 0)),
        "one class, unlabelled": make_task(corpus, (3, 0), names=True, unlabelled=5),
        "one class": make_task(corpus, (3,)),
        "one of two classes": make_task(corpus, (0, 3), names=True),
        "no class of two but one": make_task(corpus, (3, 1, 1)),
        "identical": identical,
        "misleading": misleading,
    }


def batch_of(tasks: Sequence[Task]) -> tuple[TaskBatch, Rows]:
    """The tasks laid out, and their queries."""
    batch = TaskBatch.of(
        [t.texts for t in tasks],
        [t.labels for t in tasks],
        [t.ways for t in tasks],
        [t.names for t in tasks],
        [t.unlabelled for t in tasks],
    )
    return batch, Rows.of([t.queries for t in tasks], CPU)


def episode_of(task: Task) -> Episode:
    """The task, with its queries as they come from :func:`make_task`."""
    return Episode(
        corpus="toy",
        class_names=tuple(map(str, range(task.ways))),
        support_texts=tuple(task.texts),
        support_labels=np.array(task.labels, dtype=np.int64),
        query_texts=task.queries,
        query_labels=np.array([*range(task.ways), 0]),
        label_names=None if task.names is None else tuple(task.names),
        unlabelled_texts=task.unlabelled,
    )
