"""Class splits, and what is told of corpora before training."""

import json
from pathlib import Path

import pytest

from tests.given import Logged
from textmeta.data.corpus import Corpus, CorpusSettings
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.data.overview import log_corpora, warn_of_overlap
from textmeta.data.splits import PARTS, ClassSplit, draw_class_split, load_parts, read_class_split
from textmeta.errors import DataError

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "splits").glob("*.json"))
FLAT = {"train": ["a", "b"], "valid": ["c"], "test": ["d"]}
NAMES = [f"class {number}" for number in range(20)]


def write(folder: Path, content: object) -> Path:
    path = folder / "splits.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_corpora_are_split_by_a_fold_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").write_text("text,label\n" + "".join(f"{name} text,{name}\n" for name in "abcd"))
    path = write(tmp_path, {"01": FLAT, "02": {"train": ["d"], "valid": ["a"], "test": ["b", "c"]}})
    parts = load_parts([CorpusSettings(str(tmp_path / "corpus.csv"), splits=str(path))], "02", texts=1)
    assert {part: corpus.class_names for part, (corpus,) in parts.items()} == {
        "train": ("d",), "valid": ("a",), "test": ("b", "c"),
    }  # fmt: skip
    assert parts["train"][0].source["fold"] == "02"
    assert read_class_split(write(tmp_path, FLAT)) == ClassSplit(("a", "b"), ("c",), ("d",))


def test_class_given_twice_is_named() -> None:
    with pytest.raises(DataError, match="class 'b' is given 2 times, in train and test"):
        ClassSplit(("a", "b"), ("c",), ("d", "b"))
    with pytest.raises(DataError, match="class 'c' is given 2 times, in valid;"):
        ClassSplit(("a",), ("c", "c"), ("d",))


FOLDS = json.dumps({"02": FLAT, "01": FLAT})


@pytest.mark.parametrize(
    ("content", "fold", "message"),
    [
        (FOLDS, "03", r"no fold '03', but \['01', '02'\]"),
        (FOLDS, None, r"no fold None, but \['01', '02'\]"),
        (json.dumps(FLAT), "01", "no fold '01', but one split"),
        ('{"01": {"train": ["a"], "valid": ["b"]}}', "01", "fold 01: 'test' must be a list of class names"),
        (json.dumps({"01": {**FLAT, "valid": "b"}}), "01", "fold 01: 'valid' must be a list of class names"),
        (json.dumps({"01": {**FLAT, "valid": [1]}}), "01", "fold 01: 'valid' must be a list of class names"),
        ('{"01": ["a", "b"]}', "01", "fold 01: 'train' must be a list of class names"),
        ('["a"]', None, "expected a JSON object, found list"),
        ("{", None, r"splits\.json"),
    ],
)
def test_file_that_has_no_such_split_is_named(tmp_path: Path, content: str, fold: str | None, message: str) -> None:
    path = tmp_path / "splits.json"
    with pytest.raises(DataError, match=r"splits\.json"):
        read_class_split(path)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_class_split(path, fold)


def test_drawn_split_is_complete_and_a_function_of_the_seed_and_the_names() -> None:
    split = draw_class_split(NAMES, seed=0)
    parts = [set(getattr(split, part)) for part in PARTS]
    assert [len(part) for part in parts] == [10, 5, 5]
    assert set.union(*parts) == set(NAMES)
    assert draw_class_split(NAMES, seed=3) == draw_class_split(reversed(NAMES), seed=3)
    assert len({draw_class_split(NAMES, seed=seed) for seed in range(10)}) == 10
    assert draw_class_split(NAMES).train != tuple(sorted(NAMES)[:10])


@pytest.mark.parametrize("number", range(20))
def test_every_part_of_a_drawn_split_has_two_classes_or_there_are_too_few(number: int) -> None:
    if number < 8:
        with pytest.raises(DataError, match=f"{number} classes are too few .* at least 8"):
            draw_class_split(NAMES[:number])
    else:
        assert all(len(getattr(draw_class_split(NAMES[:number]), part)) >= 2 for part in PARTS)


