import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.errors import DataError

ROWS = [
    {"text": "where is my card?", "label": "card"},
    {"text": 'I said "no", twice', "label": "refuse"},
    {"text": "größer, 更大", "label": "size"},
    {"text": "it got lost", "label": "card"},
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the tests load out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_json_list(path: Path) -> None:
    write(path, json.dumps(ROWS, indent=1))


def write_json_lines(path: Path) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(path)


def load(path: Path | str) -> Corpus:
    return load_corpus(CorpusSettings(str(path)))


def in_hand(texts: list, labels: list, names: list[str] | None = None) -> datasets.Dataset:
    dataset = datasets.Dataset.from_dict({"text": texts, "label": labels})
    return dataset if names is None else dataset.cast_column("label", datasets.ClassLabel(names=names))


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("corpus.json", write_json_list),
        ("corpus.json", write_json_lines),
        ("corpus.jsonl", write_json_lines),
        ("corpus.csv", write_csv),
        ("corpus.tsv", write_csv),
        ("corpus.parquet", write_parquet),
        ("corpus.JSONL", write_json_lines),
    ],
    ids=["json list", "json lines", "jsonl", "csv", "tsv", "parquet", "upper case"],
)
def test_file_of_each_kind_loads_to_the_same_corpus(tmp_path: Path, name: str, writer: Callable[[Path], None]) -> None:
    path = tmp_path / name
    writer(path)
    corpus = load(path)
    assert list(corpus.texts) == [row["text"] for row in ROWS]
    assert corpus.class_names == ("card", "refuse", "size")
    assert corpus.labels.tolist() == [0, 1, 2, 0]
    assert corpus.labels.dtype == np.int64
    assert corpus.name == "corpus"
    assert corpus.sha256 == Corpus.from_dataset(datasets.Dataset.from_list(ROWS), name="other").sha256


def test_file_changed_in_place_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    write(path, '{"text": "a", "label": "x"}\n')
    assert list(load(path).texts) == ["a"]
    write(path, '{"text": "changed", "label": "x"}\n')
    assert list(load(path).texts) == ["changed"]


def test_name_in_records_can_be_given(tmp_path: Path) -> None:
    write_csv(tmp_path / "corpus.csv")
    assert load_corpus(CorpusSettings(str(tmp_path / "corpus.csv"), name="mine")).name == "mine"


def test_class_label_names_are_kept_in_their_order() -> None:
    corpus = Corpus.from_dataset(in_hand(["a", "b", "c"], [1, 0, 1], ["zebra", "ape", "unused"]), name="c")
    assert corpus.class_names == ("zebra", "ape", "unused")
    assert corpus.labels.tolist() == [1, 0, 1]


def test_string_labels_are_kept_as_they_are() -> None:
    labels = ["01", " Space ", "1.0", "1", "Ünï"]
    corpus = Corpus.from_dataset(in_hand(list("abcde"), labels), name="c")
    assert [corpus.class_names[label] for label in corpus.labels] == labels


def test_integer_labels_become_strings() -> None:
    corpus = Corpus.from_dataset(in_hand(["a", "b", "c"], [10, -2, 10]), name="c")
    assert [corpus.class_names[label] for label in corpus.labels] == ["10", "-2", "10"]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.csv", "id,utterance,label,intent\n1,a,no,x\n2,b,no,y\n")
    corpus = load_corpus(CorpusSettings(path, text_column="utterance", label_column="intent"))
    assert list(corpus.texts) == ["a", "b"]
    assert corpus.class_names == ("x", "y")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_words_for_nothing_in_a_csv_stay_text(tmp_path: Path, suffix: str) -> None:
    separator = "\t" if suffix == ".tsv" else ","
    rows = [["text", "label"], ["null", "NA"], ["NA", "None"], ["NaN", "null"]]
    corpus = load(write(tmp_path / f"corpus{suffix}", "".join(separator.join(row) + "\n" for row in rows)))
    assert list(corpus.texts) == ["null", "NA", "NaN"]
    assert corpus.class_names == ("NA", "None", "null")


