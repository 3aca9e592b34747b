"""What is told of corpora before training."""

from tests.given import Logged
from textmeta.data.corpus import Corpus
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.data.overview import log_corpora, warn_of_overlap

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
