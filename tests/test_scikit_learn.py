"""What scikit-learn's own checks ask of an estimator, with texts where these give numbers; and how much classes count.

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
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, LeavePGroupsOut, cross_val_score
from sklearn.utils.class_weight import compute_class_weight

from tests.given import LABELS, SUPPORT, TEXTS, task
from tests.heads.given import examples_of, random
from textmeta import Adapter, Corpus, FewShotClassifier
from textmeta.errors import DataError, SettingsError
from textmeta.heads.common import Examples
from textmeta.heads.ridge import ridge


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
    one.fit(texts, labels, unlabelled=["bal \ud83d"])
    public = {name for name in vars(one) if not name.startswith("_") and not name.endswith("_")}
    assert public == arguments.keys()
    assert all(one.get_params()[name] is value for name, value in arguments.items())
    before = {name: id(value) for name, value in vars(one).items()}
    first = one.predict_proba([*TEXTS, "bal \ud83d"])
    one.predict(TEXTS), one.transform(TEXTS), one.score(SUPPORT, LABELS)
    assert {name: id(value) for name, value in vars(one).items()} == before
    again = one.fit(texts, labels, unlabelled=["bal \ud83d"]).predict_proba([*TEXTS, "bal \ud83d"])
    np.testing.assert_array_equal(again, first)
    assert texts[5] == "kel \ud83d"


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, pd.Series, pd.DataFrame, lambda given: np.array(given)[:, None], iter]
)
def test_texts_labels_and_weights_of_every_kind(adapter: Adapter, kind: Any) -> None:
    weights = [1.0, 2.0, 1.0, 0.5, 1.0, 1.0]
    one, other = FewShotClassifier(adapter), FewShotClassifier(adapter)
    expected = one.fit(SUPPORT, LABELS, sample_weight=weights).transform(TEXTS)
    other.fit(kind(SUPPORT), kind(LABELS), sample_weight=kind(weights))
    np.testing.assert_array_equal(other.transform(texts=kind(TEXTS)), expected)
    assert other.score(kind(SUPPORT), kind(LABELS)) == accuracy_score(LABELS, one.predict(SUPPORT))


# How much classes count: alike, by their examples, or as said; against scikit-learn's ridge and its own weights


LESS, FEWER = [*SUPPORT[:4], SUPPORT[4]], list("bbffk")
UNLABELLED = ["bal fim", "kut bel"]


def answers(classifier: FewShotClassifier, weight: Any, texts: list[str], labels: list[Any], **more: Any) -> np.ndarray:
    return classifier.set_params(class_weight=weight).fit(texts, labels, **more).predict_proba(TEXTS)


@pytest.mark.parametrize("n", [7, 23], ids=["dual", "primal"])
def test_weights_of_classes_are_those_of_scikit_learns_ridge(n: int) -> None:
    labels = ([0, 0, 1, 1, 1, 1, 2] * 4)[:n]
    z, mixture, penalty = random(1, n, 2, 5), torch.tensor([[0.3, 0.7]]).double(), torch.tensor(0.7).double()
    sample, own = random(n, seed=3).abs() + 0.1, np.array([2.0, 1.0, 0.5])
    plain = examples_of([labels], [4]).weighted(sample[None])
    given = Examples(plain.member, plain.weights, plain.classes, torch.tensor([[*own, 9.0]]).double())  # 3 has no text
    found = ridge(z, mixture, given, penalty)
    design = (z[0] * mixture[0].sqrt()[:, None]).flatten(1).numpy()
    omega = sample.numpy() * own[labels]
    omega *= float(sample.sum()) / omega.sum()  # as large in all as without, beside the penalty
    fitted = Ridge(float(penalty), fit_intercept=False).fit(design, np.eye(3)[labels] - 1 / 3, sample_weight=omega)
    scores = torch.einsum("nvd,vdc->nc", z[0], found[0]).numpy()
    np.testing.assert_allclose(scores[:, :3], fitted.predict(design), atol=1e-10)
    assert not scores[:, 3].any()


@pytest.mark.parametrize("more", [{}, {"unlabelled": UNLABELLED}], ids=["labelled", "unlabelled"])
def test_weights_say_what_scikit_learns_say(classifier: FewShotClassifier, more: dict[str, Any]) -> None:
    balanced = answers(classifier, "balanced", LESS, FEWER, **more)
    sums = dict(zip("bfk", compute_class_weight("balanced", classes=np.array(list("bfk")), y=FEWER), strict=True))
    np.testing.assert_allclose(answers(classifier, sums, LESS, FEWER, **more), balanced, rtol=0, atol=1e-6)
    given = answers(classifier, None, LESS, FEWER, **more)
    for weight in ({"k": 1.0}, dict.fromkeys("bfk", 7)):  # 1 where nothing is said
        np.testing.assert_allclose(answers(classifier, weight, LESS, FEWER, **more), given, rtol=0, atol=1e-6)
    assert np.abs(given - balanced).max() > 1e-3
    equal = [answers(classifier, weight, SUPPORT, LABELS, **more) for weight in ("balanced", None)]
    np.testing.assert_allclose(*equal, rtol=0, atol=1e-6)


def test_more_weight_makes_a_class_likelier(classifier: FewShotClassifier) -> None:
    likely = [answers(classifier, {"b": weight}, SUPPORT, LABELS)[:, 0].mean() for weight in (0.1, 1, 10)]
    assert likely == sorted(likely)
    assert likely[2] > likely[0] + 0.02
    assert np.isfinite(answers(classifier, {"b": 2}, [], [], label_names={"b": "bum", "f": "fon"})).all()


def test_weights_of_classes_that_are_not_there(classifier: FewShotClassifier) -> None:
    """As scikit-learn has it: nothing is wrong where each class has one; else a key may be misspelt."""
    whole, three = {"b": 2.0, "f": 1.0, "k": 5.0}, (SUPPORT, LABELS)
    two = answers(classifier, {"b": 2.0, "f": 1.0}, SUPPORT[:4], LABELS[:4])
    np.testing.assert_array_equal(answers(classifier, whole, SUPPORT[:4], LABELS[:4]), two)
    one = clone(classifier).set_params(class_weight=whole).fit(*three).remove_class("k")
    np.testing.assert_array_equal(one.predict_proba(TEXTS), two)
    folds = cross_val_score(one, *three, cv=LeavePGroupsOut(1), groups=[0, 0, 1, 1, 2, 2], error_score="raise")
    assert folds.shape == (3,)
    with pytest.warns(UserWarning, match="class_weight: 'K' is no class of this task, the nearest is 'k'") as told:
        classifier.set_params(class_weight={"b": 2.0, "K": 5.0}).fit(*three)
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ({"bank card": 2.0}, DataError, "'bank card' is no class of this task, the nearest is 'bank'"),
        ({"bank": 0}, DataError, "of 'bank': expected a number from 1e-09 to 1e\\+09, given 0"),
        ({"bank": float("nan")}, DataError, "of 'bank': .* given nan"),
        ({"bank": 10**400}, DataError, "of 'bank': .* given 1000"),
        ({"bank": 1e300}, DataError, "of 'bank': .* given 1e\\+300"),
        ({"bank": "2"}, DataError, "of 'bank': .* given '2'"),
        ("as given", SettingsError, "must be 'balanced', None or a mapping from labels to numbers, given 'as given'"),
        ([1.0, 2.0], SettingsError, "must be 'balanced', None or a mapping"),
    ],
)
def test_unusable_weights_are_named(classifier: FewShotClassifier, weight: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^class_weight.*{message}"):
        answers(classifier, weight, ["bal", "fim"], ["bank", "fine"])
