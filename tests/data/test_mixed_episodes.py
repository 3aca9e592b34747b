import hashlib
from dataclasses import astuple
from itertools import islice, pairwise

import numpy as np
import pytest

from tests.data.test_episodes import numbered
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.errors import DataError, SettingsError

CORPORA = (numbered("many", 30, 30), numbered("two", 2, 40), numbered("small", 8, 5))
COUNT = 2000


def content(episode: Episode) -> tuple:
    return tuple(tuple(part.tolist()) if isinstance(part, np.ndarray) else part for part in astuple(episode))


def class_of(text: str) -> str:
    return text.rpartition(" ")[0]


def parts_of(episode: Episode) -> list[list[str]]:
    """Classes of the corpus that each way is made of."""
    return [name.split(" or ") for name in episode.class_names]


def words_of(episode: Episode) -> tuple[str, ...]:
    return tuple(" or ".join(parts) for parts in parts_of(episode))  # names of these corpora are words already


def kind_of(episode: Episode) -> str:
    if episode.label_names is None:
        return "none"
    if episode.label_names == words_of(episode):
        return "true" if episode.support_texts else "zero-shot"
    return "permuted" if sorted(episode.label_names) == sorted(words_of(episode)) else "codes"


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return list(islice(MixedEpisodes(CORPORA, seed=0, outside=0.15), COUNT))


def test_episodes_never_change_with_the_code() -> None:
    episodes = MixedEpisodes(CORPORA, seed=3, unlabelled=0.5, outside=0.15)
    drawn = repr([content(episode) for episode in islice(episodes, 60)])
    expected = "cfa04f50e4650b890e6752bf32058b30560150d09d6a08f89f08617179ee6c10"
    assert hashlib.sha256(drawn.encode()).hexdigest() == expected


def test_no_text_is_in_two_sets_and_queries_are_shuffled(episodes: list[Episode]) -> None:
    for episode in episodes:
        texts = episode.support_texts + episode.query_texts + episode.unlabelled_texts
        assert len(set(texts)) == len(texts)
    assert all(any(a > b for a, b in pairwise(e.query_labels)) for e in episodes if e.ways > 4)


def test_labels_name_the_class_of_their_texts(episodes: list[Episode]) -> None:
    for episode in episodes:
        parts = parts_of(episode)
        labels = [*episode.support_labels, *episode.query_labels]
        for text, label in zip(episode.support_texts + episode.query_texts, labels, strict=True):
            if label == OUTSIDE:
                assert not any(class_of(text) in part for part in parts)
            else:
                assert class_of(text) in parts[label]


def test_names_are_words() -> None:
    corpus = Corpus.from_pairs("x", [f"{c} {row}" for row in range(6) for c in "ab"], ["LostCard", "my_balance"] * 6)
    drawn = list(islice(MixedEpisodes([corpus], seed=0, names=1.0), 60))
    words = {"LostCard": "lost card", "my_balance": "my balance"}
    assert any(e.label_names == tuple(words[name] for name in e.class_names) for e in drawn)
    assert any(e.label_names == tuple(words[name] for name in e.class_names[::-1]) for e in drawn)


def test_shares_change_no_other_text() -> None:
    plain = list(islice(MixedEpisodes(CORPORA, 0, names=0, unlabelled=0), 200))
    unlabelled = list(islice(MixedEpisodes(CORPORA, 0, names=0, unlabelled=1), 200))
    named = list(islice(MixedEpisodes(CORPORA, 0, names=1, unlabelled=0), 200))
    assert not any(e.unlabelled_texts or e.label_names for e in plain)
    assert all(e.unlabelled_texts or e.corpus == "small" for e in unlabelled)
    for one, two, three in zip(plain, unlabelled, named, strict=True):
        assert content(one)[:-1] == content(two)[:-1]
        assert (one.class_names, one.query_texts) == (three.class_names, three.query_texts)
        assert set(three.support_texts) <= set(one.support_texts)
        if kind_of(three) in ("permuted", "codes"):
            assert three.support_texts == one.support_texts


def test_classes_with_too_few_texts_of_their_own_are_left_out() -> None:
    # y has five rows, but one text twice and one that is also of x; of z's four texts all are different
    texts = [*"abcdef", *"ghiia", *"klmn"]
    corpus = Corpus.from_pairs("odd", texts, [*"xxxxxx", *"yyyyy", *"zzzz"])
    for episode in islice(MixedEpisodes([corpus], seed=0, outside=0.15), 30):
        assert sorted(episode.class_names) == ["x", "z"]
        assert not {*episode.support_texts, *episode.query_texts, *episode.unlabelled_texts} & {*"aghi"}
    with pytest.raises(DataError, match=r"'odd' has 1 classes with at least 4 different texts .*expected at least 2"):
        MixedEpisodes([numbered(), corpus.restrict(["x", "y"])], seed=0)


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(DataError, match="no corpus"):
        MixedEpisodes([], seed=0)
    for wrong in ({"seed": -1}, {"names": 1.1}, {"unlabelled": float("nan")}, {"outside": -0.1}):
        with pytest.raises(SettingsError, match=f"^{next(iter(wrong))} must be .* given"):
            MixedEpisodes(CORPORA, **{"seed": 0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="-1"):
        MixedEpisodes(CORPORA, seed=0)[-1]
