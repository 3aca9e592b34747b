"""Which rows of a support set an inner step is on: those of classes that have their share, where they are many in turn.

The nearest neighbours of a row are of a class with many examples by chance alone: steps that have to tell a class of
one example from such a class learn that example by heart, and draw other texts of its class away from it. So a class
that has few examples among others takes no part, and is told by what the steps on the others have made of the
features. And a step takes as long as it has rows: where a class has many, the next step is on others of them.
"""

import torch
from torch import Tensor

from textmeta.model.heads import class_mask, membership

__all__ = ["EXAMPLES_A_STEP", "FAIR_SHARE", "rows_in_turn", "rows_taking_part"]

FAIR_SHARE = 0.5  # of the mean number of rows of a class: with fewer, it takes no part
EXAMPLES_A_STEP = 10  # of a class, at most


def rows_taking_part(labels: Tensor, ways: Tensor) -> Tensor:
    """Return (T, n) bool, the rows of classes that have their share: none of a task in which that is only one class.

    Args:
        labels: (T, n), -1 for padding. A class's name is one of its rows.
        ways: (T,), number of classes of each task.
    """
    member = membership(labels, int(ways.max()))
    rows = member.sum(1, keepdim=True)  # (T, 1, C)
    part = class_mask(ways)[:, None] & (rows >= FAIR_SHARE * rows.sum(-1, keepdim=True) / ways[:, None, None])
    part = part & (part.sum(-1, keepdim=True) > 1)
    return (member.bool() & part).any(-1)


def rows_in_turn(labels: Tensor, is_name: Tensor | None, ways: Tensor, step: int) -> Tensor:
    """Return (T, n) bool, the rows whose turn it is in a step: names in every one.

    Args:
        labels: (T, n), -1 for padding.
        is_name: (T, n) bool; None where no task has names.
        ways: (T,), number of classes of each task.
        step: its number, from 0.
    """
    member = membership(labels, int(ways.max()))
    names = member * is_name[..., None] if is_name is not None else torch.zeros_like(member)
    examples = member - names
    number = examples.sum(1, keepdim=True).clamp(min=1)
    turn = (examples.cumsum(1) - 1 - step * EXAMPLES_A_STEP) % number  # (T, n, C), 0 for whose turn it is first
    return ((turn < EXAMPLES_A_STEP) & examples.bool() | names.bool()).any(-1)
