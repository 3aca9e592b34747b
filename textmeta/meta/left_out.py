"""What the examples of a task say of one another: each is told by those that are not in its fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from textmeta.heads.common import Examples, log_shots, temperature
from textmeta.heads.evidence import fold_nll, folds_of, left_out_scores
from textmeta.heads.pooling import pool
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner

__all__ = ["LeftOut", "SuspectLabel", "left_out"]


class SuspectLabel(NamedTuple):
    """An example that the others tell to be of another class."""

    row: int  # its number among the examples
    text: str | None  # None where it was not stored
    label: Any  # that it was given
    likely: Any  # label of the class that it is told to be
    probability: float  # of that class, by the others


@dataclass(frozen=True)
class LeftOut:
    """What the examples of a task say of one another."""

    support: Sequence[
        tuple[str | None, int]
    ]  # text of each example, None where it is not known, and number of its class
    labels: Sequence[Any]  # of the classes
    probabilities: Tensor  # (n, C) of each class for each example, by the others; NaN for an example of no fold

    @property
    def accuracy(self) -> float | None:
        """The share that is told right of the examples that are in folds; None where there are none."""
        right = [likely == own for row, likely, own in self._told()]
        return sum(right) / len(right) if right else None

    @property
    def suspects(self) -> list[SuspectLabel]:
        """The examples that are told to be of another class, the surest first."""
        text, label, sure = [text for text, _ in self.support], self.labels, self.probabilities.tolist()
        found = [
            SuspectLabel(row, text[row], label[own], label[likely], sure[row][likely])
            for row, likely, own in self._told()
            if likely != own
        ]
        return sorted(found, key=lambda suspect: -suspect.probability)

    def _told(self) -> list[tuple[int, int, int]]:
        """Return row, likely and own class of each example that is in a fold."""
        likely, in_fold = self.probabilities.argmax(-1).tolist(), ~self.probabilities[:, 0].isnan()
        return [(row, likely[row], self.support[row][1]) for row in in_fold.nonzero()[:, 0].tolist()]


@torch.no_grad()
def left_out(learner: TaskLearner, support: Sequence[tuple[str, int]], labels: Sequence[Any]) -> LeftOut:
    """Return what the examples of a task say of one another, by ridge regressions that have not seen their fold.

    They are on the views before any step, layers weighed by their prior, so that nothing was chosen by the labels that
    are to be told; without names. A class with one example is not among the classes.
    """
    init = learner.adapter.initialisation
    texts, numbers = [text for text, _ in support], [number for _, number in support]
    batch = TaskBatch.of([texts], [numbers], [len(labels)], device=init.queries.device)
    views = batch.support.pad(pool(learner.reader.read(batch.support.texts, init.lora), init.queries))
    examples = Examples.of(batch.labels, batch.ways, views.dtype)
    folds = folds_of(examples)
    how = (init.centre, init.log_centre_strength.exp(), init.log_penalty.exp(), init.view_prior.softmax(0)[None])
    scores = left_out_scores(views, folds, *how).to(views)
    nll = fold_nll(scores, folds, init.log_evidence_scale.exp())[:, 0]
    scale = temperature(init.temperature, log_shots(examples), batch.ways, torch.zeros_like(folds.any), nll)
    logits = (scale * scores[0, 0]).masked_fill(~folds.examples.present, -torch.inf)
    found = logits.softmax(-1).masked_fill((folds.of[0] < 0)[:, None], torch.nan).cpu().double()
    return LeftOut(support, labels, found[torch.tensor(batch.order, dtype=torch.long).argsort()])
