"""Texts, labels and names as users give them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from textmeta.data.labels import checked_labels, checked_texts, plain, read_labels, readable_name, task_classes
from textmeta.errors import AdapterError, DataError

CARDS = ["lost", "arrived", "lost"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "^fit: expected a list, or one column, of texts, given one string"),
        (["a", float("nan")], "^fit, row 1: text is null, expected a string"),
        (pd.Series(["a", pd.NA], dtype="string"), "^fit, row 1: text is null, expected a string"),
        (["a", None], "^fit, row 1: text is null, expected a string"),
        (["a", 3], "^fit, row 1: text is int 3"),
        (["a", " \n"], "^fit, row 1: text is empty"),
        (["half \ud83d"], "^fit, row 0: text .* is not valid Unicode"),
    ],
)
def test_text_that_cannot_be_read_is_named(texts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_texts(texts, "fit")


WORDS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "given",
    [
        tuple(WORDS),
        (word for word in WORDS),
        dict(enumerate(WORDS)).values(),
        np.array(WORDS),
        np.array(WORDS, dtype=object)[:, None],
        pd.Series(WORDS, index=[7, 8, 9]),
        pd.Series(WORDS, dtype="category"),
        pd.Index(WORDS),
        pd.Series(WORDS, index=["columns", "column_names", "to_pylist"]),
        pd.DataFrame({"words": WORDS}),
        pd.DataFrame(WORDS),
        pa.array(WORDS),
        pa.chunked_array([WORDS[:1], WORDS[1:]]),
        pa.table({"words": WORDS}),
        datasets.Dataset.from_dict({"words": WORDS}),
        datasets.Dataset.from_dict({"words": WORDS})["words"],
    ],
    ids=lambda given: f"{type(given).__module__}.{type(given).__name__}",
)
def test_one_column_is_taken_in_whatever_it_comes(given: Any) -> None:
    given = list(given) if isinstance(given, Iterator) else given
    assert checked_texts(iter(given) if isinstance(given, list) else given, "fit") == WORDS
    assert repr(checked_labels(given)) == repr(WORDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": WORDS, "label": WORDS}, "a dict with 2 columns: 'text', 'label'; give one of them"),
        ({"text": WORDS}, "a dict with 1 columns: 'text'"),
        (pd.DataFrame({"text": WORDS, 7: WORDS}), "a DataFrame with 2 columns: 'text', 7"),
        (pa.table({"text": WORDS, "label": WORDS}), "a Table with 2 columns: 'text', 'label'"),
        (datasets.Dataset.from_dict({"a": WORDS, "b": WORDS}), "a Dataset with 2 columns: 'a', 'b'"),
        (np.array([WORDS, WORDS]), r"a ndarray of shape \(2, 3\)"),
        (np.array("a"), r"a ndarray of shape \(\)"),
        (set(WORDS), "a set, which has no order"),
        (b"a", "one string"),
        (None, "NoneType None"),
        (3, "int 3"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_column_is_said(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^fit: expected a list, or one column, of texts, given {message}"):
        checked_texts(given, "fit")
    with pytest.raises(DataError, match=f"^labels: expected a list, or one column, of labels, given {message}"):
        checked_labels(given)


def test_half_of_a_character_may_be_replaced() -> None:
    given = ["a", "half \ud83d", "\ude00", "both \ud83d\ude00"]
    expected = ["a", "half \ufffd", "\ufffd", "both \U0001f600"]
    assert checked_texts(given, "fit", errors="replace") == expected
    with pytest.raises(DataError, match="row 1: text is null"):
        checked_texts(["\ud83d", None], "fit", errors="replace")


def test_labels_become_pythons_own() -> None:
    given = [np.str_("a"), np.int64(3), np.float32(0.5), np.bool_(True), torch.tensor(7), "b", 2**70]
    found = checked_labels(given)  # type: ignore[arg-type]
    assert repr(found) == repr(["a", 3, 0.5, True, 7, "b", 2**70])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("ab", "given one string"),
        (pd.Series([1, pd.NA], dtype="Int64"), "^row 1: the label is missing"),
        (["a", frozenset("b")], "^row 1: label .* is of type frozenset"),
        (["a", None], "^row 1: the label is missing"),
        ([float("nan")], "^row 0: the label is missing"),
        ([np.float64("nan")], "^row 0: the label is missing"),
        (["a", ("b", "c")], r"^row 1: label \('b', 'c'\) is of type tuple; labels are strings, whole numbers"),
        ([np.array(["a"])], "^row 0: label .* is of type ndarray"),
    ],
)
def test_label_that_cannot_be_one_is_named(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_labels(labels)


# ------------------------------------------------------------------------------------------------- classes and names


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (CARDS, ["arrived", "lost"]),
        (["PlayMusic", "card_lost", "é.t2"], ["play music", "card lost", "é t2"]),
        (["更大", "更小"], ["更大", "更小"]),
        (["1", "2"], None),
        (["lost", "2"], None),
        (["lost", "+"], None),
        (["", "lost"], None),
        ([1, 2], None),
        ([True, False], None),
        (["lost", 2], None),
    ],
)
def test_labels_are_read_all_or_none(labels: list, names: list[str] | None) -> None:
    assert task_classes(labels, "auto")[1] == names


def test_none_reads_nothing_and_classes_are_sorted_where_they_can_be() -> None:
    assert task_classes(CARDS, None) == (["arrived", "lost"], None)
    assert task_classes([10, 9, 10], None)[0] == [9, 10]
    assert task_classes(["b", 1, "a"], None)[0] == ["b", 1, "a"]


def test_a_mapping_names_classes_with_and_without_examples() -> None:
    names = {2: "lost card", 0: "arrival", 1: "fee"}
    assert task_classes([2, 0, 2], names) == ([0, 1, 2], ["arrival", "fee", "lost card"])
    assert task_classes([], names) == ([0, 1, 2], ["arrival", "fee", "lost card"])
    assert task_classes([0, 1, 2], {np.int64(i): str(name) for i, name in names.items()})[1] is not None


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_list_names_the_sorted_classes(kind: Any) -> None:
    assert task_classes(CARDS, kind(["it came", "it is lost"])) == (["arrived", "lost"], ["it came", "it is lost"])


@pytest.mark.parametrize(
    ("labels", "label_names", "message"),
    [
        ([], "auto", "^fit without examples needs label_names: a mapping"),
        ([], None, "^fit without examples needs label_names: a mapping"),
        ([], ["a", "b"], "^fit without examples needs label_names: a mapping"),
        ([], {}, "^fit without examples needs label_names: a mapping"),
        ([], {"lost": "lost card"}, r"at least 2 classes, found 1: \['lost'\]; classes without examples can be given"),
        (["lost"], "auto", r"at least 2 classes, found 1: \['lost'\]"),
        (CARDS, {"arrived": "a", "lots": "b", "x": "c"}, "label 'lost' has no name .* 2 without .* nearest 'lots'"),
        ([0, 1], {"0": "a", "1": "b"}, "label 0 has no name in label_names.* nearest '0'; .*: 0, 1 left out"),
        (
            CARDS,
            {"arrived": "a"},
            "^fit: label 'lost' has no name in label_names; expected a name for every class: 'lost' left out",
        ),
        (CARDS, {}, "no name in label_names; expected a name for every class: 'lost', 'arrived' left out"),
        (CARDS, ["a"], "^fit: label_names has 1 names for 2 classes: 'arrived', 'lost'"),
        (CARDS, {"arrived": "a", "lost": ""}, "^fit, label_names of 'lost': text is empty"),
        (CARDS, {"arrived": "a", "lost": None}, "^fit, label_names of 'lost': text is null"),
        (CARDS, ["a", 3], "^fit, label_names of 'lost': text is int 3"),
        ([], {"lost": "a", None: "b"}, "^fit, label_names, key 1: the label is missing"),
        ([1, True], None, "^fit, row 1: label True equals 1 but is of another type"),
        ([0, 1], {0: "a", 1.0: "b"}, "^fit, label_names, key 1: label 1.0 equals 1 but is of another type"),
        (CARDS, "labels", "label_names must be 'auto', a mapping .*, a list .*, or None, given str 'labels'"),
        (CARDS, True, "label_names must be .* given bool True"),
    ],
)
def test_what_cannot_be_a_task_is_said(labels: list, label_names: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_classes(labels, label_names)


def test_names_are_words() -> None:
    for label in ("PlayMusic", "play_music", "play.music", " play  music "):
        assert readable_name(label) == "play music"
    assert readable_name("+1") == "1"
    assert readable_name("??") == "??"


@pytest.mark.parametrize("stored", [["a", "a"], [1, True], [None, 1], [["a"]], [{"float": "nan"}], [{"float": "1"}]])
def test_stored_labels_that_cannot_be_are_refused(stored: list) -> None:
    with pytest.raises(AdapterError, match=r"^classes\.json: "):
        read_labels(stored, Path("classes.json"))


def test_what_is_shown_of_strangers_text_is_plain() -> None:
    assert plain("a\n`b`\x1b[2J<i>|") == "a\ufffd\ufffdb\ufffd\ufffd[2J\ufffdi\ufffd\ufffd"
    assert plain(10**400) == "a very large number"
    assert len(plain("x" * 1000)) == 500