def test_digits_in_a_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    # a CSV has no types: "01" there is the string that it is in JSON
    corpus = load(write(tmp_path / "corpus.csv", "text,label\n007,01\n42,02\n"))
    assert list(corpus.texts) == ["007", "42"]
    assert corpus.class_names == ("01", "02")


@pytest.mark.parametrize(
    ("settings", "role", "column"),
    [({"text_column": "body"}, "text_column", "body"), ({"label_column": "intent"}, "label_column", "intent")],
)
def test_missing_column_is_named_with_the_columns_there_are(
    tmp_path: Path, settings: dict[str, str], role: str, column: str
) -> None:
    path = tmp_path / "corpus.csv"
    write_csv(path)
    with pytest.raises(DataError) as caught:
        load_corpus(CorpusSettings(str(path), **settings))
    assert f"no column '{column}' ({role})" in str(caught.value)
    assert "['text', 'label']" in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], "'c', column 'text', row 1: text is null"),
        ([3, 4], "'c', column 'text', row 0: text is int 3, expected a string"),
        (["a", ""], "'c', column 'text', row 1: text is empty"),
        (["a", " \t\n"], "'c', column 'text', row 1: text is empty"),
    ],
    ids=["null", "number", "empty", "blank"],
)
def test_unusable_text_is_named_with_its_row(texts: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Corpus.from_dataset(in_hand(texts, ["x", "y"]), name="c")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["x", None], "row 1: label in column 'label' is null"),
        ([1, None], "row 1: label in column 'label' is null"),
        ([0.5, 1.0], "row 0: label in column 'label' is float 0.5, expected a string or an integer"),
        ([True, False], "row 0: label in column 'label' is bool True"),
        ([["x"], ["y"]], "row 0: label in column 'label' is list"),
    ],
    ids=["null string", "null integer", "float", "bool", "list"],
)
def test_unusable_label_is_named_with_its_row(labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Corpus.from_dataset(in_hand(["a", "b"], labels), name="c")


def test_null_class_label_is_named_with_its_row() -> None:
    with pytest.raises(DataError, match="row 1: label in column 'label' is null"):
        Corpus.from_dataset(in_hand(["a", "b"], [0, None], ["x", "y"]), name="c")


def test_hidden_class_labels_are_named_and_counted() -> None:
    # the Hub's convention for the labels of a withheld test split is -1
    with pytest.raises(DataError, match=r"row 1: label is -1, expected 0 to 1 \(2 such rows\)"):
        Corpus.from_dataset(in_hand(["a", "b", "c"], [0, -1, -1], ["x", "y"]), name="c")


def test_unusable_row_of_a_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", '{"text": "a", "label": "x"}\n{"text": null, "label": "x"}\n')
    with pytest.raises(DataError, match="corpus 'corpus', column 'text', row 1: text is null"):
        load(path)


def test_empty_label_cell_of_a_csv_is_named_with_its_row(tmp_path: Path) -> None:
    # a row without a label must not become the one row of a class without a name
    with pytest.raises(DataError, match="row 1"):
        load(write(tmp_path / "corpus.csv", "text,label\na,x\nb,\nc,y\n"))


def test_empty_text_cell_of_a_csv_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: text is empty"):
        load(write(tmp_path / "corpus.csv", "text,label\na,x\n,y\n"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*nowhere\.csv"):
        load(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.csv", "c.tsv", "c.parquet"])
def test_empty_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"file is empty: .*{name}"):
        load(write(tmp_path / name, ""))


@pytest.mark.parametrize(("name", "text"), [("c.csv", "text,label\n"), ("c.json", "[]"), ("c.jsonl", "\n")])
def test_file_without_rows_is_named(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / name, text))
    assert name in str(caught.value)
    assert any(word in str(caught.value) for word in ("no rows", "empty", "0 rows"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", '[{"text": "a", "label": "x"}, {"text": "b"'),
        ("c.jsonl", '{"text": "a", "label": "x"}\n{"text":\n'),
        ("c.csv", "text,label\na,x\nb,y,z,w\n"),
        ("c.parquet", "no parquet"),
    ],
)
def test_malformed_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match=f"cannot read .*{name} as "):
        load(write(tmp_path / name, text))


def test_hub_dataset_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(DataError, match=r"'textmeta/no-such-data'.*split 'test'.*\.jsonl"):
        load_corpus(CorpusSettings("textmeta/no-such-data", split="test"))


def test_corpus_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="'c' is empty: 0 rows"):
        Corpus("c", [], np.array([], dtype=np.int64), ("x",))


