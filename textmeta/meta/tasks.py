"""Labelled texts of T tasks, prepared to go through the encoder together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textmeta.data.episodes import Episode
from textmeta.data.labels import readable_name
from textmeta.model.encoder import Encoder, PreparedTexts

__all__ = [
    "TaskBatch",
    "frozen_features",
    "frozen_names",
    "query_batch",
    "support_and_query_batch",
    "support_batch",
    "task_batch",
]


@dataclass(frozen=True)
class TaskBatch:
    """Texts and labels of T tasks; tasks may differ in ways and in number of examples.

    Args:
        texts: all texts, task after task: N in all.
        row_task: (N,) int64, task of each text.
        slots: (N,) int64, where each text stands in the padded (T · n) layout.
        labels: (T, n) int64, -1 for padding.
        ways: (T,) int64, number of classes of each task.
    """

    texts: PreparedTexts
    row_task: Tensor
    slots: Tensor
    labels: Tensor
    ways: Tensor

    def pad(self, rows: Tensor) -> Tensor:
        """Lay flat rows (N, d) out as (T, n, d), zeros for padding."""
        tasks, width = self.labels.shape
        padded = rows.new_zeros(tasks * width, rows.shape[1]).index_copy(0, self.slots, rows)
        return padded.view(tasks, width, -1)


def task_batch(
    encoder: Encoder, texts: Sequence[Sequence[str]], labels: Sequence[Sequence[int]], ways: Sequence[int]
) -> TaskBatch:
    """Prepare the labelled texts of T tasks.

    Args:
        encoder: runs its frozen layers on the texts.
        texts: of each task.
        labels: of each task, from 0 to its ways - 1.
        ways: number of classes of each task.
    """
    device = encoder.device
    sizes = [len(part) for part in texts]
    width = max(sizes)
    row_task = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    slots = torch.cat([task * width + torch.arange(size) for task, size in enumerate(sizes)])
    padded = torch.full((len(sizes), width), -1)
    for task, part in enumerate(labels):
        padded[task, : len(part)] = torch.as_tensor(part, dtype=torch.long)
    return TaskBatch(
        texts=encoder.prepare([text for part in texts for text in part]),
        row_task=row_task.to(device),
        slots=slots.to(device),
        labels=padded.to(device),
        ways=torch.tensor(ways, device=device),
    )


def support_batch(encoder: Encoder, episodes: Sequence[Episode]) -> TaskBatch:
    """Prepare the support sets of episodes."""
    return task_batch(
        encoder, [e.support_texts for e in episodes], [list(e.support_labels) for e in episodes], _ways(episodes)
    )


def query_batch(encoder: Encoder, episodes: Sequence[Episode]) -> TaskBatch:
    """Prepare the query sets of episodes."""
    return task_batch(
        encoder, [e.query_texts for e in episodes], [list(e.query_labels) for e in episodes], _ways(episodes)
    )


def support_and_query_batch(encoder: Encoder, episodes: Sequence[Episode]) -> TaskBatch:
    """Prepare support and query sets of episodes as one set a task."""
    return task_batch(
        encoder,
        [e.support_texts + e.query_texts for e in episodes],
        [[*e.support_labels, *e.query_labels] for e in episodes],
        _ways(episodes),
    )


def frozen_features(
    encoder: Encoder, episodes: Sequence[Episode], part: Literal["support", "query"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return frozen features (T, n, d), labels (T, n) and ways (T,) of support or query sets, without LoRA."""
    texts = [getattr(episode, f"{part}_texts") for episode in episodes]
    given = [torch.as_tensor(getattr(episode, f"{part}_labels"), device=encoder.device) for episode in episodes]
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
