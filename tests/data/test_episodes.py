"""Episodes as benchmarks draw them, and as training does: mixed."""

import hashlib
from dataclasses import astuple, replace
from itertools import islice, pairwise

import numpy as np
import pytest

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import OUTSIDE, Episode, EpisodeSampler, EpisodeSettings
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.errors import DataError, SettingsError


def numbered(name: str = "numbered", classes: int = 6, rows: int = 12) -> Corpus:
    """Texts that tell their class: "name 3 7" is row 7 of class 3."""
    pairs = [(f"{name} {c} {row}", f"{name} {c}") for row in range(rows) for c in range(classes)]
    return Corpus.from_pairs(name, [text for text, _ in pairs], [label for _, label in pairs])


def content(e: Episode) -> tuple:
    return e.corpus, e.class_names, e.support_texts, tuple(e.support_labels), e.query_texts, tuple(e.query_labels)


def shots_of(episode: Episode) -> list[int]:
    return np.bincount(episode.support_labels).tolist()


def test_episode_has_the_ways_shots_and_queries_asked_for() -> None:
    # 5 + 7 uses up every row of a class: an overlap of the sets could not be missed
    for episode in EpisodeSampler(numbered(rows=12), EpisodeSettings(4, 5, 7), seed=0).take(20):
        texts = episode.support_texts + episode.query_texts
        labels = [*episode.support_labels, *episode.query_labels]
        assert episode.ways == len(set(episode.class_names)) == 4
        assert shots_of(episode) == [5] * 4
        assert np.bincount(episode.query_labels).tolist() == [7] * 4
        assert len(set(texts)) == len(texts) == len(labels) == 48
        assert [text.rpartition(" ")[0] for text in texts] == [episode.class_names[label] for label in labels]
        assert episode.support_labels.dtype == episode.query_labels.dtype == np.int64


def test_episode_is_the_same_whatever_was_drawn_before() -> None:
    settings = EpisodeSettings((2, 5), (1, 4), (1, 3))
    used = EpisodeSampler(numbered(), settings, seed=5)
    forward = [content(used[index]) for index in range(10)]
    assert [content(used[index]) for index in reversed(range(10))] == forward[::-1]
    assert content(EpisodeSampler(numbered(), settings, seed=5)[9]) == forward[9]
    assert [content(episode) for episode in used.take(4, start=6)] == forward[6:]


def digest() -> str:
    settings = EpisodeSettings((2, 5), (1, 4), (1, 3))
    episodes = EpisodeSampler([numbered("a"), numbered("b")], settings, seed=7).take(20)
    return hashlib.sha256(repr([content(episode) for episode in episodes]).encode()).hexdigest()


def test_episodes_never_change_with_the_code() -> None:
    """Results of benchmarks are paired with those recorded earlier, names or not."""
    assert digest() == "fa524c5fc4bd6fbabd90f4243941bf5de152c660d8ab8edd578e78a0ea39080b"
    settings = EpisodeSettings((3, 8), (0, 3), (1, 3), label_names=1.0)
    episodes = EpisodeSampler([numbered("a"), numbered("b")], settings, seed=3).take(20, start=5)
    drawn = repr([(content(episode), episode.label_names) for episode in episodes])
    expected = "6516bcf552ba96cca62d92570c5ff342ca6ac8d04197b28a37c3070471ebd1f5"
    assert hashlib.sha256(drawn.encode()).hexdigest() == expected


def test_negative_index_is_an_error(sampler: EpisodeSampler) -> None:
    with pytest.raises(IndexError, match="-1"):
        sampler[-1]


def test_all_classes_where_there_are_fewer_than_ways() -> None:
    episodes = EpisodeSampler(numbered(classes=3), EpisodeSettings(5, 2, 2), seed=0).take(5)
    assert all(sorted(episode.class_names) == ["numbered 0", "numbered 1", "numbered 2"] for episode in episodes)


def test_corpora_that_are_too_small_are_errors() -> None:
    with pytest.raises(DataError, match="'small' has 1 classes, expected at least 2"):
        EpisodeSampler([numbered(), numbered("small", classes=1)], EpisodeSettings(3, 2, 2), seed=0)
    short = Corpus.from_pairs("short", list("abcdefg"), ["x", "x", "x", "x", "y", "y", "y"])
    with pytest.raises(DataError, match="'short', class 'y' has 3 rows, but 2 shots and 2 queries need 4"):
        EpisodeSampler(short, EpisodeSettings(2, (1, 2), 2), seed=0)
    with pytest.raises(DataError, match="no corpus"):
        EpisodeSampler([], EpisodeSettings(), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 1}, "^ways must be a number or a pair low <= high of at least 2, given 1"),
        ({"ways": (5, 2)}, "^ways must be"),
        ({"shots": 0}, "^shots must be"),
        ({"shots": (0, 3), "label_names": 0.9}, r"^shots must be .* given \(0, 3\); 0 shots need label_names 1$"),
        ({"shots": -1, "label_names": 1.0}, "^shots must be"),
        ({"queries": (4, 3)}, "^queries must be"),
        ({"label_names": 1.1}, "^label_names must be a number from 0 to 1, given 1.1"),
        ({"label_names": float("nan")}, "^label_names must be a number"),
    ],
)
def test_bad_setting_is_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        EpisodeSettings(**settings)


def test_share_of_episodes_has_names() -> None:
    corpus = Corpus.from_pairs("x", [f"{c} {row}" for row in range(6) for c in "ab"], ["LostCard", "my_balance"] * 6)
    samplers = [EpisodeSampler(corpus, EpisodeSettings(2, 2, 2, label_names=share), seed=0) for share in (0, 0.3, 1)]
    none, some, all_ = (sampler.take(400) for sampler in samplers)
    assert all(episode.label_names is None for episode in none)
    words = {"LostCard": "lost card", "my_balance": "my balance"}
    for episode in all_:
        assert episode.label_names == tuple(words[name] for name in episode.class_names)
    # 120 expected, with a standard deviation of 9
    assert 80 < sum(episode.label_names is not None for episode in some) < 160
    assert all(a.label_names in (None, b.label_names) for a, b in zip(some, all_, strict=True))
    assert [content(e) for e in none] == [content(e) for e in some] == [content(e) for e in all_], "texts are the same"


def test_a_class_may_have_a_name_and_no_examples() -> None:
    settings = EpisodeSettings(4, (0, 2), 2, label_names=1.0)
    episodes = EpisodeSampler(numbered(), settings, seed=0).take(30)
    counts = [np.bincount(episode.support_labels, minlength=4) for episode in episodes]
    assert {int(shots) for part in counts for shots in part} == {0, 1, 2}
    for episode in EpisodeSampler(numbered(), replace(settings, shots=0), seed=0).take(3):
        assert episode.support_texts == ()
        assert episode.support_labels.dtype == np.int64
        assert len(episode.query_texts) == 8
        assert len(episode.label_names) == 4


# Mixed episodes


CORPORA = (numbered("many", 30, 30), numbered("two", 2, 40), numbered("small", 8, 5))
COUNT = 2000


def all_of(episode: Episode) -> tuple:
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


def test_mixed_episodes_never_change_with_the_code() -> None:
    episodes = MixedEpisodes(CORPORA, seed=3, unlabelled=0.5, outside=0.15)
    drawn = repr([all_of(episode) for episode in islice(episodes, 60)])
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


def test_names_of_mixed_episodes_are_words() -> None:
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
        assert all_of(one)[:-1] == all_of(two)[:-1]
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
