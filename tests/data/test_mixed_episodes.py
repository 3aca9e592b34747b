import hashlib
from collections import Counter
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


def near(number: int, share: float, count: int = COUNT) -> bool:
    """Whether a number is within four standard deviations of what is expected."""
    return abs(number - share * count) <= 4 * (share * (1 - share) * count) ** 0.5


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return list(islice(MixedEpisodes(CORPORA, seed=0, outside=0.15), COUNT))


def of_many(episodes: list[Episode]) -> list[Episode]:
    return [episode for episode in episodes if episode.corpus == "many"]


def test_episode_is_the_same_whatever_was_drawn_before() -> None:
    drawn = MixedEpisodes(CORPORA, seed=3)
    forward = [content(drawn[index]) for index in range(60)]
    assert [content(drawn[index]) for index in reversed(range(60))] == forward[::-1]
    assert [content(episode) for episode in islice(MixedEpisodes(CORPORA, seed=3), 40, 60)] == forward[40:]
    assert not set(forward) & {content(episode) for episode in islice(MixedEpisodes(CORPORA, seed=4), 60)}


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


def test_numbers_stay_in_their_limits(episodes: list[Episode]) -> None:
    for episode in episodes:
        assert 2 <= episode.ways <= 60
        assert len(episode.support_texts) == len(episode.support_labels) <= (60 if episode.ways <= 12 else 120)
        assert len(episode.query_texts) == len(episode.query_labels)
        queries = min(3, 60 // episode.ways)
        assert np.bincount(episode.query_labels + 1, minlength=1)[1:].tolist() == [queries] * episode.ways
        assert episode.support_labels.dtype == episode.query_labels.dtype == np.int64
        assert len(episode.unlabelled_texts) <= 40
        assert (np.diff(episode.support_labels) >= 0).all()
    few = [episode for episode in episodes if episode.ways <= 12]
    assert max(len(episode.support_texts) for episode in few) == 60
    assert {episode.ways for episode in of_many(few)} == set(range(2, 13))
    assert all(episode.ways == 2 for episode in episodes if episode.corpus == "two")
    assert all(episode.ways <= 8 for episode in episodes if episode.corpus == "small")


def test_labels_name_the_class_of_their_texts(episodes: list[Episode]) -> None:
    for episode in episodes:
        parts = parts_of(episode)
        labels = [*episode.support_labels, *episode.query_labels]
        for text, label in zip(episode.support_texts + episode.query_texts, labels, strict=True):
            if label == OUTSIDE:
                assert not any(class_of(text) in part for part in parts)
            else:
                assert class_of(text) in parts[label]


def test_shares_are_as_asked(episodes: list[Episode]) -> None:
    many = of_many(episodes)
    assert all(near(number, 1 / 3) for number in Counter(episode.corpus for episode in episodes).values())
    kinds = Counter(map(kind_of, many))
    assert near(sum(episode.ways > 12 for episode in many), 0.05, len(many))
    assert near(kinds["none"], 0.4, len(many))
    assert near(kinds["codes"], 0.1, len(many))
    assert near(kinds["zero-shot"], 0.1, len(many))
    assert near(kinds["permuted"], 0.1, len(many))
    assert near(sum(bool(episode.unlabelled_texts) for episode in many), 0.2, len(many))
    outside = [int((episode.query_labels == OUTSIDE).sum()) for episode in many]
    assert set(outside) == {0, 5}
    assert near(np.count_nonzero(outside), 0.15, len(many))
    assert near(sum(" or " in episode.class_names[0] for episode in many), 0.1, len(many))
    assert all((episode.query_labels >= 0).all() for episode in episodes if episode.corpus == "two")


def test_names_are_of_the_kind_drawn(episodes: list[Episode]) -> None:
    of_kind = {kind: [e for e in episodes if kind_of(e) == kind] for kind in ("permuted", "codes", "zero-shot")}
    assert all(len(drawn) > 20 for drawn in of_kind.values())
    for episode in of_kind["permuted"]:  # no class keeps its own
        assert all(given != own for given, own in zip(episode.label_names or (), words_of(episode), strict=True))
    for names in (episode.label_names or () for episode in of_kind["codes"]):
        assert len(set(names)) == len(names) > 1
        assert all(len(name) == 3 and name.isalpha() and name.islower() for name in names)
    assert all(e.support_labels.shape == (0,) for e in of_kind["zero-shot"])
    bare = [e for e in episodes if e.support_texts and len(set(e.support_labels.tolist())) < e.ways]
    assert len(bare) > 20
    assert {kind_of(episode) for episode in bare} == {"true"}


def test_names_are_words() -> None:
    corpus = Corpus.from_pairs("x", [f"{c} {row}" for row in range(6) for c in "ab"], ["LostCard", "my_balance"] * 6)
    drawn = list(islice(MixedEpisodes([corpus], seed=0, names=1.0), 60))
    words = {"LostCard": "lost card", "my_balance": "my balance"}
    assert any(e.label_names == tuple(words[name] for name in e.class_names) for e in drawn)
    assert any(e.label_names == tuple(words[name] for name in e.class_names[::-1]) for e in drawn)


def test_joined_classes_have_rows_of_all_their_classes(episodes: list[Episode]) -> None:
    joined = [episode for episode in episodes if " or " in episode.class_names[0]]
    for episode in joined:
        parts = parts_of(episode)
        assert {len(part) for part in parts} <= {2, 3}
        assert len({name for part in parts for name in part}) == sum(map(len, parts))
        if len(episode.support_texts) >= episode.ways and kind_of(episode) in ("none", "codes"):
            labelled = {class_of(text) for text in episode.support_texts + episode.query_texts}
            assert {name for part in parts for name in part} <= labelled
    assert {len(part) for episode in joined for part in parts_of(episode)} == {2, 3}
    assert all(e.ways <= 4 for e in joined if e.corpus == "small")
    assert not any(e.corpus == "two" for e in joined)


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


def test_classes_with_too_few_texts_of_their_own_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    # y has five rows, but one text twice and one that is also of x; of z's four texts all are different
    texts = [*"abcdef", *"ghiia", *"klmn"]
    corpus = Corpus.from_pairs("odd", texts, [*"xxxxxx", *"yyyyy", *"zzzz"])
    for episode in islice(MixedEpisodes([corpus], seed=0, outside=0.15), 30):
        assert sorted(episode.class_names) == ["x", "z"]
        assert not {*episode.support_texts, *episode.query_texts, *episode.unlabelled_texts} & {*"aghi"}
    (told,) = caplog.messages  # once, however many episodes are drawn
    assert told == "corpus odd: fewer than 4 different texts (in no other class) of 'y', left out of training"
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
