"""What is set once training is over: the rule of the out-of-scope score, on episodes with queries of other classes."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.errors import DataError
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.initialisation import Calibration
from textmeta.meta.learner import TaskLearner

__all__ = ["episodes_with_outside", "fit_calibration"]

FIRST_UNSEEN = 10**6  # number of the first episode that training does not see


def episodes_with_outside(episodes: MixedEpisodes, count: int) -> Iterator[Episode]:
    """Yield at most ``count`` episodes that training has not seen and that have queries of other classes."""
    unseen = (episodes[number] for number in range(FIRST_UNSEEN, FIRST_UNSEEN + 20 * count))
    return islice((e for e in unseen if (e.query_labels == OUTSIDE).any()), count)


@torch.no_grad()
def fit_calibration(learner: TaskLearner, episodes: Iterable[Episode]) -> Calibration:
    """Fit the rule that tells texts of a task's classes from others, by logistic regression.

    Texts in scope and out of it weigh alike together.

    Args:
        learner: as it was trained.
        episodes: some of whose queries are of no class (:data:`~textmeta.data.episodes.OUTSIDE`).

    Raises:
        DataError: if no query is, or every one.
    """
    inputs, inside = [], []
    for episode in episodes:
        device = learner.adapter.initialisation.queries.device
        task = learner.learn(TaskBatch.of_episodes([episode], device))
        inputs.append(learner.answer(task, Rows.of([episode.query_texts], device)).scope_inputs[0].double().cpu())
        inside.append(episode.query_labels != OUTSIDE)
    labels = np.concatenate([*inside, np.zeros(0, bool)])
    if labels.all() or not labels.any():
        raise DataError(f"a scope rule needs texts in scope and out of it, given {len(labels)} of one kind")
    fitted = LogisticRegression(class_weight="balanced", max_iter=5000).fit(torch.cat(inputs).numpy(), labels)
    return Calibration(torch.tensor([*fitted.coef_[0], fitted.intercept_[0]], dtype=torch.float32))
