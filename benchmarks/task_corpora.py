"""The corpora of the task-embedding experiment, and who sees which of their classes."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings

__all__ = ["TRAINED", "UNSEEN", "Corpora", "episodes_of", "load_corpora"]

TRAINED = ("banking77", "clinc150", "stackoverflow", "dbpedia14", "snips")
UNSEEN = ("huffpost", "20news", "trec6", "tweeteval_emotion")
FOLD = "01"


@dataclass(frozen=True)
class Corpora:
    """Corpora by name.

    Args:
        train: classes to train on, and to choose by when their corpus is left out.
        held_out: the other classes of the same corpora.
        unseen: all classes of corpora that are for reporting alone.
    """

    train: dict[str, Corpus]
    held_out: dict[str, Corpus]
    unseen: dict[str, Corpus]

    @property
    def test(self) -> dict[str, Corpus]:
        """What figures are reported on."""
        return {**self.held_out, **self.unseen}


def load_corpora(folder: Path, rows: int) -> Corpora:
    """Load NAME.jsonl of every corpus, and NAME.splits.json of those that have one.

    Test classes are those of fold 01, or the second half of the shuffled classes of a corpus without folds.

    Args:
        folder: with the files.
        rows: texts of a class that are used, drawn at random.
    """
    train, held_out, unseen = {}, {}, {}
    for name in (*TRAINED, *UNSEEN):
        corpus = _thinned(load_corpus(CorpusSettings(str(folder / f"{name}.jsonl"))), rows)
        if name in UNSEEN:
            unseen[name] = corpus
            continue
        splits = folder / f"{name}.splits.json"
        if splits.exists():
            fold = json.loads(splits.read_text(encoding="utf-8"))[FOLD]
            first, second = fold["train"], fold["test"]
        else:
            order = np.random.default_rng(0).permutation(len(corpus.class_names))
            names = [corpus.class_names[index] for index in order]
            first, second = names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]
        train[name], held_out[name] = corpus.restrict(first), corpus.restrict(second)
    return Corpora(train, held_out, unseen)


def episodes_of(corpora: dict[str, Corpus], shots: int, count: int, seed: int) -> dict[str, list[Episode]]:
    """Return episodes of 5 ways (all classes, where there are fewer) and 5 queries a class, by corpus."""
    settings = EpisodeSettings(5, shots, 5, at_most=True)
    return {name: EpisodeSampler(corpus, settings, seed).take(count) for name, corpus in corpora.items()}


def _thinned(corpus: Corpus, rows: int) -> Corpus:
    rng = np.random.default_rng(0)
    parts = [rng.permutation(corpus.rows_of(index))[:rows] for index in range(len(corpus.class_names))]
    kept = np.concatenate(parts)
    return Corpus(corpus.name, [corpus.texts[row] for row in kept], corpus.labels[kept], corpus.class_names)