def test_texts_and_labels_must_be_as_many() -> None:
    with pytest.raises(DataError, match="2 texts but 1 labels"):
        Corpus("c", ["a", "b"], np.array([0]), ("x",))


def test_class_name_given_twice_is_named() -> None:
    with pytest.raises(DataError, match=r"more than once: \['x'\]"):
        Corpus("c", ["a"], np.array([0]), ("x", "y", "x"))


def test_rows_of_a_class_are_ascending_and_complete() -> None:
    corpus = Corpus("c", list("abcdef"), np.array([2, 0, 2, 0, 0, 2]), ("x", "none", "z"))
    assert corpus.rows_of(0).tolist() == [1, 3, 4]
    assert corpus.rows_of(1).tolist() == []
    assert corpus.rows_of(2).tolist() == [0, 2, 5]
    assert corpus.rows_of(2).dtype == np.int64


def test_rows_of_the_last_class_may_be_none() -> None:
    corpus = Corpus("c", ["a", "b"], np.array([0, 0]), ("x", "none"))
    assert corpus.rows_of(0).tolist() == [0, 1]
    assert corpus.rows_of(1).tolist() == []


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
    assert "'c' has no class 'nowhere' (2 of the 3 asked for are missing); it has 2: x, y" in str(caught.value)


def test_hash_changes_with_texts_labels_and_class_names() -> None:
    base = Corpus("c", ["a", "b"], np.array([0, 1]), ("x", "y"))
    changed = [
        Corpus("c", ["a", "B"], np.array([0, 1]), ("x", "y")),
        Corpus("c", ["a", "b"], np.array([0, 0]), ("x", "y")),
        Corpus("c", ["a", "b"], np.array([0, 1]), ("x", "z")),
    ]
    assert base.sha256 == Corpus("renamed", ["a", "b"], np.array([0, 1], dtype=np.int32), ("x", "y")).sha256
    assert len({corpus.sha256 for corpus in [base, *changed]}) == 4


def test_equal_texts_of_a_class_count_once() -> None:
    corpus = Corpus.from_pairs("c", ["x", "y", "x", "x", "z"], ["a", "a", "a", "b", "b"])
    assert [corpus.rows_of(label).tolist() for label in (0, 1)] == [[0, 1], [3, 4]]
    assert len(corpus.restrict(["a"])) == 2


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    """Even where its name, size and time are those of the file that was read before."""
    path = tmp_path / "c.csv"
    path.write_text("text,label\nold,a\n")
    stamp = path.stat()
    assert list(load_corpus(CorpusSettings(str(path))).texts) == ["old"]
    path.write_text("text,label\nnew,a\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert list(load_corpus(CorpusSettings(str(path))).texts) == ["new"]


def test_restricting_to_nothing_is_named() -> None:
    with pytest.raises(DataError, match="no classes"):
        Corpus.from_pairs("c", ["x"], ["a"]).restrict([])


def test_pairs_without_a_label_are_named() -> None:
    with pytest.raises(DataError, match="row 1: label is None"):
        Corpus.from_pairs("c", ["x", "y"], ["a", None])  # type: ignore[list-item]
