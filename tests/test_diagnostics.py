"""What a support set says of itself: an estimate of the accuracy, suspect labels, the weight of names."""

import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import StratifiedKFold, cross_val_score

from tests.given import NAMES, SUPPORT, task
from textmeta import Corpus, FewShotClassifier
from textmeta.classifier import NotFittedError
from textmeta.errors import DataError

Task = tuple[list[str], list[str], list[str], list[str]]


@pytest.fixture
def three(plain: Corpus) -> Task:
    return task(plain, ["b", "d", "f"], 8)


def test_estimate_is_near_what_other_means_come_to(classifier: FewShotClassifier, three: Task) -> None:
    texts, labels, queries, true = three
    found = classifier.fit(texts, labels).cv_accuracy_
    assert found == pytest.approx(classifier.score(queries, true), abs=0.15)
    order = np.random.default_rng(0).permutation(len(texts))
    again = classifier.fit([texts[i] for i in order], [labels[i] for i in order])
    assert again.cv_accuracy_ == found
    folds = StratifiedKFold(8, shuffle=True, random_state=0)
    by_hand = cross_val_score(FewShotClassifier(classifier.adapter, steps=0), np.array(texts), labels, cv=folds)
    assert found == pytest.approx(by_hand.mean(), abs=0.15)


def test_random_labels_are_told_by_chance(classifier: FewShotClassifier, plain: Corpus) -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(30):
        texts = [plain.texts[row] for row in rng.choice(len(plain.texts), 16, replace=False)]
        found.append(classifier.fit(texts, list("abcd") * 4, label_names=None).cv_accuracy_)
    assert np.mean(found) == pytest.approx(0.25, abs=3 * np.std(found) / np.sqrt(len(found)))


def test_a_wrong_label_is_the_first_suspect(classifier: FewShotClassifier, three: Task) -> None:
    texts, labels = [*three[0], "gal ger"], [*three[1], "g"]  # of a class with one example nothing is said
    for row in (0, 10, 23):
        wrong = [*labels[:row], "d" if labels[row] == "b" else "b", *labels[row + 1 :]]
        suspects = classifier.fit(texts, wrong).suspect_labels()
        assert suspects[0][:4] == (row, texts[row], wrong[row], labels[row])
        assert (texts[row], wrong[row]) == classifier.support_[row]  # type: ignore[index]
        sure = [suspect.probability for suspect in suspects]
        assert sure == sorted(sure, reverse=True)
        assert 1 / 3 < sure[0] <= 1
        assert "g" not in {label for suspect in suspects for label in (suspect.label, suspect.likely)}


@pytest.mark.parametrize(("texts", "labels"), [(SUPPORT[::2], "bfk"), (SUPPORT[:3], "bbf"), ((), "")], ids=len)
def test_where_there_are_no_folds_nothing_is_said(classifier: FewShotClassifier, texts: Any, labels: Any) -> None:
    classifier.fit(texts, list(labels), label_names=NAMES)
    assert classifier.cv_accuracy_ is None
    with pytest.raises(DataError, match="expected two of each of two classes"):
        classifier.suspect_labels()


def test_each_fit_speaks_of_its_own_examples(classifier: FewShotClassifier, three: Task, tmp_path: Path) -> None:
    texts, labels, *_ = three
    found = classifier.fit(texts, labels).cv_accuracy_
    classifier.save_pretrained(tmp_path)
    loaded = FewShotClassifier.from_pretrained(tmp_path)
    assert loaded.name_weight_ == pytest.approx(classifier.name_weight_)
    for call in (lambda: loaded.cv_accuracy_, loaded.suspect_labels):
        with pytest.raises(NotFittedError, match="saved without its examples"):
            call()
    assert not hasattr(loaded, "cv_accuracy_")
    assert classifier.fit(texts, ["b", "d", "f"] * 8).cv_accuracy_ < found


def test_token_states_are_not_shown_as_texts(classifier: FewShotClassifier, three: Task, tmp_path: Path) -> None:
    texts, labels = [*three[0], *three[0][:2]], [*three[1][:-1], "b", "b", "d"]  # one text twice, of two classes
    classifier.fit(texts, labels).save_pretrained(tmp_path, include_support="states")
    found = FewShotClassifier.from_pretrained(tmp_path).suspect_labels()
    assert found[0].text is None
    assert found[0].row == classifier.suspect_labels()[0].row
    assert {text for _, text, *_ in found} == {None}


def test_what_was_told_goes_with_the_task(classifier: FewShotClassifier, three: Task) -> None:
    texts, labels, *_ = three
    one = clone(classifier).fit([*texts, "bal secretword"], [*labels, "b"])
    assert one.cv_accuracy_ is not None
    task = weakref.ref(one._fitted)
    one.fit(texts, labels)
    gc.collect()
    assert task() is None
    assert b"secretword" not in pickle.dumps(one)


def test_names_weigh_by_what_they_tell(classifier: FewShotClassifier, three: Task) -> None:
    texts, labels, *_ = three
    names = {"b": "bal bos ber", "d": "dal dos der", "f": "fal fos fer"}
    permuted = {"b": names["d"], "d": names["f"], "f": names["b"]}
    by_names = [classifier.fit(texts, labels, label_names=said).name_weight_ for said in (None, permuted, names)]
    assert by_names == sorted(by_names)
    assert by_names[0] == 0
    assert by_names[1] < 0.5 * by_names[2] < 0.5
    assert classifier.fit(label_names=names).name_weight_ == 1
