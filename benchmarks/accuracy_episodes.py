"""The corpora of a folder, their folds, and the episodes of each cell of the accuracy tables."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from textmeta.data.class_splits import read_class_split
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.data.labels import readable_name
from textmeta.errors import DataError

__all__ = ["OUTSIDE", "PARTS", "Cell", "Corpora", "ScopeCell", "with_names"]

# all episodes start from this seed; recipes/meta_train.py tests on the same ones with its own default
EPISODE_SEED = 2
QUERIES = 5  # of a class
DEAR = {"20news": 200}  # episodes of corpora whose texts are long; all others have 600
PARTS = ("classes", "all_way", "corpora", "curve", "scope")  # their cells: Corpora.cells
# of the parts with folds: ways (0 for all), shots, episodes
FOLDED = {"classes": (5, (1, 5), 600), "all_way": (0, (1, 5, 10), 50)}
CORPORA_SHOTS, CURVE_SHOTS = (1, 5, 10), (0, 1, 2, 5, 10, 20, 50)
FEW_CLASSES = 6  # the curve is over all classes of a corpus with at most so many
# of the part scope, by setting: ways, shots, episodes; "left-out" draws twice the ways, and leaves out the second half
SCOPE = {"oos": (0, (1, 5, 10), 20), "left-out": (5, (1, 5, 10), 100)}
OOS = {"clinc150": "clinc150_oos"}  # corpora that come with texts of no class
OUTSIDE = -1  # label of a query that belongs to none of an episode's classes
OUTSIDE_DRAW = 1  # third number of the seed that outside texts are drawn by: the sampler's own seeds have two


@dataclass(frozen=True)
class Cell:
    """What a method is scored on: a row of a table, or one fold of it.

    Args:
        part: of the benchmark.
        corpus: its name.
        fold: whose test classes are drawn from; None where the whole corpus is unseen.
        ways: classes of an episode; 0 for all.
        shots: support examples of a class.
        episodes: how many.
    """

    part: str
    corpus: str
    fold: str | None
    ways: int
    shots: int
    episodes: int


@dataclass(frozen=True)
class ScopeCell(Cell):
    """A cell of the part scope, of whose queries half are from outside.

    Args:
        setting: where the outside texts come from: "oos" from what comes with the corpus, "left-out" from other test
            classes of the same fold.
    """

    setting: str


class Corpora:
    """The corpora of a folder: NAME.jsonl, and NAME.splits.json of those with folds.

    Args:
        folder: with the files.
        rows: texts of a class that are used; None for all. Texts of no class are always used.
    """

    def __init__(self, folder: Path, rows: int | None = None) -> None:
        self.folder = folder
        self.rows = rows
        self.corpus = cache(self._load)
        self.outside = cache(self._load_outside)

    @cached_property
    def names(self) -> list[str]:
        """All corpora of the folder."""
        names = sorted(path.stem for path in self.folder.glob("*.jsonl"))
        if not names:
            raise DataError(f"{self.folder} has no NAME.jsonl")
        return names

    @property
    def folded(self) -> list[str]:
        """Those that have folds."""
        return [name for name in self.names if self._splits(name).exists()]

    def folds(self, name: str) -> list[str]:
        """Return the names of a corpus's folds."""
        return sorted(json.loads(self._splits(name).read_text(encoding="utf-8")))

    def part(self, name: str, fold: str, part: str) -> Corpus:
        """Return the train, valid or test classes of a fold."""
        return self.corpus(name).restrict(getattr(read_class_split(self._splits(name), fold), part))

    def reported(self, cell: Cell) -> Corpus:
        """Return the classes that a cell's episodes are drawn from."""
        return self.corpus(cell.corpus) if cell.fold is None else self.part(cell.corpus, cell.fold, "test")

    def sources(self, cell: Cell) -> list[Corpus]:
        """Return the corpora that hold all texts of a cell's episodes."""
        sources = [self.corpus(cell.corpus)]
        if isinstance(cell, ScopeCell) and cell.setting == "oos":
            sources.append(self.outside(cell.corpus))
        return sources

    def has_outside(self, name: str) -> bool:
        """Whether texts of no class come with a corpus."""
        return name in OOS and self._outside_path(name).exists()

    def episodes(self, cell: Cell) -> list[Episode]:
        """Return the episodes of a cell; those of the part scope have queries labelled :data:`OUTSIDE`.

        Raises:
            DataError: if there are too few texts, or too few classes to leave some out.
        """
        corpus = self.reported(cell)
        if isinstance(cell, ScopeCell) and cell.setting == "left-out":
            twice = EpisodeSettings(2 * cell.ways, cell.shots, QUERIES)
            return [_leave_out(e, cell.ways) for e in EpisodeSampler(corpus, twice, EPISODE_SEED).take(cell.episodes)]
        ways = cell.ways or len(corpus.class_names)
        settings = EpisodeSettings(ways, max(cell.shots, 1), QUERIES, at_most=True)
        episodes = EpisodeSampler(corpus, settings, EPISODE_SEED).take(cell.episodes)
        if isinstance(cell, ScopeCell):
            outside = self.outside(cell.corpus)
            return [_with_outside(episode, number, outside) for number, episode in enumerate(episodes)]
        return (
            episodes
            if cell.shots
            else [replace(e, support_texts=(), support_labels=e.support_labels[:0]) for e in episodes]
        )

    def cells(
        self, part: str, corpora: Sequence[str], folds: Sequence[str], unseen: Sequence[str], episodes: int | None
    ) -> Iterator[Cell]:
        """Yield the cells of a part.

        Args:
            part: of the benchmark.
            corpora: names of those that are used.
            folds: likewise.
            unseen: corpora that are for reporting alone, as wholes.
            episodes: of each cell, instead of the protocol's numbers.
        """
        for name in corpora:
            count = episodes or DEAR.get(name, 600)
            if part in FOLDED and name in self.folded:
                ways, shots_of, usual = FOLDED[part]
                for fold in [fold for fold in self.folds(name) if fold in folds]:
                    for shots in shots_of:
                        yield Cell(part, name, fold, ways, shots, min(episodes or usual, usual))
            elif part == "corpora" and name in unseen:
                for shots in CORPORA_SHOTS:
                    yield Cell(part, name, None, 5, shots, count)
            elif part == "curve" and name in unseen:
                few = len(self.corpus(name).class_names) <= FEW_CLASSES
                for shots in CURVE_SHOTS:
                    yield Cell(part, name, None, 0 if few else 5, shots, count)
            elif part == "scope" and name in self.folded:
                for fold in [fold for fold in self.folds(name) if fold in folds]:
                    for setting, (ways, shots_of, usual) in SCOPE.items():
                        for shots in shots_of if setting != "oos" or name in OOS else ():
                            yield ScopeCell(part, name, fold, ways, shots, min(episodes or usual, usual), setting)

    def _load(self, name: str) -> Corpus:
        corpus = load_corpus(CorpusSettings(str(self.folder / f"{name}.jsonl")))
        if self.rows is None:
            return corpus
        kept = [row for number in range(len(corpus.class_names)) for row in corpus.rows_of(number)[: self.rows]]
        return Corpus(name, [corpus.texts[row] for row in kept], corpus.labels[kept], corpus.class_names)

    def _load_outside(self, name: str) -> Corpus:
        """Load the texts of no class that come with a corpus: the test rows, where rows say of which split they are."""
        path = self._outside_path(name)
        if not path.exists():
            raise DataError(f"there is no {path.name}")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = list(dict.fromkeys(row["text"] for row in rows if row.get("split", "test") == "test"))
        return Corpus.from_pairs(path.stem, texts, ["oos"] * len(texts))

    def _outside_path(self, name: str) -> Path:
        return self.folder / f"{OOS[name]}.jsonl"

    def _splits(self, name: str) -> Path:
        return self.folder / f"{name}.splits.json"