def corpus_file(folder: Path, classes: int, texts: int, name: str = "small", further: int = 0) -> str:
    """Classes of so many texts, and further ones of two."""
    sizes = [texts] * classes + [2] * further
    rows = [f"{own} text {number},{own}\n" for own, size in zip(NAMES, sizes, strict=False) for number in range(size)]
    (folder / f"{name}.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    return str(folder / f"{name}.csv")


@pytest.mark.parametrize(("classes", "texts"), [(2, 10), (4, 10), (5, 10), (7, 10), (8, 4), (8, 9)])
def test_small_file_is_told_what_holding_classes_out_needs(tmp_path: Path, classes: int, texts: int) -> None:
    with pytest.raises(DataError) as caught:
        load_parts(corpus_file(tmp_path, classes, texts))
    large = classes * (texts == 10)
    told = f"fewer than 8 classes of 10 different texts: small ({large} of its {classes} classes); `--hold_out false`"
    assert told in str(caught.value)


def test_of_several_corpora_those_with_few_classes_are_trained_on_whole(tmp_path: Path, caplog: Logged) -> None:
    for name, classes, further in (("a", 8, 0), ("b", 3, 4), ("c", 9, 8)):
        corpus_file(tmp_path, classes, 10, name, further)
    with caplog.at_level("INFO", "textmeta"):
        parts = load_parts(tmp_path)
    assert "1 of 3 corpora are trained on whole, with fewer than 8 classes" in caplog.text
    assert "b (3 of its 7 classes)" in caplog.text
    assert [corpus.name for corpus in parts["train"]] == ["a", "b", "c"]
    assert [len(corpus.class_names) for corpus in parts["train"]] == [4, 7, 4 + 8]
    for part in ("valid", "test"):
        assert [corpus.name for corpus in parts[part]] == ["a", "c"]
        assert all(len(corpus) == 10 * len(corpus.class_names) >= 20 for corpus in parts[part])
    assert set(NAMES[9:17]) < set(parts["train"][2].class_names), "the small classes of c are not held out"
    split = draw_class_split(NAMES[:8])
    assert [parts[part][0].class_names for part in PARTS] == [getattr(split, part) for part in PARTS], "as ever"


def test_small_class_that_a_file_holds_out_is_named(tmp_path: Path) -> None:
    splits = write(tmp_path, {"train": NAMES[:2], "valid": NAMES[2:4], "test": NAMES[4:6]})
    with pytest.raises(DataError, match=r"small\.csv: fewer than 10 texts of 'class 5', which are held out"):
        load_parts(CorpusSettings(corpus_file(tmp_path, 5, 10, further=1), splits=str(splits)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_splits_have_five_different_folds_of_the_same_classes(path: Path) -> None:
    folds = [f"{number:02}" for number in range(1, 6)]
    assert sorted(json.loads(path.read_text(encoding="utf-8"))) == folds
    splits = [read_class_split(path, fold) for fold in folds]  # refuses classes in two parts
    classes = {frozenset(split.train + split.valid + split.test) for split in splits}
    assert len(classes) == 1
    assert len({split.train for split in splits}) == 5
    assert all(min(len(split.train), len(split.valid), len(split.test)) >= 5 for split in splits)


# What is told of corpora before training


ALIKE = "alike but for case, spaces, punctuation and digits"


def corpus_of(name: str, words: str = "ab", rows: int = 5, more: list[tuple[str, str]] | None = None) -> Corpus:
    """Two classes of so many texts that are not alike, and more pairs of text and label."""
    pairs = [(f"{name} {label} {word}", label) for label in "xy" for word in "klmnopqrst"[:rows]] + (more or [])
    return Corpus.from_pairs(name, *zip(*pairs, strict=True))


def told_of(corpora: list[Corpus], caplog: Logged) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO", "textmeta"):
        log_corpora(corpora, MixedEpisodes(corpora, 0).corpora)
    (message,) = caplog.messages
    return message.splitlines()


def test_what_is_left_out_of_a_corpus_is_told_with_its_reason(caplog: Logged) -> None:
    more = [("odd x k", "x"), ("odd x k", "x"), ("Hello, you!", "x"), ("hello YOU 2", "x"), ("odd x l", "y")]
    (line,) = told_of([corpus_of("odd", more=[*more, ("p", "z"), ("q", "z"), ("r", "u")])], caplog)
    left = "3 repeated; 1 of several classes; 3 of classes with fewer than 4"
    assert line == f"corpus odd: 18 texts, 4 classes; {left}; 1 {ALIKE} (not used: 'u', 'z')"
    (plain,) = told_of([corpus_of("plain")], caplog)
    assert plain == "corpus plain: 10 texts, 2 classes"


def test_letters_of_every_script_count(caplog: Logged) -> None:
    for pair, alike in (
        (("की बात", "का बात"), False),  # which differ in a vowel sign alone
        (("की बात?", "की  बात"), True),
        (("你好吗？", "你好吗"), True),
        (("你好吗", "你好"), False),
        (("Straße 5", "STRASSE 17"), True),
        (("3 + 4", "5 + 6"), False),  # no letter at all
        (("😀", "😡"), False),
    ):
        (line,) = told_of([corpus_of("c", more=[(text, "x") for text in pair])], caplog)
        assert (ALIKE in line) is alike, pair


def test_of_many_corpora_the_sum_and_the_odd_ones_are_told(caplog: Logged) -> None:
    plain = [corpus_of(chr(97 + number) * 2) for number in range(21)]
    lines = told_of([*plain[:2]], caplog)
    assert [line.split(":")[0] for line in lines] == ["corpus aa", "corpus bb", "2 corpora"]
    shared = [(text.upper(), "x") for text in plain[0].texts[:3]]
    odd, small = corpus_of("odd", more=[("Odd x k!", "x"), ("odd - x k", "x")]), corpus_of("small", more=[("t", "z")])
    lines = told_of([*plain, odd, small, corpus_of("zz", more=shared)], caplog)
    assert [line.split(":")[0] for line in lines] == ["corpus odd", "corpus small", "24 corpora"]
    assert lines[-1] == (
        f"24 corpora: 246 texts, 49 classes; 1 of classes with fewer than 4; 2 {ALIKE}; 3 in several corpora, {ALIKE}"
    )


def test_held_out_texts_that_are_trained_on_are_counted_by_corpus(caplog: Logged) -> None:
    one, two, apart = corpus_of("one"), corpus_of("two"), corpus_of("apart")
    warn_of_overlap([one, two], [apart], "test on")
    warn_of_overlap([one, two], [], "test on")
    assert not caplog.records
    held = corpus_of("held", more=[(f"{text}!", "x") for text in [*one.texts[:2], *two.texts[:3]]])
    warn_of_overlap([one, two], [apart, one.restrict(["x"]), held], "test on")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [
        f"held out to test on, but trained on, too, {ALIKE}: "
        "5 of 15 of held (3 in two, 2 in one); 5 of 5 of one (5 in one)"
    ]
