"""What is set once training is over: the rule of the out-of-scope score, on episodes with queries of other classes."""

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.errors import DataError
from textmeta.meta.evaluation import by_parts
from textmeta.meta.learner import TaskLearner

FIRST_UNSEEN = 10**6  # number of the first episode that training does not see


def episodes_with_outside(episodes: MixedEpisodes, count: int) -> list[Episode]:
    """Return at most ``count`` episodes that training has not seen and that have queries of other classes."""
    how = {"names": episodes.names, "unlabelled": episodes.unlabelled, "outside": 1.0}
    episodes = MixedEpisodes(episodes.corpora, episodes.seed, **how)
    unseen = (episodes[number] for number in range(FIRST_UNSEEN, FIRST_UNSEEN + 20 * count))
    return list(islice((e for e in unseen if (e.query_labels == OUTSIDE).any()), count))


def fit_calibration(
    learner: TaskLearner, episodes: Sequence[Episode], progress: str | None = None, *, together: bool = False
) -> Tensor:
    """Return the rule (8,) that tells texts of a task's classes from others, of which either weigh alike.

    The processes of a run may do it ``together``. DataError if no query of the episodes is of no class
    (:data:`~textmeta.data.episodes.OUTSIDE`), or every one.
    """

    def inputs_of(part: Sequence[Episode]) -> list[Tensor]:
        found = learner.answer_episodes(part).scope_inputs.cpu().double()
        return [own[: len(e.query_texts)] for own, e in zip(found, part, strict=True)]

    inputs = [*chain(*by_parts(inputs_of, episodes, progress, together))]
    labels = np.concatenate([*(e.query_labels != OUTSIDE for e in episodes), np.zeros(0, bool)])
    if labels.all() or not labels.any():
        raise DataError(f"a scope rule needs texts in scope and out of it, given {len(labels)} of one kind")
    fitted = LogisticRegression(class_weight="balanced", max_iter=5000).fit(torch.cat(inputs).numpy(), labels)
    return torch.tensor([*fitted.coef_[0], fitted.intercept_[0]], dtype=torch.float32)
