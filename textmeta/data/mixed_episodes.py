"""Episodes of every kind a user may have: what a general adapter is meta-trained on."""

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_lowercase

import numpy as np

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.data.labels import number, readable_name, whole_number
from textmeta.errors import DataError

MAX_WAYS = 12  # ways are drawn from 2 to this
MANY_WAYS, MANY = 60, 0.05  # and up to this in a share of the episodes of corpora that have more
QUERIES = 3  # queries of a class, but at most MAX_QUERIES in all
MAX_QUERIES = 60
MAX_SUPPORT, MANY_SUPPORT = 60, 120  # support texts of an episode, and of one of many ways; they bound its memory
SHOTS = (1, 1, 2, 3, 5, 5, 8, 10)  # shots of every class, all equally likely
UNEQUAL = 0.25  # share of episodes whose classes each draw their own shots, from 1 to MAX_UNEQUAL
MAX_UNEQUAL = 10
NAME_ALONE = 0.15  # chance of a class to have no example, where classes are unequal and come with true names
JOINED = 0.1  # share of episodes whose ways are 2 to 3 classes joined, where there are enough classes
NAMES = ("permuted", "codes", "zero-shot", "true", "true", "true")  # kinds of names, all equally likely
OUTSIDE_QUERIES = 5  # queries of an episode that belong to none of the classes, where there are such
UNLABELLED_PER_CLASS = 15  # unlabelled texts of a class, but for skewed ones
MAX_UNLABELLED = 40  # unlabelled texts of an episode
SKEW = 0.9  # share of skewed unlabelled texts that are of one class
MIXTURES = ("same", "skewed", "others")  # which classes unlabelled texts are of
MIXTURE_SHARES = (0.4, 0.3, 0.3)  # of the episodes with unlabelled texts


