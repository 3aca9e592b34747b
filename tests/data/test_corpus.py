"""Corpora in hand, and the one that comes with textmeta."""

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from textmeta import Corpus, EpisodeSampler, EpisodeSettings
from textmeta.data import bundled
from textmeta.data.bundled import load_bundled
from textmeta.data.splits import PARTS
from textmeta.errors import DataError


def in_hand(texts: list, labels: list, names: list[str] | None = None) -> datasets.Dataset:
    dataset = datasets.Dataset.from_dict({"text": texts, "label": labels})
    return dataset if names is None else dataset.cast_column("label", datasets.ClassLabel(names=names))


def test_class_label_names_are_kept_in_their_order() -> None:
    corpus = Corpus.from_dataset(in_hand(["a", "b", "c"], [1, 0, 1], ["zebra", "ape", "unused"]), name="c")
    assert corpus.class_names == ("zebra", "ape", "unused")
    assert corpus.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("labels", [["01", " Space ", "1.0", "1", "Ünï"], [10, -2, 10]], ids=["strings", "integers"])
def test_other_labels_are_classes_as_they_are_written(labels: list) -> None:
    corpus = Corpus.from_dataset(in_hand(list("abcde")[: len(labels)], labels), name="c")
    assert [corpus.class_names[label] for label in corpus.labels] == list(map(str, labels))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", None], ["x", "y"], "'c', row 1: text is null"),
        (["a", "b"], ["x", None], "row 1: label is null"),
        (["a", "b"], [1, None], "row 1: label is null"),
        (["a", "b"], [0.5, 1.0], "row 0: label is float 0.5, expected a string or a whole number"),
        (["a", "b"], [True, False], "row 0: label is bool True"),
        (["a", "b"], [["x"], ["y"]], "row 0: label is list"),
    ],
)
def test_unusable_text_or_label_is_named_with_its_row(texts: list, labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Corpus.from_dataset(in_hand(texts, labels), name="c")


def test_hidden_class_labels_are_named_and_counted() -> None:
    # the Hub's convention for the labels of a withheld test split is -1
    with pytest.raises(DataError, match=r"row 1: label is -1, expected 0 to 1 \(2 such rows\)"):
        Corpus.from_dataset(in_hand(["a", "b", "c"], [0, -1, -1], ["x", "y"]), name="c")
    with pytest.raises(DataError, match="row 1: label is null"):
        Corpus.from_dataset(in_hand(["a", "b"], [0, None], ["x", "y"]), name="c")


def test_what_is_no_corpus_is_an_error() -> None:
    with pytest.raises(DataError, match="'c' is empty: 0 rows"):
        Corpus("c", [], np.array([], dtype=np.int64), ("x",))
    with pytest.raises(DataError, match="2 texts but 1 labels"):
        Corpus("c", ["a", "b"], np.array([0]), ("x",))
    with pytest.raises(DataError, match=r"more than once: \['x'\]"):
        Corpus("c", ["a"], np.array([0]), ("x", "y", "x"))
    with pytest.raises(DataError, match="row 1: label is null"):
        Corpus.from_pairs("c", ["x", "y"], ["a", None])


def test_columns_of_other_libraries_make_the_same_corpus() -> None:
    """Which ones is in test_labels.py."""
    texts, labels, numbers = ["a", "b", "c"], ["y", "x", "y"], [10, 9, 10]
    for given in (labels, numbers):
        expected = Corpus.from_pairs("c", texts, given)
        assert expected.class_names == tuple(sorted({str(label) for label in given}))
        for make in (np.array, pd.Series):
            assert Corpus.from_pairs("c", make(texts), make(given)).sha256 == expected.sha256
    with pytest.raises(DataError, match="corpus 'c': expected a list, or one column, of texts, given one string"):
        Corpus.from_pairs("c", "abc", labels)


def test_rows_of_a_class_are_ascending_and_complete() -> None:
    corpus = Corpus("c", list("abcdef"), np.array([2, 0, 2, 0, 0, 2]), ("x", "none", "z"))
    assert corpus.rows_of(0).tolist() == [1, 3, 4]
    assert corpus.rows_of(1).tolist() == []
    assert corpus.rows_of(2).tolist() == [0, 2, 5]
    assert corpus.rows_of(2).dtype == np.int64
    twice = Corpus.from_pairs("c", ["x", "y", "x", "x", "z"], ["a", "a", "a", "b", "b"])
    assert [twice.rows_of(label).tolist() for label in (0, 1)] == [[0, 1], [3, 4]], "equal texts of a class count once"
    assert len(twice.restrict(["a"])) == 2


def test_restrict_keeps_the_rows_of_the_classes_asked_for_in_the_order_given() -> None:
    corpus = Corpus("c", list("abcdef"), np.array([2, 0, 2, 1, 0, 2]), ("x", "y", "z"))
    restricted = corpus.restrict(["z", "x"])
    assert restricted.class_names == ("z", "x")
    pairs = {(text, restricted.class_names[i]) for text, i in zip(restricted.texts, restricted.labels, strict=True)}
    assert pairs == {("a", "z"), ("c", "z"), ("f", "z"), ("b", "x"), ("e", "x")}
    assert len(restricted) == 5


def test_restrict_names_a_missing_class_and_the_number_missing() -> None:
    corpus = Corpus("c", ["a", "b"], np.array([0, 1]), ("x", "y"))
    with pytest.raises(DataError) as caught:
        corpus.restrict(["x", "nowhere", "neither"])
    assert "'c' has no class 'nowhere' (2 of the 3 asked for are missing); it has 2: 'x', 'y'" in str(caught.value)
    with pytest.raises(DataError, match="no classes"):
        corpus.restrict([])


def test_hash_changes_with_texts_labels_and_class_names() -> None:
    base = Corpus("c", ["a", "b"], np.array([0, 1]), ("x", "y"))
    changed = [
        Corpus("c", ["a", "B"], np.array([0, 1]), ("x", "y")),
        Corpus("c", ["a", "b"], np.array([0, 0]), ("x", "y")),
        Corpus("c", ["a", "b"], np.array([0, 1]), ("x", "z")),
    ]
    assert base.sha256 == Corpus("renamed", ["a", "b"], np.array([0, 1], dtype=np.int32), ("x", "y")).sha256
    assert len({corpus.sha256 for corpus in [base, *changed]}) == 4


# The bundled corpus


CORPUS, SPLIT = load_bundled()
ROWS = map(json.loads, (files(bundled) / "everyday.jsonl").read_text(encoding="utf-8").splitlines())
DOMAINS = {(row["label"], row["domain"]) for row in ROWS}


def test_texts_are_unique_whatever_their_case_and_punctuation() -> None:
    count = Counter(" ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())) for text in CORPUS.texts)
    assert [text for text, number in count.items() if number > 1] == []


def test_parts_are_complete_large_enough_for_episodes_and_share_no_domain() -> None:
    parts = [getattr(SPLIT, part) for part in PARTS]
    assert sorted(sum(parts, ())) == sorted(CORPUS.class_names)
    domains = [{dict(DOMAINS)[name] for name in part} for part in parts]
    assert len(set.union(*domains)) == sum(map(len, domains))
    for part in parts:
        EpisodeSampler(CORPUS.restrict(part), EpisodeSettings(5, (1, 5), 5), seed=0)[0]


def test_license_of_the_texts_is_shipped() -> None:
    assert "CC0" in (Path(str(files(bundled))) / "LICENSE").read_text(encoding="utf-8")
