"""What is set once training is over: the rule of the out-of-scope score, on episodes with queries of other classes."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.errors import DataError
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.evaluation import in_parts
from textmeta.meta.learner import TaskLearner
from textmeta.progress import progress_bar

__all__ = ["episodes_with_outside", "fit_calibration"]

FIRST_UNSEEN = 10**6  # number of the first episode that training does not see


def episodes_with_outside(episodes: MixedEpisodes, count: int) -> list[Episode]:
    """Return at most ``count`` episodes that training has not seen and that have queries of other classes."""
    how = {"names": episodes.names, "unlabelled": episodes.unlabelled, "outside": 1.0}
    episodes = MixedEpisodes(episodes.corpora, episodes.seed, **how)
    unseen = (episodes[number] for number in range(FIRST_UNSEEN, FIRST_UNSEEN + 20 * count))
    return list(islice((e for e in unseen if (e.query_labels == OUTSIDE).any()), count))


@torch.no_grad()
def fit_calibration(learner: TaskLearner, episodes: Sequence[Episode], progress: str | None = None) -> Tensor:
    """Return the rule (8,) that tells texts of a task's classes from others, of which either weigh alike.

    DataError if no query of the episodes is of no class (:data:`~textmeta.data.episodes.OUTSIDE`), or every one.
    """
    device = learner.adapter.initialisation.queries.device
    inputs, inside = [], []
    with progress_bar(len(episodes), progress, "episode") as bar:
        for part in in_parts(episodes):
            task = learner.learn(TaskBatch.of_episodes(part, device))
            found = learner.answer(task, Rows.of([e.query_texts for e in part], device)).scope_inputs.cpu().double()
            inputs += [own[: len(e.query_texts)] for own, e in zip(found, part, strict=True)]
            inside += [e.query_labels != OUTSIDE for e in part]
            bar.update(len(part))
    labels = np.concatenate([*inside, np.zeros(0, bool)])
    if labels.all() or not labels.any():
        raise DataError(f"a scope rule needs texts in scope and out of it, given {len(labels)} of one kind")
    fitted = LogisticRegression(class_weight="balanced", max_iter=5000).fit(torch.cat(inputs).numpy(), labels)
    return torch.tensor([*fitted.coef_[0], fitted.intercept_[0]], dtype=torch.float32)
