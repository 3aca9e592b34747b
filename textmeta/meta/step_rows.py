"""Which rows of a support set an inner step is on: those of classes that have their share, where they are many in turn.

The nearest neighbours of a row are of a class with many examples by chance alone: steps that have to tell a class of
one example from such a class learn that example by heart, and draw other texts of its class away from it. So a class
that has few examples among others takes no part, and is told by what the steps on the others have made of the
features. And a step takes as long as it has rows: where a class has many, the next step is on others of them.
"""

import torch
from torch import Tensor

from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import TaskBatch
from textmeta.model.heads import class_mask, membership

__all__ = ["EXAMPLES_A_STEP", "FAIR_SHARE", "batch_of_step", "rows_of_step"]

FAIR_SHARE = 0.5  # of the mean number of rows of a class: with fewer, it takes no part
EXAMPLES_A_STEP = 10  # of a class, at most


def batch_of_step(support: TaskBatch, inner: InnerLoopSettings, step: int) -> TaskBatch:
    """Return what a step is on: with the head's loss all rows, with that of neighbours :func:`rows_of_step`."""
    if inner.loss == "head":
        return support
    return support.where(rows_of_step(support.labels, support.is_name, support.ways, step))


def rows_of_step(labels: Tensor, is_name: Tensor | None, ways: Tensor, step: int) -> Tensor:
    """Return (T, n) bool, the rows that a step is on: none of a task in which only one class would take part.

    Args:
        labels: (T, n), -1 for padding.
        is_name: (T, n) bool; None where no task has names. A class's name is one of its rows, and in every step.
        ways: (T,), number of classes of each task.
        step: its number, from 0.
    """
    member = membership(labels, int(ways.max()))
    rows = member.sum(1, keepdim=True)  # (T, 1, C)
    part = class_mask(ways)[:, None] & (rows >= FAIR_SHARE * rows.sum(-1, keepdim=True) / ways[:, None, None])
    part = part & (part.sum(-1, keepdim=True) > 1)

    names = member * is_name[..., None] if is_name is not None else torch.zeros_like(member)
    examples = member - names
    number = examples.sum(1, keepdim=True).clamp(min=1)
    turn = (examples.cumsum(1) - 1 - step * EXAMPLES_A_STEP) % number  # (T, n, C), 0 for whose turn it is first
    chosen = (turn < EXAMPLES_A_STEP) & examples.bool() | names.bool()
    return (chosen & part).any(-1)
