"""Labelled texts of T tasks, prepared to go through the encoder together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textmeta.data.episodes import Episode
from textmeta.data.labels import readable_name
from textmeta.model.encoder import Encoder, PreparedTexts
from textmeta.model.heads import membership, name_weights

__all__ = [
    "TaskBatch",
    "frozen_features",
    "frozen_names",
    "query_batch",
    "support_and_query_batch",
    "support_batch",
    "support_rows",
    "task_batch",
    "unprepared_batch",
]


@dataclass(frozen=True)
class TaskBatch:
    """Texts and labels of T tasks; tasks may differ in ways and in number of examples.

    The names of a task's classes, where it comes with them, are further rows after its examples, labelled as these are.

    Args:
        texts: all texts, task after task: N in all.
        row_task: (N,) int64, task of each text.
        slots: (N,) int64, where each text stands in the padded (T · n) layout.
        labels: (T, n) int64, -1 for padding.
        ways: (T,) int64, number of classes of each task.
        is_name: (T, n) bool, whether a row is the name of its class; None where no task has names.
    """

    texts: PreparedTexts
    row_task: Tensor
    slots: Tensor
    labels: Tensor
    ways: Tensor
    is_name: Tensor | None = None

    def pad(self, rows: Tensor) -> Tensor:
        """Lay flat rows (N, d) out as (T, n, d), zeros for padding."""
        tasks, width = self.labels.shape
        padded = rows.new_zeros(tasks * width, rows.shape[1]).index_copy(0, self.slots, rows)
        return padded.view(tasks, width, -1)

    def where(self, kept: Tensor) -> "TaskBatch":
        """Return the rows that are kept (T, n) bool, in their order, padded no further than the longest task needs."""
        if bool((kept | (self.labels < 0)).all()):
            return self
        own = kept.flatten()[self.slots]
        old, row_task, width = self.slots[own], self.row_task[own], int(kept.sum(1).max().clamp(min=1))
        slots = row_task * width + (kept.cumsum(1) - 1).flatten()[old]

        def moved(rows: Tensor, padding: int | bool) -> Tensor:
            empty = rows.new_full((len(rows) * width,), padding)
            return empty.index_copy(0, slots, rows.flatten()[old]).view(len(rows), width)

        return replace(
            self,
            texts=self.texts.where(own),
            row_task=row_task,
            slots=slots,
            labels=moved(self.labels, -1),
            is_name=None if self.is_name is None else moved(self.is_name, False),
        )

    def row_weights(self, scalars: Mapping[str, Tensor]) -> Tensor | None:
        """Return the (T, n) weights of the rows, or None for 1 each: :func:`~textmeta.model.heads.name_weights`."""
        return name_weights(self.is_name, scalars)

    @property
    def class_labels(self) -> Tensor:
        """Labels (T, n) of the examples, and of the name of a class that has none; -1 for all else.

        What task embeddings are made of: where every class has examples, they are the same with names as without.
        """
        if self.is_name is None:
            return self.labels
        examples = membership(self.labels.masked_fill(self.is_name, -1), int(self.ways.max())).sum(1)  # (T, C)
        has_examples = examples.gather(1, self.labels.clamp(min=0)) > 0
        return self.labels.masked_fill(self.is_name & has_examples, -1)


def task_batch(
    encoder: Encoder,
    texts: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]],
    ways: Sequence[int],
    names: Sequence[Sequence[str | None] | None] | None = None,
) -> TaskBatch:
    """Prepare the labelled texts of T tasks.

    Args:
        encoder: runs its frozen layers on the texts.
        texts: of each task.
        labels: of each task, from 0 to its ways - 1.
        ways: number of classes of each task.
        names: of each task the names of its classes, in the order of their numbers, None for a class without; or None.
    """
    device = encoder.device
    examples = [len(part) for part in texts]
    rows = [support_rows(*task) for task in zip(texts, labels, names or [None] * len(texts), strict=True)]
    sizes = [len(part) for part, _ in rows]
    width = max(sizes)
    row_task = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    slots = torch.cat([task * width + torch.arange(size) for task, size in enumerate(sizes)])
    padded = torch.full((len(sizes), width), -1)
    for task, (_, part) in enumerate(rows):
        padded[task, : len(part)] = torch.as_tensor(part, dtype=torch.long)
    is_name = (padded >= 0) & (torch.arange(width) >= torch.tensor(examples)[:, None])
    return TaskBatch(
        texts=encoder.prepare([text for part, _ in rows for text in part]),
        row_task=row_task.to(device),
        slots=slots.to(device),
        labels=padded.to(device),
        ways=torch.tensor(ways, device=device),
        is_name=is_name.to(device) if is_name.any() else None,
    )


def unprepared_batch(
    texts: Sequence[str], labels: Sequence[int], examples: int, ways: int, device: torch.device
) -> TaskBatch:
    """Return a batch of one task whose features are known already, so that its texts need no preparing.

    Args:
        texts: rows of the support set (:func:`support_rows`).
        labels: of each row.
        examples: number of rows that are examples; those after them are names.
        ways: number of classes.
        device: of the tensors.
    """
    numbers = torch.tensor([list(labels)], device=device, dtype=torch.long)
    slots = torch.arange(len(texts), device=device)
    return TaskBatch(
        texts=PreparedTexts(tuple(texts), ()),
        row_task=torch.zeros_like(slots),
        slots=slots,
        labels=numbers,
        ways=torch.tensor([ways], device=device),
        is_name=slots[None] >= examples if len(texts) > examples else None,
    )


def support_rows(
    texts: Sequence[str], labels: Sequence[int], names: Sequence[str | None] | None
) -> tuple[list[str], list[int]]:
    """Return the texts and labels of a task's examples, and after them its classes' names, where there are any."""
    named = [(name, number) for number, name in enumerate(names or ()) if name is not None]
    return [*texts, *(name for name, _ in named)], [*labels, *(number for _, number in named)]


def support_batch(encoder: Encoder, episodes: Sequence[Episode]) -> TaskBatch:
    """Prepare the support sets of episodes, with the names of those that come with names."""
    texts, labels = [e.support_texts for e in episodes], [list(e.support_labels) for e in episodes]
    return task_batch(encoder, texts, labels, _ways(episodes), [e.label_names for e in episodes])


def query_batch(encoder: Encoder, episodes: Sequence[Episode]) -> TaskBatch:
    """Prepare the query sets of episodes."""
    return task_batch(
        encoder, [e.query_texts for e in episodes], [list(e.query_labels) for e in episodes], _ways(episodes)
    )


def support_and_query_batch(encoder: Encoder, episodes: Sequence[Episode]) -> TaskBatch:
    """Prepare support and query sets of episodes as one set a task, names as in :func:`support_batch`."""
    return task_batch(
        encoder,
        [e.support_texts + e.query_texts for e in episodes],
        [[*e.support_labels, *e.query_labels] for e in episodes],
        _ways(episodes),
        [e.label_names for e in episodes],
    )


def frozen_features(
    encoder: Encoder, episodes: Sequence[Episode], part: Literal["support", "query"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return frozen features (T, n, d), labels (T, n) and ways (T,) of support or query sets, without LoRA.

    In a support set, the name of a class that has no example stands for one, as in :attr:`TaskBatch.class_labels`.
    """
    rows = []
    for e in episodes:
        own, numbers = getattr(e, f"{part}_texts"), getattr(e, f"{part}_labels").tolist()
        names = e.label_names if part == "support" and e.label_names else ()
        missing = [None if c in numbers else name for c, name in enumerate(names)]
        rows.append(support_rows(own, numbers, missing))
    texts = [own for own, _ in rows]
    given = [torch.tensor(numbers, dtype=torch.long, device=encoder.device) for _, numbers in rows]
    features = encoder.frozen_features([text for own in texts for text in own])
    padded = pad_sequence(list(torch.split(features, [len(own) for own in texts])), batch_first=True)
    labels = pad_sequence(given, batch_first=True, padding_value=-1)
    return padded, labels, torch.tensor(_ways(episodes), device=encoder.device)


def frozen_names(encoder: Encoder, episodes: Sequence[Episode]) -> Tensor:
    """Return frozen features (T, C, d) of the class names, zeros for padding."""
    features = encoder.frozen_features([readable_name(name) for e in episodes for name in e.class_names])
    return pad_sequence(list(torch.split(features, _ways(episodes))), batch_first=True)


def _ways(episodes: Sequence[Episode]) -> list[int]:
    return [episode.ways for episode in episodes]
