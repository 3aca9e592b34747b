"""Texts and labels of T tasks, padded to the largest."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textmeta.data.episodes import Episode
from textmeta.errors import DataError
from textmeta.heads.common import Examples

MOST_ROWS, MOST_CLASSES = 128, 64  # of a task in one inner step: memory stays bounded
STAND_IN = re.compile("[0-9a-f]{72}")  # CRC-32 of a text, and SHA-256 of its token states


@dataclass(frozen=True)
class Rows:
    """Texts of T tasks one after the other, and where each stands in a padded (T, n) layout."""

    texts: tuple[str, ...]  # N of them
    row_task: Tensor  # (N,) int64, task of each text
    place: Tensor  # (N,) int64, position of each text in its task
    there: Tensor  # (T, n) bool, whether a place holds a text

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], device: str | torch.device) -> "Rows":
        """Lay out the texts of each task."""
        sizes = torch.tensor([len(part) for part in texts])
        there = torch.arange(max(map(len, texts), default=0)) < sizes[:, None]
        row_task, place = there.nonzero(as_tuple=True)  # on the CPU: a GPU would be waited for
        return cls(tuple(chain(*texts)), row_task.to(device), place.to(device), there.to(device))

    def pad(self, flat: Tensor) -> Tensor:
        """Lay flat rows (N, …) out as (T, n, …), zeros for padding."""
        tasks, width = self.there.shape
        padded = flat.new_zeros(tasks * width, *flat.shape[1:])
        return padded.index_copy(0, self.row_task * width + self.place, flat).view(tasks, width, *flat.shape[1:])


@dataclass(frozen=True)
class TaskBatch:
    """T tasks: their support sets, the names of their classes, and unlabelled texts."""

    support: Rows  # ordered by the texts alone, so that what is learned does not depend on the order they came in
    labels: Tensor  # (T, n) int64, -1 for padding
    ways: Tensor  # (T,) int64
    names: Rows  # of the classes, in the order of the labels; none for a task that comes without
    unlabelled: Rows
    weights: Tensor | None = None  # (T, n), how much each labelled text counts; None where all count 1
    class_weights: Tensor | None = None  # (T, C), of a text of each class in the head; None where they weigh alike
    order: tuple[int, ...] = ()  # of each labelled text, its number among those that were given of its task

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[str]],
        labels: Sequence[Sequence[int]],
        ways: Sequence[int],
        names: Sequence[Sequence[str] | None] | None = None,
        unlabelled: Sequence[Sequence[str]] | None = None,
        device: str | torch.device = "cpu",
        weights: Sequence[Sequence[float]] | None = None,
        class_weights: Sequence[Sequence[float]] | None = None,
    ) -> "TaskBatch":
        """Lay out T tasks: of each its labelled texts, their labels from 0 to its ways - 1, and its unlabelled texts.

        Names are of all classes of a task, or None. Weights, above 0, say how much each labelled text counts, class
        weights how much a text of each class does in the head; by default all are alike.
        """
        for number, (part, count) in enumerate(zip(names or [None] * len(ways), ways, strict=True)):
            if part is not None and len(part) != count:
                raise DataError(f"task {number}: {len(part)} names for {count} classes; expected one each, or none")
        all_weights = weights or [[1.0] * len(part) for part in texts]
        sorted_tasks = [
            sorted(zip(part, numbers, count, range(len(part)), strict=True), key=lambda row: (text_order(row[0]), row))
            for part, numbers, count in zip(texts, labels, all_weights, strict=True)
        ]
        support = Rows.of([[text for text, *_ in task] for task in sorted_tasks], device)
        flat = torch.tensor([label for task in sorted_tasks for _, label, *_ in task], dtype=torch.long, device=device)
        counts = [count for task in sorted_tasks for *_, count, _ in task]
        by_class = [torch.tensor(part, device=device) for part in class_weights or ()]
        return cls(
            support,
            support.pad(flat + 1) - 1,
            torch.tensor(list(ways), device=device),
            Rows.of([part or () for part in names or [()] * len(texts)], device),
            Rows.of(unlabelled or [()] * len(texts), device),
            None if weights is None else support.pad(torch.tensor(counts, device=device)),
            pad_sequence(by_class, batch_first=True) if by_class else None,
            tuple(number for task in sorted_tasks for *_, number in task),
        )

    @classmethod
    def of_episodes(cls, episodes: Sequence[Episode], device: str | torch.device = "cpu") -> "TaskBatch":
        """Lay out the tasks of episodes, with names and unlabelled texts of those that come with them."""
        return cls.of(
            [e.support_texts for e in episodes],
            [e.support_labels.tolist() for e in episodes],
            [e.ways for e in episodes],
            [e.label_names for e in episodes],
            [e.unlabelled_texts for e in episodes],
            device,
        )


def text_order(text: str) -> int:
    """Return what texts are ordered by, their CRC-32; where hashes stand for a text, they begin with it."""
    return int(text[:8], 16) if STAND_IN.fullmatch(text) else zlib.crc32(text.encode())


def parts_in_turn(batch: TaskBatch, examples: Examples, steps: int) -> list[tuple[Rows, Examples, Tensor | None]]:
    """Return of each inner step its support rows, the examples that they are, and their numbers (M,), None for all."""
    rows = batch.support
    if int(rows.there.sum(1).max()) <= MOST_ROWS:
        return [(rows, examples, None)] * steps
    parts: list[tuple[Rows, Examples, Tensor | None]] = []
    for step in range(steps):
        kept = rows_in_turn(examples, step)
        chosen = kept[rows.row_task, rows.place].nonzero()[:, 0]
        there = torch.arange(int(kept.sum(1).max()), device=kept.device) < kept.sum(1, keepdim=True)
        at = rows.row_task[chosen], rows.place[chosen]
        own = Rows(tuple(rows.texts[i] for i in chosen.tolist()), at[0], (kept.cumsum(1) - 1)[at], there)
        part = Examples(own.pad(examples.member[at]), own.pad(examples.weights[at]), examples.classes)
        parts.append((own, part, chosen))
    return parts


def rows_in_turn(examples: Examples, step: int) -> Tensor:
    """Choose the support rows (T, n) bool of one inner step: of a large task, classes and their texts in turn.

    Of a task with more than 128 texts a step sees at most 64 classes of two texts or more, at least two texts of each,
    and about 128 texts in all; the next step the next classes, and of a class the next texts.
    """
    member = examples.member
    counts = member.sum(1)  # (T, C)
    there = member.sum(-1) > 0
    several = counts >= 2
    number = several.sum(1).clamp(min=1)  # classes to choose from
    # classes in the order of their first text, which does not depend on how they are numbered
    first = torch.where(several, member.argmax(1), member.shape[1])
    rank = first.argsort(1).argsort(1)
    take = number.clamp(max=MOST_CLASSES)
    turns = [several & ((rank - s * take[:, None]) % number[:, None] < take[:, None]) for s in range(step + 1)]
    chosen, before = turns[-1], torch.stack(turns).sum(0) - turns[-1].long()  # how often a class had its turn
    each = (MOST_ROWS // take).clamp(min=2)
    position = ((member.cumsum(1) - member) * member).sum(-1).long()
    own = member.argmax(-1)
    size = counts.gather(1, own).long().clamp(min=1)
    in_turn = (position - before.gather(1, own) * each[:, None]) % size < each[:, None]
    large = (there.sum(1) > MOST_ROWS)[:, None]
    return there & (~large | (chosen.gather(1, own) & in_turn))