def _with_outside(episode: Episode, number: int, outside: Corpus) -> Episode:
    """Return an episode with as many further queries, of no class, as it has; a pure function of its number."""
    count = len(episode.query_texts)
    if count > len(outside):
        raise DataError(f"{outside.name} has {len(outside)} texts, but an episode needs {count}")
    rows = np.random.default_rng((EPISODE_SEED, number, OUTSIDE_DRAW)).choice(len(outside), count, replace=False)
    return replace(
        episode,
        query_texts=(*episode.query_texts, *(outside.texts[row] for row in rows)),
        query_labels=np.concatenate([episode.query_labels, np.full(count, OUTSIDE)]),
    )


def _leave_out(episode: Episode, ways: int) -> Episode:
    """Return an episode of the first so many classes; the queries of the others are from outside."""
    kept = np.flatnonzero(episode.support_labels < ways)
    return replace(
        episode,
        class_names=episode.class_names[:ways],
        support_texts=tuple(episode.support_texts[row] for row in kept),
        support_labels=episode.support_labels[kept],
        query_labels=np.where(episode.query_labels < ways, episode.query_labels, OUTSIDE),
    )


def with_names(episodes: Sequence[Episode]) -> list[Episode]:
    """Return the same episodes, with the names of their classes as words."""
    return [replace(e, label_names=tuple(map(readable_name, e.class_names))) for e in episodes]