class MixedEpisodes:
    """Draws mixed episodes. Episode ``i`` is a pure function of (corpora, seed, i).

    They differ in ways, shots, names, unlabelled texts and queries of other classes; the constants above say how, and
    the arguments in which share of the episodes these three come. Each first draws its corpus, all equally likely.
    Texts that a corpus has in two classes are left out, and so are classes with too few other texts; DataError if fewer
    than two are left. Names, queries of other classes, which no training loss sees, and unlabelled texts have random
    numbers of their own: neither share changes another text of an episode, but names may take support texts away.
    """

    def __init__(
        self, corpora: Sequence[Corpus], seed: int, *, names: float = 0.6, unlabelled: float = 0.2, outside: float = 0.0
    ) -> None:
        if not corpora:
            raise DataError("no corpus to draw episodes from")
        self.corpora = tuple(map(_usable, corpora))
        self.seed = whole_number("seed", seed, 0)
        self.names = number("names", names, 0, 1)
        self.unlabelled = number("unlabelled", unlabelled, 0, 1)
        self.outside = number("outside", outside, 0, 1)

    def __getitem__(self, index: int) -> Episode:
        """Return episode ``index`` (0, 1, 2, … without end)."""
        if index < 0:
            raise IndexError(f"episodes are numbered from 0, asked for {index}")
        rng, names_rng, outside_rng, unlabelled_rng = np.random.default_rng((self.seed, index)).spawn(4)
        corpus = self.corpora[rng.integers(len(self.corpora))]
        n_classes = len(corpus.class_names)
        many = n_classes > MAX_WAYS and rng.random() < MANY
        ways = min(int(rng.integers(*((MAX_WAYS + 1, MANY_WAYS + 1) if many else (2, MAX_WAYS + 1)))), n_classes)
        queries = min(QUERIES, MAX_QUERIES // ways)
        order = rng.permutation(n_classes)
        joined = rng.random() < JOINED and n_classes >= 2 * ways
        sizes = rng.integers(2, 4, ways) if joined else np.ones(ways, dtype=np.int64)
        groups = [order[way::ways][:size] for way, size in enumerate(sizes)]
        pools = [interleaved(rng, [corpus.rows_of(c) for c in group]) for group in groups]

        most = (MANY_SUPPORT if many else MAX_SUPPORT) // ways
        shots = np.full(ways, min(rng.choice(SHOTS), most))
        unequal = rng.random() < UNEQUAL
        if unequal:
            shots = rng.integers(1, min(MAX_UNEQUAL, most) + 1, ways)
        shots = np.minimum(shots, [len(pool) - queries for pool in pools])
        # shuffled again, lest queries and support texts of joined classes be of one class each
        drawn = [rng.permutation(pool[: queries + n]) for pool, n in zip(pools, shots, strict=True)]
        left = [pool[queries + n :] for pool, n in zip(pools, shots, strict=True)]

        words = tuple(" or ".join(readable_name(corpus.class_names[c]) for c in group) for group in groups)
        label_names = None
        if names_rng.random() < self.names:
            label_names, has_examples = _draw_names(names_rng, words, unequal)
            shots = np.where(has_examples, shots, 0)

        others = [corpus.rows_of(c) for c in np.setdiff1d(order, np.concatenate(groups))]
        other_rows = outside_rng.permutation(np.concatenate([np.empty(0, dtype=np.int64), *others]))
        n_outside = OUTSIDE_QUERIES if outside_rng.random() < self.outside else 0
        query_rows = np.concatenate([*(rows[:queries] for rows in drawn), other_rows[:n_outside]])
        query_labels = np.full(len(query_rows), OUTSIDE)
        query_labels[: ways * queries] = np.repeat(np.arange(ways), queries)
        shuffled = outside_rng.permutation(len(query_rows))

        unlabelled_rows = np.empty(0, dtype=np.int64)
        if unlabelled_rng.random() < self.unlabelled:
            mixture = MIXTURES[unlabelled_rng.choice(len(MIXTURES), p=MIXTURE_SHARES)]
            # skewed ones are twice as many as a class's, whatever the number of classes
            most = MAX_UNLABELLED // (1 if mixture == "skewed" else ways)
            per_class = min(UNLABELLED_PER_CLASS, most)
            unlabelled_rows = draw_unlabelled(unlabelled_rng, left, other_rows[n_outside:], per_class, mixture)

        def texts(rows: np.ndarray) -> tuple[str, ...]:
            return tuple(corpus.texts[row] for row in rows)

        support = [rows[queries : queries + n] for rows, n in zip(drawn, shots, strict=True)]
        return Episode(
            corpus=corpus.name,
            class_names=words if joined else tuple(corpus.class_names[group[0]] for group in groups),
            support_texts=texts(np.concatenate(support)),
            support_labels=np.repeat(np.arange(ways), shots),
            query_texts=texts(query_rows[shuffled]),
            query_labels=query_labels[shuffled],
            label_names=label_names,
            unlabelled_texts=texts(unlabelled_rows),
        )


def _draw_names(rng: np.random.Generator, words: tuple[str, ...], unequal: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names an episode comes with, and (ways,) bool, which classes keep their examples."""
    ways, has_examples = len(words), np.ones(len(words), dtype=bool)
    match NAMES[rng.integers(len(NAMES))]:
        case "permuted":
            # a cycle: no class keeps its name, or a part of the names would be worth reading
            cycle = rng.permutation(ways)
            return tuple(words[way] for way in np.roll(cycle, 1)[cycle.argsort()]), has_examples
        case "codes":
            letters = np.transpose(np.unravel_index(rng.choice(26**3, ways, replace=False), (26, 26, 26)))
            return tuple("".join(ascii_lowercase[letter] for letter in code) for code in letters), has_examples
        case "zero-shot":
            return words, ~has_examples
    kept = rng.random(ways) >= NAME_ALONE
    return words, kept if unequal and kept.sum() >= 2 else has_examples


def draw_unlabelled(
    rng: np.random.Generator, pools: Sequence[np.ndarray], others: np.ndarray, per_class: int, mixture: str
) -> np.ndarray:
    """Return rows of unlabelled texts, shuffled: of what is left of each of an episode's classes, and of other classes.

    The mixture is "same", ``per_class`` of each class, or as many as there are; "skewed", twice as many in all, 90 % of
    one class and the rest evenly of the others; or "others", as "same", but half replaced by texts of other classes.
    """
    filled = [way for way, pool in enumerate(pools) if len(pool)]
    if mixture == "skewed" and filled:
        main, total = filled[rng.integers(len(filled))], 2 * per_class
        most = round(SKEW * total)
        rest = [pools[way] for way in rng.permutation(len(pools)) if way != main]
        parts = [rng.permutation(pools[main])[:most], interleaved(rng, rest)[: total - most]]
        return rng.permutation(np.concatenate(parts))
    own = rng.permutation(np.concatenate([rng.permutation(pool)[:per_class] for pool in pools]))
    if mixture == "others":
        foreign = rng.permutation(others)[: len(own) // 2]
        own = rng.permutation(np.concatenate([own[len(foreign) :], foreign]))
    return own


def interleaved(rng: np.random.Generator, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows of all parts, shuffled within each, one of each in turn: a start of them has all parts evenly."""
    turns = np.concatenate([np.arange(len(part)) for part in parts])
    return np.concatenate([rng.permutation(part) for part in parts])[np.argsort(turns, kind="stable")]


def _usable(corpus: Corpus) -> Corpus:
    """Return the corpus with different texts of one class each, and with classes of enough of them."""
    label_of: dict[str, int] = {}
    for text, label in zip(corpus.texts, corpus.labels.tolist(), strict=True):
        if label_of.setdefault(text, label) != label:
            label_of[text] = OUTSIDE  # of two classes: right and wrong at once
    labels = np.array(list(label_of.values()), dtype=np.int64)
    sizes = np.bincount(labels[labels != OUTSIDE], minlength=len(corpus.class_names))
    classes = np.flatnonzero(sizes > QUERIES)
    if len(classes) < 2:
        told = f"{len(classes)} classes with at least {QUERIES + 1} different texts (that are in no other class)"
        raise DataError(f"corpus {corpus.name!r} has {told}, expected at least 2")
    kept = np.isin(labels, classes)
    return replace(
        corpus,
        texts=[text for text, keep in zip(label_of, kept, strict=True) if keep],
        labels=np.searchsorted(classes, labels[kept]),
        class_names=tuple(corpus.class_names[c] for c in classes),
    )
