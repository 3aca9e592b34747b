"""The rule of the out-of-scope score, fitted after training, on episodes that have queries of other classes."""

from collections.abc import Iterable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.errors import DataError
from textmeta.meta.learner import TaskLearner

__all__ = ["fit_scope_rule"]


@torch.no_grad()
def fit_scope_rule(learner: TaskLearner, episodes: Iterable[Episode]) -> Tensor:
    """Return (8,) the rule of :func:`~textmeta.heads.scope.scope_probability`, by logistic regression.

    Texts in scope and out of it weigh alike together.

    Args:
        learner: as it was trained.
        episodes: some of whose queries are of no class (:data:`~textmeta.data.episodes.OUTSIDE`).

    Raises:
        DataError: if no query is, or every one.
    """
    inputs, inside = [], []
    for episode in episodes:
        inputs.append(learner.scope_inputs(*learner.learn_episodes([episode]))[0].double().cpu())
        inside.append(episode.query_labels != OUTSIDE)
    labels = np.concatenate([*inside, np.zeros(0, bool)])
    if labels.all() or not labels.any():
        raise DataError(f"a scope rule needs texts in scope and out of it, given {len(labels)} of one kind")
    fitted = LogisticRegression(class_weight="balanced", max_iter=5000).fit(torch.cat(inputs).numpy(), labels)
    return torch.tensor([*fitted.coef_[0], fitted.intercept_[0]], dtype=torch.float32)
