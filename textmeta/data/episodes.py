"""Episodes: small classification tasks drawn from a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textmeta.data.corpus import Corpus
from textmeta.data.labels import number, readable_name, whole_number
from textmeta.errors import DataError, SettingsError

OUTSIDE = -1  # label of a query that belongs to none of an episode's classes


@dataclass(frozen=True)
class EpisodeSettings:
    """What episodes look like. A pair is a range: each episode draws its own number from it, both ends included.

    Args:
        ways: classes in an episode; of a corpus with fewer, all.
        shots: support examples of a class.
        queries: query examples of a class.
        label_names: share of the episodes whose support sets come with the names of their classes. At 1, shots may
            start from 0.
    """

    ways: int | tuple[int, int] = 5
    shots: int | tuple[int, int] = 5
    queries: int | tuple[int, int] = 5
    label_names: float = 0.0

    def __post_init__(self) -> None:
        number("label_names", self.label_names, 0, 1)
        for name, least in (("ways", 2), ("shots", 0 if self.label_names == 1 else 1), ("queries", 1)):
            try:
                low, high = bounds(getattr(self, name))
            except (TypeError, ValueError):
                low, high = 0, -1
            if not least <= low <= high:
                told = f"a number or a pair low <= high of at least {least}, given {getattr(self, name)!r}"
                more = "; 0 shots need label_names 1" if name == "shots" and low == 0 <= high else ""
                raise SettingsError(f"{name} must be {told}{more}")


def bounds(given: int | Sequence[int]) -> tuple[int, int]:
    """Return a number or a range as (low, high)."""
    low, high = (given, given) if isinstance(given, int) else given
    return low, high


@dataclass(frozen=True, eq=False)
class Episode:
    """A task (label set and support set) and the query set that judges it."""

    corpus: str  # its name
    class_names: tuple[str, ...]  # of the ways, in the order of the labels
    support_texts: tuple[str, ...]
    support_labels: np.ndarray  # (support,) int64, index into class_names
    query_texts: tuple[str, ...]  # shuffled
    query_labels: np.ndarray  # (query,) int64; OUTSIDE for a text that belongs to none of the classes
    label_names: tuple[str, ...] | None = None  # class_names as words, where the support set comes with names
    unlabelled_texts: tuple[str, ...] = ()  # of the same source, in neither set

    @property
    def ways(self) -> int:
        """Number of classes."""
        return len(self.class_names)


class EpisodeSampler:
    """Draws episodes. Episode ``i`` is a pure function of (corpora, settings, seed, i).

    So any process can make any episode, in any order. With several corpora, each episode first draws its corpus, all
    equally likely; its classes then come from that corpus alone. DataError if a corpus has fewer than two classes, or a
    class fewer rows than the most shots and queries.
    """

    def __init__(self, corpora: Corpus | Sequence[Corpus], settings: EpisodeSettings, seed: int) -> None:
        self.corpora = (corpora,) if isinstance(corpora, Corpus) else tuple(corpora)
        self.settings = settings
        self.seed = whole_number("seed", seed, 0)
        if not self.corpora:
            raise DataError("no corpus to draw episodes from")
        shots, queries = bounds(settings.shots)[1], bounds(settings.queries)[1]
        for corpus in self.corpora:
            if len(corpus.class_names) < 2:
                raise DataError(f"corpus {corpus.name!r} has {len(corpus.class_names)} classes, expected at least 2")
            for index, name in enumerate(corpus.class_names):
                if (rows := len(corpus.rows_of(index))) < shots + queries:
                    told = f"{rows} rows, but {shots} shots and {queries} queries need {shots + queries}"
                    raise DataError(f"corpus {corpus.name!r}, class {name!r} has {told}")

    def __getitem__(self, index: int) -> Episode:
        """Return episode ``index`` (0, 1, 2, … without end)."""
        if index < 0:
            raise IndexError(f"episodes are numbered from 0, asked for {index}")
        rng = np.random.default_rng((self.seed, index))
        corpus = self.corpora[rng.integers(len(self.corpora))]
        settings = self.settings
        ways = min(_draw(rng, settings.ways), len(corpus.class_names))
        classes = rng.choice(len(corpus.class_names), size=ways, replace=False)
        queries = _draw(rng, settings.queries)
        shots = _draw(rng, settings.shots)

        support_rows, query_rows = [], []
        for class_index in classes:
            rows = rng.choice(corpus.rows_of(class_index), size=shots + queries, replace=False)
            support_rows.append(rows[:shots])
            query_rows.append(rows[shots:])
        support_labels = np.repeat(np.arange(ways), shots)
        query_labels = np.repeat(np.arange(ways), queries)
        order = rng.permutation(len(query_labels))
        named = rng.random() < settings.label_names  # drawn last: texts are the same whatever the share
        class_names = tuple(corpus.class_names[c] for c in classes)
        return Episode(
            corpus=corpus.name,
            class_names=class_names,
            support_texts=tuple(corpus.texts[row] for row in np.concatenate(support_rows)),
            support_labels=support_labels,
            query_texts=tuple(corpus.texts[row] for row in np.concatenate(query_rows)[order]),
            query_labels=query_labels[order],
            label_names=tuple(map(readable_name, class_names)) if named else None,
        )

    def take(self, count: int, start: int = 0) -> list[Episode]:
        """Return episodes ``start`` to ``start + count - 1``."""
        return [self[index] for index in range(start, start + count)]


def _draw(rng: np.random.Generator, given: int | Sequence[int]) -> int:
    low, high = bounds(given)
    return int(rng.integers(low, high + 1))
