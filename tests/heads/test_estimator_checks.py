"""scikit-learn's own checks, on the head alone: numbers in. With texts, see tests/test_scikit_learn.py.

None is left out, or expected to fail; scikit-learn skips that of arrays other than NumPy's where SCIPY_ARRAY_API is not
set.
"""

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from textmeta.heads.common import Examples
from textmeta.heads.ridge import ridge

ONE_VIEW = torch.ones(1, 1, dtype=torch.float64)


class Head(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The ridge on one view, numbers in the place of what an encoder makes of texts, centred as a task's are."""

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:  # noqa: N803 - scikit-learn's name
        X, y = validate_data(self, X, y)  # noqa: N806
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        counts = _check_sample_weight(sample_weight, X, dtype=np.float64)
        if len(set(numbers[counts > 0])) < 2:
            raise ValueError("expected two classes, given one class")
        labels, ways = torch.from_numpy(numbers)[None], torch.tensor([len(self.classes_)])
        examples, rows = (
            Examples.of(labels, ways, torch.float64).weighted(torch.tensor(counts)[None]),
            torch.tensor(X).double(),
        )
        self.centre_ = examples.balanced[0] @ rows / examples.total
        views = (rows - self.centre_)[None, :, None]
        self.weights_ = ridge(views, ONE_VIEW, examples, torch.tensor(self.penalty))[0, 0]
        return self

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)  # noqa: N806
        scores = np.asarray((torch.tensor(X).double() - self.centre_) @ self.weights_)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        scores = self.decision_function(X)
        return self.classes_[scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(int)]


@parametrize_with_checks([Head()])
def test_what_scikit_learn_asks_of_an_estimator(estimator: Head, check: Any) -> None:
    check(estimator)
