"""What the examples of a task say of one another: each is told by those that are not in its fold."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from textmeta.heads.common import Examples, log_shots, temperature
from textmeta.heads.evidence import fold_nll, folds_of, left_out_scores
from textmeta.heads.pooling import pool
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner


class SuspectLabel(NamedTuple):
    """An example that the others tell to be of another class."""

    row: int  # its number among the examples
    text: str | None  # None where it was not stored
    label: Any  # that it was given
    likely: Any  # label of the class that it is told to be
    probability: float  # of that class, by the others


class LeftOut(NamedTuple):
    """What the examples of a task say of one another."""

    accuracy: float | None  # the share told right of the examples that are in folds; None where there are none
    suspects: list[SuspectLabel]  # those that are told to be of another class, the surest first


@torch.no_grad()
def left_out(learner: TaskLearner, examples: Sequence[tuple[str, Any, float]], labels: Sequence[Any]) -> LeftOut:
    """Return what examples (text, label, weight) say of one another, by ridge regressions without their fold.

    They are on the views before any step, layers weighed by their prior, so that nothing was chosen by the labels that
    are to be told; without names. A class with one example is not among the classes.
    """
    init = learner.adapter.initialisation
    number_of = {label: number for number, label in enumerate(labels)}
    texts, numbers = [text for text, *_ in examples], [number_of[label] for _, label, _ in examples]
    batch = TaskBatch.of([texts], [numbers], [len(labels)], device=init.queries.device)
    views = batch.support.pad(pool(learner.reader.read(batch.support.texts, init.lora), init.queries))
    support = Examples.of(batch.labels, batch.ways, views.dtype)
    folds = folds_of(support)
    how = (init.centre, init.log_centre_strength.exp(), init.log_penalty.exp(), init.view_prior.softmax(0)[None])
    scores = left_out_scores(views, folds, *how).to(views)
    nll = fold_nll(scores, folds, init.log_evidence_scale.exp())[:, 0]
    scale = temperature(init.temperature, log_shots(support), batch.ways, torch.zeros_like(folds.any), nll)
    logits = (scale * scores[0, 0]).masked_fill(~folds.examples.present, -torch.inf)
    given = torch.tensor(batch.order, dtype=torch.long).argsort()  # the order of the examples
    sure, likely = (part[given].tolist() for part in logits.softmax(-1).cpu().double().max(-1))
    told = (folds.of[0].cpu()[given] >= 0).nonzero()[:, 0].tolist()
    wrong = [row for row in told if likely[row] != numbers[row]]
    found = [SuspectLabel(row, texts[row], examples[row][1], labels[likely[row]], sure[row]) for row in wrong]
    right = (len(told) - len(wrong)) / len(told) if told else None
    return LeftOut(right, sorted(found, key=lambda suspect: -suspect.probability))
