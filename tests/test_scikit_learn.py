"""What scikit-learn's own checks ask of an estimator, with texts where these give numbers.

Most of it is in test_classifier.py: cloning, arguments, labels, pickles, subsets and order of texts, one class, scores.
Not asked for: that a weight of 2 is two copies (folds and shots count examples), and whatever is of columns of numbers:
their count and names, dtypes, sparse or complex or infinite values, one feature, memory layout.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_predict

from tests.given import LABELS, SUPPORT, TEXTS, task
from textmeta import Adapter, Corpus, FewShotClassifier


def test_a_search_takes_adapters_in_hand(adapter: Adapter, plain: Corpus) -> None:
    """They come through cloning as they are; the one that sees nothing in a text loses."""
    init = adapter.initialisation
    blind = init.with_tensors({**init.tensors(), "log_penalty": torch.tensor(20.0), "temperature": torch.zeros(5)})
    other = replace(adapter, initialisation=blind, record={"blind": True})
    texts, labels, queries, true = task(plain, ["b", "d", "f"], 8)
    before = {name: value.clone() for name, value in init.tensors().items()}
    grid = {"adapter": [other, adapter], "adapt": [None, "none"]}
    search = GridSearchCV(FewShotClassifier(other), grid, cv=2, scoring="neg_log_loss").fit(texts, labels)
    assert search.best_params_["adapter"].record == adapter.record
    assert search.score(queries, true) > -1
    assert all(torch.equal(init.tensors()[name], value) for name, value in before.items())
    expected = FewShotClassifier(adapter).fit(texts, labels).predict_proba(queries)
    copied = clone(clone(FewShotClassifier(adapter))).fit(texts, labels)
    np.testing.assert_array_equal(copied.predict_proba(queries), expected)


def test_fit_and_predict_change_nothing_else(adapter: Adapter) -> None:
    one = FewShotClassifier(adapter, class_weight={"b": 2.0}, errors="replace")
    arguments = one.get_params()
    texts, labels = np.array([*SUPPORT[:5], "kel \ud83d"], dtype=object), np.array(LABELS)
    for array in (texts, labels):
        array.flags.writeable = False
    one.fit(texts, labels)
    public = {name for name in vars(one) if not name.startswith("_") and not name.endswith("_")}
    assert public == arguments.keys()
    assert all(one.get_params()[name] is value for name, value in arguments.items())
    before = {name: id(value) for name, value in vars(one).items()}
    first = one.predict_proba(TEXTS)
    one.predict(TEXTS), one.transform(TEXTS), one.score(SUPPORT, LABELS)
    assert {name: id(value) for name, value in vars(one).items()} == before
    np.testing.assert_array_equal(one.fit(texts, labels).predict_proba(TEXTS), first)
    assert texts[5] == "kel \ud83d"


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series, lambda given: np.array(given)[:, None], iter])
def test_texts_labels_and_weights_of_every_kind(adapter: Adapter, kind: Any) -> None:
    weights = [1.0, 2.0, 1.0, 0.5, 1.0, 1.0]
    one, other = FewShotClassifier(adapter), FewShotClassifier(adapter)
    expected = one.fit(SUPPORT, LABELS, sample_weight=weights).transform(TEXTS)
    other.fit(kind(SUPPORT), kind(LABELS), sample_weight=kind(weights))
    np.testing.assert_array_equal(other.transform(texts=kind(TEXTS)), expected)
    assert other.score(kind(SUPPORT), kind(LABELS)) == accuracy_score(LABELS, one.predict(SUPPORT))


def test_cross_validated_probabilities_are_in_the_order_of_classes(adapter: Adapter) -> None:
    found = cross_val_predict(FewShotClassifier(adapter), SUPPORT * 2, LABELS * 2, cv=2, method="predict_proba")
    assert found.shape == (12, 3)
    assert np.take(sorted(set(LABELS)), found.argmax(1)).tolist() == LABELS * 2
